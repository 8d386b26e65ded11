"""Which parameters of the model train: before the first pruning, and after it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.adapters import is_adapter_parameter
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.training.modeling.lora import stock_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODES = ("none", "full", "blocks", "lora")


class Recovery:
    """Decides which of the causal LM's parameters train, by their ``requires_grad``.

    Args:
        mode: ``"none"`` leaves all as the user's module has it; ``"full"`` trains every parameter after the first
            pruning; ``"blocks"`` those of the decoder blocks, so that embeddings, final norm and head stay; ``"lora"``
            its adapters alone.
        own: Names of what trains before the first pruning, as :func:`trained_names` gives them. Adapters that are not
            among them train only after it.
    """

    def __init__(self, mode: str, own: Collection[str] = ()) -> None:
        self.mode = mode
        self._own = frozenset(own)

    def prepare(self, model: PreTrainedModel) -> None:
        """Let all parameters that will ever train require gradients, so that optimizers are given them.

        Args:
            model: The causal LM, adapters attached.
        """
        if self.mode != "none":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self._is_own(model, name) or self._recovers(model, name))

    def apply(self, model: PreTrainedModel, pruned: bool, optimizers: Sequence[Optimizer] = ()) -> None:
        """Set the parameters for a phase of the run; a frozen one has no gradient, so that no optimizer moves it.

        Args:
            model: The causal LM, adapters attached.
            pruned: Whether the first pruning is done.
            optimizers: All of the run; they forget the state of what is frozen, AdamW two moments a parameter.
        """
        if self.mode != "none":
            for name, parameter in model.named_parameters():
                trains = self._recovers(model, name) if pruned else self._is_own(model, name)
                parameter.requires_grad_(trains)
                if not trains:
                    parameter.grad = None
                    for optimizer in optimizers:
                        optimizer.state.pop(parameter, None)

    def check(self, model: PreTrainedModel, optimizers: Iterable[Optimizer]) -> None:
        """Refuse optimizers that lack a parameter that recovery will train.

        Args:
            model: The causal LM, adapters attached.
            optimizers: All of the run.

        Raises:
            FaspError: Naming one such parameter.
        """
        held = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
        missing = [name for name, parameter in self._recovering(model) if id(parameter) not in held]
        if missing:
            raise FaspError(
                f"recovery={self.mode!r} needs its parameters in the optimizer, which lacks {len(missing)} of them, "
                f"such as {missing[0]}; give configure_optimizers all parameters that require gradients"
            )

    def _recovering(self, model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
        if self.mode != "none":
            yield from ((name, one) for name, one in model.named_parameters() if self._recovers(model, name))

    def _recovers(self, model: PreTrainedModel, name: str) -> bool:
        if self.mode == "blocks":
            return name.startswith(f"{spec_for(model).layers}.")
        return self.mode == "full" or is_adapter_parameter(name)

    def _is_own(self, model: PreTrainedModel, name: str) -> bool:
        return stock_name(model, name) in self._own


def trained_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that require gradients, as they would be without adapters."""
    return {stock_name(model, name) for name, parameter in model.named_parameters() if parameter.requires_grad}
