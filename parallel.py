"""Where a run lives and who takes part: the run directory with its cursor, logs and atomic writes, the ranks of torchrun, and the
folder that a policy is read from and saved to.

Nothing here belongs to the method; stepagent.py is where Algorithm 1 is.
"""
from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rollout import InputError, Trajectory, grouped, stable_seed, stop_ids, use_tree_attention


class Run:
    """The run directory with its cursor, and this process's place among the ranks of torchrun."""

    def __init__(self, config, iterations: int):
        self.config = config
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)                                     # gathering objects uses the current device
        if "RANK" in os.environ and not dist.is_initialized():                     # ranks with less to play wait for the others
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12), device_id=self.device if cuda else None)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.iterations = iterations
        self.out = Path(config.out)
        self.state = {"done": [], "policy": "", "log_bytes": 0}
        self._open_directory()
        self.barrier()

    def _open_directory(self):
        wanted = dataclasses.asdict(self.config)
        if self.path("state.json").exists():
            self.state = json.loads(read_text(self.path("state.json")))
            found = json.loads(read_text(self.path("config.json")))["config"]
            other = [f"{k} {found.get(k)!r} -> {v!r}" for k, v in wanted.items() if k != "out" and found.get(k) != v]
            if other:
                raise InputError(f"{self.out} holds a run with another configuration ({', '.join(other)}); give another --out")
        self.barrier()
        if self.rank == 0:
            if not self.state["done"]:                                             # nothing to lose: an earlier start failed early
                shutil.rmtree(self.path("base"), ignore_errors=True)
                write_text(self.path("config.json"), json.dumps({"config": wanted, "versions": {
                    "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__},
                    "commit": _commit(), "ranks": self.world}, indent=2))
            metrics = self.path("metrics.jsonl")
            metrics.touch()
            os.truncate(metrics, min(self.state["log_bytes"], metrics.stat().st_size))   # lines of the phase that was cut off
            self.metrics = open(metrics, "a", encoding="utf-8")

    def path(self, name: str) -> Path:
        return self.out / name

    def phase(self, name: str, work, *args) -> None:
        """Once per run directory: does the work unless the cursor says that an earlier start finished it. All randomness is seeded
        by what is drawn, and every phase makes its own optimizer, so the cursor and the last policy are all there is to restore."""
        if name in self.state["done"]:
            return
        work(*args)
        self.barrier()
        self.state["done"].append(name)
        if self.rank == 0:
            self.metrics.flush()
            os.fsync(self.metrics.fileno())
            self.state["log_bytes"] = self.metrics.tell()
            write_text(self.path("state.json"), json.dumps(self.state))
            old = sorted(self.out.glob("iter_*/policy"), key=lambda p: int(p.parent.name[5:]))[:-2]
            for folder in old:
                shutil.rmtree(folder)
        self.barrier()

    def log(self, phase: str, iteration: int, step: int, **figures) -> None:
        if self.rank == 0:
            self.metrics.write(json.dumps({"phase": phase, "iteration": iteration, "step": step, "time": time.time(), **figures}) + "\n")
            self.metrics.flush()
            if phase in ("inspect", "discriminate", "eval"):
                show = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items() if not isinstance(v, (dict, list))}
                tqdm.write(f"{phase} {iteration}: " + "  ".join(f"{k} {v}" for k, v in show.items()))

    def finish(self):
        """report.md: the final figures, and the path to them."""
        if self.rank == 0:
            rows = [json.loads(line) for line in read_text(self.path("metrics.jsonl")).splitlines()]
            lines = [f"# {self.config.method} on {self.config.env}, {self.config.model}, seed {self.config.seed}", "",
                     "| evaluated | split | tasks | success | 95% interval | mean reward | turns | invalid |", "|---|---|---|---|---|---|---|---|"]
            for r in rows:
                if r["phase"] == "eval":
                    a, b = r["success_interval"]
                    lines.append(f"| {r['name']} | {r['split']} | {r['tasks']} | {r['success']:.1%} | {a:.1%} - {b:.1%} | {r['reward']:.3f} "
                                 f"| {r['steps']:.1f} | {r['invalid']:.1%} |")
            lines += ["", "| iteration | match_text | match_action | pairs kept |", "|---|---|---|---|"]
            lines += [f"| {r['iteration']} | {r['match_text']:.1%} | {r['match_action']:.1%} | {r['pairs_kept']} |"
                      for r in rows if r["phase"] == "inspect"]
            write_text(self.path("report.md"), "\n".join(lines) + "\n")
            self.metrics.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    # ---- ranks

    def memory(self) -> int:
        """Bytes of memory that this rank may call its own: its GPU's, or its share of the machine's."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        limit = Path("/sys/fs/cgroup/memory.max")                                  # of a container
        found = limit.read_text().strip() if limit.exists() else "max"
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min(machine, int(found) if found != "max" else machine) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def bar(self, what, label: str, total: int | None = None):
        size = {"total": what} if isinstance(what, int) else {"iterable": what, "total": total}
        return tqdm(**size, desc=label, disable=self.rank > 0, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 20)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def gather(self, part: dict) -> list[dict]:
        """Every rank's part, on every rank."""
        if self.world == 1:
            return [part]
        parts = [None] * self.world
        dist.all_gather_object(parts, part)
        return parts

    def sum_gradients(self, model: nn.Module, info: dict[str, float]) -> dict[str, float]:
        """Adds up gradients and figures over ranks: both were divided by global counts, so the sum is the whole batch's."""
        if self.world == 1:
            return info
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for some in grouped([p.grad for p in model.parameters()], torch.Tensor.numel, 2 ** 25):    # few large messages: small ones wait
            flat = torch.cat([grad.flatten() for grad in some])
            dist.all_reduce(flat)
            for grad, summed in zip(some, flat.split([grad.numel() for grad in some])):
                grad.copy_(summed.view_as(grad))
        total = defaultdict(float)
        for part in self.gather(dict(info)):
            for key, x in part.items():
                total[key] += x
        return total


