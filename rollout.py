"""Trajectories -> tokens, and the two things that a policy does with them: it plays or practises, and it scores.

The one structural idea: all states of an expert trajectory are prefixes of ONE token sequence, the trunk, and every practice
action is a leaf that branches off at its step, at the first token that differs from the expert's.

    trunk   prompt  o1  a1  o2  a2  o3  a3        expert actions a1, a2, a3 lie on the trunk
                      \\       \\       \\
    leaves            a1'     a2'     a3'         practice actions; token t of a leaf stands at position (start of a_i) + t
                      a1"     a2"     a3"         and sees the trunk before its branch and its own leaf, nothing else

So `practice` prefills each trunk once and decodes all its leaves together, and `score` gets every log-prob, expert's and agent's,
from one forward pass; what practice has in common with the expert is neither decoded nor scored again. Both are exact: tests
compare them with one forward pass per prefix.

The model is any Llama, Mistral, Qwen2 or Qwen3 of transformers. Its attention is replaced through the library's own hook by a
function that asks the `tree` it is given (a keyword argument of the model call) who sees whom: Packed, LeafCache or RowCache.
"""
from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MethodType

import numpy as np
import torch
import torch.nn.functional as F
from jinja2.exceptions import TemplateError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase

from losses import bootstrap, entropy, token_logps

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")   # plain softmax attention; others cap logits or add sinks, which the tree lacks


class InputError(Exception):
    """Bad input: one line that names the file, row or option and the remedy."""


# ------------------------------------------------------------------------------------------------------------- trajectories

@dataclass
class Step:
    """One turn: what the world said, and the whole ReAct turn ("Thought: ...\\nAction: ...") that answered it."""
    observation: str
    action: str
    ids: list[int] | None = None                     # the sampled token ids, stop token included, where the agent wrote it


