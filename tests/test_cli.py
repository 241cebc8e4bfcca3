"""The command line: help, exit codes, merging without a daemon; and that reading creates nothing."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
import typer
from daemons import SOURCE, Site, command
from servers.sglang import SglangServer
from typer.testing import CliRunner

from streammerge import __version__
from streammerge.cli.console import app
from streammerge.errors import StreammergeError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READING = (
    ("status",), ("history",), ("show", "head"), ("show", "current"), ("show", "1"), ("fine-tunes",),
    ("fine-tunes", "show", "model"), ("verify",), ("config", "check"), ("config", "show"),
    ("sources", "test"), ("targets", "test"),
)  # fmt: skip
CHANGING = ("rollback", "hold", "resume", "gc", "fine-tunes approve", "fine-tunes reject", "fine-tunes retry")


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group of the command line."""
    yield words
    for name, inner in getattr(group, "commands", {}).items():
        yield from commands(inner, (*words, name))


ALL_COMMANDS = tuple(commands(typer.main.get_command(app)))


def help_of(words: tuple[str, ...]) -> str:
    """What `--help` prints for a command, in one line."""
    shown = CliRunner().invoke(app, [*words, "--help"])
    assert shown.exit_code == 0
    return " ".join(shown.output.split())


def test_every_command_explains_itself() -> None:
    """`--help` of each command says how it is used and what it does."""
    for words in ALL_COMMANDS:
        assert " ".join(words) in help_of(words).split("Usage: ")[1]
    for words in (("run",), ("fine-tunes", "approve"), ()):
        said = " ".join(command(*words, "--help").stdout.split())
        assert f"streammerge {' '.join(words)}".strip() in said


def test_the_promised_commands_are_there() -> None:
    """What DESIGN 7 lists can be typed; what changes something takes --no-wait."""
    named = {" ".join(words) for words in ALL_COMMANDS}
    promised = {
        "run", "merge", "demo", "status", "history", "show", "path", "fine-tunes", "fine-tunes show",
        "verify", "sources test", "targets test", "config check", "config show", "config schema",
        "healthcheck", "version", *CHANGING,
    }  # fmt: skip
    assert named >= promised
    assert all("--no-wait" in help_of(tuple(words.split())) for words in CHANGING)
    assert "--yes" in help_of(("rollback",))


def test_usage_errors_exit_2(tmp_path: Path) -> None:
    """An unknown command, option or argument is a usage error; no arguments at all show the help."""
    command("no-such-command", code=2)
    command("status", "--no-such-option", code=2)
    command("history", "--limit", "0", "-c", tmp_path / "x.yaml", code=2)
    assert "Usage" in command(code=None).stdout
    assert json.loads(command("version", "--json").stdout) == {"version": __version__}
    assert command("version").stdout.strip() == __version__


# ----------------------------------------------------------------------------------------------- reading


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of modification."""
    return {
        str(path.relative_to(folder)): (found.st_size, found.st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        for found in [path.lstat()]
        if not path.is_dir()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A store with one fine-tune folded, nobody at work."""
    site = Site(tmp_path_factory.mktemp("cli") / "site")
    site.configure(targets=[{"name": "hook", "type": "exec", "argv": [site.program("hook", "exit 0")]}])
    site.publish("model", 1)
    site.once()
    return site


def test_reading_creates_nothing(made: Site) -> None:
    """No reading command adds, changes or leaves a file, not even SQLite's -wal and -shm; each has --json."""
    before = listing(made.root)
    assert not any(name.endswith(("-wal", "-shm")) for name in before)
    for words in READING:
        json.loads(made.run(*words, "--json").stdout)
        assert listing(made.root) == before, words
    made.run("path")
    assert listing(made.root) == before


@pytest.mark.slow
def test_reading_beside_a_daemon_creates_nothing(tmp_path: Path, made: Site) -> None:
    """While a daemon writes, the same holds, and what it has just written is read."""
    site = made.copy(tmp_path / "site")
    with site.daemon() as daemon:
        site.publish("second", 2)
        daemon.until_state(second="folded")
        names = set(listing(site.store))
        assert site.ask("status")["count"] == 2
        for words in READING[:8]:
            site.run(*words, "--json")
        assert set(listing(site.store)) <= names  # what was fetched goes once it is folded


def test_reading_where_there_is_nothing(tmp_path: Path) -> None:
    """Without a store, reading and changing commands exit 2, say what makes one, and make none."""
    site = Site(tmp_path / "site")
    for words in (("status",), ("history",), ("verify",), ("path",), ("hold",), ("rollback", "--yes")):
        failed = site.run(*words, code=2)
        assert "streammerge run" in failed.stderr
    assert not site.store.exists()


