"""What a policy does with trajectories: it scores them, practises at their states, and plays.

score     log-probs of all expert actions and all practice actions, in one forward pass
practice  K actions of the agent's own at every state of the expert, eq. 5
run_episodes   whole episodes, many worlds at once

All states of an expert trajectory are prefixes of one token sequence, its trunk; practice actions
are leaves. tree.py says who sees whom.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from losses import bootstrap
from system.family import use_tree_attention
from system.worlds import Player, Worlds
from trajectory import Encoded, InputError, Trajectory, encode, segment, stop_ids
from tree import LeafCache, RowCache, TrunkAndLeaves, forward, head, numbers, sample

__all__ = ["encode", "episode_figures", "practice", "run_episodes", "score", "segment", "stop_ids"]


# ----------------------------------------------------------------------------------------- scoring


@dataclass
class Scores:
    """What a forward pass says of one trajectory: S expert steps, N leaves, d hidden size.

    Log-probs and entropies are in nats, fp32, and differentiable. Values a token are flat, action
    after action.
    """

    # [S], [N] summed log-prob of each expert action and of each leaf.
    trunk: Tensor
    leaves: Tensor
    # [expert tokens], [leaf tokens] log-prob of each token.
    trunk_tokens: Tensor
    leaf_tokens: Tensor
    # The same shapes: entropy where the token was predicted, if wanted.
    trunk_entropy: Tensor | None
    leaf_entropy: Tensor | None
    # [S, d] at the state's last token, before the action.
    state_hidden: Tensor


def score(
    model: PreTrainedModel,
    encoded: list[Encoded],
    leaves: list[list[tuple[int, list[int]]]] | None = None,
    with_entropy: bool = False,
) -> list[Scores]:
    """Log-probs of all expert actions and all leaves in ONE forward pass; one Scores a trajectory.

    leaves[j] = [(step index, token ids)] of trajectory j, in any order, which Scores keeps. Tokens
    that a leaf shares with the expert are read off the trunk; equal leaves of a step are one.
    with_entropy: over a large vocabulary entropies cost as much as the log-probs.
    Memory: the caller chooses how many trajectories share a pass.
    """
    use_tree_attention(model)
    if leaves is None:
        leaves = [[] for _ in encoded]
    assert len(encoded) == len(leaves) > 0, f"{len(encoded)} trajectories, {len(leaves)} of leaves"

    # What goes in: the trunks and their leaves as one row of T tokens; ids, positions [1, T].
    # Who sees whom: `tree` says it to every layer, by `sees`.
    tree = TrunkAndLeaves()
    placed = [lay_out(tree, item, actions) for item, actions in zip(encoded, leaves)]
    ids, positions = tree.tensors(model.device)

    # The N distinct predictions (row index, token): actions that begin alike share theirs.
    index_of: dict[Prediction, int] = {}
    for expert, agent in placed:
        for action in expert + agent:
            for prediction in action.predictions():
                index_of.setdefault(prediction, len(index_of))
    rows, targets = numbers(list(index_of), model.device).T
    # What comes out: hidden states [1, T, d], log-probs and entropies [N]. It is `scoring` of
    # tree.py, which use_tree_attention has made a method of the model.
    hidden, logps, entropies = model.scoring(ids, positions, tree, rows, targets, with_entropy)
    return [read_scores(hidden[0], logps, entropies, index_of, *actions) for actions in placed]


# (row index, the token predicted there)
Prediction = tuple[int, int]


@dataclass
class Placed:
    """An action in the row of tokens: row[t] predicts tokens[t], row[-1] is the last token."""

    row: list[int]
    tokens: Sequence[int]

    def predictions(self) -> Iterable[Prediction]:
        """One for each of its tokens."""
        return zip(self.row, self.tokens)


def lay_out(tree: TrunkAndLeaves, item: Encoded, leaves: list) -> tuple[list[Placed], list[Placed]]:
    """Adds a trajectory and its leaves to the row; -> its expert actions, its leaves."""
    distinct = defaultdict(dict)
    for step, ids in leaves:
        assert len(ids) > 0, f"empty practice action at step {step} of {item.task_id}"
        distinct[step][tuple(ids)] = None
    trunk = tree.add_trunk(item.ids)
    expert = []
    placed: dict[tuple, Placed] = {}
    for step, (start, end) in enumerate(item.spans):
        # From the token before the action, which predicts its first one, to the action's last.
        expert.append(Placed(list(range(trunk + start - 1, trunk + end)), item.ids[start:end]))
        branching = []
        for ids in distinct[step]:
            common = shared(item, step, ids)
            on_trunk = list(range(trunk + start - 1, trunk + start + common))
            if common == len(ids):
                placed[step, ids] = Placed(on_trunk, ids)
            else:
                branching.append((ids, common, on_trunk))
        if branching:
            new = [(start + common, list(ids[common:])) for ids, common, _ in branching]
            for first, (ids, common, on_trunk) in zip(tree.add_leaves(new), branching):
                on_leaf = list(range(first, first + len(ids) - common))
                placed[step, ids] = Placed(on_trunk + on_leaf, ids)
    return expert, [placed[step, tuple(ids)] for step, ids in leaves]


def shared(item: Encoded, step: int, ids: Sequence[int]) -> int:
    """How many tokens an action has in common with the expert's: there it branches off."""
    start, end = item.spans[step]
    common = 0
    for ours, expert in zip(ids, item.ids[start:end]):
        if ours != expert:
            break
        common += 1
    return common


