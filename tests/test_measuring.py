"""Programs that measure: what they may take, how they end, what `streammerge.evaluate` says of a model."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import language
import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from streammerge import evaluate, measuring, programs
from streammerge.errors import TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable

MEGABYTE = 1 << 20
TEXTS = [{"text": f"w1 w2 w{i} w{i + 1} w4", "task": "odd" if i % 2 else "even"} for i in range(7)]

# Programs and their limits


def python(lines: str) -> list[str]:
    """The command line of a program."""
    return [sys.executable, "-c", lines]


def test_a_program_that_takes_too_much_memory_is_ended() -> None:
    """What it and its children hold counts together; the daemon's memory is not asked for it."""
    flood = "import os, time\nos.fork() or None\nheld = bytearray(120 << 20)\ntime.sleep(60)"
    started = time.monotonic()
    with pytest.raises(programs.OverMemory) as ended:
        programs.run(python(flood), {}, 30.0, memory=200 * MEGABYTE)
    assert 200 * MEGABYTE < ended.value.used < 300 * MEGABYTE
    assert time.monotonic() - started < 20


def test_what_processes_share_counts_once() -> None:
    """A child that only reads what its parent holds takes nothing."""
    lines = "import os, time\nheld = bytearray(120 << 20)\nos.fork()\ntime.sleep(1)\nprint(len(held))"
    code, output, _ = programs.run(python(lines), {}, 30.0, memory=200 * MEGABYTE)
    assert (code, output.split()) == (0, ["125829120"] * 2)


def test_pages_of_a_file_are_no_memory_of_a_program(tmp_path: Path) -> None:
    """Weights that are mapped, as every loader of safetensors does, can be dropped by the kernel."""
    with (tmp_path / "weights").open("wb") as file:
        file.write(bytes(120 * MEGABYTE))
    lines = (
        "import mmap, sys, time\nfile = open(sys.argv[1], 'rb')\n"
        "held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "sum(held[::4096])\ntime.sleep(1)\nprint('read')"
    )
    code, output, errors = programs.run(
        [*python(lines), str(tmp_path / "weights")], {}, 30.0, memory=60 * MEGABYTE
    )
    assert (code, output.strip()) == (0, "read"), errors


def test_an_expendable_program_is_the_first_that_the_kernel_ends() -> None:
    """When memory runs out the kernel takes it, not the daemon."""
    lines = "import time\ntime.sleep(0.5)\nprint(open('/proc/self/oom_score_adj').read())"
    assert programs.run(python(lines), {}, 30.0, is_expendable=True)[1].strip() == "1000"
    assert programs.run(python(lines), {}, 30.0)[1] == f"{Path('/proc/self/oom_score_adj').read_text()}\n"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("import time; time.sleep(60)", "did not end within 1 s"),
        (
            "held = bytearray(300 << 20); import time; time.sleep(60)",
            "used more than its memory limit of 200MiB",
        ),
        (
            "import os; os.kill(os.getpid(), 9)",
            "was ended by SIGKILL, as the kernel does when memory runs out",
        ),
        ("import os; os.abort()", "was ended by SIGABRT: no output"),
        ("import sys; sys.exit('no such exam')", "failed with exit 1: no such exam"),
        ("print('fine')", "printed no JSON object of numbers: fine"),
        ("print('[1]')", "printed no JSON object of numbers: [1]"),
    ],
)
def test_how_a_program_failed_is_said_in_words(lines: str, words: str) -> None:
    """A hang, a flood of memory, a kill and a crash are told apart."""
    limit = 1.0 if "sleep(60)" in lines and "held" not in lines else 30.0
    found = measuring.run(python(lines), {}, measuring.Bounds("gate q", limit, 200 * MEGABYTE))
    assert isinstance(found, str)
    assert found.startswith(words)


def test_exit_75_is_later() -> None:
    """It is no failure."""
    with pytest.raises(TryAgain, match="gate q says later"):
        measuring.run(python("raise SystemExit(75)"), {}, measuring.Bounds("gate q", 30.0))


# What is measured


