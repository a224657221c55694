"""PPO on whole episodes, for Table 2's PPO and Table 3's rewards `final` and `both`."""

import json
import math

import pytest
import torch
from forged import (
    after,
    assert_ppo_loss,
    changed,
    copy_of,
    cut,
    forge,
    nudge,
    opened,
)
from ranks import QUIET, metrics, run, same_bits
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import baselines
import losses
import naive
import training
from baselines import read_advantages, read_played
from rollout import score
from system.model import read_back
from training import Agent
from trajectory import InputError

ONE = [*QUIET, "--method"]


def constant_values(monkeypatch, value: float, fitted: list) -> None:
    """Value heads say `value`, whatever they see; fitted: the steps that they would learn from."""

    def fit(head, features, loss_on, fold, lr, seed):
        fitted.extend([*fold.learn.tolist(), *fold.held_out.tolist()])
        for weight in head.parameters():
            weight.data.zero_()
        head.mlp[-1].bias.data.fill_(value)
        return {"loss": 0.0}

    monkeypatch.setattr(baselines, "fit", fit)


def test_advantages_of_whole_episodes_by_hand(tmp_path, monkeypatch, model):
    """V = 0.5 everywhere, gamma 1, lambda 0.95.

    Success: the last delta is 1 - 0.5. The first episode ended by itself with nothing: -0.5. Two
    were cut: the value of their last state stands in, delta 0; it is no target of the value head.
    """
    fitted = []
    constant_values(monkeypatch, 0.5, fitted)

    def write(expert, number):
        if number % 2:
            return copy_of(expert)
        return cut(expert, 3, 0.0) if number else copy_of(expert, expert.steps[:3], 0.0)

    words = [*ONE, "ppo", "--iterations", "1", "--model", model]
    agent = after(tmp_path / "x", monkeypatch, write, *words)
    expected, real = [], []
    played = read_advantages(agent, 1)
    for number, one in enumerate(played):
        is_cut = number in (2, 4)
        delta = 0.5 if number % 2 else -0.5
        if is_cut:
            delta = 0.0
        expected += [0.95 ** (one.steps - 1 - step) * delta for step in range(one.steps)]
        assert one.real.tolist() == [True] * one.steps + [False] * is_cut
        assert len(one.encoded.spans) == one.steps + is_cut == len(one.lengths)
        real += one.real.tolist()
    real = torch.tensor(real)
    advantages = torch.cat([one.advantage for one in played])
    assert torch.allclose(advantages[real], losses.whiten(torch.tensor(expected)), atol=1e-5)
    assert not advantages[~real].any()
    assert set(fitted) == set(real.nonzero()[:, 0].tolist())


def test_an_end_that_outgrows_the_context_has_no_state_after_it(tmp_path, monkeypatch, model):
    """There is no value to stand in for what would have come."""

    def write(expert, number):
        return copy_of(expert, expert.steps[:3], 0.0, truncated=True, last="far too long " * 500)

    agent = after(tmp_path / "x", monkeypatch, write, *ONE, "ppo", "--model", model)
    for one in read_played(agent, 1):
        assert one.episode.truncated and one.real.tolist() == [True] * 3


@pytest.mark.parametrize("value, more", [(0.7, 0.1), (0.2, 0.0)])
def test_a_cut_episode_is_not_paid_twice(tmp_path, monkeypatch, model, value, more):
    """Reward 0.6 at the cut and V = 0.7 there: 0.1 more would have come. A V below adds nothing."""
    constant_values(monkeypatch, value, [])
    given, last_values, discounts, gae = [], [], [], losses.gae

    def watched(rewards, values, gamma, lam, last_value=0.0):
        given.append(rewards.tolist())
        last_values.append(last_value)
        discounts.append((gamma, lam))
        return gae(rewards, values, gamma, lam, last_value)

    monkeypatch.setattr(losses, "gae", watched)
    words = [*ONE, "ppo", "--iterations", "1", "--gamma", "0.9", "--gae-lambda", "0.8"]
    words += ["--model", model]
    after(tmp_path / "x", monkeypatch, lambda expert, number: cut(expert, 3, 0.6), *words)
    # Six returns, then six advantages.
    assert last_values[:6] == [0.0] * 6
    assert last_values[6:] == pytest.approx([more] * 6, abs=1e-6)
    assert discounts == [(0.9, 1.0)] * 6 + [(0.9, 0.8)] * 6
    # The reward is the last action's, not that of the state after it.
    rewards = [0.0, 0.0, pytest.approx(0.6)]
    assert given == [[*rewards, 0.0]] * 6 + [rewards] * 6


