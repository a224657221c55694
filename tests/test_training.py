"""The agent and its training loop: batches, rates, updates, practice on disk, episodes."""

import json
import math
from dataclasses import replace
from os.path import commonprefix
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from ranks import QUIET, WORLD, distance, metrics, run, weights, words_of
from tokenizers import normalizers
from transformers import AutoTokenizer, LlamaForCausalLM

import envs
import naive
import stepagent
import training
from losses import area_under_curve, bootstrap, reward_gap
from rollout import Scores
from stepagent import METHODS, Config, prepare
from system.ranks import Ranks
from system.run_dir import RunDir
from training import (
    Agent,
    Demonstration,
    Practised,
    batches,
    check_finite,
    falling_rate,
    imitate,
    play,
    practice_figures,
    practised_from,
    read_practice,
    save_practice,
    write_practice,
)
from trajectory import Encoded, InputError, Step, Trajectory, encode


def demonstration(name: str, steps: int) -> Demonstration:
    """One of so many steps, 20 tokens long."""
    turns = [Step(f"o{step}", f"Action: a{step}") for step in range(steps)]
    spans = [(step + 1, step + 2) for step in range(steps)]
    return Demonstration(Trajectory(name, [], turns), Encoded(list(range(20)), spans, name))


def agent_with(out: Path, steps=(3, 1, 5, 2, 4, 1, 6), iterations: int = 1, **options) -> Agent:
    """An agent that has data and a run directory, but no policy."""
    config = Config(out=str(out), **options)
    ranks = Ranks()
    data = [demonstration(f"t{number}", count) for number, count in enumerate(steps)]
    run_dir = RunDir(config, ranks, [])
    return Agent(config, ranks, run_dir, None, [], None, None, data, iterations)


# --------------------------------------------------------------------------------- data and batches


def steps_of(one: Demonstration) -> int:
    return len(one.encoded.spans)


def names(demonstrations: list) -> list[str]:
    return [one.task_id for one in demonstrations]


def test_sft_takes_the_beginning_of_the_data_and_practice_the_end(tmp_path):
    agent = agent_with(tmp_path, sft_experts=3, practice_experts=4)
    assert names(agent.sft_set) == ["t0", "t1", "t2"]
    assert names(agent.practice_set) == ["t3", "t4", "t5", "t6"]
    agent = agent_with(tmp_path, sft_experts=0, practice_experts=0)
    assert names(agent.sft_set) == names(agent.practice_set) == names(agent.experts)


def test_seeds_follow_from_what_they_are_for(tmp_path):
    agent, other = agent_with(tmp_path / "x"), agent_with(tmp_path / "y", seed=1)
    seeds = [agent.seed("D", 0), agent.seed("D", 1), agent.seed("D"), other.seed("D", 0)]
    assert len(set(seeds)) == 4 and agent.seed("D", 0) == seeds[0]


class Shown:
    """A world whose expert shows every task; a number's last digit is its type."""

    def __init__(self):
        dev = sorted((f"d{number}" for number in range(400)), key=lambda task: task[-1])
        self.splits = {"train": [f"t{number}" for number in range(20)], "dev": dev}

    def expert(self, task):
        return Trajectory(task, [], [Step("o", "Action: a")], 1.0)

    def max_steps(self, task):
        return 1


def watcher(out: Path, context: int = 99, **options) -> Agent:
    """It has learnt from t0 to t6."""
    agent = agent_with(out, **options)
    agent.env, agent.tokenizer = Shown(), tiny.chatml()
    shape = SimpleNamespace(max_position_embeddings=context)
    agent.policy = SimpleNamespace(config=shape)
    return agent


def test_nobody_has_learnt_from_tasks_that_are_held_out(tmp_path):
    """Whatever the split is called; they come from everywhere in it."""
    agent = watcher(tmp_path / "x")
    assert names(agent.held_out("train", [])) == [f"t{number}" for number in range(7, 20)]
    found = names(agent.held_out("dev", [], 100))
    assert found == envs.some(agent.env.splits["dev"], 100)
    assert len({task[-1] for task in found}) == 10
    assert len(agent.held_out("dev", [])) == 300
    assert len(watcher(tmp_path / "y", eval_tasks=5).held_out("dev", [])) == 5
    assert agent.held_out("test", []) == []
    assert watcher(tmp_path / "z", expert="file.jsonl").held_out("dev", []) == []


