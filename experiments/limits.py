"""How near the machine's limits the code runs: training against the best matrix product, decoding against a stream copy, one thread. No peers.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/limits.py                      # tables, figures and plot: experiments/results/limits.md, .json, .svg
    python experiments/limits.py --only sweep         # one part (sweep, llama135m); the other stays as it was
    python experiments/limits.py --quick              # small shapes, one repetition, into runs/limits-quick: does it run at all?
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from bench import LR, MODEL, REFERENCE, ROOT, SMALL, Shape, begin, inspect, make_data, make_model, our_update, say, table, timed, write

import torch
from rollout import Encoded, score

MODEL_135M = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                  num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True)          # SmolLM2-135M's shape


def matmul_peak(config, dtype: torch.dtype, tokens: int) -> float:
    """Best FLOP/s of a matrix product of this type at the sizes of the model's linear layers."""
    d, wide, rates = config.hidden_size, config.intermediate_size, []
    for m, n in ((d, d), (d, wide), (wide, d), (d, config.vocab_size)):
        a, b = torch.randn(tokens, m).to(dtype), torch.randn(n, m).to(dtype)
        rates.append(2 * tokens * m * n / min(timed(lambda: torch.nn.functional.linear(a, b), 1)["cpu"] for _ in range(5)))
    return max(rates)


def copy_rate() -> float:
    """Bytes/s of a stream copy of 256 MiB, read plus written."""
    a, b = torch.ones(64 << 20), torch.zeros(64 << 20)
    return 2 * 4 * a.numel() / min(timed(lambda: b.copy_(a), 1)["cpu"] for _ in range(5))


def work_of(config, encoded: Encoded, leaves: list, new: int, width: int) -> tuple[float, float, float]:
    """FLOPs of a training pass (3 x forward; attention: visible (query, key) pairs alone; the last layer's attention and MLP at wanted
    tokens alone), FLOPs of decoding one token for every leaf, and the bytes that this reads: weights, the trunk's keys and values once,
    each leaf's own half-written ones."""
    d, kv, layers = config.hidden_size, config.num_key_value_heads / config.num_attention_heads, config.num_hidden_layers
    projections, mlp, head = 2 * d * d * (1 + kv), 3 * d * config.intermediate_size, d * config.vocab_size
    n, starts, states, m = len(encoded.ids), [encoded.spans[step][0] for step, _ in leaves], [s for s, _ in encoded.spans], len(leaves)
    tokens, wanted = n + m * new, (len(states) + m) * new
    after = lambda prefixes: sum(new * s + new * (new + 1) / 2 for s in prefixes)
    pairs = (layers - 1) * (n * (n + 1) / 2 + after(starts)) + after(starts) + after(states)
    training = 6 * ((layers * projections + (layers - 1) * mlp) * tokens + (mlp + head) * wanted + 2 * d * pairs)
    decoding = 2 * m * (layers * (projections + mlp) + head) + 4 * layers * d * sum(s + new / 2 for s in starts)
    read = layers * (projections + mlp) + head + 2 * layers * d * kv * (encoded.spans[-1][0] + m * new / 2)
    return training, decoding, width * read


def shares(model, shape: Shape, k: int, dtype: torch.dtype, peak: float, stream: float, repetitions: int) -> dict:
    """Training (reference known; forward, backward, AdamW) as a share of matrix product, decoding as a share of stream copy and of
    whichever of the two limits is nearer."""
    encoded, leaves = make_data(shape, k, model.config.vocab_size)
    optimizer, stamps = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0), []
    def autocast(work):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return work()
    with torch.no_grad():
        known = autocast(lambda: score(model, [encoded], [leaves]))
    train = timed(lambda: autocast(lambda: our_update(model, [encoded], [leaves], optimizer, known)), repetitions)["cpu"]
    hook = model.model.register_forward_hook(lambda *_: stamps.append(time.process_time()))
    autocast(lambda: inspect(model, encoded, k, shape.action))
    hook.remove()
    token = statistics.median(b - a for a, b in zip(stamps[1:], stamps[2:]))           # without the prefill and the first, cold token
    training, decoding, moved = work_of(model.config, encoded, leaves, shape.action, dtype.itemsize)
    made = {"dtype": str(dtype)[6:], "shape": vars(shape), "k": k, "train_s": train, "token_s": token, "gflops": training / train / 1e9,
            "gbytes": moved / token / 1e9, "peak_gflops": peak / 1e9, "stream_gbytes": stream / 1e9, "train_share": training / train / peak,
            "decode_share": moved / token / stream, "decode_roof": max(moved / stream, decoding / peak) / token}
    say(f"  {made['dtype']}, trunk {shape.trunk}, {shape.turns} steps, K={k}: training {made['train_share']:.0%} of {peak / 1e9:.0f} "
        f"GFLOP/s, decoding {made['decode_share']:.0%} of {stream / 1e9:.1f} GB/s, {made['decode_roof']:.0%} of the nearer limit")
    return made


