"""Does the project work on a GPU, exactly, and how fast? One GPU, under 8 minutes, no network.

    python experiments/gpu.py              # into experiments/results/gpu.json and gpu.md
    python experiments/gpu.py --cpu        # tiny shapes on a CPU, into runs/gpu-cpu: does it run?
    python experiments/gpu.py --only cd    # the rest stays as it was

a  exactness: score, its gradient, practice and episodes against one forward pass per prefix
b  whole runs: three methods, a kill, torchrun, LoRA, bf16 with recomputation, FSDP on one GPU, NCCL
c  speed at 1B: update and inspection beside padded pairs and transformers' generate; profiles
d  the same at 8B
e  episodes on the household, 1B, 32 rows
f  what is not in the product: FlexAttention for the scoring pass, a CUDA graph of a decode step

Models have random weights, or are models/tiny-household. Each section is a process of its own with
a time limit. Figures are kept as they come; the same command again measures what is missing or
failed. MFU: dense bf16 of an H100 SXM or H200, 989 TFLOP/s, nothing counted twice.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# These count only before torch is loaded.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

import losses
import naive
import rollout
import tree
from envs import make_env
from system.family import use_tree_attention
from system.files import write_text
from system.model import read_policy, read_tokenizer
from trajectory import Encoded, prompt_ids

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parents[1]
PEAK = 989e12
# Seconds, if so much is left.
LIMITS = {"a": 120, "b": 140, "c": 120, "d": 140, "e": 50, "f": 80}
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
LAYERS_1B = {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192}
LAYERS_8B = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}
SHAPES = {
    "1B": LLAMA | LAYERS_1B | {"head_dim": 64, "tie_word_embeddings": True},
    "8B": LLAMA | LAYERS_8B | {"head_dim": 128, "tie_word_embeddings": False},
}
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1200}
TRAJECTORY = {"trunk": 3000, "first": 1000, "steps": 14, "action": 40}
SHORT = {"trunk": 120, "first": 40, "steps": 4, "action": 6}


class Check:
    """Where things run, and the figures of one section."""

    def __init__(self, out: Path, section: str = "", cpu: bool = False, until: float = 1e12):
        self.out, self.section, self.cpu, self.until = out, section, cpu, until
        self.cuda = torch.cuda.is_available() and not cpu
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.trajectory = SHORT if cpu else TRAJECTORY
        self.path = out / f"gpu_{section}.json"
        self.figures = json.loads(self.path.read_text()) if self.path.exists() else {}
        if cpu:
            torch.set_num_threads(1)

    def note(self, name: str, figures) -> None:
        """Keeps it, whatever comes after."""
        self.figures[name] = figures
        print(f"[{self.section}] {name}: {json.dumps(figures)[:600]}", flush=True)
        write_text(self.path, json.dumps(self.figures, indent=1))

    def attempt(self, name: str, work: Callable, *args, needs: float = 0) -> None:
        """work(*args) is noted under that name, or what it raises; what is known is not repeated.

        needs: seconds that it takes.
        """
        known = self.figures.get(name)
        if known is not None and not failed(known):
            return
        if time.time() + needs > self.until:
            self.note(name, {"skipped": f"needs {needs} s"})
            return
        try:
            self.note(name, work(*args))
        except Exception:
            self.note(name, {"error": traceback.format_exc()[-1200:]})
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def timed(self, work: Callable, repetitions: int = 3, warm: int = 1) -> dict:
        """Median milliseconds, launches by the host included, and peak memory."""
        for _ in range(warm):
            work()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(repetitions):
            began = time.perf_counter()
            work()
            if self.cuda:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0
        return {"ms": round(statistics.median(times), 2), "peak_gb": round(peak, 2)}

    def profiled(self, work: Callable) -> dict:
        """Where one call's time goes: launches, waits, and how long the GPU was busy."""
        from torch.profiler import ProfilerActivity, profile

        ms = self.timed(work, 1)["ms"]
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        with profile(activities=activities) as profiler:
            work()
            if self.cuda:
                torch.cuda.synchronize()
        events = profiler.key_averages()
        kernels = [event for event in events if event.self_device_time_total > 0]
        kernels.sort(key=lambda event: -event.self_device_time_total)
        busy = sum(event.self_device_time_total for event in kernels) / 1e3
        launches = sum(event.count for event in events if "LaunchKernel" in event.key)
        waits = sum(event.count for event in events if event.key.endswith("Synchronize"))
        top = []
        for event in kernels[:10]:
            top.append([event.key[:60], round(event.self_device_time_total / 1e3, 2), event.count])
        return {"ms": ms, "busy_ms": busy, "launches": launches, "waits": waits, "top": top}


