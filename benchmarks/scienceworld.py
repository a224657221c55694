"""ScienceWorld: 30 elementary science tasks (Wang et al., 2022), in the package's Java simulator.

The expert is the package's gold path, shortened for an agent that teleports, with thoughts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import weakref
from collections.abc import Iterator

from benchmarks.files import benchmark_folder, need, need_count, parse_json, read_contents
from trajectory import InputError, Step, Trajectory, parse_action, render

FILES = (
    "the package and Java; for split=eto train_indices.json, dev_indices.json, test_indices.json "
    "(github.com/Yifan-Song793/ETO, eval_agent/data/sciworld)"
)
# Steps allowed, as ETO set them for the 24 tasks that it uses. The package allows 100 in all.
STEP_LIMITS = {
    10: "lifespan-longest-lived lifespan-shortest-lived",
    12: "lifespan-longest-lived-then-shortest-lived",
    15: "find-animal find-living-thing find-non-living-thing find-plant "
    "chemistry-mix-paint-secondary-color",
    20: "power-component",
    30: "chemistry-mix-paint-tertiary-color grow-plant identify-life-stages-1 "
    "identify-life-stages-2 power-component-renewable-vs-nonrenewable-energy "
    "test-conductivity test-conductivity-of-unknown-substances use-thermometer",
    60: "chemistry-mix grow-fruit",
    80: "change-the-state-of-matter-of freeze melt",
    100: "boil",
    120: "measure-melting-point-known-substance",
}
MAX_STEPS = {name: limit for limit, names in STEP_LIMITS.items() for name in names.split()}
# Where bees must pollinate. Out of an open hive they fly at once and through all open doors. The
# expert shuts the greenhouse when it first sees the hive; who teleports needs no door.
POLLINATED = ("grow-fruit", "mendelian-genetics-known-plant", "mendelian-genetics-unknown-plant")
KEEP_BEES = ["close door to hallway", "close door to outside"]
# Read by every JVM from JAVA_TOOL_OPTIONS, as the package passes no options on. Unlimited, a JVM
# grows to gigabytes. The simulator iterates over hash sets of objects: with equal identity hashes,
# its texts and gold paths depend on the task and the actions, not on what was played before.
JAVA_OPTIONS = "-Xmx384m -XX:+UseSerialGC -XX:+UnlockExperimentalVMOptions -XX:hashCode=2"
# Thoughts of the expert: the first pattern that matches the action counts; {0}, {1}: its groups.
THOUGHTS = {
    r"teleport to (.+)": "What I need may be in the {0}, so I go there.",
    r"(?:go to|open door to) (.+)": "I want to get to the {0}, and this leads on.",
    r"focus on (.+)": "Of all I have seen the {0} fits best, so I focus on it.",
    r"pick up (.+)": "The {0} can be of use, so I take it.",
    r"drop (.+)": "I want my hands free, so I put the {0} down.",
    r"move (.+) to (.+)": "The next place for the {0} is the {1}, so I move it.",
    r"pour .+": "I want the liquid somewhere else, so I pour it.",
    r"mix (.+)": "The {0} holds what should react, so I mix it.",
    r"read (.+)": "The {0} may say what to do, so I read it.",
    r"close door to (.+)": "The bees must stay in here, so I close the door to the {0}.",
    r"(open|close) (.+)": "To go on I {0} the {1}.",
    r"activate (.+)": "I need the {0} to run, so I turn it on.",
    r"deactivate (.+)": "The {0} has run long enough, so I turn it off.",
    r"use (.+) on (.+)": "The {0} is the tool for the {1}, so I use it.",
    r"connect (.+) to (.+)": "The circuit needs the {0} joined to the {1}, so I connect them.",
    r"(?:examine|look at) (.+)": "I want to see how the {0} is now, so I look at it.",
    r"wait1?": "This takes time, so I wait.",
    r"\d+": "Any of these will do, so I choose one by its number.",
}
# The thoughts where the task's text names {0}.
THOUGHTS_ON_NAMED = {
    r"teleport to (.+)": "The task names the {0}, so I go there.",
    r"focus on (.+)": "The task asks for the {0}, so I focus on it.",
    r"pick up (.+)": "The task needs the {0}, so I take it.",
    r"move (.+) to (.+)": "The task needs the {0}, so I move it to the {1}.",
}
INSTRUCTION = """\
You carry out a science experiment in a house. Its rooms are the hallway, kitchen, living room, \
bedroom, bathroom, workshop, art studio, greenhouse, foundry and outside. You see only the room \
that you are in.{opened}
Your actions, where OBJ is a thing that you see and LOC a room:
look around, examine OBJ, look at OBJ, look in OBJ, read OBJ, inventory: find out more
teleport to LOC: be there at once; go to LOC: walk to a room next door
open OBJ, close OBJ, activate OBJ, deactivate OBJ, use OBJ on OBJ: doors, containers, devices and \
tools
pick up OBJ, drop OBJ, move OBJ to OBJ, pour OBJ into OBJ, dunk OBJ into OBJ: move things
mix OBJ: let what is in a container react
connect OBJ to OBJ, disconnect OBJ: electrical parts, as in connect battery anode to red wire \
terminal 1
eat OBJ, flush OBJ
focus on OBJ: show that OBJ is what the task asks for; a wrong OBJ ends the task
wait: let 10 moments pass; wait1: let one pass
a number: your choice, when you are asked which of several you mean
Reply each time with:
Thought: your reasoning
Action: your action"""


class ScienceWorldEpisode:
    """One task, in a simulator that `world` lends until the episode is done, closed or dropped."""

    simulator = None

    def __init__(self, world: ScienceWorld, task_id: str):
        name, variation = world.check(task_id)
        self.world = world
        self.simulator = world.borrow()
        self.reward = 0.0
        server = self.simulator.server
        # Seeds all chance, too, with the variation.
        server.load(name, variation, world.simplification, False)
        # As in the package's reset: renews score and completed, and lets a moment pass.
        server.step("look around")
        # As in ETO: the agent must look around itself.
        self.first = server.getTaskDescription().strip()

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. The reward is the best score so far, as a wrong focus scores -100.

        An ambiguous action counts as understood: the package asks for one of several numbers.
        """
        if self.simulator is None:
            return "The task is over.", self.reward, True, {"valid": False}
        # The package's own step would list all valid actions, too, which is many times slower.
        server = self.simulator.server
        action = parse_action(text)
        observation = "No known action matches that input."
        if action:
            observation = server.step(action).strip()
        # -1 to 1, in whole percents as in the package.
        score = round(server.getScore(), 2)
        self.reward = max(self.reward, score)
        done = bool(server.getCompleted()) or score < 0
        if done:
            self.close()
        valid = not observation.startswith(("No known action", "Unknown action"))
        return observation, self.reward, done, {"valid": valid}

    def close(self) -> None:
        """Gives the simulator back. Safe to repeat; an episode that is cut off needs it."""
        simulator, self.simulator = self.simulator, None
        if simulator is not None:
            # append and pop are atomic, so no lock is needed.
            self.world.idle.append(simulator)

    __del__ = close


