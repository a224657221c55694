"""The README's tables and figures, on the household with a 0.85M-parameter model: python experiments/reproduce.py WHAT [--seeds 0 1 2]

    tune      success against SFT updates, and every method's learning rate by the same grid, on 500 dev tasks (seed 0)
    table2    the compared methods from the same SFT start within a seed, on the 300 test and 300 test_unseen tasks
    nine      SFT, SFT+ and the two variants again, on nine seeds, four of them on another kind of CPU
    table3    reward types of StepAgent-Inverse: step, final, both
    figure4   (a) iterations 0 to 9, on 500 dev tasks; (b) K = 1 to 5, on the test tasks
    sizes     Figure 3's question at this scale: the same with a model of 0.23M parameters
    experts   how success depends on the number of demonstrations practised
    carry     how far practice at expert states carries over to the states that the agent reaches itself
    all       everything, in this order

Seeds are 0 to 4; for nine, figure4, sizes, experts and carry others, too (SEEDS): CPUs of another kind round otherwise, so that what is compared within a seed wants
to be run on one machine. Resumes run by run, and within a run. Writes experiments/results/NAME.md, .json and, for curves, .svg, and of each run the rewards of its
episodes (results/runs), from which `--report` makes tables and curves again without running anything. Needs experiments/requirements.txt.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results"
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from compare import cell, interval, keep, load, rewards, rows, spent, table  # noqa: E402
from envs import HouseholdExpert, parse_action  # noqa: E402

PASSES = (4, 8, 16, 32)                              # of SFT; START is where every method begins
START = 8
GRID = ("5e-6", "1.5e-5", "5e-5", "1.5e-4", "5e-4", "1.5e-3")
LOST = {"DPO": "5e-5", "SPIN": "1.5e-5", "ETO": "5e-5"}          # here they lost nine points and more: higher rates are not run
LATER = {("SFT+", "5e-6"), ("PPO", "5e-6"), ("PPO", "1.5e-3"), ("StepAgent-Implicit", "5e-6")}      # run later, from the SFT of seed 5
DEV, TEST = "dev,dev_more", "test,test_unseen"
# Options of each method beside its rate; a rate of None: it has none of its own (RFT and NAT train as SFT does, from the base model, with
# passes so chosen that they take about as many updates as SFT). Batches: 13 trajectories hold about the 64 pairs of an implicit update.
METHODS = {
    "SFT+": ["--method", "sft+"],
    "PPO": ["--method", "ppo", "--batch", "256"],
    "DPO": ["--method", "dpo", "--batch", "13", "--beta", "0.1"],
    "RFT": ["--method", "rft", "--sft-epochs", "3"],
    "SPIN": ["--method", "spin", "--batch", "13", "--beta", "0.1", "--iterations", "3"],
    "NAT": ["--method", "nat", "--sft-epochs", "2"],
    "ETO": ["--method", "eto", "--batch", "13", "--beta", "0.1", "--iterations", "3"],
    "StepAgent-Implicit": ["--method", "stepagent-implicit"],
    "StepAgent-Inverse": ["--method", "stepagent-inverse", "--batch", "256"],
}
RATES = {"SFT+": "5e-4", "PPO": "1.5e-4", "DPO": "1.5e-5", "SPIN": "5e-6", "ETO": "1.5e-5", "StepAgent-Implicit": "1.5e-4",
         "StepAgent-Inverse": "5e-5", "RFT": None, "NAT": None}           # the best of `tune`, or within a point of it (ETO, Inverse)
PAPER = {"base": 0.0, "SFT": 68.5, "PPO": 69.1, "DPO": 70.6, "RFT": 69.8, "SPIN": 71.4, "NAT": 69.3, "ETO": 72.8,
         "StepAgent-Implicit": 74.2, "StepAgent-Inverse": 74.9}           # Table 2, Mistral-7B, ALFWorld: the household's nearest relative
QUICK = ("--experts", "16", "--sft-experts", "8", "--practice-experts", "8", "--sft-epochs", "1", "--eval-tasks", "4", "--max-new-tokens", "4",
         "--env-options", "max_steps=19")
SMALL = "models/tiny-household-small"
BASELINES = ("SFT", "PPO", "DPO", "RFT", "SPIN", "NAT", "ETO")
SEEDS = {"nine": range(9), "figure4": [0, 5, 6, 7, 8], "sizes": [0, 1, 5, 6, 7, 8], "experts": [0, 5, 6, 7, 8], "carry": [5, 6, 7, 8]}   # others: 0 to 4


class Cells:
    """Runs of stepagent.py, `jobs` at once with one thread each; a run waits for those that it needs."""

    def __init__(self, out: Path, jobs: int, model: str = "models/tiny-household", run: bool = True, more: tuple[str, ...] = (), prefix: str = ""):
        self.out, self.jobs, self.model, self.run, self.more, self.prefix = out, jobs, model, run, more, prefix
        self.pool = ThreadPoolExecutor(jobs)
        self.begun: dict[str, Future] = {}
        self.kept: dict[str, Path] = {}              # run directory -> what is kept of it

    def add(self, name: str, *options: str, needs: tuple[str, ...] = ()) -> str:
        """-> the run's directory, or what was kept of it (--report)."""
        out, kept = self.out / name, RESULTS / "runs" / self.prefix / f"{name}.json"
        if name not in self.begun and self.run:
            waits = [self.begun[n] for n in needs if n in self.begun]
            self.begun[name] = self.pool.submit(self._run, out, options, waits)
        self.kept[str(out)] = kept
        return str(kept if not self.run and not (out / "report.md").exists() and kept.exists() else out)

    def _run(self, out: Path, options: tuple[str, ...], waits: list[Future]) -> None:
        for other in waits:
            other.result()
        if (out / "report.md").exists():             # the last thing that a run writes
            return
        out.mkdir(parents=True, exist_ok=True)
        print("run", out.relative_to(ROOT), *options, flush=True)
        command = [sys.executable, "stepagent.py", "--env", "household", "--model", self.model, "--out", str(out), *options, *self.more]
        with open(out / "log.txt", "a", encoding="utf-8") as log:
            if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
                raise SystemExit(f"error: {out} failed; see {out / 'log.txt'}")

    def wait(self) -> None:
        for run in self.begun.values():
            run.result()                             # raises what the run raised

    def finished(self, runs: dict) -> dict:
        """Those whose every seed is finished: with --report others may not be. Keeps what tables need of them."""
        done = {key: paths for key, paths in runs.items() if all(p.endswith(".json") or Path(p, "report.md").exists() for p in paths)}
        for path in {p for paths in done.values() for p in paths if not p.endswith(".json")}:
            keep(path, self.kept[path])
        return done

    def sft(self, seed: int, splits: str, passes: int = START) -> tuple[str, list[str]]:
        """-> name and options of the start that all methods of a seed share."""
        name = f"{splits.split(',')[0]}/seed{seed}/sft{passes}"
        self.add(name, "--method", "sft", "--seed", str(seed), "--sft-epochs", str(passes), "--eval-each", "", "--eval-splits", splits)
        return name, ["--seed", str(seed), "--init", str(self.out / name / "policy"), "--eval-each", "", "--eval-splits", splits]

    def method(self, label: str, seed: int, splits: str, *more: str, rate: str | None = None, tag: str = "") -> str:
        """SFT+ takes the updates of Implicit with the same options."""
        start, options = self.sft(seed, splits)
        rate = rate or RATES[label]
        name, needs = f"{splits.split(',')[0]}/seed{seed}/{label.lower()}{tag}", (start,)
        if label == "SFT+":
            like = f"_lr{RATES['StepAgent-Implicit']}" if tag.startswith("_lr") else tag
            self.method("StepAgent-Implicit", seed, splits, *more, tag=like)
            twin = f"{splits.split(',')[0]}/seed{seed}/stepagent-implicit{like}"
            options, needs = [*options, "--match", str(self.out / twin)], (start, twin)
        return self.add(name, *METHODS[label], *options, *(["--lr", rate] if rate else []), *more, needs=needs)


