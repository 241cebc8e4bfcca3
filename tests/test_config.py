"""The configuration: what is refused and how, what the environment does, what belongs to the store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
import yaml
from daemons import REPOSITORY, SOURCE, Site, command

from streammerge import config as configuration
from streammerge import configfile, machine, quantities
from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

HUB = {"name": "lineage", "type": "hub", "repos": ["org/one"], "first_run": "ignore"}
GATE = {"name": "q", "type": "command", "argv": ["/bin/true"], "limits": {"mean": {"min": 0.5}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a base, for a configuration beside it."""
    models.make_base(tmp_path / "base")
    return tmp_path


def write(folder: Path, **keys: Any) -> Path:
    """Write a configuration; gives its path."""
    path = folder / "streammerge.yaml"
    path.write_text(yaml.safe_dump({"base": "./base", "store": "./store", "sources": [SOURCE], **keys}))
    return path


def refused(folder: Path, **keys: Any) -> ConfigError:
    """Give the error that a configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        configfile.load(write(folder, **keys))
    assert str(folder / "streammerge.yaml") in caught.value.message
    return caught.value


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "key", "nearest"),
    [
        ({"methods": "opcm"}, "methods", "method"),
        ({"sources": [{**SOURCE, "setle": "30s"}]}, "sources.0.setle", "sources.0.settle"),
        ({"sources": [SOURCE, {**SOURCE, "name": "b", "pol": 1}]}, "sources.1.pol", "sources.1.poll"),
        ({"http": {"listn": "127.0.0.1:1"}}, "http.listn", "http.listen"),
        ({"finalize": {"scael": 1}}, "finalize.scael", "finalize.scale"),
        ({"tensors": {"ignore": []}}, "tensors.ignore", "tensors.ignore_extra"),
        (
            {"gates": [{**GATE, "limits": {"mean": {"maxdrop": 1}}}]},
            "gates.0.limits.mean.maxdrop",
            "gates.0.limits.mean.max_drop",
        ),
        (
            {"targets": [{"name": "t", "type": "exec", "argv": ["x"], "timeouts": 1}]},
            "targets.0.timeouts",
            "targets.0.timeout",
        ),
        (
            {"targets": [{"name": "t", "type": "sglang", "url": "http://x", "api_key": "x"}]},
            "targets.0.api_key",
            "targets.0.api_key_file",
        ),
        (
            {
                "targets": [
                    {"name": "t", "type": "exec", "argv": ["x"], "probe": {"url": "http://x", "sent": 1}}
                ]
            },
            "targets.0.probe.sent",
            "targets.0.probe.send",
        ),
        ({"sources": [{**SOURCE, "first_run": {"sinc": "2026-01-01"}}]}, "first_run", "since"),
        ({"sources": [{**HUB, "relation": ["adapter"]}]}, "sources.0.relation", "sources.0.relations"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(
    folder: Path, keys: dict[str, Any], key: str, nearest: str
) -> None:
    """At any depth, the message names the file and the key, and the hint the nearest valid key."""
    error = refused(folder, **keys)
    assert key in error.message
    assert nearest in error.hint


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"grace": "5 minutes or so"}, ["grace", "5 minutes or so", "30s"]),
        ({"grace": "-5s"}, ["grace"]),
        ({"sources": [{**SOURCE, "poll": "0s"}]}, ["sources.0.poll"]),
        ({"reserve": "20 gigs"}, ["reserve", "20 gigs", "20GiB"]),
        ({"keep": 0}, ["keep"]),
        ({"method": "magic"}, ["method", "opcm"]),
        ({"sources": [SOURCE, SOURCE]}, ["sources", "team"]),
        ({"sources": [{**SOURCE, "name": "Team 1"}]}, ["sources.0.name"]),
        ({"sources": [{"name": "x", "type": "directory"}]}, ["sources.0.path", "missing"]),
        (
            {"sources": [{**SOURCE, "type": "carrier-pigeon"}]},
            ["sources.0", "type 'carrier-pigeon'", "'directory'", "'hub'"],
        ),
        ({"sources": [{"name": "x", "path": "./x"}]}, ["sources.0", "needs a type"]),
        ({"sources": [{**HUB, "repos": ["no-owner"]}]}, ["sources.0.repos.0"]),
        ({"sources": [{**HUB, "repos": []}]}, ["lineage", "base_models, authors or repos"]),
        (
            {"sources": [{k: v for k, v in HUB.items() if k != "first_run"}]},
            ["sources.0.first_run", "missing"],
        ),
        ({"base": "hf://no-owner"}, ["base", "hf://no-owner", "hf://ORG/NAME@REVISION"]),
        ({"device": "tpu"}, ["device"]),
        ({"http": {"listen": "9478"}}, ["http.listen"]),
        ({"base": None}, ["base"]),
    ],
)
def test_a_bad_value_is_refused_with_its_key(folder: Path, keys: dict[str, Any], words: list[str]) -> None:
    """The message names the key and what is wrong with the value."""
    error = refused(folder, **keys)
    assert all(word in error.message for word in words), error.message
    assert error.hint


@pytest.mark.parametrize("content", [b"", b"[]", b"base: [", b"\t- {", b"# \xff\n", b"base: ./base\n"])
def test_what_is_no_configuration_is_refused(folder: Path, content: bytes) -> None:
    """An empty file, a list, broken YAML, bytes that are no text or missing keys are a ConfigError."""
    path = folder / "streammerge.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"streammerge\.yaml"):
        configfile.load(path)


def test_a_mistyped_choice_names_the_nearest(folder: Path) -> None:
    """A value that is none of a key's choices comes with the one that was probably meant; so does a type."""
    failed = command("config", "check", "-c", write(folder, method="spectral_kap"), code=2)
    assert "did you mean spectral_cap?" in failed.stderr
    target = {"name": "web", "type": "sglag", "url": "http://127.0.0.1:1"}
    failed = command("config", "check", "-c", write(folder, targets=[target]), code=2)
    assert "did you mean sglang?" in failed.stderr


