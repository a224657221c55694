"""The result tables and figures of docs/results.md: python experiments/reproduce.py WHAT

    tune      success against SFT updates, and every method's learning rate, on 500 dev tasks
    tune_d    the discriminator of StepAgent-Inverse and its PPO, on 500 dev tasks, three seeds
    table2    all methods from the same SFT within a seed, on 300 test and 300 test_unseen tasks
    nine      SFT, SFT+ and the two reflections on nine seeds
    main      the same with the discriminator of this code, five seeds
    one_set   the same with one set of demonstrations for SFT and practice, as in the paper
    table3    reward types of StepAgent-Inverse: step, final, both
    figure4   iterations 0 to 9 on dev; K = 1 to 5 on test
    sizes     the same with a model of 0.23M parameters
    experts   success by the number of demonstrations practised
    all       everything, in this order

The world is the household, the model has 0.85M parameters. Repeat the command to go on where it
stopped. Writes experiments/results/WHAT.md, .json and, for curves, .svg. What tables need of a
run is kept in experiments/results/runs; --report makes tables from these files and runs nothing.

Compare within a seed only: CPUs of different kinds round differently, and the seeds were run on
several. Needs experiments/requirements.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

from compare import (  # noqa: E402
    agreement,
    compare,
    estimate,
    load,
    markdown,
    note,
    percent,
    practice_match,
    spent,
    success,
    table,
    verdict,
)

# ------------------------------------------------------------------------------ what is run

DEV = ("dev", "dev_more")
TEST = ("test", "test_unseen")

# Passes of SFT that `tune` tries, and those that every method starts from.
PASSES = (4, 8, 16)
START = 8

# Options beside the learning rate. A batch of 13 trajectories has about the 64 pairs of one of
# Implicit's updates. RFT and NAT train from the base model as SFT does, with about as many updates.
METHODS = {
    "SFT+": {"method": "sft+"},
    "PPO": {"method": "ppo", "batch": 256},
    "DPO": {"method": "dpo", "batch": 13, "beta": 0.1},
    "RFT": {"method": "rft", "sft_epochs": 3},
    "SPIN": {"method": "spin", "batch": 13, "beta": 0.1, "iterations": 3},
    "NAT": {"method": "nat", "sft_epochs": 2},
    "ETO": {"method": "eto", "batch": 13, "beta": 0.1, "iterations": 3},
    "StepAgent-Implicit": {"method": "stepagent-implicit"},
    "StepAgent-Inverse": {"method": "stepagent-inverse", "batch": 256},
}
IMPLICIT, INVERSE = "StepAgent-Implicit", "StepAgent-Inverse"
MAIN = ("SFT+", IMPLICIT, INVERSE)

# The best rates of `tune`, or within a point of it (ETO). Inverse's is a prototype's, on dev
# (docs/results.md). RFT and NAT have none.
RATES = {
    "SFT+": "5e-4",
    "PPO": "1.5e-4",
    "DPO": "1.5e-5",
    "SPIN": "5e-6",
    "ETO": "1.5e-5",
    IMPLICIT: "1.5e-4",
    INVERSE: "1.5e-4",
}
GRID = ("5e-6", "1.5e-5", "5e-5", "1.5e-4", "5e-4", "1.5e-3")
# At these rates nine points and more were lost: higher ones are not run.
HIGHEST = {"DPO": "5e-5", "SPIN": "1.5e-5", "ETO": "5e-5"}
# Run later, from the SFT of seed 5 on another kind of CPU.
LATER = {("SFT+", "5e-6"), ("PPO", "5e-6"), ("PPO", "1.5e-3"), (IMPLICIT, "5e-6")}

SEEDS = {
    "tune": [0],
    "tune_d": [11, 12, 13],
    "table2": range(5),
    "nine": range(9),
    "main": range(20, 25),
    "one_set": range(20, 25),
    "table3": range(5),
    "figure4": [0, 5, 6, 7, 8],
    "sizes": [0, 1, 5, 6, 7, 8],
    "experts": [0, 5, 6, 7, 8],
}

# The paper's Table 2 (Mistral-7B) and Table 3 (Llama-3-8B), both on ALFWorld.
PAPER = {
    "base": 0.0,
    "SFT": 68.5,
    "PPO": 69.1,
    "DPO": 70.6,
    "RFT": 69.8,
    "SPIN": 71.4,
    "NAT": 69.3,
    "ETO": 72.8,
    IMPLICIT: 74.2,
    INVERSE: 74.9,
}
PAPER_REWARDS = {f"{INVERSE}, step": 76.1, f"{INVERSE}, final": 73.4, f"{INVERSE}, both": 76.2}

QUICK = {
    "experts": 16,
    "sft_experts": 8,
    "practice_experts": 8,
    "sft_epochs": 1,
    "eval_tasks": 4,
    "max_new_tokens": 4,
    "env_options": "max_steps=19",
}
# What other options than a method's own add to the name of a run.
TAGS = {
    "lr": "_lr",
    "practice": "_k",
    "practice_experts": "_n",
    "reward": "_",
    "iterations": "_",
    "d_scores": "_",
    "d_epochs": "_passes",
    "expert_in_group": "_group",
    "batch": "_batch",
}
SMALL = "models/tiny-household-small"
# Options of all runs whose names begin with this.
SETTINGS = {
    "small/": {"model": SMALL},
    "one_set/": {"sft_experts": 1300, "practice_experts": 1300},
}


class Runs:
    """Runs of stepagent.py, `jobs` at once with one thread each. A run waits for what it needs."""

    def __init__(self, out: Path, results: Path, jobs: int, execute: bool, quick: bool):
        self.out, self.results, self.execute, self.quick = out, results, execute, quick
        self.pool = ThreadPoolExecutor(jobs)
        self.started: dict[str, Future] = {}

    def start(self, name: str, options: dict, needs: tuple[str, ...] = ()) -> str:
        """-> the file that is kept of the run."""
        kept = self.results / "runs" / f"{name}.json"
        if self.execute and name not in self.started:
            waits = [self.started[need] for need in needs]
            self.started[name] = self.pool.submit(self._run, name, options, waits, kept)
        return str(kept)

    def _run(self, name: str, options: dict, waits: list[Future], kept: Path) -> None:
        for other in waits:
            other.result()
        out = self.out / name
        options = {"env": "household", "model": "models/tiny-household", "out": out, **options}
        for setting, more in SETTINGS.items():
            if name.startswith(setting):
                options |= only_read(options["method"], more)
        if self.quick:
            options |= only_read(options["method"], QUICK)
        command = [sys.executable, "stepagent.py", *words_of(options)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        out.parent.mkdir(parents=True, exist_ok=True)
        print(" ".join(command), flush=True)
        # Beside the run directory, which begins empty. A run that is finished ends at once.
        said = out.with_name(f"{out.name}.log")
        with open(said, "a", encoding="utf-8") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        if done.returncode:
            raise SystemExit(f"error: {out} failed; see {said}")
        keep(str(out), kept)

    def wait(self) -> None:
        """Until all are finished; raises what a run raised."""
        for run in self.started.values():
            run.result()

    def sft(
        self, seed: int, splits: tuple[str, ...], passes: int = START, setting: str = ""
    ) -> str:
        options = {"method": "sft", "seed": seed, "sft_epochs": passes, **evaluated(splits)}
        return self.start(f"{setting}{splits[0]}/seed{seed}/sft{passes}", options)

    def method(
        self, label: str, seed: int, splits: tuple[str, ...], setting: str = "", **more
    ) -> str:
        """A method from the SFT of the seed, with `more` options than its own.

        SFT+ takes the updates of Implicit with the same options.
        """
        self.sft(seed, splits, setting=setting)
        folder = f"{setting}{splits[0]}/seed{seed}"
        start = f"{folder}/sft{START}"
        options = {"seed": seed, "init": self.out / start / "policy", **evaluated(splits)}
        needs = [start]
        if label == "SFT+":
            of_twin = dict(more)
            if "lr" in more:
                of_twin["lr"] = RATES[IMPLICIT]
            self.method(IMPLICIT, seed, splits, setting, **of_twin)
            needs.append(f"{folder}/{run_name(IMPLICIT, of_twin)}")
            options["match"] = self.out / needs[-1]
        if label in RATES:
            options["lr"] = RATES[label]
        name = f"{folder}/{run_name(label, more)}"
        return self.start(name, options | METHODS[label] | more, tuple(needs))


def words_of(options: dict) -> list[str]:
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def run_name(label: str, more: dict) -> str:
    tags = [f"{TAGS[name]}{value}" for name, value in more.items() if name in TAGS]
    return label.lower() + "".join(tags)


def evaluated(splits: tuple[str, ...]) -> dict:
    return {"eval_each": "", "eval_splits": ",".join(splits)}


def only_read(method: str, options: dict) -> dict:
    """Without the options that the method does not read: stepagent.py refuses them."""
    from stepagent import METHODS as ROWS

    not_read = set().union(*(row.reads.split() for row in ROWS.values()))
    not_read -= set(ROWS[method].reads.split())
    return {name: value for name, value in options.items() if name not in not_read}


def keep(run: str, file: Path) -> None:
    """Writes what tables need of a run: no texts, and one line for an iteration's updates."""
    whole = load(run)
    metrics = []
    for (_, _, are_updates), group in groupby(whole["metrics"], key=_kind):
        rows = list(group)
        for row in [_merge(rows)] if are_updates else rows:
            kept = {name: value for name, value in row.items() if name not in ("time", "by_type")}
            for name, value in kept.items():
                kept[name] = float(f"{value:.6g}") if isinstance(value, float) else value
            metrics.append(kept)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(whole | {"metrics": metrics}, separators=(",", ":"))
    file.write_text(text + "\n", encoding="utf-8")