# ------------------------------------------------------------------------------------------------------------------ on dev

def tune(cells: Cells, seeds: list[int], rates: tuple[str, ...] = GRID) -> None:
    sft = {n: cells.add(cells.sft(0, DEV, n)[0]) for n in sorted(PASSES, key=lambda n: n != START)}
    later = cells.add(cells.sft(5, DEV)[0])
    grid = {(label, rate): cells.method(label, 5 if (label, rate) in LATER else 0, DEV, rate=rate, tag=f"_lr{rate}")
            for label in METHODS if RATES[label] for rate in rates if float(rate) <= float(LOST.get(label, "inf"))}
    cells.wait()
    done = cells.finished({run: [run] for run in [*sft.values(), later, *grid.values()]})
    if sft[START] not in done:
        sys.exit(f"error: SFT of {START} passes is not finished; run without --report first")
    base, figures = {False: success([sft[START]], DEV)}, {"sft": {}, "grid": {}}
    if later in done:
        base[True] = success([later], DEV)
    lines = ["Household, seed 0, 500 dev tasks; success in %, 95% bootstrap intervals over tasks in brackets.", "",
             "| SFT passes | updates | success |", "|---|---|---|"]
    for n in (n for n in PASSES if sft[n] in done):
        x, updates = success([sft[n]], DEV), round(spent([sft[n]])["updates"])
        figures["sft"][n] = {"updates": updates, "success": float(x.mean()), "interval": interval(x)}
        lines.append(f"| {n} | {updates} | {cell(x)} |")
    lines += ["", f"| from SFT of {START} passes, minus it (paired) | " + " | ".join(f"lr {rate}" for rate in rates) + " |",
              "|---" * (len(rates) + 1) + "|"]
    for label in dict.fromkeys(label for label, _ in grid):
        gaps = {rate: success([grid[label, rate]], DEV) - base[(label, rate) in LATER] for rate in rates if grid.get((label, rate)) in done}
        figures["grid"][label] = {rate: [float(x.mean()), *interval(x)] for rate, x in gaps.items()}
        best, said = max(gaps, key=lambda rate: gaps[rate].mean(), default=None), []
        for rate in rates:
            text = cell(gaps[rate], True) + " °" * ((label, rate) in LATER) if rate in gaps else "not run" * ((label, rate) in grid)
            said.append(f"**{text}**" if rate == best else text)
        lines.append(f"| {label} | " + " | ".join(said) + " |")
    lines += ["", "Empty: not run, as a lower rate has lost nine points or more already."]
    if True in base:
        lines[-1] += f" °: from another SFT, of seed 5 on another kind of CPU ({cell(base[True])}), minus it."
    write("tune", lines, figures)
    updates, low, mean, high = zip(*((s["updates"], s["interval"][0], s["success"], s["interval"][1]) for s in figures["sft"].values()))
    with plot("sft_converges", "SFT updates (a schedule of its own each)", "success on 500 dev tasks, %") as axes:
        axes.errorbar(updates, 100 * np.array(mean), yerr=100 * np.array([np.subtract(mean, low), np.subtract(high, mean)]), marker="o", capsize=3)
        axes.set(xscale="log", xticks=updates, xticklabels=updates, ylim=(0, 100))
        axes.minorticks_off()


