"""FSDP2: weights that are too large for one device lie in pieces on several.

training_bytes says by arithmetic what fits where and placement decides by it. shard and fill build
the policy; inside gathered() the ranks run it independently.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as register_forward

from rollout import score
from system.errors import InputError
from system.ranks import Ranks
from trajectory import Encoded
from tree import chunk_rows, empty_pass, kv_bytes


def layers_of(policy: nn.Module) -> nn.ModuleList:
    """The decoder layers, whatever the family calls them."""
    return next(part for part in policy.base_model.children() if isinstance(part, nn.ModuleList))


def activation_bytes(shape, width: int, checkpointing: bool) -> float:
    """Bytes that a training pass keeps of a token. shape: a model's config; width: of a number."""
    heads = getattr(shape, "num_attention_heads", None) or 1
    kv_heads = getattr(shape, "num_key_value_heads", None) or heads
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    mlp = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    numbers = 6 * mlp + 13 * shape.hidden_size + (4 * heads + 2 * kv_heads) * head_dim
    if checkpointing:
        # Every layer's input in float32, and the inside of one layer.
        return 4 * shape.hidden_size * shape.num_hidden_layers + width * numbers
    return width * numbers * shape.num_hidden_layers


def training_bytes(
    policy: nn.Module, config, split: int = 1, device: str = "cuda"
) -> dict[str, float]:
    """Bytes on one device, by arithmetic; the policy may be on the meta device.

    held: weights, gradients and Adam's moments. update: the peak of a training pass. generate: all
    weights ready to decode, without keys and values. least: the same, gathered layer by layer.
    split: how many ranks share the weights. device: CPUs read the head in smaller chunks. With
    --checkpointing auto activations are recomputed.
    """
    shape = policy.config
    width = compute_width(config)
    weights = sum(p.numel() for p in policy.parameters())
    learnt = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    copies = 0
    if config.lora_rank:
        frozen = width * (weights - learnt)
        held = frozen + 16 * learnt
        generate = least = frozen + 4 * learnt
    elif split > 1:
        layer = sum(p.numel() for p in layers_of(policy)[0].parameters())
        # Embeddings and head.
        rest = weights - layer * shape.num_hidden_layers
        held = 16 * weights / split
        # Gathered: embeddings and head, this layer and the next. Their gradients are float32.
        copies = (width + 4) * (rest + 2 * layer)
        generate = 4 * weights / split + width * weights
        # What is gathered is copied once.
        least = 4 * weights / split + width * max(2 * rest, rest + 2 * layer)
    else:
        held = 16 * weights
        copies = width * weights if width == 2 else 0
        generate = least = 4 * weights + copies
    recomputes = config.checkpointing != "false"
    activations = config.micro_tokens * activation_bytes(shape, width, recomputes)
    logits = 24 * max(2**23, chunk_rows(shape.vocab_size, device) * shape.vocab_size)
    update = held + copies + activations + logits
    return {"held": held, "update": update, "generate": generate, "least": least}


@dataclass
class Placement:
    # How many ranks share the weights, 1 where each has all: those of a node or, if it is too
    # small, all of them.
    pieces: int
    # A device can hold all weights while it decodes, in 0.7 of its memory.
    gathers_whole: bool
    # Activations are computed again in the backward pass.
    recomputes: bool = False


def placement(ranks: Ranks, policy: nn.Module, config) -> Placement:
    """Where the weights lie (--shard; auto: sharded if an update does not fit otherwise).

    With --checkpointing auto activations are kept where the memory holds them all. InputError if
    nothing fits by arithmetic.
    """
    # The smallest device decides for all ranks.
    memory = min(part["memory"] for part in ranks.gather({"memory": ranks.memory()}))
    device = ranks.device.type
    too_large = training_bytes(policy, config, 1, device)["update"] > 0.9 * memory
    wanted = config.shard == "true" or (config.shard == "auto" and too_large)
    sharded = wanted and ranks.world > 1 and not config.lora_rank
    pieces = ranks.split() if sharded else 1
    if sharded and training_bytes(policy, config, pieces)["held"] > memory:
        pieces = ranks.world
    need = training_bytes(policy, config, pieces)
    remedy = "take more devices"
    if ranks.world > 1 and not sharded and not config.lora_rank:
        remedy += " or --shard auto"
    if not config.lora_rank:
        remedy += ", or --lora-rank 16"
    weights = {"held": "weights, gradients and Adam's moments"}
    weights["least"] = "the weights that practice and evaluation read"
    for name, what in weights.items():
        if need[name] > memory:
            raise InputError(
                f"{config.model}: {what} need {need[name] / 1e9:.0f} GB a device, "
                f"each has {memory / 1e9:.0f}; {remedy}"
            )
    keeping = training_bytes(policy, replace(config, checkpointing="false"), pieces, device)
    recomputes = config.checkpointing == "true"
    if config.checkpointing == "auto":
        recomputes = keeping["update"] > 0.9 * memory
    return Placement(pieces, need["generate"] <= 0.7 * memory, recomputes)


