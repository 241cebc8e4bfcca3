"""Attacks, one small one each: what a file, an index, an adapter or a name may say that is not so.

Documents, each with the word for where it must end; `hostile_folders` has what is laid into a folder. The
same ones are given to the parsers, to a running daemon, and to the fuzzer as seeds.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from typing import Any

from streammerge.headers import MAX_HEADER_BYTES, MAX_JSON_VALUES

SHARD = "model-00001-of-00002.safetensors"


def file(header: Any, data: bytes = b"") -> bytes:
    """Put a safetensors file together from a header, as JSON or as it stands, and its data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def weight(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    """Describe one weight."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def without(key: str) -> dict[str, Any]:
    """Describe one weight, leaving something out."""
    return {name: value for name, value in weight().items() if name != key}


FOUR = b"\0\0\x80\x3f"
DIGITS = b"9" * 4300  # the most that Python converts


def digits(shape: bytes, offsets: bytes) -> bytes:
    """Describe one weight by numbers as they are written."""
    return file(b'{"w":{"dtype":"F32","shape":[%b],"data_offsets":[%b]}}' % (shape, offsets), FOUR)


def zipped(content: bytes) -> bytes:
    """Put a file into an archive, as numpy and PyTorch do."""
    where = io.BytesIO()
    with zipfile.ZipFile(where, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/model", content)
    return where.getvalue()


LIES = {
    "header-2-to-63": (1 << 63).to_bytes(8, "little") + b"{}",
    "header-all-ones": b"\xff" * 8 + b"{}",
    "header-over-limit": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
    "header-empty": file(b""),
    "header-not-json": file(b"MZ\x90\0 this is no header"),
    "header-invalid-utf8": file(b'{"\xff\xfe": 1}'),
    "header-cut-json": file(b'{"w": {"dtype": "F32"'),
    "header-list": file([weight()], FOUR),
    "header-number": file(7),
    "header-null": file(b"null"),
    "header-string": file('"w"'),
    "header-deep-list": file(b"[" * 100_000),
    "header-deep-object": file(b'{"w":' * 100_000),
    "header-deep-shape": file(b'{"w":{"dtype":"F32","data_offsets":[0,4],"shape":' + b"[" * 90_000 + b"}}"),
    "name-twice": file(b'{"w":%b,"w":%b}' % ((json.dumps(weight()).encode(),) * 2), FOUR),
    "key-twice": file(b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "overlapping": file({"a": weight([2], [0, 8]), "b": weight([2], [4, 12])}, b"\0" * 12),
    "same-bytes-twice": file({"a": weight(), "b": weight()}, FOUR),
    "gap-before": file({"w": weight([1], [4, 8])}, b"\0" * 8),
    "gap-between": file({"a": weight([1], [0, 4]), "b": weight([1], [8, 12])}, b"\0" * 12),
    "offset-negative": file({"w": weight([1], [-4, 0])}, FOUR),
    "offsets-reversed": file({"w": weight([1], [4, 0])}, FOUR),
    "shape-negative": file({"w": weight([-1, -1], [0, 4])}, FOUR),
    "shape-overflows-to-0": file({"w": weight([1 << 32, 1 << 32], [0, 0])}),
    "shape-overflows-to-4": file({"w": weight([(1 << 64) + 1], [0, 4])}, FOUR),
    "shape-17-dimensions": file({"w": weight([1] * 17)}, FOUR),
    "shape-bool": file({"w": weight([True])}, FOUR),
    "shape-float": file({"w": weight([1.0])}, FOUR),
    "shape-nan": file(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', FOUR),
    "shape-string": file({"w": weight("1")}, FOUR),
    "shape-null": file({"w": weight(None)}, FOUR),
    "shape-number": file({"w": weight(1)}, FOUR),
    "shape-object": file({"w": weight({"0": 1})}, FOUR),
    "offset-bool": file({"w": weight([1], [False, 4])}, FOUR),
    "offset-float": file({"w": weight([1], [0.0, 4.0])}, FOUR),
    "offset-infinite": file(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}', FOUR),
    "offset-string": file({"w": weight([1], ["0", "4"])}, FOUR),
    "offsets-string": file({"w": weight([1], "04")}, FOUR),
    "offsets-number": file({"w": weight([1], 4)}, FOUR),
    "offsets-null": file({"w": weight([1], None)}, FOUR),
    "offsets-object": file({"w": weight([1], {"0": 0, "1": 4})}, FOUR),
    "offsets-one": file({"w": weight([1], [0])}, FOUR),
    "offsets-three": file({"w": weight([1], [0, 4, 8])}, FOUR),
    "offset-too-many-digits": digits(b"0", b"9%b,9%b" % (DIGITS, DIGITS)),
    "offset-most-digits": digits(b"0", b"%b,%b" % (DIGITS, DIGITS)),
    "shape-most-digits": digits(b"%b,%b" % (DIGITS, DIGITS), b"0,4"),
    "dtype-unknown": file({"w": weight(dtype="F33")}, FOUR),
    "dtype-lower-case": file({"w": weight(dtype="f32")}, FOUR),
    "dtype-null": file({"w": weight(dtype=None)}, FOUR),
    "dtype-number": file({"w": weight(dtype=4)}, FOUR),
    "dtype-list": file({"w": weight(dtype=["F32"])}, FOUR),
    "dtype-object": file({"w": weight(dtype={"F32": 1})}, FOUR),
    "dtype-huge": file({"w": weight(dtype="F" * 1_000_000)}, FOUR),
    "dtype-size-lie": file({"w": weight(dtype="F64")}, FOUR),
    "entry-list": file({"w": ["F32", [1], [0, 4]]}, FOUR),
    "entry-null": file({"w": None}, FOUR),
    "entry-without-dtype": file({"w": without("dtype")}, FOUR),
    "entry-without-shape": file({"w": without("shape")}, FOUR),
    "entry-without-offsets": file({"w": without("data_offsets")}, FOUR),
    "entry-with-more": file({"w": weight(device="cuda")}, FOUR),
    "bytes-at-the-end": file({"w": weight()}, FOUR + b"\0"),
    "bytes-after-nothing": file({}, FOUR),
    "name-empty": file({"": weight()}, FOUR),
    "name-newline": file({"w\n": weight()}, FOUR),
    "name-nul": file({"w\0": weight()}, FOUR),
    "name-terminal-escape": file({"\x1b[31mw": weight()}, FOUR),
    "name-right-to-left": file({"w\u202egnp": weight()}, FOUR),
    "name-lone-surrogate": file(b'{"\\ud800":%b}' % json.dumps(weight()).encode(), FOUR),
    "name-10-kB": file({"w" * 10_000: weight()}, FOUR),
    "header-100-MB": (100 << 20).to_bytes(8, "little") + b"{}",
    "header-of-values": file(b'{"w":[' + b"0," * MAX_JSON_VALUES + b"0]}"),
    "header-utf-16": file(json.dumps({"w": weight()}).encode("utf-16"), FOUR),
    "header-utf-8-mark": file(b"\xef\xbb\xbf" + json.dumps({"w": weight()}).encode(), FOUR),
    "header-space-first": file(b" " + json.dumps({"w": weight()}).encode(), FOUR),
    "header-nul-padded": file(json.dumps({"w": weight()}).encode() + b"\0", FOUR),
    "metadata-number": file({"__metadata__": {"a": 1}, "w": weight()}, FOUR),
    "metadata-nan": file(b'{"__metadata__":{"a":NaN},"w":%b}' % json.dumps(weight()).encode(), FOUR),
    "metadata-list": file({"__metadata__": ["a"], "w": weight()}, FOUR),
    "metadata-half-character": file(
        b'{"__metadata__":{"a":"\\ud800"},"w":%b}' % json.dumps(weight()).encode(), FOUR
    ),
    "offset-minus-zero": digits(b"1", b"-0,4"),
    "gzip": gzip.compress(file({"w": weight()}, FOUR), mtime=0),
    "gzip-bomb": gzip.compress(bytes(1 << 20), mtime=0),
    "zip": zipped(file({"w": weight()}, FOUR)),
    "pickle": b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R." + b"\0" * 64,
    "pickle-in-zip": b"PK\x03\x04\0\0\x08\x08\0\0" + b"archive/data.pkl" + b"\0" * 64,
    "hdf5": b"\x89HDF\r\n\x1a\n" + b"\0" * 64,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n",
    "html": b"<!doctype html><title>404</title><p>Not found</p>",
}  # fmt: skip

UNFINISHED = {
    "no-bytes": b"",
    "seven-bytes": b"\x10\0\0\0\0\0\0",
    "header-longer-than-file": (1000).to_bytes(8, "little") + b'{"w":',
    "data-cut": file({"w": weight([2], [0, 8])}, b"\0" * 7),
    "data-absent": file({"w": weight()}),
    "data-of-an-exabyte": file({"w": weight([1 << 60], [0, 1 << 62])}, FOUR),
}

EMPTY = {
    "no-weights": file({}),
    "metadata-only": file({"__metadata__": {"format": "pt"}}),
}

UNREAD = {
    f"dtype-{code.lower()}": file({"w": weight(dtype=code)}, FOUR)
    for code in ("F4", "F6_E2M3", "F8_E8M0", "F8_E4M3FNUZ", "C64")
}

# What a header's file must end as: a reason, or "waiting".
HEADERS: dict[str, tuple[str, bytes]] = {
    **{name: ("malformed", content) for name, content in LIES.items()},
    **{name: ("waiting", content) for name, content in UNFINISHED.items()},
    **{name: ("empty", content) for name, content in EMPTY.items()},
    **{name: ("unsupported-dtype", content) for name, content in UNREAD.items()},
}

WEIGHT_MAPS: dict[str, Any] = {
    "parent": {"w": "../../etc/passwd"},
    "parent-safetensors": {"w": "../model.safetensors"},
    "absolute": {"w": "/etc/passwd"},
    "absolute-safetensors": {"w": "/tmp/model.safetensors"},
    "subfolder": {"w": "sub/model.safetensors"},
    "this-folder": {"w": "./model.safetensors"},
    "trailing-slash": {"w": "model.safetensors/"},
    "backslash-parent": {"w": "..\\..\\model.bin"},
    "nul": {"w": "model\0.safetensors"},
    "newline": {"w": "model\n.safetensors"},
    "dots": {"w": ".."},
    "nothing": {"w": ""},
    "pickle": {"w": "pytorch_model.bin"},
    "number": {"w": 7},
    "null": {"w": None},
    "list": {"w": ["model.safetensors"]},
    "one-good-one-bad": {"a": SHARD, "w": "../secret.safetensors"},
    "name-too-long": {"w": "x" * 5000 + ".safetensors"},
    "name-of-a-megabyte": {"w": "x" * (1 << 20)},
    "map-list": [SHARD],
    "map-string": SHARD,
    "map-null": None,
    "map-empty": {},
}

INDEXES = {
    "not-json": b"<!doctype html>",
    "no-bytes": b"",
    "list": b"[]",
    "no-map": b'{"metadata": {"total_size": 4}}',
    "deep": b'{"weight_map":' * 50_000,
    "invalid-utf8": b'{"weight_map": {"\xff": "m.safetensors"}}',
    "map-twice": b'{"weight_map": {"w": "a.safetensors"}, "weight_map": {"w": "b.safetensors"}}',
    "name-twice": b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}',
}

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
DEEP = b"[" * 100_000
SLOW = "could take for ever"


def adapter_config(**settings: Any) -> bytes:
    """Write the configuration of a plain LoRA adapter, with some settings changed."""
    return json.dumps({**LORA, **settings}).encode()


def pattern(key: str) -> bytes:
    """Write a configuration whose rank_pattern has this regular expression."""
    return adapter_config(rank_pattern={key: 4})


# adapter_config.json beside good factors of rank 4 -> the reason, or "folded"
ADAPTERS: dict[str, tuple[str, bytes]] = {
    "rank-2-to-31": ("malformed", adapter_config(r=1 << 31)),
    "rank-2-to-31-by-pattern": ("malformed", adapter_config(rank_pattern={"q_proj": 1 << 31})),
    "rank-4000-digits": ("malformed", adapter_config(r=10**4000)),
    "rank-5000-digits": ("malformed", b'{"peft_type":"LORA","r":' + b"9" * 5000 + b"}"),
    "rank-zero": ("malformed", adapter_config(r=-1)),
    "rank-fraction": ("malformed", adapter_config(r=4.5)),
    "rank-list": ("malformed", adapter_config(r=[4])),
    "rank-other": ("malformed", adapter_config(r=5)),
    "alpha-1e308": ("non-finite", adapter_config(lora_alpha=1e308)),
    "alpha-1e400": ("malformed", b'{"peft_type":"LORA","r":4,"lora_alpha":1e400}'),
    "alpha-nan": ("malformed", b'{"peft_type":"LORA","r":4,"lora_alpha":NaN}'),
    "alpha-word": ("malformed", adapter_config(lora_alpha="high")),
    "alpha-400-digits": ("malformed", adapter_config(lora_alpha=10**400)),
    "alpha-pattern-infinite": (
        "malformed",
        b'{"peft_type":"LORA","r":4,"alpha_pattern":{"q_proj":Infinity}}',
    ),
    "kind-half-character": ("unsupported-adapter", b'{"peft_type":"\\ud800"}'),
    "kind-escape": ("unsupported-adapter", adapter_config(peft_type="\x1b[31mLORA\n")),
    "kind-list": ("unsupported-adapter", adapter_config(peft_type=["LORA"])),
    "kind-absent": ("unsupported-adapter", b"{}"),
    "init-changes-base": ("unsupported-adapter", b'{"peft_type":"LORA","init_lora_weights":"pissa\\ud800"}'),
    "setting-deep": ("malformed", b'{"peft_type":"LORA","loftq_config":' + b"[" * 900 + b"]" * 900 + b"}"),
    "setting-unsupported": ("unsupported-adapter", adapter_config(layer_replication=[[0, 1]])),
    "patterns-list": ("malformed", adapter_config(rank_pattern=[1])),
    "patterns-5000": ("malformed", adapter_config(rank_pattern={f"m{n}": 4 for n in range(5000)})),
    "pattern-name-1-MB": ("malformed", adapter_config(rank_pattern={"x" * (1 << 20): -1})),
    "pattern-of-a-megabyte": ("unsupported-adapter", pattern("x" * (1 << 20))),
    "pattern-no-pattern": ("malformed", pattern("q_proj(")),
    "pattern-flags-inside": ("unsupported-adapter", pattern("(?i)q_proj")),
    "pattern-look-behind": ("unsupported-adapter", pattern("(?<=a)q_proj")),
    "pattern-comment": ("unsupported-adapter", pattern("(?x:(.+)#\n+)z")),
    "pattern-nested-quantifiers": ("unsupported-adapter", pattern("(a+)+z")),
    "pattern-50000-groups": ("unsupported-adapter", pattern("(" * 50_000)),
    "pattern-huge-repeat": ("malformed", pattern("a{99999999999999}")),
    "pattern-optional-bomb": ("unsupported-adapter", pattern(".?" * 60 + "z")),
    "pattern-choice-bomb": ("unsupported-adapter", pattern("(.|.)" * 38)),
    "pattern-counted-bomb": ("unsupported-adapter", pattern(".{0,9}" * 30 + "z")),
    "pattern-star-bomb": ("unsupported-adapter", pattern(".*" * 9 + "z")),
    "target-modules-bomb": ("folded", adapter_config(target_modules="(a+)+" * 1000)),
    "config-deep": ("malformed", b'{"peft_type":' + DEEP),
    "config-utf-16": ("malformed", json.dumps(LORA).encode("utf-16")),
    "config-twice": ("malformed", b'{"peft_type":"LORA","r":4,"r":8}'),
    "config-of-values": ("malformed", b'{"a":[' + b"0," * MAX_JSON_VALUES + b"0]}"),
}

# config.json beside good weights -> the reason
CONFIGS: dict[str, bytes] = {
    "deep": b'{"a":' + DEEP,
    "deep-object": b'{"a":' * 100_000,
    "not-json": b"<!doctype html>",
    "list": b"[]",
    "digits": b'{"hidden_size":' + b"9" * 5000 + b"}",
    "twice": b'{"hidden_size":1,"hidden_size":2}',
    "utf-16": b'{"hidden_size":1}'.decode().encode("utf-16"),
    "mark": b"\xef\xbb\xbf{}",
    "latin-1": b'{"a":"\xe9"}',
    "values": b'{"a":[' + b"[]," * (MAX_JSON_VALUES // 2) + b"[]]}",
}

# Names under which a good fine-tune may not come, as bytes.
NAMES = {
    "newline": b"a\nb",
    "no-utf-8": b"\xff\xfe",
    "terminal-escape": b"\x1b[31mred",
    "right-to-left": "a\u202ednp".encode(),
    "zero-width": "a\u200bb".encode(),
}
# And those under which it may.
PLAIN_NAMES = {
    "dash": b"-rf",
    "longest": b"n" * 255,
    "dots": b"a..",
    "markup": b"<b>&[red]",
    "quotes": b"'\";--",
}
