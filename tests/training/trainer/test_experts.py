"""What hangs on the shapes of experts follows them: optimizer state, averaged copies."""

from __future__ import annotations

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import basic, calibration

from fasp_lightning import FASPPruner
from fasp_lightning.structure.plan import conform, resolve_pruned
from fasp_lightning.training.trainer.optimizer_state import slice_states
from fasp_lightning.training.trainer.surgery import _slices


@pytest.mark.parametrize("experts", ["columns", "whole"])
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_optimizer_state_and_averages_follow_the_experts(name: str, experts: str) -> None:
    model, original = tiny_model(name), tiny_model(name)
    optimizer = torch.optim.AdamW(model.parameters())
    model(random_tokens(4, 30), labels=random_tokens(4, 30)).loss.backward()
    optimizer.step()
    for parameter, state in optimizer.state.items():
        state["exp_avg"].copy_(parameter.detach())
    config = basic(0.3, experts=experts, restoration="none")
    FASPPruner(config).prune(model, calibration())
    slice_states([optimizer], _slices(resolve_pruned(model, whole=config.whole), None))
    for parameter, state in optimizer.state.items():
        assert torch.equal(state["exp_avg"], parameter)
        assert state["exp_avg_sq"].shape == parameter.shape
    model(random_tokens(4, 30), labels=random_tokens(4, 30)).loss.backward()
    optimizer.step()

    average = conform(original, model.fasp_plan)
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (average, model)]
    assert shapes[0] == shapes[1]
    average.load_state_dict(model.state_dict())
    tokens = random_tokens(2, 20, seed=5)
    torch.testing.assert_close(average(tokens).logits, model(tokens).logits)
    whole = conform(average, None).state_dict()
    assert {key: value.shape for key, value in whole.items()} == {
        key: value.shape for key, value in tiny_model(name).state_dict().items()
    }
