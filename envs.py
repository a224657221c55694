"""Environments: text worlds that an agent plays turn by turn, and the expert trajectories that it learns from.

The protocol is plain attributes and methods, no base class:
    env = make_env(name, **options)
    env.splits            {"train": [task id, ...], "dev": [...], "test": [...], "test_unseen": [...] where the benchmark has one}
    env.instruction       the rules of the world and the reply format, as text
    env.example           one train task played by the expert, as text
    env.max_steps(id)     steps allowed ; env.task_type(id)  the name under which results are grouped
    env.slow              True, if it is there, where a step takes about as long as the model's: run_episodes then overlaps the two
    env.start(id)         -> (episode, first observation), which ends with the task; must bear several threads
    episode.step(text)    -> (observation, reward, done, info): text is the agent's whole turn, reward the benchmark's score
                          so far (0-1), info {"valid": the world understood the action, ...secondary metrics}
    env.expert(id)        -> Trajectory with an empty prompt, or None where nobody can show the task
Bad input (an unknown name or task, a broken file) raises InputError, one line long, with the remedy.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import inspect
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass, field

from rollout import InputError, Step, Trajectory


# ---------------------------------------------------------------------------------------------------------------------
# What all environments share: the reply format and the conversation's opening
# ---------------------------------------------------------------------------------------------------------------------
ACTION = re.compile(r"(?:(?im:^[ \t]*action)|Action|ACTION)[ \t]*:\s*([^\n]+)")


def parse_action(text: str) -> str | None:
    """The action in a ReAct turn: what follows the first "Action:", to the end of its line (or on the next, if that is empty).
    Case and spacing of the marker, backticks or stars around the action and a final period do not matter. None: no action."""
    match = ACTION.search(text)
    action = " ".join(match[1].replace("`", " ").split()).strip("* ").removesuffix(".").rstrip() if match else ""
    return action or None


def prompt_messages(env, example: bool = True) -> list[dict[str, str]]:
    """The opening of every conversation, in ETO's shape: the instruction (and one example), then the agent's "OK"."""
    text = f"{env.instruction}\n\nHere is an example.\n{env.example}" if example else env.instruction
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "OK"}]


def render(trajectory: Trajectory) -> str:
    """A trajectory as readable text, one paragraph a turn."""
    return "\n".join(f"{s.observation}\n{s.action}" for s in trajectory.steps)


# ---------------------------------------------------------------------------------------------------------------------
# Expert files
# ---------------------------------------------------------------------------------------------------------------------
def load_trajectories(path: str) -> list[Trajectory]:
    """Reads trajectories from a file (InputError names the file and the row, its line or index, if anything is wrong):
    - ETO's conversations, a JSON list of {"id", "conversations": [{"from": "human" | "gpt", "value"}, ...], "reward"?}: the
      instruction and the "OK" that answers it become the prompt as they stand, never supervised; the task and everything
      after it become steps. A last human turn is the world's final word, which no action answers: it is left out.
      Without "reward" the trajectory counts as a success (1.0), as ETO keeps only those.
    - our own JSONL, as save_trajectories writes it."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except (OSError, ValueError) as error:                           # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); give the path of a trajectory file") from None
    if not text.strip():
        raise InputError(f"{path}: empty; expected ETO's JSON list or JSONL with one trajectory a line")
    if text.lstrip().startswith("["):
        rows, read = [(f"entry {i}", row) for i, row in enumerate(_json(text, path))], _read_conversation
    else:
        lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows, read = [(name, _json(line, f"{path}, {name}")) for name, line in lines], _read_own
    if not rows:
        raise InputError(f"{path}: an empty list; expected at least one trajectory")
    trajectories, first = [], {}
    for name, row in rows:
        where = f"{path}, {name}"
        _need(isinstance(row, dict), where, "is not a JSON object; expected one trajectory")
        trajectory = read(row, where)
        _need(len(trajectory.steps) > 0, where, "has no actions; remove the row, or give it at least one turn of the agent")
        for i, step in enumerate(trajectory.steps):
            _need(parse_action(step.action) is not None, where,
                  f'action {i} has no "Action:" (it starts {step.action[:40]!r}); write it as "Thought: ...\\nAction: ..."')
        _need(trajectory.task_id not in first, where, f"repeats the id {trajectory.task_id!r} of "
              f"{first.get(trajectory.task_id)}; keep one trajectory for each task")
        first[trajectory.task_id] = name
        trajectories.append(trajectory)
    return trajectories


