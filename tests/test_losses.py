"""Every loss against numbers worked out by hand; ln 2 = 0.6931472, ln 3 = 1.0986123, ln 4 = 1.3862944."""
import math

import pytest
import torch
from torch import tensor

from losses import (discriminator_loss, dpo_loss, entropy, gae, kl_k3, ppo_loss, sft_loss, step_reward, token_logps, value_loss,
                    whiten)

close = pytest.approx


def near(x, *numbers, tol=1e-6):
    return torch.allclose(torch.as_tensor(x).float().flatten(), tensor(numbers, dtype=torch.float32), atol=tol, rtol=0)


# ---- log-probs and entropy

def test_token_logps_by_hand():
    logits = tensor([[0.0, math.log(2), math.log(5)], [0.0, 0.0, 0.0]])     # probabilities 1/8, 2/8, 5/8 and 1/3 each
    assert near(token_logps(logits, tensor([2, 0])), -0.4700036, -1.0986123)            # ln 5/8, ln 1/3
    assert token_logps(logits.expand(4, 2, 3), torch.zeros(4, 2, dtype=torch.long)).shape == (4, 2)


def test_token_logps_of_half_precision_are_float32():
    logits = torch.full((1, 1000), 20.0, dtype=torch.bfloat16)
    assert token_logps(logits, tensor([3])).dtype == torch.float32
    assert near(token_logps(logits, tensor([3])), -6.9077553, tol=1e-5)                 # -ln 1000, not bfloat16's -6.90625
    assert entropy(logits).dtype == torch.float32


def test_entropy_by_hand():
    assert near(entropy(tensor([[0.0, math.log(3)]])), 0.5623351)           # 1/4 ln 4 + 3/4 ln 4/3 = 0.3465736 + 0.2157615
    assert near(entropy(torch.zeros(2, 4)), 1.3862944, 1.3862944)
    assert near(entropy(tensor([500.0, 0.0])), 0.0)


# ---- SFT

def test_sft_is_the_mean_over_masked_tokens():
    loss, info = sft_loss(tensor([[-1.0, -2.0], [-3.0, -8.0]]), tensor([[1, 0], [1, 1]]))
    assert loss.item() == close(4.0)                                        # (1 + 3 + 8) / 3
    assert info["nll"].item() == close(4.0) and not info["nll"].requires_grad


def test_sft_gradient_raises_the_logps_of_masked_tokens_only():
    logps = tensor([-1.0, -2.0, -3.0], requires_grad=True)
    sft_loss(logps, tensor([True, False, True]))[0].backward()
    assert logps.grad.tolist() == [-0.5, 0.0, -0.5]


# ---- DPO

def test_dpo_by_hand():
    # chosen 0.5 (-1 + 2) = 0.5, rejected 0.5 (-4 + 3) = -0.5, margin 1; -ln sigmoid(1) = ln(1 + 1/e) = 0.3132617
    # and a pair with margin 0.5 ((-2 + 1) - (-2 + 4)) = -1.5: ln(1 + e^1.5) = 1.7014133; mean 1.0073375
    loss, info = dpo_loss(tensor([-1.0, -2.0]), tensor([-4.0, -2.0]), tensor([-2.0, -1.0]), tensor([-3.0, -4.0]), beta=0.5)
    assert loss.item() == close(1.0073375, abs=1e-6)
    assert {k: round(v.item(), 4) for k, v in info.items()} == {
        "margin": -0.25, "accuracy": 0.5, "chosen_reward": 0.0, "rejected_reward": 0.25, "logp_chosen": -1.5,
        "logp_rejected": -3.0, "dpo_loss": 1.0073}


def test_dpo_is_log_2_at_policy_equal_to_reference():
    expert, agent = tensor([-1.0, -7.0]), tensor([-3.0, -0.5])
    assert dpo_loss(expert, agent, expert, agent, beta=0.1)[0].item() == close(0.6931472, abs=1e-6)


def test_dpo_gradient_raises_the_expert_action_and_lowers_the_practice_action():
    expert, agent = tensor([-1.0], requires_grad=True), tensor([-4.0], requires_grad=True)
    dpo_loss(expert, agent, tensor([-2.0]), tensor([-3.0]), beta=0.5)[0].backward()
    assert near(expert.grad, -0.1344707) and near(agent.grad, 0.1344707)    # beta sigmoid(-1) = 0.5 x 0.2689414


