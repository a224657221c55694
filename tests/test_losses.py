"""Every loss against numbers worked out by hand.

ln 2 = 0.6931472, ln 3 = 1.0986123, ln 4 = 1.3862944.
"""

import math

import pytest
import torch
from torch import tensor

from losses import (
    add_up,
    discriminator_loss,
    dpo_loss,
    entropy,
    gae,
    kl_k3,
    ppo_loss,
    sft_loss,
    step_reward,
    token_logps,
    value_loss,
    whiten,
)

approx = pytest.approx
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def near(values, *numbers, tolerance=1e-6) -> bool:
    found = torch.as_tensor(values).float().flatten()
    expected = tensor(numbers, dtype=torch.float32)
    return torch.allclose(found, expected, atol=tolerance, rtol=0)


# --------------------------------------------------------------------------- log-probs and entropy


def test_token_logps_by_hand():
    # Probabilities 1/8, 2/8, 5/8 and 1/3 each.
    logits = tensor([[0.0, LN2, math.log(5)], [0.0, 0.0, 0.0]])
    # ln 5/8 and ln 1/3.
    assert near(token_logps(logits, tensor([2, 0])), -0.4700036, -1.0986123)
    many = token_logps(logits.expand(4, 2, 3), torch.zeros(4, 2, dtype=torch.long))
    assert many.shape == (4, 2)


def test_token_logps_of_half_precision_are_float32():
    logits = torch.full((1, 1000), 20.0, dtype=torch.bfloat16)
    logps = token_logps(logits, tensor([3]))
    assert logps.dtype == torch.float32
    # -ln 1000, not bfloat16's -6.90625.
    assert near(logps, -6.9077553, tolerance=1e-5)
    assert entropy(logits).dtype == torch.float32


def test_entropy_by_hand():
    # 1/4 ln 4 + 3/4 ln 4/3 = 0.3465736 + 0.2157615.
    assert near(entropy(tensor([[0.0, LN3]])), 0.5623351)
    assert near(entropy(torch.zeros(2, 4)), 1.3862944, 1.3862944)
    assert near(entropy(tensor([500.0, 0.0])), 0.0)


# --------------------------------------------------------------------------------------------- SFT


def test_sft_is_the_mean_over_masked_tokens():
    loss, info = sft_loss(tensor([[-1.0, -2.0], [-3.0, -8.0]]), tensor([[1, 0], [1, 1]]))
    # (1 + 3 + 8) / 3
    assert loss.item() == approx(4.0)
    assert info["nll"].item() == approx(4.0)
    assert not info["nll"].requires_grad


def test_sft_gradient_raises_the_logps_of_masked_tokens_only():
    logps = tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss, _ = sft_loss(logps, tensor([True, False, True]))
    loss.backward()
    assert logps.grad.tolist() == [-0.5, 0.0, -0.5]


# --------------------------------------------------------------------------------------------- DPO


def test_dpo_by_hand():
    # chosen 0.5 (-1 + 2) = 0.5, rejected 0.5 (-4 + 3) = -0.5, margin 1:
    # -ln sigmoid(1) = ln(1 + 1/e) = 0.3132617.
    # A pair with margin 0.5 ((-2 + 1) - (-2 + 4)) = -1.5:
    # ln(1 + e^1.5) = 1.7014133. The mean is 1.0073375.
    expert, ref_expert = tensor([-1.0, -2.0]), tensor([-2.0, -1.0])
    agent, ref_agent = tensor([-4.0, -2.0]), tensor([-3.0, -4.0])
    loss, info = dpo_loss(expert, agent, ref_expert, ref_agent, beta=0.5)
    assert loss.item() == approx(1.0073375, abs=1e-6)
    assert {name: round(figure.item(), 4) for name, figure in info.items()} == {
        "margin": -0.25,
        "accuracy": 0.5,
        "chosen_reward": 0.0,
        "rejected_reward": 0.25,
        "logp_chosen": -1.5,
        "logp_rejected": -3.0,
        "dpo_loss": 1.0073,
    }


def test_dpo_is_log_2_at_policy_equal_to_reference():
    expert, agent = tensor([-1.0, -7.0]), tensor([-3.0, -0.5])
    loss, _ = dpo_loss(expert, agent, expert, agent, beta=0.1)
    assert loss.item() == approx(LN2, abs=1e-6)


