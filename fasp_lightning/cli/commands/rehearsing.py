"""What the options of ``fasp fit`` say of its prunings, before any weight is read."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from fasp_lightning.checkpoints.loading import load_config, model_shapes
from fasp_lightning.checkpoints.source import resolve_source
from fasp_lightning.pruning.budget.widths import present_budget
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.training.callback import FASPPruning
from fasp_lightning.training.modeling.building import new_model
from fasp_lightning.training.modeling.export import check_export
from fasp_lightning.training.rehearsal import rehearse
from fasp_lightning.training.schedule import PruningSchedule


def pruning_callbacks(settings: Any) -> list[Any]:
    """The options of every FASPPruning.

    Args:
        settings: Parsed options of ``fasp fit``.
    """
    callbacks = settings.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    return [each.init_args for each in callbacks if issubclass(_class_of(each.class_path), FASPPruning)]


def planned(options: Any) -> tuple[PruningSchedule, PruningConfig]:
    """Schedule and settings in the options of a FASPPruning."""
    pruning = PruningConfig(**plain(options.pruning)) if options.pruning is not None else PruningConfig()
    return PruningSchedule.parse(plain(options.schedule)), pruning


def shapes(options: Any) -> Any:
    """The model in the options of a CausalLMModule, on the ``meta`` device: no weight is read."""
    if options.name_or_path is None:
        with torch.device("meta"):
            return new_model(plain(options.config), "float32")
    hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = load_config(options.name_or_path, **hub)
    return model_shapes(resolve_source(options.name_or_path), config, options.trust_remote_code)


def check_prunings(settings: Any) -> None:
    """Refuse prunings that their callback's ``setup`` would refuse, once the weights are read.

    Args:
        settings: Parsed options of ``fasp fit``.

    Raises:
        FaspError: If an event cannot happen, or the model not be exported.
    """
    for options in pruning_callbacks(settings):
        model = shapes(settings.model)
        cuts = present_budget(model).cuts
        for budget in rehearse(model, *planned(options)):
            cuts |= budget.cuts
        if options.export_to is not None:
            check_export(model, options.export_to, options.form, options.overwrite, cuts)


def plain(value: Any) -> Any:
    """What the parser made of a mapping, as the plain data it was."""
    return value.as_dict() if hasattr(value, "as_dict") else value


def _class_of(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found
