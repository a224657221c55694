"""StepAgent: LLM agent policy optimisation via step-wise reinforcement learning (WWW '25).

    python stepagent.py --model models/tiny-household --method stepagent-implicit --out runs/x
    torchrun --nproc_per_node 8 stepagent.py --env scienceworld --method stepagent-inverse \\
             --model meta-llama/Meta-Llama-3-8B-Instruct --out runs/y

`main` is Algorithm 1. The same command again continues a stopped run, to the same result (to the
bit on one CPU process; GPU kernels add up in no fixed order). Where the paper is silent or
contradicts itself we read it as follows; docs/readings.md gives the reasons.

 1. D = P(expert), trained by the usual cross-entropy; the reward log D rises with expert-likeness.
 2. D is trained on the iteration's data first, from 1/2 everywhere; then come the PPO steps.
 3. D scores the practice that it learnt from, as in Algorithm 1. log D is clamped at -5.
 4. D = p_phi / (p_phi + pi_i): phi is a copy of the policy, trained with eq. 11 end to end.
 5. The reference of eq. 6 is the policy at the start of the iteration, scored once and kept.
 6. Eq. 2 lacks the log that eq. 3 has: SFT is the mean NLL of action tokens, stop token included.
 7. Evaluation is greedy; practice samples at temperature 1, the only one for which PPO is right.
 8. Practice actions with the expert's text have no DPO gradient: their pairs are dropped.
 9. --batch counts (kept) step pairs. All pairs of a trajectory share one forward pass.
10. A practice action is a one-step episode: reward log D, baseline the state's other actions.
11. Reflection's learning rate falls along one cosine over all iterations; AdamW starts afresh.
12. beta is not given: 0.1 for real models, 1 for tiny, whose rates are a hundred times as high.
13. Preset tiny practises on demonstrations that SFT has not seen; preset real on SFT's own.
14. Table 3's `final` and `both` play whole episodes with a value head, GAE over turns.
15. Tables are cited as they are; SPIN is SPIN's own paper; ScienceWorld has ETO's test tasks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import baselines
import losses
from discriminator import (
    ActionValues,
    figures_of,
    logits_of,
    part_name,
    parts_of,
    phi_loss,
    read_log_d,
    reward_figures,
    save_logits,
    split_by_part,
)
from envs import env_options, make_env, some
from rollout import Scores, episode_figures, grouped, pass_tokens, practice, score
from system.experts import give_prompt, load_experts, product_files, read_prompt
from system.files import read_json, read_object, write_text
from system.model import load_policy, read_back, read_tokenizer, save_policy
from system.options import check_ranges, default
from system.options import parse as parse_options
from system.program import program
from system.ranks import Ranks
from system.run_dir import RunDir
from system.worlds import try_out
from training import (
    Agent,
    Demonstration,
    Practised,
    as_leaves,
    batches,
    cosine,
    imitate,
    imitation_loss,
    play,
    practice_figures,
    practised_from,
    read_practice,
    reflect,
    rounded,
    save_practice,
    score_all,
    took,
    train,
    write_episodes,
    write_practice,
)
from trajectory import Encoded, InputError, Trajectory, encode, parse_action, stop_ids

# ===================================================================================== Algorithm 1


def main(config: Config) -> None:
    method = METHODS[config.method]
    agent = prepare(config, method)  # line 1: expert trajectories T
    run = agent.run
    if method.imitates and not config.init:
        experts = [demonstration.encoded for demonstration in agent.sft_set]
        run.phase("sft", imitate, agent, experts, "sft/policy")  # line 2: pi_theta_0, eq. 2-3
    run.phase("eval_0", evaluate, agent, "eval_0", 0, config.eval_each)
    for i in range(1, agent.iterations + 1):  # line 5
        if not run.has_done(f"eval_{i}"):
            method.iteration(agent, i)  # lines 6-12
            run.phase(f"eval_{i}", evaluate, agent, f"eval_{i}", i, config.eval_each)
    run.phase("eval_final", evaluate, agent, "final", agent.iterations, config.eval_splits)
    run.phase("policy", agent.save, "policy")  # line 3, the output
    run.finish()
    run.say(f"finished: see {run.path('report.md')}")
    agent.ranks.finish()


def implicit(agent: Agent, i: int) -> None:
    """StepAgent-Implicit: practice at the expert's states, then step-wise DPO."""
    run = agent.run
    # Line 7, eq. 4-5.
    practised = run.phase(f"inspect_{i}", inspect, agent, i, reads=read_practice)
    # Eq. 6.
    run.phase(f"reflect_{i}", reflect_implicit, agent, i, practised)