# ----------------------------------------------------------------------------------------------------------------- on test

def table2(cells: Cells, seeds: list[int]) -> None:
    base = cells.add("test/base", "--method", "base", "--eval-each", "", "--eval-splits", TEST)
    runs = {"SFT": [cells.add(cells.sft(s, TEST)[0]) for s in seeds]}
    runs["SFT on all 1,300"] = [cells.add(f"test/seed{s}/sft_all", "--method", "sft", "--seed", str(s), "--sft-experts", "1300", "--sft-epochs", "4",
                                          "--eval-each", "", "--eval-splits", TEST) for s in seeds]         # what RFT and NAT add to
    runs |= {label: [cells.method(label, s, TEST) for s in seeds] for label in METHODS}
    cells.wait()
    runs = cells.finished(runs)
    lines, figures = table(runs, "SFT+", TEST.split(","), PAPER, BASELINES)
    if cells.finished({"base": [base]}):
        zero = [rewards({"": [base]}, s)[""] >= 1 for s in TEST.split(",")]
        lines.insert(4, f"| base | {PAPER['base']} | " + " | ".join(f"{100 * x.mean():.1f}" for x in zero) + " |" + " |" * 8)
    write("table2", lines + against(runs), figures)


def against(runs: dict[str, list[str]]) -> list[str]:
    """StepAgent's rows minus every other."""
    together, ours = {label: success(paths, TEST) for label, paths in runs.items()}, [label for label in runs if label.startswith("StepAgent")]
    return ["", "| paired, all tasks | " + " | ".join(f"{label} minus it" for label in ours) + " |", "|---" * (1 + len(ours)) + "|"] + [
        f"| {other} | " + " | ".join(cell(together[label] - x, True) if label != other else "" for label in ours) + " |"
        for other, x in together.items()]


