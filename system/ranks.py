"""The ranks: one process a device, started by torchrun, or a single process without it.

Every rank holds the same data, takes its share of a batch and divides by the batch's global
counts. Gradients and figures are then summed, so any number of ranks makes the same update.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import timedelta
from operator import attrgetter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rollout import grouped
from trajectory import InputError

# Numbers in one message when gradients are summed: small messages would wait for each other.
MESSAGE = 2**25


class Ranks:
    """This process's device, its number and the number of ranks.

    If a rank dies, torchrun ends the job. If it lives but hangs, the job ends after two hours, the
    timeout of a collective: a rank with less to play waits in one for the others.
    """

    def __init__(self):
        self.device = torch.device("cpu")
        backend = "gloo"
        if torch.cuda.is_available():
            number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if number >= count:
                raise InputError(
                    f"rank {number} of this machine has no GPU, there are {count}; start torchrun "
                    f"with --nproc_per_node {count}"
                )
            self.device = torch.device("cuda", number)
            # Lengths are new in every pass: fixed blocks of memory would fall to pieces. It is
            # read when the first block is taken.
            if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
                os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
            torch.cuda.set_device(self.device)
            # Python objects travel over gloo.
            backend = "cpu:gloo,cuda:nccl"
        if "RANK" in os.environ and not dist.is_initialized():
            dist.init_process_group(backend, timeout=timedelta(hours=2))
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1

    def finish(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        self.gather({})

    def gather(self, part: dict) -> list[dict]:
        """Every rank's part, on every rank."""
        if self.world == 1:
            return [part]
        parts = [None] * self.world
        dist.all_gather_object(parts, part)
        return parts

    def sum_gradients(self, policy: nn.Module) -> None:
        """Over the ranks, in place; FSDP has done so."""
        if self.world == 1 or isinstance(policy, FSDPModule):
            return
        learnt = [p for p in policy.parameters() if p.requires_grad]
        for parameter in learnt:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for grads in grouped([p.grad for p in learnt], Tensor.numel, MESSAGE):
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads])):
                grad.copy_(summed.view_as(grad))

    def sum_figures(self, info: dict[str, float]) -> dict[str, float]:
        """Over the ranks."""
        total = defaultdict(float)
        for part in self.gather(info):
            for name, figure in part.items():
                total[name] += figure
        return total

    def clip(self, policy: nn.Module, most: float) -> Tensor:
        """Clips the norm of the whole gradient, wherever its pieces are; -> the norm before."""
        learnt = [p for p in policy.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in learnt])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(learnt, most, norm)
        return norm

    def shares(self, items: Iterable, size: Callable) -> list[list]:
        """Items for each rank, of about equal total size: the largest first, to who has least."""
        if self.world == 1:
            return [list(items)]
        shares = [[] for _ in range(self.world)]
        totals = [0] * self.world
        for item in sorted(items, key=size, reverse=True):
            least = totals.index(min(totals))
            shares[least].append(item)
            totals[least] += size(item)
        return shares

    def micro_batches(
        self, policy: nn.Module, batch: list, micro_tokens: int
    ) -> list[tuple[list, float]]:
        """This rank's passes over its share of a batch: [(items, weight)].

        A pass has at most micro_tokens (item.tokens each). Ranks gather sharded weights together,
        so a rank with fewer passes repeats the batch's smallest item with weight 0.
        """
        size = attrgetter("tokens")
        passes = [grouped(share, size, micro_tokens) for share in self.shares(batch, size)]
        weighted = [(items, 1.0) for items in passes[self.rank]]
        if isinstance(policy, FSDPModule):
            most = max(len(of_rank) for of_rank in passes)
            weighted += [([min(batch, key=size)], 0.0)] * (most - len(weighted))
        return weighted

    def autocast(self, dtype: str) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def memory(self) -> int:
        """Bytes of memory for this rank: its GPU's, or its share of the machine's."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # A container's limit may be lower.
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.exists() and limit.read_text().strip() != "max":
            machine = min(machine, int(limit.read_text()))
        return machine // int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def split(self) -> int:
        """How many ranks share sharded weights: those of a node."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        return local if local > 1 and self.world % local == 0 else self.world
