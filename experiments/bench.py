"""Trunk and leaves beside named peers: TRL's DPOTrainer, and the `generate` and `generate_batch` of transformers. One thread, the same
weights and data, each peer at the best setting found here, medians of CPU and wall seconds.

    pip install -r requirements.txt -r experiments/requirements.txt
    python experiments/bench.py                       # everything: tables in experiments/results/bench.md, figures in bench.json
    python experiments/bench.py --only dpo inspect    # some parts; what the other parts measured stays in bench.json
    python experiments/bench.py --only trained        # the main job's policy after SFT, which is trained first, into runs/bench-sft
    python experiments/bench.py --quick               # small shapes, one repetition, into runs/bench-quick: does it run at all?

A speed-up is the peer's seconds over ours. The token ratio beside it is what the peer pushes through its models over what we push, padding
included, counted by a hook; a speed-up beyond it is faster kernels or less overhead, one below it is overhead of ours.
"""
from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import itertools
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
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
               "TOKENIZERS_PARALLELISM": "false"}                                      # before torch is loaded
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,  # noqa: E402
                          TrainerCallback)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import naive  # noqa: E402  (tests/naive.py: one forward pass per prefix)
from losses import dpo_loss  # noqa: E402
from envs import load_trajectories  # noqa: E402
from model import read_policy, read_tokenizer  # noqa: E402
from rollout import Encoded, encode, practice, prompt_ids, run_episodes, score, state_ids, stop_ids  # noqa: E402

VOCAB, STOP, SPECIAL, LR, BETA = 8192, 0, ["<|end|>", "<|user|>", "<|assistant|>"], 5e-7, 0.1
MODEL = dict(vocab_size=VOCAB, hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
             max_position_embeddings=32768)


@dataclass(frozen=True)
class Shape:
    """A trajectory in tokens: `first` before the first action, `turns` actions of `action` tokens (stop token included), `trunk` in
    all; observations fill the rest evenly."""
    trunk: int = 3000
    first: int = 1000
    turns: int = 14
    action: int = 40


REFERENCE, SMALL = Shape(), Shape(360, 120, 4, 12)

# Turns: the paper's Table 1, rounded. Tokens: SmolLM2's tokenizer on the benchmarks' own files, with the chat template (9 a turn) and the
# stop token. Where data hold bare actions, a thought is 27 tokens, the mean of FireAct's 500 HotpotQA trajectories. A first state is 200
# tokens of instruction (our ScienceWorld and household: 303, 198), one worked example of as many turns, and the task. Observations:
# WebShop 682 for a page of results and 162 for a product (1,000 products in its text format), three products a search; ScienceWorld:
# 40 trajectories of our expert, measured whole; ALFWorld: 120 games of its train split; HotpotQA, 2Wiki, MuSiQue: one paragraph a search
# (129, 89, 118). Mind2Web was not at hand: WebShop's lengths stand in.
BENCHMARKS = {name: Shape(first + turns * action + (turns - 1) * observation, first, turns, action)
              for name, turns, first, observation, action in (
                  ("WebShop", 5, 1970, 301, 41), ("Mind2Web", 7, 2650, 301, 41), ("ScienceWorld", 14, 878, 37, 32),
                  ("ALFWorld", 10, 1030, 27, 37), ("HotpotQA", 7, 1480, 138, 41), ("2WikiMultihopQA", 8, 1330, 98, 41),
                  ("MuSiQue", 8, 1560, 127, 41))}


# ------------------------------------------------------------------------------------------------------------- weights and data

