"""Progress, clock and memory of a pruning."""

from __future__ import annotations

import pytest
import torch
from tiny import LAYERS, tiny_model
from tiny_pruning import BOTH, calibration

from fasp_lightning import FASPPruner
from fasp_lightning.pruning import progress
from fasp_lightning.pruning.progress import ProgressEvent, Stopwatch, WorkCounter, peak_memory


def test_progress_ends_at_its_total() -> None:
    events: list[ProgressEvent] = []
    FASPPruner(BOTH).prune(tiny_model("llama"), calibration(), events.append)
    assert [event.done for event in events] == list(range(1, events[-1].total + 1))
    assert {event.total for event in events} == {events[-1].done}
    assert [event.block for event in events] == sorted(event.block for event in events)
    assert {event.blocks for event in events} == {LAYERS}


def test_total_is_known_once_the_work_is() -> None:
    events: list[ProgressEvent] = []
    counter = WorkCounter(events.append, blocks=2)
    counter.later_rounds = 1
    counter.expect(3)
    for block in (0, 0, 1):
        counter.count(block, "statistics")
    counter.later_rounds = 0
    counter.expect(2)
    counter.count(1, "apply")
    assert [(event.block, event.done, event.total) for event in events] == [(0, 1, 6), (0, 2, 6), (1, 3, 6), (1, 4, 5)]
    assert {event.blocks for event in events} == {2}


def test_time_of_an_inner_phase_is_not_that_of_the_outer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    clock = Stopwatch(torch.device("cpu"))
    with clock.phase("outer"), clock.phase("inner"):
        pass
    with clock.phase("inner"):
        pass
    assert clock.seconds == {"inner": 3.0 + 1.0, "outer": 10.0 - 3.0}


def test_an_error_in_a_phase_is_counted_and_raised() -> None:
    clock = Stopwatch(torch.device("cpu"))
    with pytest.raises(KeyError), clock.phase("solve"):
        raise KeyError
    assert set(clock.seconds) == {"solve"}


def test_memory_is_at_least_what_this_process_holds() -> None:
    held = torch.ones(2**22)
    assert peak_memory(torch.device("cpu"))["rss"] > held.numel() * 4
