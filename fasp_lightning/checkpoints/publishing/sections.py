"""The parts of a model card; each says only what is known, and is empty where that is nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fasp_lightning.checkpoints.facts import Facts, PairFacts
from fasp_lightning.checkpoints.forms import LoaderSupport
from fasp_lightning.checkpoints.publishing.markdown import figure, folded, percent, plain, table
from fasp_lightning.checkpoints.tasks.entries import TaskFacts

UNITS = {"ffn": "hidden units of the FFN", "value": "value dims", "groups": "KV groups"}
UNITS |= {"experts": "hidden units of all experts", "whole_experts": "experts"}
SOURCES = {"calibrated": "that of the calibration", "other": "another"}
FORMS = {
    "stock": "its shapes are those that its config says, as stock code builds them",
    "zero_filled": "tensors that stock code builds wider hold zeros where units are gone",
    "compact": "its tensors are as small as the plan in its config says, which stock code does not read",
}
EVENTS = {
    "step": "step",
    "sparsity": "sparsity",
    "parameters": "parameters",
    "perplexity_before": "perplexity before",
    "perplexity_pruned": "pruned",
    "perplexity_recovered": "recovered",
    "kl_pruned": "KL pruned",
    "kl_recovered": "KL recovered",
}
TAUGHT = ("kl_pruned", "kl_recovered")
"""What only an event of a run with a teacher has."""

MEMORY = {"rss": "process"}


def introduction(facts: Facts) -> str:
    """What the model is, in a sentence or two."""
    saved, base = facts.saved, facts.base
    name = f"[{base['id']}](https://huggingface.co/{base['id']})" if "id" in base else plain(base.get("name", ""))
    what = name or f"A {plain(facts.model_type)} model"
    if not saved:
        return f"{what}, pruned with `fasp_lightning`."
    return (
        f"{what}, with {percent(saved['sparsity'])} of the linear parameters of its decoder blocks removed, that is "
        f"{percent(saved['sparsity_total'])} of all its parameters: {saved['original_parameters']:,} before, "
        f"{saved['parameters']:,} now. It was pruned with `fasp_lightning`, after "
        "[FASP](https://arxiv.org/abs/2501.09412): whole units go, and what is left is an ordinary dense model."
        f"{_alone(saved.get('text_part'))}"
    )


def _alone(part: str | None) -> str:
    return f" Its {part} decoder was pruned, on text alone; the rest of it is as it was." if part else ""


def usage(facts: Facts, place: str, remote_code: bool) -> str:
    """The lines that load it.

    Args:
        facts: What is known.
        place: Id of its repository, or what stands for its folder.
        remote_code: Whether the model's own code was saved along.
    """
    trust = ", trust_remote_code=True" if remote_code else ""
    loader = facts.saved.get("auto_class", "AutoModelForCausalLM")
    lines = [f"from transformers import {loader}, AutoTokenizer", ""]
    load = f'model = {loader}.from_pretrained("{place}"{trust})'
    if facts.form == "compact":
        lines = ["from fasp_lightning import load_pruned  # pip install fasp-lightning", *lines]
        lines[1] = "from transformers import AutoTokenizer"
        load = f'model = load_pruned("{place}"{trust})'
    code = "\n".join([*lines, load, f'tokenizer = AutoTokenizer.from_pretrained("{place}"{trust})'])
    return f"```python\n{code}\n```"


def removed(facts: Facts, picture: str) -> str:
    """What was removed: sparsities, and widths of each kind of pair.

    Args:
        facts: What is known.
        picture: Markdown of the picture, empty where there is none.
    """
    saved, rows = facts.saved, []
    if saved:
        asked = "" if facts.asked is None else f", {percent(facts.asked)} asked"
        zeros = ", zeros where units are gone not counted" if facts.form == "zero_filled" else ""
        rows.append((f"parameters{zeros}", f"{saved['original_parameters']:,}", f"{saved['parameters']:,}"))
        rows.append((f"sparsity of the blocks{asked}", "", percent(saved["sparsity"])))
        rows.append(("sparsity of all parameters", "", percent(saved["sparsity_total"])))
    rows += [(f"{UNITS[pair.kind]} of a block", f"{pair.original:,}", _widths(pair)) for pair in facts.pairs]
    rows += [_error(pair) for pair in facts.pairs if _known(pair.restored)]
    parts = [table(("", "original", "pruned"), rows), _steps(facts), picture]
    if any(pair.uneven for pair in facts.pairs):
        parts.append(folded("Widths and errors of each block", _blocks(facts.pairs)))
    return "\n\n".join(filter(None, parts))


def _steps(facts: Facts) -> str:
    """Said where a report is that of the last of several prunings."""
    before, original = facts.known("parameters_before"), facts.saved.get("original_parameters")
    if not facts.fits:
        return "How it came to these widths is not known: the report that was saved along is that of another pruning."
    if before is None or original is None or before >= original:
        return ""
    return (
        f"It was pruned in several steps; settings, errors, times and perplexities before are those of the last one, "
        f"which began with {before:,} parameters."
    )


def _widths(pair: PairFacts) -> str:
    if not pair.uneven:
        return f"{pair.widths[0]:,}"
    return f"{min(pair.widths):,} to {max(pair.widths):,}, {sum(pair.widths) / len(pair.widths):,.1f} on average"


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _error(pair: PairFacts) -> tuple[str, str, str]:
    plain_, restored = (sum(known) / len(known) for known in (_known(pair.unrestored), _known(pair.restored)))
    what = f"relative error of `{pair.consumer}` on the calibration text, mean of the blocks"
    return what, "", f"{plain_:.3f} with nothing restored, {restored:.3f} restored"


def _blocks(pairs: Sequence[PairFacts]) -> str:
    titles = [f"`{pair.consumer}` {part}" for pair in pairs for part in ("width", "error, not restored", "restored")]
    rows = [
        (str(index), *(cell for pair in pairs for cell in _block(pair, index)))
        for index in sorted({index for pair in pairs for index in pair.blocks})
    ]
    return table(("block", *titles), rows)


def _block(pair: PairFacts, index: int) -> tuple[str, str, str]:
    if index not in pair.blocks:
        return "", "", ""
    place = pair.blocks.index(index)
    return f"{pair.widths[place]:,}", figure(pair.unrestored[place]), figure(pair.restored[place])


def perplexities(facts: Facts) -> str:
    """Perplexities before and after, with their protocol."""
    if not facts.texts:
        return ""
    columns = [
        ("text", [plain(text.name) for text in facts.texts]),
        ("before", [figure(text.before) for text in facts.texts]),
        ("pruned", [figure(text.after) for text in facts.texts]),
        ("same units removed, nothing restored", [figure(text.unrestored) for text in facts.texts]),
        ("change", [f"× {figure(text.after / text.before)}" if text.before else "–" for text in facts.texts]),
        ("predicted tokens", [f"{text.tokens:,}" for text in facts.texts]),
        ("seq_len", [str(text.seq_len) for text in facts.texts]),
        ("sequences begin with", [plain(text.bos or "–") for text in facts.texts]),
        ("its source", [SOURCES.get(text.domain, "–") for text in facts.texts]),
    ]
    told = {title: cells for title, cells in columns if set(cells) != {"–"}}
    computed = facts.known("computed") or {}
    where = f"Computed in {computed['dtype']} on {computed['device']}" if computed else "Computed"
    protocol = (
        f"{where}; the weights are stored in {facts.saved.get('dtype', 'another file')}. Perplexity is the exponential "
        "of the mean negative log-likelihood of the predicted tokens, all but the first of each sequence; sequences do "
        "not overlap, and none was calibrated on. Only figures on the same text, in sequences of the same length, "
        "compare."
    )
    stale = (
        "**These are not figures of the weights in this folder**: they were measured right after the pruning, and the "
        "weights were changed since, by training or by rounding."
    )
    return "\n\n".join(
        [*([] if facts.measured else [stale]), table(list(told), zip(*told.values(), strict=True)), protocol]
    )


def tasks(facts: Facts) -> str:
    """Accuracies in tasks, as far as these weights were asked."""
    protocol = (
        "After ± stands the standard error over the questions; that of a difference is over the differences question "
        "by question. A mean counts each task alike; acc_norm is accuracy by likelihood over length."
    )
    told = [f"{_tasks(found)}\n\nComputed in {plain(found.dtype)}." for found in facts.tasks]
    return "\n\n".join([*told, protocol]) if told else ""


def _tasks(found: TaskFacts) -> str:
    header = ["task", "metric", "questions", "accuracy"]
    header += [] if found.against is None else [f"of {plain(found.against)}", "difference"]
    rows = []
    for row in found.rows:
        compared = [] if row.theirs is None or row.apart is None else [str(row.theirs), row.apart.signed()]
        questions = "" if row.questions is None else f"{row.questions:,}"
        rows.append([plain(row.name), plain(row.metric), questions, str(row.accuracy), *compared])
    return table(header, rows)


def events(facts: Facts) -> str:
    """What a training run did: when it pruned, and what recovery brought."""
    if not facts.events:
        return ""
    taught = any(event.get(name) is not None for event in facts.events for name in TAUGHT)
    shown = [name for name in EVENTS if taught or name not in TAUGHT]
    rows = [[_event(event.get(name), name) for name in shown] for event in facts.events]
    divergence = ", as is the divergence from the teacher (KL, in nats a token)" if taught else ""
    return (
        "It was pruned in a training run, and trained after each step. Perplexities are those on the run's validation "
        f"batches: before a step, right after it, and where the training that followed ended{divergence}.\n\n"
        + table([EVENTS[name] for name in shown], rows)
    )


def _event(value: Any, name: str) -> str:
    if name == "sparsity" and value is not None:
        return percent(value)
    return f"{value:,}" if isinstance(value, int) else figure(value)


def making(facts: Facts) -> str:
    """How it was made: calibration, settings, time, memory, versions."""
    calibration, seconds = facts.known("calibration") or {}, facts.known("seconds") or {}
    rows = [("calibration text", plain(calibration["name"]))] if "name" in calibration else []
    if tokens := facts.known("tokens"):
        rows.append(("calibration tokens", f"{tokens:,}"))
    if own := facts.settings.get("own_text"):
        rows.append(
            ("own text of the model among them", f"{own['tokens']:,} tokens, {percent(own['share'])} of the weight")
        )
    if "total" in seconds:
        phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
        rows.append(("seconds to prune", f"{seconds['total']:.1f} ({phases})"))
    for place, size in (facts.known("peak_memory") or {}).items():
        rows.append((f"peak memory, {MEMORY.get(place, place)}", f"{size / 2**30:,.2f} GiB"))
    versions = facts.saved.get("versions", {})
    if versions:
        rows.append(("saved with", ", ".join(f"{name} {value}" for name, value in versions.items())))
    parts = [table(("", ""), rows, numbers=False)] if rows else []
    if facts.settings:
        settings = [(f"`{name}`", plain(value)) for name, value in facts.settings.items()]
        parts.append(folded("All settings of the pruning", table(("setting", "value"), settings, numbers=False)))
    return "\n\n".join(parts)


def loading(facts: Facts, loaders: Sequence[LoaderSupport]) -> str:
    """The form, and who loads it."""
    rows = [(plain(loader.name), plain(loader.version), loader.verdict, plain(loader.because)) for loader in loaders]
    form = f"Saved in the form `{facts.form}`: {FORMS.get(facts.form, '')}."
    return f"{form}\n\n{table(('loader', 'tried with', 'takes it', 'because'), rows, numbers=False)}"
