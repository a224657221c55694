"""Speed and memory beside named peers: TRL's DPOTrainer, and transformers' generate and
generate_batch. One thread, the same weights and data, each peer at the best setting found here.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/bench.py                # everything, into experiments/results/bench.md
    python experiments/bench.py --only update inspect --shape deep    # the rest stays as it was
    python experiments/bench.py --ours --only update inspect          # our own seconds, no peers
    python experiments/bench.py --quick        # short trajectories, one repetition: does it run?

Shapes: "reference" is a Llama of 2 layers, "deep" one of 12, both with random weights and one
trajectory of random tokens. "trained" is the main job's policy after SFT, on demonstrations that
it has not seen; it is trained first, into runs/bench-sft.

A speed-up is the peer's seconds over ours. The token ratio is what the peer pushes through its
models over what we push, padding included. A speed-up beyond the token ratio comes from faster
kernels or less overhead; one below it is overhead of ours.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# These count only before torch is loaded.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from envs import load_trajectories
from losses import dpo_loss
from rollout import practice, run_episodes, score
from system.files import write_text
from system.model import read_policy, read_tokenizer
from trajectory import Encoded, encode, prompt_ids, state_ids

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE, BETA, CLIP = 5e-7, 0.1, 1.0
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
LAYERS = {"reference": 2, "deep": 12}
SHAPES = (*LAYERS, "trained")
# The stop token, which also pads. NEVER: a stop token that does not occur.
STOP, NEVER = 0, -1

# [(step, token ids)] of each trajectory.
Leaves = list[list[tuple[int, list[int]]]]


@dataclass(frozen=True)
class Lengths:
    """A trajectory in tokens; observations fill the trunk evenly."""

    trunk: int = 3000
    # Before the first action.
    first: int = 1000
    steps: int = 14
    # Of an action, stop token included.
    action: int = 40


REFERENCE, SMALL = Lengths(), Lengths(trunk=360, first=120, steps=4, action=12)


@dataclass
class Workload:
    """A policy, the expert trajectories that it practises, and how often to measure."""

    shape: str
    model: LlamaForCausalLM
    tokenizer: FastTokenizer
    items: list[Encoded]
    new_tokens: int
    # NEVER: every action has new_tokens.
    stop: int
    # Of a peer's timing. Ours are three times as many.
    repetitions: int
    # Of random trajectories; None: trained.
    lengths: Lengths | None = None

    @property
    def states(self) -> list[list[int]]:
        return [item.ids[:start] for item in self.items for start, _ in item.spans]


# ---------------------------------------------------------------------------- weights and data


def make_model(shape: dict = MODEL) -> LlamaForCausalLM:
    """Fixed random weights in float32, scaled by width: next-token distributions are not flat."""
    torch.manual_seed(0)
    deviation = shape["hidden_size"] ** -0.5
    config = LlamaConfig(**shape, initializer_range=deviation, bos_token_id=None, eos_token_id=None)
    config.pad_token_id = STOP
    return count_tokens(LlamaForCausalLM(config).eval())


def count_tokens(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Lets model.model.pushed count the tokens that are read, padding included."""

    def count(module, args, kwargs):
        module.pushed += (args[0] if args else kwargs["input_ids"]).numel()

    model.generation_config = GenerationConfig(pad_token_id=STOP)
    model.model.pushed = 0
    model.model.register_forward_pre_hook(count, with_kwargs=True)
    return model


def make_tokenizer() -> FastTokenizer:
    """One word w123, one token: nothing merges where a state and an action meet."""
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    # trajectory.py lets "x" stand for any action.
    words = [*special, "x", *(f"w{i}" for i in range(4, MODEL["vocab_size"]))]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="x"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("w[0-9]+"), "isolated")
    core.decoder = decoders.Fuse()
    names = {"eos_token": special[0], "pad_token": special[0], "extra_special_tokens": special[1:]}
    tokenizer = FastTokenizer(tokenizer_object=core, **names)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def random_words(source: random.Random, count: int, vocabulary: int) -> list[int]:
    return [source.randrange(4, vocabulary) for _ in range(count)]


