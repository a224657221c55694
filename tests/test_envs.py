"""Environments by name and from a user's file, prompts, the command line, and expert files."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import envs
from envs import (
    load_trajectories,
    make_env,
    parse_action,
    prompt_messages,
    render,
    save_trajectories,
    source_file,
)
from trajectory import InputError, Step, Trajectory, lenient_action

ROOT = Path(envs.__file__).parent


@pytest.fixture(scope="module")
def env():
    return make_env("household")


def python(*words, **more):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **more)


# ---------------------------------------------------------------------------- by name


def test_an_unknown_environment_is_refused():
    with pytest.raises(InputError, match="environment 'moon': unknown; choose one of: household"):
        make_env("moon")
    with pytest.raises(InputError, match="environment 'moon': unknown"):
        source_file("moon")


def test_a_benchmark_is_imported_only_when_it_is_asked_for():
    code = (
        "import sys, envs\n"
        "def known():\n"
        "    loaded = [n for n in sys.modules if n.startswith('benchmarks.')]\n"
        "    heavy = [n for n in ('torch', 'transformers', 'numpy') if n in sys.modules]\n"
        "    print(*sorted(loaded), *heavy)\n"
        "known()\n"
        "envs.make_env('household')\n"
        "known()\n"
    )
    done = python("-c", code, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "benchmarks.files benchmarks.workers",
        "benchmarks.files benchmarks.household benchmarks.workers",
    ]


@pytest.mark.parametrize("name", envs.ENVIRONMENTS)
def test_every_environment_has_its_file_class_and_options(name):
    path = source_file(name)
    class_name = envs.ENVIRONMENTS[name].partition(":")[2]
    assert path.parent == ROOT / "benchmarks"
    assert f"class {class_name}" in path.read_text(encoding="utf-8")
    options = envs.known_options(name)
    assert options and "name" not in options
    with pytest.raises(InputError, match="no option 'rooms'; it has: .*workers"):
        make_env(name, rooms=3)


@pytest.mark.parametrize("workers", [-1, 257, "two", 0.5])
def test_a_bad_number_of_workers_is_refused(workers):
    with pytest.raises(InputError, match="workers must be a whole number from 0 to 256"):
        make_env("household", workers=workers)


def test_any_environment_plays_in_workers(env):
    played = make_env("household", workers=1, max_steps=30)
    assert played.max_steps("train-0") == 30 and played.splits == env.splits
    assert played.expert("train-0") == env.expert("train-0")


def test_help_and_errors_name_the_files(monkeypatch):
    monkeypatch.delenv("STEPAGENT_DATA", raising=False)
    text = python(envs.__file__, "--help").stdout
    for name in envs.ENVIRONMENTS:
        # Once among the files, once among the options.
        assert text.count(f"\n  {name}: ") == 2
    assert "receptacles=8, distractors=6, likely=0.75, max_steps=20" in text
    for name, file in [
        ("webshop", "items_shuffle_1000.json"),
        ("mind2web", "test_domain"),
        ("hotpotqa", "hotpot_train_v1.1.json"),
    ]:
        assert file in text
        with pytest.raises(InputError, match=file):
            make_env(name)


# ---------------------------------------------------------------------------- from a user's file

GARDEN = '''
from __future__ import annotations
from dataclasses import dataclass
from trajectory import Step, Trajectory, parse_action

@dataclass
class Bed:
    """A dataclass looks its module up in sys.modules."""
    plants: int
    wanted: int = 2

    def step(self, text):
        understood = parse_action(text) == "sow"
        self.plants += understood
        done = self.plants == self.wanted
        return f"{self.plants} plants.", float(done), done, {"valid": understood}

class Garden:
    instruction = "Sow. Reply with:\\nAction: sow"
    example = ""
    splits = {"train": ["bed-0", "bed-1"], "dev": ["bed-2"], "test": ["bed-3"]}

    def __init__(self, plants: int = 0):
        self.plants = plants

    def max_steps(self, task):
        return 3

    def task_type(self, task):
        return "garden"

    def start(self, task):
        return Bed(self.plants), f"This is {task}. Your task: two plants."

    def expert(self, task):
        episode, observation = self.start(task)
        trajectory, done = Trajectory(task), False
        while not done:
            trajectory.steps.append(Step(observation, "Action: sow"))
            observation, trajectory.reward, done, _ = episode.step("Action: sow")
        return trajectory

class SlowGarden(Garden):
    slow = True

class Wall:
    splits, instruction = {}, ""
'''


@pytest.fixture
def garden(tmp_path):
    path = tmp_path / "my_world.py"
    path.write_text(GARDEN, encoding="utf-8")
    return path


def test_an_environment_from_a_file(garden):
    world = make_env(f"{garden}:Garden", plants=1)
    assert world.plants == 1 and len(world.expert("bed-0").steps) == 1
    assert source_file(f"{garden}:Garden") == garden
    assert envs.known_options(f"{garden}:Garden") == {"plants": 0}


def test_an_environment_from_a_file_plays_in_workers(garden):
    here = make_env(f"{garden}:SlowGarden", workers=0)
    away = make_env(f"{garden}:SlowGarden")
    assert not hasattr(here, "workers") and len(away.workers) >= 1
    assert away.expert("bed-1") == here.expert("bed-1")
    episode, first = away.start("bed-2")
    assert first == here.start("bed-2")[1]
    said, reward, done, info = episode.step("Action: dig")
    assert (said, reward, done, info["valid"]) == ("0 plants.", 0.0, False, False)


@pytest.mark.parametrize(
    "source, says",
    [
        ("my_world.py:Wall", "lacks example, max_steps, task_type, start, expert"),
        ("my_world.py:Moon", "has no class 'Moon'"),
        ("my_world.py:", "has no class ''"),
        ("my_world.py", "unknown; choose one of: .* or give path/to/file.py:Class"),
        ("no_world.py:Garden", "there is no file .*no_world.py"),
        ("my_world.txt:Garden", "unknown"),
    ],
)
def test_a_file_without_an_environment_is_refused(garden, source, says):
    with pytest.raises(InputError, match=says) as error:
        make_env(str(garden.parent / source))
    assert "\n" not in str(error.value)


def test_missing_parts_are_found_with_workers_too(garden):
    with pytest.raises(InputError, match="lacks example, max_steps, task_type, start, expert"):
        make_env(f"{garden}:Wall", workers=1)


def test_an_option_that_the_file_lacks_is_refused(garden):
    with pytest.raises(InputError, match="no option 'rooms'; it has: plants, workers, lenient"):
        make_env(f"{garden}:Garden", rooms=1)


# ---------------------------------------------------------------------------- the command line


def test_the_command_line_plays_a_user_s_file(garden):
    """Relative to where one stands, in worker processes, with an action that is not understood."""
    words = [envs.__file__, "my_world.py:SlowGarden", "--task", "bed-1"]
    done = python(*words, "--play", cwd=garden.parent, input="dig\nsow\nsow\n")
    assert done.returncode == 0 and done.stdout.splitlines()[-3:] == [
        "> 0 plants.  [turn 1, reward 0, not understood]",
        "> 1 plants.  [turn 2, reward 0]",
        "> 2 plants.  [turn 3, reward 1]",
    ]
    shown = python(*words, "--expert", cwd=garden.parent).stdout
    assert shown == "This is bed-1. Your task: two plants.\nAction: sow\n1 plants.\nAction: sow\n"
    table = python(*words, "--stats", cwd=garden.parent).stdout
    assert "train: 2 tasks, 2 with an expert" in table and "solved 100.00%" in table


def test_the_command_line_shows_the_expert(env):
    words = ["household", "--env-options", "max_steps=30", "--task", "dev-3", "--expert"]
    assert python(envs.__file__, *words).stdout == render(env.expert("dev-3")) + "\n"


@pytest.mark.parametrize(
    "words, says",
    [
        (["moon", "--play"], "error: environment 'moon': unknown"),
        (["household", "--play", "--task", "moon-1"], "error: household: there is no task"),
        (["household", "--play", "--env-options", "x"], "error: --env-options: 'x' is not key="),
    ],
)
def test_the_command_line_answers_bad_input_in_one_line(words, says):
    done = python(envs.__file__, *words)
    assert done.returncode == 1 and done.stderr.startswith(says)
    assert len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------- prompts


def test_prompts_show_the_instruction_and_one_solved_example(env):
    user, answer = prompt_messages(env)
    assert env.instruction in user["content"] and env.example in user["content"]
    assert answer == {"role": "assistant", "content": "OK"}
    assert env.example.count("Action:") >= 2


def test_the_prompt_announces_an_example_only_where_there_is_one():
    world = SimpleNamespace(instruction="Rules.", example="")
    assert prompt_messages(world)[0]["content"] == "Rules."
    world.example = "Shown."
    assert prompt_messages(world)[0]["content"] == "Rules.\n\nHere is an example.\nShown."


# What the originals read, then what a lenient reader does.
READINGS = [
    ("Thought: I look.\nAction: go to desk 1", "go to desk 1", "go to desk 1"),
    ("Action: look", "look", "look"),
    ("Action:look", "look", "look"),
    ("Action:\nlook", "look", "look"),
    ("Action: look \n", "look", "look"),
    ("Thought: x. Action: look", "look", "look"),
    ("Action: Go to Desk 1", "Go to Desk 1", "go to desk 1"),
    ("Action: look.", "look.", "look"),
    ("Action: `open door`.", "`open door`.", "open door"),
    ("Action: **look**", "**look**", "look"),
    ("Action:   go   to  desk 1  ", "  go   to  desk 1", "go to desk 1"),
    ("Action: a\nObservation: b\nAction: c", "a\nObservation: b\nAction: c", "a"),
    ("Action: Search[The Hen].", "Search[The Hen].", "search[The Hen]"),
    ("Action: Finish[Ba`ath Party]", "Finish[Ba`ath Party]", "finish[Ba`ath Party]"),
    ('Action: click["Next >"]', 'click["Next >"]', "click[Next >]"),
    ('Action: click[18" x 18"]', 'click[18" x 18"]', 'click[18" x 18"]'),
    ("Action: .", ".", None),
    ("action : look", None, "look"),
    ("ACTION:look", None, "look"),
    ("Action 1: look", None, "look"),
    ("### Action 2: look", None, "look"),
    ("Thought 1: x.\n**Action 1:** `look`", None, "look"),
    ("**Action:** look", "** look", "look"),
    ("Reaction 1: joy", None, None),
    ("my reaction: joy", None, None),
    ("Thought: the action: is clear", None, None),
    ("", None, None),
    ("Action:", None, None),
    ("Action: \n", None, None),
    ("I look around", None, None),
]


@pytest.mark.parametrize("text, action, loosely", READINGS)
def test_an_action_is_read_as_it_stands_or_leniently(text, action, loosely):
    assert (parse_action(text), lenient_action(text)) == (action, loosely)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("lenient", [0, 1])
def test_a_world_is_lenient_only_if_asked(garden, workers, lenient):
    world = make_env(f"{garden}:Garden", workers=workers, lenient=lenient)
    for form in ("Sow", "sow.", "`sow`", "sow\nObservation: 9 plants."):
        episode, _ = world.start("bed-0")
        assert episode.step(f"Action: {form}")[3]["valid"] == bool(lenient)
        assert episode.step("Action: sow")[3]["valid"]
        assert not episode.step("I sow.")[3]["valid"]
    assert world.splits["dev"] == ["bed-2"] and world.expert("bed-1").reward == 1


@pytest.mark.parametrize("lenient", [2, "yes", -1])
def test_a_bad_leniency_is_refused(lenient):
    with pytest.raises(InputError, match="lenient must be 0 or 1"):
        make_env("household", lenient=lenient)


# ---------------------------------------------------------------------------- expert files

ETO_TURNS = [
    "You are an agent.",
    "OK",
    "Task: find a mug.",
    "Thought: I look.\nAction: look around",
    "A mug.",
    "Thought: It is there.\nAction: take mug",
    "Done.",
]
OWN = {
    "task_id": "t1",
    "prompt": [{"role": "user", "content": "Rules"}, {"role": "assistant", "content": "OK"}],
    "steps": [{"observation": "A desk.", "action": "Thought: x\nAction: look"}],
    "reward": 0.5,
    "truncated": False,
}


def conversation(*values, task_id="x", starts_with=0, **more):
    """ETO's format, a file of one play."""
    turns = []
    for i, value in enumerate(values):
        turns.append({"from": ("human", "gpt")[(i + starts_with) % 2], "value": value})
    return [{"id": task_id, "conversations": turns} | more]