def make_model(shape: dict = MODEL) -> LlamaForCausalLM:
    """Fixed random float32 weights, scaled by width so that next-token distributions are not flat. model.model.pushed counts tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=shape["hidden_size"] ** -0.5, bos_token_id=None, eos_token_id=None,
                                         pad_token_id=STOP, attn_implementation="sdpa")).eval()
    return counted(model)


def counted(model):
    model.generation_config, model.model.pushed = GenerationConfig(pad_token_id=STOP), 0
    model.model.register_forward_pre_hook(_count, with_kwargs=True)
    return model


def _count(module, args, kwargs) -> None:
    module.pushed += (args[0] if args else kwargs["input_ids"]).numel()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token: for peers that want text, and nothing merges where state and action meet."""
    words = SPECIAL + ["x"] + [f"w{i}" for i in range(4, VOCAB)]                       # "x": rollout.py's stand-in for any action
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="x"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[0], pad_token=SPECIAL[0],
                                        additional_special_tokens=SPECIAL[1:])
    tokenizer.chat_template = ("{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content }}{% if m.role == 'assistant' %} <|end|>"
                               "{% endif %}{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    return tokenizer


def make_data(shape: Shape, k: int, vocab: int = VOCAB) -> tuple[Encoded, list[tuple[int, list[int]]]]:
    """An expert trajectory of random tokens, and k practice actions of the same length for each step."""
    rng = random.Random(0)
    gap = (shape.trunk - shape.action - shape.first) / max(1, shape.turns - 1)
    assert gap >= shape.action, f"actions overlap in {shape}"
    words = lambda n: [rng.randrange(4, vocab) for _ in range(n)]
    ids, spans = words(shape.trunk), [(s, s + shape.action) for s in (shape.first + round(i * gap) for i in range(shape.turns))]
    for _, end in spans:
        ids[end - 1] = STOP
    return Encoded(ids, spans, "bench"), [(i, words(shape.action - 1) + [STOP]) for i in range(shape.turns) for _ in range(k)]


# ------------------------------------------------------------------------------------------------------------------- measuring

def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def timed(work: Callable, repetitions: int, model=None) -> dict:
    """Median CPU and wall seconds of work(), and the tokens that it pushes through `model`."""
    gaps, before = [], model.model.pushed if model else 0
    for _ in range(repetitions):
        gc.collect()
        a = now()
        work()
        gaps.append([y - x for x, y in zip(a, now())])
    return medians(gaps) | {"tokens": (model.model.pushed - before) / repetitions if model else 0}


def medians(gaps: list) -> dict:
    return {"cpu": statistics.median(g[0] for g in gaps), "wall": statistics.median(g[1] for g in gaps), "all_cpu": [g[0] for g in gaps]}


def best(name: str, candidates: list, measure: Callable):
    """The candidate that takes least CPU time, in one try each."""
    tried = [measure(c)["cpu"] for c in candidates] if len(candidates) > 1 else [0]
    if len(candidates) > 1:
        say(f"  {name}: " + ", ".join(f"{c}: {s:.2f} s" for c, s in zip(candidates, tried)))
    return candidates[tried.index(min(tried))]


def row(figure: str, ours: dict, peer: dict, setting: str, goal: float | None = None, said: bool = True, **more) -> dict:
    """One line of the table; speed-ups and token ratio are peer over ours."""
    ratio = {key: peer[key] / ours[key] for key in ("cpu", "wall", "tokens")}
    if said:
        say(f"  {figure}: {ratio['cpu']:.1f}x CPU, {ratio['wall']:.1f}x wall, tokens {ratio['tokens']:.1f}x ({setting})")
    return {"figure": figure, **ratio, "goal": goal, "setting": setting, "ours": ours, "peer": peer, **more}


def scaled(figures: dict, by: float) -> dict:
    return {key: x * by for key, x in figures.items() if key in ("cpu", "wall", "tokens")}


# ------------------------------------------------------------------------------------------------ one step-DPO update, and TRL's

def our_update(model, items: list[Encoded], leaves: list[list], optimizer=None, reference=None) -> dict:
    """As in stepagent.py: reference log-probs (unless given) in one pass, forward, loss, backward, clipping, AdamW."""
    first = itertools.accumulate([len(item.spans) for item in items], initial=0)
    steps = [n + step for n, own in zip(first, leaves) for step, _ in own]
    if reference is None:
        with torch.no_grad():
            reference = score(model, items, leaves)
    scores = score(model, items, leaves)
    loss, info = dpo_loss(scores.trunk[steps], scores.leaves, reference.trunk[steps], reference.leaves, BETA)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if optimizer:
        optimizer.step()
    model.zero_grad()
    return {"grad_norm": norm.item(), "chosen": info["logp_chosen"].item(), "rejected": info["logp_rejected"].item()}


def time_ours(weights, items: list[Encoded], leaves: list[list], repetitions: int) -> dict:
    """An update with reference; `given`: with the reference known; `backward`: scoring and backward pass alone."""
    model = copy.deepcopy(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    log = our_update(model, items, leaves, optimizer)                                  # also the warm-up
    with torch.no_grad():
        known = score(model, items, leaves)
    run = lambda *more: timed(lambda: our_update(model, items, leaves, *more), repetitions, model)
    return run(optimizer) | {"given": run(optimizer, known), "backward": run(None, known), "log": log}


class Stopwatch(TrainerCallback):
    """CPU and wall clock at the start of training and after every update."""
    def __init__(self):
        self.stamps = []

    def on_train_begin(self, *_, **__):
        self.stamps.append(now())

    on_step_end = on_train_begin


def make_trl(model, items: list[Encoded], leaves: list[list], batch: int, updates: int = 1, compact: bool = True,
             checkpointing: bool = False, tokenizer=None):
    """-> trainer, stopwatch. All pairs make one update, `batch` at a time, those of one state side by side, so that little is padded.
    compact: off CUDA, TRL 1.16 runs the output head at every position; compact makes it take CUDA's way, scored positions only."""
    import datasets
    import trl
    from trl.trainer import utils
    datasets.disable_progress_bars()
    for name in ("transformers", "datasets", "trl", "accelerate"):
        logging.getLogger(name).setLevel("ERROR")
    utils._use_triton = lambda device: compact                                         # all that this module asks it for
    text = as_text if tokenizer else lambda words, ids: " " + as_text(words, ids)       # between words stands a space
    tokenizer = tokenizer or make_tokenizer()
    asked = [(item.ids[:item.spans[i][0]], item.ids[slice(*item.spans[i])], leaf) for item, own in zip(items, leaves) for i, leaf in own]
    pairs = [dict(zip(("prompt", "chosen", "rejected"), (text(tokenizer, ids) for ids in one))) for one in asked]
    config = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, gradient_accumulation_steps=-(-len(pairs) // batch),
        max_steps=updates, learning_rate=LR, beta=BETA, weight_decay=0.0, lr_scheduler_type="constant", max_grad_norm=1.0, max_length=None,
        bf16=False, gradient_checkpointing=checkpointing, train_sampling_strategy="sequential", use_cpu=True, dataloader_pin_memory=False,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True)
    watch = Stopwatch()
    trainer = trl.DPOTrainer(model, copy.deepcopy(model), config, train_dataset=datasets.Dataset.from_list(pairs),
                             processing_class=tokenizer, callbacks=[watch])
    trainer.remove_callback(transformers.PrinterCallback)
    for one, ids in zip(trainer.train_dataset, asked, strict=True):                    # the same tokens on both sides, or no comparison
        assert (one["prompt_ids"], one["chosen_ids"], one["rejected_ids"]) == ids, "TRL made other tokens of the same text"
    return trainer, watch


def as_text(tokenizer, ids: list[int]) -> str:
    return tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids))


