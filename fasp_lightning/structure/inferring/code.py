"""A row as the code that registers it."""

from __future__ import annotations

from fasp_lightning.structure.spec import ArchitectureSpec, CoupledPair


def as_code(model_type: str, spec: ArchitectureSpec) -> str:
    """A row as the call that registers it."""
    return f"register_architecture({model_type!r}, {_code(spec)})"


def _code(spec: ArchitectureSpec) -> str:
    pairs = ", ".join(_pair_code(pair) for pair in spec.pairs)
    default = ArchitectureSpec(spec.layers, spec.pairs)
    named = {name: getattr(spec, name) for name in ("width_field", "transposed", "attention", "packing")}
    others = "".join(f", {name}={value!r}" for name, value in named.items() if value != getattr(default, name))
    return f"ArchitectureSpec({spec.layers!r}, ({pairs},){others})"


def _pair_code(pair: CoupledPair) -> str:
    fused = f", fused={pair.fused!r}" if pair.fused else ""
    named = {name: getattr(pair, name) for name in ("groups", "width_field", "experts")}
    others = "".join(f", {name}={value!r}" for name, value in named.items() if value)
    return f"CoupledPair({pair.consumer!r}, {pair.producers!r}, {pair.kind!r}{fused}{others})"
