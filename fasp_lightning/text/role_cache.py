"""The tokenised texts of all roles, read from the cache or put there, without a document in common."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from fasp_lightning.errors import FaspError
from fasp_lightning.staging import fingerprint
from fasp_lightning.text.config import OWN_TEXT, TextConfig, describe
from fasp_lightning.text.packed_cache import FORMAT, Tokenised, TooShort, drawn, tokenised, without
from fasp_lightning.text.roles import ROLES, RoleTexts
from fasp_lightning.text.tokenizer import tokenizer_digest
from fasp_lightning.text.tokens import POOL_BLOCKS, Packing, pool_size

log = logging.getLogger(__name__)

Unreadable = (FaspError, OSError)
"""What says that a text cannot be read."""


class RoleCache:
    """Tokenises the texts of roles, once.

    A role leaves out the documents of those before it in ``ROLES``, so these are read first. One of them that
    can't be read (a data set may have no test split) is an error only where it is asked for itself.

    Args:
        roles: Which texts.
        tokenizer: A tokenizer of transformers.
        seq_len: Tokens of a sequence.
        seed: Seed of the drawing of sequences, of texts that set none.
        folder: The cache.
        short: Roles of which "auto" sequences are the first ``POOL_BLOCKS``, instead of all.

    Attributes:
        packings: How each text of a role is cut.
        written: Own text, by role and index among its texts; who has the model puts it here.

    Raises:
        FaspError: If sequences of a text should begin with a token that the tokenizer hasn't.
    """

    def __init__(
        self, roles: RoleTexts, tokenizer: Any, seq_len: int, seed: int, folder: Path, short: tuple[str, ...]
    ) -> None:
        self.roles, self.tokenizer, self.seq_len, self.seed = roles, tokenizer, seq_len, seed
        self.folder, self.short = folder, short
        self.packings = {
            role: [Packing.of(text, tokenizer, seq_len) for text in texts] for role, texts in roles.texts.items()
        }
        self._digest = tokenizer_digest(tokenizer)
        self._found: dict[str, list[Tokenised] | Exception] = {}
        self.written: dict[tuple[str, int], Tokenised] = {}

    def get(self, role: str) -> list[Tokenised]:
        """The texts of a role, tokenised or written.

        Args:
            role: One of ``ROLES``.

        Raises:
            FaspError: As :meth:`read`, or if own text is not written.
        """
        texts, read = self.roles.texts[role], iter(self.read(role))
        return [next(read) if text.kind != "own" else self._own(role, index) for index, text in enumerate(texts)]

    def read(self, role: str) -> list[Tokenised]:
        """The texts of a role that are read, tokenised: all but own text.

        Args:
            role: One of ``ROLES``.

        Raises:
            FaspFileNotFoundError: If a local file isn't there.
            FaspError: If a text can't be read, or has not one sequence or fewer than it is to give.
        """
        if role not in self._found:
            try:
                texts = self.roles.texts[role]
                self._found[role] = [self._text(role, n) for n, text in enumerate(texts) if text.kind != "own"]
            except Unreadable as error:
                self._found[role] = error
        found = self._found[role]
        if isinstance(found, Exception):
            raise found
        return found

    def ready(self, role: str) -> bool:
        """Read the texts of a role if they can be read; say in the log if not."""
        known = role in self._found
        try:
            self.read(role)
        except Unreadable as error:
            if not known:
                log.warning("there is no %s text, which matters only if it is asked for: %s", role, error)
            return False
        return True

    def before(self, role: str) -> list[Tokenised]:
        """The texts whose documents a role leaves out."""
        earlier = [name for name in ROLES[: ROLES.index(role)] if self.ready(name)]
        return [text for name in earlier for text in self.read(name)]

    def taken(self, role: str) -> frozenset[str]:
        """Marks of the documents that a role leaves out, by :func:`~fasp_lightning.text.splits.distinct`."""
        return frozenset().union(*(text.documents for text in self.before(role)))

    def key(self, role: str, index: int, limit: int | None) -> str:
        """Name of one text of a role in the cache.

        Args:
            role: One of ``ROLES``.
            index: Which of its texts.
            limit: Number of sequences that are tokenised at most.
        """
        earlier = [text.key for text in self.before(role)]
        bos = self.packings[role][index].bos
        parts = {"text": self.roles.identity(role, index), "bos": bos, "limit": limit, "without": earlier}
        return fingerprint(FORMAT, self._digest, self.seq_len, parts)

    def _own(self, role: str, index: int) -> Tokenised:
        if (role, index) not in self.written:
            raise FaspError(
                f"the {role} text {OWN_TEXT} must be written by the model of a run, got none; let a Trainer set the "
                "data module up, or name another text"
            )
        return self.written[role, index]

    def _text(self, role: str, index: int) -> Tokenised:
        text = self.roles.texts[role][index]
        limit = POOL_BLOCKS if text.sequences == "auto" and role in self.short else None
        if text.number is not None:
            limit = pool_size(text.number)
        opened = partial(self._documents, role, index)
        key = self.key(role, index, limit)
        try:
            found = tokenised(self.folder, key, opened, self.packings[role][index], limit)
            return found if text.number is None else drawn(found, text.number, text.extent(seed=self.seed).seed)
        except TooShort as error:
            raise FaspError(_shortage(text, role, self.roles.sharing(text), error)) from error

    def _documents(self, role: str, index: int) -> Any:
        return without(self.roles.documents(role, index), self.taken(role))


def _shortage(text: TextConfig, role: str, sharing: list[str], error: Exception) -> str:
    divided = f" (what falls to {role}, as {', '.join(sharing)} divide it)" if len(sharing) > 1 else ""
    return (
        f"the {role} text {describe(text)!r}{divided} is too short: {error}; give more text, or lower seq_len "
        f"or sequences, or give {role} a text of its own"
    )
