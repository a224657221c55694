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
    env.right(experts)    -> those of an expert file that are right by the benchmark's own measure (where the world has it)
Bad input (an unknown name or task, a broken file) raises InputError, one line long, with the remedy.
"""
from __future__ import annotations

import argparse
import bisect
import contextlib
import dataclasses
import functools
import glob
import hashlib
import heapq
import html
import html.parser
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import string
import struct
import subprocess
import sys
import textwrap
import threading
import unicodedata
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rollout import InputError, Step, Trajectory, stable_seed


# ---------------------------------------------------------------------------------------------------------------------
# What environments share: the reply format, the conversation's opening, a few names, reading of large files
# ---------------------------------------------------------------------------------------------------------------------
ACTION = re.compile(r"(?:(?im:^[ \t]*[*_#]*[ \t]*action)|Action|ACTION)[ \t]*\d*[ \t*_]*:[*_]*\s*([^\n]+)")


def parse_action(text: str) -> str | None:
    """The action in a ReAct turn: what follows the first "Action:", to the end of its line (or on the next, if that is empty).
    Case and spacing of the marker, its emphasis or number ("**Action 1:**"), backticks or stars around the action and a final period
    do not matter. None: no action."""
    match = ACTION.search(text)
    action = " ".join(match[1].replace("`", " ").split()).strip("* ").removesuffix(".").rstrip() if match else ""
    return action or None


def prompt_messages(env, example: bool = True) -> list[dict[str, str]]:
    """The opening of every conversation, in ETO's shape: the instruction (and one example), then the agent's "OK"."""
    text = f"{env.instruction}\n\nHere is an example.\n{env.example}" if example and env.example else env.instruction
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "OK"}]


def render(trajectory: Trajectory) -> str:
    """A trajectory as readable text, one paragraph a turn."""
    return "\n".join(f"{s.observation}\n{s.action}" for s in trajectory.steps)


STATE = {"clean": "clean", "heat": "hot", "cool": "cool"}            # household, alfworld: what a treatment makes of a thing


def kind(name: str) -> str:
    """"mug 2" -> "mug"."""
    return name.rsplit(" ", 1)[0]


def _benchmark_folder(name: str, data: str | None) -> str:
    """The folder with a benchmark's files: the option data, else the folder of that name in $STEPAGENT_DATA."""
    root = os.environ.get("STEPAGENT_DATA")
    _need(bool(data or root), name, f"no data; it needs {FILES[name]}; give their folder as the option data=FOLDER, or set STEPAGENT_DATA to "
          f"the folder that has them in {name}/")
    return data or os.path.join(root, name)


def _load_json(path: str):
    try:
        with open(path, encoding="utf-8") as file:
            return _json(file.read(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); download it again") from None


def _stream_json(path: str, chunk: int = 1 << 24):
    """(object, its first byte, its number of bytes) of each object in a JSON list: 5 GB never are in memory as a whole."""
    decoder, text, at, byte = json.JSONDecoder(), "", 0, 0           # text[at:] is unread, and stands at `byte` in the file
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while True:
                more = file.read(chunk)
                text, at = text[at:] + more, 0
                while match := re.compile(r"[\s,\[]*(?=\{)").match(text, at):
                    try:
                        row, end = decoder.raw_decode(text, match.end())
                    except json.JSONDecodeError:
                        break
                    start, size = byte + match.end() - at, len(text[match.end():end].encode())
                    at, byte = end, start + size
                    yield row, start, size
                if not more:
                    break
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); download it again") from None
    _need(re.fullmatch(r"[\s\[]*\]\s*", text[at:]) is not None, path,
          f"broken JSON near {text[at:at + 40]!r}; it should be a list of objects; download it again")


# ---------------------------------------------------------------------------------------------------------------------
# Expert files
# ---------------------------------------------------------------------------------------------------------------------
def load_trajectories(path: str) -> list[Trajectory]:
    """Reads trajectories from a file (InputError names the file and the row, its line or index, if anything is wrong):
    - ETO's conversations, a JSON list of {"id", "conversations": [{"from": "human" | "gpt", "value"}, ...], "reward"?}: the
      instruction and the "OK" that answers it become the prompt as they stand, never supervised; the task and everything
      after it become steps. A last human turn is the world's final word, which no action answers: it is left out. The label
      "Observation:", which ETO writes before what the world says, is taken off, as our worlds do not write it.
      Without "reward" the trajectory counts as a success (1.0), as ETO keeps only those. Of a repeated id, which its WebShop
      file has, the first is kept, and the other named on stderr.
    - FireAct's ReAct plays, a JSON list of {"instruction": the question, "output": "Thought: ..\\nAction: search[..]\\n
      Observation: ..", ...}: the question becomes the task id and the first observation, the environment gives the prompt. Plays
      whose last observation does not say "reward = True" (an exact match) are left out.
    - our own JSONL, as save_trajectories writes it."""
    text = _contents(path, "a trajectory file")
    if not text.strip():
        raise InputError(f"{path}: empty; expected ETO's JSON list or JSONL with one trajectory a line")
    if text.lstrip().startswith("["):
        rows = [(f"entry {i}", row) for i, row in enumerate(_json(text, path))]
        fireact = bool(rows) and isinstance(rows[0][1], dict) and "output" in rows[0][1]
        read = _read_fireact if fireact else _read_conversation
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
        if trajectory.task_id in first:
            repeats = f"repeats the id {trajectory.task_id!r} of {first[trajectory.task_id]}"
            _need(read is _read_conversation, where, f"{repeats}; keep one trajectory for each task")
            print(f"{where}: {repeats}; left out", file=sys.stderr)
            continue
        first[trajectory.task_id] = name
        if read is not _read_fireact or trajectory.reward == 1:
            trajectories.append(trajectory)
    _need(bool(trajectories), path, "no play in it ends with the right answer; give a file of successful ones")
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


def _contents(path: str, what: str) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except (OSError, ValueError) as error:                           # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); give the path of {what}") from None


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
    steps = [Step(re.sub(r"^Observation:\s*", "", observation), action) for observation, action in zip(turns[2::2], turns[3::2])]
    return Trajectory(task_id, prompt, steps, _reward(row, where) if "reward" in row else 1.0, False)


