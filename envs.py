"""Environments: text worlds that an agent plays turn by turn, and files of expert trajectories.

An environment is a class with these attributes and methods, without a base class:
    env.splits            {"train": [task id, ...], "dev": [...], "test": [...], ...}
    env.instruction       the rules of the world and the reply format, as text
    env.example           one train task played by the expert, as text; "" where there is none
    env.max_steps(id)     steps allowed
    env.task_type(id)     the name under which results are grouped
    env.start(id)         -> (episode, first observation); the observation ends with the task.
                          Several threads may call it at once.
    env.expert(id)        -> Trajectory with an empty prompt, or None where nobody shows the task
    episode.step(text)    -> (observation, reward, done, info). text is the agent's whole turn,
                          reward the benchmark's score so far in [0, 1]; info holds "valid" (the
                          world understood the action) and the benchmark's secondary metrics, as
                          numbers. All answers are checked in their turn.
and, where they make sense:
    env.slow              True if a step takes about as long as the model's: worker processes play
                          it, while the model goes on
    env.task_of(expert)   -> the task of a trajectory from an expert file, which may name it in its
                          own way; None if the world has no such task
    env.right(experts)    -> those of an expert file that are right by the benchmark's measure
    env.paper             its sizes in the paper's Table 1, for --stats
    episode.close()       frees what the episode holds
make_env("household") makes one by its name, make_env("path/to/file.py:Class") yours. A world
understands the actions that its original understands; with lenient=1 also nearly right ones.
Bad input (an unknown name or task, a broken file) raises InputError, one line with the remedy.

    python envs.py household --play
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.files import (
    json_entries,
    json_lines,
    need,
    need_count,
    objects_of,
    read_contents,
    sound_reward,
    sound_text,
    text_of,
)
from benchmarks.workers import Workers, load_class
from trajectory import (
    InputError,
    Step,
    Trajectory,
    lenient_action,
    parse_action,
    render,
    stable_seed,
)

# A module is imported only when its environment is asked for. Its FILES says what it needs.
ENVIRONMENTS = {
    "household": "benchmarks.household:Household",
    "scienceworld": "benchmarks.scienceworld:ScienceWorld",
    "alfworld": "benchmarks.alfworld:ALFWorld",
    "webshop": "benchmarks.webshop:WebShop",
    "mind2web": "benchmarks.mind2web:Mind2Web",
    "hotpotqa": "benchmarks.qa:QA",
    "2wikimultihopqa": "benchmarks.qa:QA",
    "musique": "benchmarks.qa:QA",
}
# What every environment has, and what every line of our expert files has.
PROTOCOL = ("splits", "instruction", "example", "max_steps", "task_type", "start", "expert")
ROW_FIELDS = ("task_id", "prompt", "steps", "reward", "truncated")


# ---------------------------------------------------------------------------- environments by name


def find(name: str) -> tuple[str, dict[str, str]]:
    """(source, arguments) of an environment: where its class is, and what the name stands for."""
    if name in ENVIRONMENTS:
        source = ENVIRONMENTS[name]
        # The question benchmarks share one class, which takes their name.
        return source, {"name": name} if source.endswith(":QA") else {}
    file, _, class_name = name.rpartition(":")
    where = f"environment {name!r}"
    problem = f"unknown; choose one of: {', '.join(ENVIRONMENTS)}; or give path/to/file.py:Class"
    need(file.endswith(".py"), where, problem)
    path = Path(file).resolve()
    need(path.is_file(), where, f"there is no file {path}")
    return f"{path}:{class_name}", {}


def source_file(name: str) -> Path:
    """The file that defines an environment."""
    source, _ = find(name)
    module, _, _ = source.rpartition(":")
    if module.endswith(".py"):
        return Path(module)
    return Path(__file__).resolve().parent / f"{module.replace('.', '/')}.py"


def known_options(name: str) -> dict[str, Any]:
    """The options that an environment has, with their defaults."""
    source, arguments = find(name)
    parameters = inspect.signature(load_class(source)).parameters
    return {key: value.default for key, value in parameters.items() if key not in arguments}


def make_env(name: str, workers: int | None = None, lenient: int = 0, **options) -> Any:
    """The environment of that name, or of that path/to/file.py:Class.

    options go to its constructor. workers: the processes that play it, 0 for this process. A slow
    environment gets one for each core of this rank, but at most 8: as many as run_episodes steps
    at once. lenient: 1 to read actions by lenient_action.
    """
    where = f"environment {name!r}"
    source, arguments = find(name)
    known = [*known_options(name), "workers", "lenient"]
    for option in options:
        need(option in known, where, f"no option {option!r}; it has: {', '.join(known)}")
    make = load_class(source)
    if workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, max(1, cores)) if getattr(make, "slow", False) else 0
    need_count(where, "workers", workers, 0, 256)
    need(lenient in (0, 1), where, f"lenient must be 0 or 1, not {lenient!r}")
    arguments |= options
    env = Workers(source, arguments, workers) if workers else make(**arguments)
    if name not in ENVIRONMENTS:
        world = env.env if workers else env
        missing = [part for part in PROTOCOL if not hasattr(world, part)]
        need(not missing, where, f"lacks {', '.join(missing)}; see the top of envs.py")
        for part in ("instruction", "example"):
            sound_text(getattr(world, part), where, part)
    return Lenient(env) if lenient else env


class Lenient:
    """An environment or an episode that is asked for what lenient_action reads."""

    def __init__(self, strict: Any):
        self.strict = strict

    def __getattr__(self, name: str) -> Any:
        return getattr(self.strict, name)

    def start(self, task_id: str) -> tuple[Lenient, str]:
        episode, observation = self.strict.start(task_id)
        return Lenient(episode), observation

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        action = lenient_action(text)
        return self.strict.step(f"Action: {action}" if action else text)


def env_options(text: str) -> dict[str, Any]:
    """ "tasks=boil,melt variations=20" -> {"tasks": "boil,melt", "variations": 20}"""
    options = {}
    for word in text.split():
        key, _, value = word.partition("=")
        need(bool(key and value), "--env-options", f"{word!r} is not key=value")
        if re.fullmatch(r"-?\d+", value):
            options[key] = int(value)
        elif re.fullmatch(r"-?\d*\.\d+", value):
            options[key] = float(value)
        else:
            options[key] = value
    return options


def some(tasks: list[str], most: int) -> list[str]:
    """At most so many tasks (0 = all), in their order, the same ones each time.

    They come from everywhere in the list: lists often go type by type.
    """
    chosen = set(sorted(tasks, key=stable_seed)[: most or None])
    return [task for task in tasks if task in chosen]


def prompt_messages(env: Any) -> list[dict[str, str]]:
    """The opening of every conversation, in ETO's shape: the instruction, then the agent's "OK"."""
    text = env.instruction + example_text(env)
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "OK"}]


def example_text(env: Any) -> str:
    return f"\n\nHere is an example.\n{env.example}" if env.example else ""


def with_example(prompt: list[dict[str, str]], env: Any) -> list[dict[str, str]]:
    """An expert file's prompt with the environment's example after its instruction.

    A prompt that shows turns after the "OK", or speaks of an example, stands as it is.
    """
    talk = [message for message in prompt if message["role"] != "system"]
    if len(talk) != 2 or "example" in talk[0]["content"].lower():
        return prompt
    instruction = talk[0] | {"content": talk[0]["content"] + example_text(env)}
    return [*prompt[:-2], instruction, talk[1]]


# ---------------------------------------------------------------------------- expert files


def load_trajectories(path: str) -> list[Trajectory]:
    """Reads a file of expert trajectories: a JSON list, or one object a line.

    A row is a chat (ETO's, AgentGym's), FireAct's, or save_trajectories'. Of several plays of a
    task the first is kept, the others are named on stderr. So is the number of FireAct's plays that
    are left out: without the right answer, or with a turn that does not act. InputError names the
    file and the row (its line or index).
    """
    trajectories, first_rows, wrong = [], {}, 0
    for row_name, row in read_rows(path):
        where = f"{path}, {row_name}"
        need(isinstance(row, dict), where, "is not a JSON object; expected one trajectory")
        read = reader_of(row)
        trajectory = read(row, where)
        if read is read_fireact and trajectory.reward < 1:
            wrong += 1
            continue
        check_actions(trajectory, where)
        first = first_rows.setdefault(trajectory.task_id, row_name)
        if first != row_name:
            again = f"repeats the id {trajectory.task_id!r} of {first}; left out"
            print(f"{where}: {again}", file=sys.stderr)
            continue
        trajectories.append(trajectory)
    if wrong:
        print(f"{path}: {wrong} plays that fail or do not act are left out", file=sys.stderr)
    problem = "no play in it ends with the right answer; give a file of successful ones"
    need(bool(trajectories), path, problem)
    return trajectories


def read_rows(path: str) -> list[tuple[str, Any]]:
    """[(name of a row, row)]"""
    text = read_contents(path, "give the path of a trajectory file")
    problem = "empty; expected a JSON list, or JSONL with one trajectory a line"
    need(bool(text.strip()), path, problem)
    if not text.lstrip().startswith("["):
        return json_lines(text, path)
    rows = json_entries(text, path)
    need(bool(rows), path, "an empty list; expected at least one trajectory")
    return rows


def reader_of(row: dict) -> Callable[[dict, str], Trajectory]:
    """The function that reads a row of this shape."""
    named = id_key(row)
    if "output" in row or ("messages" in row and not named):
        return read_fireact
    return read_chat if named or "conversations" in row else read_saved


def id_key(row: dict) -> str | None:
    """Under which key a chat has its task: ETO's games have a file, AgentGym's rows an item_id."""
    return next((key for key in ("game_file", "id", "item_id") if key in row), None)


def check_actions(trajectory: Trajectory, where: str) -> None:
    problem = "has no actions; remove the row, or give it at least one turn of the agent"
    need(bool(trajectory.steps), where, problem)
    for i, step in enumerate(trajectory.steps):
        problem = f'action {i} has no "Action:" (it starts {step.action[:40]!r})'
        remedy = 'write it as "Thought: ...\\nAction: ..."'
        need(parse_action(step.action) is not None, where, f"{problem}; {remedy}")


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_chat(row: dict, where: str) -> Trajectory:
    """ETO: {"id", "conversations": [{"from": "human" | "gpt", "value"}, ...], "reward"?}.

    Also with messages for conversations, and role, user, assistant and content for from, human, gpt
    and value. The instruction and the "OK" that answers it become the prompt, never supervised,
    after a system message if there is one. The task and everything after it become steps; a last
    human turn, which no action answers, is left out. So is the label "Observation:", which our
    worlds do not write. Without "reward" the trajectory counts as a success (1.0): ETO keeps only
    those.
    """
    key = id_key(row)
    named = type(row.get(key)) in (str, int)
    need(named, where, "'id' is missing or neither text nor a whole number")
    task_id = text_of({"id": str(row[key])}, "id", where)
    turns = chat_turns(row, where)
    prompt = []
    if turns and turns[0][0] == "system":
        prompt = [{"role": "system", "content": turns.pop(0)[1]}]
    for i, (role, _, at) in enumerate(turns):
        problem = f"is from {role!r}; turns alternate 'human', 'gpt', starting with 'human'"
        need(ROLES.get(role) == ("user", "assistant")[i % 2], at, problem)
    problem = "has no instruction with its 'OK'; expected instruction, OK, task, then turns"
    need(len(turns) >= 2, where, problem)
    texts = [text for _, text, _ in turns]
    problem = 'already acts; insert an "OK" that answers the instruction'
    need(parse_action(texts[1]) is None, turns[1][2], problem)
    prompt += [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    steps = []
    for observation, action in zip(texts[2::2], texts[3::2]):
        steps.append(Step(re.sub(r"^Observation:\s*", "", observation), action))
    reward = sound_reward(row["reward"], where, "'reward'") if "reward" in row else 1.0
    return Trajectory(task_id, prompt, steps, reward)


def chat_turns(row: dict, where: str) -> list[tuple[str, str, str]]:
    """[(role, text, name for error messages)] of a chat's turns."""
    turns = []
    for turn, at in objects_of(row, "messages" if "messages" in row else "conversations", where):
        role = text_of(turn, "role" if "role" in turn else "from", at)
        turns.append((role, text_of(turn, "content" if "content" in turn else "value", at), at))
    return turns


