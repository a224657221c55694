"""Expert trajectories and the prompt: where they come from, before anything is learnt."""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.files import json_entries, need, read_contents, sound_reward, sound_text, text_of
from envs import (
    check_roles,
    load_trajectories,
    prompt_messages,
    save_trajectories,
    some,
    source_file,
    with_example,
)
from system.run_dir import ROOT, RunDir
from trajectory import InputError, Trajectory


def product_files(config) -> list[Path]:
    """The code that makes the results: a run directory remembers it.

    These are the modules of the repository that are in use, and the file of the environment.
    """
    files = {ROOT / "stepagent.py"}
    files |= {ROOT / "benchmarks/files.py", ROOT / "benchmarks/workers.py"}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "/")
        if path.parent in (ROOT, ROOT / "system"):
            files.add(path)
    # The definition that tests compare with; no run uses it.
    files.discard(ROOT / "naive.py")
    return [*sorted(files), source_file(config.env)]


def load_experts(run: RunDir, env, plays: bool) -> list[Trajectory]:
    """The expert trajectories, from --expert or from the environment's expert.

    plays: the agent plays their tasks, so the environment must know them.
    """
    config = run.config
    if not config.expert:
        path = run.path("experts.jsonl")
        # Once: all ranks and later starts must have the same.
        if run.ranks.rank == 0 and not path.exists():
            save_trajectories(str(path), show_train_tasks(run, env))
        run.ranks.barrier()
        return load_trajectories(str(path))[: config.experts or None]
    experts = load_trajectories(config.expert)
    tasks = tasks_of(env, experts)
    named = {}
    for expert, task in zip(experts, tasks):
        expert.task_id = task or expert.task_id
        named.setdefault(expert.task_id, expert)
    experts = sift(run, experts, list(named.values()), "that repeat a task")
    if hasattr(env, "right"):
        experts = sift(run, experts, env.right(experts), "whose answer is no exact match")
    # A name that is not the environment's may look like one of another task.
    shown = set(tasks)
    train, dev = (shown.intersection(env.splits.get(name, [])) for name in ("train", "dev"))
    if not config.train_on_test:
        tested = (shown & set().union(*env.splits.values())) - train - dev
        kept = [expert for expert in experts if expert.task_id not in tested]
        experts = sift(run, experts, kept, "of test tasks, unless --train-on-test,")
    experts = experts[: config.experts or None]
    check_rewards(run, experts)
    if seen := sum(expert.task_id in dev for expert in experts):
        run.say(f"{config.expert}: {seen} of {len(experts)} plays are of dev tasks")
    strange = [expert.task_id for expert in experts if expert.task_id not in shown]
    if strange and plays:
        raise InputError(
            f"{config.expert}: {strange[0]!r} is no task of {config.env}, but {config.method} "
            "plays the tasks of the expert file; name them as the environment does, such as "
            f"{list(itertools.chain(*env.splits.values()))[:1]}"
        )
    if strange:
        run.say(
            f"{config.expert}: {len(strange)} of {len(experts)} plays, such as {strange[0]!r}, are "
            f"of no task that {config.env} has; some may be of its test tasks"
        )
    return experts


def tasks_of(env, experts: list[Trajectory]) -> list[str | None]:
    """The environment's tasks that these trajectories show; None where it has no such task."""
    if hasattr(env, "task_of"):
        return [env.task_of(expert) for expert in experts]
    known = set().union(*env.splits.values())
    return [expert.task_id if expert.task_id in known else None for expert in experts]


def sift(run: RunDir, experts: list, kept: list, which: str) -> list[Trajectory]:
    """The kept ones of a file; says which are not. InputError if there are none."""
    file, total = run.config.expert, len(experts)
    if not kept:
        raise InputError(f"{file}: all {total} plays {which} are left out; give another file")
    if len(kept) < total:
        run.say(f"{file}: {total - len(kept)} of {total} plays {which} are left out")
    return kept


