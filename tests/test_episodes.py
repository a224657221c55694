"""Whole episodes, many worlds at once, against the naive definition."""

import copy
import json
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import naive
import rollout
from benchmarks.files import sound_step
from rollout import episode_figures, run_episodes
from system.family import use_tree_attention
from system.worlds import try_out
from trajectory import InputError, Step, Trajectory, encode, prompt_ids, stable_seed, stop_ids
from tree import empty_pass


class Parrot:
    """A scripted world: answers of many lengths that depend on all that was said.

    Some episodes end by themselves.
    """

    def __init__(self, turns=6):
        self.turns = turns
        self.closed = []

    def max_steps(self, task):
        return self.turns

    def start(self, task):
        return ParrotEpisode(self, task), f"Task {task}. " + "You see a desk. " * (len(task) % 3)


class ParrotEpisode:
    def __init__(self, env, task):
        self.env = env
        self.task = task
        self.said = task

    def step(self, text):
        self.said += "|" + text
        rng = random.Random(self.said)
        done = rng.random() < 0.15
        observation = "mug 1, " * rng.randrange(7) + "pen 2."
        reward = rng.random()
        return observation, reward, done, {"valid": rng.random() < 0.5}

    def close(self):
        self.env.closed.append(self.task)


class SlowParrot(Parrot):
    slow = True


class Answering(Parrot):
    """Its episodes answer this, whatever is done."""

    def __init__(self, answer, first="You see a desk."):
        super().__init__()
        self.answer = answer
        self.first = first

    def task_type(self, task):
        return "x"

    def start(self, task):
        return SimpleNamespace(step=lambda text: self.answer, close=lambda: None), self.first


def talker(make=tiny.chatml, family="llama", context=1000, **more):
    """A random model over a real tokenizer, which stops often enough."""
    tokenizer = make()
    model = tiny.model(family, vocab=len(tokenizer), context=context, **more)
    with torch.no_grad():
        model.lm_head.weight[sorted(stop_ids(tokenizer))] *= 2.5
    return model, tokenizer


TASKS = [f"t{'x' * i}{i}" for i in range(7)]
PROMPT = [
    {"role": "user", "content": "Rules of the world."},
    {"role": "assistant", "content": "OK"},
]


def assert_same_episodes(played, expected):
    for ours, naives in zip(played, expected, strict=True):
        assert ours.task_id == naives.task_id
        assert ours.steps == naives.steps
        assert ours.reward == naives.reward
        assert ours.truncated == naives.truncated
        assert ours.info["invalid"] == naives.info["invalid"]


TALKERS = [
    ("llama", tiny.chatml),
    ("mistral", tiny.mistral),
    ("qwen2", tiny.llama3),
    ("qwen3", tiny.chatml),
]


@pytest.mark.parametrize("family, make", TALKERS)
def test_episodes_with_a_kept_cache_are_episodes_computed_from_scratch(family, make):
    model, tokenizer = talker(make, family)
    ordinary = copy.deepcopy(model)
    played = run_episodes(model, tokenizer, Parrot(), TASKS, prompt=PROMPT, max_new_tokens=9)
    expected = [naive.play(ordinary, tokenizer, Parrot(), task, PROMPT, 9) for task in TASKS]
    assert_same_episodes(played, expected)
    stopped = set()
    for episode in played:
        stopped |= {step.ids[-1] in stop_ids(tokenizer) for step in episode.steps}
    assert stopped == {True, False}
    assert {episode.truncated for episode in played} == {True, False}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_looking_seldom_changes_no_episode(temperature, monkeypatch):
    """As on CUDA, where a look waits for the GPU. The context ends some episodes, and actions."""
    model, tokenizer = talker(tiny.mistral, "mistral", context=150)

    def play():
        more = {"temperature": temperature, "max_new_tokens": 11, "batch": 3}
        return run_episodes(model, tokenizer, Parrot(), TASKS, **more)

    often = play()
    assert any(episode.info.get("outgrown") for episode in often)
    monkeypatch.setattr(rollout, "passes_between_looks", lambda device: 8)
    assert play() == often


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_size_does_not_change_episodes(temperature):
    model, tokenizer = talker(tiny.mistral, "mistral")

    def play(tasks, batch, seed=0):
        more = {"temperature": temperature, "max_new_tokens": 8, "batch": batch, "seed": seed}
        return run_episodes(model, tokenizer, Parrot(), tasks, **more)

    one_by_one = play(TASKS, 1)
    assert [episode.task_id for episode in one_by_one] == TASKS
    assert play(TASKS, 3) == one_by_one
    assert play(TASKS, 64) == one_by_one
    assert play(TASKS[::-1], 4) == one_by_one[::-1]
    assert (play(TASKS, 64, seed=1) == one_by_one) == (temperature == 0)


