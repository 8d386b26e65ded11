"""A teacher that was asked once answers as it would live, for the sequences of the run alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_lightning import SCRATCH, loader, sgd, silent
from tiny_pruning import basic
from tiny_text import words, write_rows
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.distillation import distillation_loss
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.text.batches import TokenBatch, read_batch
from fasp_lightning.training.callback import FASPPruning
from fasp_lightning.training.data import CausalLMDataModule
from fasp_lightning.training.distilling import distiller, store
from fasp_lightning.training.distilling.config import DistillationConfig
from fasp_lightning.training.distilling.store import Sequences
from fasp_lightning.training.distilling.stored import StoredTeacher, stored, training_sequences, validation_sequences
from fasp_lightning.training.distilling.teacher import LiveTeacher
from fasp_lightning.training.module import CausalLMModule

CONFIG = DistillationConfig(top_k=8, temperature=1.5)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PIECE", 3)


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """A stored teacher, and how many live ones it took."""
    asked: list[LiveTeacher] = []

    def new(
        ids: torch.Tensor, config: DistillationConfig = CONFIG, family: str = "llama"
    ) -> tuple[StoredTeacher, LiveTeacher, int]:
        live, before = LiveTeacher(tiny_model(family), None, config), len(asked)

        def ask() -> LiveTeacher:
            asked.append(live)
            return live

        found = stored(live.identity, ask, Sequences(ids), config, tmp_path, live.model)
        return found, live, len(asked) - before

    return new


def test_its_loss_is_that_of_the_live_one(make: Any) -> None:
    ids = random_tokens(7)
    found, live, _ = make(ids)
    batch, student = TokenBatch(ids[[5, 2]]), tiny_model("llama", seed=3)
    with torch.no_grad():
        logits = student(input_ids=batch.input_ids).logits
    losses = [distillation_loss(logits, one(batch), batch.labels, 1.5, 0.2) for one in (found, live)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    assert found.identity == live.identity


def test_it_knows_whole_sequences_that_it_was_asked_about(make: Any) -> None:
    ids = random_tokens(7)
    found, live, _ = make(ids)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    batches = [
        TokenBatch(ids[[5, 2]]),
        TokenBatch(ids[:, :-1]),
        TokenBatch(random_tokens(7, seed=1)),
        TokenBatch(ids, mask),
    ]
    assert [found.knows(batch) for batch in batches] == [True, False, False, False]
    assert all(live.knows(batch) for batch in batches)


def test_the_model_is_asked_once(make: Any) -> None:
    ids = random_tokens(7)
    assert [make(ids)[2] for _ in range(2)] == [1, 0]
    others = [
        make(ids[:6])[2],
        make(ids, DistillationConfig(top_k=9, temperature=1.5))[2],
        make(ids, DistillationConfig(top_k=8))[2],
        make(ids, family="opt")[2],
    ]
    assert others == [1, 1, 1, 1]


def test_what_was_stopped_goes_on_with_the_next_file(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, said = random_tokens(7), []
    ask = LiveTeacher.__call__

    def counted(self: LiveTeacher, batch: TokenBatch) -> Any:
        if len(said) == 2:
            said.append(0)
            raise KeyboardInterrupt
        said.append(len(batch.input_ids))
        return ask(self, batch)

    monkeypatch.setattr(LiveTeacher, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        make(ids)
    make(ids)
    assert said == [3, 3, 0, 1]


class OneOfTwo(Processes):
    """A process whose folder the other one does not see."""

    count = 2


def test_processes_divide_the_files_and_refuse_a_folder_that_they_do_not_share(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "everyone", OneOfTwo)
    with pytest.raises(FaspError, match="cache_dir must be a folder that all processes share"):
        make(random_tokens(7))
    assert sorted(file.stem for file in tmp_path.rglob("*.topk")) == ["000000", "000002"]


def test_sequences_come_from_the_training_data_whatever_its_order() -> None:
    shuffled = DataLoader(loader(10).dataset, batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    found = training_sequences(training_on(shuffled))
    assert torch.equal(torch.get_rng_state(), before)
    for batch in shuffled:
        assert len(found.places(read_batch(batch).input_ids)) == len(batch["input_ids"])


def padded() -> list[dict[str, torch.Tensor]]:
    mask = torch.ones(12, dtype=torch.long)
    mask[-2:] = 0
    return [{"input_ids": random_tokens(1)[0], "attention_mask": mask}] * 4


@pytest.mark.parametrize("data", [padded, lambda: [*random_tokens(2), *random_tokens(2, 9)], list])
def test_validation_data_that_cannot_be_asked_beforehand_is_not(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = [DataLoader(data(), batch_size=2)] if data() else []
    monkeypatch.setattr("fasp_lightning.training.distilling.stored.validation_loaders", lambda _: loaders)
    assert validation_sequences(SimpleNamespace(), 2) is None


def training_on(data: Any) -> Any:
    """As a trainer has its loader when training starts."""
    return SimpleNamespace(fit_loop=SimpleNamespace(_combined_loader=SimpleNamespace(flattened=[data])))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from random_tokens(4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Stream(), "streamed"),
        (padded(), "padding"),
        ([*random_tokens(2), *random_tokens(2, 9)], "several lengths"),
    ],
    ids=["streamed", "padded", "lengths"],
)
def test_what_cannot_be_asked_beforehand_is_refused(data: Any, message: str) -> None:
    with pytest.raises(FaspError, match=f"top_k must be null .*{message}.*live"):
        training_sequences(training_on(DataLoader(data, batch_size=2)))


class Noting(L.Callback):
    """Notes the losses, and writes a checkpoint after the third step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        if trainer.global_step == 3:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "3.ckpt")


