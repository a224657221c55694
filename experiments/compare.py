"""Finished runs in one table, compared task by task.

    python experiments/compare.py LABEL=RUN[,RUN...] ... [--to LABEL] [--out FILE]

Prints success, the difference to SFT and minutes; --out FILE gets the full table.
A run is a run directory, or what reproduce.py keeps of one. Several runs of a label are its seeds,
in the same order for every label. Intervals are 95% percentile bootstraps over tasks (and over
seeds, where there are several). A difference is taken task by task within a seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

FORMATS = {
    "paper": "",
    "updates": ".0f",
    "million tokens": ".2f",
    "sampled, thousand": ".0f",
    "minutes": ".1f",
}


def read(path: Path) -> str:
    if not path.exists():
        sys.exit(f"error: {path} is missing; let the run finish first")
    return path.read_text(encoding="utf-8")


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in read(path).split("\n")[:-1]]


@cache
def load(run: str) -> dict:
    """{"seed", "metrics": rows, "eval": {"final_test": {"tasks", "rewards"}, ...},
    "agreement": {"final_test": {"tasks", "states", "match", "nll"}, ...}}

    tasks is a hash of the tasks' names; lists have a number for each task, in the order of the
    names: its reward; its expert states, and there the sums of matches and nats.
    """
    if run.endswith(".json"):
        return {"agreement": {}} | json.loads(read(Path(run)))
    evaluations = {}
    for path in sorted(Path(run, "eval").glob("*.jsonl")):
        episodes, tasks = by_task(path)
        rewards = [row["reward"] for row in episodes]
        evaluations[path.stem] = {"tasks": tasks, "rewards": rewards}
    agreements = {}
    for path in sorted(Path(run, "agreement").glob("*.jsonl")):
        if path.name.startswith("experts_"):
            # The demonstrations themselves.
            continue
        demonstrations, tasks = by_task(path)
        agreements[path.stem] = {
            "tasks": tasks,
            "states": [len(row["match"]) for row in demonstrations],
            "match": [sum(row["match"]) for row in demonstrations],
            "nll": [round(sum(row["nll"]), 4) for row in demonstrations],
        }
    return {
        "seed": json.loads(read(Path(run, "config.json")))["config"]["seed"],
        "metrics": read_rows(Path(run, "metrics.jsonl")),
        "eval": evaluations,
        "agreement": agreements,
    }


def by_task(path: Path) -> tuple[list[dict], str]:
    """The rows of a file in the order of their tasks' names, and a hash of these names."""
    rows = sorted(read_rows(path), key=lambda row: row["task_id"])
    names = "\n".join(row["task_id"] for row in rows)
    return rows, hashlib.sha1(names.encode()).hexdigest()[:12]


def rewards(runs: dict[str, list[str]], split: str, name: str = "final") -> dict[str, np.ndarray]:
    """label -> [seeds, tasks]; an error unless all labels have the same seeds and tasks."""
    found, first = {}, None
    for label, paths in runs.items():
        for path in paths:
            if f"{name}_{split}" not in load(path)["eval"]:
                sys.exit(f"error: {path} has not played {split} ({name}); let the run finish first")
        played = [load(path)["eval"][f"{name}_{split}"] for path in paths]
        tasks = [evaluation["tasks"] for evaluation in played]
        seeds = [load(path)["seed"] for path in paths]
        first = first or (seeds, tasks)
        if (seeds, tasks) != first or len(set(tasks)) > 1:
            other = next(iter(runs))
            sys.exit(
                f"error: {label} has other seeds or tasks on {split} than {other}; "
                "a paired table needs the same"
            )
        found[label] = np.array([evaluation["rewards"] for evaluation in played])
    return found


def success(runs: dict[str, list[str]], splits: list[str], name: str = "final") -> dict:
    """label -> [seeds, tasks of all splits], 0 or 1."""
    parts = [rewards(runs, split, name) for split in splits]
    together = {}
    for label in runs:
        joined = np.concatenate([part[label] for part in parts], axis=1)
        together[label] = (joined >= 1).astype(float)
    return together


def estimate(
    outcomes: np.ndarray, states: np.ndarray | None = None, draws: int = 2000
) -> list[float]:
    """[mean, low, high] of outcomes [seeds, tasks]. A draw takes the same tasks for all seeds.

    states [tasks]: outcomes are sums over so many states of a task, and the mean is a state's.
    """
    rng = np.random.default_rng(0)
    seeds, tasks = outcomes.shape
    states = np.ones(tasks) if states is None else states
    means = []
    for _ in range(draws):
        drawn = outcomes[rng.integers(seeds, size=seeds)]
        among = rng.integers(tasks, size=tasks)
        means.append(drawn[:, among].mean(0).sum() / states[among].sum())
    mean = outcomes.mean(0).sum() / states.sum()
    return [float(mean), *np.percentile(means, [2.5, 97.5])]