def nine(cells: Cells, seeds: list[int]) -> None:
    runs = {"SFT": [cells.add(cells.sft(s, TEST)[0]) for s in seeds]} | {
        label: [cells.method(label, s, TEST) for s in seeds] for label in ("SFT+", "StepAgent-Implicit", "StepAgent-Inverse")}
    cells.wait()
    runs = cells.finished(runs)
    lines, figures = table(runs, "SFT+", TEST.split(","))
    write("nine", lines + against(runs), figures)


def table3(cells: Cells, seeds: list[int]) -> None:
    label = "StepAgent-Inverse"
    runs = {"SFT": [cells.add(cells.sft(s, TEST)[0]) for s in seeds], "SFT+": [cells.method("SFT+", s, TEST) for s in seeds]}
    runs |= {f"{label}, step": [cells.method(label, s, TEST) for s in seeds]}
    runs |= {f"{label}, {kind}": [cells.method("PPO", s, TEST) if kind == "final" else
                                  cells.method(label, s, TEST, "--reward", kind, tag=f"_{kind}") for s in seeds] for kind in ("final", "both")}
    cells.wait()
    runs = cells.finished(runs)
    paper = {f"{label}, {kind}": x for kind, x in (("step", 76.1), ("final", 73.4), ("both", 76.2))}      # Llama-3-8B, ALFWorld
    lines, figures = table(runs, "SFT+", TEST.split(","), paper)
    write("table3", lines + against(runs), figures)


