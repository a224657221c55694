"""One table of finished runs, with task-paired differences: python experiments/compare.py LABEL=RUN[,RUN...] ... [--to LABEL]

Several runs of a label are its seeds, in the same order for every label. Intervals are 95% percentile bootstraps over tasks (and
seeds, where there are several); a difference is taken task by task within a seed, so that what both share drops out.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np


def rows(path: Path) -> list[dict]:
    if not path.exists():
        sys.exit(f"error: {path} is missing; let the run finish first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rewards(runs: dict[str, list[str]], split: str) -> dict[str, np.ndarray]:
    """label -> [seeds, tasks], the same seeds and tasks in the same order for every label, or an error."""
    found, first = {}, None
    for label, paths in runs.items():
        episodes = [sorted(rows(Path(run, f"eval/final_{split}.jsonl")), key=lambda r: r["task_id"]) for run in paths]
        seeds = [json.loads(Path(run, "config.json").read_text(encoding="utf-8"))["config"]["seed"] for run in paths]
        played = (seeds, [[r["task_id"] for r in e] for e in episodes])
        first = first or played
        if played != first or any(ids != played[1][0] for ids in played[1]):
            sys.exit(f"error: {label} has other seeds or tasks on {split} than {next(iter(runs))}; a paired table needs the same")
        found[label] = np.array([[r["reward"] for r in e] for e in episodes])
    return found


def interval(x: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Of the mean of x [seeds, tasks]; tasks are drawn for all seeds alike, seeds where there are several."""
    rng = np.random.default_rng(0)
    s, t = x.shape
    means = [x[rng.integers(s, size=s)][:, rng.integers(t, size=t)].mean() for _ in range(draws)]
    return tuple(np.percentile(means, [2.5, 97.5]))


def cell(x: np.ndarray, sign: bool = False) -> str:
    a, b = interval(x)
    return f"{100 * x.mean():{'+' if sign else ''}.1f} [{100 * a:{'+' if sign else ''}.1f}, {100 * b:{'+' if sign else ''}.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN[,RUN...]")
    parser.add_argument("--to", default="SFT+", help="the label that differences are taken to (default: SFT+)")
    parser.add_argument("--splits", default="test,test_unseen")
    parser.add_argument("--out", default="", help="also write the table there, as Markdown")
    args = parser.parse_args()
    runs = {label: paths.split(",") for label, _, paths in (r.partition("=") for r in args.runs)}
    if args.to not in runs:
        sys.exit(f"error: no run has the label {args.to!r}; give --to one of: {', '.join(runs)}")
    splits = args.splits.split(",")
    got = {s: rewards(runs, s) for s in splits}
    success = {(label, s): (got[s][label] >= 1).astype(float) for label in runs for s in splits}
    together = {label: np.concatenate([success[label, s] for s in splits], 1) for label in runs}
    reward = {label: np.concatenate([got[s][label] for s in splits], 1) for label in runs}

    n = len(next(iter(runs.values())))
    lines = [f"Success in %, 95% intervals in brackets; {n} seed{'s' * (n > 1)}, "
             f"{', '.join(f'{success[next(iter(runs)), s].shape[1]} {s} tasks' for s in splits)}." +
             " Few seeds make an interval over seeds too narrow: the difference of each seed stands beside it." * (n > 1), "",
             "| method | " + " | ".join(splits) + f" | mean reward | all tasks, minus {args.to} (paired) | by seed | updates | million tokens |",
             "|---" * (6 + len(splits)) + "|"]
    for label in runs:
        gap = together[label] - together[args.to]
        difference = "" if label == args.to else cell(gap, sign=True)
        each = "" if label == args.to else ", ".join(f"{100 * x:+.1f}" for x in gap.mean(1))
        steps = [[r for r in rows(Path(p, "metrics.jsonl")) if "grad_norm" in r] for p in runs[label]]
        updates, tokens = np.mean([len(s) for s in steps]), np.mean([sum(r["tokens"] for r in s) for s in steps]) / 1e6
        lines.append(f"| {label} | " + " | ".join(cell(success[label, s]) for s in splits) +
                     f" | {reward[label].mean():.3f} | {difference} | {each} | {updates:.0f} | {tokens:.2f} |")
    lines += ["", "| match with the expert (text / action), per iteration | " + " | ".join(runs) + " |", "|---" * (1 + len(runs)) + "|"]
    seen = {label: [{r["iteration"]: r for r in rows(Path(p, "metrics.jsonl")) if r["phase"] == "inspect"} for p in paths]
            for label, paths in runs.items()}
    for i in sorted({i for many in seen.values() for one in many for i in one}):
        figures = []
        for label in runs:
            here = [one[i] for one in seen[label] if i in one]
            figures.append(" / ".join(f"{100 * np.mean([g[k] for g in here]):.1f}" for k in ("match_text", "match_action")) if here else "")
        lines.append(f"| {i} | " + " | ".join(figures) + " |")

    above = [k for k in runs if k.startswith("StepAgent") and interval(together[k] - together[args.to])[0] > 0]
    below = [k for k in runs if k.startswith("StepAgent") and interval(together[k] - together[args.to])[1] < 0]
    said = [f"{' and '.join(above)} beat{'s' * (len(above) == 1)} {args.to}"] * bool(above) + \
           [f"{' and '.join(below)} fall{'s' * (len(below) == 1)} behind {args.to}"] * bool(below)
    even = [k for k in runs if k.startswith("StepAgent") and k not in above + below]
    said += [f"{' and '.join(even)} cannot be told from {args.to} with these tasks"] * bool(even)
    lines += ["", "What you just saw: " + "; ".join(said) + "."]
    print("\n".join(lines))
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
