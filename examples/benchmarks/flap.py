"""FLAP, to compare with: fluctuation of a consumer's inputs as the score, the lost mean as a new bias, no restoration.

An, Zhao, Yu, Tang, Wang: "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2023,
arXiv:2312.11983. Written anew from the paper, with two things as the authors' code has them: the attention's metric is
squared, and a head's metric is the mean over its columns. With grouped queries a KV head goes with its query heads.

What is removed is set to zero, which gives the perplexity of the model without it; parameters are counted as if it
were gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasp_lightning import PruningConfig, spec_for
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.structure.modes import evaluating
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.resolve import is_linear, linear_parameters


class Moments:
    """Mean and variance over all tokens of what comes into a module; used as its forward pre-hook."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add a batch."""
        rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        self.sums += torch.stack([rows.sum(0), rows.square().sum(0)])
        self.tokens += len(rows)

    @property
    def mean(self) -> Tensor:
        """(n,) means."""
        return self.sums[0] / self.tokens

    @property
    def variance(self) -> Tensor:
        """(n,) variances."""
        return (self.sums[1] / self.tokens - self.mean.square()).clamp_min(0)


@dataclass
class Consumer:
    """One consumer of one block.

    Attributes:
        pair: Its pair.
        unit_columns: (units, columns of a unit) which columns go together.
        cost: Parameters that go with a unit.
        moments: Of its inputs.
    """

    pair: ResolvedPair
    unit_columns: Tensor
    cost: int
    moments: Moments

    def metric(self) -> Tensor:
        """(columns,) WIFV: the variance of a column's input times the squared norm of its weights."""
        return self.moments.variance * self.pair.weight.double().square().sum(0)

    def standardised(self) -> Tensor:
        """(units,) metric of the adaptive form: comparable between layers, and between heads and FFN units."""
        metric = self.metric().square() if self.pair.spec.kind == "value" else self.metric()
        return ((metric - metric.mean()) / metric.std())[self.unit_columns].mean(1)

    @torch.no_grad()
    def remove(self, units: Tensor) -> int:
        """Remove units, and put what they gave on average into the bias; returns the parameters that are gone."""
        columns = self.unit_columns[units].reshape(-1)
        weight, linear = self.pair.factors[0], self.pair.consumer
        lost = (weight[:, columns].double() @ self.moments.mean[columns]).to(weight.dtype)
        weight[:, columns] = 0
        if linear.bias is not None:
            linear.bias += lost
            return self.cost * len(units)
        linear.bias = nn.Parameter(lost)
        return self.cost * len(units) - len(lost)


def flap(model: nn.Module, batches: Iterable[Tensor], sparsity: float, adaptive: bool = True) -> tuple[float, float]:
    """Prune a dense model in place.

    Args:
        model: A causal LM of a registered family.
        batches: (batch, seq) token ids for calibration.
        sparsity: As in :class:`fasp_lightning.PruningConfig`.
        adaptive: KV heads and FFN units of all blocks compete (the paper's AL-AM); otherwise FFN units only, as many
            in each block.

    Returns:
        Fraction of the blocks' linear parameters that is gone, and of all parameters.
    """
    linear, total = linear_parameters(model, spec_for(model)), sum(p.numel() for p in model.parameters())
    consumers = consumers_of(model, adaptive)
    observe(model, consumers, batches)
    if adaptive:
        removed = _remove_lowest(consumers, sparsity * linear)
    else:
        plan = decide_budget(model, PruningConfig.paper(sparsity, attention="none"))
        widths = [pair.after for block in plan.pairs for pair in block if pair.kind == "ffn"]
        removed = sum(
            consumer.remove(consumer.metric().argsort()[: consumer.pair.layout.width - width])
            for consumer, width in zip(consumers, widths, strict=True)
        )
    return removed / linear, removed / total


def consumers_of(model: nn.Module, heads: bool) -> list[Consumer]:
    """The consumers that are cut: of the FFNs, and with ``heads`` of the attention too."""
    kinds = ("value", "ffn") if heads else ("ffn",)
    pairs = [pair for block in resolve_pruned(model) for pair in block if pair.spec.kind in kinds]
    return [_consumer(pair, spec_for(model).attention) for pair in pairs]


def _consumer(pair: ResolvedPair, attention: str | None) -> Consumer:
    device = pair.consumer.weight.device
    columns, cost = torch.arange(pair.columns, device=device), pair.unit_cost
    if pair.spec.kind == "value":
        cost = _head_cost(pair, pair.block.get_submodule(attention or ""))
    units = pair.layout.groups if pair.spec.kind == "value" else pair.columns
    return Consumer(pair, columns.reshape(units, -1), cost, Moments(pair.columns, device))


def _head_cost(pair: ResolvedPair, attention: nn.Module) -> int:
    """Parameters that go with a KV head: its share of the attention's linear layers; the output's bias stays."""
    layers = [module for module in attention.modules() if is_linear(module)]
    parameters = sum(p.numel() for layer in layers for p in layer.parameters(recurse=False))
    bias = getattr(pair.consumer, "bias", None)
    return (parameters - (0 if bias is None else bias.numel())) // pair.layout.groups


def observe(model: nn.Module, consumers: list[Consumer], batches: Iterable[Tensor]) -> None:
    """One forward of the dense model, which fills the moments."""
    hooks = [consumer.pair.consumer.register_forward_pre_hook(consumer.moments) for consumer in consumers]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for batch in batches:
                model.base_model(input_ids=batch.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def _remove_lowest(consumers: list[Consumer], wanted: float) -> int:
    """Remove the units of lowest standardised metric, as many as come nearest to so many parameters."""
    metrics = [consumer.standardised().cpu() for consumer in consumers]
    costs = [torch.full_like(metric, consumer.cost) for metric, consumer in zip(metrics, consumers, strict=True)]
    order = torch.cat(metrics).argsort(stable=True)
    gone = torch.cat(costs)[order].cumsum(0)
    lowest = torch.zeros(len(order), dtype=torch.bool)
    lowest[order[: int((gone - wanted).abs().argmin()) + 1]] = True
    removed = 0
    for consumer, mask in zip(consumers, lowest.split([len(metric) for metric in metrics]), strict=True):
        if mask.any():
            removed += consumer.remove(mask.nonzero().squeeze(1).to(consumer.unit_columns.device))
    return removed