def failed(figures) -> bool:
    return isinstance(figures, dict) and bool({"error", "skipped"} & set(figures))


# ------------------------------------------------------------------------------------- a: exactness


def section_a(check: Check) -> None:
    """Errors against float64 on the same device, ours beside plain passes in the same type."""
    naive_on(check.device)
    for family in tiny.FAMILIES:
        for how in ("float32", "bfloat16", "autocast"):
            check.attempt(f"{family} {how}", exactness, check, family, how)
    check.attempt("sampled practice, CPU against this device", on_both_devices, check)
    check.attempt("episodes against re-reading everything", episodes_by_definition, check)


def naive_on(device) -> None:
    """naive.py makes its tensors on the CPU."""

    def logits(model, ids):
        return model(torch.tensor([ids], device=device), use_cache=False).logits[0]

    def token_logps(model, state, action):
        predicting = logits(model, state + action)[len(state) - 1 : -1]
        return losses.token_logps(predicting, torch.tensor(action, device=device))

    naive.logits, naive.token_logps = logits, token_logps


def cast(model, device, dtype):
    """A copy; rotary frequencies stay float32."""
    made = copy.deepcopy(model).to(device, dtype)
    rotary = made.model.rotary_emb
    made.model.rotary_emb = type(rotary)(made.config).to(device)
    return made.eval()


def tiny_model(family: str):
    more = {"hidden_size": 128, "intermediate_size": 256}
    more |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    return tiny.model(family, context=512, sharp=6.0, **more)


def example(vocab: int = 97):
    """Two trajectories, longer than the windows; some practice follows the expert for a while."""
    rng = random.Random(0)
    encoded, leaves = [], []
    spans_of = {150: [(40, 47), (60, 61), (90, 99), (140, 150)], 75: [(20, 26), (50, 54)]}
    for length, spans in spans_of.items():
        ids = random_words(rng, length, vocab)
        of_trajectory = []
        for step, (start, end) in enumerate(spans):
            for followed in (0, 0, min(2, end - start)):
                words = random_words(rng, rng.randint(1, 9), vocab)
                of_trajectory.append((step, ids[start : start + followed] + words))
        encoded.append(Encoded(ids, spans, str(length)))
        leaves.append(of_trajectory)
    return encoded, leaves


def random_words(rng: random.Random, count: int, vocab: int = 1000) -> list[int]:
    return [rng.randrange(4, vocab) for _ in range(count)]


def exactness(check: Check, family: str, how: str) -> dict:
    base, (encoded, leaves) = tiny_model(family), example()
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    expert, agent = naive.expert_pairs(encoded), naive.leaf_pairs(encoded, leaves)
    # The expert's action of each leaf's step.
    owner, first = [], 0
    for item, of_trajectory in zip(encoded, leaves):
        owner += [first + step for step, _ in of_trajectory]
        first += len(item.spans)

    def learn(model, trunk, leaf, tokens):
        """Log-probs of all tokens, and the gradient of eq. 6."""
        zero = torch.zeros_like(leaf)
        losses.dpo_loss(trunk[owner], leaf, zero, zero, 0.1)[0].backward()
        return tokens.detach().double(), [p.grad.double() for p in model.parameters()]

    def plain(model):
        of_expert = [naive.token_logps(model, *pair) for pair in expert]
        of_agent = [naive.token_logps(model, *pair) for pair in agent]
        sums = [torch.stack([one.sum() for one in part]) for part in (of_expert, of_agent)]
        return learn(model, *sums, torch.cat(of_expert + of_agent))

    def ours(model):
        scores = rollout.score(model, encoded, leaves)
        names = ("trunk", "leaves", "trunk_tokens", "leaf_tokens")
        trunk, leaf, *tokens = (torch.cat([getattr(s, name) for s in scores]) for name in names)
        return learn(model, trunk, leaf, torch.cat(tokens))

    truth, right = plain(cast(base, check.device, torch.float64))
    size = sum((gradient**2).sum() for gradient in right).sqrt()
    autocast = torch.autocast(check.device.type, torch.bfloat16, enabled=how == "autocast")
    found = {}
    with autocast:
        for name, work in (("ours", ours), ("plain", plain)):
            logps, gradients = work(cast(base, check.device, dtype))
            off = sum(((g - r) ** 2).sum() for g, r in zip(gradients, right)).sqrt()
            found[f"{name}: log-probs off"] = (logps - truth).abs().max().item()
            found[f"{name}: gradient off"] = (off / size).item()
        model = cast(base, check.device, dtype)
        drawn = rollout.practice(model, encoded, 1, 0.0, 8, set(range(1, 9)))
        same = []
        with torch.no_grad():
            model = cast(base, check.device, dtype)
            for item, steps in zip(encoded, drawn):
                for (start, _), [action] in zip(item.spans, steps):
                    expected = naive.greedy(model, item.ids[:start], 8, set(range(1, 9)))
                    same.append(action == expected)
    return found | {"greedy actions equal": f"{sum(same)} of {len(same)}"}


