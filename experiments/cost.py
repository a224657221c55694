"""What one iteration of StepAgent costs on H100s, from model shape and benchmark statistics: python experiments/cost.py [--k 3]

An estimate on paper: nothing here was timed on a GPU. An iteration = inspection (K practice actions per expert step), scoring
(reference log-probs and features) and reflection (implicit: one DPO epoch; inverse: two PPO passes). Evaluation, SFT, D (a small
MLP) and saving are left out. "Shared" is rollout.py: one sequence per trajectory, trunk and leaves. "Separate" is a generate loop and
a DPO or PPO trainer: one sequence per (state, action), the expert's again in each of its K pairs; padding and logits at unscored
positions are forgiven. T: tokens computed; pairs: (query, key) pairs that causal attention within the sliding window needs; S: scored
positions; n steps, s_i: tokens of state i, A: of an action. Practice actions are as long as the expert's and differ from
the first token on: the dearest case, as what they have in common is not computed again where shared, and always where separate.

FLOPs       forward = 2 W T + 4 L H d_head pairs + 2 V d S       W weights in the layers' matrices, L layers, H heads, V vocabulary
            training = 4 x forward: forward, backward 2, recomputation 1 (checkpointing): 8 a weight and token, 6 without recomputation
            (an upper bound: torch leaves out each layer's last matrix when it recomputes, 7.5 for these models; and the last
            layer, here counted in full, computes only scored positions after its keys and values: up to 1/L less)
            prefill  T = s_n + A - 1 shared; K sum_i s_i separate (decoding: nK (A - 1) tokens either way)
            scoring  T = s_n + A + nKA shared; separate: 2 K sum_i (s_i + A) implicit, (1 + K) sum_i (s_i + A) inverse
            reflection T = as scoring; separate and inverse: K sum_i (s_i + A). Inverse: twice.
KV          4 L H_kv d_head bytes x (T of prefill + nK (A - 1)), for one inspection batch: whole trajectories, at most 256 leaves
Time        compute: FLOPs / (40% of 989 TFLOP/s). A decode step: the larger of compute and bytes / (60% of 3.35 TB/s), the bytes
            being the weights (2 each, without the input embedding) and the batch's keys and values, the trunk's once or per leaf.
            An update: the sequences of the busiest GPU, then AdamW (28 bytes a weight, sharded) and the links (8 bytes a weight at
            300 GB/s, not overlapped: fp32 all-reduce 2 x 4, or FSDP's two bf16 gathers and fp32 scatter). It has 16 pairs (paper):
            16 sequences, for DPO 32, where separate; shared, whole trajectories until 16 are reached: often one, on one GPU.
            Launches, the environment, stragglers and the spread of lengths (quadratic for "separate") are left out.
H100-hours  GPUs x wall time, idle GPUs included
Memory      the larger of training = 16 bytes a weight (fp32 weight, gradient, two moments) + bf16 copy + activations of a micro-batch of
            8192 tokens, 4 L d + 12 I + 26 d + 8 H d_head + 4 H_kv d_head bytes each (layer inputs; inside of one layer, I intermediate)
            + 24 bytes x 2^21, at least 256 V (a chunk's logits and fp32 copies); and inspection = 4 bytes a weight + bf16 copy + KV (trunk once).
            Replicated: --shard false. Sharded is FSDP: 16 and 4 divided by the GPUs; the bf16 copy is two layers, embedding and
            head in training, whole in inspection. CUDA context, NCCL and fragmentation are left out.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PEAK, MFU = 989e12, 0.40             # FLOP/s of an H100 SXM, bfloat16 dense (data sheet); share assumed, recomputation counts as work
HBM, HBM_SHARE = 3.35e12, 0.60       # bytes/s of its memory (data sheet); share assumed, for decoding and the optimizer
LINK = 300e9                         # bytes/s of a GPU in a collective, assumed: NVLink in a node of 8, 8 x 400 Gb/s between nodes
CARD = 80e9                          # bytes
LEAVES, MICRO, PAIRS, PPO_PASSES = 256, 8192, 16, 2                  # stepagent.py's defaults
LOGIT_BYTES = 24                     # bytes a logit at the peak, its entropy differentiable
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Shape:
    """A Llama-like model with an untied head; window: how many keys a query sees at most, 0 = all."""
    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    window: int = 0

    @property
    def layer(self) -> int:
        """Weights of one layer's matrices: query and output, key and value, three of the MLP."""
        return self.hidden * (2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim + 3 * self.inner)

    @property
    def parameters(self) -> int:
        """The layers with two norms each, the last norm, embedding and head."""
        return self.layers * (self.layer + 2 * self.hidden) + self.hidden + 2 * self.vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Of one token: key and value in every layer, bfloat16."""
        return 4 * self.layers * self.kv_heads * self.head_dim

    @property
    def activation_bytes(self) -> int:
        """Of one token at the peak of a checkpointed step: the layers' inputs in fp32, and the inside of one layer with gradients."""
        inside = 12 * self.inner + 26 * self.hidden + 8 * self.heads * self.head_dim + 4 * self.kv_heads * self.head_dim
        return 4 * self.layers * self.hidden + inside


