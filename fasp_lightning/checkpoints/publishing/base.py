"""Which model a pruned one was made from, and under which license that is, as far as this machine can tell."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasp_lightning.checkpoints.pruned_folder import REPORT_FILE
from fasp_lightning.checkpoints.source import ModelSource, resolve_source
from fasp_lightning.errors import FaspError, of_library
from fasp_lightning.staging import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

CARD_FILE = "README.md"
LICENSE = ("license", "license_name", "license_link")
HUB = "https://huggingface.co/"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def base_of(model: PreTrainedModel, report: dict[str, Any]) -> dict[str, str]:
    """What is known of the model that a pruned one was made from; nothing is guessed, and no network asked.

    Args:
        model: The pruned model.
        report: Its report.

    Returns:
        ``name``, the ``id`` on the hub, ``license`` with ``license_name`` and ``license_link``; each where it is known.
    """
    if isinstance(found := report.get("base"), dict) and found:
        return found
    named = getattr(model, "fasp_source", None) or getattr(model.config, "_name_or_path", None)
    if not named:
        return {}
    try:
        return _described(resolve_source(named))
    except Exception as error:  # whatever is wrong with files that are read for this alone
        if not (of_library(error) or isinstance(error, FaspError)):
            raise
        log.info("nothing is told of the license of %s: %s", named, error)
        return {}


def _described(source: ModelSource) -> dict[str, str]:
    if source.gguf_file is not None:
        return {"name": source.gguf_file, **_of_gguf(Path(source.location) / source.gguf_file)}
    if source.local:
        return {"name": Path(source.location).resolve().name, **_of_folder(Path(source.location))}
    return {"name": source.name, **_id(source.name), **_cached(source.name)}


def _of_folder(folder: Path) -> dict[str, str]:
    """Of a model that was pruned before what that one's report says; else what config and card say."""
    report = folder / REPORT_FILE
    if report.is_file() and (base := read_json(report).get("base")):
        return dict(base)
    config = folder / "config.json"
    name = read_json(config).get("_name_or_path") if config.is_file() else None
    return {**_id(name), **_license(folder / CARD_FILE)}


def _cached(name: str) -> dict[str, str]:
    """What the card says, where an earlier download left it."""
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(name, CARD_FILE)
    return _license(Path(card)) if isinstance(card, str) else {}


def _license(card: Path) -> dict[str, str]:
    """The license in a card's metadata."""
    if not card.is_file():
        return {}
    from huggingface_hub import ModelCard

    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return {name: data[name] for name in LICENSE if isinstance(data.get(name), str)}


def _of_gguf(file: Path) -> dict[str, str]:
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    names = {
        "general.name": "name",
        "general.license": "license",
        "general.license.name": "license_name",
        "general.license.link": "license_link",
    }
    said = {name: str(fields[key].contents()) for key, name in names.items() if key in fields}
    urls = (str(fields[key].contents()) for key in ("general.repo_url", "general.source.repo_url") if key in fields)
    return next((_id(url.removeprefix(HUB)) for url in urls if url.startswith(HUB)), {}) | said


def _id(name: Any) -> dict[str, str]:
    """``{"id": name}`` if it can be the id of a repository, and no folder."""
    hub = isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists()
    return {"id": name} if hub else {}
