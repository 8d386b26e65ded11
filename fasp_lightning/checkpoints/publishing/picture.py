"""The picture on a model card: how wide each block is, and how far off its outputs are."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.facts import Facts, PairFacts, finite

PICTURE_FILE = "pruning.png"
COLORS = {"ffn": "#2f6fb0", "value": "#c2662d", "groups": "#c2662d"}
NAMES = {"ffn": "FFN", "value": "value dims", "groups": "KV groups"}


def draw(facts: Facts, file: Path) -> bool:
    """Draw widths and errors of each block.

    Args:
        facts: What is known of the model.
        file: Where to; nothing is written where matplotlib is missing or nothing is known.

    Returns:
        Whether there is a picture.
    """
    if find_spec("matplotlib") is None or not facts.pairs:
        return False
    from matplotlib.figure import Figure

    errors = [pair for pair in facts.pairs if any(map(finite, pair.restored))]
    figure = Figure(figsize=(4.8 * (1 + bool(errors)), 3.4), layout="constrained")
    panels = figure.subplots(1, 1 + bool(errors), squeeze=False)[0]
    _widths(panels[0], facts.pairs)
    if errors:
        _errors(panels[1], errors)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    return True


def _widths(axes: Any, pairs: Sequence[PairFacts]) -> None:
    """Bars side by side, in percent of the original width."""
    size = 0.8 / len(pairs)
    for at, pair in enumerate(pairs):
        places = [block - 0.4 + size * (at + 0.5) for block in range(len(pair.widths))]
        left = [100 * width / pair.original for width in pair.widths]
        axes.bar(places, left, size, color=COLORS[pair.kind], label=f"{NAMES[pair.kind]}, {pair.original:,} originally")
    axes.axhline(100, color="0.6", linewidth=0.8)
    axes.set(title="units left of each block", ylabel="% of the original", ylim=(0, 125))
    _finish(axes)


def _errors(axes: Any, pairs: Sequence[PairFacts]) -> None:
    """Lines over the blocks; blocks whose error is not known are gaps."""
    for pair in pairs:
        for values, style, what in ((pair.unrestored, ":", "nothing restored"), (pair.restored, "-", "restored")):
            told = [value if finite(value) else float("nan") for value in values]
            name = f"{NAMES[pair.kind]}, {what}"
            axes.plot(told, style, marker=".", markersize=4, color=COLORS[pair.kind], label=name)
    axes.set(title="error of its outputs on the calibration text", ylabel="relative error")
    axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.3)
    _finish(axes)


def _finish(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", ncols=1)
