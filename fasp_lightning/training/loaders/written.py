"""Own text as data of a run: its model writes it before anything is pruned."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.pruning.own_text.cache import digest_of
from fasp_lightning.pruning.own_text.writing import own_sequences, within_positions
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.staging import fingerprint
from fasp_lightning.structure.plan import plan_of
from fasp_lightning.text.config import OWN_TEXT
from fasp_lightning.text.packed_cache import Tokenised
from fasp_lightning.text.role_cache import RoleCache
from fasp_lightning.training.modeling.copying import plain_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING, OTHERS = 512, 64
"""Sequences of own text to train on, and of another role's, where the text sets no number."""

PIECE = 256
"""Sequences written at a time, each piece by a seed of its own and kept: what was stopped, or is to be longer, goes on
from there."""

log = logging.getLogger(__name__)


def write_own_text(cache: RoleCache, roles: Iterable[str], trainer: Trainer | None, model: Any) -> None:
    """Let the model of a run write the own text of some roles, or read what it wrote before; all processes call this.

    A run that is resumed has the same text: its model is, before the checkpoint is loaded, what it was at the start.

    Args:
        cache: Where the text is put. Its sequences start like the calibration text that is read, else with any tokens.
        roles: Which ones; what is there already stays.
        trainer: Says where to compute, and whether in bfloat16.
        model: The causal LM; ``None`` where there is no run.

    Raises:
        FaspError: If there is no model, it is pruned already, has fewer positions than a sequence has tokens, or gives
            logits that are not finite.
    """
    texts = {(role, index): text for role in roles for index, text in enumerate(cache.roles.texts[role])}
    missing = {place: text for place, text in texts.items() if text.kind == "own" and place not in cache.written}
    if not missing:
        return
    _check(model, cache.seq_len)
    run: Any = trainer
    writer = plain_copy(model, run.strategy.root_device, torch.bfloat16 if _in_bfloat16(run) else None)
    starts = _starts(cache, model)
    for (role, index), text in missing.items():
        wanted, _, _, seed = text.extent(TRAINING if role == "train" else OTHERS, cache.seq_len, seed=cache.seed)
        pieces = _pieces(cache, wanted or 0, (seed, role, index))
        cache.written[role, index] = _gathered(own_sequences(writer, pieces, Processes.everyone(), starts), role)


def _check(model: Any, seq_len: int) -> None:
    """Refuse what cannot write text that a pruned model should learn from."""
    if model is None:
        raise FaspError(
            f"source {OWN_TEXT} must be read in a run whose module holds one causal LM, which writes it, got none; "
            "pass the data module to a Trainer, or name another text"
        )
    plan = plan_of(model)
    if plan is not None and any(plan.blocks):
        raise FaspError(
            f"source {OWN_TEXT} must be written by a dense model, got one that is pruned already; start from the dense "
            "one and let FASPPruning prune it, at step 0 say, or name another text"
        )
    longest = within_positions(model, OwnTextConfig(tokens=seq_len, seq_len=seq_len)).seq_len
    if longest < seq_len:
        raise FaspError(f"seq_len must be at most {longest}, the model's positions, to write {OWN_TEXT}, got {seq_len}")


def _in_bfloat16(trainer: Any) -> bool:
    """Whether the run computes in it: its precision alone may not tell, since a plugin can decide by the hardware."""
    kinds = {
        trainer.strategy.root_device.type,
        "cpu",
    }  # before the module is placed, a plugin takes it to be on the CPU
    with trainer.precision_plugin.forward_context():
        dtypes = [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]
        return torch.bfloat16 in [*dtypes, torch.get_default_dtype()]


def _starts(cache: RoleCache, model: PreTrainedModel) -> Tensor:
    """The first token of every sequence of the calibration text that is read; where there is none, the vocabulary.

    Text from random first tokens is more varied than from one that begins a text (LLM-QAT, arXiv:2305.17888), which in
    chat models may open a turn, from which alone follows none.
    """
    texts = cache.read("calibration") if cache.ready("calibration") else []
    rows = (rows["input_ids"][:, 0].tolist() for text in texts for rows in text.sequences.iter(1000))
    found = [token for tokens in rows for token in tokens]
    tokens = set(cache.tokenizer.get_vocab().values()) - set(cache.tokenizer.all_special_ids)
    return torch.tensor(sorted(found or (token for token in tokens if token < ModelInputs(model).vocabulary)))


def _pieces(cache: RoleCache, sequences: int, key: tuple[Any, ...]) -> list[OwnTextConfig]:
    folder, seq_len = str(cache.folder / OWN_TEXT), cache.seq_len
    sizes = {start: min(PIECE, sequences - start) for start in range(0, sequences, PIECE)}
    seeds = {start: int(fingerprint(*key, start)[:12], 16) for start in sizes}
    return [
        OwnTextConfig(tokens=size * seq_len, seq_len=seq_len, seed=seeds[start], cache_dir=folder)
        for start, size in sizes.items()
    ]


def _gathered(pieces: Iterable[Tensor], role: str) -> Tokenised:
    """The pieces of a text, put together as what is read from the cache of tokenised text."""
    from datasets import Dataset

    found: list[Tensor] = []
    for piece in pieces:
        found.append(piece)
        log.info("own text (%s): %d sequences", role, sum(map(len, found)))
    content = digest_of(found)
    rows = Dataset.from_dict({"input_ids": torch.cat(found).int().numpy()}).with_format("torch")
    return Tokenised(content, rows, frozenset(), content, max(int(piece.max()) for piece in found))
