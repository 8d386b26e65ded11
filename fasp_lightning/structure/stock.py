"""What a stock config can say of a model's widths."""

from __future__ import annotations

from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.spec import ArchitectureSpec


def stock_fields(spec: ArchitectureSpec, layout: PairLayout, units: int) -> dict[str, int]:
    """Config values with which stock code builds a pair of so many units.

    Args:
        spec: The family's row.
        layout: Layout of the pair.
        units: Its units in every block.

    Returns:
        Field → value; empty if stock code always builds the original width.
    """
    if layout.kind == "ffn" and spec.width_field is not None:
        return {spec.width_field: units}
    return {}
