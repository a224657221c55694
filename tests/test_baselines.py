"""The other rows of the tables: what data each makes, and which loss it takes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forged import after, changed, copy_of, failed, forge, nudge, opened, same
from ranks import (
    QUIET,
    distance,
    equal,
    metrics,
    run,
    same_bits,
    weights,
)
from tokenizers import normalizers
from transformers import LlamaForCausalLM

import baselines
import naive
import stepagent
import training
from baselines import (
    Pair,
    action_texts,
    expert_over_agent,
    higher_over_lower,
    marked,
    new_episodes,
    read_episodes,
)
from stepagent import METHODS
from system.run_dir import RunDir
from trajectory import InputError, Step, Trajectory, action_text, encode

ONE = [*QUIET, "--method"]
SUCCESS, FAILURE = "What follows solves the task.", "What follows fails at the task."


def rows(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / name).open()]


# ------------------------------------------------------------------------------------ whole methods


@pytest.mark.parametrize(
    "method, phases",
    [
        ("dpo", "sft explore pair dpo eval"),
        ("spin", "sft explore pair spin explore pair spin eval"),
        ("eto", "sft explore pair eto explore pair eto eval"),
        ("rft", "sft explore retrain sft eval"),
        ("nat", "sft explore retrain sft eval"),
        ("ppo", "sft explore judge ppo explore judge ppo eval"),
    ],
)
def test_each_method_goes_through_its_phases_and_changes_the_policy(
    tmp_path, model, method, phases
):
    words = ["--eval-each", "", "--eval-tasks", "2", "--method", method, "--samples", "1"]
    out = run(tmp_path / "x", *words, "--model", model)
    found = []
    for row in metrics(out):
        if not found or row["phase"] != found[-1]:
            found.append(row["phase"])
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert found == phases.split()
    moved = distance(weights(out / "policy"), weights(out / "sft" / "policy"))
    # RFT without a success is SFT.
    assert (moved > 0) == (method != "rft")
    episodes = rows(out, "iter_1/episodes.jsonl")
    assert len(episodes) == 6
    for episode in episodes:
        assert episode["steps"] and all(turn["ids"] for turn in episode["steps"])


@pytest.mark.parametrize("words", ["spin", "ppo --iterations 1", "nat --samples 1"])
def test_a_killed_run_resumed_is_an_uninterrupted_one(tmp_path, monkeypatch, model, words):
    words = [*ONE, *words.split(), "--model", model]
    whole = run(tmp_path / "whole", *words)
    killed, phase = [], RunDir.phase

    def dying(self, name, work, *args, reads=None):
        """Every phase dies once, its work done but not yet recorded."""

        def work_and_die(*rest):
            work(*rest)
            if name not in killed:
                killed.append(name)
                raise KeyboardInterrupt

        return phase(self, name, work_and_die, *args, reads=reads)

    monkeypatch.setattr(RunDir, "phase", dying)
    for _ in range(20):
        try:
            run(tmp_path / "parts", *words)
            break
        except KeyboardInterrupt:
            pass
    assert len(killed) >= 6 and equal(whole, tmp_path / "parts")


# --------------------------------------------------------------------------------- the agent plays


@pytest.mark.parametrize(
    "method, temperature, samples",
    [
        ("dpo", 1.0, 1),
        ("spin", 1.0, 1),
        ("eto", 0.7, 1),
        ("rft", 0.7, 4),
        ("nat", 0.7, 4),
        ("ppo", 1.0, 1),
    ],
)
def test_how_many_episodes_are_played_and_how(
    tmp_path, monkeypatch, model, method, temperature, samples
):
    """All practised tasks, at the method's temperature; --samples counts more."""
    played = []

    def play(agent, tasks, label, prompt, heat, seed):
        played.append((tasks, heat, seed))
        return [Trajectory(task, steps=[Step("o", "a", [1])]) for task in tasks]

    monkeypatch.setattr(baselines, "play", play)
    words = [*ONE, method, "--practice-experts", "4", "--model", model]
    agent = opened(tmp_path / "x", *words)
    phases = {}

    def phase(self, name, work, *args, reads=None):
        phases[name] = (work, args)

    monkeypatch.setattr(RunDir, "phase", phase)
    monkeypatch.setattr(baselines, "read_episodes", lambda agent, i: [])
    METHODS[method].iteration(agent, 1)
    work, args = phases["explore_1"]
    work(*args)
    tasks = [one.task_id for one in agent.experts[2:]]
    assert [(found, heat) for found, heat, _ in played] == [(tasks, temperature)] * samples
    assert len({seed for *_, seed in played}) == samples
    seeds = {seed for *_, seed in played}
    played.clear()
    agent.config.samples = 2
    agent, _, *rest = args
    work(agent, 2, *rest)
    assert len(played) == 2 and not seeds & {seed for *_, seed in played}


