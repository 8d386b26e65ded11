"""The public names, their signatures, and what importing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

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
    "register_architecture",
    "spec_for",
    "PruningSchedule",
    "FaspError",
)
TRAINING = ("FASPPruning", "CausalLMModule", "CausalLMDataModule", "LoRAConfig", "Perplexity", "carry_structure")
PUBLIC = (*ENGINE, *TRAINING)
SIGNATURES = {
    "FASPPruner.prune": "(self, model, batches)",
    "apply_plan": "(model, plan)",
    "save_pruned": "(model, path, tokenizer=None, form='auto', verify=True, overwrite=False)",
    "load_pruned": "(path)",
    "perplexity": "(model, batches)",
    "register_architecture": "(model_type, spec, overwrite=False)",
    "spec_for": "(model_or_config)",
}
DEFAULTS = {
    "sparsity": 0.2,
    "attention": "auto",
    "score": "auto",
    "restoration": "least_squares",
    "ridge": "original",
    "damping": 0.1,
    "refit_bias": True,
    "multiple_of": 1,
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