ETO = conversation(*ETO_TURNS, task_id="kitchen-1")


def changed(**fields):
    return json.dumps(OWN | fields)


def written(tmp_path, content):
    """The path of a file with these bytes, this text, or this JSON."""
    path = tmp_path / "expert.json"
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_eto_conversations(tmp_path):
    [shown] = load_trajectories(written(tmp_path, ETO))
    assert shown.prompt == [
        {"role": "user", "content": "You are an agent."},
        {"role": "assistant", "content": "OK"},
    ]
    assert shown.steps == [
        Step("Task: find a mug.", "Thought: I look.\nAction: look around"),
        Step("A mug.", "Thought: It is there.\nAction: take mug"),
    ]
    assert (shown.task_id, shown.reward, shown.truncated) == ("kitchen-1", 1.0, False)
    [shown] = load_trajectories(written(tmp_path, [ETO[0] | {"id": 7, "reward": 0.25}]))
    assert (shown.task_id, shown.reward) == ("7", 0.25)


def test_a_game_s_file_is_its_name_and_other_chats_are_read_alike(tmp_path):
    """ETO's games, copies of them with role and content, AgentGym's rows, a list or lines."""
    [eto] = load_trajectories(written(tmp_path, ETO))
    [game] = load_trajectories(written(tmp_path, [ETO[0] | {"game_file": "data/train/x/y"}]))
    assert game.task_id == "data/train/x/y" and game.steps == eto.steps
    messages = []
    for turn in ETO[0]["conversations"]:
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        messages.append({"role": role, "content": turn["value"]})
    for row in (
        {"id": "kitchen-1", "conversations": messages},
        {"id": "kitchen-1", "messages": messages},
        {"item_id": "kitchen-1", "conversations": ETO[0]["conversations"]},
    ):
        assert load_trajectories(written(tmp_path, [row])) == [eto]
        assert load_trajectories(written(tmp_path, json.dumps(row))) == [eto]
    told = [{"role": "system", "content": "Be brief."}, *messages]
    [play] = load_trajectories(written(tmp_path, [{"id": "kitchen-1", "messages": told}]))
    assert play.prompt == [told[0], *eto.prompt] and play.steps == eto.steps
    # A list of our own rows.
    [own] = load_trajectories(written(tmp_path, [OWN]))
    assert own.task_id == "t1"


