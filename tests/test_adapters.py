"""LoRA adapters folded straight: the deltas are those of PEFT's own merge, and nothing else is believed."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import models
import peft
import pytest
import torch
import transformers
from benches import bench
from daemons import Site, command
from safetensors.torch import load_file, save_file

from streammerge import linalg, weights
from streammerge.errors import Refused
from streammerge.finetune import open_fine_tune
from streammerge.fit import Tolerance
from streammerge.headers import Incomplete, find
from streammerge.plan import DEFAULT_ADDED, make

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights; what comes of them is tested
RELATIVE = 1e-6


def llama(*, tied: bool = False, bias: bool = False) -> Any:
    """Make a tiny Llama from a configuration, with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    """Make a tiny GPT-2, whose linear layers are stored transposed."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "all linear": (llama, {"target_modules": "all-linear"}),
    "by regular expression": (llama, {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    "some layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "alpha": (llama, {"target_modules": ["o_proj"], "lora_alpha": 3, "r": 5}),
    "rank-stabilised": (llama, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "rank and alpha patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 7},
            "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 5, "k_proj": 1},
        },
    ),
    "patterns and rank-stabilised": (
        llama,
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 3}, "use_rslora": True},
    ),
    "whole modules": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    ),
    "whole embedding": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied embedding": (lambda: llama(tied=True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "all biases": (lambda: llama(bias=True), {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "biases of its own": (lambda: llama(bias=True), {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias of B": (lambda: llama(bias=True), {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "fan in, fan out": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "fan in, fan out, square": (
        gpt2,
        {"target_modules": [r"attn.c_proj"], "fan_in_fan_out": True, "use_rslora": True},
    ),
    "DoRA": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "DoRA, rank-stabilised": (llama, {"target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    "DoRA, fan in, fan out": (
        gpt2,
        {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "started otherwise": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "started orthogonal": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
}


def adapt(folder: Path, make_model: Callable[[], Any], options: dict[str, Any]) -> Any:
    """Save the base, and an adapter as if it were trained: no parameter is left as it started."""
    model = make_model()
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options})).eval()
    torch.manual_seed(1)
    for parameter in {p.data_ptr(): p for p in adapted.parameters() if p.requires_grad}.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder / "adapter"))
    return adapted


def publish(folder: Path, make_model: Callable[[], Any], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Save the base and an adapter as trained; give the weights of PEFT's own merge, in float64."""
    merged = adapt(folder, make_model, options).double().merge_and_unload()
    return {name: values.detach().clone() for name, values in merged.state_dict().items()}


