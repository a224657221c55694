"""The household, its expert and its frozen task lists; the reply format; expert files."""
import copy
import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import envs
from envs import (HouseholdExpert, kind, load_trajectories, make_env, parse_action, prompt_messages, render, save_trajectories)
from rollout import InputError, Step, Trajectory

# sha256 over f"{house}\n{expert's play}\n" of each split (train: the first 500). They change with the generator, the
# expert or the default difficulty; then every figure in the README must be made again.
FROZEN = {"train": "5e2b0c10f44ba0f7", "dev": "8baba8f27a2824ed", "dev_more": "6983d469988ef860", "test": "6ab8debe3c241da2", "test_unseen": "9bae2c020520c23a"}
SPLITS = list(FROZEN)


@pytest.fixture(scope="module")
def env():
    return make_env("household")


# ---- the household

@pytest.mark.parametrize("split", SPLITS)
def test_the_expert_solves_every_task(env, split):
    for task in env.splits[split][::max(1, len(env.splits[split]) // 150)]:
        shown = env.expert(task)
        assert shown.reward == 1.0 and not shown.truncated and len(shown.steps) <= env.max_steps(task), task
        assert shown.task_id == task and shown.prompt == [] and all(parse_action(s.action) for s in shown.steps)


@pytest.mark.parametrize("options", [{"receptacles": 5, "distractors": 0}, {"receptacles": 18, "distractors": 30},
                                     {"likely": 0.0}, {"likely": 1.0}])
def test_the_expert_solves_other_difficulties(options):
    env = make_env("household", **{"max_steps": 60} | options)
    assert all(env.expert(task).reward == 1.0 for split in SPLITS for task in env.splits[split][:25])


def test_the_expert_needs_no_invalid_action(env):
    for task in env.splits["dev"]:
        episode, _ = env.start(task)
        results = [episode.step(s.action) for s in env.expert(task).steps]
        assert all(info["valid"] for *_, info in results) and [done for _, _, done, _ in results].index(True) == len(results) - 1


def fingerprint(env, split):
    text = "".join(f"{env.house(i)}\n{render(env.expert(i))}\n" for i in env.splits[split][:500])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("split", SPLITS)
def test_the_task_lists_are_frozen(env, split):
    assert fingerprint(env, split) == FROZEN[split], f"now {({s: fingerprint(env, s) for s in SPLITS})}"


def test_splits_are_disjoint_and_have_their_sizes(env):
    assert {split: len(ids) for split, ids in env.splits.items()} == {"train": 6000, "dev": 100, "dev_more": 400, "test": 300, "test_unseen": 300}
    houses = {split: {repr(env.house(i)) for i in env.splits[split][:600]} for split in SPLITS}
    assert len(set().union(*env.splits.values())) == 7100
    assert sum(map(len, houses.values())) == len(set().union(*houses.values())) == 600 + 100 + 400 + 300 + 300


def test_held_out_combinations_are_in_test_unseen_only(env):
    for split in SPLITS:
        for task in env.splits[split]:
            house, group = env.house(task), env.task_type(task)
            assert house.task == group and ((house.obj, house.goal) in env.held_out[group]) == (split == "test_unseen")


def test_held_out_words_all_occur_in_training(env):
    for group, pairs in env.held_out.items():
        assert pairs and not set(pairs) & set(env.seen[group])
        assert {o for o, _ in pairs} <= {o for g in env.seen.values() for o, _ in g}
        assert {goal for _, goal in pairs} <= {goal for g in env.seen.values() for _, goal in g}


def test_all_six_task_types_occur_alike(env):
    for split in SPLITS:
        types = [env.task_type(i) for i in env.splits[split]]
        assert len(set(types)) == 6 and max(map(types.count, set(types))) - min(map(types.count, set(types))) <= 1


def test_houses_are_possible_and_start_unsolved(env):
    for task in env.splits["train"][:100] + env.splits["test_unseen"][:50]:
        house = env.house(task)
        objects = [o for content in house.contents.values() for o in content]
        assert len(house.contents) == env.receptacles and objects.count("desklamp 1") == 1 and len(objects) == len(set(objects))
        assert not any(kind(o) == house.obj for r, content in house.contents.items() if kind(r) == house.goal for o in content)
        episode, observation = env.start(task)
        assert not episode.solved() and observation.endswith(f"Your task: {house.sentence()}.")


def test_episodes_are_deterministic_and_independent(env):
    task = "train-4"
    actions = [s.action for s in env.expert(task).steps]
    first, second = env.start(task), env.start(task)
    assert first[1] == second[1] == make_env("household").start(task)[1]
    one = [first[0].step(a) for a in actions]
    assert one == [second[0].step(a) for a in actions] and one[-1][1:3] == (1.0, True)
    assert env.start(task)[1] == first[1] and render(env.expert(task)) == render(make_env("household").expert(task))


INVALID = ["", "go to desk 1", "Action:", "Action: fly", "Action: go to moon 1", "Action: open desk 9",
           "Action: take mug 99 from desk 1",
           "Action: put mug 1 in/on desk 1", "Action: clean mug 1 with sinkbasin 1", "Action: close safe 1",
           "Action: use desklamp 1",
           "Action: take desklamp 1 from desk 1", "Action: go to R", "Action: go to .*", "Action: go to desk",
           "Action: examine mug 99"]


@pytest.mark.parametrize("text", INVALID)
def test_an_invalid_action_changes_nothing(env, text):
    episode, _ = env.start("train-2")
    before = copy.deepcopy(episode)
    assert episode.step(text) == ("Nothing happens.", 0.0, False, {"valid": False}) and episode == before


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("go to desk 1take mug from\n:Action(put[].*\\"), max_size=60))
def test_any_text_is_answered(text):
    episode, _ = HOUSE.start("dev-3")
    observation, reward, done, info = episode.step(f"Action: {text}")
    assert observation and reward == 0 and not done and set(info) == {"valid"}


