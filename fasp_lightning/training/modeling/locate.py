"""The causal LM inside a LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.registry import spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_causal_lm(module: nn.Module, attribute: str | None = None) -> PreTrainedModel:
    """The one Hugging Face causal LM that a module holds, however it is wrapped (peft, ``torch.compile``).

    Args:
        module: Usually a LightningModule.
        attribute: Path of the model in it, such as ``"model"`` or ``"student.lm"``; by default it is looked for.

    Raises:
        FaspError: If there is none or several, or its family is not registered.
    """
    name = type(module).__name__
    root: nn.Module = module
    if attribute is not None:
        for part in attribute.split("."):
            if not isinstance(getattr(root, part, None), nn.Module):
                raise FaspError(f"attribute must be the path of a model in {name}, got {attribute!r}")
            root = getattr(root, part)
    found = causal_lms(root)
    if len(found) != 1:
        where = name if attribute is None else f"{name}.{attribute}"
        paths = ", ".join(repr(path or attribute) for path in found) or "none"
        raise FaspError(f"{where} must hold one Hugging Face causal LM, found {paths}; name it by attribute=")
    (model,) = found.values()
    spec_for(model)  # refuses a family that is not registered
    return model


def causal_lms(root: nn.Module) -> dict[str, Any]:
    """Path → causal LM that a module holds; what is inside another one (the decoder in it) does not count."""
    from transformers import PreTrainedModel

    found: dict[str, PreTrainedModel] = {}
    for path, module in root.named_modules():
        inside = any(path.startswith(f"{outer}." if outer else "") for outer in found)
        if isinstance(module, PreTrainedModel) and not inside and module.get_output_embeddings() is not None:
            found[path] = module
    return found
