"""Mind2Web (Deng et al., 2023): the next action on 137 real web sites, from recorded pages."""

from __future__ import annotations

import functools
import glob
import hashlib
import html.parser
import json
import os
import pickle
import random
import re
from dataclasses import dataclass

from benchmarks.files import benchmark_folder, need, need_count, shortest_play, stream_json
from trajectory import InputError, Step, Trajectory, parse_action

FILES = (
    "train/*.json, test_domain/*.json and, if wanted, test_task/, test_website/ and "
    "scores_all_data.pkl (the Hugging Face data set osunlp/Mind2Web, its test.zip unpacked)"
)
FOLDERS = ["train", "test_domain", "test_task", "test_website"]
# What describes an element besides its text. Cleaned HTML writes "_" for "-" in names.
ATTRIBUTES = (
    "role type name label aria_label aria-label placeholder title alt value "
    "input_value input_checked option_selected"
)
# What gives an element without text its name, the best first.
NAMES = "aria_label aria-label label placeholder title alt name"
VOID_TAGS = "area base br col embed hr img input link meta source track wbr"


class PageElements(html.parser.HTMLParser):
    """found: the wanted elements of a cleaned page, {node id: (tag, attributes, words within)}."""

    def set_cdata_mode(self, *_, **__) -> None:
        """No element's content is raw text: newer Pythons would skip what stands in an iframe."""

    def __init__(self, page: str, wanted: set[str]):
        super().__init__()
        self.wanted = wanted
        self.found: dict[str, tuple[str, dict[str, str], list[str]]] = {}
        # The tags from the root down to where the parser is, each with its node id if wanted.
        self.open: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        attributes = {name: value for name, value in attributes if value}
        for name in ("alt", "aria_label", "aria-label"):
            # To the elements around it, this is text.
            self.handle_data(attributes.get(name, ""))
        node = attributes.get("backend_node_id")
        if node in self.wanted:
            self.found[node] = (tag, attributes, [])
        if tag not in VOID_TAGS.split():
            self.open.append((tag, node if node in self.wanted else None))

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID_TAGS.split():
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        """Closes the innermost open element of this tag and all within it."""
        tags = [name for name, _ in self.open]
        if tag in tags:
            del self.open[len(tags) - 1 - tags[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        for _, node in self.open:
            if node is not None:
                self.found[node][2].extend(data.split())


def describe(tag: str, attributes: dict[str, str], words: list[str]) -> tuple[str, str]:
    """(the element as a line of the page, the name that a person would give it)"""
    # The words of a select are its options.
    limit = 40 if tag == "select" else 15
    text = " ".join(words[:limit]) + (" ..." if len(words) > limit else "")
    line = f'{tag} "{text}"' if text else tag
    known = {}
    for name in ATTRIBUTES.split():
        if name in attributes:
            known[name] = " ".join(attributes[name].split()[:limit])
            if known[name] != text:
                line += f" {name}={known[name]}"
    names = [text, *[known.get(name) for name in NAMES.split()], tag]
    return line, next(filter(None, names))


def web_action(text: str) -> tuple[str, int, str] | None:
    """(operation, element number, the first line of a value) of a turn, or None.

    As officially, a click with a value has another operation than one without.
    """
    match = re.match(r"(click|type|select) \[(\d{1,9})\](.*)", parse_action(text) or "")
    return (match[1].upper(), int(match[2]), match[3].strip()) if match else None


def operation_f1(predicted: str, wanted: str) -> float:
    """Mind2Web's F1 of the sets of words of "OPERATION value"."""
    said, gold = set(predicted.split()), set(wanted.split())
    if not said or not gold:
        return float(said == gold)
    return 2 * len(said & gold) / (len(said) + len(gold))


def right_nodes(action: dict) -> list[str]:
    """Ids of the right elements, the annotator's target first; elements inside it count too."""
    candidates = action["pos_candidates"]
    target_first = sorted(candidates, key=lambda node: not node.get("is_original_target"))
    return [candidate["backend_node_id"] for candidate in target_first]


@dataclass(slots=True)
class RecordedTask:
    """Where a task stands in its file, and which of its actions are played."""

    path: str
    first_byte: int
    size: int
    domain: str
    kept: list[int]
    train: bool


@dataclass(slots=True)
class RecordedPage:
    """One turn. names: of the elements, by number. right: numbers, the annotator's target first."""

    observation: str
    names: list[str]
    right: list[int]
    # The annotated action.
    gold: str


class Mind2WebEpisode:
    """Whatever the agent does, the next page is the one after the annotated action."""

    def __init__(self, pages: list[RecordedPage]):
        self.pages = pages
        self.turn = 0
        # Sums over the turns so far.
        self.elements = 0
        self.operation_f1 = 0.0
        self.successes = 0

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. Reward: element accuracy, as a share of all steps; the metrics likewise.

        As in the official evaluation, a step whose element is not on the page counts 0 in all.
        """
        total = len(self.pages)
        said = web_action(text)
        valid = False
        if self.turn < total:
            page = self.pages[self.turn]
            valid = said is not None and said[1] < len(page.names)
            if valid and page.right:
                gold_operation, _, gold_value = web_action(f"Action: {page.gold}")
                f1 = operation_f1(f"{said[0]} {said[2]}", f"{gold_operation} {gold_value}")
                hit = said[1] in page.right
                self.elements += hit
                self.operation_f1 += f1
                self.successes += hit and f1 == 1
            self.turn += 1
        done = self.turn >= total
        observation = "The task is over." if done else self.pages[self.turn].observation
        info = {"valid": valid, "operation_f1": self.operation_f1 / total}
        info["step_success"] = self.successes / total
        return observation, self.elements / total, done, info


class Mind2Web:
    """Task ids are annotation ids. test is test_domain, as in the paper.

    data: the folder of the official files.
    candidates: how many elements a page shows, in the page's order: the best by the official ranks
    (scores_all_data.pkl), of which MindAct takes 50; on a train page, the annotated element is
    always among them. Without the ranks, the annotated element and random others, which is easier.
    dev: how many train tasks are held out, by the order of sha1(id). The paper has no dev split.
    Train steps without a right element are left out, as officially; in test they count as wrong.
    """

    # Table 1
    paper = {"train": 1009, "dev": None, "test": 912, "turns": 7.3}
    instruction = (
        "You carry out a task on a web site, one action at a time. Each turn shows the latest "
        "actions, then the elements of the page that may matter, each with its number in brackets, "
        "then the task.\n"
        "Your actions, where N is the number of an element:\n"
        "click [N]: press it; also to hover over it or to confirm\n"
        "type [N] text: write the text into it\n"
        "select [N] value: choose the value from its list\n"
        "The pages were recorded from a person, and go on as that person did, whatever you do: "
        "trust the list of actions.\n"
        "Reply each time with:\nThought: your reasoning\nAction: your action"
    )

    def __init__(self, data: str | None = None, candidates: int = 20, dev: int = 50):
        need_count("mind2web", "candidates", candidates, 1)
        need_count("mind2web", "dev", dev, 0)
        folder = benchmark_folder("mind2web", data, FILES)
        self.count = candidates
        self.tasks: dict[str, RecordedTask] = {}
        self.pages_read: dict[str, list[RecordedPage]] = {}
        self.splits: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        for name in FOLDERS:
            split = "test" if name == "test_domain" else name
            paths = sorted(glob.glob(os.path.join(glob.escape(folder), name, "*.json")))
            enough = paths or split not in self.splits
            need(enough, os.path.join(folder, name), f"has no .json files; mind2web needs {FILES}")
            for path in paths:
                self.splits.setdefault(split, []).extend(self._scan(path, split == "train"))
        train = self.splits["train"]
        held_out = set(sorted(train, key=lambda i: hashlib.sha1(i.encode()).hexdigest())[:dev])
        self.splits["dev"] = [i for i in train if i in held_out]
        self.splits["train"] = [i for i in train if i not in held_out]
        left = bool(self.splits["train"])
        need(left, folder, f"has no train task left when {dev} are held out; lower dev")
        scores = os.path.join(folder, "scores_all_data.pkl")
        self.ranked = read_ranks(scores, candidates) if os.path.exists(scores) else None

    def _scan(self, path: str, train: bool) -> list[str]:
        """The ids of a file's tasks. Their pages take gigabytes, so they are read when played."""
        names = []
        for number, (row, first_byte, size) in enumerate(stream_json(path)):
            try:
                check_task(row)
                name, actions = row["annotation_id"], row["actions"]
                if name in self.tasks:
                    raise ValueError(f"{name!r} is another task's id")
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise InputError(
                    f"{path}: task {number}, counted from 0, is not as Mind2Web writes it "
                    f"({type(error).__name__}: {error}); download the file again"
                ) from None
            kept = [i for i, action in enumerate(actions) if action["pos_candidates"] or not train]
            if kept:
                domain = row["domain"]
                self.tasks[name] = RecordedTask(path, first_byte, size, domain, kept, train)
                names.append(name)
        return names

    @functools.cached_property
    def example(self) -> str:
        return shortest_play(self, 10)

    def max_steps(self, task_id: str) -> int:
        return len(self.recorded(task_id).kept)

    def task_type(self, task_id: str) -> str:
        return self.recorded(task_id).domain

    def recorded(self, task_id: str) -> RecordedTask:
        problem = f"there is no task {task_id!r}; the first is {next(iter(self.tasks), None)!r}"
        need(task_id in self.tasks, "mind2web", problem)
        return self.tasks[task_id]

    def pages(self, task_id: str) -> list[RecordedPage]:
        """The turns of a task. Reading a page takes about 30 ms, so the texts are kept."""
        if task_id not in self.pages_read:
            recorded = self.recorded(task_id)
            with open(recorded.path, "rb") as file:
                file.seek(recorded.first_byte)
                task = json.loads(file.read(recorded.size))
            self.pages_read[task_id] = [self._page(task, i) for i in recorded.kept]
        return self.pages_read[task_id]

    def _page(self, task: dict, i: int) -> RecordedPage:
        """The page before action i."""
        action = task["actions"][i]
        shown = self.candidates(task["annotation_id"], action)
        elements = PageElements(action["cleaned_html"], set(shown)).found
        for node, tag in shown.items():
            elements.setdefault(node, (tag, {}, []))
        lines = [f"Web site: {task['website']}", "Previous actions:"]
        for done in task["action_reprs"][max(0, i - 5) : i]:
            lines.append(f"- {one_line(done)}")
        if i == 0:
            lines[-1] += " none"
        lines.append("Elements:")
        names = []
        for number, element in enumerate(elements.values()):
            line, name = describe(*element)
            lines.append(f"[{number}] {line}")
            names.append(name)
        lines.append(f"Task: {one_line(task['confirmed_task'])}")
        numbers = {node: number for number, node in enumerate(elements)}
        right = [numbers[node] for node in right_nodes(action) if node in numbers]
        operation = action["operation"]["op"]
        gold = f"{operation.lower()} [{right[0] if right else 0}]"
        if operation != "CLICK":
            # As officially, only the first line counts.
            value = (action["operation"].get("value") or "").split("\n")[0]
            gold = f"{gold} {one_line(value)}".strip()
        return RecordedPage("\n".join(lines), names, right, gold)

    def candidates(self, task_id: str, action: dict) -> dict[str, str]:
        """The elements to show, {node id: tag}."""
        right = right_nodes(action)
        key = f"{task_id}_{action['action_uid']}"
        tags = {}
        for candidate in action["neg_candidates"] + action["pos_candidates"]:
            tags[candidate["backend_node_id"]] = candidate["tag"]
        if self.ranked is None:
            others = [node for node in tags if node not in right]
            nodes = right[: self.count]
            missing = min(self.count - len(nodes), len(others))
            nodes += random.Random(f"mind2web:{key}").sample(others, missing)
        else:
            problem = f"has no ranks for {key}; is it the file for these tasks?"
            need(key in self.ranked, "scores_all_data.pkl", problem)
            nodes = [node for node in self.ranked[key] if node in tags]
            if self.tasks[task_id].train and not set(right) & set(nodes):
                nodes = nodes[: self.count - 1] + right[:1]
        return {node: tags[node] for node in nodes}

    def start(self, task_id: str) -> tuple[Mind2WebEpisode, str]:
        pages = self.pages(task_id)
        return Mind2WebEpisode(pages), pages[0].observation

    def expert(self, task_id: str) -> Trajectory | None:
        """The annotated actions; None where a page does not show the annotated element."""
        pages = self.pages(task_id)
        if not all(page.right for page in pages):
            return None
        episode, _ = self.start(task_id)
        trajectory = Trajectory(task_id)
        for page in pages:
            turn = f"Thought: {expert_thought(page)}\nAction: {page.gold}"
            trajectory.steps.append(Step(page.observation, turn))
            _, trajectory.reward, _, trajectory.info = episode.step(turn)
        return trajectory


def expert_thought(page: RecordedPage) -> str:
    operation, number, value = web_action(f"Action: {page.gold}")
    name = f"the {page.names[number]!r} element"
    thoughts = {
        "CLICK": f"To go on with the task I click {name}.",
        "TYPE": f"Into {name} I type {value!r}.",
        "SELECT": f"In {name} I select {value!r}.",
    }
    task = page.observation.rsplit("\nTask: ", 1)[1]
    source = f"The task says {value!r}. " if value and value.lower() in task.lower() else ""
    return source + thoughts[operation]


def one_line(text: str) -> str:
    return " ".join(text.split())


def check_task(row: dict) -> None:
    """KeyError, TypeError, AttributeError or ValueError if a task is not as Mind2Web writes it."""
    actions = row["actions"]
    texts = [row[key] for key in ("annotation_id", "domain", "website", "confirmed_task")]
    texts += row["action_reprs"]
    for action in actions:
        operation = action["operation"]
        texts += [action["action_uid"], action["cleaned_html"]]
        texts += [operation["op"], operation.get("value") or ""]
        for candidate in action["pos_candidates"] + action["neg_candidates"]:
            texts += [candidate["backend_node_id"], candidate["tag"]]
        if operation["op"] not in ("CLICK", "TYPE", "SELECT"):
            raise ValueError(f"an operation {operation['op']!r}")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{text!r} where text should be")
    if len(row["action_reprs"]) != len(actions):
        raise ValueError(f"{len(actions)} actions, {len(row['action_reprs'])} action_reprs")


class RankReader(pickle.Unpickler):
    """Unpickles plain data and numpy's numbers only: a pickle can name any function to call."""

    # "__builtin__" and bytes by way of "_codecs" are in old pickles.
    NAMES = {
        "builtins": "dict list str float int",
        "__builtin__": "dict list str float int",
        "collections": "defaultdict OrderedDict",
        "numpy": "dtype",
        "numpy.core.multiarray": "scalar",
        "numpy._core.multiarray": "scalar",
        "_codecs": "encode",
    }

    def find_class(self, module: str, name: str):
        if name not in self.NAMES.get(module, "").split():
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no score file needs")
        return super().find_class(module, name)


def read_ranks(path: str, count: int) -> dict[str, list[str]]:
    """{"<annotation id>_<action uid>": [the first `count` node ids, best first]}"""
    first = {}
    try:
        with open(path, "rb") as file:
            ranks = RankReader(file).load()["ranks"]
        for key, nodes in ranks.items():
            best = sorted((rank, node) for node, rank in nodes.items() if rank < count)
            first[key] = [str(node) for _, node in best]
    except Exception as error:
        # A broken pickle can raise anything.
        shape = "{'scores': .., 'ranks': {sample: {node: rank}}}"
        raise InputError(
            f"{path}: not Mind2Web's score file, {shape} ({type(error).__name__}: {error}); "
            "download it again"
        ) from None
    return first
