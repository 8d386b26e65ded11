"""On which device, and in which dtype, a model is loaded; and where a part of it computes."""

from __future__ import annotations

import functools
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.devices import device_function

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}
HALVES = (torch.bfloat16, torch.float16)

PROBE_SHAPE = (128, 512, 512)
"""67 MFLOP: 0.4 ms in fp32 on two AVX2 cores, and still under a second where bf16 is emulated."""


def choose_device(requested: str | torch.device = "auto") -> torch.device:
    """The device to compute on.

    Args:
        requested: ``"auto"`` (CUDA where there is one, else the CPU), or any torch device name.

    Raises:
        FaspError: If torch does not know the name, the machine lacks the device, or it holds no values (``meta``).
    """
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise FaspError(
            f"device must be 'auto' or a torch device such as 'cpu' or 'cuda:0', got {requested!r}"
        ) from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FaspError(f"device {requested!r} is not usable on this machine; use 'auto' or 'cpu'") from error
    return device


def home(device: torch.device, needed: int) -> tuple[torch.device, str | None]:
    """Where a whole model is kept while it is worked on, block by block, on a device.

    Args:
        device: Where its blocks compute.
        needed: Bytes that the model and the work on it take there.

    Returns:
        The device, and ``None``; or the CPU, if the device says that it lacks that room, and the reason.
    """
    memory = device_function(device, "mem_get_info")
    if memory is None:
        return device, None
    free = memory(device)[0]
    if needed <= free:
        return device, None
    return torch.device("cpu"), f"{device} has {free / 2**30:,.2f} GiB free of the {needed / 2**30:,.2f} GiB needed"


def free_memory() -> int | None:
    """Bytes of host memory that a process can still take, within its control group; ``None`` where nothing says so."""
    found, group = [], Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        found.append(1024 * _entry(Path("/proc/meminfo"), "MemAvailable:"))
    with suppress(OSError, ValueError):  # "max" is no number, and no limit
        used = int((group / "memory.current").read_text()) - _entry(group / "memory.stat", "inactive_file")
        found.append(int((group / "memory.max").read_text()) - used)
    return min(found, default=None)


def _entry(file: Path, name: str) -> int:
    """The number on a line that begins with a name."""
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(line[1]) for line in lines if line[0] == name), 0)


def parse_dtype(requested: str | torch.dtype, name: str = "dtype") -> torch.dtype:
    """The dtype a name such as ``"bf16"`` or ``"float32"`` stands for.

    Args:
        requested: A dtype, or its name.
        name: The argument it was given as, for the message.

    Raises:
        FaspError: If the name is unknown.
    """
    if isinstance(requested, torch.dtype):
        return requested
    if requested not in DTYPES:
        raise FaspError(f"{name} must be 'auto' or one of {', '.join(DTYPES)}, got {requested!r}")
    return DTYPES[requested]


def require_dtype(requested: str | torch.dtype, name: str = "dtype") -> None:
    """Refuse what is neither a dtype, nor the name of one, nor ``"auto"``.

    Args:
        requested: What was given.
        name: The argument it was given as, for the message.

    Raises:
        FaspError: If it is none of these.
    """
    if requested != "auto":
        parse_dtype(requested, name)


def choose_dtype(
    requested: str | torch.dtype, checkpoint_dtype: torch.dtype | None, device: torch.device
) -> torch.dtype:
    """The dtype to load a model in.

    ``"auto"`` takes the checkpoint's dtype on an accelerator. On a CPU it takes bf16 or fp16 only where a probe
    shows that this is faster than fp32: without hardware for it, half precision is hundreds of times slower.

    Args:
        requested: ``"auto"`` or a dtype.
        checkpoint_dtype: Dtype of the stored weights; ``None`` if they have none of their own (GGUF), which
            reads as bf16 on an accelerator and fp32 on a CPU.
        device: Where the model will compute.

    Raises:
        FaspError: If ``requested`` is no known dtype.
    """
    if requested != "auto":
        return parse_dtype(requested)
    if device.type != "cpu":
        return checkpoint_dtype or torch.bfloat16
    if checkpoint_dtype not in HALVES:
        return checkpoint_dtype or torch.float32
    if faster_than_fp32(checkpoint_dtype):
        return checkpoint_dtype
    log.info("dtype auto: fp32 instead of %s, which this CPU computes more slowly", checkpoint_dtype)
    return torch.float32


def dtype_in(config: Any) -> torch.dtype | None:
    """The dtype that a config says its checkpoint has, if it says so."""
    stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return getattr(torch, stored, None) if isinstance(stored, str) else stored


def choose_stored(
    requested: str | torch.dtype, checkpoint_dtype: torch.dtype | None, computed: torch.dtype
) -> torch.dtype:
    """The dtype to store a model's weights in.

    ``"auto"`` is that of the checkpoint that they came from: that a device computes in fp32 shall not make the file
    larger. A model that was asked for in a narrower dtype is stored in that one.

    Args:
        requested: ``"auto"`` or a dtype.
        checkpoint_dtype: Dtype of the checkpoint; ``None`` if it is not known.
        computed: Dtype of the weights in memory.

    Raises:
        FaspError: If ``requested`` is no known dtype.
    """
    if requested != "auto":
        return parse_dtype(requested)
    if checkpoint_dtype is None or checkpoint_dtype.itemsize > computed.itemsize:
        return computed
    return checkpoint_dtype


@functools.cache
def faster_than_fp32(dtype: torch.dtype) -> bool:
    """Whether a small CPU matmul takes less time in ``dtype`` than in fp32, best of 3 each."""
    return _matmul_seconds(dtype) < _matmul_seconds(torch.float32)


def _matmul_seconds(dtype: torch.dtype) -> float:
    tokens, width, out = PROBE_SHAPE
    x, weight = torch.ones(tokens, width, dtype=dtype), torch.ones(out, width, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return best
