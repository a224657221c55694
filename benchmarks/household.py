"""A small household in the spirit of ALFWorld (Shridhar et al., 2021).

The agent puts objects away, some of them cleaned, heated or cooled first, or examines them under
a lamp. Every house is generated from its task id: the world needs no files and no packages.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from benchmarks.files import kind, need, need_count, show, sound_number
from trajectory import Trajectory, parse_action, render

FILES = "nothing"

# Receptacle types: how many a house may have, and the preposition.
RECEPTACLES = {
    "cabinet": (3, "in"),
    "drawer": (3, "in"),
    "fridge": (1, "in"),
    "microwave": (1, "in"),
    "safe": (1, "in"),
    "sinkbasin": (1, "in"),
    "garbagecan": (1, "in"),
    "shelf": (3, "on"),
    "countertop": (2, "on"),
    "diningtable": (1, "on"),
    "sidetable": (2, "on"),
    "desk": (1, "on"),
    "dresser": (1, "on"),
    "sofa": (1, "on"),
    "bed": (1, "on"),
}
# One sees inside these only after opening them.
CLOSED = {"cabinet", "drawer", "fridge", "microwave", "safe"}
# Treatments: where each is done, and the state that it leaves.
STATION = {"clean": "sinkbasin 1", "heat": "microwave 1", "cool": "fridge 1"}
STATE = {"clean": "clean", "heat": "hot", "cool": "cool"}
UNDONE_BY = {"hot": "cool", "cool": "hot"}
# Where the desklamp stands.
LAMP = ["desk", "sidetable", "dresser"]
# Where the objects of a group may have to go.
GOALS = {
    "food": "fridge microwave countertop diningtable garbagecan sidetable",
    "ware": "cabinet drawer shelf countertop diningtable sinkbasin",
    "thing": "drawer safe shelf sidetable desk dresser sofa bed",
}
# Object types: group, likely places in search order, treatments.
OBJECTS = {
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
# Task types, with the word that stands before the object in the task's sentence.
OBJECT_WORD = {"put": "", "clean": "clean ", "heat": "hot ", "cool": "cool ", "put two": "two "}
TASK_TYPES = ["put", "clean", "heat", "cool", "put two", "examine"]
# test_unseen's share of the (object, destination) pairs of each task type.
HELD_OUT = 0.2
# dev_more is for tuning with less noise.
SIZES = {"train": 6000, "dev": 100, "dev_more": 400, "test": 300, "test_unseen": 300}


def at(receptacle: str) -> str:
    """ "cabinet 1" -> "in cabinet 1", "desk 1" -> "on desk 1"; types alone work too."""
    _, preposition = RECEPTACLES[receptacle.split()[0]]
    return f"{preposition} {receptacle}"


def likely_places(object_type: str) -> list[str]:
    """The receptacle types where an object usually is, in search order."""
    if object_type == "desklamp":
        return LAMP
    _, places, _ = OBJECTS[object_type]
    return places.split()


def numbered(types: list[str]) -> list[str]:
    """["mug", "pen", "mug"] -> ["mug 1", "pen 1", "mug 2"]."""
    return [f"{name} {types[: i + 1].count(name)}" for i, name in enumerate(types)]


def combinations() -> tuple[dict[str, list], dict[str, list]]:
    """(seen, held out): the (object, destination) pairs of each task type.

    Only the combination is held out: its object and its destination both occur in seen pairs.
    """
    rng = random.Random("household combinations")
    seen, held_out = {}, {}
    for task in TASK_TYPES:
        pairs = []
        for obj, (group, _, treatments) in OBJECTS.items():
            if task in ("put", "put two", *treatments.split()):
                goals = ["desklamp"] if task == "examine" else GOALS[group].split()
                # An object does not stay where it was treated.
                pairs += [(obj, goal) for goal in goals if f"{goal} 1" != STATION.get(task)]
        rng.shuffle(pairs)
        cut = round(HELD_OUT * len(pairs))
        held_out[task], seen[task] = pairs[:cut], pairs[cut:]
    return seen, held_out


@dataclass
class House:
    """The world of one task: its type, the wanted object type, and where it must go.

    goal is a receptacle type, or "desklamp". contents maps each receptacle to the objects there, in
    the order in which the agent reads them.
    """

    task: str
    obj: str
    goal: str
    contents: dict[str, list[str]]

    def sentence(self) -> str:
        if self.task == "examine":
            return f"examine {self.obj} under desklamp"
        return f"put {OBJECT_WORD[self.task]}{self.obj} {at(self.goal)}"


@dataclass
class HouseholdEpisode:
    """One play of a task. All but the house changes as the agent plays."""

    house: House
    contents: dict[str, list[str]] = field(default_factory=dict)
    place: str | None = None
    hand: str | None = None
    opened: set[str] = field(default_factory=set)
    # Object -> its states: clean, hot, cool, lit.
    states: dict[str, set[str]] = field(default_factory=dict)
    reward: float = 0.0

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. What is not understood or not possible changes nothing."""
        action = parse_action(text)
        observation = self.act(action) if action and not self.reward else None
        if observation and self.solved():
            self.reward = 1.0
        info = {"valid": observation is not None}
        return observation or "Nothing happens.", self.reward, self.reward == 1.0, info

    def act(self, action: str) -> str | None:
        """Carries one action out. Returns what the agent sees, or None if it cannot be done."""
        here, hand, visible = self.place, self.hand, self.visible()
        if action in ("look", here and f"examine {here}"):
            return self.view()
        # A numbered name such as "mug 1" counts as one word. Between words is one space.
        match re.split(r" (?![0-9]+(?: |$))", action):
            case ["go", "to", place] if place in self.contents and place != here:
                self.place = place
                return self.view()
            case ["open", place] if place == here and self.shut(place):
                self.opened.add(place)
                return self.view()
            case ["close", place] if place == here and place in self.opened:
                self.opened.remove(place)
                return self.view()
            case ["take", obj, "from", place] if (
                place == here and obj in visible and not hand and obj != "desklamp 1"
            ):
                visible.remove(obj)
                self.hand = obj
                return f"You take {obj}."
            case ["put", obj, "in/on" | "in" | "on", place] if (
                obj == hand and place == here and not self.shut(place)
            ):
                self.contents[place].append(obj)
                self.hand = None
                return f"You put {obj} {at(place)}."
            case ["clean" | "heat" | "cool" as verb, obj, "with", place] if (
                obj == hand and place == here == STATION[verb]
            ):
                states = self.states.setdefault(obj, set())
                states.discard(UNDONE_BY.get(STATE[verb]))
                states.add(STATE[verb])
                return f"You {verb} {obj}."
            case ["use", "desklamp 1"] if "desklamp 1" in visible:
                self.states.setdefault(hand or "", set()).add("lit")
                return "You use desklamp 1."
            case ["examine", obj] if obj == hand or obj in visible:
                states = self.states.get(obj, set()) - {"lit"}
                return f"{obj} is {' and '.join(sorted(states)) or 'normal'}."
            case ["inventory"]:
                return f"You have {hand or 'nothing'}."
        return None

    def view(self) -> str:
        if not self.place:
            return f"You are in a house with {', '.join(self.contents)}."
        if self.shut(self.place):
            return f"The {self.place} is closed."
        return f"{at(self.place).capitalize()}: {', '.join(self.visible()) or 'nothing'}."

    def visible(self) -> list[str]:
        """The objects that the agent sees where it is."""
        if not self.place or self.shut(self.place):
            return []
        return self.contents[self.place]

    def shut(self, receptacle: str) -> bool:
        return kind(receptacle) in CLOSED and receptacle not in self.opened

    def solved(self) -> bool:
        house = self.house
        if house.task == "examine":
            # Lit while the agent held it.
            lit = [obj for obj, states in self.states.items() if "lit" in states]
            return house.obj in map(kind, lit)
        placed = 0
        for receptacle, objects in self.contents.items():
            for obj in objects:
                wanted = kind(receptacle) == house.goal and kind(obj) == house.obj
                states = self.states.get(obj, set())
                placed += wanted and (house.task not in STATE or STATE[house.task] in states)
        return placed >= (2 if house.task == "put two" else 1)


