"""Which tensor of a GGUF file has which type, and its bytes in it; 4 bits by the routines in ``xllamacpp``."""

from __future__ import annotations

import ctypes
import re
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasp_lightning.checkpoints.exporting.gguf.llama_cpp import PACKAGE, require_installed
from fasp_lightning.checkpoints.exporting.gguf.writing import Entry, write
from fasp_lightning.errors import FaspError
from fasp_lightning.staging import staged_file

if TYPE_CHECKING:
    import numpy as np

KINDS = {"Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_K_M": "Q4_K"}
"""Kind of a quantised file → type of most of its tensors."""

FOUR_BITS = ("Q4_0", "Q4_K_M")
"""Kinds whose embeddings or head, as what counts most, have more bits."""

PLAIN = ("F32", "F16", "BF16", "Q8_0")
"""Types that ``gguf`` makes itself."""

NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What takes rows that do not divide by the 256 of a K-quant."""


def quantized(file: str | Path, out: str | Path, kind: str) -> Path:
    """Write a quantised copy of an f32, f16 or bf16 GGUF file, without an importance matrix.

    Args:
        file: The file.
        out: Where to.
        kind: ``"Q8_0"``, ``"Q4_0"`` or ``"Q4_K_M"``.

    Returns:
        ``out``.

    Raises:
        FaspError: If ``kind`` is another one, or ``xllamacpp`` is not there.
    """
    import gguf

    if kind not in KINDS:
        raise FaspError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    require_installed()
    reader, out = gguf.GGUFReader(file), Path(out)
    architecture = reader.fields["general.architecture"].contents()
    blocks = reader.fields[f"{architecture}.block_count"].contents()
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    entries = [_entry(tensor, type_of(tensor.name, tensor.shape, kind, blocks, tied)) for tensor in reader.tensors]
    with staged_file(out) as new:
        write(new, architecture, partial(_copy_fields, reader, kind), entries)
    return out


def type_of(name: str, shape: Any, kind: str, blocks: int, tied: bool) -> str:
    """Type of a tensor in a quantised file, as llama_tensor_get_type (llama.cpp, src/llama-quant.cpp) chooses it.

    Args:
        name: Its name.
        shape: As GGUF has it, the row length first.
        kind: Of the file; the type itself of one that is not quantised.
        blocks: Decoder blocks of the model.
        tied: Whether the embeddings are the head.
    """
    if len(shape) < 2 or not name.endswith(".weight") or name == "position_embd.weight":
        return "F32"
    if kind not in KINDS:
        return kind
    found, row = KINDS[kind], int(shape[0])
    if kind in FOUR_BITS and name == ("token_embd.weight" if tied else "output.weight"):
        found = "Q6_K"
    elif kind == "Q4_K_M" and "attn_qkv" in name:
        found = "Q5_K"
    elif kind == "Q4_K_M" and re.search(r"\.(attn_v|ffn_down)\.", name) and _more_bits(name, blocks):
        found = "Q6_K"
    if row % 256:
        found = NARROWER.get(found, found)
    return "F16" if row % 32 else found


def _more_bits(name: str, blocks: int) -> bool:
    """Whether Q4_K_M gives a block more bits: the first and last eighth of them, and every third between."""
    block = int(name.split(".")[1])
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def _entry(tensor: Any, kind: str) -> Entry:
    shape = tuple(int(length) for length in reversed(tensor.shape))
    kind = tensor.tensor_type.name if kind == "F16" and tensor.tensor_type.name == "BF16" else kind
    return Entry(tensor.name, shape, kind, partial(_values, tensor, kind))


def _values(tensor: Any, kind: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in another type."""
    import gguf
    import numpy as np

    if tensor.tensor_type.name == kind:
        return np.asarray(tensor.data)
    return encoded(
        np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32), kind
    )


def encoded(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """The bytes of values in a type.

    Args:
        values: fp32 (rows, row length), which divides by the type's block.
        kind: The type.
    """
    import gguf
    import numpy as np

    wanted = gguf.GGMLQuantizationType[kind]
    if kind in PLAIN:
        return gguf.quants.quantize(values, wanted)
    row = values.shape[-1]
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    out = np.empty(values.size // block * size, dtype=np.uint8)
    address, target = (array.ctypes.data_as(ctypes.c_void_p) for array in (values, out))
    written = _library().ggml_quantize_chunk(wanted.value, address, target, 0, values.size // row, row, None)
    if written != out.nbytes:
        raise RuntimeError(f"{values.shape} must take {out.nbytes} bytes as {kind}, but llama.cpp wrote {written}")
    return out


@cache
def _library() -> ctypes.CDLL:
    """The shared library of xllamacpp, which exports ggml_quantize_chunk (llama.cpp, ggml/include/ggml.h)."""
    spec = find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = [file for folder in folders for file in folder.glob(f"{PACKAGE}.*") if file.suffix in (".so", ".pyd")]
    library = ctypes.CDLL(str(files[0]))
    call = library.ggml_quantize_chunk
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    call.argtypes, call.restype = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer], ctypes.c_size_t
    return library


def _copy_fields(reader: Any, kind: str, writer: Any) -> None:
    """All keys of a file but those that the writer writes itself, and the kind of the new one."""
    import gguf

    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    if "general.quantization_version" not in reader.fields:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
