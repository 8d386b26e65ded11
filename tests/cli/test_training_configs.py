"""The shipped configs for ``fasp fit`` run as they are, on a tiny model and a short text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import fasp_lightning
from fasp_lightning import PruningSchedule, load_pruned
from fasp_lightning.cli.configs import find_config
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.text.config import OWN_TEXT

NAMES = ("one_shot", "iterative_lora", "ddp_cpu", "recover_lora", "recover_distill", "opt_from_scratch")
TINY_OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 72, "num_hidden_layers": 2, "vocab_size": 300}


def content(name: str) -> dict[str, Any]:
    return yaml.safe_load(find_config(name).read_text())


def schedule_of(name: str) -> PruningSchedule:
    """That of the last callback, where the command line can replace it."""
    return PruningSchedule.parse(content(name)["trainer"]["callbacks"][-1]["init_args"]["schedule"])


def trained_on(name: str, text: Path) -> dict[str, Any]:
    """The options that put a short text in the place of what a config trains on, and let the model write little."""
    texts = [
        one | ({"sequences": 4} if one["source"] == OWN_TEXT else {"source": str(text)})
        for one in content(name)["data"].get("train", [])
    ]
    return {"train": json.dumps(texts), "sequences_per_epoch": 8} if texts else {}


@pytest.fixture
def small(tmp_path: Path, text: Path, tiny_folder: Callable[..., Path]) -> Callable[[str], list[str]]:
    """``small(name)`` gives the options that make a config small: as many steps as its schedule needs."""

    def options(name: str) -> list[str]:
        data = {"source": text, "seq_len": 16, "batch_size": 2, "cache_dir": tmp_path / "cache"}
        if content(name)["model"].get("config"):
            model = {f"config.{field}": value for field, value in TINY_OPT.items()}
            data |= {"train": "null", "tokenizer.vocab_size": TINY_OPT["vocab_size"]}
        else:
            model = {"name_or_path": tiny_folder("llama-gqa")}
            data |= trained_on(name, text)
        steps = max(event.step for event in schedule_of(name)) + 2
        trainer = {"max_steps": steps, "val_check_interval": steps, "limit_val_batches": 2, "accelerator": "cpu"}
        trainer |= {"enable_progress_bar": "false", "log_every_n_steps": 50}
        callback = {"calibration_sequences": 4, "validation_batches": 1}
        if "pruning" not in content(name)["trainer"]["callbacks"][-1]["init_args"]:  # the default writes own text
            callback["pruning.own_text.tokens"] = 128
        sections = {"model": model, "data": data, "trainer": trainer, "trainer.callbacks": callback}
        return [f"--{key}.{name}={value}" for key, part in sections.items() for name, value in part.items()]

    return options


def sparsity_of(folder: Path) -> float:
    """Fraction of the FFN units that is gone."""
    pairs = [pair for block in resolve_pruned(load_pruned(folder)) for pair in block if pair.spec.kind == "ffn"]
    return 1 - sum(pair.kept.numel() for pair in pairs) / sum(pair.layout.width for pair in pairs)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ddp_cpu"])
def test_shipped_config_runs(fasp, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = fasp("fit", "-c", name, *small(name))
    assert outcome.code == 0, outcome.err
    assert sparsity_of(tmp_path / "outputs" / name / "model") > 0.8 * schedule_of(name).final_sparsity
    assert list((tmp_path / "outputs" / name / "run").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_shipped_config_runs_in_two_processes(small, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fasp_lightning", "fit", "-c", "ddp_cpu", *small("ddp_cpu")]
    here = {**os.environ, "PYTHONPATH": str(Path(fasp_lightning.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=here)
    assert done.returncode == 0, done.stderr
    assert "Starting with 2 processes" in done.stderr
    assert sparsity_of(tmp_path / "outputs" / "ddp_cpu" / "model") > 0.8 * schedule_of("ddp_cpu").final_sparsity


@pytest.mark.parametrize("name", NAMES)
def test_schedule_of_a_shipped_config_is_reached_within_its_run(name: str) -> None:
    assert schedule_of(name).beyond(max_steps=content(name)["trainer"]["max_steps"]) is None


def test_every_training_config_is_run_here() -> None:
    found = [path.stem for path in find_config("demo").parent.glob("*.yaml") if "trainer" in content(path.stem)]
    assert sorted(found) == sorted(NAMES)
