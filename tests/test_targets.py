"""Serving processes as targets, each against a real HTTP server that speaks its protocol and reads files."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from daemons import free_port, until
from hubs import Strange
from places import KINDS, make_versions, opened, place, section
from servers.inbox import Inbox
from servers.triton import MODEL

from streammerge import web
from streammerge.errors import AnsweredWrong, Stopped, TryAgain

if TYPE_CHECKING:
    from pathlib import Path

    from servers import Fault

    from streammerge.targets import Told


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    """Three versions in a store."""
    return make_versions(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_serves_what_it_was_told_of(kind: str, versions: list[Told], tmp_path: Path) -> None:
    """It loads each version's bytes and says so; telling twice and going back work, and a restart shows."""
    with place(kind, versions, tmp_path) as there:
        assert there.target.serves() != versions[1].label
        for version in (1, 2, 2, 1):
            there.tell(version)
            label = versions[version].label
            assert (there.target.serves(), there.server.serves, there.server.label) == (label, label, label)
        if kind != "triton":  # which takes up the newest folder of its repository
            there.server.restart()
            assert there.target.serves() == "default"
        there.tell(2)


FAULTS: dict[Fault, type[TryAgain]] = {
    "500": TryAgain,
    "nonsense": TryAgain,
    "endless": TryAgain,
    "dripping": TryAgain,
    "hangs": TryAgain,
    "slow": TryAgain,  # slower than the time limit
    "restarts": TryAgain,
    "refuses": AnsweredWrong,
    "other": AnsweredWrong,
    "stale": AnsweredWrong,  # which only the probe sees
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_does_not_serve_the_version_confirms_nothing(
    kind: str, fault: Fault, versions: list[Told], tmp_path: Path
) -> None:
    """Each fault is told apart: not there, or there and wrong; once it is mended the same telling works."""
    with place(kind, versions, tmp_path) as there:
        there.tell(1)
        there.server.fault, there.server.pause = fault, 60.0
        patience = 0.3 if fault in ("hangs", "dripping", "slow") else 30.0
        impatient = opened(there.part.model_copy(update={"timeout": patience}), tmp_path)
        began = time.monotonic()
        with pytest.raises(TryAgain) as raised:
            replace(there, target=impatient).tell(2)
        assert raised.type is FAULTS[fault], raised.value
        assert time.monotonic() - began < 10
        assert raised.value.hint
        if fault == "stale":
            assert (there.server.serves, there.server.label) == (versions[1].label, versions[2].label)
            assert versions[1].label in raised.value.message
        there.server.fault = None
        if fault == "restarts":
            until(lambda: there.server.starts == 2, "it is back")
        if fault == "slow":
            there.server.restart()
        there.tell(2)
        assert there.server.serves == versions[2].label


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_ends_a_telling_at_once(kind: str, versions: list[Told], tmp_path: Path) -> None:
    """A server that takes minutes does not keep the daemon from stopping; a paused one is resumed."""
    load = {
        "sglang": "/update_weights_from_disk",
        "vllm": "/collective_rpc",
        "triton": f"/v2/repository/models/{MODEL}/load",
    }
    asked_at: list[float] = []

    def beat() -> None:
        if there.server.calls(load[kind]):
            asked_at.append(time.monotonic())
            raise Stopped("told to stop")

    with place(kind, versions, tmp_path, beat=beat) as there:
        there.server.fault, there.server.pause = "slow", 60.0
        with pytest.raises(Stopped):
            there.tell(1)
        assert time.monotonic() - asked_at[0] < 5
        assert not getattr(there.server, "paused", "")


def test_a_server_that_is_not_there_is_told_again(tmp_path: Path, versions: list[Told]) -> None:
    """No server, no word about the version; what hint says names what to look at."""
    part = section(type="sglang", url=f"http://127.0.0.1:{free_port()}")
    target = opened(part, tmp_path)
    for ask in (lambda: target.tell(versions[1]), target.serves):
        with pytest.raises(TryAgain, match="cannot be reached") as raised:
            ask()
        assert raised.type is TryAgain


def test_a_redirection_is_not_followed_and_takes_no_key_along(tmp_path: Path, versions: list[Told]) -> None:
    """Who answers with another address gets no further than that."""
    key = tmp_path / "key"
    key.write_text("k3y")
    with Strange(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}") as other:
        points = f"HTTP/1.1 307 Elsewhere\r\nlocation: {other.url}/\r\ncontent-length: 0\r\n\r\n".encode()
        with Strange(points) as first:
            part = section(type="sglang", url=first.url, api_key_file=str(key))
            with pytest.raises(TryAgain, match="points elsewhere"):
                opened(part, tmp_path).tell(versions[1])
        assert (first.asked, other.asked) == (["Bearer k3y"], [])


def test_certificates_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that nobody vouches for gets no request; SSL_CERT_FILE names who vouches."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    certificate, key = str(tmp_path / "cert"), str(tmp_path / "key")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with Inbox(status=200, answer=b"{}") as inbox:
        inbox.speak_tls(certificate, key)
        with pytest.raises(TryAgain, match="certificate verify failed"):
            web.send("POST", inbox.url, content=b"{}", timeout=10)
        assert inbox.got == []
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        web._certificates.cache_clear()
        assert web.send("POST", inbox.url, content=b"{}", timeout=10).is_good
    web._certificates.cache_clear()
