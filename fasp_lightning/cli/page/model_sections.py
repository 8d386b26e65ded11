"""The sections about a pruned model; each says so where something was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fasp_lightning.checkpoints.facts import Facts, PairFacts, TextFacts
from fasp_lightning.checkpoints.publishing.record import entries_in
from fasp_lightning.checkpoints.publishing.sections import UNITS
from fasp_lightning.cli.console import gibibytes, megabytes
from fasp_lightning.cli.page.charts import bars, blocks, dots
from fasp_lightning.cli.page.models import Model
from fasp_lightning.cli.page.parts import (
    UNKNOWN,
    Chapter,
    Chart,
    Charts,
    Note,
    Part,
    Section,
    Table,
    number,
    percent,
    settings_table,
)
from fasp_lightning.cli.page.task_parts import task_parts

SOURCES = {"calibrated": "as calibrated", "other": "another"}
PLACES = {"rss": "process", "cuda": "GPU"}
BEFORE, AFTER, PLAIN = "before", "pruned", "nothing restored"
OTHER_PRUNING = "Not known: the report that was saved along is that of another pruning, or damaged."


def model_chapter(model: Model) -> Chapter:
    """All about one model."""
    facts = model.facts
    name = facts.base.get("id") or facts.base.get("name") or facts.report.get("model") or model.name
    reached = facts.saved.get("sparsity", facts.known("sparsity"))
    parts = [facts.model_type, "pruned" if reached is None else f"pruned to {percent(reached)} sparsity"]
    parts += [] if facts.asked is None else [f"{percent(facts.asked)} asked"]
    return Chapter(str(name), ", ".join(parts), _sections(model))


def _sections(model: Model) -> list[Section]:
    facts = model.facts
    return [
        Section("Size", _size(model)),
        Section("Widths", _widths(facts)),
        Section("Errors", _errors(facts)),
        Section("Perplexity", _perplexities(facts)),
        Section("Tasks", _tasks(facts)),
        Section("Time and memory", _cost(facts)),
        Section("Loaders", _loaders(model)),
        Section("Exports", _exports(facts)),
        Section("Settings", _settings(facts)),
        Section("Warnings", _warnings(facts)),
    ]


def _size(model: Model) -> list[Part]:
    facts, saved, known = model.facts, model.facts.saved, model.facts.known
    before = saved.get("original_parameters")
    rows = [
        ("parameters", number(before), number(saved.get("parameters", known("parameters_after")))),
        ("files of weights", "", megabytes(model.weight_bytes) if model.weight_bytes else "none in the folder"),
        ("whole folder", "", megabytes(model.folder_bytes) if model.folder_bytes else UNKNOWN),
        ("dtype of the weights", "", saved.get("dtype", UNKNOWN)),
        ("sparsity of the blocks, asked", "", percent(facts.asked)),
        ("sparsity of the blocks, reached", "", percent(saved.get("sparsity", known("sparsity")))),
        ("sparsity of all parameters", "", percent(saved.get("sparsity_total", known("sparsity_total")))),
        ("form", "", facts.form),
    ]
    parts: list[Part] = [Table(("", "original", "pruned"), rows)]
    began = known("parameters_before")
    if began is not None and before is not None and began < before:
        parts.append(
            Note(
                f"It was pruned in several steps. Settings, errors, times and perplexities below are those of the last "
                f"one, which began with {began:,} parameters; the sparsity asked is that of its end."
            )
        )
    return parts


def _widths(facts: Facts) -> list[Part]:
    if not facts.pairs:
        return [Note("No pair of any block is cut.")]
    charts = [
        blocks(_of(pair), {"left": pair.widths}, f"{UNITS[pair.kind]}", full=pair.original) for pair in facts.pairs
    ]
    rows = [
        (
            _of(pair),
            f"{pair.original:,}",
            f"{min(pair.widths):,}",
            f"{max(pair.widths):,}",
            f"{sum(pair.widths) / len(pair.widths):,.1f}",
        )
        for pair in facts.pairs
    ]
    header = ("units of a block", "original", "fewest left", "most left", "mean")
    return [_charts(charts), Table(header, rows), _table(facts.pairs)]


def _of(pair: PairFacts) -> str:
    return f"{UNITS[pair.kind]} ({pair.consumer})"


def _table(pairs: Sequence[PairFacts]) -> Table:
    titles = [f"{pair.consumer} {what}" for pair in pairs for what in ("width", "error", "restored")]
    rows = [
        (
            str(index),
            *(cell for pair in pairs for cell in _cells(pair, index)),
        )
        for index in sorted({index for pair in pairs for index in pair.blocks})
    ]
    return Table(("block", *titles), rows, "Widths and errors of each block", folded=True)


def _cells(pair: PairFacts, index: int) -> tuple[str, str, str]:
    if index not in pair.blocks:
        return "", "", ""
    place = pair.blocks.index(index)
    return f"{pair.widths[place]:,}", number(pair.unrestored[place]), number(pair.restored[place])


def _errors(facts: Facts) -> list[Part]:
    charts = []
    for pair in facts.pairs:
        whole = {PLAIN: pair.unrestored, "restored": pair.restored}
        each = {PLAIN: pair.output_unrestored, "restored": pair.output_restored}
        charts += [
            blocks(f"{pair.consumer}: relative error", whole, "‖difference‖ / ‖output‖"),
            blocks(f"{pair.consumer}: relative error, mean of the outputs", each, "root mean square"),
        ]
    if not any(charts):
        return [Note("Not recorded." if facts.fits else OTHER_PRUNING)]
    missing = [pair.consumer for pair in facts.pairs if not any(v is not None for v in pair.output_restored)]
    return [
        _charts(charts),
        Note(
            "How far a consumer's outputs are from those before this pruning, on the calibration text: with the same "
            "units removed and nothing restored, and as it is. The mean of the outputs counts each output of the layer "
            "alike; the other is led by the largest ones. Of a pair that was cut in several rounds, the last is shown."
        ),
        *([Note(f"Mean of the outputs: not recorded for {', '.join(missing)}.")] if missing else []),
    ]


def _perplexities(facts: Facts) -> list[Part]:
    if not facts.texts:
        return [Note("Not measured." if facts.fits else OTHER_PRUNING)]
    rows = {
        f"{text.name} (seq_len {text.seq_len})": {
            kind: value
            for kind, value in ((BEFORE, text.before), (AFTER, text.after), (PLAIN, text.unrestored))
            if value is not None
        }
        for text in facts.texts
    }
    computed = facts.known("computed") or {}
    where = f"Computed in {computed['dtype']} on {computed['device']}. " if {"dtype", "device"} <= set(computed) else ""
    stale = (
        "These are not figures of the weights in this folder: they were measured right after the pruning, and whether "
        "the weights are still the same is not known, or they were trained or rounded since."
    )
    header = ("text", "its source", BEFORE, AFTER, "change", PLAIN, "predicted tokens", "seq_len", "begins with")
    return [
        *([] if facts.measured else [Note(stale, warning=True)]),
        _charts([dots("perplexity of each text", rows)]),
        Table(header, [_text(text) for text in facts.texts]),
        Note(
            f"{where}Perplexity is the exponential of the mean negative log-likelihood of the predicted tokens, all "
            "but the first of each sequence; sequences do not overlap, and none was calibrated on. Only figures on the "
            "same text, in sequences of the same length, compare. “Nothing restored” has the same units removed and "
            "the weights as they were."
        ),
    ]


def _text(text: TextFacts) -> tuple[str, ...]:
    plain = "not measured" if text.unrestored is None else number(text.unrestored)
    change = f"× {text.after / text.before:.3f}" if text.before else ""
    figures = (number(text.before), number(text.after), change, plain, number(text.tokens), str(text.seq_len))
    return text.name, SOURCES.get(text.domain, text.domain), *figures, text.bos or "the text"


def _tasks(facts: Facts) -> list[Part]:
    if not facts.tasks:
        return [Note("Not measured; fasp evaluate --tasks on this folder keeps its answers in it.")]
    return [part for found in facts.tasks for part in task_parts(found)]


def _cost(facts: Facts) -> list[Part]:
    seconds, memory = facts.known("seconds") or {}, facts.known("peak_memory") or {}
    phases = {name: value for name, value in seconds.items() if name != "total"}
    rows = [("seconds to prune", number(seconds.get("total"), 1))]
    rows += [(f"peak memory, {PLACES.get(place, place)}", gibibytes(size)) for place, size in memory.items()]
    if not memory:
        rows.append(("peak memory", "not measured"))
    chart = bars("seconds by phase", phases, "s")
    return [Table((), rows), _charts([chart]) if chart else Note("Seconds by phase: not measured.")]


def _loaders(model: Model) -> list[Part]:
    if model.loaders is None:
        return [Note(f"Not known for the form {model.facts.form} of {model.facts.model_type}.")]
    rows = [(loader.name, loader.version, loader.verdict, loader.because) for loader in model.loaders]
    return [Table(("loader", "tried with", "takes it", "because; what to do"), rows, numbers=False)]


def _exports(facts: Facts) -> list[Part]:
    exports = entries_in(facts.report, "exports")
    if not exports:
        return [Note("No export of this folder was checked.")]
    header = ("target", "architecture", "file", "size", "loader", "same tokens", "difference of logits", "date")
    return [Table(header, [_export(one) for one in exports], numbers=False)]


def _export(one: dict[str, Any]) -> tuple[str, ...]:
    loader = " ".join(str(one[name]) for name in ("loader", "version") if one.get(name))
    same = f"{one['same']} of {one['tokens']}" if {"same", "tokens"} <= set(one) else "not measured"
    logits = one.get("logit_difference")
    names = [str(one.get(name) or "") for name in ("target", "architecture", "file")]
    size = megabytes(one["bytes"]).replace(" ", "\u00a0") if isinstance(one.get("bytes"), int) else UNKNOWN
    difference = "not measured" if logits is None else f"{logits:.1e}"
    day = str(one.get("date") or "").partition("T")[0]
    return *names, size, loader or "not loaded", same, difference, day


def _settings(facts: Facts) -> list[Part]:
    calibration = facts.known("calibration") or {}
    versions = facts.saved.get("versions", {})
    rows = [
        ("calibration text", str(calibration.get("name", UNKNOWN))),
        ("calibration tokens", number(facts.known("tokens"))),
        ("saved with", ", ".join(f"{name} {value}" for name, value in versions.items()) or UNKNOWN),
        *[(f"base, {name}", str(value)) for name, value in facts.base.items()],
    ]
    folded: list[Part] = [settings_table(facts.settings, "All settings of the pruning")] if facts.settings else []
    return [Table((), rows, numbers=False), *(folded or [Note("Settings of the pruning: not recorded.")])]


def _warnings(facts: Facts) -> list[Part]:
    warnings = [Note(str(text), warning=True) for text in facts.known("warnings") or ()]
    if not facts.fits:
        warnings.append(Note("The widths that the report tells of are not those of the model.", warning=True))
    return [*(warnings or [Note("None." if facts.report.get("pairs") else "Not recorded.")])]


def _charts(charts: Sequence[Chart | None]) -> Charts:
    return Charts([chart for chart in charts if chart is not None])