def shard(ranks: Ranks, policy: nn.Module, placed: Placement, dtype: str) -> None:
    """Puts a policy of the meta device on the ranks, in float32 pieces without values.

    A layer is gathered in the compute type as it runs. Other nodes keep copies of the pieces.
    """
    sizes = (ranks.world // placed.pieces, placed.pieces)
    mesh = dist.init_device_mesh(ranks.device.type, sizes, mesh_dim_names=("copies", "pieces"))
    if placed.pieces == ranks.world:
        mesh = mesh["pieces"]
    compute = torch.bfloat16 if dtype == "bfloat16" else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for part in (*layers_of(policy), policy):
        fully_shard(part, mesh=mesh, mp_policy=precision)
        # Losses are divided by global counts, so gradients are summed; gloo can do no other.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    register_forward(policy, "scoring")
    policy.placed = placed
    policy.to_empty(device=ranks.device)
    policy.tie_weights()
    # A first pass makes the policy the root of its parts, before any of them is gathered alone.
    with torch.no_grad(), ranks.autocast(dtype):
        score(policy, [Encoded([0, 0], [(1, 2)])])
    # A root keeps what it has gathered, unless told otherwise.
    policy.set_reshard_after_forward(True)
    policy.reshard()


def fill(ranks: Ranks, policy: nn.Module, whole: nn.Module | None) -> None:
    """Sharded weights become those of `whole`, which is in rank 0's memory (None elsewhere).

    Rank 0 sends it weight by weight, and each rank keeps its piece.
    """
    weights, buffers = {}, {}
    if ranks.rank == 0:
        weights, buffers = whole.state_dict(), dict(whole.named_buffers())
        policy.generation_config = whole.generation_config
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, weights, options=options)
    # What no file holds, such as rotary frequencies.
    buffers = ranks.gather(buffers)[0]
    for name, buffer in policy.named_buffers():
        buffer.copy_(buffers[name])


def room(ranks: Ranks, policy: nn.Module, config) -> int:
    """Tokens whose keys and values take three quarters of what the weights leave of the memory."""
    memory = ranks.memory()
    need = training_bytes(policy, config, policy.placed.pieces)
    left = memory - need["generate" if policy.placed.gathers_whole else "least"]
    # Where weights take nearly all of it, something must be tried.
    return int(0.75 * max(left, memory / 16) // kv_bytes(policy, compute_width(config)))


def compute_width(config) -> int:
    """Bytes of a number in the compute type."""
    return 2 if config.dtype == "bfloat16" else 4


@contextmanager
def gathered(ranks: Ranks, policy: nn.Module):
    """Inside, every rank runs the policy without the others.

    Sharded weights are gathered once, in the compute type. If a device cannot hold all of them, it
    keeps embeddings and head and gathers each layer in every pass. Gathering takes all ranks, so
    those that have finished go on with empty passes until all have.
    """
    if not isinstance(policy, FSDPModule):
        yield
        return
    whole = policy.placed.gathers_whole
    policy.set_reshard_after_forward(False, recurse=whole)
    for part in policy.modules() if whole else [policy]:
        if isinstance(part, FSDPModule):
            part.unshard()
    with nullcontext() if whole else in_step(ranks, policy):
        yield
    policy.set_reshard_after_forward(True)
    forget_passes(policy)


@contextmanager
def in_step(ranks: Ranks, policy: nn.Module):
    """Every pass is one of all ranks: who has finished goes on with empty ones."""

    def tell_others(*_) -> None:
        any_working(ranks, True)

    hook = policy.base_model.register_forward_pre_hook(tell_others)
    yield
    hook.remove()
    while any_working(ranks, False):
        empty_pass(policy)


def any_working(ranks: Ranks, working: bool) -> bool:
    return any(part["working"] for part in ranks.gather({"working": working}))


def forget_passes(policy: nn.Module) -> None:
    """Reshards. FSDP prefetches by the order of past passes, which must be alike on all ranks."""
    if hasattr(policy, "reset_iter_state"):
        policy.reset_iter_state()
        return
    # torch before 2.13
    for part in policy.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
            part._get_fsdp_state()._fsdp_param_group._post_forward_indices.clear()
    policy._get_fsdp_state()._comm_ctx.post_forward_order.clear()
