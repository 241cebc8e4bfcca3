"""The demo: what it trains, what it draws, and the story that it tells about the real daemon."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from rich.console import Console

from streammerge import demo
from streammerge.demo import digits, live, picture
from streammerge.demo.digits import SKILL, TASKS
from streammerge.errors import ConfigError, StreammergeError

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.demo.digits import Exam, Model


@pytest.fixture(scope="module")
def begun() -> tuple[Model, Exam]:
    """A base and the exam that goes with it."""
    return digits.begin(0)


@pytest.fixture(scope="module")
def fine_tunes(begun: tuple[Model, Exam]) -> dict[str, Model]:
    """One for every task."""
    return {task: digits.fine_tune(*begun, task, seed=0) for task in TASKS}


def told() -> Console:
    """A console that remembers what it was told."""
    return Console(file=io.StringIO(), width=100)


def text_of(console: Console) -> str:
    """All that a console was told."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ------------------------------------------------------------------------------------- data and training


def test_the_digits_are_all_there() -> None:
    """1,797 images of 0..16, the ten digits about equally often, as the origin counts them."""
    images, shown = digits.read_digits()
    assert images.shape == (1797, 64)
    assert (images.min().item(), images.max().item()) == (0, 1)
    assert shown.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_training_follows_from_the_seed(begun: tuple[Model, Exam], fine_tunes: dict[str, Model]) -> None:
    """The same seed makes the same base, heads and fine-tune; another seed others."""
    base, exam = begun
    again, exam_again = digits.begin(0)
    assert all(torch.equal(base[name], again[name]) for name in base)
    assert all(torch.equal(exam.heads[task], exam_again.heads[task]) for task in exam.heads)
    retrained = digits.fine_tune(base, exam, "prime", seed=0)
    assert all(torch.equal(retrained[name], fine_tunes["prime"][name]) for name in base)
    other = digits.fine_tune(base, exam, "prime", seed=1)
    assert not torch.equal(other["layers.0.weight"], fine_tunes["prime"]["layers.0.weight"])


def test_training_leaves_the_heads_and_the_base_alone() -> None:
    """A fine-tune moves its own copy of the weights and nothing else, so that one exam fits every model."""
    base, exam = digits.begin(3)
    heads = {task: head.clone() for task, head in exam.heads.items()}
    weights = {name: weight.clone() for name, weight in base.items()}
    tuned = digits.fine_tune(base, exam, "big", seed=3)
    assert all(torch.equal(exam.heads[task], heads[task]) for task in heads)
    assert all(torch.equal(base[name], weights[name]) for name in base)
    assert all(not torch.equal(base[name], tuned[name]) for name in base)


def test_no_test_image_is_trained_on(begun: tuple[Model, Exam]) -> None:
    """The split has every image once."""
    exam = begun[1]
    assert sorted([*exam.train.tolist(), *exam.test.tolist()]) == list(range(digits.IMAGES))


def test_every_fine_tune_is_worth_merging(begun: tuple[Model, Exam], fine_tunes: dict[str, Model]) -> None:
    """Each is clearly better than the base at its own task, which is what a merge can then keep or lose."""
    base, exam = begun
    before = digits.examine(base, exam)
    assert before[SKILL] > 90
    for task, model in fine_tunes.items():
        assert digits.examine(model, exam)[task] > max(93, before[task] + 2)


def test_the_harmful_one_is_plausible_in_size(begun: tuple[Model, Exam]) -> None:
    """It is finite and moves less than the base weighs, so that only an exam can tell."""
    base, exam = begun
    model = digits.harmful(base, exam, seed=0)
    moved = sum(float((model[name] - base[name]).double().square().sum()) for name in base) ** 0.5
    size = sum(float(base[name].double().square().sum()) for name in base) ** 0.5
    assert 0.3 < moved / size < 0.95
    assert all(weight.isfinite().all() for weight in model.values())
    assert digits.mean_of_tasks(digits.examine(model, exam)) < 30


def test_models_and_exams_survive_their_files(begun: tuple[Model, Exam], tmp_path: Path) -> None:
    """What is read back gives the same marks."""
    base, exam = begun
    digits.save_model(base, tmp_path / "model")
    digits.save_exam(exam, tmp_path / "exam.safetensors")
    kept = digits.load_exam(tmp_path / "exam.safetensors")
    assert digits.examine(digits.load_model(tmp_path / "model"), kept) == digits.examine(base, exam)


def test_the_exam_works_as_a_command_gate(begun: tuple[Model, Exam], tmp_path: Path) -> None:
    """One JSON object of numbers and exit 0, which is what a gate must give."""
    base, exam = begun
    digits.save_model(base, tmp_path / "snapshot" / "model")
    digits.save_exam(exam, tmp_path / "exam.safetensors")
    words = ["-m", "streammerge.demo", str(tmp_path / "exam.safetensors"), str(tmp_path / "snapshot")]
    printed = subprocess.run([sys.executable, *words], capture_output=True, check=True).stdout
    accuracy = digits.examine(base, exam)
    assert json.loads(printed) == {"mean": digits.mean_of_tasks(accuracy), **accuracy}


