"""What tests use instead of the agent's episodes, and PPO's loss worked out by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run, words_of

import baselines
import naive
import stepagent
import training
from stepagent import METHODS, prepare
from training import Agent
from trajectory import Step, Trajectory

Writer = Callable[[Trajectory, int], Trajectory]


def forge(monkeypatch, write: Writer) -> None:
    """The agent's training episodes are write(expert trajectory, number of the episode)."""
    numbers = iter(range(10**6))

    def played(agent, tasks, label, prompt, temperature, seed):
        experts = {one.task_id: one.trajectory for one in agent.experts}
        episodes = [write(experts[task], next(numbers)) for task in tasks]
        for episode in episodes:
            steps = []
            for step in episode.steps:
                ids = agent.tokenizer(step.action + "<|end|>").input_ids
                steps.append(replace(step, ids=ids))
            episode.steps = steps
        return episodes

    monkeypatch.setattr(baselines, "play", played)


def same(expert: Trajectory, number: int) -> Trajectory:
    return copy_of(expert)


def copy_of(expert: Trajectory, steps=None, reward=1.0, **more) -> Trajectory:
    turns = [Step(step.observation, step.action) for step in steps or expert.steps]
    return Trajectory(expert.task_id, [], turns, reward, info={"invalid": 0}, **more)


def changed(expert: Trajectory, word, reward=1.0) -> Trajectory:
    """The expert's trajectory with another first thought."""
    first, *rest = expert.steps
    thought = first.action.replace("Thought:", f"Thought: {word}")
    return copy_of(expert, [replace(first, action=thought), *rest], reward)


def failed(expert: Trajectory, word) -> Trajectory:
    return changed(expert, word, 0.0)


def cut(expert: Trajectory, steps: int, reward: float) -> Trajectory:
    """An episode that the step limit ended."""
    return copy_of(expert, expert.steps[:steps], reward, truncated=True, last="Nothing happens.")


def opened(out: Path, *words: str) -> Agent:
    """The agent of a run that may have begun, with its last policy."""
    config = stepagent.parse(words_of(out, words))
    return prepare(config, METHODS[config.method])


def after(out: Path, monkeypatch, write: Writer, *words: str) -> Agent:
    """The agent of a run whose training episodes are forged and that makes no update."""
    forge(monkeypatch, write)
    monkeypatch.setattr(training, "train", lambda *rest: None)
    run(out, *words)
    return opened(out, *words)


def nudge(policy: torch.nn.Module, sign: int = 1) -> None:
    """Another policy, near this one."""
    for weight in policy.parameters():
        weight.data += sign * 0.01 * torch.sin(torch.arange(weight.numel()).view_as(weight).float())


def assert_ppo_loss(loss, info: dict, policy, actions: list, count: int) -> None:
    """Clipped PPO with entropy weight 0.3 and KL weight 0.7, token by token, divided by count.

    actions: ((state, action), old log-prob of each token, advantage).
    """
    objective, entropy, kl, clipped = 0.0, 0.0, 0.0, 0
    for pair, old, advantage in actions:
        logps = naive.token_logps(policy, *pair)
        for ratio in (logps - old).exp().tolist():
            bounded = min(max(ratio, 0.8), 1.2)
            objective += min(ratio * advantage, bounded * advantage)
            kl += 1 / ratio - 1 + math.log(ratio)
            clipped += abs(ratio - 1) > 0.2
        entropy += naive.entropies(policy, *pair).sum().item()
    expected = (-objective - 0.3 * entropy + 0.7 * kl) / count
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    assert info["entropy"].item() == pytest.approx(entropy / count, rel=1e-3)
    assert info["kl"].item() == pytest.approx(kl / count, rel=1e-3)
    assert clipped > 0 and info["clip_share"].item() == pytest.approx(clipped / count)
