"""ALFWorld: its grammar, expert and files on a stub of TextWorld; and the real games, where package and data are at hand."""
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import envs
from envs import ALFWORLD_TYPES, alfworld_names, kind, make_env
from rollout import InputError

FORMS = {"OpenObject": "open {r}", "CloseObject": "close {r}", "PickupObject": "take {o} from {r}", "PutObject": "put {o} in/on {r}",
         "CleanObject": "clean {o} with {r}", "HeatObject": "heat {o} with {r}", "CoolObject": "cool {o} with {r}",
         "ToggleObject": "use {o}", "examineObject": "examine {o}", "examineReceptacle": "examine {r}", "look": "look",
         "inventory": "inventory"}
TASKS = {"pick_and_place_simple-Mug-None-Shelf-1": "put a mug in shelf", "look_at_obj_in_light-Mug-None-DeskLamp-1": "look at mug under the desklamp",
         "pick_clean_then_place_in_recep-Mug-None-Cabinet-1": "put a clean mug in cabinet",
         "pick_heat_then_place_in_recep-Mug-None-Fridge-1": "heat some mug and put it in fridge",
         "pick_cool_then_place_in_recep-Mug-None-Shelf-1": "put a cool mug in shelf",
         "pick_two_obj_and_place-Mug-None-Drawer-1": "put two mug in drawer"}
HOUSE = {"cabinet_bar_a": ["mug_bar_a"], "cabinet_bar_b": [], "drawer_bar_a": [], "fridge_bar_a": ["egg_bar_a"], "microwave_bar_a": [],
         "shelf_bar_a": ["pen_bar_a"], "desk_bar_a": ["desklamp_bar_a", "mug_bar_b"], "sink_bar_a_bar_sinkbasin": []}
CLOSED = ("cabinet", "drawer", "fridge", "microwave")


