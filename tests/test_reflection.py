"""What StepAgent is: the inspection, and reflection with implicit and with inverse rewards."""

import json
import math
from pathlib import Path

import pytest
import torch
from forged import assert_ppo_loss, nudge
from ranks import (
    QUIET,
    assert_alike,
    distance,
    metrics,
    run,
    same_bits,
    weights,
)
from transformers import LlamaForCausalLM

import envs
import naive
import stepagent
import training
from discriminator import ActionValues, read_log_d
from rollout import score
from stepagent import METHODS, Config, prepare, step_advantages
from training import Agent, Demonstration, Practised, read_practice
from trajectory import Encoded, InputError, Trajectory

ONE = [*QUIET, "--iterations", "1"]


@pytest.fixture(scope="module")
def start_from(model, tmp_path_factory):
    """Options that begin with this model after a little SFT: its practice differs now and then."""
    out = tmp_path_factory.mktemp("sft") / "run"
    words = ["--sft-epochs", "40", "--sft-lr", "1e-2", "--max-new-tokens", "30"]
    run(out, *QUIET, "--method", "sft", "--model", model, *words)
    return ["--model", model, "--init", str(out / "policy"), "--max-new-tokens", "30"]


def practice_rows(out: Path, i: int = 1) -> list[dict]:
    return [json.loads(line) for line in (out / f"iter_{i}" / "practice.jsonl").open()]


def reopened(out: Path) -> Agent:
    """The agent of a finished run, with its last policy."""
    config = Config(**json.loads((out / "config.json").read_text())["config"])
    return prepare(config, METHODS[config.method])


# ---------------------------------------------------------------------------------- the inspection


def test_practice_is_scored_by_the_policy_that_practised(tmp_path, start_from):
    """By naive passes; practice of one trajectory does not depend on the others."""
    out = run(tmp_path / "x", *ONE, *start_from, "--lr", "0")
    alone = run(tmp_path / "y", *ONE, *start_from, "--lr", "0", "--leaves", "1")
    assert practice_rows(out) == practice_rows(alone)
    agent = reopened(out)
    policy = LlamaForCausalLM.from_pretrained(out / "policy", attn_implementation="eager")
    [row] = metrics(out, "inspect")
    assert 0 < row["pairs_kept"] < 2 * len(practice_rows(out)) and row["iteration"] == 1
    for one in read_practice(agent, 1)[:2]:
        expert = naive.sums(policy, naive.expert_pairs([one.encoded]))
        leaf_pairs = naive.leaf_pairs([one.encoded], [one.leaves])
        tokens = torch.cat([naive.token_logps(policy, *pair) for pair in leaf_pairs])
        assert torch.allclose(one.ref_expert, expert, atol=1e-3)
        assert torch.allclose(one.ref_agent_tokens, tokens, atol=1e-3)
        sums = naive.sums(policy, leaf_pairs).view(one.ref_agent.shape)
        assert torch.allclose(one.ref_agent, sums, atol=1e-3)
        expert = torch.cat(
            [naive.token_logps(policy, *pair) for pair in naive.expert_pairs([one.encoded])]
        )
        assert torch.allclose(one.ref_expert_tokens, expert, atol=1e-3)


def test_every_iteration_draws_practice_of_its_own(tmp_path, start_from):
    """At a rate of 0 the policy stays as it is."""
    out = run(tmp_path / "x", *QUIET, *start_from, "--lr", "0")
    first, second = practice_rows(out, 1), practice_rows(out, 2)
    assert [row["expert_logp"] for row in first] == [row["expert_logp"] for row in second]
    assert [row["practice"] for row in first] != [row["practice"] for row in second]


def steps_of(one: Demonstration) -> int:
    return len(one.encoded.spans)


def test_practice_that_is_decoded_together_fits(monkeypatch):
    """At most --leaves actions, and keys and values within the room for them."""
    data = []
    for number, steps in enumerate((3, 1, 5, 2, 4)):
        spans = [(step + 1, step + 2) for step in range(steps)]
        data.append(Demonstration(Trajectory(f"t{number}"), Encoded(list(range(20)), spans)))
    agent = Agent(None, None, None, None, [], None, None, data, 1)
    room = 10**9
    monkeypatch.setattr(Agent, "cache_room", lambda self: room)

    def grouped_by(**options):
        agent.config = Config(**options)
        groups = stepagent.groups_that_fit(agent, data, 2)
        assert sum(groups, []) == data
        return [list(map(steps_of, group)) for group in groups]

    assert grouped_by(leaves=12) == [[3, 1], [5], [2, 4]]
    assert grouped_by(leaves=1) == [[3], [1], [5], [2], [4]]
    # 20 + 2 * 10 tokens for each step: 80, 40, 120, 60, 100.
    room = 125
    assert grouped_by(leaves=99, max_new_tokens=10) == [[3, 1], [5], [2], [4]]


