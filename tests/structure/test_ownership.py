"""What is no plain parameter of one place is refused before anything is cut, by name and with the remedy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import basic
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from fasp_lightning import FaspError, FASPPruner, spec_for
from fasp_lightning.structure.resolve import find_blocks, resolve

DOWN = "model.layers.1.mlp.down_proj"


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class Other(torch.Tensor):
    """Stands for sharded and quantised tensors."""


def computed(linear: nn.Module) -> None:
    weight = linear.weight
    del linear.weight
    linear.weight = weight.detach().clone()


def typed(linear: nn.Module) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Other))


def sparse(linear: nn.Module) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse())


def narrow(linear: nn.Module) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def inferred(linear: nn.Module) -> None:
    with torch.inference_mode():
        linear.weight = nn.Parameter(linear.weight.detach().clone())


def bias(linear: nn.Module) -> None:
    linear.bias = nn.Parameter(torch.zeros(linear.out_features))
    prune.random_unstructured(linear, "bias", 0.5)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "mask": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"a mask .*utils\.prune\.remove\(layer, 'wei"),
    "mask-of-a-bias": (bias, r"a mask .*utils\.prune\.remove\(layer, 'bias'\)"),
    "old-weight-norm": (weight_norm, r"weight_norm; .*utils\.remove_weight_norm\(layer, 'weight'\)"),
    "old-spectral-norm": (spectral_norm, r"spectral_norm; .*utils\.remove_spectral_norm\(layer, 'weight'\)"),
    "weight-norm": (parametrizations.weight_norm, r"the parametrization WeightNorm; .*remove_parametrizations"),
    "spectral-norm": (parametrizations.spectral_norm, r"the parametrization SpectralNorm; .*remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, r"the parametrization Orthogonal; .*remove_parametrizations"),
    "own": (lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()), "parametrization Doubled;"),
    "no-parameter": (computed, r"parameter of its own .* computed by Linear; .*layer\.weight = torch\.nn\.Parameter\("),
    "subclass": (typed, "plain dense tensor to be pruned, got Other in Other; prune before sharding or quantising"),
    "sparse": (sparse, r"plain dense tensor .* layout torch\.sparse_coo; .*to_dense"),
    "float8": (narrow, r"plain dense tensor .* torch\.float8_e4m3fn; load the model in float32"),
    "inference": (inferred, r"plain dense tensor.* made in torch\.inference_mode\(\); load the model outside of it"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(("change", "error"), CHANGES.values(), ids=CHANGES)
def test_weight_that_is_no_plain_parameter_is_refused(change: Callable[[Any], Any], error: str) -> None:
    model = tiny_model("llama")
    change(model.get_submodule(DOWN))
    with pytest.raises(FaspError, match=rf"^model\.layers\.1\.mlp\.down_proj\.\w+ must be.*{error}"):
        resolve(model, spec_for(model))


@pytest.mark.parametrize(
    "path", [one for pair in spec_for(tiny_model("phi3")).pairs for one in (pair.consumer, *pair.producers)]
)
def test_every_layer_of_a_pair_is_looked_at(path: str) -> None:
    model = tiny_model("phi3")
    prune.identity(model.get_submodule(f"model.layers.0.{path}"), "weight")
    with pytest.raises(FaspError, match=rf"model\.layers\.0\.{path}\.weight must be a parameter of its own"):
        resolve(model, spec_for(model))


def test_the_named_remedy_helps() -> None:
    model = tiny_model("llama")
    for change, undo in ((prune.identity, prune.remove), (parametrizations.weight_norm, None)):
        layer = model.get_submodule(DOWN)
        change(layer, "weight")
        undo(layer, "weight") if undo else parametrize.remove_parametrizations(layer, "weight")
    FASPPruner(basic()).prune(model, [random_tokens(4, 40)])


def block(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def ffn(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def layer(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj = model.model.layers[0].self_attn.v_proj


def weight(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.weight = model.model.layers[0].self_attn.o_proj.weight


def memory(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data


def within(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj = model.model.layers[0].mlp.up_proj


def keys(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight = attention.k_proj.weight


SHARED = {
    block: ("model.layers.1", "module", "model.layers.0"),
    ffn: ("model.layers.1.mlp", "module", "model.layers.0.mlp"),
    layer: ("model.layers.1.self_attn.v_proj", "module", "model.layers.0.self_attn.v_proj"),
    weight: ("model.layers.1.self_attn.o_proj.weight", "parameter", "model.layers.0.self_attn.o_proj.weight"),
    memory: ("model.layers.1.mlp.up_proj.weight", "parameter", "model.layers.0.mlp.up_proj.weight"),
    within: ("model.layers.0.mlp.up_proj", "module", "model.layers.0.mlp.gate_proj"),
    keys: ("model.layers.0.self_attn.k_proj.weight", "parameter", "model.layers.0.self_attn.v_proj.weight"),
}


@pytest.mark.parametrize(("share", "named"), SHARED.items(), ids=[share.__name__ for share in SHARED])
def test_what_stands_in_two_places_is_refused_and_both_are_named(share: Any, named: tuple[str, str, str]) -> None:
    model = tiny_model("llama")
    share(model)
    second, kind, first = named
    with pytest.raises(FaspError) as raised:
        resolve(model, spec_for(model))
    assert str(raised.value).startswith(f"{second} must be a {kind} of its own to be pruned, got that of {first}: ")
    assert "; put a copy there first, such as" in str(raised.value)


def test_sharing_is_seen_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = type(tiny_model("llama"))(TINY["llama"].config())
    weight(model)
    with pytest.raises(FaspError, match=r"layers\.1\.self_attn\.o_proj\.weight .* that of model\.layers\.0\.self_attn"):
        resolve(model, spec_for(model))


def test_copies_are_modules_of_their_own() -> None:
    model = tiny_model("llama")
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    assert len(resolve(model, spec_for(model))) == 2


def test_what_is_not_cut_may_be_shared() -> None:
    """Embeddings and head, norms, queries, and a second name of all blocks."""
    model = tiny_model("llama-gqa")
    first, second = find_blocks(model, spec_for(model))
    second.input_layernorm, second.self_attn.q_proj = first.input_layernorm, first.self_attn.q_proj
    model.also = model.model.layers
    assert model.lm_head.weight is model.model.embed_tokens.weight
    FASPPruner(basic()).prune(model, [random_tokens(4, 40)])
