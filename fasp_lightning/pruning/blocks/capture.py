"""What the decoder blocks are called with on the calibration set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.blocks.rehearsal import require_chain
from fasp_lightning.pruning.blocks.samples import Call, Sample, Stored
from fasp_lightning.pruning.blocks.standins import BlockTap, stand_ins
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks
from fasp_lightning.text.batches import CALIBRATION, TokenBatch, read_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def micro_batches(batches: Iterable[Any], size: int | None, most_tokens: int | None = None) -> Iterator[TokenBatch]:
    """Batches in pieces, each called as without padding where it has none.

    Args:
        batches: As :meth:`FASPPruner.prune` takes them.
        size: Sequences of a piece; ``None`` leaves the batches as they are.
        most_tokens: Of a piece, which is at least one sequence; by default any number.
    """
    for given in batches:
        batch = read_batch(given).unmasked()
        step = size or len(batch.input_ids)
        if most_tokens is not None:
            step = max(1, min(step, most_tokens // batch.input_ids.shape[1]))
        yield from batch.pieces(step)


def capture(
    model: PreTrainedModel,
    batches: Iterable[Any],
    micro_batch_size: int | None,
    store: TensorStore,
    most_tokens: int | None = None,
) -> tuple[list[Sample], list[Stored]]:
    """Run everything around the blocks once a batch, and note what each block is called with.

    The model's own forward runs with a stand-in for every block, so that masks, rotary embeddings, position ids and
    per-layer variants are what this family makes of them. The language-model head is not run.

    Args:
        model: The causal LM.
        batches: Read once; see :func:`~fasp_lightning.text.batches.read_batch`.
        micro_batch_size: Sequences of a sample.
        store: Where hidden states are kept.
        most_tokens: Tokens of a sample, which is at least one sequence; by default any number.

    Returns:
        The samples, and for each of them the (batch, seq, hidden) input of the first block.

    Raises:
        FaspError: If there is no batch, one is refused by :meth:`ModelInputs.check`, or the model does not call its
            blocks one after the other.
    """
    samples: list[Sample] = []
    hidden: list[Stored] = []
    calls: list[Call] = []
    shape: list[Any] = []
    spec = spec_for(model)
    blocks = find_blocks(model, spec)
    names, order = [f"{spec.layers}.{index}" for index in range(len(blocks))], list[int]()

    def note(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        order.append(index)
        if not calls:
            hidden.append(store.put(args[0] if args else kwargs["hidden_states"]))
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(Call(store.share(args[1:]), store.share(named), named_hidden=not args))

    replacements = {str(index): BlockTap(block, partial(note, index), shape) for index, block in enumerate(blocks)}
    inputs = ModelInputs(model)
    with stand_ins(blocks, replacements):
        for batch in micro_batches(batches, micro_batch_size, most_tokens):
            calls.clear()
            order.clear()
            named = inputs.checked(batch, CALIBRATION)
            model.base_model(**named, use_cache=False)
            require_chain(names, order)
            on_cpu = {name: value.cpu() for name, value in named.items()}
            targets = batch.targets.cpu()
            samples.append(Sample(len(samples), batch.source, on_cpu, batch.weight, tuple(calls), targets=targets))
    if not samples:
        raise FaspError("batches must hold at least one calibration batch, got none")
    return samples, hidden
