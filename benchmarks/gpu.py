"""How long from an arrival to merged weights for a model of eight billion numbers, with its state on a GPU?

A bf16 model of random numbers in Llama-3-8B's shapes, base and fine-tunes in host memory; OPCM with tail
scalar, its running sum resident on the device. The first arrival finds no sum; every later one has to derive
a basis of each weight before it is folded. Then one step on a 4096 x 4096 weight, and the eigenvectors of its
Gram matrix by each library that torch can ask.

    python benchmarks/gpu.py                          as many of the 32 layers as there is room for
    python benchmarks/gpu.py --layers 4               fewer
    python benchmarks/gpu.py --models D --states D    folders for models and for states
    python benchmarks/gpu.py --quick                  tiny shapes, on the CPU where there is no CUDA device

Without a CUDA device it says so and ends.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hotpath
import torch
from common import (
    GIB,
    bytes_of,
    finish,
    fold_once,
    interleaved,
    leave,
    notes,
    options,
    progress,
    say,
    table,
    workplace,
)
from safetensors.torch import load_file, save_file

from streammerge import linalg
from streammerge.engine import Engine
from streammerge.offline import Job, Request

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping

    from torch import Tensor

    Names = Mapping[str, tuple[int, ...]]

LAYERS = 32
SIZES, QUICK_SIZES = (4096, 14336, 1024, 128256), (64, 160, 32, 512)  # hidden, ffn, keys, vocabulary
SIDE, QUICK_SIDE = 4096, 64
ARRIVALS = 3
ROUNDS = 3
ROOM = 0.9  # share of the free space that is used
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 -- host memory is where the models are to lie
LIBRARIES = ("default", "cusolver", "magma")


# ------------------------------------------------------------------------------------------------- the models


def shapes(layers: int, hidden: int, ffn: int, keys: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Llama-3's names and shapes."""
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(layers):
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def numbers(names: Names) -> int:
    """How many numbers a model has."""
    return sum(torch.Size(shape).numel() for shape in names.values())


def layers_that_fit(models: Path, states: Path) -> int:
    """As many layers as there is room for: base, fine-tune and model in one place, two states in the other.

    A bf16 model has two bytes a number, a state four; two folders of one file system share its room.
    """
    free = {path.stat().st_dev: shutil.disk_usage(path).free * ROOM for path in (models, states)}
    for layers in range(LAYERS, 0, -1):
        size = numbers(shapes(layers, *SIZES))
        wanted = dict.fromkeys(free, 0)
        wanted[models.stat().st_dev] += 6 * size
        wanted[states.stat().st_dev] += 8 * size
        if all(wanted[place] <= free[place] for place in free):
            return layers
    raise SystemExit(f"not even one layer fits into {models} and {states}")


def file_of(name: str) -> str:
    """A file a layer, and one for each weight outside the layers."""
    words = name.split(".")
    return f"model-{words[2] if 'layers' in words else words[-2]}.safetensors"