@dataclass
class Trajectory:
    """t = (o_1, a_1, ..., o_n, a_n) after a prompt of chat messages; reward in [0, 1]."""
    task_id: str
    prompt: list[dict[str, str]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    reward: float = 0.0
    truncated: bool = False                          # cut by the step limit or the model's context, not ended by the world
    info: dict[str, float] = field(default_factory=dict)
    last: str = ""                                   # what the world said after the last action


@dataclass
class Encoded:
    """A trajectory as tokens; spans[i] = [start, end) of action i, its stop token included. State i is ids[:start]."""
    ids: list[int]
    spans: list[tuple[int, int]]
    task_id: str = ""


def segment(trajectory: Trajectory) -> list[tuple[Trajectory, str]]:
    """Eq. 4: the n step-wise learning targets of an expert trajectory, as (state s_i, expert action a_i).
    The state is the trajectory so far, its last step holding the observation o_i and an empty action."""
    return [(Trajectory(trajectory.task_id, trajectory.prompt, trajectory.steps[:i] + [Step(step.observation, "")]), step.action)
            for i, step in enumerate(trajectory.steps)]


# ---------------------------------------------------------------------------------------- one renderer from text to (ids, spans)

def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], generate: bool) -> list[int]:
    """Control tokens are the template's alone: one that stands in a message is text. A character that occurs nowhere breaks it up until
    it is tokenised."""
    control = [token for token in _special_texts(tokenizer) if any(token in m["content"] for m in messages)]
    if control:
        crack = next(c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in m["content"] for m in messages))
        crack_in = lambda text: re.sub("|".join(map(re.escape, control)), lambda m: m[0][0] + crack + m[0][1:], text)
        messages = [m | {"content": crack_in(m["content"])} for m in messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:                                       # e.g. a system role where the template knows none
        raise InputError(f"chat template of {tokenizer.name_or_path or 'the tokenizer'} refuses the conversation ({error}); "
                         "its roles are " + ", ".join(m["role"] for m in messages[:4]) + ": change the prompt or the template") from None
    if not control:
        return tokenizer(text, add_special_tokens=False).input_ids       # the template writes its own BOS: never a second one
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [i for i, (a, b) in zip(found.input_ids, found.offset_mapping) if text[a:b] != crack]


def _suffix(tokenizer, shorter: list[int], longer: list[int], task_id: str = "") -> list[int]:
    if longer[:len(shorter)] != shorter:
        raise InputError(f"chat template of {tokenizer.name_or_path or 'the tokenizer'} breaks the prefix property"
                         f"{f' in trajectory {task_id}' if task_id else ''}: a longer conversation does not begin with the tokens of "
                         "a shorter one (it rewrites history); give the tokenizer a chat_template that keeps every turn as it was")
    return longer[len(shorter):]


_USER = [{"role": "user", "content": "x"}]           # a stand-in history: what a turn adds must not depend on the turns before


@lru_cache(maxsize=16)
def _special_texts(tokenizer) -> tuple[str, ...]:
    return tuple(sorted(set(tokenizer.convert_ids_to_tokens(sorted(_special_ids(tokenizer)))) - {None}, key=len, reverse=True))


@lru_cache(maxsize=16)
def _special_ids(tokenizer) -> frozenset[int]:
    return frozenset(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


@lru_cache(maxsize=100_000)
def state_ids(tokenizer, observation: str) -> list[int]:
    """Tokens between an action's stop token and the next action: the observation with the template around it."""
    history = _USER + [{"role": "assistant", "content": "x"}]
    closed = _render(tokenizer, history, False)
    stop = _stop_index(tokenizer, _suffix(tokenizer, _render(tokenizer, _USER, True), closed)) + len(_render(tokenizer, _USER, True))
    longer = _render(tokenizer, history + [{"role": "user", "content": observation}], True)
    return _suffix(tokenizer, closed[:stop + 1], longer)


@lru_cache(maxsize=100_000)
def action_ids(tokenizer, action: str) -> list[int]:
    """Tokens of an action as the agent would write it, stop token included."""
    state = _render(tokenizer, _USER, True)
    ids = _suffix(tokenizer, state, _render(tokenizer, _USER + [{"role": "assistant", "content": action}], False))
    return ids[:_stop_index(tokenizer, ids) + 1]


def _stop_index(tokenizer, ids: list[int]) -> int:
    for i, token in enumerate(ids):
        if token in _special_ids(tokenizer):
            return i
    raise InputError(f"chat template of {tokenizer.name_or_path or 'the tokenizer'} ends an assistant turn without a special stop "
                     "token; give the tokenizer a chat_template that writes one")


def stop_ids(tokenizer) -> set[int]:
    """The tokens that end an action: the one that the chat template writes after an assistant turn, and the tokenizer's EOS."""
    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template; use an instruct model, or set "
                         "chat_template in its tokenizer_config.json")
    return {action_ids(tokenizer, "x")[-1]} | ({tokenizer.eos_token_id} - {None})


def prompt_ids(tokenizer, prompt: list[dict], observation: str) -> list[int]:
    """Tokens of the first state: prompt, first observation, and the template's call for an answer."""
    return _render(tokenizer, prompt + [{"role": "user", "content": observation}], True)


def encode(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokens and action spans. Sampled ids are used where a step kept them; a trajectory of text alone is checked, on token ids,
    against the template's rendering of the whole conversation. InputError: no actions, or a template that rewrites history."""
    stops = stop_ids(tokenizer)
    if not trajectory.steps:
        raise InputError(f"trajectory {trajectory.task_id} has no actions; remove it from the expert file")
    ids, spans = prompt_ids(tokenizer, trajectory.prompt, trajectory.steps[0].observation), []
    for i, step in enumerate(trajectory.steps):
        ids += state_ids(tokenizer, step.observation) if i else []
        action = step.ids if step.ids is not None else action_ids(tokenizer, step.action)
        spans.append((len(ids), len(ids) + len(action)))
        ids += action
        if action[-1] not in stops and i < len(trajectory.steps) - 1:
            ids.append(action_ids(tokenizer, "x")[-1])                   # an action cut short: the turn is closed, unsupervised
    if all(step.ids is None for step in trajectory.steps):
        messages = list(trajectory.prompt)
        for step in trajectory.steps:
            messages += [{"role": "user", "content": step.observation}, {"role": "assistant", "content": step.action}]
        _suffix(tokenizer, ids, _render(tokenizer, messages, False), trajectory.task_id)
    return Encoded(ids, spans, trajectory.task_id)


# ------------------------------------------------------------------------------------------------------ attention over a tree

def _tree_attention(module, query, key, value, attention_mask, scaling, tree=None, sliding_window=None, **_):
    """Registered with transformers. query [R, H, T, D], key and value [R, H_kv, T, D] of this call's tokens alone."""
    assert tree is not None and attention_mask is None, "the model must be called with tree=... and without a mask"
    query, key = query.to(value.dtype), key.to(value.dtype)             # under autocast, rotary embedding has made them fp32
    return tree.attend(module.layer_idx, query, key, value, scaling, sliding_window).transpose(1, 2), None


AttentionInterface.register("trunk_and_leaves", _tree_attention)


def use_tree_attention(model: PreTrainedModel) -> None:
    """Switch the model to tree attention, for good (gradient checkpointing reads the setting again in the backward pass), and its last
    layer to wanted tokens."""
    if model.config.model_type not in SUPPORTED:
        raise InputError(f"model family {model.config.model_type!r} is not supported; use one of {', '.join(SUPPORTED)}")
    if model.config._attn_implementation != "trunk_and_leaves":
        model.set_attn_implementation("trunk_and_leaves")
        model.model.layers[-1].forward = MethodType(_last_layer, model.model.layers[-1])
        model.scoring = MethodType(_scoring, model)


def _last_layer(layer, hidden_states: Tensor, *, tree=None, **more) -> Tensor:
    """The forward pass of the families' decoder layers, but only the tokens that a Packed row wants go on after attention: of all others
    nobody reads more than keys and values."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), tree=tree, **more)
    hidden_states = hidden_states + attended
    if isinstance(tree, Packed):
        hidden_states = hidden_states[:, tree.rows]
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def _forward(model: PreTrainedModel, ids: Tensor, positions: Tensor, tree) -> Tensor:
    """Last hidden states [R, T, d] of ids [R, T], of a Packed row [1, wanted, d]; the output head runs later, at scored positions."""
    return model.model(input_ids=ids, position_ids=positions, use_cache=False, tree=tree).last_hidden_state


def _scoring(model, ids: Tensor, positions: Tensor, tree, select: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    """Hidden states [1, wanted, d], and what _head makes of those at `select`; a method of the model, so that sharded weights are gathered
    around trunk and head alike."""
    hidden = _forward(model, ids, positions, tree)
    return hidden, *_head(model, hidden[0, select], targets, with_entropy)


def kv_bytes(model: PreTrainedModel, width: int) -> int:
    """Bytes of one token's keys and values in all layers, `width` bytes a number."""
    c = model.config
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 2 * c.num_hidden_layers * c.num_key_value_heads * dim * width


def grouped(items: Iterable, size: Callable, limit: float) -> list[list]:
    """Consecutive groups of at most `limit` in size together; one item may exceed it alone."""
    groups, total = [], float("inf")
    for item in items:
        if total + size(item) > limit:
            groups, total = groups + [[]], 0
        groups[-1].append(item)
        total += size(item)
    return groups


def _sdpa(q, k, v, scaling, mask=None, causal=False) -> Tensor:
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):     # fused kernels there know grouped heads only without a mask, in half
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])


