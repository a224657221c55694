"""ALFWorld: household tasks in text (Shridhar et al., 2021), TextWorld games from ALFRED's scenes.

The expert plays by rule and says why, or follows TextWorld's planner or a file beside the game.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import random
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.files import kind, load_json, need, need_count, objects_of, show, text_of
from trajectory import InputError, Trajectory, parse_action, render

FILES = "json_2.1.1/ with its games, as alfworld-download makes it"
# dev has the rooms of train, test has others.
SPLITS = {"train": "train", "dev": "valid_seen", "test": "valid_unseen"}
TASK_TYPES = [
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
]
# Treatments: where each is done, and the state that it leaves.
STATION = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
STATE = {"clean": "clean", "heat": "hot", "cool": "cool"}
# Of an object or a receptacle, as "mug 1".
NAME = r"\w+ \d+"
# The experts, and what TextWorld must tell them. Its planner is slow: it plans anew at each step.
EXPERTS = {"rule": {"facts": True}, "planner": {"policy_commands": True}, "gt_traj": {}}
# Actions in the order of the instruction. How a game words them is read from the game.
ACTIONS = (
    "GotoLocation OpenObject CloseObject PickupObject PutObject CleanObject HeatObject CoolObject "
    "ToggleObject examineObject examineReceptacle look inventory"
)
INSTRUCTION = """\
You are in a room and solve a household task there. Objects and receptacles have a name and a \
number, such as mug 1. You see only what is at the receptacle that you go to, must open it if it \
is closed, and can hold one object.
Your actions: {actions}. R is a receptacle and O an object. Clean with a sinkbasin, heat with a \
microwave and cool with a fridge what you hold. To look at an object under a lamp, hold it and use \
the lamp. An action that is not possible gives: Nothing happens.
Reply each time with:
Thought: your reasoning
Action: your action"""
# What TextWorld says, whatever the game's wording, of an action that cannot be done.
NOTHING = "Nothing happens."
# TextWorld's parser and translator are global state.
LOCK = threading.RLock()
# Copies of the planner's library that no game uses. They stay loaded: unloading one while another
# game is open ends in a segmentation fault.
IDLE_PLANNERS = []


def load_textworld():
    """The package, made to remember what it would parse, translate and copy again at each step."""
    try:
        import fast_downward
        import textworld
        from textworld.envs.pddl import textgen
        from textworld.generator.game import EntityInfo
        from textworld.logic import Placeholder, Rule, Variable
    except ImportError:
        problem = "the package is missing; install it: pip install 'textworld[pddl]==1.7.0'"
        raise InputError(f"alfworld: {problem}") from None
    with LOCK:
        if not hasattr(fast_downward.pddl2sas, "cache_info"):
            remember = functools.lru_cache(4096)
            textgen._PARSER.parse = remember(textgen._PARSER.parse)
            Rule.parse_conjunctive_query = remember(Rule.parse_conjunctive_query)
            # Loading and resetting a game translate the same problem.
            fast_downward.pddl2sas = functools.lru_cache(2)(fast_downward.pddl2sas)
            load = fast_downward.load_lib
            fast_downward.load_lib = lambda: IDLE_PLANNERS.pop() if IDLE_PLANNERS else load()
            for constant in Variable, Placeholder, EntityInfo:
                constant.__deepcopy__ = lambda self, memo: self
    return textworld


def entity_names(ids: list[str]) -> dict[str, str]:
    """ALFRED's ids -> ALFWorld's names, as "mug_bar__minus_01_dot_57.." -> "mug 1"."""
    names, counts = {}, {}
    # The last id in alphabetical order is number 1.
    for entity_id in sorted(ids, reverse=True):
        what, bar, _ = entity_id.partition("_bar_")
        if "basin" in entity_id:
            # sink_bar_.._bar_sinkbasin
            what += "basin"
        counts[what] = counts.get(what, 0) + 1
        names[entity_id] = f"{what} {counts[what]}" if bar else entity_id
    return names


@dataclass
class Wording:
    """How a game words things; its file carries the grammar that it speaks by."""

    # {"PutObject": "put {o} in/on {r}"}, in newer games "move {o} to {r}".
    actions: dict[str, str]
    # The rules by which it tells what is at a place, as (condition, text).
    views: list[tuple[str, str]]


def read_wording(path: str) -> Wording:
    """The wording of a game.tw-pddl. InputError: it is none, or lacks an action of ACTIONS."""
    again = "run alfworld-download again"
    try:
        with open(path, encoding="utf-8") as file:
            grammar = json.load(file)["grammar"]
        header = r'action (\w+) \{\s*template :: "(.*?)";\s*feedback :: "(.*?)"'
        actions, feedback, rules = {}, {}, {}
        for name, template, symbol in re.findall(header, grammar, re.DOTALL):
            # "go to [{r.name | receptacleatlocation(..)}]" -> "go to {r}"
            actions[name] = re.sub(r"\[?\{(\w+)\b.*?\}\]?", r"{\1}", template)
            feedback[name] = symbol.strip("#")
        missing = [name for name in ACTIONS.split() if name not in actions]
        need(not missing, path, f"its grammar lacks {', '.join(missing)}; {again}")
        for block in re.findall(r'grammar :: """(.*?)"""', grammar, re.DOTALL):
            rules |= json.loads(block)
        views = []
        for rule in rules[feedback["examineReceptacle"]]:
            views.append((rule.get("condition", ""), rule["rhs"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"not a TextWorld game ({type(error).__name__}: {error})"
        raise InputError(f"{path}: {problem}; {again}") from None
    return Wording(actions, views)


class ALFWorldEpisode:
    """One game. told: what TextWorld is to tell of it, as in EXPERTS."""

    game = None

    def __init__(self, path: str, **told: bool):
        textworld = load_textworld()
        self.wording = read_wording(path)
        self.put = self.wording.actions["PutObject"]
        self.reward = 0.0
        # The translator overwrites them.
        arguments = sys.argv
        with LOCK:
            try:
                self.game = textworld.start(path, textworld.EnvInfos(won=True, **told))
                names = entity_names(self.game._entity_infos)
                for entity_id, entity in self.game._entity_infos.items():
                    entity.name = names[entity_id]
                self.state = self.game.reset()
            except (Exception, SystemExit) as error:
                # Parser and translator raise many kinds.
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:99]}"
                problem = f"TextWorld cannot play it ({reason}); run alfworld-download again"
                raise InputError(f"{path}: {problem}") from None
            finally:
                sys.argv = arguments
        # Without the banner, as in ETO.
        self.first = "\n".join(self.state.feedback.split("\n\n")[1:])

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. An action that the game does not list changes nothing."""
        if self.game is None:
            return "The task is over.", self.reward, True, {"valid": False}
        # As TextWorld does.
        action = (parse_action(text) or "").strip()
        # Games of another release word it so, and expert files come from them.
        put = re.fullmatch("put (.+) in/on (.+)", action)
        put = put or re.fullmatch("move (.+) to (.+)", action)
        if put:
            action = self.put.format(o=put[1], r=put[2])
        with LOCK:
            self.state, reward, done = self.game.step(action)
        self.reward = float(reward)
        # As in ETO. Newer games name the place instead, and are left as they are.
        observation = re.sub(r"^You arrive at loc \d+\. ", "", self.state.feedback)
        if done:
            self.close()
        return observation, self.reward, done, {"valid": observation != NOTHING}

    def close(self) -> None:
        """Gives the planner's library back. Safe to repeat."""
        with LOCK:
            game, self.game = self.game, None
            if game is not None:
                game.downward_lib.cleanup()
                IDLE_PLANNERS.append(game.downward_lib)

    __del__ = close