def _read_fireact(row: dict, where: str) -> Trajectory:
    question, output = _text(row, "instruction", where).strip(), _text(row, "output", where)
    _need(question != "", where, "'instruction' is empty; it must be the question")
    parts = re.split(r"(?m)^Observation:", output)
    told = [f"Question: {question}", *(part.split("\nThought:")[0].split("\nAction:")[0].strip() for part in parts[1:])]
    steps = []
    for i, part in enumerate(parts):
        turn = re.search(r"(?ms)^(?:Thought:\s*(.*?)\n)?Action:\s*(.*?)\s*\Z", part)
        if turn is None:                                             # after the last action there is only the world's final word
            _need(i == len(parts) - 1, where,
                  f"'output' has no action before observation {i}; write Thought: .., Action: .., Observation: ..")
            break
        call = parse_call(parse_action(f"Action: {turn[2]}"))
        _need(call is not None, where, f"action {i} is neither search[..] nor finish[..] (it is {turn[2][:40]!r})")
        thought = " ".join((turn[1] or "").split())
        steps.append(Step(told[i], f"Thought: {thought}\nAction: {call[0].capitalize()}[{call[1]}]"))
    _need(not steps or steps[-1].action.rsplit("Action: ", 1)[1].startswith("Finish["), where,
          "does not end with finish[answer]; remove the row")
    return Trajectory(question, [], steps, float(bool(re.search(r"reward = (True|1)\b", parts[-1]))), False)


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
            self.seen[self.place] = [o for o in self.seen.get(self.place, []) if o != match[1]]
        elif match := re.fullmatch(r"You put (\w+ \d+) .*", observation):
            self.event, self.hand, self.stored = "put", None, match[1]
            self.seen.setdefault(self.place, []).append(match[1])
        elif self.task in STATION and observation.startswith(f"You {self.task} "):     # an agent may treat what it need not
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
        simulator.close = lambda: None                               # the package's __del__ calls it again when Python is half gone


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
    """The package, made to remember what it would parse, translate and copy again at every step, and to play one game after the other
    with the same copy of the planner's library: unloading one while another game is open ends in a segmentation fault. Texts stay the
    same."""
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
            idle, load = [], fast_downward.load_lib
            fast_downward.load_lib = lambda: idle.pop() if idle else load()
            fast_downward.close_lib = lambda lib: (lib.cleanup(), idle.append(lib))
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
    """One game. extra: what TextWorld is to tell its expert: "facts" (what is where) or "policy_commands" (its planner's, found anew at
    each step, which is slow)."""

    def __init__(self, path: str, extra: str = ""):
        textworld, self.planner = _textworld()
        self.put, self.reward, argv = alfworld_forms(path)["PutObject"], 0.0, sys.argv
        with ALFWORLD_LOCK:
            try:
                self.game = textworld.start(path, textworld.EnvInfos(won=True, **{extra: True} if extra else {}))
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
        putting and using is made the game's own: put O in R, put O on R, put O in/on R and move O to R all count, and toggle O."""
        if self.game is None:
            return "The task is over.", self.reward, True, {"valid": False}
        action = (parse_action(text) or "").lower()
        if match := re.fullmatch(r"put (.+?) (?:in/on|in|on) (.+)|move (.+?) to (.+)", action):
            action = self.put.format(o=match[1] or match[3], r=match[2] or match[4])
        action = re.sub("^toggle ", "use ", action)
        with ALFWORLD_LOCK:
            self.state, reward, done = self.game.step(action)
        self.reward = float(reward)
        observation = re.sub(r"^You arrive at loc \d+\. ", "", self.state.feedback)
        if done:
            self.close()
        return observation, self.reward, done, {"valid": observation != "Nothing happens."}

    def close(self) -> None:
        """Gives the planner's library back. Safe to repeat."""
        with ALFWORLD_LOCK:
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
    shown: who is the expert. "rule" plays by rule and gives its reasons. It knows where things are, but first looks at up to `misses`
    places for nothing, so that the agent sees how a search goes on; 0 is the straight way. "planner" follows TextWorld's planner, who
    needs not search, and "gt_traj" the gt_traj.json beside a game, if there is one; their thoughts say no more than the action."""

    slow = True                                                      # a start takes about a second: see run_episodes
    paper = {"train": 3321, "dev": 140, "test": 134, "turns": 10.1}  # Table 1

    def __init__(self, data: str | None = None, shown: str = "rule", misses: int = 5, max_steps: int = 40):
        _need(shown in ("rule", "planner", "gt_traj"), "alfworld", f"shown must be rule, planner or gt_traj, not {shown!r}")
        self.shown = shown
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

    def start(self, task_id: str, extra: str = "") -> tuple[ALFWorldEpisode, str]:
        self.check(task_id)
        episode = ALFWorldEpisode(f"{self.root}/{task_id}/game.tw-pddl", extra)
        return episode, episode.first

    def turns(self, task_id: str, episode: ALFWorldEpisode) -> Callable[[str], str | None]:
        """observation -> the expert's turn (None: it has none left)."""
        if self.shown == "rule":
            inside: dict[str, list[str]] = {}
            for fact in episode.state.facts:
                if fact.name == "inreceptacle":
                    inside.setdefault(fact.arguments[1].name, []).append(kind(fact.arguments[0].name))
            rng = random.Random(f"alfworld:{task_id}")
            return ALFWorldExpert(self.check(task_id), episode.first, inside, episode.put, rng, self.misses).turn
        path = f"{self.root}/{task_id}/gt_traj.json"
        plan = episode.state.policy_commands if self.shown == "planner" else []
        if self.shown == "gt_traj" and os.path.exists(path):
            turns = _json(_contents(path, "a game's gt_traj.json"), path)
            _need(isinstance(turns, list), path, "is not a list of turns")
            plan = [_text(turn, "value", at) for turn, at in _items({"turns": turns}, "turns", path) if turn.get("from") == "gpt"]
        actions = iter(plan)
        return lambda observation: next((f"Thought: I {action}.\nAction: {action}" for action in actions), None)

    def expert(self, task_id: str) -> Trajectory | None:
        """None: there is no gt_traj.json."""
        episode, observation = self.start(task_id, {"rule": "facts", "planner": "policy_commands"}.get(self.shown, ""))
        trajectory, turn, done = Trajectory(task_id), self.turns(task_id, episode), False
        while not done and len(trajectory.steps) < self.limit and (action := turn(observation)):
            trajectory.steps.append(Step(observation, action))
            observation, trajectory.reward, done, _ = episode.step(action)
        episode.close()
        trajectory.truncated = not done
        return trajectory if trajectory.steps else None