def on_both_devices(check: Check) -> dict:
    base, (encoded, _) = tiny_model("llama"), example()

    def draw(device):
        generator = torch.Generator().manual_seed(0)
        model = cast(base, device, torch.float32)
        return rollout.practice(model, encoded, 8, 1.0, 8, {1, 2, 3}, generator)

    same = []
    for one, other in zip(draw(torch.device("cpu")), draw(check.device)):
        for of_step, of_other in zip(one, other):
            same += [a == b for a, b in zip(of_step, of_other)]
    return {"equal": f"{sum(same)} of {len(same)}"}


def episodes_by_definition(check: Check) -> dict:
    folder = ROOT / "models/tiny-household"
    env, tokenizer = make_env("household"), read_tokenizer(folder)
    tasks = env.splits["test"][: 2 if check.cpu else 4]
    model, plain = (read_policy(folder).to(check.device).eval() for _ in range(2))
    same = []
    for played in rollout.run_episodes(model, tokenizer, env, tasks, max_new_tokens=32):
        with torch.no_grad():
            expected = naive.play(plain, tokenizer, env, played.task_id, [], 32)
        same += [one.ids == other.ids for one, other in zip(played.steps, expected.steps)]
    return {"actions equal": f"{sum(same)} of {len(same)}"}


# ------------------------------------------------------------------------------------ b: whole runs

WORLD = "--env household --model models/tiny-household --experts 24 --eval-each= --eval-splits test"
WORLD += " --eval-tasks 6 --sft-epochs 2 --sft-batch 4 --iterations 1 --batch 16"
WORLD += " --sft-experts 16 --practice-experts 16 --max-new-tokens 24"
ONE_RANK = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
FSDP = """
import sys
import stepagent
import system.model
from system.sharding import Placement, shard

def always(*_):
    return Placement(2, True)

def on_one(ranks, policy, placed, dtype):
    placed.pieces = 1
    shard(ranks, policy, placed, dtype)

system.model.placement, system.model.shard = always, on_one
stepagent.command_line(sys.argv[1:])
"""
COLLECTIVES = """
import torch
import torch.distributed as dist
from system.ranks import Ranks

ranks = Ranks()
parts = [None]
dist.all_gather_object(parts, {"x": torch.arange(5)})
numbers = torch.ones(2**20, device=ranks.device)
dist.all_reduce(numbers)
assert parts[0]["x"].sum() == 10 and numbers.sum().item() == 2**20
ranks.finish()
"""