class ScienceWorld:
    """Science experiments in ten rooms. Task ids are "<task>/<variation>", such as "boil/3".

    tasks: names to keep, as a list or text with commas; default: all.
    variations: at most so many of each task and split, evenly spread.
    simplification: names with commas. The default is ETO's. The package's "easy" is another one:
        without openContainers and, but for the electrical tasks, without electrical actions.
    split: "package", or "eto" for ETO's lists (1,483 / 194 / 211 tasks; 54 of dev are in train).
    data: the folder with ETO's lists; default: $STEPAGENT_DATA/scienceworld.
    """

    # A step takes as long as a token, so run_episodes overlaps the two.
    slow = True
    # Table 1.
    paper = {"train": 1483, "dev": 194, "test": 241, "turns": 14.4}

    def __init__(
        self,
        tasks: str | list[str] | None = None,
        variations: int | None = None,
        simplification: str = "teleportAction,selfWateringFlowerPots,openContainers,openDoors",
        split: str = "package",
        data: str | None = None,
    ):
        known_split = split in ("package", "eto")
        need(known_split, "scienceworld", f"split must be package or eto, not {split!r}")
        if variations is not None:
            need_count("scienceworld", "variations", variations, 1)
        lists = read_eto_lists(data) if split == "eto" else {}
        self.simplification = simplification
        self.all_open = "openContainers" in simplification
        opened = " All containers are open already." if self.all_open else ""
        self.instruction = INSTRUCTION.format(opened=opened)
        # All simulators, and those that no episode plays in.
        self.started, self.idle = [], []
        # Also at exit. The JVMs of a killed Python end by themselves.
        weakref.finalize(self, stop, self.started)
        simulator = self.borrow()
        known = simulator.get_task_names()
        self.sizes = {name: simulator.get_max_variations(name) for name in known}
        # ETO numbers the tasks by topic (the package's "3-2" is of topic 3), then by name.
        topics = {name: int(number.split("-")[0]) for number, name in simulator.tasks.items()}
        self.numbered = sorted(known, key=lambda name: (topics[name], name))
        names = tasks.split(",") if isinstance(tasks, str) else tasks or known
        names = [name.strip() for name in names]
        refuse_unknown(names + [name for part in lists.values() for name in part], known)
        simplifications = ["easy", *simulator.get_possible_simplifications()]
        refuse_unknown(list(filter(None, simplification.split(","))), simplifications)
        self.splits: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        for name in dict.fromkeys(names):
            # The package gives the splits of the loaded task.
            simulator.server.load(name, 0, simplification, False)
            for part, ids in self.splits.items():
                found = getattr(simulator, f"get_variations_{part}")()
                if lists:
                    found = lists[part].get(name, [])
                problem = f"{name} has no variation {max(found, default=0)}; is it of this package?"
                need(max(found, default=0) < self.sizes[name], f"{part}_indices.json", problem)
                count = min(len(found), variations or len(found))
                ids += [f"{name}/{found[i * len(found) // count]}" for i in range(count)]
        self.idle.append(simulator)

    @functools.cached_property
    def example(self) -> str:
        # A short one, from train.
        return render(self.expert("lifespan-shortest-lived/20"))

    def max_steps(self, task_id: str) -> int:
        return MAX_STEPS.get(self.task_type(task_id), 100)

    def task_type(self, task_id: str) -> str:
        return self.check(task_id)[0]

    def check(self, task_id: str) -> tuple[str, int]:
        """(task, variation), or InputError."""
        name, _, variation = task_id.partition("/")
        exists = variation.isdecimal() and int(variation) < self.sizes.get(name, 0)
        tasks = f"boil/0 .. boil/{self.sizes['boil'] - 1} and so on"
        need(exists, "scienceworld", f"there is no task {task_id!r}; tasks are {tasks}")
        return name, int(variation)

    def task_of(self, expert: Trajectory) -> str | None:
        """ETO's "9_412" is variation 412 of its task number 9."""
        task_id = expert.task_id
        number, _, variation = task_id.partition("_")
        if number.isdecimal() and int(number) < len(self.numbered):
            task_id = f"{self.numbered[int(number)]}/{variation}"
        with contextlib.suppress(InputError):
            self.check(task_id)
            return task_id
        return None

    def borrow(self):
        """A simulator for one episode alone: chance, object ids and simplifications are global."""
        # IndexError: none is idle.
        with contextlib.suppress(IndexError):
            return self.idle.pop()
        simulator = start_simulator(len(self.started) + 1)
        self.started.append(simulator)
        return simulator

    def start(self, task_id: str) -> tuple[ScienceWorldEpisode, str]:
        episode = ScienceWorldEpisode(self, task_id)
        return episode, episode.first

    def expert(self, task_id: str) -> Trajectory:
        """The best gold path of the package, with thoughts; whole, even beyond max_steps."""
        played = []
        for plan in self.plans(task_id):
            played.append(self.replay(task_id, plan))
            if played[-1].reward >= 1:
                break
        return max(played, key=lambda trajectory: trajectory.reward)

    def plans(self, task_id: str) -> Iterator[list[str]]:
        """Gold paths, the likeliest first.

        They are made under the simplification that they are played in, then with shut containers:
        with open ones, the package's gold agent now and then carries off what it looks for.
        """
        name, variation = self.check(task_id)
        ways = [self.simplification]
        if self.all_open:
            ways.append(re.sub("openContainers,?", "", self.simplification).strip(","))
        if name in POLLINATED:
            # With open containers it waits for bees that are gone: for many minutes, in vain.
            del ways[:-1]
        for simplification in ways:
            simulator = self.borrow()
            simulator.server.load(name, variation, simplification, True)
            gold = list(simulator.server.getGoldActionSequence())
            self.idle.append(simulator)
            if self.simplification == "easy" or "teleportAction" in self.simplification:
                yield shorten(gold, self.all_open)
            # Shortened, it earns less where life stages pass at their own pace.
            yield ["look around", *gold]

    def replay(self, task_id: str, plan: list[str]) -> Trajectory:
        """Plays a plan. A thought uses the task, its own action and what was read before it."""
        episode, observation = self.start(task_id)
        trajectory = Trajectory(task_id)
        task = observation.lower()
        room, rooms_seen, evidence = None, set(), ""
        bees_leave = self.all_open and self.task_type(task_id) in POLLINATED
        plan = list(plan)
        while plan:
            action = plan.pop(0)
            if measured := re.search("thermometer measures (.*)", observation):
                evidence = f"I measured {measured[1]}. "
            elif "conductive" in task and "light bulb, which is" in observation:
                which = "A" if "light bulb, which is on" in observation else "No"
                evidence = f"{which} light bulb is on. "
            thought = think(action, task, rooms_seen)
            if action.startswith(("teleport to", "go to")):
                room = action.split(" to ", 1)[1]
            elif action == "look around":
                what = "has changed" if room in rooms_seen else "is here"
                thought = f"I look around to see what {what}."
            elif " box" in action:
                # The answer to the task's question, if it asks one.
                thought = evidence + thought
            turn = f"Thought: {thought}\nAction: {action}"
            trajectory.steps.append(Step(observation, turn))
            observation, trajectory.reward, done, _ = episode.step(turn)
            if done:
                break
            if view := re.match(r"This .* is called the ([^.]*)", observation):
                room = view[1]
                rooms_seen.add(room)
            if bees_leave and "bee hive" in observation:
                bees_leave = False
                plan = KEEP_BEES + plan
        episode.close()
        return trajectory