def _kind(row: dict) -> tuple[str, int, bool]:
    return row["phase"], row["iteration"], "grad_norm" in row


def _merge(rows: list[dict]) -> dict:
    """Updates in one line: their number, sums of tokens and seconds, means of the rest."""
    merged = {"phase": rows[0]["phase"], "iteration": rows[0]["iteration"], "updates": len(rows)}
    for name in rows[0]:
        if name not in ("phase", "iteration", "step", "time"):
            is_sum = name in ("tokens", "seconds", "trajectories")
            merged[name] = sum(row[name] for row in rows) / (1 if is_sum else len(rows))
    return merged


# ----------------------------------------------------------------------------------- tables


def solved(paths: list[str], splits: tuple[str, ...], name: str = "final") -> np.ndarray:
    """[seeds, tasks of all splits], 0 or 1."""
    return success({"": paths}, splits, name)[""]


def tune(runs: Runs, seeds: list[int]) -> None:
    [seed] = seeds
    sft = {passes: [runs.sft(seed, DEV, passes)] for passes in PASSES}
    later = [runs.sft(5, DEV)]
    # Inverse has a grid of its own, `tune_d`.
    labels = [label for label in RATES if label != INVERSE]
    grid = {}
    for label in labels:
        for rate in GRID:
            if float(rate) <= float(HIGHEST.get(label, "inf")):
                own_seed = 5 if (label, rate) in LATER else seed
                grid[label, rate] = [runs.method(label, own_seed, DEV, lr=rate)]
    runs.wait()

    figures, rows = {"sft": {}, "grid": {}}, []
    for passes, paths in sft.items():
        mean, low, high = estimate(solved(paths, DEV))
        updates = round(spent(paths)["updates"])
        figures["sft"][passes] = {"updates": updates, "success": mean, "interval": [low, high]}
        cell = percent([mean, low, high])
        rows.append({"SFT passes": str(passes), "updates": str(updates), "success": cell})
    lines = [
        f"Household, seed {seed}, 500 dev tasks; success in %, 95% bootstrap intervals over tasks "
        "in brackets.",
        "",
        *markdown(rows),
    ]
    rows = []
    for label in labels:
        gaps = {}
        for rate in GRID:
            if (label, rate) in grid:
                start = later if (label, rate) in LATER else sft[START]
                gaps[rate] = estimate(solved(grid[label, rate], DEV) - solved(start, DEV))
        best = max(gaps, key=lambda rate: gaps[rate][0])
        figures["grid"][label] = gaps
        rows.append({f"from SFT of {START} passes, minus it (paired)": label})
        for rate in GRID:
            cell = percent(gaps[rate], "+") if rate in gaps else ""
            cell += " °" if (label, rate) in LATER else ""
            rows[-1][f"lr {rate}"] = f"**{cell}**" if rate == best else cell
    start = percent(estimate(solved(later, DEV)))
    lines += [
        "",
        *markdown(rows),
        "",
        "Empty: not run, as a lower rate has lost nine points or more already. °: from another "
        f"SFT, of seed 5 on another kind of CPU ({start}), minus it.",
    ]
    write(runs, "tune", lines, figures)