def section_b(check: Check) -> None:
    where = Path(tempfile.mkdtemp())
    (where / "fsdp.py").write_text(FSDP)
    (where / "collectives.py").write_text(COLLECTIVES)

    def run(name: str, *more: str, start=("stepagent.py",)) -> dict:
        words = [*start, *WORLD.split(), "--out", str(where / name), *more]
        return program(check, words, where / name)

    bf16 = ("--dtype", "bfloat16")
    implicit, inverse, ppo = "stepagent-implicit", "stepagent-inverse", "ppo"
    cases = {
        implicit: lambda: run(implicit, "--practice", "2"),
        inverse: lambda: run(inverse, "--method", inverse, "--practice", "2"),
        ppo: lambda: run(ppo, "--method", ppo),
        "killed": lambda: killed(check, where / "killed"),
        "torchrun": lambda: run("torchrun", start=(*ONE_RANK, "stepagent.py")),
        "lora": lambda: run("lora", "--lora-rank", "8", "--lr", "1e-3", *bf16),
        "recomputation": lambda: run("recomputation", "--checkpointing", "true", *bf16),
        "fsdp": lambda: run("fsdp", *bf16, start=(*ONE_RANK, str(where / "fsdp.py"))),
        "collectives": lambda: program(check, [*ONE_RANK, str(where / "collectives.py")]),
    }
    with ThreadPoolExecutor(1 if check.cpu else 5) as pool:
        list(pool.map(lambda name: check.attempt(name, cases[name]), cases))
    check.attempt("killed and continued against undisturbed", compare_killed, where)


def program(check: Check, words: list[str], out: Path | None = None) -> dict:
    """Runs it; -> how it ended, and the last figures of each phase."""
    began = time.time()
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    left = max(1, min(600, check.until - began))
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=left
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-900:])
    figures = {"seconds": round(time.time() - began, 1)}
    log = out / "metrics.jsonl" if out else None
    for line in log.read_text().splitlines() if log else []:
        row = json.loads(line)
        for name in ("success", "nll", "dpo_loss", "ppo_loss", "d_auc_learnt", "grad_norm"):
            if name in row:
                figures[f"{row['phase']} {name}"] = round(row[name], 5)
    return figures


def killed(check: Check, out: Path) -> dict:
    """kill -9 within reflection, then the same command again."""
    words = ["stepagent.py", *WORLD.split(), "--out", str(out), "--practice", "2"]
    words += ["--save-minutes", "0"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, start_new_session=True, **quiet)
    log = out / "metrics.jsonl"
    while process.poll() is None and time.time() < check.until - 20:
        if log.exists() and log.read_text().count('"phase": "implicit"') >= 2:
            break
        time.sleep(0.02)
    in_reflection = process.poll() is None
    if in_reflection:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {"killed in reflection": in_reflection} | program(check, words, out)


def compare_killed(where: Path) -> dict:
    names = ("stepagent-implicit", "killed", "stepagent-implicit/sft")
    files = [where / name / "policy/model.safetensors" for name in names]
    one, other, sft = map(load_file, files)

    def distance(a, b):
        return sum(((a[name] - b[name]).double() ** 2).sum().item() for name in a) ** 0.5

    return {"distance": distance(one, other), "moved by reflection": distance(one, sft)}


# --------------------------------------------------------------------- c, d: updates and inspection


def data(k: int, trunk: int, first: int, steps: int, action: int) -> tuple[Encoded, list]:
    """A trajectory of random tokens, and k other actions a step, all of the same length."""
    rng, gap = random.Random(k), (trunk - action - first) / (steps - 1)
    starts = [first + round(step * gap) for step in range(steps)]
    item = Encoded(random_words(rng, trunk), [(start, start + action) for start in starts], "gpu")
    leaves = []
    for step in range(steps):
        leaves += [(step, random_words(rng, action)) for _ in range(k)]
    return item, leaves


