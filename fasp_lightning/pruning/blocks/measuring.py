"""Perplexity block after block, for models that are not in memory as a whole."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fasp_lightning.pruning.blocks.capture import capture
from fasp_lightning.pruning.blocks.passes import tail_alone, through_block
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.inputs import ModelInputs, check_at_hand
from fasp_lightning.pruning.perplexity import Counted, PerplexityResult, batch_nll, require_unweighted
from fasp_lightning.structure.causal_lm import require_language_model
from fasp_lightning.structure.modes import evaluating, own_modes
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks
from fasp_lightning.text.batches import each_batch, read_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@own_modes()
def measure_by_block(session: Session, model: PreTrainedModel, batches: Iterable[Any]) -> PerplexityResult:
    """Measure a perplexity as :func:`~fasp_lightning.measure_perplexity` does, reading each block's weights once.

    Args:
        session: Where to compute, where hidden states are kept, and where the weights are.
        model: The causal LM.
        batches: As there.

    Raises:
        FaspError: As there.
    """
    require_language_model(model)
    batches = list(each_batch(batches))
    inputs, counted, started = ModelInputs(model), Counted(), time.perf_counter()
    check_at_hand(inputs, batches)
    for given in map(read_batch, batches):
        require_unweighted(given)
        counted.see(given)
    if not batches:
        return counted.result(started)  # refuses
    store = session.store
    with evaluating(model), store:
        samples, hidden = capture(model, batches, None, store)
        returned: Any = None
        for index, block in enumerate(find_blocks(model, spec_for(model))):
            outputs, returned = through_block(session, block, index, samples, hidden)
            for stored in hidden:
                store.drop(stored)
            hidden = outputs
        with tail_alone(session, model, returned) as tail:
            for given, sample, stored in zip(batches, samples, hidden, strict=True):
                tail.hand_over(store.get(stored))
                named = {name: value.to(inputs.device) for name, value in sample.inputs.items()}
                counted.add(*batch_nll(model, named, read_batch(given).targets))
    return counted.result(started)
