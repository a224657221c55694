"""Replays the scripted experts through fresh episodes: do they get full reward, does the world say the same again, and how fast is it?

    python experiments/replay.py                                    # household, and whatever else has its files and packages here
    python experiments/replay.py alfworld --tasks 0 --workers 1 2 4

Files are looked for in the folder that STEPAGENT_DATA names; where it has none of Mind2Web, recordings of our own stand in. ScienceWorld: one
variation of each task and split. -> experiments/results/replay.md (with several environments)
"""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from tqdm import tqdm  # noqa: E402

from envs import ENVIRONMENTS, make_env, some  # noqa: E402
from parallel import write_text  # noqa: E402
from rollout import InputError, Trajectory  # noqa: E402

OPTIONS = {"musique": {"train_from_dev": 60},                            # of which only a dev file may be at hand
           "scienceworld": {"variations": 1}}
HEAD = ("| environment | tasks | with an expert | full reward | mean reward | within the step limit | said the same again | turns | seconds to start | "
        "steps/s |")


def recordings(folder: str, tasks: int = 40, elements: int = 1000) -> str:
    """Mind2Web's format, pages of about as many elements as the real ones have."""
    import test_mind2web as own
    page = own.PAGE.replace("</body>", "".join(
        f'<div backend_node_id="{1000 + i}"><a backend_node_id="{10000 + i}" title="offer {i}">Offer number {i}</a></div>' for i in range(elements)) + "</body>")
    acts = [own.action(f"a{i}", "CLICK", [["10"], ["40"], ["12", "10"]][i % 3], page=page) for i in range(7)]
    for act in acts:
        act["neg_candidates"] += [own.candidate(str(10000 + i)) for i in range(elements)]
    return own.write(Path(folder), [own.task(f"r{i}", acts) for i in range(tasks)])


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
    label, folder = name, tempfile.TemporaryDirectory()                  # goes with the last reference
    if name == "mind2web" and not os.path.isdir(os.path.join(os.environ.get("STEPAGENT_DATA", ""), name)):
        options, label = {"data": recordings(folder.name), "dev": 5}, "mind2web, own recordings"
    env, speeds = make_env(name, **options), []
    every = list(dict.fromkeys(task for ids in env.splits.values() for task in ids))
    chosen = some(every, tasks if slow else 0)
    with ThreadPoolExecutor(8 if slow else 1) as pool:
        shown = [t for t in tqdm(pool.map(env.expert, chosen), f"{name}: expert", len(chosen)) if t]
    for n in workers if slow else [0]:
        played = make_env(name, workers=n, **options)
        few = shown if n == workers[0] or not slow else shown[:60]
        with ThreadPoolExecutor(max(1, n)) as pool:
            list(pool.map(lambda t: again(played, t), few[:n]))          # starts the workers
            since = time.perf_counter()
            found = list(tqdm(pool.map(lambda t: again(played, t), few), f"{name}: replay, {n} workers", len(few)))
        wall = time.perf_counter() - since
        speeds.append((n, sum(len(t.steps) for t in few) / wall))
        if n == workers[0] or not slow:
            first = found
    rewards, same, starts, _ = zip(*first)
    speed = "; ".join(f"{n}: {x:,.0f}" if slow else f"{x:,.0f} in this process" for n, x in speeds)
    within = sum(len(t.steps) <= env.max_steps(t.task_id) for t in shown)
    return (f"| {label} | {len(chosen)} of {len(every)} | {len(shown)} | {sum(r >= 1 for r in rewards)} | {sum(rewards) / len(rewards):.3f} | {within} | {sum(same)} | "
            f"{sum(len(t.steps) for t in shown) / len(shown):.1f} | {sum(starts) / len(starts):.2g} | {speed} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("envs", nargs="*", metavar="ENV", help=f"of {', '.join(ENVIRONMENTS)} (default: all)")
    parser.add_argument("--tasks", type=int, default=200, help="at most so many of each slow environment, from all splits, 0 = all (default: 200)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker processes of slow environments (default: 1 2)")
    args = parser.parse_args()
    lines = [f"`python experiments/replay.py {' '.join(sys.argv[1:])}`".replace(" `", "`"), "", HEAD, "|---" * 10 + "|"]
    for name in args.envs or ENVIRONMENTS:
        try:
            lines.append(row(name, args.tasks, args.workers))
        except InputError as error:
            lines.append(f"| {name} | not run: {error} |" + " |" * 8)
        print(lines[-1], flush=True)
    lines += ["", "Steps/s: starts counted in. Of slow worlds with that many worker processes, each playing one world at a time."]
    if len(args.envs) != 1:
        write_text(ROOT / "experiments/results/replay.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
