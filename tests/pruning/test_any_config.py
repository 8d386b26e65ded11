"""Any settings on any family: refused with nothing changed, or what every pruning promises holds."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from tiny import MIXTURES, TINY, random_tokens, tiny_model
from tiny_pruning import assert_unchanged, calibration, leftovers

from fasp_lightning import FASPPruner, LearningConfig, PruningConfig, load_pruned, save_pruned
from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.config import OwnTextConfig

FORMS = ["auto", "stock", "compact", "zero_filled"]
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "sparsity": st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.5, 0.9, 0.999]),
        "attention": st.sampled_from(["auto", "value_dims", "kv_groups", "none"]),
        "experts": st.sampled_from(["columns", "whole"]),
        "head_balance": st.sampled_from(["even", "free"]),
        "value_basis": st.sampled_from(["given", "principal"]),
        "score": st.sampled_from(["auto", "wanda", "fisher", "learned", "magnitude"]),
        "allocation": st.sampled_from(["uniform", "adaptive", "block_influence"]),
        "influence_temperature": st.sampled_from([0.01, 0.1, 10.0]),
        "restoration": st.sampled_from(["least_squares", "none"]),
        "ridge": st.sampled_from(["original", "zero"]),
        "damping": st.sampled_from([0, 1e-6, 0.1, 10.0, "auto"]),
        "refit_bias": st.booleans(),
        "own_text": st.sampled_from([None, OwnTextConfig(tokens=60, seq_len=20), OwnTextConfig(60, 1.0, 20)]),
        "rounds": st.sampled_from([1, 2]),
        "multiple_of": st.sampled_from([1, 5, 8, 32, "auto"]),
        "sensitivity_tokens": st.sampled_from([1, 100, 16384]),
        "offload": st.sampled_from(["cpu", "accelerator", "disk"]),
        "micro_batch_size": st.sampled_from([None, 1]),
    },
)
any_config = given(name=st.sampled_from([*TINY, *MIXTURES]), form=st.sampled_from(FORMS), fields=FIELDS)


def swept(examples: int) -> settings:
    """The same examples every time; the first that fails is printed in its shortest form."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=slow)


def promises_hold(name: str, form: str, fields: dict[str, Any]) -> None:
    """Prune a tiny model, save it, and load it."""
    try:
        config = PruningConfig(**{"own_text": None, "learning": LearningConfig(steps=2, tokens=80), **fields})
    except FaspError:
        reject()  # a contradiction, which the config's own tests look at
    model = tiny_model(name)
    try:
        budget = decide_budget(model, config)
        report = FASPPruner(config).prune(model, calibration())
    except FaspError:
        assert_unchanged(model, name)
        assert leftovers(model) == []
        return
    assert leftovers(model) == []
    json.dumps(report.to_dict(), allow_nan=False)
    if config.allocation == "uniform" and config.rounds == 1:  # rounds round, too
        assert report.sparsity == pytest.approx(budget.sparsity)
    if config.restoration == "least_squares" and config.ridge == "original":
        assert all(pair.error_after <= pair.error_before * (1 + 1e-6) for pair in report.pairs)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        tokens = random_tokens(2, 24)
        expected = model(tokens).logits
        assert expected.isfinite().all()
        try:
            save_pruned(model, Path(folder) / "out", form=form, verify=False)
        except FaspError:
            assert form in ("stock", "zero_filled")  # the others hold any shapes
            return
        torch.testing.assert_close(load_pruned(Path(folder) / "out")(tokens).logits, expected, atol=1e-4, rtol=0)


@swept(10)
@any_config
def test_promises_hold_for_a_few(name: str, form: str, fields: dict[str, Any]) -> None:
    promises_hold(name, form, fields)


@pytest.mark.laws
@swept(500)
@any_config
def test_promises_hold_for_any(name: str, form: str, fields: dict[str, Any]) -> None:
    promises_hold(name, form, fields)