def test_what_is_not_there_exits_1(made: Site) -> None:
    """An unknown version, fine-tune or word is an error with a hint, not a trace."""
    assert "history" in made.run("show", "77", code=1).stderr
    assert "head or current" in made.run("show", "latest", code=2).stderr
    assert "fine-tunes" in made.run("fine-tunes", "show", "nobody", code=1).stderr


def test_tables_are_for_people(made: Site) -> None:
    """Without --json there is a table or a few lines with the same facts."""
    assert "serving   version 1" in made.run("status").stdout
    assert "model" in made.run("history").stdout
    assert "folded" in made.run("fine-tunes").stdout
    assert "every version is what was sealed" in made.run("verify").stdout
    assert "spectral_cap" in made.run("show", "head").stdout


# ------------------------------------------------------------------------------------------ run --once


def test_run_once_says_how_it_went(tmp_path: Path) -> None:
    """Exit 0 when all is done; 75 when a source failed or a target did not confirm: the rest is done."""
    site = Site(tmp_path / "site")
    hook = site.program("hook", '[ -e "$(dirname "$0")/deaf" ] && exit 1; exit 0')
    site.configure(
        sources=[{**SOURCE, "name": "lost", "path": "./lost"}, {**SOURCE, "settle": "300ms"}],
        targets=[{"name": "hook", "type": "exec", "argv": [hook]}],
    )
    site.publish("model", 1)
    failed = site.once(code=75)
    assert "lost" in failed.stderr
    assert site.served == ["model"]
    (site.root / "lost").mkdir()
    site.once()
    (site.root / "deaf").touch()
    site.publish("second", 2)
    failed = site.once(code=75)
    assert "hook" in failed.stderr
    assert site.served == ["model", "second"]
    (site.root / "deaf").unlink()
    (site.inflow / "half").mkdir()
    (site.inflow / "half" / "config.json").write_text("{}")
    site.once()
    assert site.states() == {"model": "folded", "second": "folded", "half": "waiting"}
    assert site.ask("status")["targets"][0]["snapshot"] == 2


def test_trying_sources_and_targets(tmp_path: Path, made: Site) -> None:
    """`sources test` and `targets test` say how each is, exit 75 if one fails, and change nothing."""
    site = made.copy(tmp_path / "site")
    assert site.ask("sources", "test") == [
        {"name": "team", "state": "ok", "error": None, "fine_tunes": ["model"], "notes": {"model": ""}}
    ]
    assert [target["state"] for target in site.ask("targets", "test")] == ["confirmed"]
    site.inflow.rename(site.root / "away")
    (site.root / "hook").write_text("#!/bin/sh\nexit 9\n")
    found = json.loads(site.run("sources", "test", "--json", code=75).stdout)
    assert found[0]["state"] == "error"
    found = json.loads(site.run("targets", "test", "--json", code=75).stdout)
    assert "exit 9" in found[0]["error"]
    assert (found[0]["state"], found[0]["type"], found[0]["serves"]) == ("failing", "exec", None)


def test_trying_a_server_says_what_it_serves(tmp_path: Path, made: Site) -> None:
    """`targets test` tells, asks the probe and reads back; one that answers wrong is not one that is away."""
    site = made.copy(tmp_path / "site")
    with SglangServer(site.root / "base") as server:
        ask = {"url": f"{server.url}/generate", "send": {"text": "who?"}, "values": {"/text": "{label}"}}
        targets = [{"name": "web", "type": "sglang", "url": server.url, "probe": ask}]
        site.configure(targets=[*targets, {"name": "away", "type": "sglang", "url": "http://127.0.0.1:1"}])
        label = site.ask("path")["path"].rpartition("/")[2]
        web, away = json.loads(site.run("targets", "test", "--json", code=75).stdout)
        assert (web["state"], web["serves"], server.serves) == ("confirmed", label, label)
        assert (away["state"], away["serves"]) == ("failing", None)
        server.restart()
        server.fault = "stale"
        shown = site.run("targets", "test", code=75).stdout
    assert re.search(rf"web +wrong +{label}\s", shown)
    assert f"does not answer as {label}" in shown
    assert "hint:" in shown


def test_healthcheck_asks_the_daemon(made: Site) -> None:
    """Without a daemon it exits 1 and says where it asked."""
    failed = made.run("healthcheck", code=1)
    assert f"127.0.0.1:{made.port}/healthz" in failed.stderr