# -------------------------------------------------------------------- reflection on forged practice


def forge(monkeypatch, write) -> None:
    """Practice actions are write(encoded, step, number) instead of the policy's."""

    def practice(model, encoded, k, *rest):
        found = []
        for item in encoded:
            actions = []
            for step in range(len(item.spans)):
                actions.append([write(item, step, number) for number in range(k)])
            found.append(actions)
        return found

    monkeypatch.setattr(stepagent, "practice", practice)


def expert_ids(item: Encoded, step: int) -> list[int]:
    first, end = item.spans[step]
    return item.ids[first:end]


def test_equal_actions_leave_the_policy_as_it_is(tmp_path, monkeypatch, model):
    forge(monkeypatch, lambda item, step, number: expert_ids(item, step))
    out = run(tmp_path / "x", *QUIET, "--model", model)
    assert len(metrics(out, "inspect")) == 2
    for row in metrics(out, "inspect"):
        assert (row["match_text"], row["match_action"], row["stopped"]) == (1, 1, 1)
        assert row["pairs_kept"] == 0
    assert metrics(out, "implicit") == []
    assert same_bits(weights(out / "policy"), weights(out / "sft" / "policy"))


def one_wrong_action(monkeypatch) -> str:
    """All practice equals the expert's, but for one action of one trajectory; -> its task."""
    wrong = envs.some(envs.make_env("household").splits["train"], 6)[3]

    def write(item, step, number):
        right = expert_ids(item, step)
        return [7, 8, right[-1]] if (item.task_id, step, number) == (wrong, 1, 1) else right

    forge(monkeypatch, write)
    return wrong


