"""What the defaults do to any model: they prune it on own text too, and say what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import assert_same, assert_unchanged, basic, calibration, leftovers
from transformers import AutoConfig, AutoModelForCausalLM

from fasp_lightning import FASPPruner, PruningConfig
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.pruning.own_text.writing import own_text

SHORT = PruningConfig(own_text=OwnTextConfig(tokens=512))
"""The defaults with less own text; its 128 tokens a sequence are more than the positions of tiny models."""

BOTH_SCORES = pytest.mark.parametrize("score", ["wanda", "fisher"])
"""By activations, as the defaults are, and with gradients."""


def test_defaults_are_what_they_say() -> None:
    """All own text counts, activations decide, and one pruning is as the next."""
    first, second, plain = (tiny_model("opt") for _ in range(3))
    report = FASPPruner().prune(first, calibration())
    FASPPruner(PruningConfig(0.2, score="wanda", own_text=OwnTextConfig())).prune(second, calibration())
    FASPPruner(basic()).prune(plain, calibration())
    assert report.tokens == 3 * 80 - 9 + OwnTextConfig().tokens
    assert_same(first, second)
    assert first.fasp_plan != plain.fasp_plan


@pytest.mark.sampled
@BOTH_SCORES
@pytest.mark.parametrize("family", TINY)
def test_every_family_is_pruned(family: str, score: str) -> None:
    model = tiny_model(family).train()
    report = FASPPruner(replace(SHORT, score=score)).prune(model, calibration())
    assert all(0 < pair.error_after <= pair.error_before for pair in report.pairs)
    assert report.tokens == 3 * 80 - 9 + 512
    assert leftovers(model) == []
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert model.eval()(random_tokens()).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@BOTH_SCORES
@pytest.mark.parametrize("family", ["opt", "llama-gqa", "bloom"])
def test_half_precision_model_is_pruned(family: str, score: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    FASPPruner(replace(SHORT, score=score)).prune(model, calibration())
    with torch.no_grad():
        assert model(random_tokens()).logits.isfinite().all()


@BOTH_SCORES
@pytest.mark.parametrize("vocabulary", [2, 5])
def test_model_of_a_few_tokens_none_of_them_special_is_pruned(vocabulary: int, score: str) -> None:
    nothing = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = AutoConfig.for_model(**{**TINY["llama"].config().to_dict(), "vocab_size": vocabulary, **nothing})
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = None
    ids = torch.cat(own_text(model, OwnTextConfig(tokens=512)))
    assert len(set(ids[:, 0].tolist())) > 1  # any token begins a text
    report = FASPPruner(replace(SHORT, score=score)).prune(model, [random_tokens(4, 40) % vocabulary])
    assert report.sparsity == pytest.approx(0.2, abs=0.01)


def test_model_without_a_cache_writes_the_same() -> None:
    """A custom family may keep none: it is given the whole text again then."""
    model, config = tiny_model("llama"), OwnTextConfig(tokens=60, seq_len=12)
    expected = own_text(model, config)

    def forget(module: Any, args: Any, output: Any) -> Any:
        output.past_key_values = None
        return output

    model.register_forward_hook(forget)
    assert torch.equal(torch.cat(own_text(model, config)), torch.cat(expected))


@torch.no_grad()
@BOTH_SCORES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named_before_anything_changes(value: float, score: str) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ValueError, match=r"parameter model\.layers\.1\.mlp\.up_proj\.weight is not; check the check"):
        FASPPruner(replace(SHORT, score=score)).prune(model, calibration())
    model.model.layers[1].mlp.up_proj.weight[3, 4] = tiny_model("llama").model.layers[1].mlp.up_proj.weight[3, 4]
    assert_unchanged(model)
    assert leftovers(model) == []


@BOTH_SCORES
def test_calibration_token_that_is_not_finite_is_named_by_its_layer(score: str) -> None:
    """Own text never comes to a token whose logit is −∞ if it does not start with it; the calibration text does."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[96] = torch.nan
        model.lm_head = torch.nn.Linear(32, 97)
        model.lm_head.bias[96] = -torch.inf
    with pytest.raises(ValueError, match=r"activations must be finite.* model\.layers\.0\.self_attn\.o_proj"):
        FASPPruner(replace(SHORT, score=score)).prune(model, [*calibration(), torch.tensor([[1] + 19 * [96]])])
