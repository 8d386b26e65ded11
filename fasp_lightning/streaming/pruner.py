"""The pruner of the package: the engine, on models in memory and on those that are streamed from their folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fasp_lightning.pruning.progress import Progress
from fasp_lightning.pruning.pruner import Pruner
from fasp_lightning.pruning.report import PruningReport
from fasp_lightning.streaming.folder import FolderPruning


class FASPPruner(Pruner):
    """Prunes a causal LM in place, in one pass over its blocks (FASP: Fast and Accurate Structured Pruning).

    Args:
        config: The settings; the defaults prune 20 %.

    Example::

        from fasp_lightning import FASPPruner, PruningConfig

        report = FASPPruner(PruningConfig(sparsity=0.2)).prune(model, batches)
        print(f"{report.sparsity:.3f} of the blocks, {report.sparsity_total:.3f} of all parameters are gone")
        print(f"{report.pairs[0].layer}: error {report.pairs[0].error_before:.3f} -> {report.pairs[0].error_after:.3f}")
    """

    def prune_folder(
        self,
        source: str | Path,
        output: str | Path,
        batches: Iterable[Any],
        tokenizer: Any = None,
        *,
        form: str = "auto",
        dtype: str | torch.dtype = "auto",
        save_dtype: str | torch.dtype = "auto",
        verify: bool = True,
        overwrite: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        progress: Progress | None = None,
    ) -> PruningReport:
        """Prune a model that may be larger than the memory, from its folder into another one.

        A block at a time is read from the safetensors files, pruned, and written; the outcome is bit for bit that of
        :meth:`prune` and :func:`~fasp_lightning.save_pruned`. Finished blocks stand in ``.NAME.stream`` beside the
        output until all are done: a call that was stopped, or killed, goes on where it was when it is made again.

        Args:
            source: A folder, or a hub id, of a model with safetensors files.
            output: Folder to write.
            batches: As for :meth:`prune`.
            tokenizer: Saved along if given.
            form: As for :func:`~fasp_lightning.save_pruned`.
            dtype: Dtype to compute in, as for :func:`~fasp_lightning.load_model`.
            save_dtype: Dtype of the stored weights, as ``dtype`` of :func:`~fasp_lightning.save_pruned`.
            verify: Stream what was written, and compare the logits.
            overwrite: Replace a folder that holds a pruned model, and what a pruning with other settings has begun.
            revision: Branch, tag or commit on the hub.
            trust_remote_code: Let the repository's own code run.
            attn_implementation: ``"eager"``, ``"sdpa"``, …; ``None`` for the default of transformers.
            progress: As for :meth:`prune`.

        Returns:
            As :meth:`prune`.

        Raises:
            FaspError: As :meth:`prune`; if the settings ask for what needs the whole model, which is own text and
                learned columns; if the weights cannot be read in parts.
            FaspFileExistsError: If the output is taken, or a pruning with other settings was begun there.
            FaspOSError: If a file is damaged, or the disk has too little room.
            RuntimeError: If what was written gives other logits.

        Example::

            from fasp_lightning import FASPPruner, PruningConfig, load_pruned

            pruner = FASPPruner(PruningConfig(sparsity=0.2, own_text=None))
            report = pruner.prune_folder(name, folder, batches)  # again with the same arguments if it is stopped
            print(f"{report.sparsity:.3f} of the blocks are gone", load_pruned(folder).dtype)
        """
        job = FolderPruning.open(
            self.config,
            source,
            output,
            dtype=dtype,
            save_dtype=save_dtype,
            form=form,
            revision=revision,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        with job.begun(batches):
            report = job.prune(progress)
            job.save(tokenizer, verify=verify)
        return report
