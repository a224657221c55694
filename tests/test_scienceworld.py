"""ETO's lists, and ScienceWorld itself where its package (requirements-envs.txt) and Java are."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from official import NEEDS_PACKAGES, real_files

from benchmarks.scienceworld import MAX_STEPS, ScienceWorld, read_eto_lists
from envs import Lenient, make_env
from trajectory import InputError, Trajectory

simulator = pytest.mark.skipif(
    importlib.util.find_spec("scienceworld") is None or not shutil.which("java"),
    reason=f"{NEEDS_PACKAGES}, and install Java",
)
LISTS = {
    "train": [["task-1-boil", 3], ["task-10-use-thermometer", 4], ["task-1-boil", 1]],
    "dev": [
        ["task-2a-test-conductivity", 7],
        ["task-6-lifespan-(longest-lived-then-shortest-lived)", 2],
    ],
    "test": [
        ["task-9-mendellian-genetics-(known-plant)", 5],
        ["task-6-lifespan-(longest-lived)", 0],
    ],
}


def write_lists(folder, **changed):
    for part, rows in (LISTS | changed).items():
        text = rows if isinstance(rows, str) else json.dumps(rows)
        (folder / f"{part}_indices.json").write_text(text)


# ---------------------------------------------------------------------------- ETO's lists


def test_eto_s_lists_are_read_with_the_package_s_names(tmp_path):
    write_lists(tmp_path)
    assert read_eto_lists(str(tmp_path)) == {
        "train": {"boil": [3, 1], "use-thermometer": [4]},
        "dev": {"test-conductivity": [7], "lifespan-longest-lived-then-shortest-lived": [2]},
        "test": {"mendelian-genetics-known-plant": [5], "lifespan-longest-lived": [0]},
    }


BROKEN_LISTS = [
    "",
    "{",
    "{}",
    "[]",
    "[1]",
    '[["task-1-boil"]]',
    '[["task-1-boil", "1"]]',
    '[["task-1-boil", -1]]',
    '[["a", true]]',
]


@pytest.mark.parametrize("rows", BROKEN_LISTS)
def test_broken_lists_are_reported_with_their_file(tmp_path, rows):
    write_lists(tmp_path, dev=rows)
    with pytest.raises(InputError, match="dev_indices.json"):
        read_eto_lists(str(tmp_path))


def test_absent_lists_are_reported_with_where_to_get_them(tmp_path):
    with pytest.raises(InputError, match="train_indices.json: cannot be read .* ETO"):
        read_eto_lists(str(tmp_path))


def test_without_a_folder_the_lists_are_asked_for(monkeypatch):
    monkeypatch.delenv("STEPAGENT_DATA", raising=False)
    with pytest.raises(InputError, match="train_indices.json.* data=FOLDER.* STEPAGENT_DATA"):
        ScienceWorld(split="eto")


def test_the_real_lists_and_step_limits_are_eto_s(tmp_path):
    folder = real_files("scienceworld")
    lists = read_eto_lists(str(folder))
    sizes = {part: sum(map(len, tasks.values())) for part, tasks in lists.items()}
    assert sizes == {"train": 1483, "dev": 194, "test": 211}

    ids = {}
    for part, tasks in lists.items():
        ids[part] = {(name, variation) for name, found in tasks.items() for variation in found}
    assert not ids["train"] & ids["test"]
    assert not ids["dev"] & ids["test"]
    assert len(ids["train"] & ids["dev"]) == 54

    limits = json.loads((folder / "max_steps.json").read_text())
    write_lists(tmp_path, train=[[name, 0] for name in limits])
    package_names = read_eto_lists(str(tmp_path))["train"]
    assert dict(zip(package_names, limits.values(), strict=True)) == MAX_STEPS
    assert set(lists["train"]) == set(MAX_STEPS)


# ---------------------------------------------------------------------------- the simulator


@pytest.fixture(scope="module")
def world():
    return ScienceWorld("lifespan-longest-lived,find-plant,power-component", variations=2)


@simulator
def test_splits_are_the_package_s_and_disjoint(world):
    sizes = {part: len(ids) for part, ids in world.splits.items()}
    assert sizes == {"train": 6, "dev": 6, "test": 6}
    assert len(set(sum(world.splits.values(), []))) == 18


@simulator
def test_eto_names_a_task_by_its_number_and_variation(world):
    """taskname2id.json of ETO has these numbers; 5 is the task that it leaves out."""
    for name, task in (
        ("0_3", "boil/3"),
        ("5_1", "measure-melting-point-unknown-substance/1"),
        ("9_412", "test-conductivity/412"),
        ("22_0", "lifespan-shortest-lived/0"),
        ("29_7", "mendelian-genetics-unknown-plant/7"),
        ("boil/3", "boil/3"),
    ):
        assert world.task_of(Trajectory(name)) == task
    for name in ("30_0", "9_99999", "9_x", "9", "_1", "sciworld_9", "boil"):
        assert world.task_of(Trajectory(name)) is None


@simulator
def test_eto_s_own_numbers_are_these(world):
    numbers = json.loads((real_files("scienceworld") / "taskname2id.json").read_text())
    for old_name, number in numbers.items():
        name, _, _ = world.task_of(Trajectory(f"{number}_0")).partition("/")
        words = old_name.replace("mendellian", "mendelian").replace("(", "").replace(")", "")
        assert words.endswith(name) and words.removesuffix(name).startswith("task-")
    assert len(numbers) == 29


@simulator
@pytest.mark.parametrize(
    "action, strict, lenient",
    [
        ("look around", True, True),
        ("Look  Around", True, True),
        ("look around.", False, True),
        ("`look around`", False, True),
        ("look around\nObservation: a room", False, True),
        ("sing", False, False),
    ],
)
def test_the_simulator_reads_the_action_as_it_stands(world, action, strict, lenient):
    for env, valid in ((world, strict), (Lenient(world), lenient)):
        episode, _ = env.start("find-plant/0")
        assert episode.step(f"Action: {action}")[3]["valid"] == valid
        episode.close()


@simulator
def test_the_gold_path_earns_full_reward(world):
    for task in world.splits["train"][::2] + world.splits["test"][::2]:
        expert = world.expert(task)
        assert expert.reward == 1
        assert len(expert.steps) <= world.max_steps(task)
        for step in expert.steps:
            assert step.action.startswith("Thought: ")
            assert "\nAction: " in step.action


@simulator
def test_episodes_are_deterministic_and_side_by_side(world):
    task = world.splits["dev"][0]
    actions = [step.action for step in world.expert(task).steps]
    one, first = world.start(task)
    two, second = world.start(task)
    assert first == second
    for action in actions:
        assert one.step(action) == two.step(action)
    one.close()
    two.close()


@simulator
def test_the_reward_is_the_best_score_and_a_wrong_focus_ends_the_episode(world):
    episode, _ = world.start("find-plant/0")
    _, before, done, info = episode.step("Action: look around")
    assert done is False
    assert info == {"valid": True}
    _, reward, done, _ = episode.step("Action: focus on air")
    assert done
    assert reward == before >= 0


@simulator
def test_an_invalid_action_is_said_to_be_and_costs_nothing(world):
    episode, _ = world.start("find-plant/0")
    for text in ("Action: sing a song", "I do not know"):
        observation, _, done, info = episode.step(text)
        assert observation.startswith("No known action")
        assert not done
        assert info == {"valid": False}
    episode.close()


@simulator
@pytest.mark.parametrize(
    "options",
    [{"tasks": "cook"}, {"variations": 0}, {"simplification": "simple"}, {"split": "ours"}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(InputError):
        make_env("scienceworld", **options)


@simulator
def test_eto_s_split_keeps_its_tasks_and_refuses_what_the_package_lacks(tmp_path):
    write_lists(tmp_path)
    env = make_env("scienceworld", workers=0, split="eto", data=str(tmp_path))
    assert set(env.splits["train"]) == {"boil/3", "boil/1", "use-thermometer/4"}
    assert set(env.splits["test"]) == {
        "mendelian-genetics-known-plant/5",
        "lifespan-longest-lived/0",
    }
    for changed in [["task-1-boil", 10**6]], [["task-1-cook", 0]]:
        write_lists(tmp_path, train=changed)
        with pytest.raises(InputError, match="no variation|cook"):
            make_env("scienceworld", workers=0, split="eto", data=str(tmp_path))


@simulator
def test_a_killed_simulator_is_started_anew_and_its_episode_replayed():
    env = make_env("scienceworld", workers=1, tasks="lifespan-longest-lived", variations=1)
    task = env.splits["train"][0]
    actions = [step.action for step in env.env.expert(task).steps]
    here, _ = env.env.start(task)
    undisturbed = [here.step(action)[:3] for action in actions]
    episode, _ = env.start(task)
    steps = [episode.step(actions[0])]
    # The worker's child is the Java process itself.
    worker = env.workers[0].process.pid
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    os.kill(int(children[0]), 9)
    steps += [episode.step(action) for action in actions[1:]]
    assert [step[:3] for step in steps] == undisturbed
    assert steps[-1][3]["restarts"] == 1
    env.workers[0].end()
