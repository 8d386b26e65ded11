"""Schedules decide, and refuse what cannot happen."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import yaml

from fasp_lightning.training.schedule import PruningSchedule, ScheduledPruning

MIXED = [{"step": 5, "sparsity": 0.1}, {"epoch": 2, "sparsity": 0.2}, {"step": 9, "sparsity": 0.35}]

REFUSED = {
    "sparsity falls": ([{"step": 1, "sparsity": 0.3}, {"step": 2, "sparsity": 0.2}], 1, "must exceed the 0.3"),
    "sparsity repeats": ([{"step": 1, "sparsity": 0.3}, {"epoch": 2, "sparsity": 0.3}], 1, "must exceed the 0.3"),
    "sparsity is 0": ([{"step": 1, "sparsity": 0.0}], 0, "sparsity must be in (0, 1), got 0.0"),
    "sparsity is 1": ([{"step": 1, "sparsity": 1}], 0, "sparsity must be in (0, 1), got 1"),
    "sparsity is no number": ([{"step": 1, "sparsity": math.nan}], 0, "sparsity must be in (0, 1), got nan"),
    "sparsity is text": ([{"step": 1, "sparsity": "20%"}], 0, "sparsity must be in (0, 1), got '20%'"),
    "no sparsity": ([{"step": 1}], 0, "sparsity must be given"),
    "steps fall": ([{"step": 4, "sparsity": 0.1}, {"step": 2, "sparsity": 0.2}], 1, "step must exceed the 4"),
    "steps repeat": ([*MIXED[:2], {"step": 5, "sparsity": 0.3}], 2, "step must exceed the 5"),
    "epochs fall": ([{"epoch": 4, "sparsity": 0.1}, {"epoch": 2, "sparsity": 0.2}], 1, "epoch must exceed the 4"),
    "neither": ([*MIXED, {"sparsity": 0.5}], 3, "exactly one of step and epoch must be given, got neither"),
    "both": ([{"step": 1, "epoch": 1, "sparsity": 0.5}], 0, "exactly one of step and epoch"),
    "negative step": ([{"step": -1, "sparsity": 0.5}], 0, "step must be an integer >= 0, got -1"),
    "half an epoch": ([{"epoch": 0.5, "sparsity": 0.5}], 0, "epoch must be an integer >= 0, got 0.5"),
    "unknown key": ([{"steps": 1, "sparsity": 0.5}], 0, "keys must be among sparsity, step, epoch, got steps"),
    "no mapping": ([0.1, 0.2], 0, "must be a mapping"),
}


@pytest.mark.parametrize(("entries", "index", "rule"), REFUSED.values(), ids=REFUSED)
def test_impossible_schedule_is_refused_with_its_entry(entries: list[Any], index: int, rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(rule)) as caught:
        PruningSchedule(entries)
    assert str(caught.value).startswith(f"schedule entry {index}, {entries[index]!r}: ")


@pytest.mark.parametrize("entries", [[], "0.2", {"step": 5, "sparsity": 0.1}, 0.2])
def test_no_list_of_entries_is_refused(entries: Any) -> None:
    with pytest.raises(ValueError, match="schedule must"):
        PruningSchedule(entries)


def test_one_shot_is_one_event() -> None:
    assert PruningSchedule.one_shot(0.2, step=3).to_list() == [{"step": 3, "sparsity": 0.2}]
    assert PruningSchedule.one_shot(sparsity=0.2).to_list() == [{"step": 0, "sparsity": 0.2}]


def test_linear_rounds_remove_the_same_share_each() -> None:
    schedule = PruningSchedule.linear(0.3, start_step=2, every_n_steps=4, rounds=3)
    assert schedule.to_list() == [
        {"step": 2, "sparsity": 0.1},
        {"step": 6, "sparsity": 0.2},
        {"step": 10, "sparsity": 0.3},
    ]


def test_cubic_rounds_follow_the_equation() -> None:
    schedule = PruningSchedule.cubic(final_sparsity=0.54, every_n_steps=200, rounds=3)
    assert [event.step for event in schedule] == [0, 200, 400]
    # 0.54 · (1 − 8/27), 0.54 · (1 − 1/27), 0.54
    assert [event.sparsity for event in schedule] == pytest.approx([0.38, 0.52, 0.54], abs=1e-11)


@pytest.mark.parametrize("kind", [PruningSchedule.linear, PruningSchedule.cubic])
@pytest.mark.parametrize("rounds", [1, 2, 7, 100])
def test_last_round_reaches_the_final_sparsity_exactly(kind: Any, rounds: int) -> None:
    schedule = kind(0.3, every_n_steps=1, rounds=rounds)
    assert (len(schedule), schedule.final_sparsity) == (rounds, 0.3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("final_sparsity", 1.3), ("final_sparsity", 0), ("every_n_steps", 0), ("rounds", 0), ("start_step", -1)],
)
def test_bad_argument_of_a_rule_is_named(name: str, value: Any) -> None:
    arguments = {"final_sparsity": 0.3, "every_n_steps": 5, "rounds": 3, name: value}
    with pytest.raises(ValueError, match=rf"^{name} must be .*got {value}"):
        PruningSchedule.cubic(**arguments)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"kind": "one_shot", "sparsity": 0.2}, PruningSchedule.one_shot(0.2)),
        (
            {"kind": "linear", "final_sparsity": 0.3, "every_n_steps": 5, "rounds": 2},
            PruningSchedule.linear(0.3, every_n_steps=5, rounds=2),
        ),
        (
            {"kind": "cubic", "final_sparsity": 0.3, "start_step": 1, "every_n_steps": 5, "rounds": 3},
            PruningSchedule.cubic(0.3, start_step=1, every_n_steps=5, rounds=3),
        ),
        (MIXED, PruningSchedule(MIXED)),
        (tuple(MIXED), PruningSchedule(MIXED)),
        ({"events": MIXED}, PruningSchedule(MIXED)),
        (PruningSchedule(MIXED), PruningSchedule(MIXED)),
    ],
)
def test_plain_data_is_parsed(data: Any, expected: PruningSchedule, tmp_path: Path) -> None:
    assert PruningSchedule.parse(data) == expected
    if isinstance(data, (list, dict)):  # and the same data in a file
        file = tmp_path / "schedule.yaml"
        file.write_text(yaml.safe_dump(data))
        assert PruningSchedule.parse(str(file)) == PruningSchedule.parse(file) == expected


def test_parsing_leaves_the_data_alone() -> None:
    data = {"kind": "one_shot", "sparsity": 0.2}
    PruningSchedule.parse(data)
    assert data == {"kind": "one_shot", "sparsity": 0.2}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"kind": "square", "sparsity": 0.2}, "kind must be one of one_shot, linear, cubic, got 'square'"),
        ({"sparsity": 0.2}, "kind must be one of one_shot, linear, cubic, got None"),
        ({"kind": "one_shot"}, "schedule of kind one_shot: .*'sparsity'"),
        ({"kind": "cubic", "final_sparsity": 0.3, "every_n_steps": 5, "round": 2}, "kind cubic: .*'round'"),
        (None, "schedule must be a list"),
    ],
)
def test_data_of_no_schedule_is_refused(data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PruningSchedule.parse(data)


@pytest.mark.parametrize("content", ["0.2", "", "a: [", "just words"])
def test_file_without_a_schedule_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"schedule '.*mine\.yaml'"):
        PruningSchedule.parse(str(file))


def test_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"'no/such\.yaml'"):
        PruningSchedule.parse("no/such.yaml")


@pytest.mark.parametrize("schedule", [PruningSchedule(MIXED), PruningSchedule.cubic(0.3, every_n_steps=7, rounds=5)])
def test_schedule_is_plain_data_both_ways(schedule: PruningSchedule) -> None:
    assert PruningSchedule.parse(json.loads(json.dumps(schedule.to_list()))) == schedule
    assert PruningSchedule.parse(yaml.safe_load(yaml.safe_dump(schedule.to_list()))) == schedule


def test_schedule_is_frozen() -> None:
    schedule = PruningSchedule(MIXED)
    with pytest.raises(FrozenInstanceError):
        schedule.events = ()
    assert isinstance(schedule.events, tuple)


def test_events_are_due_from_their_point_on() -> None:
    schedule = PruningSchedule([{"step": 5, "sparsity": 0.1}, {"epoch": 2, "sparsity": 0.2}])
    first, second = schedule
    assert [schedule.due(0, step, epoch=0) for step in (0, 4, 5, 6)] == [None, None, first, first]
    assert [schedule.due(1, 100, epoch) for epoch in (0, 1, 2, 3)] == [None, None, second, second]


def test_event_that_happened_is_never_due_again() -> None:
    assert PruningSchedule.one_shot(0.2).due(1, step=0, epoch=0) is None


def test_event_waits_for_the_one_above_it() -> None:
    first, _ = schedule = PruningSchedule([{"epoch": 2, "sparsity": 0.1}, {"step": 5, "sparsity": 0.2}])
    assert schedule.due(0, step=9, epoch=1) is None
    assert schedule.due(0, step=20, epoch=2) == first


BEYOND = {
    "a step before the end": (MIXED, (10, -1, None), None),
    "at the last step": (MIXED, (9, -1, None), 2),
    "the first of several": (MIXED, (5, -1, None), 0),
    "epochs": (MIXED, (-1, 2, None), 1),
    "enough epochs": (MIXED, (-1, 3, None), None),
    "steps that the epochs hold": (MIXED, (-1, 3, 4), None),
    "fewer steps than the epochs should hold": (MIXED, (-1, 3, 3), 2),
    "an epoch that starts before the last step": (MIXED[:2], (7, -1, 3), None),
    "an epoch that would start at the last step": (MIXED[:2], (6, -1, 3), 1),
    "the tighter of two limits": (MIXED, (10, 2, 100), 1),
    "no limits": (MIXED, (None, None, None), None),
    "no limits in Lightning's words": (MIXED, (-1, -1, math.inf), None),
    "no steps at all": (MIXED, (0, -1, None), 0),
    "an entry that is done": (MIXED, (0, -1, None, 1), 2),
}


@pytest.mark.parametrize(("entries", "limits", "index"), BEYOND.values(), ids=BEYOND)
def test_entry_beyond_the_run_is_found(entries: list[Any], limits: tuple[Any, ...], index: int | None) -> None:
    found = PruningSchedule(entries).beyond(*limits)
    expected = None if index is None else (index, ScheduledPruning(**entries[index]))
    assert found == expected


def test_schedules_need_no_torch() -> None:
    code = (
        "import sys; from fasp_lightning.training.schedule import PruningSchedule as S; S.one_shot(0.2);"
        "sys.stdout.write(str('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False"
