"""What the decoder blocks are called with on the calibration set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.blocks.samples import Sample
from fasp_lightning.pruning.blocks.standins import BlockTap, stand_ins
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.structure.spec import ArchitectureSpec
from fasp_lightning.text.batches import as_inputs, check_vocabulary, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def micro_batches(
    batches: Iterable[Any], size: int | None, vocabulary: int | None
) -> Iterator[tuple[Tensor, Tensor | None, float]]:
    """Batches in pieces of ``size`` sequences, checked: (input_ids, attention_mask or ``None``, weight)."""
    for batch in batches:
        input_ids, mask = as_inputs(batch)
        weight = weight_of(batch)
        if vocabulary is not None:
            check_vocabulary(input_ids, vocabulary)
        if mask is not None and bool(mask.bool().all()):
            mask = None
        step = size or input_ids.shape[0]
        for start in range(0, input_ids.shape[0], step):
            piece = slice(start, start + step)
            yield input_ids[piece], None if mask is None else mask[piece], weight


def capture(
    model: PreTrainedModel,
    spec: ArchitectureSpec,
    batches: Iterable[Any],
    micro_batch_size: int | None,
    store: TensorStore,
) -> list[Sample]:
    """Run everything around the blocks once a batch, and note what each block is called with.

    The model's own forward runs with a stand-in for every block, so that masks, rotary embeddings, position ids and
    per-layer variants are what this family makes of them. The language-model head is not run.

    Args:
        model: The causal LM.
        spec: Its row.
        batches: Read once; a mapping's ``weight`` says how much each of its tokens counts.
        micro_batch_size: Sequences in a piece.
        store: Where hidden states are kept.

    Raises:
        FaspError: If there is no batch, a token id lies outside the vocabulary, or a weight is not positive.
    """
    samples: list[Sample] = []
    shape: list[Any] = []
    blocks = model.get_submodule(spec.layers)
    assert isinstance(blocks, nn.ModuleList)

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = samples[-1]
        if not sample.calls:
            sample.named_hidden = not args
            sample.hidden = store.put(kwargs["hidden_states"] if sample.named_hidden else args[0])
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        sample.calls.append((store.share(args[1:]), store.share(named)))

    replacements = {str(index): BlockTap(block, note, shape) for index, block in enumerate(blocks)}
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    with stand_ins(blocks, replacements):
        for input_ids, mask, weight in micro_batches(batches, micro_batch_size, embeddings.num_embeddings):
            real = None if mask is None else mask.bool().reshape(-1)
            tokens = input_ids.numel() if real is None else int(real.sum())
            samples.append(Sample(tokens, real, input_ids.cpu(), weight))
            on_device = None if mask is None else mask.to(device)
            model.base_model(input_ids=input_ids.to(device), attention_mask=on_device, use_cache=False)
    if not samples:
        raise FaspError("batches must hold at least one calibration batch, got none")
    return samples