def test_agentgym_s_action_stands_on_a_line_of_its_own(tmp_path):
    said = ["Rules.", "Ok.", "A page.", "Thought:\nI search.\n\nAction:\nsearch[dress]"]
    [play] = load_trajectories(written(tmp_path, conversation(*said)))
    assert parse_action(play.steps[0].action) == "search[dress]"


def test_the_label_of_observations_is_taken_off(tmp_path):
    said = ["Rules.", "OK", "Observation: A desk.", "Action: look"]
    said += ["Observation:\nObservation: twice", "Action: go"]
    [shown] = load_trajectories(written(tmp_path, conversation(*said)))
    observations = [step.observation for step in shown.steps]
    assert observations == ["A desk.", "Observation: twice"]
    assert shown.prompt[0]["content"] == "Rules."


def test_of_a_repeated_task_the_first_is_kept_and_the_other_named(tmp_path, capsys):
    twice = [*ETO, ETO[0] | {"reward": 0.5}]
    once = load_trajectories(written(tmp_path, ETO))
    assert load_trajectories(written(tmp_path, twice)) == once
    told = "entry 1: repeats the id 'kitchen-1' of entry 0; left out"
    assert told in capsys.readouterr().err
    [own] = load_trajectories(written(tmp_path, changed() + "\n\n" + changed(reward=1)))
    assert own.reward == 0.5
    assert "line 3: repeats the id 't1' of line 1; left out" in capsys.readouterr().err


