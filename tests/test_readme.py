"""The README says what the code says. ``python tests/test_readme.py`` prints the tables of families and loaders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fasp_lightning.checkpoints.loaders import LOADERS, takes, trial_of, trials
from fasp_lightning.structure.registry import known_architectures, spec_for

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def family_table() -> str:
    """The rows of the registry, as Markdown; families that share one stand together."""
    shared: dict[tuple[str, str], list[str]] = {}
    for model_type in known_architectures():
        spec = spec_for(type("Config", (), {"model_type": model_type}))
        pairs = "; ".join(f"{pair.consumer} ← {', '.join(pair.producers)}" for pair in spec.pairs)
        fields = {pair.width_field or spec.width_field for pair in spec.pairs if pair.kind in ("ffn", "experts")}
        field = ", ".join(f"`{name}`" for name in sorted(filter(None, fields))) or "none: zero-filled or compact"
        shared.setdefault((pairs, field), []).append(model_type)
    lines = ["| `model_type` | pairs | stock FFN width |", "|---|---|---|"]
    lines += [f"| {', '.join(families)} | {pairs} | {field} |" for (pairs, field), families in shared.items()]
    return "\n".join(lines)


SHOWN = {
    "load_pruned": "`load_pruned`",
    "transformers": "`AutoModelForCausalLM`",
    "older": "transformers 4",
    "gguf": "llama.cpp by `fasp export`",
    "converter": "llama.cpp's converter",
    "vllm": "vLLM",
    "vllm_export": "vLLM by `fasp export`",
    "onnx": "ONNX Runtime",
}
FORMS = {
    "stock": "`stock`: the config says the one FFN width",
    "stock, fewer KV groups": "`stock` with fewer KV groups",
    "zero_filled": "`zero_filled`: zeros where units are gone, as large as before",
    "compact": "`compact`, as `save_pretrained` writes: all small",
    "compact, FFNs alone": "`compact`, a width for each FFN alone",
}


def loader_table() -> str:
    """What came of trying the loaders, as Markdown: a row a form, a column a loader."""
    versions = {row.loader: row.version.split()[-1] for row in trials() if row.version}
    heads = ("form", *(f"{shown} ({versions[loader]})" for loader, shown in SHOWN.items()))
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for form, shown in FORMS.items():
        lines.append(f"| {' | '.join((shown, *(takers(form, loader) for loader in LOADERS)))} |")
    return "\n".join(lines)


def takers(form: str, loader: str) -> str:
    """Of which families a loader gave the same text, in as few words as that takes."""
    tried = {name: trial_of(name, form, loader) for name in known_architectures()}
    having = [name for name, trial in tried.items() if trial is not None and trial.verdict != "no form"]
    same = [name for name in having if takes(name, form, loader)]
    if len(same) in (0, len(having)):
        return "same text" if same else "no"
    others = [name for name in having if name not in same]
    return f"same, not {', '.join(others)}" if len(others) <= len(same) else f"{', '.join(same)} alone"


def test_loader_table_is_that_of_the_trials() -> None:
    found = re.search(r"<!-- loaders:.*?-->\n(.*?)\n<!-- end of loaders -->", README, re.DOTALL)
    assert found is not None
    assert found.group(1) == loader_table()


def test_family_table_is_that_of_the_registry() -> None:
    found = re.search(r"<!-- families:.*?-->\n(.*?)\n<!-- end of families -->", README, re.DOTALL)
    assert found is not None
    assert found.group(1) == family_table()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:examples|configs|tests)/[\w/.]+\.\w+", README))))
def test_files_named_in_the_readme_exist(path: str) -> None:
    assert (Path(__file__).parents[1] / path).is_file()


def test_python_of_the_readme_compiles_and_names_what_exists() -> None:
    import fasp_lightning

    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(code, "README.md", "exec")
        for names in re.findall(r"from fasp_lightning import (.*)", code):
            assert all(hasattr(fasp_lightning, name.strip()) for name in names.split(","))


if __name__ == "__main__":
    print(family_table(), loader_table(), sep="\n\n")  # noqa: T201
