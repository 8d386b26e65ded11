"""Torch's ambient modes change no result, and are as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import OWN, assert_same, basic, calibration
from torch.utils._pytree import tree_map

from fasp_lightning import FASPPruner, apply_plan, load_pruned, perplexity, save_pruned
from fasp_lightning.structure.modes import own_modes

Mode = Callable[[], AbstractContextManager[Any]]


@contextmanager
def setting(change: Callable[[Any], None], value: Any, before: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


def backend_precision(value: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = value


MODES: dict[str, Mode] = {
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": torch.autograd.detect_anomaly,
    "meta": lambda: torch.device("meta"),
    "default-device": lambda: setting(torch.set_default_device, "meta", None),
    "default-dtype": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "products": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "products-of-a-backend": lambda: setting(backend_precision, "bf16", "none"),
}
EVERYTHING = basic(0.3, attention="value_dims", score="fisher", allocation="adaptive", damping="auto", own_text=OWN)


def state() -> Any:
    """What a caller sees of torch's modes."""
    try:
        products: Any = torch.get_float32_matmul_precision()
    except RuntimeError:
        products = torch.backends.mkldnn.matmul.fp32_precision
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_anomaly_enabled(),
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        products,
    )


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_pruning_is_the_same_bit_for_bit_in_every_mode(mode: Mode) -> None:
    model, plain, plainly = tiny_model("llama"), tiny_model("llama"), state()
    batches = calibration()
    report = FASPPruner(EVERYTHING).prune(plain, batches)
    measured = perplexity(plain, batches)
    random = torch.get_rng_state()
    with mode():
        given = [tree_map(torch.clone, batch) for batch in batches]
        inside = state()
        found = FASPPruner(EVERYTHING).prune(model, given)
        assert perplexity(model, given) == measured
        assert state() == inside
    assert state() == plainly
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(model, plain)
    assert [pair.error_after for pair in found.pairs] == [pair.error_after for pair in report.pairs]
    for name, parameter in model.named_parameters():
        assert (parameter.is_inference(), parameter.requires_grad, parameter.dtype) == (False, True, torch.float32), (
            name
        )
    model(random_tokens(), labels=random_tokens()).loss.backward()


@pytest.mark.parametrize("mode", ["inference", "autocast", "default-dtype", "default-device"])
def test_plans_and_folders_are_the_same_in_every_mode(mode: str, tmp_path: Path) -> None:
    plain = tiny_model("opt")
    FASPPruner(basic(attention="value_dims")).prune(plain, calibration())
    model = tiny_model("opt")
    with MODES[mode]():
        apply_plan(model, plain.fasp_plan)
        model.load_state_dict(plain.state_dict())
        save_pruned(model, tmp_path / "p", form="compact")
        loaded = load_pruned(tmp_path / "p") if mode != "default-device" else plain
    assert_same(model, plain)
    assert_same(loaded, plain)
    assert not any(parameter.is_inference() for one in (model, loaded) for parameter in one.parameters())


def test_weights_that_autocast_has_cast_are_cast_anew() -> None:
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        model(random_tokens()).logits.sum().backward()
        FASPPruner(basic(attention="value_dims")).prune(model, calibration())
        model(random_tokens()).logits.sum().backward()


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes_come_back_after_an_error(mode: Mode) -> None:
    with mode():
        before = state()
        with pytest.raises(KeyError), own_modes():
            raise KeyError
        assert state() == before
