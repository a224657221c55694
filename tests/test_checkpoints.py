"""Checkpoints inside a phase: kills, signals, damage, and other numbers of ranks."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import (
    QUIET,
    Killed,
    assert_alike,
    commands,
    distance,
    equal,
    finish,
    metrics,
    run,
    start,
    until,
    weights,
    words_of,
)

from stepagent import Config
from system import checkpoints
from system.checkpoints import updates
from system.program import program
from system.ranks import Ranks
from system.run_dir import RunDir
from trajectory import InputError

UPDATES = 6


def learn(out: Path, seconds: float = 0.0, **options) -> torch.nn.Module:
    """A run of one phase: six updates of a small matrix, a checkpoint after each."""
    ranks = Ranks()
    here = RunDir(Config(out=str(out), **{"save_minutes": 0.0, **options}), ranks, [])
    torch.manual_seed(0)
    policy = torch.nn.Linear(3, 2)

    def phase():
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
        for step, batch in updates(here, policy, optimizer, list(range(UPDATES)), "sft"):
            # Each update is the work of one rank; the sum over ranks is the same for any number.
            if batch % ranks.world == ranks.rank:
                policy(torch.tensor([1.0, batch, 2.0])).pow(2).sum().backward()
            ranks.sum_gradients(policy)
            optimizer.step()
            optimizer.zero_grad()
            here.log("sft", 0, step, weight=policy.weight[0, 0].item())
            time.sleep(seconds)

    here.phase("sft", phase)
    ranks.finish()
    return policy


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters())
    return all(torch.equal(weight, other_weight) for weight, other_weight in pairs)


def kill_after_saving(monkeypatch, deaths: list, most: int) -> None:
    """Dies after a checkpoint, `most` times."""
    save = checkpoints.save

    def save_and_die(here, policy, optimizer, done):
        save(here, policy, optimizer, done)
        if len(deaths) < most:
            deaths.append(done)
            raise Killed

    monkeypatch.setattr(checkpoints, "save", save_and_die)


def test_a_run_killed_after_every_update_goes_on_from_there_to_the_bit(tmp_path, monkeypatch):
    whole, deaths = learn(tmp_path / "whole"), []
    kill_after_saving(monkeypatch, deaths, 100)
    for _ in range(UPDATES):
        with pytest.raises(Killed):
            learn(tmp_path / "x")
    assert same(whole, learn(tmp_path / "x")) and deaths == [1, 2, 3, 4, 5, 6]
    assert metrics(tmp_path / "x") == metrics(tmp_path / "whole")
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_a_checkpoint_is_of_one_configuration(tmp_path, monkeypatch):
    """Also inside the first phase, before anything was finished."""
    kill_after_saving(monkeypatch, [], 1)
    with pytest.raises(Killed):
        learn(tmp_path / "x")
    with pytest.raises(InputError, match=r"another configuration \(seed 0 -> 3\)"):
        learn(tmp_path / "x", seed=3)
    learn(tmp_path / "x", save_minutes=9.0, shard="false", micro_tokens=9, checkpointing="true")


def test_between_checkpoints_is_time(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoints, "save", lambda *args: saved.append(args[-1]))
    learn(tmp_path / "x", seconds=0.3, save_minutes=0.8 / 60)
    assert saved == [3, 6]
    learn(tmp_path / "y", save_minutes=15.0)
    assert saved == [3, 6]


# ----------------------------------------------------------------------------------------- damage


def flip_a_bit(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def tear(folder: Path) -> None:
    os.truncate(max(folder.glob("*.safetensors")), 100)


def lose_a_file(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def change_the_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 3', '"step": 2'))


def destroy_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe")


DAMAGE = [flip_a_bit, tear, lose_a_file, change_the_manifest, destroy_the_manifest]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path, monkeypatch, capfd, damage
):
    whole, deaths = learn(tmp_path / "whole"), []
    with monkeypatch.context() as patch:
        kill_after_saving(patch, deaths, 3)
        for _ in range(3):
            with pytest.raises(Killed):
                learn(tmp_path / "x")
    folder = tmp_path / "x" / "checkpoints"
    (folder / "00000004.tmp").mkdir()
    damage(folder / "00000003")
    capfd.readouterr()
    assert same(whole, learn(tmp_path / "x"))
    said = capfd.readouterr().out
    assert "00000003 is torn or corrupt; it is removed, the one before it is used" in said
    assert "sft: goes on after update 2 of 6" in said
    assert metrics(tmp_path / "x") == metrics(tmp_path / "whole")


def test_where_no_checkpoint_is_whole_the_phase_begins_again(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        kill_after_saving(patch, [], 1)
        with pytest.raises(Killed):
            learn(tmp_path / "x")
    tear(tmp_path / "x" / "checkpoints" / "00000001")
    assert same(learn(tmp_path / "whole"), learn(tmp_path / "x"))
    said = capfd.readouterr().out
    assert "00000001 is torn or corrupt; it is removed, the phase begins again" in said


def test_only_names_of_checkpoints_count(tmp_path, monkeypatch):
    """Eight characters, not all of them digits; and somebody's copy."""
    kill_after_saving(monkeypatch, [], 3)
    for _ in range(3):
        with pytest.raises(Killed):
            learn(tmp_path / "x")
        for name in ("mybackup", "00000001.bak", "notes.tmp"):
            (tmp_path / "x" / "checkpoints" / name).mkdir(exist_ok=True)
    learn(tmp_path / "x")
    names = sorted(path.name for path in (tmp_path / "x" / "checkpoints").iterdir())
    assert names == ["00000001.bak", "mybackup", "notes.tmp"]


