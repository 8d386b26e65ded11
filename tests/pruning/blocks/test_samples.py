"""Which samples stand for the calibration set, and with which weight."""

from __future__ import annotations

from collections import Counter
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model

from fasp_lightning import FASPPruner, PruningConfig
from fasp_lightning.pruning import prepare
from fasp_lightning.pruning.blocks.samples import Sample, hold_back, spread_samples
from fasp_lightning.pruning.processes import Processes


def samples(count: int, tokens: int, weight: float = 1.0, source: str = "text", start: int = 0) -> list[Sample]:
    return [
        Sample(start + place, source, {"input_ids": torch.full((1, tokens), start + place)}, weight)
        for place in range(count)
    ]


def mass(chosen: list[Sample]) -> Counter[str]:
    """Σ weight · tokens by source."""
    total: Counter[str] = Counter()
    for sample in chosen:
        total[sample.source] += sample.weight * sample.tokens
    return total


@pytest.mark.parametrize(("tokens", "taken"), [(40, [0, 1, 2, 3]), (20, [1, 3]), (11, [1, 3]), (10, [2]), (1, [2])])
def test_samples_are_whole_and_evenly_spread(tokens: int, taken: list[int]) -> None:
    chosen = spread_samples(samples(4, 10), tokens)
    assert [int(sample.input_ids[0, 0]) for sample in chosen] == taken


@pytest.mark.parametrize("tokens", [1, 25, 70, 120])
@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_each_source_counts_as_much_as_all_of_it(tokens: int, weight: float) -> None:
    """Two texts of one weight are two texts."""
    everything = [*samples(8, 10), *samples(10, 4, weight, "other", start=8)]
    chosen = spread_samples(everything, tokens)
    assert mass(chosen) == pytest.approx(mass(everything))
    assert len(chosen) == min(18, {1: 2, 25: 2 + 3, 70: 5 + 6, 120: 18}[tokens])


def test_all_samples_keep_their_weight() -> None:
    everything = [*samples(3, 10), *samples(2, 5, 0.3, "other", start=3)]
    assert spread_samples(everything, 10**9) == everything


def test_the_set_stays_as_it_is_and_its_tensors_are_shared() -> None:
    everything = samples(4, 10)
    (chosen,) = spread_samples(everything, 10)
    assert chosen.weight == 4
    assert [sample.weight for sample in everything] == [1.0] * 4
    assert chosen.input_ids is everything[2].input_ids
    assert chosen.calls is everything[2].calls


class Beside(Processes):
    """This process beside one that has 30 tokens of the first text and takes 10 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.others = [{"text": (30, 30.0)}, {"text": (10, 10.0)}]

    def gather(self, value: Any) -> list[Any]:
        return [value, self.others.pop(0)]


def test_other_processes_count() -> None:
    chosen = spread_samples([*samples(1, 10), *samples(2, 5, 0.5, "other", start=1)], 20, Beside())
    # of 50 tokens 20 are wanted: one sample of each text here, and 20 of 40 tokens of the first one in all
    assert [sample.weight for sample in chosen] == [2.0, 1.0]


def test_weights_within_a_source_keep_their_proportion() -> None:
    everything = [*samples(4, 10), *samples(4, 10, weight=3.0, start=4)]
    chosen = spread_samples(everything, 40)
    assert [sample.weight for sample in chosen] == [1.0 * 2, 1.0 * 2, 3.0 * 2, 3.0 * 2]
    assert mass(chosen) == mass(everything)


def test_a_sample_is_frozen() -> None:
    (sample,) = samples(1, 10)
    with pytest.raises(FrozenInstanceError):
        sample.weight = 2.0  # type: ignore[misc]


def test_one_sample_in_four_of_each_source_is_held_back() -> None:
    """Of two texts of one weight each has its share."""
    everything = [
        Sample(number, "own text" if number % 3 == 0 else "text", {"input_ids": torch.ones(1, 5, dtype=torch.long)})
        for number in range(30)
    ]
    marked = hold_back(everything)
    assert Counter(sample.source for sample in marked if sample.held_back) == {"text": 20 // 4, "own text": 10 // 4}
    text = [sample.held_back for sample in marked if sample.source == "text"]
    assert [index for index, one in enumerate(text) if one] == [3, 7, 11, 15, 19]
    assert not any(sample.held_back for sample in everything)


def test_two_texts_of_one_weight_are_two_texts_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Counter[str]] = []

    def watched(samples: list[Sample], *arguments: Any) -> list[Sample]:
        chosen = spread_samples(samples, *arguments)
        seen.append(Counter(sample.source for sample in chosen))
        return chosen

    monkeypatch.setattr(prepare, "spread_samples", watched)
    batches = [
        {"input_ids": random_tokens(1, 20, seed=seed), "source": source, "weight": 1.0}
        for source, count in (("topics", 6), ("mine.txt", 2))
        for seed in range(count)
    ]
    config = PruningConfig(0.2, score="fisher", own_text=None, sensitivity_tokens=80)
    FASPPruner(config).prune(tiny_model("llama"), batches)
    assert seen == [{"topics": 3, "mine.txt": 1}]


def test_padding_is_no_token() -> None:
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 1, 1]])
    padded = Sample(0, "text", {"input_ids": ids, "attention_mask": mask})
    assert (padded.tokens, Sample(0, "text", {"input_ids": ids}).tokens) == (5, 6)
    assert padded.mask is not None
    assert padded.mask.dtype == torch.bool
