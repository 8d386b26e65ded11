"""Gates close what a pruning by the same scores would cut, and learn which."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import BOTH, basic, leftovers
from torch import nn

from fasp_lightning.pruning.budget.allocation import adaptive_budget
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.learned.gates import Gates
from fasp_lightning.pruning.select import select_units
from fasp_lightning.structure.modes import hooked, remove_hooks
from fasp_lightning.structure.plan import record_plan, resolve_pruned

FORMS = {
    "ffn": ("llama-gqa", basic(0.3, attention="none", multiple_of=4)),
    "value": ("llama-gqa", BOTH),
    "free-heads": ("opt", replace(BOTH, head_balance="free")),
    "groups": ("llama-gqa", basic(0.4, attention="kv_groups")),
    "adaptive": ("opt", basic(0.2, allocation="adaptive", multiple_of=4)),
    "adaptive-groups": ("phi3", basic(0.4, allocation="adaptive", attention="kv_groups")),
}


def made(
    name: str, config: PruningConfig, *, learned: float = 0.0
) -> tuple[nn.Module, Gates, list[list[torch.Tensor]]]:
    """A model with gates on random scores, some of them moved as if they had been learned."""
    model, draw = tiny_model(name), torch.Generator().manual_seed(3)
    pairs = resolve_pruned(model, whole=config.whole)
    scores = [[torch.rand(pair.kept.numel(), generator=draw).double() for pair in block] for block in pairs]
    gates = Gates(pairs, decide_budget(model, config, pairs), scores, config)
    gates.offsets += learned * torch.randn(gates.offsets.shape, generator=draw)
    return model, gates, scores


def cut_by(gates: Gates, scores: list[list[torch.Tensor]], config: PruningConfig) -> None:
    """Cut as the engine would by such scores."""
    for block, widths, found in zip(gates.pairs, gates.budget(scores).pairs, scores, strict=True):
        for pair, width, score in zip(block, widths, found, strict=True):
            if width.after < width.before:
                pair.cut(select_units(pair, width, score, config))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_masked_model_computes_what_the_cut_one_does(form: str) -> None:
    name, config = FORMS[form]
    model, gates, _ = made(name, config, learned=0.5)
    tokens = random_tokens(2, 12)
    with gates.attached():
        masked = model(tokens).logits
    assert not leftovers(model)
    assert (model(tokens).logits - masked).abs().max() > 1e-3
    cut_by(gates, gates.scores(), config)
    record_plan(model, gates.pairs)
    torch.testing.assert_close(model(tokens).logits, masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_scores_that_have_not_moved_choose_as_sensitivity_does(form: str) -> None:
    name, config = FORMS[form]
    _, gates, scores = made(name, config)
    for block in scores:
        block[-1][:3] = 0  # units that no gradient has reached
    gates = Gates(gates.pairs, decide_budget(tiny_model(name), config), scores, config)
    found = gates.scores()
    assert gates.budget(found) == gates.budget(scores)
    for block, widths, mine, theirs in zip(gates.pairs, gates.budget(found).pairs, found, scores, strict=True):
        for pair, width, one, other in zip(block, widths, mine, theirs, strict=True):
            assert torch.equal(select_units(pair, width, one, config), select_units(pair, width, other, config))


@pytest.mark.parametrize("form", FORMS)
def test_budget_holds_whatever_is_learned(form: str) -> None:
    name, config = FORMS[form]
    _, gates, scores = made(name, config, learned=2.0)
    uniform, found = decide_budget(tiny_model(name), config), gates.budget(gates.scores())
    if config.allocation == "uniform":
        assert found == uniform
        return
    step = max(width.cost for block in uniform.pairs for width in block if width.kind == "ffn") * 4
    assert abs(found.parameters_after - uniform.parameters_after) <= step / 2
    assert found == adaptive_budget(uniform, gates.pairs, gates.scores(), config)
    ffns = [width for block in found.pairs for width in block if width.kind == "ffn"]
    assert all(width.after == width.original or width.after % (config.multiple_of) == 0 for width in ffns)
    assert found != gates.budget(scores)  # widths follow the scores


@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
def test_gradient_of_a_gate_goes_through_the_slope_of_the_stand_in(name: str) -> None:
    """∂/∂δ = 2 σ(1 − σ) ∂/∂m: m multiplies the column, σ is the sigmoid at twice the distance from the threshold."""
    model, gates, scores = made(name, basic(0.3, attention="none"))
    model.requires_grad_(False)
    tokens, slopes = random_tokens(2, 12), torch.randn(2, 12, model.config.vocab_size)
    gates.offsets.requires_grad_()
    with gates.attached():
        (found,) = torch.autograd.grad((model(tokens).logits * slopes).sum(), [gates.offsets])

    pair, score = gates.pairs[-1][-1], scores[-1][-1].log()
    keep = gates.budget(scores).pairs[-1][-1].after
    ordered = (score / score.std(correction=0)).sort(descending=True)
    threshold = (ordered.values[keep - 1] + ordered.values[keep]) / 2
    mask = torch.zeros(len(score), requires_grad=True)
    mask.data[ordered.indices[:keep]] = 1
    with gates.attached():
        remove_hooks(pair.consumer, lambda hook: True)  # its gates are those of the next line
        with hooked(before=[(pair.consumer, lambda _, args, kwargs: ((args[0] * mask,), kwargs))]):
            (model(tokens).logits * slopes).sum().backward(inputs=[mask])
    smooth = torch.sigmoid(2 * (score / score.std(correction=0) - threshold))
    expected = 2 * smooth * (1 - smooth) * mask.grad
    torch.testing.assert_close(found[-len(score) :], expected, atol=1e-6, rtol=1e-3)
