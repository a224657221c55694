"""The definition itself: against numbers by hand and against transformers' own generation."""

import copy
import math
from types import SimpleNamespace

import pytest
import tiny
import torch

import naive
from losses import dpo_loss
from rollout import score
from stepagent import step_dpo_loss
from trajectory import Encoded, encode, prompt_ids, stop_ids

# P(next | last) of a language of three tokens.
CHAIN = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]], dtype=torch.float64)


def chain(ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
    """A model whose next token depends on the last one alone. Logits need not be normalised."""
    return SimpleNamespace(logits=CHAIN[ids].log() + 3)


def test_token_logps_by_hand():
    # After 0 comes 1 (1/4), then 2 (0.8), then 2 (0.1).
    logps = naive.token_logps(chain, [2, 0], [1, 2, 2])
    assert logps.exp().tolist() == pytest.approx([0.25, 0.8, 0.1])
    total = naive.sums(chain, [([2, 0], [1, 2, 2]), ([1], [0])])
    assert total.exp().tolist() == pytest.approx([0.02, 0.1])


def test_entropies_by_hand():
    # Where 1 and then 2 were predicted: (1/2, 1/4, 1/4) and (0.1, 0.1, 0.8).
    expected = [1.5 * math.log(2), 0.2 * math.log(10) + 0.8 * math.log(1.25)]
    assert naive.entropies(chain, [2, 0], [1, 2]).tolist() == pytest.approx(expected)


def test_greedy_by_hand():
    # After 1 comes 2, after 2 comes 1.
    assert naive.greedy(chain, [0, 1], 4, {0}) == [2, 1, 2, 1]
    assert naive.greedy(chain, [0, 1], 4, {1}) == [2, 1]
    assert naive.greedy(chain, [0, 1], 4, {2}) == [2]


def test_sampled_by_hand():
    # The distribution functions are (0.5, 0.75, 1), (0.1, 0.2, 1) and (0.2, 0.9, 1).
    noise = torch.tensor([0.7, 0.15, 0.95, 0.1], dtype=torch.float64)
    assert naive.sampled(chain, [0], 1.0, {9}, noise) == [1, 1, 2, 0]
    assert naive.sampled(chain, [0], 1.0, {2}, noise) == [1, 1, 2]
    assert naive.sampled(chain, [0], 0.0, {9}, noise) == [0, 0, 0, 0]


def test_pairs_are_the_states_before_the_actions():
    encoded = [Encoded([5, 6, 7, 8, 9], [(1, 3), (4, 5)]), Encoded([1, 2], [(1, 2)])]
    expert = [([5], [6, 7]), ([5, 6, 7, 8], [9]), ([1], [2])]
    assert naive.expert_pairs(encoded) == expert
    leaves = [[(1, [3]), (0, [4, 4])], []]
    assert naive.leaf_pairs(encoded, leaves) == [([5, 6, 7, 8], [3]), ([5], [4, 4])]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_is_what_transformers_generates(family):
    model = tiny.model(family)
    stops = {1, 2, 3}
    for seed in range(5):
        state = tiny.random_ids(20, torch.Generator().manual_seed(seed))
        ids = torch.tensor([state])
        more = {"do_sample": False, "eos_token_id": list(stops), "pad_token_id": 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, **more)
        assert naive.greedy(model, state, 15, stops) == made[0, 20:].tolist()


def test_last_hidden_is_what_the_head_reads():
    model = tiny.model()
    hidden = naive.last_hidden(model, [5, 6, 7])
    assert torch.allclose(model.lm_head(hidden), naive.logits(model, [5, 6, 7])[-1])


class Echo:
    """Two turns; says what it was told."""

    def max_steps(self, task):
        return 5

    def start(self, task):
        self.told = []
        return self, f"{task}: begin"

    def step(self, text):
        self.told.append(text)
        turn = len(self.told)
        return f"{turn} said", turn / 2, turn == 2, {"valid": turn == 2}


def test_play_reads_the_whole_conversation_before_every_action():
    tokenizer, env = tiny.chatml(), Echo()
    model = tiny.model(vocab=len(tokenizer))
    prompt = [{"role": "user", "content": "Rules."}, {"role": "assistant", "content": "OK"}]
    played = naive.play(model, tokenizer, env, "t", prompt, 6)
    assert [step.observation for step in played.steps] == ["t: begin", "1 said"]
    assert [step.action for step in played.steps] == env.told
    assert played.reward == 1
    assert not played.truncated
    assert played.info == {"invalid": 1}
    item = encode(played, tokenizer)
    assert item.ids[: item.spans[0][0]] == prompt_ids(tokenizer, prompt, "t: begin")
    for step, (start, _) in zip(played.steps, item.spans):
        assert step.ids == naive.greedy(model, item.ids[:start], 6, stop_ids(tokenizer))


# --------------------------------------------------------------------------- eq. 6, by definition


def test_implicit_loss_by_hand():
    """The chain against a reference in which all is equally likely."""

    def uniform(ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 3, dtype=torch.float64))

    expert, agent = [([0], [0])], [([0], [1, 1])]
    loss, info = naive.implicit_loss(chain, uniform, expert, agent, beta=2.0)
    # chosen 2 ln(0.5 * 3), rejected 2 ln(0.25 * 0.1 * 9).
    margin = 2 * math.log(1.5) - 2 * math.log(0.225)
    assert info["margin"].item() == pytest.approx(margin)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-margin)))
    # The policy is its own reference: ln 2.
    loss, _ = naive.implicit_loss(chain, chain, expert, agent, beta=2.0)
    assert loss.item() == pytest.approx(math.log(2))


