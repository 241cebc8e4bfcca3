"""Every error a user can meet, by what the program does about it.

    StreammergeError        this command could not do what was asked      exit 1
    +- ConfigError          the process does not start                    exit 2
    +- Damaged              our store does not verify; hands off          exit 3, not ready
    +- TryAgain             a source, server or disk; back off            exit 75 in one-shot commands
    |  +- Unable            the machine cannot do the work now; all work waits
    |  |  +- NoSpace        the disk is (nearly) full
    |  |  +- DiskFails      the disk returns errors, or can only be read
    |  |  +- NoMemory       memory that the work needs is not to be had
    |  +- Locked            another process changes this store now
    |  +- Stopped           a stop was asked for; the work is redone later
    |  +- Withheld          the place does not give this fine-tune out now; the queue goes on
    |  +- RateLimited       the place asks to be left alone for a while
    |  +- AnsweredWrong     a serving process answers, and not as the version it was told of should
    +- Refused              this fine-tune never goes in; recorded        the queue goes on
       +- Quarantined       unless a person lets it in

A message says what happened with the values; the hint says what to do next.
"""

from __future__ import annotations

MAX_SHOWN_CHARACTERS = 800


def shown(words: str) -> str:
    """Give words, some of which may be a stranger's, as one printable line of bounded length."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words[:10_000])
    return line if len(line) <= MAX_SHOWN_CHARACTERS else f"{line[: MAX_SHOWN_CHARACTERS - 1]}…"


class StreammergeError(Exception):
    """A command could not do what was asked."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        """`message` is one line with the values; `hint` is the next thing to do."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(StreammergeError):
    """The configuration, the base or the command line is wrong; nothing was started."""

    exit_code = 2


class Damaged(StreammergeError):
    """The store does not verify; nothing is touched until a person has looked."""

    exit_code = 3


class TryAgain(StreammergeError):
    """Something outside is not available now; the same step is tried again later."""

    exit_code = 75

    def __init__(self, message: str, *, hint: str = "") -> None:
        """`message` may quote what is outside."""
        super().__init__(shown(message), hint=hint)


class Unable(TryAgain):
    """The machine cannot do the work now; the same work is tried again when it can."""


class NoSpace(Unable):
    """There is not enough free disk space for the next step."""


class DiskFails(Unable):
    """The disk does not do what it is told: it returns errors, or can only be read."""


class NoMemory(Unable):
    """Memory that the next step needs is not to be had."""


class Locked(TryAgain):
    """Another process holds the store's writer lock."""


class NoDeviceMemory(TryAgain):
    """The GPU's memory did not suffice; it goes on with less of it."""


class Stopped(TryAgain):
    """A stop was asked for in the middle of work that leaves no trace."""


class Withheld(TryAgain):
    """A place that can be seen does not give something out now: it is gone, gated, disabled or moved.

    `reason` is that word. A state of the fine-tune, no failure of its source.
    """

    def __init__(self, reason: str, message: str, *, hint: str = "") -> None:
        """`reason` is the stable word; `message` the sentence with the values."""
        super().__init__(message, hint=hint)
        self.reason = reason


class RateLimited(TryAgain):
    """A place asks to be left alone for `seconds`."""

    def __init__(self, seconds: float) -> None:
        """`seconds` as the place says."""
        super().__init__(
            f"the rate limit is reached; no request until {seconds:.0f} s have passed",
            hint="poll less often, or give a token, which has a limit of its own",
        )
        self.seconds = seconds


class AnsweredWrong(TryAgain):
    """A serving process was reached, and does not serve the version it was told of as that should be served.

    Unlike one that cannot be reached, it may say something about the version.
    """


class Refused(StreammergeError):
    """This fine-tune never goes in as it is.

    `reason` is one of `streammerge.screen.REASONS`: short, stable, used in logs and metrics.
    """

    def __init__(self, reason: str, message: str, *, hint: str = "") -> None:
        """`reason` is the stable word; `message` the sentence with the values, which may quote a stranger."""
        super().__init__(shown(message), hint=hint)
        self.reason = reason


class Quarantined(Refused):
    """This fine-tune is set aside until a person decides."""
