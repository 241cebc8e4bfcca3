"""An address that is told of every promotion, in order, by a signed event.

A CloudEvent 1.0 in structured JSON mode, signed as Standard Webhooks has it. Its id is the delivery's, the
same at every attempt, so that a receiver can know one that it had. A receiver that answers 410 is asked no
more until the configuration is read again; what it was to be told stays open.
"""

from __future__ import annotations

import binascii
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from standardwebhooks.webhooks import EmptyWebhookSecretError, Webhook

from streammerge import credentials, members, web
from streammerge.errors import ConfigError, TryAgain
from streammerge.members import Member, Members

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.config.targets import WebhookTarget
    from streammerge.targets import Told

EVENT = "streammerge.version.promoted"
GONE = 410


class Receiver:
    """One address."""

    takes_all = True

    def __init__(self, part: WebhookTarget, store: Path, beat: Callable[[], None]) -> None:
        """`store` is the folder that promotions are of."""
        self.name = part.name
        self.part = part
        self._store = store
        self._beat = beat
        self._is_gone = False

    def tell(self, told: Told) -> None:
        """Post the event; any 2xx confirms it."""
        if self._is_gone:
            raise TryAgain(f"target {self.name} wants no more events (410)", hint=SIGHUP)
        content = json.dumps(event(told, self._store)).encode()
        answer = web.send(
            "POST", self.part.url, content=content, headers=self._headers(told, content),
            timeout=self.part.timeout, beat=self._beat,
        )  # fmt: skip
        if answer.is_good:
            return
        if answer.status == GONE:
            self._is_gone = True
            raise TryAgain(f"target {self.name} wants no more events (410)", hint=SIGHUP)
        raise TryAgain(f"{answer.url} answers {answer.quoted}", hint="it is told again by itself")

    def _headers(self, told: Told, content: bytes) -> dict[str, str]:
        at = datetime.now(UTC)
        try:
            secret = credentials.read(self.part.secret_file, credential="")
            signature = Webhook(secret or "").sign(told.delivery, at, content.decode())
        except (binascii.Error, EmptyWebhookSecretError) as exc:
            raise TryAgain(
                f"{self.part.secret_file}: is no secret for webhooks: {exc}", hint="whsec_ and base64"
            ) from exc
        except ConfigError as exc:  # the file may be put there, or exchanged, while the daemon runs
            raise TryAgain(exc.message, hint=exc.hint) from exc
        return {
            "content-type": "application/cloudevents+json; charset=utf-8",
            "webhook-id": told.delivery,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": signature,
        }

    def serves(self) -> None:
        """A receiver is told, not asked."""


SIGHUP = "take it out of the configuration, or have it receive again and reload the configuration"


def event(told: Told, store: Path) -> dict[str, Any]:
    """Say what was promoted, as a CloudEvent."""
    manifest = _manifest(told.snapshot)
    return {
        "specversion": "1.0",
        "id": told.delivery,
        "source": store.as_uri(),
        "type": EVENT,
        "subject": told.label,
        "datacontenttype": "application/json",
        "data": {
            "version": told.version,
            "digest": told.digest,
            "label": told.label,
            "path": str(told.snapshot),
            "cause": told.cause,
            "parent": manifest["parent"],
            "fine_tunes": len(manifest["fine_tunes"]),
            **_changes(manifest, told.snapshot.parent),
        },
    }


def _changes(manifest: dict[str, Any], versions: Path) -> dict[str, Any]:
    """Say which fine-tunes a version has that its parent has not, and the other way round.

    Null where the parent is not on disk any more.
    """
    before = Members()
    if manifest["parent"]:
        parent = next(versions.glob(f"*-{manifest['parent'][:12]}"), None)
        if parent is None:
            return {"added": None, "removed": None}
        before = _manifest(parent)["fine_tunes"]
    added, removed = manifest["fine_tunes"].changes(before)
    return {"added": _plain(added), "removed": _plain(removed)}


def _plain(some: list[Member]) -> list[dict[str, str]]:
    return [
        {key: getattr(member, key) for key in ("name", "source", "revision", "digest")} for member in some
    ]


def _manifest(snapshot: Path) -> dict[str, Any]:
    found: dict[str, Any] = members.parse((snapshot / "manifest.json").read_bytes())
    return found


def open_target(part: WebhookTarget, config: Config, beat: Callable[[], None]) -> Receiver:
    """Make the target."""
    return Receiver(part, config.store, beat)