def figure4(cells: Cells, seeds: list[int]) -> None:
    """With --report, the seeds of (a) are those whose three runs are finished, and of (b), label by label, those with K = 1, 3 and 5."""
    labels, practice = ("StepAgent-Implicit", "StepAgent-Inverse", "SFT+"), range(1, 6)
    long = {(label, s): cells.method(label, s, DEV, "--iterations", "9", "--eval-each", DEV, tag="_9") for label in labels for s in seeds}
    many = {(label, k, s): cells.method(label, s, TEST, *(["--practice", str(k)] if k != 3 else []), tag=f"_k{k}" if k != 3 else "")
            for label in labels for k in practice for s in seeds}                   # SFT+: with the updates of Implicit at that K
    base = {s: cells.add(cells.sft(s, TEST)[0]) for s in seeds}
    cells.wait()
    done = {path for path in [*long.values(), *many.values(), *base.values()] if cells.finished({0: [path]})}
    own = [s for s in seeds if all(long[label, s] in done for label in labels)]
    if not own:
        sys.exit("error: figure4's runs of nine iterations are not finished; run without --report first")
    whole = lambda x: [float(x.mean()), *interval(x)]
    curves = {label: [success([long[label, s] for s in own], DEV, f"eval_{i}") for i in range(10)] for label in labels}
    with_k = {label: [s for s in seeds if all(many[label, k, s] in done for k in (1, 3, 5))] for label in labels}
    run = {label: [k for k in practice if all(many[label, k, s] in done for s in with_k[label])] for label in labels}
    solved = lambda label, k, which: success([many[label, k, s] for s in which], TEST)
    figures = {"seeds": {"iterations": own, "practice": with_k}, "iterations": {}, "practice": {}}
    for label, curve in curves.items():
        logged = [load(long[label, s])["metrics"] for s in own]
        of = lambda name: [float(np.mean([r[name] for run in logged for r in run if r["iteration"] == i and name in r] or [np.nan]))
                           for i in range(1, 10)]
        figures["iterations"][label] = {"success": [whole(x) for x in curve], "minus 0": [whole(x - curve[0]) for x in curve]} | {
            name: of(name) for name in ("match_text", "match_action", "pairs_kept", "margin", "accuracy_all", "d_auc", "log_d_agent", "log_d_gap",
                                        "entropy")}
    for label in (label for label in labels if with_k[label]):
        start, x = success([base[s] for s in with_k[label]], TEST), {k: solved(label, k, with_k[label]) for k in run[label]}
        rows = {"success": x, "minus SFT": {k: x[k] - start for k in x}, "minus K = 3": {k: x[k] - x[3] for k in x if k != 3}}
        both = [s for s in with_k[label] if s in with_k["SFT+"]]
        if label == "StepAgent-Implicit" and both:
            rows[f"minus SFT+, seeds {', '.join(map(str, both))}"] = {k: solved(label, k, both) - solved("SFT+", k, both) for k in run["SFT+"]}
        figures["practice"][label] = {name: {k: whole(gap) for k, gap in row.items()} for name, row in rows.items()} | {
            "updates": {k: spent([many[label, k, s] for s in with_k[label]])["updates"] for k in x}}
    lines = [f"Success in %, intervals over tasks and seeds. Iterations: 500 dev tasks, seed{'s' * (len(own) > 1)} {', '.join(map(str, own))}.",
             "", "| iteration | " + " | ".join(map(str, range(10))) + " | 9 minus 0, paired | by seed | 9, minus SFT+ |", "|---" * 14 + "|"]
    for label, curve in curves.items():
        gap = curve[9] - curve[0]
        lines.append("| " + " | ".join([label, *(f"{100 * x.mean():.1f}" for x in curve), cell(gap, True), ", ".join(f"{100 * x:+.1f}" for x in gap.mean(1)),
                                        cell(curve[9] - curves["SFT+"][9], True) if label != "SFT+" else ""]) + " |")
    for name in ("match_text", "pairs_kept", "margin", "d_auc", "log_d_gap"):
        lines += [f"| {label}, {name} | | " + " | ".join("" if np.isnan(x) else f"{x:.3g}" for x in f[name]) + " | | | |"
                  for label, f in figures["iterations"].items() if not np.isnan(f[name]).all()]
    points = lambda x, sign: f"{100 * x[0]:{sign}.1f} [{100 * x[1]:{sign}.1f}, {100 * x[2]:{sign}.1f}]"
    for label, f in figures["practice"].items():
        taken = ": the trajectories of Implicit's updates" * (label == "SFT+")
        lines += ["", f"| {label}{taken}, 600 test tasks, seeds {', '.join(map(str, with_k[label]))} | " + " | ".join(f"K = {k}" for k in practice) + " |",
                  "|---" * 6 + "|", "| updates | " + " | ".join(f"{f['updates'][k]:.0f}" if k in f["updates"] else "not run" for k in practice) + " |"]
        lines += [f"| {name}{', paired' * (name != 'success')} | " + " | ".join(points(row[k], "+" * (name != "success")) if k in row else "" for k in practice) + " |"
                  for name, row in f.items() if name != "updates"]
    write("figure4", lines, figures)
    panels = [("(a) iterations, 500 dev tasks", "iteration", "success minus iteration 0, points"),
              ("practice that equals the expert", "iteration", "text (dashed: action), %"), ("(b) K, 600 test tasks", "K", "success minus SFT, points"),
              ("Implicit: margin of the pairs", "iteration", "margin of eq. 6"), ("Inverse: what D tells apart", "iteration", "held-out AUC"),
              ("Inverse: reward", "iteration", "log D of practice")]
    figure, grid = plt.subplots(2, 3, figsize=(11.2, 6.2), layout="constrained")
    grid = grid.flat
    for j, (label, f) in enumerate(figures["iterations"].items()):
        color = {"label": label, "color": f"C{j}", "marker": "o"}
        mean, low, high = 100 * np.array(f["minus 0"]).T
        grid[0].plot(range(10), mean, **color)
        grid[0].fill_between(range(10), low, high, alpha=0.15, color=f"C{j}")
        grid[1].plot(range(1, 10), 100 * np.array(f["match_text"]), **color)
        grid[1].plot(range(1, 10), 100 * np.array(f["match_action"]), **color | {"linestyle": "--"})
        for at, name in ((3, "margin"), (4, "d_auc"), (5, "log_d_agent")):
            grid[at].plot(range(1, 10), f[name], **color)
    for j, (label, f) in enumerate(figures["practice"].items()):
        mean, low, high = 100 * np.array(list(f["minus SFT"].values())).T
        grid[2].errorbar(np.array(list(f["minus SFT"])) + 0.1 * j, mean, yerr=[mean - low, high - mean], marker="o", capsize=3, label=label)
    for axes, (title, x, y) in zip(grid, panels):
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    grid[0].legend(fontsize=8)
    figure.savefig(RESULTS / "figure4.svg")


