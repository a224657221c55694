"""Rendering, scoring, practice and episodes, against the naive definition."""
import copy
import functools
import random
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

import naive
import rollout
import tiny
from rollout import (Encoded, InputError, Step, Trajectory, action_ids, encode, practice, run_episodes, sample, segment, stop_ids,
                     use_tree_attention)

score = functools.partial(rollout.score, with_entropy=True)             # so that every value has a gradient to compare

FAMILIES = list(tiny.FAMILIES)
STOPS = set(range(1, 14))                                                # of 97 tokens: some leaves stop early, some do not


def tokens(n, gen, vocab=97):
    return torch.randint(3, vocab, (n,), generator=gen).tolist()


def example(vocab=97):
    """Three trajectories, longer than the sliding windows; leaves in no order, several at one step, none at another."""
    gen = torch.Generator().manual_seed(1)
    encoded = [Encoded(tokens(30, gen, vocab), [(8, 12), (15, 16), (22, 30)], "a"),
               Encoded(tokens(14, gen, vocab), [(5, 9)], "b"),
               Encoded(tokens(21, gen, vocab), [(3, 7), (12, 18)], "c")]
    lengths = [[(2, 4), (0, 3), (0, 1), (2, 2), (0, 12)], [(0, 5)], []]
    return encoded, [[(step, tokens(n, gen, vocab)) for step, n in own] for own in lengths]


def late_branches():
    """The same trajectories with leaves that leave the expert's action late or never: after some tokens, at its end, behind it; some
    stand twice, some part from one another later than from the expert."""
    encoded, _ = example()
    def at(j, step, n, *more):                                           # the expert's first n tokens, and then?
        start, _ = encoded[j].spans[step]
        return step, encoded[j].ids[start:start + n] + list(more)
    return encoded, [[at(0, 2, 8), at(0, 0, 2, 90, 91), at(0, 2, 3, 90), at(0, 0, 4, 92, 93), at(0, 0, 2, 90, 91), at(0, 1, 1),
                      at(0, 2, 5, 90, 91, 92), at(0, 2, 3, 90, 94), at(0, 2, 6), at(0, 0, 0, 95, 96)],
                     [at(1, 0, 1, 90)], [at(2, 1, 6), at(2, 1, 5, 90)]]


def close(found, expected, tol=2e-5):
    return torch.allclose(found.double(), expected.double(), atol=tol, rtol=1e-5)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def same_gradients(found, expected, tol=1e-5):
    return all((a - b).abs().max() <= tol * max(1e-9, b.abs().max()) for a, b in zip(found, expected, strict=True))


def weighted(trunk, leaves, trunk_entropy, leaf_entropy):
    """A loss in which every number counts differently."""
    weight = lambda x: torch.linspace(-1, 2, len(x), dtype=x.dtype) if len(x) else x
    return sum((weight(x) * x).sum() for x in (trunk, leaves, trunk_entropy, leaf_entropy))


def of_scores(s):
    return weighted(s.trunk, s.leaves, s.trunk_entropy, s.leaf_entropy)


def of_naive(model, encoded, leaves):
    trunk, leaf = naive.expert_pairs(encoded), naive.leaf_pairs(encoded, leaves)
    each = lambda pairs: torch.cat([naive.entropies(model, *pair) for pair in pairs])
    return weighted(naive.sums(model, trunk), naive.sums(model, leaf), each(trunk), each(leaf))


# ---- score

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number, made", [(1, example), (3, example), (1, late_branches), (3, late_branches)])
def test_score_is_one_forward_pass_per_state(family, number, made):
    model = tiny.model(family)
    ordinary = copy.deepcopy(model)
    encoded, leaves = (x[:number] for x in made())
    s = score(model, encoded, leaves)
    trunk, leaf = naive.expert_pairs(encoded), naive.leaf_pairs(encoded, leaves)
    assert s.trunk_lengths == [len(a) for _, a in trunk] and s.leaf_lengths == [len(a) for _, a in leaf]
    assert close(s.trunk, naive.sums(ordinary, trunk)) and close(s.leaves, naive.sums(ordinary, leaf))
    for found, of, pairs in ((s.trunk_tokens, naive.token_logps, trunk), (s.leaf_tokens, naive.token_logps, leaf),
                             (s.trunk_entropy, naive.entropies, trunk), (s.leaf_entropy, naive.entropies, leaf)):
        assert close(found, torch.cat([of(ordinary, *pair) for pair in pairs]))
    for found, ends in ((s.state_hidden, [p for p, _ in trunk]), (s.trunk_hidden, [p + a for p, a in trunk]),
                        (s.leaf_hidden, [p + a for p, a in leaf])):
        assert close(found, torch.stack([naive.last_hidden(ordinary, ids) for ids in ends]), 1e-5)
    assert same_gradients(gradients(model, of_scores(s)), gradients(ordinary, of_naive(ordinary, encoded, leaves)))


@pytest.mark.parametrize("family", FAMILIES)
def test_score_keeps_the_order_of_leaves(family):
    model, (encoded, leaves) = tiny.model(family), example()
    order = [3, 0, 4, 2, 1]
    one = score(model, encoded[:1], leaves[:1]).leaves
    other = score(model, encoded[:1], [[leaves[0][j] for j in order]]).leaves
    assert close(other, one[order], 1e-5) and one.unique().numel() == 5