def test_sampled_episodes_take_each_token_with_its_own_random_number():
    model, tokenizer = talker()
    ordinary = copy.deepcopy(model)
    more = {"temperature": 1.0, "max_new_tokens": 8, "seed": 5}
    for episode in run_episodes(model, tokenizer, Parrot(), TASKS, **more):
        generator = torch.Generator().manual_seed(stable_seed(5, episode.task_id))
        ids = prompt_ids(tokenizer, [], episode.steps[0].observation)
        noise = torch.rand(8, generator=generator, dtype=torch.float64)
        drawn = naive.sampled(ordinary, ids, 1.0, stop_ids(tokenizer), noise)
        assert episode.steps[0].ids == drawn


def test_nobody_waits_for_the_longest_action():
    """Actions of 1 to 60 tokens.

    If all waited for the longest of each turn, there would be 2.4 times as many passes as tokens in
    each row.
    """
    model, tokenizer = talker()
    tasks = [f"t{'x' * (i % 7)}{i}" for i in range(40)]
    widths = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: widths.append(inputs[0].shape[1])
    )
    more = {"temperature": 1.0, "max_new_tokens": 60, "batch": 10}
    played = run_episodes(model, tokenizer, Parrot(), tasks, **more)
    written = 0
    for episode in played:
        written += sum(len(step.ids) - 1 for step in episode.steps)
    assert widths.count(1) < 1.6 * written / 10


def test_slow_worlds_play_the_same_episodes():
    model, tokenizer = talker()

    def play(env, batch):
        return run_episodes(model, tokenizer, env, TASKS, batch=batch, max_new_tokens=8)

    expected = play(Parrot(), 4)
    assert play(SlowParrot(), 4) == expected
    assert play(SlowParrot(), 1) == expected


def test_a_slow_world_answers_while_others_write():
    model, tokenizer = talker()
    use_tree_attention(model)
    passes, answered = [], []

    def take_time(*_):
        # The world's thread gets to run.
        time.sleep(0.05)
        passes.append(1)

    model.model.register_forward_hook(take_time)

    class Episode(ParrotEpisode):
        def step(self, text):
            before, until = len(passes), time.time() + 60
            # The first answers only once the model has moved on.
            while self.task == "first" and len(passes) == before and time.time() < until:
                time.sleep(0.01)
            answered.append((self.task, len(passes) > before))
            return super().step(text)

    class World(SlowParrot):
        def start(self, task):
            return Episode(self, task), "You see a desk."

    run_episodes(model, tokenizer, World(turns=1), ["first", "second"], batch=2, max_new_tokens=4)
    assert ("first", True) in answered


@pytest.mark.parametrize("world", [Parrot, SlowParrot])
def test_after_an_error_no_further_worlds_begin(world):
    model, tokenizer = talker()
    begun = []

    class World(world):
        def start(self, task):
            begun.append(task)
            if len(begun) == 1:
                raise InputError("no such task")
            time.sleep(0.1)
            return super().start(task)

    with pytest.raises(InputError, match="no such task"):
        run_episodes(model, tokenizer, World(), [f"t{i}" for i in range(60)])
    assert len(begun) < 30


