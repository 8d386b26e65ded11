"""Where a model's weights are while nothing computes with them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.blocks.samples import Stored
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.pruning.report import PairReport
from fasp_lightning.structure.modes import placed
from fasp_lightning.structure.ownership import require_unspread
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.resolve import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class PrunedBlock:
    """What one round has made of one block.

    Attributes:
        kept: (m,) units left of each pair.
        entries: The report on each pair that was cut.
        warnings: What the user was told.
    """

    kept: list[Tensor]
    entries: list[PairReport]
    warnings: list[str]


class Weights:
    """The weights of a model in memory as a whole. Others may hold a block of it at a time, and keep what is done.

    The engine asks for the weights of a block before it computes with it, tells when a round has pruned it, and asks at
    the start of a round which blocks are done already, by a run that was stopped.
    """

    def home(self, pairs: list[list[ResolvedPair]]) -> torch.device:
        """Where blocks compute, if the settings do not say."""
        return device_of(pairs)

    def require(self, model: PreTrainedModel) -> None:
        """Refuse weights that cannot be pruned.

        Raises:
            FaspError: If one is on ``meta``, spread over processes, or cannot be trained.
        """
        for name, parameter in model.named_parameters():
            require_unspread(name, [parameter])
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_meta:
                raise FaspError(
                    f"model must have its weights in memory, got {name} on the meta device; load it fully first"
                )
            if tensor.is_inference():
                raise FaspError(
                    f"model must be made of tensors that can be trained, got {name} made in torch.inference_mode(); "
                    "load it outside of that"
                )

    def placed(self, module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """A module with its weights on the compute device, while inside.

        Args:
            module: A block, or the model, all blocks of which are replaced by stand-ins.
            device: The compute device.
        """
        return placed(module, device)

    def own_text(self, config: OwnTextConfig, starts: Tensor | None) -> list[Tensor] | None:
        """Own text that is at hand; ``None`` lets the model write it.

        Args:
            config: How much, and how.
            starts: As for :func:`~fasp_lightning.pruning.own_text.writing.own_text`.
        """
        return None

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What was made under a name, by an earlier run that was stopped, or now.

        Args:
            name: What it is.
            make: Makes it: tensors, and plain data.
        """
        return make()

    def start_round(self, number: int) -> list[PrunedBlock]:
        """What an earlier run, which was stopped, has made of the first blocks in a round."""
        return []

    def take_over(self, index: int, pairs: list[ResolvedPair], done: PrunedBlock) -> None:
        """Give a block the shapes that an earlier run has given it, and from now on the weights, too.

        Args:
            index: Its number.
            pairs: Its pairs.
            done: What has become of them.
        """
        for pair, kept in zip(pairs, done.kept, strict=True):
            pair.cut(kept)

    def take_up(self, hidden: list[Stored], store: TensorStore) -> list[Stored]:
        """The inputs of the first block that is not done in this round, in place of those of the first block."""
        return hidden

    def finish(self, index: int, pairs: list[ResolvedPair], done: PrunedBlock, hidden: list[Stored]) -> None:
        """A round has pruned a block.

        Args:
            index: Its number.
            pairs: Its pairs.
            done: What has become of them.
            hidden: (batch, seq, hidden) what it returns, one a sample.
        """