class HouseholdExpert:
    """Plays by rule from what it reads, never from the world itself.

    It searches the object's likely places first, then the others in the order of the house's list,
    remembers what it saw, treats the object, and puts it where it must go. Every situation has one
    wording: equal actions mean equal choices.
    """

    def __init__(self, first_observation: str):
        listed, task = re.fullmatch(
            r"You are in a house with (.*)\. Your task: (.*)\.", first_observation
        ).groups()
        self.places = listed.split(", ")
        if match := re.fullmatch(r"examine (\w+) under desklamp", task):
            self.task, self.obj, self.goal = "examine", match[1], "desklamp"
        else:
            match = re.fullmatch(r"put (\w+ )?(\w+) (?:in|on) (\w+)", task)
            task_of_word = {word: task for task, word in OBJECT_WORD.items()}
            self.task, self.obj, self.goal = task_of_word[match[1] or ""], match[2], match[3]
        # Receptacle -> the objects there, as far as the expert knows.
        self.seen: dict[str, list[str]] = {}
        self.place: str | None = None
        self.hand: str | None = None
        # What it put at the goal.
        self.stored: str | None = None
        # What happened last: see, take, put or treat.
        self.event = ""
        self.closed = False
        self.treated = False

    def turn(self, observation: str) -> str:
        """The next ReAct turn after an observation."""
        self.read(observation)
        thought, action = self.decide()
        if action.startswith("go to "):
            self.place, self.closed = action.removeprefix("go to "), False
        return f"Thought: {thought}\nAction: {action}"

    def read(self, observation: str) -> None:
        self.closed = observation.endswith(" is closed.")
        if match := re.fullmatch(r"(?:In|On) (\w+ \d+): (.*)\.", observation):
            self.event = "see"
            self.seen[match[1]] = [] if match[2] == "nothing" else match[2].split(", ")
        elif match := re.fullmatch(r"You take (.*)\.", observation):
            self.event, self.hand = "take", match[1]
            self.seen[self.place] = [o for o in self.seen.get(self.place, []) if o != self.hand]
        elif match := re.fullmatch(r"You put (\w+ \d+) .*", observation):
            self.event, self.hand, self.stored = "put", None, match[1]
            self.seen.setdefault(self.place, []).append(self.stored)
        # An agent whose play it reads may treat an object for no reason.
        elif self.task in STATION and observation.startswith(f"You {self.task} "):
            self.event, self.treated = "treat", True

    def decide(self) -> tuple[str, str]:
        """(thought, action). StopIteration: it has looked everywhere in vain."""
        hand, task, goal = self.hand, self.task, f"{self.goal} 1"
        if not hand or task == "examine":
            return self.fetch("desklamp" if hand else self.obj)
        if task in STATION and not self.treated:
            station = STATION[task]
            if self.place != station:
                return f"I have {hand}. I {task} it with {station}.", f"go to {station}"
            return f"I have {hand} at {station}. I {task} it.", f"{task} {hand} with {station}"
        held = f"{STATE[task]} {hand}" if self.treated else hand
        if self.place != goal:
            return f"I have {held}. I put it {at(goal)}.", f"go to {goal}"
        if self.closed:
            return f"{goal} is closed. I open it.", f"open {goal}"
        return f"I have {held} at {goal}. I put it.", f"put {hand} in/on {goal}"

    def fetch(self, what: str) -> tuple[str, str]:
        """Goes to a thing of that kind and takes it, or uses it: the lamp, with a full hand."""
        known = []
        for receptacle, objects in self.seen.items():
            if kind(receptacle) != self.goal:
                known += [(obj, receptacle) for obj in objects if kind(obj) == what]
        if not known:
            return self.search(what)
        # One that is here comes first.
        obj, receptacle = min(known, key=lambda pair: pair[1] != self.place)
        if receptacle != self.place:
            before = f"I have {self.hand}" if self.hand else f"{self.stored} is done"
            return f"{before}. I saw {obj} {at(receptacle)}.", f"go to {receptacle}"
        if self.hand:
            return f"I have {self.hand} at {obj}. I use it.", f"use {obj}"
        return f"I see {obj}. I take it.", f"take {obj} from {receptacle}"

    def search(self, what: str) -> tuple[str, str]:
        """Opens the receptacle that it is at, or goes to the next one."""
        if self.closed:
            return f"{self.place} is closed. I open it.", f"open {self.place}"
        likely = likely_places(what)
        order = [place for place in self.places if kind(place) in likely]
        order.sort(key=lambda place: (likely.index(kind(place)), place))
        order += [place for place in self.places if kind(place) not in likely]
        target = next(r for r in order if r not in self.seen and kind(r) != self.goal)
        if not self.place:
            return f"I must find {self.plan()}. I look {at(target)} first.", f"go to {target}"
        if self.event == "take":
            why = f"I have {self.hand} but no desklamp"
        elif self.event == "put":
            # Of two objects, the second is still missing.
            why = f"{self.stored} is done"
        else:
            why = f"No {what} {at(self.place)}"
            if self.task == "examine" and "desklamp 1" in self.seen[self.place]:
                why += " but I see desklamp 1"
        return f"{why}. I look {at(target)} next.", f"go to {target}"

    def plan(self) -> str:
        if self.task == "examine":
            return f"{self.obj} and desklamp"
        if self.task == "put two":
            return f"two {self.obj} and put them {at(self.goal)}"
        treatment = f", {self.task} it" if self.task in STATION else ""
        return f"{self.obj}{treatment} and put it {at(self.goal)}"