def pass_tokens(item: Encoded, leaves: list[tuple[int, list[int]]]) -> int:
    """Tokens of a scoring pass: the trunk, and of each distinct leaf what is not on the trunk."""
    distinct = {(step, tuple(ids)) for step, ids in leaves}
    return item.tokens + sum(len(ids) - shared(item, step, ids) for step, ids in distinct)


def read_scores(
    hidden: Tensor,
    logps: Tensor,
    entropies: Tensor | None,
    index_of: dict[Prediction, int],
    expert: list[Placed],
    agent: list[Placed],
) -> Scores:
    """The Scores of one trajectory from what the whole pass predicted: hidden [T, d], logps [N]."""
    device = hidden.device

    def predicted(actions: list[Placed]) -> Tensor:
        indices = [index_of[pair] for action in actions for pair in action.predictions()]
        return numbers(indices, device)

    def summed(values: Tensor, actions: list[Placed]) -> Tensor:
        owner = []
        for number, action in enumerate(actions):
            owner += [number] * len(action.tokens)
        return values.new_zeros(len(actions)).index_add(0, numbers(owner, device), values)

    of_expert, of_agent = predicted(expert), predicted(agent)
    trunk_tokens, leaf_tokens = logps[of_expert], logps[of_agent]
    return Scores(
        trunk=summed(trunk_tokens, expert),
        leaves=summed(leaf_tokens, agent),
        trunk_tokens=trunk_tokens,
        leaf_tokens=leaf_tokens,
        trunk_entropy=None if entropies is None else entropies[of_expert],
        leaf_entropy=None if entropies is None else entropies[of_agent],
        state_hidden=hidden[numbers([action.row[0] for action in expert], device)],
    )


# -------------------------------------------------------------------------------------- inspection


