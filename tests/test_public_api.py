"""The public names, their signatures, and what importing them costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import fasp_lightning

ENGINE = (
    "PruningConfig",
    "FASPPruner",
    "PruningPlan",
    "PruningReport",
    "apply_plan",
    "save_pruned",
    "load_pruned",
    "perplexity",
    "ArchitectureSpec",
    "CoupledPair",
    "Experts",
    "Cuts",
    "register_architecture",
    "spec_for",
    "infer_spec",
    "prove",
    "Proof",
    "PruningSchedule",
    "Exported",
    "FaspError",
    "Clock",
    "LoaderCheck",
    "LoaderSupport",
    "LearningConfig",
    "LearningReport",
    "OwnTextConfig",
    "PairLayout",
    "PairPlan",
    "PairReport",
    "PerplexityResult",
    "Prepared",
    "Processes",
    "ProgressEvent",
    "SavedModel",
    "Serving",
    "Speedup",
    "SpeedupPlan",
    "ScheduledPruning",
    "TextConfig",
    "TextReport",
    "TokenizerTraining",
    "calibration_batches",
    "export_gguf",
    "export_onnx",
    "export_vllm",
    "load_model",
    "load_tokenizer",
    "measure_perplexity",
    "measure_speedup",
    "plan_speedup",
    "token_batches",
)
TRAINING = (
    "FASPPruning",
    "CausalLMModule",
    "CausalLMDataModule",
    "DistillationConfig",
    "EventRecord",
    "LoRAConfig",
    "Perplexity",
    "Teacher",
    "carry_structure",
    "distillation_loss",
)
PUBLIC = (*ENGINE, *TRAINING)
SIGNATURES = {
    "FASPPruner.prune": "(self, model, batches)",
    "FASPPruner.prune_folder": "(self, source, output, batches, tokenizer=None)",
    "apply_plan": "(model, plan)",
    "save_pruned": "(model, path, tokenizer=None, form='auto', verify=True, overwrite=False, dtype='auto', "
    "push_to_hub=None, private=None)",
    "load_pruned": "(path, dtype='auto', device_map=None, attn_implementation=None, revision=None, "
    "trust_remote_code=False)",
    "distillation_loss": "(student_logits, teacher, batch, config=None)",
    "export_gguf": "(model, path, tokenizer, outtype='f16', pad=False, architecture='auto', check=True, "
    "overwrite=False)",
    "export_onnx": "(model, path, tokenizer=None, check=True, overwrite=False)",
    "export_vllm": "(model, path, tokenizer=None, check=True, overwrite=False, dtype='auto')",
    "perplexity": "(model, batches)",
    "plan_speedup": "(config, factor, serving=None, pruning=None)",
    "infer_spec": "(model_or_config)",
    "prove": "(model_or_config, spec=None)",
    "register_architecture": "(model_type, spec, overwrite=False)",
    "spec_for": "(model_or_config)",
}
FOR_THE_ENGINE = (
    "Prepared.check",
    "PruningReport.of_budget",
    "TextConfig.extent",
    "Teacher",
    "Teacher.__call__",
    "Teacher.knows",
)
"""Methods of public classes that the package alone calls, and a protocol that it alone fulfils."""

DEFAULTS = {
    "sparsity": 0.2,
    "attention": "auto",
    "score": "auto",
    "restoration": "least_squares",
    "ridge": "original",
    "damping": 0.1,
    "refit_bias": True,
    "multiple_of": "auto",
}


def loaded_by(code: str, packages: tuple[str, ...]) -> str:
    """Which of the packages a fresh interpreter has loaded after ``code``, separated by spaces."""
    code += f"; import sys; sys.stdout.write(' '.join(p for p in {packages} if p in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_all_holds_the_public_names():
    assert sorted(PUBLIC) == fasp_lightning.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_what_it_says(name):
    value = getattr(fasp_lightning, name)
    assert value.__name__ == name
    assert value.__module__.startswith("fasp_lightning.")
    assert name in dir(fasp_lightning)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_takes_the_documented_arguments(name):
    value, expected = fasp_lightning, SIGNATURES[name]
    for part in name.split("."):
        value = getattr(value, part)
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(value).parameters.values()]
    documented = expected.strip("()").split(", ")
    assert [str(parameter) for parameter in parameters[: len(documented)]] == documented
    assert all(parameter.default is not parameter.empty for parameter in parameters[len(documented) :])


def test_pruning_config_has_the_documented_defaults():
    config = fasp_lightning.PruningConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_paper_settings_are_the_documented_ones():
    config = fasp_lightning.PruningConfig.paper(sparsity=0.3)
    assert (config.sparsity, config.attention, config.score) == (0.3, "value_dims", "wanda")
    assert (config.restoration, config.ridge) == ("least_squares", "zero")
    assert (config.damping, config.refit_bias) == (1e-4, False)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune_it'"):
        _ = fasp_lightning.prune_it


def test_importing_the_package_loads_none_of_the_heavy_ones():
    heavy = ("lightning", "peft", "datasets", "transformers", "torch")
    assert loaded_by("import fasp_lightning", heavy) == ""


def test_engine_names_load_neither_lightning_nor_peft_nor_datasets():
    heavy = ("lightning", "peft", "datasets")
    assert loaded_by(f"from fasp_lightning import {', '.join(ENGINE)}", heavy) == ""


def imported_for_checking(module: ModuleType) -> dict[str, Any]:
    """Names that a module imports for the type checker alone."""
    guards = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If)]
    imports = [line for guard in guards for line in guard.body if isinstance(line, ast.ImportFrom)]
    return {
        alias.name: getattr(importlib.import_module(line.module or ""), alias.name)
        for line in imports
        for alias in line.names
    }


def classes_in(hint: Any) -> Iterator[type]:
    """Classes in a type: ``list[int] | None`` holds ``list``, ``int`` and ``NoneType``."""
    parts = hint if isinstance(hint, (list, tuple)) else typing.get_args(hint)
    if isinstance(hint, type) and not parts:
        yield hint
    for part in parts:
        yield from classes_in(part)


def annotated_classes(value: Any) -> Iterator[type]:
    """Classes that the annotations of a class or function name."""
    module = sys.modules[value.__module__]
    known = {**imported_for_checking(module), **vars(module)}
    for annotation in inspect.get_annotations(value).values():
        hint = getattr(annotation, "__forward_arg__", annotation)
        if not isinstance(hint, str):  # what `dataclass` generates
            yield from classes_in(hint)
            continue
        names = [node.id for node in ast.walk(ast.parse(hint)) if isinstance(node, ast.Name)]
        for name in names:
            yield from classes_in(known.get(name))


def signatures(name: str) -> Iterator[tuple[str, Any]]:
    """A public name with what it declares: itself, and the methods and properties of a class.

    Left out is what overrides a method of another package's class: Lightning calls it, and gave it its signature.
    """
    value = getattr(fasp_lightning, name)
    yield name, value
    if not inspect.isclass(value):
        return
    foreign = [base for base in value.__mro__ if not base.__module__.startswith("fasp_lightning")]
    ours = [base for base in value.__mro__ if base not in foreign]
    members = {key: member for base in reversed(ours) for key, member in vars(base).items()}  # inherited ones, too
    for key, member in members.items():
        function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
        own = inspect.isfunction(function) and function.__module__.startswith("fasp_lightning")
        special = key.startswith("__")
        overrides = not special and any(key in vars(base) for base in foreign)
        if own and not overrides and (special or not key.startswith("_")):
            yield f"{name}.{key}", function


@pytest.mark.parametrize("name", PUBLIC)
def test_types_in_public_signatures_are_public(name: str) -> None:
    missing = {
        f"{where}: {found.__name__}"
        for where, value in signatures(name)
        if where not in FOR_THE_ENGINE
        for found in annotated_classes(value)
        if found.__module__.startswith("fasp_lightning") and getattr(fasp_lightning, found.__name__, None) is not found
    }
    assert not missing


def test_walk_over_signatures_finds_what_is_in_them() -> None:
    found = {where: set(annotated_classes(value)) for where, value in signatures("FASPPruner")}
    assert fasp_lightning.ProgressEvent in found["FASPPruner.prune"]  # within an alias
    assert fasp_lightning.PruningReport in found["FASPPruner.prune"]
    assert fasp_lightning.PruningConfig in found["FASPPruner.__init__"]
