"""The random state of a process goes into a checkpoint and comes back."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fasp_lightning.training.trainer.random_state import random_state, restore_random_state


def draws() -> list[float]:
    """What each global generator gives next, numpy's and Python's cached second normal draw included."""
    python, numpy = [random.random(), random.gauss(0, 1)], [np.random.rand(), np.random.randn()]
    return [*python, *map(float, numpy), *torch.rand(2).tolist()]


@pytest.mark.parametrize("drawn", [0, 1, 2], ids=["fresh", "with a cached normal", "after two"])
def test_every_generator_goes_on_where_it_was(drawn: int, tmp_path: Path) -> None:
    for _ in range(drawn):
        draws()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draws()
    draws()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == expected


def test_state_of_other_devices_is_left_out() -> None:
    there = random_state()["accelerator"]
    state = random_state() | {"accelerator": [torch.zeros(16, dtype=torch.uint8)] * (len(there) + 1)}
    expected = draws()
    restore_random_state(state)
    assert draws() == expected
