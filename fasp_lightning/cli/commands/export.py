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
        to: "gguf" (a file for llama.cpp).
        output: The file or folder to write.
        outtype: Of a GGUF file's matrices: "f32", "f16", "bf16" or "q8_0".
        pad: Fill a GGUF file's FFN widths up with zeros to a multiple of 32, which quantised types want.
        check: Load what was written with its loader, if that is installed, and compare.
        overwrite: Replace what an earlier export wrote.
        dtype: In which the weights are read; "auto" is the checkpoint's, on a CPU only if it is not slower than
            float32.
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
    """

    require: Callable[[ExportJob, Any, Any], object]
    export: Callable[[ExportJob, Any, Any], Exported]
    serve: Callable[[Exported], str]


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
    results().print(serve, soft_wrap=True)


def _check(job: ExportJob, exported: Exported) -> str:
    """What the loader made of it, in words."""
    import transformers

    check = exported.check
    if check is None:
        return "not tried: its loader is not installed" if job.check else "not asked for"
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


TARGETS = {
    "gguf": Target(_require_gguf, _export_gguf, lambda exported: f"llama-server -m {shlex.quote(str(exported.path))}"),
}
"""Name → how it is written."""
