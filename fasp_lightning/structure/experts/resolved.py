"""The experts of one block as a pair, and each of them as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fasp_lightning.structure.compact import set_attributes
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.pair import Piece, ResolvedPair
from fasp_lightning.structure.spec import CoupledPair, Experts

COUNTS = ("num_experts",)
WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim")
"""What modules of experts call their number, and the hidden units of each."""


class Slice(NamedTuple):
    """What one expert has of a three-dimensional layer: used like a linear layer, of which it has the attributes.

    Attributes:
        weight: A view.
        bias: A view, or ``None``.
    """

    weight: Tensor
    bias: Tensor | None


class Expert(ResolvedPair):
    """One expert as an FFN pair: its score, its choice and its restoration are those of any other.

    Attributes:
        consumer: What it has of the consumer.
    """

    consumer: nn.Linear = None  # type: ignore[assignment]


class ResolvedExperts(ResolvedPair):
    """The experts of one block. Their units are hidden units, as many of each expert, or whole experts."""

    @property
    def around(self) -> Experts:
        """What stands around them."""
        return cast(Experts, self.spec.experts)

    @property
    def path(self) -> str:
        """Path of their module in the block."""
        return self.spec.consumer.rpartition(".")[0]

    @property
    def module(self) -> Any:
        """The module that holds their weights."""
        return self.block.get_submodule(self.path)

    @property
    def router(self) -> nn.Module:
        """The module that chooses the experts of a token."""
        return self.block.get_submodule(self.around.router)

    @property
    def consumer(self) -> nn.Linear:
        """Their module, which is called as a whole."""
        return cast(nn.Linear, self.module)

    @property
    def producers(self) -> list[nn.Linear]:
        """None that is a module of its own."""
        return []

    @property
    def linears(self) -> list[tuple[str, nn.Linear]]:
        """The modules of the experts and of the router."""
        paths = (self.path, self.around.router)
        return [(f"{self.name}.{path}", self._linear(path)) for path in paths]

    def parameter(self, path: str) -> Tensor:
        """One of the three-dimensional parameters."""
        return cast(Tensor, getattr(self.module, path.rpartition(".")[2]))

    def bias(self, path: str) -> Tensor | None:
        """(experts, rows) bias that belongs to one of them."""
        return getattr(self.module, f"{path.rpartition('.')[2]}_bias", None)

    @property
    def top_k(self) -> int:
        """Experts that each token is sent to."""
        return int(getattr(self.router, "top_k", 1))

    @property
    def fewest(self) -> int:
        """Whole experts that must be left: as many as a token is sent to, in the groups that it is sent to.

        A router that weighs its groups by their two best experts wants two in each.
        """
        groups = self.layout.groups
        chosen = int(getattr(self.router, "topk_group", None) or 1) if groups > 1 else 1
        least = -(-self.top_k // chosen)
        return groups * (max(2, least) if groups > 1 else least)

    @property
    def count(self) -> int:
        """Experts left."""
        return self.parameter(self.spec.consumer).shape[0]

    @property
    def expert_columns(self) -> int:
        """Hidden units left of each expert."""
        return self.parameter(self.spec.consumer).shape[1 if self.transposed else 2]

    @property
    def outputs(self) -> int:
        """Output features of each consumer."""
        return self.parameter(self.spec.consumer).shape[2 if self.transposed else 1]

    @property
    def columns(self) -> int:
        """Hidden units left of all experts together."""
        return self.count * self.expert_columns

    @property
    def weight(self) -> Tensor:
        """(out, columns left) of all experts side by side."""
        weight = self.parameter(self.spec.consumer).detach()
        rows = weight if self.transposed else weight.transpose(1, 2)
        return rows.flatten(0, 1).T

    @property
    def unit_cost(self) -> int:
        """Parameters that go with one hidden unit, or with one expert: its weights, and what the router has for it."""
        if self.spec.kind == "whole_experts":
            parameters = [piece.parameter for piece in self.pieces() if isinstance(piece.parameter, nn.Parameter)]
            return sum(parameter.numel() for parameter in parameters) // self.count
        cost = self.outputs
        for path, rows in zip(self.spec.producers, self.layout.producer_rows, strict=True):
            inputs = self.parameter(path).shape[1 if self.transposed else 2]
            cost += rows // self.layout.width * (inputs + (self.bias(path) is not None))
        return cost

    @property
    def idle(self) -> int:
        """Parameters that each token leaves out: those of the experts that it is not sent to."""
        held = sum(parameter.numel() for parameter in self.module.parameters(recurse=False))
        return held // self.count * (self.count - self.top_k)

    def expert(self, index: int) -> Expert:
        """One of the experts left, as a pair: what is written into its consumer is written into the block.

        Args:
            index: Its place among those left.
        """
        size = self.layout.expert_size
        spec = CoupledPair(self.spec.consumer, self.spec.producers, "ffn")
        layout = PairLayout("ffn", size, 1, 1, None, (size,))
        kept = self.kept.reshape(self.count, -1)[index] % size if self.spec.kind == "experts" else torch.arange(size)
        expert = Expert(self.block, self.name, spec, layout, kept, self.transposed)
        bias = self.bias(self.spec.consumer)
        own = Slice(self.parameter(self.spec.consumer).detach()[index], None if bias is None else bias.detach()[index])
        expert.consumer = cast(nn.Linear, own)
        return expert

    def hidden(self, index: int, inputs: Tensor) -> Tensor:
        """What the consumer of one of the experts left reads: (tokens, in) → (tokens, hidden units left)."""
        (path,) = self.spec.producers
        weight, bias, module = self.parameter(path)[index], self.bias(path), self.module
        rows = inputs @ (weight if self.transposed else weight.T)
        if bias is not None:
            rows = rows + bias[index]
        # transformers, integrations/moe.py: use_experts_implementation gives all modules of experts this method
        hidden: Tensor = module._apply_gate(rows) if self.spec.fused else module.act_fn(rows)
        return hidden

    def output(self, index: int, hidden: Tensor) -> Tensor:
        """What one of the experts left makes of its hidden units: (tokens, hidden units left) → (tokens, out)."""
        weight, bias = self.parameter(self.spec.consumer)[index], self.bias(self.spec.consumer)
        rows = hidden @ (weight if self.transposed else weight.T)
        return rows if bias is None else rows + bias[index]

    def pieces(self) -> Iterator[Piece]:
        """Every parameter that is cut with the experts; those of which each expert has one entry go with whole ones."""
        consumer, columns = self.spec.consumer, 1 if self.transposed else 2
        yield Piece(self.parameter(consumer), (0, columns), None, consumer)
        if (bias := self.bias(consumer)) is not None:
            yield Piece(bias, 0, None, f"{consumer}_bias")
        for index, path in enumerate(self.spec.producers):
            yield Piece(self.parameter(path), (0, 3 - columns), index, path)
            if (bias := self.bias(path)) is not None:
                yield Piece(bias, (0, 1), index, f"{path}_bias")
        router = self.router
        for name, tensor in (*router.named_parameters(), *router.named_buffers()):
            dim = 0 if tensor.shape[0] == self.count else tensor.ndim - 1
            if tensor.shape[dim] == self.count:
                yield Piece(tensor, dim, None, f"{self.around.router}.{name}")

    def positions(self, piece: Piece, kept: Tensor) -> Tensor:
        """Where the units ``kept`` are in a piece: (experts left,), or (experts left, rows or columns of each)."""
        left = kept if self.spec.kind == "whole_experts" else torch.arange(self.layout.experts)
        if isinstance(piece.dim, int):
            return left
        return super().positions(piece, kept).reshape(left.numel(), -1)

    def assign_each(self, restored: Sequence[tuple[Sequence[Tensor], Tensor | None]]) -> None:
        """Write restored weights, and refitted biases, into all experts left, whose weights the cut has made anew."""
        for index, (factors, _) in enumerate(restored):
            self.expert(index).assign(factors)
        bias = self.bias(self.spec.consumer)
        if bias is not None and any(own is not None for _, own in restored):  # a new one, so that the old can come back
            rows = [old if own is None else own.to(old) for old, (_, own) in zip(bias.data, restored, strict=True)]
            bias.data = torch.stack(rows)

    @torch.no_grad()
    def shut(self, kept: Tensor) -> None:
        """As of any pair; of whole experts the router is left as it is, so a bias of theirs stays."""
        gone = torch.isin(self.layout.columns(self.kept), self.layout.columns(kept), invert=True)
        weight = self.parameter(self.spec.consumer)
        closed = gone.view(self.count, -1).unsqueeze(2 if self.transposed else 1)
        weight.masked_fill_(closed.to(weight.device), 0)

    def _set_features(self) -> None:
        set_attributes(self.module, WIDTHS, self.expert_columns)
        parent = self.block.get_submodule(self.path.rpartition(".")[0])
        for module in (parent, self.module, self.router):
            set_attributes(module, COUNTS, self.count)
        set_attributes(self.router, ("out_features",), self.count)
