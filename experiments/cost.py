"""What an iteration of StepAgent costs on H100s, and what fits into their memory: an estimate.

    python experiments/cost.py            # experiments/results/cost.md and memory.md
    python experiments/cost.py --k 5      # other tables are only printed

Nothing here was timed on a GPU. An iteration is inspection (K practice actions per expert step),
scoring (reference log-probs), for inverse D (two passes, then it scores), and reflection (implicit:
one DPO epoch; inverse: two PPO passes). Evaluation, SFT and saving are left out. "Shared" is
rollout.py: one sequence per trajectory, trunk and leaves. "Separate" is a generate loop and a DPO
or PPO trainer: one sequence per (state, action), the expert's again in each of its K pairs; padding
and logits at unscored positions are forgiven. T: tokens computed; pairs: (query, key) pairs that
causal attention within the sliding window needs; S: scored positions; n steps, s_i: tokens of state
i, A: of an action. Practice actions are as long as the expert's and differ from the first token on.
This is the dearest case: what they have in common is not computed again where shared, always where
separate.

FLOPs       forward = 2 W T + 4 L H d_head pairs + 2 V d S   W weights in the layers' matrices,
            L layers, H heads, V vocabulary
            training = 4 x forward: forward, backward 2, recomputation 1 (checkpointing): 8 a weight
            and token. An upper bound: torch leaves out each layer's last matrix when it recomputes
            (7.5 for these models).
            prefill  T = s_n + A - 1 shared; K sum_i s_i separate (decoding: nK (A - 1) either way)
            scoring  T = s_n + A + nKA shared; separate: 2 K sum_i (s_i + A) implicit,
            (1 + K) sum_i (s_i + A) inverse
            D        two trainings and one forward of what scoring computes
            reflection T = as scoring; separate and inverse: K sum_i (s_i + A). Inverse: twice.
KV          4 L H_kv d_head bytes x (T of prefill + nK (A - 1)), for one inspection batch: whole
            trajectories, at most 256 leaves
Time        compute: FLOPs / (40% of 989 TFLOP/s). A decode step: the larger of compute and
            bytes / (60% of 3.35 TB/s), the bytes being the weights (2 each, without the input
            embedding) and the batch's keys and values, the trunk's once or per leaf.
            An update: the sequences of the busiest GPU, then AdamW (28 bytes a weight, sharded) and
            the links (8 bytes a weight at 300 GB/s, not overlapped: fp32 all-reduce 2 x 4, or
            FSDP's two bf16 gathers and fp32 scatter). It has 16 pairs (paper): 16 sequences, for
            DPO 32, where separate; shared, whole trajectories until 16 are reached: often one, on
            one GPU. An update of D has 64 practice actions, separate with their share of the
            expert's. Launches, the environment, stragglers and the spread of lengths (quadratic for
            "separate") are left out.
H100-hours  GPUs x wall time, idle GPUs included
Memory      training_bytes of system/sharding.py, by which stepagent.py decides: the larger of an
            update and of generation with the batch's keys and values (trunk once). CUDA context,
            NCCL and fragmentation are left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig

from stepagent import Config
from system.files import write_text
from system.model import add_lora
from system.sharding import training_bytes
from tree import kv_bytes

# An H100 SXM, by its data sheet: FLOP/s in bfloat16, bytes/s of its memory, bytes. The shares are
# assumed; recomputation counts as work.
PEAK, MFU = 989e12, 0.40
HBM, HBM_SHARE, CARD = 3.35e12, 0.60, 80e9
# Bytes/s of a GPU in a collective, assumed: NVLink in a node of 8, 8 x 400 Gb/s between nodes.
LINK = 300e9
GPUS = (1, 8, 64)
PHASES = ("inspection", "scoring", "discriminator", "reflection", "optimizer_and_links")
SETTINGS = Config(dtype="bfloat16", checkpointing="true")


class Backbone:
    """A Llama-like model without storage. Attention sees at most `window` keys; 0: all."""

    def __init__(self, name: str, config: PretrainedConfig, lora_rank: int = 0):
        self.name, self.config = name, config
        with torch.device("meta"):
            self.policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.parameters = sum(p.numel() for p in self.policy.parameters())
        matrices = [p for p in self.policy.model.layers[0].parameters() if p.dim() == 2]
        # Weights of one layer's matrices.
        self.layer = sum(p.numel() for p in matrices)
        # Of one token, in bfloat16.
        self.kv_bytes = kv_bytes(self.policy, 2)
        self.window = getattr(config, "sliding_window", None) or 0
        if lora_rank:
            add_lora(self.policy, lora_rank, seed=0)


# The paper's backbones, from their published config.json. Mistral-Nemo's model card misprints the
# intermediate size as 14,436.
MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
NEMO = MISTRAL | {"hidden_size": 5120, "num_hidden_layers": 40, "head_dim": 128}
CONFIGS = {
    "Mistral-7B": MistralConfig(vocab_size=32000, sliding_window=4096, **MISTRAL),
    "Llama-3-8B": LlamaConfig(vocab_size=128256, **MISTRAL),
    "Mistral-Nemo-12B": MistralConfig(vocab_size=131072, sliding_window=None, **NEMO),
}


@dataclass(frozen=True)
class Benchmark:
    """Tasks and mean turns of the paper's Table 1; the rest are mean tokens, template included."""

    name: str
    tasks: int
    turns: float
    instruction: int
    # The one-shot example; 0: as long as one mean trajectory.
    example: int
    # The first observation, with the task; each later one.
    first: int
    observation: int
    # "Thought: ...\nAction: ..." and the stop token.
    action: int

    def spans(self, turns: int) -> list[tuple[int, int]]:
        """[start, end) of each action in a trajectory of mean lengths with so many turns."""
        turn = self.observation + self.action
        example = self.example or round(self.first - self.observation + self.turns * turn)
        start = self.instruction + example + self.first
        return [(start + i * turn, start + i * turn + self.action) for i in range(turns)]


