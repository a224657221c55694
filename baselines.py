"""The other rows of Tables 2 and 3. Skip this file to read the method.

In each, the agent plays the practised train tasks and learns from whole episodes.

    ppo     all actions, the environment's reward at the last one: clipped PPO, GAE, a value head
    dpo     the expert's trajectory over the agent's, whatever the rewards; one round
    spin    the same in three rounds, with the pairs of the round before (its loss is logistic)
    eto     pairs whose rewards differ, the higher one chosen; three rounds
    rft     successes that differ, beside the expert's trajectories: SFT from the base model
    nat     all that differ, marked in the prompt as success or failure: SFT from the base model

Definitions follow the methods' own papers: SPIN (Chen et al., 2024), ETO (Song et al., 2024), RFT
(Yuan et al., 2023), NAT (Wang et al., 2024). The reference of every DPO is the policy at the start
of the round. A trajectory that repeats the expert's word by word has no gradient: it makes no pair.

`--method stepagent-inverse --reward both` is PPO on episodes, too. Each action gets log D + log 2,
clamped at +-log 2, as log D alone, never positive, would reward an early end. It is scaled so that
an episode's step rewards and its final reward spread alike over the episodes. D is the one that the
iteration trained on practice.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import losses
from benchmarks.files import json_lines, read_contents
from discriminator import FOLDS, Head, fit, fold_of, part_name, parts_of, split_by_part
from rollout import score
from system.files import read_tensors, write_tensors
from system.model import forget, read_back, read_weights
from training import (
    Agent,
    batches,
    decoded_actions,
    imitate,
    play,
    reflect,
    score_all,
    took,
    write_episodes,
)
from trajectory import Encoded, InputError, Step, Trajectory, encode, stop_ids

# ------------------------------------------------------------------------------ one iteration each


def ppo(agent: Agent, i: int) -> None:
    learn_from_episodes(agent, i, "final")


def learn_from_episodes(agent: Agent, i: int, reward: str) -> None:
    """PPO on whole episodes; reward: final (Table 2's PPO) or both (Table 3)."""
    run = agent.run
    heat = agent.config.temperature
    run.phase(f"explore_{i}", explore, agent, i, heat, 1)
    run.phase(f"judge_{i}", judge, agent, i, reward)
    run.phase(f"reflect_{i}", reflect_episodes, agent, i)


def dpo(agent: Agent, i: int) -> None:
    agent.run.phase(f"explore_{i}", explore, agent, i, agent.config.temperature, 1)
    learn_from_pairs(agent, i, expert_over_agent(agent, i))


def spin(agent: Agent, i: int) -> None:
    agent.run.phase(f"explore_{i}", explore, agent, i, agent.config.temperature, 1)
    pairs = expert_over_agent(agent, i - 1) if i > 1 else []
    learn_from_pairs(agent, i, pairs + expert_over_agent(agent, i))


def eto(agent: Agent, i: int) -> None:
    agent.run.phase(f"explore_{i}", explore, agent, i, agent.config.explore_temperature, 1)
    learn_from_pairs(agent, i, higher_over_lower(agent, i))


def learn_from_pairs(agent: Agent, i: int, pairs: list[Pair]) -> None:
    run = agent.run
    pairs = run.phase(f"pair_{i}", score_pairs, agent, i, pairs, reads=read_reference)
    run.phase(f"reflect_{i}", reflect_pairs, agent, i, pairs)


def rft(agent: Agent, i: int) -> None:
    agent.run.phase(f"explore_{i}", explore, agent, i, agent.config.explore_temperature, 4)
    agent.run.phase(f"retrain_{i}", retrain, agent, i, False)


def nat(agent: Agent, i: int) -> None:
    agent.run.phase(f"explore_{i}", explore, agent, i, agent.config.explore_temperature, 4)
    agent.run.phase(f"retrain_{i}", retrain, agent, i, True)


# --------------------------------------------------------------------------------- the agent plays


def explore(agent: Agent, i: int, temperature: float, samples: int) -> None:
    """The policy plays every practised task; iter_<i>/episodes.jsonl keeps the sampled ids."""
    config = agent.config
    started = time.time()
    tasks = [demonstration.task_id for demonstration in agent.practice_set]
    samples = config.samples or samples
    episodes = []
    for number in range(samples):
        label = f"iteration {i}: episodes {number + 1} of {samples}"
        seed = agent.seed("explore", i, number)
        for episode in play(agent, tasks, label, agent.prompt, temperature, seed):
            if episode.steps and not episode.info.get("unplayable"):
                episodes.append(episode)
    if not episodes:
        problem = "the world failed in all (see above), or the prompt fills the context"
        raise InputError(f"iteration {i}: no episode could be played: {problem}")
    write_episodes(agent, f"iter_{i}/episodes.jsonl", episodes, ids=True)
    rewards = [episode.reward for episode in episodes]
    tokens = 0
    for episode in episodes:
        tokens += sum(len(step.ids) for step in episode.steps)
    success = sum(reward >= 1 for reward in rewards) / len(rewards)
    agent.run.log(
        "explore",
        i,
        0,
        episodes=len(episodes),
        success=success,
        reward=sum(rewards) / len(rewards),
        truncated=sum(episode.truncated for episode in episodes),
        tokens=tokens,
        seconds=time.time() - started,
    )
    agent.run.say(f"explore {i}: {len(episodes)} episodes, success {success:.1%}; {took(started)}")


def read_episodes(agent: Agent, i: int) -> list[Trajectory]:
    """Those of iteration i, with the ids that the policy sampled."""
    episodes = []
    path = str(agent.run.path(f"iter_{i}/episodes.jsonl"))
    for _, row in json_lines(read_contents(path, "put it back"), path):
        steps = [Step(turn["observation"], turn["action"], turn["ids"]) for turn in row["steps"]]
        episodes.append(
            Trajectory(
                row["task_id"],
                agent.prompt,
                steps,
                row["reward"],
                row["truncated"],
                last=row["last"],
            )
        )
    return episodes


# ------------------------------------------------------------ pairs of trajectories: DPO, SPIN, ETO


@dataclass
class Pair:
    """Two trajectories of one task; the reference's log-probs of each, summed over its actions."""

    chosen: Encoded
    rejected: Encoded
    ref_chosen: float = 0.0
    ref_rejected: float = 0.0

    @property
    def encoded(self) -> Encoded:
        return self.chosen

    @property
    def task_id(self) -> str:
        return self.chosen.task_id

    @property
    def tokens(self) -> int:
        return self.chosen.tokens + self.rejected.tokens


def expert_over_agent(agent: Agent, i: int) -> list[Pair]:
    """DPO and SPIN: the expert's trajectory is chosen, whatever the rewards."""
    experts = {demonstration.task_id: demonstration for demonstration in agent.practice_set}
    pairs = []
    for episode in read_episodes(agent, i):
        expert = experts[episode.task_id]
        if action_texts(episode) != decoded_actions(agent, expert.encoded):
            pairs.append(Pair(expert.encoded, encode(episode, agent.tokenizer)))
    return pairs


def higher_over_lower(agent: Agent, i: int, longer: int = 5) -> list[Pair]:
    """ETO: where rewards differ, the higher one is chosen.

    A longer rejected trajectory is cut to the chosen one's turns + 5.
    """
    experts = {demonstration.task_id: demonstration for demonstration in agent.practice_set}
    pairs = []
    for episode in read_episodes(agent, i):
        expert = experts[episode.task_id]
        same_text = action_texts(episode) == decoded_actions(agent, expert.encoded)
        if episode.reward == expert.trajectory.reward or same_text:
            continue
        chosen, rejected = expert.encoded, encode(episode, agent.tokenizer)
        if expert.trajectory.reward < episode.reward:
            chosen, rejected = rejected, chosen
        most = len(chosen.spans) + longer
        if len(rejected.spans) > most:
            end = rejected.spans[most - 1][1]
            rejected = replace(rejected, ids=rejected.ids[:end], spans=rejected.spans[:most])
        pairs.append(Pair(chosen, rejected))
    return pairs


def action_texts(trajectory: Trajectory) -> tuple[str, ...]:
    """Those of an episode, which were read off tokens when it was played."""
    return tuple(step.action.strip() for step in trajectory.steps)


def score_pairs(agent: Agent, i: int, pairs: list[Pair]) -> None:
    """Reference log-probs of both trajectories of each pair, in iter_<i>/pairs.safetensors."""
    pool = []
    for pair in pairs:
        pool += [pair.chosen, pair.rejected]
    scores = score_all(agent, pool, None, f"iteration {i}: reference", "trunk")
    if agent.ranks.rank == 0:
        sums = torch.tensor([now.trunk.sum() for now in scores]).view(-1, 2)
        write_tensors(agent.run.path(f"iter_{i}/pairs.safetensors"), {"reference": sums})
    agent.run.log("pair", i, 0, pairs=len(pairs))


def read_reference(agent: Agent, i: int, pairs: list[Pair]) -> list[Pair]:
    saved = read_tensors(agent.run.path(f"iter_{i}/pairs.safetensors"))
    reference = saved["reference"].tolist()
    return [replace(pair, ref_chosen=a, ref_rejected=b) for pair, (a, b) in zip(pairs, reference)]


def reflect_pairs(agent: Agent, i: int, pairs: list[Pair]) -> None:
    """DPO on pairs of whole trajectories: eq. 6 with the log-probs of all actions summed."""
    config = agent.config

    def loss_of(micro: list[Pair], batch: list[Pair]):
        both = [pair.chosen for pair in micro] + [pair.rejected for pair in micro]
        sums = torch.stack([now.trunk.sum() for now in score(agent.policy, both)])
        chosen, rejected = sums.split(len(micro))
        ref_chosen = torch.tensor([pair.ref_chosen for pair in micro], device=sums.device)
        ref_rejected = torch.tensor([pair.ref_rejected for pair in micro], device=sums.device)
        return losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta, len(batch))

    shuffled = []
    for epoch in range(config.epochs):
        seed = agent.seed(config.method, i, epoch)
        shuffled += batches(pairs, lambda pair: 1, config.batch, [seed])
    reflect(agent, config.method, i, shuffled, loss_of)


