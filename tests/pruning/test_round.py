"""The way from the public call to the algebra: short, and each thing is done once."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import BOTH, FFN, basic, calibration
from transformers import AutoModelForCausalLM

import fasp_lightning
from fasp_lightning import FASPPruner
from fasp_lightning.pruning import pruner, restore
from fasp_lightning.pruning import round as rounds
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.prepare import prepare
from fasp_lightning.pruning.round import round_configs
from fasp_lightning.structure import pruning_plan

PACKAGE = str(Path(fasp_lightning.__file__).parent)


def test_five_calls_lead_from_the_public_one_to_the_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: set[tuple[str, ...]] = set()
    algebra = restore.restore_weight

    def watched(*arguments: Any, **options: Any) -> Any:
        frame, names = sys._getframe(1), []
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                names.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)
            frame = frame.f_back
        ways.add(tuple(reversed(names)))
        return algebra(*arguments, **options)

    monkeypatch.setattr(restore, "restore_weight", watched)
    FASPPruner(BOTH).prune(tiny_model("llama"), calibration())
    ((first, *_, last),) = ways
    assert (first.rpartition(".")[2], last) == ("prune", "restore_pair")
    assert len(ways.pop()) == 5  # and restore_weight itself is called by the fifth


def test_preparation_takes_five_arguments() -> None:
    assert len(inspect.signature(prepare).parameters) == 5


@pytest.mark.parametrize("rounds", [1, 3])
def test_pairs_are_resolved_once(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    calls = []
    resolve = pruner.resolve_pruned
    for name, module in list(sys.modules.items()):
        if name.startswith("fasp_lightning.") and hasattr(module, "resolve_pruned"):
            monkeypatch.setattr(
                module, "resolve_pruned", lambda *args, **options: (calls.append(1), resolve(*args, **options))[1]
            )
    FASPPruner(basic(0.3, rounds=rounds)).prune(tiny_model("llama"), calibration())
    assert len(calls) == 1


def work(blocks: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], int]:
    """Calls of functions while each pair of a pruning is cut, and how often the kept units of one were encoded."""
    calls: list[int] = []
    encoded: list[Any] = []
    change, encode = rounds.all_or_nothing, pruning_plan._bits

    def count(frame: Any, event: str, _: Any) -> None:
        calls[-1] += event in ("call", "c_call")

    @contextmanager
    def counted(*args: Any) -> Iterator[None]:
        calls.append(0)
        sys.setprofile(count)
        with change(*args):
            yield
        sys.setprofile(None)

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "all_or_nothing", counted)
        patch.setattr(pruning_plan, "_bits", lambda pair: (encoded.append(pair), encode(pair))[1])
        config = TINY["llama"].config()
        config.num_hidden_layers = blocks
        FASPPruner(BOTH).prune(AutoModelForCausalLM.from_config(config), calibration())
    return calls, len(encoded)


def test_cutting_a_pair_costs_the_same_in_a_deeper_model(monkeypatch: pytest.MonkeyPatch) -> None:
    (shallow, encoded), (deep, encoded_deep) = work(2, monkeypatch), work(5, monkeypatch)
    assert (len(shallow), len(deep)) == (encoded, encoded_deep) == (4, 10)  # each pair once
    assert (min(shallow[::2]), min(shallow[1::2])) == (min(deep[::2]), min(deep[1::2]))


def test_rounds_go_in_even_steps_from_where_the_model_is() -> None:
    model = tiny_model("llama")
    FASPPruner(basic(0.1, attention="none")).prune(model, calibration())
    config = basic(0.4, attention="none", rounds=3)
    budget = decide_budget(model, config)
    configs = round_configs(budget, config)
    steps = [one.sparsity for one in configs]
    assert steps[-1] == 0.4
    first = budget.sparsity_before
    assert steps == pytest.approx([first + (0.4 - first) * k / 3 for k in (1, 2, 3)])


def test_own_text_is_written_in_the_first_round_alone() -> None:
    config = fasp_lightning.PruningConfig(0.3, rounds=3)
    configs = round_configs(decide_budget(tiny_model("llama"), config), config)
    assert [one.own_text is not None for one in configs] == [True, False, False]


def test_warnings_point_at_the_line_that_asked() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FASPPruner(FFN).prune(tiny_model("llama"), [random_tokens(1, 5)])
    few = [warning for warning in caught if "calibration tokens are fewer" in str(warning.message)]
    assert [warning.filename for warning in few] == [__file__]


def test_a_consumer_that_is_not_called_once_is_refused() -> None:
    """What would be recorded were not what the consumer is called with in the model."""
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    twice = mlp.forward
    mlp.forward = lambda hidden: twice(hidden) + twice(hidden)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj must be called once .* got 2 calls"):
        FASPPruner(FFN).prune(model, calibration())


def test_few_tokens_are_warned_of_with_both_numbers() -> None:
    model, tokens = tiny_model("llama"), random_tokens(2, 20)
    with pytest.warns(UserWarning, match=r"40 calibration tokens are fewer than the 48 columns"):
        report = FASPPruner(BOTH).prune(model, [tokens])
    assert len([message for message in report.warnings if "40" in message and "48" in message]) == 1


def test_enough_tokens_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = FASPPruner(BOTH).prune(tiny_model("llama"), [random_tokens(2, 24)])
    assert (report.tokens, report.warnings) == (48, [])


def test_singular_gram_is_warned_of_by_layer() -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        report = FASPPruner(replace(FFN, damping=0.0)).prune(tiny_model("llama"), [random_tokens(1, 20)])
    few, *singular = report.warnings
    assert "20 calibration tokens" in few
    for message, pair in zip(singular, report.pairs, strict=True):
        assert message.startswith(f"{pair.layer}: the gram was singular; solved by {pair.solver} with damping ")
        assert pair.damping > 0