# Measured with SmolLM2's tokenizer, not the models' own, on real text (tests/test_cost.py does it
# again). Instructions: the paper's appendix A; ScienceWorld's and its example are ours. Thoughts
# are everywhere those of GPT-4 in FireAct's 500 HotpotQA trajectories. Of each QA set the paper
# trains on 5,000 questions (section 6.1). WebShop: pages rebuilt from 1,000 products and 13 human
# goals. Mind2Web: ASSUMED, no data at hand; pruned HTML, one step as example. ScienceWorld: a gold
# path of each of its 30 tasks. ALFWorld: 120 ground-truth trajectories. QA: an observation is a
# paragraph.
BENCHMARKS = [
    Benchmark("WebShop", 1938, 4.9, 200, 0, 74, 379, 42),
    Benchmark("Mind2Web", 1009, 7.3, 100, 740, 700, 700, 40),
    Benchmark("ScienceWorld", 1483, 14.4, 343, 337, 162, 53, 35),
    Benchmark("ALFWorld", 3321, 10.1, 290, 0, 198, 29, 37),
    Benchmark("HotpotQA", 5000, 7.0, 157, 0, 34, 139, 41),
    Benchmark("2WikiMultihopQA", 5000, 8.2, 157, 0, 28, 99, 41),
    Benchmark("MuSiQue", 5000, 7.8, 157, 0, 29, 128, 41),
]


# ---------------------------------------------------------------------------- what is computed


def seen(start: int, count: int, window: int = 0) -> int:
    """(query, key) pairs of tokens start, start + 1, ..: each sees itself and what is before it."""

    def up_to(tokens: int) -> int:
        if not window or tokens <= window:
            return tokens * (tokens + 1) // 2
        return window * (window + 1) // 2 + (tokens - window) * window

    return up_to(start + count) - up_to(start)


def tokens_after(start: int, count: int, window: int) -> np.ndarray:
    """[tokens, pairs, scored positions] of `count` scored tokens after a state."""
    return np.array([count, seen(start, count, window), count])


def tokens_of(start: int, window: int) -> np.ndarray:
    """The same of a state, of which nothing is scored."""
    return np.array([start, seen(0, start, window), 0])


def loads(spans, leaves, window: int, shared: bool, inverse: bool) -> dict[str, np.ndarray]:
    """[tokens, pairs, scored positions] of each phase, for one trajectory with these spans.

    leaves[i]: lengths of the practice actions of step i. A leaf's first token comes from the
    prefill and its last is never read: decoding computes one token less than it writes.
    """
    once = np.array([0, 0, 1])
    prefill, decode, practice, expert, chosen, actions = 0, 0, 0, 0, 0, 0
    for (start, end), own in zip(spans, leaves, strict=True):
        state = tokens_of(start, window)
        alone = state + tokens_after(start, end - start, window)
        expert, chosen = expert + alone, chosen + alone * len(own)
        actions += end - start
        for size in own:
            prefill = prefill + state + once
            decode = decode + tokens_after(start, size - 1, window)
            practice = practice + tokens_after(start, size, window)
    if shared:
        trunk = spans[-1][1]
        count = sum(map(len, leaves))
        prefill = tokens_of(trunk - 1, window) + count * once
        score = reflect = tokens_of(trunk, window) + actions * once + practice
    else:
        practice = practice + prefill - sum(map(len, leaves)) * once
        reflect = practice if inverse else practice + chosen
        score = practice + expert if inverse else reflect
    return {"prefill": prefill, "decode": decode, "score": score, "reflect": reflect}


