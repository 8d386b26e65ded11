"""Replaying one block, so that each part of it is computed once a calibration sample.

A block is a chain of parts: the attention up to its consumer, that consumer, the FFN up to its consumer, that consumer.
Pruning needs the inputs of each consumer twice: for its statistics before it is cut, and to apply it afterwards. To run
the whole block for each would compute the attention three times. Instead the parts that are finished are replayed by
stand-ins, and the parts that are not wanted yet are skipped; see :mod:`fasp_lightning.pruning.blocks.standins`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasp_lightning.ops.basis import turned
from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning.blocks.rehearsal import require_one_call
from fasp_lightning.pruning.blocks.samples import Call, Sample, Stored
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.blocks.standins import (
    Fixed,
    Narrow,
    Recorder,
    Tap,
    Unrouted,
    first,
    skeleton,
    stand_ins,
    with_first,
)
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.structure.experts.resolved import ResolvedExperts
from fasp_lightning.structure.pair import ResolvedPair


class _Attended(NamedTuple):
    """What the attention module returns on one sample.

    Attributes:
        skeleton: Of the output: whether it is a tensor or a tuple.
        hidden: The hidden states in it.
    """

    skeleton: Any
    hidden: Stored


class _Own(NamedTuple):
    """What the attention module returns on one sample if nothing comes from its consumer.

    Attributes:
        skeleton: Of the output.
        hidden: The hidden states in it, such as Bloom's residual; ``None`` where they are zero, as for most families.
    """

    skeleton: Any
    hidden: Stored | None


class Routed(NamedTuple):
    """What the experts of a block are called with on one sample.

    Attributes:
        hidden: (tokens, hidden) what they read.
        chosen: (tokens, k) int64 numbers of the experts that each token is sent to.
        weights: (tokens, k) the router's weight of each.
    """

    hidden: Stored
    chosen: Stored
    weights: Stored


class _Recorded(NamedTuple):
    """A pair that is cut, whose consumer is still to be applied.

    Attributes:
        pair: The pair.
        kept: (m,) which of the recorded columns are left.
        inputs: (…, columns) inputs of the consumer, one a sample.
        blocks: What has turned the columns since they were recorded; none if nothing has.
    """

    pair: ResolvedPair
    kept: Tensor
    inputs: list[Stored]
    blocks: Sequence[Tensor]


class BlockReplay:
    """Calls of one block on the calibration set.

    For each pair in turn, ``record`` is called on every sample and ``finish`` once, after the cut; at last ``advance``
    on every sample.

    Args:
        session: Where to compute, and where tensors are kept.
        index: Number of the block.
        block: The block, which is on the compute device.
        pairs: Its pairs, in the order of the forward pass.
        attention: Path of its attention module, if known.
        samples: The calibration set.
        hidden: (batch, seq, hidden) inputs of the block, one a sample; :meth:`advance` puts its outputs in their place.
    """

    def __init__(
        self,
        session: Session,
        index: int,
        block: nn.Module,
        pairs: list[ResolvedPair],
        attention: str | None,
        samples: list[Sample],
        hidden: list[Stored],
    ) -> None:
        self.session = session
        self.index = index
        self.block = block
        self.pairs = pairs
        self.samples = samples
        self.hidden = hidden
        self._attention_path = attention
        self._own: dict[int, _Own] = {}  # by sample, between ``record`` and ``finish`` of a pair of the attention
        self._attention: dict[int, _Attended] = {}  # by sample, once the attention is finished
        self._ffns: list[_Recorded] = []  # their outputs are the last part of the block, so ``advance`` applies them

    def record(self, pair: ResolvedPair, number: int, statistics: GramStatistics) -> Stored:
        """Run the block on one sample up to the input of a pair's consumer.

        Args:
            pair: The pair.
            number: The sample's number.
            statistics: Takes in the rows of the input that are real tokens.

        Returns:
            The input, for :meth:`finish`.

        Raises:
            FaspError: If the block does not call the consumer exactly once.
        """
        sample, recorded = self.samples[number], []

        def sink(inputs: Tensor) -> None:
            with self.session.clock.phase("gram"):
                rows, mask = inputs.reshape(-1, inputs.shape[-1]), sample.mask
                real = rows if mask is None else rows[mask.reshape(-1).to(rows.device)]
                statistics.update(real, sample.weight)
            recorded.append(self.session.store.put(inputs))

        self._run_up_to(pair, number, {pair.spec.consumer: self._recorder(pair, sink)})
        require_one_call(pair.layer, len(recorded))
        return recorded[0]

    def route(self, pair: ResolvedExperts, number: int) -> Routed:
        """Run the block on one sample up to its experts.

        Args:
            pair: The experts.
            number: The sample's number.

        Returns:
            What they are called with, padding left out.

        Raises:
            FaspError: If the block does not call them exactly once.
        """
        mask, recorded = self.samples[number].mask, list[Routed]()

        def sink(*inputs: Tensor) -> None:
            rows = inputs if mask is None else [each[mask.reshape(-1).to(each.device)] for each in inputs]
            recorded.append(Routed(*map(self.session.store.put, rows)))

        self._run_up_to(pair, number, {pair.path: Unrouted(pair.module, sink)})
        require_one_call(pair.layer, len(recorded))
        return recorded[0]

    def _run_up_to(self, pair: ResolvedPair, number: int, replacements: dict[str, nn.Module]) -> None:
        """Run the block with stand-ins for a pair, the attention in as short a way as is possible."""
        if not pair.spec.inside_attention:  # FFNs that stand side by side do not read from each other
            replacements = {**replacements, **self._skipped(other for other in self.pairs if other is not pair)}
        if self._attention_path is None:
            self._run(number, replacements, "forward")
        elif number in self._attention:
            self._run(number, {**replacements, **self._finished_attention(number)}, "forward")
        else:
            self._run_tapped(pair, number, replacements)

    def _run_tapped(self, pair: ResolvedPair, number: int, replacements: dict[str, nn.Module]) -> None:
        """Run the block and keep what its attention module returns: all of it, or what is not its consumer's."""
        path = str(self._attention_path)
        tap = Tap(self.block.get_submodule(path))
        if pair.spec.inside_attention:
            # The recorder stands inside the original that the tap runs, so it is put in first. What comes behind the
            # attention is not wanted in this call.
            behind = self.pairs[self.pairs.index(pair) + 1 :]
            self._run(number, {**replacements, **self._skipped(behind), path: tap}, "forward")
        else:
            self._run(number, {**replacements, path: tap}, "forward")
        output = first(tap.value)
        if not pair.spec.inside_attention:
            self._attention[number] = _Attended(skeleton(tap.value), self.session.store.put(output))
            return
        # the consumer returned zeros: what is not zero is the module's own
        kept = self.session.store.put(output) if output.any() else None
        self._own[number] = _Own(skeleton(tap.value), kept)

    def _recorder(self, pair: ResolvedPair, sink: Any) -> Recorder:
        return Recorder(self.block.get_submodule(pair.spec.consumer), pair.outputs, sink)

    def _skipped(self, pairs: Iterable[ResolvedPair]) -> dict[str, nn.Module]:
        """Stand-ins that keep pairs behind the attention from being computed."""
        found: dict[str, nn.Module] = {}
        for pair in pairs:
            if isinstance(pair, ResolvedExperts):
                found[pair.path] = Unrouted(pair.module)
            elif not pair.spec.inside_attention:
                found |= self._idle_producers(pair)
                found[pair.spec.consumer] = self._recorder(pair, lambda inputs: None)
        return found

    def _idle_producers(self, pair: ResolvedPair) -> dict[str, nn.Module]:
        return {path: Narrow(self.block.get_submodule(path)) for path in pair.spec.producers}

    def _finished_attention(self, number: int) -> dict[str, nn.Module]:
        """A stand-in that returns the attention's finished output; none before the attention is finished."""
        if number not in self._attention:
            return {}
        path, output = str(self._attention_path), self._attention[number]
        fixed = Fixed(self.block.get_submodule(path))
        fixed.value = with_first(output.skeleton, self.session.store.get(output.hidden))
        return {path: fixed}

    def finish(self, pair: ResolvedPair, kept: Tensor, inputs: list[Stored], blocks: Sequence[Tensor] = ()) -> None:
        """After the cut: apply the consumer to what was recorded (an attention's now, an FFN's in :meth:`advance`).

        Args:
            pair: The pair.
            kept: (m,) which of the recorded columns are left.
            inputs: What :meth:`record` returned, one a sample.
            blocks: What has turned the columns since.
        """
        recorded = _Recorded(pair, kept, inputs, blocks)
        if not pair.spec.inside_attention:
            self._ffns.append(recorded)
            return
        store = self.session.store
        for number in range(len(self.samples)):
            with self.session.clock.phase("apply"):
                output = self._consume(recorded, number)
                own = self._own.pop(number)
                if own.hidden is not None:
                    output = store.get(own.hidden) + output
                    store.drop(own.hidden)
                self._attention[number] = _Attended(own.skeleton, store.put(output))

    def _consume(self, recorded: _Recorded, number: int) -> Tensor:
        """Output of a cut consumer on its recorded inputs, which are dropped: they are the largest thing in memory."""
        store, stored = self.session.store, recorded.inputs[number]
        inputs = store.get(stored)
        if recorded.blocks:
            inputs = turned(inputs, recorded.blocks, -1)
        inputs = inputs.index_select(-1, recorded.kept)
        store.drop(stored)
        recorded.inputs[number] = torch.empty(0)  # the last reference of a tensor in memory
        output: Tensor = recorded.pair.consumer(inputs)
        return output

    def advance(self, number: int) -> None:
        """Put the finished parts together: the output of the pruned block takes the place of its input."""
        replacements = self._finished_attention(number)
        with self.session.clock.phase("apply"):
            for recorded in self._ffns:
                consumer = recorded.pair.spec.consumer
                fixed = Fixed(self.block.get_submodule(consumer))
                fixed.value = self._consume(recorded, number)
                replacements |= {**self._idle_producers(recorded.pair), consumer: fixed}
            output = self._run(number, replacements, "apply")
            if number in self._attention:
                self.session.store.drop(self._attention.pop(number).hidden)
            self.session.store.drop(self.hidden[number])
            self.hidden[number] = self.session.store.put(output)

    def _run(self, number: int, replacements: dict[str, nn.Module], phase: str) -> Tensor:
        """One call of the block, with what the model called it with."""
        store = self.session.store
        hidden, call = store.get(self.hidden[number]), self.samples[number].calls[self.index]
        with self.session.clock.phase(phase), stand_ins(self.block, replacements), torch.no_grad():
            return first(call_block(self.block, call, hidden, store))


def call_block(block: nn.Module, call: Call, hidden: Tensor, store: TensorStore) -> Any:
    """What a block returns for hidden states, called with all else that the model called it with."""
    args, kwargs = store.load(call.args), store.load(call.kwargs)
    if call.named_hidden:
        return block(hidden_states=hidden, **kwargs)
    return block(hidden, *args, **kwargs)