# What `tune_d` compares: rows of (label, method, options beside its own).
VARIANTS = (
    ("SFT+", "SFT+", {}),
    (IMPLICIT, IMPLICIT, {}),
    (INVERSE, INVERSE, {}),
    ("one pass of D instead of two", INVERSE, {"d_epochs": 1}),
    ("D scores the tasks that it did not learn from", INVERSE, {"d_scores": "held-out"}),
    ("PPO's batch 64 instead of 256", INVERSE, {"batch": 64}),
    ("the expert's action in the group", INVERSE, {"expert_in_group": "true"}),
    ("the same, lr 3e-4", INVERSE, {"expert_in_group": "true", "lr": "3e-4"}),
)
D_FIGURES = ("d_auc_learnt", "d_auc_held_out", "d_pairs_learnt", "d_pairs_held_out", "log_d_gap")


def tune_d(runs: Runs, seeds: list[int]) -> None:
    found = {"SFT": [runs.sft(seed, DEV) for seed in seeds]}
    for label, method, more in VARIANTS:
        found[label] = [runs.method(method, seed, DEV, **more) for seed in seeds]
    runs.wait()
    together = success(found, DEV)
    rows, figures = [], {}
    for label, paths in found.items():
        gap = together[label] - together["SFT"]
        row = {"method": label, "success": percent(estimate(together[label]))}
        row["minus SFT"] = "" if label == "SFT" else percent(estimate(gap), "+")
        row["by seed"] = ", ".join(f"{100 * of_seed:+.1f}" for of_seed in gap.mean(1))
        figures[label] = {"success": estimate(together[label]), "minus SFT": estimate(gap)}
        metrics = [of_run for path in paths for of_run in load(path)["metrics"]]
        for name in D_FIGURES:
            values = [of_run[name] for of_run in metrics if name in of_run]
            row[name] = f"{np.mean(values):.3f}" if values else ""
            figures[label][name] = float(np.mean(values)) if values else None
        rows.append(row)
    write(runs, "tune_d", [note(found, DEV), "", *markdown(rows), *agreement(found, DEV)], figures)


