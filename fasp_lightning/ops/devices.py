"""What a device can do: its module is asked for the function, so that no device's name decides."""

from __future__ import annotations

import functools
from typing import Any

import torch


def device_function(device: torch.device, *names: str) -> Any:
    """The first of these functions that the device's module has, such as ``torch.cuda.mem_get_info``.

    Args:
        device: Any device, ``cpu`` and ``meta`` included.
        names: Names, the best first.

    Returns:
        The function; ``None`` if it has none of them.
    """
    module = getattr(torch, device.type, None)  # as torch.get_device_module, which refuses devices without one
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def synchronize(device: torch.device) -> None:
    """Wait for the work that is queued on an accelerator."""
    if (accelerator := torch.accelerator.current_accelerator()) and accelerator.type == device.type:
        torch.accelerator.synchronize(device)


@functools.cache
def sums_halves(kind: str, dtype: torch.dtype) -> bool:
    """Whether matrix products of 16-bit operands give float32 sums on such a device, without a float32 copy.

    Args:
        kind: Type of the device. On a CPU the copy is faster.
        dtype: Of the operands.
    """
    one = torch.ones(1, 1, dtype=dtype, device=kind)
    try:
        return kind != "cpu" and torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, NotImplementedError):
        return False