def write(folder: Path, names: Names, number: int, device: torch.device, base: Path | None = None) -> None:
    """Write a model: random numbers, or those of `base` and a little noise; one file in memory.

    The numbers are drawn on the device, for on a core eight billion of them take minutes.
    """
    folder.mkdir()
    chance = torch.Generator(device).manual_seed(number)
    weight_map = {name: file_of(name) for name in names}
    for file in dict.fromkeys(weight_map.values()):
        before = load_file(base / file) if base else {}
        shard: dict[str, Tensor] = {}
        for name in (name for name in names if weight_map[name] == file):
            made = torch.randn(names[name], generator=chance, device=device)
            made = made.mul_(0.0004).add_(before[name].to(device)) if before else made.mul_(0.02)
            shard[name] = made.bfloat16().cpu()
            del made
        save_file(shard, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ measurement


def settle(device: torch.device) -> Callable[[], None]:
    """Wait for the device."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def arrivals(models: Path, states: Path, names: Names, device: torch.device) -> list[dict[str, Any]]:
    """Fold and render one fine-tune after the other, the state resident on the device."""
    progress("gpu: writing the base")
    write(models / "base", names, 0, device)
    request = Request(models / "base", (), states / "nowhere", "opcm", {"tail": "scalar"})
    job = Job.begin(request, Engine(device=str(device), residency="device"), states)
    found = []
    for number in range(1, ARRIVALS + 1):
        progress(f"gpu: writing fine-tune {number} of {ARRIVALS}")
        fine_tune, out = models / f"fine-tune-{number}", models / "merged"
        write(fine_tune, names, number, device, models / "base")
        settle(device)()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        progress(f"gpu: folding fine-tune {number} of {ARRIVALS}")
        seconds = fold_once(job, fine_tune, out)
        settle(device)()
        peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
        found.append({"arrival": number, **seconds, "device_gib": peak})
        shutil.rmtree(fine_tune)
        shutil.rmtree(out)
    return found


def eigenvectors(side: int, device: torch.device) -> list[dict[str, Any]]:
    """Median seconds of eigh of a Gram matrix, by precision and by the library that torch is told to ask."""
    matrix = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for library in LIBRARIES if device.type == "cuda" else LIBRARIES[:1]:
        for dtype in (torch.float32, torch.float64):
            gram = linalg.cross(matrix, matrix).to(dtype)
            try:
                if device.type == "cuda":
                    torch.backends.cuda.preferred_linalg_library(library)
                run = {"eigh": partial(torch.linalg.eigh, gram)}
                seconds: float | None = interleaved(run, ROUNDS, settle(device))["eigh"]
                refused = ""
            except RuntimeError as exc:  # how torch says that it was built without a library
                seconds, refused = None, str(exc).partition("\n")[0]
            found.append(
                {"library": library, "dtype": str(dtype)[6:], "seconds": seconds, "refused": refused}
            )
    if device.type == "cuda":
        torch.backends.cuda.preferred_linalg_library("default")
    return found


# ----------------------------------------------------------------------------------------------------- report


def text(found: dict[str, Any]) -> str:
    """The three tables."""
    head = ("arrival", "seconds", "fold", "render", "peak GiB on the device")
    keys = ("arrival", "seconds", "fold", "render", "device_gib")
    kind = ("first: no sum yet", *["basis not prepared"] * (ARRIVALS - 1))
    rows = [
        [f"{row['arrival']}, {what}", *(row.get(key) for key in keys[1:])]
        for row, what in zip(found["arrivals"], kind, strict=True)
    ]
    libraries = [(f"{one['library']}, {one['dtype']}", one["seconds"]) for one in found["eigenvectors"]]
    title = (
        f"Arrivals on {found['device_name']}: {found['layers']} of {LAYERS} layers, {found['numbers']:,} "
        f"numbers, a bf16 model of {found['model_gib']:.2f} GiB"
    )
    return "\n\n".join(
        (
            title,
            table(head, rows),
            hotpath.text(found["step"]),
            f"Eigenvectors of a {found['side']} x {found['side']} matrix by library and precision",
            table(("", "seconds"), libraries),
        )
    )


NOTES = notes(
    "An arrival is one fold and one rendering by the engine: base and fine-tune are read from the folder of "
    "models, the new state is written to the folder of states and kept on the device, the merged model is "
    "written to the folder of models; all is hashed on the host.",
    "The fine-tune was just written, so it is in memory wherever its folder is. Models lie in "
    "shared memory unless told otherwise, states in the folder for temporary files.",
    "Random deltas have full rank and no leading directions; ranks, and so seconds, of real ones differ.",
)


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=0, help="as many as there is room for, where left out")
    parser.add_argument("--models", type=Path, default=SHARED_MEMORY, help="folder for models")
    parser.add_argument("--states", type=Path, default=Path(tempfile.gettempdir()), help="folder for states")
    asked = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not asked.quick:
        leave("torch finds no CUDA device here: nothing to measure (--quick runs tiny shapes on the CPU)")
    report(asked, torch.device("cuda" if has_gpu else "cpu"))


def report(asked: argparse.Namespace, device: torch.device) -> None:
    """All three parts."""
    layers = asked.layers or (1 if asked.quick else layers_that_fit(asked.models, asked.states))
    names = shapes(layers, *(QUICK_SIZES if asked.quick else SIZES))
    side = QUICK_SIDE if asked.quick else SIDE
    with workplace("gpu-models", asked.models) as models, workplace("gpu-states", asked.states) as states:
        rows = arrivals(models, states, names, device)
        model_gib = bytes_of(models / "base") / GIB
    progress("gpu: one step on one weight")
    found = {
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        "layers": layers,
        "numbers": numbers(names),
        "model_gib": model_gib,
        "side": side,
        "arrivals": rows,
        "step": hotpath.measure((side, side), ROUNDS, device.type),
        "eigenvectors": eigenvectors(side, device),
    }
    say(text(found), NOTES)
    finish("gpu", found)


if __name__ == "__main__":
    main()
