"""The agent and the loop that trains it: what StepAgent and the baselines share.

Agent is the one state object. Practised is what an inspection leaves on disk for the phases after
it. train() is the one training loop: it takes a loss and batches of items (anything with .task_id
and .tokens), which batches() makes. imitate() is SFT, play() are whole episodes.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

import losses
from envs import some
from rollout import Scores, grouped, pass_tokens, run_episodes, score
from system.checkpoints import updates
from system.experts import load_shown
from system.files import read_tensors, write_tensors, write_text
from system.model import save_policy
from system.ranks import Ranks
from system.run_dir import RunDir
from system.sharding import gathered, room
from trajectory import (
    Encoded,
    InputError,
    Trajectory,
    action_text,
    encode,
    parse_action,
    stable_seed,
    stop_ids,
)


@dataclass
class Demonstration:
    """An expert trajectory, as text and as tokens."""

    trajectory: Trajectory
    encoded: Encoded

    @property
    def task_id(self) -> str:
        return self.trajectory.task_id


@dataclass
class Agent:
    """The policy and what it learns from. Every phase takes it as its first argument."""

    config: object
    ranks: Ranks
    run: RunDir
    env: object
    # Chat messages that open every conversation of the agent's own.
    prompt: list[dict]
    policy: nn.Module
    tokenizer: object
    experts: list[Demonstration]
    # Iterations of the run: reflection's learning rate falls over all of them.
    iterations: int

    @property
    def sft_set(self) -> list[Demonstration]:
        """What SFT learns from: the first --sft-experts."""
        return self.experts[: self.config.sft_experts or None]

    @property
    def practice_set(self) -> list[Demonstration]:
        """At whose states the agent practises: the last --practice-experts."""
        return self.experts[-(self.config.practice_experts or len(self.experts)) :]

    def held_out(self, split: str, prompt: list[dict], most: int = 300) -> list[Demonstration]:
        """The world's own expert on at most `most` tasks of a split, which nobody learns from.

        Those that fit into the model's context. None where the world has no such split, or where
        experts come from a file: its authors may act in other words.
        """
        if self.config.expert or split not in self.env.splits:
            return []
        learnt = {demo.task_id for demo in self.experts}
        unlearnt = [task for task in self.env.splits[split] if task not in learnt]
        # One selection is shown and kept in a file, whatever `most` the first caller has.
        shown = some(unlearnt, min(300, self.config.eval_tasks or 300))
        wanted = set(some(shown, most))
        demos = []
        for trajectory in load_shown(self.run, self.env, split, shown):
            trajectory.prompt = prompt
            encoded = encode(trajectory, self.tokenizer)
            fits = encoded.tokens <= self.policy.config.max_position_embeddings
            if fits and trajectory.task_id in wanted:
                demos.append(Demonstration(trajectory, encoded))
        return demos

    def seed(self, *parts) -> int:
        return stable_seed(self.config.seed, *parts)

    def fold_places(self) -> dict[str, int]:
        """Task -> its place in a fixed random order, for folds."""
        tasks = [demo.task_id for demo in self.practice_set]
        tasks.sort(key=lambda task: self.seed("fold", task))
        return {task: place for place, task in enumerate(tasks)}

    def save(self, folder: str) -> None:
        """An ordinary Hugging Face folder, float32; a later start of the run continues from it."""
        save_policy(self.run, self.policy, self.tokenizer, self.run.path(folder))
        self.run.state["policy"] = folder

    @contextmanager
    def generating(self, label: str, total: int) -> Iterator:
        """A progress bar, without gradients; every rank may run the policy on its own."""
        self.policy.eval()
        with (
            self.run.bar(total, label) as bar,
            torch.no_grad(),
            gathered(self.ranks, self.policy),
            self.ranks.autocast(self.config.dtype),
        ):
            yield bar

    def cache_room(self) -> int:
        """Tokens whose keys and values fit beside the weights."""
        return room(self.ranks, self.policy, self.config)


# ---------------------------------------------------------------------- what an inspection leaves


@dataclass
class Practised:
    """The inspection of one trajectory: S expert steps, K practice actions each.

    Log-probs are those of the iteration's starting policy, by the training forward (reading 5).
    """

    demonstration: Demonstration
    # [S][K] token ids.
    actions: list[list[list[int]]]
    # [S, K] True where the action's text is not the expert's; both texts are decoded (reading 8).
    differs: Tensor
    # [S], [S, K] summed log-probs of the expert's and of the agent's actions.
    ref_expert: Tensor
    ref_agent: Tensor
    # [expert tokens], [practice tokens] log-prob of each token, action after action.
    ref_expert_tokens: Tensor
    ref_agent_tokens: Tensor

    @property
    def encoded(self) -> Encoded:
        return self.demonstration.encoded

    @property
    def task_id(self) -> str:
        return self.demonstration.task_id

    @cached_property
    def leaves(self) -> list[tuple[int, list[int]]]:
        """[(step, token ids)], as score takes them."""
        return as_leaves(self.actions)

    @cached_property
    def tokens(self) -> int:
        """Tokens of a forward pass over trunk and leaves."""
        return pass_tokens(self.encoded, self.leaves)


def as_leaves(actions: list[list[list[int]]]) -> list[tuple[int, list[int]]]:
    """[S][K] token ids -> [(step, token ids)]."""
    leaves = []
    for step, of_step in enumerate(actions):
        leaves += [(step, ids) for ids in of_step]
    return leaves


# The fields of Practised that practice.safetensors holds, beside the actions.
TENSORS = ("differs", "ref_expert", "ref_agent", "ref_expert_tokens", "ref_agent_tokens")


def save_practice(agent: Agent, i: int, practised: list[Practised]) -> None:
    """iter_<i>/practice.safetensors: the trajectories' tensors, one after another."""
    leaves = []
    for record in practised:
        leaves += [ids for _, ids in record.leaves]
    tensors = {
        "leaves": torch.tensor([token for ids in leaves for token in ids]),
        "lengths": torch.tensor([len(ids) for ids in leaves]),
    }
    for name in TENSORS:
        tensors[name] = torch.cat([getattr(record, name) for record in practised])
    write_tensors(agent.run.path(f"iter_{i}/practice.safetensors"), tensors)