class RuleExpert:
    """Plays by rule, and says only what it has read, with one wording for each situation.

    Where it looks is chosen for it: up to `misses` places without the thing, then one with it.
    parts: the task as ALFWorld.check returns it. inside: place -> the kinds of things there.
    """

    def __init__(
        self,
        parts: list[str],
        first: str,
        inside: dict,
        wording: Wording,
        rng: random.Random,
        misses: int,
    ):
        self.task, self.wanted, _, goal, _ = (part.lower() for part in parts)
        self.treatment = next((name for name in STATION if f"_{name}_" in self.task), None)
        self.lamp = goal if self.task == "look_at_obj_in_light" else None
        self.wording = wording
        self.places = re.findall(NAME, first.split("\n")[0])
        # Number 1 of a kind first.
        self.places.sort(key=lambda place: int(place.split()[1]))
        goals = [place for place in self.places if kind(place) == goal]
        counts = {place: inside.get(place, []).count(self.wanted) for place in goals}
        self.goal = max(goals, key=counts.get, default=None)
        self.routes = {}
        for what in filter(None, [self.wanted, self.lamp]):
            counts = {place: inside.get(place, []).count(what) for place in self.places}
            right = [place for place in self.places if counts[place] and self.may_take_at(place)]
            right.sort(key=counts.get, reverse=True)
            wrong = [place for place in self.places if place not in right and place != self.goal]
            self.routes[what] = rng.sample(wrong, min(rng.randint(0, misses), len(wrong))) + right
        # Its last action: the name in the game's grammar, the object, the receptacle.
        self.tried = ("look", None, None)
        # What it has read: place -> objects, and what is closed.
        self.seen: dict[str, list[str]] = {}
        self.shut: set[str] = set()
        self.place = self.hand = self.stored = None
        self.treated = False

    def may_take_at(self, place: str) -> bool:
        """What is where it belongs stays there, unless it must be treated first."""
        return bool(self.treatment) or place != self.goal

    def turn(self, observation: str) -> str:
        """The next ReAct turn after `observation`."""
        self.read(observation)
        if observation == NOTHING:
            # The place is where it stands: some share a spot.
            thought = f"{self.place} is right here. I examine it."
            action = self.act("examineReceptacle", r=self.place)
        else:
            thought, action = self.decide()
        return f"Thought: {thought}\nAction: {action}"

    def act(self, name: str, o: str | None = None, r: str | None = None) -> str:
        """An action in the game's words. o: the object, r: the receptacle."""
        self.tried = name, o, r
        return self.wording.actions[name].format(o=o, r=r)

    def read(self, observation: str) -> None:
        """What the last action did, and what is at the place, told by one of the game's views."""
        name, thing, place = self.tried
        if name == "GotoLocation":
            self.place = place
        if observation == NOTHING:
            return
        if name == "PickupObject":
            self.hand = thing
            self.seen[place].remove(thing)
        elif name == "PutObject":
            self.hand, self.stored = None, thing
        elif name.removesuffix("Object").lower() in STATION:
            self.treated = True
        for condition, text in self.wording.views:
            text = re.sub(r"\{r\..*?\}", self.place or "", text)
            # "On the desk 1, you see [{o.name | ..}]." lists objects.
            pattern = "(.*)".join(map(re.escape, re.split(r"\[\{.*?\}\]", text)))
            match = re.search(pattern, observation) if self.place else None
            if match and "openable" in condition and "opened" not in condition:
                self.shut.add(self.place)
            elif match:
                self.shut.discard(self.place)
                self.seen[self.place] = re.findall(NAME, " ".join(match.groups()))

    def decide(self) -> tuple[str, str]:
        """(thought, action)."""
        if not self.hand or self.lamp:
            return self.fetch(self.lamp if self.hand else self.wanted)
        hand, treatment, goal = self.hand, self.treatment, self.goal
        if treatment and not self.treated:
            station = next(place for place in self.places if kind(place) == STATION[treatment])
            if self.place != station:
                thought = f"I have {hand}. I {treatment} it with {station}, so I go there."
                return thought, self.act("GotoLocation", r=station)
            action = self.act(f"{treatment.capitalize()}Object", o=hand, r=station)
            return f"I have {hand} at {station}. I {treatment} it.", action
        held = f"{STATE[treatment]} {hand}" if self.treated else hand
        if self.place != goal:
            thought = f"I have {held}. It belongs at {goal}, so I go there."
            return thought, self.act("GotoLocation", r=goal)
        if goal in self.shut:
            return f"{goal} is closed. I open it.", self.act("OpenObject", r=goal)
        return f"I have {held} at {goal}. I put it there.", self.act("PutObject", o=hand, r=goal)

    def fetch(self, what: str) -> tuple[str, str]:
        """Goes to a thing of that kind and takes it, or uses it: the lamp, with a full hand."""
        # One that is here comes first.
        for place in sorted(self.seen, key=lambda place: place != self.place):
            thing = next((thing for thing in self.seen[place] if kind(thing) == what), None)
            if not thing or not self.may_take_at(place):
                continue
            if place != self.place:
                before = f"{self.stored} is done. " if self.stored else ""
                if self.hand:
                    before = f"I have {self.hand}. "
                thought = f"{before}I saw {thing} at {place}, so I go there."
                return thought, self.act("GotoLocation", r=place)
            if self.hand:
                thought = f"I have {self.hand} at {thing}. I use it."
                return thought, self.act("ToggleObject", o=thing)
            return f"I see {thing}. I take it.", self.act("PickupObject", o=thing, r=place)
        return self.search(what)

    def search(self, what: str) -> tuple[str, str]:
        """Looks at the next place of the route."""
        if self.place in self.shut:
            return f"{self.place} is closed. I open it.", self.act("OpenObject", r=self.place)
        target = next((place for place in self.routes[what] if place not in self.seen), None)
        need(target is not None, "alfworld", f"the expert knows no place with a {what}")
        done, _, _ = self.tried
        action = self.act("GotoLocation", r=target)
        if not self.place:
            number, them = ("two", "them") if "two" in self.task else ("a", "it")
            treat = f", {self.treatment} it" if self.treatment else ""
            plan = f"a {self.wanted} and a {self.lamp}"
            if not self.lamp:
                plan = f"{number} {self.wanted}{treat} and put {them} at a {kind(self.goal)}"
            return f"I must find {plan}. I look at {target} first.", action
        why = f"No {what} at {self.place}"
        if done == "PickupObject":
            why = f"I have {self.hand} but no {what}"
        elif done == "PutObject":
            why = f"{self.stored} is done"
        return f"{why}. I look at {target} next.", action