def part_135m(quick: bool, repetitions: int) -> list[dict]:
    model, stream = make_model(MODEL if quick else MODEL_135M), copy_rate()
    shape = SMALL if quick else Shape(1000, 400, 6, 40)
    return [shares(model, shape, 3, dtype, matmul_peak(model.config, dtype, shape.trunk), stream, repetitions)
            for dtype in (torch.float32, torch.bfloat16)]


def part_sweep(quick: bool, repetitions: int) -> list[dict]:
    """Reference model, float32: trunk length, steps and K, one at a time."""
    model, stream, rows = make_model(), copy_rate(), []
    peak = matmul_peak(model.config, torch.float32, 3000)
    grid = [("trunk", n, replace(REFERENCE, trunk=n, first=n // 3, turns=8), 3) for n in (1000, 2000, 4000, 8000, 16000)]
    grid += [("steps", n, replace(REFERENCE, first=256, turns=n), 3) for n in (2, 4, 8, 16, 32, 64)]
    grid += [("K", n, REFERENCE, n) for n in (1, 2, 4, 8)]
    for name, at, shape, k in grid[::5] if quick else grid:
        times = repetitions if shape.trunk < 8000 else 1                               # these take long enough to be steady
        rows.append({"sweep": name, "at": at} | shares(model, shape, k, torch.float32, peak, stream, times))
    return rows


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
    labels = {"trunk": "trunk, tokens (8 steps, K = 3)", "steps": "steps (trunk 3000, K = 3)", "K": "K (trunk 3000, 14 steps)"}
    for axis, (name, label) in zip(axes, labels.items()):
        mine = [r for r in rows if r["sweep"] == name]
        for key, text in (("train_share", "training / matrix product"), ("decode_share", "decoding / stream copy"),
                          ("decode_roof", "decoding / nearer limit")):
            axis.plot([r["at"] for r in mine], [100 * r[key] for r in mine], marker="o", label=text)
        axis.set(xscale="log", xlabel=label, xticks=[r["at"] for r in mine], xticklabels=[str(r["at"]) for r in mine], ylim=(0, 100))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of the machine's limit")
    axes[0].legend(fontsize=8, loc="upper left")
    figure.savefig(path)


PARTS = {"llama135m": part_135m, "sweep": part_sweep}


def report(data: dict) -> str:
    m, parts = data["machine"], data["parts"]
    lines = [f"{m['cpu']}, one thread; torch {m['torch']}, transformers {m['transformers']}. Medians of CPU seconds, random weights. Training: "
             "forward, backward and AdamW with the reference known, FLOPs computed, against the best of four products of the model's sizes. "
             "Decoding: bytes of weights and caches against a stream copy, and against the nearer of the two limits."]
    for name, title in (("llama135m", "Llama of 135M"), ("sweep", "reference model")):
        lines += table(f"share of the limit, {title} | K | training, GFLOP/s | of matrix product | decoding, ms a token of all rows | GB/s "
                       "| of stream copy | of the nearer limit", [
            [f"{r['dtype']}, trunk {r['shape']['trunk']}, {r['shape']['turns']} steps", r["k"], f"{r['gflops']:.1f}",
             f"{r['train_share']:.0%}", f"{1e3 * r['token_s']:.1f}", f"{r['gbytes']:.2f}", f"{r['decode_share']:.0%}",
             f"{r['decode_roof']:.0%}"] for r in parts.get(name, [])])
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, default=list(PARTS), help=f"parts to run: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="small shapes, one repetition")
    parser.add_argument("--repetitions", type=int, default=3, help="of every timing (default: 3)")
    o = parser.parse_args()
    if o.repetitions < 1:
        parser.error(f"--repetitions is {o.repetitions}; give at least 1")
    torch.set_num_threads(1)
    out = ROOT / ("runs/limits-quick" if o.quick else "experiments/results")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "limits.json"
    data = begin(file, o.only)
    for part in o.only:
        say(part)
        data["parts"][part] = PARTS[part](o.quick, 1 if o.quick else o.repetitions)
        write(file, json.dumps(data, indent=1) + "\n")                                # part by part: nothing measured is lost
    if "sweep" in data["parts"]:
        plot(data["parts"]["sweep"], out / "limits.svg")
    write(out / "limits.md", report(data))
    print("\n" + report(data))


if __name__ == "__main__":
    main()
