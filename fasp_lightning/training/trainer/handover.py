"""What spawned processes found, for the process that started them."""

from __future__ import annotations

import json
import tempfile
import uuid
from pathlib import Path
from typing import Any


class Handover:
    """Plain data from the first of spawned processes to the main one, in a file for temporary use.

    Lightning sends nothing of a callback back, and calls no hook of it in the main process
    (``_MultiProcessingLauncher._recover_results_in_main_process``, strategies/launchers/multiprocessing.py); the copy
    of this object in the worker knows the file too.
    """

    def __init__(self) -> None:
        self._path = Path(tempfile.gettempdir()) / f"fasp-{uuid.uuid4().hex}.json"

    def give(self, data: list[dict[str, Any]]) -> None:
        """Leave data for the main process."""
        self._path.write_text(json.dumps(data), encoding="utf-8")

    def take(self) -> list[dict[str, Any]]:
        """What was left, once; nothing if no process left anything."""
        if not self._path.exists():
            return []
        data: list[dict[str, Any]] = json.loads(self._path.read_text(encoding="utf-8"))
        self._path.unlink()
        return data
