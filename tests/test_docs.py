"""What docs/ says exists and is as it says, and what exists is said there."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch
import yaml
from documents import (
    DOCS,
    PACKAGE,
    ROOT,
    by_word,
    commands,
    declared_metrics,
    first_words,
    section,
    sections,
    table,
    types,
    words,
)
from pydantic import BaseModel
from safetensors.torch import save_file

from streammerge import config as configuration
from streammerge import errors, ledger, lora, methods, operations, screen
from streammerge.config.gates import Limit
from streammerge.config.sources import Since
from streammerge.config.targets import Matching, Probe
from streammerge.metrics import DECISIONS, STAGES
from streammerge.offline import ALLOWABLE
from streammerge.server import Views, make_app
from streammerge.sources import hub as hub_source
from streammerge.targets import Told

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOG_LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}

# Configuration


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List a section's keys with their fields; keys of a section inside it have a dotted name."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
            continue
        yield prefix + name, field
        if kind == dict[str, Limit]:
            yield from keys(Limit, f"{prefix}{name}.NAME.")
        elif Since in get_args(kind):
            yield from keys(Since, f"{prefix}{name}.")
        elif model is Probe and name == "values":
            yield from keys(Matching, f"{prefix}{name}.NAME.")


def value_of(field: Any, text: str) -> Any:
    """Read a default as the configuration would."""
    value = yaml.safe_load(text)
    readers = [part.func for part in field.metadata if hasattr(part, "func")]
    if readers:
        return readers[0](value)
    return tuple(value) if isinstance(value, list) else value


KEYS = [("Keys", configuration.Config)] + [
    (f"One of `{kind}`, `type: {name}`", model)
    for kind in ("sources", "gates", "targets")
    for model in sections(kind)
    for name in types(model)
]
KEYS += [("A target's `probe`", Probe)]


@pytest.mark.parametrize(("title", "model"), KEYS, ids=[title for title, _ in KEYS])
def test_every_configuration_key_is_documented_with_its_default(title: str, model: type[BaseModel]) -> None:
    """docs/configure.md has exactly the keys that the code reads, each with the default it has there."""
    documented = by_word(section("configure.md", title).split("\n### ")[0], "key")
    expected = dict(keys(model))
    assert set(documented) == set(expected)
    for key, field in expected.items():
        default = documented[key][1]
        if field.is_required():
            assert default == "required", key
        else:
            found = value_of(field, words(default)[0])
            assert found == field.get_default(call_default_factory=True), key


def test_keys_are_marked_by_when_they_can_change() -> None:
    """A key that docs/configure.md marks as `reload` can change while the daemon runs, and no other can."""
    rows = by_word(section("configure.md", "Keys").split("\n### ")[0], "key")
    assert {row[2] for row in rows.values()} == {"store", "restart", "reload"}
    fixed = {key.split(".")[0] for key, row in rows.items() if row[2] != "reload"}
    fixed.remove("allow_network_store")  # may change, and is looked at when a store is opened
    assert fixed == set(configuration.FIXED)


# Methods, sources, targets, gates


def test_every_method_and_knob_is_documented() -> None:
    """docs/methods.md has a section for each method, and in it a row for each knob with its default."""
    assert first_words(section("methods.md", "Methods"), "method") == list(methods.NAMES)
    for name in methods.NAMES:
        text = section("methods.md", name)
        if fields := methods.knob_fields(name):
            rows = by_word(text, "knob")
            documented = {knob: yaml.safe_load(words(row[1])[0]) for knob, row in rows.items()}
            assert documented == {knob: default for knob, (_, default) in fields.items()}, name
        else:
            assert "No knobs." in text, name


def method_row(name: str) -> str:
    """Give a method's row of the table in docs/methods.md, as the code has it."""
    found = methods.describe(name)
    state = f"{found.state:g}"
    if found.state_of_others != found.state:
        state += f", others {found.state_of_others:g}"
    needs = f"`{found.data}`" if found.data.endswith(".safetensors") else found.data
    order = "any" if found.order_free else "matters"
    return f"| `{name}` | {state} | {needs} | {order} | {found.removal} | {found.paper} | {found.notes} |"