def read_practice(agent: Agent, i: int) -> list[Practised]:
    """Always from disk: a killed run continues from the same bits."""
    saved = read_tensors(agent.run.path(f"iter_{i}/practice.safetensors"))
    k = agent.config.practice
    demos = agent.practice_set
    # How many of each trajectory.
    steps = [len(demo.encoded.spans) for demo in demos]
    expert_tokens = [demo.encoded.action_tokens for demo in demos]
    lengths = saved["lengths"].split([k * count for count in steps])
    practice_tokens = [int(of_trajectory.sum()) for of_trajectory in lengths]
    sizes = (steps, steps, steps, expert_tokens, practice_tokens)
    fields = [saved[name].split(size) for name, size in zip(TENSORS, sizes)]
    leaves = saved["leaves"].split(practice_tokens)
    practised = []
    for demo, demo_lengths, demo_leaves, *tensors in zip(demos, lengths, leaves, *fields):
        flat = [ids.tolist() for ids in demo_leaves.split(demo_lengths.tolist())]
        actions = [flat[first : first + k] for first in range(0, len(flat), k)]
        practised.append(Practised(demo, actions, *tensors))
    return practised


def practised_from(
    agent: Agent, demonstration: Demonstration, actions: list[list[list[int]]], scores: Scores
) -> Practised:
    """The record of one trajectory, on the CPU. actions: [S][K] token ids."""
    differs = []
    for expert, of_step in zip(decoded_actions(agent, demonstration.encoded), actions):
        texts = [action_text(agent.tokenizer, ids).strip() for ids in of_step]
        differs.append([text != expert for text in texts])
    differs = torch.tensor(differs)
    # Copies, not views: a view would keep all of its storage.
    return Practised(
        demonstration=demonstration,
        actions=actions,
        differs=differs,
        ref_expert=scores.trunk.cpu().clone(),
        ref_agent=scores.leaves.view(differs.shape).cpu().clone(),
        ref_expert_tokens=scores.trunk_tokens.cpu().clone(),
        ref_agent_tokens=scores.leaf_tokens.cpu().clone(),
    )


