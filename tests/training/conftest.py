"""Fixtures of the Lightning part's tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def single_thread(seeded: None) -> None:
    """Tiny models are several times slower with two threads, which wait for each other at every product."""
    torch.set_num_threads(1)  # ``seeded`` puts the number back
