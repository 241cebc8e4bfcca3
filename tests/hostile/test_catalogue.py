"""Every attack of the catalogue: against source and screens, and all at once against a daemon."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import models
import pytest
from attacks import NAMES, PLAIN_NAMES
from daemons import DEADLINE_SECONDS, Facts, Site, until
from hostile_folders import FOLDERS, Attack, tuned
from judge import Judge

from streammerge import screen

MAX_MESSAGE_CHARACTERS = 1200
MAX_DAEMON_BYTES = 900 << 20
SECRET = "correct horse"
HOOK = b"POST /hooks/hub HTTP/1.1\r\nhost: a\r\nx-webhook-secret: correct horse\r\n"
REQUESTS = [  # each hung up upon at once
    HOOK + b"content-length: 1000\r\n\r\n{",
    HOOK + b"transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    HOOK + b"content-length: 2\r\n\r\n{}",
    HOOK + b"content-length: -1\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nhost: a\r\n\r\n",
    b"\x16\x03\x01\0\xff" + bytes(300),
    b"\r\n" * 1000,
]
GOOD = {"good-a": 201, "good-b": 202, "good-c": 203}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """One base for all."""
    return Judge(tmp_path_factory.mktemp("judge"))


@pytest.mark.parametrize("attack", FOLDERS)
def test_an_attack_ends_where_it_must(attack: str, judge: Judge, tmp_path: Path) -> None:
    """Each hostile folder is refused by its reason, waited for, or harmless and folded."""
    (tmp_path / "inflow").mkdir()
    FOLDERS[attack].lay(tmp_path / "inflow" / "ft", judge.base)
    ended, said = judge(tmp_path / "inflow")
    assert ended == FOLDERS[attack].ends, said
    assert ended in {*screen.REASONS, "waiting", "folded", ""}
    assert len(said) < MAX_MESSAGE_CHARACTERS
    assert said.isprintable()


@pytest.mark.parametrize("name", [*NAMES, *PLAIN_NAMES])
def test_a_name_is_shown_and_never_obeyed(name: str, judge: Judge, tmp_path: Path) -> None:
    """A name that cannot be printed is refused, shown escaped; any other is only a name."""
    (tmp_path / "inflow").mkdir()
    place = tmp_path / "inflow" / os.fsdecode({**NAMES, **PLAIN_NAMES}[name])
    models.save(place, tuned(judge.base))
    assert judge(tmp_path / "inflow")[0] == ("malformed" if name in NAMES else "folded")


def listing(folder: Path) -> dict[str, str]:
    """Name everything below a folder with its content's hash, to see that nothing was touched."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def resident_bytes(process: int) -> int:
    """The most memory that a process ever had."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def laid(site: Site) -> dict[str, str]:
    """Publish every attack and three good fine-tunes; gives where each must end."""
    ends = {}
    for name, attack in FOLDERS.items():
        attack.lay(site.inflow / name, site.base)
        ends[name] = attack.ends
    for shown, raw in NAMES.items():
        models.save(site.inflow / os.fsdecode(raw), tuned(site.base))
        ends[f"name {shown}"] = "malformed"
    for name, seed in GOOD.items():
        site.publish(name, seed)
        ends[name] = "folded"
    return ends


def ended(row: Facts) -> str:
    """Where a fine-tune ended, in the catalogue's words."""
    state = str(row["state"])
    return str(row["reason"]) if state == "refused" else state


@pytest.mark.slow
def test_a_daemon_outlives_every_attack_at_once(tmp_path: Path) -> None:
    """All attacks published together with three good fine-tunes.

    The daemon lives and folds what is good and nothing else; each of the others has its reason; memory stays
    bounded; base, what lies outside, and the source folder are as they were; and what is served holds no file
    of a fine-tune.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("nobody's business")
    (tmp_path / "secret").write_text(SECRET)
    site = Site(tmp_path / "site")
    listen = site.keys["http"]["listen"]
    site.configure(http={"listen": listen, "hub_secret_file": str(tmp_path / "secret")})
    wanted = laid(site)
    os.link(site.root / "base" / "model.safetensors", site.inflow / "base-by-hard-link.safetensors")
    wanted["base-by-hard-link.safetensors"] = "duplicate"  # of `base-itself`, or that one of it
    before = listing(site.root / "base"), listing(outside)
    with site.daemon() as daemon:
        names = {row: word for row, word in wanted.items() if not row.startswith("name ")}

        def settled() -> bool:
            rows = daemon.rows()
            return names.keys() <= rows.keys() and not any(r["state"] == "pending" for r in rows.values())

        until(settled, "all decided", seconds=4 * DEADLINE_SECONDS)
        rows = daemon.rows()
        daemon.look_again()
        for request in REQUESTS:
            with socket.create_connection(("127.0.0.1", site.port), timeout=10) as caller:
                caller.sendall(request)
        most = resident_bytes(daemon.process.pid)
        assert daemon.states() == {name: row["state"] for name, row in rows.items()}
        assert daemon.get("/")[0] == daemon.get("/readyz")[0] == 200
    assert most < MAX_DAEMON_BYTES, f"{most:,}"
    odd = {
        name: (ended(rows[name]), rows[name]["detail"])
        for name, word in names.items()
        if ended(rows[name]) != word
    }
    zero = {"base-itself", "base-by-hard-link.safetensors"}
    assert not {name: found for name, found in odd.items() if name not in zero}
    assert {ended(rows[name]) for name in zero} <= {"zero-delta", "duplicate"}
    assert sum(row["reason"] == "malformed" for name, row in rows.items() if name not in wanted) == len(NAMES)
    assert sorted(site.served) == sorted(name for name, word in wanted.items() if word == "folded")
    assert (listing(site.root / "base"), listing(outside)) == before
    model, base = site.store / "current" / "model", site.root / "base"
    for path in base.iterdir():
        if not path.name.endswith(".safetensors"):
            assert (model / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in model.iterdir()} == {
        *(path.name for path in base.iterdir()),
        "README.md",
        "streammerge.json",
    }
    assert not list((site.store / "inbox").iterdir())
    site.run("verify")


def test_the_catalogue_has_no_attack_that_cannot_fail() -> None:
    """Every attack says where it must end, and most of them are not folded."""
    assert all(isinstance(attack, Attack) for attack in FOLDERS.values())
    assert sum(attack.ends != "folded" for attack in FOLDERS.values()) > 200
