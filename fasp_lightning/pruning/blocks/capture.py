"""What the decoder blocks are called with on the calibration set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.blocks.samples import Call, Sample, Stored
from fasp_lightning.pruning.blocks.standins import BlockTap, stand_ins
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks
from fasp_lightning.text.batches import check_vocabulary, read_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def micro_batches(
    batches: Iterable[Any], size: int | None, vocabulary: int | None
) -> Iterator[tuple[dict[str, Tensor], float, str]]:
    """Batches in pieces of ``size`` sequences, checked.

    Args:
        batches: As :meth:`FASPPruner.prune` takes them.
        size: Sequences of a piece; ``None`` leaves the batches as they are.
        vocabulary: Number of embeddings; ``None`` checks no token id.

    Yields:
        What the model is called with, the weight of each token, and the source.
    """
    for given in batches:
        batch = read_batch(given)
        if vocabulary is not None:
            check_vocabulary(batch.input_ids, vocabulary)
        inputs = batch.inputs
        if batch.attention_mask is not None and bool(batch.attention_mask.bool().all()):
            del inputs["attention_mask"]  # so that the blocks are called as without padding
        step = size or len(batch.input_ids)
        for start in range(0, len(batch.input_ids), step):
            yield {name: value[start : start + step] for name, value in inputs.items()}, batch.weight, batch.source


def capture(
    model: PreTrainedModel, batches: Iterable[Any], micro_batch_size: int | None, store: TensorStore
) -> tuple[list[Sample], list[Stored]]:
    """Run everything around the blocks once a batch, and note what each block is called with.

    The model's own forward runs with a stand-in for every block, so that masks, rotary embeddings, position ids and
    per-layer variants are what this family makes of them. The language-model head is not run.

    Args:
        model: The causal LM.
        batches: Read once; see :func:`~fasp_lightning.text.batches.read_batch`.
        micro_batch_size: Sequences of a sample.
        store: Where hidden states are kept.

    Returns:
        The samples, and for each of them the (batch, seq, hidden) input of the first block.

    Raises:
        FaspError: If there is no batch, a token id lies outside the vocabulary, or a batch is refused.
    """
    samples: list[Sample] = []
    hidden: list[Stored] = []
    calls: list[Call] = []
    shape: list[Any] = []
    blocks = find_blocks(model, spec_for(model))

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            hidden.append(store.put(args[0] if args else kwargs["hidden_states"]))
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(Call(store.share(args[1:]), store.share(named), named_hidden=not args))

    replacements = {str(index): BlockTap(block, note, shape) for index, block in enumerate(blocks)}
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    with stand_ins(blocks, replacements):
        for inputs, weight, source in micro_batches(batches, micro_batch_size, len(embeddings.weight)):
            calls.clear()
            model.base_model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)
            on_cpu = {name: value.cpu() for name, value in inputs.items()}
            samples.append(Sample(len(samples), source, on_cpu, weight, tuple(calls)))
    if not samples:
        raise FaspError("batches must hold at least one calibration batch, got none")
    return samples, hidden