def test_only_pairs_that_differ_are_counted(tmp_path, monkeypatch, model):
    wrong = one_wrong_action(monkeypatch)
    out = run(tmp_path / "x", *ONE, "--model", model)
    [row], [update] = metrics(out, "inspect"), metrics(out, "implicit")
    assert row["pairs_kept"] == 1 and update["trajectories"] == 1
    assert json.loads((out / "iter_1" / "batches.json").read_text()) == [[wrong]]
    assert update["dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert update["margin"] == pytest.approx(0, abs=1e-4)
    differing = [row for row in practice_rows(out) if any(row["differs"])]
    assert [(row["task"], row["step"]) for row in differing] == [(wrong, 1)]
    assert differing[0]["differs"] == [False, True]


def test_the_nll_of_all_trajectories_can_be_added(tmp_path, monkeypatch, model):
    """With --dpo-nll those without a pair are learnt from, too, and the policy moves further."""
    one_wrong_action(monkeypatch)
    plain = run(tmp_path / "x", *ONE, "--model", model)
    added = run(tmp_path / "y", *ONE, "--model", model, "--dpo-nll", "1")
    rows = metrics(added, "implicit")
    assert sum(row["trajectories"] for row in rows) == 6
    # The batch with the pair is filled by a size of 0 a trajectory, so there is one.
    assert rows[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert not same_bits(weights(plain / "policy"), weights(added / "policy"))
    [first] = metrics(plain, "implicit")
    assert "nll" in first and first["nll"] != rows[0]["nll"]


# ------------------------------------------------------------------------------------- reflections


def moved(out: Path) -> list[tuple[Practised, torch.Tensor, torch.Tensor]]:
    """(practice, change of the expert's log-probs [S], of the agent's [S, K]) by reflection."""
    agent = reopened(out)
    found = []
    for one in read_practice(agent, 1):
        with torch.no_grad():
            [now] = score(agent.policy, [one.encoded], [one.leaves])
        agents = now.leaves.view(one.ref_agent.shape) - one.ref_agent
        found.append((one, now.trunk - one.ref_expert, agents))
    return found


def test_implicit_reflection_prefers_expert_to_practice(tmp_path, model):
    out = run(tmp_path / "x", *ONE, "--model", model, "--lr", "1e-2")
    gains = []
    for one, expert, agent in moved(out):
        gains += (expert[:, None] - agent)[one.differs].tolist()
        # --max-new-tokens
        assert max(len(ids) for _, ids in one.leaves) == 6
    assert sum(gains) / len(gains) > 1
    rows = metrics(out, "implicit")
    assert rows[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[-1]["accuracy"] > 0.7 and rows[-1]["dpo_loss"] < rows[0]["dpo_loss"]


def test_the_implicit_loss_is_the_naive_one(tmp_path, monkeypatch, start_from):
    """Eq. 6 on the pairs of two trajectories that differ, divided by those of three."""
    out = run(tmp_path / "x", *ONE, *start_from)
    agent = reopened(out)
    # Another policy than the one that practised.
    nudge(agent.policy)
    agent.save("other")
    batch = read_practice(agent, 1)[:3]
    found = {}

    def record(agent, name, iteration, batches, loss_of, rate_at):
        found[name] = loss_of(batch[:2], batch)

    monkeypatch.setattr(training, "train", record)
    agent.config.dpo_nll = 0.5
    stepagent.reflect_implicit(agent, 1, batch)
    loss, info = found["implicit"]
    policy = LlamaForCausalLM.from_pretrained(out / "other", attn_implementation="eager")
    reference = LlamaForCausalLM.from_pretrained(
        agent.config.init, attn_implementation="eager"
    ).requires_grad_(False)
    expert, practised = [], []
    for one in batch[:2]:
        states = naive.expert_pairs([one.encoded])
        for step, number in one.differs.nonzero().tolist():
            expert.append(states[step])
            practised.append((states[step][0], one.actions[step][number]))
    pairs = sum(int(one.differs.sum()) for one in batch)
    assert 0 < len(expert) < pairs
    naive_loss, figures = naive.implicit_loss(
        policy, reference, expert, practised, agent.config.beta
    )
    share = len(expert) / pairs
    states = naive.expert_pairs([one.encoded for one in batch[:2]])
    nll = -sum(naive.token_logps(policy, *pair).sum() for pair in states)
    nll = nll / sum(one.encoded.action_tokens for one in batch)
    assert loss.item() == pytest.approx((naive_loss * share + 0.5 * nll).item(), rel=1e-4)
    assert info["nll"].item() == pytest.approx(nll.item(), rel=1e-4)
    accuracy = figures["accuracy"].item() * share
    assert info["accuracy"].item() == pytest.approx(accuracy, rel=1e-4) and accuracy > 0
    every = sum(one.differs.numel() for one in batch)
    assert info["accuracy_all"].item() == pytest.approx(accuracy * pairs / every, rel=1e-4)


def test_advantages_compare_the_actions_of_a_state_by_hand():
    """The baseline is the mean of the state's other actions; then all are whitened together."""
    two = ActionValues(torch.zeros(2), torch.tensor([[-1.0, -2.0], [-3.0, -3.0]]))
    one = ActionValues(torch.zeros(1), torch.tensor([[-1.0, -4.0]]))
    first, second = step_advantages([two, one])
    # 1, -1, 0, 0 and 3, -3: mean 0, variance 20 / 6.
    deviation = math.sqrt(20 / 6)
    assert torch.allclose(first * deviation, torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    assert torch.allclose(second * deviation, torch.tensor([[3.0, -3.0]]))
    # Three actions.
    [only] = step_advantages([ActionValues(torch.zeros(1), torch.tensor([[0.0, -2.0, -4.0]]))])
    assert torch.allclose(only, torch.tensor([[3.0, 0.0, -3.0]]) / math.sqrt(6))


def test_a_single_action_is_compared_with_those_of_all_states():
    lone = [ActionValues(torch.zeros(2), torch.tensor([[-1.0], [-3.0]]))]
    [advantage] = step_advantages(lone)
    assert torch.allclose(advantage, torch.tensor([[1.0], [-1.0]]))


def test_a_reward_that_rounding_alone_tells_apart_is_none():
    """phi, still the policy, may have read other trajectories together."""
    noise = 1e-6 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    [advantage] = step_advantages([ActionValues(torch.zeros(50), math.log(0.5) + noise)])
    assert not advantage.any()


def test_inverse_reflection_prefers_what_the_discriminator_rewards(tmp_path, monkeypatch, model):
    """Reward 0 for the first practice action of every state, -1 for the second."""

    def read_log_d(agent, i, practised):
        found = []
        for one in practised:
            rewards = torch.tensor([0.0, -1.0]).repeat(len(one.actions), 1)
            found.append(ActionValues(torch.zeros(len(one.actions)), rewards))
        return found

    monkeypatch.setattr(stepagent, "read_log_d", read_log_d)
    words = ["--method", "stepagent-inverse", "--lr", "1e-2", "--entropy", "0"]
    out = run(tmp_path / "x", *ONE, "--model", model, *words)
    gains = []
    for one, _, agent in moved(out):
        for (first, second), (gain, other) in zip(one.actions, agent.tolist()):
            if first != second:
                gains.append(gain - other)
    assert sum(gains) / len(gains) > 0.05
    rows = metrics(out, "inverse")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-8)
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-5) and rows[0]["clip_share"] == 0
    assert rows[-1]["ratio"] != rows[0]["ratio"] and rows[-1]["kl"] > 0


def test_the_loss_of_inverse_reflection_by_hand(tmp_path, monkeypatch, start_from):
    """Clipped PPO, entropy and KL over the tokens of two trajectories, divided by all three's."""
    words = ["--method", "stepagent-inverse", "--lr", "0"]
    out = run(tmp_path / "x", *ONE, *start_from, *words)
    agent = reopened(out)
    agent.config.entropy, agent.config.kl = 0.3, 0.7
    nudge(agent.policy)
    agent.save("other")
    batch = read_practice(agent, 1)[:3]
    generator = torch.Generator().manual_seed(0)
    log_d = []
    for one in batch:
        rewards = torch.randn(one.ref_agent.shape, generator=generator)
        log_d.append(ActionValues(one.ref_expert, rewards))
    given = {}

    def record(agent, name, iteration, batches, loss_of, rate_at):
        given["loss"], given["info"] = loss_of(batch[:2], batch)
        given["batches"] = batches

    monkeypatch.setattr(training, "train", record)
    agent.config.ppo_passes = 3
    batch[0].differs.zero_()
    stepagent.reflect_inverse(agent, 1, batch, log_d)
    policy = LlamaForCausalLM.from_pretrained(out / "other", attn_implementation="eager")
    actions = []
    for one, advantage in zip(batch[:2], step_advantages(log_d)):
        pairs = naive.leaf_pairs([one.encoded], [one.leaves])
        old = one.ref_agent_tokens.split([len(ids) for _, ids in one.leaves])
        actions += zip(pairs, old, advantage.flatten().tolist())
    count = sum(len(one.ref_agent_tokens) for one in batch)
    assert_ppo_loss(given["loss"], given["info"], policy, actions, count)
    # Every pass takes every trajectory, in an order of its own; equal actions count, too.
    order = [one.task_id for one_batch in given["batches"] for one in one_batch]
    passes = [tuple(order[first : first + 3]) for first in range(0, len(order), 3)]
    assert [len(set(names)) for names in passes] == [3, 3, 3] and len(set(passes)) > 1
    assert [len(one_batch) for one_batch in given["batches"]] == [1] * 9


def test_the_experts_action_in_the_group_by_hand():
    """It comes first, is one of the baseline's actions, and stands on its own tokens."""
    log_d = [ActionValues(torch.tensor([0.0]), torch.tensor([[-1.0, -2.0]]))]
    [advantage] = step_advantages(log_d, with_expert=True)
    # 0 against -1.5, -1 against -1, -2 against -0.5: 1.5, 0, -1.5.
    assert torch.allclose(advantage, torch.tensor([[1.0, 0.0, -1.0]]) * math.sqrt(1.5))


def test_the_loss_with_the_experts_action_in_the_group(tmp_path, monkeypatch, start_from):
    """Clipped PPO over the tokens of expert and practice, by naive passes."""
    words = [*INVERSE, "--lr", "0", "--entropy", "0.3", "--kl", "0.7", "--expert-in-group", "true"]
    out = run(tmp_path / "x", *ONE, *start_from, *words)
    agent = reopened(out)
    nudge(agent.policy)
    agent.save("other")
    batch = read_practice(agent, 1)[:3]
    generator = torch.Generator().manual_seed(0)
    log_d = []
    for one in batch:
        shape = one.ref_agent.shape
        expert, actions = torch.randn(shape[0], generator=generator), torch.randn(shape)
        log_d.append(ActionValues(expert, actions))
    given = []

    def record(agent, name, iteration, batches, loss_of, rate_at):
        given.append(loss_of(batch[:2], batch))

    monkeypatch.setattr(training, "train", record)
    stepagent.reflect_inverse(agent, 1, batch, log_d)
    policy = LlamaForCausalLM.from_pretrained(out / "other", attn_implementation="eager")
    objective = kl = entropy = 0.0
    for one, advantages in zip(batch[:2], step_advantages(log_d, with_expert=True)):
        expert = naive.expert_pairs([one.encoded])
        of_expert = [end - start for start, end in one.encoded.spans]
        of_agent = [len(ids) for _, ids in one.leaves]
        actions = zip(expert, one.ref_expert_tokens.split(of_expert), advantages[:, 0])
        leaves = naive.leaf_pairs([one.encoded], [one.leaves])
        olds = one.ref_agent_tokens.split(of_agent)
        actions = [*actions, *zip(leaves, olds, advantages[:, 1:].flatten())]
        for pair, old, advantage in actions:
            ratio = (naive.token_logps(policy, *pair) - old).exp()
            clipped = ratio.clamp(0.8, 1.2)
            objective += torch.min(ratio * advantage, clipped * advantage).sum().item()
        # The policy has sampled practice alone.
        for pair, old in zip(leaves, olds):
            ratio = (naive.token_logps(policy, *pair) - old).exp()
            kl += (1 / ratio - 1 + ratio.log()).sum().item()
            entropy += naive.entropies(policy, *pair).sum().item()
    written = sum(len(one.ref_agent_tokens) for one in batch)
    kl, entropy = kl / written, entropy / written
    objective /= written + sum(one.encoded.action_tokens for one in batch)
    [(loss, info)] = given
    assert info["kl"].item() == pytest.approx(kl, rel=1e-3) and kl > 1e-3
    assert info["entropy"].item() == pytest.approx(entropy, rel=1e-3)
    assert loss.item() == pytest.approx(0.7 * kl - 0.3 * entropy - objective, rel=1e-3)


@pytest.mark.parametrize("method", ["stepagent-implicit", "stepagent-inverse"])
def test_micro_batches_do_not_change_the_update(tmp_path, model, method):
    runs = []
    for name, micro_tokens, leaves in (("a", "8192", "1024"), ("b", "1", "1")):
        words = ["--method", method, "--micro-tokens", micro_tokens, "--leaves", leaves]
        runs.append(run(tmp_path / name, *ONE, "--model", model, *words))
    whole, parts = runs
    whole_weights, part_weights = weights(whole / "policy"), weights(parts / "policy")
    learnt = distance(whole_weights, weights(Path(model)))
    assert distance(whole_weights, part_weights) < 1e-3 * learnt
    assert_alike(whole, parts)


# ------------------------------------------------------------------------------- the discriminator

INVERSE = ["--method", "stepagent-inverse"]
# Trains D and nothing else.
ONLY_D = [*INVERSE, "--lr", "0", "--d-lr", "1e-2"]


def watched_train(monkeypatch, skip: str = "") -> list[dict]:
    """What train is called with; a name that begins with `skip` is not trained."""
    calls, train = [], stepagent.train

    def watched(agent, name, iteration, batches, loss_of, rate_at):
        calls.append({"agent": agent, "name": name, "batches": batches, "loss_of": loss_of})
        calls[-1]["rates"] = [rate_at(step) for step in range(len(batches))]
        if not skip or not name.startswith(skip):
            train(agent, name, iteration, batches, loss_of, rate_at)

    # discriminate calls it by stepagent's name, reflect by training's.
    monkeypatch.setattr(stepagent, "train", watched)
    monkeypatch.setattr(training, "train", watched)
    return calls


def naive_discriminator_loss(policy, reference, batch: list[Practised]):
    """Eq. 11 from one ordinary forward pass a state."""
    expert = naive.expert_pairs([one.encoded for one in batch])
    agent = naive.leaf_pairs([one.encoded for one in batch], [one.leaves for one in batch])
    with torch.no_grad():
        ref_expert, ref_agent = naive.sums(reference, expert), naive.sums(reference, agent)
    expert, agent = naive.sums(policy, expert) - ref_expert, naive.sums(policy, agent) - ref_agent
    return -expert.sigmoid().log().mean() - (1 - agent.sigmoid()).log().mean()


@pytest.mark.parametrize("nudged", [False, True])
def test_the_loss_of_the_discriminator_by_naive_passes(tmp_path, monkeypatch, start_from, nudged):
    """Values and gradients, at the start, where D is 1/2 and the loss 2 log 2, and elsewhere."""
    calls = watched_train(monkeypatch, skip="discriminator")
    out = run(tmp_path / "x", *ONE, *start_from, *ONLY_D)
    agent, loss_of = calls[0]["agent"], calls[0]["loss_of"]
    reference = LlamaForCausalLM.from_pretrained(out / "policy", attn_implementation="eager")
    if nudged:
        nudge(agent.policy)
        agent.save("other")
    folder = out / ("other" if nudged else "policy")
    policy = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    batch = read_practice(agent, 1)[:3]
    # Micro-batches add up to the batch.
    parts = [loss_of(batch[:2], batch), loss_of(batch[2:], batch)]
    loss = sum(part for part, _ in parts)
    expected = naive_discriminator_loss(policy, reference, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert sum(info["d_loss"] for _, info in parts).item() == pytest.approx(loss.item())
    assert (abs(loss.item() - 2 * math.log(2)) < 1e-5) is not nudged
    agent.policy.zero_grad()
    loss.backward()
    expected.backward()
    naive_gradients = {name: weight.grad for name, weight in policy.named_parameters()}
    whole = math.sqrt(sum(grad.square().sum().item() for grad in naive_gradients.values()))
    assert whole > 0.01
    for name, weight in agent.policy.named_parameters():
        assert torch.allclose(weight.grad, naive_gradients[name], atol=1e-4 * whole), name


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "2"]], ids=["full", "lora"])
@pytest.mark.parametrize("scores", ["learnt", "held-out"])
def test_the_discriminator_leaves_the_policy_to_the_bit(tmp_path, start_from, scores, lora):
    words = [*start_from, *ONLY_D, *lora, "--d-scores", scores]
    out = run(tmp_path / "x", *QUIET, *words)
    start = weights(Path(start_from[3]))
    assert same_bits(weights(out / "policy"), start)
    for name in ["discriminator"] if scores == "learnt" else ["discriminator_0", "discriminator_1"]:
        assert distance(weights(out / "iter_2" / name), start) > 0.01
    # The log-probs of the second iteration are those of the first.
    expert = [[row["expert_logp"] for row in practice_rows(out, i)] for i in (1, 2)]
    assert expert[0] == expert[1]


