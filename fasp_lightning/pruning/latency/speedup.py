"""Which sparsity makes a model so many times faster on this machine, and how much faster a pruned one is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.budget.budget import Budget
from fasp_lightning.pruning.budget.widths import budget_towards
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.pruning.latency.curve import Curve, least_sparsity
from fasp_lightning.pruning.latency.sample import Sample, layer_kinds, make_samples, require_alike, shapes_of
from fasp_lightning.pruning.latency.serving import PHASES, Serving, require_speedup
from fasp_lightning.pruning.latency.stopwatch import Clock, Passes, WallClock, repeated
from fasp_lightning.structure.configs.text_part import text_config
from fasp_lightning.structure.modes import evaluating, own_modes
from fasp_lightning.structure.plan import plan_in, resolve_pruned

GRID = 100
"""Sparsities are tried in steps of one part in so many."""

TIMED = 4
"""Widths that are timed beside the original one."""


@dataclass(frozen=True)
class Speedup:
    """How fast two models are.

    Attributes:
        before: Phase → seconds of one pass of the dense model.
        after: The same of the pruned one.
    """

    before: dict[str, float]
    after: dict[str, float]

    def of(self, phase: str) -> float:
        """How many times faster a phase is."""
        return self.before[phase] / self.after[phase]


@dataclass(frozen=True)
class SpeedupPlan:
    """The least sparsity that is predicted to be fast enough.

    Attributes:
        factor: The speed-up that was asked for.
        serving: Of what.
        sparsity: What to ask of the pruning; rounding to widths makes of it what the budget says.
        predicted: How fast it will be.
    """

    factor: float
    serving: Serving
    sparsity: float
    predicted: Speedup


@own_modes()
def plan_speedup(
    config: Any,
    factor: float,
    serving: Serving | None = None,
    pruning: PruningConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    clock: Clock | None = None,
) -> SpeedupPlan:
    """Find the least sparsity at which a model is so many times faster on this machine.

    Blocks of a few widths are timed with random weights, and what stays as it is along with them: attention over the
    context, norms, head and embeddings. With adaptive allocation all blocks are taken to have the mean width.

    Args:
        config: The dense model's transformers config.
        factor: The speed-up, more than 1.
        serving: How the model is served.
        pruning: The settings, but for the sparsity.
        dtype: In which it is served.
        device: Where.
        attn_implementation: As for ``from_pretrained``.
        trust_remote_code: As there.
        clock: What measures; by default the time on the device.

    Raises:
        FaspError: If that is not reached at any sparsity (the message names the highest speed-up), the model is pruned
            already, too short for the prompt, or has blocks with other pairs than the first.

    Example::

        from fasp_lightning import FASPPruner, PruningConfig, Serving, plan_speedup

        found = plan_speedup(model.config, 1.05, Serving(prompt=16, new=8, phase="prefill"))
        FASPPruner(PruningConfig(sparsity=found.sparsity)).prune(model, batches)
    """
    serving, pruning, device = serving or Serving(), pruning or PruningConfig(), torch.device(device)
    require_speedup(factor)
    if plan_in(config) is not None:
        raise FaspError(
            "speedup counts from the dense model, got one that is pruned already; give its sparsity instead"
        )
    config = text_config(config)
    options = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    require_alike(config, pruning.whole, **options)
    shapes = shapes_of(config, list(layer_kinds(config))[:1], **options)
    inputs = ModelInputs(shapes)
    if inputs.table is not None:  # computed positions take as long beyond those that were trained on
        inputs.check_length(serving.prompt + serving.new, "serving.prompt and serving.new")
    reachable = _reachable(shapes, pruning)
    clock = clock or WallClock(device)
    curve = _timed(config, [budget for _, budget in reachable], serving, clock, device, dtype, options)
    gone = [budget.sparsity for _, budget in reachable]
    index = least_sparsity(curve, gone, factor, serving.phases)
    before = {phase: curve.at(phase, 0.0) for phase in PHASES}
    after = {phase: curve.at(phase, gone[index]) for phase in PHASES}
    return SpeedupPlan(factor, serving, reachable[index][0], Speedup(before, after))


def _reachable(shapes: Any, pruning: PruningConfig) -> list[tuple[float, Budget]]:
    """Sparsities with widths of their own, ascending, and what each makes of the first block."""
    found: list[tuple[float, Budget]] = []
    for sparsity, budget in _tried(shapes, dataclasses.replace(pruning, allocation="uniform")):
        if budget.sparsity > (found[-1][1].sparsity if found else 0.0):
            found.append((sparsity, budget))
    if not found:
        raise FaspError("speedup needs widths that can be cut, got settings that leave none; lower multiple_of")
    return found


def _tried(shapes: Any, pruning: PruningConfig) -> Iterator[tuple[float, Budget]]:
    """Every sparsity of the grid that widths can make, with its budget; of none, why the first one cannot."""
    pairs, refusals = resolve_pruned(shapes, whole=pruning.whole), []
    sparsities = [step / GRID for step in range(1, GRID)]
    for sparsity in sparsities:
        try:
            yield sparsity, budget_towards(shapes, dataclasses.replace(pruning, sparsity=sparsity), pairs)
        except FaspError as error:  # beyond the highest, or between those that whole KV groups make up
            refusals.append(error)
    if len(refusals) == len(sparsities):
        raise refusals[0]


def _timed(
    config: Any,
    budgets: list[Budget],
    serving: Serving,
    clock: Clock,
    device: torch.device,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> Curve:
    """Time the dense widths, and some of the others, evenly spread up to the last."""
    chosen = sorted({round((len(budgets) - 1) * place / TIMED) for place in range(1, TIMED + 1)})
    timed = [budgets[index] for index in chosen]
    dense = tuple(dataclasses.replace(width, after=width.before) for width in timed[0].pairs[0])
    samples = make_samples(config, [dense, *(budget.pairs[0] for budget in timed)], device, dtype, **options)
    seconds = {"decode": _seconds(samples, "decode", serving, clock)}
    for sample in samples:
        sample.shorten()
    seconds["prefill"] = _seconds(samples, "prefill", serving, clock)
    return Curve((0.0, *(budget.sparsity for budget in timed)), seconds)


def _seconds(samples: list[Sample], phase: str, serving: Serving, clock: Clock) -> tuple[float, ...]:
    """Seconds that the whole model takes for a phase, in the width of each sample."""
    passes = [Passes(sample.model, serving, clock, sample.blocks) for sample in samples]
    with ExitStack() as stack:
        for sample in samples:
            stack.enter_context(evaluating(sample.model))
        parts = repeated([getattr(one, phase) for one in passes])
    return tuple(sample.whole(times) for sample, times in zip(samples, parts, strict=True))


@own_modes()
def measure_speedup(dense: Any, pruned: Any, serving: Serving | None = None, clock: Clock | None = None) -> Speedup:
    """Time two models in turn, and take medians.

    Args:
        dense: The dense model.
        pruned: The pruned one, on the same device.
        serving: How they are served.
        clock: What measures; by default the time on the device.
    """
    serving = serving or Serving()
    clock = clock or WallClock(dense.get_input_embeddings().weight.device)
    both = [Passes(model, serving, clock) for model in (dense, pruned)]
    with evaluating(dense), evaluating(pruned):
        found = {phase: repeated([getattr(passes, phase) for passes in both]) for phase in PHASES}
    before, after = ({phase: found[phase][place][0] for phase in PHASES} for place in range(2))
    return Speedup(before, after)
