"""The run directory: one run at a time, its phases, its log, and forks that change the code."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from ranks import (
    QUIET,
    WORLD,
    Killed,
    commands,
    equal,
    finish,
    metrics,
    run,
    same_bits,
    start,
    until,
    weights,
    words_of,
)

import envs
import system.run_dir
from stepagent import Config
from system.ranks import Ranks
from system.run_dir import RunDir
from trajectory import InputError


def open_dir(out: Path, code: list[Path] = (), **options) -> RunDir:
    """As another process would: a process's locks do not stop itself."""
    return RunDir(Config(out=str(out), method="sft", **options), Ranks(), list(code))


def nothing() -> None:
    pass


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------------- phases


def test_a_phase_is_done_once_and_its_results_are_read_at_every_start(tmp_path):
    done = []

    def work(name):
        done.append(name)
        (tmp_path / "x" / name).write_text("made")

    def read(name):
        return (tmp_path / "x" / name).read_text()

    for _ in range(2):
        here = open_dir(tmp_path / "x")
        assert here.phase("first", work, "a", reads=read) == "made"
        assert here.has_done("first") and not here.has_done("second")
    assert done == ["a"] and here.phase("first", work, "a") is None


def test_a_phase_that_failed_is_done_again_and_its_lines_of_the_log_go(tmp_path):
    here = open_dir(tmp_path / "x")
    here.phase("first", here.log, "sft", 0, 0)

    def fails():
        here.log("implicit", 1, 0, loss=0.5)
        raise OSError

    with pytest.raises(OSError):
        here.phase("second", fails)
    assert [row["phase"] for row in metrics(tmp_path / "x")] == ["sft", "implicit"]
    here = open_dir(tmp_path / "x")
    assert here.has_done("first") and not here.has_done("second")
    assert [row["phase"] for row in metrics(tmp_path / "x")] == ["sft"]


def test_two_iterations_keep_their_policy(tmp_path):
    here = open_dir(tmp_path / "x")
    for i in (1, 2, 9, 10):
        here.phase(f"reflect_{i}", here.path(f"iter_{i}/policy").mkdir, 0o777, True)
    kept = sorted(path.parent.name for path in (tmp_path / "x").glob("iter_*/policy"))
    assert kept == ["iter_10", "iter_9"] and (tmp_path / "x" / "iter_1").exists()


def test_checkpoints_of_a_finished_phase_are_removed_and_those_of_a_failed_one_kept(tmp_path):
    here = open_dir(tmp_path / "x")

    def save():
        (tmp_path / "x" / "checkpoints" / "00000001").mkdir(parents=True)

    def save_and_fail():
        save()
        raise OSError

    here.phase("first", save)
    assert not (tmp_path / "x" / "checkpoints").exists()
    with pytest.raises(OSError):
        here.phase("second", save_and_fail)
    assert (tmp_path / "x" / "checkpoints" / "00000001").exists()
    here.phase("second", nothing)
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_the_report_has_every_evaluation_and_inspection(tmp_path):
    here = open_dir(tmp_path / "x")
    figures = {"success": 0.5, "success_interval": [0.4, 0.6], "reward": 0.25, "steps": 7.0}
    figures |= {"tasks": 30, "invalid": 0.1, "secondary": {"f1": 0.6}}
    here.log("eval", 1, 0, name="final", split="test", **figures)
    here.log("inspect", 1, 0, match_text=0.5, match_action=0.75, pairs_kept=12)
    here.finish()
    report = (tmp_path / "x" / "report.md").read_text()
    assert report.startswith("# sft on household, tiny, seed 0\n\n| evaluated |")
    row = "| final | test | 30 | 50.0% | 40.0% - 60.0% | 0.250 | f1 0.600 | 7.0 | 10.0% |"
    assert row in report.splitlines() and "| 1 | 50.0% | 75.0% | 12 |" in report.splitlines()


# -------------------------------------------------------------------- the same command, other code


def begun(out: Path, code: list[Path] = ()) -> RunDir:
    here = open_dir(out, code)
    here.phase("first", nothing)
    return here


