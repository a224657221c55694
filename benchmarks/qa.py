"""Questions over several pages of an encyclopedia.

HotpotQA (Yang et al., 2018), 2WikiMultihopQA (Ho et al., 2020), MuSiQue (Trivedi et al., 2022).
"""

from __future__ import annotations

import bisect
import functools
import glob
import hashlib
import heapq
import html
import math
import os
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.files import (
    benchmark_folder,
    json_entries,
    json_lines,
    need,
    need_count,
    objects_of,
    read_contents,
    shortest_play,
    text_of,
)
from trajectory import Step, Trajectory, parse_action


@dataclass
class Question:
    text: str
    # The answer, then its aliases.
    answers: list[str]
    # The task type.
    kind: str
    # {title: its paragraphs in this question's row}
    pages: dict[str, str]
    # What the expert does: (title of a page, what it wants to know, what it reads there).
    hops: list[tuple[str, str, str]]
    # 2Wiki: the answer's entity in Wikidata.
    answer_id: str | None = None


# ---------------------------------------------------------------------------- the three formats


def read_hotpot(row: dict, where: str) -> Question:
    """The expert reads the marked pages, those first that it has read of, and quotes each."""
    sentences, facts, pages = read_context(row, where)
    question, answer = text_of(row, "question", where), text_of(row, "answer", where)
    read = question
    unread = list(facts)
    hops = []
    while unread:
        title = next((title for title in unread if names(read, title)), unread[0])
        unread.remove(title)
        read += pages.get(title, "")
        listed = sentences.get(title, [])
        marked = [listed[number] for number in facts[title] if 0 <= number < len(listed)]
        # A sentence that names the next page, or the answer, comes before the other marked ones.
        telling = [sentence for sentence in marked if names(sentence, *unread or [answer])]
        fact = f"I have read about {title}."
        if marked:
            fact = f"I read about {title}: {clean([*telling, *marked][0])}"
        hops.append((title, "", fact))
    kind = f"{text_of(row, 'type', where)} {text_of(row, 'level', where)}"
    return Question(question, [answer], kind, pages, hops)


def read_2wiki(row: dict, where: str) -> Question:
    """The expert follows the evidences, (subject, relation, object), each on its subject's page."""
    _, facts, pages = read_context(row, where)
    evidences = row.get("evidences")
    is_list = isinstance(evidences, list)
    are_triples = is_list and all(is_texts(triple) and len(triple) == 3 for triple in evidences)
    need(are_triples, where, "'evidences' is missing or not a list of triples of text")
    # If a page's title is not the subject, it is in the supporting facts, in the same order.
    titles = list(facts) or [subject for subject, _, _ in evidences]
    hops = []
    for i, (subject, relation, thing) in enumerate(evidences):
        title = subject if subject in titles else titles[min(i, len(titles) - 1)]
        wanted = f"I want to know the {relation} of {title}."
        hops.append((title, wanted, f"The {relation} of {title} is {thing}."))
    question, answer, kind = [text_of(row, key, where) for key in ("question", "answer", "type")]
    answer_id = row.get("answer_id")
    known = isinstance(answer_id, str | None)
    need(known, where, f"'answer_id' is not text but {type(answer_id).__name__}")
    return Question(question, [answer], kind, pages, hops, answer_id)


def read_musique(row: dict, where: str) -> Question:
    """The expert follows the decomposition: later questions name earlier answers as #1, #2, ..."""
    answerable = row.get("answerable", True) is True
    need(answerable, where, "'answerable' is not true; use the musique_ans files")
    titles, pages = [], {}
    for paragraph, at in objects_of(row, "paragraphs", where):
        title = clean(text_of(paragraph, "title", at))
        text = clean(text_of(paragraph, "paragraph_text", at))
        titles.append(title)
        pages[title] = f"{pages.get(title, '')}\n{text}".strip()
    found, hops = [], []
    for part, at in objects_of(row, "question_decomposition", where):
        number = part.get("paragraph_support_idx")
        is_number = type(number) is int and 0 <= number < len(titles)
        need(is_number, at, "'paragraph_support_idx' is not the number of a paragraph")
        asked = text_of(part, "question", at)
        for i, answer in enumerate(found, 1):
            asked = asked.replace(f"#{i}", answer)
        subject, arrow, relation = asked.partition(" >> ")
        wanted = f"I want to know this: {asked.rstrip('?')}?"
        if arrow:
            wanted = f"I want to know this about {subject}: {relation}."
        found.append(text_of(part, "answer", at))
        hops.append((titles[number], wanted, f"I have found this: {found[-1]}."))
    aliases = row.get("answer_aliases", [])
    need(is_texts(aliases), where, "'answer_aliases' is not a list of text")
    kind = re.match("[0-9]hop", text_of(row, "id", where))
    problem = f"the id {row['id']!r} does not start with the number of hops, as in 2hop__1_2"
    need(kind is not None, where, problem)
    answers = [text_of(row, "answer", where), *aliases]
    return Question(text_of(row, "question", where), answers, kind[0], pages, hops)


