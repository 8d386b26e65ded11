"""How many units each pair keeps, and how many parameters go with them."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import FFN, HEADS, HIDDEN, LAYERS, TINY, tiny_model
from tiny_pruning import basic, calibration
from torch import nn
from transformers.pytorch_utils import Conv1D

from fasp_lightning import FASPPruner, PruningConfig, spec_for
from fasp_lightning.pruning.budget.rounding import ffn_multiple
from fasp_lightning.pruning.budget.widths import Budget, decide_budget
from fasp_lightning.structure.plan import record_plan, resolve_pruned
from fasp_lightning.structure.resolve import find_blocks

GRID = pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.35])
ATTENTION = pytest.mark.parametrize("attention", ["value_dims", "none"])


def linear_weights(model: nn.Module) -> int:
    """P_all by asking torch: weights and biases of the linear layers in the blocks."""
    linears = [m for m in find_blocks(model, spec_for(model)).modules() if isinstance(m, (nn.Linear, Conv1D))]
    return sum(parameter.numel() for linear in linears for parameter in linear.parameters())


def ffn_cost(widths: Budget) -> int:
    return widths.pairs[0][-1].cost


def highest_sparsity(model: nn.Module, attention: str) -> float:
    """What the refusal of an impossible sparsity says."""
    with pytest.raises(ValueError, match="sparsity must be at most") as caught:
        decide_budget(model, basic(0.9999, attention=attention))
    return float(re.search(r"at most (\d\.\d+)", str(caught.value)).group(1))


@pytest.mark.sampled(pairs=True)
@GRID
@ATTENTION
@pytest.mark.parametrize("family", TINY)
def test_removed_parameters_are_what_was_asked_within_half_a_column_a_block(
    family: str, attention: str, sparsity: float
) -> None:
    model = tiny_model(family)
    widths = decide_budget(model, basic(sparsity, attention=attention))
    assert widths.linear_parameters == linear_weights(model)
    removed = [sum((pair.before - pair.after) * pair.cost for pair in block) for block in widths.pairs]
    share = sparsity * widths.linear_parameters / len(removed)  # tiny blocks are all alike
    assert all(abs(found - share) <= ffn_cost(widths) / 2 for found in removed)
    assert widths.sparsity == pytest.approx(sum(removed) / widths.linear_parameters)


@pytest.mark.sampled
@ATTENTION
@pytest.mark.parametrize("family", TINY)
def test_pruned_model_has_the_widths_and_parameters_that_were_planned(family: str, attention: str) -> None:
    model = tiny_model(family)
    config = basic(0.3, attention=attention)
    widths, before = decide_budget(model, config), sum(p.numel() for p in model.parameters())
    linear = linear_weights(model)
    report = FASPPruner(config).prune(model, calibration(4))
    after = sum(p.numel() for p in model.parameters())
    assert (widths.parameters_before, widths.parameters_after) == (before, after)
    assert (report.parameters_before, report.parameters_after) == (before, after)
    assert before - after == linear - linear_weights(model)
    assert report.sparsity == pytest.approx((before - after) / linear)
    assert report.sparsity_total == pytest.approx((before - after) / before)
    cut = [pair for block in widths.pairs for pair in block if pair.after < pair.before]
    assert [(pair.layer, pair.after) for pair in cut] == [(pair.layer, pair.width_after) for pair in report.pairs]


@pytest.mark.parametrize("family", TINY)
def test_every_kv_head_keeps_the_same_number_of_value_dims(family: str) -> None:
    model = tiny_model(family)
    share = decide_budget(model, basic(0.3, attention="value_dims"))
    FASPPruner(basic(0.3, attention="value_dims")).prune(model, calibration(4))
    for widths, block in zip(share.pairs, model.fasp_plan.blocks, strict=True):
        pair = block[spec_for(model).pairs[0].consumer]
        per_head = torch.tensor(pair.kept).div(pair.layout.size, rounding_mode="floor").bincount()
        assert per_head.tolist() == [widths[0].after // pair.layout.groups] * pair.layout.groups


def test_cost_of_a_unit_is_its_column_and_rows() -> None:
    """c_p by hand: OPT's producers lose a bias entry, a gated FFN two rows, a KV group one column a query head."""
    costs = {
        "opt": [HIDDEN + (HIDDEN + 1), HIDDEN + (HIDDEN + 1)],
        "llama": [HIDDEN + HIDDEN, HIDDEN + 2 * HIDDEN],
        "llama-gqa": [2 * HIDDEN + HIDDEN, HIDDEN + 2 * HIDDEN],
        "qwen2": [2 * HIDDEN + (HIDDEN + 1), HIDDEN + 2 * HIDDEN],
        "phi3": [2 * HIDDEN + HIDDEN, HIDDEN + 2 * HIDDEN],
        "gpt2": [HIDDEN + (HIDDEN + 1), HIDDEN + (HIDDEN + 1)],
    }
    for name, expected in costs.items():
        widths = decide_budget(tiny_model(name), basic(0.2))
        assert [pair.cost for pair in widths.pairs[0]] == expected, name


def test_widths_of_a_llama_by_hand() -> None:
    """P_all 17,408; 20 % of it is 3,481.6; r = 3481.6 / 13312 = 0.2615: 2 of 8 value dims, 16 of 48 FFN columns."""
    widths = decide_budget(tiny_model("llama"), basic(0.2, attention="value_dims"))
    assert widths.linear_parameters == LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * FFN) == 17408
    # a block's share 1740.8 − 4 heads · 2 dims · 64 = 1228.8 = 12.8 columns of 96
    assert [(pair.kind, pair.after) for pair in widths.pairs[0]] == [("value", HEADS * 6), ("ffn", FFN - 13)]


