"""The tokenizer of a run: loaded, or trained on the spot."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fasp_lightning.errors import FaspError
from fasp_lightning.staging import place
from fasp_lightning.text.reading.chats import rendered

SPECIALS = ("<pad>", "<bos>", "<eos>")
"""Special tokens of a tokenizer trained here, ids 0, 1 and 2."""

ALPHABET = 256
"""Byte-level tokenizers know every byte: no text has an unknown token."""


@dataclass(frozen=True)
class TokenizerTraining:
    """Train a byte-level BPE tokenizer on the training text, for a model that is trained from scratch.

    Attributes:
        vocab_size: Number of tokens, the special ones and the 256 bytes included; a short text may give fewer.
        min_frequency: A pair of tokens is merged if the text has it at least so often.
        characters: Number of characters of the text, from its start, that it is trained on at most.

    Raises:
        FaspError: If a field is outside its range.
    """

    vocab_size: int = 4096
    min_frequency: int = 2
    characters: int = 100_000_000

    def __post_init__(self) -> None:
        least = ALPHABET + len(SPECIALS)
        if self.vocab_size < least:
            raise FaspError(
                f"vocab_size must be {least} or more (the bytes and the special tokens), got {self.vocab_size}"
            )
        for name in ("min_frequency", "characters"):
            if getattr(self, name) < 1:
                raise FaspError(f"{name} must be 1 or more, got {getattr(self, name)}")


def train_tokenizer(documents: Iterable[str], settings: TokenizerTraining) -> Any:
    """Train a tokenizer; the same documents give the same one.

    Args:
        documents: The text.
        settings: Size of the vocabulary and the like.

    Returns:
        A fast tokenizer of transformers with ``SPECIALS`` as padding, beginning and end of a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(documents, settings.characters), trainer)
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def trained_tokenizer(folder: Path, documents: Iterable[str], settings: TokenizerTraining) -> Any:
    """The tokenizer in a cache folder, trained and put there the first time.

    Args:
        folder: Where it is kept; its name must tell apart whatever gives other tokenizers.
        documents: The text; read only if the folder isn't there.
        settings: Size of the vocabulary and the like.
    """
    from transformers import PreTrainedTokenizerFast

    if not folder.is_dir():
        trained = train_tokenizer(documents, settings)
        place(folder, trained.save_pretrained)
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash all that decides on a tokenizer's ids, as 64 hex digits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else f"{type(tokenizer)}{sorted(tokenizer.get_vocab().items())}"
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(f"{rules}{tokenizer.eos_token_id}{template}".encode()).hexdigest()


def bos_of(tokenizer: Any, add_bos: bool | Literal["auto"], text: str) -> int | None:
    """The token that every sequence of a text begins with; ``None`` where it begins with the text.

    Args:
        tokenizer: A tokenizer of transformers.
        add_bos: Whether there is one; "auto" is what the tokenizer itself does, which is tried: it may add the token
            by a setting, or by a post-processor that no attribute tells of.
        text: The text, for the message.

    Raises:
        FaspError: If there should be one, and the tokenizer has none.
    """
    bos: int | None = tokenizer.bos_token_id
    if add_bos == "auto":
        plain, own = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
        return bos if bos is not None and own[:1] == [bos] != plain[:1] else None
    if add_bos and bos is None:
        raise FaspError(
            f"add_bos must be false or 'auto' for a tokenizer without a beginning-of-text token, got {add_bos} for "
            f"{text!r}; give the tokenizer a bos_token, or leave add_bos out"
        )
    return bos if add_bos else None


def _first(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Documents until there are so many characters."""
    for document in documents:
        if characters <= 0:
            return
        yield rendered(document, None)[:characters]
        characters -= len(document)