def read_text(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def write_text(path: Path, text: str) -> None:
    """Atomic: the file is whole, or what it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    save_file({name: x.contiguous() for name, x in tensors.items()}, beside)
    os.replace(beside, path)


def _commit() -> str:
    done = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


# ------------------------------------------------------------------------------------------------------------- the policy's folder

def load_policy(run: Run, experts: list[Trajectory]):
    """-> policy in float32 with tree attention, and its tokenizer; where a run continues, its last saved policy."""
    c = run.config
    if c.model == "tiny" and not run.path("base").exists() and run.rank == 0:
        make_tiny(experts, run.path("base.tmp"), c.seed)
        os.replace(run.path("base.tmp"), run.path("base"))
    run.barrier()
    folder = run.path(run.state["policy"]) if run.state["policy"] else c.init or base_folder(run)
    policy, tokenizer = read_policy(folder)
    use_tree_attention(policy)
    stop_ids(tokenizer)
    if c.checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy.to(run.device), tokenizer


def base_folder(run: Run) -> str | Path:
    """The model before any imitation."""
    return run.path("base") if run.config.model == "tiny" else run.config.model


def read_policy(folder: str | Path):
    try:
        return (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True),
                AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"model {folder}: cannot be loaded ({str(error).splitlines()[0][:200]}); give a Hugging Face id that this "
                         "machine can reach, or a local folder with config.json, safetensors and tokenizer files") from None


def save_policy(policy: nn.Module, tokenizer, target: Path) -> None:
    """An ordinary Hugging Face folder, written beside and moved into place."""
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    policy.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(beside, target)


def make_tiny(experts: list[Trajectory], folder: Path, seed: int) -> None:
    """A Llama of about 1M parameters with random weights, and a byte-level BPE tokenizer made from the expert text (in a small
    world every word becomes one token), as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = [x for t in experts for s in t.steps for x in (s.observation, s.action)]
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=1024, special_tokens=special, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>",
                                        additional_special_tokens=special[1:])
    tokenizer.chat_template = ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'assistant' %}<|end|>"
                               "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    torch.manual_seed(stable_seed(seed, "tiny"))
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        initializer_range=0.08,                      # 1 / sqrt(width): at the library's 0.02, made for wide models, copying forms late
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
