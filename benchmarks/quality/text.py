"""The text tier: MiniLM-L6, really pretrained, fine-tuned on ten real text tasks. About two minutes.

Each task's head is frozen and weak: 20 x the pretrained model's own embedding of the classes' names, as CLIP
has it. So the base knows something of every task, and an expert can learn much; a head trained on the base's
embeddings would leave nothing to learn. Embeddings and the lower three layers are frozen, too, and computed
once; a model, to be merged, is the 48 weights of the upper three.

    python benchmarks/quality/text.py    makes the tier, and prints base and experts
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from texts import TEXTS, Task, minilm, tasks
from tier import Tier, batches, folders, kept, load_model, save_model
from tokenizers import Tokenizer
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

Weights = dict[str, "Tensor"]

LAYERS, FROZEN, HEADS, EPSILON = 6, 3, 12, 1e-12  # of MiniLM-L6-H384
TOKENS = 16
TRAIN = 700  # of TEXTS; the others are the exam
STEPS, BATCH, RATE = 80, 16, 2e-4
SHARPNESS = 20.0
SEED = 0
ROWS = 100  # at a time, where nothing is trained


def tiers() -> list[Tier]:
    """Make the one tier, or find it made."""
    found = tasks()
    names = tuple(task.name for task in found)
    root = kept("text-10", _settings(found), lambda folder: _make(folder, found))
    exam = load_file(root / "exam.safetensors")

    def accuracy(weights: Mapping[str, Tensor]) -> list[float]:
        return [_right(weights, _part(exam, name)) for name in names]

    return [Tier("text-10", root / "base", folders(root, names), names, accuracy)]


def _make(folder: Path, found: list[Task]) -> None:
    """Fill the tier's folder: the base, an expert a task, and the exam."""
    pretrained, config = minilm(), json.loads((minilm() / "config.json").read_text(encoding="utf-8"))
    weights = load_file(pretrained / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(pretrained / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    base = {name: weights[name] for name in weights if _depth(name) >= FROZEN}
    save_model(base, folder / "base", config)
    exam: Weights = {}
    for task in found:
        lessons = _read(task, weights, tokenizer)
        save_model(_fine_tune(base, lessons), folder / task.name, config)
        lessons |= {name: lessons[name][TRAIN:].clone() for name in ("hidden", "keep", "targets")}
        exam |= {f"{task.name}.{name}": values for name, values in lessons.items()}
    save_file(exam, folder / "exam.safetensors")


def _settings(found: list[Task]) -> dict[str, object]:
    return {
        "tasks": hashlib.sha256(repr(found).encode()).hexdigest(),
        "shape": [TEXTS, TRAIN, TOKENS, FROZEN],
        "training": [STEPS, BATCH, RATE, SHARPNESS, SEED],
    }


# ------------------------------------------------------------------------------------------------- one task


def _read(task: Task, weights: Weights, tokenizer: Tokenizer) -> Weights:
    """Turn texts into what the upper layers take.

    hidden   [texts, TOKENS, 384] float16, what the frozen layers make of the texts
    keep     [texts, TOKENS] bool, where a token stands
    targets  [texts] int64
    head     [classes, 384] float32
    """
    hidden, keep = _lower(task.texts, weights, tokenizer)
    with torch.no_grad():
        head = SHARPNESS * _upper(*_lower(task.labels, weights, tokenizer), weights)
    return {"hidden": hidden.half(), "keep": keep, "targets": torch.tensor(task.targets), "head": head}


def _fine_tune(base: Weights, lessons: Weights) -> Weights:
    """Train all 48 weights on the first 700 texts; the head stays as it is."""
    chance = torch.Generator().manual_seed(SEED)
    trained = {name: values.clone().requires_grad_() for name, values in base.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE)
    for rows in batches(chance, TRAIN, BATCH, STEPS):
        loss = functional.cross_entropy(_scores(trained, lessons, rows), lessons["targets"][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: values.detach() for name, values in trained.items()}


def _scores(weights: Mapping[str, Tensor], lessons: Weights, rows: Tensor) -> Tensor:
    """[rows, classes] float32, in bf16 arithmetic."""
    with torch.autocast("cpu", torch.bfloat16):
        vectors = _upper(lessons["hidden"][rows].float(), lessons["keep"][rows], weights)
    return vectors @ lessons["head"].T


def _right(weights: Mapping[str, Tensor], lessons: Weights) -> float:
    """Percent of the texts whose class scores highest."""
    weights, targets = {name: values.float() for name, values in weights.items()}, lessons["targets"]
    with torch.no_grad():
        guesses = torch.cat([_scores(weights, lessons, rows).argmax(1) for rows in _all_rows(targets)])
    return 100 * int((guesses == targets).sum()) / len(targets)


def _part(exam: Weights, task: str) -> Weights:
    """One task's tensors, by their names in `_read`."""
    return {name.rpartition(".")[2]: values for name, values in exam.items() if name.startswith(f"{task}.")}


def _all_rows(of: Tensor) -> list[Tensor]:
    return list(torch.arange(len(of)).split(ROWS))


# ---------------------------------------------------------------------------------------------- the network


@torch.no_grad()
def _lower(texts: tuple[str, ...], weights: Weights, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Embed the texts and apply the frozen layers: [texts, TOKENS, 384] float32, and where tokens stand."""
    read = tokenizer.encode_batch(list(texts))
    ids = torch.tensor([text.ids for text in read])
    keep = torch.tensor([text.attention_mask for text in read]).bool()
    places = weights["embeddings.position_embeddings.weight"][:TOKENS]
    places = places + weights["embeddings.token_type_embeddings.weight"][0]
    hidden = torch.empty(len(texts), TOKENS, places.shape[1])
    for rows in _all_rows(ids):
        part = weights["embeddings.word_embeddings.weight"][ids[rows]] + places
        part = _norm(part, weights, "embeddings.LayerNorm")
        for number in range(FROZEN):
            part = _layer(part, keep[rows], weights, f"encoder.layer.{number}")
        hidden[rows] = part
    return hidden, keep


def _upper(hidden: Tensor, keep: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Apply the layers that are fine-tuned: one vector a text, the mean over its tokens, of length one."""
    for number in range(FROZEN, LAYERS):
        hidden = _layer(hidden, keep, weights, f"encoder.layer.{number}")
    total = (hidden.float() * keep[..., None]).sum(1)  # the mean has the same direction
    return functional.normalize(total, dim=-1)


def _layer(hidden: Tensor, keep: Tensor, weights: Mapping[str, Tensor], path: str) -> Tensor:
    """One layer of BERT (arXiv 1810.04805), [texts, tokens, width] to the same."""

    def split(name: str) -> Tensor:  # [texts, heads, tokens, width / heads]
        made = _linear(hidden, weights, f"{path}.attention.self.{name}")
        return made.view(*made.shape[:2], HEADS, -1).transpose(1, 2)

    query, key, value = split("query"), split("key"), split("value")
    seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=keep[:, None, None, :])
    seen = _linear(seen.transpose(1, 2).flatten(2), weights, f"{path}.attention.output.dense")
    hidden = _norm(hidden + seen, weights, f"{path}.attention.output.LayerNorm")
    thought = functional.gelu(_linear(hidden, weights, f"{path}.intermediate.dense"))
    thought = _linear(thought, weights, f"{path}.output.dense")
    return _norm(hidden + thought, weights, f"{path}.output.LayerNorm")


def _linear(rows: Tensor, weights: Mapping[str, Tensor], path: str) -> Tensor:
    return functional.linear(rows, weights[f"{path}.weight"], weights[f"{path}.bias"])


def _norm(rows: Tensor, weights: Mapping[str, Tensor], path: str) -> Tensor:
    weight, bias = weights[f"{path}.weight"], weights[f"{path}.bias"]
    return functional.layer_norm(rows, weight.shape, weight, bias, EPSILON)


def _depth(name: str) -> int:
    """Number of the layer that a weight belongs to, -1 outside the layers."""
    return int(name.split(".")[2]) if name.startswith("encoder.layer.") else -1


def main() -> None:
    torch.set_num_threads(1)
    (tier,) = tiers()
    base = tier.accuracy(load_model(tier.base))
    print(f"{'task':<14}{'base':>6}{'expert':>8}")
    for number, (task, folder) in enumerate(zip(tier.tasks, tier.experts, strict=True)):
        print(f"{task:<14}{base[number]:6.1f}{tier.accuracy(load_model(folder))[number]:8.1f}", flush=True)


if __name__ == "__main__":
    main()
