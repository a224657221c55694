"""What StepAgent is compared with: the other rows of Table 2, and the reward types of Table 3. Skip it to read the method.

Each is a few phases of `main`: the agent plays the practised train tasks (`explore`), and learns from whole episodes.

    method  episodes a task           what is learnt from them                                        loss
    ppo     1, temperature 1          all actions; reward of the environment at the last one          clipped PPO, GAE with a value head
    dpo     1, temperature 1          pairs: the expert's trajectory over the agent's, whatever       trajectory DPO, eq. 6 with the
                                      the rewards; one round                                          log-probs of all actions summed
    spin    1, temperature 1          the same, three rounds, with the pairs of the round before      the same (its logistic loss)
    eto     1, explore_temperature    pairs where the rewards differ, the higher one chosen; a longer the same
                                      rejected one is cut to the chosen one's turns + 5; three rounds
    rft     4, explore_temperature    successes that differ, beside the expert's trajectories         SFT from the base model
    nat     4, explore_temperature    all that differ: successes and the expert's marked as such in   SFT from the base model
                                      the prompt, failures as failures; played with the first mark

Definitions follow the methods' own papers: SPIN (Chen et al., 2024; StepAgent's section 6.2 describes it as adding successes, which is
RFT), ETO (Song et al., 2024), RFT (Yuan et al., 2023), NAT (Wang et al., 2024). The reference of every DPO is the policy at the start of
the round. A trajectory that repeats the expert's word by word has no gradient and makes no pair.

`--method stepagent-inverse --reward both`: PPO on episodes as above, each action's reward being log D + log 2, clamped at +-log 2 (log D
alone, never positive, would reward an early end), scaled so that over the episodes the sum of an episode's step rewards and its final
reward have the same standard deviation; plus the final reward at the last action. D is the one of the practice actions, and judges here
states that it was not trained on.
"""
from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import Tensor

import losses
from heads import Head, fit, two_folds
from model import forget
from parallel import read_text, write_tensors
from rollout import Encoded, InputError, Step, Trajectory, encode, grouped, score, stable_seed, stop_ids

MARKS = {True: "What follows solves the task.", False: "What follows fails at the task."}


# ------------------------------------------------------------------------------------------------------------- the agent plays

def explore(learner, i: int) -> None:
    """The policy plays every practised train task; iter_<i>/episodes.jsonl keeps the episodes with their sampled ids."""
    c, run, started = learner.run.config, learner.run, time.time()
    learner.policy.eval()
    tasks = [learner.experts[j].task_id for j in learner.practised]
    learns_from_successes = c.method in ("rft", "nat")
    heat = c.explore_temperature if learns_from_successes or c.method == "eto" else c.temperature
    samples = c.samples or (4 if learns_from_successes else 1)
    episodes = [t for n in range(samples) for t in learner.play(tasks, f"iteration {i}: episodes {n + 1} of {samples}", learner.prompt, heat,
                                                               stable_seed(c.seed, "explore", i, n)) if t.steps and not t.info.get("unplayable")]
    if not episodes:
        raise InputError(f"iteration {i}: no episode came about: the world failed in all (see the messages above), or the prompt fills the context")
    learner.write_episodes(f"iter_{i}/episodes.jsonl", episodes, ids=True)
    reward = [t.reward for t in episodes]
    run.log("explore", i, 0, episodes=len(episodes), success=sum(r >= 1 for r in reward) / len(reward), reward=sum(reward) / len(reward),
            truncated=sum(t.truncated for t in episodes), tokens=sum(len(s.ids) for t in episodes for s in t.steps),
            seconds=time.time() - started)


def load_episodes(learner, i: int) -> list[Trajectory]:
    """Those of iteration i, with the ids that the policy sampled."""
    rows = map(json.loads, read_text(learner.run.path(f"iter_{i}/episodes.jsonl")).split("\n")[:-1])     # splitlines() cuts at U+2028, too
    return [Trajectory(r["task_id"], learner.prompt, [Step(s["observation"], s["action"], s["ids"]) for s in r["steps"]], r["reward"],
                       r["truncated"], last=r["last"]) for r in rows]