HOUSE = make_env("household")


def walk(task, *actions):
    """What the world says to each action."""
    episode, _ = HOUSE.start(task)
    return [episode.step(f"Thought: x\nAction: {a}")[0] for a in actions], episode


def test_the_rules_of_the_household():
    task = next(t for t in HOUSE.splits["train"] if HOUSE.task_type(t) == "put" and len(HOUSE.house(t).contents["fridge 1"]) == 2)
    food, other = HOUSE.house(task).contents["fridge 1"]
    said, episode = walk(
        task, "open fridge 1", "go to fridge 1", f"take {food} from fridge 1", "open fridge 1", f"examine {food}",
        f"take {food} from fridge 1",
        f"take {other} from fridge 1", "inventory", f"heat {food} with microwave 1", "go to fridge 1",
        f"cool {food} with fridge 1",
        f"examine {food}", "go to microwave 1", f"heat {food} with microwave 1", f"examine {food}", f"put {food} in microwave 1",
        "open microwave 1", f"put {food} in microwave 1", "inventory", "close microwave 1", "look")
    no = "Nothing happens."
    assert said[:13] == [no, "The fridge 1 is closed.", no, f"In fridge 1: {food}, {other}.", f"{food} is normal.",
                         f"You take {food}.",
                         no, f"You have {food}.", no, no, f"You cool {food}.", f"{food} is cool.", "The microwave 1 is closed."]
    assert said[13:16] == [f"You heat {food}.", f"{food} is hot.", no]
    assert said[17:] == [f"You put {food} in microwave 1.", "You have nothing.", "The microwave 1 is closed.",
                         "The microwave 1 is closed."]
    assert food in episode.contents["microwave 1"]


def test_the_expert_reads_observations_only(env):
    """Given the words alone it plays what `env.expert` plays."""
    task = "test-5"
    episode, observation = env.start(task)
    expert = HouseholdExpert(observation)
    for step in env.expert(task).steps:
        assert (observation, expert.turn(observation)) == (step.observation, step.action)
        observation = episode.step(step.action)[0]


def test_prompts_show_the_instruction_and_one_solved_example(env):
    user, ok = prompt_messages(env)
    assert env.instruction in user["content"] and env.example in user["content"] and ok == {"role": "assistant", "content": "OK"}
    assert env.example.count("Action:") >= 2 and env.example not in prompt_messages(env, example=False)[0]["content"]


@pytest.mark.parametrize("task", ["train-6000", "dev--1", "dev-01", "moon-1", "dev", "", "test_unseen-300"])
def test_an_unknown_task_is_refused(env, task):
    for call in (env.start, env.expert, env.task_type):
        with pytest.raises(InputError, match="there is no task"):
            call(task)