class Game:
    """A stub of a TextWorld game: the few actions, in the wording of the game file."""

    def __init__(self, path, infos):
        assert infos.won
        self.asked = vars(infos)                     # it tells no more
        self.task = TASKS[Path(path).parent.parent.name]
        self.forms = dict(re.findall(r'action (\w+) \{\s*template :: "(.*?)"', json.loads(Path(path).read_text())["grammar"]))
        things = [*HOUSE, *sum(HOUSE.values(), [])]
        self._entity_infos = {key: SimpleNamespace(id=key, name=key) for key in [*things, "agent1"]}
        self.downward_lib = "library"

    def reset(self):
        name = {key: entity.name for key, entity in self._entity_infos.items()}
        self.rooms = {name[r]: [name[o] for o in objects] for r, objects in HOUSE.items()}
        self.place, self.hand, self.states, self.open = None, None, set(), set()
        facts = [SimpleNamespace(name="inreceptacle", arguments=[SimpleNamespace(name=o), SimpleNamespace(name=r)])
                 for r, objects in self.rooms.items() for o in objects]
        told = {"facts": facts, "policy_commands": ["go to shelf 1", "take pen 1 from shelf 1"]}
        return SimpleNamespace(**{name: x if self.asked.get(name) else None for name, x in told.items()}, feedback=f"-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking "
                               f"quickly around you, you see a {', a '.join(self.rooms)}.\n\nYour task is to: {self.task}.")

    def view(self, r):
        if r.startswith(CLOSED) and r not in self.open:
            return f"The {r} is closed."
        where = f"The {r} is open. In it" if r in self.open else f"On the {r}"
        return f"{where}, you see {', and '.join('a ' + o for o in self.rooms[r]) or 'nothing'}."

    def step(self, action):
        text = self.act(action) or "Nothing happens."
        held = self.hand or ""
        won = {"look": held.startswith("mug") and "lit" in self.states}.get(self.task.split()[0])
        if won is None:
            goal = next(r for r in ("shelf", "cabinet", "fridge", "drawer") if r in self.task)
            state = next((s for s in ("clean", "heat", "cool") if s in self.task), None)
            inside = [o for r, objects in self.rooms.items() if r.startswith(goal) for o in objects if o.startswith("mug")]
            won = len([o for o in inside if not state or (state, o) in self.states]) >= (2 if "two" in self.task else 1)
        return SimpleNamespace(feedback=text, facts=[]), int(won), won

    def act(self, action):
        def match(form):
            return re.fullmatch(re.escape(form).replace(r"\{o\}", r"(?P<o>\w+ \d+)").replace(r"\{r\}", r"(?P<r>\w+ \d+)"), action)
        inside = self.rooms.get(self.place, [])
        if (m := match("go to {r}")) and m["r"] in self.rooms:
            if self.place and {kind(self.place), kind(m["r"])} == {"cabinet"}:
                return None                                          # both cabinets share a spot: one is there already
            self.place = m["r"]
            return f"You arrive at loc 12. {self.view(self.place)}"
        if (m := match("examine {r}")) and self.place and kind(m["r"]) == kind(self.place):
            self.place = m["r"]
            return self.view(self.place)
        if (m := match("open {r}")) and m["r"] == self.place:
            self.open.add(self.place)
            return f"You open the {self.place}. {self.view(self.place)}"
        if (m := match("take {o} from {r}")) and m["o"] in inside and not self.hand and "closed" not in self.view(self.place):
            inside.remove(m["o"])
            self.hand = m["o"]
            return f"You pick up the {m['o']} from the {self.place}."
        if (m := match(self.forms["PutObject"])) and m["o"] == self.hand and m["r"] == self.place and "closed" not in self.view(self.place):
            inside.append(self.hand)
            self.hand = None
            return f"You {self.forms['PutObject'].split()[0]} the {m['o']} in/on the {self.place}."
        for verb, station in ("clean", "sinkbasin 1"), ("heat", "microwave 1"), ("cool", "fridge 1"):
            if (m := match(f"{verb} {{o}} with {{r}}")) and (m["o"], m["r"]) == (self.hand, station) and self.place == station:
                self.states.add((verb, self.hand))
                return f"You {verb} the {m['o']} using the {station}."
        if action == "use desklamp 1" and "desklamp 1" in inside:
            self.states.add("lit")
            return "You turn on the desklamp 1."
        return {"look": "You look.", "inventory": "You have."}.get(action)


def write(folder, forms=FORMS, solvable=True):
    grammar = "".join(f'action {name} {{\n    template :: "{form}";\n}}\n' for name, form in forms.items())
    folder.mkdir(parents=True)
    (folder / "game.tw-pddl").write_text(json.dumps({"pddl_domain": "", "grammar": grammar, "pddl_problem": "", "solvable": solvable}))


@pytest.fixture
def closed(monkeypatch):
    """The stub in place of TextWorld; the list of the libraries that episodes gave back."""
    libraries = []
    textworld = SimpleNamespace(start=lambda path, infos: Game(path, infos), EnvInfos=lambda **options: SimpleNamespace(**options))
    monkeypatch.setattr(envs, "_textworld", lambda: (textworld, SimpleNamespace(close_lib=libraries.append)))
    return libraries


@pytest.fixture(params=["put {o} in/on {r}", "move {o} to {r}"])
def world(request, tmp_path, closed):
    for task in TASKS:
        for split in "train", "valid_seen":
            write(tmp_path / "json_2.1.1" / split / task / "trial_1", FORMS | {"PutObject": request.param})
    return make_env("alfworld", workers=0, data=str(tmp_path))


def test_the_instruction_words_putting_as_the_games_do(world):
    form = envs.alfworld_forms(f"{world.root}/{world.splits['dev'][0]}/game.tw-pddl")["PutObject"].format(o="O", r="R")
    assert f", {form}, " in world.instruction and world.instruction.count(" in/on R") + world.instruction.count("move O") == 1


