"""Small heads on the policy's frozen features, fitted in two folds so that none judges what it was fitted to: the discriminator D and
the value V."""
from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rollout import InputError


class Head(nn.Module):
    """A small MLP on frozen features, [.., d] -> [..]: the discriminator D(s, a) = P(the expert wrote a in s), as a logit, on the hidden
    state at the action's last token (reading 4), and the value V(s) on the one at the state's last token."""

    def __init__(self, features: int, width: int = 64):
        super().__init__()
        self.mean, self.std = nn.Buffer(torch.zeros(features)), nn.Buffer(torch.ones(features))
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp((x - self.mean) / self.std).squeeze(-1)

    @classmethod
    def load_or_make(cls, path: Path | None, features: int, seed: int) -> Head:
        """From the iteration before, where there is one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = cls(features)
        if path and path.exists():
            head.load_state_dict(load_file(path))
        return head


def two_folds(tasks: Tensor, fold: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step numbers to learn from, to stop by (a fifth of those tasks; the same, where there are too few), and of the tasks left out.
    tasks [S]: the place of each step's task in a fixed random order."""
    other = tasks % 2 != fold
    held = other & (tasks // 2 % 5 == 0)
    learn = other & ~held if (other & ~held).any() else other
    return *(x.nonzero()[:, 0] for x in (learn, held if held.any() else learn, ~other)),


def fit(head: Head, features: Tensor, loss_on, learn: Tensor, held: Tensor, lr: float, seed: int, figures: dict, name: str,
        most: int = 50, patience: int = 3) -> None:
    """Adam, until the held-out loss has not fallen for more than `patience` passes; the head keeps its best weights. features: what the
    input is standardised by; loss_on(step numbers) -> loss. Half of what it reports is added to figures, as there are two folds."""
    head.mean, head.std = features.mean(0), features.std(0) + 1e-6
    optimizer, gen = torch.optim.Adam(head.mlp.parameters(), lr=lr), torch.Generator().manual_seed(seed)
    best, kept, waited = math.inf, None, 0
    for passes in range(most + 1):
        with torch.no_grad():
            loss = loss_on(held).item()
        waited = 0 if loss < best else waited + 1
        if loss < best:
            best, kept = loss, {name: x.clone() for name, x in head.state_dict().items()}
        if waited > patience or passes == most or not math.isfinite(loss):
            break
        for steps in learn[torch.randperm(len(learn), generator=gen)].split(256):
            optimizer.zero_grad()
            loss_on(steps).backward()
            optimizer.step()
    if kept is None:
        raise InputError(f"{name}: the loss is not finite; the policy's features are broken")
    head.load_state_dict(kept)
    with torch.no_grad():
        for key, x in {f"{name}_loss": loss_on(learn).item(), f"{name}_loss_held": best, f"{name}_passes": passes}.items():
            figures[key] += x / 2
