"""Which errors are the user's to mend, and how they are told in one line."""

from __future__ import annotations

import re

from fasp_lightning.errors import FaspError, of_library, one_line

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


REPORT = (
    "this is a bug of fasp_lightning {version}, not a mistake of yours: please report it with the lines above and the "
    'command, as an issue of the repository you have it from ("Reporting a bug" in CONTRIBUTING.md)'
)
"""What follows the traceback of a bug."""


def is_user_error(error: BaseException) -> bool:
    """Whether an error is a mistake of the user or a shortcoming of the machine, and not a bug.

    That is what a check of this package refused, and what the operating system (a full disk, no permission) or an
    accelerator without memory refused. Everything else, a ``ValueError`` of a library or of a broken invariant in
    this package included, is a bug, whose traceback is wanted.

    Args:
        error: A caught error.
    """
    return isinstance(error, (FaspError, OSError)) or type(error).__name__ == "OutOfMemoryError"


def refusal_in(error: BaseException) -> BaseException | None:
    """The user's mistake in an error that a parser or a trainer raised, which wrap what they run into.

    Args:
        error: A caught error.

    Returns:
        The first error in the chain of causes that is the user's to mend, or, where libraries alone had a part in it,
        a refusal that says what they say; ``None`` for a bug.
    """
    each: BaseException | None = error
    while each is not None:
        if is_user_error(each):
            return each
        if not of_library(each):
            return None
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return FaspError(one_line(error))


def told(error: BaseException) -> str:
    """What a user reads of an error, on one line.

    Args:
        error: One that :func:`is_user_error` calls the user's.
    """
    if type(error).__name__ == "OutOfMemoryError":
        advice = "lower --pruning.micro_batch_size, or set --pruning.offload to cpu or disk"
        return f"the accelerator is out of memory ({one_line(error)[:120]}); {advice}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return one_line(error)


def reworded(error: BaseException) -> str:
    """What the argument parser refuses, on one line, without the names of Python types and classes."""
    text = one_line(error)
    for pattern, replacement in _REWORDED:
        text = re.sub(pattern, replacement, text)
    return text
