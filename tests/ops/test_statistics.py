"""The streaming gram is X Xᵀ, however the batches are cut."""

from __future__ import annotations

import pytest
import torch

from fasp_lightning.ops import statistics
from fasp_lightning.ops.moments import Moments
from fasp_lightning.ops.statistics import GramStatistics


@pytest.mark.parametrize("width", [1, 7, 128, 129, 300, 777, 800])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gram_is_that_of_the_whole_text(width: int, dtype: torch.dtype) -> None:
    inputs = torch.randn(90, width).to(dtype)
    found = GramStatistics(width, "cpu")
    for batch in inputs.split([1, 40, 49]):
        found.update(batch)
    exact = inputs.double().T @ inputs.double()
    torch.testing.assert_close(found.gram(), exact, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.norms(), inputs.double().norm(dim=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.mean(), inputs.double().mean(0), atol=1e-6, rtol=1e-5)
    assert found.tokens == 90
    assert torch.equal(found.gram(), found.gram().T)


def test_long_texts_are_summed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, ones stop counting at 2²⁴."""
    monkeypatch.setattr(statistics, "FLUSH_TOKENS", 1)
    found = GramStatistics(1, "cpu")
    found.update(torch.tensor([[2.0**12]]))  # 2²⁴
    for _ in range(3):
        found.update(torch.ones(1, 1))
    assert found.gram().item() == 2.0**24 + 3


def test_short_batches_reach_the_float64_sum_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "FLUSH_TOKENS", 4)
    found = GramStatistics(1, "cpu")
    found.update(torch.tensor([[2.0**12]]))
    for _ in range(7):  # the first three are lost beside 2²⁴ in float32
        found.update(torch.ones(1, 1))
    assert found.gram().item() == 2.0**24 + 4


def test_wide_grams_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DOUBLE_LIMIT", 4)
    found = GramStatistics(5, "cpu")
    inputs = torch.randn(9, 5)
    found.update(inputs)
    assert found.gram().dtype == torch.float32
    torch.testing.assert_close(found.gram(), inputs.T @ inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 200, 299])
def test_one_bad_input_shows(value: float, column: int) -> None:
    found = GramStatistics(300, "cpu")
    inputs = torch.randn(4, 300)
    found.update(inputs)
    assert found.is_finite()
    inputs[2, column] = value
    found.update(inputs)
    assert not found.is_finite()


def test_sums_of_two_processes_add_up() -> None:
    inputs = torch.randn(20, 150)
    whole, *parts = (GramStatistics(150, "cpu") for _ in range(3))
    whole.update(inputs)
    for part, half in zip(parts, inputs.split(10), strict=True):
        part.update(half)
    parts[0].lower.add_(parts[1].lower)
    torch.testing.assert_close(parts[0].gram(), whole.gram(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_weight_two_equal_rows_given_twice(dtype: torch.dtype) -> None:
    light, heavy = torch.randn(30, 150).to(dtype), torch.randn(9, 150).to(dtype)
    weighted, repeated = GramStatistics(150, "cpu"), GramStatistics(150, "cpu")
    weighted.update(light)
    weighted.update(heavy, weight=2.0)
    for rows in (light, heavy, heavy):
        repeated.update(rows)
    torch.testing.assert_close(weighted.gram(), repeated.gram(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(weighted.mean(), repeated.mean(), atol=1e-7, rtol=1e-6)
    assert weighted.tokens == repeated.tokens == 48


@pytest.mark.parametrize("weight", [1e-3, 0.7, 1e3])
def test_one_weight_for_all_rows_changes_no_mean(weight: float) -> None:
    inputs = torch.randn(20, 6)
    plain, weighted = GramStatistics(6, "cpu"), GramStatistics(6, "cpu")
    plain.update(inputs)
    weighted.update(inputs, weight)
    torch.testing.assert_close(weighted.mean(), plain.mean())
    torch.testing.assert_close(weighted.gram() / weighted.tokens, plain.gram() / plain.tokens, atol=1e-6, rtol=1e-5)


def test_weight_of_bf16_rows_is_not_rounded() -> None:
    """The weight 1 + 2⁻¹² would be 1 in bf16."""
    found = GramStatistics(2, "cpu")
    found.update(torch.ones(1, 2, dtype=torch.bfloat16), 1 + 2.0**-12)
    assert found.gram()[0, 1] == found.sums[0] == found.tokens == 1 + 2.0**-12


def test_weighted_tokens_of_two_processes_add_up() -> None:
    inputs = torch.randn(20, 6)
    whole, *parts = (GramStatistics(6, "cpu") for _ in range(3))
    for part, rows, weight in zip(parts, inputs.split(10), (0.25, 1.5), strict=True):
        part.update(rows, weight)
        whole.update(rows, weight)
    sent = iter((parts[1].lower, parts[1].sums, torch.tensor([parts[1].tokens], dtype=torch.float64)))
    parts[0].join(lambda total: total.add_(next(sent)))
    assert parts[0].tokens == whole.tokens == 17.5
    torch.testing.assert_close(parts[0].mean(), whole.mean())


def test_centred_gram_is_that_of_centred_inputs() -> None:
    inputs = torch.randn(50, 6, dtype=torch.float64) + 3
    centred = inputs - inputs.mean(0)
    found = Moments(inputs.T @ inputs, inputs.mean(0), 50)
    torch.testing.assert_close(found.block(torch.arange(6), torch.arange(6)), centred.T @ centred)
    torch.testing.assert_close(found.diagonal(), centred.square().sum(0))


def test_centred_gram_counts_weights() -> None:
    inputs, weights = torch.randn(50, 6, dtype=torch.float64) + 3, torch.rand(50, 1, dtype=torch.float64)
    mean = (weights * inputs).sum(0) / weights.sum()
    found = Moments((weights * inputs).T @ inputs, mean, float(weights.sum()))
    centred = (weights * (inputs - mean)).T @ (inputs - mean)
    torch.testing.assert_close(found.block(torch.arange(2, 6), torch.arange(4)), centred[2:, :4])


@pytest.mark.parametrize("limit", [4, statistics.DOUBLE_LIMIT], ids=["float32", "float64"])
def test_one_takes_in_what_another_has_seen(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DOUBLE_LIMIT", limit)
    whole, first, second = (GramStatistics(150, "cpu") for _ in range(3))
    for found, seed, weight in ((first, 0, 1.0), (second, 1, 0.3), (first, 2, 2.5), (second, 3, 1.0)):
        rows = torch.randn(20, 150, generator=torch.Generator().manual_seed(seed))
        found.update(rows, weight)
        whole.update(rows, weight)
    seen = second.gram()
    first.add(second)
    torch.testing.assert_close(first.gram(), whole.gram(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(first.mean(), whole.mean())
    assert first.tokens == pytest.approx(whole.tokens) == 96
    assert torch.equal(second.gram(), seen)  # the other stays
    assert second.tokens == 26
    first.update(torch.ones(1, 150))  # and more can follow
    assert first.tokens == pytest.approx(97)


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs must be \(tokens, 6\), got \(3, 5\)"):
        GramStatistics(6, "cpu").update(torch.ones(3, 5))


@pytest.mark.cuda
@pytest.mark.parametrize("weight", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gram_on_cuda_equals_that_on_the_cpu(dtype: torch.dtype, weight: float) -> None:
    inputs = torch.randn(90, 300).to(dtype)
    found = GramStatistics(300, "cuda")
    found.update(inputs.cuda(), weight)
    expected = weight * (inputs.double().T @ inputs.double())
    torch.testing.assert_close(found.gram().cpu(), expected, atol=1e-3, rtol=1e-4)
