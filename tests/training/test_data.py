"""The datamodule: what its batches hold, what it caches, what it refuses."""

from __future__ import annotations

import random
from itertools import chain, combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from tiny import tiny_model
from tiny_text import with_bos, words, write_rows
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fasp_lightning.pruning.perplexity import perplexity
from fasp_lightning.text import tokens
from fasp_lightning.text.config import TextConfig
from fasp_lightning.text.tokenizer import TokenizerTraining
from fasp_lightning.text.tokens import token_batches
from fasp_lightning.training.data import CausalLMDataModule
from fasp_lightning.training.metrics import Perplexity

LOADERS = {"train": "train", "calibration": "calibration", "validation": "val", "test": "test"}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", words(120))


@pytest.fixture
def make(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    def new(**options: Any) -> CausalLMDataModule:
        defaults = {"tokenizer": tiny_tokenizer, "seq_len": 16, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
        return CausalLMDataModule(**defaults | options)

    return new


def loader(data: CausalLMDataModule, role: str) -> Any:
    return getattr(data, f"{LOADERS[role]}_dataloader")()


def sequences(data: CausalLMDataModule, role: str) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in loader(data, role)])


def text_of(data: CausalLMDataModule, role: str) -> str:
    """The tokens of a role in the order of the text, read back."""
    packed = loader(data, role).dataset
    return data.tokenizer.decode(torch.cat([packed[place]["input_ids"] for place in range(len(packed))]))


def on_rank(data: CausalLMDataModule, rank: int, ranks: int) -> CausalLMDataModule:
    """As a trainer of several processes would have it."""
    kwargs = {"rank": rank, "num_replicas": ranks}
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs=kwargs,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        num_training_batches=float("inf"),
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=0, processed=0)))
        ),
    )
    return data