def test_a_value_head_goes_on_in_the_next_iteration(tmp_path, monkeypatch, model):
    begun, fit = [], baselines.fit

    def watched(head, *rest):
        begun.append({name: weight.clone() for name, weight in head.state_dict().items()})
        return fit(head, *rest)

    monkeypatch.setattr(baselines, "fit", watched)
    out = run(tmp_path / "x", *ONE, "ppo", "--model", model)
    for fold in (0, 1):
        saved = load_file(out / "iter_1" / f"value_{fold}.safetensors")
        assert same_bits(saved, begun[2 + fold]) and not same_bits(saved, begun[fold])


def test_figures_of_the_judge_by_hand(tmp_path, monkeypatch, model):
    """Returns are 1 in three episodes and 0 in the others. Values are half of them."""

    def fit_values(agent, i, states, returns, places, real):
        return returns / 2, {}

    def write(expert, number):
        return copy_of(expert, reward=float(number % 2))

    monkeypatch.setattr(baselines, "fit_values", fit_values)
    words = [*ONE, "ppo", "--iterations", "1", "--model", model]
    agent = after(tmp_path / "x", monkeypatch, write, *words)
    steps = [len(one.trajectory.steps) for one in agent.experts]
    [row] = metrics(agent.run.out, "judge")
    assert row["explained"] == pytest.approx(0.75) and row["step_rewards"] == 0
    assert row["returns"] == pytest.approx(sum(steps[1::2]) / sum(steps))


