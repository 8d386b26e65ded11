"""Which sparsity is fast enough, from seconds that were timed."""

from __future__ import annotations

import pytest

from fasp_lightning import FaspError
from fasp_lightning.pruning.latency.curve import Curve, least_sparsity
from fasp_lightning.pruning.latency.serving import Serving, require_speedup

CURVE = Curve((0.0, 0.2, 0.6), {"prefill": (12.0, 10.0, 6.0), "decode": (8.0, 7.0, 6.0)})
POSSIBLE = (0.1, 0.2, 0.3, 0.4, 0.6)


def test_seconds_lie_on_the_line_between_what_was_timed() -> None:
    assert [CURVE.at("prefill", sparsity) for sparsity in (0.0, 0.1, 0.2, 0.4, 0.6)] == [12, 11, 10, 8, 6]
    assert CURVE.speedup("decode", 0.4) == pytest.approx(8 / 6.5)


@pytest.mark.parametrize(
    ("factor", "phases", "found"),
    [(1.15, ["prefill"], 0.2), (1.15, ["decode"], 0.3), (1.15, ["prefill", "decode"], 0.3), (2.0, ["prefill"], 0.6)],
)
def test_least_sparsity_that_is_fast_enough_is_chosen(factor: float, phases: list[str], found: float) -> None:
    assert POSSIBLE[least_sparsity(CURVE, POSSIBLE, factor, phases)] == found


def test_speedup_out_of_reach_names_the_highest() -> None:
    with pytest.raises(FaspError, match=r"speedup must be at most 1\.33.* sparsity of 0\.6000, got 1\.5"):
        least_sparsity(CURVE, POSSIBLE, 1.5, ["prefill", "decode"])


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0, float("inf"), float("nan")])
def test_speedup_of_at_most_one_is_refused(factor: float) -> None:
    with pytest.raises(FaspError, match="speedup must be a number above 1"):
        require_speedup(factor)


@pytest.mark.parametrize("wrong", [{"prompt": 0}, {"new": -1}, {"batch": 0}, {"phase": "all"}])
def test_serving_that_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(FaspError, match=rf"serving\.{next(iter(wrong))} must be"):
        Serving(**wrong)