# K = 2 practice actions a step; some repeat the expert, wholly or for a while.
PRACTICE = 2
BETA = 0.3


def practised_at(encoded: list[Encoded]):
    """Leaves of every trajectory, and [S, K] whether they differ from the expert's action."""
    generator = torch.Generator().manual_seed(3)
    leaves, differs = [], []
    for item in encoded:
        actions = []
        for step, (start, end) in enumerate(item.spans):
            actions.append((step, tiny.random_ids(3, generator)))
            actions.append(tiny.follow(item, step, end - start - step % 2, *[90] * (step % 2)))
        leaves.append(actions)
        flags = [ids != item.ids[slice(*item.spans[step])] for step, ids in actions]
        differs.append(torch.tensor(flags).view(-1, PRACTICE))
    return leaves, differs


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_implicit_loss_is_eq_6_value_and_gradients(family):
    """One pass over trunk and leaves, against one ordinary pass for each action."""
    model, reference = tiny.model(family), tiny.model(family, seed=1)
    ordinary, plain_reference = copy.deepcopy(model), copy.deepcopy(reference)
    encoded, _ = tiny.example()
    leaves, differs = practised_at(encoded)
    pairs = int(sum(flags.sum() for flags in differs))
    assert 0 < pairs < sum(flags.numel() for flags in differs)

    with torch.no_grad():
        before = score(reference, encoded, leaves)
    practised = []
    for scores, flags in zip(before, differs):
        agent = scores.leaves.view(-1, PRACTICE)
        practised.append(SimpleNamespace(differs=flags, ref_expert=scores.trunk, ref_agent=agent))
    loss, info = step_dpo_loss(score(model, encoded, leaves), practised, BETA, pairs)
    loss.backward()

    expert, agent = [], []
    for item, actions, flags in zip(encoded, leaves, differs):
        for (step, ids), differing in zip(actions, flags.flatten().tolist()):
            if differing:
                start, end = item.spans[step]
                expert.append((item.ids[:start], item.ids[start:end]))
                agent.append((item.ids[:start], ids))
    expected, figures = naive.implicit_loss(ordinary, plain_reference, expert, agent, BETA)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, value in figures.items():
        assert info[name].item() == pytest.approx(value.item(), abs=1e-4), name
    for ours, naives in zip(model.parameters(), ordinary.parameters(), strict=True):
        largest = naives.grad.abs().max().clamp(min=1e-9)
        assert (ours.grad - naives.grad).abs().max() <= 1e-4 * largest


def test_dpo_over_the_scores_is_eq_6():
    """The same without the records of a run: dpo_loss over what score returns."""
    model, reference = tiny.model("mistral"), tiny.model("mistral", seed=1)
    ordinary, plain_reference = copy.deepcopy(model), copy.deepcopy(reference)
    encoded, _ = tiny.example()
    leaves, _ = practised_at(encoded)
    sides = []
    for policy in (model, reference):
        scores = score(policy, encoded, leaves)
        sides.append(torch.cat([part.trunk.repeat_interleave(PRACTICE) for part in scores]))
        sides.append(torch.cat([part.leaves for part in scores]))
    expert, agent, ref_expert, ref_agent = sides
    loss, _ = dpo_loss(expert, agent, ref_expert.detach(), ref_agent.detach(), BETA)
    pairs = []
    for pair in naive.expert_pairs(encoded):
        pairs += [pair] * PRACTICE
    practice = naive.leaf_pairs(encoded, leaves)
    expected, _ = naive.implicit_loss(ordinary, plain_reference, pairs, practice, BETA)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