def test_score_without_leaves():
    model, (encoded, _) = tiny.model(), example()
    s = score(model, encoded)
    assert s.leaves.shape == (0,) and s.leaf_hidden.shape == (0, 32) and s.leaf_lengths == []
    assert close(s.trunk, naive.sums(copy.deepcopy(tiny.model()), naive.expert_pairs(encoded)))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_actions_without_an_observation_between_them(family):
    """The last token of one action is the state of the next: wanted once, and its gradient counts once."""
    model, gen = tiny.model(family), torch.Generator().manual_seed(2)
    ordinary = copy.deepcopy(model)
    encoded, leaves = [Encoded(tokens(20, gen), [(4, 7), (7, 13), (13, 20)])], [[(1, tokens(3, gen)), (2, tokens(5, gen))]]
    s = score(model, encoded, leaves)
    assert close(s.trunk, naive.sums(ordinary, naive.expert_pairs(encoded)))
    assert torch.equal(s.state_hidden[1:], s.trunk_hidden[:-1])
    assert same_gradients(gradients(model, of_scores(s)), gradients(ordinary, of_naive(ordinary, encoded, leaves)))


def test_only_wanted_tokens_pass_the_last_layer():
    model, (encoded, leaves), seen = tiny.model(), example(), {0: [], -1: []}
    for layer in seen:
        model.model.layers[layer].mlp.register_forward_pre_hook(lambda _, args, layer=layer: seen[layer].append(args[0].shape[1]))
    s = score(model, encoded, leaves)
    states = len(s.trunk)
    assert seen == {0: [sum(len(e.ids) for e in encoded) + sum(s.leaf_lengths)],
                    -1: [states + sum(s.trunk_lengths) + sum(s.leaf_lengths)]}
    practice(model, encoded, 2, 1.0, 1, {1}, torch.Generator())
    assert seen[0][1:] == [sum(e.spans[-1][1] - 1 for e in encoded)] and seen[-1][1:] == [sum(s.trunk_lengths)]


def test_what_leaves_share_with_the_expert_is_not_computed_again():
    model, (encoded, leaves), seen = tiny.model(), late_branches(), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    s = score(model, encoded, leaves)
    new = {(j, step, tuple(leaf[rollout.shared(e, step, leaf):])) for j, (e, own) in enumerate(zip(encoded, leaves)) for step, leaf in own}
    asked = {(tuple(state + action[:t]), action[t]) for state, action in naive.expert_pairs(encoded) + naive.leaf_pairs(encoded, leaves)
             for t in range(len(action))}
    assert seen == [sum(len(e.ids) for e in encoded) + sum(len(own) for _, _, own in new), len(asked)]
    assert sum(s.leaf_lengths) > 2 * sum(len(own) for _, _, own in new)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_an_ordinary_one_under_another_attention(family):
    model, ids = tiny.model(family), torch.tensor([tokens(12, torch.Generator().manual_seed(3))])
    with torch.no_grad():
        before = copy.deepcopy(model)(ids).logits
        score(model, *example())
        twin = copy.deepcopy(model)
        twin.model.layers[-1].mlp.down_proj.weight.zero_()
        for m, changed in ((model, False), (twin, True)):                # the copy's last layer is its own
            m.set_attn_implementation("eager")
            assert close(m(ids).logits, before, 1e-5) != changed


