"""The refusal of what is not finite."""

from __future__ import annotations

from fasp_lightning.errors import FaspError


def require_finite(name: str, finite: bool, layer: str) -> None:
    """Refuse NaN and infinite values.

    Args:
        name: What they are, for the message.
        finite: Whether all are finite.
        layer: Path of the layer at whose input they came up.

    Raises:
        FaspError: If one is not; the message names the layer.
    """
    if not finite:
        raise FaspError(
            f"{name} must be finite, got NaN or Inf at the input of {layer}; "
            "check the checkpoint, or run the model in float32 or bfloat16"
        )