def main_runs(runs: Runs, seeds: list[int], setting: str = "") -> dict[str, list[str]]:
    found = {"SFT": [runs.sft(seed, TEST, setting=setting) for seed in seeds]}
    for label in MAIN:
        found[label] = [runs.method(label, seed, TEST, setting) for seed in seeds]
    return found


def table2(runs: Runs, seeds: list[int]) -> None:
    base = runs.start("test/base", {"method": "base", **evaluated(TEST)})
    found = {"SFT": [runs.sft(seed, TEST) for seed in seeds], "SFT on all 1,300": []}
    for seed in seeds:
        # What RFT and NAT add to.
        options = {"method": "sft", "seed": seed, "sft_experts": 1300, "sft_epochs": 4}
        path = runs.start(f"test/seed{seed}/sft_all", options | evaluated(TEST))
        found["SFT on all 1,300"].append(path)
    for label in METHODS:
        found[label] = [runs.method(label, seed, TEST) for seed in seeds]
    write_table(runs, "table2", found, PAPER, base)


def table3(runs: Runs, seeds: list[int]) -> None:
    found = {
        "SFT": [runs.sft(seed, TEST) for seed in seeds],
        "SFT+": [runs.method("SFT+", seed, TEST) for seed in seeds],
        f"{INVERSE}, step": [runs.method(INVERSE, seed, TEST) for seed in seeds],
        f"{INVERSE}, final": [runs.method("PPO", seed, TEST) for seed in seeds],
        f"{INVERSE}, both": [runs.method(INVERSE, seed, TEST, reward="both") for seed in seeds],
    }
    write_table(runs, "table3", found, PAPER_REWARDS)


