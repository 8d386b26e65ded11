"""A streamed pruning in a process of its own that is killed at one of its steps on the disk."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from tiny_pruning import calibration

from fasp_lightning import FASPPruner, PruningConfig, staging

STEPS = ((os, "replace"), (os, "rename"), (os, "link"), (os, "unlink"), (os, "mkdir"), (shutil, "rmtree"))
"""What changes names on the disk: between two of them, what another process finds is the same."""


def prune_until(step: int | None, source: str, output: str, settings: dict[str, Any]) -> None:
    """Prune a folder, and be killed before a step; or count them, into a file beside the output.

    Args:
        step: Number of the step, from 0.
        source: Folder of the model.
        output: Folder to write.
        settings: Of the pruning.
    """
    staging._flush = lambda path: None  # only a failing machine asks for it
    taken = [0]

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if taken[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            taken[0] += 1
            return original(*args, **kwargs)

        setattr(owner, name, call)

    for owner, name in STEPS:
        counted(owner, name)
    FASPPruner(PruningConfig(**settings)).prune_folder(source, output, calibration())
    if step is None:
        Path(f"{output}.steps").write_text(str(taken[0]))