@pytest.mark.parametrize("options", [{"receptacles": 4}, {"receptacles": 99}, {"distractors": -1}, {"likely": 2},
                                     {"max_steps": 0},
                                     {"rooms": 3}, {"receptacles": "many"}])
def test_a_bad_option_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        make_env("household", **options)


def test_an_unknown_environment_is_refused():
    with pytest.raises(InputError, match="environment 'moon': unknown; choose one of: household"):
        make_env("moon")


# ---- the reply format

@pytest.mark.parametrize("text, action", [
    ("Thought: I look.\nAction: go to desk 1", "go to desk 1"), ("Action: look", "look"), ("action : look", "look"),
    ("ACTION:look", "look"), ("Action 1: look", "look"), ("**Action:** look", "look"), ("*Action*: look", "look"), ("### Action 2: look", "look"),
    ("__Action:__ look", "look"), ("Thought 1: x.\n**Action 1:** `look`", "look"), ("Reaction 1: joy", None),
    ("Action: `open door`", "open door"), ("Action: **look**", "look"), ("Action: look.", "look"),
    ("Action:   go   to  desk 1  ", "go to desk 1"),
    ("Action:\nlook", "look"), ("Action: a\nObservation: b\nAction: c", "a"), ("Thought: x. Action: look", "look"), ("", None),
    ("Action:", None), ("Action: \n", None), ("I look around", None), ("Action: .", None), ("my reaction: joy", None),
    ("Thought: the action: is clear", None)])
def test_parse_action(text, action):
    assert parse_action(text) == action


@pytest.mark.parametrize("task, wanted", [("heat", "heat mug 1 with microwave 1"), ("put two", "put mug 1 in/on cabinet 1")])
def test_the_expert_follows_an_agent_that_treats_what_it_need_not(task, wanted):
    what = {"heat": "hot mug", "put two": "two mug"}[task]
    expert = HouseholdExpert(f"You are in a house with microwave 1, cabinet 1, sinkbasin 1. Your task: put {what} in cabinet.")
    expert.place, expert.hand, expert.closed = "sinkbasin 1", "mug 1", False
    expert.read("You clean mug 1 with sinkbasin 1.")
    expert.place = {"heat": "microwave 1", "put two": "cabinet 1"}[task]
    assert expert.decide()[1] == wanted


def test_the_prompt_announces_an_example_only_where_there_is_one():
    world = SimpleNamespace(instruction="Rules.", example="")
    assert prompt_messages(world)[0]["content"] == "Rules."
    world.example = "Shown."
    assert prompt_messages(world)[0]["content"] == "Rules.\n\nHere is an example.\nShown."


def test_help_and_errors_name_the_files(monkeypatch):
    monkeypatch.delenv("STEPAGENT_DATA", raising=False)
    text = subprocess.run([sys.executable, envs.__file__, "--help"], capture_output=True, text=True).stdout
    assert set(envs.FILES) <= set(envs.ENVIRONMENTS) and len(envs.FILES) == 8 and all(f"  {name}: " in text for name in envs.FILES)
    for name, file in (("webshop", "items_shuffle_1000.json"), ("mind2web", "test_domain"), ("hotpotqa", "hotpot_train_v1.1.json")):
        assert file in text
        with pytest.raises(InputError, match=file):
            make_env(name)


# ---- expert files

def test_eto_s_label_of_observations_is_taken_off(tmp_path):
    said = ["Rules.", "OK", "Observation: A desk.", "Action: look", "Observation:\nObservation: twice", "Action: go"]
    row = {"id": 1, "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]}
    (tmp_path / "eto.json").write_text(json.dumps([row]))
    [t] = load_trajectories(str(tmp_path / "eto.json"))
    assert [s.observation for s in t.steps] == ["A desk.", "Observation: twice"] and t.prompt[0]["content"] == "Rules."


ETO = [{"id": "kitchen-1", "conversations": [
    {"from": "human", "value": "You are an agent."}, {"from": "gpt", "value": "OK"},
    {"from": "human", "value": "Task: find a mug."},
    {"from": "gpt", "value": "Thought: I look.\nAction: look around"}, {"from": "human", "value": "A mug."},
    {"from": "gpt", "value": "Thought: It is there.\nAction: take mug"}, {"from": "human", "value": "Done."}]}]
OWN = {"task_id": "t1", "prompt": [{"role": "user", "content": "Rules"}, {"role": "assistant", "content": "OK"}],
       "steps": [{"observation": "A desk.", "action": "Thought: x\nAction: look"}], "reward": 0.5, "truncated": False}


def written(tmp_path, content, name="expert.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str)
                                                                 else json.dumps(content)).encode())
    return str(path)