def test_dpo_gradient_raises_the_expert_action_and_lowers_the_practice_action():
    expert = tensor([-1.0], requires_grad=True)
    agent = tensor([-4.0], requires_grad=True)
    loss, _ = dpo_loss(expert, agent, tensor([-2.0]), tensor([-3.0]), beta=0.5)
    loss.backward()
    # beta sigmoid(-1) = 0.5 x 0.2689414
    assert near(expert.grad, -0.1344707)
    assert near(agent.grad, 0.1344707)


def test_dpo_survives_enormous_margins():
    zero, low = tensor([0.0]), tensor([-5000.0])
    loss, _ = dpo_loss(low, zero, zero, low, beta=0.1)
    assert loss.item() == approx(1000.0)


def expected_dpo(logits, reference, chosen, beta):
    """Eq. 6 in expectation, by enumeration.

    The expert's action is drawn from `chosen` [V], practice from `reference` [V] itself. Pairs of
    equal actions are dropped.
    """
    logps = torch.log_softmax(logits, -1)
    ref_logps = reference.log()
    total = 0
    for expert in range(len(chosen)):
        for agent in range(len(chosen)):
            if expert == agent:
                continue
            loss, _ = dpo_loss(
                logps[expert, None],
                logps[agent, None],
                ref_logps[expert, None],
                ref_logps[agent, None],
                beta,
            )
            total = total + chosen[expert] * reference[agent] * loss
    return total