def test_adapters_that_sft_has_learnt_come_back_after_the_discriminator(tmp_path, model):
    words = [*ONLY_D, "--model", model, "--lora-rank", "2", "--sft-lr", "1e-2"]
    out = run(tmp_path / "x", *ONE, *words)
    learnt = weights(out / "sft" / "policy")
    assert same_bits(weights(out / "policy"), learnt)
    assert distance(learnt, weights(Path(model))) > 0.01


def test_phi_begins_as_the_policy_in_every_iteration(tmp_path, monkeypatch, start_from):
    calls = watched_train(monkeypatch)
    words = [*start_from, *INVERSE, "--lr", "0", "--d-lr", "2e-3", "--d-epochs", "3"]
    out = run(tmp_path / "x", *QUIET, *words, "--d-batch", "10")
    firsts = [row for row in metrics(out, "discriminator") if row["step"] == 0]
    assert [row["d_loss"] for row in firsts] == pytest.approx([2 * math.log(2)] * 2, abs=1e-5)
    assert metrics(out, "discriminator")[-1]["d_loss"] < 1.37
    # Three passes over six trajectories of about eight actions each; a cosine from --d-lr to 0.
    of_first = calls[0]
    assert of_first["name"] == "discriminator" and len(of_first["batches"]) > 9
    tasks = [one.task_id for batch in of_first["batches"] for one in batch]
    assert [len(set(tasks[first : first + 6])) for first in (0, 6, 12)] == [6, 6, 6]
    for batch in of_first["batches"][:-1]:
        actions = [one.differs.numel() for one in batch]
        assert sum(actions) >= 10 > sum(actions[:-1])
    assert of_first["rates"][0] == 2e-3 and of_first["rates"] == sorted(of_first["rates"])[::-1]
    assert of_first["rates"][-1] < 4e-4