def decoded_actions(agent: Agent, encoded: Encoded) -> tuple[str, ...]:
    """The actions' text, as their tokens read it, without the space around it.

    What the agent says is read off tokens, too. The text of a file may be another one for the same
    tokens: a tokenizer may know one Unicode form of a character alone.
    """
    actions = [encoded.ids[start:end] for start, end in encoded.spans]
    return tuple(action_text(agent.tokenizer, ids).strip() for ids in actions)


def write_practice(agent: Agent, i: int, practised: list[Practised], log_d: list | None = None):
    """iter_<i>/practice.jsonl, for people to read: one expert step a line.

    log_d: [(expert [S], agent [S, K])] of each trajectory, once D has judged.
    """
    lines = []
    for number, record in enumerate(practised):
        # The ids of an expert file may be its own.
        kind = "" if agent.config.expert else agent.env.task_type(record.task_id)
        for step, turn in enumerate(record.demonstration.trajectory.steps):
            row = {
                "task": record.task_id,
                "task_type": kind,
                "step": step,
                "observation": turn.observation,
                "expert": turn.action,
                "expert_logp": round(record.ref_expert[step].item(), 4),
                "practice": [action_text(agent.tokenizer, ids) for ids in record.actions[step]],
                "practice_logp": rounded(record.ref_agent[step]),
                "differs": record.differs[step].tolist(),
            }
            if log_d is not None:
                log_d_expert, log_d_agent = log_d[number]
                row["expert_log_d"] = round(log_d_expert[step].item(), 4)
                row["practice_log_d"] = rounded(log_d_agent[step])
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(agent.run.path(f"iter_{i}/practice.jsonl"), "".join(lines))


def practice_figures(agent: Agent, practised: list[Practised]) -> dict:
    """How often practice equals the expert, and other figures of an inspection."""
    stops = stop_ids(agent.tokenizer)
    same_action, stopped, tokens = [], [], 0
    for record in practised:
        experts = decoded_actions(agent, record.encoded)
        for step, ids in record.leaves:
            text = action_text(agent.tokenizer, ids)
            same_action.append(parse_action(text) == parse_action(experts[step]))
            stopped.append(ids[-1] in stops)
            tokens += len(ids)
    differs = torch.cat([record.differs.flatten() for record in practised])
    return {
        "match_text": 1 - differs.float().mean().item(),
        "match_action": float(np.mean(same_action)),
        "pairs_kept": int(differs.sum()),
        "stopped": float(np.mean(stopped)),
        "practice_tokens": tokens,
    }


def score_all(
    agent: Agent, encoded: list[Encoded], leaves: list | None, label: str, fields: str
) -> list[Scores]:
    """Scores of many trajectories (and their leaves), shared among the ranks.

    fields: what is kept of the Scores, on the CPU in float32: for large models hidden states are
    gigabytes.
    """
    ranks = agent.ranks
    leaves = leaves or [[]] * len(encoded)
    tokens = list(map(pass_tokens, encoded, leaves))
    my_share = ranks.shares(range(len(encoded)), tokens.__getitem__)[ranks.rank]
    my_share = sorted(my_share, key=tokens.__getitem__)
    by_number = {}
    with agent.generating(label, len(my_share)) as bar:
        for micro in grouped(my_share, tokens.__getitem__, agent.config.micro_tokens):
            micro_encoded = [encoded[number] for number in micro]
            micro_leaves = [leaves[number] for number in micro]
            for number, scores in zip(micro, score(agent.policy, micro_encoded, micro_leaves)):
                by_number[number] = on_cpu(scores, fields.split())
            bar.update(len(micro))
    for part in ranks.gather(by_number):
        by_number |= part
    return [by_number[number] for number in range(len(encoded))]


def on_cpu(scores: Scores, fields: list[str]) -> Scores:
    """Copies, not views: a view would keep all of its storage."""
    copies = dict.fromkeys(vars(scores))
    for name in fields:
        copies[name] = getattr(scores, name).float().cpu().clone()
    return replace(scores, **copies)


def rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


# -------------------------------------------------------------------------------- the training loop


def train(
    agent: Agent,
    name: str,
    iteration: int,
    batches: list[list],
    loss_of: Callable[[list, list], tuple[Tensor, losses.Info]],
    rate_at: Callable[[int], float],
) -> None:
    """The one training loop; every phase makes its own AdamW.

    batches: lists of items with .task_id and .tokens (what they push through the policy), the same
    on every rank. A rank takes its share of a batch, divides by the whole batch's counts, and
    gradients are summed. loss_of(micro-batch, batch) -> (loss, figures); rate_at(update) -> rate.
    """
    run, ranks, config, policy = agent.run, agent.ranks, agent.config, agent.policy
    if iteration and ranks.rank == 0:
        # SFT+ takes its trajectories from here (--match).
        tasks = [[item.task_id for item in batch] for batch in batches]
        write_text(run.path(f"iter_{iteration}/batches.json"), json.dumps(tasks))
    policy.train()
    parameters = [weight for weight in policy.parameters() if weight.requires_grad]
    # On a GPU one kernel for all weights; on CPUs it is no faster.
    fused = ranks.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=fused)
    label = f"iteration {iteration}: {name}" if iteration else name
    for step, batch in updates(run, policy, optimizer, batches, label):
        started = time.time()
        info = defaultdict(float)
        # weight is 1, or 0 for a pass that only keeps sharded ranks in step.
        for micro, weight in ranks.micro_batches(policy, batch, config.micro_tokens):
            with ranks.autocast(config.dtype):
                loss, figures = loss_of(micro, batch)
            (weight * loss).backward()
            for key, figure in figures.items():
                info[key] += weight * figure.double()
        ranks.sum_gradients(policy)
        norm = ranks.clip(policy, config.grad_norm)
        # All figures are read at once: each time the host waits for a GPU.
        *figures, norm = torch.stack([*info.values(), norm.double()]).tolist()
        info = ranks.sum_figures(dict(zip(info, figures)))
        # Before the step: a broken gradient never reaches the weights.
        check_finite(agent, name, iteration, step, batch, info | {"grad_norm": norm})
        rate = rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        run.log(
            name,
            iteration,
            step,
            lr=rate,
            grad_norm=norm,
            trajectories=len(batch),
            tokens=sum(item.tokens for item in batch),
            seconds=time.time() - started,
            **info,
        )


def check_finite(agent: Agent, name, iteration: int, step: int, batch: list, figures: dict) -> None:
    """InputError where a loss or gradient is not; the batch is saved."""
    if all(math.isfinite(figure) for figure in figures.values()):
        return
    path = agent.run.path("failed_batch.json")
    if agent.ranks.rank == 0:
        failed = {
            "phase": name,
            "iteration": iteration,
            "step": step,
            "figures": {key: str(figure) for key, figure in figures.items()},
            "batch": [asdict(getattr(item, "encoded", item)) for item in batch],
        }
        write_text(path, json.dumps(failed))
    raise InputError(
        f"{name}, iteration {iteration}, update {step}: loss or gradient is not finite; "
        f"batch saved in {path}; try a lower learning rate"
    )


def batches(items: Iterable, size_of: Callable, batch_size: int, seeds: list[int]) -> list[list]:
    """Shuffled items, gathered until their sizes reach batch_size (reading 9); one pass a seed."""
    found = []
    batch, size = [], 0
    for seed in seeds:
        shuffled = list(items)
        random.Random(seed).shuffle(shuffled)
        for item in shuffled:
            batch.append(item)
            size += size_of(item)
            if size >= batch_size:
                found.append(batch)
                batch, size = [], 0
    if batch:
        found.append(batch)
    return found


def cosine(done: float) -> float:
    """From 1 to 0 as `done` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def falling_rate(agent: Agent, iteration: int, count: int) -> Callable[[int], float]:
    """Reflection's learning rate: one cosine over all iterations together (reading 11)."""

    def rate_at(step: int) -> float:
        done = (iteration - 1 + step / max(1, count)) / agent.iterations
        return agent.config.lr * cosine(done)

    return rate_at


