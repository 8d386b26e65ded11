"""The second device of these tests; they are skipped where no compiler is."""

from __future__ import annotations

import pytest
import torch
from backend import COMPILER, second_device


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the device."""
    for item in items:
        if "second" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.second_device)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Register the device before the first test: the first backward pass of a process counts its devices, for good.

    (``Engine::start_device_threads`` in torch/csrc/autograd/engine.cpp.)
    """
    if COMPILER is not None and any(item.get_closest_marker("second_device") for item in session.items):
        second_device()


@pytest.fixture(scope="session")
def second() -> torch.device:
    """``second:0``: host memory under another name, whose tensors must not meet those of the CPU."""
    if COMPILER is None:
        pytest.skip("needs Linux and a C++ compiler")
    return second_device()
