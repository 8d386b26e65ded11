"""Which of a checkpoint's files holds which weight."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fasp_lightning.checkpoints.source import WEIGHTS_INDEX, ModelSource, check_files
from fasp_lightning.errors import FaspError, FaspFileNotFoundError, FaspOSError, as_refusal, one_line

SINGLE_FILE = "model.safetensors"


def stored_weights(source: ModelSource, folder: Path) -> dict[str, Path]:
    """The file of each weight of a checkpoint, by its name there. Headers are read, and no weights.

    Args:
        source: The resolved model, for messages.
        folder: Where its files are.

    Raises:
        FaspError: If it has no safetensors files; the message says what to do.
        FaspOSError: If one is damaged or missing, or the index is not true of them.
    """
    if source.gguf_file is not None:
        raise FaspError(
            f"model {source.name!r} must have safetensors files to be streamed, got a GGUF file, which is read as a "
            "whole; save it as such (load_model, save_pretrained) on a machine that has the memory"
        )
    check_files(ModelSource(source.name, str(folder), local=True))
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        files = {name: folder / file for name, file in _listed(index).items()}
    elif (folder / SINGLE_FILE).is_file():
        files = dict.fromkeys(_names(folder / SINGLE_FILE), folder / SINGLE_FILE)
    else:
        raise FaspError(
            f"model {source.name!r} must have {SINGLE_FILE} or {WEIGHTS_INDEX} to be streamed, got neither; load it "
            "and save it again with save_pretrained, which writes safetensors files"
        )
    held = {file: set(_names(file)) for file in set(files.values())}
    if lost := [name for name, file in files.items() if name not in held[file]]:
        raise FaspFileNotFoundError(
            f"model {source.name!r} must hold {lost[0]} in {files[lost[0]].name!r}, as its index says ({len(lost)} "
            "weights are not there); fetch it again"
        )
    return files


def read_weights(places: list[tuple[Path, str]]) -> dict[str, Tensor]:
    """Read weights from files, on the CPU, as they are stored.

    Args:
        places: The file and the name of each.

    Raises:
        FaspOSError: If a file cannot be read.
    """
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for path, _ in places):
        # pread: mapped files count as the process's memory for as long as one of their weights is held
        with as_refusal(partial(_unread, path)), safe_open(path, framework="pt", backend="pread") as file:
            found |= {name: file.get_tensor(name) for place, name in places if place == path}
    return found


def _unread(path: Path, error: Exception) -> FaspOSError:
    return FaspOSError(f"{str(path)!r} cannot be read: {one_line(error)}; fetch it again")


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _listed(index: Path) -> dict[str, str]:
    """What an index says: the file's name of each weight."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []:
            raise FaspOSError(f"{str(index)!r} must name each weight once, got {twice[0]} twice; fetch it again")
        return dict(pairs)

    found: dict[str, str] = json.loads(index.read_text("utf-8"), object_pairs_hook=once)["weight_map"]
    return found