def test_an_episode_that_never_began_is_not_counted(tmp_path, monkeypatch, model):
    agent = opened(tmp_path / "x", *ONE, "dpo", "--model", model)
    tasks = [one.task_id for one in agent.experts]
    steps = [Step("o", "a", [1])]
    too_long = Trajectory(tasks[1], truncated=True, info={"outgrown": 1})
    failed = Trajectory(tasks[2], steps=steps, info={"unplayable": 1})
    played = [Trajectory(tasks[0], steps=steps, reward=1.0), too_long, failed]
    monkeypatch.setattr(baselines, "play", lambda *rest: played)
    baselines.explore(agent, 1, 1.0, 1)
    [row] = metrics(agent.run.out, "explore")
    assert (row["episodes"], row["success"], row["tokens"]) == (1, 1.0, 1)
    assert [one.task_id for one in read_episodes(agent, 1)] == tasks[:1]
    played.pop(0)
    with pytest.raises(InputError, match="iteration 1: no episode could be played"):
        baselines.explore(agent, 1, 1.0, 1)


def test_episodes_come_back_from_disk_with_the_ids_that_were_sampled(tmp_path, model):
    agent = opened(tmp_path / "x", *ONE, "dpo", "--model", model)
    agent.prompt = [{"role": "user", "content": "Rules."}, {"role": "assistant", "content": "OK"}]
    task = agent.experts[0].task_id
    # A line break to Python's splitlines(), not to JSON.
    steps = [Step("A desk.\u2028", "Action: look", [5, 6, 0]), Step("A mug.", "", [7])]
    played = Trajectory(task, agent.prompt, steps, 0.25, True, {"invalid": 2}, "Nothing happens.")
    training.write_episodes(agent, "iter_3/episodes.jsonl", [played, played], ids=True)
    # The figures are for people.
    assert read_episodes(agent, 3) == [replace(played, info={})] * 2


# -------------------------------------------------------------------------- pairs of trajectories


