"""One pruning of a folder: opened, begun or taken up, pruned, and saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasp_lightning.checkpoints.devices import choose_device, choose_dtype, choose_stored
from fasp_lightning.checkpoints.forms import choose_form, require_form
from fasp_lightning.checkpoints.loading import checkpoint_dtype, load_config
from fasp_lightning.checkpoints.output import check_output
from fasp_lightning.checkpoints.saving import SavedModel, save_held
from fasp_lightning.checkpoints.source import resolve_source
from fasp_lightning.checkpoints.streaming.model import StreamedModel
from fasp_lightning.checkpoints.streaming.opening import open_streamed
from fasp_lightning.checkpoints.streaming.writing import Shards
from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.blocks.measuring import measure_by_block
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.config import OwnTextConfig, PruningConfig
from fasp_lightning.pruning.own_text.writing import calibration_starts
from fasp_lightning.pruning.perplexity import PerplexityResult
from fasp_lightning.pruning.progress import Progress
from fasp_lightning.pruning.pruner import pruner_on
from fasp_lightning.pruning.report import PruningReport
from fasp_lightning.staging import claimed
from fasp_lightning.streaming.journal import Journal
from fasp_lightning.streaming.weights import StreamedWeights
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.text.batches import each_batch, read_batch

PACKAGES = ("fasp_lightning", "torch", "transformers")
"""Another version of one of them may round otherwise."""


@dataclass
class FolderPruning:
    """A pruning of a folder into another one.

    Attributes:
        config: The settings, with the device.
        streamed: The model.
        output: Folder to write.
        form: Form to save in.
        stored: Dtype to save in.
        overwrite: Whether what stands in the way may be removed.
        batches: The calibration set, once it is begun.
        weights: The weights, once it is begun.
    """

    config: PruningConfig
    streamed: StreamedModel
    output: Path
    form: str
    stored: torch.dtype
    overwrite: bool
    batches: list[Any] = field(default_factory=list)
    weights: StreamedWeights | None = None

    @classmethod
    def open(
        cls,
        config: PruningConfig,
        source: str | Path,
        output: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        save_dtype: str | torch.dtype = "auto",
        form: str = "auto",
        overwrite: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
    ) -> FolderPruning:
        """Refuse what cannot be done, before anything is read or written.

        Args:
            config: The settings.
            source: As for :meth:`~fasp_lightning.FASPPruner.prune_folder`, as the others.
            output: As there.
            dtype: As there.
            save_dtype: As there.
            form: As there.
            overwrite: As there.
            revision: As there.
            trust_remote_code: As there.
            attn_implementation: As there.
        """
        require_streamable(config)
        require_form(form)
        check_output(output, overwrite)
        found = resolve_source(source)
        if found.local and Path(found.location).resolve() == Path(output).resolve():
            raise FaspError(f"output must not be the folder of the model that is pruned, got {str(output)!r}")
        device = choose_device(config.device or "auto")
        model_config = load_config(source, revision=revision, trust_remote_code=trust_remote_code)
        kept = checkpoint_dtype(found, model_config)
        computed = choose_dtype(dtype, kept, device)
        streamed = open_streamed(
            found,
            model_config,
            computed,
            device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        budget = decide_budget(streamed.model, config)
        form, stored = choose_form(form, spec_for(model_config), budget.cuts), choose_stored(save_dtype, kept, computed)
        settings = replace(config, device=str(device))
        return cls(settings, streamed, Path(output), form, stored, overwrite)

    @property
    def folder(self) -> Path:
        """Where what is finished stands until all is."""
        return self.output.absolute().with_name(f".{self.output.absolute().name}.stream")

    @contextmanager
    def begun(self, batches: Iterable[Any]) -> Iterator[None]:
        """Begin, or go on where an earlier run was stopped; what is done stays if this one is stopped, too.

        Args:
            batches: The calibration set.
        """
        self.batches = list(each_batch(batches))
        with claimed(self.output), self.streamed:
            journal = Journal(self.folder, self._made_with(self.batches), self.overwrite)
            self.weights = StreamedWeights(self.streamed, journal)
            try:
                yield
            except FaspError:
                if not journal.done(0):  # a refusal before the first block leaves nothing to go on with
                    journal.remove()
                raise
            journal.remove()

    def perplexity(self, name: str, batches: Iterable[Any]) -> PerplexityResult:
        """Measure the model as it is now, or take what an earlier run that was stopped has measured.

        Args:
            name: Of the measurement, another one for each.
            batches: As for :func:`~fasp_lightning.measure_perplexity`.

        Raises:
            FaspError: As there.
        """
        model, weights = self.streamed.model, self._begun()
        session = Session.start(self.config, resolve_pruned(model), weights=weights)
        found: dict[str, Any] = weights.journal.once(name, lambda: measure_by_block(session, model, batches).to_dict())
        return PerplexityResult(**found)

    def text_at_hand(self, own: OwnTextConfig) -> bool:
        """Whether own text is, or was where this pruning began, in its cache.

        Args:
            own: How much, and how.
        """
        weights = self._begun()
        starts = None if own.share == 1 else calibration_starts(self.batches)
        return weights.journal.once("own-text", lambda: weights.text_at_hand(own, starts) is not None)

    def prune(self, progress: Progress | None = None) -> PruningReport:
        """Prune block after block.

        Args:
            progress: As for :meth:`~fasp_lightning.FASPPruner.prune`.
        """
        report = pruner_on(self._begun(), self.config).prune(self.streamed.model, self.batches, progress)
        self.streamed.disk.settle()
        return report

    def save(self, tokenizer: Any = None, verify: bool = True, **hub: Any) -> SavedModel:
        """Put finished shards together to a saved model; see :func:`~fasp_lightning.save_pruned`."""
        options = {"push_to_hub": None, "private": None, **hub}

        def hold(_: Any, shapes: Any) -> Shards:
            return Shards(self.streamed, shapes)

        return save_held(
            hold,
            self.streamed.model,
            self.output,
            tokenizer,
            self.form,
            verify,
            self.overwrite,
            self.stored,
            **options,
        )

    def _begun(self) -> StreamedWeights:
        if self.weights is None:
            raise RuntimeError("a pruning must have begun before it prunes or measures")
        return self.weights

    def _made_with(self, batches: list[Any]) -> dict[str, Any]:
        """All that decides on the outcome, as plain data."""
        settings = {name: value for name, value in self.config.to_dict().items() if name != "offload"}
        return {
            "settings": settings | {"dtype": str(self.streamed.model.dtype)},
            "model": self.streamed.fingerprint(),
            "calibration": _digest(batches),
            "versions": {name: str(import_module(name).__version__) for name in PACKAGES},
        }


def require_streamable(config: PruningConfig) -> None:
    """Refuse settings that need the whole model at once.

    Raises:
        FaspError: If columns are learned.
    """
    if config.score == "learned":
        raise FaspError(
            "score must be 'wanda', 'fisher' or 'magnitude' where the model is streamed, got 'learned', which trains "
            "with the whole model"
        )


def _digest(batches: list[Any]) -> str:
    """Hash of all that a calibration set says."""
    digest = hashlib.sha256()
    for given in batches:
        batch = read_batch(given)
        tensors = {**batch.inputs, "labels": batch.given_labels}
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.cpu().numpy().tobytes())
        digest.update(f"{batch.weight} {batch.source}".encode())
    return digest.hexdigest()[:32]
