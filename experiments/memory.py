"""What fits where: bytes per device of an update and of generation, by the arithmetic that stepagent.py itself decides by
(model.training_bytes), with the parameters of each model counted on the meta device. -> experiments/results/memory.md

    python experiments/memory.py
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import LoRA, training_bytes  # noqa: E402
from parallel import write_text  # noqa: E402
from rollout import kv_bytes  # noqa: E402
from stepagent import Config  # noqa: E402

# The paper's backbones, from their published config.json
MODELS = {
    "Mistral-7B-Instruct-v0.1": MistralConfig(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                              num_attention_heads=32, num_key_value_heads=8, sliding_window=4096),
    "Meta-Llama-3-8B-Instruct": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                            num_attention_heads=32, num_key_value_heads=8),
    "Mistral-Nemo-Instruct-2407": MistralConfig(vocab_size=131072, hidden_size=5120, intermediate_size=14336, num_hidden_layers=40,
                                                num_attention_heads=32, num_key_value_heads=8, head_dim=128, sliding_window=None)}
MACHINES = {"1 x 24 GB": (1, 24e9), "1 x 80 GB": (1, 80e9), "8 x 80 GB": (8, 80e9)}
WAYS = {"all weights": {}, "--shard true": {"shard": "true"}, "--lora-rank 16": {"lora_rank": 16},
        "--lora-rank 16 --micro-tokens 2048": {"lora_rank": 16, "micro_tokens": 2048}}
FREE = 0.92                                          # of the card: the rest is the CUDA context, fragments, collectives' buffers


def on_meta(config, rank: int = 0):
    """A model without storage, with adapters that have none either."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if rank:
            model.requires_grad_(False)
            for module in model.model.layers.modules():
                if type(module) is torch.nn.Linear:
                    module.__class__ = LoRA
                    module.A = torch.nn.Parameter(torch.empty(rank, module.in_features))
                    module.B = torch.nn.Parameter(torch.empty(module.out_features, rank))
    return model


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = ["GB (1e9 bytes) per device: update / generation, and how many thousand tokens of keys and values then fit beside the weights.",
             "Update: weights, gradients, moments, bf16 copies or gathered layers, activations of --micro-tokens (8,192), a chunk of logits; bf16",
             f"compute, activations recomputed. Bold: fits into {FREE:.0%} of the card. By arithmetic: nothing here was run on a GPU.", "",
             "| model | flags | " + " | ".join(MACHINES) + " |", "|---" * (2 + len(MACHINES)) + "|"]
    for name, config in MODELS.items():
        for flags, options in WAYS.items():
            model, cells = on_meta(config, options.get("lora_rank", 0)), []
            for devices, card in MACHINES.values():
                need = training_bytes(model, Config(dtype="bfloat16", checkpointing=True, **({"micro_tokens": 8192} | options)),
                                      devices if "shard" in options else 1)
                left = card * FREE - need["generate"]
                cell = f"{need['update'] / 1e9:.0f} / {need['generate'] / 1e9:.0f}, {max(0, left) / kv_bytes(model, 2) / 1e3:,.0f}k"
                cells.append("-" if "shard" in options and devices == 1 else
                             f"**{cell}**" if need["update"] <= card * FREE and left > 0.05 * card else cell)
            learnt = sum(x.numel() for x in model.parameters() if x.requires_grad)
            lines.append(f"| {name}, {sum(x.numel() for x in model.parameters()) / 1e9:.2f}e9, {learnt / 1e6:,.0f}e6 learnt | {flags} | " +
                         " | ".join(cells) + " |")
    target = ROOT / "experiments/results/memory.md"
    write_text(target, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
