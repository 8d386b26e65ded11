"""The built-in corpora: what they hold, and that no text is in two splits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fasp_lightning.text import corpora
from fasp_lightning.text.corpora import (
    BUILTIN,
    builtin_splits,
    module_docstrings,
    topic_sections,
    without_repeats,
)
from fasp_lightning.text.splits import SHARES, digest

READ_ALL = """
import json, sys
from fasp_lightning.text.corpora import BUILTIN, builtin_splits
from fasp_lightning.text.splits import digest
hashes = {source: [digest(text) for text in builtin_splits(source)["test"]] for source in BUILTIN}
print(json.dumps([hashes, sorted(sys.modules)]))
"""


def paragraphs(texts: list[str]) -> set[str]:
    return {" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)}


@pytest.fixture(scope="module")
def another_process() -> tuple[dict[str, list[str]], list[str]]:
    """Hashes of the test splits' documents, and the modules loaded, in a Python with another hash seed."""
    root = Path(corpora.__file__).parents[2]
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", READ_ALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    hashes, modules = json.loads(done.stdout)
    return hashes, modules


@pytest.fixture(scope="module")
def docstrings() -> dict[str, str]:
    return dict(module_docstrings())


@pytest.mark.parametrize("source", BUILTIN)
def test_no_long_paragraph_is_in_two_splits(source: str) -> None:
    parts = [{text for text in paragraphs(texts) if len(text) >= 80} for texts in builtin_splits(source).values()]
    assert sum(map(len, parts)) == len(set().union(*parts)) > 1000


def test_every_paragraph_of_the_topics_of_some_length_is_in_a_split() -> None:
    sections = [text for _, text in topic_sections()]
    dealt = [text for texts in builtin_splits("builtin:topics").values() for text in texts]
    missing = paragraphs(sections) - paragraphs(dealt)
    assert max(map(len, missing), default=0) < 80


def test_sections_are_the_topics_cut_up() -> None:
    from pydoc_data.topics import topics

    cut = "".join(text for _, text in topic_sections())
    assert "".join(cut.split()) == "".join("".join(topics[name] for name in sorted(topics)).split())


def test_a_section_starts_with_its_heading() -> None:
    sections = dict(topic_sections())
    assert sections['assert/The "assert" statement'].splitlines()[1].startswith("****")


@pytest.mark.parametrize("source", BUILTIN)
def test_splits_have_their_shares_to_within_a_document(source: str) -> None:
    splits = builtin_splits(source)
    sizes = {name: sum(map(len, texts)) for name, texts in splits.items()}
    longest = max(len(text) for texts in splits.values() for text in texts)
    for name, share in SHARES.items():
        assert abs(sizes[name] - share * sum(sizes.values())) <= longest


@pytest.mark.slow
def test_each_split_of_the_topics_has_enough_tokens_of_smollm2(smollm2_tokenizer: Any) -> None:
    counts = {
        name: sum(len(ids) + 1 for ids in smollm2_tokenizer(texts, add_special_tokens=False)["input_ids"])
        for name, texts in builtin_splits("builtin:topics").items()
    }
    assert counts["calibration"] >= 64 * 512
    assert counts["test"] >= 32 * 512
    assert counts["train"] >= 23_000
    assert counts["validation"] >= 8_000


@pytest.mark.parametrize("source", BUILTIN)
def test_splits_are_the_same_in_every_process(
    source: str, another_process: tuple[dict[str, list[str]], list[str]]
) -> None:
    assert another_process[0][source] == [digest(text) for text in builtin_splits(source)["test"]]


def test_reading_imports_none_of_the_modules_read(
    another_process: tuple[dict[str, list[str]], list[str]],
) -> None:
    """``this`` and ``antigravity`` print or open a browser when imported."""
    modules = set(another_process[1])
    assert "pydoc_data.topics" in modules
    assert not modules & {
        "this",
        "antigravity",
        "asyncio",
        "unittest",
        "datasets",
        "transformers",
        "lightning",
    }


def test_docstrings_are_those_of_modules_classes_and_functions(docstrings: dict[str, str]) -> None:
    import textwrap

    text = docstrings["textwrap"]
    for documented in (textwrap, textwrap.TextWrapper, textwrap.TextWrapper.wrap, textwrap.dedent):
        first = documented.__doc__.strip().splitlines()[0]
        assert first in text
    assert "import re" not in text


def test_docstrings_leave_out_tests_and_optional_modules(docstrings: dict[str, str]) -> None:
    names = [name.split(".") for name in docstrings]
    assert ["json", "decoder"] in names
    assert not any({"test", "tests", "tkinter", "idlelib"} & set(parts) for parts in names)


def test_what_is_installed_beside_the_library_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site-packages").mkdir()
    for name in ("json.py", "foreign.py", "site-packages/json.py"):
        (tmp_path / name).write_text(f'"""Text of {name}."""')
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(module_docstrings()) == [("json", "Text of json.py.")]


def test_a_python_without_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=rf"builtin:docstrings.*{tmp_path}.*builtin:topics"):
        list(module_docstrings())


def test_a_source_that_does_not_parse_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ast.py").write_text("def broken(:")
    (tmp_path / "json.py").write_text('"""Sound."""')
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(module_docstrings()) == [("json", "Sound.")]


def test_a_repeated_paragraph_stays_where_it_comes_first() -> None:
    long, other = "a long paragraph " * 9, "another paragraph " * 9
    found = dict(without_repeats([("a", f"{long}\n\nshort"), ("b", f"short\n\n {long}\n\n{other}"), ("c", long)]))
    assert found == {"a": f"{long.strip()}\n\nshort", "b": f"short\n\n{other.strip()}"}
