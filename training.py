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
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import losses
from rollout import Scores, pass_tokens, run_episodes, score
from system.checkpoints import updates
from system.files import write_tensors, write_text
from system.model import save_policy
from system.ranks import Ranks
from system.run_dir import RunDir
from system.sharding import gathered, room
from trajectory import (
    Encoded,
    InputError,
    Trajectory,
    action_text,
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

    def seed(self, *parts) -> int:
        return stable_seed(self.config.seed, *parts)

    def fold_places(self) -> dict[str, int]:
        """Task -> its place in a fixed random order, for folds."""
        tasks = [demonstration.task_id for demonstration in self.practice_set]
        tasks.sort(key=lambda task: self.seed("fold", task))
        return {task: place for place, task in enumerate(tasks)}

    def save(self, folder: str) -> None:
        """An ordinary Hugging Face folder, float32; a later start of the run continues from it."""
        save_policy(self.run, self.ranks, self.policy, self.tokenizer, self.run.path(folder))
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
        """Tokens whose keys and values take a quarter of the memory."""
        return room(self.ranks, self.policy, self.config.dtype)


# ---------------------------------------------------------------------- what an inspection leaves


@dataclass
class Practised:
    """The inspection of one trajectory: S expert steps, K practice actions each.

    Log-probs are those of the iteration's starting policy, by the training forward (reading 5).
    """

    demonstration: Demonstration
    # [S][K] token ids.
    actions: list[list[list[int]]]
    # [S, K] the text is not the expert's (reading 8).
    differs: Tensor
    # [S], [S, K] summed log-probs of the expert's and of the agent's actions.
    ref_expert: Tensor
    ref_agent: Tensor
    # [practice tokens] log-prob of each token of the agent's actions.
    ref_tokens: Tensor
    # [S, d], [S, K, d] features for D.
    expert_hidden: Tensor
    agent_hidden: Tensor

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


def save_practice(agent: Agent, i: int, records: list[dict[str, Tensor]]) -> None:
    """iter_<i>/practice.safetensors: the trajectories' records, one after another."""
    joined = {name: torch.cat([record[name] for record in records]) for name in records[0]}
    write_tensors(agent.run.path(f"iter_{i}/practice.safetensors"), joined)


def practice_record(
    agent: Agent, demonstration: Demonstration, leaves: list[tuple[int, list[int]]], scores: Scores
) -> dict[str, Tensor]:
    """What practice.safetensors keeps of one trajectory."""
    differs = []
    for step, ids in leaves:
        expert = demonstration.trajectory.steps[step].action
        differs.append(action_text(agent.tokenizer, ids).strip() != expert.strip())
    tensors = {
        "ref_trunk": scores.trunk,
        "ref_leaves": scores.leaves,
        "old_tokens": scores.leaf_tokens,
        "trunk_hidden": scores.trunk_hidden.float(),
        "leaf_hidden": scores.leaf_hidden.float(),
        "leaves": torch.tensor([token for _, ids in leaves for token in ids]),
        "lengths": torch.tensor([len(ids) for _, ids in leaves]),
        "kept": torch.tensor(differs),
    }
    # Copies, not views: a view would keep all of its storage.
    return {name: tensor.cpu().clone() for name, tensor in tensors.items()}


def read_practice(agent: Agent, i: int) -> list[Practised]:
    """Always from disk: a killed run continues from the same bits."""
    saved = load_file(agent.run.path(f"iter_{i}/practice.safetensors"))
    k = agent.config.practice
    practised = []
    step = token = 0
    for demonstration in agent.practice_set:
        steps = slice(step, step + len(demonstration.encoded.spans))
        leaves = slice(k * steps.start, k * steps.stop)
        lengths = saved["lengths"][leaves].tolist()
        tokens = slice(token, token + sum(lengths))
        flat = [ids.tolist() for ids in saved["leaves"][tokens].split(lengths)]
        practised.append(
            Practised(
                demonstration=demonstration,
                actions=[flat[first : first + k] for first in range(0, len(flat), k)],
                differs=saved["kept"][leaves].view(-1, k),
                ref_expert=saved["ref_trunk"][steps],
                ref_agent=saved["ref_leaves"][leaves].view(-1, k),
                ref_tokens=saved["old_tokens"][tokens],
                expert_hidden=saved["trunk_hidden"][steps],
                agent_hidden=saved["leaf_hidden"][leaves].unflatten(0, (-1, k)),
            )
        )
        step, token = steps.stop, tokens.stop
    return practised


def write_practice(agent: Agent, i: int, practised: list[Practised], log_d: list | None = None):
    """iter_<i>/practice.jsonl, for people to read: one expert step a line.

    log_d: [(expert [S], agent [S, K])] of each trajectory, once D has judged.
    """
    lines = []
    for number, one in enumerate(practised):
        # The ids of an expert file may be its own.
        kind = "" if agent.config.expert else agent.env.task_type(one.task_id)
        for step, turn in enumerate(one.demonstration.trajectory.steps):
            row = {
                "task": one.task_id,
                "task_type": kind,
                "step": step,
                "observation": turn.observation,
                "expert": turn.action,
                "expert_logp": round(one.ref_expert[step].item(), 4),
                "practice": [action_text(agent.tokenizer, ids) for ids in one.actions[step]],
                "practice_logp": rounded(one.ref_agent[step]),
                "differs": one.differs[step].tolist(),
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
    for one in practised:
        for step, ids in one.leaves:
            expert = one.demonstration.trajectory.steps[step].action
            text = action_text(agent.tokenizer, ids)
            same_action.append(parse_action(text) == parse_action(expert))
            stopped.append(ids[-1] in stops)
            tokens += len(ids)
    differs = torch.cat([one.differs.flatten() for one in practised])
    return {
        "match_text": 1 - differs.float().mean().item(),
        "match_action": float(np.mean(same_action)),
        "pairs_kept": int(differs.sum()),
        "stopped": float(np.mean(stopped)),
        "practice_tokens": tokens,
    }


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
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    label = f"iteration {iteration}: {name}" if iteration else name
    for step, batch in updates(run, ranks, policy, optimizer, batches, label):
        started = time.time()
        info = defaultdict(float)
        for micro, weight in ranks.micro_batches(policy, batch, config.micro_tokens):
            with ranks.autocast(config.dtype):
                loss, figures = loss_of(micro, batch)
            (weight * loss).backward()
            for key, figure in figures.items():
                info[key] += weight * figure.item()
        info = ranks.sum_gradients(policy, info)
        norm = ranks.clip(policy, config.grad_norm)
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
        logps = torch.cat([one.trunk_tokens for one in scores])
        count = sum(item.action_tokens for item in batch)
        return losses.sft_loss(logps, torch.ones_like(logps), count)  # eq. 2-3

    return loss_of


# ----------------------------------------------------------------------------------------- episodes


def play(
    agent: Agent, tasks: list[str], label: str, prompt: list[dict], temperature: float, seed: int
) -> list[Trajectory]:
    """Episodes of the policy, one a task, the tasks shared among the ranks."""
    config, ranks = agent.config, agent.ranks
    mine = tasks[ranks.rank :: ranks.world]
    longest = 2 * max(demonstration.encoded.tokens for demonstration in agent.experts)
    longest = min(longest, agent.policy.config.max_position_embeddings)
    with agent.generating(label, len(mine)) as bar:
        # The cache grows by half.
        fits = int(agent.cache_room() / (1.5 * longest))
        played = run_episodes(
            agent.policy,
            agent.tokenizer,
            agent.env,
            mine,
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
    for episode in by_task.values():
        # nan, too.
        if not 0 <= episode.reward <= 1:
            write_episodes(agent, "failed_batch.json", [episode])
            raise InputError(
                f"{label}: the environment gave task {episode.task_id} the reward "
                f"{episode.reward}, which is not within 0 and 1; episode saved in "
                f"{agent.run.path('failed_batch.json')}"
            )
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