def make(check: Check, name: str, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shape = SMALL if check.cpu else SHAPES[name]
    more = {"max_position_embeddings": 32768, "rope_theta": 5e5}
    more |= dict.fromkeys(("bos_token_id", "eos_token_id"), None) | {"pad_token_id": 0}
    dtype = torch.float32 if check.cpu else dtype
    with check.device:
        config = LlamaConfig(**shape, **more)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def recompute(model, on: bool = True) -> None:
    if on:
        settings = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_disable()


def flops(config, parts: list[tuple[int, int]], targets: int) -> float:
    """Of forward and backward pass. parts: (tokens before, new tokens); targets: logits."""
    head, heads, kv = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    linear = config.hidden_size * head * (2 * heads + 2 * kv)
    linear += 3 * config.hidden_size * config.intermediate_size
    tokens = sum(own for _, own in parts)
    pairs = sum(own * before + own * (own + 1) // 2 for before, own in parts)
    layers = config.num_hidden_layers * (2 * linear * tokens + 4 * heads * head * pairs)
    return 3 * (layers + 2 * config.hidden_size * config.vocab_size * targets)


def rates(found: dict, work: float, pairs: int) -> dict:
    seconds = found["ms"] / 1e3
    return found | {
        "TFLOP": work / 1e12,
        "MFU": work / seconds / PEAK,
        "pairs/s": pairs / seconds,
    }


def update(model, item: Encoded, leaves: list) -> None:
    """Step-DPO on one trajectory, forward and backward."""
    [scores] = rollout.score(model, [item], [leaves])
    trunk = scores.trunk[[step for step, _ in leaves]]
    zero = torch.zeros_like(trunk)
    losses.dpo_loss(trunk, scores.leaves, zero, zero, 0.1)[0].backward()
    model.zero_grad()


def update_speed(check: Check, model, k: int) -> dict:
    item, leaves = data(k, **check.trajectory)
    parts = [(0, item.tokens)]
    parts += [(item.spans[step][0], len(ids)) for step, ids in leaves]
    targets = item.action_tokens + sum(len(ids) for _, ids in leaves)
    found = check.timed(lambda: update(model, item, leaves))
    return rates(found, flops(model.config, parts, targets), len(leaves))


def update_at_new_lengths(check: Check, model) -> dict:
    """As in training: what a kernel prepares for a new shape counts."""
    items = []
    for number in range(4):
        shape = dict(check.trajectory)
        shape["trunk"] -= 7 * (number + 1)
        items.append(data(1, **shape))
    left = iter(items)
    return check.timed(lambda: update(model, *next(left)))


def padded_update_speed(check: Check, model, k: int) -> dict:
    """A fair peer by hand: each action with its state is a sequence of its own, a step's 1 + k in
    one pass, logits at action tokens alone."""
    item, leaves = data(k, **check.trajectory)

    def learn(steps):
        for step in steps:
            start, end = item.spans[step]
            actions = [item.ids[start:end]] + [ids for of, ids in leaves if of == step]
            rows = [item.ids[:start] + action for action in actions]
            ids = torch.tensor(rows, device=check.device)
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, start - 1 : -1])
            logps = losses.token_logps(logits, ids[:, start:]).sum(1)
            zero = torch.zeros_like(logps[1:])
            expert = logps[:1].expand(k)
            losses.dpo_loss(expert, logps[1:], zero, zero, 0.1, len(leaves))[0].backward()
        model.zero_grad()

    learn([0])
    parts = [(0, end) for _, end in item.spans for _ in range(1 + k)]
    targets = (1 + k) * item.action_tokens
    found = check.timed(lambda: learn(range(len(item.spans))), 1, 0)
    return rates(found, flops(model.config, parts, targets), len(leaves))


def practise(check: Check, model, trajectories: int, k: int, new: int) -> Callable:
    items = [data(k, **check.trajectory)[0]] * trajectories

    def work():
        generator = torch.Generator().manual_seed(0)
        rollout.practice(model, items, k, 1.0, new, {-1}, generator)

    return work


def practice_speed(check: Check, model, trajectories: int, k: int) -> dict:
    """Prefill: what one token takes, read off the trunk. The rest are passes over the leaves."""
    new = check.trajectory["action"]
    rows = trajectories * check.trajectory["steps"] * k
    whole = check.timed(practise(check, model, trajectories, k, new), 2)
    first = check.timed(practise(check, model, trajectories, k, 1), 2)
    token = (whole["ms"] - first["ms"]) / (new - 1)
    # The weights' floor: all of them but the input embedding are read, at the data sheet's 3.35
    # TB/s of an H100.
    weights = sum(p.nbytes for p in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes
    return whole | {
        "rows": rows,
        "prefill_ms": first["ms"],
        "ms a token": round(token, 2),
        "weights' floor, ms": round(1e3 * weights / 3.35e12, 2),
        "tokens/s": round(1e3 * rows * new / whole["ms"]),
    }


def generate_speed(check: Check, model, k: int, states_a_call: int, calls: int) -> dict:
    """transformers' generate over left-padded states, K rows each."""
    item, new = data(k, **check.trajectory)[0], check.trajectory["action"]
    states = [item.ids[:start] for start, _ in item.spans][: states_a_call * calls]
    more = {"do_sample": True, "top_k": 0, "num_return_sequences": k, "pad_token_id": 0}
    settings = GenerationConfig(max_new_tokens=new, min_new_tokens=new, **more)

    def some(chosen):
        for first in range(0, len(chosen), states_a_call):
            part = chosen[first : first + states_a_call]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(s)) + s for s in part], device=check.device)
            seen = [[0] * (width - len(s)) + [1] * len(s) for s in part]
            mask = torch.tensor(seen, device=check.device)
            model.generate(ids, attention_mask=mask, generation_config=settings)

    some(states[:1])
    found = check.timed(lambda: some(states), 1, 0)
    rate = round(1e3 * len(states) * k * new / found["ms"])
    return found | {"tokens/s": rate, "states": len(states)}


