"""How an architecture is described: frozen dataclasses of strings, no modules."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fasp_lightning.errors import FaspError

KINDS = ("ffn", "value", "groups", "experts", "whole_experts")
WHOLE = {"value": "groups", "experts": "whole_experts"}
"""Kind of a pair → that of the same pair whose units are all that belongs together: KV groups, or experts."""

EXPERTS = ("experts", "whole_experts")
LAYOUTS = (None, "concatenated", "interleaved")


@dataclass(frozen=True)
class Experts:
    """What stands around the three-dimensional weights of experts, of which each token is sent to a few.

    Attributes:
        router: Path of the module inside the block that chooses them; what it holds for each of them goes with it.
        count_field: Config field of their number.
        group_field: Config field of the number of equal groups that the router chooses from, if it does that.
        transposed: Each expert's weights are stored (in, out).
    """

    router: str
    count_field: str = "num_experts"
    group_field: str | None = None
    transposed: bool = False


@dataclass(frozen=True)
class CoupledPair:
    """A consumer, and the producers whose output rows feed its input columns position by position.

    Attributes:
        consumer: Path of the consumer linear inside the block, for example ``"mlp.down_proj"``.
        producers: Paths of the producer linears inside the block.
        kind: ``"ffn"`` (one hidden unit a column), ``"value"`` (value dims; with grouped-query attention one
            value row feeds a column of each query head of its group) or ``"experts"`` (hidden units of all experts;
            the paths are those of three-dimensional parameters). ``"groups"`` (whole KV heads with their query heads)
            and ``"whole_experts"`` are made from these by :meth:`whole`, never part of a row.
        fused: How a fused producer holds its parts: ``None`` (not fused), ``"concatenated"`` (gate | up, or
            q | k | v one behind the other) or ``"interleaved"`` (each KV head's queries, key and value together, or
            gate and up of each hidden unit of an expert).
        groups: Of a value pair, the paths of queries, keys and values in this order (one path if they are fused),
            if whole KV heads can go. Leave it out where stock code takes hidden_size / num_attention_heads for the
            head size, since it cannot have fewer heads then, and where heads differ by their number, as with ALiBi.
        width_field: Config field of the width, where that is not the row's. Pairs of one field have widths in the
            ratio of the original ones.
        experts: What stands around experts.
    """

    consumer: str
    producers: tuple[str, ...]
    kind: str
    fused: str | None = None
    groups: tuple[str, ...] = ()
    width_field: str | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "producers", tuple(self.producers))
        object.__setattr__(self, "groups", tuple(self.groups))
        if isinstance(self.experts, dict):  # as dataclasses.asdict gives it
            object.__setattr__(self, "experts", Experts(**self.experts))
        if self.kind not in KINDS:
            raise FaspError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.fused not in LAYOUTS:
            raise FaspError(f"fused must be one of {LAYOUTS}, got {self.fused!r}")
        if not self.producers:
            raise FaspError(f"producers of {self.consumer!r} must name at least one linear layer, got none")
        if self.fused == "interleaved" and self.kind == "ffn":
            raise FaspError(f"fused='interleaved' is a layout of value pairs, got kind={self.kind!r}")
        if (self.experts is not None) != (self.kind in EXPERTS):
            raise FaspError(f"experts must be given for a pair of experts, and for no other, got kind={self.kind!r}")
        if self.groups and (self.kind != "value" or len(self.groups) != (1 if self.fused else 3)):
            raise FaspError(
                "groups must be the paths of queries, keys and values of a value pair, or the one path of their fused "
                f"projection, got {self.groups} of a pair of kind {self.kind!r}, fused {self.fused!r}"
            )

    @property
    def inside_attention(self) -> bool:
        """Whether the consumer is part of the attention module."""
        return self.kind in ("value", "groups")

    def whole(self) -> CoupledPair:
        """The pair of the same consumer whose units are whole KV heads with their query heads, or whole experts."""
        producers = self.groups if self.kind == "value" else self.producers
        return replace(self, producers=producers, kind=WHOLE[self.kind], groups=())


@dataclass(frozen=True)
class ArchitectureSpec:
    """Where the coupled pairs of one ``model_type`` are.

    Attributes:
        layers: Path of the ``ModuleList`` of decoder blocks, from the causal LM.
        pairs: The pairs of a block, in the order of the forward pass. A block that lacks the layers of one is left
            without it, as those of hybrids that have another mixer in the place of attention; some block has each. Of
            several FFNs, experts among them, a model may have one alone.
        width_field: Config field that holds the FFN width, or ``None`` if the width is fixed in the model's code; a
            pair may name another one.
        transposed: Weights are stored (in, out), as in ``Conv1D``.
        attention: Path of the attention module inside the block; by default the parent of the value pair's
            consumer. With neither, the engine runs the attention a second time.
        packing: Its stock code keeps sequences apart that are packed into one row, which ``position_ids`` that start
            again say; without it such batches are refused.
    """

    layers: str
    pairs: tuple[CoupledPair, ...]
    width_field: str | None = "intermediate_size"
    transposed: bool = False
    attention: str | None = None
    packing: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", tuple(self.pairs))
        kinds = [pair.kind for pair in self.pairs]
        alike = len({pair.consumer for pair in self.pairs}) < len(kinds)
        if not kinds or alike or any(kinds.count(kind) > 1 for kind in kinds if kind != "ffn"):
            raise FaspError(
                "pairs must hold one pair of a kind, or FFNs each with a consumer of its own, at least one in all, "
                f"got kinds {kinds}"
            )
        if set(kinds) & set(WHOLE.values()):
            raise FaspError(
                "pairs must be of kinds 'value', 'ffn' and 'experts'; whole KV groups go into a value pair's groups"
            )
        if "value" in kinds[1:]:
            raise FaspError("pairs must be in the order of the forward pass: value before ffn")
        if self.attention is None:
            for pair in self.pairs:
                if pair.kind == "value":
                    object.__setattr__(self, "attention", pair.consumer.rpartition(".")[0])
        for pair in self.pairs:
            if pair.kind == "value" and not (self.attention and pair.consumer.startswith(f"{self.attention}.")):
                raise FaspError(f"attention must be the module that holds {pair.consumer!r}, got {self.attention!r}")

    def width_field_of(self, consumer: str) -> str | None:
        """The config field of a pair's width; ``None`` if that is fixed in the model's code."""
        own = next((pair.width_field for pair in self.pairs if pair.consumer == consumer), None)
        return own or self.width_field