def mean_loads(
    model: Backbone, benchmark: Benchmark, K: int, shared: bool, inverse: bool
) -> dict[str, np.ndarray]:
    """Of a trajectory of mean length: a mixture of the two whole numbers of turns around it."""
    few, mixture = int(benchmark.turns), {}
    for turns, share in ((few, few + 1 - benchmark.turns), (few + 1, benchmark.turns - few)):
        leaves = [[benchmark.action] * K] * turns
        load = loads(benchmark.spans(turns), leaves, model.window, shared, inverse)
        for phase in load:
            mixture[phase] = mixture.get(phase, 0) + share * load[phase]
    return mixture


def flops(model: Backbone, load: np.ndarray) -> float:
    """Of a forward pass."""
    config = model.config
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * model.layer
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim
    return float(load @ [token, pair, 2 * config.vocab_size * config.hidden_size])


def batch_size(benchmark: Benchmark, K: int) -> int:
    """Trajectories that are practised together."""
    return max(1, int(SETTINGS.leaves / (benchmark.turns * K)))


def cache_bytes(model: Backbone, benchmark: Benchmark, K: int, shared: bool) -> float:
    """Keys and values of one inspection batch, at its end."""
    load = mean_loads(model, benchmark, K, shared, False)
    tokens = float(load["prefill"][0] + load["decode"][0])
    return batch_size(benchmark, K) * model.kv_bytes * tokens


def inspection_seconds(
    model: Backbone, benchmark: Benchmark, K: int, gpus: int, load: dict, work: dict
) -> float:
    """On the busiest GPU. load, work: tokens and FLOPs of a trajectory by phase."""
    rate, bandwidth = PEAK * MFU, HBM * HBM_SHARE
    trajectories, together = math.ceil(benchmark.tasks / gpus), batch_size(benchmark, K)
    steps = benchmark.action - 1
    # The mean over the decode steps.
    held = model.kv_bytes * (load["prefill"][0] + load["decode"][0] / 2)
    embedding = model.config.vocab_size * model.config.hidden_size
    read = 2 * (model.parameters - embedding) + together * held
    decode_step = max(read / bandwidth, together * work["decode"] / steps / rate)
    prefill = trajectories * work["prefill"] / rate
    return float(prefill + math.ceil(trajectories / together) * steps * decode_step)


def cost(
    model: Backbone,
    benchmark: Benchmark,
    K: int,
    gpus: int,
    shared: bool,
    inverse: bool,
    pairs: float = SETTINGS.batch,
) -> dict[str, float]:
    """Of one iteration with `pairs` step pairs in an update.

    PFLOP of all GPUs, wall seconds by phase, H100-hours, number of updates, GPUs with work in one.
    """
    load = mean_loads(model, benchmark, K, shared, inverse)
    work = {phase: flops(model, part) for phase, part in load.items()}
    rate, bandwidth = PEAK * MFU, HBM * HBM_SHARE

    # What learns: sequences are trajectories, or single actions (DPO: two a pair).
    def training(load: str, batch: float, per_action: float) -> tuple[float, float, int]:
        """Seconds of a pass, its updates, the sequences of one. batch: practice actions."""
        own_actions = benchmark.turns * K
        if shared:
            sequences, in_trajectory = math.ceil(batch / own_actions - 1e-9), 1
            updates = benchmark.tasks / sequences
        else:
            sequences, in_trajectory = math.ceil(batch * per_action), own_actions * per_action
            updates = benchmark.tasks * own_actions / batch
        sequence = 4 * work[load] / in_trajectory / rate
        return updates * math.ceil(sequences / gpus) * sequence, updates, sequences

    scoring = math.ceil(benchmark.tasks / gpus) * work["score"] / rate
    passes = SETTINGS.ppo_passes if inverse else 1
    seconds, updates, sequences = training("reflect", pairs, 1 if inverse else 2)
    reflection, updates = passes * seconds, passes * updates
    total = work["prefill"] + work["decode"] + work["score"] + 4 * passes * work["reflect"]
    discriminator = updates_of_d = 0.0
    if inverse:
        seconds, updates_of_d, _ = training("score", SETTINGS.d_batch, 1 + 1 / K)
        updates_of_d *= SETTINGS.d_epochs
        discriminator = SETTINGS.d_epochs * seconds + scoring
        total += (4 * SETTINGS.d_epochs + 1) * work["score"]
    optimizer = 28 * model.parameters / gpus / bandwidth
    links = 8 * model.parameters / LINK if gpus > 1 else 0
    stepping = (updates + updates_of_d) * (optimizer + links)
    inspection = inspection_seconds(model, benchmark, K, gpus, load, work)
    phases = (inspection, scoring, discriminator, reflection, stepping)
    return {
        "pflop": benchmark.tasks * total / 1e15,
        **dict(zip(PHASES, phases)),
        "h100_hours": gpus * sum(phases) / 3600,
        "updates": updates,
        "gpus_at_work": min(gpus, sequences),
    }