SHAPES = [                           # layers, hidden, heads, KV heads, head dim, intermediate, vocabulary, window: from config.json of
    Shape("Mistral-7B", 32, 4096, 32, 8, 128, 14336, 32000, 4096),          # mistralai/Mistral-7B-Instruct-v0.1; context 32k
    Shape("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256),               # meta-llama/Meta-Llama-3-8B-Instruct; context 8k
    Shape("Mistral-Nemo-12B", 40, 5120, 32, 8, 128, 14336, 131072),         # mistralai/Mistral-Nemo-Instruct-2407; context 128k; its
]                                                                           # heads x head dim is not hidden; its card misprints 14,436


@dataclass(frozen=True)
class Benchmark:
    """Tasks and mean turns of the paper's Table 1; the rest are mean tokens, chat template included."""
    name: str
    tasks: int
    turns: float
    instruction: int
    example: int                     # one-shot example; 0: as long as one mean trajectory
    first: int                       # first observation, with the task
    observation: int                 # each later one
    action: int                      # "Thought: ...\nAction: ..." and the stop token

    def spans(self, turns: int) -> list[tuple[int, int]]:
        """[start, end) of each action in a trajectory of mean lengths with so many turns."""
        each = self.observation + self.action
        example = self.example or round(self.first - self.observation + self.turns * each)
        return [(s, s + self.action) for s in range(self.instruction + example + self.first, 10 ** 9, each)[:turns]]


# Measured with SmolLM2's tokenizer, not the models' own, on real text (tests/test_cost.py does it again); instructions: the paper's
# appendix A, ScienceWorld's and its example: envs.py. Thoughts are everywhere those of GPT-4 in FireAct's 500 HotpotQA trajectories,
# before the benchmark's own actions. Of each QA set the paper trains on 5,000 questions (section 6.1), not on Table 1's all.
BENCHMARKS = [
    Benchmark("WebShop", 1938, 4.9, 200, 0, 74, 379, 42),            # pages rebuilt as text from 1,000 products and 13 human goals
    Benchmark("Mind2Web", 1009, 7.3, 100, 740, 700, 700, 40),        # no data at hand: ASSUMED, pruned HTML, one step as example
    Benchmark("ScienceWorld", 1483, 14.4, 343, 337, 162, 53, 35),    # the simulator along a gold path of each of its 30 tasks
    Benchmark("ALFWorld", 3321, 10.1, 290, 0, 198, 29, 37),          # 120 ground-truth trajectories
    Benchmark("HotpotQA", 5000, 7.0, 157, 0, 34, 139, 41),           # an observation is a paragraph of a question's context
    Benchmark("2WikiMultihopQA", 5000, 8.2, 157, 0, 28, 99, 41),
    Benchmark("MuSiQue", 5000, 7.8, 157, 0, 29, 128, 41),
]


# ------------------------------------------------------------------------------------------------------- what has to be computed

def seen(start: int, n: int, window: int = 0) -> int:
    """(query, key) pairs of n tokens at positions start, start + 1, ..., each of which sees itself and what is before it."""
    upto = lambda m: m * (m + 1) // 2 if not window or m <= window else window * (window + 1) // 2 + (m - window) * window
    return upto(start + n) - upto(start)


def loads(spans: list[tuple[int, int]], leaves: list[list[int]], window: int, shared: bool, inverse: bool) -> dict[str, np.ndarray]:
    """[tokens, pairs, scored positions] of each phase for one trajectory; leaves[i] = lengths of the practice actions of step i.
    A leaf's first token comes from the prefill and its last is never read, so decoding computes one token less than it writes. Leaves
    have nothing in common with the expert's actions here; what they have would cost the shared trunk nothing."""
    branch = lambda start, n: np.array([n, seen(start, n, window), n])                       # n tokens after a state
    alone = lambda start, n: np.array([start, seen(0, start, window), 0]) + branch(start, n)
    flat = [(start, n) for (start, _), own in zip(spans, leaves, strict=True) for n in own]
    decode = sum(branch(start, n - 1) for start, n in flat)
    if shared:
        end = spans[-1][1]
        train = np.array([end, seen(0, end, window), sum(e - s for s, e in spans)]) + sum(branch(start, n) for start, n in flat)
        return {"prefill": np.array([end - 1, seen(0, end - 1, window), len(flat)]), "decode": decode, "score": train, "reflect": train}
    expert, practice = [alone(start, end - start) for start, end in spans], sum(alone(start, n) for start, n in flat)
    pairs = practice + sum(e * len(own) for e, own in zip(expert, leaves))
    return {"prefill": sum(np.array([start, seen(0, start, window), 1]) for start, _ in flat), "decode": decode,
            "score": practice + sum(expert) if inverse else pairs, "reflect": practice if inverse else pairs}


def mean_loads(shape: Shape, b: Benchmark, k: int, shared: bool, inverse: bool) -> dict[str, np.ndarray]:
    """Of a trajectory with b.turns turns on average: a mixture of the two whole numbers around it."""
    few, share = int(b.turns), b.turns - int(b.turns)
    low, high = (loads(b.spans(n), [[b.action] * k] * n, shape.window, shared, inverse) for n in (few, few + 1))
    return {phase: (1 - share) * low[phase] + share * high[phase] for phase in low}


def flops(shape: Shape, load: np.ndarray) -> float:
    """Of a forward pass."""
    per_token, per_pair = 2 * shape.layers * shape.layer, 4 * shape.layers * shape.heads * shape.head_dim
    return float(load @ [per_token, per_pair, 2 * shape.vocab * shape.hidden])


def together(b: Benchmark, k: int) -> int:
    """Trajectories in an inspection batch."""
    return max(1, int(LEAVES / (b.turns * k)))


def kv(shape: Shape, b: Benchmark, k: int, shared: bool) -> float:
    """Bytes of keys and values of one inspection batch, at its end."""
    load = mean_loads(shape, b, k, shared, False)
    return together(b, k) * shape.kv_bytes * float(load["prefill"][0] + load["decode"][0])


# ------------------------------------------------------------------------------------------------------------------ time, memory

def cost(shape: Shape, b: Benchmark, k: int, gpus: int, shared: bool, inverse: bool, pairs: float = PAIRS) -> dict[str, float]:
    """Of one iteration with `pairs` step pairs in an update: PFLOP of all GPUs, wall seconds by phase, H100-hours, number of updates,
    GPUs that have a sequence in an update."""
    load, rate, own = mean_loads(shape, b, k, shared, inverse), PEAK * MFU, b.turns * k      # own: pairs of a trajectory
    work = {phase: flops(shape, x) for phase, x in load.items()}
    passes, most, group, steps = PPO_PASSES if inverse else 1, math.ceil(b.tasks / gpus), together(b, k), b.action - 1
    held = shape.kv_bytes * (load["prefill"][0] + load["decode"][0] / 2)                     # mean over the decode steps
    read = 2 * (shape.parameters - shape.vocab * shape.hidden) + group * held
    step = max(read / (HBM * HBM_SHARE), group * work["decode"] / steps / rate)

    of_pair = 1 if inverse else 2                                                            # sequences, where they are separate
    sequences = math.ceil(pairs / own - 1e-9) if shared else math.ceil(pairs * of_pair)
    updates = passes * b.tasks * (1 / sequences if shared else own / pairs)
    sequence = 4 * work["reflect"] / (1 if shared else own * of_pair) / rate                 # seconds
    fixed = 28 * shape.parameters / gpus / (HBM * HBM_SHARE) + (8 * shape.parameters / LINK if gpus > 1 else 0)
    seconds = {"inspection": float(most * work["prefill"] / rate + math.ceil(most / group) * steps * step),
               "scoring": most * work["score"] / rate,
               "reflection": updates * math.ceil(sequences / gpus) * sequence,
               "optimizer_and_links": updates * fixed}
    total = b.tasks * (work["prefill"] + work["decode"] + work["score"] + 4 * passes * work["reflect"])
    return {"pflop": total / 1e15, **seconds, "h100_hours": gpus * sum(seconds.values()) / 3600, "updates": updates,
            "gpus_at_work": min(gpus, sequences)}


def memory(shape: Shape, b: Benchmark, k: int, gpus: int, sharded: bool) -> float:
    """Peak bytes per GPU, trunk shared."""
    p, split = shape.parameters, gpus if sharded else 1
    copy = 2 * p if split == 1 else 2 * (2 * shape.layer + 2 * shape.vocab * shape.hidden)
    train = 16 * p / split + copy + MICRO * shape.activation_bytes + LOGIT_BYTES * max(2 ** 21, 256 * shape.vocab)
    return max(train, 4 * p / split + 2 * p + kv(shape, b, k, True))


# ------------------------------------------------------------------------------------------------------------------------ tables

def short(x: float) -> str:
    return f"{x:,.0f}" if x >= 99.5 else f"{x:.2g}" if x < 0.995 else f"{x:.1f}"


def compared(shape: Shape, b: Benchmark, k: int, gpus: int, data: list, **more) -> dict[str, str]:
    """All four costs into data; -> cells "implicit / inverse"."""
    got = {way: [cost(shape, b, k, gpus, way == "shared", inverse) for inverse in (False, True)] for way in ("shared", "separate")}
    data.append({"model": shape.name, "benchmark": b.name, "gpus": gpus, **more,
                 **{way: dict(zip(("implicit", "inverse"), x)) for way, x in got.items()}})
    cell = lambda values: " / ".join(map(short, values))
    ratio = lambda name: cell([a[name] / c[name] for a, c in zip(got["separate"], got["shared"])])
    return {"pflop": cell([c["pflop"] for c in got["shared"]]), "pflop ratio": ratio("pflop"),
            "hours": " | ".join([*(cell([c["h100_hours"] for c in x]) for x in got.values()), ratio("h100_hours")])}


def main_table(b: Benchmark, k: int, data: list) -> list[str]:
    lines = [f"**{b.name}, one iteration, K = {k}** ({b.tasks:,} trajectories of {b.turns} turns; a / b: implicit / inverse)", "",
             "| model | GPUs | PFLOP, shared trunk | KV of a batch, trunk once / nK times, GB | GB per GPU, replicated / sharded "
             "| H100-hours, shared trunk | separate | ratio |", "|---" * 8 + "|"]
    fit = [0, 0]                                                         # rows within a card: replicated, sharded
    for shape in SHAPES:
        for gpus in GPUS:
            caches, peaks = [kv(shape, b, k, x) for x in (True, False)], [memory(shape, b, k, gpus, x) for x in (False, True)]
            cells = compared(shape, b, k, gpus, data, kv_bytes=caches, bytes_per_gpu=peaks)
            fit = [n + (peak <= CARD) for n, peak in zip(fit, peaks)]
            lines.append(f"| {shape.name} | {gpus} | {cells['pflop']} | {' / '.join(f'{x / 1e9:.1f}' for x in caches)} | "
                         f"{' / '.join(f'{x / 1e9:.0f}' if x <= CARD else f'**{x / 1e9:.0f}**' for x in peaks)} | {cells['hours']} |")
    n, held = len(SHAPES) * len(GPUS), math.ceil(PAIRS / (b.turns * k) - 1e-9)
    return lines + ["", f"Bold: more than the 80 GB of a card. Replicated {fit[0]} of {n} rows fit, sharded {fit[1]}; "
                    f"hours of the others are arithmetic. Whole trajectories in an update of {PAIRS} pairs (paper), with a shared trunk: {held}; "
                    "so many GPUs work in reflection, the others wait (next table)."]


def phase_table(b: Benchmark, k: int, data: list, shape: Shape = SHAPES[0]) -> list[str]:
    """Where the time goes, and what updates as wide as the machine would change."""
    lines = [f"**Wall minutes by phase: {shape.name}, {b.name}, implicit, shared trunk**", "",
             "| GPUs | pairs in an update | inspection | scoring | reflection | optimizer, links | all | updates | GPUs at work "
             "| H100-hours |", "|---" * 10 + "|"]
    for gpus, pairs in [(GPUS[0], PAIRS), *((g, p) for g in GPUS[1:] for p in (PAIRS, g * b.turns * k))]:
        c = cost(shape, b, k, gpus, True, False, pairs)
        data.append({"model": shape.name, "benchmark": b.name, "gpus": gpus, "pairs": pairs, **c})
        phases = [c[x] / 60 for x in ("inspection", "scoring", "reflection", "optimizer_and_links")]
        lines.append(f"| {gpus} | {f'{pairs} (paper)' if pairs == PAIRS else f'{pairs:,.0f} (a trajectory per GPU)'} | "
                     f"{' | '.join(map(short, [*phases, sum(phases)]))} | {c['updates']:,.0f} | {c['gpus_at_work']} | "
                     f"{short(c['h100_hours'])} |")
    return lines


def benchmark_table(k: int, data: list, shape: Shape = SHAPES[0], gpus: int = 8) -> list[str]:
    lines = [f"**All benchmarks: {shape.name}, {gpus} GPUs, one iteration, K = {k}** (a / b: implicit / inverse)", "",
             "| benchmark | trajectories | turns | tokens of the first state | of the trunk | H100-hours, shared trunk | separate | ratio "
             "| ratio of PFLOP |", "|---" * 9 + "|"]
    for b in BENCHMARKS:
        first, trunk = b.spans(1)[0][0], b.spans(1)[0][1] + (b.turns - 1) * (b.observation + b.action)
        cells = compared(shape, b, k, gpus, data, trunk_tokens=trunk, **{x: y for x, y in asdict(b).items() if x != "name"})
        lines.append(f"| {b.name} | {b.tasks:,} | {b.turns} | {first:,} | {trunk:,.0f} | {cells['hours']} | {cells['pflop ratio']} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=3, help="practice actions per expert step (default: 3)")
    parser.add_argument("--benchmark", choices=[b.name for b in BENCHMARKS], default="ScienceWorld", help="of the first two tables")
    args = parser.parse_args()
    if args.k < 1:
        sys.exit(f"error: --k {args.k}: give at least 1")
    b, data = next(b for b in BENCHMARKS if b.name == args.benchmark), {"k": args.k, "main": [], "phases": [], "benchmarks": []}
    lines = [*main_table(b, args.k, data["main"]), "", *phase_table(b, args.k, data["phases"]), "",
             *benchmark_table(args.k, data["benchmarks"])]
    print("\n".join(lines))
    if (args.k, args.benchmark) == (parser.get_default("k"), parser.get_default("benchmark")):       # other tables are printed only
        out, legend = Path(__file__).parent / "results/cost", __doc__.split("\n\n", 1)[1].rstrip()
        out.with_suffix(".md").write_text("\n".join([*lines, "", "```", legend, "```", ""]), encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
