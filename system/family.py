"""Switches a model to tree attention, if that is exact for its family.

No list of families decides. The loaded model is asked: a made-up trunk with two leaves is scored,
practised and played by tree.py, and must get the log-probs that the model's own forward pass gives.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from system.errors import InputError
from tree import NAME, LeafCache, RowCache, TrunkAndLeaves, forward, head, scoring

# Nats between a log-prob by tree attention and by the model's own forward pass, in float32.
TOLERANCE = 1e-3


def use_tree_attention(model: PreTrainedModel) -> None:
    """Switches a causal LM to tree attention, for good: gradient checkpointing reads the setting
    again in the backward pass. InputError where its attention cannot be reproduced exactly.
    """
    usual = model.config._attn_implementation
    # A new model may have been made from the config of one that was switched.
    if usual == NAME and hasattr(model, "scoring"):
        return
    if model.device.type == "meta":
        # An outline has no weights to check.
        model.set_attn_implementation(NAME)
    else:
        try:
            check_family(model)
        except InputError:
            model.set_attn_implementation(usual)
            raise
    # Where torch prefers cuDNN's attention (2.11 on Hopper), each new length costs a plan of its
    # own, up to a second. Lengths are new in every pass here.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # A method of the model, so that sharded weights are gathered around trunk and head alike.
    model.scoring = MethodType(scoring, model)
    turn_dropout_off(model)


def turn_dropout_off(model) -> None:
    """References and old log-probs must be those that training would compute."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


# --------------------------------------------------------------------------------- the comparison


def check_family(model) -> None:
    """Switches to tree attention; InputError unless it gives the model's own log-probs.

    Soft-capped attention, sinks, state-space layers and masks that the tree lacks all show as a
    difference.
    """
    tree = TrunkAndLeaves()
    try:
        trunk, leaves = made_up(model.config.vocab_size)
        with in_float32(model):
            model.set_attn_implementation("eager")
            on_trunk = ordinary_logits(model, trunk, 0)
            on_leaves = []
            for branch, ids in leaves:
                on_leaves.append(ordinary_logits(model, trunk[:branch] + ids, branch))
            model.set_attn_implementation(NAME)
            scored = scored_logits(model, tree, trunk, leaves)
            if not tree.kept:
                raise InputError("its layers do not ask the tree")
            practised = practised_logits(model, tree, leaves)
            played = played_logits(model, trunk)
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"{unsupported(model)} fails under it ({reason})") from error
    check_lengths(model, tree)
    ours = torch.cat([scored, practised, played]).float().log_softmax(-1)
    ordinary = torch.cat([on_trunk, *on_leaves, *on_leaves, on_trunk]).float().log_softmax(-1)
    difference = (ours - ordinary).abs().max().item()
    # Written so that nan is refused, too.
    if not difference <= TOLERANCE:
        raise InputError(
            f"{unsupported(model)} differs from its own forward pass by {difference:.2g} nats "
            "(soft-capping, attention sinks, another mask, no attention at all, or positions that "
            "depend on the longest in the pass); use a model with plain softmax attention, such as "
            "Llama, Mistral, Qwen or Gemma 3"
        )


def made_up(vocabulary: int) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """A trunk of 12 random tokens; leaves of 4, (branch, ids), which branch off after 5 and 9."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (20,), generator=generator).tolist()
    return ids[:12], [(5, ids[12:16]), (9, ids[16:])]


@contextmanager
def in_float32(model):
    """Half-precision parameters are float32 inside, without autocast: what differs is wrong."""
    half = {}
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            half[parameter] = parameter.dtype
            parameter.data = parameter.data.float()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        model.train(was_training)
        for parameter, dtype in half.items():
            parameter.data = parameter.data.to(dtype)


def ordinary_logits(model, ids: list[int], start: int) -> Tensor:
    """Next-token logits [T, V] from token `start` on, by the model's own pass."""
    return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, start:]


def scored_logits(model, tree: TrunkAndLeaves, trunk: list[int], leaves: list) -> Tensor:
    """The same for trunk and leaves by one scoring pass, which `tree` keeps.

    Another trunk's token at the end of the context stands beside them: it must not matter.
    """
    tree.kept = {}
    tree.add_trunk(trunk)
    tree.add_leaves(leaves)
    tree.add_trunk(trunk[:1])
    tree.position[-1] = model.config.max_position_embeddings - 1
    return head(model, forward(model, *tree.tensors(model.device), tree)[0, :-1])


def practised_logits(model, tree: TrunkAndLeaves, leaves: list) -> Tensor:
    """The same for the leaves, decoded token by token from the trunk that `tree` has kept."""
    trunks = {}
    for layer, (keys, values) in tree.kept.items():
        trunks[layer] = [(keys[0, :, : tree.sizes[0]], values[0, :, : tree.sizes[0]])]
    prefix = torch.tensor([branch for branch, _ in leaves], device=model.device)
    tokens = torch.tensor([ids for _, ids in leaves], device=model.device)
    cache = LeafCache(trunks, torch.zeros_like(prefix), prefix)
    logits = []
    for ids in tokens.T:
        position = cache.prefix + cache.length
        logits.append(head(model, forward(model, ids[:, None], position[:, None], cache)[:, 0]))
        cache.advance()
    return torch.stack(logits, 1).flatten(0, 1)


def played_logits(model, trunk: list[int]) -> Tensor:
    """The same for the trunk, read as an episode is: a first turn, a second, one token."""
    cache = RowCache(1, model.device)
    logits = []
    for turn in (trunk[:7], trunk[7:-1], trunk[-1:]):
        ids = torch.tensor([turn], device=model.device)
        logits.append(head(model, forward(model, ids, cache.begin(len(turn)), cache)[0]))
        cache.lengths[0] += len(turn)
    return torch.cat(logits)


# ------------------------------------------------------------- what a few tokens cannot show


def check_lengths(model, tree: TrunkAndLeaves) -> None:
    """InputError for what shows on longer sequences only, up to the model's context.

    Dynamic rope is exact there: its frequencies change only in passes longer than the context.
    """
    config = model.config
    context = config.max_position_embeddings
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    told = {seen for _, seen in tree.masks}
    if window and "sliding_attention" in kinds and window not in told and window < context:
        raise InputError(
            f"{unsupported(model)} is not told of its sliding window of {window} tokens; use a "
            "model without one, or of another family"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if "longrope" in str(rope):
        raise InputError(
            f"{unsupported(model)} has longrope, under which a token depends on how long its "
            "neighbours in the pass are; use a model with another rope"
        )
    for limit in ("index_topk", "index_topk_blocks", "keep_window_size"):
        sparse = getattr(config, limit, None)
        if sparse and sparse < context:
            raise InputError(
                f"{unsupported(model)} is sparse ({limit} {sparse}); use a model with plain "
                "softmax attention"
            )


def unsupported(model) -> str:
    return f"model family {model.config.model_type!r}: attention over trunk and leaves"