def test_eto_conversations(tmp_path):
    [t] = load_trajectories(written(tmp_path, ETO))
    assert t.prompt == [{"role": "user", "content": "You are an agent."}, {"role": "assistant", "content": "OK"}]
    assert t.steps == [Step("Task: find a mug.", "Thought: I look.\nAction: look around"),
                       Step("A mug.", "Thought: It is there.\nAction: take mug")]
    assert (t.task_id, t.reward, t.truncated) == ("kitchen-1", 1.0, False)
    [t] = load_trajectories(written(tmp_path, [ETO[0] | {"id": 7, "reward": 0.25}]))
    assert (t.task_id, t.reward) == ("7", 0.25)


def test_save_and_load_round_trip(tmp_path):
    path = str(tmp_path / "own.jsonl")
    given_ = [Trajectory("a", OWN["prompt"], [Step("é\u2028\"\n", "Thought: ünï\r\nAction: x", [1, 2]), Step("", "Action: y")],
                         0.75, True),
              Trajectory("b", [], [Step("o", "Action: z")], 1.0, False, {"invalid": 3})]
    before = copy.deepcopy(given_)
    save_trajectories(path, given_)
    loaded = load_trajectories(path)
    assert given_ == before and os.listdir(tmp_path) == ["own.jsonl"]
    for t in before:
        t.info = {}
        for s in t.steps:
            s.ids = None
    assert loaded == before
    save_trajectories(path, loaded[:1])
    assert load_trajectories(path) == before[:1]


def test_a_household_expert_survives_the_round_trip(tmp_path, env):
    path, shown = str(tmp_path / "x.jsonl"), [env.expert(i) for i in env.splits["dev"][:5]]
    save_trajectories(path, shown)
    assert load_trajectories(path) == shown


def test_saving_where_one_cannot_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        save_trajectories(str(tmp_path / "no" / "x.jsonl"), [])


def changed(**fields):
    return json.dumps(OWN | fields)


def conversation(*values, start=0):
    return [{"id": "x", "conversations": [{"from": ("human", "gpt")[(i + start) % 2], "value": v} for i, v in enumerate(values)]}]


