"""What an export came to, in the report of the folder it was made from."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.exporting.exported import Exported
from fasp_lightning.checkpoints.publishing.record import add_to_report


def record_export(folder: str | Path, exported: Exported) -> bool:
    """Add an export to ``exports`` in a pruned folder's report; a later one of the same target and name replaces it.

    Args:
        folder: What was exported.
        exported: What came of it.

    Returns:
        Whether it was written, see :func:`~fasp_lightning.checkpoints.publishing.record.add_to_report`.

    Raises:
        FaspError: If the report is damaged.
    """
    entry = _entry(exported)
    key = [entry[name] for name in ("target", "file")]

    def added(exports: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*(old for old in exports if [old.get(name) for name in ("target", "file")] != key), entry]

    return add_to_report(folder, "exports", added)


def _entry(exported: Exported) -> dict[str, Any]:
    check = exported.check
    entry: dict[str, Any] = {
        "target": exported.target,
        "architecture": exported.architecture,
        "file": exported.path.name,  # the path says nothing on another machine
        "bytes": exported.bytes,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if check is not None:
        entry |= {
            "loader": check.loader,
            "version": check.version,
            "same": check.same,
            "tokens": check.tokens,
            "logit_difference": check.logit_difference,
        }
    return entry
