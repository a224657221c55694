"""Replays the scripted experts through fresh episodes: is their reward full, does the world say the
same again, and how fast is it?

    python experiments/replay.py        # every environment that has its files and packages here
    python experiments/replay.py alfworld --tasks 0 --workers 1 2 4

Files are looked for in the folder that STEPAGENT_DATA names. ScienceWorld: one variation of each
task and split. Several environments are written to experiments/results/replay.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from envs import ENVIRONMENTS, make_env, some
from system.files import write_text
from trajectory import InputError, Trajectory

ROOT = Path(__file__).resolve().parents[1]
# Of MuSiQue perhaps only a dev file is at hand.
OPTIONS = {"musique": {"train_from_dev": 60}, "scienceworld": {"variations": 1}}
HEAD = (
    "| environment | tasks | with an expert | full reward | mean reward | within the step limit "
    "| said the same again | turns | seconds to start | steps/s |\n" + "|---" * 10 + "|"
)
NOTE = "Steps/s: starts counted in. Slow worlds with so many processes, each playing one at a time."


def again(env, shown: Trajectory) -> tuple[float, bool, float]:
    """Reward, whether every observation was the expert's, and the seconds that the start took."""
    started = time.perf_counter()
    episode, observation = env.start(shown.task_id)
    seconds, same, reward = time.perf_counter() - started, True, 0.0
    for step in shown.steps:
        same &= observation == step.observation
        observation, reward, _, _ = episode.step(step.action)
    if hasattr(episode, "close"):
        episode.close()
    return reward, same, seconds


def replay(name: str, shown: list[Trajectory], workers: int) -> tuple[list[tuple], float]:
    """What again() says of each, and steps per second; workers: 0 = in this process."""
    env = make_env(name, workers=workers, **OPTIONS.get(name, {}))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        # Starts the workers.
        list(pool.map(partial(again, env), shown[:workers]))
        started = time.perf_counter()
        played = pool.map(partial(again, env), shown)
        found = list(tqdm(played, f"{name}: replay, {workers} workers", len(shown)))
    steps = sum(len(trajectory.steps) for trajectory in shown)
    return found, steps / (time.perf_counter() - started)


def row(name: str, tasks: int, workers: list[int]) -> str:
    env = make_env(name, **OPTIONS.get(name, {}))
    slow = getattr(env, "slow", False)
    every = list(dict.fromkeys(task for ids in env.splits.values() for task in ids))
    chosen = some(every, tasks if slow else 0)
    with ThreadPoolExecutor(8 if slow else 1) as pool:
        experts = tqdm(pool.map(env.expert, chosen), f"{name}: expert", len(chosen))
        shown = [trajectory for trajectory in experts if trajectory]
    if slow:
        found, rate = replay(name, shown, workers[0])
        speeds = [f"{workers[0]}: {rate:,.0f}"]
        for count in workers[1:]:
            speeds.append(f"{count}: {replay(name, shown[:60], count)[1]:,.0f}")
    else:
        found, rate = replay(name, shown, 0)
        speeds = [f"{rate:,.0f} in this process"]
    rewards, same, seconds = zip(*found)
    within = sum(len(t.steps) <= env.max_steps(t.task_id) for t in shown)
    turns = sum(len(trajectory.steps) for trajectory in shown) / len(shown)
    cells = [name, f"{len(chosen)} of {len(every)}", len(shown), sum(r >= 1 for r in rewards)]
    cells += [f"{sum(rewards) / len(shown):.3f}", within, sum(same), f"{turns:.1f}"]
    cells += [f"{sum(seconds) / len(shown):.2g}", "; ".join(speeds)]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(ENVIRONMENTS)
    parser.add_argument("envs", nargs="*", metavar="ENV", help=f"of {names} (default: all)")
    slow = "tasks of each slow environment, from all splits, 0 = all (default: 200)"
    parser.add_argument("--tasks", type=int, default=200, help=slow)
    processes = "processes of slow environments (default: 1 2)"
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help=processes)
    options = parser.parse_args()
    lines = [" ".join(["`python experiments/replay.py", *sys.argv[1:]]) + "`", "", HEAD]
    for name in options.envs or ENVIRONMENTS:
        try:
            lines.append(row(name, options.tasks, options.workers))
        except InputError as error:
            lines.append(f"| {name} | not run: {error} |" + " |" * 8)
        print(lines[-1], flush=True)
    if len(options.envs) != 1:
        write_text(ROOT / "experiments/results/replay.md", "\n".join([*lines, "", NOTE, ""]))


if __name__ == "__main__":
    main()
