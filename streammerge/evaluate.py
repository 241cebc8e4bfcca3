"""Measures a model with transformers: `python -m streammerge.evaluate WHAT MODEL`; prints one JSON object.

    loads       builds it by its architecture and runs one forward pass
    perplexity  of a causal model on texts, rows {"text"} with or without {"task"}
    accuracy    rows {"text", "label"}: of a classifier; rows {"prompt" or "question", "choices", "answer"}:
                of a causal model, which chooses what it finds the likeliest; with or without {"task"}

transformers' only door. Nothing of streammerge may import this module: it is a program, which `measuring`
starts with limits. No code of a model's folder is run, nothing is unpickled, nothing is fetched, and what a
folder lacks is never filled at random.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn.functional import cross_entropy, log_softmax

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

SAFELY: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
LONGEST = 2048  # tokens of one row, and of one batch with its padding
POSITIONS_AT_ONCE = 256  # of which logits are held in float32
MOST_TASKS = 1000
SHOWN_KEYS = 5
EVERYTHING = "all"  # the task of rows that name none
FALLBACK_IMAGE = 224  # pixels, where a configuration does not say


def loads(folder: Path, wanted: argparse.Namespace) -> dict[str, Any]:
    """Build the model and run one forward pass: is everything there, and finite what comes out?"""
    started = time.monotonic()
    model, keys = build(folder, _architecture(_config(folder)), wanted.device)
    figures = {
        "parameters": float(sum(p.numel() for p in model.parameters())),
        **{key: float(len(names)) for key, names in keys.items()},
    }
    notes = {key: _some(names) for key, names in keys.items() if names}
    try:
        found = _forward(model)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as exc:  # of a missing input
        figures["forward"], notes["forward"] = 0.0, f"not known what it takes: {str(exc)[:100]}"
    else:
        figures["forward"], figures["finite"] = 1.0, float(all(bool(t.isfinite().all()) for t in found))
    return {"figures": {**figures, "seconds": time.monotonic() - started}, "notes": notes}


def perplexity(folder: Path, wanted: argparse.Namespace) -> dict[str, Any]:
    """Measure how well a causal model foretells texts: the exponential of its mean log-loss a token."""
    rows = read_rows(wanted.data, wanted.max_rows)
    model = whole(folder, transformers.AutoModelForCausalLM, wanted.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **SAFELY)
    most, taken, used = _longest(model, tokenizer), 0, []
    for row in rows:
        ids = tokenizer(_text(row, "text")).input_ids[: min(most, wanted.max_tokens - taken + 1)]
        if len(ids) > 1:
            used.append((row, ids))
            taken += len(ids) - 1
        if taken >= wanted.max_tokens:
            break
    if not used:
        raise ValueError(f"{wanted.data} has no text of two tokens or more")
    losses = token_losses(model, [ids for _, ids in used])
    scored = [
        {"task": _task(row), "log_loss": float(found.mean()), "tokens": len(found)}
        for (row, _), found in zip(used, losses, strict=True)
    ]
    tasks = {
        name: {
            "rows": len(group),
            "tokens": sum(row["tokens"] for row in group),
            "log_loss": sum(row["log_loss"] * row["tokens"] for row in group)
            / sum(r["tokens"] for r in group),
        }
        for name, group in _by_task(scored).items()
    }
    log_loss = sum(task["log_loss"] * task["tokens"] for task in tasks.values()) / taken
    figures = {
        "perplexity": _exp(log_loss), "log_loss": log_loss, "tokens": taken, "texts": len(used),
        **{f"task.{name}": _exp(task["log_loss"]) for name, task in tasks.items() if name != EVERYTHING},
    }  # fmt: skip
    return {"figures": figures, "tasks": tasks, "rows": scored}


def accuracy(folder: Path, wanted: argparse.Namespace) -> dict[str, Any]:
    """Measure which share of the rows of each task a model gets right."""
    rows = read_rows(wanted.data, wanted.max_rows)
    scored = (chosen if "choices" in rows[0] else classified)(folder, rows, wanted.device)
    tasks = {
        name: {
            "rows": len(group),
            "accuracy": sum(row["right"] for row in group) / len(group),
            "log_loss": sum(row["log_loss"] for row in group) / len(group),
        }
        for name, group in _by_task(scored).items()
    }
    worst = min(tasks, key=lambda name: tasks[name]["accuracy"])
    figures = {
        "mean": _mean(task["accuracy"] for task in tasks.values()),
        "worst": tasks[worst]["accuracy"],
        "log_loss": _mean(task["log_loss"] for task in tasks.values()),
        "rows": len(scored),
        **{f"task.{name}": task["accuracy"] for name, task in tasks.items()},
    }
    return {"figures": figures, "notes": {"worst": worst}, "tasks": tasks, "rows": scored}


def classified(folder: Path, rows: Sequence[Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """Have a classifier name each text's label."""
    model = whole(folder, transformers.AutoModelForSequenceClassification, device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **SAFELY)
    most, padding = _longest(model, tokenizer), model.config.pad_token_id
    encoded = [tokenizer(_text(row, "text"), truncation=True, max_length=most).input_ids for row in rows]
    labels = [_label(row, model.config) for row in rows]
    scored = []
    for places in _batches(encoded, most_rows=1 if padding is None else len(rows)):
        with torch.inference_mode():
            logits = model(**_padded([encoded[i] for i in places], model, padding or 0)).logits.float().cpu()
        for i, found in zip(places, logits, strict=True):
            loss = float(cross_entropy(found, torch.tensor(labels[i])))
            right = int(found.argmax()) == labels[i]
            scored.append({"task": _task(rows[i]), "log_loss": loss, "right": right})
    return scored


