"""Who sees whom: attention over a trunk and its leaves, for scoring, practice and episodes.

    trunk   prompt  o1  a1  o2  a2  o3  a3        expert actions a1, a2, a3 lie on the trunk
                      \\       \\       \\
    leaves            a1'     a2'     a3'         practice actions
                      a1"     a2"     a3"

A leaf branches off the trunk at its first token that differs from the expert's action. Its tokens
stand at the positions that continue the trunk there. They see the trunk before the branch and their
own leaf, nothing else: `sees` says it in five lines.

transformers lets us replace a model's attention by a function of our own. Ours asks the `tree` that
the model call was given: TrunkAndLeaves (a scoring pass), LeafCache (decoding practice) or RowCache
(decoding episodes). All are exact; tests compare them with one ordinary forward pass per state.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from losses import entropy, token_logps
from trajectory import InputError

NAME = "trunk_and_leaves"


def sees(
    position: Tensor,
    leaf: Tensor,
    branch: Tensor,
    query: Tensor,
    key: Tensor,
    window: int | None = None,
) -> Tensor:
    """Does the query token see the key token? Both are indices of tokens of one trajectory.

    position, leaf, branch: one number a token, [T]. leaf is -1 on the trunk. branch is where the
    token's leaf branches off the trunk (for tokens of the trunk: past its end).
    """
    same_leaf = leaf[query] == leaf[key]
    trunk_before_branch = (leaf[key] == -1) & (position[key] < branch[query])
    earlier = position[key] <= position[query]
    near = window is None or position[key] > position[query] - window
    return (same_leaf | trunk_before_branch) & earlier & near


# ------------------------------------------------------------------------ scoring: one packed row


class TrunkAndLeaves:
    """One row of tokens: [trunk, leaves of step 1, leaves of step 2, .., next trunk, ..].

    The row is cut into pieces, a trunk or all leaves of one step. Each piece takes one attention
    call: a trunk is causal over itself; leaves attend to [their trunk's prefix, themselves]. There
    is no T x T mask, unless a sliding window is shorter than the trunk.
    """

    def __init__(self):
        # One entry a token of the row.
        self.ids: list[int] = []
        self.position: list[int] = []
        self.leaf: list[int] = []
        self.branch: list[int] = []
        # One entry a piece: its number of tokens, its trunk's piece, the trunk tokens it sees.
        self.sizes: list[int] = []
        self.trunks: list[int] = []
        self.prefixes: list[int] = []
        # (piece, window) -> mask, which the layers share.
        self.masks: dict[tuple, Tensor] = {}
        # layer -> keys, values of the row. A dict here keeps them: that is what a prefill is for.
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = None

    def add_trunk(self, ids: list[int]) -> int:
        """Starts a trajectory; -> row index of its first token."""
        self.trunks.append(len(self.sizes))
        self.prefixes.append(0)
        self.sizes.append(0)
        return self._append(ids, 0, leaf=-1, branch=len(ids))

    def add_leaves(self, leaves: list[tuple[int, list[int]]]) -> list[int]:
        """The leaves of one step of the last trunk, [(branch, ids)]; -> their first row indices."""
        self.trunks.append(self.trunks[-1])
        self.prefixes.append(max(branch for branch, _ in leaves))
        self.sizes.append(0)
        starts = []
        for branch, ids in leaves:
            number = self.leaf[-1] + 1 if self.leaf[-1] >= 0 else 0
            starts.append(self._append(ids, branch, leaf=number, branch=branch))
        return starts

    def _append(self, ids: list[int], position: int, leaf: int, branch: int) -> int:
        start = len(self.ids)
        self.ids += ids
        self.position += range(position, position + len(ids))
        self.leaf += [leaf] * len(ids)
        self.branch += [branch] * len(ids)
        self.sizes[-1] += len(ids)
        return start

    def attend(self, layer, query, key, value, scaling, window):
        """[1, H, T, D] -> [1, H, T, D]: one call a piece."""
        if self.kept is not None:
            self.kept[layer] = (key, value)
        # split, not slices: the gradient of each slice would be a whole row of zeros.
        queries, keys, values = (part.split(self.sizes, 2) for part in (query, key, value))
        outputs = []
        for piece, (trunk, prefix) in enumerate(zip(self.trunks, self.prefixes)):
            own_keys, own_values = keys[piece], values[piece]
            if piece == trunk:
                is_plain = window is None or window >= self.sizes[piece]
                mask = None if is_plain else self.mask(piece, window, query.device)
            else:
                own_keys = torch.cat([keys[trunk][:, :, :prefix], own_keys], 2)
                own_values = torch.cat([values[trunk][:, :, :prefix], own_values], 2)
                mask = self.mask(piece, window, query.device)
            outputs.append(attention(queries[piece], own_keys, own_values, scaling, mask))
        return torch.cat(outputs, 2)

    def mask(self, piece: int, window: int | None, device) -> Tensor:
        """True where a token of the piece sees one of [its trunk's prefix, the piece]."""
        if (piece, window) not in self.masks:
            trunk_start = sum(self.sizes[: self.trunks[piece]])
            start = sum(self.sizes[:piece])
            own = torch.arange(start, start + self.sizes[piece], device=device)
            prefix = torch.arange(trunk_start, trunk_start + self.prefixes[piece], device=device)
            row = [torch.tensor(x, device=device) for x in (self.position, self.leaf, self.branch)]
            key = torch.cat([prefix, own])[None, :]
            self.masks[piece, window] = sees(*row, own[:, None], key, window)
        return self.masks[piece, window]


# ------------------------------------------------------------------- practice: decoding all leaves


class LeafCache:
    """Keys and values while practice is decoded: each trunk is stored once, for all its leaves.

    R rows are leaves, those of one trunk side by side; all have `length` tokens of their own. The
    N trunks are padded to the longest, [N, H_kv, L, D]. G query heads share a key head. The rows
    of a trunk take its seats 0, 1, .., W at most, so one product serves all rows of all trunks:

        query [R, H_kv, G, D] -> seated [N, H_kv, W * G, D] x keys [N, H_kv, L, D] -> back to rows
    """

    def __init__(
        self, trunks: dict[int, list[tuple[Tensor, Tensor]]], owner: Tensor, prefix: Tensor
    ):
        """trunks: layer -> keys and values of each trunk, [H_kv, L_i, D]; emptied, to free memory.

        owner [R]: the trunk of each row. prefix [R]: the trunk tokens that the row sees.
        """
        self.trunks = {}
        for layer in list(trunks):
            keys, values = zip(*trunks.pop(layer))
            self.trunks[layer] = (pad_trunks(keys), pad_trunks(values))
        self.owner = owner
        self.prefix = prefix
        self.length = 0
        # layer -> keys, values of the leaves, [R, H_kv, capacity, D].
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self._take_seats()

    def _take_seats(self):
        """Numbers the trunks that still have rows, and the rows of each trunk."""
        found = torch.unique_consecutive(self.owner, return_inverse=True, return_counts=True)
        alive, self.owner, counts = found
        if len(alive) < len(next(iter(self.trunks.values()))[0]):
            for layer, (keys, values) in self.trunks.items():
                self.trunks[layer] = (keys[alive], values[alive])
        first_row = counts.cumsum(0) - counts
        self.seat = torch.arange(len(self.owner), device=counts.device) - first_row[self.owner]
        # An empty seat sees nothing; nobody reads its output.
        self.limit = self.prefix.new_full((len(alive), int(counts.max())), -1)
        self.limit[self.owner, self.seat] = self.prefix
        self.reach = int(self.limit.max())
        # window -> mask, which the layers share.
        self.masks: dict[int | None, Tensor] = {}

    def _mask(self, window: int | None, group: int, like: Tensor) -> Tensor:
        """Added to scores: what no query of a seat may see. [N, 1, W * G, L], layers share it."""
        if window not in self.masks:
            trunk_position = torch.arange(self.reach, device=like.device)
            hidden = trunk_position >= self.limit[..., None]
            if window:
                hidden |= trunk_position <= self.limit[..., None] + self.length - window
            hidden = hidden.repeat_interleave(group, 1)[:, None]
            # Finite, as an empty seat sees nothing at all.
            self.masks[window] = like.new_zeros(hidden.shape).masked_fill_(hidden, -1e30)
        return self.masks[window]

    def advance(self):
        """One more token of each leaf is read. A window moves with it."""
        self.length += 1
        self.masks = {window: mask for window, mask in self.masks.items() if window is None}

    def _append(self, layer, key, value):
        """One more token of each leaf; the buffers grow by doubling."""
        if layer not in self.own:
            empty = key.new_empty(*key.shape[:2], 0, key.shape[3])
            self.own[layer] = (empty, empty)
        if self.own[layer][0].shape[2] == self.length:
            room = max(32, self.length)
            self.own[layer] = tuple(F.pad(part, (0, 0, 0, room)) for part in self.own[layer])
        for buffer, new in zip(self.own[layer], (key, value)):
            buffer[:, :, self.length] = new[:, :, 0]

    def attend(self, layer, query, key, value, scaling, window):
        """[R, H, 1, D] -> [R, H, 1, D]: over the trunk's prefix and over the leaf, then joined."""
        self._append(layer, key, value)
        rows, heads, _, width = query.shape
        kv_heads = key.shape[1]
        group = heads // kv_heads
        query = query.view(rows, kv_heads, group, width)

        end = self.length + 1
        start = max(0, end - window) if window else 0
        leaf_keys, leaf_values = (part[:, :, start:end] for part in self.own[layer])
        leaf_out, leaf_norm = attention_and_norm(query, leaf_keys, leaf_values, scaling)

        trunk_keys, trunk_values = (part[:, :, : self.reach] for part in self.trunks[layer])
        trunks, seats = self.limit.shape
        seated = query.new_zeros(trunks, seats, kv_heads, group, width)
        seated[self.owner, self.seat] = query
        seated = seated.transpose(1, 2).reshape(trunks, kv_heads, seats * group, width)
        mask = self._mask(window, group, query)
        out, norm = attention_and_norm(seated, trunk_keys, trunk_values, scaling, mask)
        out = out.unflatten(2, (seats, group)).transpose(1, 2)[self.owner, self.seat]
        norm = norm.unflatten(2, (seats, group)).transpose(1, 2)[self.owner, self.seat]

        # The softmax over both is the two softmaxes, weighed by their normalisers:
        # e^norm / (e^norm + e^leaf_norm) is the trunk's share.
        trunk_share = torch.sigmoid(norm - leaf_norm)[..., None].to(value.dtype)
        out = trunk_share * out + (1 - trunk_share) * leaf_out
        return out.reshape(rows, heads, 1, width)

    def keep(self, rows: Tensor):
        """Only these rows go on."""
        self.owner = self.owner[rows]
        self.prefix = self.prefix[rows]
        for layer, (keys, values) in self.own.items():
            self.own[layer] = (keys[rows], values[rows])
        self._take_seats()


def pad_trunks(parts: tuple[Tensor, ...]) -> Tensor:
    """[H_kv, L_i, D] each -> [N, H_kv, L, D]."""
    longest = max(part.shape[1] for part in parts)
    padded = parts[0].new_zeros(len(parts), parts[0].shape[0], longest, parts[0].shape[2])
    for row, part in zip(padded, parts):
        row[:, : part.shape[1]] = part
    return padded


# --------------------------------------------------------------------------- episodes: one row each


class RowCache:
    """Keys and values of running episodes, kept across turns.

    Row r holds lengths[r] tokens and may get several new ones in one call. A row whose length is
    set to 0 is as good as new.
    """

    def __init__(self, rows: int, device):
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        # layer -> keys, values [R, H_kv, capacity, D].
        self.own: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, width: int, rows: Tensor | None = None) -> Tensor:
        """Announces `width` new tokens for these rows (ascending; None: all). -> [R, width]."""
        if rows is None:
            rows = torch.arange(len(self.lengths), device=self.lengths.device)
        lengths = self.lengths[rows]
        self.rows = rows
        self.positions = lengths[:, None] + torch.arange(width, device=lengths.device)
        self.end = int(lengths.max()) + width
        self.masks: dict[int | None, Tensor] = {}
        return self.positions

    def attend(self, layer, query, key, value, scaling, window):
        """[R, H, T, D] -> [R, H, T, D]: over all tokens of the row so far."""
        self._write(layer, key, value)
        keys, values = (part[:, :, : self.end] for part in self.own[layer])
        if len(self.rows) < len(self.lengths):
            keys, values = keys[self.rows], values[self.rows]
        if window not in self.masks:
            key_position = torch.arange(self.end, device=query.device)
            mask = key_position <= self.positions[..., None]
            if window:
                mask &= key_position > self.positions[..., None] - window
            self.masks[window] = mask[:, None]
        if query.shape[2] > 1:
            return attention(query, keys, values, scaling, self.masks[window])
        # One token a row: query heads that share keys become rows of one product.
        folded = query.view(len(query), key.shape[1], -1, query.shape[3])
        return attention(folded, keys, values, scaling, self.masks[window]).view(query.shape)

    def _write(self, layer, key, value):
        if layer not in self.own:
            empty = key.new_empty(len(self.lengths), key.shape[1], 0, key.shape[3])
            self.own[layer] = (empty, empty)
        capacity = self.own[layer][0].shape[2]
        if capacity < self.end:
            room = max(128, self.end, 3 * capacity // 2) - capacity
            self.own[layer] = tuple(F.pad(part, (0, 0, 0, room)) for part in self.own[layer])
        for buffer, new in zip(self.own[layer], (key, value)):
            # The padding of a short row is overwritten by its next tokens.
            buffer[self.rows[:, None], :, self.positions] = new.transpose(1, 2)

    def keep(self, rows: Tensor):
        """Only these rows go on."""
        self.lengths = self.lengths[rows]
        for layer, (keys, values) in self.own.items():
            self.own[layer] = (keys[rows], values[rows])


# --------------------------------------------------------------------------- attention and sampling


def attention(query, key, value, scaling, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, grouped heads; causal without a mask."""
    group = query.shape[1] // key.shape[1]
    if query.is_cuda and (mask is not None or query.dtype == torch.float32):
        # Fused kernels on CUDA know grouped heads only without a mask and in half precision.
        key = key.repeat_interleave(group, 1)
        value = value.repeat_interleave(group, 1)
        group = 1
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=group > 1
    )


def attention_and_norm(query, key, value, scaling, mask=None) -> tuple[Tensor, Tensor]:
    """Attention [R, H, T, D] without a causal mask, and the log of each softmax's normaliser, fp32.

    mask: added to scores, [R, 1, T, L].
    """
    if query.device.type == "cpu":
        # The kernel behind sdpa on CPUs; sdpa itself does not give the normalisers.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, attn_mask=mask, scale=scaling)
    return attention_and_norm_plain(query, key, value, scaling, mask)


def attention_and_norm_plain(query, key, value, scaling, mask=None) -> tuple[Tensor, Tensor]:
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def sample(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """One token a row. logits [R, V]; temperature [R], 0 = greedy; u [R] uniform in [0, 1). -> [R]

    u is the row's own random number, looked up in the distribution function: the token does not
    depend on what else is in the batch.
    """
    logits = logits.float()
    greedy = logits.argmax(-1)
    if not (temperature > 0).any():
        return greedy
    heat = torch.where(temperature > 0, temperature, 1.0)[:, None]
    cumulative = torch.softmax(logits / heat, -1).double().cumsum(-1)
    # The sum may round to a little less or more than 1. Scaled by it, u < 1 stays below the end:
    # a token of probability 0 is never found.
    target = u[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Where the logits are nan nothing is found.
    drawn = drawn.clamp(max=logits.shape[1] - 1)
    return torch.where(temperature > 0, drawn, greedy)


# --------------------------------------------------------------------------- the model's side of it


def tree_attention(
    module, query, key, value, attention_mask, scaling, tree=None, sliding_window=None, **more
):
    """The attention function that transformers calls. query [R, H, T, D], key [R, H_kv, T, D].

    Without a tree it is the library's own: a model that was scored still works for others.
    """
    if tree is None:
        more |= {"scaling": scaling, "sliding_window": sliding_window}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **more)
    if more.get("softcap") or more.get("s_aux") is not None:
        raise InputError("attention with soft-capping or sinks; the tree has plain softmax alone")
    # Under autocast rotary embedding has made query and key float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = tree.attend(module.layer_idx, query, key, value, scaling, sliding_window or None)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


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


def forward(model: PreTrainedModel, ids: Tensor, positions: Tensor, tree) -> Tensor:
    """Last hidden states [R, T, d] of ids [R, T]; the head runs later, where it is needed."""
    # A 4D mask is passed on as it is. This one says no more than that `tree` decides.
    marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    out = model.base_model(
        input_ids=ids, position_ids=positions, attention_mask=marker, use_cache=False, tree=tree
    )
    return out.last_hidden_state


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [.., V] of last hidden states [.., d], as the model's own forward pass makes them."""
    logits = model.get_output_embeddings()(hidden)
    # Cohere multiplies its logits, Granite divides them.
    if getattr(model.config, "logit_scale", None):
        logits = logits * model.config.logit_scale
    if getattr(model.config, "logits_scaling", None):
        logits = logits / model.config.logits_scaling
    return logits


def scoring(
    model, ids: Tensor, positions: Tensor, tree, rows: Tensor, targets: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states [1, T, d] of a packed row; log-probs (and entropies) of targets [N] there.

    Token n is predicted at index rows[n].
    """
    hidden = forward(model, ids, positions, tree)
    return hidden, *chunked_head(model, hidden[0, rows], targets, with_entropy)


def chunked_head(
    model, hidden: Tensor, targets: Tensor, with_entropy: bool, rows: int = 0, most: int = 2**25
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and, if wanted, entropies [N] of targets [N] at hidden [N, d], in chunks of `rows`.

    rows 0: 2^21 logits a chunk, which a cache holds, but 256 rows at least. More than `most` logits
    in all (128 MiB in fp32) never exist at once: the backward pass computes them again.
    """
    vocabulary = model.config.vocab_size
    rows = rows or max(256, 2**21 // vocabulary)
    recompute = torch.is_grad_enabled() and len(targets) * vocabulary > most

    def chunk(hidden_part, target_part):
        logits = head(model, hidden_part)
        logps = token_logps(logits, target_part)
        return logps, entropy(logits) if with_entropy else None

    logps, entropies = [], []
    for part in zip(hidden.split(rows), targets.split(rows)):
        found = checkpoint(chunk, *part, use_reentrant=False) if recompute else chunk(*part)
        logps.append(found[0])
        entropies.append(found[1])
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def kv_bytes(model: PreTrainedModel, width: int) -> int:
    """Bytes of one token's keys and values in all layers, `width` bytes a number."""
    config = model.config
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * head_width * width


# --------------------------------------------------------------------- is it exact for this model?

# A made-up trunk of 12 tokens; leaves of 4 branch off it after 5 and after 9.
CHECK_TRUNK, CHECK_BRANCHES, CHECK_LEAF = 12, (5, 9), 4


def check_tokens(model) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Random token ids: the trunk, and (branch, leaf) twice."""
    generator = torch.Generator().manual_seed(0)
    size = CHECK_TRUNK + len(CHECK_BRANCHES) * CHECK_LEAF
    ids = torch.randint(model.config.vocab_size, (size,), generator=generator).tolist()
    leaves = []
    for number, branch in enumerate(CHECK_BRANCHES):
        start = CHECK_TRUNK + number * CHECK_LEAF
        leaves.append((branch, ids[start : start + CHECK_LEAF]))
    return ids[:CHECK_TRUNK], leaves


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


def check_family(model) -> None:
    """Switches to tree attention; InputError unless it gives the model's own log-probs.

    No list of families decides. A made-up trunk with two leaves is scored, practised and played,
    and compared with ordinary passes. Soft-capped attention, sinks, state-space layers and masks
    that the tree lacks all show as a difference.
    """
    try:
        trunk, leaves = check_tokens(model)
        with in_float32(model):
            model.set_attn_implementation("eager")
            ordinary = [ordinary_logits(model, trunk, 0)]
            for branch, ids in leaves:
                ordinary.append(ordinary_logits(model, trunk[:branch] + ids, branch))
            model.set_attn_implementation(NAME)
            tree = TrunkAndLeaves()
            scored = scored_logits(model, tree, trunk, leaves)
            if not tree.kept:
                raise InputError("its layers do not ask the tree")
            decoded = decoded_logits(model, tree, leaves)
            played = played_logits(model, trunk)
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"{unsupported(model)} fails under it ({reason})") from error
    check_lengths(model, tree)
    ours = torch.log_softmax(torch.cat([scored, decoded, played]).float(), -1)
    theirs = torch.log_softmax(torch.cat([*ordinary, *ordinary[1:], ordinary[0]]).float(), -1)
    difference = (ours - theirs).abs().max().item()
    if not difference <= 1e-3:
        raise InputError(
            f"{unsupported(model)} differs from its own forward pass by {difference:.2g} nats "
            "(soft-capping, attention sinks, another mask or no attention at all); use a model "
            "with plain softmax attention, such as Llama, Mistral, Qwen or Gemma 3"
        )


def ordinary_logits(model, ids: list[int], start: int) -> Tensor:
    """Next-token logits from token `start` on, by the model's own pass."""
    return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, start:]


def scored_logits(model, tree: TrunkAndLeaves, trunk: list[int], leaves: list) -> Tensor:
    """The same for trunk and leaves by one scoring pass, which `tree` keeps."""
    tree.kept = {}
    tree.add_trunk(trunk)
    tree.add_leaves(leaves)
    ids = torch.tensor([tree.ids], device=model.device)
    positions = torch.tensor([tree.position], device=model.device)
    return head(model, forward(model, ids, positions, tree)[0])


def decoded_logits(model, tree: TrunkAndLeaves, leaves: list) -> Tensor:
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
    for start, end in ((0, 7), (7, len(trunk) - 1), (len(trunk) - 1, len(trunk))):
        ids = torch.tensor([trunk[start:end]], device=model.device)
        logits.append(head(model, forward(model, ids, cache.begin(end - start), cache)[0]))
        cache.lengths += end - start
    return torch.cat(logits)


def check_lengths(model, tree: TrunkAndLeaves) -> None:
    """InputError for what shows on longer sequences only: check_tokens are few."""
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
    sparse = getattr(config, "index_topk", None)
    if sparse and sparse < context:
        raise InputError(
            f"{unsupported(model)} attends to {sparse} tokens at most; use a model with plain "
            "softmax attention"
        )


def unsupported(model) -> str:
    return f"model family {model.config.model_type!r}: attention over trunk and leaves"