def test_save_and_load_round_trip(tmp_path):
    path = str(tmp_path / "saved.jsonl")
    steps = [
        Step('é\u2028"\n', "Thought: ünï\r\nAction: x", [1, 2]),
        Step("", "Action: y"),
    ]
    trajectories = [
        Trajectory("a", OWN["prompt"], steps, 0.75, True),
        Trajectory("b", [], [Step("o", "Action: z")], 1.0, False, {"invalid": 3}),
    ]
    before = copy.deepcopy(trajectories)
    save_trajectories(path, trajectories)
    loaded = load_trajectories(path)
    assert trajectories == before and os.listdir(tmp_path) == ["saved.jsonl"]
    # Token ids and figures are not kept.
    for trajectory in before:
        trajectory.info = {}
        for step in trajectory.steps:
            step.ids = None
    assert loaded == before
    save_trajectories(path, loaded[:1])
    assert load_trajectories(path) == before[:1]


def test_the_format_of_our_files(tmp_path):
    path = written(tmp_path, changed())
    save_trajectories(path, load_trajectories(path))
    assert Path(path).read_text(encoding="utf-8") == changed() + "\n"


def test_a_household_expert_survives_the_round_trip(tmp_path, env):
    path = str(tmp_path / "x.jsonl")
    shown = [env.expert(task) for task in env.splits["dev"][:5]]
    save_trajectories(path, shown)
    assert load_trajectories(path) == shown


