"""What ``fully_shard`` has put on is taken off wholly, and put on again as it was."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fasp_lightning.training.sharding.fsdp import opened

POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(mesh: DeviceMesh, name: str = "llama", **options: Any) -> Any:
    """Each block, and two parts of it, are units; a weight of it is none of them."""
    model: Any = tiny_model(name)
    ignored = {block.input_layernorm.weight for block in model.model.layers}
    for block in model.model.layers:
        fully_shard([block.self_attn, block.mlp], mesh=mesh, **options)
        fully_shard(block, mesh=mesh, ignored_params=ignored, **options)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    return model


def hooks(model: nn.Module) -> Counter[str]:
    """How many hooks of each kind a model has."""
    kinds = [name for name in vars(model) if name.endswith("_hooks")]
    return Counter({kind: sum(len(getattr(module, kind)) for module in model.modules()) for kind in kinds})


def trained(model: Any) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for seed in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=random_tokens(seed=seed), labels=random_tokens(seed=seed), use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_open_model_is_as_it_was_before_it_was_sharded(mesh: DeviceMesh) -> None:
    plain, model = tiny_model("llama"), sharded(mesh)
    trained(model)
    opened(model)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert hooks(model) == hooks(plain)


@pytest.mark.parametrize("options", [{}, {"mp_policy": POLICY}, {"reshard_after_forward": False}], ids=str)
def test_closed_model_trains_on_as_if_it_had_never_been_opened(options: dict[str, Any], mesh: DeviceMesh) -> None:
    outcomes = []
    for opens in (False, True):
        model = sharded(mesh, **options)
        model.model.layers[1].set_gradient_divide_factor(3.0)
        first = trained(model)
        if opens:
            before = hooks(model)
            for block in model.model.layers:
                opened(block).close()
            opened(model, model.model.layers).close()
            assert hooks(model) <= before  # those of state dicts come with the first forward
        outcomes.append((first, trained(model)))
        groups = [
            fully_shard.state(one)._fsdp_param_groups[0] for one in model.modules() if isinstance(one, FSDPModule)
        ]
        assert [group.post_forward_mesh_info is None for group in groups[1:]] == [
            "reshard_after_forward" in options
        ] * len(groups[1:])
        assert [group.gradient_divide_factor for group in groups].count(3.0) == 1
    assert outcomes[0] == outcomes[1]


def test_tied_weights_stay_tied_and_the_replaced_ones_are_told(mesh: DeviceMesh) -> None:
    model: Any = tiny_model("gemma")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    old = dict(model.named_parameters())
    around = opened(model, model.model.layers)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    replaced = around.close()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    new = dict(model.named_parameters())
    assert {old[name] for name in old if old[name] is not new[name]} == replaced.keys()
    assert all(replaced.get(old[name], old[name]) is new[name] for name in old)