# ---------------------------------------------------------------------------------------------------------------------
# webshop: shopping by instruction (Yao et al., 2022), over the official product files, as text pages
# ---------------------------------------------------------------------------------------------------------------------
WEBSHOP_FILES = (                                                    # full or small, in this order of preference
    ("items_shuffle.json", "items_ins_v2.json", "items_human_ins.json", "eto_train_indices.json", "eto_test_indices.json"),
    ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json"))
# Colours that an option is reduced to (the first one it contains, in this order), so that "c1-black" is bought as "black".
WEBSHOP_COLOURS = (
    "apricot aqua beige black blue bronze brown burgundy champagne charcoal chocolate copper coral cream dark fuchsia gold gray "
    "green grey indigo ivory khaki lavender light lilac lime magenta maroon mint mocha mustard natural navy nude olive orange "
    "peach pink plum purple rainbow red rose rust sand silver tan taupe teal turquoise violet walnut white wine yellow").split()


@dataclass(slots=True)
class Product:
    """A row of the product file. options: {name: [value, ...]}, in small letters; price: what it costs, where the tag says
    "$9 to $12" one draw from it; pricing nothing means 100, as in WebShop."""
    asin: str
    name: str
    description: str
    features: list[str]
    category: str
    path: str                                                        # "Home & Kitchen › Furniture › ..."
    query: str
    options: dict[str, list[str]]
    tag: str
    price: float
    attributes: list[str]


@dataclass(slots=True)
class ShoppingGoal:
    product: Product                                                 # what the instruction was written about
    text: str
    attributes: list[str]
    options: list[str]
    price_upper: float


def webshop_reward(bought: Product, chosen: dict[str, str], goal: ShoppingGoal) -> float:
    """WebShop's reward of a purchase (section 3.1 there and its goal.py): r_type * (attributes + options hit + price kept) /
    (attributes + options + 1). One deviation: the types of two titles are compared by all their words, not by the nouns that a
    language model finds."""
    title, other = ({w for w in re.findall("[a-z]{3,}", p.name.lower())} - {"and", "for", "from", "the", "with"}
                    for p in (goal.product, bought))
    score = len(title & other) / len(title) if title else 0.2
    paths = ({part.strip() for part in p.path.split("›")} for p in (goal.product, bought))
    alike = bought.query == goal.product.query or len(set.intersection(*paths)) >= 2 or score > 0.2
    r_type = 0.0 if score == 0 else 0.1 if score < 0.1 else 1.0 if alike else 0.5
    texts = [bought.name.lower(), " ".join(bought.features).lower(), bought.description.lower()]
    hits = sum(any(_similar(own, wanted) for own in bought.attributes) or any(wanted in text for text in texts)
               for wanted in goal.attributes)
    bought_options, wishes = [_colour(value) for value in chosen.values()], [_colour(option) for option in goal.options]
    hits += sum(any(_similar(value, wish) for value in bought_options) for wish in wishes) + (bought.price <= goal.price_upper)
    return r_type * hits / (len(goal.attributes) + len(wishes) + 1)


def _colour(option: str) -> str:
    return next((colour for colour in WEBSHOP_COLOURS if colour in option), option)


def _similar(a: str, b: str) -> bool:
    """WebShop's fuzzy match: thefuzz's token_set_ratio above 85, computed as thefuzz does."""
    from rapidfuzz import fuzz, utils
    return round(fuzz.token_set_ratio(a, b, processor=utils.default_process)) > 85


def _button(text: str) -> str:
    """A button's text in the form in which clicks are compared with it."""
    return " ".join(text.replace("`", " ").lower().split())


class WebShopEpisode:
    """One shopping trip. A page is what WebShop's text mode shows, its parts separated by [SEP], and `buttons`, which maps the
    text of what one can click there to what that does."""

    def __init__(self, shop: WebShop, goal: ShoppingGoal):
        self.shop, self.goal, self.reward, self.done = shop, goal, 0.0, False
        self.home()

    def home(self) -> None:
        self.observation, self.buttons = f"WebShop [SEP] Instruction: [SEP] {self.goal.text} [SEP] Search", {}

    def show(self, parts: list[str], buttons: dict) -> None:
        self.observation = " [SEP] ".join(["Instruction:", self.goal.text, "Back to Search", *parts])
        self.buttons = {"back to search": self.home, **{_button(text): press for text, press in buttons.items()}}

    def results(self, found: list[Product], page: int = 0) -> None:
        here, go = found[page * 10:page * 10 + 10], functools.partial(self.results, found)
        arrows = {"< Prev": functools.partial(go, page - 1)} if page else {}
        arrows |= {"Next >": functools.partial(go, page + 1)} if page * 10 + 10 < len(found) else {}
        listed = [text for p in here for text in (p.asin, p.name, p.tag)]
        self.show([f"Page {page + 1} (Total results: {len(found)})", *arrows, *listed],
                  arrows | {p.asin: functools.partial(self.item, p, {}, functools.partial(go, page)) for p in here})

    def item(self, p: Product, chosen: dict[str, str], back) -> None:
        again = functools.partial(self.item, p, back=back)
        pages = {"Description": [p.description], "Features": p.features, "Reviews": []}          # the data has no reviews
        self.show(["< Prev", *(x for name, values in p.options.items() for x in (name, *values)),
                   p.name, f"Price: {p.tag}", "Rating: N.A.", *pages, "Buy Now"],
                  {"< Prev": back, "Buy Now": functools.partial(self.buy, p, chosen)}
                  | {name: functools.partial(self.show, ["< Prev", *(list(filter(None, texts)) or [f"No {name.lower()}"])],
                                             {"< Prev": functools.partial(again, chosen)}) for name, texts in pages.items()}
                  | {value: functools.partial(again, {**chosen, name: value})
                     for name, values in p.options.items() for value in values})

    def buy(self, p: Product, chosen: dict[str, str]) -> None:
        self.reward, self.done, self.buttons = webshop_reward(p, chosen, self.goal), True, {}
        self.observation = f"Thank you for shopping with us! [SEP] Your score: {self.reward:.2f}"

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. As in WebShop one can search from any page; what the page does not offer leaves it as it is."""
        match = re.match(r"(?i)(search|click)\s*\[(.*)", parse_action(text) or "")
        value = re.sub(r"^([\"'])(.*)\1$", r"\2", re.sub(r"\][^\]]*$", "", match[2]).strip()) if match else ""
        searches = bool(match) and match[1].lower() == "search" and not self.done
        press = self.buttons.get(_button(value)) if match and not searches else None
        if searches and value:
            self.results(self.shop.find(value))
        elif press:
            press()
        return self.observation, self.reward, self.done, {"valid": bool(press or searches and value)}


class WebShop:
    """Task ids are numbers into the goals, shuffled as in WebShop (seed 233). data: a folder with the official files.
    Full files (1.18 million products): the 12,087 human goals; train and test are ETO's lists (each goal once, and train
    without the 21 that are in test, too), dev the first 200 goals that neither list has.
    The 1,000 products: their synthetic goals (each instruction with each combination of options), split by product: of
    sha1(asin) mod 10, 0 is test, 1 dev, the rest train. Also "human", the 13 human goals ("human-0" ..); products that these
    are about are never in train.
    WebShop draws prices and their bounds anew in each process; here they depend on the product alone. Search is BM25 as there
    (k1 0.9, b 0.4, first 50 hits), but without its stemmer. Nothing is sent anywhere."""

    paper = {"train": 1938, "dev": None, "test": 200, "turns": 4.9}  # Table 1
    instruction = (
        "You shop on a web site. Find a product that fits the instruction, choose the options that it asks for, and buy. You "
        "read each page as text, its parts separated by [SEP].\n"
        "Your actions:\n"
        "search[words]: look for products; the words are up to you\n"
        "click[text]: press something that the page offers: a product by its code, such as B07XYZ1234; an option, such as "
        "large; Description, Features, Reviews; < Prev, Next >, Back to Search; or Buy Now, which ends the task\n"
        "A click on what the page does not offer does nothing. You have 10 actions; without a purchase you earn nothing.\n"
        "Reply each time with:\nThought: your reasoning\nAction: your action")

    def __init__(self, data: str | None = None):
        folder = _benchmark_folder("webshop", data)
        full = os.path.exists(os.path.join(folder, WEBSHOP_FILES[0][0]))
        paths = [os.path.join(folder, name) for name in WEBSHOP_FILES[not full]]
        missing = [os.path.basename(path) for path in paths if not os.path.exists(path)]
        _need(not missing, folder, f"lacks {', '.join(missing)}; WebShop's setup.sh downloads {', '.join(WEBSHOP_FILES[1])} (-d "
              f"small) or {', '.join(WEBSHOP_FILES[0][:3])} (-d all); for the latter also ETO's WebShop lists "
              "train_indices.json and test_indices.json, here with eto_ before the name")
        for package, version in {"bm25s": "0.3.16", "rapidfuzz": "3.14.6"}.items():
            _need(importlib.util.find_spec(package) is not None, "webshop",
                  f"the package {package} is missing; install it: pip install {package}=={version}")
        attributes, instructions, *lists = map(_load_json, paths[1:])
        _need(isinstance(attributes, dict) and isinstance(instructions, dict), f"{paths[1]} or {os.path.basename(paths[2])}",
              "is not a JSON object {asin: ...}; download it again")
        self.products, goals, human, number = {}, [], [], 0
        try:
            for number, (row, _, _) in enumerate(_stream_json(paths[0])):
                asin = row["asin"]
                if asin in self.products or asin == "nan" or len(asin) > 10:                     # as WebShop does
                    continue
                p = self.products[asin] = _product(row, attributes.get(asin, {}))
                human += [_goal(p, i, ask["instruction"].strip("."), ask["instruction_attributes"], ask["instruction_options"])
                          for i, ask in enumerate(instructions.get(asin, [])) if ask["instruction_attributes"]]
                ask = {} if full else attributes.get(asin, {})
                names = sorted(p.options)
                for values in itertools.product(*(p.options[name] for name in names)) if ask.get("instruction") else ():
                    wish = ", and ".join(f"{name}: {value}" for name, value in zip(names, values))
                    text = ask["instruction"] + f" with {wish}" * bool(wish)
                    goals.append(_goal(p, 0, text, ask["instruction_attributes"], values))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{folder}: product {number}, counted from 0, is not as WebShop writes it in one of "
                             f"{', '.join(map(os.path.basename, paths[:3]))} ({type(error).__name__}: {error}); download "
                             "the files again") from None
        goals = human if full else goals
        _need(bool(goals), folder, "has products, but no instruction for any of them; download the files again")
        self._index()
        random.Random(233).shuffle(goals)
        self.goals = {str(i): goal for i, goal in enumerate(goals)}
        self.splits: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        if full:
            for path, indices in zip(paths[3:], lists):
                _need(isinstance(indices, list) and {*map(str, indices)} <= {*self.goals}, path,
                      f"is not a list of numbers below {len(goals)}, the number of goals; is it the one for these products?")
            train, test = ({str(i): None for i in indices} for indices in lists)
            self.splits = {"train": [i for i in train if i not in test],
                           "dev": [i for i in self.goals if i not in train | test][:200], "test": [*test]}
        else:
            held_out = {goal.product.asin for goal in human}
            for i, goal in self.goals.items():
                asin = goal.product.asin
                fold = 0 if asin in held_out else int(hashlib.sha1(asin.encode()).hexdigest(), 16) % 10
                self.splits[{0: "test", 1: "dev"}.get(fold, "train")].append(i)
            self.splits["human"] = [f"human-{i}" for i in range(len(human))]
            self.goals |= zip(self.splits["human"], human)

    def _index(self) -> None:
        """BM25 over title, description, first feature and options, the text that WebShop indexes."""
        import bm25s
        self.asins = list(self.products)
        texts = [" ".join([p.name, p.description, *p.features[:1], *(f"{k}: {', '.join(v)}" for k, v in p.options.items())])
                 for p in self.products.values()]
        self.bm25 = bm25s.BM25(k1=0.9, b=0.4)
        self.bm25.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)

    def find(self, words: str) -> list[Product]:
        """The best 50 products, best first; of equal ones the one that comes first in the file."""
        import bm25s
        [tokens] = bm25s.tokenize([words], stopwords="en", return_ids=False, show_progress=False)
        tokens = [token for token in tokens if token in self.bm25.vocab_dict]
        if not tokens:
            return []
        scores = self.bm25.get_scores(tokens)
        best = (-scores).argsort(kind="stable")[:50]
        return [self.products[self.asins[i]] for i in best if scores[i] > 0]

    @functools.cached_property
    def example(self) -> str:
        """The shortest text of the first train goals that the expert finishes."""
        shown = filter(None, map(self.expert, self.splits["train"][:20]))
        return min((render(t) for t in shown if t.reward == 1), key=len, default="")

    def max_steps(self, task_id: str) -> int:
        return 10

    def task_type(self, task_id: str) -> str:
        return self.goal(task_id).product.category

    def goal(self, task_id: str) -> ShoppingGoal:
        _need(task_id in self.goals, "webshop", f"there is no task {task_id!r}; tasks are 0 .. {len(self.goals) - 1}"
              + (" and human-0 ..", "")["human" not in self.splits])
        return self.goals[task_id]

    def start(self, task_id: str) -> tuple[WebShopEpisode, str]:
        episode = WebShopEpisode(self, self.goal(task_id))
        return episode, episode.observation

    def expert(self, task_id: str) -> Trajectory | None:
        """Searches with the instruction's words, pages to the product that the instruction was written about, chooses the
        options and buys; None where that takes more than the 10 steps. Which product it is, is all that the expert knows
        beyond what it reads."""
        (episode, observation), trajectory = self.start(task_id), Trajectory(task_id)
        goal = episode.goal

        def act(thought: str, action: str) -> None:
            nonlocal observation
            trajectory.steps.append(Step(observation, f"Thought: {thought}\nAction: {action}"))
            observation, trajectory.reward, _, _ = episode.step(trajectory.steps[-1].action)

        p, name = goal.product, goal.product.asin
        bound = f" (it costs {p.tag}, and I may spend up to {goal.price_upper:g} dollars)" if goal.price_upper < 1e6 else ""
        act("I search with the words of the instruction.", f"search[{goal.text.split(', and price lower than')[0]}]")
        while name.lower() not in episode.buttons and "next >" in episode.buttons:
            act("Nothing on this page fits well, so I look at the next one.", "click[Next >]")
        options = webshop_choice(p.options, goal.options)
        if name.lower() not in episode.buttons or len(trajectory.steps) + len(options) + 2 > self.max_steps(task_id):
            return None
        act(f"{name} fits best of what I have read{bound}, so I open it.", f"click[{name}]")
        for option, value in options.items():
            act(f"The instruction asks for {value}, which is offered as {option}, so I choose it.", f"click[{value}]")
        act("The product fits" + " and the options are chosen" * bool(options) + ", so I buy it.", "click[Buy Now]")
        return trajectory


def webshop_choice(options: dict[str, list[str]], wishes: list[str]) -> dict[str, str]:
    """For each option that a wish fits, the value to choose: equal if there is one, else similar as the reward sees it."""
    chosen = {}
    for name, values in options.items():
        for fits in (str.__eq__, lambda wish, value: _similar(_colour(wish), _colour(value))):
            if name not in chosen and (found := [v for wish in wishes for v in values if fits(wish, v)]):
                chosen[name] = found[0]
    return chosen


def _goal(p: Product, number: int, text: str, attributes: list[str], options: list[str]) -> ShoppingGoal:
    """The price bound is the larger of two of the next four tens above the price; none where there are not two below 1,000."""
    above = [10.0 * i for i in range(1, 100) if 10.0 * i > p.price][:4]
    upper = max(random.Random(f"webshop:{p.asin}:{number}").sample(above, 2)) if len(above) >= 2 else 1e6
    text += f", and price lower than {upper:.2f} dollars" * (upper < 1e6)
    return ShoppingGoal(p, text, list(attributes), list(options), upper)


def _product(row: dict, more: dict) -> Product:
    features, choices = row.get("small_description") or [], row.get("customization_options") or {}
    features = [features] if isinstance(features, str) else features
    prices = [float(re.sub(r"[^\d.]", "", x)) for x in (row.get("pricing") or "").split("$")[1:]][:2] or [100.0]
    price = prices[0] if len(prices) == 1 else random.Random(f"webshop:{row['asin']}").uniform(*prices)
    options = {name.lower(): [value["value"].strip().replace("/", " | ").lower() for value in values]
               for name, values in choices.items() if values is not None}
    return Product(row["asin"], row["name"], row.get("full_description") or "", features, row["category"],
                   row["product_category"], row["query"].lower().strip(), options,
                   " to ".join(f"${x}" for x in prices), price, more.get("attributes", []))


# ---------------------------------------------------------------------------------------------------------------------
# mind2web: the next action on 137 real web sites (Deng et al., 2023), offline from recorded pages
# ---------------------------------------------------------------------------------------------------------------------
MIND2WEB_FOLDERS = {"train": "train", "test": "test_domain", "test_task": "test_task", "test_website": "test_website"}
# What describes an element besides its text; in cleaned HTML names have "_" for "-", and these three are the page's state.
MIND2WEB_ATTRIBUTES = ("role", "type", "name", "label", "aria_label", "aria-label", "placeholder", "title", "alt", "value",
                       "input_value", "input_checked", "option_selected")
MIND2WEB_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class PageElements(html.parser.HTMLParser):
    """The wanted elements of a cleaned page, {node id: (tag, attributes, words within)}, in the page's order."""

    def __init__(self, page: str, wanted: set[str]):
        super().__init__()
        self.wanted, self.found, self.open = wanted, {}, []          # open: (tag, node id, if wanted) from the root down
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        attributes = {name: value for name, value in attributes if value}
        node = attributes.get("backend_node_id")
        self.handle_data(" ".join(attributes[name] for name in ("alt", "aria_label", "aria-label") if name in attributes))
        if node in self.wanted:
            self.found[node] = (tag, attributes, [])
        if tag not in MIND2WEB_VOID:
            self.open.append((tag, node if node in self.wanted else None))

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in MIND2WEB_VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in (tags := [name for name, _ in self.open]):
            del self.open[len(tags) - 1 - tags[::-1].index(tag):]

    def handle_data(self, data: str) -> None:
        for _, node in self.open:
            if node is not None:
                self.found[node][2].extend(data.split())


