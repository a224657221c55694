"""Losses of StepAgent as pure functions of tensors: no model, no I/O, no collectives.

Shapes: B rows, T tokens, N actions, V vocabulary. An action's log-prob is the sum over its tokens,
in nats, fp32. Equation numbers are those of "From Novice to Expert" (WWW '25) and stand on the line
that implements them.

Every loss returns (loss, info). `count` is the denominator (default: the local number), so that
micro-batches and ranks that all divide by the global number add up to the loss of the whole batch.
The figures in `info` are divided by the same number and add up in the same way. An empty input
gives 0 with a graph.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Info = dict[str, Tensor]


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """log pi(id) of each token. [.., V], [..] -> [..], fp32."""
    logps = torch.log_softmax(_wide(logits), -1)
    return logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Exact entropy of each token's distribution, in nats. [.., V] -> [..], fp32."""
    logps = torch.log_softmax(_wide(logits), -1)
    return -(logps.exp() * logps).sum(-1)  # H of eq. 8


def _wide(values: Tensor) -> Tensor:
    """fp32 (fp64 stays, for tests)."""
    return values if values.dtype == torch.float64 else values.float()


def _mean(values: Tensor, count: float | None, mask: Tensor | None = None) -> Tensor:
    """Mean of values[mask]; with `count` their sum / count, a part's share of a batch's mean.

    Masked-out values may be anything, also nan.
    """
    if count is None:
        count = values.numel() if mask is None else int(mask.sum())
    if mask is not None:
        values = torch.where(mask.bool(), values, 0.0)
    return values.sum() / max(count, 1)


def sft_loss(logps: Tensor, mask: Tensor, count: float | None = None) -> tuple[Tensor, Info]:
    """Eq. 2-3: mean negative log-prob of the action tokens. logps, mask [..].

    Eq. 2 lacks the log that eq. 3 has.
    """
    loss = -_mean(logps, count, mask)  # eq. 2-3
    return loss, {"nll": loss.detach()}


def dpo_loss(
    logp_expert: Tensor,
    logp_agent: Tensor,
    ref_logp_expert: Tensor,
    ref_logp_agent: Tensor,
    beta: float,
    count: float | None = None,
) -> tuple[Tensor, Info]:
    """Eq. 6, step-wise DPO: in the same state, expert action chosen, practice action rejected.

    All [N]: log-probs of the two actions under the policy and under the reference.
    """
    chosen = beta * (logp_expert - ref_logp_expert)
    rejected = beta * (logp_agent - ref_logp_agent)
    margin = chosen - rejected
    loss = _mean(-F.logsigmoid(margin), count)  # eq. 6
    info = {
        "dpo_loss": loss,
        "margin": _mean(margin, count),
        "accuracy": _mean((margin > 0).float(), count),
        "chosen_reward": _mean(chosen, count),
        "rejected_reward": _mean(rejected, count),
        "logp_chosen": _mean(logp_expert, count),
        "logp_rejected": _mean(logp_agent, count),
    }
    return loss, {name: figure.detach() for name, figure in info.items()}


def discriminator_loss(
    logit_expert: Tensor,
    logit_agent: Tensor,
    count_expert: float | None = None,
    count_agent: float | None = None,
) -> tuple[Tensor, Info]:
    """Eq. 11 with D = P(expert), so that it is bounded. [N], [M] logits of D.

    -E_expert[log D] - E_agent[log(1 - D)]; 2 log 2 where D is 1/2. The counts are the denominators
    of the two means.
    """
    expert_term = _mean(-F.logsigmoid(logit_expert), count_expert)
    agent_term = _mean(-F.logsigmoid(-logit_agent), count_agent)
    loss = expert_term + agent_term  # eq. 11
    return loss, {"d_loss": loss.detach()}


def step_reward(logit: Tensor, floor: float = -5.0) -> Tensor:
    """log D of Algorithm 1, line 12. [..] -> [..].

    Rises with expert-likeness, 0 at best, never below `floor` nats.
    """
    return F.logsigmoid(logit).clamp(min=floor)  # line 12