def read_context(row: dict, where: str) -> tuple[dict, dict, dict]:
    """{title: its sentences}, {title: numbers of its supporting sentences}, {title: its text}"""
    sentences, facts = {}, {}
    for title, texts in titled(row, "context", where, is_texts, "[sentence, ...]"):
        sentences.setdefault(title, []).extend(texts)
    for title, number in titled(row, "supporting_facts", where, is_whole, "sentence number"):
        facts.setdefault(title, []).append(number)
    pages = {title: clean(" ".join(texts)) for title, texts in sentences.items()}
    return sentences, facts, pages


def titled(row: dict, key: str, where: str, fits: Callable, shape: str) -> list[tuple]:
    """HotpotQA's and 2Wiki's lists of [title, something that fits]."""
    need(isinstance(row.get(key), list), where, f"{key!r} is missing or not a list")
    pairs = []
    for i, pair in enumerate(row[key]):
        is_pair = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        need(is_pair and fits(pair[1]), where, f"{key}[{i}] is not [title, {shape}]")
        pairs.append((clean(pair[0]), pair[1]))
    return pairs


def is_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_whole(value) -> bool:
    return type(value) is int


def clean(text: str) -> str:
    """On one line, with HTML entities resolved (HotpotQA's titles have them)."""
    return " ".join(re.sub(r"&#?\w+;", lambda entity: html.unescape(entity[0]), text).split())


def names(text: str, *titles: str) -> bool:
    """Does the text name one of these pages? "(film)" and the like may be missing."""
    bare = [re.sub(r" \([^()]*\)$", "", title).lower() for title in titles]
    return any(title in text.lower() for title in bare)


@dataclass(frozen=True)
class Benchmark:
    read: Callable[[dict, str], Question]
    source: str
    # (official name, pattern for other names)
    train: tuple[str, str]
    dev: tuple[str, str]
    # Table 1; of each the paper used 5,000 / 500 / 500 tasks.
    paper: dict[str, float]


BENCHMARKS = {
    "hotpotqa": Benchmark(
        read_hotpot,
        "hotpotqa.github.io",
        train=("hotpot_train_v1.1.json", "hotpot_train*.json"),
        dev=("hotpot_dev_distractor_v1.json", "hotpot_dev_distractor*.json"),
        paper={"train": 90447, "dev": 7405, "test": 7405, "turns": 7.0},
    ),
    "2wikimultihopqa": Benchmark(
        read_2wiki,
        "github.com/Alab-NII/2wikimultihop; beside them, if wanted, id_aliases.json",
        train=("train.json", "train*.json"),
        dev=("dev.json", "dev*.json"),
        paper={"train": 167454, "dev": 12576, "test": 12576, "turns": 8.2},
    ),
    "musique": Benchmark(
        read_musique,
        "github.com/StonyBrookNLP/musique",
        train=("musique_ans_v1.0_train.jsonl", "musique_ans*train*.jsonl"),
        dev=("musique_ans_v1.0_dev.jsonl", "musique_ans*dev*.jsonl"),
        paper={"train": 19938, "dev": 2417, "test": 2417, "turns": 7.8},
    ),
}
FILES = {
    name: f"{known.train[0]} and {known.dev[0]} ({known.source})"
    for name, known in BENCHMARKS.items()
}


# ---------------------------------------------------------------------------- answers and titles


