"""Configs: those that are shipped, found by their bare name, and the user's own files."""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]

import fasp_lightning
from fasp_lightning.errors import FaspError, one_line

SUFFIXES = (".yaml", ".yml")


def shipped_folder() -> Path:
    """Where the shipped configs are: inside the package in a wheel, beside it in a clone."""
    package = Path(fasp_lightning.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> list[str]:
    """Bare names of the shipped configs."""
    return sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def find_config(name: str) -> Path:
    """A config by path, or by the bare name of a shipped one, checked to be a YAML mapping.

    Raises:
        FaspError: If there is none, or it is no YAML mapping; the message names the file and the line.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        shipped = shipped_folder() / f"{name}.yaml"
        if path.suffix in SUFFIXES or len(path.parts) != 1 or not shipped.is_file():
            known = ", ".join(shipped_configs())
            raise FaspError(f"config must be a YAML file or one of the shipped {known}, got {name!r}")
        path = shipped
    _check(path)
    return path


def _check(path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise FaspError(f"config {str(path)!r} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise FaspError(f"config {str(path)!r} is not valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise FaspError(f"config {str(path)!r} must be a YAML mapping of options, got {type(content).__name__}")