def save_trajectories(path: str, trajectories: list[Trajectory]) -> None:
    """Writes one JSON object a line: {"task_id", "prompt": [messages], "steps": [{"observation", "action"}], "reward",
    "truncated"}; text only, as token ids belong to one tokenizer. Atomic: the file is whole, or what it was before."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for t in trajectories:
                steps = [{"observation": s.observation, "action": s.action} for s in t.steps]
                row = {"task_id": t.task_id, "prompt": t.prompt, "steps": steps, "reward": t.reward, "truncated": t.truncated}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); free space or choose another folder") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _need(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise InputError(f"{where}: {problem}")


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise InputError(f"{where}: broken JSON ({error.msg}, {at}column {error.colno}); "
                         "is the file cut off, or neither a JSON list nor JSONL?") from None
    except (RecursionError, ValueError):                             # nested too deep; a number of thousands of digits
        raise InputError(f"{where}: JSON nested too deep or with an endless number; expected plain trajectories") from None


def _text(row: dict, key: str, where: str) -> str:
    _need(key in row, where, f"{key!r} is missing; it must be text")
    _need(isinstance(row[key], str), where, f"{key!r} is not text but {type(row[key]).__name__}")
    _need(not re.search("[\ud800-\udfff]", row[key]), where, f"{key!r} holds half of a surrogate pair; re-encode it as UTF-8")
    return row[key]


def _items(row: dict, key: str, where: str) -> list[tuple[dict, str]]:
    """The list of objects under `key`, each with its place for error messages."""
    _need(isinstance(row.get(key), list), where, f"{key!r} is missing or not a list")
    for i, item in enumerate(row[key]):
        _need(isinstance(item, dict), where, f"{key}[{i}] is not an object but {type(item).__name__}")
    return [(item, f"{where}, {key}[{i}]") for i, item in enumerate(row[key])]


def _reward(row: dict, where: str) -> float:
    reward = row["reward"]
    _need(isinstance(reward, (int, float)) and not isinstance(reward, bool) and abs(reward) < 1e9, where,   # NaN compares false
          "'reward' is not a finite number; give the final score between 0 and 1")
    return float(reward)


def _read_conversation(row: dict, where: str) -> Trajectory:
    task = row.get("id")
    _need(type(task) in (str, int), where, "'id' is missing or neither text nor a whole number")
    task_id = _text({"id": str(task)}, "id", where)
    turns = []
    for i, (turn, at) in enumerate(_items(row, "conversations", where)):
        role = _text(turn, "from", at)
        _need(role == ("human", "gpt")[i % 2], at, f"is from {role!r}; turns alternate 'human', 'gpt', starting with 'human'")
        turns.append(_text(turn, "value", at))
    _need(len(turns) >= 2, where, "has no instruction with its 'OK'; expected instruction, OK, task, then turns")
    _need(parse_action(turns[1]) is None, where, 'conversations[1] already acts; insert an "OK" that answers the instruction')
    prompt = [{"role": "user", "content": turns[0]}, {"role": "assistant", "content": turns[1]}]
    steps = [Step(observation, action) for observation, action in zip(turns[2::2], turns[3::2])]
    return Trajectory(task_id, prompt, steps, _reward(row, where) if "reward" in row else 1.0, False)


def _read_own(row: dict, where: str) -> Trajectory:
    for key in ("task_id", "prompt", "steps", "reward", "truncated"):
        _need(key in row, where, f"{key!r} is missing; a row has task_id, prompt, steps, reward and truncated")
    prompt = [{"role": _text(m, "role", at), "content": _text(m, "content", at)} for m, at in _items(row, "prompt", where)]
    roles = [m["role"] for m in prompt][bool(prompt) and prompt[0]["role"] == "system":]
    _need(roles == ["user", "assistant"] * (len(roles) // 2), where,
          "'prompt' must be an optional system message, then user and assistant by turns, ending with assistant")
    steps = [Step(_text(s, "observation", at), _text(s, "action", at)) for s, at in _items(row, "steps", where)]
    _need(isinstance(row["truncated"], bool), where, "'truncated' must be true or false")
    return Trajectory(_text(row, "task_id", where), prompt, steps, _reward(row, where), row["truncated"])


# ---------------------------------------------------------------------------------------------------------------------
# household: a small world in the spirit of ALFWorld (Shridhar et al., 2021), generated from the task id alone
# ---------------------------------------------------------------------------------------------------------------------
# Receptacle types: how many a house may have, and the preposition. Closed ones must be opened before one sees inside.
RECEPTACLES = {"cabinet": (3, "in"), "drawer": (3, "in"), "fridge": (1, "in"), "microwave": (1, "in"), "safe": (1, "in"),
               "sinkbasin": (1, "in"), "garbagecan": (1, "in"), "shelf": (3, "on"), "countertop": (2, "on"),
               "diningtable": (1, "on"), "sidetable": (2, "on"), "desk": (1, "on"), "dresser": (1, "on"), "sofa": (1, "on"),
               "bed": (1, "on")}
CLOSED = {"cabinet", "drawer", "fridge", "microwave", "safe"}
STATION = {"clean": "sinkbasin 1", "heat": "microwave 1", "cool": "fridge 1"}
STATE = {"clean": "clean", "heat": "hot", "cool": "cool"}
LAMP = ["desk", "sidetable", "dresser"]                              # where the desklamp stands
GOALS = {"food": "fridge microwave countertop diningtable garbagecan sidetable",
         "ware": "cabinet drawer shelf countertop diningtable sinkbasin",
         "thing": "drawer safe shelf sidetable desk dresser sofa bed"}
OBJECTS = {                                                          # group, likely places in search order, treatments
    "apple": ("food", "fridge countertop diningtable", "clean heat cool"),
    "bread": ("food", "countertop diningtable cabinet", "heat cool"),
    "egg": ("food", "fridge countertop microwave", "clean heat cool"),
    "lettuce": ("food", "fridge sinkbasin countertop", "clean cool"),
    "potato": ("food", "countertop garbagecan fridge", "clean heat cool"),
    "tomato": ("food", "diningtable sinkbasin fridge", "clean heat cool"),
    "bowl": ("ware", "cabinet diningtable shelf", "clean heat cool"),
    "cup": ("ware", "cabinet countertop sinkbasin", "clean heat cool"),
    "mug": ("ware", "shelf cabinet microwave", "clean heat cool"),
    "plate": ("ware", "cabinet shelf diningtable", "clean heat cool"),
    "pan": ("ware", "countertop cabinet sinkbasin", "clean cool"),
    "pot": ("ware", "cabinet countertop fridge", "clean cool"),
    "fork": ("ware", "drawer diningtable sinkbasin", "clean"),
    "knife": ("ware", "drawer countertop sinkbasin", "clean"),
    "spoon": ("ware", "drawer sinkbasin diningtable", "clean"),
    "book": ("thing", "shelf desk bed", "examine"),
    "keychain": ("thing", "drawer sidetable dresser", "examine"),
    "laptop": ("thing", "desk bed sofa", "examine"),
    "newspaper": ("thing", "sofa sidetable garbagecan", "examine"),
    "pen": ("thing", "desk drawer shelf", "examine"),
    "phone": ("thing", "sidetable sofa bed", "examine"),
    "vase": ("thing", "shelf dresser sidetable", "examine"),
    "watch": ("thing", "safe dresser drawer", "examine"),
}
TASK_TYPES = ["put", "clean", "heat", "cool", "put two", "examine"]
HELD_OUT = 0.2                                                       # test_unseen's share of each task type's combinations
SIZES = {"train": 6000, "dev": 100, "dev_more": 400, "test": 300, "test_unseen": 300}     # dev_more: for tuning with less noise


def kind(name: str) -> str:
    """"mug 2" -> "mug"."""
    return name.rsplit(" ", 1)[0]


def at(receptacle: str) -> str:
    """"cabinet 1" -> "in cabinet 1", "desk 1" -> "on desk 1"; types alone work too."""
    return f"{RECEPTACLES[receptacle.split()[0]][1]} {receptacle}"


def combinations() -> tuple[dict[str, list[tuple[str, str]]], dict[str, list[tuple[str, str]]]]:
    """(seen, held out): for each task type its (object, destination) pairs. What is held out is only the combination:
    its object and its destination both occur in seen ones."""
    rng, seen, held = random.Random("household combinations"), {}, {}
    for task in TASK_TYPES:
        pairs = []
        for obj, (group, _, treatments) in OBJECTS.items():
            if task == "examine":
                pairs += [(obj, "desklamp")] * (task in treatments.split())
            elif task in ("put", "put two") or task in treatments.split():
                pairs += [(obj, goal) for goal in GOALS[group].split() if f"{goal} 1" != STATION.get(task)]
        rng.shuffle(pairs)
        cut = round(HELD_OUT * len(pairs))
        held[task], seen[task] = pairs[:cut], pairs[cut:]
    return seen, held


@dataclass
class House:
    """One task's world. contents maps each receptacle, in the order that the agent reads, to the objects there."""
    task: str                                                        # one of TASK_TYPES
    obj: str
    goal: str                                                        # a receptacle type, or "desklamp"
    contents: dict[str, list[str]]

    def sentence(self) -> str:
        if self.task == "examine":
            return f"examine {self.obj} under desklamp"
        what = {"put": "", "put two": "two "}.get(self.task, f"{STATE.get(self.task)} ")
        return f"put {what}{self.obj} {at(self.goal)}"