def inverse(agent: Agent, i: int) -> None:
    """StepAgent-Inverse: practice, a discriminator of expert and agent, then PPO on log D."""
    run, reward = agent.run, agent.config.reward
    if reward == "final":
        baselines.ppo(agent, i)
        return
    # Line 7, eq. 4-5.
    practised = run.phase(f"inspect_{i}", inspect, agent, i, reads=read_practice)
    # Lines 10-11, eq. 11.
    for part in parts_of(agent.config):
        run.phase(part_name(f"discriminate_{i}", part), discriminate, agent, i, practised, part)
    log_d = read_log_d(agent, i, practised)
    if reward == "both":
        baselines.learn_from_episodes(agent, i, "both")
        return
    # Line 12, eq. 8 and 10.
    run.phase(f"reflect_{i}", reflect_inverse, agent, i, practised, log_d)


def sft_plus(agent: Agent, i: int) -> None:
    """SFT+, the control: continues SFT on the trajectories that a reflection would practise."""
    agent.run.phase(f"sft_plus_{i}", imitate_more, agent, i)


@dataclass
class Method:
    """A row of the tables."""

    # Iterations of Algorithm 1: the peak of the paper's Figure 4, or that of the method's paper.
    rounds: int
    # What an iteration does; none for base and sft.
    iteration: Callable[[Agent, int], None] | None
    # Options that this method reads, among those that not every method reads. Others are refused.
    reads: str
    imitates: bool = True
    # The agent plays the tasks of the expert trajectories.
    plays: bool = False
    # Trains again from the model before any imitation.
    starts_again: bool = False
    # What its policy is prompted with once it is trained.
    prompt: Callable[[list[dict]], list[dict]] | None = None


IMITATION = "sft_lr sft_batch sft_epochs warmup sft_experts grad_norm save_minutes "
REFLECTION = IMITATION + "lr batch epochs practice_experts "
ROUNDS = REFLECTION + "iterations "
RETRAIN = IMITATION + "practice_experts explore_temperature samples success"
PPO = "clip ppo_passes entropy kl temperature gamma gae_lambda value_lr samples "
DISCRIMINATOR = "d_lr d_epochs d_batch d_scores expert_in_group "

METHODS = {
    "base": Method(0, None, "", imitates=False),
    "sft": Method(0, None, IMITATION),
    "sft+": Method(3, sft_plus, ROUNDS + "practice match"),
    "ppo": Method(7, baselines.ppo, ROUNDS + PPO, plays=True),
    "dpo": Method(1, baselines.dpo, REFLECTION + "beta temperature samples", plays=True),
    "rft": Method(1, baselines.rft, RETRAIN, plays=True, starts_again=True),
    "spin": Method(3, baselines.spin, ROUNDS + "beta temperature samples", plays=True),
    "nat": Method(
        1, baselines.nat, RETRAIN, plays=True, starts_again=True, prompt=baselines.marked
    ),
    "eto": Method(3, baselines.eto, ROUNDS + "beta explore_temperature samples", plays=True),
    "stepagent-implicit": Method(3, implicit, ROUNDS + "practice temperature beta dpo_nll"),
    "stepagent-inverse": Method(7, inverse, ROUNDS + PPO + DISCRIMINATOR + "practice reward"),
}


