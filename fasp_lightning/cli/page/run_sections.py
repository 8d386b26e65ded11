"""The sections about a training run and a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fasp_lightning.cli.console import megabytes
from fasp_lightning.cli.page.charts import Series, plot
from fasp_lightning.cli.page.models import Model
from fasp_lightning.cli.page.parts import (
    UNKNOWN,
    Chapter,
    Charts,
    Note,
    Part,
    Section,
    Table,
    number,
    percent,
    settings_table,
)
from fasp_lightning.cli.page.runs import Run
from fasp_lightning.cli.page.task_parts import compared_parts

MOST = 400
"""Points of a curve; of more, some are left out."""

PERPLEXITIES = {
    "perplexity_before": "perplexity before",
    "perplexity_pruned": "pruned",
    "perplexity_recovered": "recovered",
}
DIVERGENCES = {"kl_pruned": "KL pruned", "kl_recovered": "KL recovered"}
AROUND = ("perplexity_before", "perplexity_pruned")
TEACHER = (
    "The divergence is KL(teacher ‖ student) of the next token: that of training on the batches of the training, the "
    "others on the run's validation text."
)
LOSSES = {"train_loss": 0, "val_loss": 1}


def run_chapter(run: Run) -> Chapter:
    """All about one run."""
    events = f"{len(run.events)} pruning event{'' if len(run.events) == 1 else 's'}"
    sections = [
        Section("Timeline", _timeline(run)),
        Section("Events", _events(run)),
        Section("Loss", _losses(run)),
        Section("Checkpoints", _checkpoints(run)),
        Section("Settings of the run", _settings(run)),
    ]
    return Chapter(run.name, f"training run, {events}", sections)


def _timeline(run: Run) -> list[Part]:
    steps = [event["step"] for event in run.events if "step" in event]
    perplexities = [
        Series("of validation", _curve(run, "val_perplexity"), color=0),
        Series("around the events", _curve(run, "fasp/perplexity") or _at_events(run, *AROUND), color=1),
        Series("right after an event", _at_events(run, "perplexity_pruned"), "dots", color=2),
    ]
    divergences = [
        Series("of training", _curve(run, "train_kl"), color=0),
        Series("around the events", _curve(run, "fasp/kl"), color=1),
        Series("right after an event", _at_events(run, "kl_pruned"), "dots", color=2),
    ]
    reached = _curve(run, "fasp/sparsity") or [(e["step"], e["sparsity"]) for e in run.events if "sparsity" in e]
    sparsities = [
        Series("of the blocks, reached", _per_cent(reached), "stairs", 0),
        Series("of all parameters", _per_cent(_curve(run, "fasp/sparsity_total")), "stairs", 1),
        Series("of the blocks, asked", _per_cent(list(run.schedule.items())), "dots", 2),
    ]
    charts = [
        plot("perplexity over steps", perplexities, "optimizer steps", "perplexity", marks=steps),
        plot("divergence from the teacher over steps", divergences, "optimizer steps", "nats a token", marks=steps),
        plot("sparsity over steps", sparsities, "optimizer steps", "%", zero=True, marks=steps),
    ]
    shown = [chart for chart in charts if chart]
    if not shown:
        return [Note("Not recorded: neither a logger's files nor a checkpoint tells of an event.")]
    told = "" if run.scalars else " No logger's files are there: what was between the events is not known."
    return [
        Charts(shown),
        Note(
            "Vertical lines are events. Perplexities are on the run's validation text: those around the events on as "
            f"many batches as validation_batches says, those of validation on as many as limit_val_batches.{told}"
        ),
        *([Note(TEACHER)] if charts[1] else []),
    ]


def _at_events(run: Run, *names: str) -> list[tuple[float, float]]:
    """What was measured at each event."""
    return [(e["step"], e[name]) for e in run.events for name in names if e.get(name) is not None]


def _per_cent(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(step, 100 * value) for step, value in points]


def _curve(run: Run, name: str) -> list[tuple[int, float]]:
    """At most so many points of a metric, its last one among them."""
    values = run.scalars.get(name, [])
    every = -(-len(values) // MOST) or 1
    return values[::-1][::every][::-1]


def _events(run: Run) -> list[Part]:
    if not run.events:
        return [Note("No event is recorded.")]
    taught = any(event.get(name) is not None for event in run.events for name in DIVERGENCES)
    figures = PERPLEXITIES | (DIVERGENCES if taught else {})
    header = ("step", "sparsity asked", "reached", "of all", "parameters", *figures.values(), "seconds")
    rows = [_event(run, event, figures) for event in run.events]
    parts: list[Part] = [Table(header, rows), Note(f"From {run.source}.")]
    if len(run.schedule) > len(run.events):
        parts.append(
            Note(
                f"The schedule has {len(run.schedule)} entries, and {len(run.events)} pruned: others rounded to "
                "widths that were there already, or the run ended before them.",
                warning=True,
            )
        )
    return parts


def _event(run: Run, event: dict[str, Any], columns: Iterable[str]) -> tuple[str, ...]:
    figures = ["not measured" if event.get(name) is None else number(event[name]) for name in columns]
    step, sparsity, total = (event.get(name) for name in ("step", "sparsity", "sparsity_total"))
    sizes = (
        percent(None if step is None else run.schedule.get(step)),
        percent(sparsity),
        percent(total),
        number(event.get("parameters")),
    )
    return number(step), *sizes, *figures, number(event.get("seconds"), 1)


def _losses(run: Run) -> list[Part]:
    series = [Series(name, _curve(run, name), color=color) for name, color in LOSSES.items()]
    chart = plot("loss over steps", series, "optimizer steps", "loss", marks=[e["step"] for e in run.events])
    return [Charts([chart]) if chart else Note("Not recorded.")]


def _checkpoints(run: Run) -> list[Part]:
    if not run.checkpoints:
        return [Note("None is in the folder.")]
    return [Table(("file", "size"), [(name, megabytes(size)) for name, size in run.checkpoints.items()])]


def _settings(run: Run) -> list[Part]:
    if not run.settings:
        return [Note("Not recorded: the folder has no config.yaml.")]
    return [settings_table(run.settings, "All settings of the run")]


def sweep_chapter(name: str, models: Sequence[Model]) -> Chapter:
    """All sparsities of a sweep side by side."""
    models = sorted(models, key=lambda model: model.facts.asked or 0)
    texts = list(dict.fromkeys(text.name for model in models for text in model.facts.texts))
    header = ("asked", "reached", "of all", "parameters", "weights", *(f"perplexity, {text}" for text in texts), "form")
    rows = [_point(model, texts) for model in models]
    chart = plot("perplexity over sparsity", _curves(models, texts), "% of the blocks removed", "perplexity")
    parts: list[Part] = [Table(header, rows), Charts([chart]) if chart else Note("Perplexities: not measured.")]
    sections = [Section("All sparsities", parts), Section("Tasks", compared_parts([model.facts for model in models]))]
    return Chapter(name, f"sweep of {len(models)} models", sections)


def _point(model: Model, texts: Sequence[str]) -> tuple[str, ...]:
    facts, saved = model.facts, model.facts.saved
    after = {text.name: number(text.after) for text in facts.texts}
    figures = [after.get(text, "not measured") for text in texts]
    sparsities = (percent(saved.get("sparsity")), percent(saved.get("sparsity_total")))
    sizes = (number(saved.get("parameters")), megabytes(model.weight_bytes) if model.weight_bytes else UNKNOWN)
    return percent(facts.asked), *sparsities, *sizes, *figures, facts.form


def _curves(models: Sequence[Model], texts: Sequence[str]) -> list[Series]:
    """A line for each text, from before the pruning on."""
    curves = []
    for color, name in enumerate(texts):
        found = [
            (model.facts.saved.get("sparsity"), text)
            for model in models
            for text in model.facts.texts
            if text.name == name
        ]
        points = [(100 * sparsity, text.after) for sparsity, text in found if sparsity is not None]
        curves.append(Series(name, [(0.0, found[0][1].before), *points], color=color))
    return curves
