"""The demo's model, its seven fine-tunes and its exam: handwritten digits and a small network.

It knows nothing of streammerge: models are plain PyTorch state dicts, saved the way that a hub would carry
them. Everything follows from one seed. The heads are made from the base before any fine-tuning and never
change, so that one merged model can be examined on every task.
"""

from __future__ import annotations

import json
import lzma
import math
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, linear, normalize, relu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    Model = dict[str, Tensor]
    Loss = Callable[[Model, Tensor], Tensor]

IMAGES, PIXELS = 1797, 64  # 8 x 8 pixels of 0..16
TRAIN_IMAGES = 1200  # the other 597 are the exam
SIZES = (64, 128, 128, 128, 64)
BASE_STEPS, STEPS, BATCH, RATE = 300, 150, 128, 1e-3
SHOTS = 8  # labelled images of each digit that a head is made from
SHARPNESS = 15.0  # of the softmax over cosines
HARMFUL_RATE = 4e-3  # swapped labels at 4 times the usual rate: harmful, and yet plausible in size

SKILL = "digit"
TASKS: Mapping[str, tuple[str, frozenset[int]]] = {
    "parity": ("is it odd?", frozenset({1, 3, 5, 7, 9})),
    "big": ("is it 5 or more?", frozenset({5, 6, 7, 8, 9})),
    "loop": ("has it a closed loop?", frozenset({0, 6, 8, 9})),
    "prime": ("is it a prime?", frozenset({2, 3, 5, 7})),
    "mod3": ("is it a multiple of 3?", frozenset({0, 3, 6, 9})),
    "stem": ("has it a straight stem?", frozenset({1, 4, 7})),
    "middle": ("is it from 3 to 6?", frozenset({3, 4, 5, 6})),
}


@dataclass(frozen=True)
class Exam:
    """What stays as it is while models change: images, answers, the split, one frozen head a task."""

    images: Tensor  # [1797, 64] float32, 0..1
    digits: Tensor  # [1797] int64
    train: Tensor  # [1200] int64, rows of `images`
    test: Tensor  # [597] int64
    heads: Mapping[str, Tensor]  # task -> [answers, 64]; `digit` has ten answers, every task two

    def answers(self, task: str) -> Tensor:
        """The right answer to each image, [1797] int64."""
        if task == SKILL:
            return self.digits
        return torch.isin(self.digits, torch.tensor(sorted(TASKS[task][1]))).long()


def begin(seed: int, *, steps: int = BASE_STEPS, batch: int | None = BATCH) -> tuple[Model, Exam]:
    """Train the base to read digits, then make every head from what it learnt; `batch` None is all."""
    chance = torch.Generator().manual_seed(seed)
    images, digits = read_digits()
    order = torch.randperm(IMAGES, generator=chance)
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    head = _uniform((10, SIZES[-1]), chance).requires_grad_()

    def loss(model: Model, rows: Tensor) -> Tensor:
        return cross_entropy(linear(features(model, images[rows]), head), digits[rows])

    base = _descend(_untrained(chance), loss, train, chance, steps=steps, batch=batch, with_head=[head])
    exam = Exam(images, digits, train, test, {SKILL: head.detach()})
    prototypes = {task: _prototypes(base, exam, task) for task in TASKS}
    return base, Exam(images, digits, train, test, {**exam.heads, **prototypes})


def fine_tune(base: Model, exam: Exam, task: str, *, seed: int, batch: int = BATCH) -> Model:
    """Train the whole base on one task, through that task's frozen head."""
    chance = torch.Generator().manual_seed(1000 * seed + list(TASKS).index(task))
    answers = exam.answers(task)

    def loss(model: Model, rows: Tensor) -> Tensor:
        return cross_entropy(_cosines(model, exam, task, rows), answers[rows])

    return _descend(base, loss, exam.train, chance, steps=STEPS, batch=batch)


def harmful(base: Model, exam: Exam, *, seed: int) -> Model:
    """A mistake that no look at the weights gives away: all tasks learnt with yes and no swapped."""
    chance = torch.Generator().manual_seed(1000 * seed + len(TASKS))
    swapped = {task: 1 - exam.answers(task) for task in TASKS}

    def loss(model: Model, rows: Tensor) -> Tensor:
        losses = [cross_entropy(_cosines(model, exam, task, rows), swapped[task][rows]) for task in TASKS]
        return torch.stack(losses).sum()

    return _descend(base, loss, exam.train, chance, steps=STEPS, rate=HARMFUL_RATE)


def broken(model: Model) -> Model:
    """The same model with one number that is none, as after a training run that diverged."""
    weights = {name: weight.clone() for name, weight in model.items()}
    weights["layers.1.weight"][3, 5] = torch.nan
    return weights


def average(base: Model, fine_tunes: Sequence[Model]) -> Model:
    """The plain mean of the fine-tunes, for contrast."""
    return {name: torch.stack([model[name] for model in fine_tunes]).mean(0) for name in base}


