"""One table of finished runs, with task-paired differences: python experiments/compare.py LABEL=RUN[,RUN...] ... [--to LABEL]

A run is a run directory, or the file of a few kB that `keep` makes of one: each episode's reward, and figures by phase and iteration.
Several runs of a label are its seeds, in the same order for every label. Intervals are 95% percentile bootstraps over tasks (and
seeds, where there are several); a difference is taken task by task within a seed, so that what both share drops out.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np


def rows(path: Path) -> list[dict]:
    if not path.exists():
        sys.exit(f"error: {path} is missing; let the run finish first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@lru_cache(maxsize=None)
def load(run: str) -> dict:
    """{"seed", "metrics": rows, "eval": {"final_test": {"tasks": which, in short, "rewards": in the order of their names}, ..}}"""
    if run.endswith(".json"):
        return json.loads(Path(run).read_text(encoding="utf-8"))
    played = {path.stem: sorted(rows(path), key=lambda r: r["task_id"]) for path in sorted(Path(run, "eval").glob("*.jsonl"))}
    which = lambda episodes: hashlib.sha1("\n".join(r["task_id"] for r in episodes).encode()).hexdigest()[:12]
    return {"seed": json.loads(Path(run, "config.json").read_text(encoding="utf-8"))["config"]["seed"], "metrics": rows(Path(run, "metrics.jsonl")),
            "eval": {name: {"tasks": which(episodes), "rewards": [r["reward"] for r in episodes]} for name, episodes in played.items()}}


def keep(run: str, file: Path) -> None:
    """The run without its episodes' texts, and its updates as one line for each phase and iteration: their number, sums of tokens and seconds,
    means of the rest."""
    whole, groups, lines = load(run), {}, []
    for r in whole["metrics"]:
        if "grad_norm" not in r:
            lines.append(r)
            continue
        key = (r["phase"], r["iteration"])
        if key not in groups:
            groups[key] = []
            lines.append(groups[key])
        groups[key].append(r)
    total = lambda group, k: sum(r[k] for r in group) / (1 if k in ("tokens", "seconds", "trajectories") else len(group))
    lines = [x if isinstance(x, dict) else {"phase": x[0]["phase"], "iteration": x[0]["iteration"], "updates": len(x)} | {
        k: total(x, k) for k in x[0] if k not in ("phase", "iteration", "step", "time")} for x in lines]
    lines = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in r.items() if k not in ("time", "by_type")} for r in lines]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(whole | {"metrics": lines}, separators=(",", ":")) + "\n", encoding="utf-8")


def rewards(runs: dict[str, list[str]], split: str, name: str = "final") -> dict[str, np.ndarray]:
    """label -> [seeds, tasks], the same seeds and tasks in the same order for every label, or an error."""
    found, first = {}, None
    for label, paths in runs.items():
        for path in paths:
            if f"{name}_{split}" not in load(path)["eval"]:
                sys.exit(f"error: {path} has not played {split} ({name}); let the run finish first")
        episodes = [load(path)["eval"][f"{name}_{split}"] for path in paths]
        played = [load(path)["seed"] for path in paths], [e["tasks"] for e in episodes]
        first = first or played
        if played != first or len(set(played[1])) > 1:
            sys.exit(f"error: {label} has other seeds or tasks on {split} than {next(iter(runs))}; a paired table needs the same")
        found[label] = np.array([e["rewards"] for e in episodes])
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
    every = [load(p)["metrics"] for p in paths]
    mean = lambda f: float(np.mean([sum(f(r) for r in run) for run in every]))
    update = lambda r: "grad_norm" in r
    return {"updates": mean(lambda r: r.get("updates", 1) if update(r) else 0), "million_tokens": mean(lambda r: r["tokens"] if update(r) else 0) / 1e6,
            "sampled_thousand": mean(lambda r: r["tokens"] if r["phase"] == "explore" else r.get("practice_tokens", 0)) / 1e3,
            "minutes": mean(lambda r: r.get("seconds", 0)) / 60}


def table(runs: dict[str, list[str]], to: str, splits: list[str], paper: dict[str, float] | None = None,
          against: tuple[str, ...] = ()) -> tuple[list[str], dict]:
    """Markdown lines and the same figures; paper: a column of it; against: baselines, the best of which (on these tasks, which flatters
    it) is compared with, too. A run labelled SFT is the common start, and gets a column of its own."""
    if to not in runs:
        sys.exit(f"error: {to} has no finished runs; let them finish first")
    success = {s: {k: (x >= 1).astype(float) for k, x in rewards(runs, s).items()} for s in splits}
    together = {label: np.concatenate([success[s][label] for s in splits], 1) for label in runs}
    best = max((k for k in against if k in runs), key=lambda k: together[k].mean(), default=None)
    n, start = len(next(iter(runs.values()))), "SFT" in runs and to != "SFT"
    lines = [f"Success in %, 95% intervals in brackets; {n} seed{'s' * (n > 1)}, "
             f"{', '.join(f'{success[s][next(iter(runs))].shape[1]} {s} tasks' for s in splits)}." +
             " Few seeds make an interval over seeds too narrow: the difference of each seed stands beside it." * (n > 1), "",
             "| method | " + "paper | " * bool(paper) + " | ".join(splits) + f" | minus {to}, paired, all tasks | by seed | " +
             "minus SFT | " * start + f"minus {best} | " * bool(best) + "updates | million tokens | sampled, thousand | minutes |",
             "|---" * (7 + len(splits) + bool(paper) + start + bool(best)) + "|"]
    figures = {}
    for label in runs:
        gap = together[label] - together[to]
        cost = spent(runs[label])
        figures[label] = {s: [float(success[s][label].mean()), *interval(success[s][label])] for s in splits} | {
            f"minus {to}": [float(gap.mean()), *interval(gap)], "by seed": gap.mean(1).tolist(), **cost} | ({"paper": paper.get(label)} if paper else {})
        own = label == to
        line = [label, *([str(paper.get(label, "not in it"))] if paper else []), *(cell(success[s][label]) for s in splits),
                "" if own else cell(gap, True), "" if own else ", ".join(f"{100 * x:+.1f}" for x in gap.mean(1))]
        if start:
            gap = together[label] - together["SFT"]
            figures[label]["minus SFT"] = [float(gap.mean()), *interval(gap)]
            line.append("" if label == "SFT" else cell(gap, True))
        if best:
            figures[label][f"minus {best}"] = [float((together[label] - together[best]).mean()), *interval(together[label] - together[best])]
            line.append("" if label == best else cell(together[label] - together[best], True))
        lines.append("| " + " | ".join([*line, f"{cost['updates']:.0f}", f"{cost['million_tokens']:.2f}", f"{cost['sampled_thousand']:.0f}",
                                        f"{cost['minutes']:.1f}"]) + " |")
    matches = {label: [{r["iteration"]: r for r in load(p)["metrics"] if r["phase"] == "inspect"} for p in paths]
               for label, paths in runs.items()}
    inspected = [label for label in runs if any(matches[label])]
    if inspected:
        lines += ["", "| match with the expert (text / action), per iteration | " + " | ".join(inspected) + " |", "|---" * (1 + len(inspected)) + "|"]
        for i in sorted({i for label in inspected for one in matches[label] for i in one}):
            here = {label: [one[i] for one in matches[label] if i in one] for label in inspected}
            lines.append(f"| {i} | " + " | ".join(" / ".join(f"{100 * np.mean([g[k] for g in here[label]]):.1f}" for k in (
                "match_text", "match_action")) if here[label] else "" for label in inspected) + " |")
    return [*lines, "", "What you just saw: " + verdict(together, to) + "."], figures


def short(figures: dict, splits: list[str], to: str) -> list[str]:
    """The README's table, of what `table` has written: success by split, differences to the start and to the control, minutes."""
    one = lambda x, sign="": f"{100 * x[0]:{sign}.1f} [{100 * x[1]:{sign}.1f}, {100 * x[2]:{sign}.1f}]"
    lines = ["| method | paper | " + " | ".join(splits) + f" | minus SFT | minus {to} | minutes |", "|---" * (5 + len(splits)) + "|"]
    for label, f in figures.items():
        gaps = ["" if label == other else one(f[f"minus {other}"], "+") for other in ("SFT", to)]
        lines.append("| " + " | ".join([label, str(f["paper"] or "not in it"), *(one(f[s]) for s in splits), *gaps, f"{f['minutes']:.1f}"]) + " |")
    return lines


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
