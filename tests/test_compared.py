"""The compared methods: what data each makes, which loss it takes, on miniatures that take seconds."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import compared
import envs
import losses
import stepagent as S
from rollout import InputError, Step, Trajectory, encode, score
from test_stepagent import QUIET, distance, killed_and_continued, metrics, run, same_bits, weights

ONE = [*QUIET, "--iterations", "1"]


def rows(out, name):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def forge(monkeypatch, write):
    """The agent's training episodes are write(expert trajectory, number of the episode) instead of played ones."""
    count = iter(range(10 ** 6))

    def play(self, tasks, label, prompt, temperature, seed):
        experts = {t.task_id: t for t in self.experts}
        made = [write(experts[task], next(count)) for task in tasks]
        for t in made:
            t.steps = [replace(s, ids=self.tokenizer(s.action + "<|end|>").input_ids) for s in t.steps]
        return made
    monkeypatch.setattr(S.Learner, "play", play)


def copy_of(t, steps=None, reward=1.0, **more):
    return Trajectory(t.task_id, [], [Step(s.observation, s.action) for s in (steps or t.steps)], reward, info={"invalid": 0}, **more)


def changed(t, n, reward=1.0):
    """The expert's trajectory with another first thought."""
    first = replace(t.steps[0], action=t.steps[0].action.replace("Thought:", f"Thought: {n}"))
    return copy_of(t, [first, *t.steps[1:]], reward)


@pytest.mark.parametrize("method, phases", [
    ("dpo", ["sft", "explore", "pair", "dpo", "eval"]), ("spin", ["sft", "explore", "pair", "spin", "explore", "pair", "spin", "eval"]),
    ("rft", ["sft", "explore", "retrain", "sft", "eval"]), ("nat", ["sft", "explore", "retrain", "sft", "eval"]),
    ("ppo", ["sft", "explore", "judge", "ppo", "explore", "judge", "ppo", "eval"])])
def test_each_method_goes_through_its_phases_and_changes_the_policy(tmp_path, method, phases):
    out = run(tmp_path / "x", "--eval-each", "", "--eval-tasks", "2", "--method", method, "--samples", "1")
    found = [row["phase"] for row in metrics(out)]
    assert [p for p, before in zip(found, [None, *found]) if p != before] == phases
    assert (distance(weights(out / "policy"), weights(out / "sft" / "policy")) > 0) == (method != "rft")     # RFT without a success is SFT
    assert all(math.isfinite(x) for row in metrics(out) for x in row.values() if isinstance(x, float))
    episodes = rows(out, "iter_1/episodes.jsonl")
    assert len(episodes) == 6 and all(len(e["steps"]) and all(s["ids"] for s in e["steps"]) for e in episodes)


@pytest.mark.parametrize("method, temperature, samples", [("dpo", 1.0, 1), ("spin", 1.0, 1), ("eto", 0.7, 1), ("rft", 0.7, 4), ("nat", 0.7, 4),
                                                          ("ppo", 1.0, 1)])
def test_how_many_episodes_are_played_and_how(method, temperature, samples, monkeypatch):
    played = []
    learner = SimpleNamespace(
        run=SimpleNamespace(config=S.parse(["--method", method]), log=lambda *_, **__: None), policy=torch.nn.Linear(1, 1), prompt=[],
        experts=[Trajectory("a"), Trajectory("b"), Trajectory("c")], practised=[1, 2], write_episodes=lambda *_, **__: None,
        play=lambda tasks, label, prompt, heat, seed: played.append((tuple(tasks), heat, seed)) or [
            Trajectory(t, steps=[Step("o", "a", [1])]) for t in tasks])
    compared.explore(learner, 1)
    assert [(tasks, heat) for tasks, heat, _ in played] == [(("b", "c"), temperature)] * samples and len({s for *_, s in played}) == samples


def test_an_episode_that_never_began_is_not_counted(monkeypatch):
    kept, never = [], [Trajectory("b", truncated=True, info={"outgrown": 1})]
    learner = SimpleNamespace(
        run=SimpleNamespace(config=S.parse(["--method", "dpo"]), log=lambda *_, **figures: kept.append(figures["episodes"])),
        policy=torch.nn.Linear(1, 1), prompt=[], experts=[Trajectory("a"), Trajectory("b")], practised=[0, 1],
        write_episodes=lambda name, episodes, ids: kept.append(len(episodes)),
        play=lambda *_: [Trajectory("a", steps=[Step("o", "a", [1])]), *never])
    compared.explore(learner, 1)
    assert kept == [1, 1]
    learner.play = lambda *_: never
    with pytest.raises(InputError, match="no episode came about"):
        compared.explore(learner, 1)