def time_trl(weights, items: list[Encoded], leaves: list[list], batch: int, updates: int = 1, compact: bool = True, tokenizer=None) -> dict:
    """Median seconds of an update; `given`: less what the reference model's forward passes took."""
    trainer, watch = make_trl(copy.deepcopy(weights), items, leaves, batch, updates, compact, tokenizer=tokenizer)
    model, reference, stamps = trainer.model, trainer.ref_model, []
    reference.register_forward_pre_hook(lambda *_: stamps.append(now()))
    reference.register_forward_hook(lambda *_: stamps.append(now()))
    model.model.pushed = reference.model.pushed = 0
    trainer.train()
    spent = [sum(b[i] - a[i] for a, b in zip(stamps[::2], stamps[1::2])) / updates for i in (0, 1)]
    figures = medians([[y - x for x, y in zip(a, b)] for a, b in zip(watch.stamps, watch.stamps[1:])])
    log = trainer.state.log_history[0]
    return figures | {"tokens": (model.model.pushed + reference.model.pushed) / updates,
                      "given": {"cpu": figures["cpu"] - spent[0], "wall": figures["wall"] - spent[1],
                                "tokens": model.model.pushed / updates},
                      "log": {"grad_norm": log["grad_norm"], "chosen": log["logps/chosen"], "rejected": log["logps/rejected"]}}


def part_dpo(o) -> list[dict]:
    weights, rows = make_model(), []
    time_trl(weights, *[[x] for x in make_data(SMALL, 1)], 1)                          # loads its code
    for k, goal in ((1, 35), (3, 70)):
        encoded, leaves = make_data(o.shape, k)
        fewer, item = [pair for pair in leaves if pair[0] % k == 0], [encoded]         # enough to choose a batch size by
        size = best(f"TRL, pairs a pass, K={k}", [1] if o.quick else [1, 2] if k == 1 else [1, 3],
                    lambda b: time_trl(weights, item, [fewer], b))
        ours, peer = time_ours(weights, item, [leaves], 3 * o.repetitions), time_trl(weights, item, [leaves], size, o.repetitions)
        if k == 1:
            shipped = time_trl(weights, item, [leaves], 1, o.repetitions, compact=False)
        name, setting = f"step-DPO update vs TRL DPOTrainer, K={k}", f"{size} pair{'s' * (size > 1)} a pass"
        rows += [row(name, ours, scaled(shipped, k), "as shipped, 1 pair a pass" + f"; {k} x its K=1, of the same passes" * (k > 1), goal),
                 row(name, ours, peer, f"patched, {setting}", k=k, batch=size),
                 row(f"{name}, reference known", ours["given"], peer["given"], f"patched, {setting}")]
    return rows


# -------------------------------------------------------------------------------------------------------- inspection, and its peers

def generation(k: int, new: int, sampled: bool, stop: int | None = None) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, do_sample=sampled, num_return_sequences=k, eos_token_id=stop, pad_token_id=STOP,
                            **(dict(temperature=1.0, top_k=0, top_p=1.0) if sampled else {}))


def inspect(model, encoded: Encoded, k: int, new: int, temperature: float = 1.0) -> list[list[list[int]]]:
    """Ours. No token stops an action (there is no -1), so every one has `new` tokens, as the peers'."""
    return practice(model, [encoded], k, temperature, new, {-1}, torch.Generator().manual_seed(0))[0]


