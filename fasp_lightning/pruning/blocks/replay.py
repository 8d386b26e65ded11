"""Replaying one block, so that each part of it is computed once a calibration batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning.blocks.samples import Sample
from fasp_lightning.pruning.blocks.standins import Fixed, Narrow, Recorder, Tap, first, form, stand_ins, with_first
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.pruning.progress import Stopwatch
from fasp_lightning.structure.pair import ResolvedPair


class BlockReplay:
    """Calls of one block on the calibration set.

    The forward of the block is spread over its pairs. ``record`` runs the block up to a consumer's input and stops
    there in effect: the consumer is a recorder, later pairs are skipped, and a finished attention output is replayed.
    ``finish`` applies the cut consumer to the inputs that were recorded; ``advance`` puts the parts together.

    Args:
        block: The decoder block, on the compute device.
        index: Its number.
        pairs: Its pairs, in the order of the forward pass.
        attention: Path of its attention module, if known.
        store: Where recorded tensors are kept.
        watch: Counts seconds by phase.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        pairs: list[ResolvedPair],
        attention: str | None,
        store: TensorStore,
        watch: Stopwatch,
    ) -> None:
        self.block = block
        self.index = index
        self.pairs = pairs
        self.attention = attention
        self.store = store
        self.watch = watch
        self._ffn: ResolvedPair | None = None  # recorded and cut; its output is the last part to be applied
        self._ffn_kept: Tensor | None = None

    def record(self, pair: ResolvedPair, sample: Sample, statistics: GramStatistics) -> None:
        """Run the block up to the input of ``pair``'s consumer, which goes to the statistics and to the store."""

        def sink(inputs: Tensor) -> None:
            with self.watch.phase("gram"):
                rows = inputs.reshape(-1, inputs.shape[-1])
                real = rows if sample.mask is None else rows[sample.mask.to(rows.device)]
                statistics.update(real, sample.weight)
            sample.inputs = self.store.put(inputs)

        outputs = pair.outputs
        consumer = self.block.get_submodule(pair.spec.consumer)
        replacements: dict[str, nn.Module] = {pair.spec.consumer: Recorder(consumer, outputs, sink)}
        tap = self._attention_stand_in(sample)
        if tap is not None:
            assert self.attention is not None
            if pair.spec.inside_attention:  # the recorder must stand inside the tapped original
                replacements |= self._skipped(pair)
            replacements[self.attention] = tap
        with self.watch.phase("forward"):
            self._run(sample, replacements)
        if isinstance(tap, Tap):
            output = first(tap.value)
            sample.form = form(tap.value)
            # zero almost everywhere: most attention modules add nothing to what their consumer returns
            empty = pair.spec.inside_attention and not output.any()
            sample.attention = None if empty else self.store.put(output)
            tap.value = None

    def _skipped(self, recorded: ResolvedPair) -> dict[str, nn.Module]:
        """Stand-ins that keep the pairs behind ``recorded`` from being computed."""
        found: dict[str, nn.Module] = {}
        for pair in self.pairs[self.pairs.index(recorded) + 1 :]:
            found |= self._idle(pair)
            outputs = pair.outputs
            consumer = self.block.get_submodule(pair.spec.consumer)
            found[pair.spec.consumer] = Recorder(consumer, outputs, lambda inputs: None)
        return found

    def _idle(self, pair: ResolvedPair) -> dict[str, nn.Module]:
        return {path: Narrow(self.block.get_submodule(path)) for path in pair.spec.producers}

    def _attention_stand_in(self, sample: Sample) -> Fixed | Tap | None:
        """Replays the attention's output if it is at hand, taps it otherwise; nothing if its path is not known."""
        if self.attention is None:
            return None
        original = self.block.get_submodule(self.attention)
        if sample.form is None and sample.attention is None:
            return Tap(original)
        fixed = Fixed(original)
        assert sample.attention is not None
        fixed.value = with_first(sample.form, self.store.get(sample.attention))
        return fixed

    def finish(self, pair: ResolvedPair, kept: Tensor, samples: list[Sample]) -> None:
        """After the cut: apply the consumer to what was recorded (an attention's now, an FFN's in ``advance``)."""
        if not pair.spec.inside_attention:
            self._ffn, self._ffn_kept = pair, kept
            return
        for sample in samples:
            with self.watch.phase("apply"):
                output = self._consume(pair, kept, sample)
                if sample.attention is not None:  # what the module itself adds, such as Bloom's residual
                    output = self.store.get(sample.attention) + output
                    self.store.drop(sample.attention)
                sample.attention = self.store.put(output)

    def _consume(self, pair: ResolvedPair, kept: Tensor, sample: Sample) -> Tensor:
        assert sample.inputs is not None
        inputs = self.store.get(sample.inputs).index_select(-1, kept)
        self.store.drop(sample.inputs)
        sample.inputs = None
        output: Tensor = pair.consumer(inputs)
        return output

    def advance(self, sample: Sample) -> None:
        """Output of the pruned block, from the finished parts; it becomes the next block's input."""
        replacements: dict[str, nn.Module] = {}
        if sample.attention is not None and self.attention is not None:
            stand_in = self._attention_stand_in(sample)
            assert stand_in is not None
            replacements[self.attention] = stand_in
        with self.watch.phase("apply"):
            if self._ffn is not None:
                assert self._ffn_kept is not None
                fixed = Fixed(self.block.get_submodule(self._ffn.spec.consumer))
                fixed.value = self._consume(self._ffn, self._ffn_kept, sample)
                replacements |= {**self._idle(self._ffn), self._ffn.spec.consumer: fixed}
            output = self._run(sample, replacements)
            for old in (sample.hidden, sample.attention):
                self.store.drop(old)
            sample.hidden = self.store.put(output)
        sample.attention = sample.form = None

    def _run(self, sample: Sample, replacements: dict[str, nn.Module]) -> Tensor:
        """One call of the block, with what the model called it with."""
        assert sample.hidden is not None
        hidden = self.store.get(sample.hidden)
        with stand_ins(self.block, replacements), torch.no_grad():
            return first(call_block(self.block, self.index, sample, hidden, self.store))


def call_block(block: nn.Module, index: int, sample: Sample, hidden: Tensor, store: TensorStore) -> Any:
    """What a block returns for hidden states, called with all else that the model called it with."""
    args, kwargs = store.load(sample.calls[index])
    if sample.named_hidden:
        return block(hidden_states=hidden, **kwargs)
    return block(hidden, *args, **kwargs)
