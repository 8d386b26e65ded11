"""What a streamed pruning has done so far, on disk: a run that was stopped, or killed, is taken up from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from fasp_lightning.errors import FaspFileExistsError
from fasp_lightning.staging import read_json, staged_file, write_json

T = TypeVar("T")

PROGRESS_FILE = "progress.json"


class Journal:
    """A folder beside the output, of finished blocks and of what else took long to make.

    Each file is whole or not there; the progress file is written last, and names what counts.

    Args:
        folder: The folder; it is made.
        made_with: Settings and fingerprints, as plain data, that decide on the outcome.
        anew: Remove what stands there of a pruning with others, which is refused otherwise.

    Raises:
        FaspFileExistsError: If it was begun with others.
    """

    def __init__(self, folder: Path, made_with: dict[str, Any], anew: bool = False) -> None:
        self.folder = folder
        self._file = folder / PROGRESS_FILE
        begun = read_json(self._file) if self._file.is_file() else None
        if begun is not None and begun["made_with"] != made_with:
            other = sorted(name for name in made_with if begun["made_with"].get(name) != made_with[name])
            if not anew:
                raise FaspFileExistsError(
                    f"{str(folder)!r} must be of a pruning with the same settings, model and text, got one of other "
                    f"{', '.join(other)}; give those to go on with it, overwrite it, or remove it to begin anew"
                )
            begun = None
        if begun is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._state: dict[str, Any] = begun or {"made_with": made_with, "rounds": [], "made": []}
        if begun is None:
            self._write()

    def done(self, number: int) -> int:
        """How many blocks a round has finished."""
        rounds = self._state["rounds"]
        return rounds[number] if number < len(rounds) else 0

    def note(self, number: int, done: int) -> None:
        """So many blocks of a round are finished, and all of the rounds before."""
        self._state["rounds"][number:] = [done]
        self._write()

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What was made under a name: tensors in lists and mappings, and plain data.

        Args:
            name: A file name.
            make: Makes it, if it is not there.
        """
        file = self.folder / f"{name}.pt"
        if name in self._state["made"]:
            kept: T = torch.load(file, weights_only=True)
            return kept
        made = make()
        with staged_file(file) as new:
            torch.save(made, new)
        self._state["made"].append(name)
        self._write()
        return made

    def remove(self) -> None:
        """The outcome is saved: remove all of it, the progress file last."""
        for path in self.folder.iterdir():
            if path != self._file:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self) -> None:
        with staged_file(self._file) as new:
            write_json(new, self._state)