class Packed:
    """Who sees whom in one packed row [trunk, leaves of step 1, leaves of step 2, .., trunk, ..]. A leaf is (branch, length): it
    sees the trunk's tokens [0, branch), its own stand at branch, branch + 1, .. One attention call is (trunk, first, end, place,
    leaves): queries are the trunk's tokens [first, end) and a step's leaves; keys are the trunk's tokens [0, end) and these leaves. All
    layers but the last take one causal call over each trunk, [0, its length), and one for each step's leaves. The last layer, whose
    output is wanted at few tokens, takes one for each step: the state's last token, the expert's action, the leaves. No L x L mask
    unless a sliding window is shorter than the trunk."""

    def __init__(self, model: PreTrainedModel, keep: bool = False):
        self.last_layer, self.device = model.config.num_hidden_layers - 1, model.device
        self.sizes: list[int] = []                   # of the pieces of the row: trunks, leaves of a step
        self.calls: dict[bool, list[tuple]] = {False: [], True: []}      # last layer? -> its calls
        self.wanted: list[int] = []                  # the row's tokens whose last hidden state is wanted, in the last layer's order
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None        # layer -> keys, values (prefill)
        self._masks: dict[tuple, Tensor] = {}        # the layers share them

    def add(self, length: int, steps: Iterable[tuple[int, int, tuple[tuple[int, int], ...]]]) -> None:
        """A trajectory: the length of its trunk and, for each step, (start, end, its leaves). Wanted are, step by step, the trunk's
        tokens [start - 1, end) and the leaves."""
        at, trunk, done = sum(self.sizes), len(self.sizes), 0
        self.sizes.append(length)
        self.calls[False].append((trunk, 0, length, 0, ()))
        for start, end, leaves in steps:
            first, place, begin = max(start - 1, done), len(self.sizes), sum(self.sizes)         # without observation: wanted once
            size, reach = sum(n for _, n in leaves), max((branch for branch, _ in leaves), default=0)
            self.wanted += [*range(at + first, at + end), *range(begin, begin + size)]
            self.calls[True].append((trunk, first, end, place, leaves))
            if leaves:
                self.sizes.append(size)
                self.calls[False].append((trunk, reach, reach, place, leaves))
            done = end

    @cached_property
    def rows(self) -> Tensor:
        return torch.tensor(self.wanted, device=self.device)

    def attend(self, layer, q, k, v, scaling, window):
        if self.kept is not None:
            self.kept[layer] = (k, v)
        last, out = layer == self.last_layer, []
        calls = self.calls[last]
        ks, vs = k.split(self.sizes, 2), v.split(self.sizes, 2)          # not slices: the gradient of each would be a full row of zeros
        qs = (q[:, :, self.rows] if last else q).split([end - first + sum(n for _, n in leaves) for _, first, end, _, leaves in calls], 2)
        for call, own in zip(calls, qs):
            trunk, first, end, place, leaves = call
            keys, values = (torch.cat([x[trunk][:, :, :end], x[place]], 2) if leaves else x[trunk][:, :, :end] for x in (ks, vs))
            plain = first == 0 and not leaves and not (window and end > window)
            out.append(_sdpa(own, keys, values, scaling, None if plain else self._mask(call, window), causal=plain))
        made = torch.cat(out, 2)
        return torch.zeros_like(q).index_copy(2, self.rows, made) if last else made

    def _mask(self, call, window) -> Tensor:
        """True where a query (row) sees a key (column)."""
        if (call, window) not in self._masks:
            _, first, end, _, leaves = call
            at = lambda x: torch.tensor(x, device=self.device)
            run = lambda a, b: torch.arange(a, b, device=self.device)
            q_pos, k_pos = (torch.cat([run(a, end), *(run(b, b + n) for b, n in leaves)]) for a in (first, 0))
            q_leaf, k_leaf = (run(-1, len(leaves)).repeat_interleave(at([end - a, *(n for _, n in leaves)])) for a in (first, 0))     # -1: trunk
            branch = at([end, *(b for b, _ in leaves)])[q_leaf + 1]
            mask = (q_leaf[:, None] == k_leaf) | ((k_leaf == -1) & (k_pos < branch[:, None]))
            mask &= k_pos <= q_pos[:, None]
            self._masks[call, window] = mask & (k_pos > q_pos[:, None] - window) if window else mask
        return self._masks[call, window]


# -------------------------------------------------------------------------------------------------------------------- scoring

@dataclass
class Scores:
    """What one forward pass over trunks and leaves gives. S expert steps in order, N leaves in order, d hidden size.
    Log-probs and entropies are in nats, fp32, log-probs differentiable; per-token values are flat, cut by the lengths."""
    trunk: Tensor                                    # [S] summed log-prob of each expert action
    leaves: Tensor                                   # [N] summed log-prob of each practice action
    trunk_tokens: Tensor                             # [sum of trunk_lengths] log-prob of each expert token
    leaf_tokens: Tensor                              # [sum of leaf_lengths]
    trunk_entropy: Tensor | None                     # [sum of trunk_lengths] entropy where each expert token was predicted, if wanted
    leaf_entropy: Tensor | None                      # [sum of leaf_lengths]
    trunk_lengths: list[int]
    leaf_lengths: list[int]
    state_hidden: Tensor                             # [S, d] at the state's last token, before the action
    trunk_hidden: Tensor                             # [S, d] at the expert action's last token
    leaf_hidden: Tensor                              # [N, d] at the practice action's last token