def describe(tag: str, attributes: dict[str, str], words: list[str]) -> tuple[str, str]:
    """(the element as a line of the page, what a person would call it)."""
    limit = 40 if tag == "select" else 15                            # a select's words are what one can choose
    text = " ".join(words[:limit]) + " ..." * (len(words) > limit)
    known = {name: " ".join(attributes[name].split()[:limit]) for name in MIND2WEB_ATTRIBUTES if name in attributes}
    line = " ".join([tag, *[f'"{text}"'] * bool(text), *(f"{name}={value}" for name, value in known.items() if value != text)])
    names = [known.get(name) for name in ("aria_label", "aria-label", "label", "placeholder", "title", "alt", "name")]
    return line, next(filter(None, [text, *names]), tag)


def web_action(text: str) -> tuple[str, int, str] | None:
    """(operation, element number, value) of a turn; None where it has no such action."""
    match = re.match(r"(?i)(click|type|select)\s*\[?\s*(\d{1,9})\s*\]?\s*:?\s*(.*)", parse_action(text) or "")
    if not match:
        return None
    operation, value = match[1].upper(), re.sub(r"^([\"'\[])(.*)[\"'\]]$", r"\2", match[3]).strip()
    return operation, int(match[2]), "" if operation == "CLICK" else value


def operation_f1(predicted: str, wanted: str) -> float:
    """Mind2Web's F1 of the sets of words of "OPERATION value"."""
    a, b = set(predicted.split()), set(wanted.split())
    return 2 * len(a & b) / (len(a) + len(b)) if a and b else float(a == b)


def target_first(candidates: list[dict]) -> list[str]:
    """Ids of the right elements (nested ones count, too), the one that the annotator meant first."""
    return [c["backend_node_id"] for c in sorted(candidates, key=lambda c: not c.get("is_original_target"))]


@dataclass(slots=True)
class RecordedTask:
    """Where a task stands in its file, and which of its actions are played."""
    path: str
    start: int                                                       # bytes
    size: int
    domain: str
    kept: list[int]
    train: bool


@dataclass(slots=True)
class RecordedPage:
    """A turn of a task."""
    observation: str
    names: list[str]                                                 # of the elements, by number
    right: list[int]                                                 # numbers of the right ones, the annotator's first
    gold: str                                                        # the annotated action