def test_the_command_line_says_it_and_exits_2(folder: Path) -> None:
    """The error is printed with its hint, exit 2, also where the file or the base is missing."""
    failed = command("config", "show", "-c", write(folder, methods="opcm"), code=2)
    assert "error: " in failed.stderr
    assert "methods" in failed.stderr
    assert "hint: did you mean method?" in failed.stderr
    failed = command("config", "show", "-c", folder / "other.yaml", code=2)
    assert "other.yaml" in failed.stderr
    failed = command("config", "check", "-c", write(folder, method="opcm", knobs={"alfa": 0.5}), code=2)
    assert "did you mean alpha?" in failed.stderr
    failed = command("run", "-c", write(folder, base="./bass"), code=2)
    assert str(folder / "bass") in failed.stderr
    assert not (folder / "store" / "store.json").exists()


def test_an_impossible_address_exits_2(folder: Path) -> None:
    """An address that cannot be listened at is an error of the configuration."""
    failed = command("run", "-c", write(folder, http={"listen": "127.0.0.1:99999"}), code=2)
    assert "http.listen" in failed.stderr


# -------------------------------------------------------------------------------------------- what is read


def test_durations_and_sizes_read_and_print_the_same() -> None:
    """What is printed reads back as the same number, and every unit is what it says."""
    durations = {"30s": 30, "1h30m": 5400, "250ms": 0.25, "2d": 172800, "1w": 604800, 7: 7}
    for text, seconds in durations.items():
        assert quantities.parse_duration(text) == seconds
        assert quantities.parse_duration(quantities.write_duration(seconds)) == seconds
    sizes = {"20GiB": 20 * 2**30, "500 MB": 5 * 10**8, "1.5KiB": 1536, "12": 12, 12: 12}
    for text, size in sizes.items():
        assert quantities.parse_size(text) == size
        assert quantities.parse_size(quantities.write_size(size)) == size