def shorten(gold: list[str], all_open: bool) -> list[str]:
    """A gold path for an agent that teleports. all_open: every container is open from the start.

    Gold paths walk door by door and use things that they never looked at. Here a walk is one
    action, each new room is looked at, and what does nothing is left out.
    """
    plan, rooms_seen = ["look around"], set()
    # Of all doors only the greenhouse's matter, and replay shuts them.
    opens = "open .*|close door to .*" if all_open else "open door to .*"
    for action in gold:
        does_nothing = re.fullmatch(rf"{opens}|pour (.+) (?:into|in) \1", action)
        if does_nothing or plan == [action]:
            continue
        # "baby baby dragonfly" -> "baby dragonfly"
        action = re.sub(r"\b(\w+) \1\b", r"\1", action)
        arrived = plan[-1].startswith("teleport to ")
        if action.startswith("go to "):
            if arrived:
                # That room was only passed through.
                plan.pop()
            plan.append(action.replace("go to ", "teleport to ", 1))
            continue
        if arrived and plan[-1] not in rooms_seen:
            rooms_seen.add(plan[-1])
            if action != "look around":
                plan.append("look around")
        plan.append(action)
    return plan


def think(action: str, task: str, rooms_seen: set[str]) -> str:
    """The expert's thought for an action. task: the task's text in lower case."""
    for pattern, thought in THOUGHTS.items():
        match = re.fullmatch(pattern, action.replace(" in inventory", ""))
        if match is None:
            continue
        thing = re.split(" in | containing ", match[1])[0].lower() if match.groups() else ""
        if action.startswith("teleport to ") and match[1] in rooms_seen:
            thought = "I have more to do in the {0}, so I go back."
        elif thing in task:
            thought = THOUGHTS_ON_NAMED.get(pattern, thought)
        return re.sub("(?:in )?the outside", "outside", thought.format(*match.groups()))
    return f"Next I {action}."


