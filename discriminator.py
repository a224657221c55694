"""The discriminator D of StepAgent-Inverse, and the value head of PPO on whole episodes.

    D(s, a) = p_phi(a | s) / (p_phi(a | s) + pi_i(a | s))

phi begins as a copy of the policy pi_i, where D is 1/2, and learns eq. 11 end to end (reading 4).
The logit of D is log p_phi(a | s) - log pi_i(a | s): it comes out of the same pass over trunk and
leaves as everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import losses
from rollout import Scores
from system.files import read_tensors, write_tensors
from training import Agent, Practised
from trajectory import InputError

# ------------------------------------------------------------------------------------------------ D


class ActionValues(NamedTuple):
    """A number for each action of one trajectory, D's logit or log D: [S], [S, K]."""

    expert: Tensor
    agent: Tensor


def logits_of(now: Scores, before: Practised) -> ActionValues:
    """Logits of D. now: scores by phi; before: those by pi_i."""
    device = now.trunk.device
    expert = now.trunk - before.ref_expert.to(device)
    agent = now.leaves.view(before.ref_agent.shape) - before.ref_agent.to(device)
    return ActionValues(expert, agent)


def phi_loss(scores: list[Scores], micro: list[Practised], batch: list[Practised]):
    """Eq. 11 on the actions of a micro-batch, divided by the whole batch's numbers."""
    logits = [logits_of(now, before) for now, before in zip(scores, micro)]
    expert = torch.cat([values.expert for values in logits])
    agent = torch.cat([values.agent.flatten() for values in logits])
    count_expert = sum(len(record.ref_expert) for record in batch)
    count_agent = sum(record.ref_agent.numel() for record in batch)
    return losses.discriminator_loss(expert, agent, count_expert, count_agent)  # eq. 11


def parts_of(config) -> list[int | None]:
    """Which discriminators an iteration trains: [None], one on all tasks; or [0, 1], one per half.

    --d-scores learnt: it scores what it learnt from. held-out: each of the two learns from one half
    of the tasks and scores the other.
    """
    return [None] if config.d_scores == "learnt" else [0, 1]


def part_name(name: str, part: int | None) -> str:
    return name if part is None else f"{name}_{part}"


def split_by_part(agent: Agent, items: list, part: int | None) -> tuple[list, list]:
    """Of items with .task_id: those that this D learns from, and those that it scores."""
    if part is None:
        return items, items
    places = agent.fold_places()
    halves = [[], []]
    for item in items:
        halves[places[item.task_id] % 2].append(item)
    return halves[1 - part], halves[part]


def save_logits(agent: Agent, i: int, part: int | None, logits: list[ActionValues]) -> None:
    if agent.ranks.rank == 0:
        tensors = {
            "expert": torch.cat([values.expert for values in logits]),
            "agent": torch.cat([values.agent for values in logits]),
        }
        write_tensors(agent.run.path(part_name(f"iter_{i}/logits", part) + ".safetensors"), tensors)


def read_log_d(agent: Agent, i: int, practised: list[Practised]) -> list[ActionValues]:
    """log D of every action, line 12, in the order of `practised`."""
    log_d = {}
    for part in parts_of(agent.config):
        _, scored = split_by_part(agent, practised, part)
        saved = read_tensors(agent.run.path(part_name(f"iter_{i}/logits", part) + ".safetensors"))
        steps = [len(record.ref_expert) for record in scored]
        expert = losses.step_reward(saved["expert"]).split(steps)  # line 12
        practice = losses.step_reward(saved["agent"]).split(steps)
        for record, log_d_expert, log_d_practice in zip(scored, expert, practice):
            log_d[record.task_id] = ActionValues(log_d_expert, log_d_practice)
    return [log_d[record.task_id] for record in practised]


