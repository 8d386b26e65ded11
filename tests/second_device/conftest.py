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


@pytest.fixture(scope="session")
def second() -> torch.device:
    """``second:0``: host memory under another name, whose tensors must not meet those of the CPU."""
    if COMPILER is None:
        pytest.skip("needs Linux and a C++ compiler")
    return second_device()