def score_pool(learner, pool: list[Encoded], label: str, features: bool) -> list[dict[str, Tensor]]:
    """One pass of the training forward over whole trajectories, shared among the ranks. Each gives: steps [n] summed log-probs of its
    actions, tokens [action tokens] log-probs; with features, state and action [n, d] hidden states."""
    run, rows = learner.run, {}
    mine = sorted(run.shares(range(len(pool)), lambda j: len(pool[j].ids))[run.rank], key=lambda j: len(pool[j].ids))
    learner.policy.eval()
    with run.bar(len(mine), label) as bar, torch.no_grad(), run.gathered(learner.policy), run.autocast():
        for micro in grouped(mine, lambda j: len(pool[j].ids), run.config.micro_tokens):
            scores = score(learner.policy, [pool[j] for j in micro])
            steps, tokens = [len(pool[j].spans) for j in micro], [sum(e - s for s, e in pool[j].spans) for j in micro]
            parts = {"steps": scores.trunk.split(steps), "tokens": scores.trunk_tokens.split(tokens)}
            if features:
                parts |= {"state": scores.state_hidden.float().split(steps), "action": scores.trunk_hidden.float().split(steps)}
            rows |= {j: {name: part[n].cpu().clone() for name, part in parts.items()} for n, j in enumerate(micro)}
            bar.update(len(micro))
    for part in run.gather(rows):
        rows |= part
    return [rows[j] for j in range(len(pool))]


# -------------------------------------------------------------------------------------------- pairs of trajectories: DPO, SPIN, ETO

def trajectory_pairs(learner, i: int) -> list[tuple[Encoded, Encoded]]:
    """(chosen, rejected)."""
    method, pairs = learner.run.config.method, []
    number = {learner.experts[j].task_id: j for j in learner.practised}
    for r in (i - 1, i) if method == "spin" and i > 1 else (i,):
        for t in load_episodes(learner, r):
            expert = learner.experts[number[t.task_id]]
            if method == "eto" and t.reward == expert.reward or text(t) == text(expert):
                continue
            both = [learner.data[number[t.task_id]], encode(t, learner.tokenizer)]
            chosen, rejected = both if method != "eto" or expert.reward > t.reward else both[::-1]
            most = len(chosen.spans) + 5
            if method == "eto" and len(rejected.spans) > most:
                rejected = replace(rejected, ids=rejected.ids[:rejected.spans[most - 1][1]], spans=rejected.spans[:most])
            pairs.append((chosen, rejected))
    return pairs


def text(t: Trajectory) -> tuple[str, ...]:
    return tuple(s.action.strip() for s in t.steps)


def pair(learner, i: int) -> None:
    """Reference log-probs of the pairs' trajectories, in iter_<i>/pairs.safetensors."""
    pairs = trajectory_pairs(learner, i)
    rows = score_pool(learner, [t for both in pairs for t in both], f"iteration {i}: reference", False)
    if learner.run.rank == 0:
        write_tensors(learner.run.path(f"iter_{i}/pairs.safetensors"),
                      {"reference": torch.tensor([row["steps"].sum() for row in rows]).view(-1, 2)})
    learner.run.log("pair", i, 0, pairs=len(pairs))


def reflect_pairs(learner, i: int) -> None:
    """DPO on pairs of whole trajectories: eq. 6 with the log-probs of all actions of each summed."""
    c, pairs = learner.run.config, trajectory_pairs(learner, i)
    reference = load_file(learner.run.path(f"iter_{i}/pairs.safetensors"))["reference"]            # [pairs, 2]

    def loss(micro, batch):
        both = [pairs[p][side] for side in (0, 1) for p in micro]
        scores = score(learner.policy, both)
        owner = torch.repeat_interleave(torch.tensor([len(t.spans) for t in both])).to(scores.trunk.device)
        chosen, rejected = scores.trunk.new_zeros(len(both)).index_add(0, owner, scores.trunk).split(len(micro))
        ref_chosen, ref_rejected = reference[micro].to(owner.device).unbind(1)
        return losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, c.beta, len(batch))

    batches = [b for epoch in range(c.epochs) for b in learner._shuffled(c.method, i, epoch, range(len(pairs)), c.batch)]
    learner._train(c.method, i, [chosen for chosen, _ in pairs], batches, loss, learner._falling(i, len(batches)),
                   lambda p: sum(len(t.ids) for t in pairs[p]))
    learner.save(f"iter_{i}/policy")