@dataclass
class HouseholdEpisode:
    house: House
    contents: dict[str, list[str]] = field(default_factory=dict)     # changes as the agent plays
    place: str | None = None
    hand: str | None = None
    opened: set[str] = field(default_factory=set)
    states: dict[str, set[str]] = field(default_factory=dict)        # object -> clean, hot, cool
    reward: float = 0.0

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. An action that is not understood or not possible changes nothing: "Nothing happens."."""
        action = parse_action(text)
        observation = self.act(action.lower()) if action and not self.reward else None
        if observation and self.solved():
            self.reward = 1.0
        return observation or "Nothing happens.", self.reward, self.reward == 1.0, {"valid": observation is not None}

    def act(self, action: str) -> str | None:
        """Carries one action out and returns what is seen, or None if it cannot be done."""
        def words(pattern: str) -> tuple[str, ...]:                  # R and O stand for a numbered name such as "mug 2"
            match = re.fullmatch(re.sub("[RO]", r"([a-z]+ [0-9]+)", pattern), action)
            return match.groups() if match else ()
        here = self.contents[self.place] if self.place and not self.shut(self.place) else []
        if (m := words("go to R")) and m[0] in self.contents and m[0] != self.place:
            self.place = m[0]
            return self.view()
        if (m := words("open R")) and m[0] == self.place and self.shut(m[0]):
            self.opened.add(m[0])
            return self.view()
        if (m := words("close R")) and m[0] == self.place and m[0] in self.opened:
            self.opened.remove(m[0])
            return self.view()
        if (m := words("take O from R")) and m[0] in here and m[1] == self.place and not self.hand and kind(m[0]) in OBJECTS:
            here.remove(m[0])
            self.hand = m[0]
            return f"You take {m[0]}."
        if (m := words("put O (?:in/on|in|on) R")) and m[0] == self.hand and m[1] == self.place and not self.shut(m[1]):
            here.append(m[0])
            self.hand = None
            return f"You put {m[0]} {at(m[1])}."
        if (m := words("(clean|heat|cool) O with R")) and m[1] == self.hand and m[2] == self.place == STATION[m[0]]:
            state = self.states.setdefault(m[1], set())
            state.difference_update({"heat": {"cool"}, "cool": {"hot"}}.get(m[0], ()))
            state.add(STATE[m[0]])
            return f"You {m[0]} {m[1]}."
        if (m := words("use O")) and m[0] == "desklamp 1" and m[0] in here:
            self.states.setdefault(self.hand or "", set()).add("lit")
            return "You use desklamp 1."
        if (m := words("examine O")) and m[0] in [*here, self.hand]:
            return f"{m[0]} is {' and '.join(sorted(self.states.get(m[0], set()) - {'lit'})) or 'normal'}."
        if action == "look" or words("examine R") == (self.place,):
            return self.view()
        if action == "inventory":
            return f"You have {self.hand or 'nothing'}."
        return None

    def shut(self, receptacle: str) -> bool:
        return kind(receptacle) in CLOSED and receptacle not in self.opened

    def view(self) -> str:
        if not self.place:
            return f"You are in a house with {', '.join(self.contents)}."
        if self.shut(self.place):
            return f"The {self.place} is closed."
        return f"{at(self.place).capitalize()}: {', '.join(self.contents[self.place]) or 'nothing'}."

    def solved(self) -> bool:
        house = self.house
        if house.task == "examine":                                  # lit while in the hand
            return any(kind(o) == house.obj and "lit" in s for o, s in self.states.items())
        placed = [o for r, objects in self.contents.items() if kind(r) == house.goal for o in objects if kind(o) == house.obj]
        if house.task in STATE:
            placed = [o for o in placed if STATE[house.task] in self.states.get(o, ())]
        return len(placed) >= (2 if house.task == "put two" else 1)


class HouseholdExpert:
    """Plays by rule from what it reads, never from the world itself: searches the object's likely places in order of type
    and number, then the rest in the order that the house was listed, remembers what it saw, treats, and puts.
    Reads the observations of its own play only; every situation has one wording, so that equal actions mean equal choices."""

    def __init__(self, first_observation: str):
        listed, task = re.fullmatch(r"You are in a house with (.*)\. Your task: (.*)\.", first_observation).groups()
        self.places = listed.split(", ")
        if match := re.fullmatch(r"examine (\w+) under desklamp", task):
            self.task, self.obj, self.goal = "examine", match[1], "desklamp"
        else:
            what, self.obj, self.goal = re.fullmatch(r"put (?:(\w+) )?(\w+) (?:in|on) (\w+)", task).groups()
            self.task = {None: "put", "two": "put two", "clean": "clean", "hot": "heat", "cool": "cool"}[what]
        self.seen: dict[str, list[str]] = {}                         # receptacle -> objects, as far as it knows
        self.place: str | None = None
        self.hand: str | None = None
        self.stored: str | None = None                               # what it put at the goal
        self.event = ""                                              # what happened last: see, take, put, treat
        self.closed = self.treated = False

    def turn(self, observation: str) -> str:
        """The next ReAct turn after `observation`."""
        self.read(observation)
        thought, action = self.decide()
        if action.startswith("go to "):
            self.place, self.closed = action[6:], False
        return f"Thought: {thought}\nAction: {action}"

    def read(self, observation: str) -> None:
        self.closed = observation.endswith(" is closed.")
        if match := re.fullmatch(r"(?:In|On) (\w+ \d+): (.*)\.", observation):
            self.event, self.seen[match[1]] = "see", [] if match[2] == "nothing" else match[2].split(", ")
        elif match := re.fullmatch(r"You take (.*)\.", observation):
            self.event, self.hand = "take", match[1]
            self.seen[self.place].remove(match[1])
        elif match := re.fullmatch(r"You put (\w+ \d+) .*", observation):
            self.event, self.hand, self.stored = "put", None, match[1]
        elif re.fullmatch(r"You (clean|heat|cool) .*", observation):
            self.event, self.treated = "treat", True

    def decide(self) -> tuple[str, str]:
        """(thought, action)."""
        if not self.hand:
            found = [(o, r) for r, objects in self.seen.items() for o in objects if kind(o) == self.obj and kind(r) != self.goal]
            found.sort(key=lambda f: f[1] != self.place)             # what is here comes first
            if not found:
                return self.search(self.obj)
            obj, where = found[0]
            if where == self.place:
                return f"I see {obj}. I take it.", f"take {obj} from {where}"
            return f"{self.stored} is done. I saw {obj} {at(where)}.", f"go to {where}"
        if self.task == "examine":
            where = next((r for r, objects in self.seen.items() if "desklamp 1" in objects), None)
            if not where:
                return self.search("desklamp")
            if where == self.place:
                return f"I have {self.hand} at desklamp 1. I use it.", "use desklamp 1"
            return f"I have {self.hand}. I saw desklamp 1 {at(where)}.", f"go to {where}"
        if self.task in STATION and not self.treated:
            station = STATION[self.task]
            if self.place == station:
                return f"I have {self.hand} at {station}. I {self.task} it.", f"{self.task} {self.hand} with {station}"
            return f"I have {self.hand}. I {self.task} it with {station}.", f"go to {station}"
        goal = f"{self.goal} 1"
        held = f"{STATE[self.task]} {self.hand}" if self.treated else self.hand
        if self.place != goal:
            return f"I have {held}. I put it {at(goal)}.", f"go to {goal}"
        if self.closed:
            return f"{goal} is closed. I open it.", f"open {goal}"
        return f"I have {held} at {goal}. I put it.", f"put {self.hand} in/on {goal}"

    def search(self, what: str) -> tuple[str, str]:
        if self.closed:
            return f"{self.place} is closed. I open it.", f"open {self.place}"
        likely = LAMP if what == "desklamp" else OBJECTS[what][1].split()
        order = sorted((r for r in self.places if kind(r) in likely), key=lambda r: (likely.index(kind(r)), r))
        order += [r for r in self.places if kind(r) not in likely]
        target = next(r for r in order if r not in self.seen and kind(r) != self.goal)
        if not self.place:
            plan = f"{self.obj} and desklamp" if self.task == "examine" else \
                f"two {self.obj} and put them {at(self.goal)}" if self.task == "put two" else \
                f"{self.obj}{f', {self.task} it' if self.task in STATION else ''} and put it {at(self.goal)}"
            return f"I must find {plan}. I look {at(target)} first.", f"go to {target}"
        if self.event == "take":                                     # the lamp is still missing
            why = f"I have {self.hand} but no desklamp"
        elif self.event == "put":                                    # put two: the second is still missing
            why = f"{self.stored} is done"
        else:
            lamp = self.task == "examine" and "desklamp 1" in self.seen[self.place]
            why = f"No {what} {at(self.place)}{' but I see desklamp 1' if lamp else ''}"
        return f"{why}. I look {at(target)} next.", f"go to {target}"


class Household:
    """Tidying tasks in generated houses. Task ids are "<split>-<number>"; a house depends on the id and on the options only.
    receptacles: how many a house has; distractors: how many objects besides the wanted kind: together the difficulty.
    likely: the chance that an object lies in one of its likely places (a wrong place may turn out likely by chance).
    At the defaults the expert needs 19 turns at most."""

    instruction = (
        "You live in a house and solve a task there. Objects and receptacles have a name and a number, such as mug 1. "
        "You see only the receptacle that you are at, must open it if it is closed, and can hold one object. "
        "At the start no object is where you must put it.\n"
        "Your actions: go to R, open R, close R, take O from R, put O in/on R, clean O with R, heat O with R, cool O with R, "
        "use O, examine O, examine R, look, inventory. R is a receptacle and O an object. "
        "Clean with sinkbasin 1, heat with microwave 1, cool with fridge 1. "
        "To examine an object under desklamp, hold it and use desklamp 1. "
        "An action that is not possible gives: Nothing happens.\n"
        "Reply each time with:\nThought: your reasoning\nAction: your action")

    def __init__(self, receptacles: int = 8, distractors: int = 6, likely: float = 0.75, max_steps: int = 20):
        most = sum(limit for limit, _ in RECEPTACLES.values())
        for option, value, low, high in [("receptacles", receptacles, 5, most), ("distractors", distractors, 0, 1000),
                                         ("likely", likely, 0, 1), ("max_steps", max_steps, 1, 1000)]:
            _need(isinstance(value, (int, float)) and low <= value <= high, "household",
                  f"{option} must be a number between {low} and {high}, not {value!r}")
        self.receptacles, self.distractors, self.likely, self.limit = receptacles, distractors, likely, max_steps
        self.seen, self.held_out = combinations()
        self.splits = {split: [f"{split}-{i}" for i in range(size)] for split, size in SIZES.items()}
        self.example = render(self.expert(EXAMPLE))

    def max_steps(self, task_id: str) -> int:
        return self.limit

    def task_type(self, task_id: str) -> str:
        match = re.fullmatch(r"(\w+)-(0|[1-9][0-9]{0,8})", task_id)
        _need(bool(match) and int(match[2]) < SIZES.get(match[1], 0), "household", f"there is no task {task_id!r}; tasks are "
              + ", ".join(f"{split}-0 .. {split}-{size - 1}" for split, size in SIZES.items()))
        return TASK_TYPES[int(match[2]) % len(TASK_TYPES)]

    def house(self, task_id: str) -> House:
        return self.generate(random.Random(f"household:{task_id}"), self.task_type(task_id), task_id.startswith("test_unseen"))

    def generate(self, rng: random.Random, task: str, held_out: bool) -> House:
        """A random house with a task of the given type."""
        obj, goal = rng.choice((self.held_out if held_out else self.seen)[task])
        types = ["fridge", "microwave", "sinkbasin", rng.choice(LAMP)]
        types += [goal] * (goal not in types and goal != "desklamp")
        spare = [r for r, (limit, _) in RECEPTACLES.items() for _ in range(limit - types.count(r))]
        types += rng.sample(spare, self.receptacles - len(types))
        places = _number(types)
        rng.shuffle(places)
        copies = rng.choice([2, 2, 3] if task == "put two" else [1, 1, 2])
        others = [o for o in OBJECTS if o != obj]
        objects = _number([obj] * copies + [rng.choice(others) for _ in range(self.distractors)])
        rng.shuffle(objects)
        contents: dict[str, list[str]] = {r: [] for r in places}
        for name in ["desklamp 1", *objects]:
            kinds = LAMP if name == "desklamp 1" else OBJECTS[kind(name)][1].split()
            free = [r for r in places if not (kind(name) == obj and kind(r) == goal)]
            usual = [r for r in free if kind(r) in kinds]
            chosen = usual if usual and (name == "desklamp 1" or rng.random() < self.likely) else free
            contents[rng.choice(chosen)].append(name)
        return House(task, obj, goal, contents)

    def start(self, task_id: str) -> tuple[HouseholdEpisode, str]:
        house = self.house(task_id)
        episode = HouseholdEpisode(house, {r: list(objects) for r, objects in house.contents.items()})
        return episode, f"{episode.view()} Your task: {house.sentence()}."

    def expert(self, task_id: str) -> Trajectory:
        episode, observation = self.start(task_id)
        expert, trajectory, done = HouseholdExpert(observation), Trajectory(task_id), False
        while not done and len(trajectory.steps) < self.limit:
            action = expert.turn(observation)
            trajectory.steps.append(Step(observation, action))
            observation, trajectory.reward, done, _ = episode.step(action)
        trajectory.truncated = not done
        return trajectory


EXAMPLE = "train-1"                                                  # a task that the expert solves in few steps


def _number(kinds: list[str]) -> list[str]:
    """["mug", "pen", "mug"] -> ["mug 1", "pen 1", "mug 2"]."""
    return [f"{k} {kinds[:i + 1].count(k)}" for i, k in enumerate(kinds)]


# ---------------------------------------------------------------------------------------------------------------------
# scienceworld: 30 elementary science tasks (Wang et al., 2022), played in the package's own Java simulator
# ---------------------------------------------------------------------------------------------------------------------
# Steps allowed, as ETO set them for the 24 tasks that it uses; the other 6 get the package's own limit, 100.
SCIENCEWORLD_STEPS = {
    "boil": 100, "change-the-state-of-matter-of": 80, "freeze": 80, "melt": 80, "measure-melting-point-known-substance": 120,
    "use-thermometer": 30, "power-component": 20, "power-component-renewable-vs-nonrenewable-energy": 30, "test-conductivity": 30,
    "test-conductivity-of-unknown-substances": 30, "find-animal": 15, "find-living-thing": 15, "find-non-living-thing": 15,
    "find-plant": 15, "grow-fruit": 60, "grow-plant": 30, "chemistry-mix": 60, "chemistry-mix-paint-secondary-color": 15,
    "chemistry-mix-paint-tertiary-color": 30, "lifespan-longest-lived": 10, "lifespan-shortest-lived": 10,
    "lifespan-longest-lived-then-shortest-lived": 12, "identify-life-stages-1": 30, "identify-life-stages-2": 30}
# Java options, as the environment variable that every JVM reads (the package passes none on). Memory: unlimited, one grows to
# gigabytes. One collector thread. Equal identity hashes: the simulator iterates over hash sets of objects, so without this
# its texts and even its gold paths depend on what was played before; with it, on the task and the actions alone.
SCIENCEWORLD_JAVA = "-Xmx384m -XX:+UseSerialGC -XX:+UnlockExperimentalVMOptions -XX:hashCode=2"
# The expert's wording for each kind of action; {0} and {1} are the groups, and the first pattern that fits counts. The text
# before a bar is for a thing or room that the task names, the one after it for any other.
SCIENCEWORLD_THOUGHTS = {
    r"teleport to (.+)": "The task names the {0}, so I go there.|What I need may be in the {0}, so I go there.",
    r"(?:go to|open door to) (.+)": "I want to get to the {0}, and this leads on.",
    r"focus on (.+)": "The task asks for the {0}, so I focus on it.|Of all I have seen the {0} fits best, so I focus on it.",
    r"pick up (.+)": "The task needs the {0}, so I take it.|The {0} can be of use, so I take it.",
    r"drop (.+)": "I want my hands free, so I put the {0} down.",
    r"move (.+) to (.+)": "The task needs the {0}, so I move it to the {1}.|The next place for the {0} is the {1}, so I move it.",
    r"pour .+": "I want the liquid somewhere else, so I pour it.",
    r"mix (.+)": "The {0} holds what should react, so I mix it.",
    r"read (.+)": "The {0} may say what to do, so I read it.",
    r"(open|close) (.+)": "To go on I {0} the {1}.",
    r"activate (.+)": "I need the {0} to run, so I turn it on.",
    r"deactivate (.+)": "The {0} has run long enough, so I turn it off.",
    r"use (.+) on (.+)": "The {0} is the tool for the {1}, so I use it.",
    r"connect (.+) to (.+)": "The circuit needs the {0} joined to the {1}, so I connect them.",
    r"(?:examine|look at) (.+)": "I want to see how the {0} is now, so I look at it.",
    r"wait1?": "This takes time, so I wait.",
    r"\d+": "Any of these will do, so I choose one by its number."}


class ScienceWorldEpisode:
    """One task in a simulator of its own, which `world` lends until the episode is done, closed or dropped."""

    def __init__(self, world: ScienceWorld, task_id: str, gold: bool = False):
        name, variation = world.check(task_id)
        self.reward, self.world, self.simulator = 0.0, world, world.borrow()
        server = self.simulator.server                               # the simulator's Java object, see step
        server.load(name, variation, world.simplification, gold)     # also seeds all chance, with the variation
        self.gold = list(server.getGoldActionSequence()) if gold else []
        look = server.step("look around").strip()                    # as the package's reset does: renews score and completed
        self.first = f"{look}\n\n{server.getTaskDescription().strip()}"

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. The reward is the best score so far: focusing on a wrong thing scores -100 and ends the episode, which
        keeps what it earned before. An ambiguous request is answered with a numbered list, and the next action is one of the
        numbers (anything else cancels): the package's own way, so both count as understood.
        Calls the server directly: the package's own step would list every valid action, too, which is many times slower."""
        if self.simulator is None:
            return "The task is over.", self.reward, True, {"valid": False}
        action, server = parse_action(text), self.simulator.server
        observation = server.step(action).strip() if action else "No known action matches that input."
        score = round(server.getScore(), 2)                          # -1 to 1, in whole percents as in the package
        self.reward, done = max(self.reward, score), bool(server.getCompleted()) or score < 0
        if done:
            self.close()
        return observation, self.reward, done, {"valid": not observation.startswith(("No known action", "Unknown action"))}

    def close(self) -> None:
        """Gives the simulator back. Safe to repeat; needed where an episode is cut off, unless it is dropped."""
        simulator, self.simulator = getattr(self, "simulator", None), None
        if simulator is not None:
            self.world.idle.append(simulator)                        # append and pop are atomic: no lock needed

    __del__ = close


