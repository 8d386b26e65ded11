"""Results of a benchmark that may be stopped at any time: each cell is on disk as soon as it is there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import fasp_lightning
from fasp_lightning.staging import write_beside

Settings = dict[str, Any]
CODE = ("ops", "structure", "pruning")
"""Folders of the package that decide what a pruning gives."""


class Cells:
    """Cells of one JSON file: what each was made with, and what came out.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.cells: dict[str, dict[str, Any]] = self.content.setdefault("cells", {})

    def get(self, settings: Settings) -> dict[str, Any] | None:
        """The result that was made with just these settings, if there is one."""
        cell = self.cells.get(key_of(settings))
        return None if cell is None else cell["result"]

    def put(self, settings: Settings, result: dict[str, Any]) -> None:
        """Keep a result, on disk too."""
        self.cells[key_of(settings)] = {"settings": settings, "result": result}
        self.write()

    def write(self, **content: Any) -> None:
        """Write the file anew, beside the old one, and rename it."""
        self.content |= content
        write_beside(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


def key_of(settings: Settings) -> str:
    """Name of a cell."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_code() -> str:
    """What stands for the code that prunes."""
    total = hashlib.sha256()
    folder = Path(fasp_lightning.__file__).parent
    for file in sorted(file for name in CODE for file in (folder / name).rglob("*.py")):
        total.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return total.hexdigest()[:16]