def cell(estimated: list[float], sign: str = "") -> str:
    """ "0.842 [0.810, 0.874]": as percent, for other units."""
    mean, low, high = (f"{value:{sign}.3f}" for value in estimated)
    return f"{mean} [{low}, {high}]"


def percent(estimated: list[float], sign: str = "") -> str:
    """ "47.3 [42.1, 52.1]", or with the sign "+" "+6.8 [+4.1, +9.5]"."""
    mean, low, high = (f"{100 * share:{sign}.1f}" for share in estimated)
    return f"{mean} [{low}, {high}]"


def spent(paths: list[str]) -> dict[str, float]:
    """What the runs cost, means over seeds."""
    sums = []
    for path in paths:
        metrics = load(path)["metrics"]
        updates = [row for row in metrics if "grad_norm" in row]
        # Of the policy: a discriminator's cost tokens and time, and count as such.
        of_policy = [row for row in updates if not row["phase"].startswith("discriminator")]
        count = sum(row.get("updates", 1) for row in of_policy)
        trained = sum(row["tokens"] for row in updates)
        # What the agent wrote to learn from: its own episodes and practice.
        written = [row["tokens"] for row in metrics if row["phase"] == "explore"]
        written += [row.get("practice_tokens", 0) for row in metrics]
        seconds = sum(row.get("seconds", 0) for row in metrics)
        sums.append([count, trained, sum(written), seconds])
    updates, trained, written, seconds = (float(np.mean(column)) for column in zip(*sums))
    return {
        "updates": updates,
        "million tokens": trained / 1e6,
        "sampled, thousand": written / 1e3,
        "minutes": seconds / 60,
    }


def compare(
    runs: dict[str, list[str]],
    to: str,
    splits: list[str],
    paper: dict[str, float] | None = None,
) -> dict[str, dict]:
    """The table's figures: label -> column -> value.

    Differences are taken to `to` and to a label SFT, the common start. paper: the paper's success.
    """
    if to not in runs:
        sys.exit(f"error: {to} has no finished runs; let them finish first")
    by_split = {split: success(runs, [split]) for split in splits}
    together = success(runs, splits)
    figures = {}
    for label, paths in runs.items():
        figure = {"paper": paper.get(label, "not in it")} if paper else {}
        figure |= {split: estimate(by_split[split][label]) for split in splits}
        figure |= {f"minus {to}": None, "by seed": None}
        for other in (to, "SFT"):
            if other in runs:
                gap = together[label] - together[other]
                figure[f"minus {other}"] = None if label == other else estimate(gap)
        if label != to:
            figure["by seed"] = (together[label] - together[to]).mean(1).tolist()
        figures[label] = figure | spent(paths)
    return figures


def table(figures: dict[str, dict]) -> list[dict[str, str]]:
    """The same as text: rows of column -> cell."""
    rows = []
    for label, figure in figures.items():
        row = {"method": label}
        for name, value in figure.items():
            if value is None:
                row[name] = ""
            elif name == "by seed":
                row[name] = ", ".join(f"{100 * gap:+.1f}" for gap in value)
            elif isinstance(value, list):
                row[name] = percent(value, "+" if name.startswith("minus") else "")
            else:
                row[name] = f"{value:{FORMATS[name]}}"
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, str]]) -> list[str]:
    head = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return head + ["| " + " | ".join(row.values()) + " |" for row in rows]


def note(runs: dict[str, list[str]], splits: list[str]) -> str:
    """What a table's figures are, and of how many seeds and tasks."""
    label, paths = next(iter(runs.items()))
    sizes = [f"{rewards(runs, split)[label].shape[1]} {split} tasks" for split in splits]
    counted = ", ".join([f"{len(paths)} seed{'s' * (len(paths) > 1)}", *sizes])
    text = f"Success in %, 95% intervals in brackets; {counted}. Differences: paired, all tasks."
    if len(paths) > 1:
        text += " An interval over few seeds is too narrow: see the difference by seed."
    return text


