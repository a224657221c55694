"""The run directory: one run at a time, its phases, its log, and forks that change the code."""

import errno
import fcntl
import json
import os
import resource
import shutil
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
from safetensors import SafetensorError

import envs
import system.run_dir
from stepagent import Config
from system.files import read_tensors
from system.program import KEPT, program
from system.ranks import Ranks
from system.run_dir import MARK, RunDir
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
    written += " iter_12/w checkpoints/00000001/w agreement/w"
    others = "notes.txt plots/w iterations/w iter_1.bak/w iter_x/w experts_mine.jsonl my_report.md"
    for name in [*written.split(), *others.split()]:
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_text("")
    here = open_dir(out, source(tmp_path / "src", losses="2"), seed=5, restart=True)
    assert not here.has_done("first") and metrics(out) == []
    left = {path.name for path in out.iterdir()}
    kept = {name.removesuffix("/w") for name in others.split()}
    assert left == kept | {MARK, "state.json", "config.json", "metrics.jsonl"}
    assert read_json(out / "config.json")["config"]["seed"] == 5
    assert "begins again" in capsys.readouterr().out
    here.phase("first", nothing)
    # Without the option it goes on.
    assert open_dir(out, source(tmp_path / "src", losses="2"), seed=5).has_done("first")


def test_names_that_only_look_like_the_runs_are_left_alone(tmp_path):
    here = begun(tmp_path / "x")
    for name in ("iter_1", "iter_2", "iter_3", "iter_1.bak", "iter_x", "iter_4 copy"):
        (tmp_path / "x" / name / "policy").mkdir(parents=True)
    for name in ("00000001", "00000002.tmp", "00000001.bak", "mybackup"):
        (tmp_path / "x" / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "x" / "iter_1" / "discriminator_notes").mkdir()
    here.phase("second", nothing)
    left = {path.parent.name for path in (tmp_path / "x").glob("iter_*/policy")}
    assert left == {"iter_2", "iter_3", "iter_1.bak", "iter_x", "iter_4 copy"}
    kept = {path.name for path in (tmp_path / "x" / "checkpoints").iterdir()}
    assert kept == {"00000001.bak", "mybackup"}
    assert (tmp_path / "x" / "iter_1" / "discriminator_notes").exists()
    # They are no checkpoints to go on from, either.
    (tmp_path / "x" / "state.json").write_text('{"done": [], "policy": "", "log_bytes": 0}')
    assert not open_dir(tmp_path / "x", seed=3).has_done("first")


def test_of_a_link_the_link_alone_is_removed(tmp_path):
    (tmp_path / "elsewhere" / "w").mkdir(parents=True)
    begun(tmp_path / "x")
    for name in ("policy", "checkpoints", "iter_1"):
        (tmp_path / "x" / name).symlink_to(tmp_path / "elsewhere")
    open_dir(tmp_path / "x", restart=True)
    assert (tmp_path / "elsewhere" / "w").exists() and not (tmp_path / "x" / "policy").exists()


# ----------------------------------------------------------------------------- whose files are here


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", '{"model_type": "llama"}'),
        ("config.json", '{"config": {}, "code": {}}'),
        ("policy/model.safetensors", "weights"),
        ("base/notes", "mine"),
        ("metrics.jsonl", "{}\n"),
        ("report.md", "mine"),
        ("state.json", '{"done": ["sft"], "policy": "", "log_bytes": 0}'),
        ("lock", "mine"),
        (".hidden", ""),
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_with_files_that_is_no_run_is_refused_as_it_is(tmp_path, name, text, restart):
    out = tmp_path / "x"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text(text)
    with pytest.raises(InputError, match="x has files, but is no run directory .*give a new or an"):
        open_dir(out, restart=restart)
    assert contents(out) == {name: text}


