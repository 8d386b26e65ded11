"""Restoration against float64 least squares, over shape, dtype and conditioning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fasp_lightning.ops import least_squares, symmetric
from fasp_lightning.ops.least_squares import (
    LeastSquares,
    Restoration,
    refit_bias,
)
from fasp_lightning.ops.moments import Moments, error_per_output, relative_error

SHAPES = [(5, 8, 6), (16, 24, 10), (3, 40, 39), (8, 30, 1)]
CONDITIONING = ["well", "ill", "rank-deficient", "few-tokens"]


def problem(out: int, width: int, conditioning: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(out, n) weight and (tokens, n) inputs."""
    tokens = width // 2 if conditioning == "few-tokens" else 4 * width
    inputs = torch.randn(tokens, width, dtype=torch.float64) + 0.5
    if conditioning == "ill":
        inputs = inputs * torch.logspace(0, -4, width, dtype=torch.float64)
    if conditioning == "rank-deficient":
        inputs[:, width // 2 :] = inputs[:, : width - width // 2] @ torch.eye(width - width // 2, dtype=torch.float64)
    return torch.randn(out, width, dtype=dtype), inputs


def restore_weight(weight: Tensor, gram: Tensor, kept: Tensor, **options: Any) -> Restoration:
    return least_squares.restore_weight(LeastSquares(weight, Moments(gram), kept), **options)


def kept_columns(width: int, keep: int) -> Tensor:
    return torch.randperm(width)[:keep].sort().values


def ridge_lstsq(weight: Tensor, inputs: Tensor, kept: Tensor, damping: float, target: Tensor) -> Tensor:
    """min ‖W X − Ŵ X_M‖² + λ‖Ŵ − A‖² by stacking, with A = ``target``."""
    strength = (damping * inputs.square().sum(0).mean()).sqrt()
    left = torch.cat([inputs[:, kept], strength * torch.eye(len(kept), dtype=torch.float64)])
    right = torch.cat([inputs @ weight.double().T, strength * target.double().T])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize(("out", "width", "keep"), SHAPES)
@pytest.mark.parametrize("ridge", ["original", "zero"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_restored_weight_is_the_damped_least_squares_solution(
    ridge: str, out: int, width: int, keep: int, conditioning: str, dtype: torch.dtype
) -> None:
    weight, inputs = problem(out, width, conditioning, dtype)
    kept = kept_columns(width, keep)
    found = restore_weight(weight, inputs.T @ inputs, kept, damping=1e-2, ridge=ridge)
    target = weight[:, kept] if ridge == "original" else torch.zeros(out, keep)
    expected = ridge_lstsq(weight, inputs, kept, 1e-2, target)
    assert found.solver == "cholesky"
    assert found.damping == 1e-2
    torch.testing.assert_close(found.weight, expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("ridge", ["original", "zero"])
def test_undamped_restoration_reaches_the_least_error(ridge: str, conditioning: str) -> None:
    """Singular systems have many solutions: what counts is the error, which none can undercut."""
    weight, inputs = problem(6, 20, conditioning)
    kept = kept_columns(20, 13)
    gram = inputs.T @ inputs
    found = restore_weight(weight, gram, kept, damping=0.0, ridge=ridge)
    best = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T, driver="gelsd").solution.T
    least, reached = ((inputs @ weight.T - inputs[:, kept] @ to.T).square().sum() for to in (best, found.weight))
    assert reached <= least + 1e-5 * (inputs @ weight.T).square().sum()


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.1, 10.0])
def test_restoration_towards_the_original_never_raises_the_error(damping: float, conditioning: str) -> None:
    weight, inputs = problem(6, 20, conditioning)
    kept = kept_columns(20, 13)
    gram = inputs.T @ inputs
    restored = restore_weight(weight, gram, kept, damping=damping).weight
    plain, found = ((inputs @ weight.T - inputs[:, kept] @ to.T).square().sum() for to in (weight[:, kept], restored))
    assert found <= plain * (1 + 1e-9)


def test_heavy_damping_pulls_towards_the_anchor() -> None:
    weight, inputs = problem(6, 20, "well")
    kept = kept_columns(20, 13)
    gram = inputs.T @ inputs
    to_original = restore_weight(weight, gram, kept, damping=1e9, ridge="original").weight
    to_zero = restore_weight(weight, gram, kept, damping=1e9, ridge="zero").weight
    torch.testing.assert_close(to_original, weight[:, kept], atol=1e-6, rtol=0)
    torch.testing.assert_close(to_zero, torch.zeros_like(to_zero), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ridge", ["original", "zero"])
def test_keeping_all_columns_is_the_identity(ridge: str) -> None:
    weight, inputs = problem(6, 20, "rank-deficient")
    found = restore_weight(weight, inputs.T @ inputs, torch.arange(20), damping=0.1, ridge=ridge)
    assert torch.equal(found.weight, weight)
    assert found.solver == "none"


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("ridge", ["original", "zero"])
def test_dead_columns_do_not_break_the_solve(ridge: str, damping: float) -> None:
    weight, inputs = problem(6, 20, "well")
    dead = [0, 7, 19]
    inputs[:, dead] = 0
    kept = torch.tensor([0, 1, 2, 4, 5, 7, 8, 11, 19])
    gram = inputs.T @ inputs
    found = restore_weight(weight, gram, kept, damping=damping, ridge=ridge)
    assert found.weight.isfinite().all()
    assert found.solver == "cholesky"
    alive = torch.tensor([column for column in kept.tolist() if column not in dead])
    expected = restore_weight(weight, gram, alive, damping=damping, ridge=ridge).weight
    torch.testing.assert_close(found.weight[:, torch.isin(kept, alive)], expected, atol=1e-9, rtol=1e-9)


def test_inputs_that_are_zero_everywhere_restore_nothing() -> None:
    weight = torch.randn(4, 6)
    found = restore_weight(weight, torch.zeros(6, 6, dtype=torch.float64), torch.arange(3), damping=0.1)
    torch.testing.assert_close(found.weight, weight[:, :3].double())


def test_singular_system_climbs_the_damping_ladder() -> None:
    weight, inputs = problem(6, 20, "few-tokens")
    found = restore_weight(weight, inputs.T @ inputs, torch.arange(15), damping=0.0)
    assert found.solver == "cholesky"
    assert 0 < found.damping <= 1e-6


def test_pivot_of_rounding_is_not_solved_with() -> None:
    """The factorisation of two equal columns may succeed on what rounding left of the second."""
    gram = torch.ones(3, 3, dtype=torch.float64)
    gram[1, 1] += torch.finfo(torch.float64).eps
    found = restore_weight(torch.ones(1, 3), gram, torch.arange(2), damping=0.0)
    assert found.damping > 0
    torch.testing.assert_close(found.weight, torch.full((1, 2), 1.5, dtype=torch.float64), atol=1e-4, rtol=0)


def test_indefinite_gram_falls_to_the_eigendecomposition() -> None:
    weight, inputs = problem(6, 20, "well")
    gram = inputs.T @ inputs
    values, vectors = torch.linalg.eigh(gram)
    values[0] = -values[-1] / 2  # damage beyond what damping may hide
    found = restore_weight(weight, (vectors * values) @ vectors.T, torch.arange(15), damping=1e-6)
    assert found.solver == "eigh"
    assert found.weight.isfinite().all()


def test_bias_and_weight_refitted_together_are_least_squares_with_a_column_of_ones() -> None:
    weight, inputs = problem(6, 20, "well")
    bias, kept = torch.randn(6, dtype=torch.float64), kept_columns(20, 13)
    gram, mean = inputs.T @ inputs, inputs.mean(0)
    problem_of_both = LeastSquares(weight, Moments(gram, mean, len(inputs)), kept)
    restored = least_squares.restore_weight(problem_of_both, damping=0.0).weight
    refitted = refit_bias(bias, weight, restored, mean, kept)
    ones = torch.ones(len(inputs), 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([inputs[:, kept], ones], 1), inputs @ weight.T + bias).solution.T
    torch.testing.assert_close(restored, solution[:, :-1], atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(refitted, solution[:, -1], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("centred", [False, True])
def test_energies_are_the_squared_norms_of_the_outputs(centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric.panels, "__defaults__", (5,))
    weight, inputs = problem(6, 20, "well")
    kept = kept_columns(20, 13)
    removed = torch.tensor([column for column in range(20) if column not in kept])
    restored, outputs = torch.randn(6, 13, dtype=torch.float64), inputs @ weight.T
    gram = inputs.T @ inputs
    found = LeastSquares(weight, Moments(gram, inputs.mean(0), len(inputs)) if centred else Moments(gram), kept)
    exact = outputs - inputs[:, kept] @ restored.T
    energies, errors = found.energies(), found.errors(restored)
    torch.testing.assert_close(energies, outputs.square().sum(0))
    torch.testing.assert_close(errors, exact.square().sum(0))
    torch.testing.assert_close(found.plain(), (inputs[:, removed] @ weight[:, removed].T).square().sum(0))
    torch.testing.assert_close(found.errors(weight[:, kept]), found.plain())
    assert relative_error(errors, energies) == pytest.approx((exact.norm() / outputs.norm()).item())


def test_error_with_a_refitted_bias_is_that_of_inputs_less_their_means() -> None:
    """Of the bias refitted on other tokens too, as for those held back."""
    weight, inputs = problem(6, 20, "well")
    kept, mean, other = kept_columns(20, 13), inputs.mean(0), torch.randn(20, dtype=torch.float64)
    restored = torch.randn(6, 13, dtype=torch.float64)
    found = LeastSquares(weight, Moments(inputs.T @ inputs, mean, len(inputs)), kept)
    for about in (mean, other):
        exact = (inputs - about) @ weight.T - (inputs - about)[:, kept] @ restored.T
        torch.testing.assert_close(found.errors(restored, about), exact.square().sum(0))


def test_error_per_output_weighs_all_outputs_alike() -> None:
    energies, residuals = torch.tensor([4.0, 1e12, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 9.0])
    assert error_per_output(residuals, energies) == pytest.approx(((0.25 + 0 + 1) / 3) ** 0.5)  # at most 1 each
    assert error_per_output(torch.zeros(2), torch.zeros(2)) == relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(residuals, energies) < 1e-5


def test_bad_settings_are_named() -> None:
    gram = torch.eye(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"damping must be >= 0, got -1"):
        restore_weight(torch.ones(2, 4), gram, torch.arange(2), damping=-1)
    with pytest.raises(ValueError, match="ridge must be 'original' or 'zero', got 'mean'"):
        restore_weight(torch.ones(2, 4), gram, torch.arange(2), damping=0.1, ridge="mean")


def test_rounding_of_the_gram_is_not_taken_for_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without damping, a singular gram summed in float32 gives the solution of the directions that have energy."""
    monkeypatch.setattr(least_squares, "LADDER", (1.0,))
    weight, inputs = problem(6, 40, "few-tokens")
    kept, exact = torch.arange(30), inputs.T @ inputs
    found = restore_weight(weight, exact.float(), kept, damping=0.0)
    assert found.solver == "eigh"
    moments = weight[:, 30:] @ exact[30:, :30]
    expected = weight[:, :30] + moments @ torch.linalg.pinv(exact[:30, :30], rtol=1e-9, hermitian=True)
    torch.testing.assert_close(found.weight, expected, atol=1e-3, rtol=1e-3)