def test_score_alone_equals_score_among_others():
    model, (encoded, leaves) = tiny.model("mistral"), example()
    packed = score(model, encoded, leaves)
    alone = [score(model, [e], [own]) for e, own in zip(encoded, leaves)]
    for name in ("trunk", "leaves", "trunk_tokens", "leaf_tokens", "leaf_entropy", "state_hidden", "leaf_hidden"):
        assert close(getattr(packed, name), torch.cat([getattr(s, name) for s in alone]), 1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("made", [example, late_branches])
def test_gradient_checkpointing_changes_nothing(family, made):
    model, (encoded, leaves) = tiny.model(family).train(), made()
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    s = score(model, encoded, leaves)
    plain = gradients(model, of_scores(s))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    t = score(model, encoded, leaves)
    again = gradients(model, of_scores(t))
    assert len(calls) == 3                                               # it really was computed again in the backward pass
    assert torch.equal(s.trunk, t.trunk) and torch.equal(s.leaves, t.leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_entropies_are_computed_only_when_asked():
    s = rollout.score(tiny.model(), example()[0])
    assert s.trunk_tokens.requires_grad and s.trunk_entropy is None and s.leaf_entropy is None
    assert score(tiny.model(), example()[0]).trunk_entropy.requires_grad


@pytest.mark.parametrize("most, times", [(0, 2), (10 ** 9, 1)])
def test_the_head_in_chunks_is_the_head_at_once(monkeypatch, most, times):
    model, (encoded, leaves) = tiny.model(), example()
    s = score(model, encoded, leaves)
    plain = gradients(model, of_scores(s))
    calls = []
    model.lm_head.register_forward_hook(lambda _, args, out: calls.append(len(out)))
    monkeypatch.setattr(rollout._head, "__defaults__", (True, 7, most))
    t = score(model, encoded, leaves)
    assert max(calls) == 7 and sum(calls) == len(s.trunk_tokens) + len(s.leaf_tokens)
    assert close(t.trunk_tokens, s.trunk_tokens, 1e-6) and close(t.leaf_entropy, s.leaf_entropy, 1e-6)
    assert same_gradients(gradients(model, of_scores(t)), plain)
    assert sum(calls) == times * (len(s.trunk_tokens) + len(s.leaf_tokens))      # too many logits are not kept for the backward pass


@pytest.mark.parametrize("family", FAMILIES)
def test_score_under_bfloat16_autocast(family):
    model = tiny.model(family).float()
    ordinary, (encoded, leaves) = copy.deepcopy(model), example()
    with torch.autocast("cpu", torch.bfloat16):
        s = score(model, encoded, leaves)
    tokens_ = torch.cat([s.trunk_tokens, s.leaf_tokens])
    pairs = naive.expert_pairs(encoded) + naive.leaf_pairs(encoded, leaves)
    expected = torch.cat([naive.token_logps(ordinary, *pair) for pair in pairs])
    assert tokens_.dtype == s.trunk.dtype == s.leaf_entropy.dtype == torch.float32
    assert (tokens_ - expected).abs().mean() < 0.05 and expected.std() > 0.5
    flat = lambda g: torch.cat([x.flatten() for x in g])
    found, right = flat(gradients(model, -tokens_.mean())), flat(gradients(ordinary, -expected.mean()))
    assert found.dtype == torch.float32 and torch.cosine_similarity(found, right, 0) > 0.98


@pytest.mark.parametrize("family", FAMILIES)
def test_practice_under_bfloat16_autocast_is_mostly_that_in_float(family):
    """The same random numbers; where a token is another one by rounding, so is what follows."""
    model, (encoded, _) = tiny.model(family, sharp=6.0).float(), example()
    draw = lambda: [ids for steps in practice(model, encoded, 20, 1.0, 8, STOPS, torch.Generator().manual_seed(0)) for own in steps for ids in own]
    plain = draw()
    with torch.autocast("cpu", torch.bfloat16):
        half = draw()
    same = [a == b for a, b in zip(plain, half, strict=True)]
    assert 0.6 * len(same) < sum(same) and len(set(map(tuple, plain))) > 60


def test_inputs_are_not_mutated():
    model, (encoded, leaves) = tiny.model("mistral"), example()
    before, weights = copy.deepcopy((encoded, leaves)), copy.deepcopy(model.state_dict())
    score(model, encoded, leaves).trunk.sum().backward()
    practice(model, encoded, 2, 1.0, 5, STOPS, torch.Generator().manual_seed(0))
    assert (encoded, leaves) == before and all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_an_empty_leaf_is_refused():
    with pytest.raises(AssertionError, match="step 0 of a"):
        score(tiny.model(), example()[0][:1], [[(0, [])]])


@pytest.mark.parametrize("made", [
    lambda: GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20),
    lambda: Gemma2Config(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=4, vocab_size=20)])
def test_an_unsupported_family_is_refused(made):
    model = AutoModelForCausalLM.from_config(made())
    with pytest.raises(InputError, match="not supported; use one of llama, mistral"):
        use_tree_attention(model)
    with pytest.raises(InputError):
        score(model, *example(20))


def test_the_model_cannot_be_called_without_its_tree():
    model = tiny.model()
    use_tree_attention(model)
    with pytest.raises(AssertionError):
        model(torch.tensor([[1, 2, 3]]))


# ---- practice

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number, products", [(1, False), (3, False), (3, True)])
def test_greedy_practice_is_greedy_decoding_of_every_state(family, number, products, monkeypatch):
    """products: as it is computed where there is no kernel that gives log-normalisers."""
    if products:
        monkeypatch.setattr(rollout, "_weigh", rollout._weigh_by_products)
    model = tiny.model(family)
    ordinary, encoded = copy.deepcopy(model), example()[0][:number]
    found = practice(model, encoded, 2, 0.0, 12, STOPS)
    expected = [[[naive.greedy(ordinary, e.ids[:a], 12, STOPS)] * 2 for a, _ in e.spans] for e in encoded]
    assert found == expected
    lengths = {len(ids) for steps in found for own in steps for ids in own}
    assert len(lengths) > 1                                              # rows left the batch at different times


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_practice_does_not_depend_on_what_the_expert_does(family, temperature):
    """One state, many experts: who does what practice will say, who does it for a while, who goes on behind its end, who stops at once."""
    model, gen = tiny.model(family), torch.Generator().manual_seed(4)
    ordinary = copy.deepcopy(model)
    state, gens = tokens(15, gen), lambda n: [torch.Generator().manual_seed(0) for _ in range(n)]
    with_expert = lambda *actions: [Encoded(state + a, [(15, 15 + len(a))]) for a in actions]
    [[drawn]] = practice(model, with_expert([96]), 5, temperature, 12, {1, 2, 3}, gens(1))
    assert temperature or drawn[0] == naive.greedy(ordinary, state, 12, {1, 2, 3})
    others = [own[:n] + rest for own in drawn for n in (1, len(own) // 2, len(own) - 1, len(own)) for rest in ([], [96], [96] * 9) if n]
    passes = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[0]))
    assert practice(model, with_expert(*others), 5, temperature, 12, {1, 2, 3}, gens(len(others))) == [[drawn]] * len(others)
    passes.clear()
    assert practice(model, with_expert(drawn[0]), 1, temperature, 12, {1, 2, 3}, gens(1)) == [[drawn[:1]]]
    assert passes == [1]                                                 # the prefill alone


@pytest.mark.parametrize("family", FAMILIES)
def test_practice_takes_each_token_with_its_own_random_number(family):
    """Row i of the trajectory's random numbers makes action i, token by token. Experts say what one of the actions will say, for a while,
    to its end or beyond, with and without an observation before."""
    model, temperatures, limit, stops = tiny.model(family, vocab=12, sharp=6.0), [1.0, 0.0, 0.7], 7, {3}
    ordinary, gen, kinds = copy.deepcopy(model), torch.Generator().manual_seed(8), set()
    encoded, expected = [], []
    for seed in range(6):
        noise = torch.rand(12, limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ids, spans, steps = tokens(5, gen, 12), [], []
        for step in range(4):
            ids = ids + tokens(3 * (step % 2), gen, 12)
            steps.append([naive.sampled(ordinary, ids, heat, stops, u) for heat, u in zip(temperatures, noise[3 * step:3 * step + 3])])
            own = steps[-1][(seed + step) % 3]
            action = own[:(seed + step) % 4 + 1] + tokens((seed + 2 * step) % 3, gen, 12)
            spans.append((len(ids), len(ids) + len(action)))
            ids = ids + action
            common = [rollout.shared(Encoded(ids, spans), step, x) for x in steps[-1]]
            kinds |= {("first" if n == 0 else "equal" if x == action else "stops" if n == len(x) else "beyond" if n == len(action) else
                       "late" if n > 1 else "second") for n, x in zip(common, steps[-1])}
        encoded.append(Encoded(ids, spans, f"t{seed}"))
        expected.append(steps)
    assert kinds == {"first", "second", "late", "equal", "stops", "beyond"}
    gens = [torch.Generator().manual_seed(seed) for seed in range(6)]
    assert practice(model, encoded, 3, temperatures, limit, stops, gens, 60) == expected


def test_practice_ends_where_the_context_does():
    model = tiny.model(context=24)
    ordinary, encoded = copy.deepcopy(model), [Encoded(tokens(24, torch.Generator().manual_seed(2)), [(8, 10), (15, 17), (23, 24)])]
    [found] = practice(model, encoded, 1, 0.0, 12, {2})
    assert found == [[naive.greedy(ordinary, encoded[0].ids[:a], n, {2})] for a, n in ((8, 12), (15, 9), (23, 1))]
    assert [len(own[0]) for own in found] == [12, 9, 1]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_long_practice_outgrows_its_first_buffer(family):
    model = tiny.model(family)
    ordinary, encoded = copy.deepcopy(model), example()[0][1:]
    found = practice(model, encoded, 1, 0.0, 70, {1, 2})
    assert found == [[[naive.greedy(ordinary, e.ids[:a], 70, {1, 2})] for a, _ in e.spans] for e in encoded]
    assert max(len(ids) for steps in found for own in steps for ids in own) == 70


def test_a_practice_action_ends_with_its_stop_token_or_at_the_limit():
    drawn = practice(tiny.model(), example()[0], 20, 1.0, 6, STOPS, torch.Generator().manual_seed(0))
    leaves = [ids for steps in drawn for own in steps for ids in own]
    assert all(ids[-1] in STOPS or len(ids) == 6 for ids in leaves) and not any(STOPS & set(ids[:-1]) for ids in leaves)
    assert any(len(ids) == 6 and ids[-1] not in STOPS for ids in leaves) and any(len(ids) == 1 for ids in leaves)


def test_every_practice_action_has_its_own_temperature():
    model = tiny.model()
    ordinary, encoded = copy.deepcopy(model), example()[0]
    found = practice(model, encoded, 3, [0, 1.0, 0.0], 10, STOPS, torch.Generator().manual_seed(3))
    for e, steps in zip(encoded, found):
        for (a, _), (first, sampled, last) in zip(e.spans, steps):
            assert first == last == naive.greedy(ordinary, e.ids[:a], 10, STOPS)
    assert any(own[1] != own[0] for steps in found for own in steps)


def test_sampling_does_not_depend_on_packing():
    model, (encoded, _) = tiny.model("mistral"), example()
    gens = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]
    together = practice(model, encoded, 4, 1.0, 12, STOPS, gens(0, 1, 2))
    assert together == [practice(model, [e], 4, 1.0, 12, STOPS, gens(j))[0] for j, e in enumerate(encoded)]
    assert practice(model, encoded[::-1], 4, 1.0, 12, STOPS, gens(2, 1, 0)) == together[::-1]
    for passes in (1, len(encoded[0].ids) + len(encoded[1].ids)):        # a prefill pass for each trunk; for two and one
        assert practice(model, encoded, 4, 1.0, 12, STOPS, gens(0, 1, 2), prefill_tokens=passes) == together
    assert practice(model, encoded, 4, 1.0, 12, STOPS, gens(5, 6, 7)) != together
    assert len({tuple(ids) for ids in together[0][0]}) > 1               # the K actions of a state differ


@pytest.mark.parametrize("temperature, expert", [(1.0, [2]), (0.6, [2]), (1.0, [1, 5]), (0.6, [1, 5])])
def test_sampled_actions_have_the_policy_distribution(temperature, expert):
    """Chi-square over all actions of at most two tokens from a vocabulary of six; 59.7 is the 99.9% quantile for 30 degrees."""
    model, stop, n = tiny.model(vocab=6), 5, 6000
    ordinary, state = copy.deepcopy(model), [3, 1, 4, 1]
    [[drawn]] = practice(model, [Encoded(state + expert, [(4, 4 + len(expert))])], n, temperature, 2, {stop}, torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = lambda ids: torch.softmax(naive.logits(ordinary, ids)[-1] / temperature, -1).tolist()
        first = p(state)
        expected = {(stop,): first[stop]} | {(a, b): first[a] * q for a in range(5) for b, q in enumerate(p(state + [a]))}
    assert sum(expected.values()) == pytest.approx(1) and max(expected.values()) > 3 / 31
    counts = {action: drawn.count(list(action)) for action in expected}
    assert sum(counts.values()) == n
    assert sum((counts[a] - n * q) ** 2 / (n * q) for a, q in expected.items()) < 59.7


def test_sample_inverts_the_distribution_function():
    logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(6, 3)
    u = torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 1 - 1e-16], dtype=torch.float64)
    assert sample(logits, torch.ones(6), u).tolist() == [0, 0, 1, 1, 2, 2]
    assert sample(logits, torch.zeros(6), u).tolist() == [2] * 6         # temperature 0 does not look at u
    assert sample(logits[:2], torch.tensor([1.0, 0.0]), u[:2]).tolist() == [0, 2]
    # temperature 1/2 squares the odds: 4, 9, 25 of 38
    assert sample(logits[:4], torch.full((4,), 0.5), torch.tensor([3.9, 4.1, 12.9, 13.1]).double() / 38).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("size", [127, 128, 129, 1000, 8192])