def test_an_action_cut_at_the_limit_keeps_its_tokens_and_the_turn_is_closed():
    model, tokenizer = talker()
    env, ended = Parrot(), []
    more = {"max_new_tokens": 3, "temperature": 1.0, "progress": ended.append}
    played = run_episodes(model, tokenizer, env, TASKS, **more)
    assert sum(ended) == len(TASKS)
    assert sorted(env.closed) == sorted(TASKS)
    cut = 0
    for episode in played:
        item = encode(episode, tokenizer)
        for step, (start, end) in zip(episode.steps, item.spans):
            assert item.ids[start:end] == step.ids
            assert len(step.ids) <= 3
            if step.ids[-1] in stop_ids(tokenizer):
                assert tokenizer.decode(step.ids[:-1]) == step.action
                continue
            assert len(step.ids) == 3
            assert tokenizer.decode(step.ids) == step.action
            if end < len(item.ids):
                cut += 1
                # Closed, not supervised.
                assert item.ids[end] == tokenizer.eos_token_id
    assert cut > 0


@pytest.mark.parametrize("longest", [30, 120])
def test_an_episode_that_outgrows_the_context_ends_as_truncated(longest):
    model, tokenizer = talker(context=150)
    if longest > 30:
        # It never stops by itself: the context cuts actions.
        with torch.no_grad():
            model.lm_head.weight[sorted(stop_ids(tokenizer))] = 0
    ordinary = copy.deepcopy(model)
    played = run_episodes(model, tokenizer, Parrot(turns=40), TASKS, max_new_tokens=longest)
    expected = []
    for task in TASKS:
        expected.append(naive.play(ordinary, tokenizer, Parrot(turns=40), task, [], longest))
    assert_same_episodes(played, expected)
    outgrown = [episode for episode in played if episode.info.get("outgrown")]
    assert outgrown
    for episode in played:
        assert len(encode(episode, tokenizer).ids) <= 150
        assert len(episode.steps) < 40
        # 40 turns do not fit in 150 tokens.
        assert episode.truncated == (episode in outgrown)


def test_a_state_as_long_as_the_context_leaves_no_room_for_an_action():
    model, tokenizer = talker()
    played = run_episodes(model, tokenizer, Parrot(), TASKS, max_new_tokens=8)
    whole = max(played, key=lambda episode: len(episode.steps))
    item = encode(whole, tokenizer)
    assert len(item.spans) > 2
    for step, (start, _) in enumerate(item.spans):
        for allowed in (0, 1):
            model.config.max_position_embeddings = start + allowed
            [played] = run_episodes(model, tokenizer, Parrot(), [whole.task_id], max_new_tokens=8)
            lengths = [len(turn.ids) for turn in played.steps]
            expected = [len(turn.ids) for turn in whole.steps[:step]]
            assert lengths == expected + [1] * allowed
            if allowed == 0:
                assert played.truncated
                assert played.info["outgrown"] == 1


@pytest.mark.parametrize("world", [Parrot, SlowParrot])
def test_a_prompt_longer_than_the_context_ends_before_it_begins(world):
    model, tokenizer = talker(context=150)
    prompt = [{"role": "user", "content": "mug " * 400}, {"role": "assistant", "content": "OK"}]

    class World(world):
        def start(self, task):
            # The others are over before anybody asks.
            time.sleep(0.3 * (task == TASKS[0]))
            return super().start(task)

    env = World(turns=3)
    played = run_episodes(model, tokenizer, env, TASKS, prompt=prompt, max_new_tokens=5)
    assert [episode.task_id for episode in played] == TASKS
    assert sorted(env.closed) == sorted(TASKS)
    for episode in played:
        assert episode.truncated
        assert episode.steps == []
        assert episode.info["outgrown"] == 1


def test_the_step_limit_truncates():
    model, tokenizer = talker()
    played = run_episodes(model, tokenizer, Parrot(turns=2), TASKS, max_new_tokens=5)
    assert any(episode.truncated for episode in played)
    for episode in played:
        assert len(episode.steps) <= 2
        if episode.truncated:
            assert len(episode.steps) == 2
            assert not episode.info.get("outgrown")