def refuse_unknown(given: list[str], allowed: list[str]) -> None:
    unknown = sorted(set(given) - set(allowed))
    problem = f"there is no {unknown[:1]}; choose from: {', '.join(allowed)}"
    need(not unknown, "scienceworld", problem)


def read_eto_lists(data: str | None) -> dict[str, dict[str, list[int]]]:
    """split -> task -> variations, from ETO's lists of [task, variation]."""
    folder = benchmark_folder("scienceworld", data, FILES)
    lists: dict[str, dict[str, list[int]]] = {"train": {}, "dev": {}, "test": {}}
    for part, variations in lists.items():
        path = f"{folder}/{part}_indices.json"
        remedy = "give the path of ETO's eval_agent/data/sciworld as data=FOLDER"
        rows = parse_json(read_contents(path, remedy), path)
        need(isinstance(rows, list) and bool(rows), path, "is not a list of [task, variation]")
        for i, row in enumerate(rows):
            is_pair = isinstance(row, list) and list(map(type, row)) == [str, int] and row[1] >= 0
            need(is_pair, path, f"entry {i} is {row!r:.80}, not [task, variation]")
            # "task-6-lifespan-(longest-lived)" is "lifespan-longest-lived" in the package.
            name = re.sub(r"^task-\d+\w?-|[()]", "", row[0]).replace("mendellian", "mendelian")
            variations.setdefault(name, []).append(row[1])
    return lists