def write_table(
    runs: Runs, name: str, found: dict, paper: dict | None = None, base: str = ""
) -> None:
    """The table, agreement with the expert, the finding, and StepAgent minus every other row."""
    runs.wait()
    figures = compare(found, "SFT+", TEST, paper)
    rows = table(figures)
    if base:
        row = dict.fromkeys(rows[0], "") | {"method": "base", "paper": str(paper["base"])}
        row |= {split: f"{100 * solved([base], [split]).mean():.1f}" for split in TEST}
        rows.insert(0, row)
    ours = [label for label in found if label.startswith("StepAgent")]
    together = success(found, TEST)
    pairs = []
    for other in found:
        pairs.append({"paired, all tasks": other})
        for label in ours:
            gap = percent(estimate(together[label] - together[other]), "+")
            pairs[-1][f"{label} minus it"] = "" if label == other else gap
    said = f"What you just saw: {verdict(figures, ours, 'SFT+')}."
    lines = [note(found, TEST), "", *markdown(rows), *agreement(found, TEST)]
    lines += [*practice_match(found), "", said, ""]
    write(runs, name, lines + markdown(pairs), figures)


def sizes(runs: Runs, seeds: list[int]) -> None:
    by_size = {"0.23M": main_runs(runs, seeds, "small/"), "0.85M": main_runs(runs, seeds)}
    runs.wait()
    found = {}
    for size, of_size in by_size.items():
        found |= {f"{label}, {size}": paths for label, paths in of_size.items()}
    figures = compare(found, "SFT+, 0.85M", TEST)
    together = success(found, TEST)
    pairs = [(label, "SFT") for label in MAIN] + [(label, "SFT+") for label in MAIN[1:]]
    within, rows = {}, []
    for label, other in pairs:
        name = f"{label} minus {other}"
        rows.append({"paired within a size, all tasks": name})
        within[name] = []
        for size in by_size:
            gap = estimate(together[f"{label}, {size}"] - together[f"{other}, {size}"])
            within[name].append(gap)
            rows[-1][size] = percent(gap, "+")
    lines = [note(found, TEST), "", *markdown(table(figures)), *practice_match(found)]
    write(runs, "sizes", [*lines, "", *markdown(rows)], figures | {"within": within})


def experts(runs: Runs, seeds: list[int]) -> None:
    base = [runs.sft(seed, TEST) for seed in seeds]
    counts = (150, 300, 600)
    found = {}
    for label in MAIN:
        for count in counts:
            more = {} if count == 600 else {"practice_experts": count}
            found[label, count] = [runs.method(label, seed, TEST, **more) for seed in seeds]
    runs.wait()
    start = solved(base, TEST)
    figures, rows = {}, []
    for label in MAIN:
        gaps = {count: estimate(solved(found[label, count], TEST) - start) for count in counts}
        cells = {str(count): percent(gap, "+") for count, gap in gaps.items()}
        rows.append({"demonstrations practised": label, **cells})
        figures[label] = gaps
    lines = [
        f"Points of success above SFT, paired, {len(seeds)} seed{'s' * (len(seeds) > 1)}, "
        "600 test tasks; SFT has 700 demonstrations of its own.",
        "",
        *markdown(rows),
    ]
    write(runs, "experts", lines, figures)


# --------------------------------------------------------------------------------- figure 4

ITERATIONS = range(1, 10)
LOGGED = ("match_text", "match_action", "pairs_kept", "margin", "d_auc_held_out", "log_d_gap")
PRACTICE = range(1, 6)
# Which seeds of SFT+ were run at every K.
CONTROL_SEEDS = (5, 6, 7, 8)


def figure4(runs: Runs, seeds: list[int]) -> None:
    by_iteration, lines = figure4a(runs, seeds)
    by_practice, more = figure4b(runs, seeds)
    figures = {"seeds": seeds, "iterations": by_iteration, "practice": by_practice}
    write(runs, "figure4", lines + more, figures)
    plot_figure4(runs, by_iteration, by_practice)