# -------------------------------------------------------------------------------------------- imitation of own episodes: RFT, NAT

def marked(prompt: list[dict], success: bool) -> list[dict]:
    """NAT: the prompt says whether what follows succeeds."""
    first, *rest = prompt or [{"role": "user", "content": ""}, {"role": "assistant", "content": "OK"}]
    return [first | {"content": f"{first['content']}\n\n{MARKS[success]}".strip()}, *rest]


def retrain(learner, i: int) -> None:
    """SFT from the base model, on the expert's trajectories and on what the agent's episodes add."""
    c, seen, own = learner.run.config, {(t.task_id, text(t)) for t in learner.experts}, []
    for t in load_episodes(learner, i):
        if (t.task_id, text(t)) not in seen and (c.method == "nat" or t.reward >= c.success):
            seen.add((t.task_id, text(t)))
            own.append(t)
    fits = lambda item: len(item.ids) <= learner.policy.config.max_position_embeddings
    if c.method == "nat":
        mark = lambda t, good: encode(replace(t, prompt=marked(learner.prompt, good)), learner.tokenizer)
        pool, added = [mark(t, True) for t in learner.experts], [mark(t, t.reward >= c.success) for t in own]
    else:
        pool, added = learner.data, [encode(t, learner.tokenizer) for t in own]
    if long := [item.task_id for item in pool if not fits(item)]:
        raise InputError(f"trajectory {long[0]} and NAT's mark are longer than the model's context; remove it from the expert data")
    own, added = [t for t, item in zip(own, added) if fits(item)], list(filter(fits, added))           # a mark may be one word too many
    learner.run.log("retrain", i, 0, expert_trajectories=len(learner.experts), own_trajectories=len(own),
                    own_successes=sum(t.reward >= c.success for t in own))
    forget(learner.run, learner.policy)
    learner.imitate(pool + added, f"iter_{i}/policy")


# ------------------------------------------------------------------------------------------------- PPO on whole episodes (Table 3)

def own_pool(learner, i: int) -> tuple[list[Trajectory], list[Encoded]]:
    """The episodes of iteration i. A truncated one gets its last state, as one more step whose action is the stop token alone: its value
    stands for what would have come, and the step is masked in every loss. Not where the context has no room."""
    stop, limit = min(stop_ids(learner.tokenizer)), learner.policy.config.max_position_embeddings
    episodes, pool = load_episodes(learner, i), []
    for t in episodes:
        longer = encode(replace(t, steps=[*t.steps, Step(t.last, "", [stop])]), learner.tokenizer) if t.truncated else None
        pool.append(longer if longer and len(longer.ids) <= limit else encode(t, learner.tokenizer))
    return episodes, pool