def optimizer_speed(check: Check) -> dict:
    """AdamW on float32 weights, fused as on CUDA and one tensor after another; clipping."""
    model, found = make(check, "1B", torch.float32), {}
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 1e-3)
    parameters = list(model.parameters())
    found["clip"] = check.timed(lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))["ms"]
    for fused in (True, False):
        adam = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=fused)
        found["fused" if fused else "not fused"] = check.timed(adam.step)["ms"]
        del adam
    return found


def ceilings(check: Check) -> dict:
    """What the card gives: a large product, a large copy."""
    size, numbers = (64, 2**20) if check.cpu else (8192, 2**32)
    one, two = (torch.randn(size, size, device=check.device).bfloat16() for _ in range(2))
    source = torch.empty(numbers, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    product = check.timed(lambda: one @ two, 10)["ms"]
    copied = check.timed(lambda: target.copy_(source), 5)["ms"]
    return {"TFLOP/s": 2 * size**3 / product / 1e9, "TB/s": 2 * numbers / copied / 1e9}


def speed(check: Check, name: str) -> None:
    large, model = name == "8B", make(check, name)
    recompute(model)
    # The peers first: the model is an ordinary one until it is switched.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model.train()
    for k in (1, 3):
        needs = 14 * k if large else 8
        label = f"update, padded pairs by hand, K = {k}"
        check.attempt(label, padded_update_speed, check, model, k, needs=needs)
    recompute(model, False)
    model.eval()
    states, calls = (7, 1) if large else (14, 1)
    label = f"generate, {states} left-padded states, K = 3"
    check.attempt(label, generate_speed, check, model, 3, states, calls, needs=10)
    check.attempt("generate, state by state, K = 3", generate_speed, check, model, 3, 1, 5)

    use_tree_attention(model)
    recompute(model)
    model.train()
    for k in (1, 3):
        check.attempt(f"update, ours, K = {k}", update_speed, check, model, k, needs=5)
    check.attempt("update, ours, K = 1, new lengths", update_at_new_lengths, check, model)
    item = data(3, **check.trajectory)
    check.attempt("profile of an update, K = 3", check.profiled, lambda: update(model, *item))
    if not large:
        recompute(model, False)
        check.attempt("update, ours, K = 3, all activations kept", update_speed, check, model, 3)
        recompute(model)
    model.eval()
    for trajectories in (1, 6):
        label = f"practice, ours, {trajectories} trajectories, K = 3"
        check.attempt(label, practice_speed, check, model, trajectories, 3, needs=5)
    few = practise(check, model, 6, 3, 5)
    check.attempt("profile of practice, 6 trajectories, 5 tokens", check.profiled, few)
    if not large:
        check.attempt("optimizer, float32", optimizer_speed, check, needs=5)
        torch.backends.cuda.enable_cudnn_sdp(True)
        model.train()
        label = "update, ours, K = 1, new lengths, with cuDNN"
        check.attempt(label, update_at_new_lengths, check, model, needs=15)


def section_c(check: Check) -> None:
    check.attempt("ceilings", ceilings, check)
    speed(check, "1B")


def section_d(check: Check) -> None:
    speed(check, "8B")


# ---------------------------------------------------------------------------------- e: episodes


def section_e(check: Check) -> None:
    model, tokenizer = make(check, "1B").eval(), read_tokenizer(ROOT / "models/tiny-household")
    use_tree_attention(model)
    env = make_env("household", max_steps=2 if check.cpu else 6)
    # A state of about 3,000 tokens.
    text = env.instruction * (1 if check.cpu else 12)
    prompt = [{"role": "user", "content": text}, {"role": "assistant", "content": "OK"}]
    tasks = env.splits["test"][: 4 if check.cpu else 32]

    def play(longest: int) -> dict:
        began = time.perf_counter()
        more = {"prompt": prompt, "max_new_tokens": longest, "batch": 32}
        played = rollout.run_episodes(model, tokenizer, env, tasks, **more)
        seconds = time.perf_counter() - began
        tokens = sum(len(step.ids) for one in played for step in one.steps)
        return {
            "tokens/s": round(tokens / seconds),
            "ms a pass": round(1e3 * seconds * len(tasks) / tokens, 2),
            "tokens of a prompt": len(prompt_ids(tokenizer, prompt, "x")),
        }

    play(2)
    check.attempt(f"{len(tasks)} rows, 24 tokens a turn", play, 24)
    check.attempt("profile, 3 tokens a turn", check.profiled, lambda: play(3), needs=12)


# ------------------------------------------------------------------------- f: not in the product


class OneKernel(tree.TrunkAndLeaves):
    """A scoring pass by FlexAttention: one kernel a layer, which asks `sees` itself."""

    block_masks: dict

    def attend(self, layer, query, key, value, scaling, window):
        if window not in self.__dict__.setdefault("block_masks", {}):
            self.block_masks[window] = self.block_mask(query.device, window)
        grouped = query.shape[1] != key.shape[1]
        parts = [part.contiguous() for part in (query, key, value)]
        mask = self.block_masks[window]
        return flex_attention()(*parts, scale=scaling, block_mask=mask, enable_gqa=grouped)

    def block_mask(self, device, window):
        from torch.nn.attention.flex_attention import create_block_mask

        row = tree.numbers([self.position, self.leaf, self.branch], device)
        trunk = []
        for piece, size in enumerate(self.sizes):
            trunk += [self.trunks[piece]] * size
        trunk = tree.numbers(trunk, device)
        # The compiler takes tree.py for a package of that name, which it leaves alone.
        sees = torch._dynamo.dont_skip_tracing(tree.sees)

        def same_trunk_and_sees(_, __, query: Tensor, key: Tensor) -> Tensor:
            return (trunk[query] == trunk[key]) & sees(*row, query, key, window)

        length = len(self.ids)
        return create_block_mask(same_trunk_and_sees, None, None, length, length, device=device)


def flex_attention():
    from torch.nn.attention import flex_attention as flex

    if not torch.cuda.is_available():
        return flex.flex_attention
    if not hasattr(flex, "compiled"):
        flex.compiled = torch.compile(flex.flex_attention, dynamic=True)
    return flex.compiled


@contextlib.contextmanager
def one_kernel():
    usual = rollout.TrunkAndLeaves
    rollout.TrunkAndLeaves = OneKernel
    try:
        yield
    finally:
        rollout.TrunkAndLeaves = usual


def flex_difference(check: Check, model) -> dict:
    item, leaves = data(3, **check.trajectory)
    with torch.no_grad():
        [usual] = rollout.score(model, [item], [leaves])
        with one_kernel():
            [found] = rollout.score(model, [item], [leaves])
    return {"log-probs apart": (usual.leaf_tokens - found.leaf_tokens).abs().max().item()}


def graph_speed(check: Check, model) -> dict:
    """One decode step of practice, launch by launch and replayed: what a graph would pay."""
    rows, length, config = 252, 3000, model.config
    if check.cpu:
        rows, length = 6, 50
    dtype, device = model.dtype, check.device
    size = (config.num_key_value_heads, length, config.head_dim)
    trunks = {}
    for layer in range(config.num_hidden_layers):
        trunks[layer] = [(torch.randn(size, dtype=dtype, device=device),) * 2]
    owner = torch.zeros(rows, dtype=torch.long, device=device)
    cache = tree.LeafCache(trunks, owner, torch.full_like(owner, length - length // 30))
    ids = torch.ones(rows, 1, dtype=torch.long, device=device)

    def step():
        return tree.forward(model, ids, (cache.prefix + cache.length)[:, None], cache)

    with torch.no_grad():
        eager = check.timed(step, 10, 3)["ms"]
        if not check.cuda:
            return {"eager, ms": eager}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return {"eager, ms": eager, "replayed, ms": check.timed(graph.replay, 10, 3)["ms"]}


def section_f(check: Check) -> None:
    model = make(check, "1B")
    use_tree_attention(model)
    recompute(model)
    model.train()
    check.attempt("FlexAttention against the pieces", flex_difference, check, model, needs=10)
    for k in (1, 3) if check.cuda else ():
        # Compiled off CUDA, it has no backward pass.
        check.attempt(f"update, pieces, K = {k}", update_speed, check, model, k, needs=5)
        with one_kernel():
            label = f"update, FlexAttention, K = {k}"
            check.attempt(label, update_speed, check, model, k, needs=10)
    if check.cuda:
        with one_kernel():
            label = "update, FlexAttention, K = 1, new lengths"
            check.attempt(label, update_at_new_lengths, check, model, needs=10)
    recompute(model, False)
    model.eval()
    check.attempt("a decode step of 252 rows, 1B", graph_speed, check, model, needs=5)


SECTIONS = {
    "a": section_a,
    "b": section_b,
    "c": section_c,
    "d": section_d,
    "e": section_e,
    "f": section_f,
}

# ------------------------------------------------------------------------------------- the parent


def child(check: Check) -> None:
    SECTIONS[check.section](check)


def run_sections(options, out: Path) -> dict[str, dict]:
    """Each in a process of its own, so that none stops the others. a and b time nothing."""
    began = time.time()

    def run(section: str) -> None:
        left = options.seconds - (time.time() - began)
        limit = 900 if options.cpu else min(LIMITS[section], left)
        if limit < 15:
            print(f"[{section}] no time left", flush=True)
            return
        words = [sys.executable, __file__, "--section", section, "--out", str(out)]
        words += ["--until", str(time.time() + limit)] + ["--cpu"] * options.cpu
        process = subprocess.Popen(words, start_new_session=True, cwd=ROOT)
        try:
            process.wait(limit + 5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            print(f"[{section}] stopped after {limit:.0f} s", flush=True)

    with ThreadPoolExecutor(1 if options.cpu else 2) as pool:
        list(pool.map(run, [section for section in "ab" if section in options.only]))
    for section in "cdef":
        if section in options.only:
            run(section)
    found = {}
    for section in SECTIONS:
        path = out / f"gpu_{section}.json"
        if path.exists():
            found[section] = json.loads(path.read_text())
    return found


def machine(cpu: bool) -> dict:
    cuda = torch.cuda.is_available() and not cpu
    name = torch.cuda.get_device_name() if cuda else "a CPU, tiny shapes: not a measurement"
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }


def report(data: dict) -> str:
    """Markdown: a table a section."""
    machine = data["machine"]
    lines = [f"{machine['device']}; torch {machine['torch']}, transformers "]
    lines[0] += (
        f"{machine['transformers']}. By experiments/gpu.py, whose top says what is measured."
    )
    for section, figures in data["sections"].items():
        lines += ["", f"| {section}: {SECTIONS[section].__name__} | |", "|---|---|"]
        for name, found in figures.items():
            if failed(found):
                text = "**failed**" if "error" in found else found["skipped"]
            else:
                shown = {key: value for key, value in found.items() if key != "top"}
                text = ", ".join(f"{key} {short(value)}" for key, value in shown.items())
            lines.append(f"| {name} | {text} |")
    return "\n".join(lines) + "\n"


def short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--cpu", action="store_true", help="tiny shapes, to test this script")
    parser.add_argument("--only", default="abcdef", help="sections")
    parser.add_argument("--seconds", type=float, default=460, help="for everything, on a GPU")
    parser.add_argument("--out", type=Path, help="folder (default: experiments/results)")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=1e12, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out or ROOT / ("runs/gpu-cpu" if options.cpu else "experiments/results")
    out.mkdir(parents=True, exist_ok=True)
    if options.cpu:
        # For the programs of section b, too.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if options.section:
        child(Check(out, options.section, options.cpu, options.until))
        return
    if not options.cpu and not torch.cuda.is_available():
        sys.exit("error: this machine has no GPU that torch sees; --cpu tries the script")
    data = {"machine": machine(options.cpu), "sections": run_sections(options, out)}
    write_text(out / "gpu.json", json.dumps(data, indent=1) + "\n")
    write_text(out / "gpu.md", report(data))
    for section, figures in data["sections"].items():
        wrong = [name for name, found in figures.items() if failed(found)]
        print(f"{section}: {len(figures)} figures, failed or skipped: {', '.join(wrong) or 'none'}")


if __name__ == "__main__":
    main()