@torch.no_grad()
def practice(
    model: PreTrainedModel,
    encoded: list[Encoded],
    k: int,
    temperature: float | Sequence[float],
    max_new_tokens: int,
    stop_ids: Iterable[int],
    generator: torch.Generator | list[torch.Generator] | None = None,
    prefill_tokens: int = 8192,
) -> list[list[list[list[int]]]]:
    """Eq. 5, the inspection: K practice actions at every expert step, [trajectory][step][k] ids.

    Each trunk is read once. A row follows the expert while it samples the expert's tokens: what
    comes next stands on the trunk already. Where they part a leaf begins, and the leaves of all
    trajectories are decoded together. An action ends with a stop token (kept), after
    max_new_tokens, or where the model's context does.

    temperature: one for all, or one for each of the K (0 = greedy). generator: a CPU generator; one
    per trajectory makes the result independent of packing. Memory: kv_bytes(..) for each token of
    the leaves and of the trunks, padded to the longest of them.
    """
    use_tree_attention(model)
    is_number = isinstance(temperature, (int, float))
    temperatures = [temperature] * k if is_number else list(temperature)
    assert len(temperatures) == k, f"{len(temperatures)} temperatures for k = {k}"
    generators = generator if isinstance(generator, list) else [generator] * len(encoded)
    assert len(generators) == len(encoded), f"{len(generators)} generators, {len(encoded)} items"

    trunks, hidden = prefill(model, encoded, prefill_tokens)
    rows = PracticeRows(model, encoded, temperatures, max_new_tokens, stop_ids, generators)
    follow_expert(model, rows, hidden)
    decode(model, rows, trunks)

    actions = iter(rows.actions())
    return [[[next(actions) for _ in range(k)] for _ in item.spans] for item in encoded]


def prefill(
    model, encoded: list[Encoded], most: int
) -> tuple[dict[int, list[tuple[Tensor, Tensor]]], Tensor]:
    """Reads the trunks, several in a pass of at most `most` tokens.

    -> layer -> keys and values of each trunk [H_kv, L, D]; and the hidden states [.., d] that
    predict each token of each expert action, in order.
    """

    def needed(item: Encoded) -> int:
        # Nothing is predicted from the last action's last token.
        return item.spans[-1][1] - 1

    trunks = defaultdict(list)
    hidden = []
    for group in grouped(encoded, needed, most):
        tree = TrunkAndLeaves()
        tree.kept = {}
        predicting = []
        for item in group:
            first = tree.add_trunk(item.ids[: needed(item)])
            for start, end in item.spans:
                predicting += range(first + start - 1, first + end - 1)
        states = forward(model, *tree.tensors(model.device), tree)[0]
        hidden.append(states[numbers(predicting, model.device)])
        for layer, (keys, values) in tree.kept.items():
            trunks[layer] += zip(keys[0].split(tree.sizes, 1), values[0].split(tree.sizes, 1))
    return trunks, torch.cat(hidden)