@pytest.fixture
def fit(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    """Losses of a run of five steps, the last three of them with a teacher, and divergences on validation text."""
    text = write_rows(tmp_path / "rows.jsonl", words(40))

    def run(name: str, k: int | None, ckpt_path: Path | None = None, batches: int = 2) -> tuple[list[float], Any]:
        data = CausalLMDataModule(tiny_tokenizer, text, seq_len=8, batch_size=4, cache_dir=str(tmp_path / "cache"))
        sure = SCRATCH | {"vocab_size": data.vocab_size, "dropout": 0.0, "init_std": 0.5}  # much is lost
        module = CausalLMModule(config=sure, optimizer=sgd, distillation=DistillationConfig(top_k=k))
        events = {"calibration_sequences": 4, "validation_batches": batches}
        noting, pruning = Noting(), FASPPruning([{"step": 2, "sparsity": 0.2}], basic(), **events)
        made = silent(tmp_path / name, max_steps=5, callbacks=[noting, pruning])
        made.fit(module, data, ckpt_path=ckpt_path)
        return noting.losses, [(record.kl_pruned, record.kl_recovered) for record in pruning.records]

    return run


def test_a_run_learns_from_it_as_from_the_live_one(fit: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Where hardly anything is left out: all tokens of the vocabulary but one."""
    found, live = (fit("run", k) for k in (len(tiny_tokenizer) - 1, None))
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(live[0]), rtol=5e-3, atol=0)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(live[1]), rtol=5e-3, atol=0)


def test_no_second_model_is_read_and_a_resumed_run_asks_nobody(fit: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a second model")

    for name in ("load_model", "written_beside"):
        monkeypatch.setattr(distiller, name, fail)
    losses, ((pruned, recovered),) = fit("whole", 8)
    monkeypatch.setattr(LiveTeacher, "__init__", fail)
    assert fit("resumed", 8, tmp_path / "whole" / "3.ckpt") == (losses[3:], [(pruned, recovered)])
    assert fit("other validation", 8, tmp_path / "whole" / "3.ckpt", 3) == (losses[3:], [(pruned, None)])
