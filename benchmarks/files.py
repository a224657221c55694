"""How the benchmarks read their files. Every error names the file, the row and the remedy.

Rows are checked with need(condition, where, problem); `where` says which file and row.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from trajectory import InputError, Step, Trajectory, render


def need(condition: bool, where: str, problem: str) -> None:
    """InputError("where: problem") unless the condition holds."""
    if not condition:
        raise InputError(f"{where}: {problem}")


def need_count(where: str, option: str, value: Any, least: int, most: int = 10**6) -> None:
    """InputError unless an option is a whole number in this range."""
    problem = f"{option} must be a whole number from {least} to {most}, not {value!r}"
    need(isinstance(value, int) and least <= value <= most, where, problem)


def kind(name: str) -> str:
    """The kind of a numbered thing: "mug 2" -> "mug"."""
    return name.rsplit(" ", 1)[0]


def shortest_play(env, count: int) -> str:
    """The shortest text of the first train tasks that the expert solves."""
    experts = [env.expert(task_id) for task_id in env.splits["train"][:count]]
    texts = [render(expert) for expert in experts if expert and expert.reward == 1]
    return min(texts, key=len, default="")


def show(task_id: str, env, episode, observation: str, turn_after: Callable) -> Trajectory:
    """What an expert's turns lead to. turn_after: observation -> its turn, None if none is left."""
    trajectory = Trajectory(task_id, truncated=True)
    while trajectory.truncated and len(trajectory.steps) < env.max_steps(task_id):
        turn = turn_after(observation)
        if turn is None:
            break
        trajectory.steps.append(Step(observation, turn))
        observation, trajectory.reward, done, _ = episode.step(turn)
        trajectory.truncated = not done
    return trajectory


def benchmark_folder(name: str, data: str | None, files: str) -> str:
    """The folder with a benchmark's files: the option data, else $STEPAGENT_DATA/name.

    files: what the benchmark needs, for the error message.
    """
    root = os.environ.get("STEPAGENT_DATA")
    problem = f"no data; it needs {files}; give their folder as the option data=FOLDER"
    remedy = f"or set STEPAGENT_DATA to the folder that has them in {name}/"
    need(bool(data or root), name, f"{problem}, {remedy}")
    # --env-options makes a number of a folder's name that looks like one.
    return str(data) if data else os.path.join(root, name)


def read_contents(path: str, remedy: str) -> str:
    """The text of a file; remedy: what an error tells the user to do."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8, or {remedy}"
        ) from None
    except (OSError, ValueError) as error:
        # ValueError: a NUL in the path.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); {remedy}") from None


def parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise InputError(
            f"{where}: broken JSON ({error.msg}, {line}column {error.colno}); "
            "is the file cut off, or neither a JSON list nor JSONL?"
        ) from None
    except (RecursionError, ValueError):
        # Nested too deep, or a number of thousands of digits.
        raise InputError(
            f"{where}: JSON nested too deep or with an endless number; expected plain trajectories"
        ) from None


def json_lines(text: str, path: str) -> list[tuple[str, Any]]:
    """[("line 1", its value), ...] of JSONL; empty lines are left out."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append((f"line {number}", parse_json(line, f"{path}, line {number}")))
    return rows


def json_entries(text: str, path: str) -> list[tuple[str, Any]]:
    """[("entry 0", its value), ...] of a JSON list."""
    content = parse_json(text, path)
    need(isinstance(content, list), path, "is not a JSON list")
    return [(f"entry {number}", entry) for number, entry in enumerate(content)]


def load_json(path: str):
    """A downloaded JSON file."""
    return parse_json(read_contents(path, "download it again"), path)


