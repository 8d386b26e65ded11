"""The model card of a saved model: ``README.md`` with the metadata that the hub reads, and a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasp_lightning.checkpoints.facts import Facts, TextFacts, finite
from fasp_lightning.checkpoints.forms import LoaderSupport
from fasp_lightning.checkpoints.publishing import sections
from fasp_lightning.checkpoints.publishing.base import CARD_FILE, LICENSE
from fasp_lightning.checkpoints.publishing.markdown import percent, plain
from fasp_lightning.checkpoints.publishing.picture import PICTURE_FILE, draw
from fasp_lightning.checkpoints.tasks.entries import TaskRow

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TAGS = ["fasp", "pruned", "structured-pruning"]
FOLDER = "path/to/this/folder"


def write_card(
    folder: Path, facts: Facts, loaders: Sequence[LoaderSupport], repository: str | None, remote_code: bool
) -> None:
    """Write the card, and the picture where matplotlib is there.

    Args:
        folder: Where to.
        facts: What is known of the model.
        loaders: Who loads it.
        repository: Id of the repository on the hub that it goes to, if it does.
        remote_code: Whether the model's own code was saved along.
    """
    drawn = draw(facts, folder / PICTURE_FILE)
    text = _text(facts, loaders, repository or FOLDER, remote_code, drawn)
    (folder / CARD_FILE).write_text(f"---\n{metadata(facts).to_yaml()}\n---\n\n{text}", encoding="utf-8")


def _text(facts: Facts, loaders: Sequence[LoaderSupport], place: str, remote_code: bool, drawn: bool) -> str:
    """The card below its metadata; parts of which nothing is known are left out."""
    picture = f"![Width of each block, and its error with and without restoration]({PICTURE_FILE})" if drawn else ""
    parts = {
        "": sections.introduction(facts),
        "Use": sections.usage(facts, place, remote_code),
        "What was removed": sections.removed(facts, picture),
        "Perplexity" if facts.measured else "Perplexity right after the pruning": sections.perplexities(facts),
        "Accuracy in tasks": sections.tasks(facts),
        "Training": sections.events(facts),
        "How it was made": sections.making(facts),
        "Who loads it": sections.loading(facts, loaders),
    }
    told = [f"## {title}\n\n{part}" if title else part for title, part in parts.items() if part]
    return "\n\n".join([f"# {plain(_title(facts))}", *told]) + "\n"


def _title(facts: Facts) -> str:
    return f"{_name(facts)}, pruned" + (f" by {percent(facts.saved['sparsity'])}" if facts.saved else "")


def _name(facts: Facts) -> str:
    name = facts.base.get("id") or facts.base.get("name") or facts.model_type
    return str(name).rpartition("/")[2]


def metadata(facts: Facts) -> Any:
    """What the hub reads of a card: a ``ModelCardData``."""
    from huggingface_hub import ModelCardData

    base = facts.base
    known: dict[str, Any] = _license(base)
    if "id" in base:
        known |= {"base_model": base["id"], "base_model_relation": "finetune"}  # the hub has no word for pruned
    results = [_result(text) for text in facts.texts if facts.measured and finite(text.after)]
    results += [_accuracy(row) for found in facts.tasks for row in found.rows if row.questions is not None]
    if results:
        metrics = list(dict.fromkeys(result.metric_type for result in results))
        known |= {"model_name": _title(facts), "eval_results": results, "metrics": metrics}
    library = "fasp_lightning" if facts.form == "compact" else "transformers"
    return ModelCardData(library_name=library, pipeline_tag="text-generation", tags=TAGS, **known)


def _result(text: TextFacts) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=_slug(text.name),
        dataset_name=text.name,
        dataset_args={"seq_len": text.seq_len, "predicted_tokens": text.tokens},
        metric_type="perplexity",
        metric_value=round(text.after, 4),
    )


def _accuracy(row: TaskRow) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=_slug(row.name),
        dataset_name=row.name,
        dataset_args={"questions": row.questions},
        metric_type="accuracy",
        metric_name=row.metric,
        metric_value=round(row.accuracy.value, 4),
    )


def _license(base: dict[str, str]) -> dict[str, str]:
    """The license as the hub spells it: an identifier, or ``other`` with a name."""
    said = {name: base[name] for name in LICENSE if name in base}
    if "license" in said and _slug(said["license"]) != said["license"]:
        said = {**said, "license": "other", "license_name": _slug(said.get("license_name", said["license"]))}
    return said


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.+-]+", "-", name.lower()).strip("-") or "text"
