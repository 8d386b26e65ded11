"""LoRA on the linear layers of the decoder blocks: attached in place, cut along with its base, merged in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.adapters import has_adapters, is_adapted, is_adapter_parameter
from fasp_lightning.structure.compact import replace_module
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of low-rank adapters: a weight W acts as W + (alpha / rank) · B A, where B starts at zero.

    Attributes:
        rank: Rows of A and columns of B; at least 1.
        alpha: Scale of the update B A, which is multiplied by alpha / rank; greater than 0.
        dropout: Probability in [0, 1) to drop an input of A while training.
        targets: Names of the linear layers that get one, such as ``"q_proj"`` or ``"mlp.down_proj"``; by default every
            linear layer of the decoder blocks.

    Example::

        from fasp_lightning import CausalLMModule, LoRAConfig

        module = CausalLMModule(name, lora=LoRAConfig(rank=4, targets=("v_proj", "mlp.down_proj")))
        trained = [path for path, parameter in module.named_parameters() if parameter.requires_grad]
        assert all("lora_" in path for path in trained)
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise FaspError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise FaspError(f"alpha must be a finite number > 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise FaspError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.targets is not None:
            if isinstance(self.targets, str) or not self.targets:
                raise FaspError(f"targets must be a list of one or more names, or None for all, got {self.targets!r}")
            object.__setattr__(self, "targets", tuple(self.targets))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data that YAML and weights-only checkpoints take."""
        targets = None if self.targets is None else list(self.targets)
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "targets": targets}


def attach_lora(model: PreTrainedModel, config: LoRAConfig) -> None:
    """Give linear layers of the decoder blocks an adapter, in place. Then the adapters train, and nothing else does.

    The logits stay as they are. Around a layer that was cut, an adapter has the layer's widths. Adapters have the
    dtype of their base layers.

    Args:
        model: A causal LM of a registered family, pruned or not.
        config: Rank, scale, dropout and targets.

    Raises:
        FaspError: If the model carries adapters already, or a target is no linear layer of its blocks.
    """
    if has_adapters(model):
        raise FaspError("model must carry no LoRA yet, got one that does; merge it with merge_lora first")
    paths = _targets(model, config)
    frozen = tuple(stock_name(model, name) for name, value in model.named_parameters() if not value.requires_grad)
    _inject(model, config, paths)
    model.fasp_frozen = frozen  # type: ignore[assignment]  # plain data: copies of the model keep it
    model.fasp_lora = config.to_dict()  # type: ignore[assignment]  # travels with the state dict
    for layer in _lora_layers(model).values():
        dtype = layer.base_layer.weight.dtype  # peft may choose fp32
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)


def merge_lora(model: PreTrainedModel) -> None:
    """Add the adapters to their base weights and remove them, in place; without adapters nothing happens.

    Modules, state-dict keys and ``requires_grad`` are as they were before :func:`attach_lora`; a model whose adapters
    came from elsewhere trains all its parameters.

    Raises:
        FaspError: If a merged weight is not finite; the model is then partly merged.
    """
    layers = _lora_layers(model)
    if not layers:
        return
    base = base_parameters(model)
    for path, layer in layers.items():
        replace_module(model, path, _merged(layer))
    for parameter in base:
        parameter.requires_grad_(True)
    for name in ("peft_config", "fasp_frozen", "fasp_lora"):
        vars(model).pop(name, None)


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that trained before the adapters came; all but the adapters' own if that is unknown."""
    frozen = set(getattr(model, "fasp_frozen", ()))
    return [
        parameter
        for name, parameter in model.named_parameters()
        if not is_adapter_parameter(name) and stock_name(model, name) not in frozen
    ]


def stock_name(model: nn.Module, name: str) -> str:
    """A module's or parameter's name as it is in a model without adapters."""
    parts, parent = [], model
    for part in name.split("."):
        parts += [] if part == "base_layer" and is_adapted(parent) else [part]
        parent = getattr(parent, part)
    return ".".join(parts)


def linear_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the linear layers of the decoder blocks, of a model without adapters."""
    from transformers.pytorch_utils import Conv1D

    spec = spec_for(model)
    modules = find_blocks(model, spec).named_modules(prefix=spec.layers)
    return [path for path, module in modules if isinstance(module, (nn.Linear, Conv1D))]


def _targets(model: PreTrainedModel, config: LoRAConfig) -> list[str]:
    """Paths of the layers that ``config`` names."""
    paths = linear_paths(model)
    if config.targets is None:
        return paths
    chosen: list[str] = []
    for target in config.targets:
        found = [path for path in paths if path.endswith(f".{target}")]
        if not found:
            known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            raise FaspError(f"targets must be among the linear layers {known}, got {target!r}")
        chosen += found
    return chosen


def _inject(model: PreTrainedModel, config: LoRAConfig, paths: list[str]) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it, nothing else
        lora_dropout=config.dropout,
        target_modules=paths,
        fan_in_fan_out=isinstance(model.get_submodule(paths[0]), Conv1D),  # weights stored (in, out)
    )
    inject_adapter_in_model(settings, model)


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if is_adapted(module)}


@torch.no_grad()
def _merged(layer: Any) -> nn.Module:
    """The base layer with the update in it."""
    dtype = layer.base_layer.weight.dtype
    layer.to(torch.promote_types(dtype, torch.float32))  # a 16-bit sum is rounded once, at its end
    layer.merge(safe_merge=True)
    base: nn.Module = layer.base_layer.to(dtype)
    return base
