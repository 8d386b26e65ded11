"""What this package refuses, and says so: below every floor, since every floor refuses something.

Each message names the argument, the rule, the value and what to do. The command line shows it as one line with exit
code 2; an error of any other class is a bug of this package.
"""

from __future__ import annotations


class FaspError(ValueError):
    """A check of this package failed: something given to it cannot be used.

    Example:
        >>> from fasp_lightning import FaspError, PruningConfig
        >>> try:
        ...     PruningConfig(sparsity=1.3)
        ... except FaspError as error:
        ...     print(error)
        sparsity must be in [0, 1), got 1.3
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
    if not first:
        return " ".join(lines)
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")
