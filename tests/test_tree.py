"""The tree stays one that a stranger finds the way in: short files, few side by side, one name for the same thing."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import fasp_lightning

PACKAGE = Path(fasp_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_no_folder_shows_more_than_fifteen_files() -> None:
    assert max(Counter(path.parent for path in FILES).values()) <= 15


@pytest.mark.parametrize("path", FILES, ids=of)
def test_file_is_short_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(parsed(path))


@pytest.mark.parametrize("path", FILES, ids=of)
def test_nothing_is_asserted_that_data_could_say(path: Path) -> None:
    """An assert that a field is set by now says that the data has the wrong shape."""
    assert not [node.lineno for node in ast.walk(parsed(path)) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("path", FILES, ids=of)
def test_checks_raise_refusals_and_loggers_have_one_name(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(
        r"raise (?:ValueError|TypeError|OSError|FileNotFoundError|FileExistsError|PermissionError)\(", text
    )
    assert set(re.findall(r"^(\w+) = logging\.getLogger", text, re.MULTILINE)) <= {"log"}


@pytest.mark.parametrize("path", FILES, ids=of)
def test_code_in_docstrings_is_quoted_one_way(path: Path) -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(parsed(path)) if isinstance(node, documented)]
    single = [found for text in texts for found in re.findall(r"(?<![`:\w])`[^`\n]+`(?![`_])", text)]
    assert not single
