"""What an export came to, in the report of the folder it was made from."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.exporting.exported import Exported
from fasp_lightning.checkpoints.pruned_folder import REPORT_FILE
from fasp_lightning.staging import read_json, write_beside

log = logging.getLogger(__name__)


def record_export(folder: str | Path, exported: Exported) -> bool:
    """Add an export to ``exports`` in a pruned folder's report; a later one of the same target and name replaces it.

    Args:
        folder: What was exported.
        exported: What came of it.

    Returns:
        Whether it was written: not where the folder has no report, or is not writable, which is logged.

    Raises:
        FaspError: If the report is damaged.
    """
    file = Path(folder) / REPORT_FILE
    if not file.is_file():
        return False
    report, entry = read_json(file), _entry(exported)
    others = [old for old in report.get("exports", []) if any(old.get(key) != entry[key] for key in ("target", "file"))]
    report["exports"] = [*others, entry]
    try:
        write_beside(file, (json.dumps(report, separators=(",", ":")) + "\n").encode())
    except OSError as error:  # a folder that may only be read is exported all the same
        log.info("the result is not in %s: %s", file, error)
        return False
    return True


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