def test_an_action_of_the_expert_that_the_agent_does_not_take_is_above_one_half(tmp_path, model):
    """The sign: the policy has learnt nothing, so that its practice never is the expert's."""
    out = run(tmp_path / "x", *ONE, "--model", model, *ONLY_D, "--d-epochs", "10")
    agent = reopened(out)
    practised = read_practice(agent, 1)
    half = math.log(0.5)
    for log_d, one in zip(read_log_d(agent, 1, practised), practised):
        assert one.differs.all()
        assert (log_d.expert > half).all() and (log_d.agent < half).float().mean() > 0.9
    [row] = metrics(out, "discriminate")
    assert row["d_auc_learnt"] > 0.95 and row["d_pairs_learnt"] > 0.95
    assert row["d_auc_held_out"] > 0.9 and row["d_pairs_held_out"] > 0.9 and row["js"] > 0.1
    assert row["log_d_expert"] > row["log_d_agent"] + 1
    # Held out: practice of the policy, not of phi, which judges it.
    unseen = stepagent.practise(agent, agent.held_out("dev", [], 100), [1.0, 1.0], "again", 1)
    phi = LlamaForCausalLM.from_pretrained(
        out / "iter_1" / "discriminator", attn_implementation="eager"
    )
    policy = LlamaForCausalLM.from_pretrained(out / "policy", attn_implementation="eager")
    expected = naive_discriminator_loss(phi, policy, unseen).item()
    assert len(unseen) == 3 and row["d_loss_held_out"] == pytest.approx(expected, rel=1e-3)