def test_dpo_prefers_the_experts_trajectory_and_starts_at_log_2(tmp_path, monkeypatch, model):
    """A copy of the expert's makes no pair; a changed one does, whatever its reward."""

    def write(expert, number):
        return copy_of(expert) if number % 3 == 0 else changed(expert, number)

    forge(monkeypatch, write)
    words = ["dpo", "--batch", "2", "--lr", "1e-2", "--epochs", "4", "--model", model]
    out = run(tmp_path / "x", *ONE, *words)
    [row], updates = metrics(out, "pair"), metrics(out, "dpo")
    assert row["pairs"] == 4 and len(updates) == 8
    assert updates[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert updates[0]["margin"] == pytest.approx(0, abs=1e-3)
    assert updates[-1]["accuracy"] == 1 and updates[-1]["margin"] > 0.1


def test_the_loss_of_pairs_is_dpo_on_the_sums_over_all_actions(tmp_path, monkeypatch, model):
    def write(expert, number):
        return copy_of(expert, expert.steps[:-1])

    agent = after(tmp_path / "x", monkeypatch, write, *ONE, "dpo", "--model", model)
    pairs = baselines.read_reference(agent, 1, expert_over_agent(agent, 1))
    batch = [pairs[2], pairs[0], pairs[1]]
    nudge(agent.policy)
    agent.save("other")
    found = []

    def record(agent, name, iteration, batches, loss_of, rate_at):
        found.append(loss_of(batch[:2], batch))

    monkeypatch.setattr(training, "train", record)
    baselines.reflect_pairs(agent, 1, pairs)
    [(loss, _)] = found
    sums = []
    for folder in ("policy", "other"):
        policy = LlamaForCausalLM.from_pretrained(
            tmp_path / "x" / folder, attn_implementation="eager"
        )
        for pair in batch[:2]:
            for item in (pair.chosen, pair.rejected):
                sums.append(naive.sums(policy, naive.expert_pairs([item])).sum().item())
    before, now = torch.tensor(sums).view(2, 2, 2)
    references = [(pair.ref_chosen, pair.ref_rejected) for pair in batch[:2]]
    assert torch.allclose(torch.tensor(references), before, atol=1e-2)
    chosen, rejected = (now - before).unbind(1)
    expected = -torch.nn.functional.logsigmoid(agent.config.beta * (chosen - rejected)).sum() / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert abs(loss.item() - 2 * math.log(2) / 3) > 0.05


def test_eto_takes_pairs_whose_rewards_differ_and_cuts_long_losers(tmp_path, monkeypatch, model):
    """One episode is as good as the expert's; the others go in circles first."""

    def write(expert, number):
        if number == 0:
            return changed(expert, number)
        return copy_of(expert, [*expert.steps[:1] * 9, *expert.steps], 0.5)

    agent = after(tmp_path / "x", monkeypatch, write, *ONE, "eto", "--model", model)
    experts = [one.encoded for one in agent.experts]
    pairs = higher_over_lower(agent, 1)
    assert len(pairs) == 5
    for pair in pairs:
        assert pair.chosen in experts and pair.chosen.task_id == pair.rejected.task_id
        assert len(pair.rejected.spans) == len(pair.chosen.spans) + 5
        assert len(pair.rejected.ids) == pair.rejected.spans[-1][1]
    # A poor expert: the agent's own are chosen, and are not cut.
    for one in agent.experts:
        one.trajectory.reward = 0.25
    swapped = higher_over_lower(agent, 1)
    assert len(swapped) == 6 and all(pair.rejected in experts for pair in swapped)
    own = [encode(episode, agent.tokenizer) for episode in read_episodes(agent, 1)]
    assert [pair.chosen for pair in swapped] == own


def test_eto_makes_no_pair_of_the_same_words(tmp_path, monkeypatch, model):
    """A copy of the expert's has another reward when the world is not deterministic."""

    def write(expert, number):
        return copy_of(expert, reward=0.5) if number else changed(expert, number, 0.5)

    agent = after(tmp_path / "x", monkeypatch, write, *ONE, "eto", "--model", model)
    assert len(higher_over_lower(agent, 1)) == 1


def test_the_experts_tokens_are_no_pair_whatever_the_files_text(tmp_path, model):
    """The tokenizer composes characters, the file does not."""
    agent = opened(tmp_path / "x", *ONE, "eto", "--model", model)
    agent.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    episodes = []
    for one in agent.experts:
        one.trajectory = changed(one.trajectory, "cafe\u0301")
        one.encoded = encode(one.trajectory, agent.tokenizer)
        own = copy_of(one.trajectory, reward=0.5)
        for step, (start, end) in zip(own.steps, one.encoded.spans):
            step.ids = one.encoded.ids[start:end]
            step.action = action_text(agent.tokenizer, step.ids)
        episodes.append(own)
    assert action_texts(episodes[0]) != action_texts(agent.experts[0].trajectory)
    training.write_episodes(agent, "iter_1/episodes.jsonl", episodes, ids=True)
    assert expert_over_agent(agent, 1) == higher_over_lower(agent, 1) == []
    assert new_episodes(agent, episodes) == []


def test_a_cut_off_file_of_episodes_is_one_line(tmp_path, model):
    agent = opened(tmp_path / "x", *ONE, "dpo", "--model", model)
    path = agent.run.path("iter_1/episodes.jsonl")
    path.parent.mkdir()
    path.write_text('{"task_id": "tra')
    with pytest.raises(InputError, match="episodes.jsonl, line 1: broken JSON"):
        baselines.read_episodes(agent, 1)


def test_spin_keeps_the_pairs_of_the_round_before(tmp_path, monkeypatch, model):
    words = [*ONE, "spin", "--iterations", "3", "--model", model]
    agent = after(tmp_path / "x", monkeypatch, changed, *words)
    assert [row["pairs"] for row in metrics(agent.run.out, "pair")] == [6, 12, 12]
    given = []
    monkeypatch.setattr(RunDir, "phase", lambda *rest, reads=None: None)
    monkeypatch.setattr(baselines, "learn_from_pairs", lambda agent, i, pairs: given.append(pairs))
    baselines.spin(agent, 3)
    rounds = [expert_over_agent(agent, i) for i in (1, 2, 3)]
    assert given == [rounds[1] + rounds[2]] and rounds[1] != rounds[2]


def test_no_pairs_leave_the_policy_as_it_is(tmp_path, monkeypatch, model):
    forge(monkeypatch, same)
    out = run(tmp_path / "x", *ONE, "dpo", "--model", model)
    assert [row["pairs"] for row in metrics(out, "pair")] == [0] and metrics(out, "dpo") == []
    assert same_bits(weights(out / "policy"), weights(out / "sft" / "policy"))


def test_a_pair_is_pushed_as_two_trajectories(tmp_path, model):
    agent = opened(tmp_path / "x", *ONE, "dpo", "--model", model)
    chosen, rejected = (one.encoded for one in agent.experts[:2])
    pair = Pair(chosen, rejected)
    assert pair.tokens == chosen.tokens + rejected.tokens and pair.task_id == chosen.task_id


# ---------------------------------------------------------------------- imitation of own episodes


def test_rft_starts_from_the_base_model_and_adds_each_success_once(tmp_path, monkeypatch, model):
    """Four episodes a task: the expert's words, a new success twice, and a near miss."""

    def write(expert, number):
        kinds = [
            copy_of(expert),
            changed(expert, "new"),
            changed(expert, "new"),
            changed(expert, "bad", 0.9),
        ]
        return kinds[number // 6 % 4]

    forge(monkeypatch, write)
    words = [*ONE, "rft", "--sft-lr", "0", "--model", model]
    out = run(tmp_path / "x", *words)
    [row] = metrics(out, "retrain")
    assert (row["expert_trajectories"], row["own_trajectories"], row["own_successes"]) == (6, 6, 6)
    # A rate of 0: the policy is as the base model was.
    assert same_bits(weights(out / "policy"), weights(Path(model)))
    again = metrics(out, "sft")[3:]
    assert sum(row["trajectories"] for row in again) == 12
    out = run(tmp_path / "y", *words, "--success", "0.9")
    [row] = metrics(out, "retrain")
    assert (row["own_trajectories"], row["own_successes"]) == (12, 12)


def test_rft_keeps_a_success_that_follows_a_failure_of_the_same_words(tmp_path, monkeypatch, model):
    forge(monkeypatch, lambda expert, number: changed(expert, "new", float(number // 6 % 4 > 0)))
    out = run(tmp_path / "x", *ONE, "rft", "--sft-lr", "0", "--model", model)
    [row] = metrics(out, "retrain")
    assert (row["own_trajectories"], row["own_successes"]) == (6, 6)


def test_rft_forgets_what_sft_has_learnt(tmp_path, monkeypatch, model):
    """With no success of its own its SFT is the first one again."""
    forge(monkeypatch, failed)
    out = run(tmp_path / "x", *ONE, "rft", "--model", model)
    assert same_bits(weights(out / "policy"), weights(out / "sft" / "policy"))
    assert not same_bits(weights(out / "policy"), weights(Path(model)))
    learnt = metrics(out, "sft")
    assert learnt[:3] == learnt[3:]


def test_nat_marks_success_and_failure(tmp_path, monkeypatch, model):
    """The expert's six, then six own ones, every second a success."""
    forge(monkeypatch, lambda expert, number: changed(expert, number, number % 2))
    pools = []
    monkeypatch.setattr(
        baselines, "imitate", lambda agent, pool, folder: pools.append((pool, folder))
    )
    words = [*ONE, "nat", "--samples", "1", "--model", model]
    agent = opened(tmp_path / "x", *words)
    baselines.nat(agent, 1)
    [(pool, folder)] = pools
    texts = [agent.tokenizer.decode(item.ids)[:60] for item in pool]
    assert [SUCCESS in text for text in texts] == [True] * 6 + [False, True] * 3
    assert [FAILURE in text for text in texts] == [False] * 6 + [True, False] * 3
    assert folder == "iter_1/policy"
    [row] = metrics(agent.run.out, "retrain")
    assert (row["own_trajectories"], row["own_successes"]) == (6, 3)


def test_nat_is_evaluated_with_the_mark_of_success_once_it_has_seen_marks(
    tmp_path, monkeypatch, model
):
    agent = opened(tmp_path / "x", *ONE, "nat", "--model", model)
    prompts = []

    def play(agent, tasks, label, prompt, *rest):
        prompts.append(prompt)
        return [Trajectory(task, [], [Step("", "")], info={"invalid": 0}) for task in tasks]

    monkeypatch.setattr(stepagent, "play", play)
    for name, iteration in (("eval_0", 0), ("eval_1", 1), ("final", 1)):
        stepagent.evaluate(agent, name, iteration, "dev")
    assert prompts == [[], marked([], True), marked([], True)]


def test_a_mark_ends_the_first_message_of_the_prompt():
    prompt = [{"role": "user", "content": "Rules."}, {"role": "assistant", "content": "OK"}]
    first, second = marked(prompt, False)
    assert first == {"role": "user", "content": f"Rules.\n\n{FAILURE}"} and second == prompt[1]
    assert prompt[0]["content"] == "Rules."
    first, second = marked([], True)
    assert (first["content"], second["role"]) == (SUCCESS, "assistant")


def long_marks(monkeypatch, *long: bool) -> None:
    """These marks have more tokens than the model's context."""
    usual = baselines.marked

    def marked_at_length(prompt, success=True):
        first, *rest = usual(prompt, success)
        text = "too long " * 2000 if success in long else first["content"]
        return [first | {"content": text}, *rest]

    monkeypatch.setattr(baselines, "marked", marked_at_length)
    monkeypatch.setattr(stepagent.METHODS["nat"], "prompt", marked_at_length)


def test_an_own_episode_that_a_mark_makes_longer_than_the_context_is_left_out(
    tmp_path, monkeypatch, model
):
    forge(monkeypatch, failed)
    long_marks(monkeypatch, False)
    out = run(tmp_path / "x", *ONE, "nat", "--samples", "1", "--model", model)
    [row] = metrics(out, "retrain")
    assert (row["expert_trajectories"], row["own_trajectories"]) == (6, 0)
    assert sum(row["trajectories"] for row in metrics(out, "sft")[3:]) == 6


def test_an_expert_trajectory_that_a_mark_makes_longer_than_the_context_is_named(
    tmp_path, monkeypatch, model
):
    long_marks(monkeypatch, True)
    says = "trajectory train-[0-9]+ has [0-9]+ tokens, the model's context is 1024; remove it"
    with pytest.raises(InputError, match=says):
        run(tmp_path / "x", *ONE, "nat", "--samples", "1", "--model", model)
    assert json.loads((tmp_path / "x" / "state.json").read_text())["done"] == []
