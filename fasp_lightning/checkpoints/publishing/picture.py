"""The picture on a model card: how wide each block is, and how far off its outputs are."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.facts import Facts, PairFacts, finite

PICTURE_FILE = "pruning.png"
COLORS = {"ffn": "#2f6fb0", "value": "#c2662d", "groups": "#c2662d", "experts": "#3f8f5a", "whole_experts": "#3f8f5a"}
NAMES = {"ffn": "FFN", "value": "value dims", "groups": "KV groups"}
NAMES |= {"experts": "experts' hidden units", "whole_experts": "experts"}


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
    panels = 1 + bool(errors)
    figure = Figure(figsize=(4.8 * panels, 3.4))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.subplots_adjust(left=0.14 / panels, right=1 - 0.03 / panels, bottom=0.15, top=0.9, wspace=0.2)
    _widths(axes[0], facts.pairs)
    if errors:
        _errors(axes[1], errors)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    return True


def _widths(axes: Any, pairs: Sequence[PairFacts]) -> None:
    """A stair over the blocks, in percent of the original width."""
    for pair in pairs:
        left = [100 * width / pair.original for width in pair.widths]
        edges = [block - 0.5 for block in range(len(left) + 1)]
        color, name = COLORS[pair.kind], f"{NAMES[pair.kind]}, {pair.original:,} originally"
        if len(pairs) == 1:
            axes.stairs(left, edges, fill=True, alpha=0.25, color=color)
        axes.stairs(left, edges, baseline=None, color=color, linewidth=1.6, label=name)
    axes.axhline(100, color="0.6", linewidth=0.8)
    axes.set(title="units left of each block", ylabel="% of the original", ylim=(0, 130))
    _finish(axes)


def _errors(axes: Any, pairs: Sequence[PairFacts]) -> None:
    """Lines over the blocks; blocks whose error is not known are gaps."""
    for pair in pairs:
        for values, style, what in ((pair.unrestored, ":", "nothing restored"), (pair.restored, "-", "restored")):
            told = [value if finite(value) else float("nan") for value in values]
            name = f"{NAMES[pair.kind]}, {what}"
            axes.plot(told, style, marker=".", markersize=4, color=COLORS[pair.kind], label=name)
    axes.set(title="error of its outputs on the calibration text", ylabel="relative error")
    axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.4)
    _finish(axes, len(pairs))


def _finish(axes: Any, columns: int = 1) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", ncols=columns)
