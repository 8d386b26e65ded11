"""Whatever stops a pruning, at whatever call: each pair is whole or cut, the plan says which, and the model runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import basic, calibration
from torch import nn

from fasp_lightning import FASPPruner, PruningConfig, apply_plan, load_pruned, save_pruned
from fasp_lightning.errors import FaspOSError
from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning import round as rounds
from fasp_lightning.pruning.blocks import standins
from fasp_lightning.pruning.blocks.replay import BlockReplay
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.pruning.progress import WorkCounter
from fasp_lightning.structure import pair as pairs
from fasp_lightning.structure import plan as plans
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import conform, plan_of, resolve_pruned

SOME: dict[str, tuple[str, PruningConfig]] = {
    "llama-gqa": ("llama-gqa", basic(0.4, attention="kv_groups")),
    "opt": ("opt", basic(0.3, attention="value_dims")),
    "phi3": ("phi3", basic(0.4, attention="kv_groups")),
    "phi3-rounds": ("phi3", basic(0.45, attention="kv_groups", rounds=2, damping="auto")),
}
CALLS: dict[str, tuple[Any, str]] = {
    "progress": (WorkCounter, "count"),
    "put": (TensorStore, "put"),
    "get": (TensorStore, "get"),
    "statistics": (GramStatistics, "update"),
    "select": (rounds, "select_units"),
    "restore": (rounds, "restore_pair"),
    "cut": (ResolvedPair, "cut"),
    "shrink": (pairs, "shrink"),
    "features": (pairs, "set_features"),
    "heads": (pairs, "set_heads"),
    "replace": (standins, "replace_module"),
    "assign": (ResolvedPair, "assign"),
    "record": (plans, "record_plan"),
    "describe": (plans, "config_fields"),
    "own_config": (plans, "own_config"),
    "finish": (BlockReplay, "finish"),
}
FURTHER = {"llama-gqa": basic(0.55, attention="none"), "opt": basic(0.5, attention="value_dims")}


class Stop(KeyboardInterrupt):
    """One that no other code raises."""


def stopped(monkeypatch: pytest.MonkeyPatch, case: str, call: str, number: int, *, after: bool) -> tuple[Any, int]:
    """A model whose pruning was stopped at the n-th call of a function; and how many calls there were."""
    name, config = SOME[case]
    owner, attribute = CALLS[call]
    original, calls = getattr(owner, attribute), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            raise Stop
        result = original(*args, **kwargs)
        if calls == number:
            raise Stop
        return result

    model = tiny_model(name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, counted)
        try:
            FASPPruner(config).prune(model, calibration(4))
        except KeyboardInterrupt:
            assert number
    return model, calls


def hooks(model: nn.Module) -> list[Any]:
    return [
        (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def described(config: Any) -> dict[str, Any]:
    fields = {name: value for name, value in config.to_dict().items() if "transformers" not in name}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return fields | {"head_dim": size}  # spelt out, or left to its default


def assert_whole(model: Any, case: str) -> None:
    """Modules, plan and config agree; pairs that the plan does not name are the original ones; and the model runs."""
    name, _ = SOME[case]
    original, plan = tiny_model(name), plan_of(model)
    fresh = apply_plan(tiny_model(name), plan) if plan else tiny_model(name)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in fresh.state_dict().items()
    }
    assert described(model.config) == described(fresh.config)
    assert hooks(model) == hooks(fresh)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for block, before, cut in zip(
        resolve_pruned(model, whole=plan.cuts.kinds if plan else ()),
        resolve_pruned(original, whole=plan.cuts.kinds if plan else ()),
        plan.blocks if plan else ({}, {}),
        strict=True,
    ):
        for pair, whole in zip(block, before, strict=True):
            if pair.spec.consumer not in cut and pair.spec.kind == "ffn":
                for (_, mine), (_, other) in zip(pair.linears, whole.linears, strict=True):
                    assert torch.equal(mine.weight, other.weight)
    assert model(random_tokens(), labels=random_tokens()).loss.isfinite()


def assert_goes_on(model: Any, case: str, folder: Path) -> None:
    """It can be trained, pruned further and saved."""
    model(random_tokens(), labels=random_tokens()).loss.backward()
    FASPPruner(FURTHER.get(case, basic(0.55, attention="none"))).prune(model, calibration(4))
    expected = model(random_tokens()).logits
    save_pruned(model, folder, verify=False)
    torch.testing.assert_close(load_pruned(folder)(random_tokens()).logits, expected, atol=1e-4, rtol=0)


POINTS: dict[str, Callable[[int], int]] = {"first": lambda n: 1, "middle": lambda n: n // 2 + 1, "last": lambda n: n}


@pytest.mark.sampled
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", ["llama-gqa", "opt", "phi3"])
def test_each_pair_is_whole_or_cut_wherever_it_stops(
    case: str, call: str, point: str, after: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, calls = stopped(monkeypatch, case, call, 0, after=after)
    if not calls:
        assert (case, call) == ("opt", "heads")
        return
    model, _ = stopped(monkeypatch, case, call, POINTS[point](calls), after=after)
    assert_whole(model, case)
    assert_goes_on(model, case, tmp_path / "p")


@pytest.mark.laws
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", SOME)
def test_each_pair_is_whole_or_cut_at_every_call(
    case: str, call: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, calls = stopped(monkeypatch, case, call, 0, after=False)
    for number in range(1, calls + 1):
        for after in (False, True):
            model, _ = stopped(monkeypatch, case, call, number, after=after)
            assert_whole(model, case)
            assert_goes_on(model, case, tmp_path / f"{number}{after}")


@pytest.mark.parametrize("change", [apply_plan, conform])
@pytest.mark.parametrize("case", ["llama-gqa", "opt", "phi3"])
def test_a_plan_that_is_applied_half_way_is_recorded_half_way(
    change: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = stopped(monkeypatch, case, "cut", 0, after=False)
    for number in (1, 4):
        calls, shrink = iter(range(number)), pairs.shrink

        def until(*args: Any, calls: Any = calls, shrink: Any = shrink) -> None:
            if next(calls, None) is None:
                raise Stop
            shrink(*args)

        model = tiny_model(SOME[case][0])
        with monkeypatch.context() as patch:
            patch.setattr(pairs, "shrink", until)
            with pytest.raises(Stop):
                change(model, whole.fasp_plan)
        assert_whole(model, case)
        assert apply_plan(model, whole.fasp_plan).fasp_plan == whole.fasp_plan
        assert_whole(model, case)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError, torch.OutOfMemoryError, OSError])
def test_any_error_leaves_the_pair_as_it_was(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("phi3")
    before = copy.deepcopy(model.state_dict())

    def assign(*_: Any) -> None:
        raise error

    monkeypatch.setattr(ResolvedPair, "assign", assign)
    with pytest.raises(error):
        FASPPruner(SOME["phi3"][1]).prune(model, calibration(4))
    assert plan_of(model) is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_second_interrupt_does_not_stop_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasp_lightning.structure import transaction

    remembered = transaction._remembered

    def remembering(*args: Any) -> Callable[[], None]:
        put_back, first = remembered(*args), iter([True])

        def interrupted() -> None:
            if next(first, False):
                raise KeyboardInterrupt
            put_back()

        return interrupted

    monkeypatch.setattr(transaction, "_remembered", remembering)
    model, _ = stopped(monkeypatch, "llama-gqa", "record", 2, after=False)
    assert_whole(model, "llama-gqa")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_is_named_and_leaves_a_model_that_runs(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model, save, calls = tiny_model("opt"), torch.save, [0]

    def full(*args: Any) -> None:
        calls[0] += 1
        if calls[0] > 14:  # within the second block
            raise error
        save(*args)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FaspOSError, match=r"offload='disk' must find room in .*; set TMPDIR"):
        FASPPruner(basic(0.3, attention="value_dims", offload="disk")).prune(model, calibration(4))
    assert plan_of(model).blocks[0]
    assert_whole(model, "opt")


def interrupting() -> Iterator[Any]:
    yield from calibration(3)
    raise KeyboardInterrupt


def test_batches_that_stop_leave_the_model_alone() -> None:
    model, before = tiny_model("opt"), copy.deepcopy(tiny_model("opt").state_dict())
    with pytest.raises(KeyboardInterrupt):
        FASPPruner(SOME["opt"][1]).prune(model, interrupting())
    assert plan_of(model) is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
