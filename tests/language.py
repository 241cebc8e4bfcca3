"""Tiny language models for tests, with a tokenizer of 48 words: untrained ones, and how to teach them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

WORDS = ("[UNK]", "[PAD]", *(f"w{number}" for number in range(46)))
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip


def causal(seed: int = 0) -> Any:
    """Make a tiny Llama with random weights."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1))


def classifier(labels: int = 4, seed: int = 0) -> Any:
    """Make a tiny BERT with a head for so many labels."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {**SIZES, "num_labels": labels, "hidden_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**settings))


def save(model: Any, folder: Path) -> Path:
    """Save a model with its tokenizer, as one publishes it."""
    split = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=split, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows, one JSON object a line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def ids(text: str) -> list[int]:
    """The tokens of a text."""
    return [WORDS.index(word) for word in text.split()]


def train(model: Any, rows: Sequence[Mapping[str, Any]], steps: int, rate: float = 3e-3) -> Any:
    """Teach a classifier the rows' labels, all at once, step after step; gives it back."""
    inputs = torch.tensor([ids(row["text"]) for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(input_ids=inputs).logits, labels).backward()
        optimizer.step()
    return model