def test_saving_where_one_cannot_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        save_trajectories(str(tmp_path / "no" / "x.jsonl"), [])


CHAT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "OK"}]
STEP_WITHOUT_ACTION = [{"observation": "o", "action": "look"}]


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("[]", "empty list"),
        ("[1]", "entry 0: is not a JSON object"),
        ("3", "line 1: is not a JSON object"),
        ("{", "line 1: broken JSON"),
        ("[{", "broken JSON"),
        (b"\xff\xfe", "not UTF-8"),
        ("hello", "broken JSON"),
        ("[" * 100000, "nested too deep"),
        (changed() + "\n" + changed()[:50], "line 2: broken JSON"),
        (changed(steps=[]), "line 1: has no actions"),
        (changed(steps=3), "'steps' is missing or not a list"),
        (changed(steps=[{"observation": "o"}]), "'action' is missing"),
        (changed(steps=["look"]), "steps\\[0\\] is not an object"),
        (changed(steps=STEP_WITHOUT_ACTION), 'action 0 has no "Action:"'),
        (changed(reward="1"), "'reward' is '1'; it must be a number from 0 to 1"),
        (changed(reward=float("nan")), "'reward' is nan; it must"),
        (changed(reward=float("inf")), "'reward' is inf; it must"),
        (changed(reward=70), "'reward' is 70; it must be a number from 0 to 1"),
        (changed(reward=-0.1), "'reward' is -0.1; it must"),
        (changed(truncated=0), "'truncated' must be true or false"),
        (changed(task_id=3), "'task_id' is not text"),
        (json.dumps({"task_id": "x"}), "'prompt' is missing"),
        (changed(prompt=[{"role": "user", "content": "x"}]), "'prompt' must be"),
        (changed(task_id="\ud800"), "surrogate"),
        (conversation("rules", "OK", "task"), "has no actions"),
        (conversation("rules"), "has no instruction"),
        (
            conversation("rules", "OK", "task", "Action: a", starts_with=1),
            "conversations\\[0\\]: is from 'gpt'",
        ),
        (conversation("rules", "OK", "task", "I look"), 'action 0 has no "Action:"'),
        (conversation("task", "Action: a"), "already acts"),
        ([{"conversations": []}], "'id' is missing"),
        ([{"id": True, "conversations": []}], "'id' is missing"),
        ([{"id": "x"}], "'conversations' is missing"),
        ([{"item_id": "x", "conversations": None}], "'conversations' is missing"),
        ([{"messages": CHAT}], "'id' is missing; only FireAct's"),
        ([{"id": "x", "messages": CHAT * 2}], 'action 0 has no "Action:"'),
        ([{"id": "x", "messages": [{"role": "tool", "content": "x"}]}], "is from 'tool'"),
        ([ETO[0] | {"reward": None}], "'reward' is None; it must be a number from 0 to 1"),
        ([ETO[0] | {"reward": 100.0}], "'reward' is 100.0; it must be"),
    ],
)
def test_a_malformed_file_names_itself_and_the_row(tmp_path, content, says):
    path = written(tmp_path, content)
    with pytest.raises(InputError, match=says) as error:
        load_trajectories(path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["/no/such/file.json", "/", "a\0b"])