@torch.no_grad()
def generate(model, states: list[list[int]], k: int, new: int, group: int, sampled: bool = True, stop: int | None = None) -> list[list[int]]:
    """`generate` over `group` states at a time, left-padded, k actions each; group 1: one call per state."""
    out = []
    for i in range(0, len(states), group):
        some = states[i:i + group]
        width = max(map(len, some))
        ids = torch.tensor([[STOP] * (width - len(s)) + s for s in some])
        mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in some])
        out += model.generate(ids, attention_mask=mask, generation_config=generation(k, new, sampled, stop))[:, width:].tolist()
    return out


@torch.no_grad()
def generate_by_hand(model, encoded: Encoded, k: int, new: int) -> None:
    """What a careful user can build around `generate`: one cache follows the trunk, each state decodes k rows on a copy of it."""
    cache, read = DynamicCache(config=model.config), 0
    for start, _ in encoded.spans:
        model(torch.tensor([encoded.ids[read:start - 1]]), past_key_values=cache, logits_to_keep=1)
        own, read, ids = copy.deepcopy(cache), start - 1, torch.tensor([encoded.ids[:start]] * k)
        own.batch_repeat_interleave(k)
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=own, generation_config=generation(1, new, True))


def generate_batch(model, states: list[list[int]], k: int, new: int, page: int, width: int, stop: int = -1) -> None:
    """transformers' continuous batching: pages of `page` tokens, shared between equal prefixes, `width` tokens a pass."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    blocks = sum(len(s) // page + 2 + k * (new // page + 2) for s in states)
    paging = ContinuousBatchingConfig(num_blocks=blocks, page_size=page, max_batch_tokens=width, use_async_batching=False)
    config = generation(k, new, True, stop)                                            # it wants one; -1 never occurs
    out = [len(x.generated_tokens) for x in
           model.generate_batch(states, generation_config=config, continuous_batching_config=paging).values()]
    if len(out) != k * len(states) or stop < 0 and set(out) != {new}:
        raise RuntimeError(f"generate_batch returned {len(out)} answers of {sorted(set(out))} tokens")


def part_inspect(o) -> list[dict]:
    model, rows, new = make_model(), [], o.shape.action
    tree = copy.deepcopy(model)
    for k, padded, each, paged in ((1, 22, 8, 12), (3, 55, 16, 35)):
        encoded, _ = make_data(o.shape, k)
        states = [encoded.ids[:start] for start, _ in encoded.spans]
        inspect(tree, encoded, k, new)
        ours = timed(lambda: inspect(tree, encoded, k, new), 3 * o.repetitions, tree)
        for group, goal, name in ((len(states), padded, "left-padded generate"), (2, None, "left-padded generate, smallest batch"),
                                  (1, each, "generate per state")):                    # sizes between fall between
            peer = timed(lambda: generate(model, states, k, new, group), o.repetitions, model)
            rows.append(row(f"inspection vs {name}, K={k}", ours, peer, f"{group} states x K={k} a call", goal, k=k, stock=True))
        run = lambda setting, times=1: timed(lambda: generate_batch(model, states, k, new, *setting), times, model)
        try:
            setting = best(f"generate_batch, (page, tokens a pass), K={k}", [(16, 256)] if o.quick else [(16, 256), (64, 512)], run)
            rows.append(row(f"inspection vs generate_batch, K={k}", ours, run(setting, o.repetitions),
                            "page {}, {} tokens a pass".format(*setting), paged, k=k, stock=True))
        except Exception as error:                                                     # young, with many ways to fail: the rest goes on
            say(f"  generate_batch failed: {error!r}")
        model.set_attn_implementation("sdpa")                                          # generate_batch leaves its own behind
        peer = timed(lambda: generate_by_hand(model, encoded, k, new), o.repetitions, model)
        rows.append(row(f"inspection vs generate on a trunk cache copied by hand, K={k}", ours, peer, f"K={k} rows a call"))
    return rows


# ---------------------------------------------------------------------------------------------------------- episodes, and their peers

class World:
    """A scripted environment: every task has its own random observations, lengths within 30% of the shape's; actions change nothing."""
    def __init__(self, shape: Shape):
        self.shape = shape

    def script(self, task: str) -> list[str]:
        rng, s = random.Random(task), self.shape
        between = (s.trunk - s.first - s.turns * s.action) // (s.turns - 1)
        lengths = [int(n * rng.uniform(0.7, 1.3)) for n in [s.first] + [between] * (s.turns - 1)]
        return [" ".join(f"w{rng.randrange(4, VOCAB)}" for _ in range(n)) for n in lengths]

    def max_steps(self, task: str) -> int:
        return self.shape.turns

    def start(self, task: str):
        first, *rest = self.script(task)
        return Script(rest), first


class Script:
    def __init__(self, rest: list[str]):
        self.rest = rest

    def step(self, action: str):
        return (self.rest.pop(0), 0.0, False, {"valid": True}) if self.rest else ("", 0.0, True, {"valid": True})


