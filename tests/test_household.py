"""The household: its rules, its expert and its frozen task lists."""

import copy
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.files import kind
from benchmarks.household import Household, HouseholdExpert
from envs import make_env
from trajectory import InputError, parse_action, render

# sha256 over f"{house}\n{expert's play}\n" of each split (train: the first 500). They change with
# the generator, the expert or the default difficulty; then every result must be made again.
FROZEN = {
    "train": "5e2b0c10f44ba0f7",
    "dev": "8baba8f27a2824ed",
    "dev_more": "6983d469988ef860",
    "test": "6ab8debe3c241da2",
    "test_unseen": "9bae2c020520c23a",
}
# sha256 over the instruction and the example: what every prompt begins with.
FROZEN_PROMPT = "28daf3dbe1689746"
SPLITS = list(FROZEN)
SIZES = {"train": 6000, "dev": 100, "dev_more": 400, "test": 300, "test_unseen": 300}
HOUSEHOLD = Household()


@pytest.fixture(scope="module")
def env():
    return make_env("household")


def short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------- the tasks


def fingerprint(env, split):
    parts = []
    for task in env.splits[split][:500]:
        parts.append(f"{env.house(task)}\n{render(env.expert(task))}\n")
    return short_hash("".join(parts))


@pytest.mark.parametrize("split", SPLITS)
def test_the_task_lists_are_frozen(env, split):
    assert fingerprint(env, split) == FROZEN[split]


def test_the_prompt_is_frozen(env):
    assert short_hash(f"{env.instruction}\n{env.example}") == FROZEN_PROMPT


def test_splits_are_disjoint_and_have_their_sizes(env):
    assert {split: len(tasks) for split, tasks in env.splits.items()} == SIZES
    assert len(set().union(*env.splits.values())) == sum(SIZES.values())
    houses = {}
    for split in SPLITS:
        houses[split] = {repr(env.house(task)) for task in env.splits[split][:600]}
    assert sum(map(len, houses.values())) == 600 + 100 + 400 + 300 + 300
    assert len(set().union(*houses.values())) == 600 + 100 + 400 + 300 + 300


def test_held_out_combinations_are_in_test_unseen_only(env):
    for split in SPLITS:
        for task in env.splits[split]:
            house, group = env.house(task), env.task_type(task)
            assert house.task == group
            is_held_out = (house.obj, house.goal) in env.held_out[group]
            assert is_held_out == (split == "test_unseen")


def test_held_out_words_all_occur_in_training(env):
    objects, goals = set(), set()
    for pairs in env.seen.values():
        objects |= {obj for obj, _ in pairs}
        goals |= {goal for _, goal in pairs}
    for group, pairs in env.held_out.items():
        assert pairs and not set(pairs) & set(env.seen[group])
        assert {obj for obj, _ in pairs} <= objects
        assert {goal for _, goal in pairs} <= goals


def test_all_six_task_types_occur_alike(env):
    for split in SPLITS:
        types = [env.task_type(task) for task in env.splits[split]]
        counts = [types.count(name) for name in set(types)]
        assert len(counts) == 6 and max(counts) - min(counts) <= 1


def test_houses_are_possible_and_start_unsolved(env):
    for task in env.splits["train"][:100] + env.splits["test_unseen"][:50]:
        house = env.house(task)
        objects = [obj for content in house.contents.values() for obj in content]
        assert len(house.contents) == env.receptacles and len(objects) == len(set(objects))
        assert objects.count("desklamp 1") == 1
        for receptacle, content in house.contents.items():
            if kind(receptacle) == house.goal:
                assert house.obj not in map(kind, content)
        episode, observation = env.start(task)
        assert not episode.solved() and observation.endswith(f"Your task: {house.sentence()}.")


def test_episodes_are_deterministic_and_independent(env):
    task = "train-4"
    actions = [step.action for step in env.expert(task).steps]
    first, first_said = env.start(task)
    second, second_said = env.start(task)
    assert first_said == second_said == make_env("household").start(task)[1]
    played = [first.step(action) for action in actions]
    assert played == [second.step(action) for action in actions]
    assert played[-1][1:3] == (1.0, True)
    assert env.start(task)[1] == first_said
    assert render(env.expert(task)) == render(make_env("household").expert(task))


@pytest.mark.parametrize(
    "task", ["train-6000", "dev--1", "dev-01", "moon-1", "dev", "", "test_unseen-300"]
)
def test_an_unknown_task_is_refused(env, task):
    for call in (env.start, env.expert, env.task_type):
        with pytest.raises(InputError, match="there is no task"):
            call(task)


@pytest.mark.parametrize(
    "options",
    [
        {"receptacles": 4},
        {"receptacles": 99},
        {"distractors": -1},
        {"likely": 2},
        {"max_steps": 0},
        {"rooms": 3},
        {"receptacles": "many"},
    ],
)
def test_a_bad_option_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        make_env("household", **options)


# ---------------------------------------------------------------------------- the expert


