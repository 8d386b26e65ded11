"""Autocast where it is faster: the probe decides, and the run is that of the Trainer's own precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import UserModule, loader, trainer
from tiny import tiny_model

from fasp_lightning.training.trainer import precision


@pytest.mark.parametrize(("faster", "same_as"), [(True, "bf16-mixed"), (False, "32-true")])
def test_probe_decides_on_autocast(faster: bool, same_as: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "faster_than_fp32", lambda dtype: faster)
    runs = []
    for options in ({"plugins": [precision.AutocastWhereFaster()]}, {"precision": same_as}):
        module = UserModule(tiny_model("llama").train())
        trainer(tmp_path, max_steps=3, **options).fit(module, loader())
        runs.append(module.losses)
    assert runs[0] == runs[1]
    assert torch.tensor(runs[0]).isfinite().all()
