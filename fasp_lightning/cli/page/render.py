"""Chapters → one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

import fasp_lightning
from fasp_lightning.cli.page.gather import Found
from fasp_lightning.cli.page.model_sections import model_chapter
from fasp_lightning.cli.page.parts import Chapter
from fasp_lightning.cli.page.run_sections import run_chapter, sweep_chapter

TEMPLATE = "page.html"


def chapters(found: Found) -> list[Chapter]:
    """What is told of a folder, the whole before its parts."""
    told = [] if found.run is None else [run_chapter(found.run)]
    told += [sweep_chapter(found.name, found.models)] if found.sweep else []
    return told + [model_chapter(model) for model in found.models]


def render(told: Sequence[Chapter]) -> str:
    """The page; whatever text it is given, it shows as text."""
    environment = Environment(
        loader=PackageLoader("fasp_lightning.cli.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(chapters=told, version=fasp_lightning.__version__) + "\n"
