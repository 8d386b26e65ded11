"""Which folders may be written to."""

from __future__ import annotations

from pathlib import Path

from fasp_lightning.checkpoints.pruned_folder import REPORT_FILE
from fasp_lightning.errors import FaspFileExistsError
from fasp_lightning.staging import require_unclaimed


def check_output(path: str | Path, overwrite: bool, marker: str = REPORT_FILE, kind: str = "pruned model") -> None:
    """Refuse an output folder before anything is spent.

    Args:
        path: The folder.
        overwrite: Whether one that was written before may be replaced.
        marker: The file that such a one holds.
        kind: What it is.

    Raises:
        FaspFileExistsError: If it is a file; if it is not empty and ``overwrite`` is false, or holds something else; or
            another job that lives will write there.
    """
    path = Path(path)
    require_unclaimed(path)  # first: a kill may have left the model that stood here beside it
    if path.exists() and not path.is_dir():
        raise FaspFileExistsError(f"output folder {path} must be no file; choose another name")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise FaspFileExistsError(f"output folder {path} must be empty; choose another one, or overwrite it")
    if not (path / marker).is_file():
        raise FaspFileExistsError(
            f"output folder {path} holds no {kind} ({marker}) and is not overwritten; empty it first"
        )
