"""The discriminator D and the value head: small heads on the policy's frozen features.

They are fitted in two folds by task, so that no head judges what it was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trajectory import InputError

FOLDS = (0, 1)


class Head(nn.Module):
    """A small MLP on frozen features, [.., d] -> [..].

    The discriminator D(s, a) = P(the expert wrote a in s), as a logit, reads the hidden state at
    the action's last token (reading 4). The value V(s) reads the one at the state's last token.
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
            head.load_state_dict(load_file(path))
        return head


@dataclass
class Fold:
    """Numbers of the steps to learn from, to stop by, and to judge."""

    learn: Tensor
    held_out: Tensor
    judge: Tensor


def fold_of(places: Tensor, fold: int) -> Fold:
    """One of two folds by task. places [S]: the place of each step's task in a random order.

    A head learns from the tasks at every other place, and is stopped by a fifth of them (by all,
    where they are too few). It judges the tasks left out.
    """
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
    most: int = 50,
    patience: int = 3,
) -> dict[str, float]:
    """Adam until the held-out loss has not fallen for `patience` passes; the best weights stay.

    features: what the input is standardised by. loss_on(step numbers) -> loss. -> figures.
    """
    head.mean = features.mean(0)
    head.std = features.std(0) + 1e-6
    optimizer = torch.optim.Adam(head.mlp.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    best, best_weights, waited = math.inf, None, 0
    for passes in range(most + 1):
        with torch.no_grad():
            held_out_loss = loss_on(fold.held_out).item()
        if held_out_loss < best:
            best, waited = held_out_loss, 0
            best_weights = {name: weight.clone() for name, weight in head.state_dict().items()}
        else:
            waited += 1
        if waited > patience or passes == most or not math.isfinite(held_out_loss):
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


def mean_figures(folds: list[dict[str, float]], prefix: str) -> dict[str, float]:
    """The folds' figures, averaged, under prefix_name."""
    means = {}
    for name in folds[0]:
        means[f"{prefix}_{name}"] = sum(figures[name] for figures in folds) / len(folds)
    return means