def score(model: PreTrainedModel, encoded: list[Encoded], leaves: list[list[tuple[int, list[int]]]] | None = None,
          with_entropy: bool = False) -> Scores:
    """Log-probs of all expert actions and all leaves in ONE forward pass (module docstring). leaves[j] = [(step index, token ids)]
    of trajectory j, in any order; Scores.leaves keeps that order. A leaf's first tokens that are the expert's are read off the trunk,
    and equal leaves of a step are one. Memory: the caller chooses how many trajectories share a pass.
    with_entropy: entropies, differentiable (an entropy bonus wants that; over a large vocabulary it costs as much as the log-probs)."""
    use_tree_attention(model)
    leaves = leaves if leaves is not None else [[] for _ in encoded]
    assert len(encoded) == len(leaves) > 0, f"{len(encoded)} trajectories, {len(leaves)} lists of leaves"
    tree, ids, positions = Packed(model), [], []
    rows: dict[str, list] = {"trunk": [], "leaf": []}                   # per action: (tokens that predict its tokens, its token ids)
    last: dict[str, list[int]] = {"state": [], "trunk": [], "leaf": []}
    for item, own in zip(encoded, leaves):
        t0, steps, paths = len(ids), [], {}                              # paths: (step, leaf) -> the token before it, and its own
        ids += item.ids
        positions += range(len(item.ids))
        for step, (start, end) in enumerate(item.spans):
            rows["trunk"].append((range(t0 + start - 1, t0 + end - 1), item.ids[start:end]))
            last["state"].append(t0 + start - 1)
            last["trunk"].append(t0 + end - 1)
            branches = []
            for leaf in dict.fromkeys(tuple(leaf) for s, leaf in own if s == step):              # those of a step lie side by side
                assert leaf, f"empty practice action at step {step} of {item.task_id}"
                n, a = shared(item, step, leaf), len(ids)
                paths[step, leaf] = [*range(t0 + start - 1, t0 + start + n), *range(a, a + len(leaf) - n)]
                ids += leaf[n:]
                positions += range(start + n, start + len(leaf))
                branches += [(start + n, len(leaf) - n)] if n < len(leaf) else []
            steps.append((start, end, tuple(branches)))
        tree.add(len(item.ids), steps)
        rows["leaf"] += [(paths[step, tuple(leaf)][:-1], leaf) for step, leaf in own]
        last["leaf"] += [paths[step, tuple(leaf)][-1] for step, leaf in own]
    device, at = model.device, {token: j for j, token in enumerate(tree.wanted)}
    both = rows["trunk"] + rows["leaf"]
    asked = [(at[r], t) for predict, tokens in both for r, t in zip(predict, tokens)]
    once = {pair: j for j, pair in enumerate(dict.fromkeys(asked))}      # (row, token): what several actions ask is computed once
    select, targets = torch.tensor(list(once), device=device).T
    (hidden,), *found = model.scoring(torch.tensor([ids], device=device), torch.tensor([positions], device=device), tree, select, targets,
                                      with_entropy)
    answers = torch.tensor([once[pair] for pair in asked], device=device)
    logps, *more = (x.index_select(0, answers) for x in found)
    lengths = [len(tokens) for _, tokens in both]
    owner = torch.repeat_interleave(torch.arange(len(both), device=device), torch.tensor(lengths, device=device))
    sums = logps.new_zeros(len(both)).index_add(0, owner, logps)
    n, t = len(rows["trunk"]), sum(lengths[:len(rows["trunk"])])
    ends = {name: hidden[torch.tensor([at[r] for r in index], device=device, dtype=torch.long)] for name, index in last.items()}
    entropies = (more[0][:t], more[0][t:]) if with_entropy else (None, None)
    return Scores(sums[:n], sums[n:], logps[:t], logps[t:], *entropies, lengths[:n], lengths[n:], ends["state"], ends["trunk"], ends["leaf"])


def shared(item: Encoded, step: int, leaf: Sequence[int]) -> int:
    """How many tokens a practice action has in common with the expert's: it branches off the trunk after them."""
    start, end = item.spans[step]
    return next((n for n, (a, b) in enumerate(zip(item.ids[start:end], leaf)) if a != b), min(end - start, len(leaf)))