def test_where_the_discriminator_knows_nothing_the_policy_stays(tmp_path, start_from):
    """log D is the same everywhere but for rounding, and PPO's advantages are 0."""
    words = [*start_from, *INVERSE, "--d-lr", "0", "--lr", "1e-2", "--entropy", "0"]
    # phi reads other trajectories together than inspection did: it rounds otherwise.
    out = run(tmp_path / "x", *ONE, *words, "--leaves", "9", "--micro-tokens", "700")
    [row] = metrics(out, "discriminate")
    assert row["log_d_expert"] == pytest.approx(math.log(0.5), abs=1e-5)
    assert row["log_d_agent"] == pytest.approx(math.log(0.5), abs=1e-5)
    assert row["d_loss_held_out"] == pytest.approx(2 * math.log(2), abs=1e-4)
    assert same_bits(weights(out / "policy"), weights(Path(start_from[3])))


def test_what_the_discriminator_scores(tmp_path, monkeypatch, start_from):
    """learnt: what it learnt from; held-out: the half of the tasks that it did not learn from."""
    calls = watched_train(monkeypatch)
    out = run(tmp_path / "x", *ONE, *start_from, *ONLY_D)
    agent = reopened(out)
    every = {one.task_id for one in agent.practice_set}
    assert [call["name"] for call in calls] == ["discriminator", "inverse"]
    assert {one.task_id for batch in calls[0]["batches"] for one in batch} == every
    assert metrics(out, "discriminate")[0]["part"] is None
    calls.clear()
    out = run(tmp_path / "y", *ONE, *start_from, *ONLY_D, "--d-scores", "held-out")
    agent = reopened(out)
    assert [call["name"] for call in calls] == ["discriminator_0", "discriminator_1", "inverse"]
    halves = [{one.task_id for batch in call["batches"] for one in batch} for call in calls[:2]]
    assert halves[0] | halves[1] == every and not halves[0] & halves[1]
    assert len(halves[0]) == len(halves[1]) == 3
    practised = read_practice(agent, 1)
    rows = {}
    for row in practice_rows(out):
        rows.setdefault(row["task"], []).append(row["expert_log_d"])
    for part, learnt in enumerate(halves):
        # Scored by the model that is saved, naively.
        folder = out / "iter_1" / f"discriminator_{part}"
        phi = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
        scored = [one for one in practised if one.task_id not in learnt]
        for one in scored:
            logits = naive.sums(phi, naive.expert_pairs([one.encoded])) - one.ref_expert
            expected = logits.sigmoid().log().clamp(min=-5).tolist()
            assert rows[one.task_id] == pytest.approx(expected, abs=2e-3)
    first, second = metrics(out, "discriminate")
    assert (first["part"], second["part"]) == (0, 1)
    assert "log_d_gap" not in first and "log_d_gap" in second
    assert {"d_auc_learnt", "d_auc_held_out"} <= first.keys() & second.keys()