def test_paths_are_taken_against_the_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Relative paths and programs mean the same wherever the command is run; plain names use PATH."""
    gate = {**GATE, "argv": ["./score", "./argument"]}
    target = {"name": "t", "type": "exec", "argv": ["echo", "./argument"]}
    judged = {"argv": ["./judge", "./argument"], "token_file": "./token", "url": "http://x"}
    server = {"name": "s", "type": "sglang", "url": "http://x", "api_key_file": "key", "probe": judged}
    server |= {"path_map": {"./store": "/models"}}
    sources = [SOURCE, {**HUB, "token_file": "./token"}]
    path = write(
        folder, gates=[gate], targets=[target, server], sources=sources, http={"hub_secret_file": "./secret"}
    )
    shown = json.loads(
        command("config", "show", "--json", "-c", path, cwd=tmp_path_factory.mktemp("elsewhere")).stdout
    )
    assert shown["base"]["value"] == str(folder / "base")
    assert shown["store"]["value"] == str(folder / "store")
    assert shown["sources"]["value"][0]["path"] == str(folder / "fine-tunes")
    assert shown["sources"]["value"][1]["token_file"] == str(folder / "token")
    assert shown["http"]["value"]["hub_secret_file"] == str(folder / "secret")
    assert shown["gates"]["value"][0]["argv"] == [str(folder / "score"), "./argument"]
    assert shown["targets"]["value"][0]["argv"] == ["echo", "./argument"]
    served = shown["targets"]["value"][1]
    assert served["api_key_file"] == str(folder / "key")
    assert served["path_map"] == {str(folder / "store"): "/models"}
    assert served["probe"]["argv"] == [str(folder / "judge"), "./argument"]
    assert served["probe"]["token_file"] == str(folder / "token")


def test_the_environment_lies_over_the_file(folder: Path) -> None:
    """STREAMMERGE__SECTION__KEY wins over the file, and `config show` says where each value came from."""
    path = write(folder, keep=3)
    env = {
        "STREAMMERGE__KEEP": "7",
        "STREAMMERGE__HTTP__LISTEN": "127.0.0.1:1234",
        "STREAMMERGE__ADDED": "[x*]",
    }
    shown = json.loads(command("config", "show", "--json", "-c", path, env=env).stdout)
    assert (shown["keep"]["value"], shown["keep"]["origin"]) == (7, "environment STREAMMERGE__KEEP")
    assert shown["http"]["value"]["listen"] == "127.0.0.1:1234"
    assert shown["added"]["value"] == ["x*"]
    assert shown["base"]["origin"] == str(path)
    assert shown["method"] == {"value": "spectral_cap", "origin": "default"}
    table = command("config", "show", "-c", path, env=env).stdout
    assert "STREAMMERGE__KEEP" in table


@pytest.mark.parametrize(
    ("variable", "value"),
    [("STREAMMERGE__KEP", "1"), ("STREAMMERGE__KEEP", "[1"), ("STREAMMERGE__SOURCES__PATH", "x")],
)
def test_a_bad_variable_is_named(folder: Path, variable: str, value: str) -> None:
    """An environment variable that means nothing, or cannot be read, exits 2 with its name."""
    failed = command("config", "show", "-c", write(folder), env={variable: value}, code=2)
    assert variable in failed.stderr


def test_the_configuration_is_found(folder: Path) -> None:
    """By -c, else $STREAMMERGE_CONFIG, else ./streammerge.yaml; else exit 2 with what to do."""
    path = write(folder, keep=3)
    other = folder / "other.yaml"
    other.write_text(path.read_text().replace("keep: 3", "keep: 4"))

    def keep(*arguments: str, **env: str) -> int:
        shown = command("config", "show", "--json", *arguments, env=env, cwd=folder)
        return int(json.loads(shown.stdout)["keep"]["value"])

    assert keep() == 3
    assert keep(STREAMMERGE_CONFIG=str(other)) == 4
    assert keep("-c", str(path), STREAMMERGE_CONFIG=str(other)) == 3
    path.unlink()
    failed = command("config", "show", cwd=folder, code=2)
    assert "STREAMMERGE_CONFIG" in failed.stderr


def test_the_schema_describes_every_key(folder: Path) -> None:
    """`config schema` is JSON Schema that lists the keys of the configuration and refuses others."""
    schema = json.loads(command("config", "schema").stdout)
    assert schema["properties"].keys() == configuration.Config.model_fields.keys()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"base", "store"}
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False
        assert all(key in section["properties"] for key in section.get("required", []))
    shipped = REPOSITORY / "config" / "streammerge.yaml"
    if shipped.exists():
        check_against(schema, schema, yaml.safe_load(shipped.read_text()))


def check_against(schema: dict[str, Any], part: dict[str, Any], value: Any) -> None:
    """Check the keys and the plain types of a value against a schema: what JSON Schema would, for ours."""
    if "$ref" in part:
        return check_against(schema, schema["$defs"][part["$ref"].rsplit("/", 1)[1]], value)
    if "anyOf" in part:
        problems = []
        for choice in part["anyOf"]:
            try:
                return check_against(schema, choice, value)
            except AssertionError as exc:
                problems.append(exc)
        raise AssertionError(problems)
    kinds: dict[str, type | tuple[type, ...]] = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
        "null": type(None),
    }  # fmt: skip
    assert "type" not in part or isinstance(value, kinds[part["type"]]), (part, value)
    assert "enum" not in part or value in part["enum"], (part, value)
    for key, inner in value.items() if isinstance(value, dict) else ():
        rule = part.get("properties", {}).get(key, part.get("additionalProperties", {}))
        assert rule is not False, f"{key} is no key"
        if isinstance(rule, dict):
            check_against(schema, rule, inner)
    for inner in value if isinstance(value, list) else ():
        check_against(schema, part.get("items", {}), inner)
    return None


def test_config_check_says_what_it_will_take(folder: Path) -> None:
    """It counts the base's weights and the bytes that a version and the store take, and warns."""
    path = write(folder, added=["*nothing*"], keep=4, method="opcm", knobs={"alpha": 0.25})
    found = json.loads(command("config", "check", "--json", "-c", path).stdout)
    assert found["weights"] == 7
    assert (found["projected"], found["added"]) == (4, 2)
    weights = (folder / "base" / "model.safetensors").stat().st_size
    assert weights < found["version_bytes"] < 3 * weights
    assert found["full_store_bytes"] == (4 + 4 + 1) * found["version_bytes"]  # opcm takes out by replay
    assert found["knobs"] == {"alpha": 0.25, "tail": "scalar"}
    assert any("*nothing*" in warning for warning in found["warnings"])
    assert any(str(folder / "fine-tunes") in warning for warning in found["warnings"])
    assert not (folder / "store").exists()


