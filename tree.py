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

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from losses import entropy, token_logps
from system.errors import InputError

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

    position, leaf, branch: one number a token, [T]. leaf is -1 on the trunk. branch is how many
    tokens of the trunk the token's leaf sees (without effect on the trunk).
    """
    # Both on the trunk, or both on one leaf.
    same_sequence = leaf[query] == leaf[key]
    trunk_before_branch = (leaf[key] == -1) & (position[key] < branch[query])
    not_later = position[key] <= position[query]
    in_window = window is None or position[key] > position[query] - window
    return (same_sequence | trunk_before_branch) & not_later & in_window


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
        # One entry a piece: its number of tokens, ..
        self.sizes: list[int] = []
        # .. the number of its trunk's piece, ..
        self.trunks: list[int] = []
        # .. and how many tokens of that trunk it is given.
        self.prefixes: list[int] = []
        # (piece, window) -> mask, which the layers share.
        self.masks: dict[tuple, Tensor] = {}
        # Position, leaf and branch of each token, [3, T].
        self.row: Tensor | None = None
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
        # The longest prefix that one of them sees; the mask hides the rest from the others.
        self.prefixes.append(max(branch for branch, _ in leaves))
        self.sizes.append(0)
        starts = []
        for branch, ids in leaves:
            # Numbered from 0 on each trunk: the trunk itself is leaf -1.
            number = self.leaf[-1] + 1
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

    def tensors(self, device) -> tuple[Tensor, Tensor]:
        """Token ids and positions of the row, [1, T] each, as a model reads them."""
        ids, positions = numbers([self.ids, self.position], device)
        return ids[None], positions[None]

    def attend(self, layer, query, key, value, scaling, window):
        """[1, H, T, D] -> [1, H, T, D]: one call a piece."""
        if self.kept is not None:
            self.kept[layer] = (key, value)
        # split, not slices: the gradient of each slice would be a whole row of zeros.
        queries, keys, values = (part.split(self.sizes, 2) for part in (query, key, value))
        outputs = []
        group = query.shape[1] // key.shape[1]
        for piece, (trunk, prefix) in enumerate(zip(self.trunks, self.prefixes)):
            seen_keys, seen_values = keys[piece], values[piece]
            is_causal = piece == trunk and (window is None or window >= self.sizes[piece])
            mask = None if is_causal else self.mask(piece, window, query, group)
            if piece != trunk:
                seen_keys = torch.cat([keys[trunk][:, :, :prefix], seen_keys], 2)
                seen_values = torch.cat([values[trunk][:, :, :prefix], seen_values], 2)
            outputs.append(attention(queries[piece], seen_keys, seen_values, scaling, mask))
        return torch.cat(outputs, 2)

    def mask(self, piece: int, window: int | None, like: Tensor, group: int) -> Tensor:
        """For a piece that attends to [its trunk's prefix, itself]."""
        if (piece, window) not in self.masks:
            if self.row is None:
                self.row = numbers([self.position, self.leaf, self.branch], like.device)
            trunk_start = sum(self.sizes[: self.trunks[piece]])
            start = sum(self.sizes[:piece])
            query = torch.arange(start, start + self.sizes[piece], device=like.device)
            prefix = trunk_start + torch.arange(self.prefixes[piece], device=like.device)
            key = torch.cat([prefix, query])
            seen = sees(*self.row, query[:, None], key[None, :], window)
            self.masks[piece, window] = additive(seen, like, group)
        return self.masks[piece, window]


# ------------------------------------------------------------------- practice: decoding all leaves


class LeafCache:
    """Keys and values while practice is decoded: each trunk is stored once, for all its leaves.

    R rows are leaves, those of one trunk side by side; all have read `length` tokens. The N trunks
    are padded to the longest, [N, H_kv, L, D]. G query heads share a key head. A trunk has W
    columns, one for each of its rows, so one product serves all rows of all trunks:

        query [R, H_kv, G, D] -> grid [N, H_kv, W * G, D] x keys [N, H_kv, L, D] -> back to rows
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
        self.leaves: dict[int, tuple[Tensor, Tensor]] = {}
        self._lay_out()

    def _lay_out(self):
        """Numbers the trunks that still have rows, and the rows of each trunk."""
        # owner is numbered anew, 0, 1, .., over the trunks that still have rows; alive: their old
        # numbers.
        alive, self.owner, row_counts = torch.unique_consecutive(
            self.owner, return_inverse=True, return_counts=True
        )
        some_keys, _ = next(iter(self.trunks.values()))
        if len(alive) < len(some_keys):
            keep_rows(self.trunks, alive)
        first_row = row_counts.cumsum(0) - row_counts
        row = torch.arange(len(self.owner), device=first_row.device)
        self.column = row - first_row[self.owner]
        # [N, W] trunk tokens seen. An empty column sees nothing, and its output is not used.
        self.limit = self.prefix.new_full((len(alive), int(row_counts.max())), -1)
        self.limit[self.owner, self.column] = self.prefix
        self.longest = int(self.limit.max())
        # window -> mask, which the layers share.
        self.masks: dict[int | None, Tensor] = {}

    def _mask(self, window: int | None, group: int, like: Tensor) -> Tensor:
        """What the queries of each column see of their trunk. [N, 1, W * G, L]"""
        if window not in self.masks:
            prefix = self.limit[..., None]
            # The leaf's next token has this position.
            query_position = prefix + self.length
            trunk_position = torch.arange(self.longest, device=like.device)
            seen = trunk_position < prefix
            if window:
                seen &= trunk_position > query_position - window
            self.masks[window] = additive(seen.repeat_interleave(group, 1)[:, None], like)
        return self.masks[window]

    def advance(self):
        """One more token of each leaf is read. A window moves with it."""
        self.length += 1
        self.masks = {window: mask for window, mask in self.masks.items() if window is None}

    def attend(self, layer, query, key, value, scaling, window):
        """[R, H, 1, D] -> [R, H, 1, D]: over the trunk's prefix and over the leaf, then joined."""
        kv_heads = key.shape[1]
        folded = query.view(len(query), kv_heads, -1, query.shape[3])
        leaf_out, leaf_norm = self._over_leaves(layer, folded, key, value, scaling, window)
        trunk_out, trunk_norm = self._over_trunks(layer, folded, scaling, window)
        # Attention over both is trunk_share * trunk_out + (1 - trunk_share) * leaf_out, where
        # trunk_share = Z_trunk / (Z_trunk + Z_leaf) = sigmoid(log Z_trunk - log Z_leaf).
        trunk_share = torch.sigmoid(trunk_norm - leaf_norm)[..., None].to(value.dtype)
        return torch.lerp(leaf_out, trunk_out, trunk_share).reshape(query.shape)

    def _over_leaves(self, layer, query, key, value, scaling, window) -> tuple[Tensor, Tensor]:
        """query [R, H_kv, G, D] -> output [R, H_kv, G, D] and log-normaliser [R, H_kv, G]."""
        buffers = self.leaves.get(layer)
        if buffers is None or buffers[0].shape[2] == self.length:
            # Buffers grow by doubling.
            capacity = self.length + max(32, self.length)
            self.leaves[layer] = buffers = grown(buffers, key, len(key), capacity)
        for buffer, new in zip(buffers, (key, value)):
            buffer[:, :, self.length] = new[:, :, 0]
        end = self.length + 1
        start = max(0, end - window) if window else 0
        keys, values = (buffer[:, :, start:end] for buffer in buffers)
        return attention_and_norm(query, keys, values, scaling)

    def _over_trunks(self, layer, query, scaling, window) -> tuple[Tensor, Tensor]:
        """The same over the prefix of each row's trunk."""
        _, kv_heads, group, width = query.shape
        keys, values = (part[:, :, : self.longest] for part in self.trunks[layer])
        trunks, columns = self.limit.shape
        grid = query.new_zeros(trunks, kv_heads, columns, group, width)
        grid[self.owner, :, self.column] = query
        mask = self._mask(window, group, query)
        # [N, H_kv, W, G, D] -> [N, H_kv, W * G, D]
        out, norm = attention_and_norm(grid.flatten(2, 3), keys, values, scaling, mask)
        # [N, H_kv, W * G, ..] -> [N, H_kv, W, G, ..] -> [R, H_kv, G, ..]
        out, norm = (part.unflatten(2, (columns, group)) for part in (out, norm))
        return out[self.owner, :, self.column], norm[self.owner, :, self.column]

    def keep(self, rows: Tensor):
        """Only these rows go on."""
        self.owner = self.owner[rows]
        self.prefix = self.prefix[rows]
        keep_rows(self.leaves, rows)
        self._lay_out()


def pad_trunks(parts: tuple[Tensor, ...]) -> Tensor:
    """[H_kv, L_i, D] each -> [N, H_kv, L, D]."""
    longest = max(part.shape[1] for part in parts)
    return torch.stack([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])


def grown(buffers: tuple[Tensor, Tensor] | None, key: Tensor, rows: int, capacity: int):
    """Keys and values with zeros behind them, [rows, H_kv, capacity, D]; None: nothing yet."""
    if buffers is None:
        buffers = 2 * (key.new_empty(rows, key.shape[1], 0, key.shape[3]),)
    return tuple(F.pad(part, (0, 0, 0, capacity - part.shape[2])) for part in buffers)


def keep_rows(buffers: dict[int, tuple[Tensor, Tensor]], rows: Tensor) -> None:
    """Drops the others from every layer's keys and values."""
    for layer, (keys, values) in buffers.items():
        buffers[layer] = (keys[rows], values[rows])


# --------------------------------------------------------------------------- episodes: one row each


class RowCache:
    """Keys and values of running episodes, kept across turns.

    Row r holds lengths[r] tokens and may get several new ones in one call. A row whose length is
    set to 0 is as good as new. Lengths are the host's: nobody waits for a GPU to tell them.
    """

    def __init__(self, rows: int, device):
        self.device = device
        self.lengths = [0] * rows
        # layer -> keys, values [R, H_kv, capacity, D].
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, width: int, rows: list[int] | None = None) -> Tensor:
        """Announces `width` new tokens for these rows (ascending; None: all). -> [R, width]."""
        self.rows = list(range(len(self.lengths))) if rows is None else rows
        lengths = [self.lengths[row] for row in self.rows]
        self.end = max(lengths) + width
        self.all_begin = self.end == width
        self.index, starts = numbers([self.rows, lengths], self.device)
        self.positions = starts[:, None] + torch.arange(width, device=self.device)
        self.masks: dict[int | None, Tensor] = {}
        return self.positions

    def attend(self, layer, query, key, value, scaling, window):
        """[R, H, T, D] -> [R, H, T, D]: over all tokens of the row so far."""
        self._write(layer, key, value)
        if self.all_begin and (window is None or window >= self.end):
            return attention(query, key, value, scaling)
        keys, values = (buffer[:, :, : self.end] for buffer in self.buffers[layer])
        if len(self.rows) < len(self.lengths):
            keys, values = keys[self.index], values[self.index]
        mask = self._mask(window, query, query.shape[1] // key.shape[1])
        return attention(query, keys, values, scaling, mask)

    def _mask(self, window: int | None, like: Tensor, group: int) -> Tensor:
        """What a new token sees of its row. Layers share it."""
        if window not in self.masks:
            key_position = torch.arange(self.end, device=like.device)
            seen = key_position <= self.positions[..., None]
            if window:
                seen &= key_position > self.positions[..., None] - window
            self.masks[window] = additive(seen[:, None], like, group)
        return self.masks[window]

    def _write(self, layer, key, value):
        buffers = self.buffers.get(layer)
        old = 0 if buffers is None else buffers[0].shape[2]
        if old < self.end:
            capacity = max(128, self.end, 5 * old // 4)
            self.buffers[layer] = buffers = grown(buffers, key, len(self.lengths), capacity)
        for buffer, new in zip(buffers, (key, value)):
            # The padding of a short row is overwritten by its next tokens.
            buffer[self.index[:, None], :, self.positions] = new.transpose(1, 2)

    def keep(self, rows: list[int]):
        """Only these rows go on."""
        self.lengths = [self.lengths[row] for row in rows]
        keep_rows(self.buffers, torch.tensor(rows, dtype=torch.long, device=self.device))


# --------------------------------------------------------------------------- attention and sampling


def attention(query, key, value, scaling, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention [R, H, T, D], grouped heads; causal without a mask.

    mask: made by `additive`.
    """
    kv_heads = key.shape[1]
    shape = query.shape
    if mask is not None and (shape[2] == 1 or folds(query)):
        # [R, H_kv * G, T, D] -> [R, H_kv, G * T, D]: keys are read once for the group. `additive`
        # has made the mask for it; one row of a mask serves all heads by broadcasting.
        query = query.reshape(shape[0], kv_heads, -1, shape[3])
    elif query.is_cuda and query.dtype == torch.float32:
        # Fused kernels on CUDA know grouped heads in half precision only.
        key, value = (part.repeat_interleave(shape[1] // kv_heads, 1) for part in (key, value))
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return out.reshape(shape)


# Finite: with -inf the softmax of LeafCache's empty columns, which see nothing, would be nan.
HIDDEN = -1e30


def additive(seen: Tensor, like: Tensor, group: int = 1) -> Tensor:
    """A mask that is added to scores: 0 where a token is seen. [.., T, L] -> [.., T, L].

    Kernels want it so, and each layer would make its own from a mask of truth values. Where
    `attention` folds the group's query heads, the mask has rows for all of them: [.., G * T, L].
    """
    *rows, tokens, length = seen.shape
    # As `attention` folds: one copy for each query head of the group.
    if tokens > 1 and folds(like):
        seen = torch.cat([seen] * group, -2)
    # The fused kernel of CUDA wants rows to lie a multiple of 16 numbers apart.
    wide = like.new_zeros(*rows, seen.shape[-2], length + -length % 16)
    return wide[..., :length].masked_fill_(~seen, HIDDEN)


def folds(query: Tensor) -> bool:
    """CUDA's fused kernels take no mask together with grouped heads. On CPUs it costs a little."""
    return query.is_cuda


def attention_and_norm(query, key, value, scaling, mask=None) -> tuple[Tensor, Tensor]:
    """Attention [R, H, T, D] without a causal mask, and the log of each softmax's normaliser, fp32.

    mask: added to scores, [R, 1, T, L]. The kernels are those behind sdpa, which itself does not
    give the normalisers.
    """
    if query.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, attn_mask=mask, scale=scaling)
    if query.is_cuda and query.dtype != torch.float64:
        return efficient_attention(query, key, value, scaling, mask)
    return attention_and_norm_plain(query, key, value, scaling, mask)


def efficient_attention(query, key, value, scaling, mask) -> tuple[Tensor, Tensor]:
    """The same by CUDA's memory-efficient kernel."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    out, norm, *_ = kernel(query, key, value, mask, True, scale=scaling)
    # It gives normalisers of 32, 64, .. queries.
    return out, norm[..., : query.shape[2]]


def attention_and_norm_plain(query, key, value, scaling, mask=None) -> tuple[Tensor, Tensor]:
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def sample(logits: Tensor, temperature: Tensor | None, u: Tensor) -> Tensor:
    """One token a row. logits [R, V]; temperature [R], 0 = greedy; u [R] uniform in [0, 1). -> [R]

    temperature None: greedy everywhere. u is the row's own random number, looked up in the
    distribution function: the token does not depend on what else is in the batch.
    """
    greedy = logits.argmax(-1)
    if temperature is None:
        return greedy
    divisor = torch.where(temperature > 0, temperature, 1.0)[:, None]
    cumulative = torch.softmax(logits.float() / divisor, -1).double().cumsum(-1)
    # The sum may round to a little less or more than 1. Scaled by it, u < 1 stays below the end:
    # a token of probability 0 is never found.
    target = u[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Where the logits are nan nothing is found.
    drawn = drawn.clamp(max=logits.shape[1] - 1)
    return torch.where(temperature > 0, drawn, greedy)


def numbers(integers: list, device) -> Tensor:
    """Integers, or lists of them, on a device; a GPU goes on with its work meanwhile."""
    return torch.tensor(integers, dtype=torch.long).to(device, non_blocking=True)


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


def forward(model: PreTrainedModel, ids: Tensor, positions: Tensor, tree) -> Tensor:
    """Last hidden states [R, T, d] of ids [R, T]; the head runs later, where it is needed."""
    # A 4D mask is passed on as it is. This one says no more than that `tree` decides.
    marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    out = model.base_model(
        input_ids=ids, position_ids=positions, attention_mask=marker, use_cache=False, tree=tree
    )
    return out.last_hidden_state


def empty_pass(model: PreTrainedModel) -> None:
    """A pass whose output is not used: sharded weights are gathered by all ranks or by none."""
    cache = RowCache(1, model.device)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        forward(model, ids, cache.begin(1), cache)


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


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows of the head at once.

    On CPUs 2^21 logits, which a cache holds. A GPU wants few chunks: each casts the head's weights
    and adds up their gradient, and 2^27 logits take 3 GB. 256 rows at least.
    """
    if device == "cuda":
        return min(2048, max(256, 2**27 // vocabulary))
    return max(256, 2**21 // vocabulary)


def chunked_head(
    model, hidden: Tensor, targets: Tensor, with_entropy: bool, rows: int = 0, most: int = 2**25
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and, if wanted, entropies [N] of targets [N] at hidden [N, d], in chunks of `rows`.

    More than `most` logits in all (128 MiB in fp32) never exist at once, unless one chunk has them:
    the backward pass computes them again.
    """
    vocabulary = model.config.vocab_size
    rows = rows or chunk_rows(vocabulary, hidden.device.type)
    too_many = len(targets) > rows and len(targets) * vocabulary > most
    recompute = torch.is_grad_enabled() and too_many

    def chunk(hidden_part, target_part):
        logits = head(model, hidden_part)
        logps = token_logps(logits, target_part)
        return logps, entropy(logits) if with_entropy else None

    logps, entropies = [], []
    for part in zip(hidden.split(rows), targets.split(rows)):
        of_chunk = checkpoint(chunk, *part, use_reentrant=False) if recompute else chunk(*part)
        logps.append(of_chunk[0])
        entropies.append(of_chunk[1])
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def kv_bytes(model: PreTrainedModel, width: int) -> int:
    """Bytes of one token's keys and values in all layers, `width` bytes a number."""
    config = model.config
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * head_width * width