def gae(
    rewards: Tensor, values: Tensor, gamma: float, lam: float, last_value: float = 0.0
) -> Tensor:
    """Generalised advantage estimates of one episode. [n], [n] -> [n].

    last_value: V of the state after a truncated end.
    """
    advantages = torch.zeros_like(values)
    advantage = 0.0
    next_value = last_value
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        advantage = delta + gamma * lam * advantage
        advantages[t] = advantage
        next_value = values[t]
    return advantages


def whiten(values: Tensor) -> Tensor:
    """Zero mean, unit variance (population).

    Values become 0 if rounding alone could tell them apart: they are nats, or rewards within 0 and
    1, and the log-prob of an action is a sum of hundreds of float32 numbers.
    """
    if values.numel() == 0 or values.std(unbiased=False) <= 1e-4:
        return torch.zeros_like(values)
    return (values - values.mean()) / values.std(unbiased=False)


def ppo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    count: float | None = None,
) -> tuple[Tensor, Info]:
    """Clipped PPO, ratio and clip per token. All [B, T], the action's advantage on its tokens."""
    # Padding must not reach exp.
    log_ratio = torch.where(mask.bool(), logps - old_logps, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -_mean(torch.min(ratio * advantages, clipped * advantages), count, mask)  # line 12
    outside = (ratio.detach() - 1).abs() > clip
    info = {
        "ppo_loss": loss.detach(),
        "ratio": _mean(ratio.detach(), count, mask),
        "clip_share": _mean(outside.float(), count, mask),
    }
    return loss, info


def value_loss(values: Tensor, returns: Tensor, count: float | None = None) -> tuple[Tensor, Info]:
    """Half the squared error of the value head. [N], [N]."""
    loss = _mean(0.5 * (values - returns) ** 2, count)
    return loss, {"value_loss": loss.detach()}


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || ref) per token sampled from pi. [..], [..] -> [..].

    Never negative. On practice tokens, which were sampled from ref itself, it is exact in mean only
    while pi is still near ref.
    """
    log_ratio = ref_logps - logps
    return log_ratio.exp() - 1 - log_ratio


def add_up(parts: list[tuple[Tensor, Info]]) -> tuple[Tensor, Info]:
    """The sum of (loss, info) pairs that share one denominator."""
    loss = sum(part for part, _ in parts)
    info = {name: sum(figures[name] for _, figures in parts) for name in parts[0][1]}
    return loss, info


# ------------------------------------------------------------------------------ figures for the log


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """P(a positive scores above a negative), ties half: the AUC of D's logits."""
    both = torch.cat([positive, negative])
    _, inverse, counts = both.unique(return_inverse=True, return_counts=True)
    # The mean rank, from 1, of all values that are equal.
    mean_rank = counts.cumsum(0) - (counts - 1) / 2
    rank_sum = mean_rank[inverse[: len(positive)]].sum()
    n = len(positive)
    return ((rank_sum - n * (n + 1) / 2) / (n * len(negative))).item()


def reward_gap(reward: Tensor, equal: Tensor) -> dict[str, float]:
    """Mean reward of practice actions with the expert's text minus that of the others.

    [S, K] each. Over the states that have both kinds; empty where no state has. With K > 1, PPO
    compares the actions of a state: unless this is above 0, reward does not lead to the expert.
    """
    mixed = equal.any(1) & ~equal.all(1)
    if not mixed.any():
        return {}
    reward, equal = reward[mixed], equal[mixed]
    mean_equal = (reward * equal).sum(1) / equal.sum(1)
    mean_other = (reward * ~equal).sum(1) / (~equal).sum(1)
    return {"log_d_gap": (mean_equal - mean_other).mean().item()}


def bootstrap(values: list[float], draws: int = 2000) -> list[float]:
    """95% percentile interval of the mean, over tasks."""
    values = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return [float(low), float(high)]
