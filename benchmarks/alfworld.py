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

from benchmarks.files import kind, load_json, need, objects_of, text_of
from trajectory import InputError, Step, Trajectory, parse_action, render

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
# The experts, and what TextWorld must tell them. Its planner is slow: it plans anew at each step.
EXPERTS = {"rule": {"facts": True}, "planner": {"policy_commands": True}, "gt_traj": {}}
# Actions in the order of the instruction. How a game words them is read from the game.
ACTIONS = (
    "OpenObject CloseObject PickupObject PutObject CleanObject HeatObject CoolObject ToggleObject "
    "examineObject examineReceptacle look inventory"
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


def action_forms(path: str) -> dict[str, str]:
    """How a game words its actions: {"PutObject": "put {o} in/on {r}"}, newer "move {o} to {r}"."""
    try:
        with open(path, encoding="utf-8") as file:
            grammar = json.load(file)["grammar"]
        forms = dict(re.findall(r'action (\w+) \{\s*template :: "(.*?)"', grammar))
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"not a TextWorld game ({type(error).__name__}: {error})"
        raise InputError(f"{path}: {problem}; run alfworld-download again") from None
    missing = [name for name in ACTIONS.split() if name not in forms]
    need(not missing, path, f"its grammar lacks {', '.join(missing)}; run alfworld-download again")
    return forms


class ALFWorldEpisode:
    """One game. told: what TextWorld is to tell of it, as in EXPERTS."""

    game = None

    def __init__(self, path: str, **told: bool):
        textworld = load_textworld()
        self.put = action_forms(path)["PutObject"]
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
        # Without TextWorld's banner.
        self.first = self.state.feedback.partition("=-\n\n")[2].replace("\n\n", "\n")

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
        observation = re.sub(r"^You arrive at loc \d+\. ", "", self.state.feedback)
        if done:
            self.close()
        return observation, self.reward, done, {"valid": observation != "Nothing happens."}

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
    put: the game's form of putting.
    """

    def __init__(
        self, parts: list[str], first: str, inside: dict, put: str, rng: random.Random, misses: int
    ):
        self.task, self.wanted, _, goal, _ = (part.lower() for part in parts)
        self.treatment = next((name for name in STATION if f"_{name}_" in self.task), None)
        self.lamp = goal if self.task == "look_at_obj_in_light" else None
        self.put = put
        self.places = re.findall(r"\ban? (\w+ \d+)", first.split("\n")[0])
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
        # What it has read: place -> objects, what is closed, and what happened last.
        self.seen: dict[str, list[str]] = {}
        self.shut: set[str] = set()
        self.event = ""
        self.place = self.hand = self.stored = None
        self.treated = False

    def may_take_at(self, place: str) -> bool:
        """What is where it belongs stays there, unless it must be treated first."""
        return bool(self.treatment) or place != self.goal

    def turn(self, observation: str) -> str:
        """The next ReAct turn after `observation`."""
        self.read(observation)
        thought, action = self.decide()
        if observation == "Nothing happens.":
            # The place is where it stands: some share a spot.
            thought, action = f"{self.place} is right here. I examine it.", f"examine {self.place}"
        elif action.startswith("go to "):
            self.place = action.removeprefix("go to ")
        return f"Thought: {thought}\nAction: {action}"

    def read(self, observation: str) -> None:
        view = r"(?:^On the (\w+ \d+)|(?:^|\. )The (\w+ \d+) is open\. In it), you see (.*)\.$"
        if match := re.search(view, observation):
            self.event = "see"
            self.seen[match[1] or match[2]] = re.findall(r"\ban? (\w+ \d+)", match[3])
            self.shut.discard(match[2])
        elif match := re.match(r"The (\w+ \d+) is closed", observation):
            self.shut.add(match[1])
        elif match := re.match(r"You pick up the (\w+ \d+)", observation):
            self.event = "take"
            self.hand = match[1]
            self.seen[self.place].remove(self.hand)
        elif match := re.match(r"You (?:put|move) the (\w+ \d+)", observation):
            self.event = "put"
            self.hand, self.stored = None, match[1]
        elif observation.startswith(f"You {self.treatment} the "):
            self.treated = True

    def decide(self) -> tuple[str, str]:
        """(thought, action)."""
        if not self.hand or self.lamp:
            return self.fetch(self.lamp if self.hand else self.wanted)
        hand, treatment, goal = self.hand, self.treatment, self.goal
        if treatment and not self.treated:
            station = next(place for place in self.places if kind(place) == STATION[treatment])
            if self.place != station:
                thought = f"I have {hand}. I {treatment} it with {station}, so I go there."
                return thought, f"go to {station}"
            action = f"{treatment} {hand} with {station}"
            return f"I have {hand} at {station}. I {treatment} it.", action
        held = f"{STATE[treatment]} {hand}" if self.treated else hand
        if self.place != goal:
            return f"I have {held}. It belongs at {goal}, so I go there.", f"go to {goal}"
        if goal in self.shut:
            return f"{goal} is closed. I open it.", f"open {goal}"
        return f"I have {held} at {goal}. I put it there.", self.put.format(o=hand, r=goal)

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
                return f"{before}I saw {thing} at {place}, so I go there.", f"go to {place}"
            if self.hand:
                return f"I have {self.hand} at {thing}. I use it.", f"use {thing}"
            return f"I see {thing}. I take it.", f"take {thing} from {place}"
        return self.search(what)

    def search(self, what: str) -> tuple[str, str]:
        """Looks at the next place of the route."""
        if self.place in self.shut:
            return f"{self.place} is closed. I open it.", f"open {self.place}"
        target = next((place for place in self.routes[what] if place not in self.seen), None)
        need(target is not None, "alfworld", f"the expert knows no place with a {what}")
        if not self.place:
            number, them = ("two", "them") if "two" in self.task else ("a", "it")
            treat = f", {self.treatment} it" if self.treatment else ""
            plan = f"a {self.wanted} and a {self.lamp}"
            if not self.lamp:
                plan = f"{number} {self.wanted}{treat} and put {them} at a {kind(self.goal)}"
            return f"I must find {plan}. I look at {target} first.", f"go to {target}"
        why = f"No {what} at {self.place}"
        if self.event == "take":
            why = f"I have {self.hand} but no {what}"
        elif self.event == "put":
            why = f"{self.stored} is done"
        return f"{why}. I look at {target} next.", f"go to {target}"


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
        for option, value, low in ("misses", misses, 0), ("max_steps", max_steps, 1):
            problem = f"{option} must be a number between {low} and 1000, not {value!r}"
            need(isinstance(value, int) and low <= value <= 1000, "alfworld", problem)
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
        forms = action_forms(f"{self.root}/{games[0]}/game.tw-pddl")
        actions = ", ".join(["go to {r}", *(forms[name] for name in ACTIONS.split())])
        actions = actions.replace("{o}", "O").replace("{r}", "R")
        self.instruction = INSTRUCTION.format(actions=actions)

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
        turn_after = self.player(task_id, episode)
        trajectory = Trajectory(task_id, truncated=True)
        while trajectory.truncated and len(trajectory.steps) < self.limit:
            turn = turn_after(observation)
            if turn is None:
                break
            trajectory.steps.append(Step(observation, turn))
            observation, trajectory.reward, done, _ = episode.step(turn)
            trajectory.truncated = not done
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
            expert = RuleExpert(parts, episode.first, inside, episode.put, rng, self.misses)
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
