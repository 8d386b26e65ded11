"""How much each pair loses by loss sensitivity or by block influence: the total, the bounds, what goes first."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from oracle import mask_units
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import basic, calibration
from torch import Tensor

from fasp_lightning import FASPPruner, PruningConfig, spec_for
from fasp_lightning.pruning.budget.allocation import LEAST_OF_UNIFORM, MOST_OF_UNITS, adaptive_budget, influence_budget
from fasp_lightning.pruning.budget.rounding import step_units
from fasp_lightning.pruning.budget.widths import (
    PRUNED,
    SHARED,
    Budget,
    PairWidth,
    decide_budget,
    is_reached,
)
from fasp_lightning.structure.plan import record_plan, resolve_pruned
from fasp_lightning.structure.resolve import linear_parameters

CUTS: dict[str, dict[str, Any]] = {
    "ffn": {"attention": "none"},
    "ffn-multiple": {"attention": "none", "multiple_of": 8},
    "even": {"attention": "value_dims"},
    "free": {"attention": "value_dims", "head_balance": "free"},
    "even-multiple": {"attention": "value_dims", "multiple_of": 8},
    "groups": {"attention": "kv_groups"},
}
FAMILIES = ["opt", "llama", "llama-gqa", "phi3", "gemma3"]
WITHOUT_GROUPS = {"opt"}
CASES = [(name, cut) for name in FAMILIES for cut in CUTS if cut != "groups" or name not in WITHOUT_GROUPS]
every_case = pytest.mark.parametrize(("name", "cut"), CASES)


def settings(cut: str, sparsity: float = 0.2, **options: Any) -> PruningConfig:
    return basic(sparsity, **{"score": "fisher", "allocation": "adaptive", **CUTS[cut], **options})


def drawn(pairs: list[list[Any]], spread: float = 1.0, seed: int = 0) -> list[list[Tensor]]:
    """Random sensitivity, that of whole pairs some orders of magnitude apart."""
    generator = torch.Generator().manual_seed(seed)

    def scores(units: int) -> Tensor:
        level = torch.randn(1, generator=generator, dtype=torch.float64).mul(spread).exp()
        return level * torch.rand(units, generator=generator, dtype=torch.float64)

    return [[scores(pair.kept.numel()) for pair in block] for block in pairs]


def allocated(model: Any, config: PruningConfig, spread: float = 1.0, seed: int = 0) -> tuple[Budget, Any]:
    """Uniform and adaptive widths from random sensitivity."""
    uniform = decide_budget(model, config)
    pairs = resolve_pruned(model, whole=config.whole)
    return uniform, adaptive_budget(uniform, pairs, drawn(pairs, spread, seed), config)


def flat(plan: Budget) -> list[PairWidth]:
    return [pair for block in plan.pairs for pair in block]


def half_step(model: Any, config: PruningConfig) -> float:
    """Half the parameters of the largest step that is decided upon, and half of one for the rounding."""
    groups = config.attention == "kv_groups"
    kinds = PRUNED[decide_budget(model, config).attention] - {SHARED}
    pairs = chain.from_iterable(resolve_pruned(model, whole={"groups"} if groups else ()))
    return max(step_units(pair, config) * pair.unit_cost for pair in pairs if pair.spec.kind in kinds) / 2 + 0.5


@pytest.mark.sampled(pairs=True)
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.35])
@every_case
def test_total_is_what_was_asked_within_half_a_step(name: str, cut: str, sparsity: float, spread: float) -> None:
    model, config = tiny_model(name), settings(cut, sparsity)
    _, found = allocated(model, config, spread)
    removed = sum((pair.before - pair.after) * pair.cost for pair in flat(found))
    assert abs(removed - sparsity * found.linear_parameters) <= half_step(model, config)
    assert found.parameters_before - found.parameters_after == removed


@pytest.mark.parametrize("cut", ["ffn", "ffn-multiple", "even", "free", "groups"])
def test_blocks_share_what_goes_by_the_softmax_of_their_influence(cut: str) -> None:
    model, config = tiny_model("gemma3"), settings(cut, 0.2, allocation="block_influence", influence_temperature=0.5)
    influence = torch.tensor([0.1, 0.3, 0.2, 0.0], dtype=torch.float64)
    uniform, pairs = decide_budget(model, config), resolve_pruned(model, whole=[cut])
    found = influence_budget(uniform, pairs, influence, config)
    kinds = PRUNED[uniform.attention] - {SHARED}
    for block, evenly, share in zip(found.pairs, uniform.pairs, (-influence / 0.5).softmax(0) * 4, strict=True):
        for pair, even, one in zip(block, evenly, pairs[0], strict=True):
            if pair.kind in kinds:
                lost, wanted = pair.before - pair.after, float(share) * (even.before - even.after)
                assert abs(lost - wanted) <= 1.5 * step_units(one, config)  # the uniform widths are rounded too
    removed = sum((pair.before - pair.after) * pair.cost for pair in flat(found))
    assert abs(removed - 0.2 * found.linear_parameters) <= half_step(model, config)


def test_block_that_does_all_loses_the_least_it_may_and_others_the_rest() -> None:
    model, config = tiny_model("llama"), settings("ffn", 0.15, allocation="block_influence", influence_temperature=1e-3)
    uniform = decide_budget(model, config)
    found = influence_budget(uniform, resolve_pruned(model), torch.tensor([1.0, 0.1]), config)
    lost = [block[-1].before - block[-1].after for block in found.pairs]
    evenly = uniform.pairs[0][-1].before - uniform.pairs[0][-1].after
    assert lost[0] == int(LEAST_OF_UNIFORM * evenly)
    assert abs(sum(lost) - 2 * evenly) <= 1


@pytest.mark.sampled(pairs=True)
@pytest.mark.parametrize("seed", range(3))
@every_case
def test_every_pair_loses_something_and_none_all(name: str, cut: str, seed: int) -> None:
    model, config = tiny_model(name), settings(cut)
    uniform, found = allocated(model, config, spread=8.0, seed=seed)
    kinds = PRUNED[uniform.attention] - {SHARED}
    for pair, even in zip(flat(found), flat(uniform), strict=True):
        lost, evenly = pair.before - pair.after, even.before - even.after
        if pair.kind in kinds:
            step = max(step_units(one, config) for one in chain(*resolve_pruned(model)) if one.spec.kind == pair.kind)
            assert (
                LEAST_OF_UNIFORM * evenly - step
                < lost
                <= max(MOST_OF_UNITS * pair.original, (pair.original + evenly) / 2)
            )
        else:
            assert lost == evenly


@pytest.mark.parametrize("sensitive", [0, 1])
def test_block_that_the_loss_depends_on_loses_the_least_it_may(sensitive: int) -> None:
    model, config = tiny_model("llama"), settings("ffn", 0.15)
    uniform, pairs = decide_budget(model, config), resolve_pruned(model)
    level = [1e-6, 1e-6]
    level[sensitive] = 1e6
    scores = [[factor * score for score in block] for factor, block in zip(level, drawn(pairs, 0.0), strict=True)]
    lost = [block[-1].before - block[-1].after for block in adaptive_budget(uniform, pairs, scores, config).pairs]
    evenly = uniform.pairs[0][-1].before - uniform.pairs[0][-1].after
    assert lost[sensitive] == int(LEAST_OF_UNIFORM * evenly)
    assert abs(sum(lost) - 2 * evenly) <= 1


def test_block_that_has_lost_its_least_share_is_not_forced_again() -> None:
    model, config = tiny_model("llama"), settings("ffn", 0.1)
    _, first = allocated(model, config, spread=4.0)
    most = max((0, 1), key=lambda block: first.pairs[block][-1].before - first.pairs[block][-1].after)
    pairs = resolve_pruned(model)
    for block, widths in zip(pairs, first.pairs, strict=True):
        block[-1].cut(torch.arange(widths[-1].after))
    record_plan(model, pairs)
    further = settings("ffn", 0.25)
    uniform, scores = decide_budget(model, further), drawn(pairs, spread=0.0)
    scores[most] = [1e6 * score for score in scores[most]]
    found = adaptive_budget(uniform, pairs, scores, further)
    assert LEAST_OF_UNIFORM * (uniform.pairs[most][-1].before - uniform.pairs[most][-1].after) >= 1
    assert found.pairs[most][-1].after == found.pairs[most][-1].before
    assert found.pairs[1 - most][-1].after < found.pairs[1 - most][-1].before


def test_what_goes_is_less_sensitive_for_its_size_than_what_stays() -> None:
    """But for what each pair loses at least, and keeps at least."""
    model, config = tiny_model("llama"), settings("free", 0.25)
    uniform, pairs = decide_budget(model, config), resolve_pruned(model)
    scores = drawn(pairs, spread=0.2)
    gone, left = [], []
    found = adaptive_budget(uniform, pairs, scores, config)
    for pair, even, score in zip(flat(found), flat(uniform), chain(*scores), strict=True):
        density = (score / pair.cost).sort().values
        lost = pair.before - pair.after
        gone.append(density[int(LEAST_OF_UNIFORM * (even.before - even.after)) : lost])
        left.append(density[lost : int(MOST_OF_UNITS * pair.original)])
    assert all(part.numel() for part in gone)
    assert torch.cat(gone).max() < torch.cat(left).min()


def test_one_dim_of_every_head_goes_at_a_time_where_heads_are_even() -> None:
    """Head 0 needs none of its dims, the others all: an even cut must not take a dim of head 0 alone."""
    model, config = tiny_model("llama"), settings("even", 0.1)
    uniform, pairs = decide_budget(model, config), resolve_pruned(model)
    scores = [[torch.ones(pair.kept.numel(), dtype=torch.float64) for pair in block] for block in pairs]
    for block in scores:
        block[0][8:] = 1e6
    found = adaptive_budget(uniform, pairs, scores, config)
    for pair, even in zip(flat(found), flat(uniform), strict=True):
        if pair.kind == "value":
            assert pair.before - pair.after == 4 * int(LEAST_OF_UNIFORM * (even.before - even.after) / 4)


@pytest.mark.parametrize("multiple_of", [5, 8, 20])
def test_ffn_widths_are_multiples(multiple_of: int) -> None:
    model = tiny_model("llama")
    _, found = allocated(model, settings("ffn", 0.3, multiple_of=multiple_of), spread=2.0)
    widths = [pair.after for pair in flat(found) if pair.kind == "ffn"]
    assert all(width % multiple_of == 0 for width in widths)
    assert len(set(widths)) > 1 or multiple_of == 20


def pruned(name: str, config: PruningConfig) -> Any:
    model: Any = tiny_model(name)
    FASPPruner(config).prune(model, calibration(4))
    return model


def heads_left(model: Any) -> list[list[int]]:
    """Value dims of each KV head, one list a block."""
    pairs = [block[0] for block in resolve_pruned(model)]
    return [torch.bincount(p.kept // p.layout.size, minlength=p.layout.groups).tolist() for p in pairs]


@pytest.mark.sampled(pairs=True)
@pytest.mark.parametrize("allocation", ["uniform", "adaptive", "block_influence"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3])
@every_case
def test_pruned_model_has_reached_its_sparsity(name: str, cut: str, sparsity: float, allocation: str) -> None:
    model, config = tiny_model(name), settings(cut, sparsity, allocation=allocation)
    linear = linear_parameters(model, spec_for(model))
    assert not is_reached(model, config)
    report = FASPPruner(config).prune(model, calibration(4))
    assert is_reached(model, config)
    assert report.sparsity == pytest.approx(1 - linear_parameters(model, spec_for(model)) / linear)
    with pytest.raises(ValueError, match="sparsity must exceed"):
        FASPPruner(config).prune(model, calibration(4))
    with torch.no_grad():
        assert model(random_tokens()).logits.isfinite().all()


@pytest.mark.sampled(pairs=True)
@pytest.mark.parametrize("then", ["uniform", "adaptive", "block_influence"])
@every_case
def test_model_is_pruned_further_to_the_sparsity_that_was_asked(name: str, cut: str, then: str) -> None:
    model, first = tiny_model(name), settings(cut, 0.15)
    linear, half = linear_parameters(model, spec_for(model)), half_step(model, first)
    FASPPruner(first).prune(model, calibration(4))
    before = model.fasp_plan
    report = FASPPruner(settings(cut, 0.35, allocation=then)).prune(model, calibration(4))
    removed = linear - linear_parameters(model, spec_for(model))
    assert report.sparsity == pytest.approx(removed / linear)
    blocks = len(before.blocks) if then == "uniform" else 1
    assert abs(removed - 0.35 * linear) <= half * blocks
    for old, new in zip(before.blocks, model.fasp_plan.blocks, strict=True):
        assert all(set(new[path].kept) <= set(pair.kept) for path, pair in old.items())
    with torch.no_grad():
        assert model(random_tokens()).logits.isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_uniform_allocation_gives_all_blocks_one_ffn_width(name: str) -> None:
    model = pruned(name, settings("even", 0.25, allocation="uniform"))
    assert len({len(block[spec_for(model).pairs[-1].consumer].kept) for block in model.fasp_plan.blocks}) == 1
    assert not model.fasp_plan.cuts.uneven


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "phi3", "gemma3"])
def test_all_blocks_keep_one_number_of_kv_groups(name: str) -> None:
    model = pruned(name, settings("groups", 0.4))
    assert len({len(block["self_attn.o_proj"].kept) for block in model.fasp_plan.blocks}) == 1
    assert model.fasp_plan.cuts.uneven
    assert model.config.num_key_value_heads == len(model.fasp_plan.blocks[0]["self_attn.o_proj"].kept)


@pytest.mark.parametrize("cut", ["even", "free"])
@pytest.mark.parametrize("name", ["opt", "llama", "phi3", "gemma3"])
def test_heads_are_balanced_as_asked(name: str, cut: str) -> None:
    left = heads_left(pruned(name, settings(cut, 0.3)))
    assert all(len(set(block)) == 1 for block in left) == (cut == "even")


@pytest.mark.parametrize("cut", ["ffn", "free"])
@pytest.mark.parametrize("name", ["opt", "llama-gqa"])
def test_cut_model_equals_masked_model(name: str, cut: str) -> None:
    model = pruned(name, settings(cut, restoration="none"))
    masked = mask_units(tiny_model(name), model.fasp_plan)
    with torch.no_grad():
        torch.testing.assert_close(model(random_tokens()).logits, masked(random_tokens()).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cut", ["ffn", "even", "free"])
def test_sparsity_that_rounds_to_nothing_cuts_nothing(cut: str) -> None:
    model = tiny_model("llama")
    config = settings(cut, 1e-3)
    report = FASPPruner(config).prune(model, calibration())
    assert (report.sparsity, report.pairs) == (0, [])
    assert not is_reached(model, config)