def test_another_configuration_is_refused(tmp_path):
    begun(tmp_path / "x")
    before = (tmp_path / "x" / "config.json").read_text()
    with pytest.raises(InputError, match=r"another configuration \(seed 0 -> 3\); give another --"):
        open_dir(tmp_path / "x", seed=3)
    assert (tmp_path / "x" / "config.json").read_text() == before
    # What does not touch the result may change.
    open_dir(tmp_path / "x", save_minutes=1.0, shard="true")


def test_a_start_that_failed_early_does_not_occupy_the_directory(tmp_path):
    open_dir(tmp_path / "x")
    (tmp_path / "x" / "base").mkdir()
    (tmp_path / "x" / "experts.jsonl").write_text("wrong")
    open_dir(tmp_path / "x", seed=3)
    assert read_json(tmp_path / "x" / "config.json")["config"]["seed"] == 3
    assert not (tmp_path / "x" / "base").exists()
    assert not (tmp_path / "x" / "experts.jsonl").exists()


def test_a_run_keeps_the_date_of_its_first_start(tmp_path, monkeypatch):
    class Calendar(datetime):
        day = 1

        @classmethod
        def now(cls):
            return cls(2024, 7, cls.day, 12, 30)

    monkeypatch.setattr(system.run_dir, "datetime", Calendar)
    first = begun(tmp_path / "x").begun
    Calendar.day = 2
    assert open_dir(tmp_path / "x").begun == first == datetime(2024, 7, 1, 12, 30)
    assert open_dir(tmp_path / "x", restart=True).begun == datetime(2024, 7, 2, 12, 30)


def source(folder: Path, **files: str) -> list[Path]:
    """Python files with these texts."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return sorted(folder.iterdir())


def test_other_code_is_refused_and_named_with_the_remedy(tmp_path):
    out, src = tmp_path / "x", tmp_path / "src"
    begun(out, source(src, losses="1", envs="1", rollout="1"))
    assert len(read_json(out / "config.json")["code"]) == 3
    begun(out, source(src, losses="1", envs="1", rollout="1"))
    remedy = r"\); give another --out, or --restart to begin again"
    for files, named in (
        ({"losses": "2", "envs": "1", "rollout": "1"}, "[^ ]*losses.py"),
        ({"losses": "1", "envs": "1", "rollout": "1", "added": "1"}, "[^ ]*added.py"),
        ({"losses": "1", "envs": "1"}, "[^ ]*rollout.py"),
        ({"a": "", "b": ""}, r"[^ ]*a.py, [^ ]*b.py, [^ ]*envs.py and 2 more"),
    ):
        with pytest.raises(
            InputError, match=r"other code \(changed, new or missing: " + named + remedy
        ):
            open_dir(out, source(src, **files))
    assert read_json(out / "state.json")["done"] == ["first"]


def test_restart_removes_what_runs_write_and_nothing_else(tmp_path, capsys):
    out = tmp_path / "x"
    here = begun(out, source(tmp_path / "src", losses="1"))
    here.log("sft", 0, 0)
    written = "experts.jsonl report.md failed_batch.json base/w sft/w policy/w eval/w iter_1/w"
    written += " iter_12/w checkpoints/00000001/w"
    for name in [*written.split(), "notes.txt", "plots/w", "iterations/w"]:
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_text("")
    here = open_dir(out, source(tmp_path / "src", losses="2"), seed=5, restart=True)
    assert not here.has_done("first") and metrics(out) == []
    left = {path.name for path in out.iterdir()}
    assert left == {"lock", "config.json", "metrics.jsonl", "notes.txt", "plots", "iterations"}
    assert read_json(out / "config.json")["config"]["seed"] == 5
    assert "begins again" in capsys.readouterr().out
    here.phase("first", nothing)
    # Without the option it goes on.
    assert open_dir(out, source(tmp_path / "src", losses="2"), seed=5).has_done("first")


def test_restart_leaves_a_folder_of_somebody_elses(tmp_path):
    (tmp_path / "x" / "policy").mkdir(parents=True)
    open_dir(tmp_path / "x", restart=True)
    assert (tmp_path / "x" / "policy").exists()


# ---------------------------------------------------------------------------- one run a directory

HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(f"{os.getpid()} on here")
file.flush()
time.sleep(600)
"""