def test_a_file_that_cannot_be_read(path):
    with pytest.raises(InputError, match="cannot be read"):
        load_trajectories(path)


def loads_or_refuses(tmp_path, content) -> bool:
    """Either trajectories that all act and survive a round trip, or an InputError of one line."""
    path = written(tmp_path, content)
    try:
        loaded = load_trajectories(path)
    except InputError as error:
        return len(str(error).splitlines()) == 1
    save_trajectories(path, loaded)
    for trajectory in loaded:
        if not trajectory.steps or not all(parse_action(s.action) for s in trajectory.steps):
            return False
    return bool(loaded) and load_trajectories(path) == loaded


fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORDS = [
    *("task_id", "prompt", "steps", "reward", "truncated", "observation", "action", "role"),
    *("content", "user", "assistant", "id", "conversations", "from", "value", "human", "gpt"),
    *("OK", "Action: look", "Thought: a\nAction: b", "instruction", "output"),
    "Thought: t\nAction: finish[a]\nObservation: reward = True",
]
words = st.sampled_from(WORDS)
leaf = words | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)


def branches(inner):
    keys = words | st.text(max_size=3)
    return st.lists(inner, max_size=5) | st.dictionaries(keys, inner, max_size=5)


json_values = st.recursive(leaf, branches, max_leaves=25)


def with_surrogates(text):
    return text.encode("utf-8", "surrogatepass")


@fuzz
@given(st.binary(max_size=80) | st.text(max_size=80).map(with_surrogates))
@example(b"[1e999999]")
@example(b"[" + b"1" * 5000 + b"]")
@example(b"\xef\xbb\xbf[]")
def test_any_bytes_load_or_are_refused(tmp_path, content):
    assert loads_or_refuses(tmp_path, content)


@fuzz
@given(st.lists(json_values, max_size=3), st.booleans())
def test_any_json_loads_or_is_refused(tmp_path, rows, as_list):
    content = json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows))
    assert loads_or_refuses(tmp_path, content)


@fuzz
@given(st.data())
def test_a_damaged_expert_file_loads_or_is_refused(tmp_path, data):
    """A whole file with one part cut out, doubled, or replaced by anything."""
    whole = [json.dumps(ETO), changed() + "\n" + changed(task_id="t2") + "\n"]
    text = data.draw(st.sampled_from(whole))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    others = st.sampled_from(["", text[start:end] * 2, "\n", '"', "null", "3", "{}"])
    middle = data.draw(others | st.text(max_size=5))
    assert loads_or_refuses(tmp_path, with_surrogates(text[:start] + middle + text[end:]))


@fuzz
@given(
    st.lists(st.tuples(st.text(), st.text(), st.text()), min_size=1, max_size=4),
    st.floats(0, 1),
    st.booleans(),
)
def test_any_text_survives_the_round_trip(tmp_path, texts, reward, truncated):
    steps = []
    for observation, thought, action in texts:
        turn = f"{thought}\nAction: a{action}".encode("utf-8", "replace").decode()
        steps.append(Step(observation.encode("utf-8", "replace").decode(), turn))
    trajectory = Trajectory("x", [], steps, reward, truncated)
    if all(parse_action(step.action) for step in steps):
        path = str(tmp_path / "x.jsonl")
        save_trajectories(path, [trajectory])
        assert load_trajectories(path) == [trajectory]
