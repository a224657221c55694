"""Expert trajectories and the prompt: where they come from, before anything is learnt."""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.files import json_entries, need, sound_reward, sound_text, text_of
from envs import (
    check_roles,
    load_trajectories,
    prompt_messages,
    save_trajectories,
    some,
    source_file,
)
from system.files import read_text
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
    if hasattr(env, "right"):
        right = env.right(experts)
        if not right:
            raise InputError(
                f"{config.expert}: none of its {len(experts)} answers is right; give a file of "
                "successful plays"
            )
        if len(right) < len(experts):
            run.say(
                f"{config.expert}: {len(experts) - len(right)} of {len(experts)} plays whose "
                "answer is no exact match are left out"
            )
        experts = right
    experts = experts[: config.experts or None]
    if plays:
        tasks = list(itertools.chain(*env.splits.values()))
        strange = sorted({expert.task_id for expert in experts} - set(tasks))
        if strange:
            raise InputError(
                f"{config.expert}: {strange[0]!r} is no task of {config.env}, but {config.method} "
                "plays the tasks of the expert file; name them as the environment does, such as "
                f"{tasks[:1]}"
            )
    return experts


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
    """Every conversation's opening; an expert file's prompts stand, unless --prompt-file."""
    from_file = bool(config.expert and experts[0].prompt) and not config.prompt_file
    if config.prompt_file:
        prompt = read_prompt(config.prompt_file)
    elif from_file:
        return experts[0].prompt
    else:
        prompt = prompt_messages(env) if config.prompt == "full" else []
    for expert in experts:
        expert.prompt = prompt
    return prompt


def read_prompt(path: str) -> list[dict]:
    """A user's prompt: a JSON list of chat messages, or the instruction as plain text."""
    text = read_text(Path(path)).strip()
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
