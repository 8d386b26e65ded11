"""Means over tasks and paired differences, with their standard errors."""

from __future__ import annotations

import math

import pytest

from fasp_lightning.checkpoints.tasks.answers import CHANCE, MEAN, Answers, accuracies, differences
from fasp_lightning.errors import FaspError


def answers(*correct: int) -> Answers:
    return Answers("acc", f"the first {len(correct)}", list(correct))


OURS = {"arc": answers(1, 1, 0, 1), "piqa": answers(0, 1), CHANCE: answers(1, 0, 0)}
THEIRS = {"arc": answers(1, 0, 0, 1), "piqa": answers(0, 1), CHANCE: answers(1, 0, 1), "more": answers(1)}


def test_mean_counts_each_task_alike_and_once_without_the_one_at_chance() -> None:
    found = accuracies(OURS)
    assert list(found) == ["arc", "piqa", CHANCE, MEAN, f"{MEAN} without {CHANCE}"]
    assert found["arc"] == pytest.approx((3 / 4, 1 / 4))  # √(3/4 · 1/4 · 4/3 / 4)
    assert found[MEAN].value == pytest.approx((3 / 4 + 1 / 2 + 1 / 3) / 3)
    assert found[MEAN].error == pytest.approx(math.sqrt(1 / 16 + 1 / 4 + 1 / 9) / 3)
    assert found[f"{MEAN} without {CHANCE}"].value == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_error_of_a_difference_is_that_of_the_questions_answered_differently() -> None:
    found = differences(OURS, THEIRS)
    assert found["arc"] == pytest.approx((1 / 4, 1 / 4))  # of 0, 1, 0, 0
    assert found["piqa"] == (0, 0)
    assert found[MEAN] == pytest.approx(((1 / 4 - 1 / 3) / 3, math.sqrt(1 / 16 + 1 / 9) / 3))


@pytest.mark.parametrize("theirs", [{"arc": answers(1, 0)}, {"piqa": answers(1, 0)}], ids=["fewer", "another task"])
def test_answers_to_other_questions_are_refused(theirs: dict[str, Answers]) -> None:
    with pytest.raises(FaspError, match="against must hold answers to the same questions, got none or others in arc"):
        differences({"arc": answers(1, 0, 1)}, theirs)