class Household:
    """Tidying tasks in generated houses.

    A task id is "<split>-<number>". Its house depends on the id and on the options only.
    receptacles: how many a house has. distractors: how many objects besides the wanted ones.
    likely: the chance that an object lies in one of its likely places; otherwise the place is
    random. max_steps: steps allowed. By default the expert needs at most 19.
    """

    instruction = (
        "You live in a house and solve a task there. Objects and receptacles have a name and a "
        "number, such as mug 1. You see only the receptacle that you are at, must open it if it "
        "is closed, and can hold one object. At the start no object is where you must put it.\n"
        "Your actions: go to R, open R, close R, take O from R, put O in/on R, clean O with R, "
        "heat O with R, cool O with R, use O, examine O, examine R, look, inventory. R is a "
        "receptacle and O an object. Clean with sinkbasin 1, heat with microwave 1, cool with "
        "fridge 1. To examine an object under desklamp, hold it and use desklamp 1. An action "
        "that is not possible gives: Nothing happens.\n"
        "Reply each time with:\nThought: your reasoning\nAction: your action"
    )

    def __init__(
        self, receptacles: int = 8, distractors: int = 6, likely: float = 0.75, max_steps: int = 20
    ):
        most = sum(limit for limit, _ in RECEPTACLES.values())
        need_count("household", "receptacles", receptacles, 5, most)
        need_count("household", "distractors", distractors, 0, 1000)
        need_count("household", "max_steps", max_steps, 1, 1000)
        sound_number(likely, "household", "likely", 0, 1)
        self.receptacles = receptacles
        self.distractors = distractors
        self.likely = likely
        self.limit = max_steps
        self.seen, self.held_out = combinations()
        self.splits = {}
        for split, size in SIZES.items():
            self.splits[split] = [f"{split}-{i}" for i in range(size)]
        # The expert solves it in few steps.
        self.example = render(self.expert("train-1"))

    def max_steps(self, task_id: str) -> int:
        return self.limit

    def task_type(self, task_id: str) -> str:
        match = re.fullmatch(r"(\w+)-(0|[1-9][0-9]{0,8})", task_id)
        splits = ", ".join(f"{split}-0 .. {split}-{size - 1}" for split, size in SIZES.items())
        exists = match is not None and int(match[2]) < SIZES.get(match[1], 0)
        need(exists, "household", f"there is no task {task_id!r}; tasks are {splits}")
        return TASK_TYPES[int(match[2]) % len(TASK_TYPES)]

    def house(self, task_id: str) -> House:
        task = self.task_type(task_id)
        rng = random.Random(f"household:{task_id}")
        return self.generate(rng, task, held_out=task_id.startswith("test_unseen"))

    def generate(self, rng: random.Random, task: str, held_out: bool) -> House:
        """A random house with a task of the given type."""
        pairs = self.held_out if held_out else self.seen
        obj, goal = rng.choice(pairs[task])
        places = self.choose_receptacles(rng, goal)
        contents = {place: [] for place in places}
        for name in ["desklamp 1", *self.choose_objects(rng, task, obj)]:
            # At the start no object is where it must be put.
            free = [place for place in places if kind(name) != obj or kind(place) != goal]
            contents[self.choose_place(rng, name, free)].append(name)
        return House(task, obj, goal, contents)

    def choose_receptacles(self, rng: random.Random, goal: str) -> list[str]:
        """The stations, one for the lamp, the goal, and others at random."""
        types = ["fridge", "microwave", "sinkbasin", rng.choice(LAMP)]
        if goal not in [*types, "desklamp"]:
            types.append(goal)
        spare = []
        for receptacle, (limit, _) in RECEPTACLES.items():
            spare += [receptacle] * (limit - types.count(receptacle))
        types += rng.sample(spare, self.receptacles - len(types))
        places = numbered(types)
        rng.shuffle(places)
        return places

    def choose_objects(self, rng: random.Random, task: str, obj: str) -> list[str]:
        """Enough of the wanted kind, and distractors of other kinds."""
        copies = rng.choice([2, 2, 3] if task == "put two" else [1, 1, 2])
        others = [other for other in OBJECTS if other != obj]
        objects = numbered([obj] * copies + [rng.choice(others) for _ in range(self.distractors)])
        rng.shuffle(objects)
        return objects

    def choose_place(self, rng: random.Random, name: str, free: list[str]) -> str:
        usual = [place for place in free if kind(place) in likely_places(kind(name))]
        if usual and (name == "desklamp 1" or rng.random() < self.likely):
            return rng.choice(usual)
        return rng.choice(free)

    def start(self, task_id: str) -> tuple[HouseholdEpisode, str]:
        house = self.house(task_id)
        contents = {place: list(objects) for place, objects in house.contents.items()}
        episode = HouseholdEpisode(house, contents)
        return episode, f"{episode.view()} Your task: {house.sentence()}."

    def expert(self, task_id: str) -> Trajectory:
        episode, observation = self.start(task_id)
        return show(task_id, self, episode, observation, HouseholdExpert(observation).turn)