class ScienceWorld:
    """Science experiments in ten rooms. Task ids are "<task>/<variation>", such as "boil/3".
    tasks: names to keep (a list, or text with commas), by default all; variations: at most so many for each task and split,
    evenly spread; simplification: "easy" as in ETO (one may teleport, doors are open, pots water themselves, little wiring).
    split: "package", or "eto" for ETO's lists (1,483 / 194 / 211 tasks), which are in the folder `data` as train_indices.json,
    dev_indices.json and test_indices.json; by default $STEPAGENT_DATA/scienceworld. 54 of its dev tasks are train tasks, too."""

    slow = True                                                      # a step takes as long as a token: see run_episodes
    paper = {"train": 1483, "dev": 194, "test": 241, "turns": 14.4}  # Table 1
    instruction = (
        "You carry out a science experiment in a house. Its rooms are the hallway, kitchen, living room, bedroom, bathroom, "
        "workshop, art studio, greenhouse, foundry and outside. You see only the room that you are in.\n"
        "Your actions, where OBJ is a thing that you see and LOC a room:\n"
        "look around, examine OBJ, look at OBJ, look in OBJ, read OBJ, inventory: find out more\n"
        "teleport to LOC: be there at once; go to LOC: walk to a room next door\n"
        "open OBJ, close OBJ, activate OBJ, deactivate OBJ, use OBJ on OBJ: doors, containers, devices and tools\n"
        "pick up OBJ, drop OBJ, move OBJ to OBJ, pour OBJ into OBJ, dunk OBJ into OBJ: move things\n"
        "mix OBJ: let what is in a container react\n"
        "connect OBJ to OBJ, disconnect OBJ: electrical parts, as in connect battery anode to red wire terminal 1\n"
        "eat OBJ, flush OBJ\n"
        "focus on OBJ: show that OBJ is what the task asks for; a wrong OBJ ends the task\n"
        "wait: let 10 moments pass; wait1: let one pass\n"
        "a number: your choice, when you are asked which of several you mean\n"
        "Reply each time with:\nThought: your reasoning\nAction: your action")

    def __init__(self, tasks: str | list[str] | None = None, variations: int | None = None, simplification: str = "easy",
                 split: str = "package", data: str | None = None):
        _need(split in ("package", "eto"), "scienceworld", f"split must be package or eto, not {split!r}")
        listed = self.eto(data or f"{os.environ.get('STEPAGENT_DATA', '.')}/scienceworld") if split == "eto" else {}
        _need(variations is None or isinstance(variations, int) and variations >= 1, "scienceworld",
              f"variations must be a number, at least 1, not {variations!r}")
        self.simplification, self.idle, self.started = simplification, [], []
        weakref.finalize(self, _stop, self.started)                  # also at exit; JVMs of a killed Python end by themselves
        simulator = self.borrow()
        known, easier = simulator.get_task_names(), ["easy", *simulator.get_possible_simplifications()]
        names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks or known)]
        named = [name for lists in listed.values() for name in lists]
        for given, allowed in (names, known), (named, known), (simplification.split(",") if simplification else [], easier):
            unknown = sorted(set(given) - set(allowed))
            _need(not unknown, "scienceworld", f"there is no {unknown[:1]}; choose from: {', '.join(allowed)}")
        self.sizes = {name: simulator.get_max_variations(name) for name in known}
        self.splits: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        for name in dict.fromkeys(names):                            # in the given order, each once
            simulator.server.load(name, 0, simplification, False)    # the package gives the splits of the loaded task
            for part, ids in self.splits.items():
                found = listed[part].get(name, []) if listed else getattr(simulator, f"get_variations_{part}")()
                most = max(found, default=0)
                _need(most < self.sizes[name], f"{part}_indices.json", f"{name} has no variation {most}; is it of this package?")
                count = min(len(found), variations or len(found))
                ids += [f"{name}/{found[i * len(found) // count]}" for i in range(count)]
        self.idle.append(simulator)

    @staticmethod
    def eto(folder: str) -> dict[str, dict[str, list[int]]]:
        """split -> task -> variations, from ETO's lists of [task, variation], with today's task names."""
        lists: dict[str, dict[str, list[int]]] = {}
        for part in "train", "dev", "test":
            path = f"{folder}/{part}_indices.json"
            try:
                with open(path, encoding="utf-8") as file:
                    rows = _json(file.read(), path)
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{path}: cannot be read ({error}); it is in ETO's repository, under eval_agent/data/sciworld: "
                                 "give its folder as data=FOLDER") from None
            _need(isinstance(rows, list) and bool(rows), path, "is not a list of [task, variation]")
            lists[part] = {}
            for i, row in enumerate(rows):
                _need(isinstance(row, list) and list(map(type, row)) == [str, int] and row[1] >= 0, path,
                      f"entry {i} is {row!r:.80}, not [task, variation]")
                lists[part].setdefault(ScienceWorld.today(row[0]), []).append(row[1])
        return lists

    @staticmethod
    def today(name: str) -> str:
        """ "task-6-lifespan-(longest-lived)" -> "lifespan-longest-lived"."""
        return re.sub(r"^task-\d+\w?-|[()]", "", name).replace("mendellian", "mendelian")

    @functools.cached_property
    def example(self) -> str:
        return render(self.expert("lifespan-shortest-lived/20"))     # from train; short

    def max_steps(self, task_id: str) -> int:
        return SCIENCEWORLD_STEPS.get(self.task_type(task_id), 100)

    def task_type(self, task_id: str) -> str:
        return self.check(task_id)[0]

    def check(self, task_id: str) -> tuple[str, int]:
        """(task, variation), or InputError."""
        name, _, variation = task_id.partition("/")
        _need(variation.isdecimal() and int(variation) < self.sizes.get(name, 0), "scienceworld",
              f"there is no task {task_id!r}; tasks are boil/0 .. boil/{self.sizes['boil'] - 1} and so on")
        return name, int(variation)

    def borrow(self):
        """An idle simulator, or a new one. Each is a JVM (a second to start, 0.3-0.5 GB), one for each running episode: random
        numbers, object ids and simplifications are global there, so episodes that shared one would depend on each other."""
        with contextlib.suppress(IndexError):                        # none idle
            return self.idle.pop()
        try:
            from scienceworld import ScienceWorldEnv
        except ImportError:
            raise InputError("scienceworld: the package is missing; install it: pip install scienceworld==1.2.3") from None
        java = shutil.which("java")                                  # macOS has a java that only says that there is none
        _need(bool(java) and subprocess.run([java, "-version"], capture_output=True).returncode == 0, "scienceworld", "Java is "
              "missing; install it: apt-get install default-jre-headless (macOS: brew install openjdk, and put it on the PATH)")
        if SCIENCEWORLD_JAVA not in (options := os.environ.get("JAVA_TOOL_OPTIONS", "")):
            os.environ["JAVA_TOOL_OPTIONS"] = f"{SCIENCEWORLD_JAVA} {options}".strip()         # the last one counts: the user's
        try:
            simulator = ScienceWorldEnv()
        except Exception as error:                                   # py4j has many kinds
            raise InputError(f"scienceworld: Java server {len(self.started) + 1} does not start ({error}); is there memory for "
                             f"it? JAVA_TOOL_OPTIONS is {os.environ['JAVA_TOOL_OPTIONS']!r}") from None
        self.started.append(simulator)
        return simulator

    def start(self, task_id: str) -> tuple[ScienceWorldEpisode, str]:
        episode = ScienceWorldEpisode(self, task_id)
        return episode, episode.first

    def expert(self, task_id: str) -> Trajectory:
        """The package's gold path with thoughts; whole, even beyond max_steps. It walks door by door past doors that "easy" has
        opened and uses what it never looked at. So where one can teleport we play it shortened, and as it is only if that earns
        less than 1 (life stages pass at their own pace)."""
        episode = ScienceWorldEpisode(self, task_id, gold=True)
        episode.close()
        teleport = self.simplification == "easy" or "teleportAction" in self.simplification
        for plan in [shorten(episode.gold)] * teleport + [episode.gold]:
            trajectory = self.replay(task_id, plan)
            if trajectory.reward >= 1:
                break
        return trajectory

    def replay(self, task_id: str, plan: list[str]) -> Trajectory:
        """Plays a plan. A thought uses the task, this turn's action and what was read so far, nothing that comes later."""
        (episode, observation), trajectory, done = self.start(task_id), Trajectory(task_id), False
        task, room, evidence = observation.rsplit("\n\n", 1)[1].lower(), re.search(r"called the ([^.]*)", observation)[1], ""
        seen = {room}
        for action in plan:
            if match := re.search("thermometer measures (.*)", observation):
                evidence = f"I measured {match[1]}. "
            elif "conductive" in task and "light bulb, which is" in observation:
                evidence = f"{'A' if 'light bulb, which is on' in observation else 'No'} light bulb is on. "
            thought = think(action, task, seen)
            if action.startswith(("teleport to", "go to")):
                room = action.split(" to ", 1)[1]
            elif action == "look around":
                thought = f"I look around to see what {'has changed' if room in seen else 'is here'}."
                seen.add(room)
            elif " box" in action:                                   # the answer to the task's question, if it asks one
                thought = evidence + thought
            trajectory.steps.append(Step(observation, f"Thought: {thought}\nAction: {action}"))
            observation, trajectory.reward, done, _ = episode.step(trajectory.steps[-1].action)
            if done:
                break
        episode.close()
        return trajectory


