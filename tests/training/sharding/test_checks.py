"""What cannot be done yet to a sharded model is refused before the run, with the way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import FFN_ONLY, UserModule
from tiny import random_tokens, tiny_model
from tiny_pruning import basic
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from fasp_lightning import FaspError, FASPPruner, PruningConfig, apply_plan
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.training.distilling.config import DistillationConfig
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora
from fasp_lightning.training.sharding import fsdp
from fasp_lightning.training.sharding.checks import check_sharded_model, check_sharded_run

OWN = basic(own_text=OwnTextConfig(tokens=24, seq_len=12))


def strategy(parallel: int = 1, mesh: DeviceMesh | None = None) -> Any:
    made = ModelParallelStrategy()
    tensor = SimpleNamespace(size=lambda: parallel)
    made._device_mesh = {"tensor_parallel": tensor, "data_parallel": mesh}  # type: ignore[assignment]
    made.parallel_devices = [torch.device("cpu")]
    return made


def distilled(module: Any) -> None:
    module.distillation = DistillationConfig()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tensor-parallel": ({"parallel": 2}, r"tensor_parallel_size must be 1, got 2; give all"),
    "own-text": ({"pruning": OWN}, r"pruning\.own_text must be null"),
    "default": ({"pruning": PruningConfig()}, r"pruning\.own_text must be null"),
    "fisher": ({"pruning": basic(score="fisher")}, r"pruning\.score must be 'wanda' or 'magnitude', got 'fisher'"),
    "adaptive": ({"pruning": basic(allocation="adaptive")}, r"pruning\.allocation must be 'uniform', got 'adaptive'"),
    "influence": ({"pruning": basic(allocation="block_influence")}, r"pruning\.allocation .* got 'block_influence'"),
    "lora": ({"recovery": "lora"}, r"recovery must be 'none', 'full' or 'blocks', got adapters"),
    "adapters": ({"change": lambda module: attach_lora(module.lm, LoRAConfig(rank=2))}, r"recovery .* got adapters"),
    "teacher": ({"change": distilled}, r"distillation must be null"),
    "averages": ({"callbacks": [WeightAveraging()]}, r"callbacks must not hold WeightAveraging"),
    "export": ({"exports": True}, r"export_to must be null.*save_distributed_checkpoint=False.*load_from_checkpoint"),
    "all-at-once": (
        {"pruning": PruningConfig(), "recovery": "lora", "exports": True},
        r"pruning\.own_text must .*; recovery must .*; export_to must .*",
    ),
}


@pytest.mark.parametrize(("given", "error"), REFUSED.values(), ids=REFUSED)
def test_setting_that_needs_the_whole_model_is_refused(given: dict[str, Any], error: str) -> None:
    module = UserModule(tiny_model("llama"))
    given.get("change", lambda module: None)(module)
    made: Any = SimpleNamespace(strategy=strategy(given.get("parallel", 1)), callbacks=given.get("callbacks", []))
    options = given.get("pruning", FFN_ONLY), given.get("recovery", "none"), given.get("exports", False)
    with pytest.raises(FaspError, match=f"where ModelParallelStrategy shards the model, {error}.*'ddp'"):
        check_sharded_run(made, module, module.lm, *options)  # type: ignore[arg-type]


def blocks(model: Any, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh)
    return model  # type: ignore[no-any-return]


def test_model_whose_blocks_could_not_be_sharded_again_is_refused(mesh: DeviceMesh) -> None:
    made: Any = SimpleNamespace(strategy=strategy(mesh=mesh))
    whole: Any = tiny_model("llama")
    for model, error in (
        (whole, r"model\.layers\.0 must be sharded by itself .* fully_shard\(block, mesh="),
        (fully_shard(whole, mesh=mesh), r"model\.layers\.0 must be sharded by itself"),
        (
            blocks(tiny_model("llama"), mesh, shard_placement_fn=lambda weight: Shard(weight.ndim - 1)),
            r"model\.layers\.0 must be sharded along dimension 0 .* leave out shard_placement_fn",
        ),
    ):
        with pytest.raises(FaspError, match=error):
            check_sharded_model(made, model)
    offloaded: Any = blocks(tiny_model("llama"), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    elsewhere: Any = SimpleNamespace(strategy=strategy())
    elsewhere.strategy.parallel_devices = [torch.device("meta")]
    with pytest.raises(FaspError, match=r"model\.layers\.0 must be on meta .* leave out offload_policy"):
        check_sharded_model(elsewhere, offloaded)
    check_sharded_model(made, blocks(tiny_model("llama"), mesh))  # type: ignore[arg-type]


def test_torch_whose_internals_are_others_is_refused_before_the_run(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(state: Any) -> None:
        raise AttributeError("'FSDPState' object has no attribute '_modules'")

    made: Any = SimpleNamespace(strategy=strategy(mesh=mesh))
    model = blocks(tiny_model("llama"), mesh)
    monkeypatch.setattr(fsdp, "_take_off", absent)
    with pytest.raises(FaspError, match=r"torch must be .* got .* no attribute '_modules'.*strategy='ddp'"):
        check_sharded_model(made, model)  # type: ignore[arg-type]


def test_sharded_model_is_not_cut_by_what_does_not_gather_it(mesh: DeviceMesh) -> None:
    pruned = tiny_model("llama")
    FASPPruner(FFN_ONLY).prune(pruned, [random_tokens()])
    model: Any = blocks(tiny_model("llama"), mesh)
    remedy = "prune before sharding, or during fit with FASPPruning under ModelParallelStrategy"
    with pytest.raises(FaspError, match=f"must be whole to be pruned.*{remedy}"):
        FASPPruner(FFN_ONLY).prune(model, [random_tokens()])
    with pytest.raises(FaspError, match=f"must be whole to be pruned.*{remedy}"):
        apply_plan(model, pruned.fasp_plan)  # type: ignore[arg-type]