@pytest.mark.parametrize("role", LOADERS)
def test_batches_are_ids_and_equal_labels(role: str, make: Any) -> None:
    batch = next(iter(loader(make(), role)))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_sequences_are_those_that_the_engine_evaluates(make: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = TextConfig("builtin:topics", split="test", seq_len=16, sequences=None)
    assert torch.equal(sequences(make(), "test"), torch.cat(token_batches(config, tiny_tokenizer)))


@pytest.mark.parametrize(("own", "seed"), [(None, 3), (5, 5)])
def test_drawn_sequences_are_those_that_the_engine_draws(
    own: int | None, seed: int, make: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = sequences(make(seed=3, test=[TextConfig(sequences=13, seed=own)]), "test")
    config = TextConfig(split="test", seq_len=16, sequences=13, seed=seed)
    assert torch.equal(found, torch.cat(token_batches(config, tiny_tokenizer)))


def test_what_training_takes_of_its_text_is_not_handed_on(make: Any, rows: str) -> None:
    data, whole = make(train=[TextConfig(rows, sequences=8, epoch_weight=2)]), make(source=rows)
    assert len(loader(data, "train").dataset) == 8
    assert torch.equal(sequences(data, "validation"), sequences(whole, "validation"))


def test_a_text_may_repeat_the_sizes_of_the_data_module(make: Any, rows: str) -> None:
    same = make(source="builtin:topics", test=[TextConfig(rows, seq_len=16, batch_size=4)])
    assert torch.equal(sequences(same, "test"), sequences(make(source="builtin:topics", test=[rows]), "test"))


def test_texts_are_read_from_their_fields(make: Any, rows: str) -> None:
    fields = {"source": rows, "split": "test", "sequences": 5}
    assert make(test=[fields]).roles == make(test=[TextConfig(**fields)]).roles


def test_no_document_stands_in_the_tokens_of_two_roles(make: Any, tmp_path: Path) -> None:
    """Also where equal documents stand in different files. One token a character: documents can be read back."""
    shared, own = words(20, seed=9), {role: words(30, seed) for seed, role in enumerate(LOADERS)}
    texts = {role: [TextConfig(write_rows(tmp_path / f"{role}.jsonl", own[role] + shared))] for role in LOADERS}
    data = make(seq_len=8, batch_size=1, **texts)
    text = {role: text_of(data, role) for role in LOADERS}
    found = {role: {one for one in [*shared, *chain(*own.values())] if one in text[role]} for role in LOADERS}
    assert all(not found[one] & found[other] for one, other in combinations(found, 2))
    assert set(shared[:-1]) <= found["test"]  # the first in the order of precedence; the end may be cut off
    assert found["train"]
    assert not found["train"] & set(shared)


def test_headings_may_stand_in_the_texts_of_two_roles(make: Any, tmp_path: Path) -> None:
    heading = "= Reception ="
    texts = {
        role: [write_rows(tmp_path / f"{role}.jsonl", [heading, *words(30, seed)])]
        for seed, role in enumerate(("train", "test"))
    }
    data = make(source="builtin:topics", **texts)
    assert all(heading in text_of(data, role) for role in ("train", "test"))


def test_the_second_run_does_not_tokenise(make: Any, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(source=rows)
    first.prepare_data()
    expected = sequences(first, "train")

    def fail(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens, "encode_documents", fail)
    second = make(source=rows)
    second.prepare_data()
    second.setup("fit")
    assert torch.equal(sequences(second, "train"), expected)


@pytest.mark.parametrize("change", ["text", "seq_len", "tokenizer", "split"])
def test_what_changes_the_sequences_is_tokenised_anew(change: str, make: Any, rows: str) -> None:
    before = sequences(make(source=rows), "test")
    options: dict[str, Any] = {"source": rows}
    if change == "text":
        write_rows(Path(rows), words(121, seed=5))
    elif change == "seq_len":
        options["seq_len"] = 12
    elif change == "tokenizer":
        options["tokenizer"] = TokenizerTraining(vocab_size=300)
    else:
        options["test"] = [TextConfig(rows, split="train")]
    after = sequences(make(**options), "test")
    assert before.shape != after.shape or not torch.equal(before, after)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_sequence_of_every_role_begins_with_bos(
    streaming: bool, make: Any, rows: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The cache keeps them apart from those without."""
    options = {"source": rows} | ({"streaming": True, "sequences_per_epoch": 8} if streaming else {})
    for role in LOADERS:
        plain, found = (
            sequences(make(tokenizer=one, **options), role) for one in (tiny_tokenizer, with_bos(tiny_tokenizer))
        )
        assert (found[:, 0] == tiny_tokenizer.bos_token_id).all()
        assert not (plain[:, 0] == tiny_tokenizer.bos_token_id).any()


def test_roles_take_add_bos_over_from_training(make: Any, rows: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = make(train=[TextConfig(rows, add_bos=True)], calibration=[TextConfig(rows, add_bos=False)])
    first = {role: set(sequences(data, role)[:, 0].tolist()) for role in ("train", "test", "calibration")}
    bos = tiny_tokenizer.bos_token_id
    assert first["train"] == first["test"] == {bos}
    assert bos not in first["calibration"]


def test_a_killed_writer_leaves_no_half_of_a_text(make: Any, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens, "encode_documents", killed)
    with pytest.raises(KeyboardInterrupt):
        make(source=rows).prepare_data()
    monkeypatch.undo()
    assert len(sequences(make(source=rows), "train"))


def test_loaders_draw_from_no_global_random_state(make: Any) -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()]

    data = make(num_workers=1)
    data.prepare_data()
    before = states()
    for role in LOADERS:
        next(iter(loader(data, role)))
    assert states() == before


def test_processes_train_on_what_one_would_train_on(make: Any) -> None:
    ranks = [list(on_rank(make(batch_size=2), rank, 2).train_dataloader()) for rank in (0, 1)]
    for one, two, joint in zip(*ranks, make(batch_size=4).train_dataloader(), strict=True):
        both = torch.cat([one["input_ids"], two["input_ids"]])
        assert sorted(both.tolist()) == sorted(joint["input_ids"].tolist())


@pytest.mark.parametrize("role", ["validation", "test"])
def test_perplexity_over_processes_is_exact_and_all_have_as_many_batches(role: str, make: Any) -> None:
    model, texts = tiny_model("llama"), [TextConfig("builtin:topics", sequences=13)]
    ranks = [list(loader(on_rank(make(**{role: texts}), rank, 3), role)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    metric = Perplexity()
    with torch.no_grad():
        for batch in chain(*ranks):
            metric.update(model(batch["input_ids"]).logits, batch["labels"])
    alone = [batch["input_ids"] for batch in loader(make(**{role: texts}), role)]
    assert int(metric.tokens) == 13 * 15
    assert float(metric.compute()) == pytest.approx(perplexity(model, alone), rel=1e-6)


def test_a_tokenizer_is_trained_on_the_training_text(make: Any, tmp_path: Path) -> None:
    text = write_rows(tmp_path / "abc.jsonl", ["abracadabra " * 200])
    other = write_rows(tmp_path / "xyz.jsonl", ["xylophone " * 200])
    settings = TokenizerTraining(vocab_size=280)
    data = make(tokenizer=settings, source=other, train=[text])
    vocabulary = data.tokenizer.get_vocab()
    assert "abracadabra" in vocabulary
    assert "xy" not in vocabulary
    assert (data.vocab_size, data.tokenizer.pad_token_id, data.tokenizer.eos_token_id) == (280, 0, 2)
    assert data.tokenizer.decode(data.tokenizer("any text: žluťoučký\n")["input_ids"]) == "any text: žluťoučký\n"


def test_a_trained_tokenizer_is_the_same_each_time_and_kept(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tokenizer": TokenizerTraining(vocab_size=400)}
    first = make(**options).tokenizer.get_vocab()
    elsewhere = make(cache_dir=str(tmp_path / "other"), **options).tokenizer.get_vocab()
    assert first == elsewhere
    monkeypatch.setattr("fasp_lightning.text.tokenizer.train_tokenizer", None)
    assert make(**options).tokenizer.get_vocab() == first


def test_a_missing_test_text_does_not_hinder_training(make: Any, rows: str) -> None:
    data = make(source=rows, test=["missing.jsonl"])
    data.prepare_data()
    data.setup("fit")
    assert len(sequences(data, "train"))
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        data.test_dataloader()


def test_init_reads_no_file(tmp_path: Path) -> None:
    data = CausalLMDataModule("no/such-tokenizer", train=[TextConfig(str(tmp_path / "missing.jsonl"))])
    assert [text.source for text in data.roles.texts["train"]] == [str(tmp_path / "missing.jsonl")]


def test_a_datamodule_without_a_tokenizer_says_so(make: Any) -> None:
    with pytest.raises(ValueError, match="tokenizer must be the name or folder of one"):
        make(tokenizer=None).prepare_data()


def in_a_run(data: CausalLMDataModule, embeddings: int) -> CausalLMDataModule:
    """With a module that holds a GPT-2 of so many embeddings."""
    model = tiny_model("gpt2")
    model.resize_token_embeddings(embeddings)
    on_rank(data, 0, 1).trainer.lightning_module = torch.nn.ModuleList([model])  # type: ignore[union-attr,misc,assignment]
    return data


@pytest.mark.parametrize("streaming", [False, True])
def test_ids_that_occur_are_held_against_the_embeddings(streaming: bool, make: Any, rows: str) -> None:
    """Not the size of the tokenizer; of cached text at setup, of streamed text when a batch is made."""
    stream = {"streaming": True, "sequences_per_epoch": 8} if streaming else {}
    few = TextConfig(write_rows(Path(rows).with_name("few.jsonl"), ["ab" * count for count in range(40, 60)]))
    largest = int(sequences(make(source=rows), "train").max())
    fits = in_a_run(make(source=rows, validation=[few], **stream), largest + 1)
    assert largest + 1 < len(fits.tokenizer)
    fits.setup("fit")
    next(iter(fits.train_dataloader()))
    small = in_a_run(make(source=rows, validation=[few], **stream), largest)
    if streaming:
        small.setup("fit")
    message = rf"input_ids must be in \[0, {largest}\), .*, got {largest}.*'rows.jsonl.*{largest} embeddings"
    with pytest.raises(ValueError, match=message):
        list(small.train_dataloader()) if streaming else small.setup("fit")


def test_sequences_beyond_learned_positions_are_refused_at_setup(make: Any, rows: str) -> None:
    in_a_run(make(source=rows, seq_len=64), 97).setup("fit")
    with pytest.raises(ValueError, match=r"sequences of the data module must have at most 64 tokens.*got 65"):
        in_a_run(make(source=rows, seq_len=65), 97).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len must be 2 or more, got 1"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"sequences_per_epoch": 3}, "sequences_per_epoch must be 4 or more, got 3"),
        ({"streaming": True}, "sequences_per_epoch must be set with streaming, got None"),
        ({"source": "no such thing"}, "source must be one of builtin:topics"),
        (
            {"streaming": True, "sequences_per_epoch": 8, "train": [TextConfig("builtin:topics", sequences=9)]},
            "sequences must be None for a training text that is streamed, got a number for builtin:topics",
        ),
        (
            {"test": [TextConfig(seq_len=32)]},
            r"seq_len of the test text 'topics \(test\)' must be that of the data module, 16, got 32; leave it out",
        ),
        ({"train": [{"source": "a.txt", "batch_size": 2}]}, r"batch_size of the .* text 'a\.txt' must be .*, 4, got 2"),
        ({"calibration": [TextConfig(token_weight=2)]}, "token_weight must be 1 in a data module, got 2 for topics"),
        ({"train": [TextConfig(token_weight=2)]}, "token_weight must be 1 for all but calibration text, got 2"),
        ({"validation": [TextConfig(epoch_weight=2)]}, "epoch_weight must be None for all but training text, got 2"),
        ({"train": [{"weight": 2}]}, "a text must have the fields source, .*epoch_weight, token_weight, got weight"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_too_little_text_for_a_sequence_is_refused(make: Any, tmp_path: Path) -> None:
    short = write_rows(tmp_path / "short.jsonl", ["short"])
    with pytest.raises(ValueError, match=r"the train text 'short.jsonl' is too short: it has 6 tokens, and one"):
        make(source="builtin:topics", train=[short]).setup("fit")
