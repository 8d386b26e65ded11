"""How much each block does, without a gradient: one forward pass, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasp_lightning.ops import scores
from fasp_lightning.pruning.blocks.replay import call_block
from fasp_lightning.pruning.blocks.samples import Sample, Stored
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.blocks.standins import first
from fasp_lightning.structure.modes import evaluating
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def block_influence(
    session: Session,
    model: PreTrainedModel,
    samples: list[Sample],
    hidden: list[Stored],
) -> Tensor:
    """Mean over the real tokens of what :func:`~fasp_lightning.ops.scores.block_influence` says of each block.

    Args:
        session: Where to compute, one block at a time; its processes call this together, each with samples of its own.
        model: The causal LM, pruned before or not.
        samples: What :func:`~fasp_lightning.pruning.blocks.capture.capture` found, or some of it.
        hidden: (batch, seq, hidden) inputs of the first block, at each sample's ``number``; they stay.

    Returns:
        (blocks,) float64, on the CPU.

    Raises:
        RuntimeError: If another process raised an error.
    """
    blocks, store = find_blocks(model, spec_for(model)), session.store
    sums = torch.zeros(len(blocks), 2, dtype=torch.float64)
    states = [hidden[sample.number] for sample in samples]
    with session.processes.together(), evaluating(model):
        for index, block in enumerate(blocks):
            with session.weights.placed(block, session.device):
                for place, sample in enumerate(samples):
                    given = store.get(states[place])
                    returned = first(call_block(block, sample.calls[index], given, store))
                    sums[index] += _weighted(scores.block_influence(given, returned), sample)
                    if index:  # the first block's input serves the pruning too
                        store.drop(states[place])
                    states[place] = store.put(returned)
                    session.progress.count(index, "influence")
        for state in states:
            store.drop(state)
    session.processes.add(sums)
    return sums[:, 0] / sums[:, 1]


def _weighted(values: Tensor, sample: Sample) -> Tensor:
    """(2,) sum of the values of (batch, seq) tokens that are no padding, and how many they are, by their weight."""
    real = torch.ones_like(values) if sample.mask is None else sample.mask.to(values)
    return sample.weight * torch.stack([(values * real).sum(), real.sum()]).cpu()