# -------------------------------------------------------------- imitation of own episodes: RFT, NAT


def new_episodes(agent: Agent, episodes: list[Trajectory]) -> list[Trajectory]:
    """Those whose actions repeat neither an expert's nor an earlier episode's."""
    seen = set()
    for demonstration in agent.experts:
        seen.add((demonstration.task_id, decoded_actions(agent, demonstration.encoded)))
    new = []
    for episode in episodes:
        key = (episode.task_id, action_texts(episode))
        if key not in seen:
            seen.add(key)
            new.append(episode)
    return new


def retrain(agent: Agent, i: int, with_mark: bool) -> None:
    """SFT from the base model, on the expert's trajectories and on new ones of the agent's own.

    RFT: on new successes. NAT (with_mark): on failures, too; the prompt says what follows.
    """

    def encoded(trajectory: Trajectory, success: bool) -> Encoded:
        if with_mark:
            trajectory = replace(trajectory, prompt=marked(agent.prompt, success))
        return encode(trajectory, agent.tokenizer)

    def succeeds(episode: Trajectory) -> bool:
        return episode.reward >= agent.config.success

    experts = [encoded(demo.trajectory, True) for demo in agent.experts]
    episodes = read_episodes(agent, i)
    if not with_mark:
        episodes = list(filter(succeeds, episodes))
    own, successes = [], 0
    for episode in new_episodes(agent, episodes):
        item = encoded(episode, succeeds(episode))
        # NAT's mark may make a trajectory too long for the model's context.
        if fits(agent, item):
            own.append(item)
            successes += succeeds(episode)
    figures = {"own_trajectories": len(own), "own_successes": successes}
    agent.run.log("retrain", i, 0, expert_trajectories=len(experts), **figures)
    forget(agent.run, agent.policy)
    imitate(agent, experts + own, f"iter_{i}/policy")