class ALFWorld:
    """The games of a folder that holds json_2.1.1. Task ids are "train/<folder>/<trial>".

    data: the folder; default: $ALFWORLD_DATA, $STEPAGENT_DATA/alfworld or ~/.cache/alfworld.
    shown: the expert. "rule" gives its reasons. "planner" follows TextWorld's planner, "gt_traj"
        the gt_traj.json beside a game, if there is one; their thoughts only repeat the action.
    misses: the rule expert knows where things are, but first looks at up to so many places for
        nothing, to show how a search goes on. 0 is the straight way.
    """

    # A start takes about a second, so run_episodes overlaps it with decoding.
    slow = True
    # Table 1.
    paper = {"train": 3321, "dev": 140, "test": 134, "turns": 10.1}

    def __init__(
        self, data: str | None = None, shown: str = "rule", misses: int = 5, max_steps: int = 40
    ):
        need(shown in EXPERTS, "alfworld", f"shown must be rule, planner or gt_traj, not {shown!r}")
        need_count("alfworld", "misses", misses, 0, 1000)
        need_count("alfworld", "max_steps", max_steps, 1, 1000)
        self.shown = shown
        self.misses = misses
        self.limit = max_steps
        ours = os.environ.get("STEPAGENT_DATA")
        data = data or os.environ.get("ALFWORLD_DATA") or (ours and f"{ours}/alfworld")
        self.root = f"{data or os.path.expanduser('~/.cache/alfworld')}/json_2.1.1"
        self.splits = {split: self.games(folder) for split, folder in SPLITS.items()}
        games = sum(self.splits.values(), [])
        need(
            bool(games),
            f"{self.root}/{{{','.join(SPLITS.values())}}}/*/*/game.tw-pddl",
            "no games; get them: pip install alfworld==0.4.2 && ALFWORLD_DATA=FOLDER "
            "alfworld-download, then give data=FOLDER or set ALFWORLD_DATA",
        )
        wording = read_wording(f"{self.root}/{games[0]}/game.tw-pddl")
        actions = [wording.actions[name].format(o="O", r="R") for name in ACTIONS.split()]
        self.instruction = INSTRUCTION.format(actions=", ".join(actions))

    def games(self, folder: str) -> list[str]:
        """Task ids of the solvable games, as in the package without sliced and movable things."""
        found = []
        for path in sorted(glob.glob(f"{folder}/*/*/game.tw-pddl", root_dir=self.root)):
            if re.search("Sliced|movable", path):
                continue
            with open(f"{self.root}/{path}", encoding="utf-8", errors="replace") as file:
                if re.search(r'"solvable": *true', file.read()):
                    found.append(os.path.dirname(path))
        return found

    @functools.cached_property
    def example(self) -> str:
        train = self.splits["train"]
        problem = "no games, so there is no example; run alfworld-download"
        need(bool(train), f"{self.root}/train", problem)
        return render(self.expert(next((task for task in train if "_heat_" in task), train[0])))

    def max_steps(self, task_id: str) -> int:
        return self.limit

    def task_type(self, task_id: str) -> str:
        return self.check(task_id)[0]

    def check(self, task_id: str) -> list[str]:
        """[task type, object, movable receptacle, destination or lamp, room] or InputError."""
        games = sum(self.splits.values(), [])
        # "train/pick_and_place_simple-Mug-None-Shelf-1/trial_.."
        parts = task_id.split("/")[1].split("-") if task_id in games else []
        problem = f"there is no task {task_id!r}; tasks are the folders with a game below"
        known = len(parts) == 5 and parts[0] in TASK_TYPES
        need(known, "alfworld", f"{problem} {self.root}, such as {games[0]}")
        return parts

    def task_of(self, expert: Trajectory) -> str | None:
        """ETO names a game by its file, as in "data/json_2.1.1/train/<folder>/<trial>"."""
        game = expert.task_id.split("json_2.1.1/")[-1].removesuffix("/game.tw-pddl")
        return game if any(game in games for games in self.splits.values()) else None

    def start(self, task_id: str, **told: bool) -> tuple[ALFWorldEpisode, str]:
        self.check(task_id)
        episode = ALFWorldEpisode(f"{self.root}/{task_id}/game.tw-pddl", **told)
        return episode, episode.first

    def expert(self, task_id: str) -> Trajectory | None:
        """None: there is no gt_traj.json."""
        episode, observation = self.start(task_id, **EXPERTS[self.shown])
        trajectory = show(task_id, self, episode, observation, self.player(task_id, episode))
        episode.close()
        return trajectory if trajectory.steps else None

    def player(self, task_id: str, episode: ALFWorldEpisode) -> Callable[[str], str | None]:
        """observation -> the expert's turn, None if it has none left."""
        if self.shown == "rule":
            inside: dict[str, list[str]] = {}
            for fact in episode.state.facts:
                if fact.name == "inreceptacle":
                    thing, place = fact.arguments
                    inside.setdefault(place.name, []).append(kind(thing.name))
            parts, rng = self.check(task_id), random.Random(f"alfworld:{task_id}")
            expert = RuleExpert(parts, episode.first, inside, episode.wording, rng, self.misses)
            return expert.turn
        plan = episode.state.policy_commands or []
        path = f"{self.root}/{task_id}/gt_traj.json"
        if self.shown == "gt_traj" and os.path.exists(path):
            # A conversation in ETO's form.
            said = load_json(path)
            need(isinstance(said, list), path, "is not a list of turns")
            said = objects_of({"turns": said}, "turns", path)
            plan = [text_of(turn, "value", at) for turn, at in said if turn.get("from") == "gpt"]
        turns = iter([f"Thought: I {action}.\nAction: {action}" for action in plan])
        return lambda observation: next(turns, None)