def test_sampling_block_by_block_inverts_the_whole_distribution_function(size):
    """In each block and at its borders; rounding (float32 sums of a block, float64 here) may move a border by 1e-6."""
    gen = torch.Generator().manual_seed(size)
    logits, heat = 3 * torch.randn(7, size, generator=gen), torch.tensor([0.3, 0.5, 1.0, 1.0, 1.0, 2.0, 9.0])
    cdf = torch.softmax(logits.double() / heat[:, None], -1).cumsum(-1)
    border = torch.cat([torch.zeros(7, 1), cdf[:, :-1]], 1)
    middle = (border + cdf) / 2
    for token in {*range(0, size, 97), *range(127, size, 128), *range(0, size, 128), size - 1}:
        wide = cdf[:, token] - border[:, token] > 4e-6
        drawn = torch.stack([sample(logits, heat, u.clamp(max=1 - 1e-16)) for u in
                             (border[:, token] + 1e-6, middle[:, token], cdf[:, token] - 1e-6)])
        assert (drawn[:, wide] == token).all()
    many = torch.rand(500, 7, dtype=torch.float64, generator=gen)
    drawn = torch.stack([sample(logits, heat, u) for u in many], 1)
    assert (many.T < cdf.gather(1, drawn) + 1e-6).all() and (many.T > border.gather(1, drawn) - 1e-6).all()
    assert torch.equal(drawn[2:3, :50], torch.stack([sample(logits[2:3], heat[2:3], u[2:3]) for u in many[:50]], 1))       # alone, the same


