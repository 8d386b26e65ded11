"""``fasp schedule``: the schedule of a config's pruning as a YAML file to edit, with what each event leaves."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from fasp_lightning.cli.commands.lightning import TrainingCLI
from fasp_lightning.cli.commands.rehearsing import planned, pruning_callbacks, shapes
from fasp_lightning.cli.console import note, percent
from fasp_lightning.cli.quiet import one_thread, quiet_libraries
from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.budget.budget import Budget
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.training.rehearsal import passed_over, rehearse
from fasp_lightning.training.schedule import PruningSchedule, ScheduledPruning

HEADER = """\
# When {model} is pruned, and how far. Sparsity is cumulative: counted from the original model.
# Edit the entries (step: optimizer steps done; epoch: from 0, at its start), and give this file as the schedule of
# FASPPruning: fasp fit -c CONFIG --trainer.callbacks.schedule FILE, where FASPPruning is the last callback.
"""


def run(command: str, argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        command: Its name.
        argv: Options of ``fasp fit``, and ``--output FILE``.

    Returns:
        The exit code.

    Raises:
        FaspError: If the arguments do not fit, or no callback prunes.
        FaspError: If the schedule is refused, or an event's sparsity cannot be reached.
    """
    quiet_libraries()
    settings = ScheduleCLI(argv).settings
    schedule, pruning = planned(_pruning_callback(settings))
    with one_thread():
        model = shapes(settings.model)
        text = HEADER.format(model=settings.model.name_or_path or f"a new {model.config.model_type} model")
        text += "".join(_entries(model, schedule, pruning))
    if settings.output is None:
        sys.stdout.write(text)
    else:
        Path(settings.output).write_text(text, encoding="utf-8")
        note(f"schedule of {len(schedule)} events written to {settings.output}")
    return 0


class ScheduleCLI(TrainingCLI):
    """Parses what ``fasp fit`` takes, and constructs nothing.

    Args:
        argv: The arguments.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        super().__init__("fit", argv, "fasp schedule")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what ``fasp fit`` has not."""
        super().add_arguments_to_parser(parser)
        parser.description = "Write the schedule of the pruning in the options of fasp fit as YAML."
        parser.add_argument("--output", type=str | None, default=None, help="File to write; by default stdout.")

    def instantiate_classes(self) -> None:
        """Keep the parsed options."""
        self.settings = self.config["fit"]

    def _run_subcommand(self, subcommand: str) -> None:
        """Do not fit."""


def _pruning_callback(settings: Any) -> Any:
    """The options of the one FASPPruning."""
    found = pruning_callbacks(settings)
    if len(found) != 1:
        raise FaspError(
            f"trainer.callbacks must hold one FASPPruning with a schedule, got {len(found)}; name a config by -c, "
            "or add --trainer.callbacks+=FASPPruning --trainer.callbacks.schedule ..."
        )
    return found[0]


def _entries(model: Any, schedule: PruningSchedule, pruning: PruningConfig) -> Iterator[str]:
    """One YAML list entry an event, with what it leaves as a comment."""
    budgets = rehearse(model, schedule, pruning)
    if idle := passed_over(schedule, budgets):
        note(idle)
    for index, (event, budget) in enumerate(zip(schedule, budgets, strict=True)):
        yield from _entry(index, event, budget)


def _entry(index: int, event: ScheduledPruning, budget: Budget) -> Iterator[str]:
    original, left = budget.original_parameters, budget.parameters_after
    reached = "" if budget.changes else "; as before it: passed over"
    yield f"\n# event {index}: {left:,} of {original:,} parameters left ({percent(left / original)}){reached}\n"
    yield from (f"#   {line}\n" for line in _widths(budget))
    first, *rest = (f"{name}: {value!r}" for name, value in event.to_dict().items())
    yield f"- {first}\n"
    yield from (f"  {line}\n" for line in rest)


def _widths(budget: Budget) -> Iterator[str]:
    """One line for each kind of pair: its width in all blocks, or in each where they differ."""
    kinds = {pair.kind: pair.layer.rpartition(".")[2] for block in budget.pairs for pair in block}
    for kind, layer in kinds.items():
        pairs = [pair for block in budget.pairs for pair in block if pair.kind == kind]
        after = [pair.after for pair in pairs]
        shown = f"{after[0]} in each block" if len(set(after)) == 1 else f"{', '.join(map(str, after))} by block"
        shown += ", more or less as calibration decides" if budget.decided_later(kind) else ""
        yield f"{kind} width ({layer}): {shown}, of {pairs[0].original}"
