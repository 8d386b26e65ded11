"""The bytes of a GGUF file, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Entry(NamedTuple):
    """One tensor of a GGUF file.

    Attributes:
        name: Its name there.
        shape: As torch has it, the row length last.
        kind: Its type, such as ``"F16"``; a type of blocks divides the row length.
        values: Makes its bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    values: Callable[[], np.ndarray[Any, Any]]

    @property
    def bytes(self) -> int:
        """Its size."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        rows = 1
        for length in self.shape[:-1]:
            rows *= length
        return rows * (self.shape[-1] // block) * size


def write(path: Path, architecture: str, fields: Callable[[Any], None], entries: Sequence[Entry]) -> None:
    """Write a GGUF file.

    Args:
        path: The file, which is overwritten.
        architecture: Its ``general.architecture``.
        fields: Adds the other keys to a ``gguf.GGUFWriter``.
        entries: Its tensors.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, architecture)
    try:
        fields(writer)
        for entry in entries:
            kind = gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.values())
    finally:
        writer.close()
