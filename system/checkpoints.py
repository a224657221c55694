"""Checkpoints inside a phase: a stopped or killed run continues after its last saved update.

checkpoints/<updates done> holds safetensors of each rank's part and a manifest with checksums. It
is written under another name, then renamed; two are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from system.files import named, remove, write_text
from system.program import PostponedSignal, Stopped
from system.ranks import Ranks
from system.run_dir import CHECKPOINT, RunDir


def updates(
    run: RunDir, policy: nn.Module, optimizer, batches: list, label: str
) -> Iterator[tuple[int, list]]:
    """(number, batch) of every update that is left to do.

    An earlier start's last whole checkpoint is loaded first. After each update there is another if
    --save-minutes have passed or a signal asks the run to stop.
    """
    first = resume(run, policy, optimizer, len(batches))
    saved_at = time.time()
    with PostponedSignal() as postponed:
        for step, batch in enumerate(run.bar(batches, label)):
            if step < first:
                continue
            yield step, batch
            is_due = time.time() - saved_at >= 60 * run.config.save_minutes
            told = run.ranks.gather({"due": is_due, "signal": postponed.number})
            number = max(part["signal"] for part in told)
            if told[0]["due"] or number:
                save(run, policy, optimizer, step + 1)
                saved_at = time.time()
            if number:
                raise Stopped(number)


def save(run: RunDir, policy: nn.Module, optimizer, done: int) -> None:
    target = run.path(f"checkpoints/{done:08d}")
    beside = target.with_suffix(".tmp")
    if run.ranks.rank == 0:
        remove(beside)
        beside.mkdir(parents=True)
    run.ranks.barrier()
    writer = dcp.HuggingFaceStorageWriter(str(beside), save_distributed=True)
    # Or CUDA copies everything to memory that stays pinned.
    writer.per_thread_copy_ahead = 0
    with plain_errors():
        dcp.save(learnt_tensors(policy, optimizer), storage_writer=writer)
    run.ranks.barrier()
    sums = checksums(run.ranks, beside, [path.name for path in beside.iterdir()])
    if run.ranks.rank == 0:
        about = {"phase": run.current, "step": done, "files": sums, "log": run.phase_log()}
        manifest = json.dumps(about)
        write_text(beside / "manifest.json", f"{sha256(manifest)}\n{manifest}")
        remove(target)
        os.replace(beside, target)
        for old in named(target.parent, CHECKPOINT)[:-2]:
            remove(old)
    run.ranks.barrier()


def resume(run: RunDir, policy: nn.Module, optimizer, most: int) -> int:
    """Loads the phase's last whole checkpoint; -> the number of updates done.

    A damaged one is named and removed, and the one before it is used. Other machines may see rank
    0's files late, so what rank 0 finds counts.
    """
    folder = run.path("checkpoints")
    if run.ranks.rank == 0:
        for cut_off in named(folder, rf"{CHECKPOINT}\.tmp"):
            remove(cut_off)
    names = [path.name for path in named(folder, CHECKPOINT)]
    names = run.ranks.gather({"names": names})[0]["names"]
    while names:
        folder = run.path(f"checkpoints/{names.pop()}")
        manifest = run.ranks.gather({"found": read_manifest(folder)})[0]["found"]
        # An earlier phase's was left by a kill at the end of that phase.
        if manifest is None or manifest["phase"] == run.current:
            files = manifest["files"] if manifest else None
            if files and checksums(run.ranks, folder, list(files)) == files:
                tensors = learnt_tensors(policy, optimizer)
                with plain_errors():
                    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
                for state in optimizer.state.values():
                    state["step"].fill_(manifest["step"])
                run.restore_log(manifest["log"])
                run.say(f"{run.current}: goes on after update {manifest['step']} of {most}")
                return manifest["step"]
            instead = "the one before it is used" if names else "the phase begins again"
            run.say(f"warning: checkpoint {folder} is torn or corrupt; it is removed, {instead}")
        if run.ranks.rank == 0:
            remove(folder)
    return 0


def learnt_tensors(policy: nn.Module, optimizer) -> dict[str, Tensor]:
    """All that updates change, by name: trainable weights and AdamW's moments.

    Before the first update the moments are made here.
    """
    tensors = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            if not state:
                # A fused AdamW counts on the device.
                device = parameter.device if optimizer.defaults["fused"] else "cpu"
                state["step"] = torch.zeros((), device=device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            tensors[name] = parameter.detach()
            tensors[f"{name}.exp_avg"] = state["exp_avg"]
            tensors[f"{name}.exp_avg_sq"] = state["exp_avg_sq"]
    return tensors


def checksums(ranks: Ranks, folder: Path, names: list[str]) -> dict[str, str]:
    """sha256 of each file that is there; the ranks share the reading."""
    sums = {}
    for name in sorted(names)[ranks.rank :: ranks.world]:
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
    for part in ranks.gather(sums):
        sums = sums | part
    return sums


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> dict | None:
    """None if it is torn or corrupt."""
    try:
        stored, text = (folder / "manifest.json").read_text(encoding="utf-8").split("\n", 1)
        return json.loads(text) if stored == sha256(text) else None
    except (OSError, ValueError):
        return None


@contextmanager
def plain_errors():
    """torch.distributed.checkpoint warns that one process is no group, and wraps disk errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except dcp.api.CheckpointException as error:
        reasons = {str(reason).splitlines()[0] for reason, _ in error.failures.values()}
        raise OSError("checkpoint: " + "; ".join(sorted(reasons))) from None