def figures_of(
    logits: list[ActionValues], practised: list[Practised], where: str
) -> dict[str, float]:
    """How well D tells expert from practice; where: learnt or held_out, the end of the names."""
    if not logits:
        return {}
    expert = torch.cat([values.expert for values in logits])
    agent = torch.cat([values.agent for values in logits])
    differs = torch.cat([record.differs for record in practised])
    loss = losses.discriminator_loss(expert, agent.flatten())[0].item()
    figures = {
        f"d_auc_{where}": losses.area_under_curve(expert, agent.flatten()),
        f"d_loss_{where}": loss,
    }
    if where == "held_out":
        # The minimum of eq. 11 is 2 log 2 - 2 JS, so that any D gives a lower bound.
        figures["js"] = math.log(2) - loss / 2
    if differs.any():
        above = expert[:, None] > agent
        figures[f"d_pairs_{where}"] = above[differs].float().mean().item()
    return figures


def reward_figures(log_d: list[ActionValues], practised: list[Practised]) -> dict[str, float]:
    """The reward, log D, of expert and practice actions."""
    expert = torch.cat([values.expert for values in log_d])
    agent = torch.cat([values.agent for values in log_d])
    equal = ~torch.cat([record.differs for record in practised])
    means = {"log_d_expert": expert.mean().item(), "log_d_agent": agent.mean().item()}
    return means | losses.reward_gap(agent, equal)


# --------------------------------------------------------------------------------------- value head

FOLDS = (0, 1)


class Head(nn.Module):
    """V(s): a small MLP on the policy's frozen hidden state at the state's last token.

    [.., d] -> [..]. Heads are fitted in two folds by task, so that none judges what it learnt.
    """

    def __init__(self, features: int, width: int = 64):
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(features))
        self.std = nn.Buffer(torch.ones(features))
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp((features - self.mean) / self.std).squeeze(-1)

    @classmethod
    def load_or_make(cls, path: Path, features: int, seed: int) -> Head:
        """The head of the iteration before, where there is one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = cls(features)
        if path.exists():
            head.load_state_dict(read_tensors(path))
        return head


@dataclass
class Fold:
    """Indices of steps: what a head is fitted on, what decides when it stops, what it judges."""

    learn: Tensor
    held_out: Tensor
    judge: Tensor


def fold_of(places: Tensor, fold: int) -> Fold:
    """One of two folds by task. places [S]: the place of each step's task in a random order.

    A head learns from the tasks at every other place, and is stopped by a fifth of them (by all,
    where they are too few). It judges the tasks left out.
    """
    # Even and odd places are the two folds. In the fold that learns, every fifth is held out.
    judged = places % 2 == fold
    held_out = ~judged & (places // 2 % 5 == 0)
    learn = ~judged & ~held_out
    if not learn.any():
        learn = ~judged
    if not held_out.any():
        held_out = learn
    return Fold(*(mask.nonzero()[:, 0] for mask in (learn, held_out, judged)))


def fit(
    head: Head,
    features: Tensor,
    loss_on: Callable[[Tensor], Tensor],
    fold: Fold,
    lr: float,
    seed: int,
    max_passes: int = 50,
    patience: int = 3,
) -> dict[str, float]:
    """Adam until the held-out loss has not fallen for more than `patience` passes.

    The best weights stay. features: what the input is standardised by. loss_on(step indices) ->
    loss. -> figures.
    """
    head.mean = features.mean(0)
    head.std = features.std(0) + 1e-6
    optimizer = torch.optim.Adam(head.mlp.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    best, best_weights, waited = math.inf, None, 0
    for passes in range(max_passes + 1):
        with torch.no_grad():
            held_out_loss = loss_on(fold.held_out).item()
        if held_out_loss < best:
            best, waited = held_out_loss, 0
            best_weights = {name: weight.clone() for name, weight in head.state_dict().items()}
        else:
            waited += 1
        if waited > patience or passes == max_passes or not math.isfinite(held_out_loss):
            break
        order = torch.randperm(len(fold.learn), generator=generator)
        for steps in fold.learn[order].split(256):
            optimizer.zero_grad()
            loss_on(steps).backward()
            optimizer.step()
    if best_weights is None:
        raise InputError("a head's loss is not finite; the policy's features are broken")
    head.load_state_dict(best_weights)
    with torch.no_grad():
        return {"loss": loss_on(fold.learn).item(), "loss_held": best, "passes": passes}
