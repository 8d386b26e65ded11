"""The models that :mod:`serve_speed` measures: dense, pruned, and cut to other widths, in a folder that is kept."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from serve_engines import Shape

from fasp_lightning import (
    FASPPruner,
    OwnTextConfig,
    Prepared,
    PruningConfig,
    TextConfig,
    export_gguf,
    export_onnx,
    load_model,
    load_pruned,
    load_tokenizer,
    save_pruned,
    token_batches,
)
from fasp_lightning.checkpoints.exporting.gguf.quantising import quantized
from fasp_lightning.structure.plan import resolve_pruned

KINDS = {"stock": "uniform", "adaptive": "adaptive"}
"""Kind of a model → its ``allocation``: one FFN width that stock code loads, or a width for each block."""


class Variant(NamedTuple):
    """One model.

    Attributes:
        kind: A key of :data:`KINDS`, or ``"dense"``.
        sparsity: What is asked for.
        multiple: ``multiple_of``; with the default the model is pruned, with another only cut.
    """

    kind: str = "dense"
    sparsity: float = 0.0
    multiple: int | str = "auto"

    @property
    def name(self) -> str:
        """Of its folder and files."""
        return "dense" if self.kind == "dense" else f"{self.kind}-{100 * self.sparsity:g}-{self.multiple}"

    @property
    def pruned(self) -> bool:
        """Whether its weights are worth a perplexity: those that were only cut are fast or slow as any others."""
        return self.multiple == "auto"

    def config(self) -> PruningConfig:
        """The default, but for what the variant says; without least squares where the values are of no interest."""
        if self.kind == "dense":
            return PruningConfig(sparsity=0.0)
        config = PruningConfig(sparsity=self.sparsity, allocation=KINDS[self.kind], multiple_of=self.multiple)
        if self.pruned:
            return config
        score = "fisher" if self.kind == "adaptive" else "magnitude"
        return dataclasses.replace(config, score=score, restoration="none")


class Models:
    """Folders of the variants, made when they are first asked for.

    Args:
        source: The dense model, as :func:`fasp_lightning.load_model` takes it.
        folder: Where they are kept.
        calibration: The text to calibrate on.
    """

    def __init__(self, source: str, folder: Path, calibration: TextConfig) -> None:
        self.source, self.root, self.calibration = source, folder, calibration
        self.shapes: dict[Variant, tuple[Shape, list[int]]] = {}

    def folder(self, variant: Variant) -> Path:
        """Where a variant is saved."""
        return self.root / variant.name

    def make(self, variants: Iterable[Variant]) -> None:
        """Prune and save those that are not there; own text and loss sensitivity are made once for all of them."""
        left = [variant for variant in variants if not (self.folder(variant) / "config.json").exists()]
        if not left:
            return
        tokenizer, dense = self.tokenizer(), load_model(self.source, dtype="float32", device="cpu")
        adaptive = any(variant.kind == "adaptive" for variant in left)
        batches = token_batches(self.calibration, tokenizer)
        given = self._prepared(dense, batches, adaptive)
        few = dataclasses.replace(given, batches=given.batches[:1])  # nothing is learnt from text where one only cuts
        for variant in left:
            print(f"making {variant.name}", flush=True)
            model = copy.deepcopy(dense)
            FASPPruner(variant.config()).prune(model, given if variant.pruned else few)
            save_pruned(model, self.folder(variant), tokenizer, verify=False, dtype="float16")

    def load(self, variant: Variant, dtype: str) -> Any:
        """A variant in a dtype."""
        return load_pruned(self.folder(variant), dtype=dtype)

    def tokenizer(self) -> Any:
        """That of all of them."""
        return load_tokenizer(self.source)

    def shape(self, variant: Variant) -> tuple[Shape, list[int]]:
        """What its arithmetic depends on, and the FFN width of each block."""
        if variant not in self.shapes:
            model = self.load(variant, "float16")
            self.shapes[variant] = Shape.of(model), ffn_widths(model)
        return self.shapes[variant]

    def gguf(self, variant: Variant, ftype: str) -> Path:
        """Its file in a type of llama.cpp, quantised from the one in F16."""
        unquantised, path = (self.root / f"{variant.name}-{name}.gguf" for name in ("F16", ftype))
        if not unquantised.exists():
            export_gguf(self.load(variant, "float32"), unquantised, self.tokenizer(), check=False)
        return path if path.exists() else quantized(unquantised, path, ftype)

    def onnx(self, variant: Variant) -> Path:
        """Its graph."""
        path = self.root / f"{variant.name}-onnx"
        if not path.exists():
            export_onnx(self.load(variant, "float32"), path, self.tokenizer(), check=False)
        return path / "model.onnx"

    def _prepared(self, dense: Any, batches: Any, adaptive: bool) -> Prepared:
        print("writing own text" + (" and measuring loss sensitivity" if adaptive else ""), flush=True)
        own = OwnTextConfig(cache_dir=str(self.root.parent / "own_text"))
        allocation = "adaptive" if adaptive else "uniform"
        return FASPPruner(PruningConfig(allocation=allocation, own_text=own)).prepare(dense, batches)


def ffn_widths(model: Any) -> list[int]:
    """FFN width of each block."""
    return [pair.kept.numel() for block in resolve_pruned(model) for pair in block if pair.layout.kind == "ffn"]
