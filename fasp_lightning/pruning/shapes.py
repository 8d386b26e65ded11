"""A model's shapes without its weights."""

from __future__ import annotations

from typing import Any

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.checkpoint import read_plan
from fasp_lightning.pruning.forms import stock_part
from fasp_lightning.pruning.plan import apply_plan
from fasp_lightning.pruning.source import ModelSource
from fasp_lightning.structure.registry import spec_for


def model_shapes(source: ModelSource, config: Any, trust_remote_code: bool = False) -> Any:
    """Build a model on the ``meta`` device; one that was pruned before carries its plan.

    Args:
        source: The resolved model.
        config: Its config.
        trust_remote_code: Let the repository's own code run.

    Raises:
        FaspError: If the config does not fit its model class, or a plan is damaged.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a constructor makes of values that do not go together
        reason = " ".join(str(error).split())
        raise FaspError(
            f"the config of {source.name!r} makes no {config.model_type} model: {reason}"
        ) from error
    if source.pruned:
        form, plan = read_plan(source.location)
        if form != "compact":  # the config's widths have cut it so far already
            model.fasp_plan = stock_part(plan, spec_for(model))
        apply_plan(model, plan)
    return model