@dataclass
class Config:
    """Every option, its default and its range. The comment above a field is its help text."""

    # ---- what to run
    # environment: household, scienceworld, alfworld, webshop, mind2web, hotpotqa, 2wikimultihopqa,
    # musique (`python envs.py --help` names the files that each needs), or path/to/file.py:Class
    env: str = "household"
    # options of the environment, as key=value words, e.g. 'tasks=boil,melt variations=20'
    env_options: str = ""
    # Hugging Face id or folder of a chat model; tiny: 1M parameters, random weights made here
    # (models/tiny-household: pretrained)
    model: str = "tiny"
    # which row of the tables
    method: str = "stepagent-implicit"
    # run directory; the same command again continues there
    out: str = "runs/default"
    # remove what an earlier run left in --out, and begin again
    restart: bool = False
    # seed of everything random
    seed: int = 0
    # folder of an SFT'd policy to start from, instead of running SFT
    init: str = ""
    # defaults for real models or for tiny ones; auto: by a field in the model's config.json
    preset: Literal["auto", "real", "tiny"] = "auto"

    # ---- expert data
    # file of expert trajectories (ETO's, AgentGym's, FireAct's, or our JSONL), instead of the
    # environment's own expert
    expert: str = ""
    # expert trajectories to use, 0 = all of the train split
    experts: int = default(0, tiny=1300, least=0)
    # at most how many of the expert trajectories SFT learns from (the first ones), 0 = all
    sft_experts: int = default(0, tiny=700, least=0)
    # at most how many of the expert trajectories are practised (the last ones), 0 = all
    practice_experts: int = default(0, tiny=600, least=0)
    # full: instruction and one-shot example; none: a model made from scratch needs neither. The
    # prompt of an expert file gets the example (full), or stands (none)
    prompt: Literal["full", "none"] = default("full", tiny="none")
    # learn also from trajectories of --expert whose tasks are in a test split
    train_on_test: bool = False
    # file with the prompt: JSON chat messages, or the instruction as plain text
    prompt_file: str = ""

    # ---- imitation, eq. 2-3
    # SFT learning rate (paper)
    sft_lr: float = default(1e-5, tiny=2e-3, least=0)
    # trajectories per SFT update (paper)
    sft_batch: int = default(64, tiny=8, least=1)
    # passes over the expert data (paper)
    sft_epochs: int = default(4, tiny=8, least=1)
    # share of SFT updates with rising rate (paper); then cosine
    warmup: float = default(0.03, least=0, most=1)

    # ---- inspection, eq. 4-5
    # iterations of Algorithm 1; -1 = the method's own (paper's peak: 3 implicit, 7 inverse)
    iterations: int = default(-1, tiny=2, least=-1)
    # K, practice actions per expert step (paper's peak)
    practice: int = default(3, least=1)
    # sampling temperature of practice, and of the episodes that ppo, dpo and spin learn from;
    # 0 = greedy
    temperature: float = default(1.0, least=0)

    # ---- reflection, eq. 6, 8-11
    # learning rate of reflection (paper), and of SFT+
    lr: float = default(5e-7, tiny=5e-5, least=0)
    # step pairs per update (paper); for ppo actions, for dpo, spin and eto trajectory pairs
    batch: int = default(16, tiny=64, least=1)
    # passes over the iteration's pairs (paper)
    epochs: int = default(1, least=1)
    # DPO temperature beta, eq. 6
    beta: float = default(0.1, tiny=1.0, above=0)
    # weight of the NLL of all expert actions in the batch, added to eq. 6 (paper: 0)
    dpo_nll: float = default(0.0, least=0)
    # Table 3: step = log D of practice actions; final = the environment's, of whole episodes; both
    reward: Literal["step", "final", "both"] = "step"
    # learning rate of the discriminator, a copy of the policy
    d_lr: float = default(2.5e-6, tiny=5e-4, least=0)
    # the discriminator's passes over the iteration's actions
    d_epochs: int = default(2, least=1)
    # practice actions per update of the discriminator
    d_batch: int = default(64, least=1)
    # the discriminator scores what it learnt from (Algorithm 1), or the other half of the tasks
    d_scores: Literal["learnt", "held-out"] = "learnt"
    # also train on the expert's action, with its own log D as reward (not in the paper)
    expert_in_group: bool = False
    # PPO clip range
    clip: float = default(0.2, above=0)
    # PPO passes over the iteration's practice actions
    ppo_passes: int = default(2, tiny=1, least=1)
    # lambda of eq. 8, weight of the entropy bonus
    entropy: float = default(0.01, least=0)
    # weight of KL(policy || reference) in PPO, k3 estimate
    kl: float = default(0.0, least=0)
    # run directory of another run: take the same trajectories in each update, so that the two
    # differ in loss and --lr only
    match: str = ""

    # ---- whole episodes (baselines, Table 3)
    # sampling temperature of the episodes that eto, rft and nat learn from (ETO)
    explore_temperature: float = default(0.7, least=0)
    # episodes played per train task; 0 = the method's own: 4 for rft and nat, 1 otherwise
    samples: int = default(0, least=0)
    # reward from which an episode counts as a success
    success: float = default(1.0, above=0, most=1)
    # discount
    gamma: float = default(1.0, least=0, most=1)
    # GAE's lambda
    gae_lambda: float = default(0.95, least=0, most=1)
    # learning rate of the value head
    value_lr: float = default(1e-4, tiny=1e-3, least=0)

    # ---- optimisation and memory
    # gradient norm is clipped to this
    grad_norm: float = default(1.0, above=0)
    # longest action, in tokens
    max_new_tokens: int = default(512, tiny=48, least=1)
    # compute type; master weights are always float32
    dtype: Literal["float32", "bfloat16"] = default("bfloat16", tiny="float32")
    # tokens per forward pass in training, scoring and practice prefill
    micro_tokens: int = default(8192, least=1)
    # practice actions decoded together at most; fewer where keys and values would not fit beside
    # the weights
    leaves: int = default(256, tiny=1024, least=1)
    # episodes played together
    episodes: int = default(32, tiny=300, least=1)
    # FSDP: weights, gradients and moments in pieces on the ranks; auto = where one device cannot
    # hold them
    shard: Literal["auto", "true", "false"] = "auto"
    # learn adapters of this rank on frozen weights, for one small GPU; 0 = all weights
    lora_rank: int = default(0, least=0)
    # minutes between checkpoints inside a phase that learns
    save_minutes: float = default(15.0, least=0)
    # recompute activations in the backward pass; auto = where the memory cannot hold them
    checkpointing: Literal["auto", "true", "false"] = default("auto", tiny="false")

    # ---- evaluation
    # splits evaluated at the end, separated by commas
    eval_splits: str = default("test", tiny="test,test_unseen")
    # splits evaluated after SFT and after every iteration; empty = none
    eval_each: str = "dev"
    # tasks per evaluated split, 0 = all
    eval_tasks: int = default(0, least=0)

    def __post_init__(self):
        check_ranges(self)


