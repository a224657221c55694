"""Which models are taken, and that tree attention gives them their own log-probs."""

import copy

import pytest
import tiny
import torch
from test_episodes import TASKS, Parrot
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    GPT2Config,
    Phi3Config,
    Starcoder2Config,
)

import naive
import tree
from rollout import practice, run_episodes, score
from system.family import use_tree_attention
from trajectory import Encoded, InputError
from tree import TrunkAndLeaves, sees

ALL_FAMILIES = [*tiny.FAMILIES, *tiny.OTHER_FAMILIES]

BRANCH_LEAVES = [(6, [40, 41, 42]), (11, [50, 51])]


def logits_of(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def packed_logits(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a trunk and its leaves by the tree, and by one ordinary pass each."""
    trunk = list(range(10, 34))
    row = TrunkAndLeaves()
    row.add_trunk(trunk)
    row.add_leaves(BRANCH_LEAVES)
    ordinary = copy.deepcopy(model)
    ordinary.set_attn_implementation("eager")
    expected = [logits_of(ordinary, trunk)]
    for branch, ids in BRANCH_LEAVES:
        expected.append(logits_of(ordinary, trunk[:branch] + ids)[branch:])
    with torch.no_grad():
        hidden = tree.forward(model, *row.tensors("cpu"), row)
        return tree.head(model, hidden)[0], torch.cat(expected)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_logits_are_those_of_ordinary_passes(family):
    """Positions, windows, scaled logits: nothing of a family is lost on the way."""
    model = tiny.model(family)
    use_tree_attention(model)
    found, expected = packed_logits(model)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def assert_same_outside(model, untouched):
    """Forward passes with and without padding, and generation, longer than the windows."""
    ids = torch.tensor([range(20, 44), range(50, 74)])
    left = torch.ones_like(ids)
    left[1, :9] = 0
    with torch.no_grad():
        for mask in (None, left, left.flip(1)):
            found = model(ids, attention_mask=mask).logits
            expected = untouched(ids, attention_mask=mask).logits
            assert torch.equal(found, expected)
    for sampled in (False, True):
        drawn = []
        for policy in (model, untouched):
            torch.manual_seed(0)
            more = {"max_new_tokens": 12, "do_sample": sampled, "pad_token_id": 0}
            drawn.append(policy.generate(ids, attention_mask=left, **more))
        assert torch.equal(*drawn)
        assert drawn[0].shape == (2, 36)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_model_goes_on_working_for_others(family):
    model = tiny.model(family)
    untouched = copy.deepcopy(model)
    untouched.set_attn_implementation("sdpa")
    use_tree_attention(model)
    packed_logits(model)
    assert_same_outside(model, untouched)


def test_another_attention_can_be_set_and_the_tree_again():
    model = tiny.model("mistral")
    untouched = copy.deepcopy(model)
    use_tree_attention(model)
    model.set_attn_implementation("eager")
    ids = list(range(24))
    assert torch.equal(logits_of(model, ids), logits_of(untouched, ids))
    use_tree_attention(model)
    torch.testing.assert_close(*packed_logits(model), atol=1e-4, rtol=1e-5)


def test_a_copy_scores_with_its_own_weights():
    model = tiny.model()
    use_tree_attention(model)
    twin = copy.deepcopy(model)
    twin.model.layers[-1].mlp.down_proj.weight.data.zero_()
    row = TrunkAndLeaves()
    row.add_trunk([5, 6, 7, 8])
    prediction = (torch.tensor([2]), torch.tensor([8]))
    for policy in (model, twin):
        _, logps, _ = policy.scoring(*row.tensors("cpu"), row, *prediction, False)
        expected = logits_of(policy, row.ids)[2].log_softmax(-1)[8]
        assert logps.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_new_model_from_a_scored_model_s_config_scores_too():
    model = tiny.model()
    use_tree_attention(model)
    fresh = AutoModelForCausalLM.from_config(model.config).eval()
    use_tree_attention(fresh)
    assert fresh.scoring.__self__ is fresh
    torch.testing.assert_close(*packed_logits(fresh), atol=1e-4, rtol=1e-4)


REASONS = {
    "gemma2": "soft-capping",
    "stablelm": "its layers do not ask the tree",
    "gpt_oss": "sinks",
    "mamba": "fails under it",
    "falcon": "its layers do not ask the tree",
    "phimoe": "not told of its sliding window of 30 tokens",
    "doge": "not told of its sliding window of 30 tokens",
}


def test_attention_that_grows_sparse_later_is_refused():
    """Doge and its like keep so many tokens and no more; the check's few tokens are all kept."""
    with pytest.raises(InputError, match=r"'doge': .* is sparse \(keep_window_size 30\)"):
        use_tree_attention(tiny.model("doge", keep_window_size=30, sliding_window=None))
    use_tree_attention(tiny.model("doge", keep_window_size=256, sliding_window=None))


@pytest.mark.parametrize("family", tiny.REFUSED)
@pytest.mark.parametrize("is_training", [True, False])
def test_a_refused_model_stays_as_it_was(family, is_training):
    model = tiny.model(family)
    before = logits_of(model, list(range(12)))
    attention = model.config._attn_implementation
    model.train(is_training)
    for _ in range(2):
        with pytest.raises(InputError, match=REASONS[family]) as error:
            use_tree_attention(model)
        assert f"model family {family!r}" in str(error.value)
        assert "\n" not in str(error.value)
        assert model.config._attn_implementation == attention
        assert model.training == is_training
    assert torch.equal(logits_of(model.eval(), list(range(12))), before)


def test_half_precision_weights_are_checked_in_float32():
    """Their own passes differ by whole nats where logits are large. The weights stay."""
    model = tiny.model().bfloat16()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    use_tree_attention(model)
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, before[name])


def other_model(config, **options):
    size = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    size |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**size | options)).eval()