def make_trajectory(lengths: Lengths, vocabulary: int = MODEL["vocab_size"]) -> Encoded:
    """An expert trajectory of random tokens."""
    gap = (lengths.trunk - lengths.action - lengths.first) / max(1, lengths.steps - 1)
    assert gap >= lengths.action, f"actions overlap in {lengths}"
    ids = random_words(random.Random("trunk"), lengths.trunk, vocabulary)
    spans = []
    for step in range(lengths.steps):
        start = lengths.first + round(step * gap)
        spans.append((start, start + lengths.action))
        ids[start + lengths.action - 1] = STOP
    return Encoded(ids, spans, "bench")


def random_leaves(lengths: Lengths, K: int, vocabulary: int = MODEL["vocab_size"]) -> Leaves:
    """K random actions at each step, as long as the expert's."""
    source, leaves = random.Random("leaves"), []
    for step in range(lengths.steps):
        for _ in range(K):
            words = random_words(source, lengths.action - 1, vocabulary)
            leaves.append((step, [*words, STOP]))
    return [leaves]


def random_workload(shape: str, quick: bool, repetitions: int) -> Workload:
    lengths = SMALL if quick else REFERENCE
    model = make_model(MODEL | {"num_hidden_layers": LAYERS[shape]})
    items = [make_trajectory(lengths)]
    if shape == "deep":
        # Peers take minutes, and are then steady.
        repetitions = max(1, repetitions // 3)
    settings = (lengths.action, NEVER, repetitions, lengths)
    return Workload(shape, model, make_tokenizer(), items, *settings)


def trained_workload(quick: bool, repetitions: int) -> Workload:
    """The main job's policy after SFT. Most of its practice repeats the expert."""
    folder = ROOT / ("runs/bench-sft-quick" if quick else "runs/bench-sft")
    options = "--model models/tiny-household --method sft --eval-each= --eval-splits="
    if quick:
        options += " --experts 60 --sft-experts 40 --sft-epochs 1"
    command = [sys.executable, "stepagent.py", *options.split(), "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    tokenizer = read_tokenizer(folder / "policy")
    # SFT takes the first of the file.
    unseen = load_trajectories(folder / "experts.jsonl")[-2 if quick else -16 :]
    items = [encode(trajectory, tokenizer) for trajectory in unseen]
    model = count_tokens(read_policy(folder / "policy").eval())
    return Workload("trained", model, tokenizer, items, 48, STOP, repetitions)


# ---------------------------------------------------------------------------- measuring


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def medians(stamps: list[tuple[float, float]]) -> dict:
    """Of the (CPU, wall) seconds between two stamps; stamps come in pairs of start and end."""
    cpu = [end[0] - start[0] for start, end in zip(stamps[::2], stamps[1::2])]
    wall = [end[1] - start[1] for start, end in zip(stamps[::2], stamps[1::2])]
    return {"cpu": statistics.median(cpu), "wall": statistics.median(wall), "all_cpu": cpu}


def now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def timed(action: Callable, repetitions: int, model=None) -> dict:
    """Median CPU and wall seconds of action(), and the tokens that it pushes through the model."""
    stamps = []
    before = model.model.pushed if model else 0
    for _ in range(repetitions):
        gc.collect()
        stamps.append(now())
        action()
        stamps.append(now())
    tokens = (model.model.pushed - before) / repetitions if model else 0
    return medians(stamps) | {"tokens": tokens}


def best(name: str, settings: list, peer: Callable):
    """The setting with which peer(setting) takes least CPU time, in one try each."""
    if len(settings) == 1:
        return settings[0]
    seconds = {setting: timed(partial(peer, setting), 1)["cpu"] for setting in settings}
    say(f"  {name}: " + ", ".join(f"{setting}: {s:.2f} s" for setting, s in seconds.items()))
    return min(seconds, key=seconds.get)


def compare(work: Workload, figure: str, K: int, ours: dict, peer: dict, setting: str) -> dict:
    """A line of the table."""
    line = {"shape": work.shape, "figure": figure, "K": K, "setting": setting}
    line |= {"ours": ours, "peer": peer}
    say(f"  {figure}, K={K}: {peer['cpu'] / ours['cpu']:.1f}x ({setting})")
    return line


# ---------------------------------------------------------------------------- one step-DPO update


def practice_pairs(work: Workload, K: int) -> Leaves:
    """The practice actions of an update.

    Random weights: random actions. After SFT: our practice, without actions that repeat the
    expert's, and without those that TRL, which reads text, would read as other tokens.
    """
    if work.lengths:
        return random_leaves(work.lengths, K)
    pairs: Leaves = []
    for item, steps in zip(work.items, inspect(work, copy.deepcopy(work.model), K)):
        pairs.append([])
        for step, actions in enumerate(steps):
            start, end = item.spans[step]
            for action in actions:
                text = work.tokenizer.decode(action)
                same_tokens = work.tokenizer(text, add_special_tokens=False).input_ids == action
                if same_tokens and action[-1] == STOP and action != item.ids[start:end]:
                    pairs[-1].append((step, action))
    return pairs


def our_update(model, items: list[Encoded], leaves: Leaves, optimizer, reference=None) -> dict:
    """As in stepagent.py: reference (unless given), forward, loss, backward, clipping, AdamW."""
    count = sum(map(len, leaves))
    if reference is None:
        with torch.no_grad():
            reference = score(model, items, leaves)
    total, chosen, rejected = 0.0, 0.0, 0.0
    for scores, before, own in zip(score(model, items, leaves), reference, leaves):
        steps = [step for step, _ in own]
        expert, ref_expert = scores.trunk[steps], before.trunk[steps]
        loss, info = dpo_loss(expert, scores.leaves, ref_expert, before.leaves, BETA, count)
        total = total + loss
        chosen += info["logp_chosen"].item()
        rejected += info["logp_rejected"].item()
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return {"grad_norm": norm.item(), "chosen": chosen, "rejected": rejected}


def make_optimizer(model) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)


def time_our_update(work: Workload, leaves: Leaves) -> dict:
    """Seconds of an update, and what the first gave, which also warms up."""
    model = copy.deepcopy(work.model)
    update = partial(our_update, model, work.items, leaves, make_optimizer(model))
    log = update()
    return timed(update, 3 * work.repetitions, model) | {"log": log}


class Stopwatch(transformers.TrainerCallback):
    """Takes the time before and after every update."""

    def __init__(self):
        self.stamps = []

    def on_step_begin(self, *_, **__):
        self.stamps.append(now())

    on_step_end = on_step_begin


def make_trainer(work, leaves, batch, updates=1, compact=True, checkpointing=False):
    """TRL's trainer and a stopwatch. All pairs make one update, `batch` of them a pass.

    Pairs of one state lie side by side, so that little is padded. Off CUDA, TRL runs the output
    head at every position; compact makes it take CUDA's way, scored positions only.
    """
    import datasets
    import trl
    from trl.trainer import utils

    datasets.disable_progress_bars()
    for name in ("transformers", "datasets", "trl", "accelerate"):
        logging.getLogger(name).setLevel("ERROR")
    # The output head is all that this module asks it for.
    utils._use_triton = lambda device: compact

    pairs, texts = [], []
    for item, own in zip(work.items, leaves):
        for step, leaf in own:
            start, end = item.spans[step]
            pair = {"prompt": item.ids[:start], "chosen": item.ids[start:end], "rejected": leaf}
            pairs.append(pair)
            texts.append({name: work.tokenizer.decode(ids) for name, ids in pair.items()})
    config = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=-(-len(pairs) // batch),
        max_steps=updates,
        learning_rate=LEARNING_RATE,
        beta=BETA,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        max_length=None,
        bf16=False,
        gradient_checkpointing=checkpointing,
        train_sampling_strategy="sequential",
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    stopwatch = Stopwatch()
    trainer = trl.DPOTrainer(
        copy.deepcopy(work.model),
        copy.deepcopy(work.model),
        config,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=work.tokenizer,
        callbacks=[stopwatch],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    for read, pair in zip(trainer.train_dataset, pairs, strict=True):
        for name, ids in pair.items():
            assert read[f"{name}_ids"] == ids, "TRL made other tokens of the same text"
    return trainer, stopwatch


def time_trl(work: Workload, leaves: Leaves, compact: bool, updates: int, batch: int) -> dict:
    """Seconds of an update, and what TRL logs of its first."""
    trainer, stopwatch = make_trainer(work, leaves, batch, updates, compact)
    both = (trainer.model.model, trainer.ref_model.model)
    for model in both:
        model.pushed = 0
    trainer.train()
    tokens = sum(model.pushed for model in both) / updates
    log = trainer.state.log_history[0]
    names = {"grad_norm": "grad_norm", "chosen": "logps/chosen", "rejected": "logps/rejected"}
    log = {ours: log[theirs] for ours, theirs in names.items()}
    return medians(stopwatch.stamps) | {"tokens": tokens, "log": log}


def part_update(work: Workload) -> list[dict]:
    load_trl(work)
    lines = []
    for K in (1, 3):
        leaves = practice_pairs(work, K)
        ours = time_our_update(work, leaves)
        # The first and the last step are enough to choose a batch size by.
        few = []
        for item, own in zip(work.items, leaves):
            few.append([leaf for leaf in own if leaf[0] in (0, len(item.spans) - 1)])
        count = sum(map(len, leaves))
        # TRL takes the mean of its passes' means: all passes must be of one size.
        sizes = [size for size in (1, 2, 3, 4) if count % size == 0]
        measure = partial(time_trl, work, few, True, 1)
        batch = best(f"TRL, pairs a pass, K={K}", sizes, measure)
        for name, compact, updates, size in (
            ("patched", True, work.repetitions, batch),
            # Takes minutes, and is then steady.
            ("as shipped", False, 1, 1),
        ):
            peer = time_trl(work, leaves, compact, updates, size)
            # Log-probs and gradient norm of the first update.
            apart = max(abs(ours["log"][key] / peer["log"][key] - 1) for key in ours["log"])
            setting = f"{name}, {size} of {count} pairs a pass"
            line = compare(work, "step-DPO update vs TRL", K, ours, peer, setting)
            lines.append(line | {"apart": apart})
    return lines


def load_trl(work: Workload) -> None:
    """The first update loads code."""
    time_trl(work, [own[:1] for own in practice_pairs(work, 1)], True, 1, 1)


# ---------------------------------------------------------------------------- inspection


def inspect(work: Workload, model, K: int) -> list[list[list[list[int]]]]:
    generators = [torch.Generator().manual_seed(seed) for seed, _ in enumerate(work.items)]
    return practice(model, work.items, K, 1.0, work.new_tokens, {work.stop}, generators)


def time_our_inspection(work: Workload, K: int) -> dict:
    model = copy.deepcopy(work.model)
    inspect(work, model, K)
    return timed(partial(inspect, work, model, K), 3 * work.repetitions, model)


def generation(work: Workload, K: int, sampled: bool = True) -> GenerationConfig:
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
    return GenerationConfig(
        max_new_tokens=work.new_tokens,
        do_sample=sampled,
        num_return_sequences=K,
        eos_token_id=None if work.stop == NEVER else work.stop,
        pad_token_id=STOP,
        **sampling,
    )


@torch.no_grad()
def left_padded(model, states: list[list[int]], config: GenerationConfig, **more):
    """One call of generate -> [state, K] token ids."""
    width = max(map(len, states))
    ids = torch.tensor([[STOP] * (width - len(state)) + state for state in states])
    mask = torch.tensor([[0] * (width - len(state)) + [1] * len(state) for state in states])
    made = model.generate(ids, attention_mask=mask, generation_config=config, **more)
    return made[:, width:].tolist()


def generate(work: Workload, K: int, group: int) -> None:
    """`group` states a call."""
    states = work.states
    for first in range(0, len(states), group):
        left_padded(work.model, states[first : first + group], generation(work, K))


@torch.no_grad()
def generate_by_hand(work: Workload, K: int, _) -> None:
    """What a careful user can build around generate.

    One cache follows the trunk; each state decodes K rows on a copy of it.
    """
    for item in work.items:
        cache, read = DynamicCache(config=work.model.config), 0
        for start, _ in item.spans:
            new = torch.tensor([item.ids[read : start - 1]])
            work.model(new, past_key_values=cache, logits_to_keep=1)
            read = start - 1
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(K)
            states = [item.ids[:start]] * K
            left_padded(work.model, states, generation(work, 1), past_key_values=own)


def generate_batch(work: Workload, K: int, setting: tuple[int, int]) -> None:
    """transformers' continuous batching: pages shared between equal prefixes."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    (page, width), states, config = setting, work.states, generation(work, K)
    # It wants a stop token.
    config.eos_token_id = work.stop
    blocks = sum(len(state) // page + 2 + K * (work.new_tokens // page + 2) for state in states)
    paging = ContinuousBatchingConfig(
        num_blocks=blocks, page_size=page, max_batch_tokens=width, use_async_batching=False
    )
    made = work.model.generate_batch(
        states, generation_config=config, continuous_batching_config=paging
    )
    # It leaves its own attention behind.
    work.model.set_attn_implementation("sdpa")
    sizes = [len(answer.generated_tokens) for answer in made.values()]
    complete = work.stop != NEVER or set(sizes) == {work.new_tokens}
    assert len(sizes) == K * len(states) and complete, f"generate_batch returned {sizes}"


def part_inspect(work: Workload) -> list[dict]:
    whole = max(len(item.spans) for item in work.items)
    pages = [(16, 256), (16, 1024), (64, 512)]
    by_hand = "generate on a trunk cache copied by hand"
    peers = (
        ("left-padded generate", generate, [whole], "{} states a call"),
        ("left-padded generate", generate, [2, 4], "best batch: {} states"),
        ("generate per state", generate, [1], "one state a call"),
        ("generate_batch", generate_batch, pages, "(page, tokens a pass): {}"),
        (by_hand, generate_by_hand, [None], "K rows a call"),
    )
    lines = []
    for K in (1, 3):
        ours = time_our_inspection(work, K)
        for name, peer, settings, text in peers:
            setting = best(f"{name}, K={K}", settings, partial(peer, work, K))
            theirs = timed(partial(peer, work, K, setting), work.repetitions, work.model)
            figure = f"inspection vs {name}"
            lines.append(compare(work, figure, K, ours, theirs, text.format(setting)))
    return lines


# ---------------------------------------------------------------------------- episodes


class World:
    """A scripted environment: random observations, within 30% of the lengths."""

    def __init__(self, lengths: Lengths):
        self.lengths = lengths

    def script(self, task: str) -> list[str]:
        source, lengths = random.Random(task), self.lengths
        rest = lengths.trunk - lengths.first - lengths.steps * lengths.action
        sizes = [lengths.first] + [rest // (lengths.steps - 1)] * (lengths.steps - 1)
        observations = []
        for size in sizes:
            count = int(size * source.uniform(0.7, 1.3))
            words = random_words(source, count, MODEL["vocab_size"])
            observations.append("".join(f"w{word}" for word in words))
        return observations

    def max_steps(self, task: str) -> int:
        return self.lengths.steps

    def start(self, task: str):
        first, *rest = self.script(task)
        return Script(rest), first


class Script:
    """An episode; actions change nothing."""

    def __init__(self, rest: list[str]):
        self.rest = rest

    def step(self, action: str):
        done = not self.rest
        return "" if done else self.rest.pop(0), 0.0, done, {"valid": True}


def replay(work: Workload, world: World, tasks: list[str], keep: bool) -> list[list[list[int]]]:
    """The same episodes side by side with generate -> [task][turn] token ids.

    Every turn reads the whole history again; keep (one task) hands a cache from turn to turn.
    """
    config = generation(work, 1, sampled=False)
    more = {"past_key_values": DynamicCache(config=work.model.config)} if keep else {}
    scripts = [world.script(task) for task in tasks]
    histories = [prompt_ids(work.tokenizer, [], script[0]) for script in scripts]
    played: list[list[list[int]]] = [[] for _ in tasks]
    for turn in range(world.lengths.steps):
        for i, action in enumerate(left_padded(work.model, histories, config, **more)):
            played[i].append(action)
            if turn + 1 < world.lengths.steps:
                # No stop token was written: the turn is closed.
                observation = state_ids(work.tokenizer, scripts[i][turn + 1])
                histories[i] = histories[i] + action + [STOP] + observation
    return played


def part_episodes(work: Workload) -> list[dict]:
    world, tasks = World(work.lengths), [f"task {i}" for i in range(8)]
    # A logit of 0 never wins: greedy actions do not stop.
    work = replace(work, model=copy.deepcopy(work.model))
    work.model.lm_head.weight.data[STOP] = 0
    model, played, lines = copy.deepcopy(work.model), {}, []

    def play_ours():
        options = {"max_new_tokens": work.new_tokens}
        episodes = run_episodes(model, work.tokenizer, world, tasks, **options)
        played["ours"] = []
        for episode in episodes:
            played["ours"].append([step.ids for step in episode.steps])

    def play_peer(group: int, keep: bool):
        played["peer"] = []
        for first in range(0, len(tasks), group):
            played["peer"] += replay(work, world, tasks[first : first + group], keep)

    play_ours()
    ours = timed(play_ours, 3 * work.repetitions, model)
    for name, group, keep in (
        ("re-encoding the history each turn", len(tasks), False),
        ("re-encoding the history each turn", 1, False),
        ("generate with its own cache per turn", 1, True),
    ):
        peer = timed(partial(play_peer, group, keep), work.repetitions, work.model)
        same = "same tokens" if played["peer"] == played["ours"] else "TOKENS DIFFER"
        setting = f"{group} of {len(tasks)} episodes a call; {same}"
        lines.append(compare(work, f"episodes vs {name}", 1, ours, peer, setting))
    return lines


# ---------------------------------------------------------------------------- memory


def part_memory(work: Workload) -> list[dict]:
    """Peak memory of an update above what is loaded, in MiB."""
    load_trl(work)
    lines = []
    for checkpointing in (False, True):
        ours = {}
        for K in (1, 3):
            model = copy.deepcopy(work.model)
            if checkpointing:
                model.train().gradient_checkpointing_enable({"use_reentrant": False})
            leaves, optimizer = random_leaves(work.lengths, K), make_optimizer(model)
            ours[K] = peak_memory(partial(our_update, model, work.items, leaves, optimizer))
        for compact, batch in ((False, 1), (True, 1), (True, 3)):
            # TRL's peak is its longest pass, whatever K: the last two states do.
            leaves = [random_leaves(work.lengths, 3)[0][-6:]]
            trainer, _ = make_trainer(work, leaves, batch, 1, compact, checkpointing)
            peer = peak_memory(trainer.train)
            setting = f"{'patched' if compact else 'as shipped'}, {batch} a pass"
            setting += ", gradient checkpointing in both" if checkpointing else ""
            for K, mine in ours.items():
                line = {"shape": work.shape, "K": K, "setting": setting}
                lines.append(line | {"ours": mine, "peer": peer})
            say(f"  {setting}: {peer:.0f} MiB; ours {ours[1]:.0f} at K=1, {ours[3]:.0f} at K=3")
    return lines


def peak_memory(update: Callable) -> float:
    gc.collect()
    # What is free goes back to the system; then the peak starts again.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    loaded = resident("VmRSS")
    update()
    return resident("VmHWM") - loaded


def resident(name: str) -> float:
    """A figure of /proc, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


# ---------------------------------------------------------------------------- report

PARTS = {
    "update": part_update,
    "inspect": part_inspect,
    "episodes": part_episodes,
    "memory": part_memory,
}
SETTINGS = """\
{cpu}, one thread; torch {torch}, transformers {transformers}, trl {trl}. Seconds are CPU time, a
peer's the median of {repetitions}, ours of three times as many; TRL as shipped is measured once.
Reference: a Llama of 2 layers, width 256, 8 heads, 2 KV heads, vocabulary 8192, float32, random
weights; one trajectory of 3000 tokens, 14 steps, first state at 1000, 40-token actions. Deep: the
same with 12 layers. Trained: models/tiny-household after SFT, on 16 demonstrations that it has not
seen. Off CUDA, TRL as shipped runs its output head at every position; patched, at scored ones
only, as on CUDA. Results: log-probs and gradient norm of the first update, relative."""


def lines_of(data: dict, part: str) -> list[dict]:
    """Of all shapes."""
    return [line for lines in data["parts"].get(part, {}).values() for line in lines]


def whole_iterations(data: dict) -> list[dict]:
    """Inspection by the fastest stock way to generate, then an update."""
    lines = []
    for update in lines_of(data, "update"):
        stock = []
        for line in lines_of(data, "inspect"):
            same = line["shape"] == update["shape"] and line["K"] == update["K"]
            if same and "by hand" not in line["figure"]:
                stock.append(line)
        if stock:
            fastest = min(stock, key=lambda line: line["peer"]["cpu"])
            name = fastest["figure"].removeprefix("inspection vs ")
            line = {"figure": "whole iteration", "setting": f"{name}, TRL {update['setting']}"}
            for side in ("ours", "peer"):
                both = (fastest[side], update[side])
                line[side] = {key: both[0][key] + both[1][key] for key in ("cpu", "wall", "tokens")}
            lines.append({"shape": update["shape"], "K": update["K"]} | line)
    return lines


def table(head: str, rows: list[list]) -> list[str]:
    """Markdown, with a blank line before; nothing for no rows."""
    if not rows:
        return []
    lines = ["", f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return lines + ["| " + " | ".join(map(str, cells)) + " |" for cells in rows]


def report(data: dict) -> str:
    repetitions = ", ".join(f"{n} ({shape})" for shape, n in data["repetitions"].items())
    lines = [SETTINGS.format(repetitions=repetitions, **data["machine"])]
    if data["quick"]:
        lines.insert(0, "Short trajectories, one repetition: a test of this script, no result.\n")
    speed = lines_of(data, "update") + lines_of(data, "inspect")
    speed += whole_iterations(data) + lines_of(data, "episodes")
    rows = []
    for line in sorted(speed, key=lambda line: SHAPES.index(line["shape"])):
        ours, peer = line["ours"], line["peer"]
        cells = [line["shape"], line["figure"], line["K"]]
        cells += [f"{ours['cpu']:.3f}", f"{peer['cpu']:.3f}", f"{peer['cpu'] / ours['cpu']:.2f}x"]
        cells += [f"{peer['wall'] / ours['wall']:.2f}x", f"{peer['tokens'] / ours['tokens']:.1f}"]
        apart = f"{line['apart']:.0e}" if "apart" in line else ""
        rows.append([*cells, apart, line["setting"]])
    head = "shape | figure | K | ours, s | peer, s | speed-up, CPU | wall | token ratio"
    lines += table(f"{head} | results differ by | peer's setting", rows)
    rows = []
    for line in lines_of(data, "memory"):
        ours, peer = line["ours"], line["peer"]
        sizes = [f"{ours:.0f}", f"{peer:.0f}", f"{ours / peer:.2f}"]
        rows.append([line["shape"], line["K"], *sizes, line["setting"]])
    head = "shape | K | peak memory of an update above what is loaded: ours, MiB | TRL, MiB"
    lines += table(f"{head} | ours / TRL | TRL's setting", rows)
    return "\n".join(lines) + "\n"


def machine() -> dict:
    names = ("torch", "transformers", "trl", "accelerate", "datasets", "matplotlib")
    try:
        found = {name: version(name) for name in names}
    except PackageNotFoundError as error:
        files = "-r requirements.txt -r experiments/requirements.txt"
        sys.exit(f"error: {error.name} is missing; pip install {files}")
    cpus = Path("/proc/cpuinfo").read_text().split("model name")[1:] or [": unknown CPU"]
    return found | {"cpu": cpus[0].split(":")[1].splitlines()[0].strip()}


def begin(file: Path, parts: list[str]) -> dict:
    """What the file holds; these parts are to be measured now."""
    new = {"machine": machine(), "parts": {}, "repetitions": {}}
    table = file.with_suffix(".md")
    if table.exists() and not file.exists() and set(parts) != set(PARTS):
        sys.exit(f"error: {table} would lose its other parts; measure all, or give --out")
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else new
    if data["machine"] == new["machine"]:
        return data
    # A table is of one machine and one set of versions.
    if set(data["parts"]) - set(parts):
        sys.exit(f"error: {file} is of another machine or other versions; measure all parts")
    return new


def print_ours(works: list[Workload], parts: list[str]) -> None:
    """Our own CPU seconds, to compare two checkouts; nothing is kept."""
    for work in works:
        for K in (1, 3):
            measured = {}
            if "update" in parts:
                measured["update"] = time_our_update(work, practice_pairs(work, K))
            if "inspect" in parts:
                measured["inspect"] = time_our_inspection(work, K)
            for part, figures in measured.items():
                least, median = min(figures["all_cpu"]), figures["cpu"]
                print(f"{work.shape} {part} K={K}: median {median:.4f} s, least {least:.4f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=SHAPES, help="shapes")
    parser.add_argument("--ours", action="store_true", help="print our own seconds, no peers")
    parser.add_argument("--quick", action="store_true", help="short trajectories, 1 repetition")
    parser.add_argument("--repetitions", type=int, default=3, help="of a peer (default: 3)")
    parser.add_argument("--out", help="folder of bench.md (default: experiments/results)")
    options = parser.parse_args()
    if options.repetitions < 1:
        parser.error(f"--repetitions is {options.repetitions}; give at least 1")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if sys.platform != "linux":
        sys.exit("error: memory is read from /proc; run this on Linux")
    works = []
    for shape in options.shape:
        make = trained_workload if shape == "trained" else partial(random_workload, shape)
        works.append(make(options.quick, 1 if options.quick else options.repetitions))
    if options.ours:
        print_ours(works, options.only)
    else:
        measure(works, options)


def measure(works: list[Workload], options: argparse.Namespace) -> None:
    results = "runs/bench-quick" if options.quick else "experiments/results"
    out = Path(options.out or ROOT / results)
    data = begin(out / "bench.json", options.only) | {"quick": options.quick}
    for part in options.only:
        for work in works:
            # Episodes and memory want random weights.
            if part in ("update", "inspect") or work.lengths:
                say(f"{part}, {work.shape}")
                data["parts"].setdefault(part, {})[work.shape] = PARTS[part](work)
                data["repetitions"][work.shape] = work.repetitions
                # Part by part: nothing measured is lost.
                write_text(out / "bench.json", json.dumps(data, indent=1) + "\n")
    write_text(out / "bench.md", report(data))
    print("\n" + report(data))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the parts that were finished are kept")
