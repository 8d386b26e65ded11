"""``fasp export``: a pruned or whole model for another loader, tried by that loader."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.devices import choose_device, require_dtype
from fasp_lightning.checkpoints.exporting.exported import Exported
from fasp_lightning.checkpoints.exporting.record import record_export
from fasp_lightning.checkpoints.loading import model_shapes
from fasp_lightning.checkpoints.source import resolve_source
from fasp_lightning.cli.checks import tokenizer_of
from fasp_lightning.cli.console import megabytes, note, results, shown_warnings, table
from fasp_lightning.cli.jobs import ModelConfig
from fasp_lightning.cli.model_setup import config_of, load
from fasp_lightning.cli.quiet import quiet_libraries
from fasp_lightning.errors import FaspError
from fasp_lightning.staging import claimed

OUTTYPE = "f16"


@dataclass(frozen=True)
class ExportJob:
    """Write a pruned or whole model for another loader, and compare that loader's answer with transformers'.

    Attributes:
        model: A folder, pruned or not, a hub id, a .gguf file, or package:NAME.
        to: "gguf" (a file for llama.cpp), "vllm" (a folder that vLLM serves) or "onnx" (a folder with a graph for ONNX
            Runtime, in float32).
        output: The file or folder to write.
        outtype: Of a GGUF file's matrices: "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_k_m".
        pad: Fill a GGUF file's FFN widths up with zeros to a multiple of 32, which quantised types want.
        check: Load what was written with its loader, if that is installed, and compare.
        overwrite: Replace what an earlier export wrote.
        dtype: In which the weights are read, and a folder for vLLM stores them: "auto" (the checkpoint's), "float32",
            "bfloat16" or "float16".
        tokenizer: Where the tokenizer comes from, if it is not the model's own.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the model.
    """

    model: str
    to: str
    output: str
    outtype: str = OUTTYPE
    pad: bool = False
    check: bool = True
    overwrite: bool = False
    dtype: str = "auto"
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise FaspError(f"to must be one of {', '.join(map(repr, TARGETS))}, got {self.to!r}")
        if self.to != "gguf" and (self.outtype != OUTTYPE or self.pad):
            raise FaspError(f"outtype and pad are of GGUF files and must be left out for to={self.to!r}")
        require_dtype(self.dtype)

    @property
    def source(self) -> ModelConfig:
        """Which model, as the other commands name it."""
        return ModelConfig(self.model, self.tokenizer, self.revision, self.trust_remote_code)


JOB = ExportJob


@dataclass(frozen=True)
class Target:
    """How a target is written.

    Attributes:
        require: Refuses (job, shapes, tokenizer) before weights are read.
        export: Writes (job, model, tokenizer).
        serve: The line that serves what was written.
        untried: Why there is no answer of its loader, where one was asked for.
    """

    require: Callable[[ExportJob, Any, Any], object]
    export: Callable[[ExportJob, Any, Any], Exported]
    serve: Callable[[Exported], str]
    untried: str


def run(job: ExportJob) -> int:
    """Run the command; returns the exit code."""
    quiet_libraries()
    target, output = TARGETS[job.to], Path(job.output).expanduser()
    source, config = resolve_source(job.model), config_of(job.source)
    if output.exists() and source.local and output.resolve() == Path(source.location).resolve():
        raise FaspError(f"output must not be the model that is exported, got {job.output!r}")
    tokenizer = tokenizer_of(job.source)
    target.require(job, model_shapes(source, config, job.trust_remote_code), tokenizer)
    with claimed(output), shown_warnings():
        note(f"loading {job.model}")
        model = load(job.source, config, job.dtype, choose_device("cpu"))
        note(f"writing {output}")
        exported = target.export(job, model, tokenizer)
    _print(job, exported, target.serve(exported))
    if source.local and record_export(source.location, exported):
        note(f"recorded in {source.location}")
    return 0


def _print(job: ExportJob, exported: Exported, serve: str) -> None:
    rows = [
        ("target", exported.target),
        ("architecture", exported.architecture),
        ("size", megabytes(exported.bytes)),
        ("check", _check(job, exported)),
    ]
    table(str(exported.path), ("", ""), rows, numbers=False)
    if exported.check is not None and exported.check.same < exported.check.tokens:
        told = f"{exported.check.loader} writes another text from token {exported.check.same + 1} on"
        rounded = exported.target == "gguf" and job.outtype.startswith("q")
        note(f"{told}, as rounding to {job.outtype} may well do" if rounded else f"warning: {told}")
    results().print(serve, soft_wrap=True)


def _check(job: ExportJob, exported: Exported) -> str:
    """What the loader made of it, in words."""
    import transformers

    check = exported.check
    if check is None:
        return f"not tried: {TARGETS[job.to].untried}" if job.check else "not asked for"
    difference = check.logit_difference
    logits = "" if difference is None else f", largest logit difference {difference:.1e}"
    tokens = f"{check.same} of {check.tokens} greedy tokens as transformers {transformers.__version__}"
    return f"{tokens}{logits}, by {check.loader} {check.version}"


def _require_gguf(job: ExportJob, shapes: Any, tokenizer: Any) -> None:
    from fasp_lightning.checkpoints.exporting.gguf.export import check_file, require_gguf

    check_file(Path(job.output).expanduser(), job.overwrite)
    require_gguf(shapes, tokenizer, job.outtype, job.pad)


def _export_gguf(job: ExportJob, model: Any, tokenizer: Any) -> Exported:
    from fasp_lightning.checkpoints.exporting.gguf.export import export_gguf

    path = Path(job.output).expanduser()
    return export_gguf(model, path, tokenizer, job.outtype, job.pad, check=job.check, overwrite=job.overwrite)


def _require_vllm(job: ExportJob, shapes: Any, tokenizer: Any) -> None:
    from fasp_lightning.checkpoints.exporting.vllm.folder import require_vllm
    from fasp_lightning.checkpoints.output import check_output

    check_output(Path(job.output).expanduser(), job.overwrite)
    require_vllm(shapes, tokenizer, job.check)


def _export_vllm(job: ExportJob, model: Any, tokenizer: Any) -> Exported:
    from fasp_lightning.checkpoints.exporting.vllm.folder import export_vllm

    path = Path(job.output).expanduser()
    return export_vllm(model, path, tokenizer, job.check, job.overwrite, job.dtype)


def _serve_vllm(exported: Exported) -> str:
    from fasp_lightning.checkpoints.exporting.vllm.decilm import ARCHITECTURE

    trust = " --trust-remote-code" if exported.architecture == ARCHITECTURE else ""
    return f"vllm serve {shlex.quote(str(exported.path))}{trust}"


def _require_onnx(job: ExportJob, shapes: Any, tokenizer: Any) -> None:
    from fasp_lightning.checkpoints.exporting.onnx_graph import GRAPH_FILE, require_onnx
    from fasp_lightning.checkpoints.output import check_output

    check_output(Path(job.output).expanduser(), job.overwrite, GRAPH_FILE, "graph")
    require_onnx(shapes)


def _export_onnx(job: ExportJob, model: Any, tokenizer: Any) -> Exported:
    from fasp_lightning.checkpoints.exporting.onnx_graph import export_onnx

    return export_onnx(model, Path(job.output).expanduser(), tokenizer, job.check, job.overwrite)


def _serve_onnx(exported: Exported) -> str:
    return f"onnxruntime.InferenceSession({str(exported.path / 'model.onnx')!r})"


INSTALL = "pip install 'fasp-lightning[serve]'"

TARGETS = {
    "gguf": Target(
        _require_gguf,
        _export_gguf,
        lambda exported: f"llama-server -m {shlex.quote(str(exported.path))}",
        f"xllamacpp is not installed; {INSTALL}",
    ),
    "vllm": Target(
        _require_vllm,
        _export_vllm,
        _serve_vllm,
        "vLLM is not installed here; FASP_VLLM_PYTHON names a python that has it",
    ),
    "onnx": Target(_require_onnx, _export_onnx, _serve_onnx, f"onnxruntime is not installed; {INSTALL}"),
}
"""Name → how it is written."""
