"""Where a run lives and who takes part: the run directory with its cursor, logs, checkpoints and atomic writes, and the ranks of torchrun.

Nothing here belongs to the method; stepagent.py is where Algorithm 1 is. How the policy lies on the ranks is in model.py.
"""
from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from rollout import InputError, empty_pass, grouped, kv_bytes

FREE = ("out", "save_minutes", "shard")              # options that another start of the same run may change


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; args[0] is its number."""


def stop(number: int, frame) -> None:
    """Handler of Ctrl-C and SIGTERM outside of updates."""
    _exit_anyway(number)
    raise Stopped(number)


def _exit_anyway(number: int) -> None:
    """Schedulers kill 30 s after their first signal."""
    last = threading.Timer(25, os._exit, (128 + number,))
    last.daemon = True
    last.start()


def program(work: Callable[[], None]) -> None:
    """Does the work; what goes wrong becomes one line and an exit code, 128 + its number for a signal."""
    kept = "what was finished is kept, the same command continues"
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        work()
    except InputError as error:
        sys.exit(f"error: {error}")
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: {error}; {kept}")
    except RuntimeError as error:
        gone = ("Connection closed", "Connection reset", "Broken pipe", "Socket closed", "NCCL", "remote process")
        if not dist.is_initialized() or not any(words in str(error) for words in gone):
            raise
        sys.exit(f"error: another rank is gone, its own message says why, or the connection to it ({str(error).splitlines()[0][:200]}); {kept}")
    except Stopped as asked:
        print(f"stopped; {kept}", file=sys.stderr)
        sys.exit(128 + asked.args[0])


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
        self.current, self.asked = "", 0                                           # phase, and the signal that came inside its updates
        self.heart = Heartbeat(self.rank, self.world) if self.world > 1 else None
        if self.heart:
            self.heart.start()
        if self.rank == 0:
            self._lock()
        self._open_directory()
        self.barrier()

    def _lock(self):
        """One run a directory. The system drops the lock with the process that holds it, however that ends; its children have no part."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path("lock"), "a+", encoding="utf-8")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            self.lock.seek(0)
            raise InputError(f"{self.out} is in use by process {self.lock.read().strip()}; wait for it, or give another --out") from None
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
        self.lock.flush()
        os.fsync(self.lock.fileno())

    def _owner(self) -> str:
        """What the lock file says. Rank 0 never opens it again: the system drops a process's lock with the first handle that it closes."""
        if self.rank == 0:
            self.lock.seek(0)
            return self.lock.read()
        return self.path("lock").read_text(encoding="utf-8") if self.path("lock").exists() else ""

    def _open_directory(self):
        wanted = dataclasses.asdict(self.config)
        told = self.gather({"owner": self._owner()})[0]["owner"]                   # rank 0 has the lock by now
        if self._owner() != told:
            raise InputError(f"{self.out} is not the same folder on all machines; give an --out on a file system that they share")
        if self.path("state.json").exists():
            self.state = json.loads(read_text(self.path("state.json")))
        self.state = self.gather({"state": self.state})[0]["state"]
        if self.state["done"] or self.path("checkpoints").exists():
            found = json.loads(read_text(self.path("config.json")))["config"]
            other = [f"{k} {found.get(k)!r} -> {v!r}" for k, v in wanted.items() if k not in FREE and found.get(k) != v]
            if other:
                raise InputError(f"{self.out} holds a run with another configuration ({', '.join(other)}); give another --out")
        self.barrier()
        if self.rank == 0:
            if not self.state["done"] and not self.path("checkpoints").exists():   # nothing to lose: an earlier start failed early
                shutil.rmtree(self.path("base"), ignore_errors=True)
                self.path("experts.jsonl").unlink(missing_ok=True)
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
        by what is drawn, and every phase makes its own optimizer, so the cursor and the last policy are all there is to restore; `updates` keeps
        more inside a phase that learns."""
        if name in self.state["done"]:
            return
        self.current = name
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
            shutil.rmtree(self.path("checkpoints"), ignore_errors=True)
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
                     "| evaluated | split | tasks | success | 95% interval | mean reward | secondary | turns | invalid |", "|---|---|---|---|---|---|---|---|---|"]
            for r in rows:
                if r["phase"] == "eval":
                    a, b = r["success_interval"]
                    lines.append(f"| {r['name']} | {r['split']} | {r['tasks']} | {r['success']:.1%} | {a:.1%} - {b:.1%} | {r['reward']:.3f} | "
                                 f"{', '.join(f'{name} {x:.3f}' for name, x in r['secondary'].items())} | {r['steps']:.1f} | {r['invalid']:.1%} |")
            lines += ["", "| iteration | match_text | match_action | pairs kept |", "|---|---|---|---|"]
            lines += [f"| {r['iteration']} | {r['match_text']:.1%} | {r['match_action']:.1%} | {r['pairs_kept']} |"
                      for r in rows if r["phase"] == "inspect"]
            write_text(self.path("report.md"), "\n".join(lines) + "\n")
            self.metrics.close()
        if self.heart:
            self.heart.end()
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

    def room(self, policy: nn.Module) -> int:
        """Tokens whose keys and values take a quarter of the memory."""
        return self.memory() // 4 // kv_bytes(policy, 2 if self.config.dtype == "bfloat16" else 4)

    def split(self) -> int:
        """Ranks that share sharded weights: those of a node."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        return local if local > 1 and self.world % local == 0 else self.world

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def bar(self, what, label: str, total: int | None = None):
        size = {"total": what} if isinstance(what, int) else {"iterable": self._living(what), "total": total or len(what)}
        return tqdm(**size, desc=label, disable=self.rank > 0, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 20)

    def _living(self, items: Iterable):
        for item in items:
            if self.heart:
                self.heart.passes += 1                                             # work goes on, though the policy makes no pass
            yield item

    def barrier(self):
        self.gather({})

    def gather(self, part: dict) -> list[dict]:
        """Every rank's part, on every rank."""
        if self.world == 1:
            return [part]
        parts, self.heart.waiting = [None] * self.world, True
        dist.all_gather_object(parts, part)
        self.heart.waiting = False
        return parts

    def collect(self, part: dict) -> list[dict]:
        """Every rank's part on rank 0, nothing elsewhere."""
        if self.world == 1:
            return [part]
        parts, self.heart.waiting = [None] * self.world if self.rank == 0 else None, True
        dist.gather_object(part, parts)
        self.heart.waiting = False
        return parts or []

    def shares(self, items, size: Callable) -> list[list]:
        """Items for each rank, of like total size: the largest first, each to the rank that has least. The same on every rank."""
        if self.world == 1:
            return [list(items)]
        parts, totals = [[] for _ in range(self.world)], [0] * self.world
        for item in sorted(items, key=size, reverse=True):
            least = totals.index(min(totals))
            parts[least].append(item)
            totals[least] += size(item)
        return parts

    def micro_batches(self, policy: nn.Module, batch: list, size: Callable) -> list[tuple[list, float]]:
        """This rank's share of a batch, as [(items of at most micro_tokens together, weight 1)]. The ranks gather sharded weights
        together, so there all make the same number of passes: one with less to do repeats the batch's smallest item with weight 0."""
        groups = [grouped(share, size, self.config.micro_tokens) for share in self.shares(batch, size)]
        mine = [(group, 1.0) for group in groups[self.rank]]
        if isinstance(policy, FSDPModule):
            mine += [([min(batch, key=size)], 0.0)] * (max(map(len, groups)) - len(mine))
        return mine

    def sum_gradients(self, model: nn.Module, info: dict[str, float]) -> dict[str, float]:
        """Adds up gradients and figures over ranks: both were divided by global counts, so the sum is the whole batch's. (FSDP has
        added up the gradients in the backward pass.)"""
        if self.world == 1:
            return info
        if not isinstance(model, FSDPModule):
            parameters = [p for p in model.parameters() if p.requires_grad]
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            for some in grouped([p.grad for p in parameters], torch.Tensor.numel, 2 ** 25):      # few large messages: small ones wait
                flat = torch.cat([grad.flatten() for grad in some])
                dist.all_reduce(flat)
                for grad, summed in zip(some, flat.split([grad.numel() for grad in some])):
                    grad.copy_(summed.view_as(grad))
        total = defaultdict(float)
        for part in self.gather(dict(info)):
            for key, x in part.items():
                total[key] += x
        return total

    def clip(self, model: nn.Module, most: float) -> float:
        """Clips the norm of the whole gradient, wherever its pieces lie; -> the norm before."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return norm.item()

    @contextmanager
    def gathered(self, policy: nn.Module):
        """Every rank may run the policy without the others until the end. Sharded weights are gathered once, in the compute type; where a
        device cannot hold them, embeddings and head are, and each layer in every pass: as gathering takes all ranks, those that have
        finished go on with empty passes until all have."""
        if not isinstance(policy, FSDPModule):
            yield
            return
        whole = policy.gathers_whole
        policy.set_reshard_after_forward(False, recurse=whole)
        for part in policy.modules() if whole else [policy]:
            if isinstance(part, FSDPModule):
                part.unshard()
        if whole:
            yield
        else:
            hook = policy.model.register_forward_pre_hook(lambda *_: self._working(1) and None)      # what a hook returns replaces the arguments
            yield
            hook.remove()
            while self._working(0):
                empty_pass(policy)
        policy.set_reshard_after_forward(True)
        policy.reset_iter_state()                                                  # and reshards: a rank that ran no pass must not differ

    def _working(self, mine: int) -> int:
        """How many ranks have work left. Waits until all have said so: what a GPU queues behind others' answers would time out."""
        self.heart.waiting, ranks = True, torch.tensor([mine], device=self.device)
        dist.all_reduce(ranks)
        ranks, self.heart.waiting = ranks.item(), False
        return ranks

    # ---- checkpoints inside a phase

    def updates(self, policy: nn.Module, optimizer, batches: list, label: str) -> Iterator[tuple[int, list]]:
        """(number, batch) of every update that is left to do. After each, if --save-minutes have passed or a signal asks to stop, policy,
        optimizer and the phase's lines of the log are saved; an earlier start's last whole checkpoint is taken up first."""
        first, self.saved = self._resume(policy, optimizer, len(batches)), time.time()
        usual = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step, batch in enumerate(self.bar(batches, label)):
                if step >= first:
                    yield step, batch
                    self._save_if_due(policy, optimizer, step + 1)
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame) -> None:
        """Ctrl-C or SIGTERM: the update ends with a checkpoint; asked again after a second, at once. (torchrun passes on what a scheduler
        sends to all processes, so that each gets the signal twice.)"""
        if not self.asked:
            self.asked, self.asked_at = number, time.monotonic()
            _exit_anyway(number)
        elif time.monotonic() - self.asked_at > 1:
            stop(number, frame)

    def _save_if_due(self, policy, optimizer, step: int) -> None:
        due = torch.tensor([time.time() - self.saved >= 60 * self.config.save_minutes and self.rank == 0, self.asked], device=self.device)
        if self.world > 1:
            dist.all_reduce(due, dist.ReduceOp.MAX)                                # all or none
        due, asked = due.tolist()
        if due or asked:
            self._save(policy, optimizer, step)
            self.saved = time.time()
        if asked:
            raise Stopped(asked)

    def _save(self, policy, optimizer, step: int) -> None:
        """checkpoints/<step>: safetensors of each rank's part, and a manifest with checksums. Written beside, moved into place; two are kept."""
        target = self.path(f"checkpoints/{step:08d}")
        beside = target.with_suffix(".tmp")
        if self.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        self.barrier()
        writer = dcp.HuggingFaceStorageWriter(str(beside), save_distributed=True)
        writer.per_thread_copy_ahead = 0                                           # else CUDA copies all of it to memory pinned for good
        tensors = _tensors(policy, optimizer)
        large = sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors.values()) > 2 ** 31
        with _quiet(), self.heart.silent() if self.heart and large else nullcontext():
            dcp.save(tensors, storage_writer=writer)
        self.barrier()
        sums = self._checksums(beside, sorted(p.name for p in beside.iterdir()))
        if self.rank == 0:
            self.metrics.flush()
            with open(self.path("metrics.jsonl"), encoding="utf-8") as log:
                log.seek(self.log_start)
                manifest = json.dumps({"phase": self.current, "step": step, "files": sums, "log": log.read()})
            write_text(beside / "manifest.json", hashlib.sha256(manifest.encode()).hexdigest() + "\n" + manifest)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(beside, target)
            for old in sorted(self.path("checkpoints").glob("????????"))[:-2]:
                shutil.rmtree(old)
        self.barrier()

    def _checksums(self, folder: Path, names: list[str]) -> dict[str, str]:
        """sha256 by file, the ranks share the reading; a file that is not there has none."""
        mine = {}
        for name in names[self.rank::self.world]:
            if (folder / name).is_file():
                with open(folder / name, "rb") as file:
                    mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
                    os.fsync(file.fileno())
        return {name: found for part in self.gather(mine) for name, found in part.items()}

    def _resume(self, policy, optimizer, most: int) -> int:
        """Takes up the last whole checkpoint of this phase; -> updates done. A damaged one is named and the one before it taken."""
        if self.rank == 0:
            self.metrics.flush()
            self.log_start = self.metrics.tell()
            for cut_off in self.path("checkpoints").glob("*.tmp"):
                shutil.rmtree(cut_off)
        names = sorted(p.name for p in self.path("checkpoints").glob("????????"))
        for name in reversed(self.gather({"names": names})[0]["names"]):           # rank 0's, as a network's folders may look older elsewhere
            folder = self.path(f"checkpoints/{name}")
            manifest = self.gather({"read": _manifest(folder)})[0]["read"]         # rank 0's reading
            if manifest and manifest["phase"] != self.current:
                continue                                                           # of a phase that was finished since
            if not manifest or self._checksums(folder, sorted(manifest["files"])) != manifest["files"]:
                if self.rank == 0:
                    tqdm.write(f"warning: checkpoint {folder} is torn or corrupt; it is removed, the one before it is used", file=sys.stderr)
                    shutil.rmtree(folder)
                continue
            tensors = _tensors(policy, optimizer)
            with _quiet():
                dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
            for p in optimizer.state:
                optimizer.state[p]["step"].fill_(manifest["step"])
            if self.rank == 0:
                self.metrics.write(manifest["log"])
                self.metrics.flush()
                tqdm.write(f"{self.current}: goes on after update {manifest['step']} of {most}", file=sys.stderr)
            return manifest["step"]
        return 0


