"""What stands below every floor: the message of an error on one line."""

from __future__ import annotations

import pytest

from fasp_lightning.errors import one_line


@pytest.mark.parametrize(
    ("message", "whole", "first"),
    [
        ("one line", "one line", "one line"),
        ("a\n  wrapped\n\n line.", "a wrapped line.", "a"),
        ("announced:\n  what it is\nand advice", "announced: what it is and advice", "announced: what it is"),
        ("a sentence.\nand advice", "a sentence. and advice", "a sentence"),
        ("", "KeyError", "KeyError"),
    ],
)
def test_message_is_on_one_line(message: str, whole: str, first: str) -> None:
    error = type("KeyError", (Exception,), {})(message)
    assert one_line(error) == whole
    assert one_line(error, first=True) == first
