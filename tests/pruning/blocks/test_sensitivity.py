"""Loss sensitivity against a naive oracle, and the laws it keeps; see ``test_sensitivity_run.py`` for the rest."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch
from oracle import mask_units
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import BOTH, calibration, pruned
from tiny_sensitivity import WAYS, assert_close, naive, scores
from torch import nn

from fasp_lightning.pruning.blocks import sensitivity
from fasp_lightning.structure.plan import record_plan, resolve_pruned
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora, merge_lora


@WAYS
@pytest.mark.parametrize("name", ["llama", "llama-gqa", "opt", "gpt2"])
def test_scores_are_the_definition(name: str, whole: bool) -> None:
    assert_close(scores(tiny_model(name), whole=whole), naive(tiny_model(name), calibration(2)))


@WAYS
def test_score_of_a_kv_group_is_that_of_all_its_columns(whole: bool) -> None:
    model = tiny_model("llama-gqa")
    assert_close(scores(model, kv_groups=True, whole=whole), naive(model, calibration(2), kv_groups=True))


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("family", "attention"), [(name, attention) for name, tiny in TINY.items() for attention in tiny.attention]
)
def test_both_ways_give_the_same(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    assert_close(scores(model, whole=True), scores(model, whole=False))


def unevenly_cut(name: str) -> nn.Module:
    """Another number of value dims in each KV head."""
    model = tiny_model(name)
    pairs = resolve_pruned(model)
    pairs[0][0].cut(torch.tensor([0, 2, 3, *range(8, pairs[0][0].layout.width)]))
    record_plan(model, pairs)
    return model


def adapted(model: nn.Module) -> nn.Module:
    attach_lora(model, LoRAConfig(rank=3, alpha=6.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_()  # for the oracle
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


@WAYS
@pytest.mark.parametrize("name", ["llama-gqa", "opt", "gpt2", "phi3"])
def test_pruned_and_adapted_models_have_scores_of_what_is_left(name: str, whole: bool) -> None:
    for make in (pruned, lambda name: adapted(pruned(name)), unevenly_cut):
        model = make(name)
        assert_close(scores(model, whole=whole), naive(model, calibration(2)))


@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
def test_merging_adapters_changes_no_score(name: str) -> None:
    model = adapted(tiny_model(name))
    attached = scores(model)
    merge_lora(model)
    assert_close(scores(model), attached, rtol=1e-3)


@WAYS
@pytest.mark.parametrize("name", ["llama-gqa", "gpt_neox", "opt"])
def test_units_without_weights_have_no_score_and_the_others_those_of_the_cut_model(name: str, whole: bool) -> None:
    cut = pruned(name, replace(BOTH, restoration="none"))
    masked = scores(mask_units(tiny_model(name), cut.fasp_plan), whole=whole)
    for block, blocks_pairs, left in zip(masked, resolve_pruned(cut), scores(cut, whole=whole), strict=True):
        for score, pair, expected in zip(block, blocks_pairs, left, strict=True):
            gone = torch.ones(score.numel(), dtype=torch.bool)
            gone[pair.kept] = False
            assert gone.any()
            assert not score[gone].any()
            torch.testing.assert_close(score[pair.kept], expected, rtol=1e-4, atol=1e-6)


@WAYS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_padding_gives_nothing(name: str, side: str, whole: bool) -> None:
    tokens = random_tokens(2, 10)
    width = [(0, 4), (4, 0)][side == "left"]
    ids, mask = nn.functional.pad(tokens, width, value=7), nn.functional.pad(torch.ones_like(tokens), width)
    padded = {"input_ids": ids, "attention_mask": mask}
    model = tiny_model(name)
    assert_close(scores(model, [padded], whole=whole), scores(model, [tokens], whole=whole), rtol=1e-3)


@WAYS
def test_a_weight_counts_as_often_as_it_says(whole: bool) -> None:
    model, (first, second) = tiny_model("llama"), [random_tokens(seed=seed) for seed in range(2)]
    heavy = scores(model, [{"input_ids": first, "weight": 2.5}, second], whole=whole)
    one, other = (scores(model, [batch], whole=whole) for batch in (first, second))
    assert_close(heavy, [[2.5 * a + b for a, b in zip(x, y, strict=True)] for x, y in zip(one, other, strict=True)])


@WAYS
def test_pieces_change_nothing(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scores(tiny_model("opt"), whole=whole)
    monkeypatch.setattr(sensitivity, "PIECE_TOKENS", 1)
    assert_close(scores(tiny_model("opt"), whole=whole), expected)


@WAYS
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_training_mode_matters_not(name: str, whole: bool) -> None:
    model = tiny_model(name).train()
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert_close(scores(model, whole=whole), scores(tiny_model(name), whole=whole), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["opt", "llama-gqa", "bloom"])
def test_half_precision_has_about_the_same_scores(name: str, dtype: torch.dtype) -> None:
    found, exact = scores(tiny_model(name, dtype=dtype)), scores(tiny_model(name))
    for score, expected in zip(chain(*found), chain(*exact), strict=True):
        assert torch.corrcoef(torch.stack([score, expected]))[0, 1] > 0.97


def test_one_token_is_no_loss() -> None:
    model = tiny_model("llama")
    both = scores(model, [random_tokens(2, 1), random_tokens()])
    assert_close(both, scores(model, [random_tokens()]))
