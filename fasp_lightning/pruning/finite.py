"""The refusal of what is not finite."""

from __future__ import annotations

from torch import nn

from fasp_lightning.errors import FaspError


def bad_parameter(model: nn.Module) -> str:
    """What to add to a message: which parameter is not finite, if one is."""
    bad = (name for name, value in model.named_parameters() if not value.is_meta and not value.isfinite().all())
    name = next(bad, None)
    return "" if name is None else f": parameter {name} is not"


def require_finite(name: str, finite: bool, layer: str, reason: str = "") -> None:
    """Refuse NaN and infinite values.

    Args:
        name: What they are, for the message.
        finite: Whether all are finite.
        layer: Path of the layer at whose input they came up.
        reason: Why, if it is known; see :func:`bad_parameter`.

    Raises:
        FaspError: If one is not; the message names the layer.
    """
    if not finite:
        raise FaspError(
            f"{name} must be finite, got NaN or Inf at the input of {layer}{reason}; "
            "check the checkpoint, or run the model in float32 or bfloat16"
        )