def judge(learner, i: int, reward: str) -> None:
    """Rewards, values and advantages of the agent's actions, in iter_<i>/advantages.safetensors. The value head sees the hidden state at
    the state's last token, never the action's; it is fitted to the returns, in two folds by task, each judged by the other's."""
    c, run, figures = learner.run.config, learner.run, defaultdict(float)
    episodes, pool = own_pool(learner, i)
    places = {learner.place[t.task_id] for t in episodes}
    if min(sum(x % 2 == fold for x in places) for fold in (0, 1)) < 2:
        raise InputError(f"episodes of {len(places)} tasks are too few for two value heads; give more train tasks")
    rows = score_pool(learner, pool, f"iteration {i}: values", True)
    n = [len(t.steps) for t in episodes]
    owner = torch.repeat_interleave(torch.tensor([len(t.spans) for t in pool]))                    # [S] episode of each step
    real = torch.cat([torch.arange(len(t.spans)) < k for t, k in zip(pool, n)])                    # [S] false: a truncated one's last state
    tasks = torch.tensor([learner.place[t.task_id] for t in episodes])[owner]
    states, actions = (torch.cat([row[name] for row in rows]) for name in ("state", "action"))
    final = torch.tensor([t.reward for t in episodes])
    rewards = torch.zeros(len(owner))
    if reward == "both":
        for fold in (0, 1):
            d, test = Head(actions.shape[1]), two_folds(tasks, fold)[2]
            d.load_state_dict(load_file(run.path(f"iter_{i}/discriminator_{fold}.safetensors")))
            with torch.no_grad():
                rewards[test] = (losses.step_reward(d(actions[test])) + math.log(2)).clamp(-math.log(2), math.log(2))
        rewards[~real] = 0
        sums = torch.zeros(len(pool)).index_add(0, owner, rewards)
        spread = [x.std(unbiased=False).item() for x in (final, sums)]
        rewards *= (spread[0] if spread[0] > 1e-3 else 1.0) / max(spread[1], 1e-6)
    ends = torch.tensor([len(t.spans) for t in pool]).cumsum(0)
    starts = ends - torch.tensor([len(t.spans) for t in pool])
    rewards[starts + torch.tensor(n) - 1] += final
    returns = torch.cat([losses.gae(rewards[a:b], torch.zeros(b - a), c.gamma, 1.0) for a, b in zip(starts.tolist(), ends.tolist())])
    values = torch.zeros(len(owner))
    for fold in (0, 1):
        v = Head.load_or_make(run.path(f"iter_{i - 1}/value_{fold}.safetensors"), states.shape[1], stable_seed(c.seed, "V", fold))
        learn, held, test = two_folds(tasks, fold)
        learn, held = learn[real[learn]], held[real[held]]                         # what comes after a cut was not seen: no target there
        fit(v, states[learn], lambda s: losses.value_loss(v(states[s]), returns[s])[0], learn, held, c.d_lr, stable_seed(c.seed, i, fold),
            figures, "value")
        with torch.no_grad():
            values[test] = v(states[test])
        if run.rank == 0:
            write_tensors(run.path(f"iter_{i}/value_{fold}.safetensors"), v.state_dict())
    advantages = torch.zeros(len(owner))
    for a, k, b, got in zip(starts.tolist(), n, ends.tolist(), final.tolist()):
        last = max(0.0, values[a + k].item() - got) if b > a + k else 0.0          # a truncated episode: what more would have come
        advantages[a:a + k] = losses.gae(rewards[a:a + k], values[a:a + k], c.gamma, c.gae_lambda, last)
    advantages[real] = losses.whiten(advantages[real])
    if run.rank == 0:
        write_tensors(run.path(f"iter_{i}/advantages.safetensors"), {
            "advantages": advantages, "real": real, "old_tokens": torch.cat([row["tokens"] for row in rows])})
    run.log("judge", i, 0, returns=returns[real].mean().item(), step_rewards=(rewards.sum() - final.sum()).item() / len(episodes),
            explained=1 - ((returns - values)[real].var() / returns[real].var().clamp(min=1e-6)).item(), **figures)


def reflect_episodes(learner, i: int) -> None:
    """Clipped PPO on the actions of whole episodes."""
    c, (episodes, pool) = learner.run.config, own_pool(learner, i)
    saved = load_file(learner.run.path(f"iter_{i}/advantages.safetensors"))
    lengths = [torch.tensor([e - s for s, e in t.spans]) for t in pool]
    steps = [len(t.spans) for t in pool]
    advantage, real = (saved[name].split(steps) for name in ("advantages", "real"))
    old = saved["old_tokens"].split([int(x.sum()) for x in lengths])

    def loss(micro, batch):
        scores = score(learner.policy, [pool[j] for j in micro], with_entropy=True)
        spread = lambda x: torch.cat([x[j].repeat_interleave(lengths[j]) for j in micro]).to(scores.trunk_tokens.device)
        count = sum(int(lengths[j][real[j]].sum()) for j in batch)
        mask, before = spread(real), torch.cat([old[j] for j in micro]).to(scores.trunk_tokens.device)
        total, info = losses.ppo_loss(scores.trunk_tokens, before, spread(advantage), mask, c.clip, count)
        entropy = (scores.trunk_entropy * mask).sum() / count                      # lambda H of eq. 8
        kl = (losses.kl_k3(scores.trunk_tokens, before) * mask).sum() / count
        return total - c.entropy * entropy + c.kl * kl, info | {"entropy": entropy.detach(), "kl": kl.detach()}

    batches = [b for n in range(c.ppo_passes)
               for b in learner._batches("episodes", (i, n), range(len(pool)), lambda j: len(episodes[j].steps))]
    learner._train(c.method, i, pool, batches, loss, learner._falling(i, len(batches)))
    learner.save(f"iter_{i}/policy")
