"""Scoring and practice against the naive definition, on every model family."""

import copy

import pytest
import tiny
import torch
from tiny import STOPS, example, late_branches, random_ids
from torch.utils._python_dispatch import TorchDispatchMode

import naive
import rollout
import tree
from rollout import Scores, pass_tokens, practice, run_episodes, score
from system.family import use_tree_attention
from trajectory import Encoded, InputError

FAMILIES = list(tiny.FAMILIES)
OTHER_FAMILIES = list(tiny.OTHER_FAMILIES)


def joined(scores: list[Scores], name: str) -> torch.Tensor:
    """A field of all trajectories, one after another."""
    return torch.cat([getattr(of_trajectory, name) for of_trajectory in scores])


def close(found, expected, tolerance=1e-5) -> bool:
    return torch.allclose(found.double(), expected.double(), atol=tolerance, rtol=1e-5)


def gradients(model, loss) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = []
    for weight in model.parameters():
        found.append(torch.zeros_like(weight) if weight.grad is None else weight.grad.clone())
    return found


def assert_same_gradients(found, expected, tolerance=1e-4):
    for ours, naives in zip(found, expected, strict=True):
        largest = naives.abs().max().clamp(min=1e-9)
        assert (ours - naives).abs().max() <= tolerance * largest


def weighted(*parts: torch.Tensor) -> torch.Tensor:
    """A loss in which every number counts differently."""
    total = 0
    for values in parts:
        weights = torch.linspace(-1, 2, len(values), dtype=values.dtype)
        total = total + (weights * values).sum()
    return total


def loss_of(scores: list[Scores]) -> torch.Tensor:
    names = ("trunk", "leaves", "trunk_entropy", "leaf_entropy")
    return weighted(*[joined(scores, name) for name in names])


def each(value_of, model, pairs) -> torch.Tensor:
    """A naive value of each token of each (state, action)."""
    return torch.cat([value_of(model, *pair) for pair in pairs])


def naive_loss(model, expert, agent) -> torch.Tensor:
    values = [naive.sums(model, expert), naive.sums(model, agent)]
    for pairs in (expert, agent):
        values.append(each(naive.entropies, model, pairs))
    return weighted(*values)


def flat(practised) -> list[list[int]]:
    """[trajectory][step][k] -> every practice action."""
    actions = []
    for steps in practised:
        for of_step in steps:
            actions += of_step
    return actions


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ------------------------------------------------------------------------------------------- score

SCORED = [(family, 1, example) for family in FAMILIES]
SCORED += [(family, 3, example) for family in FAMILIES]
SCORED += [(family, 3, late_branches) for family in FAMILIES + OTHER_FAMILIES]