def is_locked(path: Path) -> bool:
    """Asked by another process, as a process's lock does not stop itself."""
    code = "import fcntl, sys\nfcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", code, path], capture_output=True).returncode != 0


def test_a_second_run_on_the_directory_is_refused_and_a_dead_ones_lock_is_not(tmp_path):
    lock = tmp_path / "x" / "lock"
    lock.parent.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, lock])
    until(lambda: lock.exists() and "here" in lock.read_text())
    message = f"x is in use by process {holder.pid} on here; wait for it, or give another --out"
    with pytest.raises(InputError, match=message):
        open_dir(tmp_path / "x")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["lock"]
    holder.kill()
    holder.wait()
    open_dir(tmp_path / "x")


def test_a_run_holds_its_directory_until_it_ends(tmp_path):
    """A POSIX lock goes with the first handle on the file that its process closes."""
    here = begun(tmp_path / "x")
    here.log("sft", 0, 0)
    here.phase("second", nothing)
    assert is_locked(tmp_path / "x" / "lock")
    here.finish()
    assert is_locked(tmp_path / "x" / "lock")
    fcntl.lockf(here.lock, fcntl.LOCK_UN)
    assert not is_locked(tmp_path / "x" / "lock")


def test_a_log_alone_does_not_make_a_folder_a_run(tmp_path):
    """Somebody else's metrics.jsonl, and a policy that must stay."""
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "model.safetensors").write_text("kept")
    open_dir(tmp_path)
    assert (tmp_path / "policy" / "model.safetensors").read_text() == "kept"


def test_all_machines_must_see_the_directory(tmp_path):
    """A rank whose folder of that name is another one does not find rank 0's lock."""

    class Elsewhere(Ranks):
        rank, world = 1, 2

        def __init__(self):
            pass

        def gather(self, part):
            return [{"holder": "17 on node-0\n", "found": None}, part]

    with pytest.raises(InputError, match="is not the same folder on all machines"):
        RunDir(Config(out=str(tmp_path)), Elsewhere(), [])


# ---------------------------------------------------------------------------- whole runs, disturbed


def again_and_again(out: Path, *words: str) -> Path:
    for _ in range(40):
        try:
            return run(out, *words)
        except Killed:
            pass
    raise AssertionError("killed again and again")


def kill_at_the_end_of_phases(monkeypatch, killed: list) -> None:
    """Every phase dies once, its work done but not yet recorded."""
    phase = RunDir.phase

    def dying(self, name, work, *args, reads=None):
        def work_and_die(*rest):
            work(*rest)
            if name not in killed:
                killed.append(name)
                raise Killed

        return phase(self, name, work_and_die, *args, reads=reads)

    monkeypatch.setattr(RunDir, "phase", dying)


def kill_in_the_middle_of_phases(monkeypatch, killed: list) -> None:
    """Every phase that logs dies once, after its first line."""
    log = RunDir.log

    def dying(self, phase, iteration, step, **figures):
        log(self, phase, iteration, step, **figures)
        if (phase, iteration, figures.get("name")) not in killed:
            killed.append((phase, iteration, figures.get("name")))
            raise Killed

    monkeypatch.setattr(RunDir, "log", dying)


def kill_in_the_second_update(monkeypatch, killed: list) -> None:
    """Every phase that trains dies once, with a checkpoint behind it."""
    log = RunDir.log

    def dying(self, phase, iteration, step, **figures):
        log(self, phase, iteration, step, **figures)
        if step == 1 and (phase, iteration) not in killed:
            killed.append((phase, iteration))
            raise Killed

    monkeypatch.setattr(RunDir, "log", dying)


SAVING = ["--method", "stepagent-inverse", "--save-minutes", "0", "--d-batch", "8"]


