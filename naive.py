"""StepAgent by definition: one ordinary forward pass per state. Read this first.

Everything here is slow, short and obviously right. The fast code (tree.py, rollout.py) gives the
same numbers from one pass over trunk and leaves; tests compare the two, values and gradients, on
every model family.

A state is a list of token ids, an action is the list of token ids that follows it. Models are any
causal LM of transformers.
"""

from __future__ import annotations

import torch

from losses import dpo_loss
from trajectory import (
    Encoded,
    Step,
    Trajectory,
    action_text,
    closing_id,
    encode,
    prompt_ids,
    state_ids,
    stop_ids,
)
from tree import sample


def logits(model, ids: list[int]):
    """Next-token logits [T, V] after every token: one ordinary forward pass."""
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def token_logps(model, state: list[int], action: list[int]):
    """log pi(a_t | state, a_<t) of every token of the action, [T]."""
    predicting = logits(model, state + action)[len(state) - 1 : -1]
    logps = torch.log_softmax(predicting, -1)
    return logps.gather(-1, torch.tensor(action)[:, None])[:, 0]


def entropies(model, state: list[int], action: list[int]):
    """Entropy of the policy where each token of the action was predicted, [T]."""
    probabilities = torch.softmax(logits(model, state + action)[len(state) - 1 : -1], -1)
    return -(probabilities * probabilities.log()).sum(-1)


def last_hidden(model, ids: list[int]):
    """The last hidden state at the last token, [d]."""
    return model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]


def sums(model, pairs):
    """log pi(action | state) of each (state, action), [N]."""
    return torch.stack([token_logps(model, state, action).sum() for state, action in pairs])


# Eq. 4: an expert trajectory is cut into its states, each with the expert's action.


def expert_pairs(encoded: list[Encoded]):
    """Every (state, expert action) in order."""
    pairs = []
    for item in encoded:
        for start, end in item.spans:
            pairs.append((item.ids[:start], item.ids[start:end]))
    return pairs


def leaf_pairs(encoded: list[Encoded], leaves):
    """Every (state, practice action); leaves[j] = [(step, action)] of trajectory j."""
    pairs = []
    for item, actions in zip(encoded, leaves):
        for step, action in actions:
            pairs.append((item.ids[: item.spans[step][0]], action))
    return pairs


# Eq. 5: the agent practises at the expert's states.


@torch.no_grad()
def greedy(model, state: list[int], limit: int, stops) -> list[int]:
    """The most probable token, one after another, until a stop token or `limit` tokens."""
    action = []
    while len(action) < limit and (not action or action[-1] not in stops):
        action.append(logits(model, state + action)[-1].argmax().item())
    return action


@torch.no_grad()
def sampled(model, state: list[int], temperature: float, stops, noise) -> list[int]:
    """A sampled action; token t is drawn with the random number noise[t], at most len(noise)."""
    action = []
    while len(action) < len(noise) and (not action or action[-1] not in stops):
        last = logits(model, state + action)[-1:]
        divisor = torch.tensor([float(temperature)])
        action.append(sample(last, divisor, noise[len(action)][None]).item())
    return action


# Eq. 6: the expert's action is preferred to the agent's own, in every state.


def implicit_loss(model, reference, expert, agent, beta: float):
    """Step-wise DPO. expert, agent: (state, action) pairs of the same states, [N] each."""
    with torch.no_grad():
        ref_expert, ref_agent = sums(reference, expert), sums(reference, agent)
    return dpo_loss(sums(model, expert), sums(model, agent), ref_expert, ref_agent, beta)


# Evaluation.


def play(model, tokenizer, env, task: str, prompt: list[dict], max_new_tokens: int) -> Trajectory:
    """One greedy episode; the whole conversation is read again before every action."""
    stops, context = stop_ids(tokenizer), model.config.max_position_embeddings
    episode, observation = env.start(task)
    trajectory = Trajectory(task, list(prompt))
    ids = prompt_ids(tokenizer, list(prompt), observation)
    invalid, done = 0, False
    while not done:
        action = greedy(model, ids, min(max_new_tokens, context - len(ids)), stops)
        text = action_text(tokenizer, action)
        trajectory.steps.append(Step(observation, text, action))
        observation, trajectory.reward, done, info = episode.step(text)
        invalid += not info["valid"]
        ids = ids + action
        if action[-1] not in stops:
            ids.append(closing_id(tokenizer))
        ids = ids + state_ids(tokenizer, observation)
        out_of_steps = len(trajectory.steps) >= env.max_steps(task)
        trajectory.truncated = not done and (len(ids) >= context or out_of_steps)
        done = done or trajectory.truncated
    trajectory.info = {"invalid": invalid}
    # What was played is what is trained on.
    read = encode(trajectory, tokenizer).ids
    assert read == ids[: len(read)]
    return trajectory
