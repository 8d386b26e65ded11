"""A model that was pruned before is sharded over two processes, and trains there as it does in one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from processes import run_ranks
from tiny import random_tokens
from tiny_pruning import BOTH, pruned
from torch.utils.data import DataLoader

from fasp_lightning import save_pruned
from fasp_lightning.training.module import CausalLMModule
from fasp_lightning.training.sharding.shard import shard

SCRIPT = """
import functools, json, os
import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader
from fasp_lightning.training.module import CausalLMModule

data = DataLoader(torch.load(tokens)[int(os.environ["LOCAL_RANK"]) :: 2], batch_size=2)

def fit(epochs, checkpoint=None):
    module = CausalLMModule(folder, optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    trainer = L.Trainer(
        accelerator="cpu", devices=2, max_epochs=epochs, logger=False, enable_progress_bar=False, default_root_dir=out,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False),
    )
    trainer.fit(module, data, data, ckpt_path=checkpoint)
    return module, trainer

fit(1)[1].save_checkpoint(out + "/first.ckpt")
module, trainer = fit(2, out + "/first.ckpt")
trainer.save_checkpoint(out + "/last.ckpt")
weight = module.model.model.layers[0].mlp.down_proj.weight
found = {"whole": list(weight.shape), "local": list(weight.to_local().shape)}
found["loss"] = trainer.callback_metrics["val_loss"].item()
with open(f"{out}/rank{trainer.global_rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pruned folder, and the tokens to train on."""
    save_pruned(pruned("llama", BOTH), tmp_path / "pruned", form="compact")
    torch.save(random_tokens(16), tmp_path / "tokens.pt")
    return tmp_path


@pytest.mark.slow
def test_sharded_training_of_a_pruned_model_stopped_and_resumed_equals_one_process(folder: Path) -> None:
    given = {"folder": str(folder / "pruned"), "tokens": str(folder / "tokens.pt"), "out": str(folder)}
    ended = run_ranks(exec, folder, SCRIPT, given)
    assert [status for status, _ in ended] == [0, 0], ended

    module = CausalLMModule(str(folder / "pruned"), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    data = DataLoader(random_tokens(16), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "default_root_dir": folder}
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=2, **quiet)
    trainer.fit(module, data, data)
    for rank in range(2):
        found = json.loads((folder / f"rank{rank}.json").read_text())
        rows, columns = module.model.model.layers[0].mlp.down_proj.weight.shape
        assert found["whole"] == [rows, columns]
        assert found["local"] == [rows // 2, columns]
        assert found["loss"] == pytest.approx(trainer.callback_metrics["val_loss"].item(), rel=1e-5)
    saved = CausalLMModule.load_from_checkpoint(folder / "last.ckpt")
    assert saved.model.fasp_plan == module.model.fasp_plan
    expected = dict(module.named_parameters())
    for name, value in saved.named_parameters():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


def test_tensor_parallelism_is_refused() -> None:
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(ValueError, match=r"tensor_parallel_size must be 1.* got 2"):
        shard(pruned("llama", BOTH), mesh)
