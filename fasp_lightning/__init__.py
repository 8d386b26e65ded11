"""FASP: fast and accurate structured pruning of causal language models, by itself and inside a Lightning run.

The public names are loaded on first use (PEP 562), so that ``import fasp_lightning`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasp_lightning.checkpoints.exporting.exported import Exported, LoaderCheck
    from fasp_lightning.checkpoints.exporting.gguf.export import export_gguf
    from fasp_lightning.checkpoints.exporting.onnx_graph import export_onnx
    from fasp_lightning.checkpoints.exporting.vllm.folder import export_vllm
    from fasp_lightning.checkpoints.forms import LoaderSupport
    from fasp_lightning.checkpoints.loading import load_model, load_tokenizer
    from fasp_lightning.checkpoints.pruned_folder import load_pruned
    from fasp_lightning.checkpoints.saving import SavedModel, save_pruned
    from fasp_lightning.errors import FaspError
    from fasp_lightning.proving.proof import Proof, prove
    from fasp_lightning.pruning.config import LearningConfig, OwnTextConfig, PruningConfig
    from fasp_lightning.pruning.latency.serving import Serving
    from fasp_lightning.pruning.latency.speedup import Speedup, SpeedupPlan, measure_speedup, plan_speedup
    from fasp_lightning.pruning.latency.stopwatch import Clock
    from fasp_lightning.pruning.perplexity import PerplexityResult, measure_perplexity, perplexity
    from fasp_lightning.pruning.prepare import Prepared
    from fasp_lightning.pruning.processes import Processes
    from fasp_lightning.pruning.progress import ProgressEvent
    from fasp_lightning.pruning.report import LearningReport, PairReport, PruningReport, TextReport
    from fasp_lightning.streaming.pruner import FASPPruner
    from fasp_lightning.structure.inferring.inference import infer_spec
    from fasp_lightning.structure.layout import Cuts, PairLayout
    from fasp_lightning.structure.plan import apply_plan
    from fasp_lightning.structure.pruning_plan import PairPlan, PruningPlan
    from fasp_lightning.structure.registry import register_architecture, spec_for
    from fasp_lightning.structure.spec import ArchitectureSpec, CoupledPair, Experts
    from fasp_lightning.text.config import TextConfig
    from fasp_lightning.text.tokenizer import TokenizerTraining
    from fasp_lightning.text.tokens import calibration_batches, token_batches
    from fasp_lightning.training.callback import FASPPruning
    from fasp_lightning.training.data import CausalLMDataModule
    from fasp_lightning.training.distilling.config import DistillationConfig
    from fasp_lightning.training.distilling.loss import distillation_loss
    from fasp_lightning.training.distilling.teacher import Teacher
    from fasp_lightning.training.metrics import Perplexity
    from fasp_lightning.training.modeling.lora import LoRAConfig
    from fasp_lightning.training.modeling.structure_state import carry_structure
    from fasp_lightning.training.module import CausalLMModule
    from fasp_lightning.training.reporting import EventRecord
    from fasp_lightning.training.schedule import PruningSchedule, ScheduledPruning

__version__ = "0.1.0"

__all__ = [
    "ArchitectureSpec",
    "CausalLMDataModule",
    "CausalLMModule",
    "Clock",
    "CoupledPair",
    "Cuts",
    "DistillationConfig",
    "EventRecord",
    "Experts",
    "Exported",
    "FASPPruner",
    "FASPPruning",
    "FaspError",
    "LearningConfig",
    "LearningReport",
    "LoRAConfig",
    "LoaderCheck",
    "LoaderSupport",
    "OwnTextConfig",
    "PairLayout",
    "PairPlan",
    "PairReport",
    "Perplexity",
    "PerplexityResult",
    "Prepared",
    "Processes",
    "ProgressEvent",
    "Proof",
    "PruningConfig",
    "PruningPlan",
    "PruningReport",
    "PruningSchedule",
    "SavedModel",
    "ScheduledPruning",
    "Serving",
    "Speedup",
    "SpeedupPlan",
    "Teacher",
    "TextConfig",
    "TextReport",
    "TokenizerTraining",
    "apply_plan",
    "calibration_batches",
    "carry_structure",
    "distillation_loss",
    "export_gguf",
    "export_onnx",
    "export_vllm",
    "infer_spec",
    "load_model",
    "load_pruned",
    "load_tokenizer",
    "measure_perplexity",
    "measure_speedup",
    "perplexity",
    "plan_speedup",
    "prove",
    "register_architecture",
    "save_pruned",
    "spec_for",
    "token_batches",
]

_HOMES = {
    "ArchitectureSpec": "structure.spec",
    "CausalLMDataModule": "training.data",
    "CausalLMModule": "training.module",
    "CoupledPair": "structure.spec",
    "Cuts": "structure.layout",
    "DistillationConfig": "training.distilling.config",
    "EventRecord": "training.reporting",
    "Experts": "structure.spec",
    "Exported": "checkpoints.exporting.exported",
    "FASPPruner": "streaming.pruner",
    "FASPPruning": "training.callback",
    "FaspError": "errors",
    "LearningConfig": "pruning.config",
    "LearningReport": "pruning.report",
    "LoRAConfig": "training.modeling.lora",
    "LoaderCheck": "checkpoints.exporting.exported",
    "LoaderSupport": "checkpoints.forms",
    "OwnTextConfig": "pruning.config",
    "PairLayout": "structure.layout",
    "PairPlan": "structure.pruning_plan",
    "PairReport": "pruning.report",
    "Perplexity": "training.metrics",
    "PerplexityResult": "pruning.perplexity",
    "Prepared": "pruning.prepare",
    "Processes": "pruning.processes",
    "ProgressEvent": "pruning.progress",
    "PruningConfig": "pruning.config",
    "PruningPlan": "structure.pruning_plan",
    "PruningReport": "pruning.report",
    "PruningSchedule": "training.schedule",
    "SavedModel": "checkpoints.saving",
    "ScheduledPruning": "training.schedule",
    "Serving": "pruning.latency.serving",
    "Clock": "pruning.latency.stopwatch",
    "Speedup": "pruning.latency.speedup",
    "SpeedupPlan": "pruning.latency.speedup",
    "Teacher": "training.distilling.teacher",
    "TextConfig": "text.config",
    "TextReport": "pruning.report",
    "TokenizerTraining": "text.tokenizer",
    "apply_plan": "structure.plan",
    "calibration_batches": "text.tokens",
    "carry_structure": "training.modeling.structure_state",
    "distillation_loss": "training.distilling.loss",
    "export_gguf": "checkpoints.exporting.gguf.export",
    "export_onnx": "checkpoints.exporting.onnx_graph",
    "export_vllm": "checkpoints.exporting.vllm.folder",
    "load_model": "checkpoints.loading",
    "load_pruned": "checkpoints.pruned_folder",
    "load_tokenizer": "checkpoints.loading",
    "measure_perplexity": "pruning.perplexity",
    "measure_speedup": "pruning.latency.speedup",
    "infer_spec": "structure.inferring.inference",
    "perplexity": "pruning.perplexity",
    "plan_speedup": "pruning.latency.speedup",
    "Proof": "proving.proof",
    "prove": "proving.proof",
    "register_architecture": "structure.registry",
    "save_pruned": "checkpoints.saving",
    "spec_for": "structure.registry",
    "token_batches": "text.tokens",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
