"""The wheel is complete: it works away from the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fasp_lightning import __version__

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command; its failure is the test's, with all it wrote."""
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source tree without network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("fasp_lightning-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the source tree with the installed wheel, to be put on ``PYTHONPATH``."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder)
    run(*pip, wheel, cwd=folder)
    return folder


def test_wheel_holds_every_shipped_file_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fasp_lightning").rglob("*.py")}
    configs = {f"fasp_lightning/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "configs").rglob("*.yaml")}
    pages = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fasp_lightning/cli/page/templates").iterdir()}
    data = {"fasp_lightning/py.typed", "fasp_lightning/checkpoints/loaders.json"}
    assert sources | configs | pages | data == {
        name for name in names if ".dist-info/" not in name and not name.endswith(".md")
    }


def test_wheel_carries_its_version_licence_and_console_script(wheel):
    assert wheel.name == f"fasp_lightning-{__version__}-py3-none-any.whl"
    archive = zipfile.ZipFile(wheel)
    texts = {name.split(".dist-info/")[1]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "Apache License" in archive.read(texts["licenses/LICENSE"]).decode()
    assert "fasp = fasp_lightning.cli.main:main" in archive.read(texts["entry_points.txt"]).decode()


def test_installed_wheel_is_imported_from_its_own_folder(installed, tmp_path):
    code = "import fasp_lightning, sys; fasp_lightning.spec_for; sys.stdout.write(fasp_lightning.__file__)"
    file = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(file).is_relative_to(installed)


def test_installed_wheel_ships_the_quickstart_config(installed, tmp_path):
    code = (
        "from importlib.resources import files; import sys;"
        "sys.stdout.write(files('fasp_lightning').joinpath('configs', 'quickstart.yaml').read_text())"
    )
    text = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert text == (ROOT / "configs" / "quickstart.yaml").read_text()


def test_installed_wheel_prunes_with_a_config_by_its_bare_name(installed, tmp_path, tiny_folder):
    sizes = ("--calibration.seq_len", "16", "--calibration.sequences", "8", "--evaluation", "[]")
    command = ("prune", "-c", "quickstart", "--model.name_or_path", tiny_folder("llama"), *sizes)
    run(sys.executable, "-m", "fasp_lightning", *command, cwd=tmp_path, PYTHONPATH=str(installed))
    assert (tmp_path / "outputs" / "quickstart" / "model.safetensors").is_file()


def test_installed_wheel_has_a_command_line(installed, tmp_path):
    text = run(sys.executable, "-m", "fasp_lightning", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert all(command in text for command in ("prune", "plan", "evaluate"))