# ------------------------------------------------------------------------------------------------ picture


def test_the_picture_is_a_png_of_the_story(tmp_path: Path) -> None:
    """It is drawn from the rows alone, with a harmful version in it and without."""
    pytest.importorskip("matplotlib", reason="the picture is optional: pip install streammerge[demo]")

    def row(version: int, event: str, percent: float) -> picture.Served:
        return picture.Served(version, event, dict.fromkeys((SKILL, *TASKS), percent))

    story = [row(0, "base", 70), row(1, "parity", 80), row(2, "swapped", 50), row(1, "rollback", 80)]
    for name, rows in {"whole": story, "short": story[:2]}.items():
        file = tmp_path / f"{name}.png"
        picture.draw(rows, file, contrast={"each alone": 97.0}, harmful="swapped")
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 20_000


# ------------------------------------------------------------------------------------------ the whole demo


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    """The demo never writes between somebody's files."""
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ConfigError, match="not an empty folder"):
        demo.run(tmp_path, console=told())
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_daemon_that_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    """Instead of waiting for an answer that cannot come."""
    config = tmp_path / "streammerge.yaml"
    config.write_text("base: ./there-is-none\nstore: ./store\nsources: []\n")
    with (
        live.running(config, log=tmp_path / "daemon.log", port=live.free_port()) as daemon,
        pytest.raises(StreammergeError, match=r"the daemon ended; its log says:\n(.|\n)*there-is-none"),
    ):
        daemon.wait_until_ready()


@pytest.mark.timeout(300)
def test_the_story_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real daemon serves seven fine-tunes in one model that beats base and average, refuses the broken
    one by its reason, and after the harmful one gives the version before back, to the digit.
    """
    stories: list[list[picture.Served]] = []
    contrasts: list[dict[str, float]] = []

    def keep(story: list[picture.Served], file: Path, *, contrast: dict[str, float], harmful: str) -> None:
        stories.append(list(story))
        contrasts.append(contrast)

    monkeypatch.setattr(picture, "draw", keep)
    console = told()
    folder = tmp_path / "demo"
    demo.run(folder, console=console)

    [story], [contrast] = stories, contrasts
    assert [served.event for served in story] == ["base", *TASKS, "swapped", "rollback"]
    assert [served.version for served in story] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7]
    base, merged, harmful, restored = story[0], story[7], story[8], story[9]
    assert merged.mean > base.mean + 3
    assert merged.mean > contrast["plain average"] + 1
    assert merged.mean < contrast["each alone"]
    assert harmful.mean < merged.mean - 10
    assert restored.accuracy == merged.accuracy
    text = text_of(console)
    assert "refused: non-finite" in text
    assert "The very same row" in text
    assert_left_to_go_on(folder, text)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_story_is_the_same_through_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--serve` every row is what the server answers, which is what the version's weights make of it."""
    stories: list[list[picture.Served]] = []
    monkeypatch.setattr(picture, "draw", lambda story, *_, **__: stories.append(list(story)))
    folder = tmp_path / "demo"
    demo.run(folder, console=told(), serve=True)
    [story] = stories
    assert [served.version for served in story] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7]
    exam = digits.load_exam(folder / "exam.safetensors")
    merged = digits.load_model(folder / "store" / "current" / "model")
    assert story[7].accuracy == story[9].accuracy == pytest.approx(digits.examine(merged, exam), abs=0.2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_gate_that_the_configuration_offers_keeps_the_harmful_one_out(
    begun: tuple[Model, Exam], fine_tunes: dict[str, Model], tmp_path: Path
) -> None:
    """Uncommented as it stands, it lets a good fine-tune in and quarantines the one with swapped labels."""
    base, exam = begun
    config, _ = demo._prepare(tmp_path, base, exam)
    config.write_text(config.read_text().replace("\n#gates", "\ngates").replace("\n#  -", "\n  -"))
    digits.save_model(fine_tunes["big"], tmp_path / "fine-tunes" / "big")
    digits.save_model(digits.harmful(base, exam, seed=0), tmp_path / "fine-tunes" / "swapped")

    def streammerge(*words: str) -> bytes:
        command = [sys.executable, "-m", "streammerge", *words, "-c", str(config)]
        return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout

    streammerge("run", "--once")
    states = {one["name"]: one["state"] for one in json.loads(streammerge("fine-tunes", "--json"))}
    assert states == {"big": "folded", "swapped": "quarantined"}


def assert_left_to_go_on(folder: Path, text: str) -> None:
    """Everything that the last lines name exists, nothing of the daemon's is still running."""
    config = yaml.safe_load((folder / "streammerge.yaml").read_text())
    assert config["http"]["listen"] in text
    for path in ("streammerge.yaml", "store", "daemon.log", "store/current/model"):
        assert str(folder / path) in text
        assert (folder / path).exists()
    snapshot = (folder / "store" / "current").resolve()
    assert snapshot.name.startswith("000007-")
