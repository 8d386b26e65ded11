"""How documents become batches of token ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import with_bos
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fasp_lightning.text import tokens
from fasp_lightning.text.config import SPLITS, TextConfig, describe
from fasp_lightning.text.tokens import calibration_batches, documents, draw, pool_size, token_batches

EOS = 1


def word_tokenizer(eos_token: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """One id a word: "w0" is 4, "w1" is 5 and so on; a run of line feeds is a word, too."""
    words = ["<unk>", "<eos>", "\n\n", "\n", *(f"w{number}" for number in range(500))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n\n", "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=eos_token)


def words(start: int, end: int) -> str:
    return " ".join(f"w{number}" for number in range(start, end))


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in texts))
    return str(path)


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    """A text of the words w0 … w399 in one document."""
    file = tmp_path / "numbers.txt"
    file.write_text(words(0, 400))
    return str(file)


def test_documents_stand_end_to_end_with_eos_between(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [words(0, 3), words(3, 4), "", " \n", words(4, 8)])
    (batch,) = token_batches(TextConfig(source, seq_len=11, sequences=None), word_tokenizer())
    assert batch.tolist() == [[4, 5, 6, EOS, 7, EOS, 8, 9, 10, 11, EOS]]


def test_an_eos_that_ends_a_document_is_not_put_again(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [words(0, 2) + " <eos> ", words(2, 4)])
    (batch,) = token_batches(TextConfig(source, seq_len=6, sequences=None), word_tokenizer())
    assert batch.tolist() == [[4, 5, EOS, 6, 7, EOS]]


def test_without_an_eos_line_feeds_stand_between(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [words(0, 2), words(2, 4)])
    (batch,) = token_batches(TextConfig(source, seq_len=6, sequences=None), word_tokenizer(None))
    assert batch.tolist() == [[4, 5, 2, 6, 7, 2]]


def test_a_separator_replaces_eos(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [words(0, 2), words(2, 4)])
    config = TextConfig(source, seq_len=6, sequences=None, separator="\n\n")
    (batch,) = token_batches(config, word_tokenizer())
    assert batch.tolist() == [[4, 5, 2, 6, 7, 2]]


@pytest.mark.parametrize("group", [1, 40, 1_000_000])
def test_tokenizing_in_groups_changes_nothing(group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "GROUP_LENGTH", group)
    source = write(tmp_path / "rows.jsonl", [words(n, n + 7) for n in range(0, 70, 7)])
    (batch,) = token_batches(TextConfig(source, seq_len=80, sequences=1), word_tokenizer())
    assert batch[batch != EOS].tolist() == list(range(4, 74))


def test_sequences_do_not_overlap_and_leave_only_the_rest(numbers: str) -> None:
    batches = token_batches(TextConfig(numbers, seq_len=30, sequences=None, batch_size=4), word_tokenizer())
    assert [tuple(batch.shape) for batch in batches] == [(4, 30), (4, 30), (4, 30), (1, 30)]
    assert all(batch.dtype == torch.int64 for batch in batches)
    assert torch.cat(batches).flatten().tolist() == list(range(4, 4 + 390))


def test_a_sample_is_of_different_sequences_in_the_order_of_the_text(numbers: str) -> None:
    whole = torch.cat(token_batches(TextConfig(numbers, seq_len=10, sequences=None), word_tokenizer()))
    sample = torch.cat(token_batches(TextConfig(numbers, seq_len=10, sequences=20), word_tokenizer()))
    places = [whole.tolist().index(sequence) for sequence in sample.tolist()]
    assert len(places) == 20
    assert places == sorted(set(places))
    assert places != list(range(20))


def test_calibration_batches_have_the_weights_of_their_texts(numbers: str) -> None:
    plain = TextConfig(numbers, seq_len=10, sequences=4, batch_size=2)
    heavy = replace(plain, token_weight=0.5)
    batches = calibration_batches([plain, heavy], word_tokenizer())
    expected = torch.cat(token_batches(plain, word_tokenizer()))
    assert [batch["weight"] for batch in batches] == [1.0, 1.0, 0.5, 0.5]
    assert {batch["source"] for batch in batches} == {describe(plain)}
    for part in (batches[:2], batches[2:]):
        assert torch.equal(torch.cat([batch["input_ids"] for batch in part]), expected)


def test_the_seed_alone_decides_on_the_sample(numbers: str) -> None:
    def sample(seed: int) -> list[Any]:
        torch.rand(seed + 1)  # moves the global state, which must not matter
        config = TextConfig(numbers, seq_len=10, sequences=20, seed=seed)
        return torch.cat(token_batches(config, word_tokenizer())).tolist()

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


@pytest.mark.parametrize(("available", "wanted"), [(1, 1), (7, 7), (7, 3), (5000, 100)])
def test_a_draw_is_of_different_places_that_rise(available: int, wanted: int) -> None:
    places = draw(available, wanted, seed=1).tolist()
    assert places == sorted(set(places))
    assert len(places) == wanted
    assert set(places) <= set(range(available))


def test_every_place_is_drawn_as_often() -> None:
    counts = torch.bincount(torch.cat([draw(10, 4, seed) for seed in range(1000)]), minlength=10)
    assert ((counts - 400).abs() < 80).all()  # five standard deviations


@pytest.mark.parametrize(("wanted", "size"), [(1, 1024), (64, 1024), (65, 1040)])
def test_a_pool_is_much_larger_than_what_is_drawn_from_it(wanted: int, size: int) -> None:
    assert pool_size(wanted) == size


def test_no_more_is_read_than_the_sample_is_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "GROUP_LENGTH", 1)
    monkeypatch.setattr(tokens, "POOL_BLOCKS", 5)
    monkeypatch.setattr(tokens, "POOL_FACTOR", 3)
    read = []

    def endless(*_: object) -> Any:
        while True:
            read.append(words(0, 9))
            yield read[-1]

    monkeypatch.setattr(tokens, "hub_documents", endless)
    token_batches(TextConfig("some/endless", split="train", seq_len=10, sequences=2), word_tokenizer())
    assert len(read) == 6  # 3 blocks a sequence, each a document of nine words and EOS
    read.clear()
    token_batches(TextConfig("some/endless", split="train", seq_len=10, sequences=1), word_tokenizer())
    assert len(read) == 5


@pytest.mark.parametrize(("content", "found"), [("", 0), ("  \n", 0), (words(0, 39), 40), (words(0, 98), 99)], ids=str)
def test_too_short_a_text_names_both_numbers(content: str, found: int, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [content])
    message = rf"source '{source}' is too short: it has {found} tokens, .*sequences=5 of seq_len=20 need 100;"
    with pytest.raises(ValueError, match=message):
        token_batches(TextConfig(source, seq_len=20, sequences=5), word_tokenizer())


def test_just_enough_text_will_do(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [words(0, 99)])
    assert len(token_batches(TextConfig(source, seq_len=20, sequences=5), word_tokenizer())) == 5


def test_all_of_a_text_must_be_one_sequence_at_least(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ["w1"])
    with pytest.raises(ValueError, match=r"it has 2 tokens, and sequences=1 of seq_len=3 need 3;"):
        token_batches(TextConfig(source, seq_len=3, sequences=None), word_tokenizer())


def test_a_document_without_a_split_of_its_own_says_which_split_is_short(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ["w1"])
    empty = next(split for split in SPLITS if not list(documents(TextConfig(source, split=split))))
    with pytest.raises(ValueError, match=rf"\(split '{empty}'\) is too short: it has 0 tokens"):
        token_batches(TextConfig(source, split=empty), word_tokenizer())


def test_special_tokens_are_not_added_to_documents(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", EOS)]
    )
    source = write(tmp_path / "rows.jsonl", [words(0, 2)])
    (batch,) = token_batches(TextConfig(source, seq_len=3, sequences=1), tokenizer)
    assert batch.tolist() == [[4, 5, EOS]]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_local_splits_share_nothing_and_leave_nothing(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"text{suffix}"
    if suffix == ".jsonl":
        write(file, [f"document {number % 200}" for number in range(300)])
    else:
        file.write_text("\n".join(f"line {number} of the text" for number in range(5000)))
    splits = {split: list(documents(TextConfig(str(file), split=split))) for split in SPLITS}
    everything = [document for split in splits.values() for document in split]
    assert sum(len(set(split)) for split in splits.values()) == len(set(everything))
    assert all(splits.values())
    whole = list(documents(TextConfig(str(file))))
    assert sorted("".join(whole)) == sorted("".join(everything))


def test_a_document_keeps_its_split_wherever_it_stands(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(50)]
    one, two = write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", ["new", *reversed(texts)])
    for split in SPLITS:
        before, after = (set(documents(TextConfig(source, split=split))) for source in (one, two))
        assert after - {"new"} == before


@pytest.mark.parametrize("source", ["builtin:topics", "builtin:docstrings"])
def test_builtin_text_needs_a_split(source: str) -> None:
    with pytest.raises(ValueError, match=f"split of source '{source}' must be one of calibration, .* got None"):
        list(documents(TextConfig(source)))


def test_own_text_is_not_read_without_a_model() -> None:
    with pytest.raises(
        ValueError, match=r"whose run has the model that writes it.*set share of the pruning's own_text"
    ):
        next(documents(TextConfig("own_text")))


@pytest.mark.parametrize("split", SPLITS)
def test_builtin_text_gives_batches(split: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = TextConfig(split=split, sequences=3, seq_len=16, batch_size=2)
    assert [len(batch) for batch in token_batches(config, tiny_tokenizer)] == [2, 1]


def test_builtin_and_txt_load_neither_datasets_nor_transformers(numbers: str) -> None:
    code = (
        "import sys; from fasp_lightning.text.tokens import TextConfig, documents\n"
        f"list(documents(TextConfig({numbers!r}))), list(documents(TextConfig(split='test')))\n"
        "print(sorted({'datasets', 'transformers', 'lightning', 'peft'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tokens.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("add_bos", ["auto", True])
def test_every_sequence_begins_with_bos(add_bos: Any, numbers: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    adding = with_bos(tiny_tokenizer) if add_bos == "auto" else tiny_tokenizer
    text = TextConfig(numbers, seq_len=9, sequences=None, add_bos=add_bos)
    found = torch.cat(token_batches(text, adding))
    assert found.shape[1] == 9
    assert set(found[:, 0].tolist()) == {tiny_tokenizer.bos_token_id}
    plain = torch.cat(token_batches(replace(text, seq_len=8, add_bos=False), adding))
    assert torch.equal(found[:, 1:], plain)


def test_bos_takes_no_token_of_the_text_away(numbers: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = TextConfig(numbers, seq_len=9, sequences=3, add_bos=True)
    assert torch.cat(token_batches(text, tiny_tokenizer)).shape == (3, 9)
    with pytest.raises(ValueError, match=r"sequences=1000 of seq_len=9 need 8000"):
        token_batches(replace(text, sequences=1000), tiny_tokenizer)
