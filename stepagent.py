"""StepAgent: LLM agent policy optimisation via step-wise reinforcement learning (WWW '25), from scratch.

    python stepagent.py --env household --model models/tiny-household --method stepagent-implicit --out runs/x
    torchrun --nproc_per_node 8 stepagent.py --env scienceworld --model HuggingFaceTB/SmolLM2-1.7B-Instruct \\
             --method stepagent-inverse --out runs/y

`main` is Algorithm 1; what StepAgent is compared with lives in compared.py. The same command again continues a stopped run, to the same
result (to the bit on one CPU process; GPU kernels add up in no fixed order). Where the paper is silent or contradicts itself, we read
it as follows:

 1. Sign of D. D = P(expert). Eq. 11 minimised as it stands is unbounded; D minimises the cross-entropy -E_expert[log D] -
    E_agent[log(1 - D)] and the reward is log D, which rises with expert-likeness. Eq. 9-10 label D the other way round (log D a
    cost); their saddle point would give the reward -log(1 - D), so section 5's JS argument does not carry over to log D as it is.
 2. Order. Lines 9-12 alternate D and policy batch by batch. We train D on the iteration's data first and take the PPO steps then:
    D is useful before it is trusted. D is warm-started across iterations.
 3. D never scores what it was trained on: two folds by task, each scored by the D of the other; log D is clamped at -5.
 4. D's architecture is not given: a small MLP on a frozen feature of (s, a), the last hidden state at the action's final token. The
    action's log-prob is left out on purpose. The agent's samples are what it thinks probable, the expert's actions need not be, so a
    D that sees it learns "improbable = expert", and its reward ranks a state's actions against the expert (experiments/NOTES.md).
 5. Reference of eq. 6 = the policy at the start of the iteration. No second model is loaded: reference log-probs and features come
    from one pass of the training forward, kept with the practice actions.
 6. Eq. 2 lacks the log that eq. 3 has: SFT is the mean negative log-prob of action tokens, the stop token included.
 7. Decoding. Section 6.4 says greedy, but K > 1 practice actions need samples: evaluation is greedy, practice samples at
    temperature 1. PPO refuses any other temperature, as its ratio would be wrong. For DPO greedy practice is one-sided: where the
    agent's favourite is right the pair is dropped, so the favourite only ever loses, however often it is right.
 8. Equal actions. A practice action with the expert's text (and tokens) has no DPO gradient; such pairs are dropped before batches
    are counted. Discriminator and PPO keep them. Their share, over all practice, is match_text (match_action: parsed actions).
 9. Batch unit. `batch` counts (kept) step pairs, as the paper's data points are step-wise. All pairs of a trajectory share one
    forward pass, so shuffled trajectories are added until the count is reached, and the loss is divided by the true count.
10. PPO with step rewards. Each practice action is a one-step episode with reward log D; baseline: mean reward of the state's other
    K - 1 practice actions (K = 1: of all); advantages whitened over all actions of the iteration; ratio and clip per token.
    The entropy bonus is the exact token entropy on practice tokens, eq. 8's causal entropy without its future term.
11. Rates. The paper gives no schedule for reflection: the rate falls to zero along a cosine over all iterations together, so the
    third of nine iterations is not the end of a run of three. AdamW starts afresh in every phase.
12. beta is not given. As practice is drawn from the reference itself, eq. 6 has its optimum where pi is proportional to
    pi_ref (p_expert / pi_ref)^(1 / beta), and its expected gradient at the reference is SFT's on the same states (tests show both).
    Among states that the model cannot tell apart the expert looks random; there beta = 1 aims at what it does, and a smaller beta
    beyond it. Real models have the usual 0.1 with the paper's 5e-7; `tiny`, at rates a hundred times as high, has 1.
13. The paper practises the trajectories that SFT learnt from. `tiny` memorises those, and practice would only repeat them: there SFT
    takes the first 700 and practice the last 600 (--sft-experts, --practice-experts). Real models keep the paper's one set.
14. Table 3's `final` and `both` play whole episodes (compared.py says how rewards are made): GAE over turns, a truncated episode is
    bootstrapped, the value head reads the state's last token, never the action's. `--method ppo` is the same code with `final`.
15. Table 3's `final` row equals Table 2's ETO row for Llama-3 digit for digit, and section 7.2's 67.2 and 63.6 are StepAgent-Implicit's
    scores: we cite the tables as they are. SPIN is described as adding successful trajectories; we implement SPIN's own paper.
    ScienceWorld's test split has 241 tasks in the paper, 211 in ETO's index file.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import compared
import losses
from envs import env_options, load_trajectories, make_env, parse_action, prompt_messages, save_trajectories, some
from heads import Head, fit, two_folds
from model import load_policy, save_policy
from parallel import Run, program, read_text, write_tensors, write_text
from rollout import (Encoded, InputError, Trajectory, encode, episode_figures, grouped, practice, run_episodes, score, shared,
                     stable_seed, stop_ids)

ROUNDS = {"base": 0, "sft": 0, "sft+": 3, "ppo": 7, "dpo": 1, "rft": 1, "spin": 3, "nat": 1, "eto": 3,         # method -> iterations
          "stepagent-implicit": 3, "stepagent-inverse": 7}                                                     # (the paper's peaks)


def option(default, help: str, tiny=None, choices=None):
    """A field of Config: its default for real models, and the one for `--model tiny` where that differs."""
    return dataclasses.field(default=default, metadata={"help": help, "tiny": default if tiny is None else tiny, "choices": choices})


@dataclass
class Config:
    # what
    env: str = option("household", "environment: household, scienceworld, alfworld, webshop, mind2web, hotpotqa, 2wikimultihopqa, musique; "
                                "`python envs.py --help` names the files that each needs")
    env_options: str = option("", "options of the environment, as key=value words, e.g. 'tasks=boil,melt variations=20'")
    model: str = option("tiny", "Hugging Face id or folder of a Llama, Mistral, Qwen2 or Qwen3 chat model; tiny: 1M parameters, "
                                "random weights made here (models/tiny-household: pretrained); a folder whose name begins with "
                                "tiny has the tiny defaults, too")
    method: str = option("stepagent-implicit", "which row of the table", choices=tuple(ROUNDS))
    reward: str = option("step", "stepagent-inverse only (Table 3): step = log D of practice actions; final = the environment's, of whole "
                                 "episodes; both. ppo is stepagent-inverse with final", choices=("step", "final", "both"))
    out: str = option("runs/default", "run directory; the same command again continues there")
    seed: int = option(0, "seed of everything random")
    init: str = option("", "folder of an SFT'd policy to start from, instead of running SFT")
    # expert data
    expert: str = option("", "file of expert trajectories (ETO's JSON, FireAct's, or our JSONL), instead of the environment's own expert")
    experts: int = option(0, "expert trajectories to use, 0 = all of the train split", tiny=1300)
    sft_experts: int = option(0, "of these, at most how many SFT learns from (the first ones), 0 = all", tiny=700)
    practice_experts: int = option(0, "of these, at most how many are practised (the last ones), 0 = all", tiny=600)
    prompt: str = option("full", "full: instruction and one-shot example; none: a model made from scratch needs neither", tiny="none",
                         choices=("full", "none"))
    # imitation, eq. 2-3
    sft_lr: float = option(1e-5, "SFT learning rate (paper)", tiny=2e-3)
    sft_batch: int = option(64, "trajectories per SFT update (paper)", tiny=8)
    sft_epochs: int = option(4, "passes over the expert data (paper)", tiny=8)
    warmup: float = option(0.03, "share of SFT updates with rising rate (paper); then cosine")
    # inspection, eq. 4-5
    iterations: int = option(-1, "iterations of Algorithm 1; -1 = the method's own: 7 for stepagent-inverse and ppo (paper's peak), 3 for "
                                 "stepagent-implicit (paper's peak), sft+, spin and eto, 1 for dpo, rft and nat", tiny=2)
    practice: int = option(3, "K, practice actions per expert step (paper's peak)")
    temperature: float = option(1.0, "of practice, and of the episodes that ppo, dpo and spin learn from; 0 = greedy")
    explore_temperature: float = option(0.7, "of the episodes that eto, rft and nat learn from (ETO)")
    samples: int = option(0, "episodes played per train task by a compared method; 0 = its own: 4 for rft and nat, 1 otherwise")
    success: float = option(1.0, "rft and nat: reward from which an episode counts as a success")
    # reflection, eq. 6, 8-11
    lr: float = option(5e-7, "learning rate of reflection (paper), and of SFT+", tiny=5e-5)
    batch: int = option(16, "step pairs per update (paper); for ppo actions, for dpo, spin and eto trajectory pairs", tiny=64)
    epochs: int = option(1, "passes over the iteration's pairs (paper)")
    beta: float = option(0.1, "DPO temperature beta, eq. 6", tiny=1.0)
    dpo_nll: float = option(0.0, "weight of the NLL of all expert actions in the batch, added to eq. 6 (paper: 0)")
    clip: float = option(0.2, "PPO clip range")
    ppo_passes: int = option(2, "PPO passes over the iteration's practice actions", tiny=1)
    entropy: float = option(0.01, "lambda of eq. 8, weight of the entropy bonus")
    kl: float = option(0.0, "weight of KL(policy || reference) in PPO, k3 estimate")
    gamma: float = option(1.0, "discount of whole episodes (reward final, both)")
    gae_lambda: float = option(0.95, "GAE's lambda, the same")
    d_lr: float = option(1e-4, "learning rate of the discriminator and of the value head", tiny=1e-3)
    match: str = option("", "sft+ only: take each update's trajectories from this run's updates, so that the two differ in loss and --lr alone")
    # optimisation and evaluation
    grad_norm: float = option(1.0, "gradient norm is clipped to this")
    max_new_tokens: int = option(512, "longest action, in tokens", tiny=48)
    dtype: str = option("bfloat16", "compute type; master weights are always float32", tiny="float32", choices=("float32", "bfloat16"))
    micro_tokens: int = option(8192, "tokens per forward pass in training, scoring and practice prefill")
    leaves: int = option(256, "practice actions decoded together at most; fewer where keys and values would take about a quarter "
                                "of the memory", tiny=1024)
    episodes: int = option(32, "episodes played together", tiny=300)
    shard: str = option("auto", "FSDP: weights, gradients and moments in pieces on the ranks; auto = where one device cannot hold them",
                        choices=("auto", "true", "false"))
    lora_rank: int = option(0, "learn adapters of this rank on frozen weights, for one small GPU; wants higher rates; 0 = all weights")
    save_minutes: float = option(15.0, "minutes between checkpoints inside a phase that learns")
    checkpointing: bool = option(True, "recompute activations in the backward pass, to save memory", tiny=False)
    eval_splits: str = option("test", "splits evaluated at the end, separated by commas", tiny="test,test_unseen")
    eval_each: str = option("dev", "splits evaluated after SFT and after every iteration; empty = none")
    eval_tasks: int = option(0, "tasks per evaluated split, 0 = all")


# ============================================================================================================ Algorithm 1

def main(config: Config) -> None:
    run = Run(config, check(config))
    env, experts, prompt = load_experts(run)
    policy, tokenizer = load_policy(run, experts)
    data = encode_experts(run, experts, tokenizer, policy)                                       # line 1: expert trajectories T
    learner = Learner(run, env, prompt, policy, tokenizer, experts, data)
    method, reward = config.method, "final" if config.method == "ppo" else config.reward

    if method != "base" and not config.init:
        run.phase("sft", learner.imitate)                                                        # line 2: pi_theta_0, eq. 2-3
    run.phase("eval_0", learner.evaluate, "eval_0", config.eval_each)
    for i in range(1, run.iterations + 1):                                                       # line 5 (none for base, sft)
        if method == "stepagent-implicit":
            run.phase(f"inspect_{i}", learner.inspect, i)                                        # line 7, eq. 4-5
            run.phase(f"reflect_{i}", learner.reflect_implicit, i)                               # eq. 6
        elif method in ("stepagent-inverse", "ppo"):
            if reward != "final":
                run.phase(f"inspect_{i}", learner.inspect, i)                                    # line 7, eq. 4-5
                run.phase(f"discriminate_{i}", learner.discriminate, i)                          # lines 10-11, eq. 11, reading 2
            if reward == "step":
                run.phase(f"reflect_{i}", learner.reflect_inverse, i)                            # line 12, eq. 8
            else:                                                                                # Table 3, and Table 2's PPO
                run.phase(f"explore_{i}", compared.explore, learner, i)
                run.phase(f"judge_{i}", compared.judge, learner, i, reward)
                run.phase(f"reflect_{i}", compared.reflect_episodes, learner, i)
        elif method == "sft+":
            run.phase(f"sft_plus_{i}", learner.imitate_more, i)                                  # the control: eq. 3 goes on
        else:
            run.phase(f"explore_{i}", compared.explore, learner, i)                              # Table 2's other rows
            if method in ("rft", "nat"):
                run.phase(f"retrain_{i}", compared.retrain, learner, i)
            else:
                run.phase(f"pair_{i}", compared.pair, learner, i)
                run.phase(f"reflect_{i}", compared.reflect_pairs, learner, i)
        run.phase(f"eval_{i}", learner.evaluate, f"eval_{i}", config.eval_each)
    run.phase("eval_final", learner.evaluate, "final", config.eval_splits)
    run.phase("policy", learner.save, "policy")                                                  # line 3, the output
    run.finish()


# ==================================================================================================== phases of the learner

@dataclass
class Practice:
    """One iteration's inspection, flat: S expert steps of all practised trajectories in order, N = S * K leaves in the same order.
    Log-probs are those of the iteration's starting policy, by the training forward (reading 5)."""
    leaves: list[list[int]]                          # N token ids
    kept: Tensor                                     # [N] bool: the text differs from the expert's (reading 8)
    ref_trunk: Tensor                                # [S] summed log-prob of the expert's action
    ref_leaves: Tensor                               # [N]
    old_tokens: list[Tensor]                         # N of [length of the leaf]: PPO's old log-probs
    trunk_hidden: Tensor                             # [S, d] features for D
    leaf_hidden: Tensor                              # [N, d]


