"""What takes long to make, on disk: checked when it is read, under a key of the model that made it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasp_lightning.staging import write_beside
from fasp_lightning.structure.adapters import is_adapted
from fasp_lightning.structure.compact import width_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
"""Goes into every key: a change of the sampling makes old files unused."""

DIGEST = hashlib.sha256().digest_size

_IDLE = ("_name_or_path", "transformers_version", "architectures", "use_cache")
"""Entries of a config that change no logits."""

_ADAPTER = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
"""What decides on an adapted layer's output beside its weights."""

log = logging.getLogger(__name__)


def weights_digest(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]] | None = None) -> str:
    """Hash all that decides on a model's logits, as 64 hex digits.

    Every byte of every weight is read (about a second a GB): a fine-tuned model differs in few digits.

    Args:
        model: The model, pruned or not, with or without LoRA.
        tensors: Its parameters and buffers by name, in their order, where it does not have them itself.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model) if tensors is None else _with_positions(model, tensors):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # bytes, because hashlib knows no bfloat16
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    adapted = [module for module in model.modules() if is_adapted(module)]
    adapters = [[str(getattr(module, name, None)) for name in _ADAPTER] for module in adapted]
    config = {name: value for name, value in model.config.to_dict().items() if name not in _IDLE}
    generation = getattr(model, "generation_config", None)
    starts = [getattr(generation, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    digest.update(json.dumps([adapters, starts, config], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and where the rows and columns that are left of a pruned pair stand."""
    yield from _with_positions(model, (*model.named_parameters(), *model.named_buffers()))


def _with_positions(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    yield from tensors
    for name, hook in width_hooks(model):
        yield name, hook.positions


def digest_of(batches: Iterable[Tensor]) -> str:
    """Hash token ids: what stands for a text, its length, its tokenizer and its sequences.

    Args:
        batches: (batch, seq) token ids, on the CPU.
    """
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(str(tuple(batch.shape)).encode() + batch.numpy().tobytes())
    return digest.hexdigest()


def read_ids(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Read token ids.

    Args:
        path: The file.
        shape: What they must have.

    Returns:
        (sequences, seq_len) int64, or ``None`` if there is no such file, or it is damaged.
    """
    body = read_checked(path, "own text is sampled anew", 4 * shape[0] * shape[1])
    return None if body is None else torch.frombuffer(bytearray(body), dtype=torch.int32).long().view(shape)


def write_ids(path: Path, ids: Tensor) -> None:
    """Put token ids on disk; see :func:`write_checked`.

    Args:
        path: The file; its folder is made.
        ids: (sequences, seq_len) int64.
    """
    write_checked(path, ids.to(torch.int32).contiguous().numpy().tobytes(), "own text")


def read_checked(path: Path, otherwise: str, size: int | None = None) -> bytes | None:
    """Read what :func:`write_checked` wrote.

    Args:
        path: The file.
        otherwise: What will be done without it, for the log.
        size: Bytes that there must be, if that is known.

    Returns:
        The content, or ``None`` if there is no such file, or it is damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s): %s", path, error, otherwise)
        return None
    body = content[DIGEST:]
    if len(body) != (len(body) if size is None else size) or content[:DIGEST] != hashlib.sha256(body).digest():
        log.warning("%s is damaged: %s", path, otherwise)
        return None
    return body


def write_checked(path: Path, body: bytes, what: str) -> None:
    """Put bytes on disk with their digest: beside, then renamed, so that nobody reads half a file.

    A cache that cannot be written is no error: its content is at hand, and the log says so.

    Args:
        path: The file; its folder is made.
        body: The content.
        what: What it is, for the log.
    """
    try:
        write_beside(path, hashlib.sha256(body).digest() + body)
    except OSError as error:
        log.warning("%s cannot be kept in %s: %s", what, path.parent, error)
