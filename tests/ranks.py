"""Miniature runs of stepagent.py, in this process or as ranks.

Ranks start in milliseconds: they are forked from a server that has imported everything once.
"""

import json
import math
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import conftest  # noqa: F401  (one thread, no network, the repository root on the path)
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import envs
import stepagent
from system.model import make_tiny

HERE = Path(__file__).resolve().parent
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["ranks"])

WORLD = "receptacles=5 distractors=2 max_steps=13"
# Six demonstrations, three updates of SFT, an evaluation on three tasks.
MINIATURE = ["--env-options", WORLD, "--experts", "6", "--sft-experts", "6"]
MINIATURE += ["--practice-experts", "6", "--sft-epochs", "1", "--sft-batch", "2"]
MINIATURE += ["--iterations", "2", "--practice", "2", "--batch", "8", "--dpo-nll", "0"]
MINIATURE += ["--max-new-tokens", "6", "--eval-each", "dev", "--eval-splits", "test"]
MINIATURE += ["--eval-tasks", "3"]
QUIET = ["--eval-each", "", "--eval-splits", ""]


def words_of(out: Path, words) -> list[str]:
    """A command line: options of MINIATURE that the method reads, then these words."""
    words = list(words)
    method = "stepagent-implicit"
    if "--method" in words:
        method = words[words.index("--method") + 1]
    only_some_read = set()
    for row in stepagent.METHODS.values():
        only_some_read |= set(row.reads.split())
    refused = only_some_read - set(stepagent.METHODS[method].reads.split())
    kept = []
    for name, value in zip(MINIATURE[::2], MINIATURE[1::2]):
        if name.removeprefix("--").replace("-", "_") not in refused:
            kept += [name, value]
    return ["--out", str(out), *kept, *words]


def run(out: Path, *words: str) -> Path:
    """A run in this process; -> its directory."""
    stepagent.main(stepagent.parse(words_of(out, words)))
    return out


def two_layers(folder: Path) -> None:
    """A policy that learns in milliseconds: two layers of width 32, words as tokens."""
    env = envs.make_env("household", **envs.env_options(WORLD))
    make_tiny([env.expert(task) for task in envs.some(env.splits["train"], 20)], folder, 0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        stepagent_preset="tiny",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class Killed(Exception):
    """A test ended a run at this point."""


def until(what: Callable, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


# ------------------------------------------------------------------------------- runs side by side


def metrics(out: Path, phase: str | None = None) -> list[dict]:
    """The log without times."""
    rows = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if phase in (None, row["phase"]):
            rows.append({key: row[key] for key in row if key not in ("time", "seconds")})
    return rows


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def distance(one: dict, other: dict) -> float:
    """Euclidean, over all weights."""
    return math.sqrt(sum(((one[name] - other[name]).double() ** 2).sum().item() for name in one))


def same_bits(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def equal(one: Path, other: Path) -> bool:
    """The same policy to the bit, and the same log."""
    same_weights = same_bits(weights(one / "policy"), weights(other / "policy"))
    return same_weights and metrics(one) == metrics(other)


def assert_alike(one: Path, other: Path) -> None:
    """The logs of two runs agree up to the order of additions."""
    for row, other_row in zip(metrics(one), metrics(other), strict=True):
        assert row.keys() == other_row.keys()
        for key, value in row.items():
            if not isinstance(value, (str, dict)):
                value = pytest.approx(value, rel=2e-3, abs=2e-4)
            assert other_row[key] == value, key


# ------------------------------------------------------------------------------------------- ranks


def start(world: int, log: Path, work: Callable, *args) -> list:
    """-> `world` processes that call work(*args), a function of a module. log: what they print."""
    os.environ["PYTHONPATH"] = f"{HERE}:{HERE.parent}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        about = (rank, world, port, str(log), work, args)
        processes.append(server.Process(target=_rank, args=about))
    for process in processes:
        process.start()
    return processes


def _rank(rank: int, world: int, port: int, log: str, work: Callable, args: tuple) -> None:
    sys.stdout.flush()
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if world > 1:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    work(*args)


def commands(runs: list, before: Callable | None = None) -> None:
    """What ranks do: stepagent.py's command line, once for each (environment variables, words).

    before: what each process calls first.
    """
    if len(runs) > 1:
        # The next run needs the process group.
        dist.destroy_process_group = lambda: None
    if before:
        before()
    for variables, words in runs:
        os.environ.update(variables)
        stepagent.command_line(words)


def finish(processes: list, seconds: float = 300) -> list[int]:
    """-> exit codes. What takes longer is killed."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