def test_held_out_trajectories_begin_with_the_prompt_and_fit_into_the_context(tmp_path):
    prompt = [{"role": "user", "content": "Rules."}, {"role": "assistant", "content": "OK"}]
    agent = watcher(tmp_path, eval_tasks=3)
    bare, prompted = agent.held_out("dev", [])[0], agent.held_out("dev", prompt)[0]
    assert prompted.encoded == encode(replace(bare.trajectory, prompt=prompt), agent.tokenizer)
    assert prompted.encoded.tokens > bare.encoded.tokens
    agent.policy.config.max_position_embeddings = bare.encoded.tokens
    assert len(agent.held_out("dev", [])) == 3 and agent.held_out("dev", prompt) == []


def test_every_task_has_a_place_in_a_fixed_random_order(tmp_path):
    agent = agent_with(tmp_path / "x", steps=[1] * 30)
    places = agent.fold_places()
    assert sorted(places.values()) == list(range(30)) and set(places) == set(names(agent.experts))
    assert [places[f"t{number}"] for number in range(30)] != list(range(30))
    agent.experts.reverse()
    assert agent.fold_places() == places
    assert agent_with(tmp_path / "y", steps=[1] * 30, seed=1).fold_places() != places


def test_batches_reach_their_size_and_overshoot_by_one_item_at_most(tmp_path):
    data = agent_with(tmp_path).experts
    made = batches(data, steps_of, 6, [0])
    assert sorted(name for batch in made for name in names(batch)) == names(data)
    assert len(made) >= 3
    for batch in made[:-1]:
        assert sum(map(steps_of, batch)) >= 6 > sum(map(steps_of, batch[:-1]))


def alone(item) -> int:
    return 1


def test_batches_follow_from_their_seeds():
    items = list(range(7))
    made = batches(items, alone, 2, [0])
    assert made == batches(items, alone, 2, [0]) != batches(items, alone, 2, [1])
    assert items == list(range(7)) and batches([], alone, 2, [0, 1]) == []


def test_a_pass_over_the_data_begins_where_the_one_before_ended():
    """What is left of a pass and the first of the next share a batch."""
    twice = batches(range(7), alone, 2, [3, 4])
    assert [len(batch) for batch in twice] == [2] * 7
    order = [item for batch in twice for item in batch]
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7)) and order[:7] != order[7:]


# -------------------------------------------------------------------------------------------- rates


def recorded(monkeypatch, agent: Agent, phase) -> dict:
    """What a phase gives to train(), with its learning rates."""
    given = {}

    def record(agent, name, iteration, batches, loss_of, rate_at):
        rates = [rate_at(step) for step in range(len(batches))]
        given.update(name=name, iteration=iteration, batches=batches, rates=rates)

    monkeypatch.setattr(training, "train", record)
    monkeypatch.setattr(Agent, "save", lambda self, folder: given.update(folder=folder))
    phase(agent)
    return given


def test_the_rate_of_sft_rises_and_then_follows_a_cosine(tmp_path, monkeypatch):
    """Ten updates, three of them rising."""
    agent = agent_with(tmp_path, steps=[1] * 20, sft_epochs=5, sft_batch=10, sft_lr=2.0, warmup=0.3)
    pool = [one.encoded for one in agent.experts]
    given = recorded(monkeypatch, agent, lambda agent: imitate(agent, pool, "sft/policy"))
    rates = given["rates"]
    assert len(rates) == 10 and max(rates) <= 2
    assert rates[:2] == pytest.approx([2 / 3, 4 / 3])
    # 1 + cos(pi / 2) and 1 + cos(0.9 pi)
    assert rates[5] == pytest.approx(1.0) and rates[9] == pytest.approx(0.0489435)
    assert all(rate > later for rate, later in zip(rates[2:], rates[3:]))
    assert (given["name"], given["iteration"], given["folder"]) == ("sft", 0, "sft/policy")