def shorten(gold: list[str]) -> list[str]:
    """A gold path for one who teleports: a walk is one action, a new room is looked at, and what does nothing is left out."""
    plan, seen = [], set()
    for action in gold:
        if re.fullmatch(r"open door to .*|pour (.+) (?:into|in) \1", action) or action == "look around" and not plan:
            continue
        action = re.sub(r"\b(\w+) \1\b", r"\1", action)              # "baby baby dragonfly"
        arrived = bool(plan) and plan[-1].startswith("teleport to ")
        if action.startswith("go to "):
            plan[-1 if arrived else len(plan):] = [f"teleport to {action[6:]}"]     # rooms only passed through do not count
            continue
        if arrived and plan[-1] not in seen:
            seen.add(plan[-1])
            plan += ["look around"] * (action != "look around")
        plan.append(action)
    return plan


def think(action: str, task: str, seen: set[str]) -> str:
    """The wording of SCIENCEWORLD_THOUGHTS for an action; `seen`: the rooms looked at."""
    for pattern, thought in SCIENCEWORLD_THOUGHTS.items():
        if match := re.fullmatch(pattern, action.replace(" in inventory", "")):
            if action.startswith("teleport to ") and match[1] in seen:
                thought = "I have more to do in the {0}, so I go back."
            thing = re.split(" in | containing ", match[1])[0].lower() if match.groups() else ""
            thought = thought.split("|")[0 if thing in task else -1]
            return thought.format(*match.groups()).replace("in the outside", "outside").replace("the outside", "outside")
    return f"Next I {action}."