def test_log_d_comes_back_by_trajectory(tmp_path, start_from):
    out = run(tmp_path / "x", *ONE, *start_from, *ONLY_D, "--d-scores", "held-out")
    agent = reopened(out)
    practised = read_practice(agent, 1)
    log_d = read_log_d(agent, 1, practised)
    rows = practice_rows(out)
    assert [one.agent.shape for one in log_d] == [one.ref_agent.shape for one in practised]
    expert = torch.cat([one.expert for one in log_d]).tolist()
    agents = torch.cat([one.agent for one in log_d]).tolist()
    assert expert == pytest.approx([row["expert_log_d"] for row in rows], abs=1e-4)
    for found, row in zip(agents, rows, strict=True):
        assert found == pytest.approx(row["practice_log_d"], abs=1e-4)
    # Never positive, never below -5.
    assert all(-5 <= value <= 0 for found in agents for value in found)
    # The practice action with the expert's words is better than the other one by so much.
    gaps = []
    for row in rows:
        if row["differs"] in ([True, False], [False, True]):
            first, second = row["practice_log_d"]
            gaps.append(second - first if row["differs"][0] else first - second)
    figures = metrics(out, "discriminate")[-1]
    assert len(gaps) > 3 and figures["log_d_gap"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-3)


def test_a_world_without_dev_tasks_has_no_held_out_figures(tmp_path, monkeypatch, start_from):
    monkeypatch.setattr(Agent, "held_out", lambda *rest: [])
    out = run(tmp_path / "x", *ONE, *start_from, *ONLY_D)
    [row] = metrics(out, "discriminate")
    assert "d_auc_learnt" in row and "d_auc_held_out" not in row and "js" not in row