def memory(model: Backbone, benchmark: Benchmark, K: int, split: int) -> float:
    """Peak bytes per GPU with a shared trunk; `split` GPUs share the weights."""
    need = training_bytes(model.policy, SETTINGS, split)
    return max(need["update"], need["generate"] + cache_bytes(model, benchmark, K, True))


# ---------------------------------------------------------------------------- tables


def short(number: float) -> str:
    if number >= 99.5:
        return f"{number:,.0f}"
    return f"{number:.2g}" if number < 0.995 else f"{number:.1f}"


def table(head: str, rows: list[list[str]]) -> list[str]:
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def compare(model: Backbone, benchmark: Benchmark, K: int, gpus: int) -> dict[str, list[str]]:
    """Figure -> cells "implicit / inverse": shared trunk, separate sequences, their ratio."""
    cells = {}
    for figure in ("pflop", "h100_hours"):
        pairs = []
        for shared in (True, False):
            pair = [cost(model, benchmark, K, gpus, shared, inverse) for inverse in (False, True)]
            pairs.append([costs[figure] for costs in pair])
        pairs.append([separate / shared for shared, separate in zip(*pairs)])
        cells[figure] = [f"{short(implicit)} / {short(inverse)}" for implicit, inverse in pairs]
    return cells


def main_table(models: list[Backbone], benchmark: Benchmark, K: int) -> list[str]:
    rows = []
    for model in models:
        caches = [cache_bytes(model, benchmark, K, shared) / 1e9 for shared in (True, False)]
        for gpus in GPUS:
            sizes = []
            for split in (1, gpus):
                peak = memory(model, benchmark, K, split)
                sizes.append(f"{peak / 1e9:.0f}" if peak <= CARD else f"**{peak / 1e9:.0f}**")
            cells = compare(model, benchmark, K, gpus)
            row = [model.name, str(gpus), cells["pflop"][0]]
            row += [f"{caches[0]:.1f} / {caches[1]:.1f}", " / ".join(sizes)]
            rows.append(row + cells["h100_hours"])
    head = "model | GPUs | PFLOP, shared trunk | KV of a batch, trunk once / nK times, GB "
    head += "| GB per GPU, replicated / sharded | H100-hours, shared trunk | separate | ratio"
    held = math.ceil(SETTINGS.batch / (benchmark.turns * K) - 1e-9)
    return [
        f"**{benchmark.name}, one iteration, K = {K}** ({benchmark.tasks:,} trajectories of "
        f"{benchmark.turns} turns; a / b: implicit / inverse)",
        "",
        *table(head, rows),
        "",
        "Bold: more than the 80 GB of a card; hours are arithmetic there. With a shared trunk, an "
        f"update of {SETTINGS.batch} pairs (paper) is {held} whole trajectories: so many GPUs work "
        "in reflection, the others wait (next table).",
        "",
    ]


def phase_table(model: Backbone, benchmark: Benchmark, K: int) -> list[str]:
    """Where the time goes, and what updates as wide as the machine would change."""
    paper, rows = SETTINGS.batch, []
    settings = [(GPUS[0], paper)]
    for gpus in GPUS[1:]:
        settings += [(gpus, paper), (gpus, gpus * benchmark.turns * K)]
    for gpus, pairs in settings:
        costs = cost(model, benchmark, K, gpus, True, False, pairs)
        minutes = [costs[phase] / 60 for phase in PHASES if phase != "discriminator"]
        update = f"{pairs} (paper)" if pairs == paper else f"{pairs:,.0f} (a trajectory per GPU)"
        row = [str(gpus), update, *map(short, minutes), short(sum(minutes))]
        row += [f"{costs['updates']:,.0f}", str(costs["gpus_at_work"])]
        rows.append([*row, short(costs["h100_hours"])])
    head = "GPUs | pairs in an update | inspection | scoring | reflection | optimizer, links | all "
    head += "| updates | GPUs at work | H100-hours"
    title = f"{model.name}, {benchmark.name}, implicit, shared trunk"
    return [f"**Wall minutes by phase: {title}**", "", *table(head, rows), ""]