# ============================================================================ inspection, eq. 4-5


def inspect(agent: Agent, i: int) -> None:
    """Line 7, eq. 5: K practice actions at every expert step, with their log-probs."""
    config, run = agent.config, agent.run
    started = time.time()
    temperatures = [config.temperature] * config.practice
    label = f"iteration {i}: practice"
    practised = practise(agent, agent.practice_set, temperatures, label, i)
    if agent.ranks.rank > 0:
        return
    save_practice(agent, i, practised)
    write_practice(agent, i, practised)
    figures = practice_figures(agent, practised)
    run.log("inspect", i, 0, **figures, seconds=time.time() - started)
    run.say(
        f"inspect {i}: {sum(record.differs.numel() for record in practised)} practice actions, "
        f"{figures['match_text']:.1%} equal the expert's; {took(started)}"
    )


def practise(
    agent: Agent, demonstrations: list[Demonstration], temperatures: list[float], label: str, *seed
) -> list[Practised]:
    """An action at each temperature in every state of these demonstrations, on all ranks.

    seed: what the random numbers are drawn for, beside the task.
    """
    config, ranks = agent.config, agent.ranks
    copies = len(temperatures)
    shares = ranks.shares(demonstrations, lambda demo: expected_tokens(demo.encoded, copies))
    # Like lengths together: less padding.
    my_share = sorted(shares[ranks.rank], key=lambda demo: demo.encoded.tokens)
    by_task = {}
    with agent.generating(label, len(my_share)) as bar:
        for group in groups_that_fit(agent, my_share, copies):
            encoded = [demo.encoded for demo in group]
            seeds = [agent.seed(*seed, demo.task_id) for demo in group]
            actions = practice(
                agent.policy,
                encoded,
                copies,
                temperatures,
                config.max_new_tokens,
                stop_ids(agent.tokenizer),
                [torch.Generator().manual_seed(seed) for seed in seeds],
                config.micro_tokens,
            )  # eq. 5
            by_task |= score_practice(agent, group, actions)
            bar.update(len(group))
    for part in ranks.gather(by_task):
        by_task |= part
    # The demonstrations are put back in, in the caller's order.
    return [replace(by_task[demo.task_id], demonstration=demo) for demo in demonstrations]


def expected_tokens(encoded: Encoded, k: int) -> int:
    """What practice on a trajectory costs, before anything is sampled."""
    return encoded.tokens + k * encoded.action_tokens


def groups_that_fit(
    agent: Agent, demonstrations: list[Demonstration], copies: int
) -> list[list[Demonstration]]:
    """Trajectories whose practice is decoded together: at most --leaves, within the memory."""
    config, room = agent.config, agent.cache_room()

    def share(demo: Demonstration) -> float:
        leaves = len(demo.encoded.spans) * copies
        tokens = demo.encoded.tokens + leaves * config.max_new_tokens
        return max(leaves / config.leaves, tokens / room)

    return grouped(demonstrations, share, 1)


def score_practice(
    agent: Agent, group: list[Demonstration], actions: list[list[list[list[int]]]]
) -> dict[str, Practised]:
    """One scoring pass of pi_i: what later phases need, keyed by task."""

    def tokens_of(entry: tuple) -> int:
        demo, _, leaves = entry
        return pass_tokens(demo.encoded, leaves)

    entries = list(zip(group, actions, map(as_leaves, actions)))
    by_task = {}
    for micro in grouped(entries, tokens_of, agent.config.micro_tokens):
        demos, micro_actions, leaves = zip(*micro)
        scores = score(agent.policy, [demo.encoded for demo in demos], list(leaves))
        for demo, demo_actions, demo_scores in zip(demos, micro_actions, scores):
            record = practised_from(agent, demo, demo_actions, demo_scores)
            # Records travel between ranks without the demonstration, which every rank has.
            by_task[demo.task_id] = replace(record, demonstration=None)
    return by_task


# =========================================================== reflection with implicit reward, eq. 6


