"""The two built-in corpora, read from the running Python itself.

``builtin:topics`` is the language reference behind ``help()`` (``pydoc_data.topics``); ``builtin:docstrings``
are the docstrings of the standard library's modules. Both differ between Python versions (and the second also
between distributions, which leave out modules or ship them compiled): perplexities on them compare only
within one Python.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fasp_lightning.errors import FaspError
from fasp_lightning.text.splits import deal_corpus

log = logging.getLogger(__name__)


REPEAT_LENGTH = 80
"""A paragraph of this many characters or more is kept only where it comes first: shorter ones (a signature,
"New in version 3.8.") recur by nature, longer ones are the same section told under two topics, or an
inherited docstring."""

OPTIONAL_MODULES = frozenset(
    {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "venv"}
)
"""Modules that Linux distributions package apart, or leave out."""

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

_HEADING = re.compile(r"^(?=\S.*\n([*=~^\"-])\1{3,}$)", re.MULTILINE)  # empty, before an underlined line
_BLANK_LINE = re.compile(r"\n\s*\n")


def without_repeats(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Drop long paragraphs that an earlier document has, and documents of which nothing is left.

    Without this, a fifth of the topics' text would stand in two splits: "specialnames" holds all of
    "customization".
    """
    seen: set[str] = set()
    for name, text in documents:
        kept = []
        for paragraph in _BLANK_LINE.split(text):
            key = " ".join(paragraph.split())
            if len(key) >= REPEAT_LENGTH and key in seen:
                continue
            seen.add(key)
            kept.append(paragraph.rstrip())
        if any(len(" ".join(paragraph.split())) >= REPEAT_LENGTH for paragraph in kept):
            yield name, "\n\n".join(kept).strip("\n")


def topic_sections() -> Iterator[tuple[str, str]]:
    """Yield name and text of each section (one underlined heading to the next) of Python's help topics."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        text = topics[topic]
        starts = [match.start() for match in _HEADING.finditer(text)]
        if not starts or starts[0] > 0:
            starts.insert(0, 0)
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            section = text[start:end].strip("\n")
            yield f"{topic}/{section.partition(chr(10))[0]}", section


def module_docstrings() -> Iterator[tuple[str, str]]:
    """Yield name and docstrings of each module of the standard library.

    The docstrings are the module's own, its classes' and its functions'. They differ between Python versions.
    The sources are parsed, never imported: importing may open windows, start threads or print.

    Raises:
        FaspError: If this Python carries no sources of its standard library (a frozen or zipped one).
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not _is_library_module(parts):
            continue
        found = True
        text = "\n\n".join(_docstrings(path))
        if text:
            yield ".".join(parts), text
    if not found:
        raise FaspError(
            f"source 'builtin:docstrings' needs the standard library's .py files, found none in {root}; "
            "use builtin:topics"
        )


def _is_library_module(parts: tuple[str, ...]) -> bool:
    """Tell whether a path below the library folder is a module of it, no test, and rarely left out."""
    return (
        parts[0] in sys.stdlib_module_names
        and parts[0] not in OPTIONAL_MODULES
        and not {"test", "tests", "pydoc_data"} & set(parts)
    )


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one source file, from the top down, dedented."""
    try:
        with tokenize.open(path) as file:  # honours the file's coding line
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError, OSError) as error:
        log.debug("builtin:docstrings leaves out %s: %s", path, error)
        return
    for node in _definitions(tree):
        text = ast.get_docstring(node, clean=False)
        if text and text.strip():
            yield inspect.cleandoc(text)


def _definitions(node: ast.AST) -> Iterator[_Documented]:
    """Yield a tree's module, classes and functions in the order of the source, which ``ast.walk`` has not."""
    if isinstance(node, _Documented):
        yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # no expression holds a definition
            yield from _definitions(child)


BUILTIN: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "builtin:topics": topic_sections,
    "builtin:docstrings": module_docstrings,
}
"""Name → source of documents."""


@functools.cache
def builtin_splits(source: str) -> dict[str, list[str]]:
    """Split → documents of a built-in corpus, read once a process.

    Args:
        source: One of ``BUILTIN``.
    """
    return deal_corpus(without_repeats(BUILTIN[source]()))
