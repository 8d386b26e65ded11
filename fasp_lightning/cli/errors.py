"""Which errors are the user's to mend, and how they are told in one line."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

_REWORDED = (
    (r"Parser key ", "option "),
    (r"Problem with given class_path '[^']*': ", ""),
    (r"<class '(\w+)'>", r"\1"),
    (r"Expected an? (typing\.)?", "must be "),
    (r"\. Got value: ", ", got "),
    (r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - ", ""),
    (r" Given value type: (<class '[\w.]+'>|\w+) Given value: ", ", got "),
    (r"- must be path but .*? either not accessible or invalid - ", ""),
    (r"Literal(\[.*?\])", r"one of \1"),
    (r" - must be NoneType", " - or null"),
)
"""What jsonargparse says → what a user understands."""


class UsageError(ValueError):
    """A mistake in what the user asked for, found on this floor."""


def is_user_error(error: BaseException, package: Path) -> bool:
    """Whether an error is a mistake of the user or a shortcoming of the machine, and not a bug.

    An ``OSError`` always is. A ``ValueError`` is if it was raised in this package, whose checks name the
    argument and the remedy; one that comes out of a library is a bug, and its traceback is wanted.

    Args:
        error: A caught error, with its traceback.
        package: Folder of this package's modules.
    """
    if isinstance(error, (UsageError, OSError)) or type(error).__name__ == "OutOfMemoryError":
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and package in Path(frames[-1].filename).parents


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    if type(error).__name__ == "OutOfMemoryError":
        advice = "lower --pruning.micro_batch_size, or set --pruning.offload to cpu or disk"
        return f"the accelerator is out of memory ({' '.join(str(error).split())[:120]}); {advice}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())


def reworded(message: str) -> str:
    """A message of the argument parser on one line, without the names of Python types and classes."""
    text = " ".join(message.split())
    for pattern, replacement in _REWORDED:
        text = re.sub(pattern, replacement, text)
    return text