def reflect_implicit(agent: Agent, i: int, practised: list[Practised]) -> None:
    """Step-wise DPO on the pairs that differ."""
    config = agent.config

    def loss_of(micro: list[Practised], batch: list[Practised]):
        scores = score_practised(agent, micro)
        kept = sum(kept_pairs(record) for record in batch)
        loss, info = step_dpo_loss(scores, micro, config.beta, kept)
        # A pair of equal actions has margin 0 and is not won: only the denominator changes.
        all_pairs = sum(record.differs.numel() for record in batch)
        info["accuracy_all"] = info["accuracy"] * kept / all_pairs
        logps = torch.cat([now.trunk_tokens for now in scores])
        count = sum(record.encoded.action_tokens for record in batch)
        nll, figures = losses.sft_loss(logps, torch.ones_like(logps), count)
        if config.dpo_nll:
            loss = loss + config.dpo_nll * nll
        return loss, info | figures

    useful = [record for record in practised if config.dpo_nll or record.differs.any()]
    seeds = [agent.seed("implicit", i, epoch) for epoch in range(config.epochs)]
    reflect(agent, "implicit", i, batches(useful, kept_pairs, config.batch, seeds), loss_of)


def score_practised(agent: Agent, records: list[Practised], with_entropy=False) -> list[Scores]:
    """Expert and practice actions under the policy as it is now."""
    encoded = [record.encoded for record in records]
    return score(agent.policy, encoded, [record.leaves for record in records], with_entropy)


def step_dpo_loss(scores: list[Scores], practised: list[Practised], beta: float, pairs: int):
    """Eq. 6 over the step pairs of these trajectories that differ, divided by `pairs`."""
    parts = []
    for now, before in zip(scores, practised):
        device = now.trunk.device
        # [P] step and practice number of each pair that differs. They are made on the CPU, where
        # `differs` is: a mask on a GPU would make the host wait for its size.
        step, k = before.differs.nonzero().T
        ref_expert = before.ref_expert[step].to(device)
        ref_agent = before.ref_agent[step, k].to(device)
        step, k = step.to(device), k.to(device)
        agent = now.leaves.view(before.differs.shape)[step, k]
        parts.append(
            losses.dpo_loss(now.trunk[step], agent, ref_expert, ref_agent, beta, pairs)  # eq. 6
        )
    return losses.add_up(parts)


def kept_pairs(record: Practised) -> int:
    return int(record.differs.sum())


# ==================================================== reflection with inverse RL, eq. 8, 10 and 11


def discriminate(agent: Agent, i: int, practised: list[Practised], part: int | None) -> None:
    """Lines 10-11, eq. 11: trains D on expert and practice actions, and scores practice with it.

    The policy becomes phi, is saved as such, and is read back. part: which of the discriminators
    that --d-scores asks for.
    """
    config, run, ranks = agent.config, agent.run, agent.ranks
    started = time.time()
    if part is None:
        # One D, which scores what it learnt from (reading 3). It is tested on dev tasks.
        learnt = practised
        temperatures = [config.temperature] * config.practice
        label = f"iteration {i}: practice for D's test"
        dev_demos = agent.held_out("dev", agent.prompt, 100)
        held_out = practise(agent, dev_demos, temperatures, label, i)
    else:
        # It learns from one half of the tasks and scores the other.
        learnt, held_out = split_by_part(agent, practised, part)

    def loss_of(micro: list[Practised], batch: list[Practised]):
        return phi_loss(score_practised(agent, micro), micro, batch)  # eq. 11

    seeds = [agent.seed("D", i, part, epoch) for epoch in range(config.d_epochs)]
    shuffled = batches(learnt, lambda record: record.differs.numel(), config.d_batch, seeds)

    def rate_at(step: int) -> float:
        return config.d_lr * cosine(step / len(shuffled))

    name = part_name("discriminator", part)
    train(agent, name, i, shuffled, loss_of, rate_at)
    save_policy(run, agent.policy, agent.tokenizer, run.path(f"iter_{i}/{name}"))
    judged = learnt + held_out
    encoded, leaves = [record.encoded for record in judged], [record.leaves for record in judged]
    scores = score_all(agent, encoded, leaves, f"iteration {i}: D", "trunk leaves")
    read_back(run, agent.policy)

    logits = [logits_of(now, before) for now, before in zip(scores, judged)]
    learnt_logits, held_out_logits = logits[: len(learnt)], logits[len(learnt) :]
    # What PPO will use: of the tasks that it learnt from with one D, of the other half with two.
    save_logits(agent, i, part, learnt_logits if part is None else held_out_logits)
    ranks.barrier()
    figures = figures_of(learnt_logits, learnt, "learnt")
    figures |= figures_of(held_out_logits, held_out, "held_out")
    if part == parts_of(config)[-1]:
        log_d = read_log_d(agent, i, practised)
        figures |= reward_figures(log_d, practised)
        if ranks.rank == 0:
            write_practice(agent, i, practised, log_d)
    run.log("discriminate", i, 0, part=part, **figures, seconds=time.time() - started)
    aucs = [f"{figures['d_auc_learnt']:.3f} where it learnt"]
    if held_out:
        aucs.append(f"{figures['d_auc_held_out']:.3f} on unseen tasks")
    run.say(f"discriminate {i}: D's AUC is {', '.join(aucs)} (chance: 0.5); {took(started)}")


