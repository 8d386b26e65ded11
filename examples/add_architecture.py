"""Prune a family that is not in the table: Helium, with one row and no other code.

    python examples/add_architecture.py

The model here is a tiny random one; a real one is pruned in the same way.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fasp_lightning import ArchitectureSpec, CoupledPair, FASPPruner, PruningConfig, register_architecture, spec_for

config = AutoConfig.for_model(
    "helium",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
)
model = AutoModelForCausalLM.from_config(config)

try:
    spec_for(model)
except ValueError as error:
    print(error, "\n")

register_architecture(
    "helium",
    ArchitectureSpec(
        layers="model.layers",
        pairs=(
            CoupledPair("self_attn.o_proj", producers=("self_attn.v_proj",), kind="value"),
            CoupledPair("mlp.down_proj", producers=("mlp.gate_proj", "mlp.up_proj"), kind="ffn"),
        ),
    ),
)

batches = [torch.randint(0, 256, (4, 128)) for _ in range(4)]
report = FASPPruner(PruningConfig(sparsity=0.2, attention="value_dims")).prune(model, batches)
for pair in report.pairs[:2]:
    print(
        f"{pair.layer}: {pair.width_before} -> {pair.width_after} units, "
        f"error {pair.error_before:.3f} -> {pair.error_after:.3f}"
    )
print(f"{report.sparsity:.1%} of the blocks' linear parameters removed")
model.generate(batches[0][:1, :4], max_new_tokens=4)
