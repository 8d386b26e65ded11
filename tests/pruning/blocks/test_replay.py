"""Replaying a block computes each part of it once, whatever the family."""

from __future__ import annotations

from collections import Counter

import pytest
from tiny import TINY, tiny_model
from tiny_pruning import assert_same, basic, calibration, pruned
from torch import Tensor

from fasp_lightning import FASPPruner, spec_for
from fasp_lightning.structure.resolve import find_blocks


@pytest.mark.sampled
@pytest.mark.parametrize("attention", ["value_dims", "none"])
@pytest.mark.parametrize("family", TINY)
def test_every_projection_runs_once_a_calibration_batch(family: str, attention: str) -> None:
    model, calls = tiny_model(family), Counter()
    spec, batches = spec_for(model), calibration()
    blocks = find_blocks(model, spec)
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2:
                module.register_forward_pre_hook(lambda m, args, key=(index, name): calls.update([key]))
    FASPPruner(basic(0.2, attention=attention)).prune(model, batches)
    # one call more is the rehearsal, and one in block 0: the form of a block's output is learned by running it once
    runs = {key: count - 1 - (key[0] == 0) for key, count in calls.items()}
    assert len(runs) == len(blocks) * len({name for _, name in runs})
    assert runs == dict.fromkeys(runs, len(batches))


def test_batches_are_read_once() -> None:
    batches = iter(calibration())
    assert_same(pruned(batches=batches), pruned())
    assert next(batches, None) is None