@pytest.mark.parametrize("family", TINY)
def test_auto_leaves_grouped_query_attention_alone(family: str) -> None:
    config = tiny_model(family).config
    grouped = (
        family == "falcon-multi-query"
        or (getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None) or HEADS) < HEADS
    )
    expected = "none" if grouped else "value_dims"
    assert decide_budget(tiny_model(family), basic()).attention == expected


@ATTENTION
@pytest.mark.parametrize("family", ["opt", "llama-gqa", "gemma", "gpt2", "bloom", "falcon-multi-query"])
def test_unreachable_sparsity_names_the_highest_that_works(family: str, attention: str) -> None:
    model = tiny_model(family)
    highest = highest_sparsity(model, attention)
    with pytest.raises(ValueError, match=f"sparsity must be at most {highest}"):
        decide_budget(model, basic(highest + 1e-4, attention=attention))
    config = basic(highest, attention=attention)
    report = FASPPruner(config).prune(model, calibration(4))
    assert all(1 <= pair.width_after < pair.width_before for pair in report.pairs)
    with torch.no_grad():
        assert model(calibration()[1]).logits.isfinite().all()


@pytest.mark.parametrize("multiple_of", [1, 8, 20])
@pytest.mark.parametrize("sparsity", [0.1, 0.3])
def test_ffn_width_is_a_multiple_within_the_original(sparsity: float, multiple_of: int) -> None:
    config = basic(sparsity, attention="none", multiple_of=multiple_of)
    for block in decide_budget(tiny_model("llama"), config).pairs:
        exact = FFN - sparsity * (4 * HIDDEN**2 + 3 * HIDDEN * FFN) / (3 * HIDDEN)
        after = block[-1].after
        assert multiple_of <= after <= FFN
        assert after % multiple_of == 0 or after == FFN
        assert abs(after - exact) <= multiple_of / 2 + 0.5 or after in (multiple_of, FFN)


@pytest.mark.parametrize("multiple_of", [1, 8, 16])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_value_dims_take_up_what_rounding_the_ffn_leaves(family: str, multiple_of: int) -> None:
    widths = decide_budget(tiny_model(family), basic(0.2, attention="value_dims", multiple_of=multiple_of))
    value, ffn = widths.pairs[0]
    assert ffn.after % multiple_of == 0
    step = HEADS * value.cost if multiple_of > 1 else ffn.cost  # the smaller of the two decides
    assert abs(widths.sparsity - 0.2) * widths.linear_parameters <= LAYERS * step / 2


@pytest.mark.parametrize(
    ("width", "multiple"),
    [(48, 1), (64, 32), (1000, 1), (1024, 32), (1536, 32), (2047, 32), (2048, 64), (4096, 128), (11008, 256)],
)
def test_automatic_multiple_is_the_largest_that_costs_a_thirty_second_of_the_width(width: int, multiple: int) -> None:
    assert ffn_multiple(width, PruningConfig()) == multiple
    assert ffn_multiple(width, PruningConfig.paper()) == 1


@pytest.mark.parametrize(("sparsity", "multiple_of"), [(0.01, 8), (0.02, 4)])
def test_multiple_that_rounds_the_cut_away_is_refused(sparsity: float, multiple_of: int) -> None:
    with pytest.raises(ValueError, match=f"multiple_of must be small enough.*got {multiple_of}.*no width changes"):
        decide_budget(tiny_model("llama"), basic(sparsity, attention="none", multiple_of=multiple_of))


@pytest.mark.parametrize("multiple_of", [FFN + 1, 4096])
def test_multiple_larger_than_the_width_is_refused(multiple_of: int) -> None:
    with pytest.raises(ValueError, match=f"multiple_of must be at most the FFN width {FFN}, got {multiple_of}"):
        decide_budget(tiny_model("llama"), basic(multiple_of=multiple_of))


def test_widths_need_no_weights() -> None:
    with torch.device("meta"):
        model = type(tiny_model("llama"))(TINY["llama"].config())
    assert decide_budget(model, basic()) == decide_budget(tiny_model("llama"), basic())


def test_free_head_balance_takes_its_share_of_all_dims() -> None:
    """r = 0.3008 of 32 value dims are 9.6: 10 of them instead of 2 in each of 4 heads; the FFN takes up the rest."""
    config = basic(0.23, attention="value_dims", head_balance="free")
    widths = decide_budget(tiny_model("llama"), config)
    assert widths.pairs[0][0].after == HEADS * 8 - 10
    assert widths.sparsity == pytest.approx(0.23, abs=96 / 2 * LAYERS / widths.linear_parameters)


def test_even_cut_of_heads_that_are_uneven_already_is_refused() -> None:
    model = tiny_model("llama")
    pairs = resolve_pruned(model)
    pairs[0][0].cut(torch.arange(2, HEADS * 8))
    record_plan(model, pairs)
    with pytest.raises(ValueError, match=r"head_balance must be 'free' .* those of model\.layers\.0 keep 6, 8, 8, 8"):
        decide_budget(model, basic(0.3, attention="value_dims"))
    decide_budget(model, basic(0.3, attention="value_dims", head_balance="free"))
    decide_budget(model, basic(0.3, attention="none"))