def sizes(cells: Cells, seeds: list[int]) -> None:
    small = Cells(cells.out / "small", cells.jobs, SMALL, cells.run, cells.more, "small")
    labels = ("SFT+", "StepAgent-Implicit", "StepAgent-Inverse")
    runs = {}
    for size, of in (("0.23M", small), ("0.85M", cells)):
        runs |= {f"SFT, {size}": [of.add(of.sft(s, TEST)[0]) for s in seeds]}
        runs |= {f"{label}, {size}": [of.method(label, s, TEST) for s in seeds] for label in labels}
    small.wait()
    cells.wait()
    runs = small.finished({label: paths for label, paths in runs.items() if "0.23M" in label}) | cells.finished(
        {label: paths for label, paths in runs.items() if "0.85M" in label})
    lines, figures = table(runs, "SFT+, 0.85M", TEST.split(","))
    solved = {label: success(paths, TEST) for label, paths in runs.items()}
    lines = [*lines[:-2], "", "| paired within a size, all tasks | 0.23M | 0.85M |", "|---|---|---|"]         # the last two: a verdict across sizes
    figures["within"] = {}
    for one, other in [(label, "SFT") for label in labels] + [(label, "SFT+") for label in labels[1:]]:
        gaps = [solved[f"{one}, {size}"] - solved[f"{other}, {size}"] for size in ("0.23M", "0.85M")]
        figures["within"][f"{one} minus {other}"] = [[float(x.mean()), *interval(x)] for x in gaps]
        lines.append(f"| {one} minus {other} | " + " | ".join(cell(x, True) for x in gaps) + " |")
    write("sizes", lines, figures)


def experts(cells: Cells, seeds: list[int]) -> None:
    labels = ("SFT+", "StepAgent-Implicit", "StepAgent-Inverse")
    counts = (150, 300, 600)
    runs = {(label, n): [cells.method(label, s, TEST, "--practice-experts", str(n), tag=f"_n{n}") if n != 600 else cells.method(label, s, TEST)
                         for s in seeds] for label in labels for n in counts}
    base = [cells.add(cells.sft(s, TEST)[0]) for s in seeds]
    cells.wait()
    runs = cells.finished(runs)
    cells.finished({"SFT": base})
    gaps = {key: success(paths, TEST) - success(base, TEST) for key, paths in runs.items()}
    figures = {label: {n: [float(gaps[label, n].mean()), *interval(gaps[label, n])] for n in counts if (label, n) in gaps} for label in labels}
    lines = [f"Points of success above SFT, paired, {len(seeds)} seed{'s' * (len(seeds) > 1)}, 600 test tasks; SFT has 700 demonstrations of its own.",
             "", "| demonstrations practised | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(f"{100 * x[0]:+.1f} [{100 * x[1]:+.1f}, {100 * x[2]:+.1f}]" for x in f.values()) + " |"
              for label, f in figures.items() if len(f) == len(counts)]
    write("experts", lines, figures)


def carry(cells: Cells, seeds: list[int]) -> None:
    """Along each policy's own greedy test episodes: how often its action is the one that the scripted expert takes in that very state."""
    runs = {"SFT": [cells.add(cells.sft(s, TEST)[0]) for s in seeds]} | {
        label: [cells.method(label, s, TEST) for s in seeds] for label in ("SFT+", "StepAgent-Implicit", "StepAgent-Inverse")}
    cells.wait()
    lines = ["Greedy episodes on 600 test tasks, each action beside the one that the scripted expert takes in that very state, having read the same.", "",
             "| policy | turns until it first differs | after that: the expert's action, % | of those turns, after \"Nothing happens.\", % |",
             "|---|---|---|---|"]
    figures = {}
    for label, paths in runs.items():
        until, equal, after, stuck = [], 0, 0, 0
        for path in paths:
            for split in TEST.split(","):
                for episode in rows(Path(path, f"eval/final_{split}.jsonl")):
                    same, nothing = along(episode["steps"])
                    first = same.index(False) if False in same else len(same)
                    until.append(first)
                    equal, after, stuck = equal + sum(same[first + 1:]), after + len(same[first + 1:]), stuck + sum(nothing[first + 1:])
        figures[label] = {"turns_until": float(np.mean(until)), "equal_after": equal / after, "stuck": stuck / after}
        lines.append(f"| {label} | {np.mean(until):.2f} | {100 * equal / after:.1f} | {100 * stuck / after:.1f} |")
    write("carry", lines, figures)