def figure4a(runs: Runs, seeds: list[int]) -> tuple[dict, list[str]]:
    """Success on dev after each iteration, and what practice and reflection look like there."""
    more = {"iterations": 9, "eval_each": ",".join(DEV)}
    found = {}
    for label in (IMPLICIT, INVERSE, "SFT+"):
        found[label] = [runs.method(label, seed, DEV, **more) for seed in seeds]
    runs.wait()
    curves, figures, rows = {}, {}, []
    for label, paths in found.items():
        curves[label] = [solved(paths, DEV, f"eval_{i}") for i in (0, *ITERATIONS)]
    for label, curve in curves.items():
        figures[label] = {"success": [estimate(outcomes) for outcomes in curve]}
        figures[label]["minus 0"] = [estimate(outcomes - curve[0]) for outcomes in curve]
        figures[label] |= {name: logged(found[label], name) for name in LOGGED}
        gap = curve[9] - curve[0]
        row = {"iteration": label}
        row |= {str(i): f"{100 * outcomes.mean():.1f}" for i, outcomes in enumerate(curve)}
        row["9 minus 0, paired"] = percent(estimate(gap), "+")
        row["by seed"] = ", ".join(f"{100 * of_seed:+.1f}" for of_seed in gap.mean(1))
        other = estimate(curve[9] - curves["SFT+"][9])
        row["9, minus SFT+"] = "" if label == "SFT+" else percent(other, "+")
        rows.append(row)
    for name in LOGGED:
        for label in figures:
            values = figures[label][name]
            if not np.isnan(values).all():
                row = dict.fromkeys(rows[0], "") | {"iteration": f"{label}, {name}"}
                for i, value in enumerate(values, 1):
                    row[str(i)] = "" if np.isnan(value) else f"{value:.3g}"
                rows.append(row)
    head = "Success in %, intervals over tasks and seeds. Iterations: 500 dev tasks, seeds "
    return figures, [f"{head}{', '.join(map(str, seeds))}.", "", *markdown(rows)]


def logged(paths: list[str], name: str) -> list[float]:
    """A logged figure's mean by iteration; NaN where no run has it."""
    means = []
    for i in ITERATIONS:
        rows = []
        for path in paths:
            metrics = load(path)["metrics"]
            rows += [row for row in metrics if row["iteration"] == i and name in row]
        weights = [row.get("updates", 1) for row in rows]
        values = [row[name] for row in rows]
        means.append(float(np.average(values, weights=weights)) if rows else float("nan"))
    return means


def figure4b(runs: Runs, seeds: list[int]) -> tuple[dict, list[str]]:
    """Success on test by K. SFT+ takes the updates of Implicit at that K."""
    control_seeds = [seed for seed in seeds if seed in CONTROL_SEEDS] or seeds
    seeds_of = {IMPLICIT: seeds, INVERSE: seeds, "SFT+": control_seeds}
    found = {}
    for label, own in seeds_of.items():
        for k in PRACTICE:
            more = {} if k == 3 else {"practice": k}
            found[label, k] = {seed: runs.method(label, seed, TEST, **more) for seed in own}
    start = {seed: runs.sft(seed, TEST) for seed in seeds}
    runs.wait()

    def outcomes(paths: dict[int, str], among: list[int]) -> np.ndarray:
        return solved([paths[seed] for seed in among], TEST)

    figures, lines = {}, []
    for label, own in seeds_of.items():
        by_k = {k: outcomes(found[label, k], own) for k in PRACTICE}
        rows = {
            "success": by_k,
            "minus SFT, paired": {k: by_k[k] - outcomes(start, own) for k in PRACTICE},
            "minus K = 3, paired": {k: by_k[k] - by_k[3] for k in PRACTICE if k != 3},
        }
        if label == IMPLICIT:
            title = f"minus SFT+, seeds {', '.join(map(str, control_seeds))}, paired"
            rows[title] = {}
            for k in PRACTICE:
                control = outcomes(found["SFT+", k], control_seeds)
                rows[title][k] = outcomes(found[label, k], control_seeds) - control
        taken = ": the trajectories of Implicit's updates" if label == "SFT+" else ""
        title = f"{label}{taken}, 600 test tasks, seeds {', '.join(map(str, own))}"
        updates = {k: spent(list(found[label, k].values()))["updates"] for k in PRACTICE}
        cells = [{title: "updates"} | {f"K = {k}": f"{updates[k]:.0f}" for k in PRACTICE}]
        figures[label] = {"updates": updates}
        for name, row in rows.items():
            figures[label][name] = {k: estimate(outcome) for k, outcome in row.items()}
            cells.append({title: name} | {f"K = {k}": "" for k in PRACTICE})
            for k, estimated in figures[label][name].items():
                cells[-1][f"K = {k}"] = percent(estimated, "" if name == "success" else "+")
        lines += ["", *markdown(cells)]
    return figures, lines


