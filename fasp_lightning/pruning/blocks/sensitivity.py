"""Loss sensitivity of every unit: one backward pass with respect to the consumers' inputs.

The whole model runs at once where it is on the compute device and its activations fit there. Else it goes block by
block: forward, keeping every block's input; the head; and backward, computing each block once more from its input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasp_lightning.ops.likelihood import next_token_nll_gradient
from fasp_lightning.pruning.blocks.gradients import ConsumerScores
from fasp_lightning.pruning.blocks.passes import tail_alone, through_block
from fasp_lightning.pruning.blocks.replay import call_block
from fasp_lightning.pruning.blocks.samples import Sample, Stored
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.blocks.standins import first
from fasp_lightning.structure.causal_lm import input_device
from fasp_lightning.structure.modes import evaluating, frozen, requiring_gradients
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import device_of, find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PIECE_TOKENS = 2048
"""Tokens that go through the head, or the whole model, at once; a longer sequence goes alone."""


def fisher_scores(
    session: Session,
    model: PreTrainedModel,
    pairs: list[list[ResolvedPair]],
    samples: list[Sample],
    hidden: list[Stored],
    *,
    whole: bool | None = None,
) -> list[list[Tensor]]:
    """Σ w (x · ∂L/∂x)² of every unit: x the consumer's input in the model as it is, L the summed next-token NLL.

    Padding is neither predicted nor scored, and a label of −100 is no prediction. The model runs in evaluation mode;
    its modes, its parameters, their gradients and ``requires_grad`` are as before afterwards, also after an error. The
    samples stay as they are.

    Args:
        session: Where to compute; its processes call this together, each with samples of its own, and the sums are over
            all of them.
        model: The causal LM, pruned before or not.
        pairs: Its pairs, one list a block.
        samples: What :func:`~fasp_lightning.pruning.blocks.capture.capture` found, or some of it; w is their weight.
        hidden: (batch, seq, hidden) inputs of the first block, at each sample's ``number``.
        whole: Whether the whole model runs at once; by default that is so where its first block is on the device.

    Returns:
        For each pair of each block a (units left,) float64 tensor on the CPU, summed over the columns a unit feeds.

    Raises:
        FaspError: If an activation or a gradient is not finite; the message names the layer.
        RuntimeError: If another process raised an error.
    """
    if whole is None:
        here = device_of(pairs)
        whole = here == torch.empty(0, device=session.device).device  # "cuda" is that of some index
    work = _Passes(session, model, pairs, hidden)
    with session.processes.together(), evaluating(model), frozen(model):
        left = work.at_once(samples) if whole else samples
        if left:
            work.block_by_block(left)
        columns = iter(work.scores.columns(work.flat))
        scores = [[pair.layout.unit_scores(next(columns), pair.kept) for pair in block] for block in pairs]
    for block in scores:
        for score in block:
            session.processes.add(score)
    return scores


class _Passes:
    """Forward and backward passes over samples, in either way.

    Attributes:
        flat: The pairs of all blocks, in the order of the forward pass.
        scores: What has come out so far.
    """

    def __init__(
        self, session: Session, model: PreTrainedModel, pairs: list[list[ResolvedPair]], hidden: list[Stored]
    ) -> None:
        self.session = session
        self.store = session.store
        self.model = model
        self.pairs = pairs
        self.blocks = find_blocks(model, spec_for(model))
        self.hidden = hidden
        self.flat = [pair for block in pairs for pair in block]
        self.scores = ConsumerScores()

    def at_once(self, samples: list[Sample]) -> list[Sample]:
        """Run the whole model; returns the samples that are left once its activations have found no room."""
        for index, sample in enumerate(samples):
            try:
                self.scores.add(self._sample_at_once(sample))
            except torch.OutOfMemoryError:
                log.info("the activations of the whole model do not fit on the device: sensitivity block by block")
                return samples[index:]
            for block in reversed(range(len(self.pairs))):
                self.session.progress.count(block, "sensitivity")
        return []

    def _sample_at_once(self, sample: Sample) -> ConsumerScores:
        found = ConsumerScores()  # of its own: a sample whose backward pass runs out of memory must not count by half
        with requiring_gradients(self.model.get_input_embeddings()):
            for rows in _rows_at_once(sample):
                with found.recording(self.flat, sample.weight):
                    self._backward(sample, rows)
        return found

    def _backward(self, sample: Sample, rows: slice) -> None:
        """The model's own forward, and back from the loss to whatever requires gradients."""
        device = input_device(self.model)
        inputs = {name: value[rows].to(device) for name, value in sample.inputs.items()}
        with torch.enable_grad():
            output = self.model(**inputs, use_cache=False)
        logits: Tensor = output.logits  # a model spread over devices answers on its last one
        mask = None if sample.mask is None else sample.mask[rows].to(logits.device)
        targets = (sample.input_ids if sample.targets is None else sample.targets)[rows].to(logits.device)
        # The gradient of the loss is written out: autograd would keep a float32 softmax of all logits for it.
        logits.backward(next_token_nll_gradient(logits, targets, mask))

    def block_by_block(self, samples: list[Sample]) -> None:
        """Only one block, or the head, is on the device at a time; all hidden states are in the store."""
        inputs = [[self.hidden[sample.number]] for sample in samples]
        returned: Any = None
        for index, block in enumerate(self.blocks):
            present = [states[-1] for states in inputs]
            outputs, returned = through_block(self.session, block, index, samples, present)
            for states, output in zip(inputs, outputs, strict=True):
                states.append(output)
        slopes = self._head(samples, [states.pop() for states in inputs], returned)
        for index in reversed(range(len(self.pairs))):
            with self.session.weights.placed(self.blocks[index], self.session.device):
                for place, sample in enumerate(samples):
                    gradient = self._block(index, sample, inputs[place].pop(), slopes[place])
                    if index:  # the gradient of what comes before the blocks is not asked for
                        slopes[place] = self.store.put(gradient)
                    self.session.progress.count(index, "sensitivity")

    def _head(self, samples: list[Sample], outputs: list[Stored], returned: Any) -> list[Stored]:
        """∂L/∂h of the last block's outputs h."""
        slopes = []
        with tail_alone(self.session, self.model, returned) as tail:
            for sample, output in zip(samples, outputs, strict=True):
                hidden, gradient = self._leaf(output)
                for rows in _rows_at_once(sample):
                    with torch.enable_grad():
                        tail.hand_over(hidden[rows])
                    self._backward(sample, rows)
                self.store.drop(output)
                slopes.append(self.store.put(gradient))
        return slopes

    def _block(self, index: int, sample: Sample, stored: Stored, slopes: Stored) -> Tensor:
        """From ∂L/∂ of a block's output to that of its input; both are dropped."""
        hidden, gradient = self._leaf(stored)
        pairs = self.pairs[index]
        with self.scores.recording(pairs, sample.weight):
            with torch.enable_grad():
                output = first(call_block(self.blocks[index], sample.calls[index], hidden, self.store))
            output.backward(self.store.get(slopes))
        self.store.drop(slopes)
        if index:  # the first block's input serves the pruning too
            self.store.drop(stored)
        return gradient

    def _leaf(self, stored: Stored) -> tuple[Tensor, Tensor]:
        """Stored hidden states as a leaf of the graph, and the tensor in which backward passes sum up its gradient."""
        leaf = self.store.get(stored).detach().requires_grad_()
        leaf.grad = torch.zeros_like(leaf)
        return leaf, leaf.grad


def _rows_at_once(sample: Sample) -> Iterator[slice]:
    """A sample's sequences in slices of about ``PIECE_TOKENS`` tokens, at least one sequence each."""
    batch, length = sample.input_ids.shape
    step = max(1, PIECE_TOKENS // length)
    for start in range(0, batch, step):
        yield slice(start, start + step)