def test_a_new_or_empty_folder_is_marked_before_anything_else(tmp_path, monkeypatch):
    def dies(self, made_by):
        raise Killed

    for name in ("new/er", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(RunDir, "_open", dies)
            with pytest.raises(Killed):
                open_dir(tmp_path / name)
        assert list(contents(tmp_path / name)) == [MARK]
        begun(tmp_path / name)


@pytest.mark.parametrize("option", ["model", "init", "expert", "prompt_file", "match"])
@pytest.mark.parametrize("given", ["x", "x/experts.jsonl", "x/sft/policy", "."])
def test_a_run_that_could_touch_what_the_user_gave_is_refused(tmp_path, option, given):
    """Also where the folder is a run's: its files may be what is given."""
    out = tmp_path / "x"
    begun(out)
    (out / "experts.jsonl").write_text("given")
    (out / "sft/policy").mkdir(parents=True)
    before = contents(out)
    says = f"--out .*x is, holds or lies in --{option.replace('_', '-')} .*give another --out"
    with pytest.raises(InputError, match=says):
        open_dir(out, restart=True, **{option: str(tmp_path / given)})
    assert contents(out) == before


def test_a_link_to_what_the_user_gave_is_no_way_around(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "model")
    for out in ("x", "x/run"):
        with pytest.raises(InputError, match="is, holds or lies in --model"):
            open_dir(tmp_path / out, model=str(tmp_path / "model"))
    assert not list((tmp_path / "model").iterdir())


def test_the_id_of_a_model_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_dir(Path("tiny"), model="tiny")
    open_dir(Path("some"), model="some/model")
    # A folder of its name would be read instead of it.
    with pytest.raises(
        InputError, match="--out other/model is, holds or lies in --model other/mod"
    ):
        open_dir(Path("other/model"), model="other/model")
    assert not (tmp_path / "other").exists()


def test_a_run_inside_a_run_is_refused(tmp_path):
    begun(tmp_path / "x")
    for inside in ("policy", "notes/deep"):
        with pytest.raises(InputError, match=f"{inside} lies in the run .*x; give another --out"):
            open_dir(tmp_path / "x" / inside)
        assert not (tmp_path / "x" / inside).exists()


def lose(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("state.json", None, "state.json: cannot be read"),
        ("state.json", "", "state.json: broken JSON"),
        ("state.json", "[" * 100_000, "state.json: broken JSON"),
        ("state.json", "[]", "state.json: not a JSON object"),
        ("state.json", '{"done": []}', "state.json: 'policy' is missing or broken"),
        ("state.json", '{"done": 3, "policy": "", "log_bytes": 0}', "'done' is missing or broken"),
        ("state.json", b"\xff", r"state.json: not UTF-8 text \(byte 0\)"),
        ("config.json", None, "config.json: cannot be read"),
        ("config.json", '{"config": {', "config.json: broken JSON"),
        ("config.json", '{"code": {}}', "config.json: 'config' is missing or broken"),
        ("metrics.jsonl", None, "metrics.jsonl: lines of finished phases are missing"),
        ("metrics.jsonl", "", "metrics.jsonl: lines of finished phases are missing"),
        ("sft/policy", None, "policy: the policy is missing"),
    ],
)
def test_a_broken_run_directory_is_one_line_and_loses_nothing(tmp_path, name, text, says):
    out = tmp_path / "x"
    here = open_dir(out)

    def work():
        (out / "sft/policy").mkdir(parents=True)
        (out / "sft/policy/w").write_text("learnt")
        here.state["policy"] = "sft/policy"
        here.log("sft", 0, 0)

    here.phase("sft", work)
    lose(out / name)
    if text is not None:
        (out / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    remedy = "put it back, give another --out, or --restart to begin again"
    with pytest.raises(InputError, match=f"{says}.*{remedy}$") as error:
        open_dir(out)
    assert len(str(error.value).splitlines()) == 1
    assert name == "sft/policy" or (out / "sft/policy/w").read_text() == "learnt"
    assert not open_dir(out, restart=True).has_done("sft")


def test_a_broken_log_is_named_with_its_line(tmp_path):
    here = open_dir(tmp_path / "x")
    here.log("sft", 0, 0)
    (tmp_path / "x" / "metrics.jsonl").write_text('{"phase": "sft"}\n{"pha\n')
    with pytest.raises(InputError, match="metrics.jsonl, line 2: broken JSON"):
        here.finish()


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
    lock = tmp_path / "x" / MARK
    lock.parent.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, lock])
    until(lambda: lock.exists() and "here" in lock.read_text())
    message = f"x is in use by process {holder.pid} on here; wait for it, or give another --out"
    with pytest.raises(InputError, match=message):
        open_dir(tmp_path / "x")
    assert [path.name for path in (tmp_path / "x").iterdir()] == [MARK]
    holder.kill()
    holder.wait()
    open_dir(tmp_path / "x")


def test_a_run_holds_its_directory_until_it_ends(tmp_path):
    """A POSIX lock goes with the first handle on the file that its process closes."""
    here = begun(tmp_path / "x")
    here.log("sft", 0, 0)
    here.phase("second", nothing)
    assert is_locked(tmp_path / "x" / MARK)
    here.finish()
    assert is_locked(tmp_path / "x" / MARK)
    fcntl.lockf(here.lock, fcntl.LOCK_UN)
    assert not is_locked(tmp_path / "x" / MARK)


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
        if not name.endswith(("metrics.jsonl", "state.json", "config.json", MARK)):
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


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(errno.ENOSPC, "No space left"), f"No space left; put this right: {KEPT}"),
        (PermissionError(errno.EACCES, "Permission denied"), f"put this right: {KEPT}"),
        (SafetensorError("No space left"), f"No space left; put this right: {KEPT}"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "right, or begin again with --restart"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "or begin again with --restart"),
    ],
)
def test_only_what_a_repetition_can_mend_is_said_to_continue(monkeypatch, error, says):
    def work():
        raise error

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        program(work)
    assert stopped.value.code.endswith(says) and stopped.value.code.startswith("error: ")
    assert ("continues" in says) == ("continues" in stopped.value.code)


@pytest.mark.parametrize("content", [None, b"", b"torn"])
def test_tensors_that_are_missing_or_torn_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / "practice.safetensors").write_bytes(content)
    says = "practice.safetensors: cannot be read .*; put it back, or begin again with --restart$"
    with pytest.raises(InputError, match=says):
        read_tensors(tmp_path / "practice.safetensors")


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
