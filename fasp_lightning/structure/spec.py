"""How an architecture is described: frozen dataclasses of strings, no modules."""

from __future__ import annotations

from dataclasses import dataclass

from fasp_lightning.errors import FaspError

KINDS = ("ffn", "value", "groups")
LAYOUTS = (None, "concatenated", "interleaved")


@dataclass(frozen=True)
class CoupledPair:
    """A consumer, and the producers whose output rows feed its input columns position by position.

    Attributes:
        consumer: Path of the consumer linear inside the block, for example ``"mlp.down_proj"``.
        producers: Paths of the producer linears inside the block.
        kind: ``"ffn"`` (one hidden unit a column), ``"value"`` (value dims; with grouped-query attention one
            value row feeds a column of each query head of its group) or ``"groups"`` (whole KV heads with their
            query heads; made from a value pair by :meth:`whole_groups`, never part of a row).
        fused: How a fused producer holds its parts: ``None`` (not fused), ``"concatenated"`` (gate | up, or
            q | k | v one behind the other) or ``"interleaved"`` (each KV head's queries, key and value together).
        groups: Of a value pair, the paths of queries, keys and values in this order (one path if they are fused),
            if whole KV heads can go. Leave it out where stock code takes hidden_size / num_attention_heads for the
            head size, since it cannot have fewer heads then, and where heads differ by their number, as with ALiBi.
    """

    consumer: str
    producers: tuple[str, ...]
    kind: str
    fused: str | None = None
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "producers", tuple(self.producers))
        object.__setattr__(self, "groups", tuple(self.groups))
        if self.kind not in KINDS:
            raise FaspError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.fused not in LAYOUTS:
            raise FaspError(f"fused must be one of {LAYOUTS}, got {self.fused!r}")
        if not self.producers:
            raise FaspError(f"producers of {self.consumer!r} must name at least one linear layer, got none")
        if self.fused == "interleaved" and self.kind == "ffn":
            raise FaspError(f"fused='interleaved' is a layout of value pairs, got kind={self.kind!r}")
        if self.groups and (self.kind != "value" or len(self.groups) != (1 if self.fused else 3)):
            raise FaspError(
                "groups must be the paths of queries, keys and values of a value pair, or the one path of their fused "
                f"projection, got {self.groups} of a pair of kind {self.kind!r}, fused {self.fused!r}"
            )

    @property
    def inside_attention(self) -> bool:
        """Whether the consumer is part of the attention module."""
        return self.kind != "ffn"

    def whole_groups(self) -> CoupledPair:
        """The pair of the same consumer whose units are whole KV heads with their query heads."""
        return CoupledPair(self.consumer, self.groups, "groups", self.fused)


@dataclass(frozen=True)
class ArchitectureSpec:
    """Where the coupled pairs of one ``model_type`` are.

    Attributes:
        layers: Path of the ``ModuleList`` of decoder blocks, from the causal LM.
        pairs: The pairs of a block, in the order of the forward pass. A block that lacks the layers of one is left
            without it, as those of hybrids that have another mixer in the place of attention; some block has each.
        width_field: Config field that holds the FFN width, or ``None`` if the width is fixed in the model's code.
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
        if not kinds or any(kinds.count(kind) > 1 for kind in kinds):
            raise FaspError(f"pairs must hold one pair of a kind, at least one in all, got kinds {kinds}")
        if "groups" in kinds:
            raise FaspError("pairs must be of kinds 'value' and 'ffn'; whole KV groups go into a value pair's groups")
        if kinds == ["ffn", "value"]:
            raise FaspError("pairs must be in the order of the forward pass: value before ffn")
        if self.attention is None:
            for pair in self.pairs:
                if pair.kind == "value":
                    object.__setattr__(self, "attention", pair.consumer.rpartition(".")[0])
        for pair in self.pairs:
            if pair.kind == "value" and not (self.attention and pair.consumer.startswith(f"{self.attention}.")):
                raise FaspError(f"attention must be the module that holds {pair.consumer!r}, got {self.attention!r}")
