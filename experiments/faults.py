"""Kills runs, damages checkpoints, fills disks; compares each with an undisturbed run.

    python experiments/faults.py               # 50 kills, 6 damaged checkpoints, a full disk (root)
    python experiments/faults.py --soak 45     # and 45 minutes under kills with 2 processes

Writes experiments/results/faults.md. The runs are a miniature: six demonstrations of the household,
a Llama of two layers, a checkpoint after every update, so some kills fall into checkpoints. A kill
is SIGKILL to all processes of a run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from ranks import WORLD, commands, finish, metrics, start, two_layers, weights  # noqa: E402

RESULT = ROOT / "experiments/results/faults.md"
WORDS = ["--env-options", WORLD, "--experts", "6", "--sft-experts", "6", "--practice-experts", "6"]
WORDS += ["--sft-epochs", "1", "--sft-batch", "2", "--iterations", "1", "--practice", "2"]
WORDS += ["--batch", "8", "--max-new-tokens", "6", "--eval-each", "", "--eval-splits", "test"]
WORDS += ["--eval-tasks", "2", "--save-minutes", "0"]


def launch(work: Path, out: Path, *words: str, world: int = 1) -> list:
    """The processes of a run, which goes on if `out` is there already."""
    options = ["--out", str(out), "--model", str(work / "model"), *WORDS, *words]
    return start(world, log_of(work, out), commands, [({}, options)])


def log_of(work: Path, out: Path) -> Path:
    return work / f"{out.name}.log"


def said(work: Path, out: Path) -> str:
    return log_of(work, out).read_text()


def end(processes: list, work: Path, out: Path, code: int = 0) -> None:
    assert set(finish(processes)) == {code}, said(work, out)[-2000:]


def kill(processes: list) -> None:
    for process in processes:
        process.kill()
    finish(processes)


# ---------------------------------------------------------------------------------- outcomes


def doubled_lines(out: Path) -> int:
    """Lines of the log that stand there more than once."""
    names = ("phase", "iteration", "step", "name", "split")
    different = set()
    for row in metrics(out):
        different.add(tuple(row.get(name) for name in names))
    return len(metrics(out)) - len(different)


def compare(whole: Path, disturbed: Path) -> str:
    """How the disturbed run differs from the whole one."""
    one, other = weights(whole / "policy"), weights(disturbed / "policy")
    start = weights(whole / "sft/policy")
    far = max((one[name] - other[name]).abs().max().item() for name in one)
    moved = max((one[name] - start[name]).abs().max().item() for name in one)
    same_weights = "weights to the bit"
    if far > 0:
        same_weights = f"weights within {far:.1e} (reflection moved them by {moved:.1e})"
    log = "the same" if metrics(whole) == metrics(disturbed) else "other"
    return f"{same_weights}, log {log}, {doubled_lines(disturbed)} lines doubled"


def place_of(out: Path) -> str:
    """Where in a run it was killed."""
    state = out / "state.json"
    done = json.loads(state.read_text())["done"] if state.exists() else []
    place = f"after {done[-1] if done else 'nothing'}"
    checkpoints = [path.name for path in (out / "checkpoints").glob("*")]
    if any(name.endswith(".tmp") for name in checkpoints):
        return place + ", in a checkpoint"
    return place + (", with checkpoints" if checkpoints else "")


# ------------------------------------------------------------------------------------ faults


def kills(work: Path, number: int) -> list[str]:
    rows = []
    share = number * 2 // 5
    for world, method, count in (
        (1, "stepagent-implicit", share),
        (1, "stepagent-inverse", share),
        (2, "stepagent-implicit", number - 2 * share),
    ):
        words = ("--method", method)
        whole, out = (work / f"{name}-{method}-{world}" for name in ("whole", "killed"))
        since = time.monotonic()
        end(launch(work, whole, *words, world=world), work, whole)
        longest = 0.7 * (time.monotonic() - since)
        places = kill_often(work, out, words, world, count, longest)
        end(launch(work, out, *words, world=world), work, out)
        outcome = compare(whole, out)
        rows.append(f"| kill -9 at random moments, {method} | {world} | {count} | {outcome} |")
        counted = [f"{place}: {times}" for place, times in sorted(places.items())]
        rows.append("| " + "; ".join(counted) + " | | | |")
    return rows


def kill_often(
    work: Path, out: Path, words: tuple, world: int, count: int, longest: float
) -> Counter:
    """Starts a run again and again and kills it each time after a random time."""
    random_times, places = random.Random(world), Counter()
    while places.total() < count:
        processes = launch(work, out, *words, world=world)
        deadline = time.monotonic() + random_times.uniform(0, longest)
        while time.monotonic() < deadline and any(process.is_alive() for process in processes):
            time.sleep(0.005)
        if any(process.is_alive() for process in processes):
            kill(processes)
            places[place_of(out)] += 1
        else:
            # It has ended: the directory starts over.
            end(processes, work, out)
            shutil.rmtree(out)
    return places


def damage(work: Path, whole: Path, number: int) -> list[str]:
    """The newest checkpoint is cut, or one bit of it changed, at a random place."""
    generator, good = random.Random(0), 0
    for trial in range(number):
        out = work / f"damaged-{trial}"
        processes = launch(work, out)
        checkpoints = out / "checkpoints"
        while len(list(checkpoints.glob("????????"))) < 2 and processes[0].is_alive():
            time.sleep(0.005)
        kill(processes)
        file = generator.choice(sorted(max(checkpoints.glob("????????")).iterdir()))
        data = bytearray(file.read_bytes())
        place = generator.randrange(len(data))
        if trial % 2:
            data = data[:place]
        else:
            data[place] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
        end(launch(work, out), work, out)
        is_same = compare(whole, out).startswith("weights to the bit, log the same")
        good += is_same and "torn or corrupt" in said(work, out)
    what = "newest checkpoint cut or one bit changed, at random places"
    outcome = "named and the one before used, then weights and log to the bit"
    return [f"| {what} | 1 | {number} | {outcome}: {good} |"]


def full_disk(work: Path, whole: Path) -> list[str]:
    """On a small file system a run must end with one line, and go on once there is room."""
    disk = work / "disk"
    out = disk / "full"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk), "-o"]
    if os.geteuid() or subprocess.run([*mount, "size=900k"], capture_output=True).returncode:
        return ["| full disk | | not run: no permission to mount | |"]
    try:
        end(launch(work, out), work, out, code=1)
        errors = [line for line in said(work, out).splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and "Traceback" not in said(work, out), said(work, out)[-2000:]
        subprocess.run([*mount, "size=20000k,remount"], check=True)
        end(launch(work, out), work, out)
        outcome = f"`{errors[0][:110]}`; {compare(whole, out)}"
        return [f"| full disk (900 kB), then more room | 1 | 1 | {outcome} |"]
    finally:
        subprocess.run(["umount", str(disk)])


def soak(work: Path, minutes: float) -> list[str]:
    """One endless run of 2 processes, killed every minute and a half on average.

    It goes on at once each time and is ended by SIGTERM. The memory of rank 0 is read each second;
    its growth is that within lives, 20 s after their start.
    """
    generator = random.Random(0)
    until, deaths, most, grown, lived = time.monotonic() + 60 * minutes, 0, 0.0, 0.0, 0.0
    out = work / "soak"
    while time.monotonic() < until:
        words = ("--iterations", "100000", "--save-minutes", "0.1")
        processes, born, samples = launch(work, out, *words, world=2), time.monotonic(), []
        death = born + generator.expovariate(1 / 90)
        while time.monotonic() < min(death, until):
            assert all(process.is_alive() for process in processes), said(work, out)[-2000:]
            if time.monotonic() > born + 20:
                samples.append(mebibytes(processes[0].pid))
            time.sleep(1)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL if death < until else signal.SIGTERM)
        codes = finish(processes)
        deaths += death < until
        most = max([most, *samples])
        if samples:
            grown, lived = grown + samples[-1] - samples[0], lived + len(samples) / 60
    assert codes == [143, 143], (codes, said(work, out)[-2000:])
    steps: dict[int, list[int]] = {}
    for row in metrics(out):
        if row["phase"] == "implicit":
            steps.setdefault(row["iteration"], []).append(row["step"])
    names = json.loads((out / "state.json").read_text())["done"]
    done = sum(name.startswith("reflect") for name in names)
    holes = 0
    for iteration in range(1, done + 1):
        found = steps.get(iteration, [])
        holes += not found or found != list(range(len(found)))
    outcome = f"{done} iterations, {len(metrics(out))} lines in the log, {doubled_lines(out)} "
    outcome += f"doubled, {holes} iterations with a hole; memory of rank 0 at most {most:.0f} MiB, "
    outcome += f"growing by {grown / max(lived, 1e-9):.2f} MiB a minute"
    what = f"soak of {minutes:g} minutes, killed again and again, ended by SIGTERM"
    return [f"| {what} | 2 | {deaths} | {outcome} |"]


def mebibytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=6)
    parser.add_argument("--soak", type=float, default=0.0, help="minutes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        two_layers(work / "model")
        command = f"--kills {args.kills} --damages {args.damages} --soak {args.soak:g}"
        lines = [
            f"`python experiments/faults.py {command}`, torch {torch.__version__}, gloo; "
            "a miniature household, a checkpoint after every update.",
            "",
            "| fault | processes | times | outcome |",
            "|---|---|---|---|",
            *kills(work, args.kills),
        ]
        whole = work / "whole-stepagent-implicit-1"
        lines += damage(work, whole, args.damages) + full_disk(work, whole)
        if args.soak:
            lines += soak(work, args.soak)
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