@pytest.fixture
def measure(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the program in this process and read what it printed."""

    def run(*words: object) -> Any:
        evaluate.main([str(word) for word in words])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_a_model_that_loads(tmp_path: Path, measure: Callable[..., Any]) -> None:
    """It is built by its architecture, and one forward pass gives finite numbers."""
    model = language.causal()
    found = measure("loads", language.save(model, tmp_path / "model"))
    assert found["figures"].pop("seconds") > 0
    assert found == {
        "figures": {
            "parameters": model.num_parameters(), "missing": 0, "unexpected": 0, "mismatched": 0,
            "finite": 1, "forward": 1,
        },
        "notes": {},
    }  # fmt: skip


def test_what_a_model_lacks_is_named(tmp_path: Path, measure: Callable[..., Any]) -> None:
    """A weight that the loader would fill at random is missing; one that it does not know is unexpected."""
    model = language.causal()
    folder = language.save(model, tmp_path / "model")
    tensors = model.state_dict()
    tensors["model.layers.0.extra.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    model.save_pretrained(folder, state_dict=tensors)
    found = measure("loads", folder)
    assert (found["figures"]["missing"], found["figures"]["unexpected"]) == (1, 1)
    assert found["notes"] == {
        "missing": "model.layers.1.mlp.up_proj.weight", "unexpected": "model.layers.0.extra.weight"
    }  # fmt: skip
    data = language.write(tmp_path / "texts.jsonl", TEXTS)
    with pytest.raises(
        SystemExit, match=r"needs what the model does not have: model\.layers\.1\.mlp\.up_proj"
    ):
        measure("perplexity", folder, "--data", data)


def test_a_model_whose_outputs_are_not_finite(tmp_path: Path, measure: Callable[..., Any]) -> None:
    """One weight suffices."""
    model = language.causal()
    model.lm_head.weight.data[3, 3] = math.inf
    assert measure("loads", language.save(model, tmp_path / "model"))["figures"]["finite"] == 0


def test_no_code_of_a_model_is_run(tmp_path: Path, measure: Callable[..., Any]) -> None:
    """A folder whose configuration asks for its own code does not load, and the code does not run."""
    folder = language.save(language.causal(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(SystemExit, match="ValueError"):
        measure("loads", folder)
    assert not (tmp_path / "ran").exists()


def test_perplexity_is_that_of_each_text_by_itself(tmp_path: Path, measure: Callable[..., Any]) -> None:
    """Batches and padding change nothing; tasks are told apart; each row's log-loss is given on request."""
    model = language.causal().eval()
    folder = language.save(model, tmp_path / "model")
    rows = [
        *TEXTS,
        {"text": "w3 w5", "task": "odd"},
        {"text": "w5 w6 w7 w8 w9 w10 w11 w12", "task": "long"},
        {"text": "w1", "task": "long"},
    ]
    found = measure("perplexity", folder, "--data", language.write(tmp_path / "texts.jsonl", rows), "--each")
    expected = []
    for row in rows[:-1]:
        ids = torch.tensor(language.ids(row["text"]))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        expected.append((len(ids) - 1, float(cross_entropy(logits, ids[1:]))))
    assert [row["log_loss"] for row in found["rows"]] == pytest.approx(
        [loss for _, loss in expected], rel=1e-5
    )
    mean = sum(n * loss for n, loss in expected) / sum(n for n, _ in expected)
    assert found["figures"]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["figures"]["tokens"] == 7 * 4 + 1 + 7
    assert found["figures"]["task.long"] == pytest.approx(math.exp(expected[-1][1]), rel=1e-5)
    assert found["tasks"]["long"]["rows"] == 1


def test_perplexity_reads_no_more_tokens_than_it_may(tmp_path: Path, measure: Callable[..., Any]) -> None:
    """The bound is exact, in the middle of a text too."""
    folder = language.save(language.causal(), tmp_path / "model")
    data = language.write(tmp_path / "texts.jsonl", TEXTS)
    found = measure("perplexity", folder, "--data", data, "--max-tokens", 10)
    assert (found["figures"]["tokens"], found["figures"]["texts"]) == (10, 3)
    assert measure("perplexity", folder, "--data", data, "--max-rows", 2)["figures"]["texts"] == 2


def test_accuracy_of_a_classifier(tmp_path: Path, measure: Callable[..., Any]) -> None:
    """Each task's share of right labels, their mean, and the worst."""
    model = language.classifier().eval()
    folder = language.save(model, tmp_path / "model")
    rows: list[dict[str, Any]] = [{**row, "label": i % 4} for i, row in enumerate(TEXTS)]
    found = measure("accuracy", folder, "--data", language.write(tmp_path / "rows.jsonl", rows), "--each")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([language.ids(row["text"]) for row in rows])).logits
    right = [int(scores.argmax()) == row["label"] for scores, row in zip(logits, rows, strict=True)]
    tasks = {"even": right[0::2], "odd": right[1::2]}
    shares = {f"task.{name}": sum(group) / len(group) for name, group in tasks.items()}
    assert {key: found["figures"][key] for key in shares} == pytest.approx(shares)
    assert found["figures"]["mean"] == pytest.approx(sum(shares.values()) / 2)
    assert found["figures"]["worst"] == min(shares.values())
    losses = cross_entropy(logits, torch.tensor([row["label"] for row in rows]), reduction="none")
    assert [row["log_loss"] for row in found["rows"]] == pytest.approx(losses.tolist(), rel=1e-4)


