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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def rewards(runs: dict[str, list[str]], split: str, name: str = "final") -> dict[str, np.ndarray]:
    """label -> [seeds, tasks], the same seeds and tasks in the same order for every label, or an error."""
    found, first = {}, None
    for label, paths in runs.items():
        episodes = [sorted(rows(Path(run, f"eval/{name}_{split}.jsonl")), key=lambda r: r["task_id"]) for run in paths]
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


def spent(paths: list[str]) -> dict[str, float]:
    """Means over seeds: updates; million tokens that updates pushed through the model; thousand tokens that the agent wrote to learn
    from; minutes of sampling and training, as the run took them."""
    every = [rows(Path(p, "metrics.jsonl")) for p in paths]
    mean = lambda f: float(np.mean([sum(f(r) for r in run) for run in every]))
    update = lambda r: "grad_norm" in r
    return {"updates": mean(update), "million_tokens": mean(lambda r: r["tokens"] if update(r) else 0) / 1e6,
            "sampled_thousand": mean(lambda r: r["tokens"] if r["phase"] == "explore" else r.get("practice_tokens", 0)) / 1e3,
            "minutes": mean(lambda r: r.get("seconds", 0)) / 60}


def table(runs: dict[str, list[str]], to: str, splits: list[str], paper: dict[str, float] | None = None,
          against: tuple[str, ...] = ()) -> tuple[list[str], dict]:
    """Markdown lines and the same figures; paper: a column of it; against: baselines, the best of which (on these tasks, which flatters
    it) is a second thing to be compared with."""
    success = {s: {k: (x >= 1).astype(float) for k, x in rewards(runs, s).items()} for s in splits}
    together = {label: np.concatenate([success[s][label] for s in splits], 1) for label in runs}
    best = max((k for k in against if k in runs), key=lambda k: together[k].mean(), default=None)
    n = len(next(iter(runs.values())))
    lines = [f"Success in %, 95% intervals in brackets; {n} seed{'s' * (n > 1)}, "
             f"{', '.join(f'{success[s][next(iter(runs))].shape[1]} {s} tasks' for s in splits)}." +
             " Few seeds make an interval over seeds too narrow: the difference of each seed stands beside it." * (n > 1), "",
             "| method | " + "paper | " * bool(paper) + " | ".join(splits) + f" | minus {to}, paired, all tasks | by seed | " +
             f"minus {best} | " * bool(best) + "updates | million tokens | sampled, thousand | minutes |",
             "|---" * (7 + len(splits) + bool(paper) + bool(best)) + "|"]
    figures = {}
    for label in runs:
        gap = together[label] - together[to]
        cost = spent(runs[label])
        figures[label] = {s: [float(success[s][label].mean()), *interval(success[s][label])] for s in splits} | {
            f"minus {to}": [float(gap.mean()), *interval(gap)], "by seed": gap.mean(1).tolist(), **cost}
        own = label == to
        line = [label, *([str(paper.get(label, "not in it"))] if paper else []), *(cell(success[s][label]) for s in splits),
                "" if own else cell(gap, True), "" if own else ", ".join(f"{100 * x:+.1f}" for x in gap.mean(1))]
        if best:
            figures[label][f"minus {best}"] = [float((together[label] - together[best]).mean()), *interval(together[label] - together[best])]
            line.append("" if label == best else cell(together[label] - together[best], True))
        lines.append("| " + " | ".join([*line, f"{cost['updates']:.0f}", f"{cost['million_tokens']:.2f}", f"{cost['sampled_thousand']:.0f}",
                                        f"{cost['minutes']:.1f}"]) + " |")
    matches = {label: [{r["iteration"]: r for r in rows(Path(p, "metrics.jsonl")) if r["phase"] == "inspect"} for p in paths]
               for label, paths in runs.items()}
    inspected = [label for label in runs if any(matches[label])]
    if inspected:
        lines += ["", "| match with the expert (text / action), per iteration | " + " | ".join(inspected) + " |", "|---" * (1 + len(inspected)) + "|"]
        for i in sorted({i for label in inspected for one in matches[label] for i in one}):
            here = {label: [one[i] for one in matches[label] if i in one] for label in inspected}
            lines.append(f"| {i} | " + " | ".join(" / ".join(f"{100 * np.mean([g[k] for g in here[label]]):.1f}" for k in (
                "match_text", "match_action")) if here[label] else "" for label in inspected) + " |")
    return [*lines, "", "What you just saw: " + verdict(together, to) + "."], figures


def verdict(together: dict[str, np.ndarray], to: str) -> str:
    ours = [k for k in together if k.startswith("StepAgent")]
    low, high = ({k: interval(together[k] - together[to])[side] for k in ours} for side in (0, 1))
    said = []
    for which, one, many in (([k for k in ours if low[k] > 0], f"beats {to}", f"beat {to}"),
                             ([k for k in ours if high[k] < 0], f"falls behind {to}", f"fall behind {to}"),
                             ([k for k in ours if low[k] <= 0 <= high[k]], f"cannot be told from {to} with these tasks",
                              f"cannot be told from {to} with these tasks")):
        if which:
            said.append(f"{' and '.join(which)} {one if len(which) == 1 else many}")
    return "; ".join(said) or f"{len(together)} methods beside {to}"


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
    lines, _ = table(runs, args.to, args.splits.split(","))
    print("\n".join(lines))
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
