"""Which samples stand for the calibration set, and with which weight."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from fasp_lightning.pruning.blocks.samples import Sample, spread_samples
from fasp_lightning.pruning.processes import Processes


def samples(count: int, tokens: int, weight: float = 1.0) -> list[Sample]:
    return [Sample(tokens, None, torch.full((1, tokens), index), weight) for index in range(count)]


def mass(chosen: list[Sample]) -> Counter[int]:
    """Σ weight · tokens by the length of a sample, which tells the kinds of these tests apart."""
    total: Counter[int] = Counter()
    for sample in chosen:
        total[sample.input_ids.shape[1]] += sample.weight * sample.tokens
    return total


@pytest.mark.parametrize(("tokens", "taken"), [(40, [0, 1, 2, 3]), (20, [1, 3]), (11, [1, 3]), (10, [2]), (1, [2])])
def test_samples_are_whole_and_evenly_spread(tokens: int, taken: list[int]) -> None:
    chosen = spread_samples(samples(4, 10), tokens)
    assert [int(sample.input_ids[0, 0]) for sample in chosen] == taken


@pytest.mark.parametrize("tokens", [1, 25, 70, 120])
def test_each_kind_counts_as_much_as_all_of_it(tokens: int) -> None:
    everything = [*samples(8, 10, weight=1.0), *samples(10, 4, weight=0.25)]
    chosen = spread_samples(everything, tokens)
    assert mass(chosen) == pytest.approx(mass(everything))
    assert len(chosen) == min(18, {1: 2, 25: 2 + 3, 70: 5 + 6, 120: 18}[tokens])


def test_all_samples_keep_their_weight() -> None:
    everything = [*samples(3, 10), *samples(2, 5, weight=0.3)]
    assert spread_samples(everything, 10**9) == everything


def test_the_set_stays_as_it_is_and_its_tensors_are_shared() -> None:
    everything = samples(4, 10)
    (chosen,) = spread_samples(everything, 10)
    assert chosen.weight == 4
    assert [sample.weight for sample in everything] == [1.0] * 4
    assert chosen.input_ids is everything[2].input_ids
    assert chosen.calls is everything[2].calls


class Beside(Processes):
    """This process beside one that has 30 tokens of weight 1 and takes 10 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.others = [{1.0: 30}, {1.0: 10}]

    def gather(self, value: Any) -> list[Any]:
        return [value, self.others.pop(0)]


def test_other_processes_count() -> None:
    chosen = spread_samples([*samples(1, 10), *samples(2, 5, weight=0.5)], 20, Beside())
    # of 50 tokens 20 are wanted: one sample of each kind here, and 20 of 40 tokens of weight 1 in all
    assert [sample.weight for sample in chosen] == [2.0, 1.0]