def read_fireact(row: dict, where: str) -> Trajectory:
    """FireAct: {"instruction": the question, "output": "Thought: ...\\nAction: search[..]\\n
    Observation: ...", ...}, or the same turns as messages.

    The question becomes the task id and the first observation; the environment gives the prompt.
    The reward is 1 if the last observation says "reward = True" (an exact match), and every turn
    acts, else 0.
    """
    # Only these files need the question benchmarks.
    from benchmarks.qa import parse_call

    if "messages" in row:
        texts = [text for _, text, _ in chat_turns(row, where)] + ["", ""]
        acts = parse_action(texts[1]) or texts[1].startswith("Observation:")
        need(bool(acts), where, "'id' is missing; only FireAct's chats have none")
        row = {"instruction": texts[0], "output": "\n".join(texts[1:])}
    question = text_of(row, "instruction", where).strip()
    need(question != "", where, "'instruction' is empty; it must be the question")
    parts = re.split(r"(?m)^Observation:", text_of(row, "output", where))
    observation = f"Question: {question}"
    trajectory = Trajectory(question)
    for i, part in enumerate(parts):
        if i:
            observation = part.split("\nThought:")[0].split("\nAction:")[0].strip()
        turn = re.search(r"(?ms)^(?:Thought:\s*(.*?)\n)?Action:\s*(.*?)\s*\Z", part)
        if turn is None:
            return trajectory
        call = parse_call(lenient_action(f"Action: {turn[2]}"))
        problem = f"action {i} is neither search[..] nor finish[..] (it is {turn[2][:40]!r})"
        need(call is not None, where, problem)
        thought = " ".join((turn[1] or "").split())
        action = f"Thought: {thought}\nAction: {call[0].capitalize()}[{call[1]}]"
        trajectory.steps.append(Step(observation, action))
        if call[0] == "finish":
            # What follows is the world's final word.
            trajectory.reward = float(bool(re.search(r"reward = (True|1)\b", parts[-1])))
            return trajectory
    return trajectory