def test_methods_that_play_the_expert_file_s_tasks_want_them_named_as_the_environment_does(tmp_path):
    trajectory = envs.make_env("household").expert("train-0")
    trajectory.task_id = "a task of ETO's"
    envs.save_trajectories(str(tmp_path / "own.jsonl"), [trajectory])
    with pytest.raises(InputError, match="\"a task of ETO's\" is no task of household, but dpo plays .* such as 'train-0'"):
        run(tmp_path / "x", *ONE, "--method", "dpo", "--expert", str(tmp_path / "own.jsonl"))


@pytest.mark.parametrize("method", ["rft", "nat"])
def test_a_start_with_another_tokenizer_than_the_model_s_is_refused(tmp_path, method):
    out = run(tmp_path / "x", *QUIET, "--method", "base")
    with pytest.raises(InputError, match="its tokenizer is not the one of --model"):
        run(tmp_path / "y", *ONE, "--method", method, "--init", str(out / "policy"), "--model", str(S.Path(S.__file__).parent / "models/tiny-household"))


def test_an_own_episode_that_a_mark_makes_longer_than_the_context_is_not_trained(tmp_path, monkeypatch):
    forge(monkeypatch, lambda t, n: changed(t, n, 0.0))
    added, imitate = [], S.Learner.imitate

    def narrow(learner, pool=None, *more):
        added.append(len(pool or ()))
        return imitate(learner, pool, *more)
    monkeypatch.setattr(S.Learner, "imitate", narrow)
    marked = compared.marked
    monkeypatch.setattr(compared, "marked", lambda prompt, good: marked(prompt, good) if good else
                        [{"role": "user", "content": "too long " * 2000}, {"role": "assistant", "content": "OK"}])
    out = run(tmp_path / "x", *ONE, "--method", "nat", "--samples", "1")
    [row] = metrics(out, "retrain")
    assert row["own_trajectories"] == 0 and added[-1] == row["expert_trajectories"] == 6


def test_dpo_prefers_the_expert_s_trajectory_and_starts_at_log_2(tmp_path, monkeypatch):
    """A copy of the expert's makes no pair; a changed one does, whatever its reward."""
    forge(monkeypatch, lambda t, n: copy_of(t) if n % 3 == 0 else changed(t, n))
    out = run(tmp_path / "x", *ONE, "--method", "dpo", "--batch", "2", "--lr", "1e-3", "--epochs", "4")
    [row], updates = metrics(out, "pair"), metrics(out, "dpo")
    assert row["pairs"] == 4 and len(updates) == 8
    assert updates[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4) and updates[0]["margin"] == pytest.approx(0, abs=1e-3)
    assert updates[-1]["accuracy"] == 1 and updates[-1]["margin"] > 0.1


def test_the_loss_of_a_pair_is_dpo_on_the_sums_over_all_actions(tmp_path, monkeypatch):
    forge(monkeypatch, lambda t, n: changed(t, n))
    found = {}
    monkeypatch.setattr(S.Learner, "_train", lambda self, name, i, pool, batches, loss, *rest:
                        found.update({name: (self, loss)}) if name == "dpo" else None)
    out = run(tmp_path / "x", *ONE, "--method", "dpo")
    learner, loss = found["dpo"]
    for p in learner.policy.parameters():
        p.data += 0.01 * torch.sin(torch.arange(p.numel()).view_as(p).float())
    value, info = loss([2, 0], [2, 0, 1])
    pairs, reference = compared.trajectory_pairs(learner, 1), load_file(out / "iter_1/pairs.safetensors")["reference"]
    total = 0.0
    for p in (2, 0):
        chosen, rejected = (score(learner.policy, [t]).trunk.sum() for t in pairs[p])
        total += -torch.nn.functional.logsigmoid(learner.run.config.beta * (chosen - rejected - (reference[p, 0] - reference[p, 1])))
    assert value.item() == pytest.approx(total.item() / 3, rel=1e-4) and abs(value.item() - 2 * math.log(2) / 3) > 1e-4


def made_learner(tmp_path, monkeypatch, write, *words):
    """A learner at the end of a run whose training episodes are forged."""
    kept = []
    forge(monkeypatch, write)
    monkeypatch.setattr(S.Learner, "_train", lambda self, *rest: kept.append(self))
    run(tmp_path / "x", *ONE, *words)
    return kept[-1]


def test_eto_takes_pairs_whose_rewards_differ_and_cuts_long_losers(tmp_path, monkeypatch):
    def write(t, n):
        if n == 0:
            return changed(t, n)                                         # as good as the expert's: no pair
        long = [*t.steps[:1] * 9, *t.steps]
        return copy_of(t, long, 0.5)
    learner = made_learner(tmp_path, monkeypatch, write, "--method", "eto")
    pairs = compared.trajectory_pairs(learner, 1)
    assert len(pairs) == 5
    for chosen, rejected in pairs:
        assert chosen in learner.data and chosen.task_id == rejected.task_id and len(rejected.spans) == len(chosen.spans) + 5
        assert len(rejected.ids) == rejected.spans[-1][1]
    for t in learner.experts:
        t.reward = 0.25                                                  # a poor expert: the agent's own are chosen
    swapped = compared.trajectory_pairs(learner, 1)
    assert len(swapped) == 6 and all(rejected in learner.data for _, rejected in swapped)