def _head(model: PreTrainedModel, hidden: Tensor, targets: Tensor, with_entropy: bool = True, rows: int = 0, most: int = 2 ** 25) -> list[Tensor]:
    """Log-probs and, if wanted, entropies [N] of targets [N] at hidden [N, d], in chunks of `rows` (0: 2^21 logits, which a cache holds,
    but 256 rows at least). More than `most` logits in all (128 MiB in fp32) never exist at once: the backward pass computes them again."""
    def part(h, t):
        logits = model.lm_head(h)
        return (token_logps(logits, t), entropy(logits)) if with_entropy else (token_logps(logits, t),)
    rows = rows or max(256, 2 ** 21 // model.config.vocab_size)
    again = torch.is_grad_enabled() and len(targets) * model.config.vocab_size > most
    parts = [checkpoint(part, h, t, use_reentrant=False) if again else part(h, t)
             for h, t in zip(hidden.split(rows), targets.split(rows))]
    return [torch.cat(x) for x in zip(*parts)]


# ----------------------------------------------------------------------------------------------------------------- inspection

def sample(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """One token a row. logits [R, V]; temperature [R], 0 = greedy; u [R] uniform in [0, 1), the row's own random number: inverting
    the distribution function with it makes the token independent of what else is in the batch. -> [R]
    First the block of 128 tokens is found, then the token in it: running sums in float64 over a whole vocabulary cost more than the softmax."""
    logits = logits.float()
    if not (temperature > 0).any():
        return logits.argmax(-1)
    heat = torch.where(temperature > 0, temperature, 1.0)[:, None]
    p = torch.softmax(logits / heat, -1)
    p = F.pad(p, (0, -p.shape[1] % 128)).unflatten(1, (-1, 128))                               # [R, blocks, 128]
    mass = p.sum(-1).double()
    cdf = mass.cumsum(-1)
    x = u[:, None] * cdf[:, -1:]
    i = _inverse(cdf, x)
    own = _inverse(p[torch.arange(len(p), device=p.device), i[:, 0]].double().cumsum(-1), x - (cdf - mass).gather(1, i))
    drawn = (i * 128 + own)[:, 0]
    return drawn if (temperature > 0).all() else torch.where(temperature > 0, drawn, logits.argmax(-1))


def _inverse(cdf: Tensor, x: Tensor) -> Tensor:
    """The first index at which cdf [R, n] exceeds x [R, 1], which rounding may have moved below 0 or to the end. -> [R, 1]"""
    x = torch.minimum(x.clamp(min=0), torch.nextafter(cdf[:, -1:], torch.zeros_like(x)))
    return torch.searchsorted(cdf, x, right=True).clamp(max=cdf.shape[1] - 1)                  # nan finds nothing


class LeafCache:
    """KV cache of practice: each trunk's keys and values stand once, for all its leaves; a leaf keeps its own few tokens.
    Rows are leaves, those of one trunk side by side; all have the same number of own tokens, `length`. Trunks are padded to the
    longest, [N, H_kv, L, D], and the rows of each take slots 0, 1, .. beside it, so that one product serves all trunks."""

    def __init__(self, trunks: dict[int, list[tuple[Tensor, Tensor]]], owner: Tensor, prefix: Tensor, group: int):
        self.trunks = {layer: tuple(map(self._pad, zip(*trunks.pop(layer)))) for layer in list(trunks)}       # frees as it goes
        self.owner, self.prefix, self.length = owner, prefix, 0          # [R] trunk of each row, [R] trunk tokens that it sees
        self.group = group                                               # query heads that share a key head
        self.own: dict[int, tuple[Tensor, Tensor]] = {}                  # layer -> keys, values [R, H_kv, capacity, D]
        self._seats()

    @staticmethod
    def _pad(parts: Sequence[Tensor]) -> Tensor:
        """[H_kv, L_i, D] each -> [N, H_kv, L, D], contiguous: without a kernel for it (_weigh), products would copy anything else each time."""
        out = parts[0].new_zeros(len(parts), parts[0].shape[0], max(x.shape[1] for x in parts), parts[0].shape[2])
        for row, x in zip(out, parts):
            row[:, :x.shape[1]] = x
        return out

    def _seats(self):
        """Numbers the trunks that still have rows, and each trunk's rows."""
        alive, self.owner, counts = torch.unique_consecutive(self.owner, return_inverse=True, return_counts=True)
        if len(alive) < len(next(iter(self.trunks.values()))[0]):
            self.trunks = {layer: (k[alive], v[alive]) for layer, (k, v) in self.trunks.items()}
        first = (counts.cumsum(0) - counts)[self.owner]
        self.slot, self.slots = torch.arange(len(self.owner), device=first.device) - first, int(counts.max())
        limit = self.prefix.new_full((len(alive), self.slots), -1)       # -1: an empty slot, whose output nobody reads
        limit[self.owner, self.slot] = self.prefix
        # Blocks of slots, so that early steps do not look over the whole trunk: their limits [N, 1, w * G, 1], and how many keys they read.
        # 32 queries are what the CPU's kernel takes at once; elsewhere a call costs more than the work it saves.
        size = -(-32 // self.group) if limit.device.type == "cpu" else -(-self.slots // 4)
        self.blocks = [(x.repeat_interleave(self.group, 1)[:, None, :, None], int(x.max())) for x in limit.split(size, 1)]
        self.masks: dict[int | None, tuple] = {}     # window -> (length, masks): the layers share them

    def _masks(self, window: int | None, like: Tensor) -> list[Tensor]:
        """What the queries of each block must not see, as -1e30 to add to scores (finite: a row may see none), [N, 1, w * G, keys]."""
        if window not in self.masks or window and self.masks[window][0] != self.length:
            masks = []
            for limit, reads in self.blocks:
                far = torch.arange(reads, device=like.device)
                hidden = far >= limit
                if window:
                    hidden |= far <= limit + self.length - window
                masks.append(like.new_zeros(hidden.shape).masked_fill_(hidden, -1e30))
            self.masks[window] = self.length, masks
        return self.masks[window][1]

    def _append(self, layer, k, v):
        if layer not in self.own or self.own[layer][0].shape[2] == self.length:
            room = [x.new_empty(x.shape[0], x.shape[1], max(32, self.length), x.shape[3]) for x in (k, v)]
            self.own[layer] = tuple(room) if layer not in self.own else tuple(
                torch.cat([x, r], 2) for x, r in zip(self.own[layer], room))
        for buffer, x in zip(self.own[layer], (k, v)):
            buffer[:, :, self.length] = x[:, :, 0]

    def attend(self, layer, q, k, v, scaling, window):
        """Two softmaxes, one over the trunk's prefix and one over the leaf, joined by their normalisers."""
        self._append(layer, k, v)
        n, (rows, heads, _, dim) = self.length + 1, q.shape
        q = q.view(rows, k.shape[1], self.group, dim)
        own_out, own_lse = _weigh(q, *(x[:, :, max(0, n - window) if window else 0:n] for x in self.own[layer]), scaling)
        keys, values = self.trunks[layer]                                                      # [N, H_kv, L, D]
        seated = q.new_zeros(len(keys), self.slots, *q.shape[1:])
        seated[self.owner, self.slot] = q                                                      # [N, W, H_kv, G, D]
        flat = seated.transpose(1, 2).flatten(2, 3).split(self.blocks[0][0].shape[2], 2)       # [N, H_kv, w * G, D] each
        outs = [_weigh(some, keys[:, :, :reads], values[:, :, :reads], scaling, mask)
                for some, (_, reads), mask in zip(flat, self.blocks, self._masks(window, q))]
        out, lse = (torch.cat(x, 2).unflatten(2, (self.slots, self.group)).transpose(1, 2)[self.owner, self.slot] for x in zip(*outs))
        share = torch.sigmoid(lse - own_lse)[..., None].to(v.dtype)
        return (share * out + (1 - share) * own_out).reshape(rows, heads, 1, dim)

    def keep(self, rows: Tensor):
        self.owner, self.prefix = self.owner[rows], self.prefix[rows]
        self.own = {layer: (k[rows], v[rows]) for layer, (k, v) in self.own.items()}
        self._seats()


def _weigh(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention [R, H, T, D] and its softmax's log-normalisers [R, H, T], fp32. mask: added to scores, [R, 1, T, L]."""
    if q.device.type == "cpu":                       # the kernel behind sdpa there; sdpa itself does not give the normalisers
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scaling)
    return _weigh_by_products(q, k, v, scaling, mask)


def _weigh_by_products(q, k, v, scaling, mask=None):
    out, scores = _products(q, k, v, scaling, mask)
    return out, scores.logsumexp(-1)


def _products(q, k, v, scaling, mask=None):
    scores = (q @ k.transpose(2, 3)).float().mul_(scaling)
    scores = scores if mask is None else scores.add_(mask)
    return scores.softmax(-1).to(v.dtype) @ v, scores


def _prefill(model: PreTrainedModel, encoded: list[Encoded], most: int) -> tuple[dict[int, list[tuple[Tensor, Tensor]]], Tensor]:
    """-> keys and values of each trunk, layer by layer, [H_kv, L, D], and the hidden states that predict each token of each expert
    action [.., d], in order. Several trunks share a pass of at most `most` tokens."""
    trunks, hidden = defaultdict(list), []
    ends = [item.spans[-1][1] - 1 for item in encoded]                   # nothing is predicted from the last action's last token
    for group in grouped(range(len(encoded)), lambda j: ends[j], most):
        tree = Packed(model, keep=True)
        for j in group:
            tree.add(ends[j], [(start, end - 1, ()) for start, end in encoded[j].spans])
        ids = torch.tensor([[token for j in group for token in encoded[j].ids[:ends[j]]]], device=model.device)
        positions = torch.tensor([[t for j in group for t in range(ends[j])]], device=model.device)
        hidden.append(_forward(model, ids, positions, tree)[0])
        for layer, kv in tree.kept.items():
            trunks[layer] += zip(*(x[0].split([ends[j] for j in group], 1) for x in kv))
        tree.kept.clear()                                                # the cache's padded copy is to be the only one
    return trunks, torch.cat(hidden)


@torch.no_grad()
def practice(model: PreTrainedModel, encoded: list[Encoded], k: int, temperature: float | Sequence[float], max_new_tokens: int,
             stop_ids: Iterable[int], generator: torch.Generator | list[torch.Generator] | None = None,
             prefill_tokens: int = 8192) -> list[list[list[list[int]]]]:
    """Eq. 5, the inspection: k practice actions for every expert step, [trajectory][step][k] token ids, the stop token kept.
    Prefills each trunk once, several in a pass of up to prefill_tokens. As long as the tokens sampled are the expert's, what comes next
    stands on the trunk already; where they part a leaf begins, and the leaves of all given trajectories are decoded together.
    An action ends with a stop token, after max_new_tokens, or where the model's context does.
    temperature: one for all, or one per practice action (0 = greedy). generator: one per trajectory makes the result independent
    of packing; CPU generators. Memory: kv_bytes(..) a token, of the leaves and of the trunks, padded to the longest of them."""
    use_tree_attention(model)
    device, stops = model.device, torch.tensor(sorted(stop_ids), device=model.device)
    heats = [temperature] * k if isinstance(temperature, (int, float)) else list(temperature)
    assert len(heats) == k, f"{len(heats)} temperatures for k = {k}"
    gens = generator if isinstance(generator, list) else [generator] * len(encoded)
    assert len(gens) == len(encoded), f"{len(gens)} generators for {len(encoded)} trajectories"

    trunks, hidden = _prefill(model, encoded, prefill_tokens)
    noise = [torch.rand(len(item.spans) * k, max_new_tokens, generator=gen, dtype=torch.float64) for item, gen in zip(encoded, gens)]
    noise = F.pad(torch.cat(noise), (0, 1)).to(device)
    spans = [(j, item.ids[start:end - 1], start) for j, item in enumerate(encoded) for start, end in item.spans]
    expert = torch.tensor([(a + [-1] * max_new_tokens)[:max_new_tokens] for _, a, _ in spans], device=device).repeat_interleave(k, 0)
    sizes = torch.tensor([[j, start, len(a) + 1] for j, a, start in spans], device=device)
    first = (sizes[:, 2].cumsum(0) - sizes[:, 2]).repeat_interleave(k)   # [R] where in `hidden` each row's state is
    owner, start, _ = sizes.repeat_interleave(k, 0).T
    heat = torch.tensor(heats, device=device).repeat(len(spans))
    room = (model.config.max_position_embeddings - start).clamp(1, max_new_tokens)       # of each action, within the context

    # Rows are practice actions. lengths: 0 while a row writes; column max_new_tokens takes what a finished one still writes.
    written = torch.zeros(len(first), max_new_tokens + 1, dtype=torch.long, device=device)
    lengths, common = (torch.zeros(len(first), dtype=torch.long, device=device) for _ in range(2))

    def write(rows: Tensor, hidden: Tensor, t: Tensor) -> Tensor:
        """Token t [R] of these rows."""
        token = sample(model.lm_head(hidden), heat[rows], noise[rows, t])
        written[rows, t] = token
        ended = (torch.isin(token, stops) | (t == room[rows] - 1)) & (lengths[rows] == 0)
        lengths[rows[ended]] = t[ended] + 1
        return token

    rows = torch.arange(len(first), device=device)
    for t in range(max_new_tokens):                                      # follow the expert
        common[rows] = t
        token = write(rows, hidden[first[rows] + t], common[rows])
        rows = rows[token == expert[rows, t]]
        if not len(rows):
            break
    rows = (lengths == 0).nonzero()[:, 0]                                # leaves still in the batch
    if len(rows):
        cache = LeafCache(trunks, owner[rows], (start + common)[rows], model.config.num_attention_heads // model.config.num_key_value_heads)
    token = written[rows, common[rows]]
    while len(rows):                                                     # decode
        hidden = _forward(model, token[:, None], (cache.prefix + cache.length)[:, None], cache)[:, 0]
        cache.length += 1
        token = write(rows, hidden, (common[rows] + cache.length).clamp(max=max_new_tokens))
        alive = lengths[rows] == 0
        if alive.sum() < 0.8 * len(rows):                                # finished leaves go, in bulk: moving the cache costs too
            if alive.any():
                cache.keep(alive.nonzero()[:, 0])
            rows, token = rows[alive], token[alive]
    flat = iter([row[:n] for row, n in zip(written.tolist(), lengths.tolist())])
    return [[[next(flat) for _ in range(k)] for _ in item.spans] for item in encoded]


# ------------------------------------------------------------------------------------------------------------------- episodes

def empty_pass(model: PreTrainedModel) -> None:
    """One token that nobody reads."""
    cache = RowCache(1, model.device)
    with torch.no_grad():
        _forward(model, torch.zeros(1, 1, dtype=torch.long, device=model.device), cache.begin(1), cache)


class RowCache:
    """KV cache of episodes, kept across turns: row r holds lengths[r] tokens, and may get several new ones in one call. A row whose
    length is set to 0 is as good as new."""

    def __init__(self, rows: int, device):
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.own: dict[int, tuple[Tensor, Tensor]] = {}                  # layer -> keys, values [R, H_kv, capacity, D]

    def begin(self, width: int, rows: Tensor | None = None):
        """Announce `width` new tokens for each of these rows (None: all of them); -> their positions [R, width]."""
        self.rows, lengths = rows, self.lengths if rows is None else self.lengths[rows]
        self.positions = lengths[:, None] + torch.arange(width, device=lengths.device)
        self.end, self.masks = int(lengths.max()) + width, {}
        self.row = (torch.arange(len(lengths), device=lengths.device) if rows is None else rows)[:, None]
        return self.positions

    def attend(self, layer, q, k, v, scaling, window):
        if layer not in self.own:
            self.own[layer] = tuple(x.new_empty(len(self.lengths), x.shape[1], 0, x.shape[3]) for x in (k, v))
        if self.own[layer][0].shape[2] < self.end:
            capacity = self.own[layer][0].shape[2]
            room = max(128, self.end, 3 * capacity // 2) - capacity
            self.own[layer] = tuple(F.pad(x, (0, 0, 0, room)) for x in self.own[layer])
        for buffer, x in zip(self.own[layer], (k, v)):
            buffer[self.row, :, self.positions] = x.transpose(1, 2)      # a short row's padding is overwritten by its next tokens
        # A CPU decodes in bfloat16 twice as fast by products with the whole cache (of a part it makes a copy first), in which heads that
        # share keys are rows of one.
        products = q.dtype == torch.bfloat16 and q.device.type == "cpu" and self.rows is None and q.shape[2] <= 8
        end, group = self.own[layer][0].shape[2] if products else self.end, q.shape[1] // k.shape[1]
        keys, values = (x[:, :, :end] if self.rows is None else x[self.rows, :, :end] for x in self.own[layer])
        if window not in self.masks:                                     # the layers share it
            far = torch.arange(end, device=q.device)
            mask = far <= self.positions[..., None]
            if window:
                mask &= far > self.positions[..., None] - window
            self.masks[window] = -1e30 * (~mask[:, None].repeat(1, 1, group, 1)).float() if products else mask[:, None]
        if not products:
            return _sdpa(q, keys, values, scaling, self.masks[window])
        return _products(q.reshape(len(q), k.shape[1], -1, q.shape[3]), keys, values, scaling, self.masks[window])[0].reshape(q.shape)

    def keep(self, rows: Tensor):
        self.lengths = self.lengths[rows]
        self.own = {layer: (k[rows], v[rows]) for layer, (k, v) in self.own.items()}


@dataclass
class _Row:
    """One running episode: its world, what is written so far, and the tokens that the model has not read yet."""
    trajectory: Trajectory
    generator: torch.Generator
    job: Future | None = None                        # its world starts or answers
    old: bool = False                                # asked before the last stretch of writing
    episode: object = None
    observation: str = ""
    pending: list[int] = field(default_factory=list)
    length: int = 0                                  # tokens read
    action: list[int] = field(default_factory=list)
    room: int = 0                                    # tokens that the action may have
    noise: list[float] = field(default_factory=list)
    invalid: int = 0
    done: bool = False


@torch.no_grad()
def run_episodes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, env, task_ids: Sequence[str], *,
                 prompt: list[dict] = (), temperature: float = 0.0, max_new_tokens: int = 512, batch: int = 64, seed: int = 0,
                 progress: Callable[[int], object] = lambda n: None) -> list[Trajectory]:
    """Plays the tasks, `batch` worlds at once, and returns their trajectories in order, sampled ids kept, info["invalid"] =
    number of invalid actions. Greedy at temperature 0; otherwise seeded by (seed, task), whatever shares the batch. An episode
    that outgrows the model's context ends as truncated. progress(n) is called as n more tasks end.

    Rows write side by side. Whenever a quarter of them have a whole action, these ask their worlds and read the answers, and the
    others go on where they were: nobody waits for the longest action. The worlds of a slow environment (env.slow) answer during the
    next such stretch. Who shares a pass with whom follows from the episodes alone, not from timing, so that a repetition gives the
    same bits."""
    use_tree_attention(model)
    limit, stops, waiting, slow = model.config.max_position_embeddings, stop_ids(tokenizer), list(task_ids), getattr(env, "slow", False)
    finished: dict[str, Trajectory] = {}
    pool = ThreadPoolExecutor(8)

    def begin() -> _Row:
        task = waiting.pop(0)
        row = _Row(Trajectory(task, list(prompt), info={"invalid": 0}), torch.Generator().manual_seed(stable_seed(seed, task)))
        row.job = pool.submit(_start, env, tokenizer, limit, row)
        return row

    try:
        rows = [begin() for _ in range(min(batch, len(waiting)))]
        cache = RowCache(len(rows), model.device)
        hidden = torch.zeros(len(rows), model.config.hidden_size, device=model.device, dtype=model.dtype)
        while rows:
            due = [j for j, row in enumerate(rows) if row.job]
            if slow:                                                     # where nearly all wait, half of them do so a stretch longer
                due = [j for j in due if rows[j].old] or due[:(len(due) + 1) // 2 if 4 * len(due) > 3 * len(rows) else 0]
            for j in due:                                                # grows
                rows[j].job.result()                                     # waits for the world, and raises what it raised
                rows[j].job = None
                if rows[j].done:
                    finished[rows[j].trajectory.task_id] = rows[j].trajectory
                    progress(1)
                    if waiting:                                          # a waiting task takes the place of a finished one
                        rows[j] = begin()
                        due += [] if slow else [j]
            alive = [j for j, row in enumerate(rows) if row.job or not row.done]
            if len(alive) < len(rows):
                cache.keep(torch.tensor(alive, device=model.device, dtype=torch.long))
                hidden, rows = hidden[alive], [rows[j] for j in alive]
            _read(model, rows, cache, hidden, max_new_tokens)
            for row in rows:
                row.old = row.job is not None
            hidden, written = _write(model, rows, cache, hidden, temperature, stops)
            for row in written:
                row.job = pool.submit(_answer, env, tokenizer, limit, row)
        return [finished[task] for task in task_ids]
    finally:
        pool.shutdown(cancel_futures=True)                               # after an error nobody waits for worlds that have not begun


def _start(env, tokenizer, limit: int, row: _Row) -> None:
    task, prompt = row.trajectory.task_id, row.trajectory.prompt
    row.episode, row.observation = env.start(task)
    row.pending = prompt_ids(tokenizer, prompt, row.observation)
    if len(row.pending) >= limit:                                        # over before it began
        row.done = row.trajectory.truncated = True
        row.trajectory.info["outgrown"] = 1
        if hasattr(row.episode, "close"):
            row.episode.close()


def stable_seed(*parts) -> int:
    """A 63-bit seed from the parts' text, the same in every process: sampling depends on what is sampled, not on where."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _read(model, rows: list[_Row], cache: RowCache, hidden: Tensor, max_new_tokens: int) -> None:
    """Rows whose worlds have answered read their pending tokens (prefill); hidden[row] becomes what their action begins with."""
    reading = [j for j, row in enumerate(rows) if not row.job and row.pending]
    cache.lengths = torch.tensor([row.length for row in rows], device=model.device)
    for group in _alike([len(rows[j].pending) for j in reading]):
        some = [reading[j] for j in group]
        width, index = max(len(rows[j].pending) for j in some), torch.tensor(some, device=model.device)
        ids = torch.tensor([rows[j].pending + [0] * (width - len(rows[j].pending)) for j in some], device=model.device)
        out = _forward(model, ids, cache.begin(width, None if len(some) == len(rows) else index), cache)
        last = torch.tensor([len(rows[j].pending) - 1 for j in some], device=model.device)
        hidden[index] = out[torch.arange(len(some), device=model.device), last].to(hidden.dtype)
    for row in (rows[j] for j in reading):
        row.length, row.pending, row.action = row.length + len(row.pending), [], []
        row.room = min(max_new_tokens, model.config.max_position_embeddings - row.length)
        row.noise = torch.rand(max_new_tokens, generator=row.generator, dtype=torch.float64).tolist()


def _write(model, rows: list[_Row], cache: RowCache, hidden: Tensor, temperature: float, stops: set[int]) -> tuple[Tensor, list[_Row]]:
    """Rows that do not wait for their worlds write, token by token (decode), until a quarter of all rows have a whole action.
    -> hidden states for the next token, and those that have one; their last token is sampled, not read."""
    writing, written = [row.job is None for row in rows], []
    heat = torch.full((len(rows),), float(temperature), device=model.device)
    while any(writing) and 4 * len(written) < len(rows):
        noise = torch.tensor([row.noise[len(row.action)] if w else 0.0 for row, w in zip(rows, writing)], dtype=torch.float64)
        token = sample(model.lm_head(hidden), heat, noise.to(model.device))
        for j, value in enumerate(token.tolist()):
            if writing[j]:
                row = rows[j]
                row.action.append(value)
                if value in stops or len(row.action) == row.room:
                    row.pending, writing[j] = [value], False
                    written.append(row)
        if any(writing):                                                 # the others idle: their length stands still
            cache.lengths = torch.tensor([row.length for row in rows], device=model.device)
            hidden = _forward(model, token[:, None], cache.begin(1), cache)[:, 0]
            for row, w in zip(rows, writing):
                row.length += w
    return hidden, written


def _alike(lengths: list[int], most: int = 16384) -> list[list[int]]:
    """Indices in groups of like length, each of at most `most` tokens when padded (one row may exceed it alone)."""
    order, groups = sorted(range(len(lengths)), key=lambda j: lengths[j]), []
    for j in order:
        if not groups or lengths[j] * (len(groups[-1]) + 1) > most or lengths[j] > 2 * lengths[groups[-1][0]] + 64:
            groups.append([])
        groups[-1].append(j)
    return [sorted(group) for group in groups]


def _answer(env, tokenizer, limit: int, row: _Row) -> None:
    """The world answers one action; the row's pending tokens become what the model reads next."""
    stops, trajectory, action = stop_ids(tokenizer), row.trajectory, row.action
    text = tokenizer.decode(action[:-1] if action[-1] in stops else action)
    observation, trajectory.reward, ended, info = row.episode.step(text)
    trajectory.steps.append(Step(row.observation, text, action))
    row.invalid += not info["valid"]
    trajectory.info = {"invalid": row.invalid, **{name: x for name, x in info.items() if name != "valid"}}
    if action[-1] not in stops:
        row.pending = row.pending + [action_ids(tokenizer, "x")[-1]]
    row.pending = row.pending + state_ids(tokenizer, observation)
    row.observation = trajectory.last = observation
    outgrown = row.length + len(row.pending) >= limit
    trajectory.truncated = not ended and (outgrown or len(trajectory.steps) >= env.max_steps(trajectory.task_id))
    if outgrown and not ended:
        trajectory.info["outgrown"] = 1
    row.done = ended or trajectory.truncated
    if row.done and hasattr(row.episode, "close"):
        row.episode.close()


def episode_figures(episodes: list[Trajectory], env) -> dict:
    """success = reward >= 1; invalid: share of all actions; steps: mean turns; secondary: means of the world's other metrics (f1, ..).
    Episodes whose world failed (info["unplayable"]) are counted, not scored."""
    played = [t for t in episodes if not t.info.get("unplayable")]
    if not played:
        raise InputError(f"the world failed in all of {len(episodes)} episodes; see the messages above")
    success, reward = [float(t.reward >= 1) for t in played], [t.reward for t in played]
    by_type = defaultdict(list)
    for t, won in zip(played, success):
        by_type[env.task_type(t.task_id)].append(won)
    turns = max(1, sum(len(t.steps) for t in played))
    others = dict.fromkeys(name for t in played for name in t.info if name not in ("invalid", "outgrown", "restarts"))
    return {"success": float(np.mean(success)), "success_interval": bootstrap(success), "reward": float(np.mean(reward)),
            "reward_interval": bootstrap(reward), "tasks": len(played), "steps": turns / len(played),
            "invalid": sum(t.info["invalid"] for t in played) / turns, "truncated": sum(t.truncated for t in played),
            "outgrown": sum(t.info.get("outgrown", 0) for t in played), "unplayable": len(episodes) - len(played),
            "restarts": sum(t.info.get("restarts", 0) for t in episodes),
            "secondary": {name: float(np.mean([t.info.get(name, 0.0) for t in played])) for name in others},
            "by_type": {name: [float(np.mean(x)), len(x)] for name, x in sorted(by_type.items())}}
