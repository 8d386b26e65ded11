"""What the tests of streaming share."""

from __future__ import annotations

import pytest

from fasp_lightning import staging


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """That files reach the disk, and not only its cache, no test could tell; most of its time it would wait for it."""
    monkeypatch.setattr(staging, "_flush", lambda path: None)
