"""What makes a command start quickly."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection within this block of code, for what makes many objects and little garbage.

    To import torch and transformers makes a million objects that all stay; to look through them again and again takes
    a seventh of the time of ``fasp plan``.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