def test_dpo_survives_enormous_margins():
    loss, _ = dpo_loss(tensor([-5000.0]), tensor([0.0]), tensor([0.0]), tensor([-5000.0]), beta=0.1)
    assert loss.item() == close(1000.0)


def expected_dpo(logits, reference, chosen, beta):
    """Eq. 6 in expectation, by enumeration: the expert's action drawn from `chosen` [V], practice from `reference` [V] itself."""
    logp, ref = torch.log_softmax(logits, -1), reference.log()
    e, a = (x.flatten() for x in torch.meshgrid(torch.arange(len(chosen)), torch.arange(len(chosen)), indexing="ij"))
    each = torch.stack([dpo_loss(logp[i:i + 1], logp[j:j + 1], ref[i:i + 1], ref[j:j + 1], beta)[0] for i, j in zip(e, a)])
    return (chosen[e] * reference[a] * (e != a) * each).sum()                # equal actions are dropped


def test_the_first_dpo_step_is_an_sft_step_in_expectation_over_practice():
    logits = tensor([1.0, 0.2, -0.5, 0.3], dtype=torch.float64, requires_grad=True)
    reference, expert = torch.softmax(logits, -1).detach(), tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    dpo, = torch.autograd.grad(expected_dpo(logits, reference, expert, 0.3), logits)
    sft, = torch.autograd.grad(sft_loss(torch.log_softmax(logits, -1)[1:2], torch.ones(1))[0], logits)
    assert torch.allclose(dpo, 0.3 / 2 * sft, atol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_practice_drawn_from_the_reference_pulls_dpo_to_the_expert_at_beta_1_and_beyond_it_below(beta):
    reference, expert = tensor([0.5, 0.3, 0.2], dtype=torch.float64), tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    goal = reference * (expert / reference) ** (1 / beta)
    logits = (goal / goal.sum()).log().requires_grad_()
    gradient, = torch.autograd.grad(expected_dpo(logits, reference, expert, beta), logits)
    assert gradient.abs().max() < 1e-12                                       # convex in the log-probs: this is the optimum
    logits = reference.log().requires_grad_()
    gradient, = torch.autograd.grad(expected_dpo(logits, reference, expert, beta), logits)
    assert gradient.abs().max() > 1e-3


# ---- discriminator and reward

def test_discriminator_loss_by_hand():
    assert discriminator_loss(tensor([0.0]), tensor([0.0]))[0].item() == close(1.3862944, abs=1e-6)          # twice ln 2
    # D = 3/4 on the expert, 1/5 on the agent: -ln 3/4 - ln 4/5 = 0.2876821 + 0.2231436
    loss, info = discriminator_loss(tensor([math.log(3)]), tensor([-math.log(4)] * 3))
    assert loss.item() == close(0.5108256, abs=1e-6) and info["d_loss"].item() == close(0.5108256, abs=1e-6)


def test_step_reward_is_log_d_and_bounded():
    # D = 1/2, 3/4, nearly 1, nearly 0
    assert near(step_reward(tensor([0.0, math.log(3), 100.0, -100.0])), -0.6931472, -0.2876821, 0.0, -5.0)
    assert near(step_reward(tensor([-100.0]), floor=-2.0), -2.0)


def test_reward_rises_with_expert_likeness():
    """The sign of D: trained on separable data, the expert's side earns more, and PPO moves the policy there."""
    gen = torch.Generator().manual_seed(0)
    expert, agent = torch.randn(50, 1, generator=gen) + 3, torch.randn(50, 1, generator=gen) - 3
    d = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        discriminator_loss(d(expert), d(agent))[0].backward()
        optimizer.step()
    ladder = step_reward(d(tensor([[-2.0], [-1.0], [0.0], [1.0], [2.0]])), floor=-100)[:, 0]
    assert (ladder.diff() > 0).all() and step_reward(d(expert)).mean() > -0.2 and step_reward(d(agent)).mean() < -2
    policy = torch.zeros(2, requires_grad=True)                             # two actions, 0 looks like the expert's
    logps = torch.log_softmax(policy, 0)[None]
    advantages = whiten(step_reward(d(tensor([[3.0], [-3.0]]))[:, 0]))[None].detach()
    ppo_loss(logps, logps.detach(), advantages, torch.ones(1, 2), clip=0.2)[0].backward()
    assert policy.grad[0] < 0 < policy.grad[1]


def test_discriminator_gradient_has_the_right_sign():
    expert, agent = torch.zeros(2, requires_grad=True), torch.zeros(4, requires_grad=True)
    discriminator_loss(expert, agent)[0].backward()
    assert near(expert.grad, -0.25, -0.25) and near(agent.grad, *[0.125] * 4)           # -(1 - D) / 2 and D / 4 at D = 1/2


# ---- advantages

def test_gae_by_hand():
    rewards, values = tensor([0.0, 0.0, 1.0]), tensor([0.5, 0.6, 0.7])      # gamma 0.9, lambda 0.8, their product 0.72
    # deltas 0.54 - 0.5 = 0.04, 0.63 - 0.6 = 0.03, 1 - 0.7 = 0.3; 0.03 + 0.72 x 0.3 = 0.246; 0.04 + 0.72 x 0.246 = 0.21712
    assert near(gae(rewards, values, 0.9, 0.8), 0.21712, 0.246, 0.3)


def test_gae_bootstraps_a_truncated_episode():
    # the last delta becomes 1 + 0.9 x 0.8 - 0.7 = 1.02; 0.03 + 0.72 x 1.02 = 0.7644; 0.04 + 0.72 x 0.7644 = 0.590368
    assert near(gae(tensor([0.0, 0.0, 1.0]), tensor([0.5, 0.6, 0.7]), 0.9, 0.8, last_value=0.8), 0.590368, 0.7644, 1.02)


def test_gae_of_one_step_is_reward_less_value():
    assert near(gae(tensor([-0.7]), tensor([0.2]), 1.0, 0.95), -0.9)


def test_whiten_by_hand():
    x = tensor([1.0, 2.0, 3.0, 4.0])                                        # mean 2.5, variance 5/4, deviation 1.1180340
    assert near(whiten(x), -1.3416408, -0.4472136, 0.4472136, 1.3416408)
    assert x.tolist() == [1.0, 2.0, 3.0, 4.0] and whiten(tensor([])).numel() == 0


@pytest.mark.parametrize("value", [0.0, 0.1, -1.3, 0.7, -5.0])
@pytest.mark.parametrize("n", [1, 3, 7, 1000])
def test_whiten_of_constants_is_zero(value, n):
    assert whiten(torch.full((n,), value)).abs().max() < 1e-3               # rounding of the mean must not be blown up to 1


# ---- PPO

OLD = [[-1.0, -1.0]]
NEW = [[-1.0 + math.log(1.5), -1.0 + math.log(0.5)]]                        # ratios 1.5 and 0.5


@pytest.mark.parametrize("sign, value, gradient", [
    (1.0, -0.85, [0.0, -0.25]),       # -(min(1.5, 1.2) + min(0.5, 0.8)) / 2; the first is clipped, the second gets -0.5 / 2
    (-1.0, 1.15, [0.75, 0.0]),        # -(min(-1.5, -1.2) + min(-0.5, -0.8)) / 2; the first gets 1.5 / 2, the second is clipped
])
def test_ppo_by_hand_with_a_gradient_of_exactly_zero_where_clipped(sign, value, gradient):
    logps = tensor(NEW, requires_grad=True)
    loss, info = ppo_loss(logps, tensor(OLD), torch.full((1, 2), sign), torch.ones(1, 2), clip=0.2)
    loss.backward()
    assert loss.item() == close(value, abs=1e-6) and near(logps.grad, *gradient)
    assert logps.grad[0, gradient.index(0.0)].item() == 0.0
    assert info["clip_share"].item() == 1.0 and info["ratio"].item() == close(1.0) and info["ppo_loss"].item() == close(value)


def test_ppo_ratio_is_exactly_1_at_the_old_policy():
    logps = tensor([[-0.3, -2.7, -11.1]], requires_grad=True)
    loss, info = ppo_loss(logps, logps.detach().clone(), tensor([[2.0, 2.0, 2.0]]), torch.ones(1, 3), clip=0.2)
    loss.backward()
    assert info["ratio"].item() == 1.0 and info["clip_share"].item() == 0.0 and loss.item() == -2.0
    assert near(logps.grad, -2 / 3, -2 / 3, -2 / 3)                         # plain policy gradient


def test_ppo_clip_share_counts_tokens_outside_the_range():
    new = tensor([[math.log(1.1), math.log(1.3), math.log(0.7), 9.0]])
    _, info = ppo_loss(new, torch.zeros(1, 4), torch.ones(1, 4), tensor([[1, 1, 1, 0]]), clip=0.2)
    assert info["clip_share"].item() == close(2 / 3) and info["ratio"].item() == close(3.1 / 3)


# ---- value, KL

def test_value_loss_by_hand():
    loss, info = value_loss(tensor([1.0, 3.0]), tensor([2.0, 1.0]))         # (0.5 x 1 + 0.5 x 4) / 2
    assert loss.item() == close(1.25) and info["value_loss"].item() == close(1.25)


def test_kl_k3_by_hand():
    # log ratio ref - new: 0, -ln 2, ln 2 -> 0, 1/2 - 1 + ln 2, 2 - 1 - ln 2
    assert near(kl_k3(tensor([-1.0, -1.0, -1.0]), tensor([-1.0, -1.6931472, -0.3068528])), 0.0, 0.1931472, 0.3068528)


def test_kl_k3_estimates_the_divergence_of_policy_from_reference():
    p, q = tensor([0.6, 0.3, 0.1]), tensor([0.2, 0.3, 0.5])                 # KL(p || q) = 0.6 ln 3 - 0.1 ln 5 = 0.4982236
    assert (p * kl_k3(p.log(), q.log())).sum().item() == close(0.4982236, abs=1e-6)


# ---- what all share

def cases(n):
    """name -> (loss of rows a:b with a count, the leaf tensors that get gradients), n rows."""
    gen = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=gen)
    x, y, z, w = rand(n, 4).requires_grad_(), rand(n).requires_grad_(), rand(n).requires_grad_(), rand(n, 4)
    r, s, mask = rand(n), rand(n), rand(n, 4) > 0
    return {
        "sft": (lambda a, b, c: sft_loss(x[a:b], mask[a:b], c), [x], int(mask.sum())),
        "dpo": (lambda a, b, c: dpo_loss(y[a:b], z[a:b], r[a:b], s[a:b], 0.3, c), [y, z], n),
        "ppo": (lambda a, b, c: ppo_loss(x[a:b], x[a:b].detach() + 0.3 * w[a:b], w[a:b], mask[a:b], 0.2, c), [x],
                int(mask.sum())),
        "value": (lambda a, b, c: value_loss(y[a:b], r[a:b], c), [y], n),
    }


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo", "value"])
def test_micro_batches_with_count_add_up_to_one_batch(name):
    loss_of, leaves, count = cases(7)[name]
    whole, info = loss_of(0, 7, None)
    expected = torch.autograd.grad(whole, leaves)
    parts = [loss_of(a, b, count) for a, b in ((0, 3), (3, 3), (3, 7))]     # the middle one is empty
    found = torch.autograd.grad(sum(part for part, _ in parts), leaves)
    assert sum(part for part, _ in parts).item() == close(whole.item(), abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(expected, found))
    for key, value in info.items():
        assert sum(part[key] for _, part in parts).item() == close(value.item(), abs=1e-6), key
        assert not value.requires_grad


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo", "value"])
@pytest.mark.parametrize("count", [None, 5])
def test_an_empty_input_gives_0_with_a_graph(name, count):
    loss_of, leaves, _ = cases(3)[name]
    loss, info = loss_of(0, 0, count)
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in leaves) and all(x.item() == 0 for x in info.values())