def fits(agent: Agent, item: Encoded) -> bool:
    return item.tokens <= agent.policy.config.max_position_embeddings


def marked(prompt: list[dict], success: bool = True) -> list[dict]:
    """NAT's mark at the end of the prompt's first message; that of success is played with."""
    mark = "What follows solves the task." if success else "What follows fails at the task."
    if not prompt:
        prompt = [{"role": "user", "content": ""}, {"role": "assistant", "content": "OK"}]
    first, *rest = prompt
    return [first | {"content": f"{first['content']}\n\n{mark}".strip()}, *rest]


# ------------------------------------------------------------------ PPO on whole episodes (Table 3)


@dataclass
class Played:
    """One episode of the agent's own, n steps.

    A truncated one gets its last state as one more step, whose action is the stop token alone. Its
    value stands for what would have come; it is masked in every loss. There is none where the
    context has no room for it.
    """

    episode: Trajectory
    encoded: Encoded
    # [n or n + 1] each, set by judge.
    advantage: Tensor | None = None
    old_tokens: Tensor | None = None

    @property
    def task_id(self) -> str:
        return self.episode.task_id

    @property
    def tokens(self) -> int:
        return self.encoded.tokens

    @property
    def steps(self) -> int:
        return len(self.episode.steps)

    @property
    def real(self) -> Tensor:
        """[n or n + 1] False for a truncated episode's last state."""
        return torch.arange(len(self.encoded.spans)) < self.steps

    @property
    def lengths(self) -> Tensor:
        """Tokens of each action."""
        return torch.tensor([end - start for start, end in self.encoded.spans])

    def on_tokens(self, values: Tensor) -> Tensor:
        """A value a step -> a value a token."""
        return values.repeat_interleave(self.lengths)