def test_labels_may_be_names(tmp_path: Path, measure: Callable[..., Any]) -> None:
    """They are those of the model's configuration; another name is an error that says which there are."""
    folder = language.save(language.classifier(), tmp_path / "model")
    rows: list[dict[str, Any]] = [{"text": "w1 w2", "label": "LABEL_1"}, {"text": "w1 w2", "label": 1}]
    found = measure("accuracy", folder, "--data", language.write(tmp_path / "rows.jsonl", rows))
    assert found["figures"]["task.all"] in (0.0, 1.0)
    language.write(tmp_path / "rows.jsonl", [{"text": "w1", "label": "no"}])
    with pytest.raises(SystemExit, match="no label 'no'; it has LABEL_0, LABEL_1"):
        measure("accuracy", folder, "--data", tmp_path / "rows.jsonl")


def test_accuracy_of_choices(tmp_path: Path, measure: Callable[..., Any]) -> None:
    """A causal model chooses what it finds the likeliest after the prompt, all of its tokens counted."""
    model = language.causal().eval()
    folder = language.save(model, tmp_path / "model")
    rows: list[dict[str, Any]] = [
        {"question": f"w{i} w2 w{i + 3}", "choices": ["w4", "w7 w8", "w9"], "answer": i % 3} for i in range(6)
    ]
    found = measure("accuracy", folder, "--data", language.write(tmp_path / "rows.jsonl", rows), "--each")
    for row, scored in zip(rows, found["rows"], strict=True):
        scores = []
        for choice in row["choices"]:
            before, after = language.ids(row["question"]), language.ids(choice)
            ids = torch.tensor(before + after)
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1]
            scores.append(-float(cross_entropy(logits, ids[1:], reduction="none")[-len(after) :].sum()))
        assert scored["right"] == (scores.index(max(scores)) == row["answer"])
        loss = -float(log_softmax(torch.tensor(scores), 0)[row["answer"]])
        assert scored["log_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": 5}', "a row needs text"),
        ("{", "line 1: Expecting"),
        ("[1]", "line 1: is no JSON object"),
        ("", "has no rows"),
        ('{"prompt": "w1", "choices": ["w1", "w2"], "answer": 2}', "the answer's place among them"),
    ],
)
def test_data_that_cannot_be_used_say_why(
    line: str, words: str, tmp_path: Path, measure: Callable[..., Any]
) -> None:
    """An error in the data is told with the row, and is no figure."""
    folder = language.save(language.causal(), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(line)
    what = "accuracy" if "choices" in line else "perplexity"
    with pytest.raises(SystemExit, match=words):
        measure(what, folder, "--data", tmp_path / "rows.jsonl")


def test_a_model_is_measured_by_a_process_of_its_own(tmp_path: Path) -> None:
    """The program gives the very figures, from a small environment and any working folder."""
    folder = language.save(language.causal(), tmp_path / "model")
    data = language.write(tmp_path / "texts.jsonl", TEXTS)
    bounds = measuring.Bounds("gate q", 60.0, 4 << 30)
    found = measuring.evaluate("perplexity", folder, bounds, each=True, data=data, max_tokens=12, threads=1)
    assert isinstance(found, measuring.Measurement), found
    assert found.figures["tokens"] == 12
    assert set(found.tasks) == {"odd", "even"}
    assert len(found.rows) == 3
