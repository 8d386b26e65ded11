"""The loader of the training text: mixed by weight, named by what decides on its order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_text import words, write_rows
from transformers import PreTrainedTokenizerFast

from fasp_lightning.text import token_shards, token_stream
from fasp_lightning.text.config import TextConfig
from fasp_lightning.text.role_cache import RoleCache
from fasp_lightning.text.roles import RoleTexts, as_texts
from fasp_lightning.training.data import CausalLMDataModule
from fasp_lightning.training.loaders.build import TrainingOptions, cached_loader, stream_loader
from fasp_lightning.training.loaders.cached import ResumableLoader
from fasp_lightning.training.loaders.streamed import StreamLoader
from fasp_lightning.training.trainer.resuming import BatchProgress

BUILD = {"map": cached_loader, "stream": stream_loader}
CHANGES = [{}, {"seed": 1}, {"batch_size": 4}, {"world_size": 2}]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "WINDOW", 6)
    monkeypatch.setattr(token_shards, "GROUP_LENGTH", 300)


@pytest.fixture
def make(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    """A cache of two training texts with these weights."""
    paths = [write_rows(tmp_path / f"{seed}.jsonl", words(40, seed)) for seed in (0, 1)]

    def new(*weights: float | None, **fields: Any) -> RoleCache:
        texts = [TextConfig(path, epoch_weight=weight, **fields) for path, weight in zip(paths, weights, strict=True)]
        roles = RoleTexts.resolve("builtin:topics", {"train": as_texts(texts)})
        return RoleCache(roles, tiny_tokenizer, 16, 0, tmp_path / "cache", ("test", "validation", "calibration"))

    return new


def options(**changes: Any) -> TrainingOptions:
    defaults = {"batch_size": 2, "seed": 0, "sequences_per_epoch": 40, "num_workers": 0, "rank": 0, "world_size": 1}
    return TrainingOptions(**defaults | changes, progress=BatchProgress())


@pytest.mark.parametrize(("weights", "counts"), [((1, 1), (20, 20)), ((3, 1), (30, 10)), ((0.3, 0.1), (30, 10))])
def test_an_epoch_of_the_cache_is_divided_by_weight(weights: Any, counts: Any, make: Any) -> None:
    loader = cached_loader(make(*weights), options())
    drawn = Counter(int(place >= loader.dataset.lengths[0]) for place in loader.sampler)
    assert (drawn[0], drawn[1]) == counts


def test_without_weights_texts_have_the_share_of_their_length(make: Any) -> None:
    cache = make(None, None)
    loader = cached_loader(cache, options(sequences_per_epoch=None))
    assert len(loader.sampler) // 2 == sum(loader.dataset.lengths) // 2


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_on_the_order_is_in_its_name(build: Any, change: dict[str, int], make: Any) -> None:
    name, other = build(make(1, 1), options()).order, build(make(1, 1), options(**change)).order
    assert (name == other) is (not change)
    assert other != build(make(2, 1), options(**change)).order


def test_what_is_drawn_is_in_the_name_of_the_order(make: Any) -> None:
    drawn = [make(1, 1), make(1, 1, sequences=20), make(1, 1, sequences=20, seed=1), make(1, 1, sequences=21)]
    assert len({cached_loader(cache, options()).order for cache in drawn}) == 4


def test_a_stream_leaves_out_what_other_roles_have(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    def new(streamed: bool) -> StreamLoader | ResumableLoader:
        data = CausalLMDataModule(
            tiny_tokenizer,
            seq_len=16,
            batch_size=2,
            sequences_per_epoch=12,
            streaming=streamed,
            cache_dir=str(tmp_path),
            seed=1,
        )
        data.prepare_data()
        return data.train_dataloader()

    cached = {tuple(row["input_ids"].tolist()) for row in map(new(False).dataset.__getitem__, range(12))}
    streamed = {tuple(row) for batch in new(True) for row in batch["input_ids"].tolist()}
    assert streamed == cached  # of the training split, from its start


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_an_epoch_without_a_batch_for_each_process_is_refused(build: Any, make: Any) -> None:
    with pytest.raises(ValueError, match=r"it has 4 sequences of seq_len=16, got batch_size=2 on 3 processes"):
        build(make(1, 1), options(sequences_per_epoch=4, world_size=3))


def test_too_little_text_for_a_batch_is_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    short, cache = write_rows(tmp_path / "short.jsonl", words(1)), str(tmp_path / "cache")
    data = CausalLMDataModule(tiny_tokenizer, "builtin:topics", [short], seq_len=16, batch_size=100, cache_dir=cache)
    with pytest.raises(
        ValueError, match=r"must fill a batch on every process: it has .* got batch_size=100 on 1 processes"
    ):
        data.train_dataloader()
