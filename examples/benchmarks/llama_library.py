"""llama.cpp by its C interface: prompts, single tokens and likelihoods of GGUF files, and their quantising.

Two prebuilt libraries serve: the one inside ``xllamacpp`` (x86-64 code of 2013, no AVX-512, no quantising), and the
one that ``npm pack @node-llama-cpp/linux-x64@3.21.1`` fetches, which picks code for the processor that it runs on.

Structures are declared longer than they are, with the few fields that are read or set here; they stand first. So the
library may add fields, which happens with every other version.
"""

from __future__ import annotations

import ctypes
import math
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

FTYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}
"""``llama_ftype`` of the types that are written here."""


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class _ModelParams(ctypes.Structure):
    _fields_ = (("rest", c_void_p * 64),)


class _ContextParams(ctypes.Structure):
    _fields_ = (("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("rest", c_void_p * 64))


class _QuantizeParams(ctypes.Structure):
    _fields_ = (("nthread", c_int32), ("ftype", c_int32), ("rest", c_void_p * 64))


_RESULTS: dict[str, Any] = {
    "llama_model_default_params": _ModelParams,
    "llama_context_default_params": _ContextParams,
    "llama_model_load_from_file": c_void_p,
    "llama_init_from_model": c_void_p,
    "llama_model_get_vocab": c_void_p,
    "llama_get_memory": c_void_p,
    "llama_get_logits": POINTER(c_float),
    "llama_batch_init": _Batch,
}
_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class LlamaLibrary:
    """A prebuilt llama.cpp.

    Args:
        folder: Where its shared libraries lie; by default those of ``xllamacpp``.

    Raises:
        SystemExit: If there is none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.name, self._library = _of_xllamacpp() if folder is None else _of_folder(folder)
        for name, result in _RESULTS.items():
            getattr(self._library, name).restype = result
        self._silence = _LOG(lambda level, text, data: None)  # must live as long as the library
        self._library.llama_log_set(self._silence, None)
        self._library.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    @property
    def quantises(self) -> bool:
        """Whether it holds what writes quantised files."""
        return hasattr(self._library, "llama_model_quantize")

    def quantise(self, source: Path, target: Path, ftype: str, threads: int) -> None:
        """Write a GGUF file in another type.

        Args:
            source: File in f32 or f16.
            target: File to write.
            ftype: A key of :data:`FTYPES`.
            threads: How many.

        Raises:
            SystemExit: If the library cannot.
        """
        if not self.quantises:
            raise SystemExit(f"{ftype} must be written by a library that quantises, got {self.name}; see --llama-cpp")
        default = self._library.llama_model_quantize_default_params
        default.restype = _QuantizeParams
        params = default()
        params.nthread, params.ftype = threads, FTYPES[ftype]
        beside = target.with_name(target.name + ".part")
        if self._library.llama_model_quantize(str(source).encode(), str(beside).encode(), byref(params)):
            raise SystemExit(f"{source} must be a file that llama.cpp quantises to {ftype}; it refused")
        beside.replace(target)

    def load(self, path: Path, threads: int, tokens: int = 1024) -> LlamaModel:
        """Load a GGUF file.

        Args:
            path: The file.
            threads: How many compute.
            tokens: Longest context.

        Raises:
            SystemExit: If the library refuses it.
        """
        return LlamaModel(self, path, threads, tokens)


class LlamaModel:
    """A GGUF file in memory, with one context."""

    def __init__(self, library: LlamaLibrary, path: Path, threads: int, tokens: int) -> None:
        self.library = library
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"{path} must be a file that {library.name} loads; it refused")
        params = library.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, 512, 512
        self._context = c_void_p(library.llama_init_from_model(c_void_p(self._model), params))
        library.llama_set_n_threads(self._context, threads, threads)
        self.vocabulary = library.llama_vocab_n_tokens(c_void_p(library.llama_model_get_vocab(c_void_p(self._model))))

    def forget(self) -> None:
        """Empty the context."""
        self.library.llama_memory_clear(c_void_p(self.library.llama_get_memory(self._context)), True)

    def forward(self, ids: list[int], every: bool = False) -> Any:
        """Append tokens to the context.

        Args:
            ids: At most 512.
            every: Whether the logits of all of them are computed, or those of the last one alone.

        Returns:
            Logits (tokens, vocabulary) or (1, vocabulary), fp32, as an array that the next call overwrites.
        """
        import numpy

        start = 1 + self.library.llama_memory_seq_pos_max(
            c_void_p(self.library.llama_get_memory(self._context)), c_int32(0)
        )
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = every or index == len(ids) - 1
        failed = self.library.llama_decode(self._context, batch)
        self.library.llama_batch_free(batch)
        if failed:
            raise SystemExit(f"llama.cpp must take a batch of {len(ids)} tokens at {start}; it answered {failed}")
        rows = len(ids) if every else 1
        return numpy.ctypeslib.as_array(self.library.llama_get_logits(self._context), (rows, self.vocabulary))

    def negative_log_likelihood(self, sequences: list[list[int]]) -> tuple[float, int]:
        """Sum over all tokens but the first of each sequence.

        Returns:
            In nats, and of how many tokens.
        """
        import torch

        total, count = 0.0, 0
        for ids in sequences:
            self.forget()
            logits = torch.from_numpy(self.forward(ids, every=True))[:-1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
            count += len(ids) - 1
        return total, count

    def perplexity(self, sequences: list[list[int]]) -> float:
        """As :func:`fasp_lightning.measure_perplexity` counts it."""
        total, count = self.negative_log_likelihood(sequences)
        return math.exp(total / count)

    def close(self) -> None:
        """Free the memory."""
        self.library.llama_free(self._context)
        self.library.llama_model_free(c_void_p(self._model))


def _of_xllamacpp() -> tuple[str, ctypes.CDLL]:
    try:
        import xllamacpp
        import xllamacpp.xllamacpp as compiled
    except ImportError:
        raise SystemExit("llama.cpp must be installed: pip install 'fasp-lightning[serve]'") from None
    return f"llama.cpp of xllamacpp {xllamacpp.__version__}", ctypes.CDLL(compiled.__file__)


def _of_folder(folder: Path) -> tuple[str, ctypes.CDLL]:
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    found = {
        name: sorted(folder.rglob(f"{name}*{suffix}"), key=lambda file: len(file.name))
        for name in ("libggml-base", "libggml.", "libllama.")
    }
    if missing := [name for name, files in found.items() if not files]:
        raise SystemExit(f"{folder} must hold a prebuilt llama.cpp, found no {' and no '.join(missing)}")
    loaded = {name: ctypes.CDLL(str(files[0]), mode=ctypes.RTLD_GLOBAL) for name, files in found.items()}
    place = found["libggml."][0].parent
    loaded["libggml."].ggml_backend_load_all_from_path(str(place).encode())  # the code for this processor
    return f"llama.cpp in {folder.name}", loaded["libllama."]