@torch.no_grad()
def replay(model, tokenizer, world: World, tasks: list[str], group: int, keep: bool) -> list[list[list[int]]]:
    """The same episodes with `generate`, `group` at a time: every turn reads the whole history again, or (keep, one episode at a time) a
    DynamicCache is handed from turn to turn. -> [task][turn] action ids"""
    played = []
    for i in range(0, len(tasks), group):
        scripts, cache = [world.script(task) for task in tasks[i:i + group]], DynamicCache(config=model.config)
        histories = [prompt_ids(tokenizer, [], script[0]) for script in scripts]
        actions: list = [[] for _ in scripts]
        for turn in range(world.shape.turns):
            if keep:
                ids = torch.tensor(histories)
                got = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
                                     generation_config=generation(1, world.shape.action, False))[:, ids.shape[1]:].tolist()
            else:
                got = generate(model, histories, 1, world.shape.action, group, sampled=False)
            for j, action in enumerate(got):
                actions[j].append(action)
                if turn + 1 < world.shape.turns:                                       # no stop token was written: the turn is closed
                    histories[j] = histories[j] + action + [STOP] + state_ids(tokenizer, scripts[j][turn + 1])
        played += actions
    return played


def part_episodes(o) -> list[dict]:
    model, tokenizer, world, rows = make_model(), make_tokenizer(), World(o.shape), []
    tasks = [f"task {i}" for i in range(2 if o.quick else 8)]
    with torch.no_grad():
        model.lm_head.weight[STOP] = 0                                                 # a logit of 0 never wins: greedy does not stop
    tree, last = copy.deepcopy(model), {}
    play = lambda: last.update(ours=run_episodes(tree, tokenizer, world, tasks, max_new_tokens=o.shape.action))
    play()
    ours = timed(play, 3 * o.repetitions, tree)
    for name, group, keep, goal in (("re-encoding the history each turn", len(tasks), False, 5),
                                    ("re-encoding the history each turn", 1, False, 5), ("generate with its own cache per turn", 1, True, 2)):
        peer = timed(lambda: last.update(peer=replay(model, tokenizer, world, tasks, group, keep)), o.repetitions, model)
        same = last["peer"] == [[step.ids for step in t.steps] for t in last["ours"]]
        setting = f"{group} of {len(tasks)} episodes a call; {'same tokens' if same else 'TOKENS DIFFER'}"
        rows.append(row(f"episodes vs {name}", ours, peer, setting, goal))
    return rows


# --------------------------------------------------------------------------------------------------------------- memory, exactness

def part_memory(o) -> list[dict]:
    """Peak resident memory of one update above what is loaded, in MiB, each in a process of its own. TRL's does not depend on K."""
    fastest, rows = next((r["batch"] for r in o.parts.get("dpo", []) if r.get("k") == 3), 1), []
    for checkpointing in (False, True):
        ask = lambda k, batch, compact: child(dict(k=k, batch=batch, compact=compact, checkpointing=checkpointing, shape=vars(o.shape)))
        ours = {k: ask(k, 0, True) for k in (1, 3)}
        for batch, compact in dict.fromkeys([(1, False), (1, True), (fastest, True), (3, True)]):
            peer = ask(3, batch, compact)
            setting = f"TRL {'patched' if compact else 'as shipped'}, {batch} pair{'s' * (batch > 1)} a pass"
            setting += ", gradient checkpointing in both" * checkpointing
            rows += [{"setting": f"{setting}, K={k}", "ours": mine, "peer": peer, "goal": 0.2} for k, mine in ours.items()]
            say(f"  {setting}: TRL {peer:.0f} MiB, ours {ours[1]:.0f} at K=1, {ours[3]:.0f} at K=3")
    return rows


def child(ask: dict) -> float:
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(ask)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: memory of {ask}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def measure_memory(ask: dict) -> float:
    """In the child. A small update loads all code; then the peak mark is reset and the real one runs."""
    def ready(shape: Shape, k: int) -> Callable:
        model, (encoded, leaves) = make_model(), make_data(shape, k)
        if ask["batch"]:                                                               # TRL's peak is its longest pass: two states do
            return make_trl(model, [encoded], [leaves[-2 * k:]], ask["batch"], 1, ask["compact"], ask["checkpointing"])[0].train
        if ask["checkpointing"]:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=LR, weight_decay=0.0)
        return lambda: our_update(model, [encoded], [leaves], optimizer)
    status = lambda key: next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)) / 1024
    ready(SMALL, 1)()
    work = ready(Shape(**ask["shape"]), ask["k"])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)                                                   # what is free goes back to the system first
    Path("/proc/self/clear_refs").write_text("5")                                      # VmHWM starts again from here
    loaded = status("VmRSS:")
    work()
    return status("VmHWM:") - loaded