def test_impossible_tokens_are_never_sampled():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(3, 5)
    assert sample(logits, torch.ones(3), torch.tensor([0.0, 0.5, 1 - 1e-16], dtype=torch.float64)).tolist() == [1, 3, 3]
    gen, logits = torch.Generator().manual_seed(0), torch.full((50, 1000), -torch.inf)         # blocks without any, possible ones before the end of a block
    logits[:, 260:300] = torch.randn(50, 40, generator=gen)
    logits[:, 390:400] = torch.randn(50, 10, generator=gen)
    p = logits.softmax(-1).double()
    border = (p[:, :300].sum(-1) / p.sum(-1))[:, None] + torch.linspace(-2e-7, 2e-7, 400, dtype=torch.float64)
    us = torch.cat([border, (1 - torch.logspace(-16, -6, 200, dtype=torch.float64)).expand(50, -1)], 1)
    drawn = torch.stack([sample(logits, torch.ones(50), u) for u in us.T], 1)
    assert (p.gather(1, drawn) > 0).all()
    cdf, ends = torch.tensor([[0.0, 0.5, 0.5, 1.0, 1.0]]).double(), [-1e-17, 0.0, 0.5, 1.0, 1 + 1e-15]         # rounding on both sides
    assert [rollout._inverse(cdf, torch.tensor([[x]]).double()).item() for x in ends] == [1, 1, 3, 3, 3]


# ---- episodes

class Parrot:
    """A scripted world: answers of many lengths that depend on all that was said; some episodes end by themselves."""

    def __init__(self, turns=6):
        self.turns, self.closed = turns, []

    def max_steps(self, task):
        return self.turns

    def start(self, task):
        return ParrotEpisode(self, task), f"Task {task}. " + "You see a desk. " * (len(task) % 3)


class ParrotEpisode:
    def __init__(self, env, task):
        self.env, self.said, self.task = env, task, task

    def step(self, text):
        self.said += "|" + text
        rng = random.Random(self.said)
        done = rng.random() < 0.15
        return "mug 1, " * rng.randrange(7) + "pen 2.", rng.random(), done, {"valid": rng.random() < 0.5}

    def close(self):
        self.env.closed.append(self.task)


def talker(make=tiny.chatml, family="llama", context=1000, **more):
    """A random model over a real tokenizer, which stops often enough."""
    tokenizer = make()
    model = tiny.model(family, vocab=len(tokenizer), context=context, **more)
    with torch.no_grad():
        model.lm_head.weight[sorted(stop_ids(tokenizer))] *= 2.5
    return model, tokenizer


TASKS = [f"t{'x' * i}{i}" for i in range(7)]
PROMPT = [{"role": "user", "content": "Rules of the world."}, {"role": "assistant", "content": "OK"}]


def same_episode(a, b):
    what = lambda t: (t.task_id, t.steps, t.reward, t.truncated, t.info["invalid"])
    return what(a) == what(b)


@pytest.mark.parametrize("family, make", [("llama", tiny.chatml), ("mistral", tiny.mistral), ("qwen2", tiny.llama3),
                                          ("qwen3", tiny.chatml)])
