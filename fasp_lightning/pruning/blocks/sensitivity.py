"""Loss sensitivity of every unit: one backward pass with respect to the consumers' inputs.

The whole model runs at once where it is on the compute device and its activations fit there. Else it goes block by
block: forward, keeping every block's input; the head; and backward, computing each block anew from its input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasp_lightning.ops.likelihood import next_token_nll_gradient
from fasp_lightning.pruning.blocks.gradients import ConsumerScores
from fasp_lightning.pruning.blocks.replay import call_block
from fasp_lightning.pruning.blocks.samples import Sample, Stored
from fasp_lightning.pruning.blocks.standins import BlockTap, Fixed, first, form, stand_ins, with_first
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.structure.modes import evaluating, frozen, placed, requiring_gradients
from fasp_lightning.structure.pair import ResolvedPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PIECE_TOKENS = 2048
"""Tokens that go through the head, or the whole model, at once; a longer sequence goes alone."""


def fisher_scores(
    model: PreTrainedModel,
    pairs: list[list[ResolvedPair]],
    samples: list[Sample],
    store: TensorStore,
    *,
    processes: Processes | None = None,
    tick: Callable[[int], None] | None = None,
    whole: bool | None = None,
) -> list[list[Tensor]]:
    """Σ w (x · ∂L/∂x)² of every unit: x the consumer's input in the model as it is, L the summed next-token NLL.

    Padding is neither predicted nor scored. The model runs in evaluation mode; its modes, its parameters, their
    gradients and ``requires_grad`` are as before afterwards, also after an error. The samples stay as they are.

    Args:
        model: The causal LM, pruned before or not.
        pairs: Its pairs, one list a block.
        samples: What :func:`~fasp_lightning.pruning.blocks.capture.capture` found, or some of it; w is their weight.
        store: Where tensors are kept, and on which device to compute.
        processes: Those that call this together, each with samples of its own; the sums are over all of them. By
            default this process alone.
        tick: Called with the index of a block: once for each block and sample.
        whole: Whether the whole model runs at once; by default that is so where its first block is on the device.

    Returns:
        For each pair of each block a (units left,) float64 tensor on the CPU, summed over the columns a unit feeds.

    Raises:
        FaspError: If an activation or a gradient is not finite; the message names the layer.
        RuntimeError: If another process raised an error.
    """
    processes = processes or Processes()
    if whole is None:
        whole = next(pairs[0][0].block.parameters()).device == torch.empty(0, device=store.device).device
    work = _Passes(model, pairs, store, tick or (lambda block: None))
    with processes.together(), evaluating(model), frozen(model):
        left = work.at_once(samples) if whole else samples
        if left:
            work.block_by_block(left)
        columns = iter(work.scores.columns(work.flat))
        scores = [[pair.layout.unit_scores(next(columns), pair.kept) for pair in block] for block in pairs]
    for block in scores:
        for score in block:
            processes.add(score)
    return scores


class _Passes:
    """Forward and backward passes over samples, in either way.

    Attributes:
        flat: The pairs of all blocks, in the order of the forward pass.
        scores: What has come out so far.
    """

    def __init__(
        self, model: PreTrainedModel, pairs: list[list[ResolvedPair]], store: TensorStore, tick: Callable[[int], None]
    ) -> None:
        self.model = model
        self.pairs = pairs
        self.flat = [pair for block in pairs for pair in block]
        self.store = store
        self.scores = ConsumerScores()
        self._tick = tick

    def at_once(self, samples: list[Sample]) -> list[Sample]:
        """Run the whole model; returns the samples that are left once its activations have found no room."""
        for index, sample in enumerate(samples):
            try:
                self.scores.add(self._sample_at_once(sample))
            except torch.OutOfMemoryError:
                log.info("the activations of the whole model do not fit on the device: sensitivity block by block")
                return samples[index:]
            for block in reversed(range(len(self.pairs))):
                self._tick(block)
        return []

    def _sample_at_once(self, sample: Sample) -> ConsumerScores:
        found = ConsumerScores()  # of its own, so that a sample counts as a whole or not at all
        with requiring_gradients(self.model.get_input_embeddings()):
            for _, input_ids, mask in _pieces(sample):
                with found.recording(self.flat, sample.weight):
                    self._backward(input_ids, mask)
        return found

    def _backward(self, input_ids: Tensor, mask: Tensor | None) -> None:
        """The model's own forward, and back from the loss to whatever requires gradients."""
        embeddings: Any = self.model.get_input_embeddings()
        device = embeddings.weight.device
        attention_mask = None if mask is None else mask.long().to(device)
        with torch.enable_grad():
            output = self.model(input_ids=input_ids.to(device), attention_mask=attention_mask, use_cache=False)
        logits: Tensor = output.logits  # a model spread over devices answers on its last one
        real = None if mask is None else mask.to(logits.device)
        logits.backward(next_token_nll_gradient(logits, input_ids.to(logits.device), real))

    def block_by_block(self, samples: list[Sample]) -> None:
        """Only one block, or the head, is on the device at a time; all hidden states are in the store."""
        inputs: list[list[Stored]] = [[sample.hidden] for sample in samples if sample.hidden is not None]
        returned: Any = None
        for index, (pair, *_) in enumerate(self.pairs):
            with placed(pair.block, self.store.device):
                for sample, states in zip(samples, inputs, strict=True):
                    hidden = self.store.get(states[-1])
                    output = call_block(pair.block, index, sample, hidden, self.store)
                    returned = form(output)
                    states.append(self.store.put(first(output)))
        slopes = self._head(samples, [states.pop() for states in inputs], returned)
        for index in reversed(range(len(self.pairs))):
            with placed(self.pairs[index][0].block, self.store.device):
                for number, sample in enumerate(samples):
                    gradient = self._block(index, sample, inputs[number].pop(), slopes[number])
                    if index:  # what is before the blocks is not asked for
                        slopes[number] = self.store.put(gradient)
                    self._tick(index)

    def _head(self, samples: list[Sample], outputs: list[Stored], returned: Any) -> list[Stored]:
        """∂L/∂h of the last block's outputs h: the model's own forward, which is handed them by a stand-in."""
        path = self.flat[0].name.rpartition(".")[0]
        blocks = self.model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        last = Fixed(blocks[-1])
        through = {str(i): BlockTap(block, lambda args, kwargs: None, [returned]) for i, block in enumerate(blocks)}
        slopes = []
        # with every block replaced, what is left of the model is all that moves
        with stand_ins(blocks, {**through, str(len(blocks) - 1): last}), placed(self.model, self.store.device):
            for sample, output in zip(samples, outputs, strict=True):
                hidden = self.store.get(output).detach().requires_grad_()
                for rows, input_ids, mask in _pieces(sample):
                    with torch.enable_grad():
                        last.value = with_first(returned, hidden[rows])
                    self._backward(input_ids, mask)
                self.store.drop(output)
                slopes.append(self.store.put(_gradient(hidden)))
        return slopes

    def _block(self, index: int, sample: Sample, stored: Stored, slopes: Stored) -> Tensor:
        """From ∂L/∂ of a block's output to that of its input; both are dropped."""
        hidden = self.store.get(stored).detach().requires_grad_()
        pairs = self.pairs[index]
        with self.scores.recording(pairs, sample.weight):
            with torch.enable_grad():
                output = first(call_block(pairs[0].block, index, sample, hidden, self.store))
            output.backward(self.store.get(slopes))
        self.store.drop(slopes)
        if index:  # the first block's input is the sample's
            self.store.drop(stored)
        return _gradient(hidden)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _pieces(sample: Sample) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """A sample's sequences, some at a time: which they are, and their (rows, seq) token ids and mask."""
    batch, length = sample.input_ids.shape
    mask = None if sample.mask is None else sample.mask.reshape(batch, length)
    step = max(1, PIECE_TOKENS // length)
    for start in range(0, batch, step):
        rows = slice(start, start + step)
        yield rows, sample.input_ids[rows], None if mask is None else mask[rows]
