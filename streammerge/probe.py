"""One request to what serves, after it was told of a version: does it answer as that version should?

That it took the weights is its own word. A probe looks at what it does: it cannot be reached, which says
nothing about the version; or it answers, right or wrong.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from streammerge import programs, web
from streammerge.config.targets import Matching
from streammerge.errors import AnsweredWrong, TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.config.targets import Probe, Serving
    from streammerge.targets import Told

LATER = 75
NO_ANSWER = (401, 403, 429, 502, 503, 504)  # of a proxy, or of one that is busy: not of the model
WRONG = "`streammerge targets test` asks again; see `probe` in docs/targets.md"


def ask(part: Serving, told: Told, beat: Callable[[], None]) -> None:
    """Ask what the target's `probe` says, if it has one; return if the answer is right.

    Raises TryAgain where there is no answer, AnsweredWrong where it is not the expected one.
    """
    if (probe := part.probe) is None:
        return
    words = {
        "{label}": told.label,
        "{version}": str(told.version),
        "{digest}": told.digest,
        "{path}": part.sees(told.snapshot),
    }
    content = b""
    if probe.url:
        answer = _request(probe, words, beat)
        if wrong := _what_is_wrong(probe, words, answer):
            raise AnsweredWrong(f"{answer.url} does not answer as {told.label}: {wrong}", hint=WRONG)
        content = answer.content
    if probe.argv:
        _have_judged(probe, words, told.variables(words["{path}"]), content, beat)


def _request(probe: Probe, words: dict[str, str], beat: Callable[[], None]) -> web.Answer:
    headers = {name.lower(): _filled(text, words) for name, text in probe.headers.items()}
    content = None
    if probe.send is not None:
        sent = _filled(probe.send, words)
        content = (sent if isinstance(sent, str) else json.dumps(sent)).encode()
        kind = "text/plain" if isinstance(sent, str) else "application/json"
        headers = {"content-type": kind, **headers}
    headers |= web.bearer(probe.token_file)
    answer = web.send(
        probe.method or ("GET" if content is None else "POST"), _filled(str(probe.url), words),
        content=content, headers=headers, timeout=probe.timeout, beat=beat,
    )  # fmt: skip
    if answer.status in NO_ANSWER and answer.status != probe.status:
        raise TryAgain(f"{answer.url} answers {answer.quoted}", hint=web.TIMES)
    return answer


def _filled(value: Any, words: dict[str, str]) -> Any:  # noqa: ANN401 -- whatever YAML can say
    """Put what is told into every text of a value, at any depth."""
    if isinstance(value, str):
        for word, meant in words.items():
            value = value.replace(word, meant)
        return value
    if isinstance(value, dict):
        return {_filled(key, words): _filled(inner, words) for key, inner in value.items()}
    return [_filled(inner, words) for inner in value] if isinstance(value, list) else value


def _what_is_wrong(probe: Probe, words: dict[str, str], answer: web.Answer) -> str:
    """Say how an answer differs from what is expected; "" where it does not."""
    if answer.status != probe.status:
        return f"it answers {answer.quoted}"
    if probe.contains is not None and _filled(probe.contains, words).encode() not in answer.content:
        return f"{_filled(probe.contains, words)!r} is not in {answer.quoted}"
    return _odd_value(probe, words, answer) if probe.values else ""


def _odd_value(probe: Probe, words: dict[str, str], answer: web.Answer) -> str:
    """Name the first value of an answer that is not as expected; "" where all are."""
    try:
        found = json.loads(answer.content)
    except (ValueError, RecursionError):
        return f"it answers no JSON: {answer.quoted}"
    for pointer, wanted in probe.values.items():
        try:
            value = _at(found, pointer)
        except (LookupError, ValueError, TypeError):
            return f"{pointer} is not in {answer.quoted}"
        if not _fits(value, wanted, words):
            shown = wanted.model_dump(exclude_none=True) if isinstance(wanted, Matching) else wanted
            return f"{pointer} is {json.dumps(value)[:200]}, not {json.dumps(_filled(shown, words))[:200]}"
    return ""


def _at(found: Any, pointer: str) -> Any:  # noqa: ANN401 -- whatever JSON can say
    """Follow a JSON pointer (RFC 6901)."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def _fits(value: Any, wanted: Any, words: dict[str, str]) -> bool:  # noqa: ANN401 -- whatever JSON can say
    if not isinstance(wanted, Matching):
        return bool(value == _filled(wanted, words)) and isinstance(value, bool) == isinstance(wanted, bool)
    if wanted.matches is not None:
        quoted = {word: re.escape(meant) for word, meant in words.items()}
        text = value if isinstance(value, str) else json.dumps(value)
        if not re.search(_filled(wanted.matches, quoted), text):
            return False
    if wanted.min is None and wanted.max is None:
        return True
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (
        is_number
        and (wanted.min is None or value >= wanted.min)
        and (wanted.max is None or value <= wanted.max)
    )


def _have_judged(
    probe: Probe, words: dict[str, str], variables: dict[str, str], content: bytes, beat: Callable[[], None]
) -> None:
    """Let the program judge: exit 0 is right, 75 is no answer, all else is wrong."""
    argv = _filled(list(probe.argv), words)
    code, output, errors = programs.run(argv, variables, probe.timeout, beat, content)
    said = (errors or output)[-300:].strip() or "no output"
    if code is None:
        raise TryAgain(f"{argv[0]} did not end within {probe.timeout:g} s", hint="raise the probe's timeout")
    if code in (LATER, programs.NOT_STARTED):
        raise TryAgain(f"{argv[0]} cannot judge (exit {code}): {said}", hint="it is asked again by itself")
    if code:
        raise AnsweredWrong(f"{argv[0]} judged the answer wrong (exit {code}): {said}", hint=WRONG)
