"""Small random texts in files."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing


def words(count: int, seed: int = 0, length: int = 120) -> list[str]:
    """Different documents of about so many characters, of random lower-case words."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def word() -> str:
        return "".join(draw.choices(letters, k=draw.randint(2, 8)))

    return [" ".join(word() for _ in range(length // 6)) for _ in range(count)]


def write_rows(path: Path, documents: list[str]) -> str:
    """Write a .jsonl file, one document a row, and return its path."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), "utf-8")
    return str(path)


def with_bos(tokenizer: Any) -> Any:
    """A copy that puts its beginning-of-text token before every text, by a post-processor as Gemma's does."""
    adding = copy.deepcopy(tokenizer)
    token, number = adding.bos_token, adding.bos_token_id
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )
    return adding
