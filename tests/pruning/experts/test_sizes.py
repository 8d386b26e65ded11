"""What models with experts take up: all parameters, and those that a token meets."""

from __future__ import annotations

import pytest
from tiny import tiny_model
from tiny_experts import experts_of
from tiny_pruning import basic, calibration
from torch import nn

from fasp_lightning import FaspError, FASPPruner, PruningConfig
from fasp_lightning.pruning.budget import chunks
from fasp_lightning.pruning.budget.footprint import footprints, peak_memory_estimate
from fasp_lightning.pruning.budget.widths import decide_budget


def met_by_a_token(model: nn.Module, config: PruningConfig) -> int:
    """All parameters but those of the experts that it is not sent to, counted one by one."""
    left = sum(parameter.numel() for parameter in model.parameters())
    for pair in experts_of(model, config):
        for parameter in pair.module.parameters():
            left -= sum(parameter[index].numel() for index in range(pair.top_k, len(parameter)))
    return left


@pytest.mark.parametrize("experts", ["columns", "whole"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_active_parameters_are_those_of_the_pruned_model(name: str, experts: str) -> None:
    model, config = tiny_model(name), basic(0.3, experts=experts)
    before, after = footprints(model, decide_budget(model, config), 4)
    assert before.active == met_by_a_token(model, config) < before.parameters
    FASPPruner(config).prune(model, calibration())
    assert after.active == met_by_a_token(model, config)
    assert after.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_grams_of_experts_are_counted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_model("mixtral"), basic(0.3)
    options = {"tokens": 100, "evaluated_tokens": 0, "bytes_per_value": 4, "verify": False}
    solves = []
    for experts in (6, 2):
        monkeypatch.setattr(chunks, "GRAM_ROOM", experts * 12 * 48**2)
        solves.append(peak_memory_estimate(model, decide_budget(model, config), config, **options).solve)
    assert solves[0] - solves[1] == 4 * 12 * 48**2


@pytest.mark.parametrize("options", [{"score": "fisher"}, {"allocation": "adaptive"}, {"score": "learned"}])
def test_loss_sensitivity_of_experts_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(FaspError, match="score must be 'wanda', 'magnitude' or 'auto', and allocation 'uniform', with"):
        FASPPruner(basic(0.2, **options)).prune(tiny_model("mixtral"), calibration())


def test_width_of_an_expert_stays_one_that_grouped_kernels_take() -> None:
    for sparsity in (0.1, 0.2, 0.3, 0.4):
        budget = decide_budget(tiny_model("mixtral"), basic(sparsity, multiple_of=1))
        assert all(pair.after // pair.parts % 8 == 0 for pair in budget.cut)