def _stop(simulators: list) -> None:
    for simulator in simulators:
        simulator.close()
        simulator._gateway.java_process.kill()                       # now, so that the package's own clean-up finds it ended
        simulator._gateway.java_process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# alfworld: household tasks in text (Shridhar et al., 2021): TextWorld games made from the scenes of ALFRED
# ---------------------------------------------------------------------------------------------------------------------
ALFWORLD_SPLITS = {"train": "train", "dev": "valid_seen", "test": "valid_unseen"}
ALFWORLD_TYPES = ["pick_and_place_simple", "look_at_obj_in_light", "pick_clean_then_place_in_recep",
                  "pick_heat_then_place_in_recep", "pick_cool_then_place_in_recep", "pick_two_obj_and_place"]
# Actions in the order of the instruction; how a game words each is read from the game.
ALFWORLD_ACTIONS = ["OpenObject", "CloseObject", "PickupObject", "PutObject", "CleanObject", "HeatObject", "CoolObject",
                    "ToggleObject", "examineObject", "examineReceptacle", "look", "inventory"]
ALFWORLD_STATION = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
ALFWORLD_LOCK = threading.RLock()                                    # TextWorld's parser and translator are global state


def _textworld():
    """The package, made to remember what it would parse, translate and copy again at every step. Texts stay the same."""
    try:
        import fast_downward
        import textworld
        from textworld.envs.pddl import textgen
        from textworld.generator.game import EntityInfo
        from textworld.logic import Placeholder, Rule, Variable
    except ImportError:
        raise InputError("alfworld: the package is missing; install it: pip install 'textworld[pddl]==1.7.0'") from None
    with ALFWORLD_LOCK:
        if not hasattr(fast_downward.pddl2sas, "cache_info"):
            textgen._PARSER.parse = functools.lru_cache(4096)(textgen._PARSER.parse)         # templates
            Rule.parse_conjunctive_query = functools.lru_cache(4096)(Rule.parse_conjunctive_query)
            fast_downward.pddl2sas = functools.lru_cache(2)(fast_downward.pddl2sas)          # load and reset do the same work
            for constant in Variable, Placeholder, EntityInfo:
                constant.__deepcopy__ = lambda self, memo: self
    return textworld, fast_downward


def alfworld_names(ids: list[str]) -> dict[str, str]:
    """ALFRED's ids -> ALFWorld's names, "mug_bar__minus_01_dot_57.." -> "mug 1": the last id in alphabetical order is number 1."""
    names, counts = {}, {}
    for key in sorted(ids, reverse=True):
        what, bar, _ = key.partition("_bar_")
        what += "basin" if "basin" in key else ""                    # sink_bar_.._bar_sinkbasin
        counts[what] = counts.get(what, 0) + 1
        names[key] = f"{what} {counts[what]}" if bar else key
    return names