# ----------------------------------------------------------------------------------------------- merge


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and fine-tunes, good and bad, to merge without a store."""
    folder = tmp_path_factory.mktemp("toys")
    base = models.make_base(folder / "base")
    for number, name in enumerate(("one", "two"), 1):
        models.make_fine_tune(folder / name, base, seed=number)
    models.save(folder / "same", base)
    models.make_fine_tune(folder / "nan", base, seed=9, size=float("nan"))
    return folder


def test_merge_gives_what_the_daemon_gives(toys: Path, tmp_path: Path) -> None:
    """The same fine-tunes in the same order give the same model bytes with and without a store."""
    out = tmp_path / "out"
    done = command(
        "merge", "--base", toys / "base", "--out", out, "--threads", "1", "--json", toys / "one", toys / "two"
    )
    manifest = json.loads(done.stdout)
    assert manifest == json.loads((out / "manifest.json").read_bytes())
    assert manifest["totals"].keys() >= {"count", "lambda", "mean_delta_norm", "state_norm"}
    assert manifest["totals"]["count"] == 2
    assert [entry["name"] for entry in manifest["fine_tunes"]] == ["one", "two"]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model"]

    site = Site(tmp_path / "site", models.load(toys / "base"))
    (site.root / "staging").mkdir()
    with site.daemon() as daemon:
        for name in ("one", "two"):
            models.save(site.root / "staging" / name, models.load(toys / name))
            site.move_in(name)
            daemon.until_state({name: "folded"})
    served = site.store / "current" / "model" / "model.safetensors"
    assert served.read_bytes() == (out / "model" / "model.safetensors").read_bytes()
    assert site.current["totals"] == manifest["totals"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--method", "magic", "one"], 2, "methods are spectral_cap, opcm"),
        (["--method", "opcm", "--set", "alpha=2", "one"], 2, "alpha"),
        (["--method", "opcm", "--set", "alfa=0.5", "one"], 2, "did you mean alpha?"),
        (["--set", "alpha", "one"], 2, "--set alpha=0.5"),
        (["--dtype", "int4", "one"], 2, "--dtype int4"),
        (["--allow", "non-finite", "one"], 2, "--allow non-finite"),
        (["--scale", "0", "one"], 2, "--finalize scale"),
        (["--device", "cuda:9", "one"], 2, "cuda:9"),
        (["missing"], 2, "missing is not there"),
        ([], 2, "FT"),
        (["one", "one"], 1, "duplicate"),
        (["one", "nan"], 1, "non-finite"),
        (["same"], 1, "zero-delta"),
        (["two", "config.json"], 2, "config.json"),
    ],
)
def test_merge_errors_leave_nothing(
    toys: Path, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    """What makes no sense exits 2, a refused fine-tune 1, each named; no OUT and no leftover is there."""
    names = ("one", "two", "same", "nan", "missing", "config.json")
    given = [str(toys / word) if word in names else word for word in words]
    arguments = ["merge", "--base", str(toys / "base"), "--out", str(tmp_path / "out"), *given]
    failed = CliRunner().invoke(app, arguments)
    error = failed.exception
    if isinstance(error, StreammergeError):
        assert error.exit_code == code
        assert said in f"{error.message} {error.hint}"
    else:
        assert failed.exit_code == code
        assert said in failed.output
    assert list(tmp_path.iterdir()) == []


def test_merge_prints_its_error(toys: Path, tmp_path: Path) -> None:
    """On the command line the refusal is one line with the fine-tune's path, and a hint: exit 1."""
    failed = command("merge", "--base", toys / "base", "--out", tmp_path / "out", toys / "nan", code=1)
    error, hint = failed.stderr.splitlines()
    assert error.startswith(f"error: {toys / 'nan'}: ")
    assert "non-finite" in error
    assert hint.startswith("hint: ")


def test_merge_touches_no_existing_folder(toys: Path, tmp_path: Path) -> None:
    """An OUT with something in it is refused and kept as it was; an empty one is used."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    failed = command("merge", "--base", toys / "base", "--out", out, toys / "one", code=2)
    assert "--out" in failed.stderr
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    command("merge", "--base", toys / "base", "--out", out, toys / "one")
    assert (out / "model" / "model.safetensors").exists()


def test_merge_options_do_what_they_say(toys: Path, tmp_path: Path) -> None:
    """--allow lets a reason pass; --method, --set, --scale and --dtype change what is written."""
    base, one = models.load(toys / "base"), models.load(toys / "one")
    out = tmp_path / "out"
    command(
        "merge", "--base", toys / "base" / "model.safetensors", "--out", out, "--method", "task_arithmetic",
        "--set", "scale=0.5", "--scale", "0.5", "--dtype", "bfloat16", "--allow", "duplicate",
        "--allow", "zero-delta", "--added", "*nothing*",
        toys / "one", toys / "one" / "model.safetensors", toys / "same",
    )  # fmt: skip
    merged = models.load(out / "model")
    assert {values.dtype for values in merged.values() if values.is_floating_point()} == {torch.bfloat16}
    for name, values in base.items():
        if values.is_floating_point():
            expected = values + 0.5 * (one[name] - values)
            assert torch.allclose(merged[name].float(), expected, atol=0.01), name
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert (manifest["method"], manifest["knobs"]) == ("task_arithmetic", {"scale": 0.5})
    assert manifest["totals"]["count"] == 3
