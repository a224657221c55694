"""Ranks: who does what, the same update from any number of them, and the end of a job."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import (
    assert_alike,
    commands,
    distance,
    finish,
    run,
    start,
    weights,
    words_of,
)

from system.program import program
from system.ranks import Ranks
from trajectory import InputError

ROOT = Path(__file__).resolve().parent.parent
SEVEN = ["--experts", "7", "--sft-experts", "7", "--practice-experts", "7", "--sft-batch", "3"]
METHODS = ("stepagent-implicit", "stepagent-inverse", "ppo")


@dataclass
class Item:
    name: str
    tokens: int


ITEMS = [Item(name, tokens) for name, tokens in zip("abcdefg", [5, 40, 9, 31, 7, 20, 20])]


def one_of(world: int, rank: int = 0) -> Ranks:
    ranks = Ranks()
    ranks.world, ranks.rank = world, rank
    return ranks


def test_shares_are_balanced_whole_and_the_same_everywhere():
    shares = one_of(3).shares(ITEMS, lambda item: item.tokens)
    assert sorted(item.name for share in shares for item in share) == list("abcdefg")
    assert [sum(item.tokens for item in share) for share in shares] == [47, 45, 40]
    assert one_of(3).shares([6], lambda item: 1) == [[6], [], []]


def test_a_batch_is_passed_once_by_all_ranks_together():
    plain = torch.nn.Linear(1, 1)
    passed = []
    for rank in range(3):
        for items, weight in one_of(3, rank).micro_batches(plain, ITEMS, 45):
            assert weight == 1 and sum(item.tokens for item in items) <= 45
            passed += [item.name for item in items]
    assert sorted(passed) == list("abcdefg")


def test_one_process_needs_no_torchrun():
    ranks = Ranks()
    assert (ranks.rank, ranks.world) == (0, 1)
    assert ranks.gather({"x": 1}) == [{"x": 1}]
    assert 2**30 < ranks.memory() < 2**50


# ------------------------------------------------------------------------------- the same update


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """The runs of one process, by method."""
    where = tmp_path_factory.mktemp("alone")
    runs = {}
    for method in (*METHODS, "sft+"):
        runs[method] = run(where / method, *SEVEN, *one_round(method), "--model", model)
    return runs


def one_round(method: str) -> list[str]:
    return ["--method", method, "--iterations", "1"]


def together(where: Path, world: int, cases: list, before=None) -> None:
    """cases: (name, environment variables, words), one after the other by the same ranks."""
    runs = [(variables, words_of(where / name, words)) for name, variables, words in cases]
    processes = start(world, where / "log", commands, runs, before)
    assert set(finish(processes, 600)) == {0}, (where / "log").read_text()[-3000:]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_updates_of_one_process(tmp_path, model, alone, world):
    """Plain and sharded: SFT, DPO, D and PPO on 7 trajectories, to 0.1% of what an update moved.

    An evaluation has 3 tasks and a late batch 1 trajectory, so some of 4 ranks have none. SFT+
    learns right after such an evaluation. `nodes`: two nodes of two ranks.
    """
    which = [(method, shard) for method in METHODS for shard in ("true", "false")]
    if world == 4:
        which = [("stepagent-inverse", "true"), ("ppo", "false"), ("sft+", "true")]
    cases = []
    for method, shard in which:
        words = [*SEVEN, *one_round(method), "--model", model, "--shard", shard]
        cases.append((f"{method} {shard}", {}, words))
    if world == 4:
        words = [*SEVEN, *one_round(METHODS[0]), "--model", model, "--shard", "true"]
        cases.append((f"{METHODS[0]} nodes", {"LOCAL_WORLD_SIZE": "2"}, words))
    together(tmp_path, world, cases)
    for name, _, _ in cases:
        assert_same_run(alone[name.split()[0]], tmp_path / name)


def assert_same_run(one: Path, many: Path) -> None:
    moved = distance(weights(one / "policy"), weights(one / "sft" / "policy"))
    assert moved > 1e-3
    assert distance(weights(one / "policy"), weights(many / "policy")) < 1e-3 * moved
    assert_alike(one, many)
    episodes = "eval/final_test.jsonl"
    assert (one / episodes).read_text() == (many / episodes).read_text()


def no_room_for_all_weights():
    """By arithmetic no device holds them all while it decodes; only rank 0 may read them."""
    from system import model, sharding

    arithmetic = sharding.training_bytes
    sharding.training_bytes = lambda *args: arithmetic(*args) | {"generate": 1e15}
    if os.environ["RANK"] != "0":
        model.read_policy = None


@pytest.mark.parametrize("world", [2, 4])
def test_layers_are_gathered_one_by_one_while_ranks_play(tmp_path, model, alone, world):
    """7 trajectories, 3 tasks: one of 4 ranks makes empty passes only. 4 ranks: two nodes."""
    cases = []
    for method in ("stepagent-implicit", "ppo"):
        words = [*SEVEN, *one_round(method), "--model", model, "--shard", "true"]
        cases.append((method, {"LOCAL_WORLD_SIZE": "2"}, words))
    together(tmp_path, world, cases, no_room_for_all_weights)
    for method, _, _ in cases:
        assert_same_run(alone[method], tmp_path / method)


def test_experts_are_made_once_for_all_ranks_and_starts(tmp_path, model):
    out = run(tmp_path / "x", "--model", model, "--method", "sft")
    before = (out / "experts.jsonl").stat()
    assert len((out / "experts.jsonl").read_text().splitlines()) == 6
    run(out, "--model", model, "--method", "sft")
    assert (out / "experts.jsonl").stat().st_mtime_ns == before.st_mtime_ns


# ------------------------------------------------------------------------------ the end of a job


def lose_rank_1() -> None:
    def work():
        ranks = Ranks()
        ranks.barrier()
        if ranks.rank == 1:
            raise InputError("rank 1 is out of order")
        ranks.barrier()

    program(work)


def test_the_others_end_when_a_rank_gives_up(tmp_path):
    """Without torchrun's help: its connections close."""
    assert finish(start(2, tmp_path / "log", lose_rank_1), 60) == [1, 1]
    said = (tmp_path / "log").read_text()
    assert "error: rank 1 is out of order" in said and "Traceback" not in said
    assert "error: another rank is gone" in said