def part_exact(o) -> list[dict]:
    """Float32, ours against one forward pass per prefix: largest difference over largest value; greedy tokens against generate's."""
    plain = make_model()
    tree, (encoded, leaves) = copy.deepcopy(plain), make_data(o.shape, 1)
    scores = score(tree, [encoded], [leaves])
    ours, theirs = torch.cat([scores.trunk, scores.leaves]), []
    weight = torch.linspace(-1, 1, len(ours))                                          # gradients of some function of all log-probs
    (weight * ours).sum().backward()
    for (state, action), w in zip(naive.expert_pairs([encoded]) + naive.leaf_pairs([encoded], [leaves]), weight):
        theirs.append(naive.token_logps(plain, state, action).sum())
        (w * theirs[-1]).backward()                                                    # one graph at a time
    apart = lambda a, b: ((a - b).abs().max() / b.abs().max()).item()
    greedy = generate(plain, [encoded.ids[:s] for s, _ in encoded.spans], 1, o.shape.action, 1, sampled=False)
    mine = [action for step in inspect(tree, encoded, 1, o.shape.action, temperature=0.0) for action in step]
    grad = max(apart(a.grad, b.grad) for a, b in zip(tree.parameters(), plain.parameters()))
    made = {"logp": apart(ours, torch.stack(theirs)), "grad": grad,
            "greedy": f"{sum(a == b for a, b in zip(mine, greedy))} of {len(mine)} actions identical", "goal": 1e-5}
    say(f"  {made}")
    return [made]


# ------------------------------------------------------------------------------------------------------ a policy that has been through SFT

def part_trained(o) -> list[dict]:
    """The main job's policy after SFT, on demonstrations that it has not seen: most of its practice repeats the expert, and a leaf begins
    where it does not. Actions end with their stop token; an update takes the pairs that differ."""
    folder, few = f"runs/bench-sft{'-quick' * o.quick}", "--experts 60 --sft-experts 40 --practice-experts 20 --sft-epochs 1".split()
    done = subprocess.run([sys.executable, "stepagent.py", "--model", "models/tiny-household", "--method", "sft", "--eval-each", "",
                           "--eval-splits", "", "--out", folder, *few * o.quick], cwd=ROOT)            # nothing to do the second time
    if done.returncode:
        sys.exit(done.returncode)
    folder = ROOT / folder
    tokenizer, n, k, new = read_tokenizer(folder / "policy"), 2 if o.quick else 16, 3, 48
    model = counted(read_policy(folder / "policy").eval())
    items = [encode(t, tokenizer) for t in load_trajectories(folder / "experts.jsonl")[-n:]]          # SFT takes the first
    assert stop_ids(tokenizer) == {STOP}
    states, tree = [item.ids[:start] for item in items for start, _ in item.spans], copy.deepcopy(model)
    gens = lambda: [torch.Generator().manual_seed(j) for j in range(n)]
    inspect_all = lambda: practice(tree, items, k, 1.0, new, {STOP}, gens())
    drawn = inspect_all()
    ours, rows = timed(inspect_all, 3 * o.repetitions, tree), []
    for name, sizes in (("generate per state", [1]), ("left-padded generate", [2, 4, 16])):
        run = lambda group, times=1: timed(lambda: generate(model, states, k, new, group, stop=STOP), times, model)
        size = best(f"{name}, states a call", sizes[:1] if o.quick else sizes, run)
        rows.append(row(f"inspection vs {name}", ours, run(size, o.repetitions), f"{size} states x K={k} a call"))
    run = lambda setting, times=1: timed(lambda: generate_batch(model, states, k, new, *setting, STOP), times, model)
    try:
        setting = best("generate_batch, (page, tokens a pass)", [(16, 256)] if o.quick else [(16, 256), (16, 1024), (64, 512)], run)
        rows.append(row("inspection vs generate_batch", ours, run(setting, o.repetitions), "page {}, {} tokens a pass".format(*setting)))
    except Exception as error:
        say(f"  generate_batch failed: {error!r}")
    model.set_attn_implementation("sdpa")
    fastest = min(rows, key=lambda r: r["peer"]["cpu"])

    differs = lambda item, i, leaf: leaf != item.ids[slice(*item.spans[i])]
    again = lambda ids: ids[-1] == STOP and tokenizer(as_text(tokenizer, ids), add_special_tokens=False).input_ids == ids      # TRL reads text
    pairs = [[(i, leaf) for i, of_step in enumerate(steps) for leaf in of_step if differs(item, i, leaf)] for item, steps in zip(items, drawn)]
    count, pairs = sum(map(len, pairs)), [[pair for pair in own if again(pair[1])] for own in pairs]
    used = sum(map(len, pairs))
    say(f"  {n} trajectories, {len(states)} states; {count} of {k * len(states)} practice actions differ, TRL can read {used}")
    size = best("TRL, pairs a pass", [2] if o.quick else [1, 2, 4, 16], lambda b: time_trl(model, items, pairs, b, tokenizer=tokenizer))
    mine, peer = time_ours(tree, items, pairs, 3 * o.repetitions), time_trl(model, items, pairs, size, o.repetitions, tokenizer=tokenizer)
    rows.append(row("step-DPO update vs TRL DPOTrainer", mine, peer, f"patched, {size} pair{'s' * (size > 1)} a pass"))
    both = [{key: a[key] + b[key] for key in ("cpu", "wall", "tokens")} for a, b in ((ours, mine), (fastest["peer"], peer))]
    rows.append(row("whole iteration", *both, f"{fastest['figure'].split(' vs ')[1]}, then TRL patched"))
    rows[0] |= {"trajectories": n, "states": len(states), "k": k, "differ": count, "used": used}
    return rows