def read_saved(row: dict, where: str) -> Trajectory:
    """A line that save_trajectories wrote."""
    for name in ROW_FIELDS:
        problem = f"{name!r} is missing; a row has task_id, prompt, steps, reward and truncated"
        need(name in row, where, problem)
    prompt, steps = [], []
    for message, at in objects_of(row, "prompt", where):
        prompt.append({key: text_of(message, key, at) for key in ("role", "content")})
    check_roles(prompt, f"{where}: 'prompt'")
    for step, at in objects_of(row, "steps", where):
        steps.append(Step(text_of(step, "observation", at), text_of(step, "action", at)))
    need(isinstance(row["truncated"], bool), where, "'truncated' must be true or false")
    reward = sound_reward(row["reward"], where, "'reward'")
    return Trajectory(text_of(row, "task_id", where), prompt, steps, reward, row["truncated"])


def check_roles(messages: list[dict], where: str) -> None:
    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        del roles[0]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise InputError(
            f"{where} must be an optional system message, then user and assistant by turns, "
            "ending with assistant"
        )


def save_trajectories(path: str, trajectories: list[Trajectory]) -> None:
    """Writes one JSON object a line; text only, as token ids belong to one tokenizer.

    {"task_id", "prompt": [messages], "steps": [{"observation", "action"}], "reward", "truncated"}
    Atomic: the file is whole, or what it was before.
    """
    beside = f"{path}.tmp{os.getpid()}"
    try:
        with open(beside, "w", encoding="utf-8") as file:
            for trajectory in trajectories:
                row = {name: getattr(trajectory, name) for name in ROW_FIELDS}
                row["steps"] = []
                for step in trajectory.steps:
                    row["steps"].append({"observation": step.observation, "action": step.action})
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another folder"
        ) from None
    finally:
        if os.path.exists(beside):
            os.remove(beside)


