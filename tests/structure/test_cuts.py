"""What is cut adds up over events."""

from __future__ import annotations

from fasp_lightning.structure.cuts import Cuts

FFN, VALUE = frozenset({"ffn"}), frozenset({"value"})


def test_cuts_add_up() -> None:
    assert Cuts(FFN) | Cuts(VALUE, uneven=True) == Cuts(FFN | VALUE, uneven=True)
    assert Cuts(FFN, uneven=True) | Cuts() == Cuts(FFN, uneven=True)


def test_nothing_is_cut_of_a_whole_model() -> None:
    assert Cuts() == Cuts(frozenset(), uneven=False)
