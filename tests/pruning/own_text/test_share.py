"""Own text has the share of the calibration that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import BOTH, calibration

from fasp_lightning import FASPPruner
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.pruning.own_text.writing import OWN_TEXT, mixed, own_text, share_weight

CONFIG = OwnTextConfig(tokens=5 * 20, seq_len=20)


def weights(batches: list[Any]) -> tuple[float, float]:
    """Weight of the calibration text, and of own text behind it."""
    sums = [0.0, 0.0]
    for index, batch in enumerate(batches):
        ids = batch["input_ids"] if isinstance(batch, dict) else batch
        mask = batch.get("attention_mask", torch.ones_like(ids)) if isinstance(batch, dict) else torch.ones_like(ids)
        sums[index >= 4] += float(mask.sum()) * (batch.get("weight", 1) if isinstance(batch, dict) else 1)
    return sums[0], sums[1]


@pytest.mark.parametrize("share", [0.01, 0.33, 0.5, 0.9])
def test_own_text_has_its_share(share: float) -> None:
    given = [*calibration(), {"input_ids": random_tokens(2, 40), "weight": 2.5}]  # one of them is padded
    own = [random_tokens(3, 8), random_tokens(1, 8)]
    found = mixed(iter(given), own, share)
    assert found[:4] == given
    assert [batch["input_ids"] for batch in found[4:]] == own
    calibrated, written = weights(found)
    assert calibrated == 80 - 9 + 2 * 80 + 2.5 * 80
    assert written / (calibrated + written) == pytest.approx(share)


def test_half_the_weight_of_as_many_tokens_is_a_weight_of_one() -> None:
    assert share_weight(0.5, 640, 640) == 1


def test_own_text_alone_reads_no_other() -> None:
    def unread() -> Iterator[Any]:
        raise AssertionError
        yield

    own = [random_tokens(3, 8)]
    (alone,) = mixed(unread(), own, 1.0)
    assert alone["input_ids"] is own[0]
    assert (alone["weight"], alone["source"]) == (1.0, OWN_TEXT)


@pytest.mark.parametrize("batches", [[], [{"input_ids": random_tokens(), "attention_mask": torch.zeros(2, 12).long()}]])
def test_a_share_of_nothing_is_refused(batches: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"at least one calibration token, got none; set own_text\.share to 1"):
        mixed(batches, [random_tokens()], 0.33)


def test_the_mixture_prunes() -> None:
    model = tiny_model("llama")
    report = FASPPruner(BOTH).prune(model, mixed(calibration(), own_text(model, CONFIG), CONFIG.share))
    assert report.tokens == 80 - 9 + 160 + 100