def normalize_answer(text: str) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no articles, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(answer: str, gold: str, squad: bool = False) -> float:
    """F1 of the bags of normalised words, by HotpotQA's and 2Wiki's scripts.

    They give nothing for a part of yes, no or noanswer, nor for an answer without words.
    squad: by MuSiQue's script, where no word is special, and no words match no words.
    """
    answer, gold = normalize_answer(answer), normalize_answer(gold)
    words, gold_words = answer.split(), gold.split()
    if not words or not gold_words:
        return float(squad and words == gold_words)
    if answer != gold and not squad and {answer, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    common = Counter(words) & Counter(gold_words)
    return 2 * common.total() / (len(words) + len(gold_words))


def parse_call(action: str | None) -> tuple[str, str] | None:
    """("search" | "finish", its argument), or None; as ReAct reads it: the last bracket closes."""
    match = re.fullmatch(r"\s*([Ss]earch|[Ff]inish)\[(.*)\]", action or "")
    return (match[1].lower(), match[2].strip()) if match else None


def exact_key(title: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", title).casefold().split())


def title_words(title: str) -> list[str]:
    """Lower-case words without accents."""
    letters = unicodedata.normalize("NFKD", title.casefold())
    return re.findall(r"\w+", "".join(c for c in letters if not unicodedata.combining(c)))


class Titles:
    """Finds a title by its name, or similar ones. Built once, then only read."""

    # A word in more titles than this says little, and is slow.
    COMMON = 5000

    def __init__(self, titles: list[str]):
        self.titles = titles
        # By the title without case, and also without punctuation and accents.
        self.exact: dict[str, str] = {}
        self.loose: dict[str, str] = {}
        # {word: the numbers of the titles with it}, and the number of words in each title.
        self.having: dict[str, list[int]] = {}
        self.sizes: list[int] = []
        for number, title in enumerate(titles):
            words = title_words(title)
            self.exact.setdefault(exact_key(title), title)
            self.loose.setdefault(" ".join(words), title)
            self.sizes.append(len(set(words)))
            for word in set(words):
                self.having.setdefault(word, []).append(number)
        self.vocabulary = sorted(self.having)

    def find(self, name: str) -> str | None:
        """The title of that name; if only its punctuation or accents differ, the first such."""
        words = " ".join(title_words(name))
        return self.exact.get(exact_key(name)) or (self.loose.get(words) if words else None)

    def similar(self, name: str) -> list[str]:
        """The five titles that share most words with the name and have few others."""
        weights = self._weights(name)
        scores: Counter = Counter()
        for word in sorted(weights, key=lambda word: len(self.having[word])):
            numbers = self.having[word]
            if len(scores) >= 5 and len(numbers) > self.COMMON:
                # Common words only add to what rare ones found.
                numbers = scores.keys() & set(numbers)
            for number in numbers:
                scores[number] += weights[word]
        sizes = {number: len(weights) + self.sizes[number] for number in scores}
        order = {number: (-scores[number] / sizes[number], number) for number in scores}
        best = heapq.nsmallest(5, order, key=order.get)
        return [self.titles[number] for number in best]

    def _weights(self, name: str) -> dict[str, float]:
        """Weights of the name's words: high if rare; unknown words count as their neighbours."""
        weights: dict[str, float] = {}
        for word in title_words(name):
            rank = bisect.bisect(self.vocabulary, word)
            known = self.vocabulary[max(0, rank - 3) : rank + 3]
            if word in self.having:
                known = [word]
            for other in known:
                begin = len(os.path.commonprefix([other, word]))
                alike = (1 + begin) / (1 + max(len(other), len(word)))
                rare = math.log(1 + len(self.titles) / len(self.having[other]))
                weights[other] = max(weights.get(other, 0), alike * rare)
        return weights


# ---------------------------------------------------------------------------- the environment


@dataclass
class QAEpisode:
    world: QA
    question: Question
    reward: float = 0.0
    f1: float = 0.0
    over: bool = False

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. Reward: exact match. info: F1, 0 until there is an answer."""
        call = None if self.over else parse_call(parse_action(text))
        if self.over:
            observation = "The question is already answered."
        elif call is None:
            observation = "That is not an action. Write Search[entity] or Finish[answer]."
        elif call[0] == "search":
            observation = self.world.search(self.question, call[1])
        else:
            self.over = True
            self.reward = float(self.world.matches(self.question, call[1]))
            squad = self.world.name == "musique"
            self.f1 = max(answer_f1(call[1], gold, squad) for gold in self.question.answers)
            observation = f"Your answer is {'right' if self.reward else 'wrong'}."
        return observation, self.reward, self.over, {"valid": call is not None, "f1": self.f1}


class QA:
    """Task ids are those of the files.

    Search covers all paragraphs of the files. Of those with one title it shows the question's,
    else those of the first question that has the title. HotpotQA and 2Wiki have a page's first
    paragraph only; MuSiQue may have several, with the answer in any.
    train is 5,000 questions of the train file; dev and test are 500 each of the dev file, or half
    of a smaller one each. All are in the order of sha1(id).
    data: the folder of the files. train_from_dev: without a train file, the number of questions
    that train takes from the dev file, before dev and test.
    """

    SIZES = {"train": 5000, "dev": 500, "test": 500}
    instruction = (
        "You answer a question with the help of an encyclopedia. The answer takes several pages. "
        "You see a page's first paragraph only when you search for it.\n"
        "Your actions:\n"
        "Search[entity]: reads the page with this title; if there is none, lists the five most "
        "similar titles\n"
        "Finish[answer]: gives your answer and ends. The answer is a name, a date, a number or a "
        "short phrase from the pages, or yes or no: the words alone, no sentence\n"
        "You have 12 turns. Reply each time with:\nThought: your reasoning\nAction: your action"
    )

    def __init__(self, name: str, data: str | None = None, train_from_dev: int = 0):
        need_count(name, "train_from_dev", train_from_dev, 0)
        self.name = name
        self.paper = BENCHMARKS[name].paper
        if name == "musique":
            several = "the paragraphs of a page that are at hand"
            self.instruction = self.instruction.replace("a page's first paragraph", several)
        folder = benchmark_folder(name, data, FILES[name])
        paths = find_files(name, folder, train_from_dev)
        rows = {split: read_rows(path) for split, path in paths.items()}
        self.splits = self._split(rows, train_from_dev)
        self.questions: dict[str, Question] = {}
        self.pages: dict[str, str] = {}
        for split in rows:
            self._read(rows[split])
        path = os.path.join(folder, "id_aliases.json")
        if name == "2wikimultihopqa" and os.path.exists(path):
            self._accept_aliases(path)
        self.titles = Titles(list(self.pages))

    def _split(self, rows: dict[str, dict], train_from_dev: int) -> dict[str, list[str]]:
        order = {}
        for split in rows:
            order[split] = sorted(rows[split], key=lambda i: hashlib.sha1(i.encode()).hexdigest())
        train = order["dev"][:train_from_dev]
        if "train" in order:
            train = order["train"][: self.SIZES["train"]]
        rest = order["dev"][train_from_dev:]
        half = min(self.SIZES["dev"], len(rest) // 2)
        test = rest[half : half + self.SIZES["test"]]
        splits = {"train": train, "dev": rest[:half], "test": test}
        problem = f"the dev file has {len(order['dev'])} questions: too few; each split needs one"
        need(all(splits.values()), self.name, problem)
        return splits

    def _read(self, rows: dict[str, tuple[dict, str]]) -> None:
        """Adds the pages of a file's rows, and the questions of those that are in a split."""
        chosen = set().union(*self.splits.values())
        for task_id in list(rows):
            # Frees each row once it is read: the full files take gigabytes.
            row, where = rows.pop(task_id)
            question = BENCHMARKS[self.name].read(row, where)
            question.text = clean(question.text)
            question.answers = [clean(answer) for answer in question.answers]
            need(question.answers[0] != "", where, "'answer' is empty")
            for title, text in question.pages.items():
                self.pages.setdefault(title, text)
            if task_id in chosen:
                problem = f"the id {task_id!r} is also in the other file; keep it in one"
                need(task_id not in self.questions, where, problem)
                self.questions[task_id] = question

    def _accept_aliases(self, path: str) -> None:
        """As in 2Wiki's evaluation since v1.1: other names of the entities that answers are."""
        asking = defaultdict(list)
        for question in self.questions.values():
            asking[question.answer_id].append(question)
        for row_name, row in json_lines(read_contents(path, "download it again"), path):
            where = f"{path}, {row_name}"
            need(isinstance(row, dict), where, "is not a JSON object; download it again")
            for question in asking[text_of(row, "Q_id", where)]:
                others = [row.get("aliases"), row.get("demonyms")]
                need(
                    all(map(is_texts, others)),
                    where,
                    "'aliases' or 'demonyms' is not a list of text",
                )
                question.answers += map(clean, others[0] + others[1])

    @functools.cached_property
    def example(self) -> str:
        return shortest_play(self, 100)

    def question(self, task_id: str) -> Question:
        known = f"tasks are the ids of the files' questions, such as {self.splits['train'][0]}"
        need(task_id in self.questions, self.name, f"there is no task {task_id!r}; {known}")
        return self.questions[task_id]

    def max_steps(self, task_id: str) -> int:
        return 12

    def task_type(self, task_id: str) -> str:
        return self.question(task_id).kind

    def start(self, task_id: str) -> tuple[QAEpisode, str]:
        question = self.question(task_id)
        return QAEpisode(self, question), f"Question: {question.text}"

    def search(self, question: Question, name: str) -> str:
        # "HALO" and "Halo" may be two pages.
        title = name if name in self.pages else self.titles.find(name)
        if title is None:
            similar = "; ".join(self.titles.similar(name)) or "none"
            return f"There is no page {clean(name)}. Similar titles: {similar}."
        return question.pages.get(title) or self.pages[title]

    @staticmethod
    def matches(question: Question, answer: str) -> bool:
        """Exact match with the answer or an alias."""
        return normalize_answer(answer) in map(normalize_answer, question.answers)

    @functools.cached_property
    def asked(self) -> dict[str, str]:
        """{question: task id}"""
        return {question.text: task_id for task_id, question in self.questions.items()}

    def task_of(self, expert: Trajectory) -> str | None:
        """FireAct names a question by its text."""
        if expert.task_id in self.questions:
            return expert.task_id
        return self.asked.get(clean(expert.task_id))

    def right(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Those whose answer is an exact match, as in the paper, with their task ids.

        If the files do not have the question, the trajectory's reward decides.
        """
        kept = []
        for trajectory in trajectories:
            task_id, reward = self.task_of(trajectory), trajectory.reward
            if task_id:
                verb, answer = parse_call(parse_action(trajectory.steps[-1].action)) or ("", "")
                matches = self.matches(self.questions[task_id], answer)
                reward = float(verb == "finish" and matches)
            if reward >= 1:
                task_id = task_id or trajectory.task_id
                kept.append(replace(trajectory, task_id=task_id, reward=reward))
        return kept

    def expert(self, task_id: str) -> Trajectory | None:
        """Reads the pages that the annotators marked, in an order that a reader could follow.

        A thought says what the last page told, what to find next, and whether the question or a
        page so far names the next page. None if a marked page is missing.
        """
        episode, observation = self.start(task_id)
        question = episode.question
        if not question.hops or not all(title in question.pages for title, _, _ in question.hops):
            return None
        trajectory = Trajectory(task_id)
        thoughts, facts = [], []
        read: dict[str, str] = {}

        def act(action: str) -> None:
            nonlocal observation
            turn = f"Thought: {clean(' '.join(thoughts))}\nAction: {action}"
            trajectory.steps.append(Step(observation, turn))
            observation, trajectory.reward, _, _ = episode.step(turn)

        for title, wanted, fact in question.hops:
            thoughts += [wanted] if wanted else []
            if title not in read:
                if names(question.text, title):
                    thoughts.append(f"The question names {title}.")
                elif names(" ".join([*read.values(), *facts]), title):
                    thoughts.append(f"I have read of {title}.")
                else:
                    thoughts.append(f"Nothing so far names the page. I try {title}.")
                act(f"Search[{title}]")
                read[title] = observation
                thoughts = []
            facts.append(fact)
            thoughts.append(fact)
        if "comparison" in question.kind:
            thoughts = facts[-2:]
        thoughts.append(f"So the answer is {question.answers[0]}.")
        act(f"Finish[{question.answers[0]}]")
        return trajectory


def find_files(name: str, folder: str, train_from_dev: int) -> dict[str, str]:
    """{"train": path, "dev": path}; only dev if train_from_dev."""
    known = BENCHMARKS[name]
    paths = {}
    for split, (official, pattern) in (("train", known.train), ("dev", known.dev)):
        found = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
        exact = [path for path in found if os.path.basename(path) == official]
        problem = f"has {len(found)} files like {pattern}; keep one, or name it {official}"
        need(len(exact or found) < 2, folder, problem)
        if found:
            [paths[split]] = exact or found
    need("dev" in paths, name, f"{folder} has no {known.dev[0]}; it needs {FILES[name]}")
    remedy = "or take N train questions from the dev file: train_from_dev=N"
    problem = f"{folder} has no {known.train[0]}; it needs {FILES[name]}, {remedy}"
    need("train" in paths or train_from_dev, name, problem)
    problem = f"train_from_dev is for want of a train file, but {paths.get('train')} is there"
    need(not ("train" in paths and train_from_dev), name, problem)
    return paths


def read_rows(path: str) -> dict[str, tuple[dict, str]]:
    """{id: (row, the file and row for error messages)}"""
    read = json_lines if path.endswith(".jsonl") else json_entries
    rows, first = {}, {}
    for row_name, row in read(read_contents(path, "give the path of a file of questions"), path):
        where = f"{path}, {row_name}"
        need(isinstance(row, dict), where, "is not a JSON object; expected one question")
        task_id = text_of(row, "_id" if "_id" in row else "id", where)
        problem = f"repeats the id {task_id!r} of {first.get(task_id)}; keep one"
        need(task_id not in rows, where, problem)
        rows[task_id] = (row, where)
        first[task_id] = row_name
    return rows
