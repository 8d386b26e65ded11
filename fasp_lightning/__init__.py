"""FASP: fast and accurate structured pruning of causal language models, by itself and inside a Lightning run.

The public names are loaded on first use (PEP 562), so that ``import fasp_lightning`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasp_lightning.errors import FaspError
    from fasp_lightning.pruning.checkpoint import load_pruned, save_pruned
    from fasp_lightning.pruning.config import PruningConfig
    from fasp_lightning.pruning.perplexity import perplexity
    from fasp_lightning.pruning.plan import PruningPlan, apply_plan
    from fasp_lightning.pruning.pruner import FASPPruner
    from fasp_lightning.pruning.report import PruningReport
    from fasp_lightning.pruning.schedule import PruningSchedule
    from fasp_lightning.structure.registry import register_architecture, spec_for
    from fasp_lightning.structure.spec import ArchitectureSpec, CoupledPair
    from fasp_lightning.training.callback import FASPPruning
    from fasp_lightning.training.data import CausalLMDataModule
    from fasp_lightning.training.lora import LoRAConfig
    from fasp_lightning.training.metrics import Perplexity
    from fasp_lightning.training.module import CausalLMModule
    from fasp_lightning.training.structure_state import carry_structure

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
    "LoRAConfig": "training.lora",
    "Perplexity": "training.metrics",
    "PruningConfig": "pruning.config",
    "PruningPlan": "pruning.plan",
    "PruningReport": "pruning.report",
    "PruningSchedule": "pruning.schedule",
    "apply_plan": "pruning.plan",
    "carry_structure": "training.structure_state",
    "load_pruned": "pruning.checkpoint",
    "perplexity": "pruning.perplexity",
    "register_architecture": "structure.registry",
    "save_pruned": "pruning.checkpoint",
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
