"""The examples in the docstrings of the public names run, on tiny models."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LAYERS, random_tokens, tiny_model
from tiny_clock import counting
from tiny_text import words
from torch.utils.data import DataLoader

import fasp_lightning
from fasp_lightning import PruningConfig
from fasp_lightning.pruning.latency import speedup
from fasp_lightning.structure import registry
from fasp_lightning.structure.registry import known_architectures
from fasp_lightning.training.modeling.structure_state import carries_structure

REQUIRED = (
    "CausalLMDataModule",
    "CausalLMModule",
    "FASPPruner",
    "FASPPruning",
    "PruningSchedule",
    "perplexity",
    "save_pruned",
)
"""Names that a newcomer starts with."""

LIBRARIES = {"fasp_lightning", "lightning", "torch"}
"""What examples import from."""

OUTCOMES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "plan_speedup": lambda names: names["found"].predicted.of("prefill") >= 1.05 and is_pruned(names["model"]),
    "CausalLMDataModule": lambda left: left["batch"]["input_ids"].dtype == torch.int64,
    "CausalLMModule": lambda left: (Path(left["folder"]) / "model.safetensors").is_file(),
    "DistillationConfig": lambda left: left["module"].distillation.label_weight == 0.1,
    "FASPPruner": lambda left: is_pruned(left["model"]),
    "FASPPruning": lambda left: [record.step for record in left["pruning"].records] == [0, 1],
    "LoRAConfig": lambda left: len(left["trained"]) == 2 * 2 * LAYERS,  # A and B of two targets a block
    "Perplexity": lambda left: float(left["metric"].tokens) == 15 * len(left["loader"].dataset),
    "PruningConfig": lambda left: left["paper"] == PruningConfig.paper(0.3) != left["best"],
    "PruningPlan": lambda left: is_pruned(left["model"]),
    "PruningSchedule": lambda left: left["schedule"].events[0].sparsity == 0.23125,
    "apply_plan": lambda left: left["same_shapes"].fasp_plan == left["model"].fasp_plan,
    "carry_structure": lambda left: carries_structure(left["MyModule"](left["model"])),
    "distillation_loss": lambda left: left["pruning"].teacher.identity,
    "export_gguf": lambda left: left["exported"].path.stat().st_size == left["exported"].bytes,
    "export_onnx": lambda left: left["exported"].check.same == left["exported"].check.tokens,
    "export_vllm": lambda left: (Path(left["folder"]) / "model.safetensors").is_file(),
    "infer_spec": lambda left: True,  # it prints
    "prove": lambda left: left["proof"].kinds == ("ffn", "value", "groups"),
    "load_pruned": lambda left: left["loaded"].fasp_plan == left["model"].fasp_plan,
    "perplexity": lambda left: left["before"] > 1 and is_pruned(left["model"]),
    "register_architecture": lambda left: "my_type" in known_architectures(),
    "save_pruned": lambda left: (Path(left["folder"]) / "model.safetensors").is_file(),
}
"""Name → whether its example, which left these variables behind, did what it is there for."""


def is_pruned(model: Any) -> bool:
    """Whether every block lost units, and the model still gives finite logits."""
    return all(model.fasp_plan.blocks) and bool(model(random_tokens()).logits.isfinite().all())


def example_of(name: str) -> str | None:
    """The code of a public name's ``Example::``; ``None`` if it has none."""
    document = inspect.getdoc(getattr(fasp_lightning, name)) or ""
    found = re.search(r"^Example::\n\n((?:(?:    .*)?\n?)+)", document, re.MULTILINE)
    return None if found is None else textwrap.dedent(found.group(1))


EXAMPLES = {name: code for name in fasp_lightning.__all__ if (code := example_of(name)) is not None}


@pytest.fixture
def namespace(tmp_path: Path, tiny_folder: Callable[..., Path], tiny_tokenizer: Any) -> dict[str, Any]:
    """What the examples take as given."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(words(300, seed=0)))
    rows = [{"input_ids": ids, "labels": ids} for ids in random_tokens(64, 16)]
    return {
        "model": tiny_model("llama"),
        "tokenizer": tiny_tokenizer,
        "batches": [random_tokens(2, 16, seed=seed) for seed in range(4)],
        "name": str(tiny_folder("llama")),
        "text_file": str(text),
        "folder": str(tmp_path / "folder"),
        "loader": DataLoader(rows, batch_size=4),
    }


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files go to a temporary folder, seconds are operations, and rows that are registered are gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    grad = torch.is_grad_enabled()
    with ExitStack() as counted:
        monkeypatch.setattr(speedup, "WallClock", lambda device: counted.enter_context(counting()))
        yield
    assert torch.is_grad_enabled() == grad


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, namespace: dict[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(EXAMPLES[name], f"{name}.Example", "exec"), namespace)
    assert printed.getvalue() or "print(" not in EXAMPLES[name]
    if name == "FaspError":
        assert printed.getvalue() == "sparsity must be in [0, 1), got 1.3\n"
    else:
        assert OUTCOMES[name](namespace)


@pytest.mark.parametrize("name", REQUIRED)
def test_what_newcomers_start_with_has_an_example(name: str) -> None:
    assert name in EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_uses_public_names_alone(name: str) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(EXAMPLES[name])):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            imported |= {alias.name for alias in node.names if node.module == "fasp_lightning"}
        else:
            continue
        assert all(module.partition(".")[0] in LIBRARIES for module in modules)
        assert not any(module.startswith("fasp_lightning.") for module in modules)
    assert imported <= set(fasp_lightning.__all__)
    assert name in imported  # an example of a name uses it