def test_episodes_with_a_kept_cache_are_episodes_computed_from_scratch(family, make):
    model, tokenizer = talker(make, family)
    ordinary = copy.deepcopy(model)
    played = run_episodes(model, tokenizer, Parrot(), TASKS, prompt=PROMPT, max_new_tokens=9)
    expected = [naive.play(ordinary, tokenizer, Parrot(), task, PROMPT, 9) for task in TASKS]
    assert all(map(same_episode, played, expected))
    stops, actions = stop_ids(tokenizer), [s.ids for t in played for s in t.steps]
    assert any(ids[-1] in stops for ids in actions) and any(ids[-1] not in stops for ids in actions)
    assert any(t.truncated for t in played) and any(not t.truncated for t in played)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_size_does_not_change_episodes(temperature):
    model, tokenizer = talker(tiny.mistral, "mistral")
    play = lambda tasks, batch, seed=0: run_episodes(model, tokenizer, Parrot(), tasks, batch=batch, temperature=temperature,
                                                     max_new_tokens=8, seed=seed)
    one = play(TASKS, 1)
    assert [t.task_id for t in one] == TASKS and play(TASKS, 3) == one == play(TASKS, 64)
    assert play(TASKS[::-1], 4) == one[::-1]
    assert (play(TASKS, 64, seed=1) == one) == (temperature == 0)


def test_sampled_episodes_take_each_token_with_its_own_random_number():
    model, tokenizer = talker()
    ordinary = copy.deepcopy(model)
    for t in run_episodes(model, tokenizer, Parrot(), TASKS, temperature=1.0, max_new_tokens=8, seed=5):
        generator = torch.Generator().manual_seed(rollout.stable_seed(5, t.task_id))
        ids = rollout.prompt_ids(tokenizer, [], t.steps[0].observation)
        for token, u in zip(t.steps[0].ids, torch.rand(8, generator=generator, dtype=torch.float64)):
            with torch.no_grad():
                logits = ordinary(torch.tensor([ids])).logits[:, -1]
            assert sample(logits, torch.ones(1), u[None]).item() == token
            ids = [*ids, token]


def test_nobody_waits_for_the_longest_action():
    """Actions of 1 to 60 tokens: where all waited for the longest of each turn, 2.4 times as many passes as tokens for each row."""
    model, tokenizer = talker()
    passes, tasks = [0], [f"t{'x' * (i % 7)}{i}" for i in range(40)]
    model.model.register_forward_hook(lambda *hook: passes.__setitem__(0, passes[0] + (hook[-1].last_hidden_state.shape[1] == 1)))
    played = run_episodes(model, tokenizer, Parrot(), tasks, temperature=1.0, max_new_tokens=60, batch=10)
    assert passes[0] < 1.6 * sum(len(step.ids) - 1 for t in played for step in t.steps) / 10


class SlowParrot(Parrot):
    slow = True


def test_slow_worlds_play_the_same_episodes():
    model, tokenizer = talker()
    play = lambda env, batch: run_episodes(model, tokenizer, env, TASKS, batch=batch, max_new_tokens=8)
    assert play(SlowParrot(), 4) == play(SlowParrot(), 1) == play(Parrot(), 4)


def test_a_slow_world_answers_while_others_write():
    model, tokenizer = talker()
    passes, seen = [0], []
    def count(*_):
        time.sleep(0.05)                                                 # a model that takes its time: the world's thread gets to run
        passes[0] += 1
    model.model.register_forward_hook(count)

    class Episode(ParrotEpisode):
        def step(self, text):
            before, until = passes[0], time.time() + 60
            while self.task == "first" and passes[0] == before and time.time() < until:
                time.sleep(0.01)                                         # answers only once the model has moved on
            seen.append((self.task, passes[0] > before))
            return super().step(text)

    class World(SlowParrot):
        def start(self, task):
            return Episode(self, task), "You see a desk."

    run_episodes(model, tokenizer, World(turns=1), ["first", "second"], batch=2, max_new_tokens=4)
    assert ("first", True) in seen


@pytest.mark.parametrize("world", [Parrot, SlowParrot])
def test_after_an_error_no_further_worlds_begin(world):
    model, tokenizer = talker()
    begun = []

    class World(world):
        def start(self, task):
            begun.append(task)
            if len(begun) == 1:
                raise InputError("no such task")
            time.sleep(0.1)
            return super().start(task)

    with pytest.raises(InputError, match="no such task"):
        run_episodes(model, tokenizer, World(), [f"t{i}" for i in range(60)])
    assert len(begun) < 30


def test_groups_hold_at_most_the_limit():
    groups = rollout.grouped([0, 1, 2, 3, 4], lambda j: [4, 3, 9, 2, 5][j], 7)
    assert groups == [[0, 1], [2], [3, 4]] and rollout.grouped([], len, 7) == []


@pytest.mark.parametrize("lengths", [[3], [5, 900, 4], [40] * 9, [1, 2, 4, 8, 600, 500, 20000]])
def test_rows_that_read_together_are_alike_and_all_read_once(lengths):
    groups = rollout._alike(lengths, most=1200)
    assert sorted(j for group in groups for j in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[j] for j in group)
        assert len(group) == 1 or (longest * len(group) <= 1200 and longest <= 2 * min(lengths[j] for j in group) + 64)


