"""A teacher's answers on disk: what was said, found again by the sequence, whole files or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, random_tokens, tiny_model

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.distillation import TopK, top_k
from fasp_lightning.training.distilling import store as module
from fasp_lightning.training.distilling.store import AnswerStore, Sequences

K = 5


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 3)


@pytest.fixture
def said() -> TopK:
    """Of 7 sequences."""
    with torch.no_grad():
        return top_k(tiny_model("llama")(input_ids=random_tokens(7)).logits, K)


def new(folder: Path, vocabulary: int = VOCAB) -> AnswerStore:
    return AnswerStore(folder, 7, 12, K, vocabulary)


def filled(folder: Path, said: TopK, **options: Any) -> AnswerStore:
    store = new(folder, **options)
    for number, piece in enumerate(store.pieces()):
        store.write(number, TopK(*(part[piece.start : piece.stop] for part in said)))
    return store


@pytest.mark.parametrize("vocabulary", [VOCAB, 2**16 + 1])
def test_any_sequences_are_read_as_they_were_written(vocabulary: int, said: TopK, tmp_path: Path) -> None:
    filled(tmp_path, said, vocabulary=vocabulary)
    store, places = new(tmp_path, vocabulary), [6, 0, 3, 3]
    found = store.read(places)
    assert torch.equal(found.tokens, said.tokens[places])
    assert found.tokens.dtype == torch.int64
    torch.testing.assert_close(found.log_probabilities, said.log_probabilities[places], rtol=2**-11, atol=0)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == store.size


def test_files_that_are_not_whole_are_missing(said: TopK, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path, said)
    assert not store.missing()
    first, second, _ = sorted(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    assert store.missing() == [0, 1]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "staged_file", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write(1, said)
    assert store.missing() == [0, 1]


def test_sequences_are_found_in_any_order(tmp_path: Path) -> None:
    ids = random_tokens(7)
    sequences = Sequences(ids)
    assert sequences.places(ids[[4, 1, 6]]) == [4, 1, 6]
    with pytest.raises(FaspError, match="got another one; set top_k"):
        sequences.places(ids[:1].roll(1, 1))


def test_other_sequences_have_another_digest() -> None:
    ids = random_tokens(7)
    changed = ids.clone()
    changed[6, 11] += 1
    assert len({Sequences(one).digest for one in (ids, changed, ids[:6], ids.flip(0))}) == 4
    assert Sequences(ids).digest == Sequences(ids.clone()).digest
