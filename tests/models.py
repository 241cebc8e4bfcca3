"""Toy models for tests: a few small weights of every shape that matters, saved as real safetensors files.

make_base saves a base and gives its tensors; make_fine_tune adds random deltas to them, make_adapter as the
two factors of LoRA; save writes any tensors as a folder or as one .safetensors file; load reads them back
with safetensors itself.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SQUARE = "model.layers.0.q_proj.weight"
TALL = "model.layers.0.up_proj.weight"
WIDE = "model.layers.0.down_proj.weight"
BIAS = "model.layers.0.up_proj.bias"
NORM = "model.norm.weight"
BUFFER = "model.position_ids"
PROJECTED = (SQUARE, TALL, WIDE)

CONFIG = {"architectures": ["ToyForCausalLM"], "model_type": "toy", "hidden_size": 16, "vocab_size": 40}
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}}}
INDEX = "model.safetensors.index.json"


def make_base(
    where: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    head: Literal["none", "tied", "untied"] = "none",
) -> dict[str, Tensor]:
    """Save a base and give its tensors: at a folder, or at one file where the name ends in .safetensors.

    head  "none": declared tied to the embedding and not saved; "tied": saved too; "untied": a head of its own
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).div(4).to(dtype)

    tensors = {
        EMBEDDING: normal(40, 16),
        SQUARE: normal(16, 16),
        TALL: normal(48, 16),
        WIDE: normal(16, 48),
        BIAS: normal(48),
        NORM: normal(16) + 1,
        BUFFER: torch.arange(12).reshape(1, 12),
    }
    if head == "tied":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    elif head == "untied":
        tensors[HEAD] = normal(40, 16)
    declared = {"tie_word_embeddings": head != "untied", "dtype": str(dtype).removeprefix("torch.")}
    save(where, tensors, shards=shards, config={**CONFIG, **declared})
    return tensors


def make_fine_tune(
    where: Path,
    base: Mapping[str, Tensor],
    *,
    seed: int,
    size: float = 0.02,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    shards: int = 1,
    only: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    """Save the base plus random deltas and give the tensors; a head tied to the embedding stays so.

    size   a delta's typical element
    rank   of matrices' deltas; full if None
    dtype  None: each weight keeps the base's
    only   the names that change, all floating-point ones if None
    """
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, values in base.items():
        tensors[name] = values
        if not values.is_floating_point():
            continue
        if only is None or name in only:
            delta = torch.randn(values.shape, generator=random, dtype=torch.float64)
            if rank is not None and values.ndim == 2:
                delta = delta[:, :rank] @ torch.randn(
                    min(rank, values.shape[1]), values.shape[1], generator=random, dtype=torch.float64
                )
            tensors[name] = values + (delta * size).to(values.dtype)
        tensors[name] = tensors[name].to(dtype or values.dtype)
    if HEAD in base and torch.equal(base[HEAD], base[EMBEDDING]):
        tensors[HEAD] = tensors[EMBEDDING].clone()
    save(where, tensors, shards=shards, config=CONFIG)
    return tensors


def make_adapter(where: Path, base: Mapping[str, Tensor], *, seed: int, rank: int = 2) -> None:
    """Save a LoRA adapter of the projected weights."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in PROJECTED:
        module, (rows, columns) = name.removesuffix(".weight"), base[name].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=random) / 8
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=random) / 8
    where.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (where / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, where / "adapter_model.safetensors", metadata={"format": "pt"})


def save(
    where: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> None:
    """Write tensors as one .safetensors file, or as a folder with config.json and tokenizer.json."""
    contiguous = {name: values.contiguous() for name, values in tensors.items()}
    if where.suffix == ".safetensors":
        save_file(contiguous, where, metadata={"format": "pt"})
        return
    where.mkdir(parents=True, exist_ok=True)
    (where / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (where / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    if shards == 1:
        save_file(contiguous, where / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(contiguous.items())[number::shards])
        save_file(part, where / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(values.numel() * values.element_size() for values in contiguous.values())
    (where / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def load(where: Path) -> dict[str, Tensor]:
    """Read every weight of a folder or of one file with safetensors itself."""
    if where.is_file():
        return load_file(where)
    return {
        name: values
        for path in sorted(where.glob("*.safetensors"))
        for name, values in load_file(path).items()
    }
