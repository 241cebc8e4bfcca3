"""Every parser that strangers reach: what it may say, what it must agree with, inputs to begin from."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attacks
import models
import pydantic
import torch
from hostile_folders import factors, tuned
from hypothesis import strategies as st
from judge import Judge
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from starlette.testclient import TestClient

from streammerge import configfile, hubfacts, screen
from streammerge.errors import ConfigError, Refused, TryAgain
from streammerge.fit import Tolerance
from streammerge.headers import MARK, Incomplete, find
from streammerge.quantities import Duration, Size
from streammerge.server import HubHook, Views, make_app
from streammerge.weights import Weights, identity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hypothesis.strategies import SearchStrategy

# What is refused though the safetensors library would take it, by the words that say so.
STRICTER = (
    "stands twice", "is no usable name", "is not described by", "impossible shape", "no header begins",
    "holds no weights", "which streammerge does not read", "is stored as", "more than 1,048,576 values",
    "becomes shorter", "more than 262,144 weights",
)  # fmt: skip
SECRET = "correct horse"
DURATION, SIZE = pydantic.TypeAdapter(Duration), pydantic.TypeAdapter(Size)


class Bench:
    """A base, a place for inputs, and a port that webhooks come in at."""

    def __init__(self, work: Path) -> None:
        self.judge = Judge(work)
        self.work = work
        self.heard: list[str] = []
        good = factors(self.judge.base)
        self.factors = save(good)
        self.tuned = tuned(self.judge.base)

    def folder(self, name: str, **files: bytes) -> Path:
        """Make a folder with these files, in place of what was there."""
        place = self.work / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for file, content in files.items():
            (place / file).write_bytes(content)
        return place

    @cached_property
    def port(self) -> TestClient:
        """The application that answers a Hub's webhook."""

        def mention(name: str) -> bool:
            self.heard.append(name)
            return hubfacts.is_repo_id(name)

        def nothing() -> Any:
            raise AssertionError

        hook = HubHook(SECRET, mention)
        views = Views(nothing, nothing, nothing, nothing, nothing, nothing, hook)
        return TestClient(make_app(views), raise_server_exceptions=True)


@dataclass(frozen=True)
class Parser:
    """One door for strangers' bytes.

    feed       gives it one input and tells what came of it; raises `allowed`, or what is a finding
    documents  inputs near valid ones
    seeds      inputs to mutate
    """

    feed: Callable[[Bench, bytes], str | None]
    documents: SearchStrategy[bytes]
    seeds: list[bytes]
    allowed: tuple[type[Exception], ...] = field(default=(Refused, TryAgain))


WORDS = st.one_of(
    st.sampled_from(["w", "model.safetensors", "../x", "", "\ud800", "a\0", "(a+)+"]), st.text(max_size=8)
)
NUMBERS = st.one_of(
    st.integers(-2, 20), st.sampled_from([2**31, 2**63, 2**64, 10**400, -1, 1e308]), st.floats(),
)  # fmt: skip
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=8,
)


def encoded(value: object) -> bytes:
    """Write a value as JSON; halves of characters stay escaped."""
    return json.dumps(value).encode()


def near(document: dict[str, Any]) -> SearchStrategy[bytes]:
    """Make a JSON object like this one: some keys gone, some with another value, some more."""
    keys = {key: st.one_of(st.just(value), JSON) for key, value in document.items()}
    more = st.dictionaries(WORDS, JSON, max_size=1)
    return st.builds(lambda a, b: encoded({**a, **b}), st.fixed_dictionaries({}, optional=keys), more)


# Headers

KEYS = st.sampled_from(["dtype", "shape", "data_offsets"])


@st.composite
def safetensors_files(draw: st.DrawFn, names: SearchStrategy[str] = WORDS) -> bytes:
    """Make a true file of a few small weights, and mostly lie about one thing in it."""
    described: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        dtype, size = draw(
            st.sampled_from([("F32", 4), ("BF16", 2), ("F64", 8), ("U8", 1), ("F8_E5M2", 1), ("I64", 8)])
        )
        stop = position + math.prod(shape) * size
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        position = stop
    if draw(st.booleans()):
        described["__metadata__"] = draw(
            st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
        )
    data = draw(st.binary(min_size=position, max_size=position))
    if draw(st.booleans()) and described:
        name = draw(st.sampled_from(sorted(described)))
        described[name] = {
            **described[name],
            draw(KEYS): draw(JSON),
        }
    return attacks.file(described, data[: draw(st.one_of(st.just(position), st.integers(0, position)))])