def test_spin_keeps_the_pairs_of_the_round_before(tmp_path, monkeypatch):
    forge(monkeypatch, changed)
    out = run(tmp_path / "x", *QUIET, "--method", "spin", "--iterations", "3")
    assert [row["pairs"] for row in metrics(out, "pair")] == [6, 12, 12]


def test_rft_starts_from_the_base_model_and_adds_each_success_once(tmp_path, monkeypatch):
    forge(monkeypatch, lambda t, n: [copy_of(t), changed(t, "new"), changed(t, "new"), changed(t, "bad", 0.9)][n // 6 % 4])
    out = run(tmp_path / "x", *ONE, "--method", "rft", "--sft-lr", "0")
    [row] = metrics(out, "retrain")
    assert (row["expert_trajectories"], row["own_trajectories"], row["own_successes"]) == (6, 6, 6)
    assert same_bits(weights(out / "policy"), weights(out / "base"))      # a rate of 0: as the base model was
    again = [r for r in metrics(out, "sft")][3:]
    assert sum(r["trajectories"] for r in again) == 12
    assert metrics(run(tmp_path / "y", *ONE, "--method", "rft", "--success", "0.9", "--sft-lr", "0"), "retrain")[0]["own_trajectories"] == 12


def test_nat_marks_success_and_failure_and_plays_with_the_first(tmp_path, monkeypatch):
    forge(monkeypatch, lambda t, n: changed(t, n, n % 2))
    taken, train = [], S.Learner._train
    monkeypatch.setattr(S.Learner, "_train", lambda self, name, i, pool, *rest: taken.append((self, pool)) or train(self, name, i, pool, *rest))
    out = run(tmp_path / "x", *ONE, "--method", "nat", "--samples", "1")
    learner, pool = taken[-1]
    beginning = [learner.tokenizer.decode(t.ids)[:60] for t in pool]
    assert [compared.MARKS[True] in b for b in beginning] == [True] * 6 + [bool(n % 2) for n in range(6)]
    assert [compared.MARKS[False] in b for b in beginning] == [False] * 6 + [not n % 2 for n in range(6)]
    played = []
    monkeypatch.setattr(S.Learner, "play", lambda self, tasks, label, prompt, *rest: played.append(prompt) or
                        [Trajectory(t, [], [Step("", "")], info={"invalid": 0}) for t in tasks])
    monkeypatch.setattr(learner.run, "log", lambda *_, **__: None)
    for name in ("eval_0", "final"):
        learner.evaluate(name, "dev")
    assert played == [[], compared.marked([], True)]
    assert compared.marked([{"role": "user", "content": "Rules."}, {"role": "assistant", "content": "OK"}], False)[0]["content"] \
        == f"Rules.\n\n{compared.MARKS[False]}"


# ---- PPO on whole episodes

def constant_heads(monkeypatch, value, fitted):
    """Value heads that say `value`, whatever they see; fitted: the steps that they are fitted to."""
    def fit(head, features, loss_on, learn, held, *rest):
        fitted.extend([*learn.tolist(), *held.tolist()])
        for p in head.parameters():
            p.data.zero_()
        head.mlp[-1].bias.data.fill_(value)
    monkeypatch.setattr(compared, "fit", fit)


def test_advantages_of_whole_episodes_by_hand(tmp_path, monkeypatch):
    """V = 0.5 everywhere, gamma 1, lambda 0.95. Success: the last delta is 1 - 0.5. Cut off: its last state's value stands in, delta 0; it
    is no target of the value head."""
    constant_heads(monkeypatch, 0.5, fitted := [])
    learner = made_learner(tmp_path, monkeypatch, lambda t, n: copy_of(t) if n % 2 else
                           copy_of(t, t.steps[:3], 0.0, truncated=n > 0, last="Nothing happens."), "--method", "ppo")
    saved = load_file(learner.run.path("iter_1/advantages.safetensors"))
    episodes, pool = compared.own_pool(learner, 1)
    expected, real = [], []
    for n, t in enumerate(episodes):
        k = len(t.steps)
        delta = [0.0] * (k - 1) + [0.5 if n % 2 else -0.5 if n == 0 else 0.0]      # the first ended by itself, with nothing
        expected += [0.95 ** (k - 1 - j) * delta[-1] for j in range(k)]
        real += [True] * k + [False] * (n in (2, 4))
        assert len(pool[n].spans) == k + (n in (2, 4))
    assert saved["real"].tolist() == real and set(fitted) == {j for j, x in enumerate(real) if x}
    assert torch.allclose(saved["advantages"][saved["real"]], losses.whiten(torch.tensor(expected)), atol=1e-5)
    assert not saved["advantages"][~saved["real"]].any()


def test_a_cut_episode_is_not_paid_twice(tmp_path, monkeypatch):
    """Reward 0.6 at the cut and V = 0.7 there: 0.1 more would have come; V below the reward adds nothing."""
    for value, more in ((0.7, 0.1), (0.2, 0.0)):
        constant_heads(monkeypatch, value, [])
        seen, gae = [], losses.gae
        monkeypatch.setattr(losses, "gae", lambda rewards, values, gamma, lam, last=0.0: seen.append(last) or gae(rewards, values, gamma, lam, last))
        made_learner(tmp_path / str(value), monkeypatch, lambda t, n: copy_of(t, t.steps[:3], 0.6, truncated=True, last="Nothing happens."),
                     "--method", "ppo")
        assert seen[6:] == pytest.approx([more] * 6, abs=1e-6)
        monkeypatch.setattr(losses, "gae", gae)


def test_ppo_makes_rewarded_episodes_likelier(tmp_path, monkeypatch):
    forge(monkeypatch, lambda t, n: changed(t, "good", 1.0) if n % 2 else changed(t, "bad", 0.0))
    out = run(tmp_path / "x", *ONE, "--method", "ppo", "--lr", "1e-3", "--epochs", "4", "--entropy", "0")
    updates = metrics(out, "ppo")
    assert updates[0]["ratio"] == pytest.approx(1, abs=1e-5) and updates[0]["clip_share"] == 0 and updates[0]["kl"] == pytest.approx(0, abs=1e-6)
    c = S.Config(**json.loads((out / "config.json").read_text())["config"])
    run_ = S.Run(c, S.check(c))
    env, experts, prompt = S.load_experts(run_)
    policy, tokenizer = S.load_policy(run_, experts)
    learner = S.Learner(run_, env, prompt, policy, tokenizer, experts, [encode(t, tokenizer) for t in experts])
    episodes, pool = compared.own_pool(learner, 1)
    old = load_file(out / "iter_1/advantages.safetensors")["old_tokens"].split([sum(e - s for s, e in t.spans) for t in pool])
    with torch.no_grad():
        moved = torch.tensor([(score(policy, [t]).trunk_tokens - x).mean() for t, x in zip(pool, old)])
    good = torch.tensor([t.reward for t in episodes]) > 0
    assert (moved[good].mean() - moved[~good].mean()) > 0.01


def test_both_rewards_weigh_alike_and_the_discriminator_judges_other_tasks(tmp_path, monkeypatch):
    gae, seen = losses.gae, []
    monkeypatch.setattr(losses, "gae", lambda rewards, values, gamma, lam, last=0.0: seen.append(rewards.clone()) or gae(rewards, values, gamma, lam, last))
    learner = made_learner(tmp_path, monkeypatch, lambda t, n: changed(t, n, float(n % 2)) if n % 3 else
                           copy_of(t, t.steps[:2], 0.0, truncated=True, last="Nothing happens."),
                           "--method", "stepagent-inverse", "--reward", "both")
    episodes, _ = compared.own_pool(learner, 1)
    final = torch.tensor([t.reward for t in episodes])
    steps = torch.tensor([r.sum() for r in seen[:len(episodes)]]) - final
    cut = [r for t, r in zip(episodes, seen) if t.truncated]
    assert cut and all(len(r) == 3 and r[:2].abs().min() > 0 and r[2] == 0 for r in cut)       # its last state is not rewarded
    assert steps.std(unbiased=False).item() == pytest.approx(final.std(unbiased=False).item(), rel=1e-4)
    kinds = [row["phase"] for row in metrics(learner.run.out)]
    assert {"inspect", "discriminate", "explore", "judge"} <= set(kinds)


def test_reward_types_are_checked(tmp_path):
    with pytest.raises(InputError, match="--reward both belongs to --method stepagent-inverse"):
        run(tmp_path / "x", *QUIET, "--method", "eto", "--reward", "both")
    with pytest.raises(InputError, match="temperature"):
        run(tmp_path / "x", *QUIET, "--method", "ppo", "--temperature", "0.5")


@pytest.mark.parametrize("method", ["eto", "ppo"])
def test_a_killed_run_resumed_is_an_uninterrupted_one(tmp_path, monkeypatch, method):
    words = [*QUIET, "--method", method]
    whole = run(tmp_path / "whole", *words)
    parts, killed = killed_and_continued(monkeypatch, tmp_path / "parts", *words)
    assert len(killed) > 6 and same_bits(weights(whole / "policy"), weights(parts / "policy")) and metrics(whole) == metrics(parts)