@pytest.mark.parametrize("content, says", [
    ("", "empty"), (" \n ", "empty"), ("[]", "empty list"), ("[1]", "entry 0: is not a JSON object"),
    ("3", "line 1: is not a JSON object"),
    ("{", "line 1: broken JSON"), ("[{", "broken JSON"), (b"\xff\xfe", "not UTF-8"), ("hello", "broken JSON"),
    ("[" * 100000, "nested too deep"),
    (changed() + "\n" + changed()[:50], "line 2: broken JSON"),
    (changed() + "\n\n" + changed(), "line 3: repeats the id 't1' of line 1"),
    (changed(steps=[]), "line 1: has no actions"), (changed(steps=3), "'steps' is missing or not a list"),
    (changed(steps=[{"observation": "o"}]), "'action' is missing"), (changed(steps=["look"]), "steps\\[0\\] is not an object"),
    (changed(steps=[{"observation": "o", "action": "look"}]), 'action 0 has no "Action:"'),
    (changed(reward="1"), "'reward' is not a finite"),
    (changed(reward=True), "'reward' is not a finite"), (changed(reward=float("nan")), "'reward' is not a finite"),
    (changed(reward=float("inf")), "'reward' is not a finite"), (changed(truncated=0), "'truncated' must be true or false"),
    (changed(task_id=3), "'task_id' is not text"), (json.dumps({"task_id": "x"}), "'prompt' is missing"),
    (changed(prompt=[{"role": "user", "content": "x"}]), "'prompt' must be"), (changed(task_id="\ud800"), "surrogate"),
    (conversation("rules", "OK", "task"), "has no actions"), (conversation("rules"), "has no instruction"),
    (conversation("rules", "OK", "task", "Action: a", start=1), "conversations\\[0\\]: is from 'gpt'"),
    (conversation("rules", "OK", "task", "I look"), 'action 0 has no "Action:"'),
    (conversation("task", "Action: a"), "already acts"),
    ([{"conversations": []}], "'id' is missing"), ([{"id": True, "conversations": []}], "'id' is missing"),
    ([{"id": "x"}], "'conversations' is missing"),
    ([ETO[0] | {"reward": None}], "'reward' is not"),
])
def test_a_malformed_file_names_itself_and_the_row(tmp_path, content, says):
    path = written(tmp_path, content)
    with pytest.raises(InputError, match=says) as error:
        load_trajectories(path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_of_a_conversation_that_is_there_twice_the_first_is_kept_and_the_other_named(tmp_path, capsys):
    other = [ETO[0] | {"reward": 0.5}]
    assert load_trajectories(written(tmp_path, ETO + other)) == load_trajectories(written(tmp_path, ETO))
    assert f"entry 1: repeats the id {str(ETO[0]['id'])!r} of entry 0; left out" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/no/such/file.json", "/", "a\0b"])
def test_a_file_that_cannot_be_read(path):
    with pytest.raises(InputError, match="cannot be read"):
        load_trajectories(path)


def loads_or_refuses(tmp_path, content) -> bool:
    """The content loads, as trajectories that all act and survive a round trip, or is refused with one line; nothing else is raised."""
    path = written(tmp_path, content)
    try:
        loaded = load_trajectories(path)
    except InputError as error:
        return len(str(error).splitlines()) == 1
    save_trajectories(path, loaded)
    acts = all(t.steps and all(parse_action(s.action) for s in t.steps) for t in loaded)
    return bool(loaded) and acts and load_trajectories(path) == loaded


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.sampled_from(["task_id", "prompt", "steps", "reward", "truncated", "observation", "action", "role", "content", "user",
                         "assistant",
                         "id", "conversations", "from", "value", "human", "gpt", "OK", "Action: look", "Thought: a\nAction: b"])
leaf = words | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
tree = st.recursive(leaf, lambda x: st.lists(x, max_size=5) | st.dictionaries(words | st.text(max_size=3), x, max_size=5),
                    max_leaves=25)


@fuzz
@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda s: s.encode("utf-8", "surrogatepass")))
@example(b"[1e999999]")
@example(b"[" + b"1" * 5000 + b"]")
@example(b"\xef\xbb\xbf[]")
def test_any_bytes_load_or_are_refused(tmp_path, content):
    assert loads_or_refuses(tmp_path, content)


@fuzz
@given(st.lists(tree, max_size=3), st.booleans())
def test_any_json_loads_or_is_refused(tmp_path, rows, as_list):
    assert loads_or_refuses(tmp_path, json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)))


@fuzz
@given(st.data())
def test_a_damaged_expert_file_loads_or_is_refused(tmp_path, data):
    """A whole file with one part cut out, doubled, or replaced by anything."""
    text = data.draw(st.sampled_from([json.dumps(ETO), changed() + "\n" + changed(task_id="t2") + "\n"]))
    a = data.draw(st.integers(0, len(text)))
    b = data.draw(st.integers(a, min(len(text), a + 40)))
    middle = data.draw(st.sampled_from(["", text[a:b] * 2, "\n", '"', "null", "3", "{}"]) | st.text(max_size=5))
    assert loads_or_refuses(tmp_path, (text[:a] + middle + text[b:]).encode("utf-8", "surrogatepass"))


@fuzz
@given(st.lists(st.tuples(st.text(), st.text(), st.text()), min_size=1, max_size=4), st.floats(0, 1), st.booleans())
def test_any_text_survives_the_round_trip(tmp_path, steps, reward, truncated):
    clean = lambda s: s.encode("utf-8", "replace").decode()
    t = Trajectory("x", [], [Step(clean(o), f"{clean(th)}\nAction: {'a' + clean(ac)}") for o, th, ac in steps], reward, truncated)
    if all(parse_action(s.action) for s in t.steps):
        path = str(tmp_path / "x.jsonl")
        save_trajectories(path, [t])
        assert load_trajectories(path) == [t]