def stream_json(path: str, chunk: int = 1 << 24) -> Iterator[tuple[dict, int, int]]:
    """(object, its first byte, its number of bytes) of each object in a JSON list.

    Reads `chunk` characters at a time: files of several GB never are in memory as a whole.
    """
    before_object = re.compile(r"[\s,\[]*(?=\{)")
    decoder = json.JSONDecoder()
    # text[start:] is not parsed yet; its first character is byte `offset` of the file.
    text, start, offset = "", 0, 0
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while True:
                more = file.read(chunk)
                text, start = text[start:] + more, 0
                while match := before_object.match(text, start):
                    try:
                        row, end = decoder.raw_decode(text, match.end())
                    except json.JSONDecodeError:
                        # The object goes on in the next chunk.
                        break
                    first_byte = offset + match.end() - start
                    size = len(text[match.end() : end].encode())
                    yield row, first_byte, size
                    start, offset = end, first_byte + size
                if not more:
                    break
    except (OSError, ValueError, RecursionError) as error:
        # ValueError: not UTF-8, or a number of thousands of digits.
        raise InputError(f"{path}: cannot be read ({error}); download it again") from None
    near = repr(text[start : start + 40])
    problem = f"broken JSON near {near}; it should be a list of objects; download it again"
    need(re.fullmatch(r"[\s\[]*\]\s*", text[start:]) is not None, path, problem)


# ---------------------------------------------------------------------------- fields of a row


def text_of(row: dict, key: str, where: str) -> str:
    need(key in row, where, f"{key!r} is missing; it must be text")
    return sound_text(row[key], where, repr(key))


def objects_of(row: dict, key: str, where: str) -> list[tuple[dict, str]]:
    """The list of objects under `key`, each with its name for error messages."""
    need(isinstance(row.get(key), list), where, f"{key!r} is missing or not a list")
    found = []
    for i, item in enumerate(row[key]):
        problem = f"{key}[{i}] is not an object but {type(item).__name__}"
        need(isinstance(item, dict), where, problem)
        found.append((item, f"{where}, {key}[{i}]"))
    return found


# ---------------------------------------------------------------------------- what others answer

# The other names in an episode's file, and in the figures of an evaluation.
TAKEN = ("task_id", "task_type", "reward", "truncated", "steps", "last", "invalid", "outgrown")


def sound_text(text: Any, where: str, what: str) -> str:
    need(isinstance(text, str), where, f"{what} is not text but {type(text).__name__}")
    problem = f"{what} holds half of a surrogate pair; re-encode it as UTF-8"
    need(not re.search("[\ud800-\udfff]", text), where, problem)
    return str(text)


def sound_number(value: Any, where: str, what: str, least: float = -1e9, most: float = 1e9):
    """The number as Python's own: NumPy and torch have theirs."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    bounds = f" from {least:g} to {most:g}" if most < 1e9 else ""
    problem = f"{what} is {value!r:.60}; it must be a number{bounds}"
    # nan compares false.
    need(isinstance(value, (int, float)) and least <= value <= most, where, problem)
    return value


def sound_reward(value: Any, where: str, what: str = "the reward") -> float:
    return float(sound_number(value, where, what, 0, 1))


def sound_step(answer: Any, where: str) -> tuple[str, float, bool, dict]:
    """What episode.step answered, as the top of envs.py promises it."""
    problem = f"the answer is {answer!r:.60}; it must be (observation, reward, done, info)"
    need(isinstance(answer, tuple) and len(answer) == 4, where, problem)
    observation, reward, done, info = answer
    need(isinstance(info, dict) and "valid" in info, where, 'info is no dict with "valid"')
    figures = {}
    for name, figure in info.items():
        problem = f"info[{name!r}] has the name of another figure; call it otherwise"
        need(name not in TAKEN, where, problem)
        figures[name] = sound_number(figure, where, f"info[{name!r}]")
    figures["valid"] = bool(sound_number(figures["valid"], where, 'info["valid"]', 0, 1))
    observation = sound_text(observation, where, "the observation")
    done = bool(sound_number(done, where, '"done"', 0, 1))
    return observation, sound_reward(reward, where), done, figures