def read_played(agent: Agent, i: int) -> list[Played]:
    stop = min(stop_ids(agent.tokenizer))
    played = []
    for episode in read_episodes(agent, i):
        encoded = encode(episode, agent.tokenizer)
        if episode.truncated:
            last_state = Step(episode.last, "", [stop])
            longer = replace(episode, steps=[*episode.steps, last_state])
            longer = encode(longer, agent.tokenizer)
            if fits(agent, longer):
                encoded = longer
        played.append(Played(episode, encoded))
    return played


def judge(agent: Agent, i: int, reward: str) -> None:
    """Rewards, values and advantages of the agent's actions, in iter_<i>/advantages.safetensors."""
    config, run = agent.config, agent.run
    played = read_played(agent, i)
    place = agent.fold_places()
    places = {place[record.task_id] for record in played}
    if min(sum(number % 2 == fold for number in places) for fold in FOLDS) < 2:
        problem = "tasks are too few for two value heads; give more train tasks"
        raise InputError(f"episodes of {len(places)} {problem}")
    fields = "trunk trunk_tokens state_hidden"
    encoded = [record.encoded for record in played]
    scores = score_all(agent, encoded, None, f"iteration {i}: values", fields)
    sizes = [len(record.encoded.spans) for record in played]
    # One entry a step, of all episodes: [S].
    places = torch.tensor([place[record.task_id] for record in played])
    places = places.repeat_interleave(torch.tensor(sizes))
    real = torch.cat([record.real for record in played])
    rewards = torch.zeros(len(real))
    if reward == "both":
        rewards = step_rewards(agent, i, played, [now.trunk for now in scores])
        rewards[~real] = 0
        rewards *= scale_like_final(rewards.split(sizes), played)
    step_sum = rewards.sum().item()
    for record, on_steps in zip(played, rewards.split(sizes)):
        on_steps[record.steps - 1] += record.episode.reward

    returns = []
    for on_steps in rewards.split(sizes):
        returns.append(losses.gae(on_steps, torch.zeros_like(on_steps), config.gamma, 1.0))
    returns = torch.cat(returns)
    states = torch.cat([now.state_hidden for now in scores])
    values, figures = fit_values(agent, i, states, returns, places, real)
    advantages = episode_advantages(agent, played, rewards.split(sizes), values.split(sizes))
    advantages[real] = losses.whiten(advantages[real])
    if agent.ranks.rank == 0:
        tensors = {
            "advantages": advantages,
            "old_tokens": torch.cat([now.trunk_tokens for now in scores]),
        }
        write_tensors(run.path(f"iter_{i}/advantages.safetensors"), tensors)
    unexplained = (returns - values)[real].var() / returns[real].var().clamp(min=1e-6)
    run.log(
        "judge",
        i,
        0,
        returns=returns[real].mean().item(),
        step_rewards=step_sum / len(played),
        explained=1 - unexplained.item(),
        **figures,
    )


def step_rewards(agent: Agent, i: int, played: list[Played], before: list[Tensor]) -> Tensor:
    """log D + log 2 of each action, within +-log 2; before: its log-prob by pi_i. -> [S]"""
    most = math.log(2)
    run = agent.run
    logps = {}
    for part in parts_of(agent.config):
        _, scored = split_by_part(agent, played, part)
        name = part_name("discriminator", part)
        read_weights(run, agent.policy, run.path(f"iter_{i}/{name}"))
        encoded = [record.encoded for record in scored]
        scores = score_all(agent, encoded, None, f"iteration {i}: D on episodes", "trunk")
        # A task may have several episodes.
        logps |= {id(record): now.trunk for record, now in zip(scored, scores)}
    read_back(run, agent.policy)
    logits = [logps[id(record)] - old for record, old in zip(played, before)]
    return (losses.step_reward(torch.cat(logits)) + most).clamp(-most, most)


def scale_like_final(rewards: tuple[Tensor, ...], played: list[Played]) -> float:
    """The factor that gives an episode's summed step rewards the final rewards' deviation."""
    final = torch.tensor([record.episode.reward for record in played]).std(unbiased=False).item()
    summed = torch.stack([on_steps.sum() for on_steps in rewards]).std(unbiased=False).item()
    return (final if final > 1e-3 else 1.0) / max(summed, 1e-6)