@pytest.mark.parametrize(
    "kill, words, times",
    [
        (kill_in_the_second_update, SAVING, 5),
        (kill_in_the_second_update, [*SAVING, "--d-scores", "held-out"], 7),
        (kill_at_the_end_of_phases, ["--method", "stepagent-inverse"], 12),
        (kill_in_the_middle_of_phases, ["--method", "stepagent-implicit"], 9),
        (kill_at_the_end_of_phases, ["--method", "stepagent-implicit", "--lora-rank", "3"], 10),
    ],
)
def test_a_killed_run_resumed_is_an_uninterrupted_one_to_the_bit(
    tmp_path, monkeypatch, model, kill, words, times
):
    whole, killed = run(tmp_path / "whole", "--model", model, *words), []
    kill(monkeypatch, killed)
    parts = again_and_again(tmp_path / "parts", "--model", model, *words)
    assert len(killed) == times and equal(whole, parts)
    assert not same_bits(weights(whole / "policy"), weights(whole / "sft" / "policy"))
    files = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    found = sorted(str(path.relative_to(parts)) for path in parts.rglob("*") if path.is_file())
    assert files == found and "report.md" in files
    for name in files:
        if not name.endswith(("metrics.jsonl", "state.json", "config.json", "lock")):
            assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_a_finished_run_does_nothing_more(tmp_path, monkeypatch, model):
    import stepagent

    out = run(tmp_path / "x", "--method", "sft", "--model", model)
    before = metrics(out)
    for name in ("train", "play", "imitate", "evaluate"):
        monkeypatch.setattr(stepagent, name, None)
    run(out, "--method", "sft", "--model", model)
    assert metrics(out) == before


def test_task_ids_name_no_files(tmp_path, model):
    env = envs.make_env("household", **envs.env_options(WORLD))
    shown = [env.expert(task) for task in envs.some(env.splits["train"], 6)]
    for number, trajectory in enumerate(shown):
        trajectory.task_id = f"../../../escape-{number}"
    envs.save_trajectories(tmp_path / "in.jsonl", shown)
    words = [*QUIET, "--iterations", "1", "--model", model, "--expert", str(tmp_path / "in.jsonl")]
    run(tmp_path / "deep" / "er" / "x", *words)
    assert not list(tmp_path.parent.rglob("*escape*"))
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "deep"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["er"]


# ------------------------------------------------------------------------ the program, as a process


def drop_root() -> None:
    if os.geteuid() == 0:
        os.setuid(65534)


@pytest.mark.parametrize(
    "out, says", [("no_permission/x", "Permission denied"), ("a_file/x", "Not a directory")]
)
def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, out, says):
    (tmp_path / "no_permission").mkdir(mode=0o555)
    (tmp_path / "a_file").write_text("")
    (tmp_path / "log").touch(0o666)
    before = drop_root if out.startswith("no_permission") else None
    runs = [({}, ["--out", str(tmp_path / out)])]
    assert finish(start(1, tmp_path / "log", commands, runs, before)) == [1]
    [line] = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("error: ") and says in line


def small_files() -> None:
    """The kernel refuses files above 20 kB, as a full disk would refuse their tail."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_disk_that_takes_no_more_is_one_line_and_the_run_goes_on_later(tmp_path, model):
    words = [*QUIET, "--method", "sft", "--model", model]
    whole = run(tmp_path / "whole", *words)
    runs = [({}, words_of(tmp_path / "x", words))]
    assert finish(start(1, tmp_path / "log", commands, runs, small_files)) == [1]
    said = (tmp_path / "log").read_text()
    assert "error: " in said and "the same command continues" in said and "Traceback" not in said
    assert equal(whole, run(tmp_path / "x", *words))


def test_other_code_ends_the_program_with_one_line_and_an_exit_code(tmp_path, model):
    """The trap: a loss is edited, the command repeated."""
    words = [*QUIET, "--method", "sft", "--model", model]
    out = run(tmp_path / "x", *words)
    made_by = read_json(out / "config.json")
    [name] = [name for name in made_by["code"] if name.endswith("losses.py")]
    made_by["code"][name] = "0" * 64
    (out / "config.json").write_text(json.dumps(made_by))
    processes = start(1, tmp_path / "log", commands, [({}, words_of(out, words))])
    assert finish(processes) == [1]
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: ") and "losses.py" in last and "--restart" in last
    run(out, *words, "--restart", "true")