# ---------------------------------------------------------------------------- the command line


def stats(env: Any) -> None:
    """Prints, by split and task type, how many tasks there are and how the expert does on them."""
    paper = getattr(env, "paper", None)
    if paper:
        sizes = [f"{split} {paper[split] or '-'} tasks" for split in ("train", "dev", "test")]
        print(f"paper: {', '.join(sizes)}, {paper['turns']} turns")
    for split, task_ids in env.splits.items():
        groups: dict[str, list[Trajectory]] = {"all": []}
        for shown in filter(None, map(env.expert, task_ids)):
            groups["all"].append(shown)
            groups.setdefault(env.task_type(shown.task_id), []).append(shown)
        print(f"{split}: {len(task_ids)} tasks, {len(groups['all'])} with an expert")
        for name, group in groups.items():
            count = max(1, len(group))
            turns = sorted(len(shown.steps) for shown in group) or [0]
            words = sum(len(re.findall(r"\w+|[^\w\s]", render(shown))) for shown in group) / count
            solved = sum(shown.reward >= 1 for shown in group) / count
            print(
                f"  {name:12} {len(group):5}  solved {solved:7.2%}  "
                f"turns mean {sum(turns) / count:5.2f} median {turns[len(turns) // 2]} "
                f"max {turns[-1]}  words and marks {words:.0f}"
            )