DYING = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from system.program import program
from system.ranks import Ranks

def work():
    ranks = Ranks()
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    {others}

program(work)
"""


@pytest.mark.parametrize("others", ["ranks.barrier()", "time.sleep(300)"])
def test_with_torchrun_a_killed_rank_ends_the_job_and_the_cause_is_shown(tmp_path, others):
    """The real torchrun; takes about 8 seconds. The other rank waits for it, or is at work."""
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(ROOT), others=others))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    started = time.monotonic()
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", str(script)], capture_output=True, text=True
    )
    assert done.returncode != 0 and time.monotonic() - started < 60
    assert "rank      : 1" in done.stderr and "Signal 9 (SIGKILL) received" in done.stderr


# ------------------------------------------------------------------------------------------- GPUs


@pytest.fixture
def two_gpus(monkeypatch):
    """What a machine with two GPUs says; nothing is done on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "LOCAL_RANK"):
        # Whatever a test sets is gone afterwards.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_rank_takes_its_gpu_with_memory_that_grows(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks().device == torch.device("cuda", 1)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    del os.environ["PYTORCH_ALLOC_CONF"]
    # The user's own settings stand.
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    Ranks()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_more_ranks_than_gpus_are_refused(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="there are 2; start torchrun with --nproc_per_node 2"):
        Ranks()


def test_a_full_gpu_is_one_line_with_the_remedy():
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"

    def work():
        raise torch.OutOfMemoryError(said)

    with pytest.raises(SystemExit) as end:
        program(work)
    assert end.value.code.startswith("error: CUDA out of memory; lower --micro-tokens")
    assert "\n" not in end.value.code