def test_the_expert_solves_all_six_types_by_actions_that_the_game_knows(world):
    assert {world.task_type(task) for task in world.splits["train"]} == set(ALFWORLD_TYPES)
    for task in world.splits["train"] + world.splits["dev"]:
        shown = world.expert(task)
        assert shown.reward == 1.0 and not shown.truncated and shown.prompt == [], task
        episode, first = world.start(task)
        assert first == shown.steps[0].observation
        for step, following in zip(shown.steps, [*shown.steps[1:], None]):
            observation, reward, done, info = episode.step(step.action)
            assert info == {"valid": observation != "Nothing happens."} and done == (following is None) and (done or observation == following.observation)


def test_a_thought_names_only_what_was_read_before(world):
    for task in world.splits["train"]:
        read = ""
        for step in world.expert(task).steps:
            read += step.observation
            thought = step.action.split("\nAction: ")[0]
            assert all(name in read for name in re.findall(r"[a-z]+ \d+", thought)), step


def test_a_place_at_the_same_spot_is_examined(world, closed):
    inside = {"cabinet 1": ["mug"], "cabinet 2": []}
    expert = envs.ALFWorldExpert(["pick_and_place_simple", "Mug", "None", "Shelf", "1"], "you see a cabinet 2, a cabinet 1, a shelf 1.\nYour task",
                                 inside, "put {o} in/on {r}", random.Random(0), 0)
    expert.routes["mug"] = ["cabinet 2", "cabinet 1"]
    said = ["a first look", "On the cabinet 2, you see nothing.", "Nothing happens.", "The cabinet 1 is closed.", "You open the cabinet 1. The cabinet 1 is open. In it, you see a mug 1."]
    assert [expert.turn(o).split("Action: ")[1] for o in said] == ["go to cabinet 2", "go to cabinet 1", "examine cabinet 1", "open cabinet 1",
                                                                   "take mug 1 from cabinet 1"]


def test_misses_lengthen_the_search_and_none_is_the_straight_way(tmp_path, world):
    straight = make_env("alfworld", workers=0, data=str(tmp_path), misses=0)
    turns = [[len(env.expert(task).steps) for task in env.splits["train"] + env.splits["dev"]] for env in (straight, world)]
    assert all(a <= b for a, b in zip(*turns)) and sum(turns[0]) < sum(turns[1])
    assert "No mug" not in envs.render(straight.expert("train/pick_and_place_simple-Mug-None-Shelf-1/trial_1"))


def test_other_experts_follow_the_planner_or_the_file_beside_the_game(tmp_path, world):
    task = "train/pick_and_place_simple-Mug-None-Shelf-1/trial_1"
    shown = make_env("alfworld", workers=0, data=str(tmp_path), shown="planner").expert(task)
    assert [s.action for s in shown.steps] == ["Thought: I go to shelf 1.\nAction: go to shelf 1",
                                               "Thought: I take pen 1 from shelf 1.\nAction: take pen 1 from shelf 1"]
    assert (shown.reward, shown.truncated) == (0.0, True)
    told = make_env("alfworld", workers=0, data=str(tmp_path), shown="gt_traj")
    assert told.expert(task) is None                                 # no file
    path, solved = tmp_path / "json_2.1.1" / task / "gt_traj.json", world.expert(task)
    turns = [{"from": "human", "value": "You are .."}, *({"from": "gpt", "value": s.action.split("Action: ")[1]} for s in solved.steps)]
    path.write_text(json.dumps(turns))
    shown = told.expert(task)
    assert shown.reward == 1 and [s.observation for s in shown.steps] == [s.observation for s in solved.steps]
    for content, says in (("[", "broken JSON"), ("{}", "not a list of turns"), ('[{"from": "gpt"}]', "'value' is missing")):
        path.write_text(content)
        with pytest.raises(InputError, match=says) as error:
            told.expert(task)
        assert str(error.value).startswith(str(path))