def play(env: Any, task_id: str) -> None:
    """A person plays one task: type actions, without "Action:"."""
    episode, observation = env.start(task_id)
    print(f"{env.instruction}\n\n{observation}")
    for turn in range(1, env.max_steps(task_id) + 1):
        try:
            action = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        observation, reward, done, info = episode.step(f"Action: {action}")
        understood = "" if info["valid"] else ", not understood"
        print(f"{observation}  [turn {turn}, reward {reward:g}{understood}]")
        if done:
            return


def epilog() -> str:
    """The end of --help: the files and options of all environments."""
    lines = ["files, in the folder given as data=FOLDER, or in the environment's own folder within"]
    lines.append("the one that STEPAGENT_DATA names:")
    for name, source in ENVIRONMENTS.items():
        files = importlib.import_module(source.partition(":")[0]).FILES
        if isinstance(files, dict):
            # The question benchmarks share a module.
            files = files[name]
        lines.append(textwrap.fill(f"  {name}: {files}", 100, subsequent_indent="      "))
    lines += ["", "options of all: workers=N, lenient=1 (see make_env); of each (see its class):"]
    for name in ENVIRONMENTS:
        options = [f"{key}={default}" for key, default in known_options(name).items()]
        lines.append(f"  {name}: {', '.join(options)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Look at an environment.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if {"-h", "--help"} & set(sys.argv):
        # Only help imports all benchmarks.
        parser.epilog = epilog()
    names = f"one of: {', '.join(ENVIRONMENTS)}; or path/to/file.py:Class"
    parser.add_argument("env", help=names)
    parser.add_argument("--task", default=None, help="a task id (default: the first train task)")
    parser.add_argument(
        "--env-options",
        default="",
        help="options of the environment, as key=value words, e.g. 'data=FOLDER'",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    stats_help = "the tasks, and how the expert does on them"
    what.add_argument("--stats", action="store_true", help=stats_help)
    what.add_argument("--expert", action="store_true", help="print one episode of the expert")
    what.add_argument("--play", action="store_true", help="play one task yourself")
    args = parser.parse_args()
    # Ends quietly where `head` has read enough.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    env = make_env(args.env, **env_options(args.env_options))
    task = args.task or env.splits["train"][0]
    if args.stats:
        stats(env)
    elif args.play:
        play(env, task)
    else:
        shown = env.expert(task)
        print(render(shown) if shown else f"{task}: there is no expert for this task")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
