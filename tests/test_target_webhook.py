"""Signed events, against a receiver at a real port and the verifier of those who wrote the standard."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import documents
import pytest
from documents import code_blocks
from places import make_versions, opened, section
from servers.inbox import Inbox
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from streammerge.errors import TryAgain
from streammerge.targets import Told, webhook

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.targets import Target


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    """Three versions in a store."""
    return make_versions(tmp_path_factory.mktemp("store"))


SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


def receiver(inbox: Inbox, root: Path, secret: str = SECRET) -> Target:
    """Open the target on an inbox."""
    (root / "secret").write_text(secret)
    return opened(
        section(type="webhook", url=f"{inbox.url}/events?from=merge", secret_file=str(root / "secret")), root
    )


def test_an_event_is_signed_and_says_what_changed(tmp_path: Path, versions: list[Told]) -> None:
    """The standard's own package verifies it, and the documented example has the keys that are sent."""
    with Inbox() as inbox:
        target = receiver(inbox, tmp_path)
        for _ in range(2):
            target.tell(versions[2])
    first, second = inbox.got
    headers, event = first.headers, Webhook(SECRET).verify(first.body, first.headers)
    assert headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    assert (second.body, second.headers["webhook-id"]) == (first.body, headers["webhook-id"])
    assert (first.method, first.path) == ("POST", "/events?from=merge")
    assert headers["webhook-id"] == event["id"] == versions[2].delivery
    assert event["source"] == tmp_path.as_uri()
    assert event["data"]["path"] == str(versions[2].snapshot)
    assert (event["data"]["cause"], event["data"]["parent"]) == ("fold", versions[1].digest)
    (added,), (removed,) = event["data"]["added"], event["data"]["removed"]
    assert (added["name"], removed["name"]) == ("b", "a")
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(first.body.replace(b"fold", b"gold"), headers)
    documented = json.loads(code_blocks(documents.section("targets.md", "webhook"), "json"))
    assert documented.keys() == event.keys()
    assert documented["data"].keys() == event["data"].keys()
    assert documented["data"]["added"][0].keys() == added.keys()


def test_what_changed_is_unknown_without_the_parent(tmp_path: Path, versions: list[Told]) -> None:
    """The first version has nothing before it; one whose parent was collected does not guess."""
    assert webhook.event(versions[0], tmp_path)["data"]["added"] == []
    alone = tmp_path / "snapshots" / versions[2].label
    alone.mkdir(parents=True)
    shutil.copy(versions[2].snapshot / "manifest.json", alone)
    found = webhook.event(replace(versions[2], snapshot=alone), tmp_path)["data"]
    assert (found["added"], found["removed"], found["fine_tunes"]) == (None, None, 1)


def test_a_receiver_is_told_again_until_it_takes_the_event(tmp_path: Path, versions: list[Told]) -> None:
    """Any 2xx confirms; errors are tried again; 410 is asked no more by this target."""
    with Inbox() as inbox:
        target = receiver(inbox, tmp_path)
        for status in (500, 404, 302, 429):
            inbox.status = status
            with pytest.raises(TryAgain, match=str(status)) as raised:
                target.tell(versions[1])
            assert "from=merge" not in raised.value.message  # a query may be a secret
        inbox.status = 202
        target.tell(versions[1])
        inbox.status = 410
        for _ in range(2):
            with pytest.raises(TryAgain, match="no more events"):
                target.tell(versions[2])
        assert len(inbox.got) == 6
        inbox.status = 200
        receiver(inbox, tmp_path).tell(versions[2])  # after a reload
        for secret in ("whsec_", "whsec_%%%x"):
            with pytest.raises(TryAgain, match="secret"):
                receiver(inbox, tmp_path, secret).tell(versions[2])
