"""``fasp plan``: what a pruning would give, from the config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from fasp_lightning.checkpoints.forms import loaders_for
from fasp_lightning.cli.checks import texts_of
from fasp_lightning.cli.commands.prune_streamed import streams
from fasp_lightning.cli.commands.prune_tables import loaders_table, print_speedup
from fasp_lightning.cli.console import change, dtype_name, gibibytes, megabytes, note, percent, results, table
from fasp_lightning.cli.jobs import PlanJob, PruneJob
from fasp_lightning.cli.model_setup import (
    Setup,
    bytes_before,
    memory_of,
    remarks,
    set_up,
)
from fasp_lightning.cli.quiet import one_thread, quiet_libraries
from fasp_lightning.cli.startup import without_collection
from fasp_lightning.cli.texts import calibration_name, own_tokens
from fasp_lightning.proving.proof import prove
from fasp_lightning.pruning.budget.footprint import PeakMemory, footprints
from fasp_lightning.pruning.budget.rounding import FFNS, ffn_multiple
from fasp_lightning.pruning.learned.learning import forward_tokens
from fasp_lightning.pruning.own_text.writing import within_positions

JOB = PlanJob

KERNELS = {
    "llama.cpp Q4_0, Q8_0": 32,
    "llama.cpp K-quants": 256,
}
"""What works on blocks of so many columns of ``down_proj``; a width that does not divide is stored unquantised."""


def run(job: PlanJob) -> int:
    """Run the command; returns the exit code."""
    with without_collection(), one_thread():
        quiet_libraries()
        texts_of(job)
        setup = set_up(job)
    for remark in remarks(setup):
        note(remark)
    _print_sizes(job, setup)
    _print_widths(setup)
    print_speedup(setup)
    _print_kernels(job, setup)
    _print_memory(job, setup)
    _print_learning(setup)
    loaders_table(loaders_for(setup.form, setup.config, setup.cuts))
    if job.prove:
        _print_proof(setup)
    return 0


def _print_proof(setup: Setup) -> None:
    """Try the row on a twin, and say what held."""
    proof = prove(setup.model, setup.spec)
    rows = [(kind, ", ".join(proof.checks), "stock" if kind in proof.stock else "zero_filled") for kind in proof.kinds]
    title = f"row of {proof.model_type}, proved on {proof.blocks} tiny blocks in {proof.seconds:.1f} s"
    table(title, ("pairs", "what held", "stock code loads form"), rows, numbers=False)


def _print_sizes(job: PruneJob, setup: Setup) -> None:
    budget = setup.budget
    before, after = footprints(setup.model, budget, setup.dtype.itemsize)
    dtype = dtype_name(setup.dtype)

    def row(name: str, old: int, new: int, show: Callable[[int], str]) -> tuple[str, str, str, str]:
        return name, show(old), show(new), change(old, new)

    total = 1 - before.parameters / budget.original_parameters
    flops = before.flops_per_token, after.flops_per_token
    rows = [
        row("parameters", before.parameters, after.parameters, _count),
        row(f"size in {dtype}", before.weight_bytes, after.weight_bytes, megabytes),
        row(f"size on disk, {dtype_name(setup.stored)}", bytes_before(setup, job), setup.stored_bytes, megabytes),
        row("FLOPs per token, attention over the context aside", *flops, _giga),
        (f"sparsity of the blocks, {percent(setup.pruning.sparsity)} asked", percent(setup.already_pruned),
         percent(budget.sparsity), ""),
        ("sparsity of all parameters", percent(total), percent(budget.sparsity_total), ""),
    ]  # fmt: skip
    if before.active < before.parameters:
        rows.insert(1, row("active parameters, of the experts that a token meets", before.active, after.active, _count))
    cache, cache_after = before.kv_bytes_per_token, after.kv_bytes_per_token
    if cache is not None and cache_after is not None:
        rows.insert(-2, row(f"KV cache per token in {dtype}", cache, cache_after, _kilo))
    kind = f"{setup.config.model_type}, attention {budget.attention}, form {setup.form}"
    table(f"{setup.source.name} ({kind})", ("", "before", "after", "change"), rows)


def _print_widths(setup: Setup) -> None:
    """One row for pairs of the same width; blocks mostly agree."""
    counts = Counter(
        (pair.layer.split(".")[-1], pair.kind, pair.before, pair.after, pair.parts)
        for block in setup.budget.pairs
        for pair in block
    )
    rows = [
        (consumer, kind, str(blocks), _each(before, parts), _each(after, parts), change(before, after))
        for (consumer, kind, before, after, parts), blocks in counts.items()
    ]
    title = "widths"
    if any(map(setup.budget.decided_later, setup.cuts.kinds)):
        title += "; those of single blocks are more or less, as calibration decides"
    table(title, ("consumer", "kind", "blocks", "before", "after", "change"), rows)


def _each(units: int, parts: int) -> str:
    """Units of a pair; of experts those of each."""
    return str(units) if parts == 1 else f"{parts} x {units // parts}"


def _print_kernels(job: PlanJob, setup: Setup) -> None:
    """Whether the FFN widths divide into the blocks of quantised formats and kernels, on each rank."""
    pairs = [pair for block in setup.budget.pairs for pair in block]
    ffns = {pair.after // pair.parts: pair.original // pair.parts for pair in pairs if pair.kind in FFNS}
    ffns |= {pair.columns: pair.columns for pair in pairs if pair.kind == "whole_experts"}
    if setup.budget.decided_later("ffn"):  # whatever the widths will be, they are multiples
        ffns = {ffn_multiple(original, setup.pruning): original for original in ffns.values()}
    ranks = job.tensor_parallel
    blocks = KERNELS | {f"Marlin (4 and 8 bit in vLLM), {ranks} ranks": 128 * ranks}
    if ranks > 1:
        blocks[f"tensor parallel, {ranks} ranks"] = ranks
    rows = [
        (name, str(size), "yes" if all(width % size == 0 for width in ffns) else "no") for name, size in blocks.items()
    ]
    shown = " or ".join(f"{width:,}" for width in sorted(ffns))
    table(f"FFN width {shown}: does it divide?", ("kernels", "by", ""), rows)


def _print_memory(job: PruneJob, setup: Setup) -> None:
    calibration, own = texts_of(job)[0], job.pruning.own_text
    tokens = own_tokens(own and within_positions(setup.model, own))
    for text in calibration:
        extent = text.extent()
        if extent.sequences is None:
            note("calibration.sequences is null: the peak memory depends on the length of the whole text")
            return
        tokens += extent.sequences * extent.seq_len
    streamed = bool(job.stream) and streams(job, setup)  # unasked, it would depend on what else runs here
    memory = memory_of(setup, job, tokens, streamed)
    rows = [(name, gibibytes(size), place) for name, size, place in _parts(memory, setup, streamed)]
    rows.append(("peak, if all of it is in one place", gibibytes(memory.total), ""))
    title = f"estimated memory while pruning on {tokens:,} tokens of {calibration_name(calibration, own)}"
    table(title, ("", "size", "where"), rows)


def _print_learning(setup: Setup) -> None:
    """What learned columns cost beside the rest, which goes over the calibration set a few times."""
    if setup.pruning.score != "learned":
        return
    learning = setup.pruning.learning
    results().print(
        f"columns are learned in {learning.steps:,} steps of {learning.tokens:,} tokens, with the whole model on "
        f"{setup.device}: about the time of {forward_tokens(learning):,} tokens forward through it",
        soft_wrap=True,
    )


def _parts(memory: PeakMemory, setup: Setup, streamed: bool) -> list[tuple[str, int, str]]:
    stored = {"accelerator": str(setup.device), "cpu": "memory", "disk": "disk"}[setup.pruning.offload]
    whole = "block by block if they do not fit" if setup.device.type != "cpu" else "at once"
    weights = ("weights", memory.weights, f"{setup.device}, or memory if they do not fit")
    if streamed:
        whole = "block by block"
        weights = ("weights: a block, and the next one", memory.weights, f"{setup.device}, or memory")
    return [
        weights,
        ("hidden states and consumer inputs of the calibration set", memory.calibration, stored),
        ("gram and solve of the widest pair", memory.solve, str(setup.device)),
        ("hidden states and activations for the loss sensitivity", memory.sensitivity, f"{setup.device}, {whole}"),
        ("logits of a batch that is evaluated", memory.logits, str(setup.device)),
        ("reloaded copy, to verify what was saved", memory.reload, str(setup.device)),
    ]


def _count(count: int) -> str:
    return f"{count:,}"


def _giga(count: int) -> str:
    return f"{count / 1e9:,.3f} G"


def _kilo(count: int) -> str:
    return f"{count / 1e3:,.1f} kB"
