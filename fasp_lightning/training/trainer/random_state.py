"""The random state of a process as tensors and lists, which checkpoints loaded with ``weights_only`` may hold."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasp_lightning.ops.devices import device_function
from fasp_lightning.pruning.processes import Processes


def random_state() -> dict[str, Any]:
    """The state of the global generators of torch (the accelerator's included), Python and numpy."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "accelerator": _accelerator_states(),
        "python": [version, list(words), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`. The accelerator's part is left out where its number of devices differs."""
    torch.set_rng_state(state["torch"].cpu())
    accelerator, states = torch.accelerator.current_accelerator(check_available=True), state["accelerator"]
    if accelerator is not None and len(states) == len(_accelerator_states()):
        if restore := device_function(accelerator, "set_rng_state_all"):
            restore([one.cpu() for one in states])
        elif restore := device_function(accelerator, "set_rng_state"):
            restore(*(one.cpu() for one in states))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def random_states(processes: Processes) -> list[dict[str, Any] | None]:
    """The random state of each process, by rank; ``None`` for those that are not asked.

    Args:
        processes: Those that call this together: all, or this one alone.
    """
    parts = processes.gather({Processes.everyone().rank: random_state()})
    found = {rank: state for part in parts for rank, state in part.items()}
    return [found.get(rank) for rank in range(max(found) + 1)]


def restore_own(states: Sequence[dict[str, Any] | None]) -> None:
    """Put back what :func:`random_states` has of this process, if anything."""
    rank = Processes.everyone().rank
    if rank < len(states) and (state := states[rank]) is not None:
        restore_random_state(state)


@contextmanager
def isolated_random_state() -> Iterator[None]:
    """Put the random state back afterwards, that of accelerators too which Lightning's ``isolate_rng`` passes over."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def _accelerator_states() -> list[Tensor]:
    """One state for each device; MPS, which is one device, has no ``get_rng_state_all``."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    if read := device_function(accelerator, "get_rng_state_all"):
        return list(read())
    return [read()] if (read := device_function(accelerator, "get_rng_state")) else []