class PracticeRows:
    """Practice actions while they are written: R = all steps x K rows, those of a step together."""

    def __init__(self, model, encoded, temperatures, max_new_tokens, stops, generators):
        device = model.device
        steps, expert, noise = [], [], []
        for trunk, (item, generator) in enumerate(zip(encoded, generators)):
            for start, end in item.spans:
                steps.append([trunk, start, end - start])
                # Without its last token, which ends the action. -1 equals no token: there every
                # row leaves the trunk.
                action = item.ids[start : end - 1][:max_new_tokens]
                expert.append(action + [-1] * (max_new_tokens - len(action)))
            size = (len(item.spans) * len(temperatures), max_new_tokens)
            noise.append(torch.rand(size, generator=generator, dtype=torch.float64))
        trunk, start, length = torch.tensor(steps, device=device).T
        # There is a hidden state for each expert token, step after step.
        first_hidden = length.cumsum(0) - length

        copies = len(temperatures)
        # [R] the row's trunk, where its action starts on it, its first row in the hidden states.
        self.trunk = trunk.repeat_interleave(copies)
        self.start = start.repeat_interleave(copies)
        self.first_hidden = first_hidden.repeat_interleave(copies)
        # [R, max_new_tokens] the expert's tokens, and each token's own random number.
        self.expert = torch.tensor(expert, device=device).repeat_interleave(copies, 0)
        self.noise = F.pad(torch.cat(noise), (0, 1)).to(device)
        self.temperature = None
        if any(temperatures):
            self.temperature = torch.tensor(temperatures, device=device).repeat(len(steps))
        self.stops = torch.tensor(sorted(stops), device=device)
        # [R] tokens that the action may have within the model's context.
        left = model.config.max_position_embeddings - self.start
        self.allowed = left.clamp(1, max_new_tokens)
        # What is written; one more column takes what a finished row still writes.
        self.longest = max_new_tokens
        size = (len(self.trunk), max_new_tokens + 1)
        self.written = torch.zeros(size, dtype=torch.long, device=device)
        # [R] 0 while a row writes; tokens in common with the expert.
        self.lengths = torch.zeros(len(self.trunk), dtype=torch.long, device=device)
        self.common = torch.zeros_like(self.lengths)

    def write(self, model, rows: Tensor, hidden: Tensor, place: Tensor) -> Tensor:
        """Samples the token at `place` [r] of these rows from hidden states [r, d]."""
        temperature = None if self.temperature is None else self.temperature[rows]
        token = sample(head(model, hidden), temperature, self.noise[rows, place])  # eq. 5
        self.written[rows, place] = token
        is_last = torch.isin(token, self.stops) | (place == self.allowed[rows] - 1)
        lengths = self.lengths[rows]
        self.lengths[rows] = torch.where(is_last & (lengths == 0), place + 1, lengths)
        return token

    def actions(self) -> list[list[int]]:
        lengths = self.lengths.tolist()
        return [ids[:length] for ids, length in zip(self.written.tolist(), lengths)]


def follow_expert(model, rows: PracticeRows, hidden: Tensor) -> None:
    """Samples from the trunk's own states for as long as the tokens are the expert's."""
    following = torch.arange(len(rows.trunk), device=hidden.device)
    for place in range(rows.longest):
        # These rows have repeated the expert's first `place` tokens.
        rows.common[following] = place
        places = torch.full_like(following, place)
        states = hidden[rows.first_hidden[following] + place]
        token = rows.write(model, following, states, places)
        following = following[token == rows.expert[following, place]]
        if len(following) == 0:
            break


def decode(model, rows: PracticeRows, trunks: dict) -> None:
    """Writes on where rows have left the trunk, token by token, all leaves together."""
    writing = (rows.lengths == 0).nonzero()[:, 0]
    if len(writing) == 0:
        return
    # A row leaves the trunk where its last sampled token differs: that is its leaf's first token.
    branch = (rows.start + rows.common)[writing]
    cache = LeafCache(trunks, rows.trunk[writing], branch)
    token = rows.written[writing, rows.common[writing]]
    while len(writing) > 0:
        position = within_context(model, cache.prefix + cache.length)
        hidden = forward(model, token[:, None], position[:, None], cache)[:, 0]
        cache.advance()
        # The place of the next token. Clamped: a finished row writes on, into a spare column.
        place = (rows.common[writing] + cache.length).clamp(max=rows.longest)
        token = rows.write(model, writing, hidden, place)
        if cache.length % passes_between_looks(hidden.device) != 0:
            continue
        alive = (rows.lengths[writing] == 0).nonzero()[:, 0]
        # Finished rows leave in bulk: moving the cache costs, too.
        if len(alive) < 0.8 * len(writing):
            if len(alive):
                cache.keep(alive)
            writing, token = writing[alive], token[alive]


def passes_between_looks(device: torch.device) -> int:
    """How often the host looks which actions have ended: it waits for the GPU each time."""
    return 8 if device.type == "cuda" else 1


def within_context(model, positions: Tensor) -> Tensor:
    """Positions of what is not used, padding and finished rows, clamped to the model's context."""
    return positions.clamp(max=model.config.max_position_embeddings - 1)


def grouped(items: Iterable, size: Callable, limit: float) -> list[list]:
    """Consecutive groups of at most `limit` in size together; one item may exceed it alone."""
    groups: list[list] = []
    total = 0
    for item in items:
        item_size = size(item)
        if not groups or total + item_size > limit:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += item_size
    return groups


