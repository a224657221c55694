"""How near our code comes to the machine's limits, on one thread: training against the best matrix
product, decoding against a stream copy. No peers.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/limits.py                 # into experiments/results/limits.md, .json, .svg
    python experiments/limits.py --only sweep    # one part; the other stays as it was
    python experiments/limits.py --quick         # small shapes, a few: do they run?
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

# bench.py comes before torch: it sets the number of threads.
import bench
import torch
from bench import Lengths, make_trajectory, random_leaves, timed

from rollout import practice, score
from system.files import write_text

# SmolLM2-135M's shape.
MODEL_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def matmul_peak(config, dtype: torch.dtype, tokens: int) -> float:
    """Best FLOP/s of a matrix product at the sizes of the model's linear layers."""
    hidden, inner, rates = config.hidden_size, config.intermediate_size, []
    sizes = ((hidden, hidden), (hidden, inner), (inner, hidden), (hidden, config.vocab_size))
    for width, out in sizes:
        inputs, weights = torch.randn(tokens, width).to(dtype), torch.randn(out, width).to(dtype)
        product = partial(torch.nn.functional.linear, inputs, weights)
        rates.append(2 * tokens * width * out / min(timed(product, 5)["all_cpu"]))
    return max(rates)


def copy_rate() -> float:
    """Bytes/s of a stream copy of 256 MiB, read plus written."""
    source, target = torch.ones(64 << 20), torch.zeros(64 << 20)
    return 2 * source.nbytes / min(timed(partial(target.copy_, source), 5)["all_cpu"])