def test_a_model_that_attends_twice_a_layer_cannot_be_practised_with():
    """DiffLlama: scoring alone would be exact."""
    with pytest.raises(InputError, match="'diffllama': attention over trunk and leaves differs"):
        use_tree_attention(other_model(DiffLlamaConfig))


def test_training_has_no_dropout():
    """Starcoder2 keeps its rates as plain numbers, GPT-2 in modules."""
    for config in (Starcoder2Config, GPT2Config):
        model = other_model(config, residual_dropout=0.5, embedding_dropout=0.5, resid_pdrop=0.5)
        use_tree_attention(model)
        ids = torch.arange(12)[None]
        evaluated = model.eval()(ids).logits
        torch.testing.assert_close(model.train()(ids).logits, evaluated, atol=1e-6, rtol=1e-6)


def test_longrope_is_refused():
    """What a token is depends on the longest position in its pass."""
    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "long_factor": factors, "short_factor": factors}
    rope |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
    model = other_model(Phi3Config, rope_parameters=rope)
    with pytest.raises(InputError, match="'phi3': .* has longrope"):
        use_tree_attention(model)


@pytest.mark.parametrize("reach", [32, 255, 256])
def test_positions_that_follow_the_longest_in_the_pass_are_refused(monkeypatch, reach):
    """Whatever a family calls it. Past the context there is nothing to follow."""
    model = tiny.model()
    rotary = model.model.rotary_emb
    plain = rotary.forward

    def follows(x, position_ids, **more):
        return plain(x, position_ids * (1 + (position_ids.max() >= reach)), **more)

    monkeypatch.setattr(rotary, "forward", follows)
    if reach < 256:
        with pytest.raises(InputError, match="positions that depend on the longest in the pass"):
            use_tree_attention(model)
    else:
        use_tree_attention(model)


# Under it frequencies depend on the longest position in a pass, once that is past the context.
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_dynamic_rope_is_exact_up_to_the_end_of_the_context(family):
    """Trunk, leaves, practice and episodes that reach the context's last token."""
    tokenizer = tiny.chatml()
    size, context = len(tokenizer), 150
    model = tiny.model(family, vocab=size, context=context, rope_parameters=DYNAMIC)
    ordinary = copy.deepcopy(model)
    assert "dynamic" in model.model.rotary_emb.rope_type
    ids = tiny.random_ids(context, torch.Generator().manual_seed(2), size)
    # One of seven ends early: too few to leave the batch, so it idles beside the others.
    starts = [128, 130, 132, 134, 136, 137, 148]
    encoded = Encoded(ids, [(start, start + 1) for start in starts])

    drawn = practice(model, [encoded], 1, 0.0, 99, {-1})
    expected = [[naive.greedy(ordinary, ids[:start], context - start, {-1})] for start in starts]
    assert drawn == [expected]
    assert [len(action) for [action] in expected] == [context - start for start in starts]

    leaves = [[(step, action) for step, [action] in enumerate(expected)]]
    [found] = score(model, [encoded], leaves)
    expert = naive.sums(ordinary, naive.expert_pairs([encoded]))
    agent = naive.sums(ordinary, naive.leaf_pairs([encoded], leaves))
    torch.testing.assert_close(found.trunk, expert, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.leaves, agent, atol=1e-5, rtol=1e-5)

    played = run_episodes(model, tokenizer, Parrot(turns=40), TASKS, max_new_tokens=9)
    for episode, task in zip(played, TASKS):
        by_definition = naive.play(ordinary, tokenizer, Parrot(turns=40), task, [], 9)
        assert episode.steps == by_definition.steps
        assert episode.truncated == by_definition.truncated
    assert any(episode.steps and episode.info.get("outgrown") for episode in played)


@pytest.mark.parametrize("window", [None, 256])
def test_a_window_as_long_as_the_context_is_none(window):
    model = tiny.model("phimoe", context=256, sliding_window=window)
    use_tree_attention(model)
    torch.testing.assert_close(*packed_logits(model), atol=1e-3, rtol=1e-4)


def sees_past_the_branch(position, leaf, branch, query, key, window=None):
    return sees(position, leaf, branch + 1, query, key, window)


def sees_other_leaves(position, leaf, branch, query, key, window=None):
    return sees(position, leaf.clamp(max=0), branch, query, key, window)


def sees_a_longer_window(position, leaf, branch, query, key, window=None):
    return sees(position, leaf, branch, query, key, None if window is None else window + 1)


@pytest.mark.parametrize("wrong", [sees_past_the_branch, sees_other_leaves, sees_a_longer_window])
def test_the_check_notices_a_wrong_mask(monkeypatch, wrong):
    monkeypatch.setattr(tree, "sees", wrong)
    with pytest.raises(InputError, match="differs from its own forward pass"):
        use_tree_attention(tiny.model("mistral"))


@pytest.mark.parametrize("is_training", [True, False])
def test_a_model_in_half_precision_is_taken_and_keeps_its_mode(is_training):
    model = tiny.model(sharp=1.0).bfloat16().train(is_training)
    use_tree_attention(model)
    assert model.config._attn_implementation == tree.NAME
    assert model.training == is_training


def test_an_outline_without_weights_is_not_checked():
    config = tiny.model("gemma2").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    use_tree_attention(model)
    assert model.config._attn_implementation == tree.NAME
    assert model.scoring.__self__ is model


def test_tree_attention_keeps_cudnns_kernels_out():
    """They build a plan for each new length, and lengths are new in every pass."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    use_tree_attention(tiny.model())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
