"""What :mod:`quality` compares: one row a method, its settings as a function of the sparsity."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from flap import flap
from torch import Tensor, nn

from fasp_lightning import FASPPruner, LearningConfig, OwnTextConfig, PruningConfig

FREE: dict[str, Any] = dict(allocation="adaptive")
"""The free form: what differs from the default. Stock code can load it zero-filled alone."""


def plain(**changes: Any) -> Callable[[float], PruningConfig]:
    """FFN only, without restoration, gradients or own text; whatever the package's default is."""
    return lambda sparsity: PruningConfig.paper(sparsity, attention="none", restoration="none", **changes)


def stock(**changes: Any) -> Callable[[float], PruningConfig]:
    """The package's default, but for FFN widths, which may be any, so that methods compare at equal size; changed."""
    return lambda sparsity: dataclasses.replace(PruningConfig(sparsity=sparsity, multiple_of=1), **changes)


def free(**changes: Any) -> Callable[[float], PruningConfig]:
    """The free form, changed."""
    return stock(**FREE | changes)


def learned(form: Callable[..., Callable[[float], PruningConfig]], **changes: Any) -> Callable[[float], PruningConfig]:
    """A form with learned columns, and other settings of the learning."""
    return form(score="learned", learning=LearningConfig(**changes))


class Method(NamedTuple):
    """One method.

    Attributes:
        note: What it is, for the table.
        config: Its settings; ``None`` for a method that is no setting of the package.
        pictured: It has a line in the picture, where the ablations have none.
    """

    note: str
    config: Callable[[float], PruningConfig] | None = None
    pictured: bool = False


METHODS: dict[str, Method] = {
    "magnitude": Method("FFN only, columns by their weights, nothing restored", plain(score="magnitude"), True),
    "wanda": Method("FFN only, Wanda score, nothing restored", plain(), True),
    "flap-uniform": Method("FLAP's metric and bias compensation, FFN only, one width", None, True),
    "flap": Method("FLAP: heads and FFN units of all blocks compete, bias compensation", None, True),
    "paper": Method(
        "the FASP paper: V/O and FFN, Wanda, ridge to zero, PruningConfig.paper", PruningConfig.paper, True
    ),
    "paper-no-restoration": Method(
        "paper without least squares", lambda sparsity: PruningConfig.paper(sparsity, restoration="none")
    ),
    "stock": Method("the default, PruningConfig(), with FFNs of any width", stock(), True),
    "free": Method(
        "each block loses what it can spare: " + ", ".join(f"{k}={v!r}" for k, v in FREE.items()), free(), True
    ),
    "stock-no-own-text": Method("stock without own text", stock(own_text=None)),
    "stock-own-text-alone": Method("stock calibrated on own text alone", stock(own_text=OwnTextConfig(share=1.0))),
    "stock-fisher": Method("stock with columns by loss sensitivity", stock(score="fisher")),
    "stock-no-restoration": Method("stock without least squares", stock(restoration="none")),
    "stock-ridge-zero": Method("stock with the ridge towards zero", stock(ridge="zero")),
    "stock-damping-auto": Method("stock with damping chosen on held-back tokens", stock(damping="auto")),
    "stock-ffn-alone": Method("stock with the FFN cut alone", stock(attention="none")),
    "stock-value-dims": Method("stock with V/O cut too", stock(attention="value_dims")),
    "stock-value-dims-principal": Method(
        "stock with V/O cut too, in the principal basis", stock(attention="value_dims", value_basis="principal")
    ),
    "stock-kv-groups": Method("stock with whole KV heads cut too", stock(attention="kv_groups")),
    "stock-learned": Method("stock with learned columns", stock(score="learned")),
    "stock-learned-120": Method("the same in 120 steps", learned(stock, steps=120)),
    "stock-learned-rate-0.01": Method("the same with half the rate", learned(stock, rate=0.01)),
    "stock-rounds-2": Method("stock in two rounds", stock(rounds=2)),
    "stock-rounds-4": Method("stock in four rounds", stock(rounds=4)),
    "free-no-own-text": Method("free without own text", free(own_text=None)),
    "free-wanda": Method("free with Wanda columns", free(score="wanda")),
    "free-influence": Method("free, shared by block influence, forward alone", stock(allocation="block_influence")),
    "free-influence-0.2": Method(
        "the same, more evenly", stock(allocation="block_influence", influence_temperature=0.2)
    ),
    "free-no-restoration": Method("free without least squares", free(restoration="none")),
    "free-value-dims": Method("free, V/O cut too", free(attention="value_dims", head_balance="free")),
    "free-value-dims-even": Method("free, as many value dims in each KV head", free(attention="value_dims")),
    "free-learned": Method("free with learned columns and widths", free(score="learned")),
    "free-rounds-2": Method("free in two rounds", free(rounds=2)),
    "free-rounds-4": Method("free in four rounds", free(rounds=4)),
}


def settings(name: str, sparsity: float) -> dict[str, Any]:
    """Everything about a method that decides its outcome, as plain data."""
    config = METHODS[name].config
    return {"method": name, "sparsity": sparsity, "config": None if config is None else config(sparsity).to_dict()}


def own_tokens(name: str, sparsity: float) -> int:
    """Tokens that the model writes itself for its calibration."""
    config = METHODS[name].config
    own = None if config is None else config(sparsity).own_text
    return 0 if own is None else own.tokens


def prune(name: str, model: nn.Module, batches: list[Tensor], sparsity: float) -> tuple[float, float]:
    """Prune a model in place by a method.

    Returns:
        Fraction of the blocks' linear parameters that is gone, and of all parameters.
    """
    config = METHODS[name].config
    if config is None:
        return flap(model, batches, sparsity, adaptive=name == "flap")
    report = FASPPruner(config(sparsity)).prune(model, batches)
    return report.sparsity, report.sparsity_total