def reflect(agent: Agent, name: str, i: int, shuffled: list[list], loss_of: Callable) -> None:
    """Trains on an iteration's batches and saves its policy."""
    started = time.time()
    if not shuffled:
        agent.run.say(f"iteration {i}: nothing differs from the expert; nothing to learn")
    train(agent, name, i, shuffled, loss_of, falling_rate(agent, i, len(shuffled)))
    agent.save(f"iter_{i}/policy")
    agent.run.say(f"reflect {i}: {len(shuffled)} updates; {took(started)}")


# ---------------------------------------------------------------------------------------- imitation


def imitate(agent: Agent, pool: list[Encoded], folder: str) -> None:
    """SFT on these trajectories, eq. 2-3: warm-up, then a cosine."""
    config = agent.config
    shuffled = []
    for epoch in range(config.sft_epochs):
        seed = agent.seed("sft", epoch)
        shuffled += batches(pool, lambda item: 1, config.sft_batch, [seed])
    warm_up = max(1, round(config.warmup * len(shuffled)))

    def rate_at(step: int) -> float:
        return config.sft_lr * min((step + 1) / warm_up, cosine(step / len(shuffled)))

    started = time.time()
    train(agent, "sft", 0, shuffled, imitation_loss(agent), rate_at)
    agent.save(folder)
    agent.run.say(
        f"sft: {len(pool)} trajectories, {config.sft_epochs} passes, {len(shuffled)} updates; "
        f"{took(started)}"
    )


def imitation_loss(agent: Agent) -> Callable:
    """Eq. 3 on whole trajectories: mean over all action tokens of the batch."""

    def loss_of(micro: list[Encoded], batch: list[Encoded]):
        scores = score(agent.policy, micro)
        logps = torch.cat([now.trunk_tokens for now in scores])
        count = sum(item.action_tokens for item in batch)
        return losses.sft_loss(logps, torch.ones_like(logps), count)  # eq. 2-3

    return loss_of


# ----------------------------------------------------------------------------------------- episodes


def play(
    agent: Agent, tasks: list[str], label: str, prompt: list[dict], temperature: float, seed: int
) -> list[Trajectory]:
    """Episodes of the policy, one a task, the tasks shared among the ranks."""
    config, ranks = agent.config, agent.ranks
    my_tasks = tasks[ranks.rank :: ranks.world]
    longest = 2 * max(demonstration.encoded.tokens for demonstration in agent.experts)
    longest = min(longest, agent.policy.config.max_position_embeddings)
    with agent.generating(label, len(my_tasks)) as bar:
        # The cache grows by a quarter.
        fits = int(agent.cache_room() / (1.25 * longest))
        played = run_episodes(
            agent.policy,
            agent.tokenizer,
            agent.env,
            my_tasks,
            prompt=prompt,
            temperature=temperature,
            max_new_tokens=config.max_new_tokens,
            batch=max(1, min(config.episodes, fits)),
            seed=seed,
            progress=bar.update,
        )
    by_task = {}
    for part in ranks.gather({episode.task_id: episode for episode in played}):
        by_task |= part
    return [by_task[task] for task in tasks]


def write_episodes(agent: Agent, name: str, episodes: list[Trajectory], ids: bool = False) -> None:
    """One episode a line; ids: with the sampled tokens, which are to be learnt from."""
    if agent.ranks.rank > 0:
        return
    lines = []
    for episode in episodes:
        row = {
            "task_id": episode.task_id,
            "task_type": agent.env.task_type(episode.task_id),
            "reward": episode.reward,
            "truncated": episode.truncated,
            **episode.info,
            "steps": [],
        }
        for step in episode.steps:
            turn = {"observation": step.observation, "action": step.action}
            if ids:
                turn["ids"] = step.ids
            row["steps"].append(turn)
        if ids:
            row["last"] = episode.last
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(agent.run.path(name), "".join(lines))


def took(started: float) -> str:
    """Time since then, for the screen."""
    seconds = round(time.time() - started)
    return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"