def along(steps: list[dict]) -> tuple[list[bool], list[bool]]:
    """For each turn of an agent's household episode: is its action the expert's, who has read the same; did "Nothing happens." precede it."""
    expert, same, nothing = HouseholdExpert(steps[0]["observation"]), [], []
    for n, step in enumerate(steps):
        nothing.append(step["observation"] == "Nothing happens.")
        if not nothing[-1]:
            expert.read(step["observation"])
        try:
            _, wanted = expert.decide()
        except StopIteration:                        # it has looked everywhere: nothing that it would do
            wanted = None
        action = parse_action(step["action"])
        same.append(action == wanted)
        follows = steps[n + 1]["observation"] if n + 1 < len(steps) else "Nothing happens."
        if action and action.lower().startswith("go to ") and follows != "Nothing happens.":
            expert.place, expert.closed = action.lower()[6:], False
    return same, nothing


# ------------------------------------------------------------------------------------------------------------------ results

def success(runs: list[str], splits: str, name: str = "final") -> np.ndarray:
    """[seeds, tasks of all splits], 0 or 1."""
    return np.concatenate([rewards({"": runs}, split, name)[""] >= 1 for split in splits.split(",")], 1).astype(float)


class plot:
    """with plot(name, x, y) as axes: ...   saves experiments/results/name.svg"""

    def __init__(self, name: str, x: str, y: str):
        self.name, (self.figure, self.axes) = name, plt.subplots(figsize=(5, 3.2), layout="constrained")
        self.axes.set(xlabel=x, ylabel=y)

    def __enter__(self):
        return self.axes

    def __exit__(self, *_):
        self.axes.grid(alpha=0.3)
        self.figure.savefig(RESULTS / f"{self.name}.svg")


def write(name: str, lines: list[str], figures: dict) -> None:
    for suffix, text in ((".md", "\n".join(lines) + "\n"), (".json", json.dumps(figures, indent=1).replace("NaN", "null") + "\n")):
        beside = RESULTS / f"{name}{suffix}.tmp"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, RESULTS / f"{name}{suffix}")
    print("\n".join(lines), flush=True)


PARTS = {f.__name__: f for f in (tune, table2, nine, table3, figure4, sizes, experts, carry)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*PARTS, "all"])
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: 0 1 2 3 4, or SEEDS)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                        help="runs at once, one thread each (default: the number of cores)")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="where the runs live (default: runs/reproduce)")
    parser.add_argument("--report", action="store_true", help="run nothing: tables from the runs that are finished (tune, table2, table3, figure4), or that are kept in experiments/results/runs")
    parser.add_argument("--quick", action="store_true", help="miniatures, into runs/reproduce-quick: does it run at all?")
    args = parser.parse_args()
    global RESULTS
    if args.quick:
        args.out, RESULTS = Path("runs/reproduce-quick"), ROOT / "runs/reproduce-quick"
        RESULTS.mkdir(parents=True, exist_ok=True)
    if args.what in ("sizes", "all") and not args.report and not (ROOT / SMALL).exists():
        sys.exit(f"error: {SMALL} is not there; make it: python experiments/pretrain.py --width 64 --out {SMALL}")
    cells = Cells((ROOT / args.out).resolve(), args.jobs, run=not args.report, more=QUICK if args.quick else ())
    for name in PARTS if args.what == "all" else [args.what]:
        PARTS[name](cells, args.seeds or list(SEEDS.get(name, range(5))))


if __name__ == "__main__":
    main()