def agreement(runs: dict[str, list[str]], splits: list[str], name: str = "final") -> list[str]:
    """The policy and the expert at states of tasks that nobody learns from, of the runs that
    have it; differences to SFT are paired."""
    keys = [f"{name}_{split}" for split in splits]
    found = {}
    for label, paths in runs.items():
        of_label = [[load(path)["agreement"].get(key) for key in keys] for path in paths]
        if all(None not in of_run for of_run in of_label):
            found[label] = of_label
    if not found:
        return []
    first = next(iter(found.values()))[0]
    states = np.concatenate([of_split["states"] for of_split in first])
    sums: dict[str, dict[str, np.ndarray]] = {"match": {}, "nll": {}}
    for label, of_label in found.items():
        for of_run in of_label:
            if [part["tasks"] for part in of_run] != [part["tasks"] for part in first]:
                sys.exit(f"error: {label} agrees on other tasks than {next(iter(found))}")
        for figure, of_figure in sums.items():
            of_figure[label] = np.array(
                [np.concatenate([part[figure] for part in of_run]) for of_run in of_label]
            )
    rows = []
    for label in found:
        row = {f"the expert's action, {int(states.sum())} held-out states": label}
        match, nll = sums["match"], sums["nll"]
        row["greedy, %"] = percent(estimate(match[label], states))
        row["nats"] = cell(estimate(nll[label], states))
        row["greedy minus SFT"] = row["nats minus SFT"] = ""
        if label != "SFT" and "SFT" in found and len(match[label]) == len(match["SFT"]):
            row["greedy minus SFT"] = percent(estimate(match[label] - match["SFT"], states), "+")
            row["nats minus SFT"] = cell(estimate(nll[label] - nll["SFT"], states), "+")
        rows.append(row)
    return ["", *markdown(rows)]


def practice_match(runs: dict[str, list[str]]) -> list[str]:
    """How often practice is the expert's text / action, by iteration, of the runs that practise."""
    inspected: dict[str, dict[int, list[dict]]] = {}
    for label, paths in runs.items():
        for row in (row for path in paths for row in load(path)["metrics"]):
            if row["phase"] == "inspect":
                inspected.setdefault(label, {}).setdefault(row["iteration"], []).append(row)
    rows = []
    for iteration in sorted(set().union(*inspected.values())):
        rows.append({"match with the expert (text / action), per iteration": str(iteration)})
        for label, by_iteration in inspected.items():
            found = by_iteration.get(iteration, [])
            text = [100 * row["match_text"] for row in found]
            action = [100 * row["match_action"] for row in found]
            rows[-1][label] = f"{np.mean(text):.1f} / {np.mean(action):.1f}" if found else ""
    return ["", *markdown(rows)] if rows else []


def verdict(figures: dict, labels: Iterable[str], other: str) -> str:
    """The finding in words: which labels did better than another, or worse."""
    groups = {"did better than": [], "did worse than": [], "could not be told from": []}
    better, worse, equal = groups
    for label in labels:
        if label != other:
            _, low, high = figures[label][f"minus {other}"]
            groups[better if low > 0 else worse if high < 0 else equal].append(label)
    parts = [f"{listed(found)} {verb} {other}" for verb, found in groups.items() if found]
    return "; ".join(parts)


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN[,RUN...]")
    parser.add_argument("--to", default="SFT+", help="the baseline of the full table")
    parser.add_argument("--splits", default="test,test_unseen")
    parser.add_argument("--out", default="", help="write the full table there, as Markdown")
    args = parser.parse_args()
    splits = args.splits.split(",")
    runs = {}
    for run in args.runs:
        label, _, paths = run.partition("=")
        runs[label] = paths.split(",")
    if args.to not in runs:
        sys.exit(f"error: no run has the label {args.to!r}; give --to one of: {', '.join(runs)}")

    figures = compare(runs, args.to, splits)
    rows = table(figures)
    start = "SFT" if "SFT" in runs else args.to
    columns = ["method", *splits, f"minus {start}", "minutes"]
    print(note(runs, splits), end="\n\n")
    widths = {}
    for name in columns:
        widths[name] = max(len(name), *(len(row[name]) for row in rows))
    for row in [dict(zip(columns, columns)), *rows]:
        print("   ".join(row[name].ljust(widths[name]) for name in columns).rstrip())
    said = [verdict(figures, runs, start)]
    if start != args.to:
        ours = [label for label in runs if label.startswith("StepAgent")]
        said.append(verdict(figures, ours, args.to))
    print(f"\nWhat you just saw: {'; '.join(filter(None, said))}.")
    if args.out:
        page = [note(runs, splits), "", *markdown(rows), *agreement(runs, splits)]
        page += practice_match(runs)
        Path(args.out).write_text("\n".join(page) + "\n", encoding="utf-8")
        print(f"The full table: {args.out}")


if __name__ == "__main__":
    main()