def plot_figure4(runs: Runs, by_iteration: dict, by_practice: dict) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11.2, 3.2), layout="constrained")
    for index, (label, figures) in enumerate(by_iteration.items()):
        style = {"label": label, "color": f"C{index}", "marker": "o"}
        mean, low, high = 100 * np.array(figures["minus 0"]).T
        left.plot(range(10), mean, **style)
        left.fill_between(range(10), low, high, alpha=0.15, color=f"C{index}")
        middle.plot(ITERATIONS, 100 * np.array(figures["match_text"]), **style)
        mean, low, high = 100 * np.array(list(by_practice[label]["minus SFT, paired"].values())).T
        beside = np.array(PRACTICE) + 0.1 * index
        right.errorbar(beside, mean, yerr=[mean - low, high - mean], capsize=3, **style)
    left.set(title="(a) iterations, 500 dev tasks", ylabel="success minus iteration 0, points")
    middle.set(title="practice that equals the expert", ylabel="%")
    right.set(title="(b) K, 600 test tasks", ylabel="success minus SFT, points")
    for axes, unit in ((left, "iteration"), (middle, "iteration"), (right, "K")):
        axes.set(xlabel=unit)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(runs.results / "figure4.svg")


def write(runs: Runs, name: str, lines: list[str], figures: dict) -> None:
    text = "\n".join(lines) + "\n"
    values = json.dumps(figures, indent=1).replace("NaN", "null") + "\n"
    for suffix, content in ((".md", text), (".json", values)):
        (runs.results / f"{name}{suffix}").write_text(content, encoding="utf-8")
    print(text, flush=True)


PARTS = {
    "tune": tune,
    "tune_d": tune_d,
    "table2": table2,
    "nine": lambda runs, seeds: write_table(runs, "nine", main_runs(runs, seeds)),
    "main": lambda runs, seeds: write_table(runs, "main", main_runs(runs, seeds)),
    "one_set": lambda runs, seeds: write_table(runs, "one_set", main_runs(runs, seeds, "one_set/")),
    "table3": table3,
    "figure4": figure4,
    "sizes": sizes,
    "experts": experts,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    parser.add_argument("what", choices=[*PARTS, "all"])
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: those of SEEDS)")
    parser.add_argument("--jobs", type=int, default=cores, help="runs at once (default: cores)")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="run directories")
    parser.add_argument("--report", action="store_true", help="tables of what is kept; run nothing")
    parser.add_argument("--quick", action="store_true", help="miniatures: does it run at all?")
    args = parser.parse_args()
    results = ROOT / "experiments/results"
    if args.quick:
        args.out = Path("runs/reproduce-quick")
        results = ROOT / args.out
        results.mkdir(parents=True, exist_ok=True)
    if args.what in ("sizes", "all") and not args.report and not (ROOT / SMALL).exists():
        make = f"python experiments/pretrain.py --width 64 --out {SMALL}"
        sys.exit(f"error: {SMALL} is not there; make it: {make}")
    out = (ROOT / args.out).resolve()
    runs = Runs(out, results, args.jobs, execute=not args.report, quick=args.quick)
    for name in PARTS if args.what == "all" else [args.what]:
        PARTS[name](runs, args.seeds or list(SEEDS[name]))


if __name__ == "__main__":
    main()