def test_ppo_makes_rewarded_episodes_likelier(tmp_path, monkeypatch, model):
    def write(expert, number):
        return changed(expert, "good", 1.0) if number % 2 else changed(expert, "bad", 0.0)

    forge(monkeypatch, write)
    words = [*ONE, "ppo", "--iterations", "1", "--lr", "1e-2", "--epochs", "4", "--entropy", "0"]
    words += ["--model", model]
    out = run(tmp_path / "x", *words)
    first = metrics(out, "ppo")[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["clip_share"] == 0
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    agent = opened(out, *words)
    good, bad = [], []
    for one in read_advantages(agent, 1):
        with torch.no_grad():
            [now] = score(agent.policy, [one.encoded])
        moved = (now.trunk_tokens - one.old_tokens).mean().item()
        (good if one.episode.reward else bad).append(moved)
    assert sum(good) / len(good) - sum(bad) / len(bad) > 0.01


def test_the_loss_of_ppo_by_hand(tmp_path, monkeypatch, model):
    """Clipped PPO, entropy and KL over real actions' tokens, divided by those of the batch."""

    def write(expert, number):
        return cut(expert, 2, 0.0) if number % 2 else copy_of(expert)

    words = [*ONE, "ppo", "--iterations", "1", "--model", model]
    agent = after(tmp_path / "x", monkeypatch, write, *words)
    batch = read_advantages(agent, 1)[:3]
    nudge(agent.policy)
    agent.save("other")
    agent.config.entropy, agent.config.kl, agent.config.ppo_passes = 0.3, 0.7, 3
    given = {}

    def record(agent, name, iteration, batches, loss_of, rate_at):
        given["name"], given["batches"] = name, batches
        given["loss"], given["info"] = loss_of(batch[:2], batch)

    monkeypatch.setattr(training, "train", record)
    baselines.reflect_episodes(agent, 1)
    policy = LlamaForCausalLM.from_pretrained(agent.run.path("other"), attn_implementation="eager")
    actions = []
    for one in batch[:2]:
        pairs = naive.expert_pairs([one.encoded])[: one.steps]
        old = one.old_tokens.split(one.lengths.tolist())
        actions += zip(pairs, old, one.advantage.tolist())
    count = sum(sum(one.lengths.tolist()[: one.steps]) for one in batch)
    assert_ppo_loss(given["loss"], given["info"], policy, actions, count)
    assert given["name"] == "ppo"
    # Three passes over six episodes, each in an order of its own.
    order = [one.task_id for one_batch in given["batches"] for one in one_batch]
    passes = [order[:6], order[6:12], order[12:]]
    assert all(len(set(names)) == len(names) == 6 for names in passes)
    assert passes[0] != passes[1] != passes[2]


def test_too_few_tasks_for_two_value_heads_are_refused_at_the_start(tmp_path, model):
    few = ["--practice-experts", "3", "--model", model]
    inverse = ["stepagent-inverse", "--reward"]
    for number, words in enumerate((["ppo"], [*inverse, "final"], [*inverse, "both"])):
        out = tmp_path / str(number)
        with pytest.raises(InputError, match="3 expert trajectories to practise are too few: .* 4"):
            run(out, *ONE, *words, *few)
        assert json.loads((out / "state.json").read_text())["done"] == []


def test_worlds_that_fail_may_leave_too_few_tasks_for_two_value_heads(tmp_path, monkeypatch, model):
    def write(expert, number):
        episode = changed(expert, number)
        episode.info["unplayable"] = int(number >= 3)
        return episode

    with pytest.raises(InputError, match="episodes of 3 tasks are too few for two value heads"):
        after(tmp_path / "x", monkeypatch, write, *ONE, "ppo", "--model", model)


# -------------------------------------------------------------------------- Table 3: final and both


def test_both_rewards_weigh_alike_and_a_cut_episodes_last_state_has_none(
    tmp_path, monkeypatch, model
):
    rewards, gae = [], losses.gae

    def watched(own, values, gamma, lam, last_value=0.0):
        rewards.append(own.clone())
        return gae(own, values, gamma, lam, last_value)

    def write(expert, number):
        return changed(expert, number, float(number % 2)) if number % 3 else cut(expert, 2, 0.0)

    monkeypatch.setattr(losses, "gae", watched)
    words = [*QUIET, "--method", "stepagent-inverse", "--reward", "both", "--iterations", "1"]
    agent = after(tmp_path / "x", monkeypatch, write, *words, "--model", model)
    played = read_played(agent, 1)
    final = torch.tensor([one.episode.reward for one in played])
    steps = torch.tensor([own.sum() for own in rewards[: len(played)]]) - final
    assert steps.std(unbiased=False).item() == pytest.approx(
        final.std(unbiased=False).item(), rel=1e-4
    )
    is_cut = [one.episode.truncated for one in played]
    assert is_cut == [True, False, False] * 2
    for own in (own for own, truncated in zip(rewards, is_cut) if truncated):
        assert len(own) == 3 and own[:2].abs().min() > 0 and own[2] == 0
    kinds = {row["phase"] for row in metrics(agent.run.out)}
    assert {"inspect", "discriminate", "explore", "judge"} <= kinds


@pytest.mark.parametrize("scores", ["learnt", "held-out"])
def test_a_step_is_rewarded_by_the_saved_discriminators(tmp_path, monkeypatch, model, scores):
    """log D + log 2, clamped at both ends, by naive passes; the policy comes back to the bit."""

    def write(expert, number):
        return changed(expert, number, float(number % 2))

    words = [*QUIET, "--method", "stepagent-inverse", "--reward", "both", "--iterations", "1"]
    words += ["--d-scores", scores, "--model", model]
    agent = after(tmp_path / "x", monkeypatch, write, *words)
    names = ["discriminator"] if scores == "learnt" else ["discriminator_0", "discriminator_1"]
    for number, name in enumerate(names):
        nudge(agent.policy, -1 if number else 1)
        agent.save(f"iter_1/{name}")
        read_back_first(agent)
    policy = {name: weight.clone() for name, weight in agent.policy.state_dict().items()}
    played = read_played(agent, 1)
    before = [naive_sums(agent, "sft/policy", one) for one in played]
    found = baselines.step_rewards(agent, 1, played, before)
    assert same_bits(policy, agent.policy.state_dict())
    places = agent.fold_places()
    expected = []
    for one, old in zip(played, before):
        name = names[places[one.task_id] % 2 if len(names) == 2 else 0]
        logits = naive_sums(agent, f"iter_1/{name}", one) - old
        reward = torch.nn.functional.logsigmoid(logits) + math.log(2)
        expected.append(reward.clamp(-math.log(2), math.log(2)))
    expected = torch.cat(expected)
    assert torch.allclose(found, expected, atol=1e-3) and expected.std() > 0.01


def read_back_first(agent: Agent) -> None:
    agent.run.state["policy"] = "sft/policy"
    read_back(agent.run, agent.policy)


def naive_sums(agent: Agent, folder: str, one) -> torch.Tensor:
    policy = LlamaForCausalLM.from_pretrained(agent.run.path(folder), attn_implementation="eager")
    with torch.no_grad():
        return naive.sums(policy, naive.expert_pairs([one.encoded]))


@pytest.mark.parametrize("reward", ["final", "both"])
def test_whole_episode_rewards_of_inverse_go_through_their_phases(tmp_path, model, reward):
    """With `final` nothing is inspected: it is Table 2's PPO under another name."""
    words = [*QUIET, "--method", "stepagent-inverse", "--reward", reward, "--iterations", "1"]
    out = run(tmp_path / "x", *words, "--model", model)
    kinds = {row["phase"] for row in metrics(out)}
    assert kinds == {"sft", "explore", "judge", "stepagent-inverse"} | (
        {"inspect", "discriminator", "discriminate"} if reward == "both" else set()
    )