# ---------------------------------------------------------------------------------- what belongs to the store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A store with one fine-tune folded."""
    site = Site(tmp_path_factory.mktemp("made") / "site", method="opcm", knobs={"alpha": 0.3})
    site.publish("first", 1)
    site.once()
    return site


def test_what_is_fixed_for_a_stores_life_cannot_change(made: Site, tmp_path: Path) -> None:
    """Another method, knob, route or list of added weights for a store exits 2; rebuild is the way."""
    site = made.copy(tmp_path / "site")
    before = (site.store / "store.json").read_bytes()
    for changed, back in (
        ({"method": "average", "knobs": {}}, {"method": "opcm", "knobs": {"alpha": 0.3}}),
        ({"knobs": {"alpha": 0.4}}, {"knobs": {"alpha": 0.3}}),
        ({"added": ["*norm*"]}, {"added": None}),
        ({"routes": [{"weights": "*norm*", "share": 0}]}, {"routes": []}),
    ):
        site.configure(**changed)
        failed = site.run("run", "--once", code=2)
        assert next(iter(changed)) in failed.stderr
        assert "hint: " in failed.stderr
        assert "streammerge rebuild" in failed.stderr
        site.configure(**back)
    site.configure(knobs={})  # left open, a knob keeps the store's value
    site.once()
    assert (site.store / "store.json").read_bytes() == before
    assert site.ask("status")["knobs"]["alpha"] == 0.3


@pytest.mark.parametrize("change", ["names", "shapes", "values"])
def test_another_base_is_refused(made: Site, tmp_path: Path, change: str) -> None:
    """A base with other weights is an error of the configuration before any fine-tune is judged by it."""
    site = made.copy(tmp_path / "site")
    site.publish("second", 2)
    base = dict(site.base)
    if change == "names":
        base["another.weight"] = torch.ones(2, 2)
    elif change == "shapes":
        base[models.EMBEDDING] = torch.ones(41, 16)
    else:
        base[models.SQUARE] = base[models.SQUARE] + 1
    models.save(site.root / "base", base)
    failed = site.run("run", "--once", code=2)
    assert str(site.root / "base") in failed.stderr
    assert "original base" in failed.stderr
    assert site.states().get("second", "pending") == "pending"
    if change == "values":
        models.save(site.root / "base", site.base)
        site.once()
        assert site.states() == {"first": "folded", "second": "folded"}


def test_a_folder_with_other_things_is_no_store(tmp_path: Path) -> None:
    """A store is not made in a folder that holds something else."""
    site = Site(tmp_path / "site")
    site.store.mkdir()
    (site.store / "thesis.tex").write_text("years of work")
    failed = site.run("run", "--once", code=2)
    assert "thesis.tex" in failed.stderr
    assert [path.name for path in site.store.iterdir()] == ["thesis.tex"]


def test_network_file_systems_are_known(tmp_path: Path) -> None:
    """The kind of a path's file system is the kernel's own word, and the usual network ones are refused."""
    assert machine.file_system(tmp_path) not in machine.NETWORK_FILE_SYSTEMS
    assert machine.file_system(tmp_path / "not" / "there" / "yet") == machine.file_system(tmp_path)
    assert machine.file_system(REPOSITORY.__class__("/proc/self")) == "proc"
    assert {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs"} <= machine.NETWORK_FILE_SYSTEMS
    assert not {"ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs"} & machine.NETWORK_FILE_SYSTEMS
