"""Replays the scripted experts through fresh episodes: do they get full reward, does the world say the same again, and how fast is it?

    python experiments/replay.py                                    # household, and whatever else has its files and packages here
    python experiments/replay.py alfworld --tasks 0 --workers 1 2 4

Files are looked for in the folder that STEPAGENT_DATA names. -> experiments/results/replay.md (with several environments)
"""
from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tqdm import tqdm  # noqa: E402

from envs import ENVIRONMENTS, make_env, some  # noqa: E402
from parallel import write_text  # noqa: E402
from rollout import InputError, Trajectory  # noqa: E402

OPTIONS = {"musique": {"train_from_dev": 60}}                            # of which only a dev file may be at hand
HEAD = ("| environment | tasks | with an expert | full reward | mean reward | said the same again | turns | seconds to start | "
        "steps/s, of that many worlds at once in worker processes |")


def again(env, t: Trajectory) -> tuple[float, bool, float, float]:
    """-> reward, whether every observation was the expert's, seconds to start, seconds of all steps."""
    began = time.perf_counter()
    episode, observation = env.start(t.task_id)
    started, same = time.perf_counter(), True
    for step in t.steps:
        same &= observation == step.observation
        observation, reward, _, _ = episode.step(step.action)
    ended = time.perf_counter()
    if hasattr(episode, "close"):
        episode.close()
    return reward, same, started - began, ended - started


def row(name: str, tasks: int, workers: list[int]) -> str:
    options, slow = OPTIONS.get(name, {}), getattr(ENVIRONMENTS[name], "slow", False)
    env, speeds = make_env(name, **options), []
    every = list(dict.fromkeys(task for ids in env.splits.values() for task in ids))
    chosen = some(every, tasks if slow else 0)
    with ThreadPoolExecutor(8 if slow else 1) as pool:
        shown = [t for t in tqdm(pool.map(env.expert, chosen), f"{name}: expert", len(chosen)) if t]
    for n in workers if slow else [0]:
        played = make_env(name, workers=n, **options)
        few, since = shown if n == workers[0] or not slow else shown[:60], time.perf_counter()
        with ThreadPoolExecutor(max(1, n)) as pool:
            found = list(tqdm(pool.map(lambda t: again(played, t), few), f"{name}: replay, {n} workers", len(few)))
        wall = time.perf_counter() - since
        speeds.append((n, sum(len(t.steps) for t in few) / (wall if n > 1 else sum(x[3] for x in found))))
        if n == workers[0] or not slow:
            first = found
    rewards, same, starts, _ = zip(*first)
    speed = "; ".join(f"{n}: {x:,.0f}" if slow else f"{x:,.0f} in this process" for n, x in speeds)
    return (f"| {name} | {len(chosen)} of {len(every)} | {len(shown)} | {sum(r >= 1 for r in rewards)} | {sum(rewards) / len(rewards):.3f} | {sum(same)} | "
            f"{sum(len(t.steps) for t in shown) / len(shown):.1f} | {sum(starts) / len(starts):.2g} | {speed} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("envs", nargs="*", metavar="ENV", help=f"of {', '.join(ENVIRONMENTS)} (default: all)")
    parser.add_argument("--tasks", type=int, default=200, help="at most so many of each slow environment, from all splits, 0 = all (default: 200)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker processes of slow environments (default: 1 2)")
    args = parser.parse_args()
    lines = [f"`python experiments/replay.py {' '.join(sys.argv[1:])}`".replace(" `", "`"), "", HEAD, "|---" * 9 + "|"]
    for name in args.envs or ENVIRONMENTS:
        try:
            lines.append(row(name, args.tasks, args.workers))
        except InputError as error:
            lines.append(f"| {name} | not run: {error} |" + " |" * 7)
        print(lines[-1], flush=True)
    lines += ["", "With several workers the rate holds starting the games; with one, or in this process, it is of steps alone."]
    if len(args.envs) != 1:
        write_text(ROOT / "experiments/results/replay.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
