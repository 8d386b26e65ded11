"""FASP: fast and accurate structured pruning of causal language models, by itself and inside a Lightning run.

The public names are loaded on first use (PEP 562), so that ``import fasp_lightning`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasp_lightning.checkpoints.pruned_folder import load_pruned
    from fasp_lightning.checkpoints.saving import save_pruned
    from fasp_lightning.errors import FaspError
    from fasp_lightning.pruning.config import PruningConfig
    from fasp_lightning.pruning.perplexity import perplexity
    from fasp_lightning.pruning.pruner import FASPPruner
    from fasp_lightning.pruning.report import PruningReport
    from fasp_lightning.structure.plan import PruningPlan, apply_plan
    from fasp_lightning.structure.registry import register_architecture, spec_for
    from fasp_lightning.structure.spec import ArchitectureSpec, CoupledPair
    from fasp_lightning.training.callback import FASPPruning
    from fasp_lightning.training.data import CausalLMDataModule
    from fasp_lightning.training.metrics import Perplexity
    from fasp_lightning.training.modeling.lora import LoRAConfig
    from fasp_lightning.training.modeling.structure_state import carry_structure
    from fasp_lightning.training.module import CausalLMModule
    from fasp_lightning.training.schedule import PruningSchedule

__version__ = "0.1.0"

__all__ = [
    "ArchitectureSpec",
    "CausalLMDataModule",
    "CausalLMModule",
    "CoupledPair",
    "FASPPruner",
    "FASPPruning",
    "FaspError",
    "LoRAConfig",
    "Perplexity",
    "PruningConfig",
    "PruningPlan",
    "PruningReport",
    "PruningSchedule",
    "apply_plan",
    "carry_structure",
    "load_pruned",
    "perplexity",
    "register_architecture",
    "save_pruned",
    "spec_for",
]

_HOMES = {
    "ArchitectureSpec": "structure.spec",
    "CausalLMDataModule": "training.data",
    "CausalLMModule": "training.module",
    "CoupledPair": "structure.spec",
    "FASPPruner": "pruning.pruner",
    "FASPPruning": "training.callback",
    "FaspError": "errors",
    "LoRAConfig": "training.modeling.lora",
    "Perplexity": "training.metrics",
    "PruningConfig": "pruning.config",
    "PruningPlan": "structure.plan",
    "PruningReport": "pruning.report",
    "PruningSchedule": "training.schedule",
    "apply_plan": "structure.plan",
    "carry_structure": "training.modeling.structure_state",
    "load_pruned": "checkpoints.pruned_folder",
    "perplexity": "pruning.perplexity",
    "register_architecture": "structure.registry",
    "save_pruned": "checkpoints.saving",
    "spec_for": "structure.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
