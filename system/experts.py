"""Expert trajectories and the prompt: where they come from, before anything is learnt."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.files import parse_json
from envs import (
    load_trajectories,
    prompt_messages,
    save_trajectories,
    some,
    source_file,
    with_example,
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
    experts = renamed(run, env, load_trajectories(config.expert))
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
    experts = without_test_tasks(run, env, experts)[: config.experts or None]
    strange = []
    for expert, task in zip(experts, tasks_of(env, experts)):
        strange += [] if task else [expert.task_id]
    if strange and plays:
        raise InputError(
            f"{config.expert}: {strange[0]!r} is no task of {config.env}, but {config.method} "
            "plays the tasks of the expert file; name them as the environment does, such as "
            f"{env.splits['train'][0]!r}"
        )
    if strange:
        run.say(
            f"{config.expert}: {len(strange)} of {len(experts)} are no tasks of {config.env}, such "
            f"as {strange[0]!r}; whether they are among its test tasks is not known"
        )
    return experts


def tasks_of(env, experts: list[Trajectory]) -> list[str | None]:
    """The environment's tasks that these trajectories show; None where it has no such task."""
    if hasattr(env, "task_of"):
        return [env.task_of(expert) for expert in experts]
    known = set().union(*env.splits.values())
    return [expert.task_id if expert.task_id in known else None for expert in experts]


def renamed(run: RunDir, env, experts: list[Trajectory]) -> list[Trajectory]:
    """The trajectories under the environment's names of their tasks, one of each task."""
    named = {}
    for expert, task in zip(experts, tasks_of(env, experts)):
        expert.task_id = task or expert.task_id
        named.setdefault(expert.task_id, expert)
    if len(named) < len(experts):
        again = len(experts) - len(named)
        run.say(f"{run.config.expert}: {again} plays of a task that has one already are left out")
    return list(named.values())


def without_test_tasks(run: RunDir, env, experts: list[Trajectory]) -> list[Trajectory]:
    """Drops tasks of the splits that are only tested on, unless --train-on-test; says so."""
    config = run.config
    train, dev = (set(env.splits.get(name, [])) for name in ("train", "dev"))
    tested = set().union(*env.splits.values()) - train - dev
    seen = sum(one.task_id in dev for one in experts)
    if seen:
        run.say(f"{config.expert}: {seen} plays are of tasks of dev, whose figures flatter then")
    kept = [one for one in experts if one.task_id not in tested]
    found = f"{config.expert}: {len(experts) - len(kept)} of {len(experts)} plays are of test tasks"
    if len(kept) == len(experts):
        return experts
    if config.train_on_test:
        run.say(f"{found} and are learnt (--train-on-test); figures on test flatter then")
        return experts
    if not kept:
        raise InputError(f"{found}; give plays of train tasks, or --train-on-test")
    run.say(f"{found} and are left out")
    return kept


def load_shown(run: RunDir, env, split: str, tasks: list[str]) -> list[Trajectory]:
    """The environment's own expert on tasks of a split, as far as it solves them in time."""
    path = run.path(f"experts_{split}.jsonl")
    if run.ranks.rank == 0 and not path.exists():
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
    for expert in shown:
        if expert is None or expert.reward < 1:
            continue
        if len(expert.steps) <= env.max_steps(expert.task_id):
            experts.append(expert)
    return experts


def give_prompt(config, env, experts: list[Trajectory]) -> list[dict]:
    """Every conversation's opening, in training and evaluation.

    An expert file's instruction stands, unless --prompt-file. With --prompt full it gets the
    environment's example if it has none: the paper's prompt has one (section 6.4).
    """
    if config.expert and experts[0].prompt and not config.prompt_file:
        if config.prompt == "full":
            for expert in experts:
                expert.prompt = with_example(expert.prompt, env)
        return experts[0].prompt
    if config.prompt_file:
        prompt = read_prompt(config.prompt_file)
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
    messages = parse_json(text, path)
    for number, message in enumerate(messages):
        is_message = isinstance(message, dict) and set(message) == {"role", "content"}
        if not is_message or not all(isinstance(value, str) for value in message.values()):
            raise InputError(f'{path}: message {number} is not {{"role": text, "content": text}}')
    return messages