def test_an_empty_pass_is_one_pass():
    """Or ranks that have nothing to play would keep the others waiting."""
    model = tiny.model()
    use_tree_attention(model)
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    empty_pass(model)
    assert len(passes) == 1


LENGTHS = [[3], [5, 900, 4], [10, 200, 10], [40] * 9, [1, 2, 4, 8, 600, 500, 20000]]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_rows_that_read_together_are_alike_and_all_read_once(lengths):
    rows = list(range(len(lengths)))
    groups = rollout.of_like_length(rows, lengths.__getitem__, most=1200)
    assert sorted(sum(groups, [])) == rows
    for group in groups:
        lengths_read = [lengths[row] for row in group]
        assert group == sorted(group)
        if len(group) > 1:
            assert max(lengths_read) * len(group) <= 1200
            assert max(lengths_read) <= 2 * min(lengths_read) + 64


VALID = {"valid": True}


@pytest.mark.parametrize(
    "answer, sound",
    [
        (("o", np.float32(0.5), np.bool_(True), VALID), ("o", 0.5, True, VALID)),
        (("o", np.int64(1), True, {"valid": np.bool_(False)}), ("o", 1.0, True, {"valid": False})),
        (("o", np.array(0.25), 1, VALID), ("o", 0.25, True, VALID)),
        (("o", torch.tensor(0.25), 1, {"valid": 1}), ("o", 0.25, True, VALID)),
        (
            (np.str_("o"), True, True, VALID | {"f1": np.float64(2)}),
            ("o", 1.0, True, VALID | {"f1": 2.0}),
        ),
    ],
)
def test_what_a_world_answers_becomes_plain_values(answer, sound):
    model, tokenizer = talker()
    [episode] = run_episodes(model, tokenizer, Answering(answer), ["t0"], max_new_tokens=4)
    assert sound_step(answer, "here") == sound
    found = [*sound_step(answer, "here")[:3], *sound_step(answer, "here")[3].values()]
    assert {type(value) for value in found} <= {str, float, bool}
    assert (episode.reward, episode.last) == (sound[1], "o")
    # As it is written.
    json.dumps([episode.reward, episode.truncated, episode.info, episode.last])


@pytest.mark.parametrize(
    "answer, says",
    [
        (None, r"the answer is None; it must be \(observation, reward, done, info\)"),
        ("four", "the answer is 'four'"),
        (("o", 0.5, True, False, VALID), r"the answer is .*; it must be \(observation, reward"),
        (("o", 7.0, True, VALID), "the reward is 7.0; it must be a number from 0 to 1"),
        (("o", -0.1, True, VALID), "the reward is -0.1"),
        (("o", float("nan"), True, VALID), "the reward is nan"),
        (("o", np.float32("nan"), True, VALID), "the reward is nan"),
        (("o", "0.5", True, VALID), "the reward is '0.5'"),
        (("o", None, True, VALID), "the reward is None"),
        (("o", np.ones(2), True, VALID), "the reward is array"),
        (("o", 0.5, None, VALID), '"done" is None'),
        (("o", 0.5, True, None), 'info is no dict with "valid"'),
        (("o", 0.5, True, {}), 'info is no dict with "valid"'),
        (("o", 0.5, True, {"valid": "yes"}), "info.'valid'. is 'yes'"),
        (("o", 0.5, True, VALID | {"note": "x"}), "info.'note'. is 'x'; it must be a number"),
        (("o", 0.5, True, VALID | {"f1": float("nan")}), "info.'f1'. is nan"),
        (("o", 0.5, True, VALID | {"steps": 3}), "info.'steps'. has the name of another figure"),
        ((b"o", 0.5, True, VALID), "the observation is not text but bytes"),
        (("\ud83d", 0.5, True, VALID), "the observation holds half of a surrogate pair"),
    ],
)
def test_what_no_world_may_answer_is_named_in_its_turn(answer, says):
    model, tokenizer = talker()
    with pytest.raises(InputError, match=f"^environment, task t0, turn 1: {says}") as error:
        run_episodes(model, tokenizer, Answering(answer), ["t0"], max_new_tokens=4)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("first, says", [(None, "not text but NoneType"), ("\udc00", "surrogate")])
