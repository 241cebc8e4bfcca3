"""What is put beside the rendered weights, and what is not."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import models
import pytest
import torch
from benches import bench
from models import TALL

from streammerge.furnish import furnish
from streammerge.headers import MARK, find

if TYPE_CHECKING:
    from pathlib import Path


def furnished(base: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Render version 0 of a base and furnish it."""
    run = bench(out, base)
    model = run.render(dtype=dtype)
    furnish(base, model, "# the card\n", {"method": "opcm"}, dtype)
    return model


def test_what_servers_need_is_beside_the_weights(tmp_path: Path) -> None:
    """Config, tokenizer, subfolders are copied; other weight formats, hidden files and the card are not."""
    base = tmp_path / "base"
    models.make_base(base, shards=2)
    (base / "1_Pooling").mkdir()
    (base / ".git").mkdir()
    (base / "onnx").mkdir()
    for name in ("vocab.txt", "1_Pooling/config.json", "chat_template.jinja"):
        (base / name).write_text(name)
    unwanted = [
        *(
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "tf_model.h5",
            "flax_model.msgpack",
            "rust_model.ot",
        ),
        *("model.gguf", "old.pt", ".gitattributes", ".git/HEAD", "onnx/model.onnx", "gram.safetensors"),
    ]
    for name in unwanted:
        (base / name).write_bytes(b"not wanted")
    (base / "README.md").write_text("the base's card")
    out = furnished(base, tmp_path / "run")
    for name in (
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "1_Pooling/config.json",
        "chat_template.jinja",
    ):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not [name for name in unwanted if (out / name).exists()]
    assert (out / "README.md").read_text() == "# the card\n"
    assert json.loads((out / MARK).read_bytes()) == {"method": "opcm"}


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_index_fits_what_was_rendered(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """The shard index names every weight in its file, and the size as rendered."""
    models.make_base(tmp_path / "base", dtype=torch.bfloat16, shards=3)
    out = furnished(tmp_path / "base", tmp_path / "run", dtype)
    index = json.loads((out / models.INDEX).read_bytes())
    tensors = {p.name: models.load(p) for p in out.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, found in tensors.items() for name in found}
    assert index["metadata"]["total_size"] == sum(
        v.numel() * v.element_size() for found in tensors.values() for v in found.values()
    )


def test_the_index_keeps_the_name_that_was_read(tmp_path: Path) -> None:
    """Where two indexes lie in the base, the one that was followed is the one that is written."""
    base = tmp_path / "base"
    models.make_base(base, shards=2)
    (base / "consolidated.safetensors.index.json").write_text('{"weight_map": {"w": "other.safetensors"}}')
    out = furnished(base, tmp_path / "run")
    assert set(json.loads((out / models.INDEX).read_bytes())["weight_map"]) == set(models.load(base))
    assert find(out).files == tuple(out / path.name for path in find(base).files)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_another_dtype_is_declared(key: str, tmp_path: Path) -> None:
    """Rendered in float32, config.json says float32 wherever it named the dtype; the rest of it stays."""
    tensors = models.make_base(tmp_path / "made", dtype=torch.bfloat16)
    config = {**models.CONFIG, key: "bfloat16", "text_config": {key: "bfloat16", "layers": 2}}
    models.save(tmp_path / "base", tensors, config=config)
    out = furnished(tmp_path / "base", tmp_path / "run", torch.float32)
    expected = {**config, key: "float32", "text_config": {key: "float32", "layers": 2}}
    assert json.loads((out / "config.json").read_bytes()) == expected
    assert models.load(out)[TALL].dtype == torch.float32


@pytest.mark.parametrize("trick", ["dangling", "loop", "pipe", "read-only"])
def test_odd_things_in_the_bases_folder_are_no_obstacle(trick: str, tmp_path: Path) -> None:
    """A link to nothing or to its own folder, a pipe or a read-only file beside the weights does no harm."""
    base = tmp_path / "base"
    models.make_base(base)
    if trick == "pipe":
        os.mkfifo(base / "pipe")
    elif trick == "read-only":
        (base / "config.json").chmod(0o444)
    else:
        (base / "link").symlink_to("." if trick == "loop" else "gone")
    out = furnished(base, tmp_path / "run", torch.float32)
    assert (out / "config.json").is_file()
    assert sum(1 for _ in out.rglob("*")) < 20


def test_linked_files_are_copied_as_files(tmp_path: Path) -> None:
    """A base out of the Hub's cache, where every file is a link, is furnished with files of its own."""
    models.make_base(tmp_path / "blobs")
    (tmp_path / "base").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "base" / path.name).symlink_to(path)
    out = furnished(tmp_path / "base", tmp_path / "run")
    assert (out / "tokenizer.json").is_file()
    assert not any(path.is_symlink() for path in out.rglob("*"))