def test_toggling_is_using(world):
    episode, _ = world.start("train/look_at_obj_in_light-Mug-None-DeskLamp-1/trial_1")
    assert [episode.step(f"Action: {a}")[3]["valid"] for a in ("go to desk 1", "toggle desklamp 1")] == [True, True]


def test_the_banner_and_locations_are_dropped_and_the_task_comes_last(world):
    episode, first = world.start(world.splits["dev"][0])
    assert first.startswith("You are in the middle of a room.") and first.split("\n")[-1].startswith("Your task is to: ")
    assert episode.step("Action: go to shelf 1")[0] == "On the shelf 1, you see a pen 1."


@pytest.mark.parametrize("wording", ["put pen 1 in shelf 1", "put pen 1 on shelf 1", "put pen 1 in/on shelf 1", "move pen 1 to shelf 1", "Put pen 1 in/on Shelf 1."])
def test_every_wording_of_putting_is_understood(world, wording):
    episode, _ = world.start(world.splits["dev"][0])
    for action in "go to shelf 1", "take pen 1 from shelf 1":
        assert episode.step(f"Action: {action}")[3]["valid"]
    assert episode.step(f"Action: {wording}")[0] in ("You put the pen 1 in/on the shelf 1.", "You move the pen 1 in/on the shelf 1.")


@pytest.mark.parametrize("text", ["Action: take mug 1", "Action: put mug 1 shelf 1", "I do not know.", "Action: open shelf 9"])
def test_what_cannot_be_done_is_said_to_be_invalid(world, text):
    episode, _ = world.start(world.splits["dev"][0])
    assert episode.step(text) == ("Nothing happens.", 0.0, False, {"valid": False})


def test_an_episode_gives_its_library_back_once(world, closed):
    task = world.splits["dev"][0]
    world.expert(task)
    assert closed == ["library"]
    episode, _ = world.start(task)
    episode.close(), episode.close()
    assert closed == ["library"] * 2 and episode.step("Action: look") == ("The task is over.", 0.0, True, {"valid": False})


def test_names_are_alfworld_s():
    ids = ["mug_bar__minus_01", "mug_bar__plus_02", "agent1", "sink_bar_1_bar_sinkbasin", "sink_bar_1"]
    assert alfworld_names(ids) == {"mug_bar__minus_01": "mug 2", "mug_bar__plus_02": "mug 1", "agent1": "agent1",
                                   "sink_bar_1_bar_sinkbasin": "sinkbasin 1", "sink_bar_1": "sink 1"}


def test_unsolvable_sliced_and_movable_games_are_left_out(tmp_path):
    task = next(iter(TASKS))
    root = tmp_path / "json_2.1.1" / "train"
    write(root / task / "trial_1")
    write(root / task / "trial_2", solvable=False)
    write(root / "pick_and_place_simple-AppleSliced-None-Shelf-1" / "trial_1")
    write(root / "pick_and_place_with_movable_recep-Pen-Mug-Shelf-1" / "trial_1")
    assert make_env("alfworld", workers=0, data=str(tmp_path)).splits == {"train": [f"train/{task}/trial_1"], "dev": [], "test": []}


def test_absent_games_are_reported_with_the_download(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="alfworld-download"):
        make_env("alfworld", workers=0, data=str(tmp_path))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="elsewhere"):
        make_env("alfworld", workers=0)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"grammar": 1}', '{"grammar": ""}', '{"solvable": true}'])
def test_a_broken_game_is_reported_with_its_file(tmp_path, closed, content):
    folder = tmp_path / "json_2.1.1" / "train" / next(iter(TASKS)) / "trial_1"
    write(folder)
    env = make_env("alfworld", workers=0, data=str(tmp_path))
    (folder / "game.tw-pddl").write_text(content)
    with pytest.raises(InputError, match="trial_1/game.tw-pddl"):
        env.start(env.splits["train"][0])


@pytest.mark.parametrize("options", [{"misses": -1}, {"max_steps": 0}, {"misses": "x"}, {"shown": "me"}])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match="must be (a number|rule)"):
        make_env("alfworld", workers=0, **options)


