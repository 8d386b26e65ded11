"""Collection of garbage stops for a while, and only for a while."""

from __future__ import annotations

import gc

import pytest

from fasp_lightning.cli.startup import without_collection


def within() -> None:
    assert not gc.isenabled()
    raise KeyError


def test_collection_is_off_within_and_on_again_afterwards() -> None:
    with without_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collection_is_on_again_after_an_error() -> None:
    with pytest.raises(KeyError), without_collection():
        within()
    assert gc.isenabled()


def test_who_had_it_off_has_it_off_afterwards() -> None:
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
