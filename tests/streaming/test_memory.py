"""Peak memory of a streamed pruning does not grow with the number of blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from large import FFN, HIDDEN, prune_within, write_model
from processes import run_forked


@pytest.mark.laws
def test_a_model_is_pruned_in_memory_in_which_it_does_not_fit(tmp_path: Path) -> None:
    whole, block = write_model(str(tmp_path / "dense"))
    states, grams = 3 * 768 * (HIDDEN + FFN) * 4, 72 * FFN**2
    room = 2 * block + states + grams + 100_000_000  # stacks of threads, and what allocators keep
    assert room < whole / 2
    measured = tmp_path / "measured"
    arguments = (str(tmp_path / "dense"), str(tmp_path / "pruned"), whole, str(measured))
    ((status, errors),) = run_forked(prune_within, tmp_path, arguments)
    assert status == 0, errors
    assert int(measured.read_text()) < room
