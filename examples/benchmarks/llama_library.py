"""llama.cpp by its C interface: prompts, single tokens and likelihoods of GGUF files.

Two prebuilt libraries serve: the one inside ``xllamacpp``, which on x86-64 goes as far as AVX2, and the one that
``npm pack @node-llama-cpp/linux-x64@3.21.1`` fetches, which picks code for the processor that it runs on.

Structures are declared longer than they are, with the few fields that are read or set here; they stand first. So the
library may add fields, which happens with every other version.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from functools import partial
from pathlib import Path
from typing import Any


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
        self.name, self._library, load = _of_xllamacpp() if folder is None else _of_folder(folder)
        for name, result in _RESULTS.items():
            getattr(self._library, name).restype = result
        self._silence = _LOG(lambda level, text, data: None)  # must live as long as the library
        self._library.llama_log_set(self._silence, None)
        load()
        self._library.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

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


def _of_xllamacpp() -> tuple[str, ctypes.CDLL, Callable[[], Any]]:
    try:
        import xllamacpp
        import xllamacpp.xllamacpp as compiled
    except ImportError:
        raise SystemExit("llama.cpp must be installed: pip install 'fasp-lightning[serve]'") from None
    return f"llama.cpp of xllamacpp {xllamacpp.__version__}", ctypes.CDLL(compiled.__file__), lambda: None


def _of_folder(folder: Path) -> tuple[str, ctypes.CDLL, Callable[[], Any]]:
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    found = {
        name: sorted(folder.rglob(f"{name}*{suffix}"), key=lambda file: len(file.name))
        for name in ("libggml.", "libllama.")
    }
    if missing := [name for name, files in found.items() if not files]:
        raise SystemExit(f"{folder} must hold a prebuilt llama.cpp, found no {' and no '.join(missing)}")
    loaded = {name: ctypes.CDLL(str(files[0])) for name, files in found.items()}
    place = str(found["libggml."][0].parent).encode()
    processor = partial(loaded["libggml."].ggml_backend_load_all_from_path, place)
    return f"llama.cpp {_release(folder)}", loaded["libllama."], processor


def _release(folder: Path) -> str:
    """What node-llama-cpp was built of, or the folder's name."""
    for file in folder.rglob("_nlcBuildMetadata.json"):
        return str(json.loads(file.read_text())["buildOptions"]["llamaCpp"]["release"])
    return f"in {folder.name}"
