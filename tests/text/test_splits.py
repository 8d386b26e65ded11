"""Who gets a document: by its content and the shares, never by where it stands."""

from __future__ import annotations

from itertools import product

import pytest
from tiny_text import words

from fasp_lightning.text.splits import (
    HUB_SHARES,
    SHARES,
    claimant,
    deal,
    deal_corpus,
    distinct,
    meet,
    owner,
    split_of,
)

TEXTS = [f"document {number}" for number in range(4000)]


def test_dealing_does_not_depend_on_positions() -> None:
    corpus = [(f"name {number}", "text " * (number + 1)) for number in range(40)]
    assert deal_corpus(corpus) == deal_corpus(reversed(corpus))


def test_every_document_is_dealt_once() -> None:
    corpus = [(f"name {number}", f"text {number}") for number in range(100)]
    dealt = [text for texts in deal_corpus(corpus).values() for text in texts]
    assert sorted(dealt) == sorted(text for _, text in corpus)


def test_a_documents_split_is_fixed_for_ever() -> None:
    """Another hash would move documents between splits, and make published perplexities wrong."""
    found = [split_of(text) for text in ("", "a", "b", "Grüße", "\ud800")]
    assert found == ["test", "test", "calibration", "validation", "train"]


def test_documents_of_a_stream_are_dealt_by_the_shares() -> None:
    dealt = [split_of(f"document {number}") for number in range(4000)]
    for name, share in SHARES.items():
        assert dealt.count(name) / len(dealt) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("scale", [1.0, 0.25, 7.0])
def test_shares_need_not_add_up_to_one(scale: float) -> None:
    shares = {name: share * scale for name, share in SHARES.items()}
    places = [(number + 0.5) / 1000 for number in range(1000)]  # none where two shares meet
    assert [deal(place, shares) for place in places] == [deal(place) for place in places]


def test_the_end_belongs_to_the_last() -> None:
    assert deal(1.0) == deal(1.0 - 2**-53) == "validation"
    assert deal(0.0) == "calibration"


def test_roles_that_are_all_get_the_splits_of_their_names() -> None:
    assert [owner(text, list(SHARES)) for text in TEXTS] == [split_of(text) for text in TEXTS]


@pytest.mark.parametrize("sharing", [["calibration", "train"], ["train", "test", "validation"], ["test"]])
@pytest.mark.parametrize("shares", [SHARES, HUB_SHARES], ids=["local", "hub"])
def test_roles_divide_in_the_proportion_of_their_shares(sharing: list[str], shares: dict[str, float]) -> None:
    found = [owner(text, sharing, shares) for text in TEXTS]
    for role in sharing:
        expected = shares[role] / sum(shares[name] for name in sharing)
        assert found.count(role) / len(found) == pytest.approx(expected, abs=0.03)


def test_salt_makes_a_choice_that_the_split_does_not_tell() -> None:
    """Without it all of a split's documents would fall to one of the roles that divide it."""
    split = [text for text in TEXTS if split_of(text) == "calibration"]
    salted = [owner(text, ["calibration", "train"], SHARES, "role ") for text in split]
    assert salted.count("calibration") / len(split) == pytest.approx(0.40 / 0.70, abs=0.05)
    assert {owner(text, ["calibration", "train"]) for text in split} == {"calibration"}


def test_claims_on_splits_are_kept_apart() -> None:
    claims = {("train", "train"), ("test", "test")}
    for text in TEXTS[:400]:
        split = split_of(text)
        assert claimant(text, claims) == ((split, split) if split in ("train", "test") else None)


def test_a_claim_on_all_of_a_file_shares_each_split() -> None:
    claims = {("calibration", None), ("train", "train")}
    found = [claimant(text, claims) for text in TEXTS]
    assert None not in found
    assert {one for one in found if one is not None and one[1] == "train"} == {
        ("calibration", "train"),
        ("train", "train"),
    }
    assert all(one[0] == "calibration" for one in found if one is not None and one[1] != "train")


def test_without_a_split_roles_divide_the_whole() -> None:
    claims = [(role, None) for role in SHARES]
    assert [claimant(text, claims) for text in TEXTS] == [(split_of(text), None) for text in TEXTS]


@pytest.mark.parametrize(("one", "other"), list(product([None, "train", "test"], repeat=2)))
def test_splits_meet_where_they_are_equal_or_one_is_all(one: str | None, other: str | None) -> None:
    assert meet(one, other) == meet(other, one) == (None in (one, other) or one == other)


def test_long_documents_have_a_mark_of_their_own_and_short_ones_none() -> None:
    marks = {distinct(text) for text in words(50)}
    assert len(marks) == 50
    assert None not in marks
    assert distinct("x" * 79) is None
    assert distinct("x" * 80) == distinct("x" * 80)