@dataclass
class Learner:
    """The agent and what it learns from; each method is one phase of `main`."""
    run: Run
    env: object
    prompt: list[dict]
    policy: nn.Module
    tokenizer: object
    experts: list[Trajectory]
    data: list[Encoded]

    def __post_init__(self):
        c, n = self.run.config, len(self.data)
        self.sft_set = range(min(c.sft_experts or n, n))                           # indices into data
        self.practised = range(n - min(c.practice_experts or n, n), n)
        starts = np.cumsum([0] + [len(self.data[j].spans) for j in self.practised]).tolist()
        self.first_step = dict(zip(self.practised, starts))                        # trajectory -> its first step in Practice
        order = sorted(self.practised, key=lambda j: stable_seed(c.seed, "fold", self.data[j].task_id))
        self.place = {self.data[j].task_id: n for n, j in enumerate(order)}        # task -> its place in a fixed random order, for folds

    # ---- imitation

    def imitate(self, pool: list[Encoded] | None = None, folder: str = "sft/policy"):
        """SFT on the expert's trajectories (or on those of `pool`), eq. 2-3."""
        c = self.run.config
        pool, numbers = (self.data, self.sft_set) if pool is None else (pool, range(len(pool)))
        batches = [b for epoch in range(c.sft_epochs) for b in self._shuffled("sft", epoch, numbers, c.sft_batch)]
        warm = max(1, round(c.warmup * len(batches)))
        self._train("sft", 0, pool, batches, self._nll(pool), lambda step: c.sft_lr * min((step + 1) / warm, _cosine(step / len(batches))))
        self.save(folder)

    def imitate_more(self, i: int):
        """SFT+: eq. 3 on the practised trajectories, in the updates of the run given by --match, or in its own: as many as
        implicit reflection would take if no pair were dropped."""
        c = self.run.config
        if c.match:
            number = {item.task_id: j for j, item in enumerate(self.data)}
            batches = [[number[task] for task in batch] for batch in json.loads(read_text(Path(c.match, f"iter_{i}/batches.json")))]
        else:
            batches = self._batches("sft+", i, self.practised, lambda j: len(self.data[j].spans) * c.practice)
        self._train("sft+", i, self.data, batches, self._nll(self.data), self._falling(i, len(batches)))
        self.save(f"iter_{i}/policy")

    def _nll(self, pool: list[Encoded]):
        def loss(micro, batch):
            scores = score(self.policy, [pool[j] for j in micro])
            count = sum(e - s for j in batch for s, e in pool[j].spans)
            return losses.sft_loss(scores.trunk_tokens, torch.ones_like(scores.trunk_tokens), count)
        return loss

    # ---- inspection

    def inspect(self, i: int):
        """Line 7, eq. 5: K practice actions at every expert step, then one scoring pass for what later phases need of pi_i."""
        run, c, stops, started = self.run, self.run.config, stop_ids(self.tokenizer), time.time()
        self.policy.eval()
        written = lambda j: self._tokens(j) + c.practice * sum(e - s for s, e in self.data[j].spans)
        mine, shards = sorted(run.shares(self.practised, written)[run.rank], key=self._tokens), {}      # like lengths together: less padding
        with run.bar(len(mine), f"iteration {i}: practice") as bar, torch.no_grad(), run.gathered(self.policy), run.autocast():
            room = run.room(self.policy)
            n = lambda j: len(self.data[j].spans) * c.practice
            for group in grouped(mine, lambda j: max(n(j) / c.leaves, (self._tokens(j) + n(j) * c.max_new_tokens) / room), 1):
                encoded = [self.data[j] for j in group]
                gens = [torch.Generator().manual_seed(stable_seed(c.seed, i, e.task_id)) for e in encoded]
                drawn = practice(self.policy, encoded, c.practice, c.temperature, c.max_new_tokens, stops, gens, c.micro_tokens)
                leaves = dict(zip(group, [[(s, leaf) for s, of_step in enumerate(steps) for leaf in of_step] for steps in drawn]))
                for micro in grouped(group, lambda j: self._tokens(j, leaves[j]), c.micro_tokens):
                    scores = score(self.policy, [self.data[j] for j in micro], [leaves[j] for j in micro])
                    shards |= self._split(micro, leaves, scores)
                bar.update(len(group))
        parts = run.collect(shards)                                                # rank 0's: for a large model gigabytes of features
        if run.rank:
            return
        for shard in parts:
            shards |= shard
        rows = [shards[j] for j in self.practised]
        kept, match_action = self._compare(rows)
        figures = {"match_text": 1 - kept.float().mean().item(), "match_action": match_action, "pairs_kept": int(kept.sum()),
                   "stopped": float(np.mean([ids[-1] in stops for row in rows for _, ids in row["leaves"]])),
                   "practice_tokens": sum(len(ids) for row in rows for _, ids in row["leaves"])}
        flat = {name: torch.cat([row[name] for row in rows]) for name in rows[0] if name != "leaves"}
        flat["leaves"] = torch.tensor([t for row in rows for _, ids in row["leaves"] for t in ids])
        flat["lengths"] = torch.tensor([len(ids) for row in rows for _, ids in row["leaves"]])
        write_tensors(run.path(f"iter_{i}/practice.safetensors"), flat | {"kept": kept})
        self._write_practice(i)
        run.log("inspect", i, 0, **figures, seconds=time.time() - started)

    def _split(self, micro: list[int], leaves: dict, scores) -> dict[int, dict]:
        """What is kept of one scoring pass, by trajectory."""
        steps, n = [len(self.data[j].spans) for j in micro], [len(leaves[j]) for j in micro]
        tokens = [sum(len(ids) for _, ids in leaves[j]) for j in micro]
        parts = zip(scores.trunk.split(steps), scores.leaves.split(n), scores.leaf_tokens.split(tokens),
                    scores.trunk_hidden.float().split(steps), scores.leaf_hidden.float().split(n))
        names = ("ref_trunk", "ref_leaves", "old_tokens", "trunk_hidden", "leaf_hidden")
        own = lambda x: x.cpu().clone()                                            # not a view: with one goes all of its storage
        return {j: {"leaves": leaves[j]} | {name: own(x) for name, x in zip(names, part)} for j, part in zip(micro, parts)}

    def _compare(self, rows: list[dict]) -> tuple[Tensor, float]:
        """Which practice actions differ from the expert's text [N], and the share whose parsed action is the expert's."""
        kept, same_action = [], []
        for j, row in zip(self.practised, rows):
            for s, ids in row["leaves"]:
                text, expert = self._text(ids), self.experts[j].steps[s].action
                kept.append(text.strip() != expert.strip())
                same_action.append(parse_action(text) == parse_action(expert))
        return torch.tensor(kept), float(np.mean(same_action))

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids[:-1] if ids[-1] in stop_ids(self.tokenizer) else ids)

    def _write_practice(self, i: int, log_d: Tensor | None = None, log_d_expert: Tensor | None = None):
        """iter_<i>/practice.jsonl: one expert step a line, for people to read."""
        p, k, lines = self.load_practice(i), self.run.config.practice, []
        for j in self.practised:
            kind = "" if self.run.config.expert else self.env.task_type(self.experts[j].task_id)      # a file's ids may be its own
            for s, step in enumerate(self.experts[j].steps):
                n = self.first_step[j] + s
                row = {"task": self.experts[j].task_id, "task_type": kind, "step": s, "observation": step.observation, "expert": step.action,
                       "expert_logp": round(p.ref_trunk[n].item(), 4),
                       "practice": [self._text(ids) for ids in p.leaves[n * k:(n + 1) * k]],
                       "practice_logp": [round(x, 4) for x in p.ref_leaves[n * k:(n + 1) * k].tolist()],
                       "differs": p.kept[n * k:(n + 1) * k].tolist()}
                if log_d is not None:
                    row |= {"expert_log_d": round(log_d_expert[n].item(), 4),
                            "practice_log_d": [round(x, 4) for x in log_d[n * k:(n + 1) * k].tolist()]}
                lines.append(json.dumps(row, ensure_ascii=False))
        write_text(self.run.path(f"iter_{i}/practice.jsonl"), "\n".join(lines) + "\n")

    def load_practice(self, i: int) -> Practice:
        """Always from disk, so that a run that was killed here and one that was not go on from the same bits."""
        t = load_file(self.run.path(f"iter_{i}/practice.safetensors"))
        lengths = t["lengths"].tolist()
        return Practice([x.tolist() for x in t["leaves"].split(lengths)], t["kept"], t["ref_trunk"], t["ref_leaves"],
                        list(t["old_tokens"].split(lengths)), t["trunk_hidden"], t["leaf_hidden"])

    def _own(self, p: Practice, j: int, only_kept: bool) -> list[int]:
        """Leaf numbers of trajectory j."""
        a, k = self.first_step[j], self.run.config.practice
        mine = range(a * k, (a + len(self.data[j].spans)) * k)
        return [n for n in mine if p.kept[n]] if only_kept else list(mine)

    def _placed(self, p: Practice, j: int, numbers: list[int]) -> list[tuple[int, list[int]]]:
        """These leaves of trajectory j as (step, token ids)."""
        return [(n // self.run.config.practice - self.first_step[j], p.leaves[n]) for n in numbers]

    def _score_leaves(self, p: Practice, micro: list[int], only_kept: bool, with_entropy: bool = False):
        """One forward pass. -> scores, leaf numbers [N], expert step numbers [N], and these steps' places in scores.trunk [N]."""
        device = self.run.device
        own = {j: self._own(p, j, only_kept) for j in micro}
        leaves = [self._placed(p, j, own[j]) for j in micro]
        scores = score(self.policy, [self.data[j] for j in micro], leaves, with_entropy)
        offsets = np.cumsum([0] + [len(self.data[j].spans) for j in micro]).tolist()
        place = [offsets[m] + s for m in range(len(micro)) for s, _ in leaves[m]]
        numbers = torch.tensor([n for j in micro for n in own[j]], dtype=torch.long)
        return scores, numbers, torch.tensor(place, dtype=torch.long, device=device)

    # ---- reflection, implicit

    def reflect_implicit(self, i: int):
        """Step-wise DPO on the pairs that differ, eq. 6."""
        c, k, p = self.run.config, self.run.config.practice, self.load_practice(i)

        def loss(micro, batch):
            scores, n, place = self._score_leaves(p, micro, only_kept=True)
            pairs = sum(len(self._own(p, j, True)) for j in batch)
            total, info = losses.dpo_loss(scores.trunk[place], scores.leaves, p.ref_trunk[n // k].to(place.device),
                                          p.ref_leaves[n].to(place.device), c.beta, pairs)       # eq. 6
            nll, more = losses.sft_loss(scores.trunk_tokens, torch.ones_like(scores.trunk_tokens),
                                        sum(e - s for j in batch for s, e in self.data[j].spans))
            every = sum(len(self._own(p, j, False)) for j in batch)
            more["accuracy_all"] = info["accuracy"] * pairs / every                # a pair of equal actions has margin 0: not won
            return total + c.dpo_nll * nll if c.dpo_nll else total, info | more

        batches = self._batches("implicit", i, [j for j in self.practised if c.dpo_nll or self._own(p, j, True)],
                                lambda j: len(self._own(p, j, True)))
        self._reflect("implicit", i, batches, loss, lambda j: self._own(p, j, True), p)

    # ---- reflection, inverse

    def discriminate(self, i: int):
        """Lines 10-11, eq. 11: D on expert against practice actions; two folds by task, each judged by the other's D (reading 3)."""
        run, c, k, p = self.run, self.run.config, self.run.config.practice, self.load_practice(i)
        agent, expert = p.leaf_hidden, p.trunk_hidden
        if len(self.practised) < 4:
            raise InputError(f"{len(self.practised)} trajectories are too few for two discriminators; give at least 4")
        tasks = torch.cat([torch.full((len(self.data[j].spans),), self.place[self.data[j].task_id]) for j in self.practised])      # [S]
        leaves = lambda steps: (steps[:, None] * k + torch.arange(k)).flatten()
        log_d, log_d_expert, auc, figures = torch.zeros(len(agent)), torch.zeros(len(expert)), [], defaultdict(float)
        for fold in (0, 1):
            d = Head.load_or_make(run.path(f"iter_{i - 1}/discriminator_{fold}.safetensors"), agent.shape[1],
                                  stable_seed(c.seed, "D", fold))                  # warm start
            learn, held, test = two_folds(tasks, fold)
            loss = lambda steps: losses.discriminator_loss(d(expert[steps]), d(agent[leaves(steps)]))[0]           # eq. 11
            fit(d, torch.cat([expert[learn], agent[leaves(learn)]]), loss, learn, held, c.d_lr, stable_seed(c.seed, i, fold), figures, "d")
            with torch.no_grad():
                log_d[leaves(test)], log_d_expert[test] = losses.step_reward(d(agent[leaves(test)])), losses.step_reward(d(expert[test]))
                auc.append(losses.area_under_curve(d(expert[test]), d(agent[leaves(test)])))
            if run.rank == 0:
                write_tensors(run.path(f"iter_{i}/discriminator_{fold}.safetensors"), d.state_dict())
        if run.rank == 0:
            write_tensors(run.path(f"iter_{i}/log_d.safetensors"), {"agent": log_d, "expert": log_d_expert})
            self._write_practice(i, log_d, log_d_expert)
        run.log("discriminate", i, 0, d_auc=float(np.mean(auc)), log_d_expert=log_d_expert.mean().item(),
                log_d_agent=log_d.mean().item(), **losses.reward_gap(log_d.view(-1, k), ~p.kept.view(-1, k)), **figures)

    def reflect_inverse(self, i: int):
        """Line 12: clipped PPO on the practice actions with reward log D (reading 10)."""
        c, k, p = self.run.config, self.run.config.practice, self.load_practice(i)
        reward = load_file(self.run.path(f"iter_{i}/log_d.safetensors"))["agent"].view(-1, k)            # [S, K]
        others = (reward.sum(1, keepdim=True) - reward) / (k - 1) if k > 1 else reward.mean()
        advantage = losses.whiten((reward - others).flatten())                                           # [N]

        def loss(micro, batch):
            scores, n, _ = self._score_leaves(p, micro, only_kept=False, with_entropy=True)
            lengths = torch.tensor([len(p.leaves[x]) for x in n.tolist()])
            tokens = sum(len(p.leaves[x]) for j in batch for x in self._own(p, j, False))
            old = torch.cat([p.old_tokens[x] for x in n.tolist()]).to(scores.leaf_tokens.device)
            spread = advantage[n].repeat_interleave(lengths).to(old.device)
            total, info = losses.ppo_loss(scores.leaf_tokens, old, spread, torch.ones_like(old), c.clip, tokens)
            entropy = scores.leaf_entropy.sum() / tokens                                                 # lambda H of eq. 8
            kl = losses.kl_k3(scores.leaf_tokens, old).sum() / tokens
            return total - c.entropy * entropy + c.kl * kl, info | {"entropy": entropy.detach(), "kl": kl.detach()}

        batches = [b for n in range(c.ppo_passes)
                   for b in self._batches("inverse", (i, n), self.practised, lambda j: len(self._own(p, j, False)))]
        self._reflect("inverse", i, batches, loss, lambda j: self._own(p, j, False), p)

    # ---- what the phases share

    def _reflect(self, name, i, batches, loss, own, p: Practice):
        if not batches:
            tqdm.write(f"iteration {i}: every practice action equals the expert's; nothing to reflect on, the policy stays as it is")
        self._train(name, i, self.data, batches, loss, self._falling(i, len(batches)),
                    lambda j: self._tokens(j, self._placed(p, j, own(j))))
        self.save(f"iter_{i}/policy")

    def _train(self, name: str, i: int, pool: list[Encoded], batches: list[list[int]], loss_of, rate, tokens=None):
        """The one training loop: batches of numbers of trajectories in `pool`, the same on every rank; each rank takes its share, divides
        by the batch's global counts, and gradients are summed. loss_of(micro batch, batch) -> (loss, info); rate(step) -> learning rate;
        tokens(j): those that one of them pushes through the policy."""
        tokens = tokens or (lambda j: len(pool[j].ids))
        if self.run.rank == 0 and i:                                               # for --match
            write_text(self.run.path(f"iter_{i}/batches.json"), json.dumps([[pool[j].task_id for j in b] for b in batches]))
        run, c, policy = self.run, self.run.config, self.policy
        policy.train()
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
        for step, batch in run.updates(policy, optimizer, batches, f"iteration {i}: {name}" if i else name):
            info, started = defaultdict(float), time.time()
            for micro, weight in run.micro_batches(policy, batch, tokens):
                with run.autocast():
                    loss, figures = loss_of(micro, batch)
                (weight * loss).backward()
                for key, x in figures.items():
                    info[key] += weight * x.item()
            info = run.sum_gradients(policy, info)
            norm = run.clip(policy, c.grad_norm)
            if not math.isfinite(norm) or not all(math.isfinite(x) for x in info.values()):
                if run.rank == 0:
                    write_text(run.path("failed_batch.json"), json.dumps({
                        "phase": name, "iteration": i, "step": step, "figures": {k: str(x) for k, x in info.items()},
                        "grad_norm": str(norm), "batch": [dataclasses.asdict(pool[j]) for j in batch]}))
                raise InputError(f"{name}, iteration {i}, update {step}: loss or gradient is not finite; batch saved in "
                                 f"{run.path('failed_batch.json')}; try a lower learning rate")
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
            optimizer.zero_grad()
            run.log(name, i, step, lr=rate(step), grad_norm=norm, trajectories=len(batch),
                    tokens=sum(map(tokens, batch)), seconds=time.time() - started, **info)

    def _falling(self, i: int, updates: int):
        c = self.run.config
        return lambda step: c.lr * _cosine((i - 1 + step / max(1, updates)) / self.run.iterations)       # reading 11

    def _shuffled(self, *key_set_size):
        *key, indices, size = key_set_size
        order = list(indices)
        random.Random(stable_seed(self.run.config.seed, *key)).shuffle(order)
        return [order[a:a + size] for a in range(0, len(order), size)]

    def _batches(self, name, i, numbers, size) -> list[list[int]]:
        """Shuffled trajectories, gathered until `batch` in size (step pairs, actions) are reached (reading 9)."""
        batches, current = [], []
        for epoch in range(self.run.config.epochs):
            for [j] in self._shuffled(name, i, epoch, numbers, 1):
                current.append(j)
                if sum(map(size, current)) >= self.run.config.batch:
                    batches, current = batches + [current], []
        return batches + [current] if current else batches

    def _tokens(self, j: int, leaves=()) -> int:
        """Tokens of trajectory j and these leaves in a forward pass."""
        item = self.data[j]
        return len(item.ids) + sum(len(ids) - shared(item, step, ids) for step, ids in {(s, tuple(ids)) for s, ids in leaves})

    # ---- evaluation and saving

    def evaluate(self, name: str, splits: str):
        """Greedy episodes: mean reward and success with 95% bootstrap intervals over tasks, whole episodes in eval/."""
        run, c = self.run, self.run.config
        self.policy.eval()
        prompt = compared.marked(self.prompt, True) if c.method == "nat" and name != "eval_0" else self.prompt
        for split in filter(None, splits.split(",")):
            tasks = some(self.env.splits[split], c.eval_tasks)
            episodes = self.play(tasks, f"{name}: {split}", prompt, 0.0, c.seed)
            self.write_episodes(f"eval/{name}_{split}.jsonl", episodes)
            run.log("eval", int(name.split("_")[-1]) if name[-1].isdigit() else run.iterations, 0, split=split, name=name,
                    unparsed=sum(parse_action(s.action) is None for t in episodes for s in t.steps), **episode_figures(episodes, self.env))

    def play(self, tasks: list[str], label: str, prompt: list[dict], temperature: float, seed: int) -> list[Trajectory]:
        """Episodes of the policy, one a task, the tasks shared among the ranks."""
        run, c = self.run, self.run.config
        mine = tasks[run.rank::run.world]
        longest = min(2 * max(len(e.ids) for e in self.data), self.policy.config.max_position_embeddings)
        batch = max(1, min(c.episodes, int(run.room(self.policy) / (1.5 * longest))))                # the cache grows by half
        with run.bar(len(mine), label) as bar, run.gathered(self.policy), run.autocast():
            played = run_episodes(self.policy, self.tokenizer, self.env, mine, prompt=prompt, temperature=temperature, batch=batch,
                                  max_new_tokens=c.max_new_tokens, seed=seed, progress=bar.update)
        byid = {t.task_id: t for part in run.gather({t.task_id: t for t in played}) for t in part.values()}
        for t in byid.values():
            if not 0 <= t.reward <= 1:                                             # nan, too
                self.write_episodes("failed_batch.json", [t])
                raise InputError(f"{label}: the environment gave task {t.task_id} the reward {t.reward}, which is not within 0 and 1; "
                                 f"episode saved in {run.path('failed_batch.json')}")
        return [byid[task] for task in tasks]

    def write_episodes(self, name: str, episodes: list[Trajectory], ids: bool = False) -> None:
        """One episode a line, with the sampled token ids if they are to be learnt from."""
        if self.run.rank == 0:
            write_text(self.run.path(name), "".join(json.dumps({
                "task_id": t.task_id, "task_type": self.env.task_type(t.task_id), "reward": t.reward, "truncated": t.truncated, **t.info,
                "steps": [{"observation": s.observation, "action": s.action} | ({"ids": s.ids} if ids else {}) for s in t.steps]}
                | ({"last": t.last} if ids else {}), ensure_ascii=False) + "\n" for t in episodes))

    def save(self, folder: str):
        """An ordinary Hugging Face folder, float32."""
        save_policy(self.run, self.policy, self.tokenizer, self.run.path(folder))
        self.run.state["policy"] = folder


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


# ============================================================================================================ setting up

def check(c: Config) -> int:
    """What can be known to be wrong before anything is loaded; -> the number of iterations."""
    if c.method in ("stepagent-inverse", "ppo") and c.temperature != 1:
        raise InputError(f"--temperature {c.temperature}: PPO's ratio is right for temperature 1 only; leave it out")
    if c.reward != "step" and c.method != "stepagent-inverse":
        raise InputError(f"--reward {c.reward} belongs to --method stepagent-inverse; leave it out")
    if c.lora_rank and c.init and c.method in ("rft", "nat"):
        raise InputError(f"--lora-rank with --init: {c.method} starts again from --model, which adapters of --init cannot; leave out one")
    if c.match:
        other = json.loads(read_text(Path(c.match, "config.json")))["config"]
        same = ("env", "env_options", "expert", "experts", "practice_experts", "iterations")
        if wrong := [k for k in same if other[k] != getattr(c, k)]:
            raise InputError(f"--match {c.match}: its --{wrong[0].replace('_', '-')} is {other[wrong[0]]!r}, not "
                             f"{getattr(c, wrong[0])!r}; give this run the same")
    once = ROUNDS[c.method] < 2
    return ROUNDS[c.method] if c.iterations < 0 or once else c.iterations


def load_experts(run: Run):
    """-> environment, expert trajectories with their prompt, and the prompt for the agent's own episodes."""
    c = run.config
    env = make_env(c.env, **env_options(c.env_options))
    for split in filter(None, f"{c.eval_splits},{c.eval_each}".split(",")):
        if split not in env.splits:
            raise InputError(f"{c.env} has no split {split!r}; use {', '.join(env.splits)}")
    file = c.expert or run.path("experts.jsonl")
    if not c.expert and run.rank == 0 and not file.exists():                       # once: all ranks and later starts must have the same
        tasks = some(env.splits["train"], c.experts)
        with ThreadPoolExecutor(8 if getattr(env, "slow", False) else 1) as pool:
            shown = list(run.bar(pool.map(env.expert, tasks), "expert", len(tasks)))
        solved = [t for t in shown if t is not None and t.reward >= 1]
        experts = [t for t in solved if len(t.steps) <= env.max_steps(t.task_id)]
        if not experts:
            raise InputError(f"{c.env}: no expert trajectory; give a file with --expert")
        if len(experts) < len(tasks):
            tqdm.write(f"expert: {len(tasks)} tasks; {len(tasks) - len(solved)} not solved and {len(solved) - len(experts)} solved in more steps than "
                       "allowed are left out")
        save_trajectories(str(file), experts)
    run.barrier()
    experts = load_trajectories(str(file))
    if c.expert and hasattr(env, "right"):
        right = env.right(experts)
        if not right:
            raise InputError(f"{c.expert}: none of its {len(experts)} answers is right; give a file of successful plays")
        if len(right) < len(experts) and run.rank == 0:
            tqdm.write(f"{c.expert}: {len(experts) - len(right)} of {len(experts)} plays whose answer is no exact match are left out")
        experts = right
    experts = experts[:c.experts or None]
    plays = c.method in ("ppo", "dpo", "rft", "spin", "nat", "eto") or c.reward != "step"
    if c.expert and plays and (strange := {t.task_id for t in experts} - set().union(*env.splits.values())):
        raise InputError(f"{c.expert}: {min(strange)!r} is no task of {c.env}, but {c.method} plays the tasks of the expert file; name them "
                         f"as the environment does, such as {env.splits['train'][0]!r}")
    given = c.expert and experts[0].prompt
    prompt = experts[0].prompt if given else prompt_messages(env) if c.prompt == "full" else []
    for t in experts:
        t.prompt = t.prompt if given else prompt
    return env, experts, prompt


def encode_experts(run: Run, experts: list[Trajectory], tokenizer, policy) -> list[Encoded]:
    data, limit = [encode(t, tokenizer) for t in run.bar(experts, "encode")], policy.config.max_position_embeddings
    for item in data:
        if len(item.ids) > limit:
            raise InputError(f"trajectory {item.task_id} has {len(item.ids)} tokens, the model's context is {limit}; "
                             "remove it from the expert data or take a model with a longer context")
    return data


# ============================================================================================================ command line

def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse(argv: list[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(description="StepAgent: step-wise reinforcement learning of LLM agents.", allow_abbrev=False,
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=130))
    for f in dataclasses.fields(Config):
        kind = {"int": int, "float": float, "str": str, "bool": _boolean}[f.type]
        tiny = f"; tiny: {f.metadata['tiny']}" if f.metadata["tiny"] != f.default else ""
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, choices=f.metadata["choices"],
                            metavar=None if f.metadata["choices"] else f.type.upper(),
                            help=f"{f.metadata['help']} (default: {f.default!r}{tiny})".replace("%", "%%"))
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    tiny = Path(given.get("model", Config.model)).name.startswith("tiny")
    return Config(**{f.name: given.get(f.name, f.metadata["tiny"] if tiny else f.default) for f in dataclasses.fields(Config)})


def command_line(argv: list[str] | None = None) -> None:
    program(lambda: main(parse(argv)))


if __name__ == "__main__":
    command_line()