@pytest.mark.parametrize("split", SPLITS)
def test_the_expert_solves_every_task(env, split):
    every = max(1, len(env.splits[split]) // 150)
    for task in env.splits[split][::every]:
        shown = env.expert(task)
        assert shown.reward == 1.0 and not shown.truncated, task
        assert len(shown.steps) <= env.max_steps(task), task
        assert shown.task_id == task and shown.prompt == []
        assert all(parse_action(step.action) for step in shown.steps)


@pytest.mark.parametrize(
    "options",
    [
        {"receptacles": 5, "distractors": 0},
        {"receptacles": 18, "distractors": 30},
        {"likely": 0.0},
        {"likely": 1.0},
    ],
)
def test_the_expert_solves_other_difficulties(options):
    env = make_env("household", **{"max_steps": 60} | options)
    for split in SPLITS:
        for task in env.splits[split][:25]:
            assert env.expert(task).reward == 1.0


def test_the_expert_needs_no_invalid_action(env):
    for task in env.splits["dev"]:
        episode, _ = env.start(task)
        results = [episode.step(step.action) for step in env.expert(task).steps]
        assert all(info["valid"] for *_, info in results)
        ends = [done for _, _, done, _ in results]
        assert ends == [False] * (len(ends) - 1) + [True]


def test_the_expert_reads_observations_only(env):
    """Given the words alone it plays what `env.expert` plays."""
    task = "test-5"
    episode, observation = env.start(task)
    expert = HouseholdExpert(observation)
    for step in env.expert(task).steps:
        assert (observation, expert.turn(observation)) == (step.observation, step.action)
        observation = episode.step(step.action)[0]


@pytest.mark.parametrize(
    "what, place, wanted",
    [
        ("hot mug", "microwave 1", "heat mug 1 with microwave 1"),
        ("two mug", "cabinet 1", "put mug 1 in/on cabinet 1"),
    ],
)
def test_the_expert_follows_an_agent_that_treats_what_it_need_not(what, place, wanted):
    expert = HouseholdExpert(
        "You are in a house with microwave 1, cabinet 1, sinkbasin 1. "
        f"Your task: put {what} in cabinet."
    )
    expert.place, expert.hand, expert.closed = "sinkbasin 1", "mug 1", False
    expert.read("You clean mug 1 with sinkbasin 1.")
    expert.place = place
    assert expert.decide()[1] == wanted


# ---------------------------------------------------------------------------- the rules

INVALID = [
    "",
    "go to desk 1",
    "Action:",
    "Action: fly",
    "Action: go to moon 1",
    "Action: open desk 9",
    "Action: take mug 99 from desk 1",
    "Action: put mug 1 in/on desk 1",
    "Action: clean mug 1 with sinkbasin 1",
    "Action: close safe 1",
    "Action: use desklamp 1",
    "Action: take desklamp 1 from desk 1",
    "Action: go to R",
    "Action: go to .*",
    "Action: go to desk",
    "Action: go tofridge 1",
    "Action: go fridge 1",
    "Action: go to fridge 1 now",
    "Action: examine mug 99",
    "Action: examine None",
    "Action: examine none",
    "Action: Look",
    "Action: look.",
    "Action: `look`",
    "Action: go  to countertop 1",
    "Action: go to  countertop 1",
    "Action: look\nObservation: On desk 1: mug 1.",
]


@pytest.mark.parametrize("text", INVALID)
def test_an_invalid_action_changes_nothing(env, text):
    episode, _ = env.start("train-2")
    before = copy.deepcopy(episode)
    assert episode.step(text) == ("Nothing happens.", 0.0, False, {"valid": False})
    assert episode == before


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet=st.sampled_from("go to desk 1take mug from\n:Action(put[].*\\"), max_size=60)
)
def test_any_text_is_answered(text):
    episode, _ = HOUSEHOLD.start("dev-3")
    observation, reward, done, info = episode.step(f"Action: {text}")
    assert observation and reward == 0 and not done and set(info) == {"valid"}


def test_the_rules_of_the_household():
    for task in HOUSEHOLD.splits["train"]:
        contents = HOUSEHOLD.house(task).contents
        if HOUSEHOLD.task_type(task) == "put" and len(contents["fridge 1"]) == 2:
            break
    food, other = contents["fridge 1"]
    nothing = "Nothing happens."
    dialogue = [
        ("open fridge 1", nothing),
        ("go to fridge 1", "The fridge 1 is closed."),
        (f"take {food} from fridge 1", nothing),
        ("open fridge 1", f"In fridge 1: {food}, {other}."),
        (f"examine {food}", f"{food} is normal."),
        (f"take {food}from fridge 1", nothing),
        (f"take {food} from fridge 1", f"You take {food}."),
        (f"take {other} from fridge 1", nothing),
        ("inventory", f"You have {food}."),
        (f"heat {food} with microwave 1", nothing),
        ("go to fridge 1", nothing),
        (f"cool {food} with fridge 1", f"You cool {food}."),
        (f"examine {food}", f"{food} is cool."),
        ("go to microwave 1", "The microwave 1 is closed."),
        (f"heat {food} with microwave 1", f"You heat {food}."),
        (f"examine {food}", f"{food} is hot."),
        (f"put {food} in microwave 1", nothing),
        ("open microwave 1", None),
        (f"put {food} in microwave 1", f"You put {food} in microwave 1."),
        ("inventory", "You have nothing."),
        ("close microwave 1", "The microwave 1 is closed."),
        ("look", "The microwave 1 is closed."),
        ("examine microwave 1", "The microwave 1 is closed."),
    ]
    episode, _ = HOUSEHOLD.start(task)
    for action, wanted in dialogue:
        said = episode.step(f"Thought: x\nAction: {action}")[0]
        assert wanted is None or said == wanted, action
    assert food in episode.contents["microwave 1"]
