"""Damping that is chosen on tokens held back: it is the best of the grid there, and never a loss."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from oracle import least_squares
from tiny import random_tokens, tiny_model
from tiny_pruning import FFN, basic
from torch import Tensor

from fasp_lightning import FASPPruner, PruningConfig
from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning import round
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.report import PairReport
from fasp_lightning.pruning.restore import FALLBACK, GRID, Restored, restore_pair
from fasp_lightning.structure.plan import resolve_pruned

AUTO = basic(0.3, attention="value_dims", damping="auto")
FAMILIES = pytest.mark.parametrize("family", ["opt", "llama-gqa"])  # with and without a bias that is refitted
KINDS = pytest.mark.parametrize("kind", ["value", "ffn"])


class Problem(NamedTuple):
    """A pair of the first block, the columns it keeps, and raw inputs of its consumer."""

    pair: Any
    width: Any
    kept: Tensor
    fitted: Tensor
    held: Tensor

    @classmethod
    def of(cls, family: str, kind: str, tokens: int = 60, noise: float = 0.0, seed: int = 0) -> Problem:
        """Inputs that hang together, and have means; those held back are ``noise`` different ones."""
        model = tiny_model(family)
        place = ["value", "ffn"].index(kind)
        pair, width = resolve_pruned(model)[0][place], decide_budget(model, AUTO).pairs[0][place]
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        common, other = draw(12, pair.columns), draw(12, pair.columns)

        def inputs(count: int, noise: float) -> Tensor:
            directions = (1 - noise) * common + noise * other
            return 1 + draw(count, 12) @ directions + 0.3 * draw(count, pair.columns)

        kept = torch.arange(pair.columns)[torch.arange(pair.columns) % 3 > 0]
        return cls(pair, width, kept, inputs(tokens, 0.0), inputs(200, noise))

    def restored(self, config: PruningConfig = AUTO, together: bool = False) -> tuple[Restored, PairReport]:
        """By the package; ``together`` has no token held back."""
        fitted, held = statistics(self.fitted), statistics(self.held)
        if together:
            return restore_pair(self.pair, self.width, self.kept, statistics(self.fitted, self.held), None, config)
        return restore_pair(self.pair, self.width, self.kept, fitted, held, config)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """‖(W X + b) − (Ŵ X_M + b̂)‖² on the inputs held back."""
        full = self.pair.weight.double()
        found = self.held @ full.T - self.held[:, self.kept] @ weight.double().T
        if bias is not None:
            found = found + self.pair.consumer.bias.detach() - bias.double()
        return float(found.square().sum())

    @property
    def unrestored(self) -> float:
        return self.error(self.pair.weight[:, self.kept], None)

    def oracle(self, damping: float) -> float:
        """Error on the inputs held back of least squares, stacked, on the others."""
        full, columns = self.pair.weight.double(), self.kept.tolist()
        mean = self.fitted.mean(0)
        if getattr(self.pair.consumer, "bias", None) is None:
            return self.error(least_squares(self.fitted, full, columns, damping, "original"), None)
        weight = least_squares(self.fitted - mean, full, columns, damping, "original")
        bias = self.pair.consumer.bias.detach().double() + full @ mean - weight @ mean[self.kept]
        return self.error(weight, bias)


def statistics(*inputs: Tensor) -> GramStatistics:
    found = GramStatistics(inputs[0].shape[1], "cpu")
    for rows in inputs:
        found.update(rows)
    return found


@FAMILIES
@KINDS
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_tokens_held_back_are_never_worse_off(family: str, kind: str, noise: float) -> None:
    for seed in range(5):
        problem = Problem.of(family, kind, noise=noise, seed=seed)
        found, entry = problem.restored()
        error = problem.error(found.factors[0], found.bias)
        assert error <= problem.unrestored * (1 + 1e-6)
        assert entry.solver == "none" or error < problem.unrestored


@FAMILIES
@KINDS
def test_damping_is_the_best_of_the_grid(family: str, kind: str) -> None:
    chosen: set[float | None] = set()
    for noise in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6):
        for tokens in (30, 60, 300):
            problem = Problem.of(family, kind, tokens, noise)
            errors = {damping: problem.oracle(damping) for damping in GRID}
            best = min(GRID, key=errors.__getitem__)
            _, entry = problem.restored()
            if errors[best] < problem.unrestored:
                assert (entry.damping, entry.solver) == (best, "cholesky")
                chosen.add(best)
            else:
                assert entry.solver == "none"
                chosen.add(None)
    assert len(chosen) > 2


@FAMILIES
@KINDS
def test_all_tokens_enter_the_final_solve(family: str, kind: str) -> None:
    problem = Problem.of(family, kind)
    found, entry = problem.restored()
    assert entry.damping in GRID
    expected, plain = problem.restored(replace(AUTO, damping=entry.damping), together=True)
    torch.testing.assert_close(found.factors, expected.factors, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found.bias, expected.bias, atol=1e-5, rtol=1e-3)
    assert (entry.error_before, entry.error_after) == pytest.approx((plain.error_before, plain.error_after), rel=1e-4)
    alone, _ = problem._replace(held=problem.fitted[:0]).restored(replace(AUTO, damping=entry.damping))
    assert (alone.factors[0] - found.factors[0]).abs().max() > 1e-3  # those not held back are not all


def test_weights_stay_where_no_damping_helps() -> None:
    problem = Problem.of("opt", "ffn", noise=1.0)
    found, entry = problem.restored()
    assert torch.equal(found.factors[0], problem.pair.weight[:, problem.kept].double())
    assert found.bias is None
    assert (entry.damping, entry.solver, found.singular) == (0.0, "none", False)
    assert entry.error_after == entry.error_before > 0


@pytest.mark.parametrize("held", [None, GramStatistics(48, "cpu")], ids=["nothing", "no-token"])
def test_without_tokens_held_back_the_damping_is_the_fallback(held: GramStatistics | None) -> None:
    problem = Problem.of("opt", "ffn")
    _, entry = restore_pair(problem.pair, problem.width, problem.kept, statistics(problem.fitted), held, AUTO)
    assert (entry.damping, entry.solver) == (FALLBACK, "cholesky")


@FAMILIES
def test_few_samples_are_fitted_as_a_whole(family: str) -> None:
    """Three batches: the outcome is that of the fallback, to the bit."""
    batches = [random_tokens(2, 40, seed=seed) for seed in range(3)]
    models = [tiny_model(family) for _ in range(2)]
    for model, config in zip(models, (AUTO, replace(AUTO, damping=FALLBACK)), strict=True):
        report = FASPPruner(config).prune(model, batches)
        assert {pair.damping for pair in report.pairs} == {FALLBACK}
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@FAMILIES
def test_engine_never_makes_tokens_held_back_worse(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gains, tokens = [], []

    def watched(pair: Any, width: Any, kept: Tensor, fitted: Any, held: Any, config: Any, bases: Any) -> Any:
        original, gram, mean, counts = pair.weight.double(), held.gram(), held.mean(), (fitted.tokens, held.tokens)
        result = restore_pair(pair, width, kept, fitted, held, config, bases)
        tokens.append((*counts, fitted.tokens))
        removed = original.clone()
        removed[:, kept] = 0
        difference = original.clone()
        difference[:, kept] -= result[0].factors[0]
        constant = torch.zeros(original.shape[0], dtype=torch.float64)
        if result[0].bias is not None:
            constant = pair.consumer.bias.detach().double() - result[0].bias
        # Σ ‖D x + c‖² = tr(D G Dᵀ) + 2 T cᵀ D μ + T ‖c‖²
        error = ((difference @ gram) * difference).sum() + 2 * held.tokens * constant @ difference @ mean
        error += held.tokens * constant.square().sum()
        gains.append(float(((removed @ gram) * removed).sum() - error))
        return result

    monkeypatch.setattr(round, "restore_pair", watched)
    batches = [random_tokens(2, 40, seed=seed) for seed in range(9)]
    report = FASPPruner(AUTO).prune(tiny_model(family), batches)
    assert len(gains) == 4
    assert min(gains) >= -1e-6
    assert max(gains) > 0
    assert set(tokens) == {(7 * 80, 2 * 80, 9 * 80)}  # the fourth and the eighth batch are held back
    assert {pair.damping for pair in report.pairs} <= {0.0, *GRID}
    assert report.tokens == 9 * 80


def test_nothing_is_held_back_for_a_given_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*arguments: Any) -> Any:
        seen.append(arguments[4])
        return restore_pair(*arguments)

    monkeypatch.setattr(round, "restore_pair", watched)
    FASPPruner(FFN).prune(tiny_model("llama"), [random_tokens(2, 40, seed=seed) for seed in range(8)])
    assert seen == [None, None]


@pytest.mark.parametrize(("damping", "warned"), [("auto", False), (0.0, True), (0.01, False)])
def test_singular_grams_are_warned_of_where_they_matter(damping: Any, warned: bool) -> None:
    """Each damping of the grid makes a gram regular; none does not."""
    batches = [random_tokens(1, 5, seed=seed) for seed in range(4)]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        report = FASPPruner(basic(0.2, attention="none", damping=damping)).prune(tiny_model("llama"), batches)
    singular = [message for message in report.warnings if "the gram was singular" in message]
    assert len(singular) == (2 if warned else 0)
    assert any("20 calibration tokens are fewer" in message for message in report.warnings)