def _tensors(policy: nn.Module, optimizer) -> dict[str, Tensor]:
    """All that updates change, by name: trainable weights and AdamW's moments (made here, where there was no update yet)."""
    tensors = {}
    for name, p in policy.named_parameters():
        if p.requires_grad:
            state = optimizer.state[p]
            if not state:
                state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            tensors |= {name: p.detach(), f"{name}.exp_avg": state["exp_avg"], f"{name}.exp_avg_sq": state["exp_avg_sq"]}
    return tensors


def _manifest(folder: Path) -> dict | None:
    """None: torn or corrupt."""
    try:
        sum_, text = (folder / "manifest.json").read_text(encoding="utf-8").split("\n", 1)
        return json.loads(text) if hashlib.sha256(text.encode()).hexdigest() == sum_ else None
    except (OSError, ValueError):
        return None


@contextmanager
def _quiet():
    """torch.distributed.checkpoint remarks on every call that one process is no group, and wraps what the disk said."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except dcp.api.CheckpointException as error:
        raise OSError("checkpoint: " + "; ".join(sorted({str(why).splitlines()[0] for why, _ in error.failures.values()}))) from None


class Heartbeat(threading.Thread):
    """Every rank counts in torchrun's store while it lives, and watches the rank after it; one that stops counting ends the job, with
    its name: left alone, the others would wait for it in their next collective for as long as that may take."""
    EVERY, DEAD, SILENT, STUCK = 4, 30, 600, 3600    # seconds; stuck: alive, but the policy ran no pass and no collective waits

    def __init__(self, rank: int, world: int):
        super().__init__(daemon=True)
        self.store = dist.PrefixStore(f"beats{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False))
        self.rank, self.other, self.passes, self.waiting, self.ended = rank, (rank + 1) % world, 0, False, False
        self.busy = threading.Lock()                                               # of the store's line about this rank
        self.store.set(str(rank), "0 0")

    def run(self):
        beats, seen, changed = 0, ["", ""], [time.monotonic()] * 2
        while not self.ended:
            beats += 1
            try:
                if self.busy.acquire(blocking=False):
                    self.store.set(str(self.rank), f"{beats} {'waits' if self.waiting else self.passes}")
                    self.busy.release()
                found = self.store.get(str(self.other)).decode().split()
            except RuntimeError:
                self._stop("torchrun, or the rank that holds its store, is gone")
            if found[0] == "ended":
                found = [str(beats), "waits"]
            changed = [time.monotonic() if new != old or new == "waits" else at for new, old, at in zip(found, seen, changed)]
            seen, silent = found, [time.monotonic() - at for at in changed]
            most = self.SILENT if found[0] == "silent" else self.DEAD
            if silent[0] > most:
                self._stop(f"rank {self.other} has given no sign of life for {most} s: its process died or was stopped, or its machine "
                           "is gone")
            if silent[1] > self.STUCK:
                self._stop(f"rank {self.other} lives, but has run no pass of the policy for {self.STUCK // 60} minutes")
            time.sleep(self.EVERY)

    def _stop(self, why: str):
        if not self.ended:
            print(f"error: {why}; what was finished is kept, the same command continues", file=sys.stderr, flush=True)
            os._exit(1)

    @contextmanager
    def silent(self):
        """For what keeps Python to itself: safetensors writes gigabytes so, and no thread can count meanwhile."""
        with self.busy:
            self.store.set(str(self.rank), "silent waits")
            yield

    def end(self):
        self.ended = True
        with self.busy:
            self.store.set(str(self.rank), "ended")


def read_text(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def write_text(path: Path, text: str) -> None:
    """Atomic: the file is whole, or what it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    move_into_place(beside, path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    save_file({name: x.contiguous() for name, x in tensors.items()}, beside)
    move_into_place(beside, path)


def move_into_place(beside: Path, target: Path) -> None:
    """A file, or a folder of files, once the disk has it all."""
    for path in beside.iterdir() if beside.is_dir() else [beside]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if beside.is_dir():
        shutil.rmtree(target, ignore_errors=True)
    os.replace(beside, target)


def _commit() -> str:
    done = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
