"""A broken invariant inside the package is a bug wherever it breaks: exit code 1, never told as the user's mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fasp_lightning.checkpoints import loading, saving
from fasp_lightning.cli import model_setup
from fasp_lightning.errors import FaspError, FaspOSError, as_refusal, of_library
from fasp_lightning.pruning import pruner
from fasp_lightning.text import tokens
from fasp_lightning.training import data


def uneven(*_: Any, **__: Any) -> Any:
    """A ``zip`` of this package that does not come out even, as in its own code."""
    code = compile("list(zip([1], [], strict=True))", "uneven.py", "exec")
    exec(code, {"__name__": "fasp_lightning.injected"})


PLACES: dict[str, tuple[str, Any, str]] = {
    "shapes": ("plan", model_setup, "model_shapes"),
    "budget": ("plan", model_setup, "decide_budget"),
    "reading of text": ("prune", tokens, "documents"),
    "loading": ("prune", loading, "_load_dense"),
    "pruning": ("prune", pruner, "prepare"),
    "saving": ("prune", saving, "verify_saved"),
    "evaluation": ("evaluate", tokens, "encode_documents"),
    "training": ("fit", data, "RoleCache"),
}


@pytest.mark.parametrize(("command", "module", "name"), PLACES.values(), ids=PLACES)
def test_broken_invariant_is_reported(
    fasp: Callable[..., Any],
    tiny_folder: Callable[..., Any],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    module: Any,
    name: str,
) -> None:
    monkeypatch.setattr(module, name, uneven)
    small = ("--calibration.seq_len", 16, "--calibration.sequences", 8, "--pruning.own_text", "null")
    texts = ("--evaluation", "[{source: builtin:topics, split: test, seq_len: 16, sequences: 4}]")
    options = {
        "plan": (*small, *texts),
        "prune": (*small, *texts, "--output_dir", tmp_path / "pruned", "--device", "cpu"),
        "evaluate": texts,
        "fit": ("--trainer.accelerator", "cpu", "--trainer.max_steps", 1, "--trainer.logger", "false"),
    }[command]
    outcome = fasp(command, "--model.name_or_path", tiny_folder("llama"), *options)
    assert outcome.code == 1, outcome.err
    assert "Traceback (most recent call last)" in outcome.err
    assert "zip() argument 2 is shorter" in outcome.err
    assert "please report it" in outcome.err.splitlines()[-1]
    assert not (tmp_path / "pruned").exists()


def refuse(error: Exception) -> FaspError:
    return FaspOSError(f"cannot be read: {error}")


def test_error_of_a_library_becomes_the_refusal() -> None:
    with pytest.raises(FaspOSError, match="cannot be read: invalid literal"), as_refusal(refuse):
        exec(compile("int('x')", "library.py", "exec"), {"__name__": "library"})


def test_bug_of_the_package_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="zip") as caught, as_refusal(refuse):
        uneven()
    assert not isinstance(caught.value, FaspError)


def test_refusal_within_stays_what_it_is() -> None:
    with pytest.raises(FaspError, match=r"^mine$"), as_refusal(refuse):
        raise FaspError("mine")


def raised(code: str, **names: Any) -> Exception:
    """What code raises that a module of this package has called."""
    space = {"__name__": "fasp_lightning.caller", **names}
    try:
        exec(compile(code, "caller.py", "exec"), space)
    except Exception as error:
        return error.with_traceback(error.__traceback__.tb_next if error.__traceback__ else None)
    raise AssertionError(code)


def test_a_library_that_calls_the_package_back_may_have_met_a_bug_of_it() -> None:
    library: dict[str, Any] = {"__name__": "library"}
    exec("def parse(text): return int(text)\ndef build(make): return make()", library)
    assert of_library(raised("parse('x')", **library | {"__name__": "fasp_lightning.caller"}))
    assert not of_library(raised("build(uneven)", **library | {"__name__": "fasp_lightning.caller", "uneven": uneven}))