def reflect_inverse(
    agent: Agent, i: int, practised: list[Practised], log_d: list[ActionValues]
) -> None:
    """Line 12: clipped PPO on the practice actions, with reward log D (reading 10)."""
    config = agent.config
    # [S, K] a trajectory, or [S, 1 + K] with the expert's own action first.
    advantages = step_advantages(log_d, config.expert_in_group)
    on_tokens = {}
    for record, advantage in zip(practised, advantages):
        on_tokens[record.task_id] = advantage_on_tokens(record, advantage)

    def loss_of(micro: list[Practised], batch: list[Practised]):
        scores = score_practised(agent, micro, with_entropy=True)
        logps = torch.cat([now.leaf_tokens for now in scores])
        old = torch.cat([record.ref_agent_tokens for record in micro]).to(logps.device)
        practice_count = sum(len(record.ref_agent_tokens) for record in batch)
        # H and KL are over practice tokens only: pi_i sampled those, not the expert's action.
        entropy = sum(now.leaf_entropy.sum() for now in scores) / practice_count  # H of eq. 8
        kl = losses.kl_k3(logps, old).sum() / practice_count
        count = practice_count
        if config.expert_in_group:
            # Expert tokens first, then practice tokens, as in `advantage` below.
            expert_old = torch.cat([record.ref_expert_tokens for record in micro])
            old = torch.cat([expert_old.to(logps.device), old])
            logps = torch.cat([*(now.trunk_tokens for now in scores), logps])
            count += sum(len(record.ref_expert_tokens) for record in batch)
        on_expert, on_practice = zip(*(on_tokens[record.task_id] for record in micro))
        advantage = torch.cat([*on_expert, *on_practice]).to(logps.device)
        mask = torch.ones_like(old)
        loss, info = losses.ppo_loss(logps, old, advantage, mask, config.clip, count)  # line 12
        loss = loss - config.entropy * entropy + config.kl * kl  # lambda H of eq. 8
        return loss, info | {"entropy": entropy.detach(), "kl": kl.detach()}

    shuffled = []
    for ppo_pass in range(config.ppo_passes):
        seeds = [agent.seed("inverse", (i, ppo_pass), epoch) for epoch in range(config.epochs)]
        shuffled += batches(practised, lambda record: record.differs.numel(), config.batch, seeds)
    reflect(agent, "inverse", i, shuffled, loss_of)


def step_advantages(log_d: list[ActionValues], with_expert: bool = False) -> list[Tensor]:
    """[S, K] a trajectory: log D minus its baseline, whitened over all actions (reading 10).

    with_expert: the expert's action is one more of the state's group and comes first, [S, 1 + K].
    """
    reward = torch.cat([values.agent for values in log_d])  # [all S, K]
    if with_expert:
        expert = torch.cat([values.expert for values in log_d])
        reward = torch.cat([expert[:, None], reward], 1)
    k = reward.shape[1]
    baseline = reward.mean()
    if k > 1:
        # The mean of the state's other actions. One alone has none, and takes the mean of all.
        baseline = (reward.sum(1, keepdim=True) - reward) / (k - 1)
    advantage = losses.whiten((reward - baseline).flatten()).view(-1, k)
    return list(advantage.split([len(values.expert) for values in log_d]))