def chosen(folder: Path, rows: Sequence[Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """Have a causal model choose: the choice that it finds the likeliest after the prompt, whole."""
    model = whole(folder, transformers.AutoModelForCausalLM, device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **SAFELY)
    most, encoded, tails, counts = _longest(model, tokenizer), [], [], []
    for row in rows:
        prompt, choices = _text(row, "prompt" if "prompt" in row else "question"), row.get("choices")
        if not isinstance(choices, list) or len(choices) < 2 or row.get("answer") not in range(len(choices)):
            raise ValueError(f"a row needs two choices or more and the answer's place among them: {row}")
        counts.append(len(choices))
        before = tokenizer(prompt).input_ids
        for choice in choices:
            gap = "" if prompt[-1:].isspace() or str(choice)[:1].isspace() else " "
            ids = tokenizer(f"{prompt}{gap}{choice}").input_ids
            same = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
            tails.append(max(1, len(ids) - max(same, 1)))
            encoded.append(ids[-most:])
    losses = [
        float(found[-tail:].sum()) for found, tail in zip(token_losses(model, encoded), tails, strict=True)
    ]
    scored = []
    for row, count in zip(rows, counts, strict=True):
        scores, losses = -torch.tensor(losses[:count]), losses[count:]
        loss, right = -float(log_softmax(scores, 0)[row["answer"]]), int(scores.argmax()) == row["answer"]
        scored.append({"task": _task(row), "log_loss": loss, "right": right})
    return scored


# The model


def whole(folder: Path, kind: Any, device: str) -> Any:  # noqa: ANN401 -- one of transformers' classes
    """Build a model of one kind; a folder that lacks something of it is an error, never filled at random."""
    model, keys = build(folder, kind, device)
    if keys["missing"] or keys["mismatched"]:
        lacking = _some([*keys["missing"], *keys["mismatched"]])
        raise ValueError(f"{type(model).__name__} needs what the model does not have: {lacking}")
    return model


def build(folder: Path, kind: Any, device: str) -> tuple[Any, dict[str, list[str]]]:  # noqa: ANN401 -- the same
    """Build a model; gives it with the names that are missing, unexpected and mismatched."""
    remote = {} if hasattr(kind, "config_class") else {"trust_remote_code": False}  # only Auto classes ask
    model, found = kind.from_pretrained(
        folder, config=_config(folder), local_files_only=True, use_safetensors=True,
        dtype="auto", output_loading_info=True, **remote,
    )  # fmt: skip
    kinds = ("missing", "unexpected", "mismatched")
    names = {key: sorted(str(name) for name in found[f"{key}_keys"]) for key in kinds}
    return model.eval().to(_device(device)), names


def _config(folder: Path) -> Any:  # noqa: ANN401 -- transformers'
    return transformers.AutoConfig.from_pretrained(folder, **SAFELY)


def _architecture(config: Any) -> Any:  # noqa: ANN401 -- the same
    """Choose the class that the configuration names, where transformers has it."""
    for name in config.architectures or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
    return transformers.AutoModel


def _device(wanted: str) -> str:
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _forward(model: Any) -> list[Tensor]:  # noqa: ANN401 -- the same
    """Run one forward pass on the smallest input there is; gives the outputs of floats."""
    with torch.inference_mode():
        found = model(**_smallest_input(model)).values()
    return [tensor for tensor in found if torch.is_tensor(tensor) and tensor.is_floating_point()]


def _smallest_input(model: Any) -> dict[str, Any]:  # noqa: ANN401 -- the same
    """Make something that the model takes."""
    config = model.config
    if model.main_input_name == "input_ids":
        ids = torch.arange(8, device=model.device)[None] % config.get_text_config().vocab_size
        return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or FALLBACK_IMAGE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (1, getattr(config, "num_channels", None) or 3, height, width)
        return {"pixel_values": torch.zeros(shape, device=model.device, dtype=model.dtype)}
    raise NotImplementedError(model.main_input_name)


def _longest(model: Any, tokenizer: Any) -> int:  # noqa: ANN401 -- the same
    """How many tokens a row may have."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    return int(min(known, tokenizer.model_max_length, LONGEST))


def token_losses(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:  # noqa: ANN401 -- the same
    """Give -ln p of every token but the first of each row, given those before it; float32."""
    found: list[Tensor] = []
    for places in _batches(rows):
        batch = _padded([rows[i] for i in places], model, 0)
        with torch.inference_mode():
            logits = model(**batch, use_cache=False).logits  # [rows, tokens, vocabulary]
            for place, ids, scores in zip(places, batch["input_ids"], logits, strict=True):
                stop = len(rows[place])
                parts = zip(
                    scores[: stop - 1].split(POSITIONS_AT_ONCE),
                    ids[1:stop].split(POSITIONS_AT_ONCE),
                    strict=True,
                )
                found.append(
                    torch.cat([cross_entropy(s.float(), t, reduction="none").cpu() for s, t in parts])
                )
    return found


def _batches(rows: Sequence[Sequence[int]], most_rows: int = LONGEST) -> Iterator[list[int]]:
    """Put rows that stand beside one another together, as many as fit with their padding."""
    batch: list[int] = []
    for place, row in enumerate(rows):
        widest = max(len(row), *(len(rows[i]) for i in batch)) if batch else len(row)
        if batch and (widest * (len(batch) + 1) > LONGEST or len(batch) == most_rows):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _padded(rows: Sequence[Sequence[int]], model: Any, padding: int) -> dict[str, Tensor]:  # noqa: ANN401 -- the same
    """Lay rows of tokens one below the other, filled at their right."""
    width = max(map(len, rows))
    ids = [[*row, *[padding] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }


# The data


def read_rows(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line."""
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if len(rows) == most:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as exc:
                raise ValueError(f"{path}, line {number}: {exc}") from exc
            if not isinstance(row, dict):
                raise TypeError(f"{path}, line {number}: is no JSON object")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row.get(key), str):
        raise TypeError(f"a row needs {key}, a text: {row}")
    return str(row[key])


def _label(row: Mapping[str, Any], config: Any) -> int:  # noqa: ANN401 -- the same
    """Give a label's number."""
    label = row.get("label")
    number = config.label2id.get(label) if isinstance(label, str) else label
    if type(number) is not int or not 0 <= number < config.num_labels:
        raise ValueError(f"the model has no label {label!r}; it has {_some(list(config.label2id))}")
    return number


def _task(row: Mapping[str, Any]) -> str:
    return str(row.get("task", EVERYTHING))


def _by_task(scored: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in scored:
        groups[row["task"]].append(row)
    if len(groups) > MOST_TASKS:
        raise ValueError(f"the data have {len(groups)} tasks, at most {MOST_TASKS} are measured")
    return dict(groups)


def _mean(values: Any) -> float:  # noqa: ANN401 -- any numbers
    found = list(values)
    return float(sum(found) / len(found))


def _exp(log_loss: float) -> float:
    return math.exp(min(log_loss, 700.0)) if not math.isnan(log_loss) else math.nan


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_KEYS
    return ", ".join(names[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")


# The program


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for and print it; what is wrong in words, with exit 1."""
    parser = argparse.ArgumentParser(prog="python -m streammerge.evaluate", description=__doc__)
    parser.add_argument("what", choices=("loads", "perplexity", "accuracy"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, help="rows, one JSON object a line")
    parser.add_argument("--max-tokens", type=int, default=100_000, help="perplexity: how many are measured")
    parser.add_argument("--max-rows", type=int, help="how many rows are read")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--each", action="store_true", help="print every row's log-loss too")
    wanted = parser.parse_args(words)
    if wanted.data is None and wanted.what != "loads":
        parser.error(f"{wanted.what} needs --data")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if wanted.threads is not None:
        torch.set_num_threads(wanted.threads)
    measure = {"loads": loads, "perplexity": perplexity, "accuracy": accuracy}[wanted.what]
    try:
        found = measure(wanted.model, wanted)
    except (ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as exc:
        sys.exit(f"{type(exc).__name__}: {str(exc)[:280]}")
    if not wanted.each:
        found.pop("rows", None)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
