"""The main job with a real pretrained chat model, for one GPU: SFT until dev stops improving, then
SFT+ and both reflections from that SFT, on the household with full prompts.

    python experiments/gpu_job.py MODEL [--seed 0] [--out runs/gpu-job]      # again: continues
    python experiments/gpu_job.py MODEL --few      # a handful of tasks: does it run?

MODEL is a folder of SmolLM2-135M-Instruct, or of another chat model. Learning rates are those of
real_model.sh, D's is ten times the policy's; none is tuned for this job. The table has success and
agreement with the expert at the states of held-out tasks; compare.py adds intervals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system.files import write_text

ROOT = Path(__file__).resolve().parents[1]
# Passes of SFT, one after another while success on dev rises.
PASSES = (1, 2, 4, 8)
WHOLE = ["--experts", "1300", "--sft-experts", "700", "--practice-experts", "600"]
WHOLE += ["--max-new-tokens", "48", "--micro-tokens", "16384", "--leaves", "512"]
WHOLE += ["--episodes", "128"]
FEW = ["--experts", "6", "--sft-experts", "3", "--practice-experts", "3", "--eval-tasks", "2"]
FEW += ["--max-new-tokens", "12", "--env-options", "receptacles=5 distractors=2 max_steps=13"]


@dataclass
class Job:
    """How runs are started, and where they lie."""

    model: str
    seed: int
    out: Path
    few: bool

    def run(self, name: str, method: str, splits: str, *more: str) -> Path:
        """A run of stepagent.py; one that has finished is not started again."""
        out = self.out / name
        state = out / "state.json"
        if state.exists() and "policy" in json.loads(state.read_text(encoding="utf-8"))["done"]:
            return out
        options = FEW if self.few else WHOLE
        words = ["--env", "household", "--model", self.model, "--seed", str(self.seed)]
        words += ["--method", method, "--preset", "real", "--eval-each=", "--eval-splits", splits]
        if method == "sft":
            # It does not practise.
            place = options.index("--practice-experts")
            options = options[:place] + options[place + 2 :]
        words += [*options, *more, "--out", str(out)]
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, "stepagent.py", *words], cwd=ROOT)
        if done.returncode:
            sys.exit(done.returncode)
        return out


def last_eval(out: Path, split: str) -> dict:
    """The figures of the final evaluation on a split."""
    found = {}
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["phase"] == "eval" and row["name"] == "final" and row["split"] == split:
            found = row
    return found


def imitate_until_dev_stops(job: Job) -> Path:
    """SFT with more and more passes, each from the model itself; -> the best on dev."""
    best, highest = None, -1.0
    for passes in PASSES[: 2 if job.few else len(PASSES)]:
        rate = ["--sft-lr", "1e-4", "--sft-batch", "8", "--sft-epochs", str(passes)]
        out = job.run(f"sft_{passes}", "sft", "dev,test,test_unseen", *rate)
        success = last_eval(out, "dev")["success"]
        print(f"SFT, {passes} passes: success on dev {success:.1%}", flush=True)
        if success <= highest:
            break
        best, highest = out, success
    return best


def table(runs: dict[str, Path], seconds: float) -> str:
    lines = ["| | success, test | unseen | expert's action, test | NLL of the expert | minutes |"]
    lines.append("|---|---|---|---|---|---|")
    for name, out in runs.items():
        test, unseen = last_eval(out, "test"), last_eval(out, "test_unseen")
        low, high = test["success_interval"]
        cells = [f"{test['success']:.1%} [{low:.1%}, {high:.1%}]", f"{unseen['success']:.1%}"]
        cells += [f"{test['expert_match']:.1%}", f"{test['expert_nll']:.3f}"]
        cells.append(f"{minutes(out):.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\nThis start took {seconds / 60:.1f} minutes.")
    return "\n".join(lines) + "\n"


def minutes(out: Path) -> float:
    """From a run's first line of the log to its last."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = (json.loads(line)["time"] for line in (lines[0], lines[-1]))
    return (last - first) / 60


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", help="folder of the chat model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu-job")
    parser.add_argument("--few", action="store_true", help="a handful of tasks")
    options = parser.parse_args()
    began = time.time()
    out = options.out / ("few" if options.few else "") / f"seed{options.seed}"
    job = Job(options.model, options.seed, out.resolve(), options.few)

    runs = {"SFT": imitate_until_dev_stops(job)}
    reflect = ["--init", str(runs["SFT"] / "policy"), "--iterations", "1" if job.few else "2"]
    reflect += ["--lr", "5e-6"]
    splits = "test,test_unseen"
    implicit = job.run("implicit", "stepagent-implicit", splits, *reflect)
    match = ["--match", str(implicit)]
    runs["SFT+"] = job.run("sft_plus", "sft+", splits, *reflect, *match)
    runs["StepAgent-Implicit"] = implicit
    inverse = ["--batch", "64", "--d-lr", "5e-5"]
    runs["StepAgent-Inverse"] = job.run("inverse", "stepagent-inverse", splits, *reflect, *inverse)
    text = table(runs, time.time() - began)
    write_text(job.out / "table.md", text)
    print(f"\n{text}")
    named = [f"{name}={path}" for name, path in runs.items()]
    words = ["experiments/compare.py", *named, "--out", str(job.out / "compare.md")]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