@pytest.mark.parametrize("family, number, made", SCORED)
def test_score_is_one_forward_pass_per_state(family, number, made):
    model = tiny.model(family)
    ordinary = copy.deepcopy(model)
    encoded, leaves = made()
    encoded, leaves = encoded[:number], leaves[:number]
    scores = score(model, encoded, leaves, with_entropy=True)
    assert len(scores) == number
    expert = naive.expert_pairs(encoded)
    agent = naive.leaf_pairs(encoded, leaves)
    for name, pairs in (("trunk", expert), ("leaf", agent)):
        logps = each(naive.token_logps, ordinary, pairs)
        entropies = each(naive.entropies, ordinary, pairs)
        assert close(joined(scores, f"{name}_tokens"), logps)
        assert close(joined(scores, f"{name}_entropy"), entropies)
    assert close(joined(scores, "trunk"), naive.sums(ordinary, expert))
    assert close(joined(scores, "leaves"), naive.sums(ordinary, agent))
    states = [naive.last_hidden(ordinary, state) for state, _ in expert]
    assert close(joined(scores, "state_hidden"), torch.stack(states))
    expected = gradients(ordinary, naive_loss(ordinary, expert, agent))
    assert_same_gradients(gradients(model, loss_of(scores)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_score_keeps_the_order_of_leaves(family):
    model = tiny.model(family)
    encoded, leaves = example()
    order = [3, 0, 4, 2, 1]
    [scores] = score(model, encoded[:1], leaves[:1])
    [reordered] = score(model, encoded[:1], [[leaves[0][place] for place in order]])
    assert close(reordered.leaves, scores.leaves[order])
    assert scores.leaves.unique().numel() == 5


def test_score_without_leaves():
    model = tiny.model()
    ordinary = copy.deepcopy(model)
    encoded, _ = example()
    scores = score(model, encoded)
    for found in scores:
        assert found.leaves.shape == found.leaf_tokens.shape == (0,)
    assert close(joined(scores, "trunk"), naive.sums(ordinary, naive.expert_pairs(encoded)))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_actions_without_an_observation_between_them(family):
    """The last token of one action is the state of the next; its gradient counts once."""
    model = tiny.model(family)
    ordinary = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    encoded = [Encoded(random_ids(20, generator), [(4, 7), (7, 13), (13, 20)])]
    leaves = [[(1, random_ids(3, generator)), (2, random_ids(5, generator))]]
    [found] = score(model, encoded, leaves, with_entropy=True)
    expert = naive.expert_pairs(encoded)
    assert close(found.trunk, naive.sums(ordinary, expert))
    states = [naive.last_hidden(ordinary, state) for state, _ in expert]
    assert close(found.state_hidden, torch.stack(states))
    loss = naive_loss(ordinary, expert, naive.leaf_pairs(encoded, leaves))
    expected = gradients(ordinary, loss)
    assert_same_gradients(gradients(model, loss_of([found])), expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_score_alone_equals_score_among_others(family):
    model = tiny.model(family)
    encoded, leaves = late_branches()
    packed = score(model, encoded, leaves, with_entropy=True)
    for item, actions, found in zip(encoded, leaves, packed):
        [alone] = score(model, [item], [actions], with_entropy=True)
        for name, values in vars(alone).items():
            assert close(getattr(found, name), values), name


@pytest.mark.parametrize("made", [example, late_branches])
def test_a_pass_computes_nothing_twice(made):
    """What leaves share with the expert or have twice is read once; the head answers once."""
    model = tiny.model()
    use_tree_attention(model)
    encoded, leaves = made()
    passes = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: passes.append(inputs[0].numel())
    )
    model.lm_head.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    score(model, encoded, leaves)
    new = set()
    for item, actions in zip(encoded, leaves):
        for step, ids in actions:
            rest = ids[rollout.shared(item, step, ids) :]
            new.add((item.task_id, step, tuple(rest)))
    predictions = set()
    for state, action in naive.expert_pairs(encoded) + naive.leaf_pairs(encoded, leaves):
        for place, token in enumerate(action):
            predictions.add((*state, *action[:place], token))
    trunk_tokens = sum(len(item.ids) for item in encoded)
    assert passes == [trunk_tokens + sum(len(rest) for *_, rest in new), len(predictions)]
    assert passes[0] == sum(map(pass_tokens, encoded, leaves))


def test_what_leaves_share_with_the_expert_is_most_of_them():
    """Or the test above would show little."""
    encoded, leaves = late_branches()
    written = 0
    for actions in leaves:
        written += sum(len(ids) for _, ids in actions)
    trunk_tokens = sum(len(item.ids) for item in encoded)
    assert written > 2 * (sum(map(pass_tokens, encoded, leaves)) - trunk_tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("made", [example, late_branches])
def test_gradient_checkpointing_changes_nothing(family, made):
    model = tiny.model(family).train()
    use_tree_attention(model)
    encoded, leaves = made()
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = score(model, encoded, leaves, with_entropy=True)
    plain_gradients = gradients(model, loss_of(plain))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    again = score(model, encoded, leaves, with_entropy=True)
    again_gradients = gradients(model, loss_of(again))
    # It really was computed again in the backward pass.
    assert len(calls) == 3
    assert torch.equal(joined(plain, "trunk"), joined(again, "trunk"))
    assert torch.equal(joined(plain, "leaves"), joined(again, "leaves"))
    assert all(map(torch.equal, plain_gradients, again_gradients))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_score_with_folded_heads(family, monkeypatch):
    """As on CUDA, where query heads that share keys stand one behind the other under a mask."""
    model = tiny.model(family)
    encoded, leaves = late_branches()
    plain = score(model, encoded, leaves, with_entropy=True)
    plain_gradients = gradients(model, loss_of(plain))
    monkeypatch.setattr(tree, "folds", lambda query: True)
    folded = score(model, encoded, leaves, with_entropy=True)
    assert close(joined(folded, "trunk"), joined(plain, "trunk"))
    assert close(joined(folded, "leaves"), joined(plain, "leaves"))
    assert_same_gradients(gradients(model, loss_of(folded)), plain_gradients)


def test_entropies_are_computed_only_when_asked():
    encoded, _ = example()
    [found, *_] = score(tiny.model(), encoded)
    assert found.trunk_tokens.requires_grad
    assert found.trunk_entropy is None
    assert found.leaf_entropy is None
    [found, *_] = score(tiny.model(), encoded, with_entropy=True)
    assert found.trunk_entropy.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_score_under_bfloat16_autocast(family):
    model = tiny.model(family).float()
    ordinary = copy.deepcopy(model)
    encoded, leaves = example()
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(model, encoded, leaves, with_entropy=True)
    for name in ("trunk", "leaves", "trunk_tokens", "leaf_entropy"):
        assert joined(scores, name).dtype == torch.float32
    found = torch.cat([joined(scores, "trunk_tokens"), joined(scores, "leaf_tokens")])
    pairs = naive.expert_pairs(encoded) + naive.leaf_pairs(encoded, leaves)
    expected = each(naive.token_logps, ordinary, pairs)
    assert (found - expected).abs().mean() < 0.05
    assert expected.std() > 0.5
    ours = torch.cat([part.flatten() for part in gradients(model, -found.mean())])
    naives = torch.cat([part.flatten() for part in gradients(ordinary, -expected.mean())])
    assert ours.dtype == torch.float32
    assert torch.cosine_similarity(ours, naives, 0) > 0.98


def test_inputs_are_not_mutated():
    model = tiny.model("mistral")
    encoded, leaves = example()
    before = copy.deepcopy((encoded, leaves))
    weights = copy.deepcopy(model.state_dict())
    joined(score(model, encoded, leaves), "trunk").sum().backward()
    practice(model, encoded, 2, 1.0, 5, STOPS, torch.Generator().manual_seed(0))
    assert (encoded, leaves) == before
    for name, values in model.state_dict().items():
        assert torch.equal(values, weights[name])


def test_an_empty_leaf_is_refused():
    encoded, _ = example()
    with pytest.raises(AssertionError, match="step 0 of a"):
        score(tiny.model(), encoded[:1], [[(0, [])]])


def test_an_unsupported_family_is_refused_at_its_first_use():
    model = tiny.model("gemma2")
    encoded, leaves = example()
    for _ in range(2):
        with pytest.raises(InputError, match="soft-capping"):
            score(model, encoded, leaves)
        with pytest.raises(InputError, match="soft-capping"):
            practice(model, encoded, 1, 0.0, 2, STOPS)
        with pytest.raises(InputError, match="soft-capping"):
            run_episodes(model, tiny.chatml(), None, ["t"])


# ---------------------------------------------------------------------------------------- practice


def agreeing(ordinary, seed: int) -> Encoded:
    """A trajectory whose expert does what the agent will do, for three tokens."""
    state = random_ids(15, torch.Generator().manual_seed(seed))
    action = [*naive.greedy(ordinary, state, 3, STOPS), 95, 96]
    return Encoded([*state, *action], [(15, 15 + len(action))], f"agreeing {seed}")


def greedy_everywhere(ordinary, encoded: list[Encoded], limit: int, stops) -> list:
    """practice at temperature 0 with K = 1, by definition."""
    expected = []
    for item in encoded:
        steps = []
        for start, _ in item.spans:
            steps.append([naive.greedy(ordinary, item.ids[:start], limit, stops)])
        expected.append(steps)
    return expected


@pytest.mark.parametrize("family", FAMILIES + OTHER_FAMILIES)
@pytest.mark.parametrize("number", [1, 3])
def test_greedy_practice_is_greedy_decoding_of_every_state(family, number):
    model = tiny.model(family)
    ordinary = copy.deepcopy(model)
    encoded = [*example()[0][:number], agreeing(ordinary, number)]
    found = practice(model, encoded, 1, 0.0, 12, STOPS)
    assert found == greedy_everywhere(ordinary, encoded, 12, STOPS)


@pytest.mark.parametrize("family", FAMILIES)
def test_practice_without_the_kernel_of_cpus(family, monkeypatch):
    """As it is computed where no kernel gives log-normalisers."""
    monkeypatch.setattr(tree, "attention_and_norm", tree.attention_and_norm_plain)
    model = tiny.model(family)
    ordinary = copy.deepcopy(model)
    encoded, _ = example()
    found = practice(model, encoded, 2, 0.0, 12, STOPS)
    for steps, expected in zip(found, greedy_everywhere(ordinary, encoded, 12, STOPS)):
        assert steps == [2 * action for action in expected]
    # Rows left the batch at different times.
    assert len({len(ids) for ids in flat(found)}) > 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_practice_does_not_depend_on_what_the_expert_does(family, temperature):
    """One state, many experts: one does what practice will do, others do it for a while, go on
    behind its end, or stop at once."""
    model = tiny.model(family)
    ordinary = copy.deepcopy(model)
    use_tree_attention(model)
    state = random_ids(15, torch.Generator().manual_seed(4))
    stops = {1, 2, 3}

    def with_experts(k: int, *actions: list[int]):
        encoded = [Encoded(state + action, [(15, 15 + len(action))]) for action in actions]
        generators = seeded(*[0] * len(actions))
        return practice(model, encoded, k, temperature, 12, stops, generators)

    [[drawn]] = with_experts(5, [96])
    if temperature == 0:
        assert drawn[0] == naive.greedy(ordinary, state, 12, stops)
    experts = []
    for action in drawn:
        for length in {1, len(action) // 2, len(action) - 1, len(action)} - {0}:
            for rest in ([], [96], [96] * 9):
                experts.append(action[:length] + rest)
    assert with_experts(5, *experts) == [[drawn]] * len(experts)
    passes = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    assert with_experts(1, drawn[0]) == [[drawn[:1]]]
    # The prefill alone.
    assert len(passes) == 1


def kind_of(action: list[int], expert: list[int]) -> str:
    """How a practice action leaves the expert's."""
    common = rollout.shared(Encoded(expert, [(0, len(expert))]), 0, action)
    if action == expert:
        return "equal"
    if common == len(action):
        return "stops"
    if common == len(expert):
        return "beyond"
    return {0: "first", 1: "second"}.get(common, "late")


@pytest.mark.parametrize("family", FAMILIES)
def test_practice_takes_each_token_with_its_own_random_number(family):
    """Row k of a step's random numbers makes action k, token by token.

    Experts do what one of the actions will do, for a while, to its end or beyond, with and without
    an observation before.
    """
    model = tiny.model(family, vocab=12, sharp=6.0)
    ordinary = copy.deepcopy(model)
    temperatures, limit, stops = [1.0, 0.0, 0.7], 7, {3}
    generator = torch.Generator().manual_seed(8)
    encoded, expected, kinds = [], [], set()
    for seed in range(6):
        [source] = seeded(seed)
        noise = torch.rand(4, 3, limit, generator=source, dtype=torch.float64)
        ids, spans, steps = random_ids(5, generator, 12), [], []
        for step in range(4):
            ids = ids + random_ids(3 * (step % 2), generator, 12)
            drawn = []
            for temperature, numbers in zip(temperatures, noise[step]):
                drawn.append(naive.sampled(ordinary, ids, temperature, stops, numbers))
            followed = drawn[(seed + step) % 3][: (seed + step) % 4 + 1]
            expert = followed + random_ids((seed + 2 * step) % 3, generator, 12)
            spans.append((len(ids), len(ids) + len(expert)))
            ids = ids + expert
            steps.append(drawn)
            kinds |= {kind_of(action, expert) for action in drawn}
        encoded.append(Encoded(ids, spans, f"t{seed}"))
        expected.append(steps)
    assert kinds == {"first", "second", "late", "equal", "stops", "beyond"}
    generators = seeded(*range(6))
    assert practice(model, encoded, 3, temperatures, limit, stops, generators, 60) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_practice_under_bfloat16_autocast_is_mostly_that_in_float(family):
    """The same random numbers; where rounding moves a token, what follows moves too."""
    model = tiny.model(family, sharp=6.0).float()
    encoded, _ = example()
    plain = flat(practice(model, encoded, 20, 1.0, 8, STOPS, *seeded(0)))
    with torch.autocast("cpu", torch.bfloat16):
        half = flat(practice(model, encoded, 20, 1.0, 8, STOPS, *seeded(0)))
    same = sum(map(list.__eq__, plain, half))
    assert same > 0.6 * len(plain)
    assert len(set(map(tuple, plain))) > 60


def test_practice_ends_where_the_context_does():
    model = tiny.model(context=24)
    ordinary = copy.deepcopy(model)
    ids = random_ids(24, torch.Generator().manual_seed(2))
    found = practice(model, [Encoded(ids, [(8, 10), (15, 17), (23, 24)])], 1, 0.0, 12, {2})
    expected = []
    for start, allowed in ((8, 12), (15, 9), (23, 1)):
        expected.append(naive.greedy(ordinary, ids[:start], allowed, {2}))
    assert flat(found) == expected
    assert [len(action) for action in expected] == [12, 9, 1]


def test_finished_rows_do_not_stand_past_the_context():
    """GPT-2 has no position there. A row that ends early idles beside one that goes on."""
    model = tiny.model("gpt2", context=24)
    ordinary = copy.deepcopy(model)
    ids = random_ids(24, torch.Generator().manual_seed(2))
    # One of seven ends early: too few to leave the batch.
    starts = [3, 5, 7, 9, 11, 12, 22]
    encoded = Encoded(ids, [(start, start + 1) for start in starts])
    found = practice(model, [encoded], 1, 0.0, 12, {-1})
    expected = []
    for start in starts:
        expected.append(naive.greedy(ordinary, ids[:start], min(12, 24 - start), {-1}))
    assert flat(found) == expected


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_long_practice_outgrows_its_first_buffer(family):
    model = tiny.model(family)
    ordinary = copy.deepcopy(model)
    encoded = example()[0][1:]
    found = practice(model, encoded, 1, 0.0, 70, {1, 2})
    assert found == greedy_everywhere(ordinary, encoded, 70, {1, 2})
    assert max(map(len, flat(found))) == 70


def test_a_practice_action_ends_with_its_stop_token_or_at_the_limit():
    encoded, _ = example()
    leaves = flat(practice(tiny.model(), encoded, 20, 1.0, 6, STOPS, *seeded(0)))
    for ids in leaves:
        assert ids[-1] in STOPS or len(ids) == 6
        assert not STOPS & set(ids[:-1])
    assert any(len(ids) == 6 and ids[-1] not in STOPS for ids in leaves)
    assert any(len(ids) == 1 for ids in leaves)


def test_every_practice_action_has_its_own_temperature():
    model = tiny.model()
    ordinary = copy.deepcopy(model)
    encoded, _ = example()
    drawn = flat(practice(model, encoded, 3, [0, 1.0, 0.0], 10, STOPS, *seeded(3)))
    expected = flat(greedy_everywhere(ordinary, encoded, 10, STOPS))
    assert drawn[0::3] == drawn[2::3] == expected
    assert drawn[1::3] != expected


def test_finished_rows_leave_the_batch():
    """In bulk, as soon as a fifth of the rows have ended."""
    model = tiny.model(sharp=6.0)
    use_tree_attention(model)
    encoded, _ = example()
    rows = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0].shape[0])
    )
    drawn = practice(model, encoded, 30, 1.0, 20, STOPS, *seeded(0))
    # A leaf reads what it wrote from its branch on, but for its last token.
    needed = 0
    for item, steps in zip(encoded, drawn):
        for step, actions in enumerate(steps):
            for ids in actions:
                needed += max(0, len(ids) - 1 - rollout.shared(item, step, ids))
    prefill, *decoded = rows
    assert prefill == 1
    assert needed <= sum(decoded) <= needed / 0.8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_looking_seldom_changes_no_action(temperature, monkeypatch):
    """As on CUDA, where a look waits for the GPU."""
    model = tiny.model("mistral", context=40)
    encoded, _ = example()

    def draw():
        return practice(model, encoded, 4, temperature, 20, STOPS, seeded(0, 1, 2))

    often = draw()
    monkeypatch.setattr(rollout, "passes_between_looks", lambda device: 8)
    assert draw() == often
    assert len({len(ids) for ids in flat(often)}) > 3


class Waits(TorchDispatchMode):
    """Counts the calls for which the host would wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_truth = False
        if name.startswith("index"):
            indices = [index for index in args[1] if index is not None]
            by_truth = any(index.dtype == torch.bool for index in indices)
        self.count += by_truth or name in self.NAMES
        return func(*args, **(kwargs or {}))


def test_between_looks_the_host_waits_for_nothing(monkeypatch):
    model = tiny.model()
    use_tree_attention(model)
    encoded, _ = example()
    monkeypatch.setattr(rollout, "passes_between_looks", lambda device: 8)
    waits = []
    for longest in (9, 25):
        with Waits() as counted:
            practice(model, encoded, 2, [0.0, 1.0], longest, {-1}, seeded(0, 0, 0))
        waits.append(counted.count)
    # Sixteen passes more: two looks.
    assert waits[1] - waits[0] == 2


def test_sampling_does_not_depend_on_packing():
    model = tiny.model("mistral")
    encoded, _ = example()

    def draw(items, *seeds, **more):
        return practice(model, items, 4, 1.0, 12, STOPS, seeded(*seeds), **more)

    together = draw(encoded, 0, 1, 2)
    assert together == [draw([item], seed)[0] for seed, item in enumerate(encoded)]
    assert draw(encoded[::-1], 2, 1, 0) == together[::-1]
    # A prefill pass for each trunk; for two and one.
    for most in (1, len(encoded[0].ids) + len(encoded[1].ids)):
        assert draw(encoded, 0, 1, 2, prefill_tokens=most) == together
    assert draw(encoded, 5, 6, 7) != together
    # The K actions of a state differ.
    assert len({tuple(ids) for ids in together[0][0]}) > 1


def test_groups_hold_at_most_the_limit():
    sizes = [4, 3, 9, 2, 5]
    assert rollout.grouped(range(5), sizes.__getitem__, 7) == [[0, 1], [2], [3, 4]]
    assert rollout.grouped([], len, 7) == []


def test_a_prefill_reads_each_trunk_once_and_no_further_than_it_must():
    model = tiny.model()
    use_tree_attention(model)
    encoded, _ = example()
    passes = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: passes.append(inputs[0].numel())
    )
    practice(model, encoded, 2, 1.0, 1, {1}, *seeded(0))
    assert passes == [sum(item.spans[-1][1] - 1 for item in encoded)]
    passes.clear()
    practice(model, encoded, 2, 1.0, 1, {1}, *seeded(0), prefill_tokens=45)
    assert passes == [29 + 8, 17]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("expert", [[2], [1, 5]])
def test_sampled_actions_have_the_policy_distribution(temperature, expert):
    """Chi-square over all actions of at most two tokens from a vocabulary of six.

    59.7 is the 99.9% quantile for 30 degrees of freedom.
    """
    model = tiny.model(vocab=6)
    ordinary = copy.deepcopy(model)
    state, stop, draws = [3, 1, 4, 1], 5, 6000
    item = Encoded(state + expert, [(4, 4 + len(expert))])
    [[drawn]] = practice(model, [item], draws, temperature, 2, {stop}, *seeded(0))

    @torch.no_grad()
    def probabilities(ids):
        return torch.softmax(naive.logits(ordinary, ids)[-1] / temperature, -1).tolist()

    first = probabilities(state)
    expected = {(stop,): first[stop]}
    for token in range(stop):
        for following, share in enumerate(probabilities([*state, token])):
            expected[token, following] = first[token] * share
    assert sum(expected.values()) == pytest.approx(1)
    assert max(expected.values()) > 3 / 31
    distance, counted = 0, 0
    for action, share in expected.items():
        count = drawn.count(list(action))
        counted += count
        distance += (count - draws * share) ** 2 / (draws * share)
    assert counted == draws
    assert distance < 59.7
