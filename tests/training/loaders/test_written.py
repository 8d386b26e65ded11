"""Own text as data of a run: written by the dense model, once, the same after a stop, each role's apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_lightning import SCRATCH, sgd, silent
from tiny_text import words, write_rows
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.config import OwnTextConfig, PruningConfig
from fasp_lightning.pruning.own_text import writing
from fasp_lightning.pruning.own_text.writing import own_text
from fasp_lightning.text.config import TextConfig
from fasp_lightning.training.callback import FASPPruning
from fasp_lightning.training.data import CausalLMDataModule
from fasp_lightning.training.loaders import written
from fasp_lightning.training.module import CausalLMModule

pytestmark = pytest.mark.filterwarnings("ignore:.*(workers|logging interval|val_dataloader).*")

CUT = PruningConfig(own_text=None, attention="none", multiple_of=1)


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "PIECE", 6)
    monkeypatch.setattr(written, "TRAINING", 16)
    monkeypatch.setattr(written, "OTHERS", 4)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The first tokens of each piece that was sampled, and not read from the cache."""
    calls: list[Tensor] = []
    sample = writing.sample
    monkeypatch.setattr(writing, "sample", lambda *given: (calls.append(given[1]), sample(*given))[1])
    return calls


@pytest.fixture
def make(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    def new(**options: Any) -> CausalLMDataModule:
        fixed = {"tokenizer": tiny_tokenizer, "seq_len": 8, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
        return CausalLMDataModule(**fixed | {"source": "own_text"} | options)

    return new


class Noting(CausalLMModule):
    """Notes the batches that it trains on."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(config=SCRATCH | {"vocab_size": vocabulary}, optimizer=sgd)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"])
        return super().training_step(batch, batch_idx)


class Saver(L.Callback):
    """Writes a checkpoint after the second step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "2.ckpt")


def fit(folder: Path, data: CausalLMDataModule, ckpt_path: Path | None = None, **options: Any) -> Noting:
    module = Noting(data.vocab_size)
    pruning = FASPPruning([{"step": 1, "sparsity": 0.2}], CUT, calibration_sequences=4, validation_batches=1)
    silent(folder, **{"max_steps": 3, "callbacks": [pruning, Saver()]} | options).fit(module, data, ckpt_path=ckpt_path)
    return module


def rows(data: CausalLMDataModule, role: str) -> Tensor:
    packed = data._sequences(role)
    return torch.stack([packed[place]["input_ids"] for place in range(len(packed))])


def test_it_trains_validates_and_calibrates_on_text_of_each_roles_own(tmp_path: Path, make: Any) -> None:
    data = make()
    module = fit(tmp_path, data)
    assert module.model.fasp_plan is not None
    found = {role: rows(data, role) for role in ("train", "calibration", "validation", "test")}
    assert [len(text) for text in found.values()] == [16, 4, 4, 4]
    trained = torch.cat(module.seen)
    assert all((row == found["train"]).all(1).any() for row in trained)
    assert len(torch.cat(list(found.values())).unique(dim=0)) == 28


def test_the_dense_model_writes_it_although_the_run_prunes(tmp_path: Path, make: Any) -> None:
    """In pieces, by seeds of their own, as calibration's own text is."""
    data = make()
    dense = Noting(data.vocab_size).model
    fit(tmp_path, data)
    pieces = written._pieces(data._texts(), 16, (0, "train", 0))
    assert [piece.sequences for piece in pieces] == [6, 6, 4]
    assert len({piece.seed for piece in pieces}) == 3
    settings = [OwnTextConfig(tokens=piece.tokens, seq_len=8, seed=piece.seed) for piece in pieces]
    starts = written._starts(data._texts(), dense)
    assert not set(starts.tolist()) & set(data.tokenizer.all_special_ids)
    expected = torch.cat([torch.cat(own_text(dense, one, starts=starts)) for one in settings])
    assert torch.equal(rows(data, "train"), expected)


def test_a_resumed_run_trains_on_the_same_text_without_the_cache(tmp_path: Path, make: Any, sampled: Any) -> None:
    whole = fit(tmp_path, make()).seen
    sampled.clear()
    resumed = fit(tmp_path / "resumed", make(cache_dir=str(tmp_path / "other")), tmp_path / "2.ckpt").seen
    assert sampled
    assert torch.equal(torch.cat(resumed), torch.cat(whole[2:]))


def test_it_is_sampled_once_and_a_longer_one_goes_on_from_there(tmp_path: Path, make: Any, sampled: Any) -> None:
    fit(tmp_path, make())
    times = len(sampled)
    fit(tmp_path, make())
    assert len(sampled) == times
    longer = make(train=[TextConfig("own_text", sequences=24)], validation=["own_text"], calibration=["own_text"])
    fit(tmp_path, longer)
    assert [len(starts) for starts in sampled[times:] if len(starts) != 4] == [6, 6]


def test_mixed_it_has_its_share_and_starts_like_the_text_that_calibrates(
    tmp_path: Path, make: Any, sampled: Any
) -> None:
    """Roles without a text of their own take training's, but not the model's."""
    file = write_rows(tmp_path / "rows.jsonl", words(120))
    texts = [TextConfig("own_text", epoch_weight=3), TextConfig(file, epoch_weight=1)]
    data = make(source=None, train=texts, sequences_per_epoch=12)
    module = fit(tmp_path, data)
    own = rows(data, "train")[:16]
    assert sum(bool((row == own).all(1).any()) for row in torch.cat(module.seen)) == 9
    assert not any((row == own).all(1).any() for role in ("validation", "calibration") for row in rows(data, role))
    assert set(torch.cat(sampled).tolist()) <= set(rows(data, "calibration")[:, 0].tolist())


def test_bfloat16_runs_write_in_it_and_leave_the_model(tmp_path: Path, make: Any, monkeypatch: Any) -> None:
    seen: list[Any] = []
    sample = writing.sample
    monkeypatch.setattr(writing, "sample", lambda model, *rest: (seen.append(model.dtype), sample(model, *rest))[1])
    module = fit(tmp_path, make(), precision="bf16-mixed")
    assert set(seen) == {torch.bfloat16}
    assert module.model.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in module.model.parameters())


def test_a_model_that_is_pruned_already_does_not_write(tmp_path: Path, make: Any) -> None:
    module = fit(tmp_path, make())
    with pytest.raises(FaspError, match="pruned already; start from the dense one"):
        silent(tmp_path, max_steps=1).fit(module, make())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streaming": True, "sequences_per_epoch": 8}, "streaming must be false"),
        ({"seq_len": 65}, "at most 64"),
        ({"train": [{"source": "own_text", "sequences": None}]}, "give a number of sequences"),
        ({"train": [{"source": "own_text", "split": "train"}]}, "leave them out"),
    ],
)
def test_what_cannot_be_written_is_refused(options: Any, message: str, tmp_path: Path, make: Any) -> None:
    with pytest.raises(FaspError, match=message):
        fit(tmp_path, make(**options))


def test_without_a_run_nobody_writes(make: Any) -> None:
    data = make()
    data.prepare_data()
    with pytest.raises(FaspError, match="pass the data module to a Trainer"):
        data.setup("fit")