def start_simulator(number: int):
    """A simulator in a JVM: a second to start, 0.3-0.5 GB."""
    try:
        from scienceworld import ScienceWorldEnv

        # macOS has a java that only says that there is none.
        subprocess.run(["java", "-version"], capture_output=True, check=True)
    except ImportError:
        problem = "the package is missing; install it: pip install scienceworld==1.2.3"
        raise InputError(f"scienceworld: {problem}") from None
    except (OSError, subprocess.CalledProcessError):
        raise InputError(
            "scienceworld: Java is missing; install it: apt-get install default-jre-headless "
            "(macOS: brew install openjdk, and put it on the PATH)"
        ) from None
    options = os.environ.get("JAVA_TOOL_OPTIONS", "")
    if JAVA_OPTIONS not in options:
        # Of two values of an option the last one counts: the user's.
        os.environ["JAVA_TOOL_OPTIONS"] = f"{JAVA_OPTIONS} {options}".strip()
    try:
        return ScienceWorldEnv()
    except Exception as error:
        # py4j raises many kinds.
        raise InputError(
            f"scienceworld: Java server {number} does not start ({error}); is there memory for "
            f"it? JAVA_TOOL_OPTIONS is {os.environ['JAVA_TOOL_OPTIONS']!r}"
        ) from None


def stop(simulators: list) -> None:
    for simulator in simulators:
        simulator.close()
        simulator._gateway.java_process.kill()
        simulator._gateway.java_process.wait()
        # The package's __del__ calls it again when Python is half gone.
        simulator.close = lambda: None
