"""What a run's loggers and its console show of a pruning."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from fasp_lightning.pruning.budget.widths import present_budget
from fasp_lightning.pruning.report import PruningReport
from fasp_lightning.training.events import Quality
from fasp_lightning.training.schedule import PruningSchedule
from fasp_lightning.training.trainer.surgery import publish

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLUMNS = {
    "step": "step",
    "sparsity": "sparsity",
    "sparsity_total": "(all)",
    "parameters": "parameters",
    "perplexity_before": "perplexity before",
    "perplexity_pruned": "pruned",
    "perplexity_recovered": "recovered",
    "kl_pruned": "KL pruned",
    "kl_recovered": "recovered",
    "seconds": "seconds",
}
"""Fields of :class:`EventRecord` that the table of events shows where any event has them, and their titles."""

LAYOUT = {
    "FASP": {
        "loss": ["Multiline", ["train_loss", "val_loss"]],
        "perplexity, up at an event, down in recovery": ["Multiline", ["^fasp/perplexity$"]],
        "divergence from the teacher": ["Multiline", ["train_kl", "^fasp/kl$"]],
        "sparsity: of the blocks, of all parameters": ["Multiline", ["^fasp/sparsity$", "^fasp/sparsity_total$"]],
        "width of each pair": ["Multiline", ["fasp_width/.*"]],
        "relative error per output, restored, mean of a kind": ["Multiline", ["fasp/output_error_.*"]],
        "relative error, restored": ["Multiline", ["fasp_error/.*"]],
        "relative error, not restored": ["Multiline", ["fasp_error_unrestored/.*"]],
    }
}
"""Charts on TensorBoard's page "Custom Scalars": all of a run, with a line for each pair."""

FORMATS = {"step": "d", "parameters": ",d", "sparsity": ".3f", "sparsity_total": ".3f", "seconds": ".1f"}
FORMATS |= {"kl_pruned": ".4f", "kl_recovered": ".4f"}
"""How the table writes numbers; others with two decimals."""


@dataclass
class EventRecord:
    """What one event did; plain numbers.

    Attributes:
        step: Optimizer steps that were done before it.
        sparsity: Fraction of the original blocks' linear parameters that is gone.
        sparsity_total: Fraction of all original parameters that is gone.
        parameters: Parameters left, adapters not counted.
        seconds: Wall-clock time of calibration and pruning.
        perplexity_before: On the validation batches, before the event; ``None`` without validation data.
        perplexity_pruned: Likewise right after the event.
        perplexity_recovered: Likewise at the next event or the end of the run; ``None`` until then.
        kl_pruned: Mean KL from the teacher on the validation batches, right after the event, in nats a token; ``None``
            without a teacher.
        kl_recovered: Likewise at the next event or the end of the run.
    """

    step: int
    sparsity: float
    sparsity_total: float
    parameters: int
    seconds: float
    perplexity_before: float | None = None
    perplexity_pruned: float | None = None
    perplexity_recovered: float | None = None
    kl_pruned: float | None = None
    kl_recovered: float | None = None

    def metrics(self) -> dict[str, float]:
        """Name → value for loggers, without what was not measured.

        Sparsity and parameters are left to :func:`report_structure`, which reads them from the model.
        """
        own = ("seconds", "perplexity_before", "perplexity_pruned", "kl_pruned")
        return {f"fasp/{key}": value for key, value in asdict(self).items() if key in own and value is not None}


def new_record(step: int, report: PruningReport, seconds: float, before: Quality, pruned: Quality) -> EventRecord:
    """The record of an event that has just happened.

    Args:
        step: Optimizer steps that were done before it.
        report: What was pruned.
        seconds: How long that took.
        before: The model's quality before it.
        pruned: And after it.
    """
    return EventRecord(
        step=step,
        sparsity=report.sparsity,
        sparsity_total=report.sparsity_total,
        parameters=report.parameters_after,
        seconds=seconds,
        perplexity_before=before.perplexity,
        perplexity_pruned=pruned.perplexity,
        kl_pruned=pruned.divergence,
    )