def feed_header(bench: Bench, content: bytes) -> None:
    """The independent reader must take what we take, and read the same; and the other way round."""
    place = bench.work / "model.safetensors"
    place.write_bytes(content)
    try:
        theirs = {name: (found["dtype"], list(found["shape"])) for name, found in deserialize(content)}  # type: ignore[no-untyped-call]
    except (SafetensorError, UnicodeDecodeError):
        theirs = None
    try:
        with Weights(find(place)) as weights:
            ours = {name: (e.dtype, list(e.shape)) for name, e in weights.entries.items()}
        identity(place)
    except (Refused, Incomplete) as exc:
        assert theirs is None or any(words in exc.message for words in STRICTER), exc.message  # noqa: PT017 -- a finding
        raise
    assert ours == theirs


# Indexes, configurations, adapters


def feed_index(bench: Bench, content: bytes) -> None:
    """Whatever the index says, only files of its own folder are opened."""
    shard = attacks.file({"w": attacks.weight()}, attacks.FOUR)
    place = bench.folder("index", **{models.INDEX: content, attacks.SHARD: shard})
    found = find(place)
    assert all(path.parent == place and path.suffix == ".safetensors" for path in found.files)
    with Weights(found):
        pass


def feed_config(bench: Bench, content: bytes) -> None:
    """A fine-tune with this config.json is screened."""
    place = bench.folder("config", **{"config.json": content, "model.safetensors": bench_weights(bench)})
    with screen.examine(place, bench.judge.entries, bench.judge.recipe, Tolerance()):
        pass


def feed_mark(bench: Bench, content: bytes) -> None:
    """Whatever stands in the mark of our own merges, a folder with one is refused."""
    place = bench.folder("mark", **{MARK: content, "model.safetensors": bench_weights(bench)})
    with screen.examine(place, bench.judge.entries, bench.judge.recipe, Tolerance()):
        raise AssertionError


def bench_weights(bench: Bench) -> bytes:
    """A good fine-tune's file."""
    return save({name: values.contiguous() for name, values in bench.tuned.items()})


def feed_adapter_settings(bench: Bench, content: bytes) -> None:
    """Good factors with these settings are screened and folded."""
    files = {"adapter_config.json": content, "adapter_model.safetensors": bench.factors}
    bench.judge.fold(bench.folder("adapter", **files))


def feed_adapter_weights(bench: Bench, content: bytes) -> None:
    """These factors with good settings are screened, hashed and folded."""
    files = {"adapter_config.json": attacks.adapter_config(), "adapter_model.safetensors": content}
    place = bench.folder("adapter", **files)
    identity(place)
    bench.judge.fold(place)


