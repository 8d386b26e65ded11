"""What is not finite is refused, and the layer is named."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from tiny_pruning import BOTH, calibration, leftovers

from fasp_lightning import FaspError, FASPPruner
from fasp_lightning.pruning.finite import require_finite


@pytest.mark.parametrize(
    ("broken", "named"),
    [("self_attn.v_proj", "model.layers.1.self_attn.o_proj"), ("mlp.up_proj", "model.layers.1.mlp.down_proj")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activation_that_is_not_finite_names_the_layer(broken: str, named: str, value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{broken}").weight[0, 0] = value
    with pytest.raises(ValueError, match=rf"activations must be finite.*{named}"):
        FASPPruner(BOTH).prune(model, calibration())
    assert leftovers(model) == []


def test_what_is_finite_passes() -> None:
    require_finite("activations", True, "model.layers.0.mlp.down_proj")


def test_a_refusal_says_what_to_do() -> None:
    with pytest.raises(FaspError, match=r"^gradients must be finite, got NaN or Inf at the input of lm_head; check"):
        require_finite("gradients", False, "lm_head")
