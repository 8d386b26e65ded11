"""Lightning's finetuning callbacks, which know parameters by name, go along with prunings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from runs import UserModule, loader, trainer
from tiny import tiny_model
from tiny_pruning import basic
from torch import Tensor, nn

from fasp_lightning import FASPPruning


class Finetuned(UserModule):
    """Its head trains first."""

    @property
    def backbone(self) -> nn.Module:
        return self.lm.model

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=1e-2)


def run(folder: Path, steps: tuple[int, ...], resumed: Path | None = None) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Weights, and the names that the optimizer's groups have, after three epochs of four steps."""
    torch.manual_seed(0)
    module = Finetuned(tiny_model("llama", seed=int(resumed is not None)).train())
    events = [{"step": step, "sparsity": 0.1 + step / 50} for step in steps]
    pruning = FASPPruning(events, basic(attention="value_dims"), calibration_sequences=8, validation_batches=0)
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5, verbose=False)
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    options = {"max_steps": -1, "max_epochs": 3, "enable_checkpointing": True}
    made = trainer(folder, pruning, finetuning, saver, **options)
    made.fit(module, loader(8), ckpt_path=resumed, weights_only=False)
    names = {one: name for name, one in module.named_parameters()}
    groups = [[names[one] for one in group["params"]] for group in made.optimizers[0].param_groups]
    return {name: one.detach() for name, one in module.named_parameters()}, groups


@pytest.mark.parametrize("steps", [(2,), (2, 6)])
@pytest.mark.filterwarnings("ignore:.*(eval mode|not resumable).*")
def test_resumed_finetuning_with_value_dims_ends_as_the_whole_run(steps: tuple[int, ...], tmp_path: Path) -> None:
    weights, groups = run(tmp_path / "whole", steps)
    assert sorted(name for group in groups for name in group) == sorted(weights)
    found, found_groups = run(tmp_path / "resumed", steps, tmp_path / "whole" / "epoch=0.ckpt")
    assert found_groups == groups
    for name, value in weights.items():
        assert torch.equal(found[name], value), name


@pytest.mark.filterwarnings("ignore:.*(eval mode|not resumable).*")
def test_groups_of_unfrozen_layers_come_back_after_a_cut(tmp_path: Path) -> None:
    # Their weights stay behind: BaseFinetuning.setup freezes the backbone, and nothing thaws it after that epoch.
    _, groups = run(tmp_path / "whole", (2, 6))
    assert run(tmp_path / "resumed", (2, 6), tmp_path / "whole" / "epoch=1.ckpt")[1] == groups