def deltas(folder: Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Open base and adapter as the engine does: name -> delta; and which of them stayed factors."""
    config = json.loads((folder / "base" / "config.json").read_text())
    found, factored = {}, set()
    with weights.Weights(find(folder / "base"), hashing=True) as base:
        base.read_rest()
        plan = make(base, config, DEFAULT_ADDED)
        original = load_file(folder / "base" / "model.safetensors")
        with open_fine_tune(folder / "adapter", base.entries, plan, Tolerance()) as adapter:
            for name in plan.merged:
                values = original[name].float()
                if plan.kinds[name] == "projected":
                    delta = adapter.read(name, 0, values.numel())(values)
                    factored |= {name} if isinstance(delta, linalg.LowRank) else set()
                    found[name] = linalg.dense(delta)
                    continue
                panels = list(
                    weights.element_panels(values.numel(), panel=50)
                )  # they end in the midst of rows
                parts = [adapter.read(name, a, b)(values.reshape(-1)[a:b].clone()) for a, b in panels]
                found[name] = torch.cat([linalg.dense(part) for part in parts]).reshape(values.shape)
            assert adapter.finish() == weights.identity(folder / "adapter")
    return found, factored


@pytest.mark.parametrize("case", CASES)
def test_the_delta_is_that_of_pefts_own_merge(case: str, tmp_path: Path) -> None:
    """For every option, base plus delta is what merge_and_unload makes, to 1e-6 of the delta's length."""
    merged = publish(tmp_path, *CASES[case])
    found, factored = deltas(tmp_path)
    original = load_file(tmp_path / "base" / "model.safetensors")
    moved = 0
    for name, delta in found.items():
        expected = merged[name] - original[name].double()
        moved += bool(expected.any())
        assert (delta.double() - expected).norm() <= RELATIVE * expected.norm(), name
    assert moved >= 1
    assert factored or "DoRA" in case or not any(name in factored for name in found)


def test_the_matrix_covers_what_the_file_can_hold(tmp_path: Path) -> None:
    """Together the cases have every sort of tensor that the reader names."""
    seen = set()
    for number, case in enumerate(("embedding", "DoRA", "bias of B", "plain")):
        publish(tmp_path / str(number), *CASES[case])
        file = tmp_path / str(number) / "adapter" / "adapter_model.safetensors"
        seen |= {name.rsplit("proj", 1)[-1].rsplit("embed_tokens", 1)[-1] for name in load_file(file)}
    assert {".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector"} <= seen
    assert {".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight"} <= seen


def test_adapters_and_full_weights_mix_in_one_stream(tmp_path: Path) -> None:
    """Folding an adapter gives, within rounding, what folding the model PEFT merged it into gives."""
    merged = publish(tmp_path, *CASES["all linear"])
    models.save(tmp_path / "merged", {name: values.float() for name, values in merged.items()})
    other = load_file(tmp_path / "base" / "model.safetensors")
    models.save(tmp_path / "other", {name: values + 0.01 * values.square() for name, values in other.items()})
    found = []
    for third in ("adapter", "merged"):
        run = bench(tmp_path / f"run-{third}", tmp_path / "base")
        for path in ("other", third, "other"):
            run.fold(tmp_path / path)
        found.append(models.load(run.render()))
    for name, values in found[0].items():
        assert torch.allclose(values, found[1][name], rtol=0, atol=2e-6), name


def adapter(tmp_path: Path, **changes: Any) -> Path:
    """Publish a plain adapter and change its configuration."""
    publish(tmp_path, *CASES["plain"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path


def refusal(folder: Path) -> Refused:
    """Open the adapter and give why it was refused."""
    with pytest.raises(Refused) as caught:
        deltas(folder)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "LOKR"}, "LOKR"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "VERA"}, "VERA"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.gate"]}, "target_parameters"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"alpha_pattern": {"(q+)+x": 3}}, "(q+)+x"),
    ],
)
def test_what_is_not_known_exactly_is_refused_by_name(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """No other kind of adapter is taken for a LoRA; the refusal says which it is and what to do."""
    refused = refusal(adapter(tmp_path, **changes))
    assert refused.reason == "unsupported-adapter"
    assert named in refused.message
    assert "merge" in refused.hint or "conversion" in refused.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 5},
        {"r": 0},
        {"lora_alpha": "much"},
        {"rank_pattern": {"q_proj": 9}},
        {"alpha_pattern": {"(": 1}},
    ],
)
def test_a_configuration_that_does_not_fit_its_weights_is_malformed(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """A rank that the tensors do not have, or no number at all, is never guessed around."""
    assert refusal(adapter(tmp_path, **changes)).reason == "malformed"


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Change the tensors of a published adapter."""
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: values.contiguous() for name, values in change(load_file(file)).items()}, file)
    return folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {k.replace("q_proj", "query"): v for k, v in t.items()}, "unknown-weights"),
        (lambda t: {k.replace("model.layers", "blocks"): v for k, v in t.items()}, "wrong-base"),
        (lambda t: {k: v[:-1] if "lora_B" in k else v for k, v in t.items()}, "wrong-shape"),
        (lambda t: {k: v for k, v in t.items() if "lora_A" not in k}, "malformed"),
        (
            lambda t: {**t, **{k.replace("lora_A.weight", "lora_embedding_A"): v + 0 for k, v in t.items()}},
            "malformed",
        ),
        (lambda t: {k: v[:, :2] if "lora_B" in k else v for k, v in t.items()}, "malformed"),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "quantised"),
        (lambda t: {k.replace("lora_A", "hada_w1_a"): v for k, v in t.items()}, "unknown-weights"),
        (lambda t: {**t, "base_model.model.score.weight": torch.ones(2, 16)}, "unknown-weights"),
        (lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(50, 16)}, "vocab-resized"),
    ],
)
def test_an_adapter_of_something_else_is_refused_with_its_reason(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], reason: str, tmp_path: Path
) -> None:
    """Names and shapes must be the base's; new heads and resized vocabularies have their own reasons."""
    publish(tmp_path, *CASES["plain"])
    assert refusal(rewritten(tmp_path, change)).reason == reason


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    ],
)
def test_a_head_trained_apart_from_its_embedding_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """A tied base has no place for it; PEFT's merge would put both changes into both."""
    publish(tmp_path, lambda: llama(tied=True), options)
    assert refusal(tmp_path).reason == "untied-head"


def test_a_head_kept_tied_while_it_was_trained_counts_once(tmp_path: Path) -> None:
    """The adapted model's own outputs are the measure: PEFT 0.21's merge adds such a delta twice."""
    options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    adapted = adapt(tmp_path, lambda: llama(tied=True), options)
    expected = adapted(torch.arange(10)[None]).logits
    merged = llama(tied=True).eval()
    found, _ = deltas(tmp_path)
    for name, parameter in merged.named_parameters():
        parameter.data += found[name]
    assert torch.allclose(merged(torch.arange(10)[None]).logits, expected, atol=1e-5)