# ---------------------------------------------------------------------------------------- episodes


@torch.no_grad()
def run_episodes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    env,
    task_ids: Sequence[str],
    *,
    prompt: Sequence[dict] = (),
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    batch: int = 64,
    seed: int = 0,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Trajectory]:
    """Plays the tasks, `batch` worlds at once, and returns their trajectories in order.

    Sampled ids are kept; info["invalid"] counts invalid actions. Greedy at temperature 0, otherwise
    seeded by (seed, task), whatever shares the batch. An episode that outgrows the model's context
    ends as truncated. progress(n) is called as n more tasks end.

    Players write side by side. Whenever a quarter of them have a whole action, these ask their
    worlds and read the answers, and the others go on where they were: nobody waits for the longest
    action. The worlds of a slow environment (env.slow) answer during the next such stretch. Who
    shares a pass with whom follows from the episodes alone, not from timing: a repetition gives the
    same bits.
    """
    use_tree_attention(model)
    stops = stop_ids(tokenizer)
    worlds = Worlds(env, tokenizer, model.config.max_position_embeddings, task_ids, prompt, seed)
    finished: dict[str, Trajectory] = {}
    try:
        players = [worlds.next_player() for _ in range(min(batch, len(task_ids)))]
        cache = RowCache(len(players), model.device)
        # [players, d] the state from which each player's next token is sampled.
        size = (len(players), model.config.hidden_size)
        hidden = torch.zeros(size, device=model.device, dtype=model.dtype)
        while players:
            for trajectory in worlds.endings(players):
                finished[trajectory.task_id] = trajectory
                progress(1)
            alive = [i for i, player in enumerate(players) if player.job or not player.done]
            if len(alive) < len(players):
                cache.keep(alive)
                hidden = hidden[alive]
                players = [players[i] for i in alive]
            read_observations(model, players, cache, hidden, max_new_tokens)
            hidden, with_action = write_actions(model, players, cache, hidden, temperature, stops)
            for player in with_action:
                worlds.ask(player)
        return [finished[task] for task in task_ids]
    finally:
        # After an error nobody waits for worlds that have not begun.
        worlds.threads.shutdown(cancel_futures=True)


def read_observations(model, players, cache: RowCache, hidden: Tensor, max_new_tokens: int) -> None:
    """Prefill: players whose worlds have answered read what is pending.

    hidden[i] becomes the state from which player i's action begins.
    """
    device = model.device
    reading = [i for i, player in enumerate(players) if not player.job and player.pending]
    cache.lengths = [player.length for player in players]
    for group in of_like_length(reading, lambda i: len(players[i].pending)):
        pending = [players[i].pending for i in group]
        width = max(map(len, pending))
        padded = numbers([ids + [0] * (width - len(ids)) for ids in pending], device)
        positions = within_context(model, cache.begin(width, group))
        states = forward(model, padded, positions, cache)
        last = numbers([len(ids) - 1 for ids in pending], device)
        found = states[torch.arange(len(group), device=device), last]
        hidden[cache.index] = found.to(hidden.dtype)
    for i in reading:
        player = players[i]
        player.length += len(player.pending)
        player.pending, player.action = [], []
        player.allowed = min(max_new_tokens, model.config.max_position_embeddings - player.length)
        noise = torch.rand(max_new_tokens, generator=player.generator, dtype=torch.float64)
        player.noise = noise.tolist()


