"""Weights that are spread over processes, of which the engine is given a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fasp_lightning.pruning.blocks.weights import Weights
from fasp_lightning.structure.ownership import is_spread
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks
from fasp_lightning.training.sharding.fsdp import Opened, opened
from fasp_lightning.training.sharding.shard import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ShardedWeights(Weights):
    """A block is whole in each process while the engine computes with it, and sharded again afterwards.

    Args:
        blocks: The decoder blocks.
        optimizers: They are handed the parameters that take the place of those they hold.
    """

    def __init__(self, blocks: Sequence[nn.Module], optimizers: Iterable[Optimizer]) -> None:
        self._blocks = blocks
        self._optimizers = list(optimizers)
        self._closed = set[nn.Module]()

    def require(self, model: PreTrainedModel) -> None:
        """Sharded weights can be pruned; a run has made them on its device."""

    def placed(self, module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """A block, gathered; what is around the blocks is there already, see :meth:`around_open`."""
        return self._gathered(module, device) if module in self._blocks else nullcontext()

    @contextmanager
    def around_open(self, root: nn.Module) -> Iterator[None]:
        """What is around the blocks is whole in each process, while inside: calls of it need no other process.

        Args:
            root: The module that is trained.
        """
        around = opened(root, self._blocks)
        try:
            yield
            # FSDPState._lazy_init (torch/distributed/fsdp/_fully_shard/_fsdp_state.py) of a new root refuses blocks
            # that have had another one.
            for block in self._blocks:
                if block not in self._closed:
                    self._close(opened(block))
        finally:
            self._close(around)

    @contextmanager
    def _gathered(self, block: nn.Module, device: torch.device) -> Iterator[None]:
        whole = opened(block)
        try:
            with super().placed(block, device):
                yield
        finally:
            self._close(whole)
            self._closed.add(block)

    def _close(self, whole: Opened) -> None:
        replace_parameters(self._optimizers, whole.close())


@contextmanager
def weights_of(model: PreTrainedModel, root: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[Weights]:
    """Where the engine has the weights of a model from.

    Args:
        model: The causal LM.
        root: The module that is trained, which holds it.
        optimizers: All of the run; where weights are sharded they follow, but for the shapes of their state.
    """
    if not is_sharded(model):
        yield Weights()
        return
    weights = ShardedWeights(list(find_blocks(model, spec_for(model))), optimizers)
    with weights.around_open(root):
        yield weights


def replace_parameters(optimizers: Iterable[Optimizer], replaced: dict[Tensor, nn.Parameter]) -> None:
    """Hand optimizers the parameters that stand for others now; their state is the new ones'.

    Args:
        optimizers: All of the run.
        replaced: Old parameter → new one.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(one, one) for one in group["params"]]
        for old in [old for old in replaced if old in optimizer.state]:
            optimizer.state[replaced[old]] = optimizer.state.pop(old)


def whole(value: Tensor) -> Tensor:
    """All of a tensor, sharded or not; all processes call this."""
    return cast(Any, value).full_tensor() if is_spread(value) else value


def resharded(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change a tensor as a whole, and spread it as it was; all processes call this.

    Args:
        value: Any tensor, sharded or not.
        change: What the whole tensor becomes.
    """
    changed = change(whole(value))
    if not is_spread(value):
        return changed
    from torch.distributed.tensor import DTensor, distribute_tensor

    spread = cast(DTensor, value)
    # every process has all of it, so that none is sent anything
    return distribute_tensor(changed, spread.device_mesh, spread.placements, src_data_rank=None)