def check_rewards(run: RunDir, experts: list[Trajectory]) -> None:
    """Whatever the rewards in a file, its trajectories are imitated: it must show some success."""
    path = run.config.expert
    failed = [expert.task_id for expert in experts if expert.reward == 0]
    if len(failed) == len(experts):
        raise InputError(
            f"{path}: all {len(experts)} rewards are 0; give successful plays, or write what "
            "rewards they got"
        )
    if failed:
        run.say(
            f"{path}: {len(failed)} of {len(experts)} trajectories have reward 0, {failed[0]!r} "
            "first; they are imitated like the others"
        )


def load_shown(run: RunDir, env, split: str, tasks: list[str]) -> list[Trajectory]:
    """The environment's own expert on tasks of a split, as far as it solves them in time."""
    path = run.path(f"agreement/experts_{split}.jsonl")
    if run.ranks.rank == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_trajectories(str(path), show_tasks(run, env, tasks))
    run.ranks.barrier()
    return load_trajectories(str(path)) if path.stat().st_size else []


def show_train_tasks(run: RunDir, env) -> list[Trajectory]:
    """The environment's own expert on train tasks; what it does not solve in time is left out."""
    tasks = some(env.splits["train"], run.config.experts)
    experts = show_tasks(run, env, tasks)
    if not experts:
        raise InputError(f"{run.config.env}: no expert trajectory; give a file with --expert")
    if len(experts) < len(tasks):
        run.say(
            f"expert: {len(tasks)} tasks; {len(tasks) - len(experts)} that are not solved, or in "
            "more steps than allowed, are left out"
        )
    return experts


def show_tasks(run: RunDir, env, tasks: list[str]) -> list[Trajectory]:
    """The expert trajectories of these tasks that succeed within the environment's steps."""
    with ThreadPoolExecutor(8 if getattr(env, "slow", False) else 1) as pool:
        shown = list(run.bar(pool.map(env.expert, tasks), "expert", len(tasks)))
    experts = []
    for task, expert in zip(tasks, shown):
        if expert is None or check_shown(expert, task).reward < 1:
            continue
        if len(expert.steps) <= env.max_steps(expert.task_id):
            experts.append(expert)
    return experts


def check_shown(expert: Trajectory, task: str) -> Trajectory:
    where = f"the expert of the environment, task {task}"
    is_of_task = isinstance(expert, Trajectory) and expert.task_id == task
    need(is_of_task, where, f"showed {expert!r:.60}; it must be a Trajectory of this task")
    expert.reward = sound_reward(expert.reward, where)
    for step in expert.steps:
        sound_text(step.observation, where, "an observation")
        sound_text(step.action, where, "an action")
    return expert


def give_prompt(config, env, experts: list[Trajectory]) -> list[dict]:
    """Every conversation's opening, in training and evaluation.

    An expert file's instruction stands, unless --prompt-file. With --prompt full it gets the
    environment's example if it has none: the paper's prompt has one (section 6.4).
    """
    prompt = prompt_messages(env) if config.prompt == "full" else []
    if config.prompt_file:
        prompt = read_prompt(config.prompt_file)
    elif config.expert:
        first = experts[0]
        for expert in experts:
            if expert.prompt != first.prompt:
                raise InputError(
                    f"{config.expert}: {expert.task_id!r} has another prompt than "
                    f"{first.task_id!r}, but a run has one; give all the same, or --prompt-file"
                )
        if first.prompt:
            prompt = with_example(first.prompt, env) if config.prompt == "full" else first.prompt
    for expert in experts:
        expert.prompt = prompt
    return prompt


def read_prompt(path: str) -> list[dict]:
    """A user's prompt: a JSON list of chat messages, or the instruction as plain text."""
    text = read_contents(path, "give the file with the prompt").replace("\r\n", "\n").strip()
    if not text:
        raise InputError(f"{path}: empty; give the instruction, or a JSON list of chat messages")
    if not text.startswith("["):
        return [{"role": "user", "content": text}, {"role": "assistant", "content": "OK"}]
    messages = []
    for name, message in json_entries(text, path):
        where = f"{path}, {name}"
        is_message = isinstance(message, dict) and set(message) == {"role", "content"}
        need(is_message, where, 'is not {"role": text, "content": text}')
        messages.append({key: text_of(message, key, where) for key in message})
    check_roles(messages, f"{path}: the messages")
    return messages
