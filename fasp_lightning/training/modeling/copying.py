"""A copy of a model to compute with, which takes no memory for what need not change."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasp_lightning.structure.adapters import is_adapted
from fasp_lightning.structure.compact import replace_module
from fasp_lightning.training.modeling.lora import merge_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plain_copy(
    model: PreTrainedModel, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A frozen copy in eval mode, without adapters; weights of the same device and dtype are shared.

    So it holds for as long as the model is not trained further. It has the same fingerprint whether adapters that do
    nothing yet were attached to the model or not.

    Args:
        model: The model, which stays as it is.
        device: Where the copy computes; by default where the model is.
        dtype: Of its weights; by default the model's.
    """

    def placed(weight: Tensor) -> nn.Parameter:
        kind = dtype if weight.is_floating_point() else None
        return nn.Parameter(weight.detach().to(device or weight.device, kind or weight.dtype), requires_grad=False)

    # deepcopy takes from its memo what it need not copy
    copied: Any = copy.deepcopy(model, {id(weight): placed(weight) for weight in model.parameters()})
    for path, layer in list(copied.named_modules()):
        if is_adapted(layer) and not any(weight.any() for weight in layer.lora_B.parameters()):
            replace_module(copied, path, layer.base_layer)
    merge_lora(copied)
    copied.config.dtype = copied.dtype  # as where it is read so
    found: PreTrainedModel = copied.to(device or model.device).eval().requires_grad_(False)  # buffers go there too
    return found