def test_the_first_dpo_step_is_an_sft_step_in_expectation_over_practice():
    logits = tensor([1.0, 0.2, -0.5, 0.3], dtype=torch.float64, requires_grad=True)
    reference = torch.softmax(logits, -1).detach()
    expert = tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    [dpo] = torch.autograd.grad(expected_dpo(logits, reference, expert, 0.3), logits)
    loss, _ = sft_loss(torch.log_softmax(logits, -1)[1:2], torch.ones(1))
    [sft] = torch.autograd.grad(loss, logits)
    assert torch.allclose(dpo, 0.3 / 2 * sft, atol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_practice_from_the_reference_pulls_dpo_to_the_expert_and_beyond_it(beta):
    """To the expert at beta 1, beyond it below. The loss is convex in the log-probs."""
    reference = tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    expert = tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    goal = reference * (expert / reference) ** (1 / beta)
    optimum = (goal / goal.sum()).log().requires_grad_()
    [gradient] = torch.autograd.grad(expected_dpo(optimum, reference, expert, beta), optimum)
    assert gradient.abs().max() < 1e-12
    start = reference.log().requires_grad_()
    [gradient] = torch.autograd.grad(expected_dpo(start, reference, expert, beta), start)
    assert gradient.abs().max() > 1e-3


# ------------------------------------------------------------------------ discriminator and reward


def test_discriminator_loss_by_hand():
    loss, _ = discriminator_loss(tensor([0.0]), tensor([0.0]))
    assert loss.item() == approx(2 * LN2, abs=1e-6)
    # D = 3/4 on the expert, 1/5 on the agent: -ln 3/4 - ln 4/5 = 0.2876821 + 0.2231436.
    loss, info = discriminator_loss(tensor([LN3]), tensor([-LN4] * 3))
    assert loss.item() == approx(0.5108256, abs=1e-6)
    assert info["d_loss"].item() == approx(0.5108256, abs=1e-6)


def test_step_reward_is_log_d_and_bounded():
    # D = 1/2, 3/4, nearly 1, nearly 0.
    logits = tensor([0.0, LN3, 100.0, -100.0])
    assert near(step_reward(logits), -0.6931472, -0.2876821, 0.0, -5.0)
    assert near(step_reward(tensor([-100.0]), floor=-2.0), -2.0)


def test_reward_rises_with_expert_likeness():
    """The sign of D: trained on separable data, the expert's side earns more, and PPO moves the
    policy there."""
    generator = torch.Generator().manual_seed(0)
    expert = torch.randn(50, 1, generator=generator) + 3
    agent = torch.randn(50, 1, generator=generator) - 3
    judge = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(judge.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss, _ = discriminator_loss(judge(expert), judge(agent))
        loss.backward()
        optimizer.step()
    ladder = tensor([[-2.0], [-1.0], [0.0], [1.0], [2.0]])
    rewards = step_reward(judge(ladder), floor=-100)[:, 0]
    assert (rewards.diff() > 0).all()
    assert step_reward(judge(expert)).mean() > -0.2
    assert step_reward(judge(agent)).mean() < -2
    # Two actions; the first looks like the expert's.
    policy = torch.zeros(2, requires_grad=True)
    logps = torch.log_softmax(policy, 0)[None]
    rewards = step_reward(judge(tensor([[3.0], [-3.0]]))[:, 0])
    advantages = whiten(rewards)[None].detach()
    loss, _ = ppo_loss(logps, logps.detach(), advantages, torch.ones(1, 2), clip=0.2)
    loss.backward()
    assert policy.grad[0] < 0 < policy.grad[1]


def three_actions():
    """Expert and policy over three actions, as probabilities."""
    expert = tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return expert, tensor([0.2, 0.2, 0.6], dtype=torch.float64)


def divergence(one, other):
    """KL(one || other)."""
    return (one * (one / other).log()).sum()


def expected_discriminator(phi, policy, expert):
    """Eq. 11 in expectation, by enumeration; phi: log-probs, which need not sum to 1."""
    logits, total = phi - policy.log(), 0
    for action in range(len(expert)):
        logit, nothing = logits[action : action + 1], logits[:0]
        total = total + expert[action] * discriminator_loss(logit, nothing)[0]
        total = total + policy[action] * discriminator_loss(nothing, logit)[0]
    return total


def test_the_best_phi_is_the_expert_and_its_loss_tells_the_divergence():
    """2 log 2 - 2 JS, and more for every other phi."""
    expert, policy = three_actions()
    best = expert.log().requires_grad_()
    loss = expected_discriminator(best, policy, expert)
    [gradient] = torch.autograd.grad(loss, best)
    assert gradient.abs().max() < 1e-12
    middle = (expert + policy) / 2
    js = (divergence(expert, middle) + divergence(policy, middle)) / 2
    assert loss.item() == approx(2 * LN2 - 2 * js.item())
    for other in (policy.log(), 2 * best.detach(), best.detach() + 0.1):
        assert expected_discriminator(other, policy, expert) > loss


def test_the_first_step_of_the_discriminator_is_half_an_sft_step_in_expectation():
    expert, policy = three_actions()
    logits = policy.log().requires_grad_()
    phi = torch.log_softmax(logits, -1)
    loss = expected_discriminator(phi, policy, expert)
    [gradient] = torch.autograd.grad(loss, logits, retain_graph=True)
    [sft] = torch.autograd.grad(-(expert * phi).sum(), logits)
    assert torch.allclose(gradient, sft / 2, atol=1e-12) and sft.abs().max() > 0.1


def test_the_reward_of_the_best_discriminator_leads_to_the_expert():
    """Its policy gradient is that of 2 KL((pi + pi_E) / 2 || pi_E), for D held fixed."""
    expert, policy = three_actions()
    logits = policy.log().requires_grad_()
    probabilities = torch.softmax(logits, -1)
    reward = step_reward(expert.log() - policy.log())
    [ours] = torch.autograd.grad(-(probabilities * reward).sum(), logits, retain_graph=True)
    middle = (expert + probabilities) / 2
    [wanted] = torch.autograd.grad(2 * divergence(middle, expert), logits)
    assert torch.allclose(ours, wanted, atol=1e-12) and wanted.abs().max() > 0.01


def test_discriminator_gradient_has_the_right_sign():
    expert = torch.zeros(2, requires_grad=True)
    agent = torch.zeros(4, requires_grad=True)
    loss, _ = discriminator_loss(expert, agent)
    loss.backward()
    # -(1 - D) / 2 and D / 4 at D = 1/2.
    assert near(expert.grad, -0.25, -0.25)
    assert near(agent.grad, 0.125, 0.125, 0.125, 0.125)


# -------------------------------------------------------------------------------------- advantages


def test_gae_by_hand():
    # gamma 0.9, lambda 0.8, their product 0.72.
    # Deltas: 0.54 - 0.5 = 0.04, 0.63 - 0.6 = 0.03, 1 - 0.7 = 0.3.
    # 0.03 + 0.72 x 0.3 = 0.246; 0.04 + 0.72 x 0.246 = 0.21712.
    rewards, values = tensor([0.0, 0.0, 1.0]), tensor([0.5, 0.6, 0.7])
    assert near(gae(rewards, values, 0.9, 0.8), 0.21712, 0.246, 0.3)


def test_gae_bootstraps_a_truncated_episode():
    # The last delta becomes 1 + 0.9 x 0.8 - 0.7 = 1.02.
    # 0.03 + 0.72 x 1.02 = 0.7644; 0.04 + 0.72 x 0.7644 = 0.590368.
    rewards, values = tensor([0.0, 0.0, 1.0]), tensor([0.5, 0.6, 0.7])
    found = gae(rewards, values, 0.9, 0.8, last_value=0.8)
    assert near(found, 0.590368, 0.7644, 1.02)


def test_gae_of_one_step_is_reward_less_value():
    assert near(gae(tensor([-0.7]), tensor([0.2]), 1.0, 0.95), -0.9)


def test_whiten_by_hand():
    # Mean 2.5, variance 5/4, deviation 1.1180340.
    values = tensor([1.0, 2.0, 3.0, 4.0])
    assert near(whiten(values), -1.3416408, -0.4472136, 0.4472136, 1.3416408)
    assert values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert whiten(tensor([])).numel() == 0


@pytest.mark.parametrize("value", [0.0, 0.1, -1.3, 0.7, -5.0])
@pytest.mark.parametrize("count", [1, 3, 7, 1000])
@pytest.mark.parametrize("rounding", [0.0, 1e-5])
def test_whiten_of_constants_is_zero(value, count, rounding):
    """Rounding, of the mean or of the values, must not be blown up to 1."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0))
    assert not whiten(value + rounding * noise).any()
    assert whiten(value + 0.01 * noise).any() or count == 1


# --------------------------------------------------------------------------------------------- PPO

OLD = [[-1.0, -1.0]]
# Ratios 1.5 and 0.5.
NEW = [[-1.0 + math.log(1.5), -1.0 + math.log(0.5)]]
BY_HAND = [
    # -(min(1.5, 1.2) + min(0.5, 0.8)) / 2; the first is clipped, the second gets -0.5 / 2.
    (1.0, -0.85, [0.0, -0.25]),
    # -(min(-1.5, -1.2) + min(-0.5, -0.8)) / 2; the first gets 1.5 / 2, the second is clipped.
    (-1.0, 1.15, [0.75, 0.0]),
]


@pytest.mark.parametrize("sign, value, gradient", BY_HAND)
def test_ppo_by_hand_with_a_gradient_of_exactly_zero_where_clipped(sign, value, gradient):
    logps = tensor(NEW, requires_grad=True)
    loss, info = ppo_loss(logps, tensor(OLD), torch.full((1, 2), sign), torch.ones(1, 2), clip=0.2)
    loss.backward()
    assert loss.item() == approx(value, abs=1e-6)
    assert near(logps.grad, *gradient)
    assert logps.grad[0, gradient.index(0.0)].item() == 0.0
    assert info["clip_share"].item() == 1.0
    assert info["ratio"].item() == approx(1.0)
    assert info["ppo_loss"].item() == approx(value)


def test_ppo_ratio_is_exactly_1_at_the_old_policy():
    logps = tensor([[-0.3, -2.7, -11.1]], requires_grad=True)
    old_logps, advantages = logps.detach().clone(), torch.full((1, 3), 2.0)
    loss, info = ppo_loss(logps, old_logps, advantages, torch.ones(1, 3), clip=0.2)
    loss.backward()
    assert info["ratio"].item() == 1.0
    assert info["clip_share"].item() == 0.0
    assert loss.item() == -2.0
    # The plain policy gradient.
    assert near(logps.grad, -2 / 3, -2 / 3, -2 / 3)


def test_ppo_clip_share_counts_tokens_outside_the_range():
    logps = tensor([[math.log(1.1), math.log(1.3), math.log(0.7), 9.0]])
    mask = tensor([[1, 1, 1, 0]])
    _, info = ppo_loss(logps, torch.zeros(1, 4), torch.ones(1, 4), mask, clip=0.2)
    assert info["clip_share"].item() == approx(2 / 3)
    assert info["ratio"].item() == approx(3.1 / 3)


# --------------------------------------------------------------------------------------- value, KL


def test_value_loss_by_hand():
    # (0.5 x 1 + 0.5 x 4) / 2
    loss, info = value_loss(tensor([1.0, 3.0]), tensor([2.0, 1.0]))
    assert loss.item() == approx(1.25)
    assert info["value_loss"].item() == approx(1.25)


def test_kl_k3_by_hand():
    # log ratio ref - new: 0, -ln 2, ln 2 -> 0, 1/2 - 1 + ln 2, 2 - 1 - ln 2.
    logps = tensor([-1.0, -1.0, -1.0])
    ref_logps = tensor([-1.0, -1.6931472, -0.3068528])
    assert near(kl_k3(logps, ref_logps), 0.0, 0.1931472, 0.3068528)


def test_kl_k3_estimates_the_divergence_of_policy_from_reference():
    # KL = 0.6 ln 3 - 0.1 ln 5 = 0.4982236.
    policy, reference = tensor([0.6, 0.3, 0.1]), tensor([0.2, 0.3, 0.5])
    mean = (policy * kl_k3(policy.log(), reference.log())).sum()
    assert mean.item() == approx(0.4982236, abs=1e-6)


# --------------------------------------------------------------------------------- what all share


class Case:
    """A loss over `size` random rows, of which any part can be taken."""

    def __init__(self, name: str, size: int):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.name = name
        self.logps = draw(size, 4).requires_grad_()
        self.first = draw(size).requires_grad_()
        self.second = draw(size).requires_grad_()
        self.advantages = draw(size, 4)
        self.ref_first = draw(size)
        self.ref_second = draw(size)
        self.mask = draw(size, 4) > 0
        of_tokens = name in ("sft", "ppo")
        self.count = int(self.mask.sum()) if of_tokens else size
        self.inputs = {
            "sft": [self.logps],
            "dpo": [self.first, self.second],
            "ppo": [self.logps],
            "value": [self.first],
        }[name]

    def loss(self, start: int, end: int, count: float | None):
        rows = slice(start, end)
        first, ref_first = self.first[rows], self.ref_first[rows]
        logps, mask, advantages = self.logps[rows], self.mask[rows], self.advantages[rows]
        if self.name == "sft":
            return sft_loss(logps, mask, count)
        if self.name == "dpo":
            return dpo_loss(first, self.second[rows], ref_first, self.ref_second[rows], 0.3, count)
        if self.name == "ppo":
            old_logps = logps.detach() + 0.3 * advantages
            return ppo_loss(logps, old_logps, advantages, mask, 0.2, count)
        return value_loss(first, ref_first, count)


NAMES = ["sft", "dpo", "ppo", "value"]


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_with_count_add_up_to_one_batch(name):
    case = Case(name, 7)
    whole, info = case.loss(0, 7, None)
    expected = torch.autograd.grad(whole, case.inputs)
    # The middle one is empty.
    parts = [case.loss(start, end, case.count) for start, end in ((0, 3), (3, 3), (3, 7))]
    total, figures = add_up(parts)
    assert total.item() == approx(whole.item(), abs=1e-6)
    for ours, wanted in zip(torch.autograd.grad(total, case.inputs), expected):
        assert torch.allclose(ours, wanted, atol=1e-7)
    assert set(figures) == set(info)
    for key, value in info.items():
        assert figures[key].item() == approx(value.item(), abs=1e-6), key
        assert not value.requires_grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [None, 5])
def test_an_empty_input_gives_0_with_a_graph(name, count):
    case = Case(name, 3)
    loss, info = case.loss(0, 0, count)
    loss.backward()
    assert loss.item() == 0
    assert all((values.grad == 0).all() for values in case.inputs)
    assert all(figure.item() == 0 for figure in info.values())


def test_an_empty_mask_gives_0_with_a_graph():
    logps = torch.randn(2, 3, requires_grad=True)
    nothing = torch.zeros(2, 3)
    sft, _ = sft_loss(logps, nothing)
    ppo, _ = ppo_loss(logps, logps.detach(), torch.ones(2, 3), nothing, 0.2)
    for loss in (sft, ppo):
        loss.backward()
        assert loss.item() == 0
        assert (logps.grad == 0).all()


def test_the_discriminator_may_see_only_one_side():
    agent = torch.zeros(2, requires_grad=True)
    loss, _ = discriminator_loss(torch.zeros(0), agent)
    loss.backward()
    assert loss.item() == approx(LN2, abs=1e-6)
    assert near(agent.grad, 0.25, 0.25)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e9])
def test_masked_values_do_not_leak(bad):
    mask = tensor([[1.0, 0.0]])
    logps = tensor([[-1.0, bad]], requires_grad=True)
    loss, info = sft_loss(logps, mask)
    loss.backward()
    assert loss.item() == 1.0
    assert logps.grad.tolist() == [[-1.0, 0.0]]
    assert info["nll"].item() == 1.0
    logps.grad = None
    loss, info = ppo_loss(logps, tensor([[-1.0, 0.0]]), tensor([[2.0, bad]]), mask, 0.2)
    loss.backward()
    assert loss.item() == -2.0
    assert logps.grad.tolist() == [[-2.0, 0.0]]
    assert info["ratio"].item() == 1.0
    assert info["clip_share"].item() == 0.0