def test_the_identity_is_that_of_the_delta(tmp_path: Path) -> None:
    """What changes the delta changes the digest; how the adapter came about does not."""
    folder = adapter(tmp_path) / "adapter"
    path, before = folder / "adapter_config.json", weights.identity(folder)
    config = json.loads(path.read_text())
    for harmless in (
        {"lora_dropout": 0.3},
        {"inference_mode": False},
        {"target_modules": ["v_proj", "q_proj"]},
    ):
        path.write_text(json.dumps(config | harmless))
        assert weights.identity(folder) == before
    for change in ({"lora_alpha": 9}, {"use_rslora": True}, {"fan_in_fan_out": True}):
        path.write_text(json.dumps(config | change))
        assert weights.identity(folder) != before


def test_an_adapter_without_its_configuration_is_waited_for(tmp_path: Path) -> None:
    """The weights alone say nothing of their scale."""
    folder = adapter(tmp_path) / "adapter"
    (folder / "adapter_config.json").unlink()
    with pytest.raises(Incomplete, match="adapter_config"):
        find(folder)


def test_an_adapter_of_nan_is_refused(tmp_path: Path) -> None:
    """Values are checked although the product is never written out."""
    publish(tmp_path, *CASES["plain"])
    rewritten(
        tmp_path,
        lambda t: {k: v * float("nan") if "0.self_attn.q_proj.lora_A" in k else v for k, v in t.items()},
    )
    run = bench(tmp_path / "run", tmp_path / "base")
    with pytest.raises(Refused) as caught:
        run.fold(tmp_path / "adapter")
    assert caught.value.reason == "non-finite"


def test_factors_give_what_the_product_gives() -> None:
    """Every function of a delta has the same value for two factors and for their product."""
    torch.manual_seed(0)
    factors = linalg.LowRank(torch.randn(12, 3), torch.randn(3, 20))
    product, matrix = linalg.dense(factors), torch.randn(12, 20)
    assert linalg.squares(factors) == pytest.approx(linalg.squares(product), rel=1e-6)
    assert linalg.inner(factors, matrix) == pytest.approx(linalg.inner(product, matrix), rel=1e-5)
    assert torch.allclose(linalg.times(matrix.T, factors), matrix.T @ product, atol=1e-4)
    for scale, factor in ((1.0, 1.0), (0.3, 1.0), (1.0, -2.0), (0.5, 3.0)):
        expected = scale * matrix + factor * product
        for delta in (factors, product):
            assert torch.allclose(linalg.plus(matrix, delta, scale=scale, factor=factor), expected, atol=1e-5)
    assert linalg.statistics(factors) == pytest.approx(linalg.statistics(product), rel=1e-5)
    empty = linalg.LowRank(torch.empty(12, 0), torch.empty(0, 20))
    assert linalg.is_zero(empty)
    assert linalg.statistics(empty) == (0.0, 0.0, 0.0)
    assert linalg.lying(factors.T).shape == (12, 20)


def test_a_copy_of_an_adapter_is_the_same_fine_tune(tmp_path: Path) -> None:
    """Identity does not depend on where the files lie."""
    folder = adapter(tmp_path) / "adapter"
    shutil.copytree(folder, tmp_path / "copy")
    assert weights.identity(folder) == weights.identity(tmp_path / "copy")


def test_the_daemon_and_merge_fold_an_adapter_alike(tmp_path: Path) -> None:
    """`merge` takes an adapter's folder where it takes a model's, and gives the daemon's bytes."""
    publish(tmp_path / "made", *CASES["some layers"])
    site = Site(tmp_path / "site", load_file(tmp_path / "made" / "base" / "model.safetensors"))
    site.publish("full", 1)
    site.once()
    shutil.copytree(tmp_path / "made" / "adapter", site.inflow / "lora")
    site.once()
    rows = {row["name"]: row["state"] for row in site.ask("fine-tunes")}
    assert rows == {"full": "folded", "lora": "folded"}
    assert not list((site.store / "inbox").iterdir())
    inputs = (site.inflow / "full", site.inflow / "lora")
    out = tmp_path / "out"
    command("merge", "--base", site.root / "base", "--threads", "1", "--out", out, *inputs)
    for file in (out / "model").glob("*.safetensors"):
        assert file.read_bytes() == (site.store / "current" / "model" / file.name).read_bytes()
    digests = [entry["digest"] for entry in json.loads((out / "manifest.json").read_text())["fine_tunes"]]
    assert digests == [entry["digest"] for entry in site.ask("show", "head")["fine_tunes"]]