def advantage_on_tokens(record: Practised, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """An action's advantage on each of its tokens: [expert tokens or 0], [practice tokens].

    advantage: [S, K], or [S, 1 + K] with the expert's action first.
    """
    k = record.ref_agent.shape[1]
    lengths = torch.tensor([len(ids) for _, ids in record.leaves])
    of_agent = advantage[:, -k:].flatten().repeat_interleave(lengths)
    if advantage.shape[1] == k:
        return of_agent[:0], of_agent
    spans = torch.tensor([end - start for start, end in record.encoded.spans])
    return advantage[:, 0].repeat_interleave(spans), of_agent


# ============================================================================= control, evaluation


def imitate_more(agent: Agent, i: int) -> None:
    """SFT+: eq. 3 on the practised trajectories.

    In the updates of the run given by --match, or in as many as implicit reflection would take if
    no pair were dropped.
    """
    config = agent.config
    by_task = {demo.task_id: demo.encoded for demo in agent.practice_set}
    if config.match:
        shuffled = [[by_task[task] for task in batch] for batch in read_updates(config, i)]
    else:
        pool = list(by_task.values())
        seeds = [agent.seed("sft+", i, epoch) for epoch in range(config.epochs)]
        shuffled = batches(
            pool, lambda item: len(item.spans) * config.practice, config.batch, seeds
        )
    reflect(agent, "sft+", i, shuffled, imitation_loss(agent))


def evaluate(agent: Agent, name: str, iteration: int, splits: str) -> None:
    """Greedy episodes: success and mean reward with 95% bootstrap intervals over tasks."""
    config, run = agent.config, agent.run
    agent.policy.eval()
    prompt = agent.prompt
    method_prompt = METHODS[config.method].prompt
    if method_prompt and iteration > 0:
        prompt = method_prompt(prompt)
    for split in split_names(splits):
        started = time.time()
        tasks = some(agent.env.splits[split], config.eval_tasks)
        episodes = play(agent, tasks, f"{name}: {split}", prompt, 0.0, config.seed)
        write_episodes(agent, f"eval/{name}_{split}.jsonl", episodes)
        unparsed = 0
        for episode in episodes:
            unparsed += sum(parse_action(step.action) is None for step in episode.steps)
        figures = episode_figures(episodes, agent.env)
        figures |= agreement(agent, split, name, prompt)
        run.log("eval", iteration, 0, split=split, name=name, unparsed=unparsed, **figures)
        low, high = figures["success_interval"]
        agrees = ""
        if "expert_match" in figures:
            agrees = f", the expert's action in {figures['expert_match']:.1%}"
        run.say(
            f"{name}: success on {split} {figures['success']:.1%} [{low:.1%}, {high:.1%}] of "
            f"{figures['tasks']} tasks, reward {figures['reward']:.3f}{agrees}; "
            f"{took(started)}"
        )


def agreement(agent: Agent, split: str, name: str, prompt: list[dict]) -> dict:
    """How near the policy is to the expert at states of tasks that nobody learns from.

    expert_nll: nats of the expert's action. expert_match: how often the greedy action is the
    expert's; expert_match_sampled: a sampled one. Section 5 says that these distributions meet.
    """
    demonstrations = agent.held_out(split, prompt)
    if not demonstrations:
        return {}
    label = f"{name}: agreement on {split}"
    practised = practise(agent, demonstrations, [0.0, 1.0], label, "agreement", split)
    nll = torch.cat([-record.ref_expert for record in practised])
    match = ~torch.cat([record.differs for record in practised])  # [S, greedy and sampled]
    if agent.ranks.rank == 0:
        lines = []
        for record in practised:
            row = {"task_id": record.task_id, "nll": rounded(-record.ref_expert)}
            row |= {"match": (~record.differs[:, 0]).tolist()}
            lines.append(json.dumps(row) + "\n")
        write_text(agent.run.path(f"agreement/{name}_{split}.jsonl"), "".join(lines))
    greedy, sampled = match.float().mean(0).tolist()
    return {
        "expert_nll": nll.mean().item(),
        "expert_match": greedy,
        "expert_match_sampled": sampled,
        "expert_states": len(nll),
    }


def split_names(text: str) -> list[str]:
    """Without repetitions and the spaces around commas."""
    names = dict.fromkeys(name.strip() for name in text.split(","))
    return [name for name in names if name]


# ======================================================================================= setting up


def prepare(config: Config, method: Method) -> Agent:
    """Builds what the phases need. Input errors that can be found early are raised here."""
    check(config, method)
    ranks = Ranks()
    run = RunDir(config, ranks, product_files(config))
    env = make_env(config.env, **env_options(config.env_options))
    splits = check_inputs(config, env)
    plays = method.plays or config.reward != "step"
    experts = load_experts(run, env, plays)
    prompt = give_prompt(config, env, experts)
    policy, tokenizer = load_policy(run, experts, method.starts_again)
    demonstrations = encode_experts(run, experts, policy, tokenizer)
    if method.prompt:
        for expert in experts:
            marked = replace(expert, prompt=method.prompt(prompt))
            check_length(policy, encode(marked, tokenizer))
    agent = Agent(
        config=config,
        ranks=ranks,
        run=run,
        env=env,
        prompt=prompt,
        policy=policy,
        tokenizer=tokenizer,
        experts=demonstrations,
        iterations=rounds(config, method),
    )
    check_data(agent)
    try_worlds(agent, splits, plays)
    return agent


def check_inputs(config: Config, env) -> list[str]:
    """The splits to evaluate. What can be missing is looked for before hours are spent."""
    for model in {config.model, config.init} - {"tiny", ""}:
        read_tokenizer(model)
    if config.prompt_file:
        read_prompt(config.prompt_file)
    splits = split_names(f"{config.eval_splits},{config.eval_each}")
    for split in splits:
        if not env.splits.get(split):
            used = ", ".join(name for name, tasks in env.splits.items() if tasks)
            problem = "has no task in" if split in env.splits else "has no"
            raise InputError(f"{config.env} {problem} split {split!r}; use {used}")
    return splits


def try_worlds(agent: Agent, splits: list[str], plays: bool) -> None:
    """A turn in each kind of task that will be played, and the expert on the held-out tasks."""
    if agent.ranks.rank == 0 and not agent.run.state["done"]:
        played = [some(agent.env.splits[split], agent.config.eval_tasks) for split in splits]
        if plays:
            played.append([demo.task_id for demo in agent.practice_set])
        for tasks in played:
            try_out(agent.env, tasks, agent.experts[0].trajectory.steps[0].action)
    for split in splits:
        agent.held_out(split, agent.prompt)


def encode_experts(
    run: RunDir, experts: list[Trajectory], policy: nn.Module, tokenizer
) -> list[Demonstration]:
    """Says how many actions are longer than the agent may write. InputError beyond the context."""
    demonstrations, lengths = [], []
    for expert in run.bar(experts, "encode"):
        encoded = encode(expert, tokenizer)
        check_length(policy, encoded)
        demonstrations.append(Demonstration(expert, encoded))
        lengths += [end - start for start, end in encoded.spans]
    most = run.config.max_new_tokens
    if max(lengths) > most:
        longer = sum(length > most for length in lengths)
        run.say(
            f"{longer} of {len(lengths)} expert actions are longer than --max-new-tokens {most}: "
            f"the longest has {max(lengths)}"
        )
    return demonstrations


def check(config: Config, method: Method) -> None:
    if config.method in ("stepagent-inverse", "ppo") and config.temperature != 1:
        raise InputError(f"--temperature {config.temperature}: PPO's ratio needs 1; leave it out")
    if config.init and method.imitates and not method.iteration:
        raise InputError(f"--init: {config.method} would not learn from it; give it as --model")
    if config.lora_rank and config.init and method.starts_again:
        problem = f"{config.method} starts again from --model; leave out one"
        raise InputError(f"--lora-rank with --init: {problem}")
    if config.match:
        remedy = "give as --match the --out of a run"
        other = read_object(Path(config.match, "config.json"), remedy, config=dict)["config"]
        same = "env env_options expert experts practice_experts iterations"
        for name in same.split():
            if other.get(name) != getattr(config, name):
                raise InputError(
                    f"--match {config.match}: its --{name.replace('_', '-')} is "
                    f"{other.get(name)!r}, not {getattr(config, name)!r}; give this run the same"
                )


def check_data(agent: Agent) -> None:
    """InputError if a later phase would find its data too few or missing."""
    config = agent.config
    tasks = {demo.task_id for demo in agent.practice_set}
    fewest = 2 if config.d_scores == "held-out" else 1
    if config.method == "ppo" or config.reward != "step":
        # Two folds of two tasks, for the value heads.
        fewest = 4
    if len(tasks) < fewest:
        raise InputError(
            f"{len(tasks)} expert trajectories to practise are too few: {config.method} needs "
            f"{fewest} with these options; give more (--experts, --practice-experts)"
        )
    if config.match:
        for i in range(1, agent.iterations + 1):
            strange = set().union(*read_updates(config, i)) - tasks
            if strange:
                raise InputError(
                    f"--match {config.match}: {min(strange)!r} is none of this run's "
                    "trajectories; give this run the same expert data"
                )


def check_length(policy: nn.Module, encoded: Encoded) -> None:
    limit = policy.config.max_position_embeddings
    if encoded.tokens > limit:
        raise InputError(
            f"trajectory {encoded.task_id} has {encoded.tokens} tokens, the model's context is "
            f"{limit}; remove it from the expert data or take a model with a longer context"
        )


def read_updates(config: Config, i: int) -> list[list[str]]:
    """The tasks of each update of the run that --match names."""
    return read_json(Path(config.match, f"iter_{i}/batches.json"), "give as --match a finished run")


def rounds(config: Config, method: Method) -> int:
    """Iterations: the method's own, unless --iterations says otherwise."""
    chosen = "iterations" in method.reads and config.iterations >= 0
    return config.iterations if chosen else method.rounds


def parse(argv: list[str] | None = None) -> Config:
    """The options of a command line. Its help begins as this file's docstring does."""
    reads = {name: method.reads.split() for name, method in METHODS.items()}
    return parse_options(Config, argv, __doc__.partition("`main` is")[0], reads)


def command_line(argv: list[str] | None = None) -> None:
    program(lambda: main(parse(argv)))


if __name__ == "__main__":
    command_line()
