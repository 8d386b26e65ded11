"""The row of a model's family: shipped, or inferred and proved before it is used."""

from __future__ import annotations

from typing import Any

from fasp_lightning.checkpoints.loading import model_shapes
from fasp_lightning.checkpoints.source import ModelSource
from fasp_lightning.cli.console import note
from fasp_lightning.proving.inferring import infer_proved
from fasp_lightning.proving.proof import prove
from fasp_lightning.structure.configs.text_part import text_family, whole_class
from fasp_lightning.structure.inferring.code import as_code
from fasp_lightning.structure.registry import has_row, register_architecture, spec_for
from fasp_lightning.structure.spec import ArchitectureSpec


def row_of(source: ModelSource, config: Any, trust_remote_code: bool = False) -> ArchitectureSpec:
    """The row of a config's family; one that is unknown is inferred, proved, said, and registered for this process.

    Args:
        source: The model's source.
        config: Its config.
        trust_remote_code: Let the repository's own code run.

    Raises:
        FaspError: If no row can be inferred, or none that holds; the message says what was found.
    """
    if has_row(config):
        if whole_class(config) is not None:  # whose forward around the decoder is not that of the row's family
            prove(config)
    else:
        found = infer_proved(model_shapes(source, config, trust_remote_code))
        for dropped in found.dropped:
            note(dropped)
        name, seconds = text_family(config), found.proof.seconds
        note(f"{name} has no row; one was found and proved in {seconds:.1f} s: {as_code(name, found.spec)}")
        register_architecture(name, found.spec)
    return spec_for(config)