def test_each_pass_of_sft_is_whole_and_shuffled_anew(tmp_path, monkeypatch):
    """Eight of 20 trajectories a batch: a pass ends with a smaller one."""
    agent = agent_with(tmp_path, steps=[1] * 20, sft_epochs=3, sft_batch=8)
    pool = [one.encoded for one in agent.experts]
    given = recorded(monkeypatch, agent, lambda agent: imitate(agent, pool, "sft/policy"))
    assert [len(batch) for batch in given["batches"]] == [8, 8, 4] * 3
    order = names([item for batch in given["batches"] for item in batch])
    passes = [order[:20], order[20:40], order[40:]]
    assert all(sorted(one) == sorted(names(pool)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_the_rate_of_reflection_falls_to_zero_over_all_iterations(tmp_path):
    agent = agent_with(tmp_path, iterations=2, lr=2.0)
    first, second = falling_rate(agent, 1, 4), falling_rate(agent, 2, 4)
    rates = [first(step) for step in range(4)] + [second(step) for step in range(4)]
    # 1 + cos(0), 1 + cos(pi / 2), 1 + cos(3 pi / 4)
    assert rates[0] == 2.0 and rates[4] == pytest.approx(1.0)
    assert rates[6] == pytest.approx(0.2928932)
    assert all(rate > later for rate, later in zip(rates, rates[1:])) and rates[-1] > 0


# -------------------------------------------------------------------------------------- the updates


def test_sft_is_adamw_on_the_naive_loss(tmp_path, monkeypatch, model):
    """Three updates by hand.

    Ordinary passes, the mean over the batch's action tokens, a clipped gradient that starts at
    zero, no weight decay.
    """
    taken, train = [], training.train

    def recording(agent, name, iteration, batches, *rest):
        taken.extend(batches)
        train(agent, name, iteration, batches, *rest)

    monkeypatch.setattr(training, "train", recording)
    words = ["--method", "sft", "--model", model, "--micro-tokens", "400"]
    out = run(tmp_path / "x", *QUIET, *words)
    rows = metrics(out, "sft")
    policy = LlamaForCausalLM.from_pretrained(model, attn_implementation="eager").double()
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    for batch, row in zip(taken, rows, strict=True):
        pairs = naive.expert_pairs(batch)
        logps = torch.cat([naive.token_logps(policy, *pair) for pair in pairs])
        policy.zero_grad()
        (-logps.mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        assert row["nll"] == pytest.approx(-logps.mean().item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["tokens"] == sum(item.tokens for item in batch) and row["trajectories"] == 2
        optimizer.param_groups[0]["lr"] = row["lr"]
        optimizer.step()
    # These are of no use to --match.
    assert not (out / "iter_0").exists()
    # The gradient must have been clipped, or this says nothing about it.
    assert max(row["grad_norm"] for row in rows) > 1
    expected, found = dict(policy.named_parameters()), weights(out / "policy")
    found = {name: found[name] for name in expected if name in found}
    assert len(taken) == 3
    assert distance(found, expected) < 1e-3 * distance(found, weights(Path(model)))


def test_what_sft_learns_from_is_the_experts_play(tmp_path, model):
    """Text, tokens and order, from the world to the batch."""
    words = [*QUIET, "--method", "sft", "--model", model]
    agent = prepare(stepagent.parse(words_of(tmp_path / "x", words)), METHODS["sft"])
    env = envs.make_env("household", **envs.env_options(WORLD))
    tasks = envs.some(env.splits["train"], 6)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert [one.encoded for one in agent.sft_set] == [
        encode(env.expert(task), tokenizer) for task in tasks
    ]
    assert names(agent.sft_set) == tasks and agent.prompt == []


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tmp_path, monkeypatch, model):
    load = stepagent.load_policy

    def poisoned(*args):
        policy, tokenizer = load(*args)
        policy.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
        return policy, tokenizer

    monkeypatch.setattr(stepagent, "load_policy", poisoned)
    says = "sft, iteration 0, update 0: loss or gradient is not finite; batch saved in .*failed_ba"
    with pytest.raises(InputError, match=says):
        run(tmp_path / "x", *QUIET, "--model", model)
    saved = json.loads((tmp_path / "x" / "failed_batch.json").read_text())
    assert (saved["phase"], saved["step"], saved["figures"]["nll"]) == ("sft", 0, "nan")
    assert [len(item["ids"]) > 50 for item in saved["batch"]] == [True, True]
    assert not (tmp_path / "x" / "sft").exists()


@pytest.mark.parametrize("name", ["grad_norm", "nll"])
def test_a_failed_batch_of_any_items_is_kept_as_tokens(tmp_path, name):
    agent = agent_with(tmp_path)
    figures = {"nll": 0.5, "grad_norm": 1.0}
    check_finite(agent, "implicit", 1, 2, agent.experts[:2], figures)
    with pytest.raises(InputError, match="implicit, iteration 1, update 2: loss or gradient"):
        check_finite(agent, "implicit", 1, 2, agent.experts[:2], figures | {name: math.inf})
    saved = json.loads((tmp_path / "failed_batch.json").read_text())
    assert [item["task_id"] for item in saved["batch"]] == ["t0", "t1"]


# --------------------------------------------------------------------------- what practice leaves

TOKENIZER = tiny.chatml()
EXPERT = "Thought: I look around.\nAction: go to desk 1"
OTHER_THOUGHT = "Thought: I know.\nAction: go to desk 1"
OTHER_ACTION = "Thought: I look around.\nAction: go to desk 2"


def ids_of(text: str, stop: bool = True) -> list[int]:
    return TOKENIZER(text + "<|im_end|>" * stop, add_special_tokens=False).input_ids


def practised_agent(out: Path, **options) -> Agent:
    """Two demonstrations, of two steps and of one; K = 2."""
    agent = agent_with(out, steps=(2, 1), practice=2, **options)
    agent.tokenizer = TOKENIZER
    agent.env = envs.make_env("household")
    for number, one in enumerate(agent.experts):
        one.trajectory.task_id = f"train-{number}"
        for step in one.trajectory.steps:
            step.action = EXPERT
        one.encoded = encode(one.trajectory, TOKENIZER)
    return agent


# [S][K] of each demonstration.
ACTIONS = [
    [
        [ids_of(EXPERT), ids_of(OTHER_THOUGHT)],
        [ids_of(EXPERT + " \n"), ids_of(OTHER_ACTION, stop=False)],
    ],
    [[ids_of("Action: look"), ids_of(EXPERT)]],
]


def forged_scores(encoded: Encoded, actions: list, first: float) -> Scores:
    """Counted from `first`, as views of larger tensors; two features."""
    steps = len(actions)
    leaves = [ids for of_step in actions for ids in of_step]
    tokens = sum(map(len, leaves))

    def count(*shape):
        size = math.prod(shape)
        return (first + torch.arange(10.0 * size))[:size].view(shape)

    return Scores(
        trunk=count(steps),
        leaves=count(len(leaves)) + 100,
        trunk_tokens=count(encoded.action_tokens) + 300,
        leaf_tokens=count(tokens) + 200,
        trunk_entropy=None,
        leaf_entropy=None,
        state_hidden=count(steps, 2),
    )


def records_of(agent: Agent) -> list[Practised]:
    records = []
    for number, (one, actions) in enumerate(zip(agent.experts, ACTIONS)):
        scores = forged_scores(one.encoded, actions, 1000.0 * number)
        records.append(practised_from(agent, one, actions, scores))
    return records


def test_a_record_has_what_later_phases_need_in_storage_of_its_own(tmp_path):
    record = records_of(practised_agent(tmp_path))[0]
    # The text counts, without the space around it.
    assert record.differs.tolist() == [[False, True], [False, True]]
    for name, tensor in vars(record).items():
        if isinstance(tensor, torch.Tensor):
            size = tensor.numel() * tensor.element_size()
            assert tensor.untyped_storage().nbytes() == size, name


def test_practice_of_the_experts_tokens_is_no_pair_whatever_the_files_text(tmp_path):
    """The tokenizer composes characters, the file does not."""
    tokenizer = tiny.chatml()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    agent = practised_agent(tmp_path)
    agent.tokenizer = tokenizer
    one = agent.experts[1]
    one.trajectory.steps[0].action = "Thought: cafe\u0301\nAction: take cafe\u0301"
    one.encoded = encode(one.trajectory, tokenizer)
    [(start, end)] = one.encoded.spans
    actions = [[one.encoded.ids[start:end], ids_of("Thought: caf\nAction: take caf")]]
    assert "\u0301" not in tokenizer.decode(actions[0][0])
    record = practised_from(agent, one, actions, forged_scores(one.encoded, actions, 0.0))
    assert record.differs.tolist() == [[False, True]]
    assert practice_figures(agent, [record])["match_action"] == 0.5


def test_practice_comes_back_from_disk_as_it_was_by_step_and_action(tmp_path):
    agent = practised_agent(tmp_path)
    save_practice(agent, 3, records_of(agent))
    first, second = read_practice(agent, 3)
    assert (first.actions, second.actions) == tuple(ACTIONS)
    assert first.differs.tolist() == [[False, True], [False, True]]
    assert second.differs.tolist() == [[True, False]]
    assert first.ref_expert.tolist() == [0, 1] and second.ref_expert.tolist() == [1000]
    assert first.ref_agent.tolist() == [[100, 101], [102, 103]]
    assert second.ref_agent.tolist() == [[1100, 1101]]
    assert first.ref_agent_tokens.tolist() == list(range(200, 200 + len(first.ref_agent_tokens)))
    assert len(second.ref_agent_tokens) == sum(len(ids) for ids in ACTIONS[1][0])
    assert second.ref_agent_tokens[0] == 1200
    tokens = [one.encoded.action_tokens for one in (first, second)]
    assert first.ref_expert_tokens.tolist() == list(range(300, 300 + tokens[0]))
    assert second.ref_expert_tokens.tolist() == list(range(1300, 1300 + tokens[1]))
    assert first.leaves == [(0, ACTIONS[0][0][0]), (0, ACTIONS[0][0][1])] + [
        (1, ACTIONS[0][1][0]),
        (1, ACTIONS[0][1][1]),
    ]
    assert (first.task_id, second.task_id) == ("train-0", "train-1")
    # Of a leaf, what is not the expert's.
    common = [len(commonprefix([ids, ids_of(EXPERT)])) for _, ids in first.leaves]
    assert common[0] == len(ids_of(EXPERT)) and 0 < common[1] < common[3]
    own = sum(len(ids) for _, ids in first.leaves) - sum(common)
    assert first.tokens == first.encoded.tokens + own


def test_figures_of_practice_by_hand(tmp_path):
    agent = practised_agent(tmp_path)
    save_practice(agent, 1, records_of(agent))
    figures = practice_figures(agent, read_practice(agent, 1))
    tokens = sum(len(ids) for one in ACTIONS for of_step in one for ids in of_step)
    assert figures == {
        "match_text": pytest.approx(3 / 6),
        "match_action": pytest.approx(4 / 6),
        "pairs_kept": 3,
        "stopped": pytest.approx(5 / 6),
        "practice_tokens": tokens,
    }


@pytest.mark.parametrize("expert, kind", [("", True), ("own.jsonl", False)])
def test_practice_is_written_for_people_one_step_a_line(tmp_path, expert, kind):
    agent = practised_agent(tmp_path, expert=expert)
    save_practice(agent, 1, records_of(agent))
    practised = read_practice(agent, 1)

    def rows(log_d=None):
        write_practice(agent, 1, practised, log_d)
        return [json.loads(line) for line in (tmp_path / "iter_1/practice.jsonl").open()]

    plain = rows()
    assert [(row["task"], row["step"]) for row in plain] == [
        ("train-0", 0),
        ("train-0", 1),
        ("train-1", 0),
    ]
    assert plain[1] == {
        "task": "train-0",
        "task_type": agent.env.task_type("train-0") if kind else "",
        "step": 1,
        "observation": "o1",
        "expert": EXPERT,
        "expert_logp": 1.0,
        "practice": [EXPERT + " \n", OTHER_ACTION],
        "practice_logp": [102.0, 103.0],
        "differs": [False, True],
    }
    log_d = []
    for one in practised:
        log_d.append((torch.full_like(one.ref_expert, -0.5), one.ref_agent - 2000))
    judged = rows(log_d)
    assert judged[1] == plain[1] | {"expert_log_d": -0.5, "practice_log_d": [-1898.0, -1897.0]}


# ------------------------------------------------------------------------------------------ play


def player(out: Path, model: str) -> Agent:
    words = [*QUIET, "--method", "base", "--model", model]
    return prepare(stepagent.parse(words_of(out, words)), METHODS["base"])


def test_episodes_come_back_in_the_order_of_their_tasks(tmp_path, monkeypatch, model):
    """Whichever rank has played them."""
    agent = player(tmp_path / "x", model)

    def gather(part):
        return [{task: part[task]} for task in sorted(part)]

    monkeypatch.setattr(agent.ranks, "gather", gather)
    tasks = agent.env.splits["dev"][4:0:-1]
    played = play(agent, tasks, "dev", [], 0.0, 0)
    assert names(played) == tasks and all(episode.steps[0].ids for episode in played)
    again = play(agent, tasks[2:], "dev", [], 0.0, 5)
    # Greedy: neither the company nor the seed matters.
    assert again == played[2:]
    hot = play(agent, tasks, "dev", [], 1.0, 0)
    assert hot != played and hot != play(agent, tasks, "dev", [], 1.0, 1)


def test_ranks_share_the_tasks(tmp_path, monkeypatch, model):
    """The second of two ranks plays every second task."""
    agent = player(tmp_path / "x", model)
    tasks = agent.env.splits["dev"][:4]
    alone = play(agent, tasks, "dev", [], 0.0, 0)
    mine = []

    def gather(part):
        mine.extend(part)
        return [{task: alone[place] for place, task in enumerate(tasks)}]

    monkeypatch.setattr(agent.ranks, "gather", gather)
    agent.ranks.rank, agent.ranks.world = 1, 2
    assert play(agent, tasks, "dev", [], 0.0, 0) == alone and mine == tasks[1::2]


def test_written_episodes_can_keep_their_tokens(tmp_path):
    agent = agent_with(tmp_path)
    agent.env = envs.make_env("household")
    turns = [Step("A desk.\u2028", "Action: look", [4, 5])]
    episode = Trajectory("train-0", [], turns, 0.5, True, {"invalid": 2}, "Nothing happens.")
    training.write_episodes(agent, "eval/x.jsonl", [episode] * 2)
    lines = (tmp_path / "eval/x.jsonl").read_text().split("\n")
    assert len(lines) == 3 and lines[0] == lines[1]
    kind = agent.env.task_type("train-0")
    turn = {"observation": "A desk.\u2028", "action": "Action: look"}
    expected = {"task_id": "train-0", "task_type": kind, "reward": 0.5, "truncated": True}
    expected |= {"invalid": 2, "steps": [turn]}
    assert json.loads(lines[0]) == expected
    training.write_episodes(agent, "x.jsonl", [episode], ids=True)
    with_ids = {"steps": [turn | {"ids": [4, 5]}], "last": "Nothing happens."}
    assert json.loads((tmp_path / "x.jsonl").read_text()) == expected | with_ids


@pytest.mark.parametrize("seconds, text", [(0.2, "0 s"), (59.4, "59 s"), (151, "2 min 31 s")])
def test_time_for_the_screen(monkeypatch, seconds, text):
    monkeypatch.setattr(training.time, "time", lambda: 1000.0 + seconds)
    assert training.took(1000.0) == text


# ------------------------------------------------------------------------------ figures for the log


def test_auc_is_the_share_of_ordered_pairs():
    generator = torch.Generator().manual_seed(0)
    for count, other_count in ((1, 1), (5, 8), (40, 17)):
        positive = torch.randint(0, 6, (count,), generator=generator).float() + 1
        negative = torch.randint(0, 6, (other_count,), generator=generator).float()
        above = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
        expected = above.item() / (count * other_count)
        assert area_under_curve(positive, negative) == pytest.approx(expected, abs=1e-6)
    assert area_under_curve(torch.ones(3), torch.zeros(2)) == 1.0
    assert area_under_curve(torch.zeros(3), torch.ones(2)) == 0.0


def test_reward_gap_by_hand():
    """Two of the four states have both kinds of actions."""
    equal = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]]).bool()
    reward = torch.tensor([[-1, -2, -4], [-9, 0, 0], [-1, -3, -2], [-7, -7, 0]]).float()
    expected = ((-1 + 3) + (-2.5 + 1)) / 2
    assert reward_gap(reward, equal)["log_d_gap"] == pytest.approx(expected)
    assert reward_gap(reward, torch.ones_like(equal)) == {}


def test_the_bootstrap_interval_has_the_right_width():
    """The mean's deviation is 0.05, so 95% lie within 0.098."""
    low, high = bootstrap([0.0, 1.0] * 50)
    assert 0.38 < low < 0.43 and 0.57 < high < 0.62
    assert bootstrap([1.0] * 9) == [1.0, 1.0]
