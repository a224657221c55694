"""Losses of StepAgent as pure functions of tensors: no model, no I/O, no collectives.

Shapes: B rows, T tokens, N actions, V vocabulary. An action's log-prob is the sum over its tokens, in nats, fp32. Equations are
those of "From Novice to Expert" (WWW '25); its eq. numbers stand on the line that implements them.

Every loss returns (loss, info). `count` is the denominator (default: the local number), so that micro-batches and ranks that all
divide by the global number add up to the loss of the whole batch; the figures in `info` are divided by the same number and add up
in the same way. An empty input gives 0 with a graph.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Info = dict[str, Tensor]


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """log pi(id) of each token. [.., V], [..] -> [..], fp32."""
    return torch.log_softmax(_wide(logits), -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Exact entropy of each token's distribution, in nats. [.., V] -> [..], fp32."""
    logp = torch.log_softmax(_wide(logits), -1)
    return -(logp.exp() * logp).sum(-1)


def _wide(x: Tensor) -> Tensor:
    """fp32 (fp64 stays, for tests)."""
    return x if x.dtype == torch.float64 else x.float()


def _mean(x: Tensor, count: float | None, mask: Tensor | None = None) -> Tensor:
    """Sum of x where mask holds, over count. Masked-out values may be anything, even nan."""
    if mask is not None:
        x = torch.where(mask.bool(), x, 0.0)
    return x.sum() / max(count if count is not None else (x.numel() if mask is None else int(mask.sum())), 1)


def sft_loss(logps: Tensor, mask: Tensor, count: float | None = None) -> tuple[Tensor, Info]:
    """Eq. 2-3: mean negative log-prob of the action tokens (eq. 2 with the log that eq. 3 has). logps, mask [..]."""
    loss = -_mean(logps, count, mask)
    return loss, {"nll": loss.detach()}


def dpo_loss(logp_expert: Tensor, logp_agent: Tensor, ref_logp_expert: Tensor, ref_logp_agent: Tensor, beta: float,
             count: float | None = None) -> tuple[Tensor, Info]:
    """Eq. 6, step-wise DPO: the expert's action chosen, the agent's practice action in the same state rejected. All [N]."""
    chosen, rejected = beta * (logp_expert - ref_logp_expert), beta * (logp_agent - ref_logp_agent)
    margin = chosen - rejected
    loss = _mean(-F.logsigmoid(margin), count)                                     # eq. 6
    figures = {"margin": margin, "accuracy": (margin > 0).float(), "chosen_reward": chosen, "rejected_reward": rejected,
               "logp_chosen": logp_expert, "logp_rejected": logp_agent}
    return loss, {name: _mean(x.detach(), count) for name, x in figures.items()} | {"dpo_loss": loss.detach()}


def discriminator_loss(logit_expert: Tensor, logit_agent: Tensor) -> tuple[Tensor, Info]:
    """Eq. 11 with D = P(expert), so that it is bounded: -E_expert[log D] - E_agent[log(1 - D)]. [N], [M] logits of D."""
    loss = _mean(-F.logsigmoid(logit_expert), None) + _mean(-F.logsigmoid(-logit_agent), None)
    return loss, {"d_loss": loss.detach()}


def step_reward(logit: Tensor, floor: float = -5.0) -> Tensor:
    """log D of Algorithm 1, line 12: rises with expert-likeness, 0 at best, never below `floor` nats. [..] -> [..]."""
    return F.logsigmoid(logit).clamp(min=floor)


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float, last_value: float = 0.0) -> Tensor:
    """Generalised advantage estimates of one episode, [n], [n] -> [n]; last_value: V of the state after a truncated end."""
    advantages, following, next_value = torch.zeros_like(values), 0.0, last_value
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        following = delta + gamma * lam * following
        advantages[t], next_value = following, values[t]
    return advantages


def whiten(x: Tensor) -> Tensor:
    """Zero mean, unit variance (population); a constant x becomes 0, whatever rounding leaves of its spread."""
    if not x.numel() or (std := x.std(unbiased=False)) <= 1e-6 * x.abs().max():
        return torch.zeros_like(x)
    return (x - x.mean()) / std


def ppo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float,
             count: float | None = None) -> tuple[Tensor, Info]:
    """Clipped PPO, ratio and clip per token; all [B, T], the action's advantage on each of its tokens."""
    log_ratio = torch.where(mask.bool(), logps - old_logps, 0.0)                   # padding must not reach exp
    ratio = log_ratio.exp()
    loss = -_mean(torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), count, mask)
    outside = (ratio.detach() - 1).abs() > clip
    return loss, {"ppo_loss": loss.detach(), "ratio": _mean(ratio.detach(), count, mask),
                  "clip_share": _mean(outside.float(), count, mask)}


def value_loss(values: Tensor, returns: Tensor, count: float | None = None) -> tuple[Tensor, Info]:
    """Half the squared error of the value head. [N], [N]."""
    loss = _mean(0.5 * (values - returns) ** 2, count)
    return loss, {"value_loss": loss.detach()}


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || ref) for each token sampled from pi; never negative. [..], [..] -> [..].
    On practice tokens, sampled from ref itself, it is exact in mean only while pi is still near ref."""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - 1 - log_ratio


# ---------------------------------------------------------------------------------------------------------- figures for the log

def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """P(a positive scores above a negative), ties half: the AUC of D's logits, expert against agent."""
    values, inverse, counts = torch.cat([positive, negative]).unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[inverse[:len(positive)]]          # mean rank, from 1, of each positive
    n = len(positive)
    return ((rank.sum() - n * (n + 1) / 2) / (n * len(negative))).item()


def reward_gap(reward: Tensor, equal: Tensor) -> dict[str, float]:
    """Mean reward of practice actions with the expert's text minus that of the others, over the states that have both; nothing where
    no state has. [S, K] each. With K > 1 PPO compares a state's actions: where this is not above 0, reward does not lead to the expert."""
    mixed = equal.any(1) & ~equal.all(1)
    mean = lambda mask: (reward * mask).sum(1)[mixed] / mask.sum(1)[mixed]
    return {"log_d_gap": (mean(equal) - mean(~equal)).mean().item()} if mixed.any() else {}


def bootstrap(values: list[float], draws: int = 2000) -> list[float]:
    """95% percentile interval of the mean, over tasks."""
    x = np.asarray(values, dtype=float)
    means = x[np.random.default_rng(0).integers(len(x), size=(draws, len(x)))].mean(1)
    return [float(q) for q in np.percentile(means, [2.5, 97.5])]
