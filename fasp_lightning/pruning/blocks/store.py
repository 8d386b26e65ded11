"""Where the calibration set's tensors live between two uses."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasp_lightning.errors import FaspOSError, one_line

ALIKE = 8
"""Tensors of one shape with which a call's argument is compared: cos and sin, of local and of global layers."""


class TensorStore:
    """Keeps tensors on the CPU, on the accelerator, or on disk, and hands them back on the compute device.

    It is used inside a ``with`` block of itself, and is empty again when the block ends: what lay on disk, in the
    directory for temporary files (``TMPDIR``), is removed. One store serves several blocks, one after the other.

    Args:
        place: ``"cpu"``, ``"accelerator"`` or ``"disk"``.
        device: The compute device.
    """

    def __init__(self, place: str, device: torch.device) -> None:
        self.place = place
        self.device = device
        self._folder: Path | None = None
        self._files = 0
        self._shared: dict[tuple[Any, ...], list[Tensor]] = {}

    def __enter__(self) -> TensorStore:
        if self.place == "disk":
            self._folder = Path(tempfile.mkdtemp(prefix="fasp-"))
        return self

    def __exit__(self, *_: object) -> None:
        self._shared.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def put(self, tensor: Tensor) -> Tensor | Path:
        """Store a tensor; the result is what :meth:`get` and :meth:`drop` take.

        Raises:
            FaspOSError: If the disk takes no more.
        """
        if self._folder is not None:
            self._files += 1
            path = self._folder / f"{self._files}.pt"
            try:
                torch.save(tensor.contiguous().cpu(), path)
            except (OSError, RuntimeError) as error:  # torch's writer raises the latter
                raise FaspOSError(
                    f"offload='disk' must find room in {path.parent}, got {one_line(error)}; set TMPDIR to one of a "
                    "larger disk, or offload to 'cpu'"
                ) from error
            return path
        return tensor.to("cpu" if self.place == "cpu" else self.device)

    def get(self, stored: Tensor | Path) -> Tensor:
        """The tensor, on the compute device."""
        tensor = torch.load(stored, mmap=True, weights_only=True) if isinstance(stored, Path) else stored
        return tensor.to(self.device, non_blocking=True)

    def drop(self, stored: Tensor | Path) -> None:
        """Free what a file takes up; memory goes with the last reference."""
        if isinstance(stored, Path):
            stored.unlink(missing_ok=True)

    def share(self, value: Any) -> Any:
        """A call's argument for keeping: tensors equal to one kept before are kept once.

        Rotary embeddings and masks are the same for all blocks and for most batches. Containers are rebuilt.
        """
        if isinstance(value, Tensor):
            return self._share_tensor(value)
        if isinstance(value, dict):
            return {key: self.share(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.share(item) for item in value)
        return value

    def _share_tensor(self, tensor: Tensor) -> Tensor:
        kept = self._shared.setdefault((tuple(tensor.shape), tensor.dtype, tensor.device), [])
        if any(known is tensor for known in kept):  # most often: all layers of one batch are given the same one
            return tensor
        for known in kept:
            if torch.equal(known, tensor):
                return known
        kept.append(tensor)
        del kept[:-ALIKE]
        return tensor

    def load(self, value: Any) -> Any:
        """A kept argument with its tensors on the compute device."""
        if isinstance(value, Tensor):
            return value.to(self.device, non_blocking=True)
        if isinstance(value, dict):
            return {key: self.load(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.load(item) for item in value)
        return value
