"""What this package refuses, and says so: below every floor, since every floor refuses something.

Each message names the argument, the rule, the value and what to do. The command line shows it as one line with exit
code 2; an error of any other class is a bug of this package.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class FaspError(ValueError):
    """A check of this package failed: something given to it cannot be used.

    Example::

        from fasp_lightning import FaspError, PruningConfig

        try:
            PruningConfig(sparsity=1.3)
        except FaspError as error:
            print(error)  # sparsity must be in [0, 1), got 1.3
    """


class FaspTypeError(FaspError, TypeError):
    """An object of another kind was given."""


class FaspOSError(FaspError, OSError):
    """A file or folder cannot be used, or a disk has no room."""


class FaspFileNotFoundError(FaspOSError, FileNotFoundError):
    """There is no such file, folder or package."""


class FaspFileExistsError(FaspOSError, FileExistsError):
    """A folder is taken."""


class FaspPermissionError(FaspOSError, PermissionError):
    """A place may not be written to."""


class FaspProcessError(FaspError, RuntimeError):
    """A check failed in another of the processes that prune together."""


def one_line(error: BaseException, first: bool = False) -> str:
    """The message of an error on one line, or the name of its class where it has none.

    Args:
        error: A caught error.
        first: Leave out all but its first line, and the second where the first ends in a colon: libraries go on at
            length.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):  # whose message is the key alone
        lines[0] = f"{type(error).__name__}: {lines[0]}"
    if not first:
        return " ".join(lines)
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")


def of_library(error: BaseException) -> bool:
    """Whether an error came out of a library, with no code of this package between its call and the error.

    A library that is given what a user wrote refuses it by errors of any class, which cannot be told by their class
    from a bug of this package. They can by their traceback: it leaves this package and does not come back. It does
    come back where a library calls this package, such as a constructor of a model that is cut while it is built.

    Args:
        error: A caught error.
    """
    package = __name__.partition(".")[0]
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    beyond = list(itertools.dropwhile(lambda ours: ours, (name.partition(".")[0] == package for name in names)))
    return bool(beyond) and not any(beyond)


@contextmanager
def as_refusal(refusal: Callable[[Exception], FaspError]) -> Iterator[None]:
    """Tell an error of a library as a refusal; a bug of this package within the block stays what it is.

    Args:
        refusal: Makes the refusal of the library's error.
    """
    try:
        yield
    except FaspError:
        raise
    except Exception as error:
        if not of_library(error):
            raise
        raise refusal(error) from error
