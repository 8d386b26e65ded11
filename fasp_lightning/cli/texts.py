"""Whether a text is of the kind that a model was calibrated on, as far as its source tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.pruning.own_text.writing import within_positions
from fasp_lightning.text.batches import check_vocabulary, labelled
from fasp_lightning.text.config import TextConfig, describe
from fasp_lightning.text.reading.files import data_set_of, listed, local_files
from fasp_lightning.text.tokenizer import bos_of
from fasp_lightning.text.tokens import read_text

CALIBRATED, OTHER = "calibrated", "other"


def domain_of(text: TextConfig, calibration: Iterable[TextConfig]) -> str:
    """``"calibrated"`` if a text comes from a source of the calibration text, else ``"other"``.

    Local files of one folder count as one source; which split or part of it is taken does not matter.

    Args:
        text: A text that perplexity is measured on.
        calibration: The texts that the model is calibrated on.
    """
    source = _source(text)
    return CALIBRATED if any(source & _source(one) for one in calibration) else OTHER


def missing_domain(domains: Iterable[str]) -> str | None:
    """What a reader of the figures lacks if they are all of one domain."""
    found = set(domains)
    if found == {OTHER}:
        return (
            "no text that is measured comes from the source of the calibration text: the figures say what pruning "
            "does to other text alone; --evaluation can name held-out text of that source"
        )
    if found == {CALIBRATED}:
        return (
            "every text that is measured comes from the source of the calibration text, where pruning does least harm; "
            "--other_text names another"
        )
    return None


def single_source(calibration: Sequence[TextConfig], own: bool) -> str | None:
    """What a user risks who calibrates on text of one source.

    Args:
        calibration: The texts that are read.
        own: Whether the model's own text is in the calibration too.
    """
    if own or OTHER in {domain_of(text, calibration[:1]) for text in calibration}:
        return None
    return (
        f"all calibration text is of one source, {describe(calibration[0])}: the pruned model may get worse on other "
        "text than the figures on this one say; mix in another by --calibration_mix, or the model's own by "
        "--pruning.own_text"
    )


def _source(text: TextConfig) -> set[tuple[str | None, ...] | Path]:
    if text.kind == "local":
        return {data_set_of(file) for file in local_files(text.source)}
    return {(text.source, text.subset)}


@dataclass(frozen=True)
class Text:
    """A text that is ready to be measured.

    Attributes:
        name: For tables.
        batches: (batch, seq) token ids.
        config: Where it came from.
        read: What was read for it, unless it is built-in: documents, chats among them, and the files of a local text.
        bos: Token that every sequence begins with; ``None`` where it begins with the text.
    """

    name: str
    batches: list[Tensor]
    config: TextConfig
    read: dict[str, Any] = field(default_factory=dict)
    bos: str | None = None

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(batch.numel() for batch in self.batches)


@dataclass(frozen=True)
class Calibration:
    """All text that a model is calibrated on.

    Attributes:
        texts: Texts that are read; none where own text is all.
        own: What the model will write itself, if it does.
    """

    texts: list[Text]
    own: OwnTextConfig | None

    @property
    def name(self) -> str:
        """For tables."""
        return calibration_name(self.configs, self.own)

    @property
    def configs(self) -> list[TextConfig]:
        """Where the texts that are read came from."""
        return [text.config for text in self.texts]

    @property
    def tokens(self) -> int:
        """All tokens, own text among them."""
        return sum(text.tokens for text in self.texts) + own_tokens(self.own)

    @property
    def batches(self) -> list[Any]:
        """For the pruner, own text aside."""
        return [batch for text in self.texts for batch in labelled(text.batches, text.name, text.config.token_weight)]

    def to_dict(self) -> dict[str, Any]:
        """What the report says of it: the first text's settings, and those of the texts mixed in."""
        first, *mix = map(_settings, self.texts) if self.texts else [{}]
        return {"name": self.name, **first, **({"mix": mix} if mix else {})}


def _settings(text: Text) -> dict[str, Any]:
    """The fields of a text, those filled in that it leaves open, what was read, and what its sequences begin with."""
    known = {"read": text.read, "bos": text.bos}
    found = {name: value for name, value in known.items() if value}
    return {**dataclasses.asdict(text.config), **text.config.extent()._asdict(), **found}


def begins_with(texts: Iterable[Text]) -> str | None:
    """Say which texts have sequences that begin with the tokenizer's beginning-of-text token, if any."""
    names = {text.name: text.bos for text in texts if text.bos is not None}
    if not names:
        return None
    token = next(iter(names.values()))
    return f"every sequence of {', '.join(names)} begins with the tokenizer's {token}, which add_bos=false leaves out"


def calibration_name(texts: Sequence[TextConfig], own: OwnTextConfig | None) -> str:
    """Name a mix for a table: "topics (calibration), 0.5 x articles.jsonl, own text"."""
    names = [
        describe(text) if text.token_weight == 1 else f"{text.token_weight:g} x {describe(text)}" for text in texts
    ]
    return ", ".join([*names, *(["own text"] if own is not None else [])])


def own_tokens(own: OwnTextConfig | None) -> int:
    """Tokens of own text."""
    return 0 if own is None else own.sequences * own.seq_len


def load_text(config: TextConfig, tokenizer: Any, model: Any, name: str) -> Text:
    """Tokenize a text, and check that the model can take it.

    Args:
        config: The text.
        tokenizer: The model's tokenizer.
        model: The model, on any device.
        name: The option's name, for messages.

    Raises:
        FaspError: If the text is too short, its sequences longer than a table of learned positions, or a token has no
            embedding.
        FaspOSError: If a file cannot be read.
    """
    inputs = ModelInputs(model)
    inputs.check_length(config.extent().seq_len, name)
    batches, documents, chats = read_text(config, tokenizer)
    for batch in batches:
        check_vocabulary(batch, inputs.vocabulary, describe(config))
    read: dict[str, Any] = {} if config.kind == "builtin" else {"documents": documents, "chats": chats}
    if config.kind == "local":
        read["files"] = listed(local_files(config.source))
    bos = bos_of(tokenizer, config.add_bos, describe(config))
    token = None if bos is None else tokenizer.convert_ids_to_tokens(bos)
    return Text(describe(config), batches, config, read, token)


def load_calibration(texts: list[TextConfig], own: OwnTextConfig | None, tokenizer: Any, model: Any) -> Calibration:
    """Tokenize the calibration texts, and check that the model can take them.

    Args:
        texts: Those of :func:`texts_of`.
        own: The settings of own text.
        tokenizer: The model's tokenizer.
        model: The model, on any device.

    Raises:
        FaspError: As in :func:`load_text`.
        FaspOSError: If a file cannot be read.
    """
    own = own and within_positions(model, own)
    names = ("calibration_mix" if index else "calibration" for index in range(len(texts)))
    return Calibration([load_text(text, tokenizer, model, name) for text, name in zip(texts, names, strict=True)], own)
