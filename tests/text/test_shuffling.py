"""The order of sequences: what an epoch holds, and how processes share it."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from fasp_lightning.text.mixing import shares_of
from fasp_lightning.text.shuffling import BLANK, EvaluationSampler, TrainingSampler, epoch_order


def indices(world_size: int, batch_size: int, rank: int = 0, epoch: int = 0, lengths: tuple[int, ...] = (23,)) -> list:
    sampler = TrainingSampler(lengths, lengths, batch_size, 0, rank, world_size)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_epoch_takes_each_sequence_once() -> None:
    assert sorted(epoch_order([5, 8], [5, 8], seed=0, epoch=3).tolist()) == list(range(13))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_order([40], [40], seed=1, epoch=2)
    torch.rand(3)  # moves the global state, which must not matter
    assert torch.equal(epoch_order([40], [40], seed=1, epoch=2), first)
    assert not torch.equal(epoch_order([40], [40], seed=1, epoch=3), first)
    assert not torch.equal(epoch_order([40], [40], seed=2, epoch=2), first)


def test_the_order_draws_from_no_global_state() -> None:
    before = torch.get_rng_state()
    epoch_order([40], [40], seed=1, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("length", "count"), [(12, 5), (12, 18), (7, 30)])
def test_no_sequence_comes_again_before_all_others_have(length: int, count: int) -> None:
    epochs = [epoch_order([length], [count], seed=0, epoch=epoch) for epoch in range(length)]
    times = torch.stack([torch.bincount(epoch, minlength=length) for epoch in epochs]).cumsum(0)
    assert (times.amax(1) - times.amin(1) <= 1).all()


@pytest.mark.parametrize(
    ("lengths", "weights", "total", "counts"),
    [
        ([10, 30], None, 40, [10, 30]),
        ([10, 30], None, 20, [5, 15]),
        ([10, 30], [1, 1], 40, [20, 20]),
        ([10, 30, 5], [1, 1, 1], 10, [4, 3, 3]),
        ([10, 30], [0.7, 0.3], 10, [7, 3]),
    ],
)
def test_a_weight_is_the_share_of_an_epoch(
    lengths: list[int], weights: list[float] | None, total: int, counts: list[int]
) -> None:
    assert shares_of(lengths, weights, total) == counts
    order = epoch_order(lengths, counts, seed=0, epoch=1)
    edges = torch.tensor(lengths).cumsum(0)
    assert torch.bincount(torch.bucketize(order, edges, right=True)).tolist() == counts


def test_processes_take_together_what_one_would_take() -> None:
    ranks = [torch.tensor(indices(2, 3, rank)).view(-1, 3) for rank in (0, 1)]
    alone = torch.tensor(indices(1, 6)).view(-1, 6)
    assert torch.equal(torch.cat(ranks, dim=1).sort().values, alone.sort().values)


def test_what_fills_no_batch_on_every_process_is_left_out() -> None:
    both = [indices(2, 3, rank, epoch) for epoch in (0, 1) for rank in (0, 1)]
    assert [len(part) for part in both] == [9] * 4  # of 23, 18 fill three batches of 2 × 3
    assert set(both[0] + both[1]) != set(both[2] + both[3])  # not the same ones again


@pytest.mark.parametrize("length", [1, 6, 7])
def test_evaluation_takes_each_sequence_once_and_pads_with_blanks(length: int) -> None:
    ranks = [list(EvaluationSampler(length, rank, 3)) for rank in range(3)]
    assert len({len(part) for part in ranks}) == 1
    together = list(chain(*ranks))
    assert sorted(index for index in together if index != BLANK) == list(range(length))
    assert len(together) - length < 3
