"""fit, validate, test and predict from the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fasp_lightning import load_pruned
from fasp_lightning.cli.commands.lightning import TrainingCLI
from fasp_lightning.structure.layout import Cuts
from fasp_lightning.structure.plan import plan_of

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "max_steps": 2,
    "limit_val_batches": 1,
}


@pytest.fixture
def config(tmp_path: Path, text: Path, tiny_folder: Callable[..., Path]) -> Callable[..., Path]:
    """``config(trainer={…})`` writes a small config, its sections changed as said."""

    def write(**changes: dict[str, Any]) -> Path:
        data = {"source": str(text), "seq_len": 16, "batch_size": 2, "cache_dir": str(tmp_path / "cache")}
        sections = {
            "model": {"name_or_path": str(tiny_folder("llama"))},
            "data": data,
            "trainer": {**QUIET, "default_root_dir": str(tmp_path / "root")},
        }
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({name: {**part, **changes.get(name, {})} for name, part in sections.items()}))
        return path

    return write


def pruning(**options: Any) -> dict[str, Any]:
    """A FASPPruning for a config."""
    small = {"schedule": {"kind": "one_shot", "sparsity": 0.3}, "calibration_sequences": 4, "validation_batches": 1}
    small["pruning"] = {"own_text": {"tokens": 64, "seq_len": 16}}
    return {"class_path": "FASPPruning", "init_args": {**small, **options}}


def run_and_keep(command: str, *argv: object) -> TrainingCLI:
    """Run a command and return what it constructed."""
    return TrainingCLI(command, [str(argument) for argument in argv])


def test_fit_prunes_and_exports(fasp, config, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    trainer = {"callbacks": [pruning(export_to=str(exported))]}
    outcome = fasp("fit", "-c", config(trainer=trainer))
    assert outcome.code == 0, outcome.err
    assert plan_of(load_pruned(exported)) is not None
    assert (exported / "tokenizer.json").is_file()


def test_callback_is_appended_by_its_bare_name(fasp, config, tmp_path: Path) -> None:
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text("- {step: 1, sparsity: 0.2}")
    exported = tmp_path / "exported"
    options = ["--trainer.callbacks+=FASPPruning", "--trainer.callbacks.schedule", schedule]
    more = ["--trainer.callbacks.calibration_sequences", 4, "--trainer.callbacks.export_to", exported]
    outcome = fasp("fit", "-c", config(), *options, *more)
    assert outcome.code == 0, outcome.err
    assert plan_of(load_pruned(exported)) is not None


EVERYTHING = {
    "attention": "value_dims",
    "head_balance": "free",
    "score": "fisher",
    "sensitivity_tokens": 64,
    "allocation": "adaptive",
    "damping": "auto",
    "own_text": {"tokens": 64, "seq_len": 16, "share": 0.5},
}


@pytest.mark.parametrize("settings", [EVERYTHING, {"attention": "kv_groups", "score": "fisher"}], ids=["all", "groups"])
def test_settings_of_the_engine_are_taken_from_yaml(fasp, config, tmp_path: Path, settings: dict[str, Any]) -> None:
    exported = tmp_path / "exported"
    callback = pruning(pruning=settings, export_to=str(exported))
    outcome = fasp("fit", "-c", config(trainer={"callbacks": [callback]}))
    assert outcome.code == 0, outcome.err
    model = load_pruned(exported)
    uneven = "allocation" in settings
    kinds = frozenset({"value", "ffn"} if uneven else {"groups", "ffn"})
    assert model.fasp_plan.cuts == Cuts(kinds, uneven)
    told = model.fasp_report["config"]
    assert {name: told[name] for name in settings if name != "own_text"} == {
        name: value for name, value in settings.items() if name != "own_text"
    }
    assert (told["own_text"] or {}).items() >= settings.get("own_text", {}).items()


def test_later_config_and_flags_win(config, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("trainer: {max_steps: 1, accumulate_grad_batches: 2}")
    cli = run_and_keep("fit", "-c", config(), "-c", second, "--trainer.accumulate_grad_batches=3")
    assert (cli.trainer.max_steps, cli.trainer.accumulate_grad_batches) == (1, 3)
    assert cli.trainer.global_step == 1


def test_tokenizer_is_the_models_unless_one_is_named(config, tiny_folder) -> None:
    argv = ["-c", config(), "--trainer.limit_val_batches", 0]
    assert run_and_keep("validate", *argv).config.validate.data.tokenizer == str(tiny_folder("llama"))
    other = str(tiny_folder("opt"))
    cli = run_and_keep("validate", *argv, "--data.tokenizer", other)
    assert cli.config.validate.data.tokenizer == other


def test_printed_config_gives_the_same_options(fasp, config, tmp_path: Path) -> None:
    written = config(trainer={"callbacks": [pruning(recovery="lora")], "max_steps": 1})
    outcome = fasp("fit", "-c", written, "--print_config")
    assert outcome.code == 0
    (tmp_path / "printed.yaml").write_text(outcome.out)
    first = run_and_keep("fit", "-c", written)
    second = run_and_keep("fit", "-c", tmp_path / "printed.yaml")
    assert first.config.fit.trainer == second.config.fit.trainer
    assert first.config.fit.model == second.config.fit.model


def test_run_goes_on_from_its_checkpoint(fasp, config, tmp_path: Path) -> None:
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "kept"), "save_last": True}}
    trainer = {"callbacks": [checkpoint, pruning()], "enable_checkpointing": True}
    written = config(trainer=trainer)
    assert fasp("fit", "-c", written).code == 0
    last = tmp_path / "kept" / "last.ckpt"
    exported = tmp_path / "exported"
    more = ["--trainer.max_steps", 3, "--trainer.callbacks.export_to", exported]
    outcome = fasp("fit", "-c", written, "--ckpt_path", last, *more)
    assert outcome.code == 0, outcome.err
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert plan_of(load_pruned(exported)) is not None


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_pruned_checkpoint_is_evaluated(fasp, config, tmp_path: Path, command: str) -> None:
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path), "filename": "kept"}}
    trainer = {"callbacks": [checkpoint, pruning()], "enable_checkpointing": True}
    assert fasp("fit", "-c", config(trainer=trainer)).code == 0
    limit = [f"--trainer.limit_{command.replace('idate', '')}_batches", 1]
    outcome = fasp(command, "-c", config(), "--ckpt_path", tmp_path / "kept.ckpt", *limit)
    assert outcome.code == 0, outcome.err
    shown = {"validate": "val_perplexity", "test": "test_perplexity", "predict": ""}
    assert shown[command] in outcome.out


def test_second_run_overwrites_the_saved_config(fasp, config, tmp_path: Path) -> None:
    written = config()
    assert fasp("fit", "-c", written).code == 0
    outcome = fasp("fit", "-c", written, "--trainer.max_steps", 1)
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load((tmp_path / "root" / "config.yaml").read_text())["trainer"]["max_steps"] == 1


BAD = {
    "no config": (("-c", "no-such"), "config must be a YAML file or one of the shipped"),
    "unknown option": (("--trainer.max_step", "1"), "--trainer.max_step"),
    "bad value": (("--trainer.max_steps", "many"), 'option "trainer.max_steps": must be int, got many'),
    "no model": (("--model.name_or_path", "no/such/folder"), "no/such/folder"),
    "no checkpoint": (("--ckpt_path", "no-such.ckpt"), "ckpt_path must be a checkpoint"),
    "bad schedule": (
        ("--trainer.callbacks+=FASPPruning", "--trainer.callbacks.schedule=[{step: 0, sparsity: 1.5}]"),
        "schedule entry 0, {'step': 0, 'sparsity': 1.5}: sparsity must be in (0, 1), got 1.5",
    ),
    "no schedule file": (
        ("--trainer.callbacks+=FASPPruning", "--trainer.callbacks.schedule=no-such.yaml"),
        "schedule must be data or the path of a YAML file, got 'no-such.yaml'",
    ),
    "schedule beyond the run": (
        ("--trainer.callbacks+=FASPPruning", "--trainer.callbacks.schedule=[{step: 2, sparsity: 0.2}]"),
        "schedule entry 0, {'step': 2, 'sparsity': 0.2}",
    ),
    "settings that do not go together": (("--trainer.limit_train_batches", "-1"), "limit_train_batches"),
    "a token without an embedding": (
        ("--data.tokenizer={vocab_size: 300}",),
        "input_ids must be in [0, 97), the model's vocabulary, got",
    ),
    "bad settings of the engine": (
        (
            "--trainer.callbacks+=FASPPruning",
            "--trainer.callbacks.schedule={kind: one_shot, sparsity: 0.3}",
            "--trainer.callbacks.pruning={own_text: {share: 2}}",
        ),
        "own_text.share must be in (0, 1], got 2",
    ),
    "bad data": (("--data.seq_len", "1"), "seq_len must be 2 or more, got 1"),
}


@pytest.mark.parametrize(("argv", "words"), BAD.values(), ids=BAD)
def test_mistake_is_one_line(fasp, config, argv: tuple[str, ...], words: str) -> None:
    outcome = fasp("fit", "-c", config(), *argv)
    assert outcome.code == 2
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("fasp: ")
    assert words in last
    assert "Traceback" not in outcome.err


BEFORE_THE_WEIGHTS = {
    "no text": (("--data.source", "no-such.txt"), "no-such.txt"),
    "no sequence": (("--data.seq_len", "1"), "seq_len must be 2 or more, got 1"),
    "sparsity out of reach": (
        ("--trainer.callbacks+=FASPPruning", "--trainer.callbacks.schedule=[{step: 0, sparsity: 0.99}]"),
        "schedule entry 0, {'step': 0, 'sparsity': 0.99}: sparsity must be at most",
    ),
    "form that cannot hold the cuts": (
        (
            "--trainer.callbacks+=FASPPruning",
            "--trainer.callbacks.schedule=[{step: 0, sparsity: 0.3}]",
            "--trainer.callbacks.export_to=out",
            "--trainer.callbacks.form=stock",
        ),
        "form 'stock' cannot hold this model",
    ),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("argv", "words"), BEFORE_THE_WEIGHTS.values(), ids=BEFORE_THE_WEIGHTS)
def test_mistake_is_found_before_the_weights_are_read(fasp, config, argv: tuple[str, ...], words: str) -> None:
    outcome = fasp("fit", "-c", config(), *argv)
    assert outcome.code == 2, outcome.err
    assert words in outcome.err.strip().splitlines()[-1]


def test_bug_keeps_its_traceback(fasp, config, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("fasp_lightning.training.callback.validation_quality", bug)
    outcome = fasp("fit", "-c", config(trainer={"callbacks": [pruning()]}))
    assert outcome.code == 1
    assert "ZeroDivisionError: a bug" in outcome.err
    assert "please report it" in outcome.err.splitlines()[-1]


def test_help_shows_the_documentation_of_the_fields(fasp) -> None:
    outcome = fasp("fit", "--help")
    shown = " ".join(outcome.out.split())
    assert "usage: fasp fit " in shown
    assert "Tokens of a sequence." in shown
    assert "--optimizer" not in shown.replace("--model.optimizer", "")


def test_engine_commands_load_no_lightning() -> None:
    code = (
        "import sys; from fasp_lightning.cli.main import main; main(['prune', '--help']);"
        "sys.stderr.write(' '.join(p for p in ('lightning', 'peft', 'datasets') if p in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == ""


def test_interrupt_is_told_after_the_trainer_has_shut_down(fasp, config, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fasp_lightning.training.callback.validation_quality", interrupt)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Lightning ignores further ones for good
    outcome = fasp("fit", "-c", config(trainer={"callbacks": [pruning()]}))
    assert outcome.code == 130
    assert outcome.err.endswith("fasp: interrupted\n")