@pytest.mark.parametrize("task", ["", "x", "train/x/y", "dev-0", "train"])
def test_an_unknown_task_is_refused(world, task):
    for call in world.start, world.task_type, world.expert:
        with pytest.raises(InputError, match="there is no task"):
            call(task)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(InputError, match=r"pip install 'textworld\[pddl\]==1.7.0'"):
        envs._textworld()


# ---- the real games

@pytest.fixture(scope="module")
def real():
    pytest.importorskip("textworld", reason="pip install -r requirements-envs.txt")
    pytest.importorskip("fast_downward", reason="pip install -r requirements-envs.txt")
    data = Path(os.environ.get("STEPAGENT_DATA", "")) / "alfworld"
    if not (os.environ.get("STEPAGENT_DATA") and data.is_dir()):
        pytest.skip("STEPAGENT_DATA names no folder with alfworld/json_2.1.1")
    return make_env("alfworld", workers=0, data=str(data))


def test_the_expert_solves_real_games_of_every_type(real):
    by_type = {real.task_type(task): task for task in real.splits["test"] + real.splits["train"]}
    assert set(by_type) == set(ALFWORLD_TYPES)
    argv = list(sys.argv)
    for task in by_type.values():
        shown = real.expert(task)
        assert shown.reward == 1.0 and shown.steps[0].observation.split("\n")[1].startswith("Your task is to: "), task
    assert sys.argv == argv


@pytest.mark.parametrize("shown", ["planner", "gt_traj"])
def test_the_other_experts_solve_real_games(real, shown):
    other, solved = make_env("alfworld", workers=0, data=os.path.dirname(real.root), shown=shown), 0
    with_file = [task for task in other.splits["train"] if os.path.exists(f"{other.root}/{task}/gt_traj.json")]
    for task in with_file[::max(1, len(with_file) // 4)][:4]:
        solved += other.expert(task).reward
    assert solved == min(4, len(with_file)) > 0


def test_what_is_remembered_changes_no_text(real):
    """Two plays of one game: the second finds every template, translation and query in memory."""
    task = real.splits["dev"][0]
    actions = [step.action for step in real.expert(task).steps]
    plays = []
    for _ in range(2):
        episode, first = real.start(task)
        plays.append([first, *(episode.step(action) for action in ["Action: look", "Action: sing", *actions])])
    assert plays[0] == plays[1] and plays[0][2][3] == {"valid": False} and plays[0][-1][1:3] == (1.0, True)
    import fast_downward
    assert fast_downward.pddl2sas.cache_info().hits > 0


def test_several_real_games_at_once_share_a_few_copies_of_the_planner(real):
    """In a process of its own: unloading a copy while another game was open used to end in a segmentation fault."""
    code = ("import sys; sys.path.insert(0, sys.argv[1])\nimport envs\nfrom concurrent.futures import ThreadPoolExecutor\n"
            "env = envs.make_env('alfworld', workers=0)\n"
            "def play(task):\n    episode, _ = env.start(task)\n    won = env.expert(task).reward\n    episode.close()\n    return won\n"
            "with ThreadPoolExecutor(4) as pool: print(sum(pool.map(play, env.splits['train'][:12])))")
    done = subprocess.run([sys.executable, "-c", code, str(Path(envs.__file__).parent)], capture_output=True, text=True)
    assert done.stdout == "12.0\n", done.stderr[-1000:]


def test_names_are_those_of_the_package(real):
    misc = pytest.importorskip("alfworld.agents.utils.misc", reason="pip install alfworld==0.4.2")
    task = random.Random(0).choice(real.splits["train"])
    episode, _ = real.start(task)
    entities = episode.game._entity_infos
    theirs = misc.Demangler(game_infos=entities)
    assert {key: theirs.demangle_alfred_name(key).strip() for key in entities} == {key: e.name for key, e in entities.items()}