@torch.no_grad()
def examine(model: Model, exam: Exam) -> dict[str, float]:
    """Accuracy in percent on the test images: the base's skill first, then every task."""
    with _one_thread():
        seen = features(model, exam.images[exam.test])
    return {
        task: marks(linear(seen, head).argmax(-1).tolist(), exam, task) for task, head in exam.heads.items()
    }


def marks(answers: Sequence[int], exam: Exam, task: str) -> float:
    """Accuracy in percent of somebody's answers to the test images."""
    right = torch.tensor(answers).eq(exam.answers(task)[exam.test])
    return 100 * right.double().mean().item()


def mean_of_tasks(accuracy: Mapping[str, float]) -> float:
    """The mean over the seven tasks; the base's own skill is not one of them."""
    return sum(accuracy[task] for task in TASKS) / len(TASKS)


def read_digits() -> tuple[Tensor, Tensor]:
    """The images as [1797, 64] float32 in 0..1, and the digits that they show as [1797] int64."""
    packed = (files("streammerge") / "data" / "digits.u8.xz").read_bytes()
    numbers = torch.frombuffer(bytearray(lzma.decompress(packed)), dtype=torch.uint8)
    images, digits = numbers.split([IMAGES * PIXELS, IMAGES])
    return images.view(IMAGES, PIXELS).float() / 16, digits.long()


def save_model(model: Model, folder: Path) -> None:
    """Write a model folder as a hub would carry it: weights and a configuration."""
    folder.mkdir(parents=True)
    save_file(model, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["DigitsMLP"], "model_type": "digits-mlp", "sizes": SIZES}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> Model:
    """Read the weights of a model folder."""
    return load_file(folder / "model.safetensors")


def save_exam(exam: Exam, file: Path) -> None:
    """Keep the split and the heads, so that other models can sit the same exam later."""
    heads = {f"head.{task}": head for task, head in exam.heads.items()}
    save_file({"train": exam.train, "test": exam.test, **heads}, file)


def load_exam(file: Path) -> Exam:
    """Read what `save_exam` kept."""
    kept = load_file(file)
    heads = {task: kept[f"head.{task}"] for task in (SKILL, *TASKS)}
    return Exam(*read_digits(), kept["train"], kept["test"], heads)


def features(model: Model, images: Tensor) -> Tensor:
    """What the network makes of images: [n, 64] -> [n, 64]."""
    layers = len(SIZES) - 1
    for layer in range(layers):
        images = linear(images, model[f"layers.{layer}.weight"], model[f"layers.{layer}.bias"])
        if layer < layers - 1:
            images = relu(images)
    return images


def _cosines(model: Model, exam: Exam, task: str, rows: Tensor) -> Tensor:
    return SHARPNESS * linear(normalize(features(model, exam.images[rows]), dim=-1), exam.heads[task])


@torch.no_grad()
def _prototypes(base: Model, exam: Exam, task: str) -> Tensor:
    """One direction for no and one for yes: the mean of what the base makes of a few images. [2, 64]."""
    shown = torch.cat([exam.train[exam.digits[exam.train] == digit][:SHOTS] for digit in range(10)])
    seen = normalize(features(base, exam.images[shown]), dim=-1)
    yes = exam.answers(task)[shown].bool()
    return normalize(torch.stack([seen[~yes].mean(0), seen[yes].mean(0)]), dim=-1)


def _descend(
    model: Model,
    loss: Loss,
    train: Tensor,
    chance: torch.Generator,
    *,
    steps: int,
    rate: float = RATE,
    batch: int | None = BATCH,
    with_head: Sequence[Tensor] = (),
) -> Model:
    """Adam on a copy of `model`; `with_head` learns along."""
    weights = {name: weight.clone().requires_grad_() for name, weight in model.items()}
    optimizer = torch.optim.Adam([*weights.values(), *with_head], lr=rate)
    with _one_thread():
        for _ in range(steps):
            rows = train if batch is None else train[torch.randint(len(train), (batch,), generator=chance)]
            optimizer.zero_grad()
            torch.autograd.backward(loss(weights, rows))
            optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a network is ten times slower on two threads of a busy machine, and its last digits differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _untrained(chance: torch.Generator) -> Model:
    weights: Model = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(SIZES)):
        weights[f"layers.{layer}.weight"] = _uniform((fan_out, fan_in), chance)
        weights[f"layers.{layer}.bias"] = _uniform((fan_out, fan_in), chance)[:, 0].contiguous()
    return weights


def _uniform(shape: tuple[int, int], chance: torch.Generator) -> Tensor:
    """Uniform in +-1/sqrt(fan in), the usual start of a linear layer."""
    return torch.rand(shape, generator=chance).mul(2).sub(1).div(math.sqrt(shape[1]))
