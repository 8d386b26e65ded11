"""What a run's loggers and its console are told of a pruning."""

from __future__ import annotations

import io
from collections.abc import Iterable

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from fasp_lightning.pruning.report import PruningReport
from fasp_lightning.training.events import EventRecord
from fasp_lightning.training.progress import show_text
from fasp_lightning.training.surgery import publish

COLUMNS = {
    "step": "step",
    "sparsity": "sparsity",
    "sparsity_total": "(all)",
    "parameters": "parameters",
    "perplexity_before": "perplexity before",
    "perplexity_pruned": "pruned",
    "perplexity_recovered": "recovered",
    "seconds": "seconds",
}
FORMATS = {"step": "d", "parameters": ",d", "sparsity": ".3f", "sparsity_total": ".3f", "seconds": ".1f"}


def tell_event(trainer: Trainer, record: EventRecord, report: PruningReport) -> None:
    """Scalars to every logger: the event's own, then width and relative error of each pair that was cut."""
    publish(trainer, record.metrics())
    pairs = {f"fasp_width/{pair.layer}": float(pair.width_after) for pair in report.pairs}
    pairs |= {f"fasp_error/{pair.layer}": pair.error_after for pair in report.pairs}
    pairs |= {f"fasp_error_unrestored/{pair.layer}": pair.error_before for pair in report.pairs}
    if pairs:
        publish(trainer, pairs)


def tell_history(trainer: Trainer, records: Iterable[EventRecord]) -> None:
    """All events so far as one table: on the console, and as a text of TensorBoard."""
    rows = [[_cell(record, name) for name in COLUMNS] for record in records]
    show_text(trainer, _table(rows))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *rows]
            text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            logger.experiment.add_text("fasp/events", text, trainer.global_step)


def _cell(record: EventRecord, name: str) -> str:
    value = getattr(record, name)
    return "" if value is None else format(value, FORMATS.get(name, ".2f"))


def _table(rows: list[list[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="FASP pruning", title_justify="left")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=110).print(table)
    return stream.getvalue().rstrip()
