"""What restoration and scores do to a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import BOTH, FFN, basic, calibration, pruned

from fasp_lightning import FASPPruner, PruningConfig


@pytest.mark.parametrize(
    "config",
    [BOTH, PruningConfig.paper(0.2), PruningConfig.paper(0.2, damping=10.0)],
    ids=["default", "paper", "paper-overdamped"],
)
@pytest.mark.parametrize("family", ["opt", "llama-gqa", "gpt2"])
def test_restoration_never_raises_the_calibration_error(family: str, config: PruningConfig) -> None:
    report = FASPPruner(config).prune(tiny_model(family), calibration())
    assert all(0 < pair.error_after <= pair.error_before < 1 for pair in report.pairs)
    assert (config.damping > 1) == all(pair.solver == "none" for pair in report.pairs)


def test_reported_error_is_that_of_the_outputs() -> None:
    """‖WX − ŴX_M‖/‖WX‖ of the first consumer, from the model's own activations."""
    model, dense, batches = tiny_model("opt"), tiny_model("opt"), [random_tokens(6, 40)]
    report = FASPPruner(basic(0.3, attention="value_dims")).prune(model, batches)
    found = {}
    for key, which in (("pruned", model), ("dense", dense)):
        handle = which.model.decoder.layers[0].self_attn.out_proj.register_forward_hook(
            lambda m, args, output, key=key: found.update({key: output})
        )
        with torch.no_grad():
            which(*batches)
        handle.remove()
    bias = dense.model.decoder.layers[0].self_attn.out_proj.bias
    error = (found["pruned"] - found["dense"]).norm() / (found["dense"] - bias).norm()
    assert report.pairs[0].layer == "model.decoder.layers.0.self_attn.out_proj"
    assert report.pairs[0].error_after == pytest.approx(error.item(), rel=1e-3)


def test_massive_activation_hides_no_error_of_the_other_outputs() -> None:
    """One column that is huge and writes into one output holds nearly all energy; the other outputs lose as before."""
    plain, massive = tiny_model("llama"), tiny_model("llama")
    for model, size in ((plain, 1.0), (massive, 1e4)):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[1:, 0] = 0
            model.model.layers[0].mlp.down_proj.weight[0, 0] = size
    expected, found = (FASPPruner(FFN).prune(model, calibration()).pairs[0] for model in (plain, massive))
    assert expected.error_before > 0.1 > 1e-3 > found.error_before
    assert found.output_error_before == pytest.approx(expected.output_error_before, rel=0.05)
    assert 0.1 < found.output_error_after < found.output_error_before


def test_refitted_bias_lowers_the_error() -> None:
    with_bias, without = (
        FASPPruner(replace(BOTH, refit_bias=refit)).prune(tiny_model("opt"), calibration()) for refit in (True, False)
    )
    assert with_bias.pairs[0].error_after < without.pairs[0].error_after


def test_bias_stays_without_a_refit() -> None:
    model = pruned("opt", replace(BOTH, refit_bias=False))
    dense = tiny_model("opt")
    for path in ("self_attn.out_proj", "fc2"):
        name = f"model.decoder.layers.0.{path}.bias"
        assert torch.equal(model.state_dict()[name], dense.state_dict()[name])
        assert not torch.equal(pruned("opt").state_dict()[name], dense.state_dict()[name])


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_dead_columns_go_first(score: str) -> None:
    model, dead = tiny_model("llama"), {3, 7, 20}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[list(dead)] = 0
    FASPPruner(replace(FFN, score=score)).prune(model, calibration())
    assert all(not dead & set(block["mlp.down_proj"].kept) for block in model.fasp_plan.blocks)


def test_dead_columns_that_stay_do_not_break_the_solve() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:40] = 0  # more than go
    report = FASPPruner(replace(FFN, damping=0.0)).prune(model, calibration())
    assert report.warnings == []
    assert all(pair.solver == "cholesky" and pair.error_after < 1e-6 for pair in report.pairs)


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_score_decides_what_stays(score: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :10] *= 1e-2  # small weights …
            layer.mlp.up_proj.weight[:10] *= 1e4  # … on inputs that make up for it
    FASPPruner(replace(FFN, score=score)).prune(model, calibration())
    kept = set(model.fasp_plan.blocks[0]["mlp.down_proj"].kept)
    assert set(range(10)) <= kept if score == "wanda" else not kept & set(range(10))