@pytest.mark.parametrize("name", methods.NAMES)
def test_every_method_is_described_as_the_code_does(name: str) -> None:
    """The table in docs/methods.md has each method's row as it follows from the code, once."""
    lines = section("methods.md", "The methods").splitlines()
    assert lines.count(method_row(name)) == 1, method_row(name)


def test_methods_with_weights_are_named() -> None:
    """docs/methods.md names exactly the methods in which a fine-tune's weight counts."""
    named = set(words(section("methods.md", "Weights").split("\n\n")[1]))
    assert named == {name for name in methods.NAMES if methods.describe(name).weighted}


def test_every_tail_of_opcm_is_documented() -> None:
    """docs/methods.md has a row for each value of opcm's knob `tail`."""
    kind, _ = methods.knob_fields("opcm")["tail"]
    assert set(first_words(section("methods.md", "opcm"), "tail")) == set(get_args(kind))


@pytest.mark.parametrize("kind", ["sources", "targets", "gates"])
def test_every_type_of_source_target_and_gate_is_documented(kind: str) -> None:
    """Each page has one section a type, and the types are the modules of the folder where there is one."""
    titles = re.findall(r"^## (\w+)$", (DOCS / f"{kind}.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert titles == [name for model in sections(kind) for name in types(model)]
    if (PACKAGE / kind).is_dir():
        modules = {path.stem for path in (PACKAGE / kind).glob("*.py")}
        assert set(titles) == modules - {"__init__"}


def test_every_variable_of_an_exec_target_is_documented() -> None:
    """docs/targets.md has a row for each variable that the command gets."""
    given = set(re.findall(r'"(STREAMMERGE_[A-Z]+)"', inspect.getsource(Told)))
    assert set(first_words(section("targets.md", "exec"), "variable")) == given


# Metrics


def test_every_metric_is_documented_with_its_type_and_labels() -> None:
    """docs/metrics.md has exactly the metrics that are declared, each with its type and its labels."""
    rows = by_word(section("metrics.md", "Metrics").split("\n## ")[0], "metric")
    documented = {name: (row[1], tuple(words(row[2]))) for name, row in rows.items()}
    assert documented == declared_metrics()


def test_every_decision_and_stage_is_documented() -> None:
    """docs/metrics.md names each value that the labels `decision` and `stage` can take."""
    rows = by_word(section("metrics.md", "Metrics"), "metric")
    assert set(words(rows["streammerge_finetunes_total"][3])) == set(DECISIONS)
    assert set(words(rows["streammerge_stage_duration_seconds"][3])) == set(STAGES)


# Commands


def options(command: Any) -> set[str]:
    """Give every spelling of a command's options."""
    return {word for parameter in command.params for word in parameter.opts if word.startswith("-")}


def test_every_command_and_option_is_documented() -> None:
    """docs/commands.md has exactly the commands that there are, each with exactly its options."""
    rows = by_word(section("commands.md", "Commands"), "command")
    documented = {name: set(words(row[1])) for name, row in rows.items()}
    assert documented == {name: options(command) - {"--config"} for name, command in commands().items()}


def test_every_option_of_merge_is_explained() -> None:
    """docs/commands.md has a row for each option of `streammerge merge` besides the folders and --json."""
    rows = by_word(section("commands.md", "`streammerge merge`"), "option")
    explained = {word.split()[0]: row for word, row in rows.items()}
    assert set(explained) == options(commands()["streammerge merge"]) - {"--base", "--out", "--json"}
    assert set(words(explained["--allow"][1])) == set(ALLOWABLE)
    assert set(words(explained["--method"][1])) == set(methods.NAMES)


def test_every_command_that_goes_through_the_ledger_is_said_to() -> None:
    """docs/commands.md lists each verb that people leave in the ledger."""
    text, _, _ = section("commands.md", "Commands that change the store").partition("are rows in the ledger")
    listed = {verb for word in words(text) for verb in word.removeprefix("fine-tunes ").split(" | ")}
    assert listed == set(operations.VERBS)


def test_every_exit_code_is_documented() -> None:
    """docs/commands.md has exactly the exit codes that errors have, and 0."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.StreammergeError)}
    assert {int(code) for code in first_words(section("commands.md", "Exit codes"), "code")} == {0, *codes}


# Logs, reasons, states, addresses


def calls() -> Iterator[tuple[Path, ast.Call]]:
    """Give every call in the package's source."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                yield path, node


def constants(node: ast.expr) -> set[str]:
    """Give the strings in an expression, such as both of `"a" if x else "b"`."""
    return {str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant)}


def test_every_log_event_is_documented_with_its_level() -> None:
    """docs/operate.md has exactly the events that the code logs, each with its level."""
    logged = set()
    for path, call in calls():
        match call.func:
            case ast.Attribute(value=ast.Name(id="log"), attr=level) if level in LOG_LEVELS:
                events = constants(call.args[0])
                assert events, f"{path.name}:{call.lineno}: the event is no constant"
                logged |= {(event, "error" if level == "exception" else level) for event in events}
    rows = by_word(section("operate.md", "Log events"), "event")
    assert {(event, level) for event, row in rows.items() for level in row[1].split(", ")} == logged


def test_every_reason_is_documented() -> None:
    """docs/refusals.md has exactly the screen's reasons, each with its state, its meaning and advice."""
    rows = table(section("refusals.md", "Reasons"), "reason")
    assert [words(row[0])[0] for row in rows] == list(screen.REASONS)
    assert {row[1] for row in rows} <= set(ledger.FINE_TUNE_STATES)
    assert all(row[2] and row[3] for row in rows)


def test_every_refusal_in_the_code_has_a_documented_reason() -> None:
    """No `Refused` is raised with a word that docs/refusals.md does not have."""
    documented = set(first_words(section("refusals.md", "Reasons"), "reason"))
    documented |= set(first_words(section("refusals.md", "Left out without a refusal"), "word"))
    raised = [(path, call) for path, call in calls() if getattr(call.func, "id", "") == "Refused"]
    assert raised
    for path, call in raised:
        assert constants(call.args[0]) <= documented, f"{path.name}:{call.lineno}"


def test_every_rule_of_a_hub_source_is_documented() -> None:
    """docs/refusals.md has each rule by which a repository is left out, with the state `ignored`."""
    rules = set(re.findall(r'(?:yield |_excluded\(repo, )"(\w+)"', inspect.getsource(hub_source)))
    assert {"names", "first_run"} <= rules
    rows = by_word(section("refusals.md", "Left out without a refusal"), "word")
    assert rules <= {word for word, row in rows.items() if row[1] == "ignored"}


def test_what_is_withheld_is_documented() -> None:
    """docs/refusals.md has exactly the words for what a place does not give out now."""
    raised = {word for _, call in calls() if getattr(call.func, "id", "") == "Withheld"
              for word in constants(call.args[0])}  # fmt: skip
    assert set(first_words(section("refusals.md", "Not given out now"), "word")) == raised


def test_every_adapter_that_is_refused_by_its_settings_is_documented() -> None:
    """docs/adapters.md names each setting under which an adapter is no plain LoRA of its base."""
    named = set(first_words(section("adapters.md", "What is refused"), "setting"))
    assert set(lora.UNSUPPORTED) <= named
    assert set(lora.INITS_THAT_CHANGE_THE_BASE) <= named


def test_every_state_is_documented() -> None:
    """docs/commands.md has every state of a fine-tune, and names every state of a version."""
    assert set(first_words(section("commands.md", "fine-tunes"), "state")) == set(ledger.FINE_TUNE_STATES)
    row = by_word(section("commands.md", "history"), "key")["state"]
    assert set(words(row[1])) == set(ledger.SNAPSHOT_STATES)


def test_every_address_is_documented() -> None:
    """docs/operate.md has exactly the addresses that the HTTP port answers."""
    views: Any = [dict] * len(inspect.signature(Views).parameters)
    answered = {getattr(route, "path", "") for route in make_app(Views(*views)).routes}
    assert set(first_words(section("operate.md", "Is it well?"), "address")) == answered


# A real store, against what is said of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store with one fine-tune in it; its configuration lies beside it."""
    place = tmp_path_factory.mktemp("documented")
    chance = torch.Generator().manual_seed(0)
    base = {name: torch.randn(8, 8, generator=chance) for name in ("a.weight", "b.weight")}
    for name, step in (("base", 0.0), ("fine-tunes/one", 0.01)):
        (place / name).mkdir(parents=True)
        weights = {key: weight + step * torch.randn(8, 8, generator=chance) for key, weight in base.items()}
        save_file(weights, place / name / "model.safetensors")
    (place / "streammerge.yaml").write_text(
        "base: ./base\nstore: ./store\nreserve: 1MB\n"
        "sources: [{name: team, type: directory, path: ./fine-tunes, settle: 0s}]\n"
        "targets: [{name: hook, type: exec, argv: ['true']}]\n",
        encoding="utf-8",
    )
    ask(place, "run", "--once")
    return place


def ask(place: Path, *line: str) -> str:
    """Run a command on the store and give what it printed."""
    command = [sys.executable, "-m", "streammerge", *line, "-c", str(place / "streammerge.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("line", ["status", "history", "show head", "fine-tunes"])
def test_every_key_of_the_json_is_documented(line: str, folder: Path) -> None:
    """docs/commands.md has exactly the keys that `--json` prints."""
    printed = json.loads(ask(folder, *line.split(), "--json"))
    record = printed[-1] if isinstance(printed, list) else printed
    title = line.removesuffix(" head")
    documented = set(first_words(section("commands.md", title), "key"))
    if title == "show":
        documented |= set(first_words(section("commands.md", "history"), "key"))
    assert documented == set(record)


def test_the_parts_of_the_json_are_documented(folder: Path) -> None:
    """What docs/commands.md says of a source, a target, the disk, totals and health is what is printed."""
    status = json.loads(ask(folder, "status", "--json"))
    rows = by_word(section("commands.md", "status"), "key")
    assert set(status["sources"][0]) <= set(words(rows["sources"][1]))
    assert set(status["targets"][0]) <= set(words(rows["targets"][1]))
    assert set(status["disk"]) == set(words(rows["disk"][1]))
    shown = json.loads(ask(folder, "show", "1", "--json"))
    rows = by_word(section("commands.md", "show"), "key")
    assert set(shown["totals"]) == set(words(rows["totals"][1]))
    assert set(shown["health"]) == set(words(rows["health"][1]))
    assert set(shown["fine_tunes"][0]) == set(words(rows["fine_tunes"][1]))


def test_the_store_is_as_its_format_says(folder: Path) -> None:
    """docs/store-format.md has exactly the keys of store.json and manifests, and the ledger's tables."""
    store = folder / "store"
    settings = json.loads((store / "store.json").read_text(encoding="utf-8"))
    assert set(first_words(section("store-format.md", "store.json"), "key")) == set(settings)
    manifest = json.loads((store / "current" / "manifest.json").read_text(encoding="utf-8"))
    only_where_configured = {"tuning"}
    documented = set(first_words(section("store-format.md", "manifest.json"), "key"))
    assert documented - only_where_configured == set(manifest)
    opened = ledger.Ledger(store / "ledger.db", read_only=True)
    tables = {row["name"] for row in opened.rows("select name from sqlite_master where type = 'table'")}
    opened.close()
    assert set(first_words(section("store-format.md", "ledger.db"), "table")) == tables


def test_every_fact_in_the_ledger_is_documented() -> None:
    """docs/store-format.md names each fact that the code writes."""
    written = {
        fact
        for _, call in calls()
        if getattr(call.func, "attr", "") == "set_fact"
        for fact in constants(call.args[0])
    }
    row = by_word(section("store-format.md", "ledger.db"), "table")["facts"]
    assert set(words(row[1])) == written
