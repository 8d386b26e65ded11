"""The settings validate and document themselves."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from fasp_lightning import PruningConfig
from fasp_lightning.pruning.config import OwnTextConfig

BAD = {
    "sparsity": [-0.1, 1.0, 1.3, float("nan"), float("inf")],
    "attention": ["heads", "VALUE_DIMS", None],
    "head_balance": ["uneven"],
    "value_basis": ["pca"],
    "score": ["l2"],
    "sensitivity_tokens": [0],
    "allocation": ["global"],
    "rounds": [0],
    "restoration": ["ols"],
    "ridge": ["mean"],
    "damping": [-1e-9, float("nan"), float("inf"), "cv"],
    "multiple_of": [0, -8],
    "micro_batch_size": [0, -1],
    "device": ["gpu0", ""],
    "offload": ["ram"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_value_is_named_with_its_argument(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*got .*{re.escape(str(value))}"):
        PruningConfig(**{name: value})


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.999])
def test_ends_of_the_range_are_taken(sparsity: float) -> None:
    assert PruningConfig(sparsity).sparsity == sparsity


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PruningConfig().sparsity = 0.5


def test_every_field_is_documented_once() -> None:
    documented = re.findall(r"(?m)^        (\w+): ", PruningConfig.__doc__)
    assert documented == [field.name for field in fields(PruningConfig)]


def test_paper_settings_take_changes() -> None:
    paper = PruningConfig.paper(0.3, damping=0.5, multiple_of=64)
    assert (paper.sparsity, paper.damping, paper.multiple_of, paper.ridge) == (0.3, 0.5, 64, "zero")
    assert PruningConfig.paper() == PruningConfig.paper(sparsity=0.2)


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(),
        PruningConfig.paper(0.3, device="cpu", micro_batch_size=4),
        PruningConfig(own_text=OwnTextConfig(tokens=640, share=1.0), damping="auto", allocation="adaptive", rounds=2),
    ],
    ids=["default", "paper", "others"],
)
def test_settings_are_plain_data_both_ways(config: PruningConfig) -> None:
    assert PruningConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_default_needs_no_gradients_and_writes_own_text_which_the_papers_does_not() -> None:
    assert (PruningConfig().score, PruningConfig().own_text) == ("auto", OwnTextConfig())
    assert (PruningConfig.paper().score, PruningConfig.paper().own_text) == ("wanda", None)
    assert PruningConfig().allocation == PruningConfig.paper().allocation == "uniform"
