"""Kills runs at random moments and compares what comes out with an undisturbed run. -> experiments/results/faults.md

    python experiments/faults.py                     # 50 kills over 1 and 2 processes, damaged checkpoints, a full disk (root only)
    python experiments/faults.py --soak 45           # and 45 minutes of household with 2 processes under kills; memory, lines of the log

The runs are a miniature household (6 trajectories, a Llama of two layers), with a checkpoint after every update, so that kills fall
into checkpoints, too. The processes are forked from one that has imported everything; a kill is SIGKILL to all of a run's processes.
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
from ranks import finish, start, two_layers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import parallel  # noqa: E402

ENVIRONMENT = "receptacles=5 distractors=2 max_steps=13"
WORDS = ["--env-options", ENVIRONMENT, "--experts", "6", "--sft-experts", "6", "--practice-experts", "6", "--sft-epochs", "1", "--sft-batch", "2",
         "--iterations", "1", "--practice", "2", "--batch", "8", "--max-new-tokens", "6", "--eval-each", "", "--eval-splits", "test",
         "--eval-tasks", "2", "--save-minutes", "0"]


def rows(out: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k not in ("time", "seconds")}
            for line in (out / "metrics.jsonl").read_text().splitlines()]


def twice_or_never(out: Path) -> int:
    """Lines of the log that stand there more than once, by phase, iteration, step and name."""
    return sum(n - 1 for n in Counter((r["phase"], r["iteration"], r["step"], r.get("name"), r.get("split")) for r in rows(out)).values())


def where(out: Path) -> str:
    """The phase that a run directory is in."""
    state = out / "state.json"
    done = json.loads(state.read_text())["done"] if state.exists() else []
    inside = [p.name for p in (out / "checkpoints").glob("*")] if (out / "checkpoints").exists() else []
    return f"after {done[-1] if done else 'nothing'}" + (", in a checkpoint" if any(name.endswith(".tmp") for name in inside) else
                                                         ", with checkpoints" if inside else "")


def killed_run(out: Path, words: list[str], world: int, kills: int, longest: float, gen: random.Random, log: Path) -> Counter:
    """Starts the run again and again, kills it after a random time, and lets it end when it has been killed `kills` times."""
    places = Counter()
    while sum(places.values()) < kills:
        processes = start(world, [({}, words)], log)
        deadline = time.monotonic() + gen.uniform(0, longest)
        while time.monotonic() < deadline and any(p.is_alive() for p in processes):
            time.sleep(0.005)
        if not any(p.is_alive() for p in processes):         # it got to its end: the directory starts over
            assert {p.exitcode for p in processes} == {0}, log.read_text()[-2000:]
            shutil.rmtree(out)
            continue
        for p in processes:
            p.kill()
        finish(processes)
        places[where(out)] += 1
    return places


def compare(one: Path, two: Path) -> str:
    a, b = (load_file(out / "policy" / "model.safetensors") for out in (one, two))
    far = max((a[name] - b[name]).abs().max().item() for name in a)
    moved = max((a[name] - x).abs().max().item() for name, x in load_file(one / "sft" / "policy" / "model.safetensors").items())
    equal = "the same" if rows(one) == rows(two) else "other"
    return (f"weights to the bit, log {equal}" if far == 0 else f"weights within {far:.1e} (reflection moved them by {moved:.1e}), log {equal}") + \
        f", {twice_or_never(two)} lines doubled"


def kills(work: Path, model: Path, n: int) -> list[str]:
    table = []
    for world, method in ((1, "stepagent-implicit"), (1, "stepagent-inverse"), (2, "stepagent-implicit")):
        words = lambda out: ["--out", str(out), *WORDS, "--model", str(model), "--method", method]
        whole, out, log = (work / f"{name}-{method}-{world}" for name in ("whole", "killed", "log"))
        since = time.monotonic()
        assert set(finish(start(world, [({}, words(whole))], log))) == {0}, log.read_text()[-2000:]
        longest = 0.7 * (time.monotonic() - since)
        share = n * 2 // 5 if world == 1 else n - 2 * (n * 2 // 5)
        places = killed_run(out, words(out), world, share, longest, random.Random(world), log)
        assert set(finish(start(world, [({}, words(out))], log))) == {0}, log.read_text()[-2000:]
        row = f"| kill -9 at random moments, {method} | {world} | {share} | {compare(whole, out)} |"
        print(row, dict(places), flush=True)
        table.append(row)
        table.append("| " + "; ".join(f"{place}: {count}" for place, count in sorted(places.items())) + " | | | |")
    return table


def full_disk(work: Path, model: Path) -> list[str]:
    """A file system of its own that is too small: the run must end with one line, and go on once there is room."""
    disk, log = work / "disk", work / "log-disk"
    disk.mkdir()
    size = lambda kb, more="": subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kb}k{more}", "tmpfs", str(disk)], capture_output=True).returncode
    if os.geteuid() or size(900):
        return ["| full disk | | not run: no permission to mount | |"]
    try:
        words = ["--out", str(disk / "x"), *WORDS, "--model", str(model)]
        code = finish(start(1, [({}, words)], log))
        said = log.read_text()
        lines = [line for line in said.splitlines() if line.startswith("error:")]
        assert code == [1] and len(lines) == 1 and "Traceback" not in said, said[-2000:]
        size(20000, ",remount")
        log.write_text("")
        code = finish(start(1, [({}, words)], log))
        assert code == [0], log.read_text()[-2000:]
        return [f"| full disk (900 kB), then more room | 1 | 1 | `{lines[0][:110]}`; {compare(work / 'whole-stepagent-implicit-1', disk / 'x')} |"]
    finally:
        subprocess.run(["umount", str(disk)])


def damage(work: Path, model: Path, n: int) -> list[str]:
    """One byte of the newest checkpoint is changed, or the file cut, at a random place."""
    gen, words, good = random.Random(0), lambda out: ["--out", str(out), *WORDS, "--model", str(model)], 0
    for k in range(n):
        out, log = work / f"damaged-{k}", work / f"log-damaged-{k}"
        processes = start(1, [({}, words(out))], log)
        while len(list((out / "checkpoints").glob("????????"))) < 2 and processes[0].is_alive():
            time.sleep(0.005)
        processes[0].kill()
        finish(processes)
        newest = max((out / "checkpoints").glob("????????"))
        file = gen.choice(sorted(newest.iterdir()))
        data = bytearray(file.read_bytes())
        place = gen.randrange(len(data))
        file.write_bytes(data[:place] if k % 2 else data[:place] + bytes([data[place] ^ (1 << gen.randrange(8))]) + data[place + 1:])
        assert finish(start(1, [({}, words(out))], log)) == [0], log.read_text()[-2000:]
        good += "torn or corrupt" in log.read_text() and compare(work / "whole-stepagent-implicit-1", out).startswith("weights to the bit, log the same")
    return [f"| newest checkpoint cut or one bit changed, at random places | 1 | {n} | named and the one before used, then weights and log to the bit: {good} |"]


def soak(work: Path, model: Path, minutes: float) -> list[str]:
    """One run of endless iterations with 2 processes, killed every minute and a half on average, continued at once, ended by SIGTERM.
    Memory of rank 0 each second; its slope is fitted within lives, after 20 s each. The log must hold every update once."""
    gen, end, deaths, lives = random.Random(0), time.monotonic() + 60 * minutes, 0, []
    out, log = work / "soak", work / "log-soak"
    words = ["--out", str(out), *WORDS, "--model", str(model), "--iterations", "100000", "--save-minutes", "0.1"]
    while time.monotonic() < end:
        processes, born, samples = start(2, [({}, words)], log), time.monotonic(), []
        death = born + gen.expovariate(1 / 90)
        while time.monotonic() < min(death, end):
            assert all(p.is_alive() for p in processes), log.read_text()[-2000:]
            status = Path(f"/proc/{processes[0].pid}/status").read_text()
            samples.append(((time.monotonic() - born) / 60, int(status.split("VmRSS:")[1].split()[0]) / 1024))
            time.sleep(1)
        for p in processes:
            os.kill(p.pid, signal.SIGKILL if death < end else signal.SIGTERM)
        codes = finish(processes)
        deaths += death < end
        lives.append([(t, x) for t, x in samples if t > 1 / 3])
    assert codes == [143, 143], (codes, log.read_text()[-2000:])
    centred = [(t - sum(u for u, _ in life) / len(life), x) for life in lives if len(life) > 20 for t, x in life]
    slope = sum(t * x for t, x in centred) / sum(t * t for t, _ in centred)
    state = json.loads((out / "state.json").read_text())
    done, found = sum(name.startswith("reflect") for name in state["done"]), {}
    for r in rows(out):
        if r["phase"] == "implicit":
            found.setdefault(r["iteration"], []).append(r["step"])
    holes = sum(found.get(i) != list(range(len(found.get(i, [])))) or not found.get(i) for i in range(1, done + 1))
    return [f"| soak of {minutes:g} minutes, killed again and again, ended by SIGTERM | 2 | {deaths} | {done} iterations, {len(rows(out))} lines in the "
            f"log, {twice_or_never(out)} doubled, {holes} iterations with a hole; memory of rank 0 at most {max(x for life in lives for _, x in life):.0f} MiB, "
            f"slope {slope:+.2f} MiB a minute |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=6)
    parser.add_argument("--soak", type=float, default=0.0, help="minutes")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        two_layers(work / "tiny-two-layers", ENVIRONMENT)
        lines = [f"`python experiments/faults.py --kills {a.kills} --damages {a.damages} --soak {a.soak:g}`, torch {torch.__version__}, gloo; a miniature "
                 "household, a checkpoint after every update.", "", "| fault | processes | times | outcome |", "|---|---|---|---|"]
        lines += kills(work, work / "tiny-two-layers", a.kills)
        lines += damage(work, work / "tiny-two-layers", a.damages) + full_disk(work, work / "tiny-two-layers")
        if a.soak:
            lines += soak(work, work / "tiny-two-layers", a.soak)
    parallel.write_text(ROOT / "experiments/results/faults.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
