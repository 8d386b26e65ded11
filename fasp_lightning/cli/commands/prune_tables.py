"""What ``fasp prune`` prints."""

from __future__ import annotations

from fasp_lightning.checkpoints.forms import LoaderSupport
from fasp_lightning.checkpoints.saving import SavedModel
from fasp_lightning.checkpoints.source import weight_files
from fasp_lightning.cli.console import change, dtype_name, gibibytes, megabytes, percent, results, table
from fasp_lightning.cli.jobs import PruneJob
from fasp_lightning.cli.model_setup import Setup, bytes_before
from fasp_lightning.cli.texts import CALIBRATED, OTHER, Calibration
from fasp_lightning.pruning.latency.serving import PHASES
from fasp_lightning.pruning.latency.speedup import Speedup
from fasp_lightning.pruning.report import PruningReport, TextReport
from fasp_lightning.structure.configs.text_part import auto_class

Row = tuple[str, str, str, str]

PLACES = {"rss": "process", "cuda": "GPU"}
SOURCES = {CALIBRATED: "as calibrated", OTHER: "another"}


def print_results(
    job: PruneJob, setup: Setup, calibration: Calibration, report: PruningReport, saved: SavedModel | None
) -> None:
    """The tables: sizes, both sparsities, time and memory; perplexities of all texts side by side."""
    size = setup.dtype.itemsize
    old, new = report.parameters_before, report.parameters_after
    now = setup.already_pruned
    rows: list[Row] = [
        ("parameters", f"{old:,}", f"{new:,}", change(old, new)),
        (
            f"size in {dtype_name(setup.dtype)}",
            megabytes(old * size),
            megabytes(new * size),
            change(old, new),
        ),
        *_on_disk(job, setup, saved),
        (
            f"sparsity of the blocks, {percent(setup.pruning.sparsity)} asked",
            percent(now),
            percent(report.sparsity),
            "",
        ),
        ("sparsity of all parameters", percent(_total(setup)), percent(report.sparsity_total), ""),
        *_bases(report),
        (
            f"seconds to prune\n  calibration {calibration.name}, {calibration.tokens:,} tokens",
            "",
            _seconds(report),
            "",
        ),
        *(
            (f"peak memory, {PLACES.get(place, place)}", "", gibibytes(peak), "")
            for place, peak in report.peak_memory.items()
        ),
    ]
    table(f"{setup.source.name} pruned", ("", "before", "after", "change"), rows)
    phases = {name: value for name, value in report.seconds.items() if name != "total"}
    if phases:
        results().print("seconds by phase: " + ", ".join(f"{name} {value:.1f}" for name, value in phases.items()))
    for learned in report.learning:
        results().print(
            f"columns learned: step {learned.chosen} of {learned.steps}; divergence from the model without gates, on "
            f"{learned.tokens:,} held-back tokens: {learned.divergence_before:.4f} -> {learned.divergence_after:.4f}",
            soft_wrap=True,
        )
    if report.evaluation:
        print_perplexities(report.evaluation)


def _bases(report: PruningReport) -> list[Row]:
    """How many value pairs were cut in another basis than the given one, if any."""
    bases = [pair.basis for pair in report.pairs if pair.kind == "value"]
    turned = bases.count("principal")
    return [("value dims in their principal basis", "", f"{turned} of {len(bases)} pairs", "")] if turned else []


def _on_disk(job: PruneJob, setup: Setup, saved: SavedModel | None) -> list[Row]:
    """The files of weights: what the model came in, and what was saved."""
    if saved is None:
        return []
    old, new = bytes_before(setup, job), sum(file.stat().st_size for file in weight_files(saved.path))
    return [(f"size on disk, {dtype_name(saved.dtype)}", megabytes(old), megabytes(new), change(old, new))]


def print_perplexities(texts: list[TextReport]) -> None:
    """One column a text: where it comes from, before, after, and what the restoration did."""
    rows = [
        ("source", *(SOURCES[text.domain] for text in texts)),
        ("before", *(f"{text.before.perplexity:.3f}" for text in texts)),
        ("pruned", *(f"{text.after.perplexity:.3f}" for text in texts)),
        ("change", *(f"x {text.after.perplexity / text.before.perplexity:.3f}" for text in texts)),
        ("predicted tokens", *(f"{text.after.tokens:,}" for text in texts)),
        ("seq_len", *(str(text.after.seq_len) for text in texts)),
    ]
    if any(text.bos for text in texts):
        rows.append(("sequences begin with", *(text.bos or "the text" for text in texts)))
    if any(text.unrestored for text in texts):
        plain = (f"{text.unrestored.perplexity:.3f}" if text.unrestored else "" for text in texts)
        rows.insert(4, ("same columns, nothing restored", *plain))
    table("perplexity", ("", *(text.name for text in texts)), rows)


def print_speedup(setup: Setup, measured: Speedup | None = None) -> None:
    """Seconds and speed-ups of both phases: asked for, predicted from blocks, and measured on the models.

    Prints nothing where none is asked for.
    """
    if (planned := setup.speedup) is None:
        return
    serving, rows = planned.serving, []
    for phase in PHASES:
        asked = f"x {planned.factor:.2f}" if phase in serving.phases else ""
        known = planned.predicted if measured is None else measured
        seconds = (f"{1e3 * times[phase]:,.1f} ms" for times in (known.before, known.after))
        found = "" if measured is None else f"x {measured.of(phase):.2f}"
        rows.append((phase, *seconds, asked, f"x {planned.predicted.of(phase):.2f}", found))
    title = (
        f"speed at batch {serving.batch}: prefill of {serving.prompt:,} tokens, a decode step within the "
        f"{serving.new:,} after them"
    )
    if setup.budget.decided_later("ffn"):
        title += "; predicted for all blocks at the mean width, from which allocation lets single ones differ"
    table(title, ("", "before", "after", "asked", "predicted", "measured"), rows)


def print_continuations(prompt: str, before: str, after: str) -> None:
    """How the model goes on, before and after."""
    console = results()
    console.print(f"\nprompt:  {prompt}\nbefore:  {before}\nafter:   {after}", soft_wrap=True)


def print_loaders(saved: SavedModel, setup: Setup) -> None:
    """Where the model is, whether the reloaded one is the same, and who can load it."""
    console = results()
    console.print(f"\nsaved to {saved.path}, form {saved.form}, {megabytes(saved.bytes)}", soft_wrap=True)
    if saved.logit_difference is not None:
        loader = (
            "fasp_lightning.load_pruned" if saved.form == "compact" else f"stock {auto_class(setup.config).__name__}"
        )
        rounded = "" if saved.dtype == setup.dtype else f" but for the rounding to {dtype_name(saved.dtype)}"
        console.print(
            f"reloaded with {loader}: the logits are the same{rounded}, within {saved.logit_difference:.1e}",
            soft_wrap=True,
        )
    loaders_table(saved.loaders)
    if saved.url is not None:
        console.print(f"\nuploaded to {saved.url}", soft_wrap=True)


def loaders_table(loaders: list[LoaderSupport]) -> None:
    """Which loaders take a model, why, and what to do where one does not."""
    rows = [(loader.name, loader.version.rpartition(" ")[2], loader.verdict, loader.because) for loader in loaders]
    table("loaders", ("loader", "tried with", "takes it", "because; what to do"), rows, numbers=False)


def _total(setup: Setup) -> float:
    return 1 - setup.budget.parameters_before / setup.budget.original_parameters


def _seconds(report: PruningReport) -> str:
    return f"{report.seconds.get('total', 0.0):.1f}"