def test_an_empty_mask_gives_0_with_a_graph():
    x = torch.randn(2, 3, requires_grad=True)
    for loss in (sft_loss(x, torch.zeros(2, 3))[0], ppo_loss(x, x.detach(), torch.ones(2, 3), torch.zeros(2, 3), 0.2)[0]):
        loss.backward()
        assert loss.item() == 0 and (x.grad == 0).all()


def test_the_discriminator_may_see_only_one_side():
    agent = torch.zeros(2, requires_grad=True)
    loss, _ = discriminator_loss(torch.zeros(0), agent)
    loss.backward()
    assert loss.item() == close(0.6931472, abs=1e-6) and near(agent.grad, 0.25, 0.25)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e9])
def test_masked_values_do_not_leak(bad):
    mask, logps = tensor([[1.0, 0.0]]), tensor([[-1.0, bad]], requires_grad=True)
    loss, info = sft_loss(logps, mask)
    loss.backward()
    assert loss.item() == 1.0 and logps.grad.tolist() == [[-1.0, 0.0]] and info["nll"].item() == 1.0
    logps.grad = None
    loss, info = ppo_loss(logps, tensor([[-1.0, 0.0]]), tensor([[2.0, bad]]), mask, 0.2)
    loss.backward()
    assert loss.item() == -2.0 and logps.grad.tolist() == [[-2.0, 0.0]] and info["ratio"].item() == 1.0
    assert info["clip_share"].item() == 0.0