def benchmark_table(model: Backbone, K: int, gpus: int = 8) -> list[str]:
    rows = []
    for benchmark in BENCHMARKS:
        first, end = benchmark.spans(1)[0]
        trunk = end + (benchmark.turns - 1) * (benchmark.observation + benchmark.action)
        cells = compare(model, benchmark, K, gpus)
        row = [benchmark.name, f"{benchmark.tasks:,}", str(benchmark.turns), f"{first:,}"]
        rows.append([*row, f"{trunk:,.0f}", *cells["h100_hours"], cells["pflop"][2]])
    head = "benchmark | trajectories | turns | tokens of the first state | of the trunk "
    head += "| H100-hours, shared trunk | separate | ratio | ratio of PFLOP"
    title = f"{model.name}, {gpus} GPUs, one iteration, K = {K}"
    return [f"**All benchmarks: {title}** (a / b: implicit / inverse)", "", *table(head, rows)]


MEMORY = """\
GB (1e9 bytes) per device: update / generation, and how many thousand tokens of keys and values then
fit beside the weights. Update: weights, gradients, moments, bf16 copies or gathered layers,
activations of --micro-tokens (8,192), a chunk of logits; bf16 compute, activations recomputed.
Bold: fits into 92% of the card; the rest is the CUDA context, fragments, collectives' buffers. By
arithmetic (training_bytes of system/sharding.py): nothing here was run on a GPU.
"""
MACHINES = {"1 x 24 GB": (1, 24e9), "1 x 80 GB": (1, 80e9), "8 x 80 GB": (8, 80e9)}
FLAGS = {
    "all weights": {},
    "--shard true": {"shard": "true"},
    "--lora-rank 16": {"lora_rank": 16},
    "--lora-rank 16 --micro-tokens 2048": {"lora_rank": 16, "micro_tokens": 2048},
}


def memory_table() -> list[str]:
    rows = []
    for name, config in CONFIGS.items():
        for flags, options in FLAGS.items():
            settings = replace(SETTINGS, **options)
            model = Backbone(name, config, settings.lora_rank)
            weights = sum(p.numel() for p in model.policy.parameters())
            learnt = sum(p.numel() for p in model.policy.parameters() if p.requires_grad)
            row = [f"{name}, {weights / 1e9:.2f}e9, {learnt / 1e6:,.0f}e6 learnt", flags]
            for devices, card in MACHINES.values():
                sharded = settings.shard == "true"
                need = training_bytes(model.policy, settings, devices if sharded else 1)
                left = 0.92 * card - need["generate"]
                cell = f"{need['update'] / 1e9:.0f} / {need['generate'] / 1e9:.0f}, "
                cell += f"{max(0, left) / model.kv_bytes / 1e3:,.0f}k"
                if sharded and devices == 1:
                    cell = "-"
                elif need["update"] <= 0.92 * card and left > 0.05 * card:
                    cell = f"**{cell}**"
                row.append(cell)
            rows.append(row)
    return [MEMORY, *table("model | flags | " + " | ".join(MACHINES), rows)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--k", type=int, default=3, help="practice actions per step (default: 3)")
    parser.add_argument("--benchmark", choices=names, default="ScienceWorld", help="of two tables")
    options = parser.parse_args()
    if options.k < 1:
        parser.error(f"--k {options.k}: give at least 1")
    models = [Backbone(name, config) for name, config in CONFIGS.items()]
    benchmark, K = BENCHMARKS[names.index(options.benchmark)], options.k
    lines = main_table(models, benchmark, K) + phase_table(models[0], benchmark, K)
    lines += benchmark_table(models[0], K)
    needs = memory_table()
    print("\n".join([*lines, "", *needs]))
    if (options.benchmark, K) == (parser.get_default("benchmark"), parser.get_default("k")):
        results = Path(__file__).parent / "results"
        legend = __doc__.split("\n\n", 2)[2].rstrip()
        write_text(results / "cost.md", "\n".join([*lines, "", "```", legend, "```", ""]))
        write_text(results / "memory.md", "\n".join(needs) + "\n")


if __name__ == "__main__":
    main()