def test_an_action_cut_at_the_limit_keeps_its_tokens_and_the_turn_is_closed():
    model, tokenizer = talker()
    env = Parrot()
    ended = []
    played = run_episodes(model, tokenizer, env, TASKS, max_new_tokens=3, temperature=1.0, progress=ended.append)
    assert sum(ended) == len(TASKS) and sorted(env.closed) == sorted(TASKS)
    cut = 0
    for t in played:
        e = encode(t, tokenizer)
        for i, (step, (a, b)) in enumerate(zip(t.steps, e.spans)):
            assert e.ids[a:b] == step.ids and len(step.ids) <= 3
            if step.ids[-1] not in stop_ids(tokenizer):
                assert len(step.ids) == 3 and tokenizer.decode(step.ids) == step.action
                cut += i < len(t.steps) - 1
                assert i == len(t.steps) - 1 or e.ids[b] == tokenizer.eos_token_id              # closed, not supervised
            else:
                assert tokenizer.decode(step.ids[:-1]) == step.action
    assert cut


@pytest.mark.parametrize("longest", [30, 120])
def test_an_episode_that_outgrows_the_context_ends_as_truncated(longest):
    model, tokenizer = talker(context=150)
    if longest > 30:                                                     # never stops by itself: the context cuts actions
        with torch.no_grad():
            model.lm_head.weight[sorted(stop_ids(tokenizer))] = 0
    ordinary = copy.deepcopy(model)
    played = run_episodes(model, tokenizer, Parrot(turns=40), TASKS, max_new_tokens=longest)
    expected = [naive.play(ordinary, tokenizer, Parrot(turns=40), task, [], longest) for task in TASKS]
    assert all(map(same_episode, played, expected))
    outgrown = [t for t in played if t.info.get("outgrown")]
    assert outgrown and all(t.truncated and len(t.steps) < 40 for t in outgrown)
    assert all(len(encode(t, tokenizer).ids) <= 150 for t in played)
    assert all(t.truncated == bool(t.info.get("outgrown")) for t in played)              # 40 turns do not fit in 150 tokens


@pytest.mark.parametrize("world", [Parrot, SlowParrot])
def test_a_prompt_longer_than_the_context_ends_before_it_begins(world):
    model, tokenizer = talker(context=150)
    prompt = [{"role": "user", "content": "mug " * 400}, {"role": "assistant", "content": "OK"}]

    class World(world):
        def start(self, task):
            time.sleep(0.3 * (task == TASKS[0]))                         # the others are over before anybody asks
            return super().start(task)

    played = run_episodes(model, tokenizer, World(turns=3), TASKS, prompt=prompt, max_new_tokens=5)
    assert len(played) == len(TASKS) and all(t.truncated and not t.steps and t.info["outgrown"] for t in played)


def test_the_step_limit_truncates():
    model, tokenizer = talker()
    played = run_episodes(model, tokenizer, Parrot(turns=2), TASKS, max_new_tokens=5)
    assert all(len(t.steps) <= 2 for t in played) and any(t.truncated for t in played)
    assert all(len(t.steps) == 2 and not t.info.get("outgrown") for t in played if t.truncated)


# ---- encode

EXPERT = [Step("You are in a house. Task: find é.", "Thought: I must look.\nAction: go to desk 1"),
          Step("On desk 1: mug 1.", "Thought: ünï\nAction: take mug 1 from desk 1"),
          Step("You take mug 1.", "Thought: done\nAction: look")]
TOKENIZERS = [tiny.chatml, tiny.llama3, tiny.mistral]


def expert(steps=EXPERT, prompt=PROMPT):
    return Trajectory("task-7", copy.deepcopy(prompt), copy.deepcopy(steps))


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("prompt", [[], PROMPT])
def test_supervised_ids_are_the_action_and_its_stop_token(make, prompt):
    tokenizer = make()
    e = encode(expert(prompt=prompt), tokenizer)
    stop = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}[make.__name__]
    assert [tokenizer.decode(e.ids[a:b]) for a, b in e.spans] == [s.action + stop for s in EXPERT]
    assert all(e.ids[b - 1] in stop_ids(tokenizer) and e.ids.count(e.ids[b - 1]) >= len(EXPERT) for _, b in e.spans)
    assert e.task_id == "task-7" and e.spans[-1][1] == len(e.ids)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_every_state_is_what_the_template_writes_for_it(make):
    tokenizer, t = make(), expert()
    e = encode(t, tokenizer)
    for (state, action), (start, end) in zip(segment(t), e.spans, strict=True):
        messages = list(state.prompt)
        for step in state.steps:
            messages += [{"role": "user", "content": step.observation}]
            messages += [{"role": "assistant", "content": step.action}] * bool(step.action)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer(text, add_special_tokens=False).input_ids == e.ids[:start]
        text = tokenizer.apply_chat_template(messages + [{"role": "assistant", "content": action}], tokenize=False)
        assert tokenizer(text, add_special_tokens=False).input_ids[:end] == e.ids[:end]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_the_ok_turn_is_not_supervised(make):
    tokenizer = make()
    e, without = encode(expert(), tokenizer), encode(expert(prompt=[]), tokenizer)
    assert "OK" in tokenizer.decode(e.ids[:e.spans[0][0]]) and "Rules" in tokenizer.decode(e.ids[:e.spans[0][0]])
    assert [e.ids[a:b] for a, b in e.spans] == [without.ids[a:b] for a, b in without.spans]


def test_the_stop_token_is_supervised_where_pad_is_eos():
    tokenizer = tiny.chatml()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    e = encode(expert(), tokenizer)
    assert all(e.ids[b - 1] == tokenizer.eos_token_id for _, b in e.spans)
    assert score(tiny.model(vocab=len(tokenizer)), [e]).trunk_lengths == [b - a for a, b in e.spans]


@pytest.mark.parametrize("make", [tiny.llama3, tiny.mistral])
def test_there_is_one_bos(make):
    tokenizer = make()
    ids = encode(expert(), tokenizer).ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("make", TOKENIZERS)
