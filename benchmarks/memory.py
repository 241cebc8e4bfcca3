"""Does the memory of a fold depend on the model's size or on how many fine-tunes came before?

Makes a Llama-shaped bf16 model of random numbers, publishes fine-tunes of it one after the other, and folds
each with `streammerge run --once` in a process of its own, whose peak resident set the kernel reports. The
bound is 160 MiB + 8 x the float32 bytes of the largest projected weight, over a process that has only
imported torch and safetensors; the last fold must cost what the second did, within 5 %.

    python benchmarks/memory.py                  1 GiB, 12 fine-tunes
    python benchmarks/memory.py --gib 0.1        a quick look
    python benchmarks/memory.py --adapters 16    LoRA adapters of rank 16 in place of full weights
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

MIB = 1 << 20
BOUND_MIB = 160
BOUND_WEIGHTS = 8
GROWTH = 1.05
SHARD_BYTES = 256 * MIB
SAMPLE_SECONDS = 0.01


def shapes(gib: float, hidden: int) -> dict[str, tuple[int, ...]]:
    """Llama's names and shapes, as many layers as fit into `gib` at two bytes a number."""
    ffn, vocabulary = hidden * 11 // 4, 32 * hidden
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden // 4, hidden),
        "self_attn.v_proj.weight": (hidden // 4, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    numbers = 2 * vocabulary * hidden
    while 2 * numbers < gib * (1 << 30):
        index = len(found) // len(layer)
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        numbers += sum(torch.Size(shape).numel() for shape in layer.values())
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Make normal random numbers, the same for one seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_model(folder: Path, table: dict[str, tuple[int, ...]], seed: int) -> None:
    """Write a sharded model: seed 0 is the base, others the base and a little noise; a shard in memory."""
    folder.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    held = number = 0
    for position, (name, shape) in enumerate(table.items()):
        values = noise(shape, position).mul_(0.02)
        if seed:
            values += noise(shape, 10_000 * seed + position).mul_(0.0004)
        shard[name] = values.bfloat16()
        held += shard[name].numel() * 2
        weight_map[name] = f"model-{number:05d}.safetensors"
        if held > SHARD_BYTES or position == len(table) - 1:
            save_file(shard, folder / weight_map[name])
            shard, held, number = {}, 0, number + 1
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))


def write_adapter(folder: Path, table: dict[str, tuple[int, ...]], seed: int, rank: int) -> None:
    """Write a LoRA adapter of every linear layer."""
    folder.mkdir(parents=True)
    tensors = {}
    for position, (name, (rows, *columns)) in enumerate(table.items()):
        if ".layers." in name and columns:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = noise((rank, columns[0]), 10_000 * seed + position).mul_(0.02)
            tensors[f"{path}.lora_B.weight"] = noise((rows, rank), 20_000 * seed + position).mul_(0.02)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def peak_mib(argv: list[str]) -> tuple[float, float]:
    """Run a program to its end: its peak resident set in MiB, and its seconds.

    From /proc while it runs: what wait4 reports would count this process, from which it was started, too.
    """
    started = time.monotonic()
    process = subprocess.Popen(argv, stderr=subprocess.PIPE)
    errors, peak = bytearray(), 0
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    while process.poll() is None:
        errors += process.stderr.read() or b""
        with suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(status.split("VmHWM:")[1].split()[0])
        time.sleep(SAMPLE_SECONDS)
    errors += process.stderr.read() or b""
    if process.returncode:
        sys.exit(errors.decode())
    return peak / 1024, time.monotonic() - started


def main() -> None:
    """Measure, print the table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--fine-tunes", type=int, default=12)
    parser.add_argument("--tail", default="scalar")
    parser.add_argument("--adapters", type=int, default=0, metavar="RANK", help="publish LoRA adapters")
    parser.add_argument("--folder", type=Path, default=None, help="where there is room")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="streammerge-memory-", dir=options.folder))
    try:
        measure(work, options)
    finally:
        for path in work.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)  # sealed versions are read-only
        shutil.rmtree(work)


def measure(work: Path, options: argparse.Namespace) -> None:
    """Fold one fine-tune after the other, each in a process of its own."""
    table = shapes(options.gib, options.hidden)
    write_model(work / "base", table, 0)
    (work / "published").mkdir()
    (work / "streammerge.yaml").write_text(
        "base: ./base\nstore: ./store\nmethod: opcm\n"
        f"knobs: {{tail: {options.tail}}}\nkeep: 1\ngrace: 0s\nreserve: 1MB\n"
        "sources: [{name: team, type: directory, path: ./published, settle: 0s}]\n"
    )
    run = [sys.executable, "-m", "streammerge", "run", "--once", "-c", str(work / "streammerge.yaml")]
    idle = min(peak_mib([sys.executable, "-c", "import torch, safetensors.torch"])[0] for _ in range(3))
    peak_mib(run)  # version 0
    rows = []
    for number in range(1, options.fine_tunes + 1):
        if options.adapters:
            write_adapter(work / "fresh", table, number, options.adapters)
        else:
            write_model(work / "fresh", table, number)
        (work / "fresh").rename(work / "published" / f"fine-tune-{number:02d}")
        peak, seconds = peak_mib(run)
        shutil.rmtree(work / "published" / f"fine-tune-{number:02d}")
        rows.append(
            {"fine_tune": number, "over_idle_mib": round(peak - idle, 1), "seconds": round(seconds, 1)}
        )
        print(f"fine-tune {number:2}   {peak - idle:7.1f} MiB over idle   {seconds:6.1f} s", flush=True)
    report(table, options, idle, rows)


def report(
    table: dict[str, tuple[int, ...]], options: argparse.Namespace, idle: float, rows: list[dict[str, float]]
) -> None:
    """Hold the figures against the bound."""
    largest = max(torch.Size(s).numel() for n, s in table.items() if len(s) == 2 and "layers" in n) * 4 / MIB
    bound = BOUND_MIB + BOUND_WEIGHTS * largest
    worst = max(row["over_idle_mib"] for row in rows)
    growth = rows[-1]["over_idle_mib"] / rows[1]["over_idle_mib"]
    print(f"\nbound {bound:.1f} MiB (160 + 8 x {largest:.1f}), worst {worst:.1f}, growth {growth:.3f}")
    print(
        json.dumps(
            {
                "benchmark": "memory",
                "model_gib": round(2 * sum(torch.Size(s).numel() for s in table.values()) / (1 << 30), 3),
                "hidden": options.hidden,
                "tail": options.tail,
                "adapters": options.adapters,
                "idle_mib": round(idle, 1),
                "largest_projected_mib": round(largest, 1),
                "bound_mib": round(bound, 1),
                "worst_over_idle_mib": worst,
                "last_over_second": round(growth, 4),
                "holds": worst <= bound and growth <= GROWTH,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "machine": platform.machine(),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
