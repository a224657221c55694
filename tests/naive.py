"""The readable definition that the fast code is tested against: one ordinary forward pass per (state, action), decoding token by
token without a cache, episodes recomputed from scratch at every turn. The models here are copies made with eager attention."""
import torch

from rollout import Encoded, Step, Trajectory, action_ids, encode, prompt_ids, sample, state_ids, stop_ids


def logits(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def token_logps(model, state, action):
    """log pi(a_t | state, a_<t) of every token of the action, by a forward pass of its own."""
    ordinary = logits(model, state + action)[len(state) - 1:-1]
    return torch.log_softmax(ordinary, -1).gather(-1, torch.tensor(action)[:, None])[:, 0]


def entropies(model, state, action):
    p = torch.softmax(logits(model, state + action)[len(state) - 1:-1], -1)
    return -(p * p.log()).sum(-1)


def last_hidden(model, ids):
    return model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]


def expert_pairs(encoded: list[Encoded]):
    """Every (state, expert action) in order."""
    return [(e.ids[:start], e.ids[start:end]) for e in encoded for start, end in e.spans]


def leaf_pairs(encoded: list[Encoded], leaves):
    """Every (state, practice action) in the order given."""
    return [(e.ids[:e.spans[step][0]], ids) for e, own in zip(encoded, leaves) for step, ids in own]


def sums(model, pairs):
    return torch.stack([token_logps(model, state, action).sum() for state, action in pairs])


@torch.no_grad()
def greedy(model, state, limit, stops):
    action = []
    while len(action) < limit and (not action or action[-1] not in stops):
        action.append(logits(model, state + action)[-1].argmax().item())
    return action


@torch.no_grad()
def sampled(model, state, temperature, stops, noise):
    """An action of at most as many tokens as there are random numbers, each token by its own."""
    action = []
    while len(action) < len(noise) and (not action or action[-1] not in stops):
        last = logits(model, state + action)[-1:]
        action.append(sample(last, torch.tensor([float(temperature)]), noise[len(action)][None]).item())
    return action


def play(model, tokenizer, env, task, prompt, max_new_tokens):
    """One greedy episode; the whole conversation is read again before every action."""
    stops, limit = stop_ids(tokenizer), model.config.max_position_embeddings
    episode, observation = env.start(task)
    t, invalid, done = Trajectory(task, list(prompt)), 0, False
    ids = prompt_ids(tokenizer, list(prompt), observation)
    while not done:
        action = greedy(model, ids, min(max_new_tokens, limit - len(ids)), stops)
        text = tokenizer.decode([x for x in action if x not in stops])
        t.steps.append(Step(observation, text, action))
        observation, t.reward, done, info = episode.step(text)
        invalid += not info["valid"]
        ids = ids + action + ([] if action[-1] in stops else [action_ids(tokenizer, "x")[-1]]) + state_ids(tokenizer, observation)
        t.truncated = not done and (len(ids) >= limit or len(t.steps) >= env.max_steps(task))
        done = done or t.truncated
    t.info = {"invalid": invalid}
    assert encode(t, tokenizer).ids == ids[:len(encode(t, tokenizer).ids)]          # what was played is what is trained on
    return t