def test_a_first_observation_is_checked_too(first, says):
    model, tokenizer = talker()
    with pytest.raises(InputError, match=f"^environment, task t0: the first observation .*{says}"):
        run_episodes(model, tokenizer, Answering(None, first), ["t0"], max_new_tokens=4)
    env = Answering(None)
    env.start = lambda task: "You see a desk."
    with pytest.raises(
        InputError, match="start answered 'You see a desk.'; it must be .episode, f"
    ):
        run_episodes(model, tokenizer, env, ["t0"], max_new_tokens=4)


def test_tasks_are_tried_before_they_are_played():
    good = ("o", 0.5, False, VALID)
    try_out(Answering(good), ["t0", "t1"], "Action: look")
    # Of the last task, too.
    for name, value in (("max_steps", 0), ("max_steps", None), ("task_type", None)):
        env = Answering(good)
        usual = getattr(env, name)
        setattr(env, name, {"t0": usual("t0"), "t1": value}.get)
        with pytest.raises(InputError, match=f"environment, task t1: its {name} is"):
            try_out(env, ["t0", "t1"], "Action: look")
    with pytest.raises(InputError, match="environment, task 7: its id is not text but int"):
        try_out(Answering(good), [7], "Action: look")
    with pytest.raises(InputError, match="environment, task t0, turn 1: the reward is 2"):
        try_out(Answering(("o", 2, False, VALID)), ["t0"], "Action: look")


def test_a_world_may_fail_in_some_tasks_but_not_in_all():
    failed = ("The world has failed.", 0.0, True, VALID | {"unplayable": 1})
    with pytest.raises(InputError, match="the world failed in t0, t1, t2; see the messages above"):
        try_out(Answering(failed), ["t0", "t1", "t2", "t3"], "Action: look")
    worlds = {"t0": Answering(failed), "t1": Answering(("o", 0.5, False, VALID))}
    env = Answering(failed)
    env.start = lambda task: worlds[task].start(task)
    try_out(env, ["t0", "t1"], "Action: look")


def turns(count: int) -> list[Step]:
    return [Step("", "")] * count


def test_episode_figures_by_hand():
    env = SimpleNamespace(task_type=lambda task: task[0])
    played = [
        Trajectory("a1", [], turns(2), 1.0, False, {"invalid": 1}),
        Trajectory("a2", [], turns(4), 0.5, True, {"invalid": 2}),
        Trajectory("b1", [], turns(4), 0.0, True, {"invalid": 0, "outgrown": 1}),
    ]
    figures = episode_figures(played, env)
    assert figures["success"] == pytest.approx(1 / 3)
    assert figures["reward"] == pytest.approx(0.5)
    assert figures["steps"] == pytest.approx(10 / 3)
    assert figures["invalid"] == pytest.approx(0.3)
    assert figures["truncated"] == 2
    assert figures["outgrown"] == 1
    assert figures["tasks"] == 3
    assert figures["unplayable"] == 0
    assert figures["secondary"] == {}
    assert figures["by_type"] == {"a": [0.5, 2], "b": [0.0, 1]}
    # What one episode does not name counts as 0.
    played[0].info["f1"] = 0.6
    assert episode_figures(played, env)["secondary"] == {"f1": pytest.approx(0.2)}


def test_an_episode_whose_world_failed_is_counted_not_scored():
    env = SimpleNamespace(task_type=lambda task: task[0])
    played = Trajectory("a1", [], turns(2), 1.0, False, {"invalid": 1})
    info = {"invalid": 0, "unplayable": 1, "restarts": 2}
    failed = Trajectory("b2", [], turns(1), 0.0, False, info)
    alone = episode_figures([played], env)
    assert episode_figures([played, failed], env) == alone | {"unplayable": 1, "restarts": 2}
    with pytest.raises(InputError, match="failed in all of 1; see the messages above"):
        episode_figures([failed], env)
    with pytest.raises(InputError, match="no episode to evaluate: there is no task"):
        episode_figures([], env)