@st.composite
def factor_files(draw: st.DrawFn) -> bytes:
    """Make a file of factors, of shapes that fit or nearly do."""
    stem = "base_model.model." + models.SQUARE.removesuffix(".weight")
    ends = [
        ".lora_A.weight",
        ".lora_B.weight",
        ".lora_magnitude_vector",
        ".lora_B.bias",
        ".base_layer.weight",
        ".x",
    ]
    sides = st.sampled_from([0, 1, 4, 4, 16, 16])
    described, position = {}, 0
    for end in draw(st.lists(st.sampled_from(ends), min_size=1, max_size=4, unique=True)):
        right = {".lora_A.weight": [4, 16], ".lora_B.weight": [16, 4]}.get(end, [16])
        shape = draw(st.one_of(st.just(right), st.lists(sides, max_size=3)))
        stop = position + 4 * math.prod(shape)
        described[stem + end] = {"dtype": "F32", "shape": shape, "data_offsets": [position, stop]}
        position = stop
    value = draw(st.sampled_from([b"\0\0\x80\x3f", b"\xff\xff\xff\x7f", b"\1\0\0\0", b"\xff\xff\x7f\x7f"]))
    return attacks.file(described, value * (position // 4))


def feed_values(bench: Bench, content: bytes) -> None:
    """Bits written over a good fine-tune's values: never folded where the delta is not finite."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    dtype = dtypes[content[0] % 4 if content else 0]
    tensors = {n: v.to(dtype) if v.is_floating_point() else v for n, v in bench.tuned.items()}
    floating = sorted(n for n, v in tensors.items() if v.is_floating_point())
    name = floating[content[1] % len(floating) if len(content) > 1 else 0]
    raw = bytearray(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    raw[len(raw) - len(content[2:8]) :] = content[2:8]
    tensors[name] = torch.frombuffer(raw, dtype=dtype).reshape(tensors[name].shape)
    is_finite = all(bool(torch.isfinite(v.float()).all()) for v in tensors.values())
    place = bench.folder("values", **{"model.safetensors": save(tensors)})
    try:
        bench.judge.fold(place)
    except Refused as exc:
        assert exc.reason in ({"implausible"} if is_finite else {"non-finite"}), exc.message  # noqa: PT017 -- a finding
        raise
    assert is_finite


# What comes by the network


def feed_webhook(bench: Bench, content: bytes) -> str:
    """403 without the secret; with it 202 or 4xx, and nothing is mentioned but names."""
    for secret in (b"", b"wrong", b"corr\xe9ct"):
        answer = bench.port.post("/hooks/hub", content=content, headers=[(b"x-webhook-secret", secret)])
        assert answer.status_code == 403
    bench.heard.clear()
    answer = bench.port.post("/hooks/hub", content=content, headers={"x-webhook-secret": SECRET})
    assert answer.status_code == 202 or 400 <= answer.status_code < 500
    assert bool(bench.heard) <= (answer.status_code == 202)
    if answer.status_code == 202 and answer.json()["looked_at"]:
        assert bench.heard[0].count("/") <= 1
        assert ".." not in bench.heard[0]
    return answer.text


def feed_hub(bench: Bench, content: bytes) -> str:
    """A repository is read as facts that can be written down and joined to a path, or not at all."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as exc:
        return type(exc).__name__
    repo = hubfacts.read_repo(found)
    if repo is None:
        return "no repository"
    repr(repo).encode()
    f"{repo.id} {repo.sha} {' '.join(repo.tags)}".encode()
    assert math.isfinite(repo.last_modified + repo.created_at)
    f"{sum(file.size for file in repo.files):,}"
    root = bench.work / "inbox"
    for file in repo.files:
        assert os.path.commonpath([root, os.path.normpath(root / file.path)]) == str(root)
        f"{file.path} {file.identity}".encode()
    return str([bool(getattr(repo, name)) for name in repo.__dataclass_fields__])


# Configuration


def feed_yaml(bench: Bench, content: bytes) -> None:
    """A file is a configuration, or a ConfigError."""
    place = bench.work / "streammerge.yaml"
    place.write_bytes(content)
    configfile.load(place)


def feed_environment(bench: Bench, content: bytes) -> None:
    """A variable STREAMMERGE__<first line> = <the rest> over a good file."""
    place = bench.work / "streammerge.yaml"
    place.write_bytes(b"base: ./base\nstore: ./store\n")
    name, _, value = content.replace(b"\0", b"").partition(b"\n")
    variable = "STREAMMERGE__" + os.fsdecode(name.replace(b"=", b""))
    with contextlib.ExitStack() as stack:
        os.environ[variable] = os.fsdecode(value[: 1 << 16])
        stack.callback(os.environ.pop, variable)
        configfile.load(place)


def feed_quantity(bench: Bench, content: bytes) -> None:
    """What is a duration or a size is finite, and reads back the same."""
    text = content.decode(errors="replace")
    quantities: tuple[pydantic.TypeAdapter[Any], ...] = (DURATION, SIZE)
    for quantity in quantities:
        with contextlib.suppress(pydantic.ValidationError):
            value = quantity.validate_python(text)
            assert 0 <= value < math.inf
            again = quantity.validate_python(quantity.dump_python(value))
            assert math.isclose(again, value, rel_tol=1e-5, abs_tol=1e-5)


MAP = {"metadata": {"total_size": 4}, "weight_map": {"w": attacks.SHARD}}
ADAPTER = {
    **attacks.LORA, "use_rslora": False, "use_dora": False, "rank_pattern": {"q_proj": 4}, "bias": "none",
    "alpha_pattern": {}, "fan_in_fan_out": False, "init_lora_weights": True, "layer_replication": None,
}  # fmt: skip
HOOK = {"event": {"action": "update"}, "repo": {"type": "model", "name": "org/name"}}
SHA = "0123456789abcdef" * 2 + "01234567"
REPO = {
    "id": "org/name", "sha": SHA, "lastModified": "2026-01-01T00:00:00.000Z", "tags": ["base_model:org/base"],
    "gated": False, "private": False, "createdAt": "2026-01-01T00:00:00.000Z",
    "siblings": [{"rfilename": "a.safetensors", "size": 4, "blobId": SHA, "lfs": {"sha256": SHA, "size": 4}}],
}  # fmt: skip
YAML = b"""base: ./base
store: ./store
method: opcm
knobs: {alpha: 0.5}
finalize: {scale: 0.9, lines: {alpha: 0.5, block: '(\\d+)'}}
sources: [{name: team, type: directory, path: ./fine-tunes, settle: 30s, first_run: {since: 2026-01-01}}]
gates: [{name: q, type: command, argv: [./score, "{snapshot}"], limits: {mean: {min: 0.6}}, timeout: 10m}]
targets: [{name: hook, type: exec, argv: [./reload.sh], timeout: 60s}]
reserve: 1MB
http: {listen: "127.0.0.1:9478"}
"""
VARIABLES = [
    b"KEEP\n3",
    b"HTTP__LISTEN\n127.0.0.1:1",
    b"GRACE\n2h",
    b"SOURCES\n[]",
    b"KNOBS__ALPHA\n0.5",
    b"BASE\n~/x",
]
QUANTITIES = [
    b"30s", b"1h30m", b"5m", b"20GiB", b"500 MB", b"0.5TiB", b"1e3", b"9" * 400, b"9" * 90 + b"w",
    b"99999999TiB", b"-5s", b"9999w",
]  # fmt: skip

PARSERS: dict[str, Parser] = {
    "header": Parser(feed_header, safetensors_files(), [content for _, content in attacks.HEADERS.values()]),
    "index": Parser(
        feed_index,
        st.one_of(near(MAP), st.builds(lambda m: encoded({"weight_map": m}), JSON)),
        [encoded(MAP), *attacks.INDEXES.values()],
    ),
    "base config": Parser(
        feed_config, near(models.CONFIG), [encoded(models.CONFIG), *attacks.CONFIGS.values()]
    ),
    "adapter settings": Parser(
        feed_adapter_settings, near(ADAPTER), [encoded(ADAPTER), *(c for _, c in attacks.ADAPTERS.values())]
    ),
    "adapter weights": Parser(
        feed_adapter_weights,
        factor_files(),
        [save(factors({models.SQUARE: torch.empty(16, 16)})), attacks.file({}), b"PK"],
    ),
    "values": Parser(feed_values, st.binary(min_size=2, max_size=8), [bytes(8), b"\0\0" + b"\xff" * 6]),
    "mark": Parser(feed_mark, near({"version": 1}), [b"{}", attacks.DEEP]),
    "webhook": Parser(feed_webhook, near(HOOK), [encoded(HOOK), attacks.DEEP, b"", b"9" * 5000]),
    "hub answer": Parser(feed_hub, near(REPO), [encoded(REPO), attacks.DEEP]),
    "configuration": Parser(
        feed_yaml, st.builds(lambda d: d + b"\n" + YAML, near({"keep": 5})), [YAML], (ConfigError,)
    ),
    "environment": Parser(feed_environment, st.sampled_from(VARIABLES), VARIABLES, (ConfigError,)),
    "quantities": Parser(
        feed_quantity, st.builds(str.encode, st.from_regex(r"\d{1,9}(\.\d+)?[smhdwKMGTiB]{1,3}")), QUANTITIES
    ),
}