def report_structure(trainer: Trainer, model: PreTrainedModel, quality: Quality, before: bool = False) -> None:
    """Log what the model is: sparsity, parameters, the width of each pair, and its quality as far as that was measured.

    To be called before and after each event and at the end of the run, so that charts show a stair at each event. What
    was before an event stands at the last step that was trained with it, one to the left; an event at step 0 has both
    values at step 0, of which a chart may draw the later one alone.

    Args:
        trainer: The Trainer.
        model: The causal LM.
        quality: On the validation batches.
        before: Whether this is the model before an event.
    """
    budget = present_budget(model)
    scalars = {
        "fasp/sparsity": budget.sparsity,
        "fasp/sparsity_total": budget.sparsity_total,
        "fasp/parameters": float(budget.parameters_after),
    }
    pairs = {f"fasp_width/{pair.layer}": float(pair.dims_left) for block in budget.pairs for pair in block}
    quality_of = {"fasp/perplexity": quality.perplexity, "fasp/kl": quality.divergence}
    measured = {name: value for name, value in quality_of.items() if value is not None}
    publish(trainer, scalars | pairs | measured, max(0, trainer.global_step - before))


def report_event(trainer: Trainer, record: EventRecord, report: PruningReport) -> None:
    """Log an event: its own numbers, the error per output of each kind of pair, and the error of each pair cut."""
    outputs = {
        f"fasp/output_error_{kind}": fmean(pair.output_error_after for pair in report.pairs if pair.kind == kind)
        for kind in sorted({pair.kind for pair in report.pairs})
    }
    publish(trainer, record.metrics() | outputs)
    errors = {f"fasp_error/{pair.layer}": pair.error_after for pair in report.pairs}
    publish(trainer, errors | {f"fasp_error_unrestored/{pair.layer}": pair.error_before for pair in report.pairs})


def report_recovered(trainer: Trainer, records: Sequence[EventRecord], quality: Quality) -> None:
    """Note and log the quality that the recovery from the last event ends with."""
    if not records:
        return
    found = {"perplexity_recovered": quality.perplexity, "kl_recovered": quality.divergence}
    for name, value in found.items():
        if value is not None:
            setattr(records[-1], name, value)
            publish(trainer, {f"fasp/{name}": value})


def report_missed(schedule: PruningSchedule, done: int) -> None:
    """Warn of the first event that did not happen: a run may end early, or its length be unknown when it starts.

    Args:
        schedule: All events.
        done: How many of them happened.
    """
    for event in list(schedule)[done:][:1]:
        rank_zero_warn(
            f"the run ended before schedule entry {done}, {event.to_dict()!r}: the model is less pruned than the "
            "schedule says"
        )


def report_history(trainer: Trainer, records: Sequence[EventRecord]) -> None:
    """Show all events so far as one table: on the console, and as a text in TensorBoard, where charts are laid out."""
    shown = [name for name in COLUMNS if "kl" not in name or any(getattr(one, name) is not None for one in records)]
    titles = [COLUMNS[name] for name in shown]
    rows = [[_cell(record, name) for name in shown] for record in records]
    show_text(trainer, _table(titles, rows))
    lines = [titles, ["---"] * len(titles), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text("fasp/events", text, trainer.global_step)
            logger.experiment.add_custom_scalars(LAYOUT)


def _cell(record: EventRecord, name: str) -> str:
    value = getattr(record, name)
    return "" if value is None else format(value, FORMATS.get(name, ".2f"))


def _table(titles: list[str], rows: list[list[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="FASP pruning", title_justify="left")
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=110).print(table)
    return stream.getvalue().rstrip()


def show_text(trainer: Trainer, text: str) -> None:
    """Print lines above the Trainer's progress bar, in the first process; where there is none, log them."""
    bar = trainer.progress_bar_callback
    if bar is None:
        rank_zero_info(text)
    elif trainer.is_global_zero:
        bar.print(text)
