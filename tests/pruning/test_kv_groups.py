"""Whole KV groups: what is left is a smaller model of the same family, for stock code too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import consumer_columns, consumer_weight, mask_units, reference
from tiny import FFN, HIDDEN, TINY, random_tokens, tiny_model
from tiny_pruning import assert_unchanged, basic, calibration
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from fasp_lightning import FASPPruner, PruningConfig, PruningPlan, apply_plan, load_pruned, save_pruned, spec_for
from fasp_lightning.pruning.budget.footprint import footprints
from fasp_lightning.pruning.budget.widths import Budget, decide_budget
from fasp_lightning.pruning.progress import ProgressEvent
from fasp_lightning.structure.layout import Cuts
from fasp_lightning.structure.plan import conform, plan_of, resolve_pruned
from fasp_lightning.structure.resolve import linear_parameters
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora, merge_lora

ABLE = ["llama", "llama-gqa", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3"]
"""Gemma has one KV head here, which stays."""

UNABLE = ["opt", "gpt2", "gpt_neox", "bloom", "falcon", "falcon-multi-query", "falcon-alibi"]
HALF = basic(0.4, attention="kv_groups")
PLAIN = basic(0.4, attention="kv_groups", restoration="none")
able = pytest.mark.parametrize("name", ABLE)


def pruned(name: str, config: PruningConfig = HALF) -> Any:
    model = tiny_model(name)
    FASPPruner(config).prune(model, calibration(4))
    return model


def logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**({"input_ids": random_tokens(), "use_cache": False} | options)).logits


def groups_of(widths: Budget) -> set[int]:
    """KV groups left, over all blocks."""
    return {pair.after for block in widths.pairs for pair in block if pair.kind == "groups"}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def heads(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads, config.num_key_value_heads, size


@able
def test_model_without_groups_equals_one_with_their_columns_zeroed(name: str) -> None:
    model = pruned(name, PLAIN)
    assert all(len(block) == 2 for block in model.fasp_plan.blocks)  # both pairs of every block
    masked = mask_units(tiny_model(name), model.fasp_plan)
    torch.testing.assert_close(logits(model), logits(masked), atol=1e-4, rtol=0)
    assert (logits(model) - logits(tiny_model(name))).abs().max() > 1e-2


@able
def test_stock_code_loads_it_and_computes_the_same(name: str, tmp_path: Path) -> None:
    model = pruned(name)
    saved = save_pruned(model, tmp_path / "p")
    assert saved.form == "stock"
    attention = {"attn_implementation": model.config._attn_implementation}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "p", **attention)
    assert torch.equal(logits(stock), logits(model))
    assert shapes(stock) == shapes(model)
    loaded = load_pruned(tmp_path / "p", **attention)
    assert loaded.fasp_plan == model.fasp_plan
    assert heads(loaded.config) == heads(stock.config) == heads(model.config)


@pytest.mark.sampled
@able
@pytest.mark.parametrize("form", ["compact", "zero_filled"])
def test_other_forms_come_back(name: str, form: str, tmp_path: Path) -> None:
    model = pruned(name)
    save_pruned(model, tmp_path / "p", form=form)
    loaded = load_pruned(tmp_path / "p", attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.fasp_plan == model.fasp_plan
    assert heads(loaded.config) == heads(model.config)


def test_stock_code_refuses_the_compact_form(tmp_path: Path) -> None:
    save_pruned(pruned("qwen2"), tmp_path / "p", form="compact")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")


@able
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model = pruned(name)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    cached, plain = (model.generate(random_tokens(), use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)


@able
def test_kv_cache_shrinks_as_foretold(name: str) -> None:
    model = tiny_model(name)
    before, after = footprints(model, decide_budget(model, HALF), 4)
    FASPPruner(HALF).prune(model, calibration(4))
    cache = DynamicCache()
    model(random_tokens(1, 5), past_key_values=cache, use_cache=True)
    entries = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert after.kv_bytes_per_token == sum(entry.numel() * 4 for entry in entries) // 5
    assert after.kv_bytes_per_token <= before.kv_bytes_per_token / 2 or name == "phi"  # phi keeps 3 of 4


@able
def test_engine_equals_naive_oracle(name: str) -> None:
    model, naive = tiny_model(name), tiny_model(name)
    expected = reference(naive, calibration(4), HALF)
    FASPPruner(HALF).prune(model, calibration(4))
    for index, block in enumerate(model.fasp_plan.blocks):
        assert {path: list(pair.kept) for path, pair in block.items()} == expected[index]
        for pair in resolve_pruned(model)[index]:
            columns = consumer_columns(pair.layout, pair.kept.tolist())
            wanted = consumer_weight(naive, index, pair.spec.consumer)[:, columns]
            torch.testing.assert_close(pair.weight, wanted, atol=2e-4, rtol=1e-3)


@able
def test_restoration_never_raises_the_error(name: str) -> None:
    report = FASPPruner(HALF).prune(tiny_model(name), calibration(4))
    assert {pair.kind for pair in report.pairs} == {"groups", "ffn"}
    assert all(pair.error_after <= pair.error_before for pair in report.pairs)
    assert any(pair.error_after < 0.99 * pair.error_before for pair in report.pairs if pair.kind == "groups")


@pytest.mark.sampled
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.35, 0.5, 0.65])
@able
def test_removed_parameters_are_what_was_asked_within_half_a_column_a_block(name: str, sparsity: float) -> None:
    model = tiny_model(name)
    linear = linear_parameters(model, spec_for(model))
    widths = decide_budget(model, basic(sparsity, attention="kv_groups"))
    report = FASPPruner(basic(sparsity, attention="kv_groups")).prune(model, calibration(4))
    removed = linear - linear_parameters(model, spec_for(model))
    assert report.sparsity == widths.sparsity == removed / linear
    assert abs(removed - sparsity * linear) <= len(widths.pairs) * 3 * HIDDEN / 2


@pytest.mark.parametrize(
    ("name", "left"),
    [("llama", [4, 2, 2]), ("phi", [4, 3, 2]), ("mistral", [2, 1, 1])],
    ids=["llama", "phi", "mistral"],
)
def test_number_of_groups_is_the_nearest_that_the_config_takes(name: str, left: list[int]) -> None:
    """Llama's config wants the heads to divide the hidden size of 32; Phi's does not."""
    configs = [basic(sparsity, attention="kv_groups") for sparsity in (0.1, 0.3, 0.4)]
    assert [groups_of(decide_budget(tiny_model(name), config)) for config in configs] == [{count} for count in left]


def test_last_kv_group_stays() -> None:
    widths = decide_budget(tiny_model("gemma"), basic(0.3, attention="kv_groups"))
    assert groups_of(widths) == {1}
    assert widths.cuts == Cuts(frozenset({"ffn"}))
    assert widths.sparsity == pytest.approx(0.3, abs=0.006)


def test_highest_sparsity_leaves_what_the_config_takes() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"sparsity must be at most 0\.8713 with 1 KV groups kept, got 0\.95"):
        decide_budget(model, basic(0.95, attention="kv_groups"))
    FASPPruner(basic(0.8713, attention="kv_groups")).prune(model, calibration())
    assert heads(model.config) == (1, 1, 8)
    assert logits(model).isfinite().all()


@able
def test_plan_gives_a_fresh_model_the_same_shapes(name: str) -> None:
    model = pruned(name)
    plan = PruningPlan.from_json(model.fasp_plan.to_json())
    assert plan == model.fasp_plan
    fresh = apply_plan(tiny_model(name), plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    with torch.device("meta"):
        empty = type(model)(TINY[name].config())
    assert shapes(apply_plan(empty, plan)) == shapes(model)


@able
def test_original_shapes_come_back(name: str) -> None:
    model = pruned(name)
    conform(model, None)
    assert shapes(model) == shapes(tiny_model(name))
    assert heads(model.config) == heads(tiny_model(name).config)
    model.load_state_dict(tiny_model(name).state_dict())
    assert torch.equal(logits(model), logits(tiny_model(name)))


@pytest.mark.sampled
@able
@pytest.mark.parametrize("order", [("value_dims", "kv_groups"), ("kv_groups", "value_dims")])
def test_weights_of_another_cut_can_be_loaded(name: str, order: tuple[str, str]) -> None:
    model, other = (pruned(name, basic(0.3, attention=attention)) for attention in order)
    conform(model, plan_of(other))
    model.load_state_dict(other.state_dict())
    assert model.fasp_plan == other.fasp_plan
    assert torch.equal(logits(model), logits(other))
    assert heads(model.config) == heads(other.config)


@pytest.mark.parametrize(("name", "query_heads"), [("llama", 1), ("phi", 1), ("phi3", 2)])
def test_pruned_further_from_what_was_saved(name: str, query_heads: int, tmp_path: Path) -> None:
    save_pruned(pruned(name, basic(0.3, attention="kv_groups")), tmp_path / "p")
    model = load_pruned(tmp_path / "p")
    for config in (basic(0.75, attention="kv_groups"), basic(0.78, attention="none")):
        report = FASPPruner(config).prune(model, calibration(4))
        assert heads(model.config) == (query_heads, 1, 8)  # which the second pruning leaves
        assert report.sparsity == pytest.approx(config.sparsity, abs=0.006)
    assert save_pruned(model, tmp_path / "p", overwrite=True).form == "stock"


@able
def test_adapters_on_queries_and_keys_are_cut_along(name: str) -> None:
    def adapted() -> Any:
        model = tiny_model(name).double()
        attach_lora(model, LoRAConfig(rank=3))
        generator = torch.Generator().manual_seed(1)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).double()
        return model

    first, second = adapted(), adapted()
    merge_lora(second)
    for model in (first, second):
        FASPPruner(HALF).prune(model, calibration(4)[1:])  # padding and eager attention give NaN in float64
    merge_lora(first)
    assert first.fasp_plan == second.fasp_plan
    for key, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[key], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", UNABLE)
def test_family_whose_heads_are_tied_to_their_number_is_refused(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(
        ValueError, match=rf"'kv_groups' cannot be used with {TINY[name].model_type}: .*use 'value_dims'"
    ):
        FASPPruner(HALF).prune(model, calibration())
    assert_unchanged(model, name)


def test_norms_of_the_head_size_are_refused() -> None:
    model = tiny_model("phi")
    model.config.qk_layernorm = True
    with pytest.raises(ValueError, match="'kv_groups' cannot be used with phi: qk_layernorm"):
        decide_budget(model, HALF)


@pytest.mark.parametrize("order", [("value_dims", "kv_groups"), ("kv_groups", "value_dims")])
def test_heads_are_not_cut_in_both_ways(order: tuple[str, str]) -> None:
    model = pruned("llama", basic(0.4, attention=order[0]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=f"attention='{order[1]}' cannot follow '{order[0]}' .*prune the original model"
    ):
        FASPPruner(basic(0.5, attention=order[1])).prune(model, calibration())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_auto_leaves_a_model_without_some_groups_its_attention() -> None:
    model = pruned("llama")
    assert decide_budget(model, basic(0.5)).attention == "none"


def test_failed_pruning_leaves_a_model_that_can_be_saved(tmp_path: Path) -> None:
    """Blocks have different numbers of groups then: stock code gets the removed ones back as zeros."""
    model = tiny_model("mistral")

    def stop(event: ProgressEvent) -> None:
        if event.block == 1:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        FASPPruner(HALF).prune(model, calibration(), stop)
    assert model.fasp_plan.cuts == Cuts(frozenset({"groups", "ffn"}), uneven=True)
    assert save_pruned(model, tmp_path / "p").form == "zero_filled"
    assert load_pruned(tmp_path / "p").fasp_plan == model.fasp_plan
    assert heads(model.config) == (4, 2, 8)
    assert model.config.intermediate_size == FFN