def fit_values(
    agent: Agent, i: int, states: Tensor, returns: Tensor, places: Tensor, real: Tensor
) -> tuple[Tensor, dict]:
    """V of every state, by heads fitted to the returns in two folds. [S, d], [S] -> [S], figures.

    The head reads the hidden state at the state's last token, never the action's.
    """
    run, device = agent.run, agent.ranks.device
    values = torch.zeros(len(returns))
    states, returns = states.to(device), returns.to(device)
    figures = []
    for number in FOLDS:
        before = run.path(f"iter_{i - 1}/value_{number}.safetensors")
        head = Head.load_or_make(before, states.shape[1], agent.seed("V", number)).to(device)
        fold = fold_of(places, number)
        # The state after a cut has no return to learn from.
        fold.learn = fold.learn[real[fold.learn]]
        fold.held_out = fold.held_out[real[fold.held_out]]
        figures.append(fit_value(head, states, returns, fold, agent, agent.seed(i, number)))
        with torch.no_grad():
            values[fold.judge] = head(states[fold.judge]).cpu()
        if agent.ranks.rank == 0:
            write_tensors(run.path(f"iter_{i}/value_{number}.safetensors"), head.state_dict())
    means = {}
    for name in figures[0]:
        means[f"value_{name}"] = sum(of_fold[name] for of_fold in figures) / len(figures)
    return values, means


def fit_value(head: Head, states: Tensor, returns: Tensor, fold, agent: Agent, seed: int) -> dict:
    def loss_on(steps: Tensor) -> Tensor:
        return losses.value_loss(head(states[steps]), returns[steps])[0]

    return fit(head, states[fold.learn], loss_on, fold, agent.config.value_lr, seed)


def episode_advantages(agent: Agent, played: list[Played], rewards, values) -> Tensor:
    """GAE over the turns of each episode; rewards, values: [n or n + 1] an episode. -> [S]."""
    config = agent.config
    advantages = []
    for record, reward, value in zip(played, rewards, values):
        steps = record.steps
        advantage = torch.zeros_like(value)
        last_value = 0.0
        if len(value) > steps:
            # A truncated episode: what more would have come.
            last_value = max(0.0, value[steps].item() - record.episode.reward)
        advantage[:steps] = losses.gae(
            reward[:steps], value[:steps], config.gamma, config.gae_lambda, last_value
        )
        advantages.append(advantage)
    return torch.cat(advantages)


def read_advantages(agent: Agent, i: int) -> list[Played]:
    """The episodes with what judge has saved of them."""
    played = read_played(agent, i)
    saved = read_tensors(agent.run.path(f"iter_{i}/advantages.safetensors"))
    advantages = saved["advantages"].split([len(record.encoded.spans) for record in played])
    old_tokens = saved["old_tokens"].split([record.encoded.action_tokens for record in played])
    for record, advantage, old in zip(played, advantages, old_tokens):
        record.advantage, record.old_tokens = advantage, old
    return played


def reflect_episodes(agent: Agent, i: int) -> None:
    """Clipped PPO on the actions of whole episodes."""
    config = agent.config
    played = read_advantages(agent, i)

    def loss_of(micro: list[Played], batch: list[Played]):
        scores = score(agent.policy, [record.encoded for record in micro], with_entropy=True)
        logps = torch.cat([now.trunk_tokens for now in scores])
        entropies = torch.cat([now.trunk_entropy for now in scores])
        mask = torch.cat([record.on_tokens(record.real) for record in micro]).to(logps.device)
        old = torch.cat([record.old_tokens for record in micro]).to(logps.device)
        advantage = torch.cat([record.on_tokens(record.advantage) for record in micro]).to(
            logps.device
        )
        count = sum(int(record.lengths[record.real].sum()) for record in batch)
        loss, info = losses.ppo_loss(logps, old, advantage, mask, config.clip, count)
        entropy = (entropies * mask).sum() / count  # lambda H of eq. 8
        kl = (losses.kl_k3(logps, old) * mask).sum() / count
        loss = loss - config.entropy * entropy + config.kl * kl
        return loss, info | {"entropy": entropy.detach(), "kl": kl.detach()}

    shuffled = []
    for ppo_pass in range(config.ppo_passes):
        seeds = [agent.seed("episodes", (i, ppo_pass), epoch) for epoch in range(config.epochs)]
        shuffled += batches(played, lambda record: record.steps, config.batch, seeds)
    reflect(agent, config.method, i, shuffled, loss_of)
