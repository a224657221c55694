"""stepagent.py as processes that start in milliseconds: forked from a server that has imported everything once."""
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import conftest  # noqa: F401  (one thread, no network, the repository root on the path)

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import envs
import stepagent as S
from model import make_tiny

HERE = Path(__file__).resolve().parent
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["ranks"])


def start(world: int, runs: list, log: Path, before=None) -> list:
    """-> `world` processes that take each of `runs` together: (environment variables, words of the command line). log: their standard
    error. before: a picklable function that each process calls first."""
    os.environ["PYTHONPATH"] = f"{HERE}:{HERE.parent}"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [server.Process(target=_rank, args=(rank, world, port, runs, str(log), before)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def _rank(rank: int, world: int, port: int, runs: list, log: str, before) -> None:
    sys.stdout.flush()
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if len(runs) > 1:
        dist.destroy_process_group = lambda: None                      # the next run needs it
    if before:
        before(rank)
    for variables, words in runs:
        os.environ |= variables
        S.command_line(words)


def finish(processes: list, seconds: float = 300) -> list[int]:
    """-> exit codes; those that take longer are killed."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def two_layers(folder: Path, environment: str) -> None:
    """A policy that learns in milliseconds: two layers of width 32, and the household's words for tokens."""
    env = envs.make_env("household", **envs.env_options(environment))
    make_tiny([env.expert(task) for task in envs.some(env.splits["train"], 20)], folder, 0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
