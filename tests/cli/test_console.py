"""Progress bars end with what they show."""

from __future__ import annotations

import threading

import pytest

from fasp_lightning.cli.console import PruningProgress, tracked
from fasp_lightning.pruning.progress import ProgressEvent


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_bars_leave_no_thread(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for one
    before = set(threading.enumerate())
    assert list(tracked([1, 2, 3], "perplexity")) == [1, 2, 3]
    for _ in zip(tracked([1, 2, 3], "stopped half-way"), [1], strict=False):
        pass
    with PruningProgress() as progress:
        progress(ProgressEvent(0, 2, "statistics", 1, 4))
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(timeout=10)  # one that was told to end does so when it gets a processor
    assert not [thread for thread in left if thread.is_alive()]