def test_two_checkpoints_are_kept_and_a_cut_off_one_is_removed(tmp_path, monkeypatch):
    kill_after_saving(monkeypatch, [], 4)
    for _ in range(4):
        with pytest.raises(Killed):
            learn(tmp_path / "x")
        (tmp_path / "x" / "checkpoints" / "00000009.tmp").mkdir()
    names = sorted(path.name for path in (tmp_path / "x" / "checkpoints").iterdir())
    assert names == ["00000003", "00000004", "00000009.tmp"]


# ---------------------------------------------------------------------------------------- signals


def learn_slowly(out: str) -> None:
    program(lambda: learn(Path(out), seconds=0.5, save_minutes=15.0))


@pytest.mark.parametrize(
    "number, code, world",
    [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)],
)
def test_a_signal_saves_and_exits_cleanly(tmp_path, number, code, world):
    out = tmp_path / "x"
    processes = start(world, tmp_path / "log", learn_slowly, str(out))
    until(lambda: (out / "metrics.jsonl").exists() and metrics(out))
    sent = time.monotonic()
    for process in processes:
        os.kill(process.pid, number)
    assert finish(processes) == [code] * world and time.monotonic() - sent < 20
    said = (tmp_path / "log").read_text()
    assert said.count("stopped; what was finished is kept") == world and "Traceback" not in said
    assert list((out / "checkpoints").glob("0000000?"))
    assert same(learn(tmp_path / "whole"), learn(out))


def learn_for_a_minute(out: str) -> None:
    """Ten seconds an update: it would save and leave only at the end of one."""
    program(lambda: learn(Path(out), seconds=10, save_minutes=15.0))


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    """Not one within a second: torchrun passes a signal on, so each process gets it twice."""
    out = tmp_path / "x"
    [process] = start(1, tmp_path / "log", learn_for_a_minute, str(out))
    until(lambda: (out / "metrics.jsonl").exists() and metrics(out))
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.5)
    assert process.is_alive()
    time.sleep(1)
    sent = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert finish([process]) == [130] and time.monotonic() - sent < 4
    said = (tmp_path / "log").read_text()
    assert said.count("stopped; what was finished is kept") == 1 and "Traceback" not in said
    assert not (out / "checkpoints").exists()


def learn_and_stop(out: str) -> None:
    """SIGTERM reaches every rank in its third update."""
    log = RunDir.log

    def log_and_signal(self, phase, iteration, step, **figures):
        log(self, phase, iteration, step, **figures)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    RunDir.log = log_and_signal
    program(lambda: learn(Path(out), save_minutes=15.0))


@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_checkpoint_of_some_ranks_is_continued_by_one(tmp_path, first):
    out = tmp_path / "x"
    assert finish(start(first, tmp_path / "log", learn_and_stop, str(out))) == [143] * first
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000003"]
    assert same(learn(tmp_path / "whole"), learn(out))


# ------------------------------------------------------------------------- whole runs of a policy


@pytest.fixture(scope="module")
def words(model):
    return [*QUIET, "--iterations", "1", "--model", model]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """A run that nothing disturbed."""
    return run(tmp_path_factory.mktemp("whole") / "run", *words, "--save-minutes", "0")


def test_sft_and_reflection_killed_after_every_update_go_on(tmp_path, monkeypatch, words, whole):
    deaths = []
    kill_after_saving(monkeypatch, deaths, 100)
    count = len(metrics(whole, "sft")) + len(metrics(whole, "implicit"))
    for _ in range(count):
        with pytest.raises(Killed):
            run(tmp_path / "x", *words, "--save-minutes", "0")
    assert equal(whole, run(tmp_path / "x", *words, "--save-minutes", "0"))
    assert len(deaths) == count > 5


def stop_in_the_second_update() -> None:
    clip, calls = Ranks.clip, []

    def clip_and_signal(self, policy, most):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(self, policy, most)

    Ranks.clip = clip_and_signal


@pytest.mark.parametrize("shard", ["true", "false"])
def test_one_process_continues_what_two_ranks_have_begun(tmp_path, words, whole, shard):
    out = tmp_path / "x"
    runs = [({}, words_of(out, [*words, "--shard", shard]))]
    processes = start(2, tmp_path / "log", commands, runs, stop_in_the_second_update)
    assert finish(processes) == [143, 143], (tmp_path / "log").read_text()[-2000:]
    folder = out / "checkpoints" / "00000002"
    assert (folder / "manifest.json").exists() and len(list(folder.glob("*.safetensors"))) == 2
    run(out, *words, "--shard", shard)
    assert_alike(whole, out)
    moved = distance(weights(whole / "policy"), weights(whole / "sft" / "policy"))
    assert distance(weights(whole / "policy"), weights(out / "policy")) < 1e-3 * moved


def test_a_fused_optimizer_counts_on_the_device_of_its_weights():
    """As on CUDA; the usual one counts in the host's memory."""
    policy = torch.nn.Linear(3, 2, device="meta")
    for fused, device in ((True, "meta"), (False, "cpu")):
        optimizer = torch.optim.AdamW(policy.parameters())
        optimizer.defaults["fused"] = fused
        checkpoints.learnt_tensors(policy, optimizer)
        assert {state["step"].device.type for state in optimizer.state.values()} == {device}
