"""A model's forward pass on many samples, taken apart: block after block, and what follows the last one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fasp_lightning.pruning.blocks.replay import call_block
from fasp_lightning.pruning.blocks.samples import Sample, Stored
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.blocks.standins import BlockTap, Fixed, first, skeleton, stand_ins, with_first
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def through_block(
    session: Session, block: nn.Module, index: int, samples: Sequence[Sample], hidden: Sequence[Stored]
) -> tuple[list[Stored], Any]:
    """What a block returns on each sample, stored, and the skeleton of its output.

    Args:
        session: Where to compute.
        block: The block.
        index: Its number.
        samples: The samples.
        hidden: (batch, seq, hidden) its inputs, one a sample; they stay.
    """
    store, found, returned = session.store, list[Stored](), None
    with session.weights.placed(block, session.device):
        for sample, stored in zip(samples, hidden, strict=True):
            output = call_block(block, sample.calls[index], store.get(stored), store)
            returned = skeleton(output)
            found.append(store.put(first(output)))
    return found, returned


class Tail:
    """What follows the blocks, while the model's own forward is handed the last one's output by a stand-in.

    So norms, logit scales and soft caps behind the blocks are the family's own.
    """

    def __init__(self, last: Fixed, returned: Any) -> None:
        self._last = last
        self._returned = returned

    def hand_over(self, hidden: Tensor) -> None:
        """Set what the last block returns in the next forward: (batch, seq, hidden)."""
        self._last.value = with_first(self._returned, hidden)


@contextmanager
def tail_alone(session: Session, model: PreTrainedModel, returned: Any) -> Iterator[Tail]:
    """Replace every block, while inside; those before the last let through whatever they are given.

    Args:
        session: Where to compute: what is left of the model is all that moves there.
        model: The causal LM.
        returned: Skeleton of a block's output.
    """
    blocks = find_blocks(model, spec_for(model))
    last = Fixed(blocks[-1])
    through = {str(i): BlockTap(block, lambda args, kwargs: None, [returned]) for i, block in enumerate(blocks)}
    weights, device = session.weights, session.device
    with stand_ins(blocks, {**through, str(len(blocks) - 1): last}), weights.placed(model, device):
        yield Tail(last, returned)
