"""Transformers' own way from stored weights to those of a model, taken for a part of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasp_lightning.checkpoints.dry_save import no_progress_bar
from fasp_lightning.checkpoints.pruned_folder import unreadable_weights
from fasp_lightning.errors import FaspError, FaspOSError, as_refusal


@dataclass(frozen=True)
class PartLoading:
    """Names, splits and joins of weights, as a model is loaded.

    Attributes:
        config: What ``convert_and_load_state_dict_in_model`` (transformers, core_model_loading.py) is given.
        tied: Name of each weight that is another one → that one's name.
    """

    config: Any
    tied: dict[str, str]

    def load(self, model: Any, stored: dict[str, Tensor], name: str) -> None:
        """Fill those of a model's weights that are made of some stored ones.

        Args:
            model: The model.
            stored: The weights, by their names in files.
            name: Of the model, for messages.

        Raises:
            FaspOSError: If they do not fit.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with as_refusal(lambda error: unreadable_weights(name, error)), no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(model, stored, self.config)
        if wrong := sorted(info.mismatched_keys):
            key, found, expected = wrong[0]
            raise FaspOSError(f"model {name!r} must have {key} of {tuple(expected)}, got {tuple(found)}")
        if info.conversion_errors:
            key, reason = next(iter(info.conversion_errors.items()))
            raise FaspOSError(f"{key} of {name!r} cannot be made of a part of the stored weights: {reason}")

    def names(self, model: Any, stored: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """The name in the model of each stored weight, the first one where it becomes several."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [one for one in self.config.weight_mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in self.config.weight_mapping if isinstance(one, WeightConverter)]
        prefix, state = model.base_model_prefix, model.state_dict()
        for name in stored:
            found, _ = rename_source_key(name, renamings, converters, prefix, state)
            if found not in state and name in state:
                found = name
            yield name, found


def part_loading(model: Any, device: torch.device) -> PartLoading:
    """How the parts of a model are loaded.

    Args:
        model: The model, on ``meta``.
        device: Where to.

    Raises:
        FaspError: If this version of transformers loads models another way.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        mapping = get_model_conversion_mapping(model)
    except (ImportError, TypeError) as error:
        raise FaspError(f"streaming needs transformers 5.23, which loads a part of a model; {error}") from None
    plan = model._get_dtype_plan(model.dtype)
    mapped: Any = mapping
    config = LoadStateDictConfig(device_map={"": device}, dtype=model.dtype, dtype_plan=plan, weight_mapping=mapped)
    return PartLoading(config, dict(getattr(model, "all_tied_weights_keys", {})))