# ------------------------------------------------------------------------------------------------------------ shapes of the benchmarks

def part_shapes(o) -> list[dict]:
    """K = 3; with one pair a pass, TRL's time is three times that of a third of the pairs, of the same lengths."""
    weights, k, rows = make_model(), 3, []
    tree, batch = copy.deepcopy(weights), next((r["batch"] for r in o.parts.get("dpo", []) if r.get("k") == 3), 1)
    for name, shape in [("small", SMALL)] if o.quick else BENCHMARKS.items():
        encoded, leaves = make_data(shape, k)
        states, third = [encoded.ids[:start] for start, _ in encoded.spans], k if batch == 1 else 1
        update = row(f"{name}: update vs TRL", time_ours(weights, [encoded], [leaves], 3 * o.repetitions), scaled(
            time_trl(weights, [encoded], [leaves[::third]], batch, o.repetitions), third), f"{batch} pairs a pass, patched")
        inspect(tree, encoded, k, shape.action)
        ours = timed(lambda: inspect(tree, encoded, k, shape.action), 3 * o.repetitions, tree)
        peer = timed(lambda: generate(weights, states, k, shape.action, 1), o.repetitions, weights)
        rows.append({"name": name, "shape": vars(shape), "update": update,
                     "inspect": row(f"{name}: inspection", ours, peer, "generate per state")})
    return rows


# --------------------------------------------------------------------------------------------------------------------------- report

PARTS = {"dpo": part_dpo, "inspect": part_inspect, "episodes": part_episodes, "memory": part_memory, "exact": part_exact,
         "trained": part_trained, "shapes": part_shapes}


def derived(parts: dict) -> list[dict]:
    """What follows from two parts: the cost of K = 3 over K = 1, and a whole iteration against the fastest stock `generate`, then TRL."""
    dpo = {k: [r for r in parts.get("dpo", []) if f", K={k}" in r["figure"] and "known" not in r["figure"]] for k in (1, 3)}
    stock = {k: [r for r in parts.get("inspect", []) if r.get("stock") and r["k"] == k] for k in (1, 3)}
    rows = [row(f"cost of K=3 over K=1, {name}", cost[1], cost[3], "ours at K=3, at K=1", "<= 1.4", said=False) for name, cost in (
        ("inspection", {k: r[0]["ours"] for k, r in stock.items() if r}),
        ("scoring with backward", {k: r[0]["ours"]["backward"] for k, r in dpo.items() if r})) if len(cost) == 2]
    for k, goal in ((1, None), (3, 25)):
        fastest = min(stock[k], key=lambda r: r["peer"]["cpu"], default=None)
        for update in dpo[k] if fastest else []:
            both = [{key: fastest[side][key] + update[side][key] for key in ("cpu", "wall", "tokens")} for side in ("ours", "peer")]
            name = fastest["figure"].split(" vs ")[1].split(",")[0]
            how = "patched" if "patched" in update["setting"] else "as shipped"
            rows.append(row(f"whole iteration, K={k}", *both, f"{name}, then TRL {how}", goal, said=False))
    return rows


def table(head: str, rows: list[list]) -> list[str]:
    """Markdown, with a blank line before."""
    return ["", f"| {head} |", "|---" * (head.count("|") + 1) + "|"] + ["| " + " | ".join(map(str, r)) + " |" for r in rows] if rows else []