class Mind2WebEpisode:
    """One recorded task. Whatever the agent does, the next page is the one after the annotated action."""

    def __init__(self, pages: list[RecordedPage]):
        self.pages, self.at, self.elements, self.f1, self.successes = pages, 0, 0, 0.0, 0

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. Reward: elements hit, as a share of all steps; info: mean operation F1 and step success, likewise. As
        in the official evaluation a step whose element is not among the candidates counts 0 in all three."""
        total, said, valid = len(self.pages), web_action(text), False
        if self.at < total:
            page = self.pages[self.at]
            valid = said is not None and said[1] < len(page.names)
            if valid and page.right:
                (op, number, value), (gold_op, _, gold_value) = said, web_action(f"Action: {page.gold}")
                f1 = operation_f1(f"{op} {value}", f"{gold_op} {gold_value}")
                self.elements += number in page.right
                self.f1 += f1
                self.successes += number in page.right and f1 == 1
            self.at += 1
        observation = self.pages[self.at].observation if self.at < total else "The task is over."
        return observation, self.elements / total, self.at >= total, {
            "valid": valid, "operation_f1": self.f1 / total, "step_success": self.successes / total}


class Mind2Web:
    """Task ids are annotation ids. data: a folder with the official JSON files in train/, test_domain/ and, if wanted,
    test_task/ and test_website/ (the paper's test, of 912 tasks, is test_domain), and scores_all_data.pkl, the official ranks
    of elements. A page shows its `candidates` best-ranked elements, in the page's order; on train pages always the annotated
    one, too. Without that file it shows the annotated element among others drawn by chance, which is easier.
    dev: so many train tasks are held out, by the order of sha1(id); 0 as in the paper, which has no dev split. Train steps
    whose element is not in the cleaned page are left out, as officially; on test pages they count as wrong."""

    paper = {"train": 1009, "dev": None, "test": 912, "turns": 7.3}  # Table 1
    instruction = (
        "You carry out a task on a web site, one action at a time. Each turn shows the latest actions, then the elements of the "
        "page that may matter, each with its number in brackets, then the task.\n"
        "Your actions, where N is the number of an element:\n"
        "click [N]: press it; also to hover over it or to confirm\n"
        "type [N] text: write the text into it\n"
        "select [N] value: choose the value from its list\n"
        "The pages were recorded from a person, and go on as that person did, whatever you do: trust the list of actions.\n"
        "Reply each time with:\nThought: your reasoning\nAction: your action")

    def __init__(self, data: str | None = None, candidates: int = 20, dev: int = 50):
        _need(isinstance(candidates, int) and candidates >= 1 and isinstance(dev, int) and dev >= 0, "mind2web",
              f"candidates must be a number, at least 1, and dev one, at least 0, not {candidates!r} and {dev!r}")
        folder, self.count, self.tasks, self.read = _benchmark_folder("mind2web", data), candidates, {}, {}
        self.splits: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        for split, name in MIND2WEB_FOLDERS.items():
            paths = sorted(glob.glob(os.path.join(glob.escape(folder), name, "*.json")))
            _need(bool(paths) or split.startswith("test_"), os.path.join(folder, name), "has no .json files; get from the "
                  "Hugging Face data set osunlp/Mind2Web data/train/*.json and test.zip, which has test_domain/, test_task/ and "
                  "test_website/, put the four folders side by side, and with them scores_all_data.pkl")
            for path in paths:
                self.splits.setdefault(split, []).extend(self.scan(path, split == "train"))
        held_out = set(sorted(self.splits["train"], key=lambda i: hashlib.sha1(i.encode()).hexdigest())[:dev])
        self.splits["dev"] = [i for i in self.splits["train"] if i in held_out]
        self.splits["train"] = [i for i in self.splits["train"] if i not in held_out]
        _need(bool(self.splits["train"]), folder, f"has no train task left when {dev} are held out; lower dev")
        scores = os.path.join(folder, "scores_all_data.pkl")
        self.ranked = read_ranks(scores, candidates) if os.path.exists(scores) else None

    def scan(self, path: str, train: bool) -> list[str]:
        """Checks a file's tasks and notes where each stands: their pages take gigabytes, so they are read when played."""
        names = []
        for number, (row, start, size) in enumerate(_stream_json(path)):
            try:
                name, actions = row["annotation_id"], row["actions"]
                texts = [name, row["domain"], row["website"], row["confirmed_task"], *row["action_reprs"]]
                for action in actions:
                    op, elements = action["operation"], action["pos_candidates"] + action["neg_candidates"]
                    texts += [action["action_uid"], action["cleaned_html"], op["op"], op.get("value") or ""]
                    texts += [text for c in elements for text in (c["backend_node_id"], c["tag"])]
                    if op["op"] not in ("CLICK", "TYPE", "SELECT"):
                        raise ValueError(f"an operation {op['op']!r}")
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError(f"{next(text for text in texts if not isinstance(text, str))!r} where text should be")
                if len(row["action_reprs"]) != len(actions) or name in self.tasks:
                    raise ValueError(f"{len(actions)} actions, {len(row['action_reprs'])} action_reprs; or another task's id")
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise InputError(f"{path}: task {number}, counted from 0, is not as Mind2Web writes it ({type(error).__name__}: "
                                 f"{error}); download the file again") from None
            kept = [i for i, action in enumerate(actions) if action["pos_candidates"] or not train]
            if kept:
                self.tasks[name] = RecordedTask(path, start, size, row["domain"], kept, train)
                names.append(name)
        return names

    @functools.cached_property
    def example(self) -> str:
        """The shortest text of the first train tasks."""
        return min((render(self.expert(i)) for i in self.splits["train"][:10]), key=len)

    def max_steps(self, task_id: str) -> int:
        return len(self.recorded(task_id).kept)

    def task_type(self, task_id: str) -> str:
        return self.recorded(task_id).domain

    def recorded(self, task_id: str) -> RecordedTask:
        _need(task_id in self.tasks, "mind2web", f"there is no task {task_id!r}; the first is {next(iter(self.tasks), None)!r}")
        return self.tasks[task_id]

    def pages(self, task_id: str) -> list[RecordedPage]:
        """The turns of a task. Reading a page takes long (184 KB: 30 ms), so the texts are kept, about 20 KB a task."""
        if task_id not in self.read:
            recorded = self.recorded(task_id)
            with open(recorded.path, "rb") as file:
                file.seek(recorded.start)
                task = json.loads(file.read(recorded.size))
            self.read[task_id] = [self.page(task, i) for i in recorded.kept]
        return self.read[task_id]

    def page(self, task: dict, i: int) -> RecordedPage:
        """The page before action i."""
        action, before = task["actions"][i], task["action_reprs"][max(0, i - 5):i]
        shown = self.candidates(task["annotation_id"], action)
        found = PageElements(action["cleaned_html"], set(shown)).found
        found |= {node: (tag, {}, []) for node, tag in shown.items() if node not in found}
        lines, names = zip(*(describe(*element) for element in found.values())) if found else ((), ())
        numbers = {node: n for n, node in enumerate(found)}
        right = [numbers[node] for node in target_first(action["pos_candidates"]) if node in numbers]
        op, value = action["operation"]["op"], " ".join((action["operation"].get("value") or "").split())
        gold = f"{op.lower()} [{right[0] if right else 0}] {value * (op != 'CLICK')}".strip()
        before = "".join(f"\n- {' '.join(done.split())}" for done in before) or " none"
        text = [f"Web site: {task['website']}", f"Previous actions:{before}", "Elements:",
                *(f"[{n}] {line}" for n, line in enumerate(lines)), f"Task: {' '.join(task['confirmed_task'].split())}"]
        return RecordedPage("\n".join(text), list(names), right, gold)

    def candidates(self, task_id: str, action: dict) -> dict[str, str]:
        """{node id: tag} of the elements to show."""
        right, key = target_first(action["pos_candidates"]), f"{task_id}_{action['action_uid']}"
        tags = {c["backend_node_id"]: c["tag"] for c in action["neg_candidates"] + action["pos_candidates"]}
        if self.ranked is None:
            others, nodes = [node for node in tags if node not in right], right[:self.count]
            nodes += random.Random(f"mind2web:{key}").sample(others, min(self.count - len(nodes), len(others)))
        else:
            _need(key in self.ranked, "scores_all_data.pkl", f"has no ranks for {key}; is it the file for these tasks?")
            nodes = [node for node in self.ranked[key] if node in tags]
            if self.tasks[task_id].train and not set(right) & set(nodes):
                nodes = nodes[:self.count - 1] + right[:1]
        return {node: tags[node] for node in nodes}

    def start(self, task_id: str) -> tuple[Mind2WebEpisode, str]:
        pages = self.pages(task_id)
        return Mind2WebEpisode(pages), pages[0].observation

    def expert(self, task_id: str) -> Trajectory | None:
        """The annotated actions with thoughts; None where a page does not show the annotated element."""
        pages, (episode, _), trajectory = self.pages(task_id), self.start(task_id), Trajectory(task_id)
        if not all(page.right for page in pages):
            return None
        for page in pages:
            op, number, value = web_action(f"Action: {page.gold}")
            name = f"the {page.names[number]!r} element"
            thought = {"CLICK": f"To go on with the task I click {name}.", "TYPE": f"Into {name} I type {value!r}.",
                       "SELECT": f"In {name} I select {value!r}."}[op]
            if value and value.lower() in page.observation.rsplit("\nTask: ", 1)[1].lower():
                thought = f"The task says {value!r}. {thought}"
            trajectory.steps.append(Step(page.observation, f"Thought: {thought}\nAction: {page.gold}"))
            _, trajectory.reward, _, trajectory.info = episode.step(trajectory.steps[-1].action)
        return trajectory


class RankReader(pickle.Unpickler):
    """Unpickles dicts, lists, text and numbers, those of numpy included, and refuses everything else: a pickle can name any
    function to be called. Numpy's own numbers are rebuilt here, as its code trusts the bytes."""

    class Kind:                                                      # numpy.dtype
        def __init__(self, code: str, *_):
            self.code, self.order = {"f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q"}[code], "<"

        def __setstate__(self, state: tuple):
            self.order = ">" if state[1] == ">" else "<"

    def find_class(self, module: str, name: str):
        if (module, name) == ("numpy", "dtype"):
            return self.Kind
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return lambda kind, data: struct.unpack(kind.order + kind.code, data)[0]
        if (module, name) == ("_codecs", "encode"):                  # bytes in old pickles
            return lambda text, _: text.encode("latin1")
        if (module, name) in (("collections", "defaultdict"), ("collections", "OrderedDict")):
            return lambda *_: {}
        if module in ("builtins", "__builtin__") and name in ("dict", "list", "str", "float", "int"):
            return {"dict": dict, "list": list, "str": str, "float": float, "int": int}[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no score file needs")


def read_ranks(path: str, count: int) -> dict[str, list[str]]:
    """{"<annotation id>_<action uid>": [the first `count` node ids, best first]} of Mind2Web's score file."""
    try:
        with open(path, "rb") as file:
            ranks = RankReader(file).load()["ranks"]
        first = {key: sorted((rank, node) for node, rank in nodes.items() if rank < count) for key, nodes in ranks.items()}
        return {key: [str(node) for _, node in nodes] for key, nodes in first.items()}
    except Exception as error:                                       # a broken pickle can raise anything
        raise InputError(f"{path}: not Mind2Web's score file, {{'scores': .., 'ranks': {{sample: {{node: rank}}}}}} "
                         f"({type(error).__name__}: {error}); download it again") from None


# ---------------------------------------------------------------------------------------------------------------------
# HotpotQA (Yang et al., 2018), 2WikiMultihopQA (Ho et al., 2020), MuSiQue (Trivedi et al., 2022)
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Question:
    text: str
    answers: list[str]                                               # the answer, then its aliases (MuSiQue)
    kind: str                                                        # the task type
    pages: dict[str, str]                                            # title -> this question's own paragraphs of that title
    hops: list[tuple[str, str, str]]                                 # the expert's: title, what it wants to know, what it read


def _clean(text: str) -> str:
    """On one line, with HTML entities resolved (HotpotQA's titles have them)."""
    return " ".join(re.sub(r"&#?\w+;", lambda m: html.unescape(m[0]), text).split())


def _pairs(row: dict, key: str, where: str, fits, shape: str) -> list[tuple[str, Any]]:
    """HotpotQA's and 2Wiki's lists of [title, something], titles cleaned."""
    _need(isinstance(row.get(key), list), where, f"{key!r} is missing or not a list")
    for i, pair in enumerate(row[key]):
        _need(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and fits(pair[1]), where,
              f"{key}[{i}] is not [title, {shape}]")
    return [(_clean(title), thing) for title, thing in row[key]]


def _context(row: dict, where: str) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """title -> sentences, and title -> numbers of its supporting sentences."""
    pages, facts, texts = {}, {}, lambda x: isinstance(x, list) and all(isinstance(s, str) for s in x)
    for title, sentences in _pairs(row, "context", where, texts, "[sentence, ...]"):
        pages.setdefault(title, []).extend(sentences)
    for title, number in _pairs(row, "supporting_facts", where, lambda x: type(x) is int, "sentence number"):
        facts.setdefault(title, []).append(number)
    return pages, facts


def named(title: str, text: str) -> bool:
    """Whether a text names a page; "(film)" and the like need not be there."""
    return re.sub(r" \([^()]*\)$", "", title).lower() in text.lower()


def _read_hotpot(row: dict, where: str) -> Question:
    """The expert's order: pages that the question or a page read before names come first. It quotes one marked sentence of each."""
    text, answer, (sentences, facts) = _text(row, "question", where), _text(row, "answer", where), _context(row, where)
    pages, todo, hops, read = {t: _clean(" ".join(s)) for t, s in sentences.items()}, list(facts), [], text
    while todo:
        title = next((t for t in todo if named(t, read)), todo[0])
        todo.remove(title)
        read += pages.get(title, "")
        marked = [sentences[title][n] for n in facts[title] if 0 <= n < len(sentences[title])] if title in pages else []
        telling = [s for s in marked if any(named(t, s) for t in todo) or not todo and named(answer, s)] + marked
        hops.append((title, "", f"I read about {title}: {_clean(telling[0])}" if telling else f"I have read about {title}."))
    kind = f"{_text(row, 'type', where)} {_text(row, 'level', where)}"
    return Question(text, [answer], kind, pages, hops)


def _read_2wiki(row: dict, where: str) -> Question:
    """The expert's order: the evidences, (subject, relation, object), each read on its subject's page. Its title is in the
    supporting facts, which have the same order."""
    (pages, facts), evidences = _context(row, where), row.get("evidences")
    _need(isinstance(evidences, list) and all(isinstance(e, list) and len(e) == 3 and all(isinstance(x, str) for x in e)
                                              for e in evidences), where, "'evidences' is missing or not a list of triples of text")
    titles = list(facts) or [subject for subject, _, _ in evidences]
    hops = []
    for i, (subject, relation, thing) in enumerate(evidences):
        title = subject if subject in titles else titles[min(i, len(titles) - 1)]
        hops.append((title, f"I want to know the {relation} of {title}.", f"The {relation} of {title} is {thing}."))
    return Question(_text(row, "question", where), [_text(row, "answer", where)], _text(row, "type", where),
                    {t: _clean(" ".join(s)) for t, s in pages.items()}, hops)


def _read_musique(row: dict, where: str) -> Question:
    """The expert's order: the decomposition, whose later questions use the earlier answers as #1, #2, .."""
    _need(row.get("answerable", True) is True, where, "'answerable' is not true; use the musique_ans files")
    paragraphs, pages, answers, hops = _items(row, "paragraphs", where), {}, [], []
    titles = [_clean(_text(p, "title", at)) for p, at in paragraphs]
    for title, (p, at) in zip(titles, paragraphs):
        pages[title] = f"{pages.get(title, '')}\n{_clean(_text(p, 'paragraph_text', at))}".strip()
    for part, at in _items(row, "question_decomposition", where):
        place = part.get("paragraph_support_idx")
        _need(type(place) is int and 0 <= place < len(titles), at, "'paragraph_support_idx' is not the number of a paragraph")
        asked = _text(part, "question", at)
        for n, answer in enumerate(answers, 1):
            asked = asked.replace(f"#{n}", answer)
        subject, arrow, relation = asked.partition(" >> ")
        wanted = f"I want to know this about {subject}: {relation}." if arrow else f"I want to know this: {asked.rstrip('?')}?"
        answers.append(_text(part, "answer", at))
        hops.append((titles[place], wanted, f"I have found this: {answers[-1]}."))
    aliases, hop = row.get("answer_aliases", []), re.match("[0-9]hop", _text(row, "id", where))
    _need(isinstance(aliases, list) and all(isinstance(a, str) for a in aliases), where, "'answer_aliases' is not a list of text")
    _need(hop is not None, where, f"the id {row['id']!r} does not start with the number of hops, as in 2hop__1_2")
    return Question(_text(row, "question", where), [_text(row, "answer", where), *aliases], hop[0], pages, hops)


QA_BENCHMARKS = {                                                    # reader, {file: (official name, pattern for samples)}, source
    "hotpotqa": (_read_hotpot, {"train": ("hotpot_train_v1.1.json", "hotpot_train*.json"),
                                "dev": ("hotpot_dev_distractor_v1.json", "hotpot_dev_distractor*.json")}, "hotpotqa.github.io"),
    "2wikimultihopqa": (_read_2wiki, {"train": ("train.json", "train*.json"), "dev": ("dev.json", "dev*.json")},
                        "github.com/Alab-NII/2wikimultihop"),
    "musique": (_read_musique, {"train": ("musique_ans_v1.0_train.jsonl", "musique_ans*train*.jsonl"),
                                "dev": ("musique_ans_v1.0_dev.jsonl", "musique_ans*dev*.jsonl")}, "github.com/StonyBrookNLP/musique"),
}
QA_PAPER = {                                                         # Table 1; of each the paper used 5,000 / 500 / 500
    "hotpotqa": {"train": 90447, "dev": 7405, "test": 7405, "turns": 7.0},
    "2wikimultihopqa": {"train": 167454, "dev": 12576, "test": 12576, "turns": 8.2},
    "musique": {"train": 19938, "dev": 2417, "test": 2417, "turns": 7.8},
}


def normalize_answer(text: str) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(answer: str, gold: str, squad: bool = False) -> float:
    """F1 of the bags of normalised words. HotpotQA's and 2Wiki's scripts give yes, no and noanswer nothing in part and an answer
    without words nothing at all; squad: MuSiQue's has no such words, and no words match no words."""
    answer, gold = normalize_answer(answer), normalize_answer(gold)
    a, g = answer.split(), gold.split()
    if not a or not g:
        return float(squad and a == g)
    if answer != gold and not squad and {answer, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    return 2 * sum((Counter(a) & Counter(g)).values()) / (len(a) + len(g))


def parse_call(action: str | None) -> tuple[str, str] | None:
    """("search" | "finish", its argument), or None. The bracket may hold brackets; what follows its end is ignored, and a missing
    end is forgiven."""
    match = re.match(r"(search|finish)\s*\[(.*)", action or "", re.IGNORECASE)
    if not match:
        return None
    argument, depth = match[2], 1
    for i, c in enumerate(argument):
        depth += (c == "[") - (c == "]")
        if depth == 0:
            argument = argument[:i]
            break
    argument = argument.strip()
    return (match[1].lower(), argument) if argument else None


def _key(title: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", title).casefold().split())


def _words(title: str) -> list[str]:
    """Lower-case words without accents."""
    return re.findall(r"\w+", "".join(c for c in unicodedata.normalize("NFKD", title.casefold()) if not unicodedata.combining(c)))


class Titles:
    """All titles, to be found by name or by likeness. A dictionary of words, built once, then only read."""
    COMMON = 5000                                                    # a word in more titles than this says little, and is slow

    def __init__(self, titles: list[str]):
        self.titles, self.exact, self.loose, self.having, self.sizes = titles, {}, {}, {}, []
        for i, title in enumerate(titles):
            words = list(dict.fromkeys(_words(title)))
            self.exact.setdefault(_key(title), title)
            self.loose.setdefault(" ".join(_words(title)), title)
            self.sizes.append(len(words))
            for word in words:
                self.having.setdefault(word, []).append(i)
        self.vocabulary = sorted(self.having)

    def find(self, name: str) -> str | None:
        """The title of that name: letter for letter but for case, else but for punctuation and accents (the first such)."""
        words = " ".join(_words(name))
        return self.exact.get(_key(name)) or (self.loose.get(words) if words else None)

    def similar(self, name: str) -> list[str]:
        """The five titles that share most words with the name, rare ones counting more, and have few others. An unknown word
        counts as its neighbours in the alphabet, by the share of letters that they begin with alike."""
        weights: dict[str, float] = {}
        for word in _words(name):
            place = bisect.bisect(self.vocabulary, word)
            for w in [word] if word in self.having else self.vocabulary[max(0, place - 3):place + 3]:
                alike = (1 + len(os.path.commonprefix([w, word]))) / (1 + max(len(w), len(word)))
                weights[w] = max(weights.get(w, 0), alike * math.log(1 + len(self.titles) / len(self.having[w])))
        scores: Counter = Counter()
        for word in sorted(weights, key=lambda w: len(self.having[w])):
            having = self.having[word]                               # common words only add to what rare ones found
            for i in having if len(scores) < 5 or len(having) <= self.COMMON else scores.keys() & set(having):
                scores[i] += weights[word]
        best = heapq.nsmallest(5, scores, key=lambda i: (-scores[i] / (len(weights) + self.sizes[i]), i))
        return [self.titles[i] for i in best]


@dataclass
class QAEpisode:
    world: QA
    question: Question
    reward: float = 0.0
    f1: float = 0.0
    over: bool = False

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. An action that is neither a search nor an answer changes nothing. f1 is 0 until there is an answer."""
        call = None if self.over else parse_call(parse_action(text))
        if call is None:
            observation = "The question is already answered." if self.over else \
                "That is not an action. Write Search[entity] or Finish[answer]."
        elif call[0] == "search":
            observation = self.world.search(self.question, call[1])
        else:
            answers, squad = self.question.answers, self.world.name == "musique"
            self.reward = float(self.world.matches(self.question, call[1]))
            self.f1, self.over = max(answer_f1(call[1], a, squad) for a in answers), True
            observation = f"Your answer is {'right' if self.reward else 'wrong'}."
        return observation, self.reward, self.over, {"valid": call is not None, "f1": self.f1}


class QA:
    """Questions that need several pages. Searches run over all paragraphs of the files. Where several share a title, one sees those
    that belong to the question, else those of the first question that has the title: HotpotQA and 2Wiki have one of each page, its
    first; MuSiQue may have several, and the answer in any of them. Task ids are the files' own.
    data: the folder of the files, by default the benchmark's own in the folder named by STEPAGENT_DATA. train: 5,000 questions of the
    train file; dev, test: 500 each of the dev file (of a smaller one, a half each), all in the order of their ids' sha1.
    train_from_dev: for want of a train file, takes that many questions of the dev file for train, before dev and test."""

    SIZES = {"train": 5000, "dev": 500, "test": 500}
    instruction = (
        "You answer a question with the help of an encyclopedia. The answer takes several pages. You see a page's first paragraph "
        "only when you search for it.\n"
        "Your actions:\n"
        "Search[entity]: reads the page with this title; if there is none, lists the five most similar titles\n"
        "Finish[answer]: gives your answer and ends. The answer is a name, a date, a number or a short phrase from the pages, "
        "or yes or no: the words alone, no sentence\n"
        "You have 12 turns. Reply each time with:\nThought: your reasoning\nAction: your action")

    def __init__(self, name: str, data: str | None = None, train_from_dev: int = 0):
        _need(type(train_from_dev) is int and train_from_dev >= 0, name,
              f"train_from_dev must be a whole number, not {train_from_dev!r}")
        self.name, self.paper, self.questions, root = name, QA_PAPER[name], {}, os.environ.get("STEPAGENT_DATA")
        if name == "musique":
            self.instruction = self.instruction.replace("a page's first paragraph only", "the paragraphs of a page that are at hand only")
        reader, self.files, source = QA_BENCHMARKS[name]
        self.folder = str(data) if data else (os.path.join(root, name) if root else None)
        official = " and ".join(file for file, _ in self.files.values())
        _need(bool(self.folder), name, f"no data; download {official} from {source} into a folder and give it as data=FOLDER (or put "
              f"them into {name}/ of the folder named by the variable STEPAGENT_DATA)")
        paths = {split: self.file(split) for split in ("train", "dev")}
        _need(bool(paths["dev"] and (paths["train"] or train_from_dev)), name,
              f"{self.folder} has no {self.files['train' if paths['dev'] else 'dev'][0]}; download {official} from "
              f"{source} into it" + ", or take N train questions from the dev file: train_from_dev=N" * bool(paths["dev"]))
        _need(not (paths["train"] and train_from_dev), name,
              f"train_from_dev is for want of a train file, but {paths['train']} is there")
        self.pages: dict[str, str] = {}
        rows = {split: self.rows(path) for split, path in paths.items() if path}
        order = {split: sorted(ids, key=lambda i: hashlib.sha1(i.encode()).hexdigest()) for split, ids in rows.items()}
        train = order["train"][:self.SIZES["train"]] if "train" in order else order["dev"][:train_from_dev]
        rest = order["dev"][len(train) * ("train" not in order):]
        half = min(self.SIZES["dev"], len(rest) // 2)
        self.splits = {"train": train, "dev": rest[:half], "test": rest[half:half + self.SIZES["test"]]}
        _need(all(self.splits.values()), name, f"the dev file has {len(order['dev'])} questions: too few; each split needs one")
        chosen = set().union(*self.splits.values())
        for split, path in paths.items():
            while split in rows and rows[split]:                     # frees each row once read: the full files take gigabytes
                task, (row, where) = next(iter(rows[split].items()))
                del rows[split][task]
                question = reader(row, where)
                question.text, question.answers = _clean(question.text), [_clean(answer) for answer in question.answers]
                _need(question.answers[0] != "", where, "'answer' is empty")
                for title, text in question.pages.items():
                    self.pages.setdefault(title, text)
                if task in chosen:
                    _need(task not in self.questions, where, f"the id {task!r} is also in the other file; keep it in one")
                    self.questions[task] = question
        self.titles = Titles(list(self.pages))

    def file(self, split: str) -> str | None:
        """The official file, or else the only one that looks like it."""
        official, pattern = self.files[split]
        found = sorted(glob.glob(os.path.join(glob.escape(self.folder), pattern)))
        exact = [path for path in found if os.path.basename(path) == official]
        _need(len(exact or found) < 2, self.folder, f"has {len(found)} files like {pattern}; keep one, or name it {official}")
        return (exact or found or [None])[0]

    def rows(self, path: str) -> dict[str, tuple[dict, str]]:
        """id -> (row, its place for error messages)."""
        text, rows, first = _contents(path, "a file of questions"), {}, {}
        if path.endswith(".jsonl"):
            lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
            entries = [(where, _json(line, where)) for where, line in lines]
        else:
            entries = _json(text, path)
            _need(isinstance(entries, list), path, "is not a JSON list of questions")
            entries = [(f"{path}, entry {i}", row) for i, row in enumerate(entries)]
        for where, row in entries:
            _need(isinstance(row, dict), where, "is not a JSON object; expected one question")
            task = _text(row, "_id" if "_id" in row else "id", where)
            _need(task not in rows, where, f"repeats the id {task!r} of {first.get(task)}; keep one")
            rows[task], first[task] = (row, where), where.rsplit(", ", 1)[1]
        return rows

    @functools.cached_property
    def example(self) -> str:
        """The shortest play among the first 100 train questions."""
        return min((render(t) for t in map(self.expert, self.splits["train"][:100]) if t and t.reward == 1), key=len,
                   default="")

    def question(self, task_id: str) -> Question:
        _need(task_id in self.questions, self.name,
              f"there is no task {task_id!r}; tasks are the ids of the files' questions, such as {self.splits['train'][0]}")
        return self.questions[task_id]

    def max_steps(self, task_id: str) -> int:
        return 12

    def task_type(self, task_id: str) -> str:
        return self.question(task_id).kind

    def right(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Of an expert file's plays those whose answer is an exact match, as in the paper. Where the question is one of the files', that
        file's answer decides, and the play gets the task's id; where it is not, the play's own reward."""
        ids, kept = {q.text: task for task, q in self.questions.items()}, []
        for t in trajectories:
            task = t.task_id if t.task_id in self.questions else ids.get(_clean(t.task_id))
            call, reward = parse_call(parse_action(t.steps[-1].action)), t.reward
            if task:
                reward = float(bool(call) and call[0] == "finish" and self.matches(self.questions[task], call[1]))
            if reward >= 1:
                kept.append(dataclasses.replace(t, task_id=task or t.task_id, reward=reward))
        return kept

    @staticmethod
    def matches(question: Question, answer: str) -> bool:
        return any(normalize_answer(answer) == normalize_answer(a) for a in question.answers)

    def search(self, question: Question, name: str) -> str:
        title = name if name in self.pages else self.titles.find(name)             # "HALO" and "Halo" may be two pages
        if title is None:
            return f"There is no page {_clean(name)}. Similar titles: {'; '.join(self.titles.similar(name)) or 'none'}."
        return question.pages.get(title) or self.pages[title]

    def start(self, task_id: str) -> tuple[QAEpisode, str]:
        question = self.question(task_id)
        return QAEpisode(self, question), f"Question: {question.text}"

    def expert(self, task_id: str) -> Trajectory | None:
        """Reads the pages that the annotators marked, in an order that a reader could follow. A thought says what the last page told,
        what to find next, and whether the question or a page read so far names the next page. None: a marked page is missing."""
        (episode, observation), trajectory = self.start(task_id), Trajectory(task_id)
        question, read, facts, thought = episode.question, {}, [], []
        if not question.hops or any(title not in question.pages for title, _, _ in question.hops):
            return None
        def act(action: str) -> str:
            trajectory.steps.append(Step(observation, f"Thought: {_clean(' '.join(thought))}\nAction: {action}"))
            told, trajectory.reward, _, _ = episode.step(trajectory.steps[-1].action)
            return told
        for title, wanted, fact in question.hops:
            thought += [wanted] if wanted else []
            if title not in read:
                thought.append(f"The question names {title}." if named(title, question.text) else
                               f"I have read of {title}." if named(title, " ".join([*read.values(), *facts])) else
                               f"Nothing so far names the page. I try {title}.")
                read[title] = observation = act(f"Search[{title}]")
                thought = []
            facts.append(fact)
            thought.append(fact)
        if "comparison" in question.kind:                            # weighs the last two facts against each other
            thought = facts[-2:]
        thought.append(f"So the answer is {question.answers[0]}.")
        act(f"Finish[{question.answers[0]}]")
        return trajectory


ENVIRONMENTS = {"household": Household, "scienceworld": ScienceWorld, "alfworld": ALFWorld, "webshop": WebShop, "mind2web": Mind2Web,
                **{name: functools.partial(QA, name) for name in QA_BENCHMARKS}}


FILES = {                                                            # what each needs, for --help and errors
    "household": "nothing",
    "scienceworld": "the package and Java; for split=eto train_indices.json, dev_indices.json, test_indices.json (github.com/Yifan-Song793/"
                    "ETO, eval_agent/data/sciworld)",
    "alfworld": "json_2.1.1/ with its games, as alfworld-download makes it",
    "webshop": f"{', '.join(WEBSHOP_FILES[1])} (github.com/princeton-nlp/WebShop, setup.sh -d small) or {', '.join(WEBSHOP_FILES[0])} "
               "(setup.sh -d all, and ETO's train_indices.json and test_indices.json for WebShop)",
    "mind2web": "train/*.json, test_domain/*.json and, if wanted, test_task/, test_website/ and scores_all_data.pkl (the Hugging Face data "
                "set osunlp/Mind2Web, its test.zip unpacked)",
    **{name: f"{' and '.join(file for file, _ in files.values())} ({source})" for name, (_, files, source) in QA_BENCHMARKS.items()}}


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


def env_options(text: str) -> dict:
    """"tasks=boil,melt variations=20" -> {"tasks": "boil,melt", "variations": 20}"""
    words = [word.partition("=") for word in text.split()]
    if wrong := [key for key, equals, value in words if not (equals and value)]:
        raise InputError(f"--env-options: {wrong[0]!r} is not key=value")
    number = lambda x: int(x) if re.fullmatch(r"-?\d+", x) else float(x) if re.fullmatch(r"-?\d*\.\d+", x) else x
    return {key: number(value) for key, _, value in words}


def some(tasks: list[str], most: int) -> list[str]:
    """At most so many tasks (0 = all), the same ones each time, from everywhere in the list: lists often go type by type."""
    chosen = set(sorted(tasks, key=stable_seed)[:most or None])
    return [task for task in tasks if task in chosen]


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
    """Prints, for each split and task type, how many tasks there are and how the expert does on them; first the paper's Table 1."""
    if paper := getattr(env, "paper", None):
        print("paper: " + ", ".join(f"{split} {paper[split] or '-'} tasks" for split in ("train", "dev", "test")) + f", {paper['turns']} turns")
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
    parser = argparse.ArgumentParser(
        description="Look at an environment.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="files, in the folder given as data=FOLDER, or in the environment's own folder within the one that STEPAGENT_DATA names:\n"
        + "\n".join(textwrap.fill(f"{name}: {text}", 120, initial_indent="  ", subsequent_indent="      ") for name, text in FILES.items())
        + "\n\noptions of each (its class says what they mean):\n"
        + "\n".join(f"  {name}: {', '.join(str(p).partition(':')[0] + '=' + str(p.default) for p in inspect.signature(make).parameters.values())}"
                    for name, make in ENVIRONMENTS.items()))
    parser.add_argument("env", help=f"one of: {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--task", default=None, help="a task id (default: the first train task)")
    parser.add_argument("--env-options", default="", help="options of the environment, as key=value words, e.g. 'data=FOLDER'")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stats", action="store_true", help="tasks, and the expert's turns and successes, by split and type")
    what.add_argument("--expert", action="store_true", help="print one episode of the expert")
    what.add_argument("--play", action="store_true", help="play one task yourself")
    args = parser.parse_args()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)                # ends quietly where `head` has read enough
    try:
        env = make_env(args.env, **env_options(args.env_options))
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