def test_one_trajectory_has_no_other_half(tmp_path, model):
    words = [*INVERSE, "--practice-experts", "1", "--model", model, "--d-scores", "held-out"]
    with pytest.raises(InputError, match="1 expert trajectories to practise are too few: .* 2 w"):
        run(tmp_path / "x", *ONE, *words)
    assert json.loads((tmp_path / "x" / "state.json").read_text())["done"] == []


# ------------------------------------------------------------------------------------- agreement


def test_agreement_is_of_the_greedy_and_of_a_sampled_action(tmp_path, monkeypatch, start_from):
    """Greedy is right but in the first step, sampled in the first step alone."""
    out = run(tmp_path / "x", *ONE, *start_from)
    agent, asked = reopened(out), []

    def practice(model, encoded, k, temperatures, *rest):
        asked.append(temperatures)
        found = []
        for item in encoded:
            pairs = [[expert_ids(item, step), [7, 8]] for step in range(len(item.spans))]
            found.append([pairs[0][::-1], *pairs[1:]])
        return found

    monkeypatch.setattr(stepagent, "practice", practice)
    prompt = [{"role": "user", "content": "Rules."}]
    figures = stepagent.agreement(agent, "test", "final", prompt)
    held_out = [one.encoded for one in agent.held_out("test", prompt)]
    steps = sum(len(one.spans) for one in held_out)
    assert asked[0] == [0.0, 1.0] and len(held_out) == 3 and figures["expert_states"] == steps
    assert figures["expert_match"] == pytest.approx(1 - 3 / steps)
    assert figures["expert_match_sampled"] == pytest.approx(3 / steps)
    policy = LlamaForCausalLM.from_pretrained(out / "policy", attn_implementation="eager")
    with torch.no_grad():
        logps = naive.sums(policy, naive.expert_pairs(held_out))
    assert figures["expert_nll"] == pytest.approx(-logps.mean().item(), rel=1e-4)
    lines = (out / "agreement" / "final_test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["task_id"] for row in rows] == [one.task_id for one in held_out]
    assert sum((row["nll"] for row in rows), []) == pytest.approx((-logps).tolist(), abs=1e-3)
    assert all(row["match"] == [False] + [True] * (len(row["match"]) - 1) for row in rows)


# ------------------------------------------------------------------------------- a planted world

SIGNS = """
import random

from trajectory import Step, Trajectory

COLOURS = ["red", "blue", "green", "black", "white", "brown"]


class Signs:
    \"\"\"The right button is visible in the state.\"\"\"

    splits = {
        "train": [f"train-{i}" for i in range(60)],
        "dev": [f"dev-{i}" for i in range(40)],
        "test": [f"test-{i}" for i in range(100)],
    }
    instruction = "Press the button of the colour that the sign shows."
    example = ""

    def colours(self, task):
        return random.Random(task).choices(COLOURS, k=2)

    def start(self, task):
        return Play(self.colours(task)), f"The sign is {self.colours(task)[0]}."

    def expert(self, task):
        first, second = self.colours(task)
        steps = [
            Step(f"The sign is {first}.", f"Thought: I see. Action: press {first}"),
            Step(f"Now it is {second}.", f"Thought: I see. Action: press {second}"),
        ]
        return Trajectory(task, [], steps, 1.0)

    def max_steps(self, task):
        return 2

    def task_type(self, task):
        return "sign"


class Play:
    def __init__(self, colours):
        self.left = list(colours)

    def step(self, text):
        if not text.endswith(f"press {self.left.pop(0)}"):
            return "Wrong.", 0.0, True, {"valid": True}
        if self.left:
            return f"Now it is {self.left[0]}.", 0.0, False, {"valid": True}
        return "Done.", 1.0, True, {"valid": True}
"""


def test_inverse_teaches_what_the_state_shows(tmp_path):
    """A little SFT presses buttons by chance; practice and D teach to read the sign."""
    (tmp_path / "signs.py").write_text(SIGNS)
    words = ["--env", f"{tmp_path / 'signs.py'}:Signs", "--model", "tiny", "--env-options", ""]
    words += ["--experts", "60", "--sft-experts", "60", "--practice-experts", "60"]
    words += [*INVERSE, "--sft-epochs", "2", "--lr", "5e-4", "--practice", "4", "--iterations", "3"]
    words += ["--max-new-tokens", "12", "--eval-each", "test", "--eval-tasks", "100"]
    out = run(tmp_path / "x", *words, "--eval-splits", "", "--batch", "64", "--d-batch", "64")
    success = [row["success"] for row in metrics(out, "eval")]
    match = [row["expert_match_sampled"] for row in metrics(out, "eval")]
    assert success[0] < 0.92 and success[-1] > success[0], (success, match)
    assert match[-1] > match[0] + 0.1, (success, match)
