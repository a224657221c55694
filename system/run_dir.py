"""The run directory: its lock, its finished phases, its log and its report.

A run is a list of phases. Each leaves its results as files in the directory, and state.json names
the finished ones, so the same command continues where an earlier start stopped. What an unfinished
phase has done is in checkpoints.py.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from benchmarks.files import json_lines, read_contents
from system.errors import InputError
from system.files import named, read_object, remove, write_text
from system.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
# Options that another start of the same run may change: where and how it runs, and how much memory
# it takes. The latter change results by rounding alone.
FREE_OPTIONS = ("out", "save_minutes", "shard", "restart")
FREE_OPTIONS += ("micro_tokens", "leaves", "episodes", "checkpointing")
# What the user may give, and a run must not touch.
GIVEN = ("model", "init", "expert", "prompt_file", "match")
# The mark of a run directory, and its lock. In a folder that lacks it no file is touched.
MARK = "stepagent.run"
ITERATION = "iter_[0-9]+"
CHECKPOINT = "[0-9]{8}"
# What a run writes beside its mark and its state.
RUN_FILES = rf"checkpoints|{ITERATION}|policy|sft|base|experts\.jsonl|eval|agreement"
RUN_FILES += r"|failed_batch\.json|report\.md|config\.json|metrics\.jsonl"
REMEDY = "give another --out, or --restart to begin again"


class RunDir:
    """A directory that one run holds until it ends."""

    def __init__(self, config, ranks: Ranks, source_files: list[Path]):
        """source_files: the code that makes the results."""
        self.config = config
        self.ranks = ranks
        self.out = Path(config.out)
        # Finished phases, the folder of the last saved policy, the log's length after the phases.
        self.state = {"done": [], "policy": "", "log_bytes": 0}
        self.current = ""
        if ranks.rank == 0:
            self._check_place()
            self._lock()
        self._open({"config": dataclasses.asdict(config), "code": hashes(source_files)})
        ranks.barrier()

    def path(self, name: str) -> Path:
        return self.out / name

    def has_done(self, name: str) -> bool:
        return name in self.state["done"]

    def phase(self, name: str, work: Callable, *args, reads: Callable | None = None):
        """Calls work(*args) unless an earlier start has finished this phase; -> reads(*args).

        Results always come back from disk, so a resumed run continues from the same bits. Nothing
        else is to restore: random numbers are seeded by what they are drawn for, and every phase
        makes a new optimizer.
        """
        if not self.has_done(name):
            self.current = name
            work(*args)
            self.ranks.barrier()
            self.state["done"].append(name)
            if self.ranks.rank == 0:
                with open(self.path("metrics.jsonl"), "ab") as file:
                    os.fsync(file.fileno())
                    self.state["log_bytes"] = file.tell()
                write_text(self.path("state.json"), json.dumps(self.state))
                self._remove_old_weights()
            self.ranks.barrier()
        return reads(*args) if reads else None

    def _remove_old_weights(self) -> None:
        """The last two iterations keep their weights, a finished phase needs no checkpoints."""
        iterations = named(self.out, ITERATION)
        iterations.sort(key=lambda folder: int(folder.name[5:]))
        for weights in ("policy", "discriminator(_[01])?"):
            having = [folder for folder in iterations if named(folder, weights)]
            for folder in having[:-2]:
                for old in named(folder, weights):
                    remove(old)
        checkpoints = self.path("checkpoints")
        for old in named(checkpoints, rf"{CHECKPOINT}(\.tmp)?"):
            remove(old)
        if checkpoints.is_dir() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()

    def say(self, text: str) -> None:
        if self.ranks.rank == 0:
            tqdm.write(text)

    def bar(self, what, label: str, total: int | None = None) -> tqdm:
        """A progress bar: over an iterable, or of so many steps."""
        if isinstance(what, int):
            what, total = None, what
        # In a file every refresh is a line.
        interval = 0.5 if sys.stderr.isatty() else 20
        quiet = self.ranks.rank > 0
        return tqdm(what, label, total, disable=quiet, dynamic_ncols=True, mininterval=interval)

    def log(self, phase: str, iteration: int, step: int, **figures) -> None:
        """One line of metrics.jsonl."""
        row = {"phase": phase, "iteration": iteration, "step": step, "time": time.time()}
        self._append_log(json.dumps(row | figures) + "\n")

    def _append_log(self, lines: str) -> None:
        if self.ranks.rank == 0:
            with open(self.path("metrics.jsonl"), "a", encoding="utf-8") as file:
                file.write(lines)

    def phase_log(self) -> str:
        """The log's lines of the phase that runs, for a checkpoint."""
        with open(self.path("metrics.jsonl"), encoding="utf-8") as file:
            file.seek(self.state["log_bytes"])
            return file.read()

    def restore_log(self, lines: str) -> None:
        """The log of the finished phases, then these lines."""
        if self.ranks.rank == 0:
            metrics = self.path("metrics.jsonl")
            metrics.touch()
            os.truncate(metrics, min(self.state["log_bytes"], metrics.stat().st_size))
            self._append_log(lines)

    def finish(self) -> None:
        """Writes report.md."""
        if self.ranks.rank == 0:
            log = self.path("metrics.jsonl")
            rows = [row for _, row in json_lines(read_contents(str(log), "put it back"), str(log))]
            write_text(self.path("report.md"), report(self.config, rows))

    def _check_place(self) -> None:
        """InputError where a run could touch what the user gave, or another run."""
        out = self.out.resolve()
        for name in GIVEN:
            given = getattr(self.config, name)
            if not given or (name, given) == ("model", "tiny"):
                continue
            path = Path(given).resolve()
            # The id of a model is no path, but a folder of its name would be taken for the model.
            near = os.path.exists(path) and (out.is_relative_to(path) or path.is_relative_to(out))
            if near or path == out:
                raise InputError(
                    f"--out {self.out} is, holds or lies in --{name.replace('_', '-')} {given}, "
                    "which a run must not touch; give another --out"
                )
        for parent in out.parents:
            if os.path.exists(parent / MARK):
                raise InputError(f"--out {self.out} lies in the run {parent}; give another --out")

    def _lock(self) -> None:
        """One run a directory. The system drops the lock when the process ends, however it does."""
        mark = self.path(MARK)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if not mark.is_file() and any(self.out.iterdir()):
                raise InputError(
                    f"--out {self.out} has files, but is no run directory ({MARK} is missing); "
                    "give a new or an empty folder"
                )
            self.lock = open(mark, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"--out {self.out}: {error.strerror}; give another folder") from None
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = self._holder().strip()
            raise InputError(
                f"{self.out} is in use by process {holder}; wait for it, or give another --out"
            ) from None
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
        self.lock.flush()

    def _holder(self) -> str:
        """What the lock file says. If rank 0 closed any other handle on it, the lock would drop."""
        if self.ranks.rank == 0:
            self.lock.seek(0)
            return self.lock.read()
        lock = self.path(MARK)
        return lock.read_text(encoding="utf-8") if lock.exists() else ""

    def _open(self, made_by: dict) -> None:
        """Continues the run that is here, if it is this one, or begins one.

        Other machines may see rank 0's files late, so what rank 0 finds counts.
        """
        now = datetime.now().isoformat(timespec="seconds")
        here = {"holder": self._holder(), "found": self._find(), "begun": now}
        rank_0 = self.ranks.gather(here)[0]
        if self._holder() != rank_0["holder"]:
            problem = "is not the same folder on all machines; give an --out that they share"
            raise InputError(f"{self.out} {problem}")
        if found := rank_0["found"]:
            self.state = found["state"]
            self._compare(made_by, found["made_by"])
        # The date that chat templates write is that of the first start.
        begun = found["made_by"]["begun"] if found else rank_0["begun"]
        self.begun = datetime.fromisoformat(begun)
        if self.ranks.rank == 0 and not found:
            self._begin(made_by)
        # Lines of a phase that was cut off go.
        self.restore_log("")

    def _find(self) -> dict | None:
        """The state of an earlier start and what made it; None if it has done nothing."""
        if self.ranks.rank > 0 or self.config.restart:
            return None
        file = self.path("state.json")
        written = named(self.out, RUN_FILES)
        if not file.exists() and not written:
            return None
        remedy = f"put it back, {REMEDY}"
        state = read_object(file, remedy, done=list, policy=str, log_bytes=int)
        if not state["done"] and not named(self.path("checkpoints"), CHECKPOINT):
            return None
        made_by = read_object(self.path("config.json"), remedy, config=dict, code=dict)
        log = self.path("metrics.jsonl")
        if state["log_bytes"] > (log.stat().st_size if log.exists() else 0):
            raise InputError(f"{log}: lines of finished phases are missing; {remedy}")
        if not self.path(state["policy"]).is_dir():
            raise InputError(f"{self.path(state['policy'])}: the policy is missing; {remedy}")
        return {"state": state, "made_by": made_by}

    def _compare(self, now: dict, earlier: dict) -> None:
        """InputError unless options and code are those of the earlier start."""
        changed = []
        for name, value in now["config"].items():
            before = earlier["config"].get(name)
            if name not in FREE_OPTIONS and before != value:
                changed.append(f"{name} {before!r} -> {value!r}")
        if changed:
            changes = ", ".join(changed)
            raise InputError(
                f"{self.out} holds a run with another configuration ({changes}); {REMEDY}"
            )
        now, earlier = now["code"], earlier["code"]
        files = [name for name in sorted(now | earlier) if now.get(name) != earlier.get(name)]
        if files:
            named = ", ".join(files[:3])
            named += f" and {len(files) - 3} more" if len(files) > 3 else ""
            raise InputError(
                f"{self.out} holds a run of other code (changed, new or missing: {named}); {REMEDY}"
            )

    def _begin(self, made_by: dict) -> None:
        """Removes what another run or a start that failed early has left; writes config.json."""
        if self.config.restart:
            self.say(f"{self.out} begins again; to continue it later, leave --restart out")
        # First: whatever else is still there, nothing is done.
        write_text(self.path("state.json"), json.dumps(self.state))
        for path in named(self.out, RUN_FILES):
            remove(path)
        ask = "git rev-parse --verify --quiet HEAD"
        commit = subprocess.run(ask, shell=True, cwd=ROOT, capture_output=True, text=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        versions["python"] = sys.version.split()[0]
        about = {"versions": versions, "commit": commit.stdout.strip(), "ranks": self.ranks.world}
        about["begun"] = self.begun.isoformat()
        write_text(self.path("config.json"), json.dumps(made_by | about, indent=2))


def hashes(files: list[Path]) -> dict[str, str]:
    """sha256 of each file, by its name relative to the repository."""
    found = {}
    for file in files:
        name = os.path.relpath(Path(file).resolve(), ROOT)
        found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def report(config, rows: Iterable[dict]) -> str:
    """Markdown: a table of the evaluations, and one of the inspections."""
    evaluations = [
        "| evaluated | split | tasks | success | 95% interval | mean reward | secondary | turns "
        "| invalid |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    inspections = ["| iteration | match_text | match_action | pairs kept |", "|---|---|---|---|"]
    for row in rows:
        if row["phase"] == "eval":
            low, high = row["success_interval"]
            secondary = ", ".join(f"{name} {value:.3f}" for name, value in row["secondary"].items())
            evaluations.append(
                f"| {row['name']} | {row['split']} | {row['tasks']} | {row['success']:.1%} "
                f"| {low:.1%} - {high:.1%} | {row['reward']:.3f} | {secondary} "
                f"| {row['steps']:.1f} | {row['invalid']:.1%} |"
            )
        elif row["phase"] == "inspect":
            inspections.append(
                f"| {row['iteration']} | {row['match_text']:.1%} | {row['match_action']:.1%} "
                f"| {row['pairs_kept']} |"
            )
    title = f"# {config.method} on {config.env}, {config.model}, seed {config.seed}"
    return "\n".join([title, "", *evaluations, "", *inspections, ""])
