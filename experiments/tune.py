"""Where SFT stops rising, and each method's learning rate, on dev tasks: python experiments/tune.py [--jobs 2] [--out runs/tune]

SFT of 16 passes; from it the same grid of learning rates for every method (SFT+ in the updates of Implicit at 1.5e-4); then SFT of 32, 8
and 4 passes, each with its own schedule, for the curve. Needs experiments/requirements.txt (matplotlib). Tasks: dev and dev_more (500, none of them a train or test task), seed 0. Writes experiments/results/tune.md, .json
and sft_converges.svg. Runs that are finished are not run again. About 80 minutes of one core.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from losses import bootstrap  # noqa: E402

PASSES = (4, 8, 16, 32)                              # of SFT; main_job.sh takes 16
RATES = ("5e-5", "1.5e-4", "5e-4")
METHODS = {                                          # label -> options beside the learning rate
    "SFT+": ["--method", "sft+"],
    "StepAgent-Implicit": ["--method", "stepagent-implicit"],
    "StepAgent-Inverse": ["--method", "stepagent-inverse", "--batch", "256"],
}


def run(out: Path, options: list[str]) -> None:
    if (out / "report.md").exists():                 # the last thing that a run writes
        return
    command = [sys.executable, "stepagent.py", "--env", "household", "--model", "models/tiny-household", "--out", str(out), *options,
               "--eval-each", "", "--eval-splits", "dev,dev_more"]
    out.mkdir(parents=True, exist_ok=True)
    print("run", out, *options, flush=True)
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
            sys.exit(f"error: {out} failed; see {out / 'log.txt'}")


def success(out: Path) -> np.ndarray:
    """[tasks], 0 or 1."""
    rows = [json.loads(line) for split in ("dev", "dev_more") for line in open(out / f"eval/final_{split}.jsonl", encoding="utf-8")]
    return np.array([row["reward"] >= 1 for row in rows], dtype=float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    args = parser.parse_args()
    out = (ROOT / args.out).resolve()
    sft = {n: out / f"sft_{n}" for n in PASSES}
    grid = {(label, rate): out / f"{method[1]}_{rate}" for label, method in METHODS.items() for rate in RATES}
    start = ["--init", str(sft[16] / "policy")]
    with ThreadPoolExecutor(args.jobs) as pool:
        run(sft[16], ["--method", "sft"])
        reflect = {key: pool.submit(run, grid[key], [*METHODS[key[0]], *start, "--lr", key[1]]) for key in grid if key[0] != "SFT+"}
        reflect["StepAgent-Implicit", RATES[1]].result()
        match = ["--match", str(grid["StepAgent-Implicit", RATES[1]])]           # all rates see the same updates
        others = [pool.submit(run, grid["SFT+", rate], [*METHODS["SFT+"], *start, *match, "--lr", rate]) for rate in RATES]
        others += [pool.submit(run, sft[n], ["--method", "sft", "--sft-epochs", str(n)]) for n in sorted(PASSES, reverse=True) if n != 16]
        for task in [*others, *reflect.values()]:
            task.result()                                                        # raises what the run raised

    base = success(sft[16])
    lines = ["Household, seed 0, 500 dev tasks; success in %, 95% bootstrap intervals over tasks in brackets.", "",
             "| SFT passes | updates | success |", "|---|---|---|"]
    figures: dict = {"sft": {}, "grid": {}}
    for n in PASSES:
        x, updates = success(sft[n]), sum('"phase": "sft"' in line for line in open(sft[n] / "metrics.jsonl", encoding="utf-8"))
        figures["sft"][n] = {"updates": updates, "success": float(x.mean()), "interval": bootstrap(x)}
        lines.append(f"| {n} | {updates} | {100 * x.mean():.1f} [{100 * bootstrap(x)[0]:.1f}, {100 * bootstrap(x)[1]:.1f}] |")
    lines += ["", "| from SFT of 16 passes, minus it (paired) | " + " | ".join(f"lr {rate}" for rate in RATES) + " |", "|---" * (len(RATES) + 1) + "|"]
    for label in METHODS:
        cells = []
        for rate in RATES:
            x = success(grid[label, rate])
            a, b = bootstrap(x - base)
            figures["grid"][f"{label} {rate}"] = {"success": float(x.mean()), "minus_sft": float((x - base).mean()), "interval": [a, b]}
            cells.append(f"{100 * x.mean():.1f}: {100 * (x - base).mean():+.1f} [{100 * a:+.1f}, {100 * b:+.1f}]")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    results = ROOT / "experiments/results"
    (results / "tune.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (results / "tune.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    plot(figures["sft"], results / "sft_converges.svg")
    print("\n".join(lines))


def plot(sft: dict, path: Path) -> None:
    updates, mean = [s["updates"] for s in sft.values()], np.array([100 * s["success"] for s in sft.values()])
    low, high = 100 * np.array([s["interval"] for s in sft.values()]).T
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.errorbar(updates, mean, yerr=[mean - low, high - mean], marker="o", capsize=3)
    axes.set(xscale="log", xticks=updates, xticklabels=updates, xlabel="SFT updates (a schedule of its own each)",
             ylabel="success on 500 dev tasks, %", ylim=(0, 100))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