def write_actions(
    model, players, cache: RowCache, hidden: Tensor, temperature: float, stops: set[int]
) -> tuple[Tensor, list[Player]]:
    """Decode: players that do not wait for their worlds write until a quarter have an action.

    -> hidden states for the next token, and those that have an action; their last token is sampled,
    not read.
    """
    device = model.device
    writing = [player.job is None for player in players]
    with_action = []
    temperatures = None
    if temperature > 0:
        temperatures = torch.full((len(players),), float(temperature), device=device)

    def read(token: Tensor) -> Tensor:
        """Reads one more token of each player; the length of those who do not write stays."""
        positions = within_context(model, cache.begin(1))
        states = forward(model, token[:, None], positions, cache)[:, 0]
        cache.lengths = [length + writes for length, writes in zip(cache.lengths, writing)]
        return states

    # Until a quarter of the players have an action.
    while any(writing) and 4 * len(with_action) < len(players):
        ahead = passes_between_looks(device)
        noise = []
        for player, writes in zip(players, writing):
            upcoming = player.noise[len(player.action) :][:ahead] if writes else []
            noise.append(upcoming + [0.0] * (ahead - len(upcoming)))
        noise = torch.tensor(noise, dtype=torch.float64).to(device)
        # Tokens read beyond the end of an action are forgotten here.
        cache.lengths = [player.length for player in players]
        tokens = [sample(head(model, hidden), temperatures, noise[:, 0])]
        for place in range(1, ahead):
            hidden = read(tokens[-1])
            tokens.append(sample(head(model, hidden), temperatures, noise[:, place]))
        for i, (player, values) in enumerate(zip(players, torch.stack(tokens, 1).tolist())):
            if not writing[i]:
                continue
            # What follows the end of an action is not used.
            for value in values:
                player.action.append(value)
                if value in stops or len(player.action) == player.allowed:
                    player.pending = [value]
                    writing[i] = False
                    with_action.append(player)
                    break
                player.length += 1
        if any(writing):
            hidden = read(tokens[-1])
    return hidden, with_action


def of_like_length(rows: list[int], length_of: Callable, most: int = 16384) -> list[list[int]]:
    """Rows in groups of like length, each of at most `most` tokens when padded."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=length_of):
        length = length_of(row)
        if (
            not groups
            or length * (len(groups[-1]) + 1) > most
            or length > 2 * length_of(groups[-1][0]) + 64
        ):
            groups.append([])
        groups[-1].append(row)
    return [sorted(group) for group in groups]


def episode_figures(episodes: list[Trajectory], env) -> dict:
    """success = reward >= 1; invalid: share of all actions; steps: mean turns.

    secondary: means of the world's other metrics (f1, ..). Episodes whose world failed
    (info["unplayable"]) are counted, not scored.
    """
    played = [episode for episode in episodes if not episode.info.get("unplayable")]
    if not played:
        failed = f"the world failed in all of {len(episodes)}; see the messages above"
        raise InputError(f"no episode to evaluate: {failed if episodes else 'there is no task'}")
    success = [float(episode.reward >= 1) for episode in played]
    reward = [episode.reward for episode in played]
    by_type = defaultdict(list)
    names = {}
    for episode, won in zip(played, success):
        by_type[env.task_type(episode.task_id)].append(won)
        names |= dict.fromkeys(episode.info)
    secondary = {}
    for name in names:
        if name not in ("invalid", "outgrown", "restarts"):
            values = [episode.info.get(name, 0.0) for episode in played]
            secondary[name] = float(np.mean(values))
    turns = max(1, sum(len(episode.steps) for episode in played))
    return {
        "success": float(np.mean(success)),
        "success_interval": bootstrap(success),
        "reward": float(np.mean(reward)),
        "reward_interval": bootstrap(reward),
        "tasks": len(played),
        "steps": turns / len(played),
        "invalid": sum(episode.info["invalid"] for episode in played) / turns,
        "truncated": sum(episode.truncated for episode in played),
        "outgrown": sum(episode.info.get("outgrown", 0) for episode in played),
        "unplayable": len(episodes) - len(played),
        "restarts": sum(episode.info.get("restarts", 0) for episode in episodes),
        "secondary": secondary,
        "by_type": {name: [float(np.mean(won)), len(won)] for name, won in sorted(by_type.items())},
    }