def alfworld_forms(path: str) -> dict[str, str]:
    """How a game words its actions, such as {"PutObject": "put {o} in/on {r}"} ("move {o} to {r}" in newer games)."""
    try:
        with open(path, encoding="utf-8") as file:
            forms = dict(re.findall(r'action (\w+) \{\s*template :: "(.*?)"', json.load(file)["grammar"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not a TextWorld game ({type(error).__name__}: {error}); run alfworld-download again") from None
    missing = [name for name in ALFWORLD_ACTIONS if name not in forms]
    _need(not missing, path, f"its grammar lacks {', '.join(missing)}; run alfworld-download again")
    return forms


class ALFWorldEpisode:
    """One game. facts: keep TextWorld's list of what is where, for the expert."""

    def __init__(self, path: str, facts: bool = False):
        textworld, self.planner = _textworld()
        self.put, self.reward, argv = alfworld_forms(path)["PutObject"], 0.0, sys.argv
        with ALFWORLD_LOCK:
            try:
                self.game = textworld.start(path, textworld.EnvInfos(won=True, facts=facts))
                names = alfworld_names(self.game._entity_infos)
                for key, entity in self.game._entity_infos.items():
                    entity.name = names[key]
                self.state = self.game.reset()
            except (Exception, SystemExit) as error:                 # parser and translator raise many kinds
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:99]}"
                raise InputError(f"{path}: TextWorld cannot play it ({reason}); run alfworld-download again") from None
            finally:
                sys.argv = argv                                      # which the translator overwrites
        self.first = self.state.feedback.partition("=-\n\n")[2].replace("\n\n", "\n")        # without TextWorld's banner

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. An action that the game does not list changes nothing: "Nothing happens.". Only the wording of
        putting is made the game's own: put O in R, put O on R, put O in/on R and move O to R all count."""
        if self.game is None:
            return "The task is over.", self.reward, True, {"valid": False}
        action = (parse_action(text) or "").lower()
        if match := re.fullmatch(r"put (.+?) (?:in/on|in|on) (.+)|move (.+?) to (.+)", action):
            action = self.put.format(o=match[1] or match[3], r=match[2] or match[4])
        with ALFWORLD_LOCK:
            self.state, reward, done = self.game.step(action)
        self.reward = float(reward)
        observation = re.sub(r"^You arrive at loc \d+\. ", "", self.state.feedback)
        if done:
            self.close()
        return observation, self.reward, done, {"valid": observation != "Nothing happens."}

    def close(self) -> None:
        """Frees the planner's library, of which each game loads a copy of its own. Safe to repeat."""
        game, self.game = getattr(self, "game", None), None
        if game is not None:
            self.planner.close_lib(game.downward_lib)

    __del__ = close


class ALFWorldExpert:
    """Plays by rule, and says only what it has read, as the household's expert does; one wording for each situation. Where it
    looks next is chosen for it: some places without what it wants, then one with it (`inside`: place -> kinds of things there).
    parts: the task as ALFWorld.check returns it; put: the game's form of putting."""

    def __init__(self, parts: list[str], first_observation: str, inside: dict[str, list[str]], put: str,
                 rng: random.Random, misses: int):
        self.task, self.obj, _, goal, _ = (part.lower() for part in parts)
        self.treatment = next((t for t in ALFWORLD_STATION if f"_{t}_" in self.task), None)
        self.lamp = goal if self.task == "look_at_obj_in_light" else None
        self.places = re.findall(r"\ban? (\w+ \d+)", first_observation.split("\n")[0])
        self.places.sort(key=lambda place: int(place.split()[1]))    # number 1 of a kind first
        goals = [place for place in self.places if kind(place) == goal]
        self.goal = max(goals, key=lambda place: inside.get(place, []).count(self.obj), default=None)
        self.put, self.routes = put, {}
        for what in filter(None, [self.obj, self.lamp]):
            right = [place for place in self.places if what in inside.get(place, []) and (self.treatment or place != self.goal)]
            right.sort(key=lambda place: -inside[place].count(what))
            wrong = [place for place in self.places if place not in right and place != self.goal]
            self.routes[what] = rng.sample(wrong, min(rng.randint(0, misses), len(wrong))) + right
        self.seen: dict[str, list[str]] = {}                         # place -> objects, as last read
        self.shut: set[str] = set()
        self.place = self.hand = self.stored = None
        self.treated, self.event = False, ""                         # what happened last: see, take, put, treat

    def turn(self, observation: str) -> str:
        """The next ReAct turn after `observation`."""
        self.read(observation)
        thought, action = self.decide()
        if observation == "Nothing happens.":                        # the place is where it stands: some share a spot
            thought, action = f"{self.place} is right here. I examine it.", f"examine {self.place}"
        elif action.startswith("go to "):
            self.place = action[6:]
        return f"Thought: {thought}\nAction: {action}"

    def read(self, observation: str) -> None:
        if match := re.search(r"(?:^On the (\w+ \d+)|(?:^|\. )The (\w+ \d+) is open\. In it), you see (.*)\.$", observation):
            self.event, self.seen[match[1] or match[2]] = "see", re.findall(r"\ban? (\w+ \d+)", match[3])
            self.shut.discard(match[2])
        elif match := re.match(r"The (\w+ \d+) is closed", observation):
            self.shut.add(match[1])
        elif match := re.match(r"You pick up the (\w+ \d+)", observation):
            self.event, self.hand = "take", match[1]
            self.seen[self.place].remove(self.hand)
        elif match := re.match(r"You (?:put|move) the (\w+ \d+)", observation):
            self.event, self.hand, self.stored = "put", None, match[1]
        elif observation.startswith(f"You {self.treatment} the "):
            self.event, self.treated = "treat", True

    def find(self, what: str) -> tuple[str, str] | None:
        """(object, place) of that kind that it has seen, here if possible; none that is where it belongs."""
        found = [(o, place) for place, objects in self.seen.items() for o in objects
                 if kind(o) == what and (self.treatment or place != self.goal)]
        return min(found, key=lambda f: f[1] != self.place, default=None)

    def decide(self) -> tuple[str, str]:
        """(thought, action)."""
        if not self.hand or self.lamp:
            what = self.lamp if self.hand else self.obj
            thing, where = self.find(what) or (None, None)
            if not thing:
                return self.search(what)
            if where != self.place:
                before = f"I have {self.hand}. " if self.hand else f"{self.stored} is done. " if self.stored else ""
                return f"{before}I saw {thing} at {where}, so I go there.", f"go to {where}"
            if self.hand:
                return f"I have {self.hand} at {thing}. I use it.", f"use {thing}"
            return f"I see {thing}. I take it.", f"take {thing} from {where}"
        if self.treatment and not self.treated:
            station = next(place for place in self.places if kind(place) == ALFWORLD_STATION[self.treatment])
            if self.place != station:
                return f"I have {self.hand}. I {self.treatment} it with {station}, so I go there.", f"go to {station}"
            return f"I have {self.hand} at {station}. I {self.treatment} it.", f"{self.treatment} {self.hand} with {station}"
        held = f"{STATE[self.treatment]} {self.hand}" if self.treated else self.hand
        if self.place != self.goal:
            return f"I have {held}. It belongs at {self.goal}, so I go there.", f"go to {self.goal}"
        if self.goal in self.shut:
            return f"{self.goal} is closed. I open it.", f"open {self.goal}"
        return f"I have {held} at {self.goal}. I put it there.", self.put.format(o=self.hand, r=self.goal)

    def search(self, what: str) -> tuple[str, str]:
        if self.place in self.shut:
            return f"{self.place} is closed. I open it.", f"open {self.place}"
        target = next((place for place in self.routes[what] if place not in self.seen), None)
        _need(target is not None, "alfworld", f"the expert knows no place with a {what}")
        if not self.place:
            two, treatment = "two" in self.task, f", {self.treatment} it" if self.treatment else ""
            plan = f"a {self.obj} and a {self.lamp}" if self.lamp else \
                f"{'two' if two else 'a'} {self.obj}{treatment} and put {'them' if two else 'it'} at a {kind(self.goal)}"
            return f"I must find {plan}. I look at {target} first.", f"go to {target}"
        why = {"take": f"I have {self.hand} but no {what}", "put": f"{self.stored} is done"}
        why = why.get(self.event, f"No {what} at {self.place}")
        return f"{why}. I look at {target} next.", f"go to {target}"


class ALFWorld:
    """The games of a folder that holds json_2.1.1. Task ids are "train/<folder>/<trial>"; dev is valid_seen (rooms of train),
    test is valid_unseen (other rooms). data: the folder, by default $ALFWORLD_DATA, $STEPAGENT_DATA/alfworld or ~/.cache/alfworld.
    misses: the expert, who knows where things are, first looks at up to so many places for nothing, so that the agent sees how
    a search goes on; 0 is the straight way."""

    slow = True                                                      # a start takes about a second: see run_episodes
    paper = {"train": 3321, "dev": 140, "test": 134, "turns": 10.1}  # Table 1

    def __init__(self, data: str | None = None, misses: int = 5, max_steps: int = 40):
        for option, value, low in ("misses", misses, 0), ("max_steps", max_steps, 1):
            _need(isinstance(value, int) and low <= value <= 1000, "alfworld",
                  f"{option} must be a number between {low} and 1000, not {value!r}")
        ours = os.environ.get("STEPAGENT_DATA")
        data = data or os.environ.get("ALFWORLD_DATA") or (ours and f"{ours}/alfworld") or os.path.expanduser("~/.cache/alfworld")
        self.root, self.misses, self.limit = f"{data}/json_2.1.1", misses, max_steps
        self.splits = {split: self.games(folder) for split, folder in ALFWORLD_SPLITS.items()}
        games = sum(self.splits.values(), [])
        _need(bool(games), f"{self.root}/{{{','.join(ALFWORLD_SPLITS.values())}}}/*/*/game.tw-pddl", "no games; get them: pip "
              "install alfworld==0.4.2 && ALFWORLD_DATA=FOLDER alfworld-download, then give data=FOLDER or set ALFWORLD_DATA")
        forms = alfworld_forms(f"{self.root}/{games[0]}/game.tw-pddl")
        actions = ", ".join(["go to {r}", *(forms[name] for name in ALFWORLD_ACTIONS)]).replace("{o}", "O").replace("{r}", "R")
        self.instruction = (
            "You are in a room and solve a household task there. Objects and receptacles have a name and a number, such as mug 1. "
            "You see only what is at the receptacle that you go to, must open it if it is closed, and can hold one object.\n"
            f"Your actions: {actions}. R is a receptacle and O an object. "
            "Clean with a sinkbasin, heat with a microwave and cool with a fridge what you hold. "
            "To look at an object under a lamp, hold it and use the lamp. "
            "An action that is not possible gives: Nothing happens.\n"
            "Reply each time with:\nThought: your reasoning\nAction: your action")

    def games(self, folder: str) -> list[str]:
        """Task ids of a folder's solvable games; as in the package, without sliced objects and movable receptacles."""
        found = []
        for path in sorted(glob.glob(f"{glob.escape(self.root)}/{folder}/*/*/game.tw-pddl")):
            with open(path, encoding="utf-8", errors="replace") as file:
                if not re.search("Sliced|movable", path[len(self.root):]) and re.search(r'"solvable": *true', file.read()):
                    found.append(os.path.dirname(path)[len(self.root) + 1:])
        return found

    @functools.cached_property
    def example(self) -> str:
        train = self.splits["train"]
        _need(bool(train), f"{self.root}/train", "no games, so there is no example; run alfworld-download")
        return render(self.expert(next((task for task in train if "_heat_" in task), train[0])))

    def max_steps(self, task_id: str) -> int:
        return self.limit

    def task_type(self, task_id: str) -> str:
        return self.check(task_id)[0]

    def check(self, task_id: str) -> list[str]:
        """[task type, object, movable receptacle, destination or lamp, room], as the folder's name has them, or InputError."""
        parts = task_id.split("/")[1].split("-") if any(task_id in ids for ids in self.splits.values()) else []
        _need(len(parts) == 5 and parts[0] in ALFWORLD_TYPES, "alfworld", f"there is no task {task_id!r}; tasks are the folders "
              f"with a game below {self.root}, such as {next(filter(None, self.splits.values()))[0]}")
        return parts

    def start(self, task_id: str, facts: bool = False) -> tuple[ALFWorldEpisode, str]:
        self.check(task_id)
        episode = ALFWorldEpisode(f"{self.root}/{task_id}/game.tw-pddl", facts)
        return episode, episode.first

    def expert(self, task_id: str) -> Trajectory:
        episode, observation = self.start(task_id, facts=True)
        inside: dict[str, list[str]] = {}
        for fact in episode.state.facts:
            if fact.name == "inreceptacle":
                inside.setdefault(fact.arguments[1].name, []).append(kind(fact.arguments[0].name))
        rng = random.Random(f"alfworld:{task_id}")
        expert = ALFWorldExpert(self.check(task_id), observation, inside, episode.put, rng, self.misses)
        trajectory, done = Trajectory(task_id), False
        while not done and len(trajectory.steps) < self.limit:
            action = expert.turn(observation)
            trajectory.steps.append(Step(observation, action))
            observation, trajectory.reward, done, _ = episode.step(action)
        episode.close()
        trajectory.truncated = not done
        return trajectory


ENVIRONMENTS = {"household": Household, "scienceworld": ScienceWorld, "alfworld": ALFWorld}


def make_env(name: str, workers: int | None = None, **options):
    """The environment of that name; options go to its constructor. A slow one plays in `workers` processes, by default one for
    each of this rank's cores, but at most 8, which is how many worlds run_episodes steps at once; 0: in this process."""
    _need(name in ENVIRONMENTS, f"environment {name!r}", f"unknown; choose one of: {', '.join(ENVIRONMENTS)}")
    make = ENVIRONMENTS[name]
    known = [*inspect.signature(make).parameters, "workers"]
    for option in options:
        _need(option in known, f"environment {name!r}", f"no option {option!r}; it has: {', '.join(known)}")
    if workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, max(1, cores)) if getattr(make, "slow", False) else 0
    _need(isinstance(workers, int) and 0 <= workers <= 256, f"environment {name!r}",
          f"workers must be a number from 0 to 256, not {workers!r}")
    return Workers(make, options, workers) if workers else make(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes: an environment that is slow, keeps global state or may crash plays in processes of its own
# ---------------------------------------------------------------------------------------------------------------------
WORKER_FAILURES = 3                                                  # so many on one task, and it counts as unplayable


class WorkerFailure(Exception):
    """A worker died, hung, or answered what no environment answers."""


def _serve(pipe, make, options: dict) -> None:
    """A worker's life: it answers one request after another until the pipe closes. An error of the environment ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                     # Ctrl-C is for the parent, whose end closes the pipe
    env, episodes = None, {}
    while True:
        try:
            call, key, argument, dropped = pipe.recv()
        except (EOFError, OSError):
            return
        for old in dropped:
            episode = episodes.pop(old, None)
            if hasattr(episode, "close"):
                episode.close()
        try:
            env = env or make(**options)
            if call == "start":
                episodes[key], answer = env.start(argument)
            else:
                answer = episodes[key].step(argument) if call == "step" else env.expert(argument)
            pipe.send((True, answer))
        except InputError as error:
            pipe.send((False, str(error)))


def _sound(call: str, answer) -> bool:
    """Whether an answer is of the kind that the protocol promises."""
    if call != "step":
        return isinstance(answer, str if call == "start" else (Trajectory, type(None)))
    return isinstance(answer, tuple) and len(answer) == 4 and all(map(isinstance, answer, (str, (int, float), bool, dict))) \
        and 0 <= answer[1] <= 1 and isinstance(answer[3].get("valid"), bool)


class _Worker:
    """A process and the pipe to it. Who asks holds the lock."""

    def __init__(self, make, options: dict, timeout: float):
        self.made, self.timeout, self.lock = (make, options), timeout, threading.Lock()
        self.process, self.lives = None, 0                           # lives: processes that have ended
        self.playing: set[int] = set()                               # keys of running episodes
        self.dropped: list[int] = []                                 # and of those to close at the next request

    def ask(self, call: str, key: int, argument: str):
        """The answer to a request, from a new process if there is none. WorkerFailure: there is no sound one, the process is
        ended. InputError: the environment's."""
        try:
            if self.process is None:
                context = multiprocessing.get_context("forkserver")  # not fork: CUDA and threads of the parent do not survive it
                context.set_forkserver_preload(["envs"])             # torch is imported once for all workers
                self.pipe, theirs = context.Pipe()
                self.process = context.Process(target=_serve, args=(theirs, *self.made), daemon=True)
                self.process.start()
                theirs.close()
            dropped, self.dropped = self.dropped, []
            self.pipe.send((call, key, argument, dropped))
            if not self.pipe.poll(self.timeout):
                raise WorkerFailure(f"no answer within {self.timeout:g} s")
            understood, answer = self.pipe.recv()
            if understood and not _sound(call, answer):
                raise WorkerFailure(f"the answer to {call!r} was {answer!r:.200}")
        except BaseException as error:                               # also Ctrl-C: an answer still to come would fit no request
            self.end()
            if isinstance(error, Exception) and not isinstance(error, WorkerFailure):
                raise WorkerFailure("the process died") from None
            raise
        if not understood:
            raise InputError(answer)
        return answer

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            self.lives += 1
            self.pipe.close()
            if process.pid is not None:                              # it had started
                process.kill()
                process.join()


class WorkerEpisode:
    """An episode in a worker. If its process fails, the recorded actions are played again in the next one, to the same answers.
    info["restarts"] counts that. After WORKER_FAILURES failures the episode ends with info["unplayable"] = 1: not to be scored."""

    def __init__(self, worker: _Worker, key: int, call: str, task_id: str):
        self.worker, self.key, self.task_id = worker, key, task_id
        self.history: list[tuple[str, str, object]] = []             # call, argument, answer
        self.life, self.restarts, self.failures, self.reward = worker.lives, 0, 0, 0.0
        self.first = self.request(call, task_id)                     # first observation, or the expert's trajectory

    def request(self, call: str, argument: str):
        """The answer, or None if the task has failed too often."""
        while self.failures < WORKER_FAILURES:
            try:
                with self.worker.lock:
                    if self.life != self.worker.lives:
                        self.replay()
                    answer = self.worker.ask(call, self.key, argument)
                self.history.append((call, argument, answer))
                return answer
            except WorkerFailure as error:
                self.failures += 1
                print(f"{self.task_id}: failure {self.failures} of {WORKER_FAILURES} ({error})"
                      + "; the task is not playable" * (self.failures == WORKER_FAILURES), file=sys.stderr)
        return None

    def replay(self) -> None:
        self.life = self.worker.lives
        self.restarts += bool(self.history)
        for call, argument, answer in self.history:
            if self.worker.ask(call, self.key, argument) != answer:
                self.worker.end()
                raise WorkerFailure("the same actions led elsewhere")

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        if self.key not in self.worker.playing:
            return "The task is over.", self.reward, True, {"valid": False, "restarts": self.restarts}
        answer = self.request("step", text) if self.failures < WORKER_FAILURES else None
        if answer is None:
            self.close()
            return "The world has failed.", self.reward, True, {"valid": True, "restarts": self.restarts, "unplayable": 1}
        observation, self.reward, done, info = answer
        if done:
            self.close()
        return observation, self.reward, done, {**info, "restarts": self.restarts}

    def close(self) -> None:
        """Safe to repeat, and in a garbage collection: takes no lock, the worker hears of it with the next request."""
        if hasattr(self, "key") and self.key in self.worker.playing:
            self.worker.playing.discard(self.key)
            self.worker.dropped.append(self.key)

    __del__ = close


class Workers:
    """make(**options) in n processes, by the protocol of all environments: start, step and expert run there, each episode in the
    process with the fewest, and everything else is asked of an instance in this process. timeout: seconds for one answer."""

    def __init__(self, make, options: dict, n: int, timeout: float = 300.0):
        self.env, self.keys, self.lock = make(**options), itertools.count(), threading.Lock()
        self.workers = [_Worker(make, options, timeout) for _ in range(n)]
        weakref.finalize(self, lambda workers: [worker.end() for worker in workers], self.workers)    # also at exit

    def __getattr__(self, name: str):
        if name == "env":                                            # its own constructor failed
            raise AttributeError(name)
        return getattr(self.env, name)

    def start(self, task_id: str) -> tuple[WorkerEpisode, str]:
        episode = self.begin("start", task_id)
        return episode, episode.first or f"{task_id} cannot be played."

    def begin(self, call: str, task_id: str) -> WorkerEpisode:
        with self.lock:
            worker, key = min(self.workers, key=lambda worker: len(worker.playing)), next(self.keys)
            worker.playing.add(key)
        return WorkerEpisode(worker, key, call, task_id)

    def expert(self, task_id: str) -> Trajectory | None:
        """As the environment's; None, after a message, also where the task failed too often."""
        episode = self.begin("expert", task_id)
        episode.close()
        return episode.first


# ---------------------------------------------------------------------------------------------------------------------
# Looking at an environment from the terminal
# ---------------------------------------------------------------------------------------------------------------------
def stats(env) -> None:
    """Prints, for each split and task type, how many tasks there are and how the expert does on them."""
    for split, ids in env.splits.items():
        groups: dict[str, list[Trajectory]] = {"all": []}
        for t in filter(None, map(env.expert, ids)):
            groups["all"].append(t)
            groups.setdefault(env.task_type(t.task_id), []).append(t)
        print(f"{split}: {len(ids)} tasks, {len(groups['all'])} with an expert")
        for name, ts in groups.items():
            turns = sorted(len(t.steps) for t in ts) or [0]
            words = sum(len(re.findall(r"\w+|[^\w\s]", render(t))) for t in ts) / len(turns)
            solved = sum(t.reward >= 1 for t in ts) / max(1, len(ts))
            print(f"  {name:12} {len(ts):5}  solved {solved:7.2%}  turns mean {sum(turns) / len(turns):5.2f} "
                  f"median {turns[len(turns) // 2]} max {turns[-1]}  words and marks {words:.0f}")


def play(env, task_id: str) -> None:
    """A person plays one task: type actions, without "Action:"."""
    episode, observation = env.start(task_id)
    done, turns = False, 0
    print(f"{env.instruction}\n\n{observation}")
    while not done and turns < env.max_steps(task_id):
        try:
            action = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        observation, reward, done, info = episode.step(f"Action: {action}")
        turns += 1
        print(f"{observation}  [turn {turns}, reward {reward:g}{'' if info['valid'] else ', not understood'}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Look at an environment.")
    parser.add_argument("env", help=f"one of: {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--task", default=None, help="a task id (default: the first train task)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stats", action="store_true", help="tasks, and the expert's turns and successes, by split and type")
    what.add_argument("--expert", action="store_true", help="print one episode of the expert")
    what.add_argument("--play", action="store_true", help="play one task yourself")
    args = parser.parse_args()
    try:
        env = make_env(args.env)
        task = args.task or env.splits["train"][0]
        if args.stats:
            stats(env)
        elif args.play:
            play(env, task)
        else:
            shown = env.expert(task)
            print(render(shown) if shown else f"{task}: there is no expert for this task")
    except InputError as error:
        sys.exit(f"error: {error}")