def test_sampled_ids_are_used_as_they_are(make, monkeypatch):
    """One token a character, as no tokenizer would write it; text and ids may even disagree."""
    tokenizer, t = make(), expert()
    usual, stop = encode(t, tokenizer), action_ids(tokenizer, "x")[-1]
    odd = [i for c in "Action" for i in tokenizer(c, add_special_tokens=False).input_ids] + [stop]
    cut = odd[:4]
    t.steps[0].ids, t.steps[1].ids = list(odd), list(cut)
    e = encode(t, tokenizer)
    (a, b), (c, d), (x, y) = e.spans
    assert e.ids[a:b] == odd and e.ids[b - 1] == stop and e.ids[c:d] == cut and e.ids[d] == stop
    assert e.ids[x:y] == usual.ids[usual.spans[2][0]:usual.spans[2][1]]
    between = usual.ids[usual.spans[0][1]:usual.spans[1][0]]
    assert e.ids[b:c] == between and t.steps[0].ids == odd and t.steps[1].ids == cut


def test_a_cut_last_action_is_not_closed():
    tokenizer, t = tiny.chatml(), expert()
    t.steps[-1].ids = [5, 6]
    e = encode(t, tokenizer)
    assert e.ids[-2:] == [5, 6] and e.spans[-1] == (len(e.ids) - 2, len(e.ids))


def test_a_template_that_drops_old_thinking_is_refused():
    t = expert([Step("o1", "<think>plan</think>Action: a"), Step("o2", "<think>more</think>Action: b")])
    with pytest.raises(InputError, match="breaks the prefix property in trajectory task-7") as error:
        encode(t, tiny.qwen3())
    assert "\n" not in str(error.value)
    assert len(encode(expert(), tiny.qwen3()).spans) == 3                # without thinking it keeps every turn


def test_a_tokenizer_without_template_is_refused():
    for call in (stop_ids, lambda tokenizer: encode(expert(), tokenizer)):
        with pytest.raises(InputError, match="no chat template"):
            call(tiny.byte_level(["<s>", "</s>"], None, eos_token="</s>"))


def test_a_template_without_a_stop_token_is_refused():
    with pytest.raises(InputError, match="without a special stop token"):
        encode(expert(), tiny.byte_level(["</s>"], "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
                                         eos_token="</s>"))


def test_a_prompt_that_the_template_refuses_is_an_input_error():
    """Mistral-v0.1 has no system role; its template raises."""
    with pytest.raises(InputError, match="template") as error:
        encode(expert(prompt=[{"role": "system", "content": "Be brief."}]), tiny.mistral())
    assert "\n" not in str(error.value)


def test_a_trajectory_without_actions_is_refused():
    with pytest.raises(InputError, match="task-7 has no actions"):
        encode(expert([]), tiny.chatml())


def test_encode_does_not_mutate_its_trajectory():
    t = expert()
    encode(t, tiny.chatml())
    assert t == expert()


def test_segment_gives_every_state_with_its_expert_action():
    t = expert()
    pairs = segment(t)
    assert [action for _, action in pairs] == [s.action for s in EXPERT]
    for i, (state, _) in enumerate(pairs):
        assert state.steps == EXPERT[:i] + [Step(EXPERT[i].observation, "")]
        assert state.task_id == "task-7" and state.prompt == PROMPT
    assert t == expert()


@pytest.mark.parametrize("queries", [1, 4, 9])
def test_episodes_attend_in_bfloat16_as_in_float(queries):
    """A CPU makes rows of the heads that share keys, for up to 8 queries."""
    torch.manual_seed(0)
    draw = lambda n: [torch.randn(3, heads, n, 16, dtype=torch.bfloat16) for heads in (6, 2, 2)]
    cache, lengths, old, new = rollout.RowCache(3, "cpu"), [40, 17, 30], draw(40), draw(queries)
    cache.begin(40)
    cache.attend(0, *old, 0.25, None)
    cache.lengths = torch.tensor(lengths)
    cache.begin(queries)
    got = cache.attend(0, *new, 0.25, None)
    for r, n in enumerate(lengths):
        keys, values = (torch.cat([x[r, :, :n], y[r]], 1).float().repeat_interleave(3, 0) for x, y in zip(old[1:], new[1:]))
        hidden = torch.arange(n + queries) > n + torch.arange(queries)[:, None]
        weights = (new[0][r].float() @ keys.transpose(1, 2) * 0.25).masked_fill(hidden, -torch.inf).softmax(-1)
        torch.testing.assert_close(got[r].float(), weights @ values, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_cpu_s_kernel_weighs_as_products_do(dtype, tolerance):
    """Attention and log-normalisers, with and without a mask that hides everything from one query."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 16, dtype=dtype) for n in (5, 70, 70))
    hidden = torch.rand(3, 1, 5, 70) < 0.5
    hidden[1, 0, 2] = True
    for mask in (None, torch.zeros(3, 1, 5, 70, dtype=dtype).masked_fill(hidden, -1e30)):
        plain = rollout._weigh_by_products(*(x.float() for x in (q, k, v)), 0.25, mask if mask is None else mask.float())
        for got, want in zip(rollout._weigh(q, k, v, 0.25, mask), plain):
            seen = torch.ones(3, 2, 5, dtype=torch.bool) if mask is None else ~hidden.all(-1).expand(3, 2, 5)
            assert (got.float() - want)[seen].abs().max() < tolerance
            assert not got.isnan().any()