def report(data: dict) -> str:
    parts, m = data["parts"], data["machine"]
    goal = lambda r: "" if not r["goal"] else r["goal"] if isinstance(r["goal"], str) else f">= {r['goal']}"
    lines = ["Small shapes, one repetition: a test of this script, not a result.", ""] if data["quick"] else []
    lines += [f"{m['cpu']}, one thread; torch {m['torch']}, transformers {m['transformers']}, trl {m['trl']}. Seconds are CPU time: ours the "
             f"median of 3 or more, a peer's of {', '.join(f'{n} ({part})' for part, n in data['repetitions'].items())}. "
             "Reference shape: trunk 3000, 14 steps, first state at 1000, 40-token actions; Llama of 2 layers, width 256, 8 heads, 2 KV heads, "
             "vocabulary 8192, float32, random weights. Off CUDA, TRL as shipped runs its output head at every position; patched, at scored "
             "ones only, as on CUDA."]
    speed = [r for name in ("dpo", "inspect") for r in parts.get(name, [])] + derived(parts) + parts.get("episodes", [])
    of = lambda rows: [[r["figure"], f"{r['ours']['cpu']:.3f}", f"{r['peer']['cpu']:.3f}", f"{r['cpu']:.2f}x", f"{r['wall']:.2f}x",
                        f"{r['tokens']:.1f}", goal(r), r["setting"]] for r in rows]
    columns = "ours, s | peer, s | speed-up, CPU | wall | token ratio | goal | peer's setting"
    lines += table(f"figure | {columns}", of(speed))
    for t in parts.get("trained", [])[:1]:
        lines += ["", f"The same for models/tiny-household after SFT, on {t['trajectories']} demonstrations that it has not seen ({t['states']} states, "
                  f"K = {t['k']}; {t['differ']} of {t['k'] * t['states']} practice actions differ from the expert's, {t['used']} of which end with "
                  "a stop token and are the same tokens when TRL reads their text: the pairs of the update)."]
        lines += table(f"after SFT | {columns}", of(parts["trained"]))
    lines += table("peak memory of an update above what is loaded | ours, MiB | TRL, MiB | ours / TRL | goal", [
        [r["setting"], f"{r['ours']:.0f}", f"{r['peer']:.0f}", f"{r['ours'] / r['peer']:.2f}", f"<= {r['goal']}"]
        for r in parts.get("memory", [])])
    agree = [(r["k"], r["ours"]["log"], r["peer"]["log"]) for r in parts.get("dpo", []) if "batch" in r]
    lines += table("exactness, relative | log-probs | gradients | greedy tokens | goal", [
        ["one forward pass per prefix", f"{r['logp']:.1e}", f"{r['grad']:.1e}", r["greedy"], f"<= {r['goal']:.0e}"]
        for r in parts.get("exact", [])] + [
        [f"TRL's log of its first update, K={k}", f"{max(abs(a[n] / b[n] - 1) for n in ('chosen', 'rejected')):.1e}",
         f"{abs(a['grad_norm'] / b['grad_norm'] - 1):.1e} (norm)", "", ""] for k, a, b in agree])
    lines += table("benchmark, K=3 | turns | trunk | first state | action | update vs TRL, patched | tokens | inspection vs generate per state "
                   "| tokens", [
        [r["name"], *(r["shape"][key] for key in ("turns", "trunk", "first", "action"))] +
        [x for one in (r["update"], r["inspect"]) for x in (f"{one['cpu']:.1f}x (wall {one['wall']:.1f}x)", f"{one['tokens']:.1f}")]
        for r in parts.get("shapes", [])])
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def machine() -> dict:
    try:
        found = {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets", "matplotlib")}
    except PackageNotFoundError as error:
        sys.exit(f"error: {error.name} is missing; pip install -r requirements.txt -r experiments/requirements.txt")
    named = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return found | {"cpu": (named or ["unknown CPU"])[0]}


def begin(file: Path, parts: list[str]) -> dict:
    """What was measured so far; these parts are to be measured now. A table is of one machine and one set of versions."""
    here, new = machine(), {"parts": {}, "minutes": {}}
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else new | {"machine": here}
    if data["machine"] == here:
        return data
    others = [name for name in data["parts"] if name not in parts]
    if others:
        there = ", ".join(f"{name} {x}" for name, x in data["machine"].items() if here.get(name) != x)
        sys.exit(f"error: {file} holds {', '.join(others)} of another machine or other versions ({there}); measure all parts here, or move it away")
    return new | {"machine": here}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, default=list(PARTS), help=f"parts to run: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="small shapes, one repetition")
    parser.add_argument("--repetitions", type=int, default=3, help="of a peer's timing; ours are three times as many (default: 3)")
    parser.add_argument("--out", help="folder of bench.json and bench.md (default: experiments/results)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    o = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if o.child:
        return print(measure_memory(json.loads(o.child)))
    if sys.platform != "linux":
        sys.exit("error: memory is read from /proc; run this on Linux")
    out = Path(o.out or (ROOT / "runs/bench-quick" if o.quick else ROOT / "experiments/results"))
    out.mkdir(parents=True, exist_ok=True)
    file = out / "bench.json"
    if o.repetitions < 1:
        sys.exit(f"error: --repetitions is {o.repetitions}; give at least 1")
    data = begin(file, o.only) | {"quick": o.quick}
    o.shape, o.repetitions, o.parts = (SMALL, 1, data["parts"]) if o.quick else (REFERENCE, o.repetitions, data["parts"])
    for part in o.only:
        say(part)
        started = time.perf_counter()
        data["parts"][part] = PARTS[part](o)
        data["repetitions"] = data.get("repetitions", {}) | {part: o.repetitions}
        data["minutes"][part] = round((time.perf_counter() - started) / 60, 2)
        write(file, json.dumps(data, indent=1) + "\n")                                 # part by part: nothing measured is lost
    write(out / "bench.md", report(data))
    print("\n" + report(data))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the parts that were finished are kept")