def work_of(config, encoded, steps: list[int], new: int) -> dict[str, float]:
    """FLOPs and numbers read, where each of `steps` has a leaf of `new` tokens.

    train: FLOPs of forward and backward. decode: FLOPs of one token of every leaf. read: weights,
    the trunk's keys and values once, each leaf's own half-written ones.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    share = config.num_key_value_heads / config.num_attention_heads
    matrices = 2 * hidden * hidden * (1 + share) + 3 * hidden * config.intermediate_size
    head = hidden * config.vocab_size
    trunk, leaves = len(encoded.ids), len(steps)
    # (query, key) pairs that attention needs.
    starts = [encoded.spans[step][0] for step in steps]
    pairs = trunk * (trunk + 1) / 2 + sum(new * start + new * (new + 1) / 2 for start in starts)
    scored = (len(encoded.spans) + leaves) * new
    forward = 2 * (layers * matrices * (trunk + leaves * new) + head * scored)
    forward += 4 * layers * hidden * pairs
    seen = sum(start + new / 2 for start in starts)
    decode = 2 * leaves * (layers * matrices + head) + 4 * layers * hidden * seen
    cached = 2 * layers * hidden * share * (encoded.spans[-1][0] + leaves * new / 2)
    return {"train": 3 * forward, "decode": decode, "read": layers * matrices + head + cached}


def measure(model, lengths: Lengths, K: int, dtype, peak: float, stream: float) -> dict:
    """Shares of matrix product and of stream copy, and of whichever limit of decoding is nearer.

    Training: forward, backward and AdamW, with the reference known.
    """
    vocabulary, stamps = model.config.vocab_size, []
    item, leaves = make_trajectory(lengths, vocabulary), random_leaves(lengths, K, vocabulary)
    optimizer = bench.make_optimizer(model)

    def cast(action, *inputs):
        # Every pass casts the weights anew, as in training.
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return action(*inputs)

    with torch.no_grad():
        known = cast(score, model, [item], leaves)
    update = partial(cast, bench.our_update, model, [item], leaves, optimizer, known)
    train = timed(update, 3 if lengths.trunk < 8000 else 1)["cpu"]
    hook = model.model.register_forward_hook(lambda *_: stamps.append(time.process_time()))
    cast(practice, model, [item], K, 1.0, lengths.action, {bench.NEVER})
    hook.remove()
    # Without the prefill and the first, cold token.
    token = statistics.median(end - start for start, end in zip(stamps[1:], stamps[2:]))
    work = work_of(model.config, item, [step for step, _ in leaves[0]], lengths.action)
    moved = work["read"] * dtype.itemsize
    bench.say(f"  {dtype}, {lengths}, K={K}: training at {work['train'] / train / peak:.0%}")
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "lengths": asdict(lengths),
        "K": K,
        "gflops": work["train"] / train / 1e9,
        "train_share": work["train"] / train / peak,
        "token_ms": 1e3 * token,
        "decode_roof": max(moved / stream, work["decode"] / peak) / token,
    }


def part_135m(quick: bool) -> list[dict]:
    model, stream = bench.make_model(bench.MODEL if quick else MODEL_135M), copy_rate()
    lengths = bench.SMALL if quick else Lengths(trunk=1000, first=400, steps=6)
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        peak = matmul_peak(model.config, dtype, lengths.trunk)
        lines.append(measure(model, lengths, 3, dtype, peak, stream))
    return lines


def part_sweep(quick: bool) -> list[dict]:
    """The reference model in float32: trunk length, steps and K, one at a time."""
    model, stream = bench.make_model(), copy_rate()
    peak = matmul_peak(model.config, torch.float32, 3000)
    grid = []
    for trunk in (1000, 2000, 4000, 8000, 16000):
        grid.append(("trunk", trunk, Lengths(trunk, trunk // 3, steps=8), 3))
    for steps in (2, 4, 8, 16, 32, 64):
        grid.append(("steps", steps, Lengths(first=256, steps=steps), 3))
    for K in (1, 2, 4, 8):
        grid.append(("K", K, Lengths(), K))
    lines = []
    for name, at, lengths, K in grid[::5] if quick else grid:
        line = measure(model, lengths, K, torch.float32, peak, stream)
        lines.append({"sweep": name, "at": at} | line)
    return lines


PARTS = {"llama135m": part_135m, "sweep": part_sweep}


def plot(lines: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
    labels = (
        "trunk, tokens (8 steps, K = 3)",
        "steps (trunk 3000, K = 3)",
        "K (trunk 3000, 14 steps)",
    )
    curves = {"train_share": "training / matrix product", "decode_roof": "decoding / nearer limit"}
    for axis, name, label in zip(axes, ("trunk", "steps", "K"), labels):
        shown = [line for line in lines if line["sweep"] == name]
        at = [line["at"] for line in shown]
        for key, text in curves.items():
            axis.plot(at, [100 * line[key] for line in shown], marker="o", label=text)
        axis.set(xscale="log", xlabel=label, xticks=at, xticklabels=map(str, at), ylim=(0, 100))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of the machine's limit")
    axes[0].legend(fontsize=8, loc="upper left")
    figure.savefig(path)


INTRODUCTION = """\
{cpu}, one thread; torch {torch}, transformers {transformers}. Medians of CPU seconds, random
weights. Training: forward, backward and AdamW with the reference known; FLOPs are computed.
Decoding: the nearer limit is a stream copy of weights and caches, or their matrix products."""


def report(data: dict) -> str:
    lines = [INTRODUCTION.format(**data["machine"])]
    for name, title in (("llama135m", "Llama of 135M"), ("sweep", "reference model")):
        rows = []
        for line in data["parts"].get(name, []):
            lengths = line["lengths"]
            shape = f"{line['dtype']}, trunk {lengths['trunk']}, {lengths['steps']} steps"
            cells = [shape, line["K"], f"{line['gflops']:.1f}", f"{line['train_share']:.0%}"]
            rows.append([*cells, f"{line['token_ms']:.1f}", f"{line['decode_roof']:.0%}"])
        head = f"share of the limit, {title} | K | training, GFLOP/s | of matrix product"
        head += " | decoding, ms a token of all rows | of the nearer limit"
        lines += bench.table(head, rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    parser.add_argument("--quick", action="store_true", help="small shapes, a few of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = bench.ROOT / ("runs/limits-quick" if options.quick else "experiments/results")
    data = bench.begin(out / "limits.json", options.only)
    for part in options.only:
        bench.say(part)
        data["parts"][part] = PARTS[part](options.quick)
        # Part by part: nothing measured is lost.
        write_text(out / "limits.json", json.dumps(data, indent=1) + "\n")
    if "sweep" in data["parts"]:
        plot(data["parts"]["sweep"], out / "limits.svg")
    write_text(out / "limits.md", report(data))
    print("\n" + report(data))


if __name__ == "__main__":
    main()
