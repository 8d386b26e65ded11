"""What prune and plan have in common: the model's shapes, and what pruning will make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fasp_lightning.checkpoints.devices import choose_device, choose_dtype, choose_stored
from fasp_lightning.checkpoints.forms import choose_form
from fasp_lightning.checkpoints.loading import checkpoint_dtype, load_config, load_model, model_shapes
from fasp_lightning.checkpoints.refused_models import quantization_method
from fasp_lightning.checkpoints.source import ModelSource, resolve_source, stored_bytes
from fasp_lightning.cli.console import dtype_name, percent
from fasp_lightning.cli.jobs import ModelConfig, PruneJob
from fasp_lightning.cli.quiet import all_threads
from fasp_lightning.cli.rows import row_of
from fasp_lightning.pruning.budget.budget import Budget
from fasp_lightning.pruning.budget.footprint import PeakMemory, peak_memory_estimate
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.config import PruningConfig, with_user_cache
from fasp_lightning.pruning.latency.speedup import SpeedupPlan, plan_speedup
from fasp_lightning.structure.configs.text_part import text_family, whole_class
from fasp_lightning.structure.layout import Cuts
from fasp_lightning.structure.spec import ArchitectureSpec
from fasp_lightning.text.config import TextConfig


@dataclass(frozen=True)
class Setup:
    """A job whose budget is decided; no weight was read.

    Attributes:
        source: The model's source.
        config: Its transformers config.
        model: Its shapes, on the ``meta`` device.
        spec: Its family's row.
        pruning: The settings, with the device to compute on.
        budget: Widths before and after.
        device: Where to compute.
        dtype: Dtype to load in.
        stored: Dtype to save in.
        form: Form to save in.
        cuts: What will be cut.
        speedup: How the sparsity was found, where it is a speed-up that was asked for.
    """

    source: ModelSource
    config: Any
    model: Any
    spec: ArchitectureSpec
    pruning: PruningConfig
    budget: Budget
    device: torch.device
    dtype: torch.dtype
    stored: torch.dtype
    form: str
    cuts: Cuts
    speedup: SpeedupPlan | None = None

    @property
    def already_pruned(self) -> float:
        """Sparsity of the model as it is, counted from the original."""
        budget = self.budget
        return (budget.original_parameters - budget.parameters_before) / budget.linear_parameters

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights that will be saved, zeros of a zero-filled model among them; the most it can be."""
        size, budget = self.stored.itemsize, self.budget
        if self.form != "zero_filled":
            return size * budget.parameters_after
        padded = self.spec.width_field is None or self.cuts.uneven  # how wide the widest will be is not known
        kinds = {"value", "ffn"} if padded else {"value"}
        gone = (pair for block in budget.pairs for pair in block if pair.kind not in kinds)
        return size * (budget.original_parameters - sum((pair.original - pair.after) * pair.cost for pair in gone))


def set_up(job: PruneJob) -> Setup:
    """Decide budget, device, dtype and form.

    Raises:
        FaspError: If the model is of no known family, the sparsity cannot be reached, the form cannot hold
            the result, or device or dtype do not fit.
        FaspOSError: If there is no such model.
    """
    device = choose_device(job.device)
    if job.pruning.device is not None:
        choose_device(job.pruning.device)  # refused where the machine lacks it
    source, config = resolve_source(job.model.name_or_path), config_of(job.model)
    spec = row_of(source, config, job.model.trust_remote_code)
    model = model_shapes(source, config, job.model.trust_remote_code)
    own = None if job.pruning.own_text is None else with_user_cache(job.pruning.own_text)
    learning, device_name = with_user_cache(job.pruning.learning), job.pruning.device or str(device)
    pruning = dataclasses.replace(job.pruning, device=device_name, own_text=own, learning=learning)
    checkpoint = checkpoint_dtype(source, config)
    dtype = choose_dtype(job.dtype, checkpoint, device)
    speedup = None if job.speedup is None else _for_speedup(job, job.speedup, config, pruning, dtype)
    if speedup is not None:
        pruning = dataclasses.replace(pruning, sparsity=speedup.sparsity)
    budget = decide_budget(model, pruning)
    cuts = budget.cuts
    stored = choose_stored(job.save_dtype, checkpoint, dtype)
    form = choose_form(job.form, spec, cuts)
    return Setup(source, config, model, spec, pruning, budget, device, dtype, stored, form, cuts, speedup)


def _for_speedup(job: PruneJob, factor: float, config: Any, pruning: PruningConfig, dtype: torch.dtype) -> SpeedupPlan:
    """Time blocks of a few widths, with all threads."""
    with all_threads():
        return plan_speedup(
            config,
            factor,
            job.serving,
            pruning,
            dtype=dtype,
            device=pruning.device or "cpu",
            attn_implementation=job.model.attn_implementation,
            trust_remote_code=job.model.trust_remote_code,
        )


def remarks(setup: Setup) -> Iterator[str]:
    """What the user should know of a model before anything is done to it."""
    if setup.already_pruned:
        yield (
            f"{setup.source.name} is already pruned by {percent(setup.already_pruned)} of its blocks' linear "
            "parameters: it is pruned further, and sparsity counts from the original model"
        )
    if whole_class(setup.config) is not None:
        yield (
            f"{setup.config.model_type} takes more than text: its {text_family(setup.config)} decoder is pruned, on "
            "text alone, and the rest is saved as it is"
        )
    if (method := quantization_method(setup.config)) is not None:
        yield f"{setup.source.name} is quantised ({method}): it is read, pruned and saved in full precision"


def bytes_before(setup: Setup, job: PruneJob) -> int:
    """Bytes of the model's files of weights, or what they would be in the dtype it is saved in."""
    found = stored_bytes(setup.source, job.model.revision)
    return found or setup.budget.parameters_before * setup.stored.itemsize


def saved_dtype(setup: Setup) -> str:
    """In which dtype a model is saved, where that is not the one it is computed in, or the checkpoint has none."""
    if setup.source.gguf_file is not None and setup.stored.itemsize > 2:
        return f"; saved in {dtype_name(setup.stored)}, since a GGUF file has no dtype (save_dtype: bfloat16 halves it)"
    return "" if setup.stored == setup.dtype else f"; saved in {dtype_name(setup.stored)}"


def config_of(model: ModelConfig) -> Any:
    """The transformers config of a job's model."""
    return load_config(model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def load(model: ModelConfig, config: Any, dtype: str | torch.dtype, device: torch.device) -> Any:
    """The weights of a job's model."""
    return load_model(
        model.name_or_path,
        dtype=dtype,
        device=device,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        attn_implementation=model.attn_implementation,
        config=config,
    )


def memory_of(setup: Setup, job: PruneJob, tokens: int, streamed: bool = False) -> PeakMemory:
    """Estimated peak memory of a job with so many calibration tokens, where the model is streamed or not."""
    return peak_memory_estimate(
        setup.model,
        setup.budget,
        setup.pruning,
        tokens=tokens,
        evaluated_tokens=max((batch_tokens(text) for text in job.evaluated()), default=0),
        bytes_per_value=setup.dtype.itemsize,
        verify=job.compares or (job.verify and job.output_dir is not None),
        streamed=streamed,
    )


def batch_tokens(text: TextConfig) -> int:
    """Tokens of one batch of a text."""
    sequences, seq_len, batch_size, _ = text.extent()
    return seq_len * min(batch_size, sequences or batch_size)
