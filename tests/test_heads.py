"""Discriminator and value head: fitting, early stop, folds."""
from collections import defaultdict

import pytest
import torch

import losses
from heads import Head, fit, two_folds


def clouds(steps=200, k=2, gap=2.0):
    gen = torch.Generator().manual_seed(0)
    return torch.randn(steps, 5, generator=gen) + gap, torch.randn(steps * k, 5, generator=gen) - gap


def discriminator(expert, agent, learn, held, lr):
    """Fitted to two practice actions a step."""
    d, figures = Head.load_or_make(None, 5, 0), defaultdict(float)
    leaves = lambda steps: (2 * steps[:, None] + torch.arange(2)).flatten()
    fit(d, torch.cat([expert[learn], agent[leaves(learn)]]), lambda s: losses.discriminator_loss(d(expert[s]), d(agent[leaves(s)]))[0],
        learn, held, lr, 0, figures, "d")
    return d, figures


def test_the_discriminator_separates_what_can_be_separated():
    expert, agent = clouds()
    d, figures = discriminator(expert, agent, torch.arange(120), torch.arange(120, 150), 1e-2)
    with torch.no_grad():
        assert losses.area_under_curve(d(expert[150:]), d(agent[300:])) > 0.99
        assert losses.step_reward(d(expert[150:])).mean() > -0.1 and losses.step_reward(d(agent[300:])).mean() < -2
    assert 2 * figures["d_loss_held"] < 0.1 and 2 * figures["d_loss"] < 0.1


def test_fitting_stops_when_the_held_out_loss_rises():
    """Nothing to learn: it keeps the weights of its best pass, near two times ln 2."""
    expert, agent = clouds(60, gap=0.0)
    d, figures = discriminator(expert, agent, torch.arange(30), torch.arange(30, 60), 3e-2)
    with torch.no_grad():
        loss = losses.discriminator_loss(d(expert[30:]), d(agent[60:]))[0].item()
    assert 2 * figures["d_passes"] < 40 and loss == pytest.approx(2 * figures["d_loss_held"], abs=1e-5) and loss < 1.6


def test_a_value_head_learns_a_linear_value():
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(400, 5, generator=gen)
    y, v = x @ torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0]) + 3, Head.load_or_make(None, 5, 0)
    fit(v, x[:200], lambda s: losses.value_loss(v(x[s]), y[s])[0], torch.arange(200), torch.arange(200, 300), 1e-2, 0, defaultdict(float), "value")
    with torch.no_grad():
        assert 1 - (v(x[300:]) - y[300:]).var() / y[300:].var() > 0.9


def test_folds_are_whole_tasks_and_nobody_is_judged_by_what_it_taught():
    tasks = torch.arange(40).repeat_interleave(3)
    for fold in (0, 1):
        learn, held, test = two_folds(tasks, fold)
        of = lambda steps: set(tasks[steps].tolist())
        assert not of(learn) & of(held) and not (of(learn) | of(held)) & of(test)
        assert len(of(held)) == 4 and len(of(test)) == 20 and len(learn) + len(held) + len(test) == 120
    learn, held, _ = two_folds(torch.tensor([2, 3]), 0)                   # too few to hold any out: it must still be trained
    assert learn.tolist() == held.tolist() == [1]


def test_heads_are_seeded_apart_from_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = (Head.load_or_make(None, 5, seed) for seed in (0, 0, 1))
    assert torch.equal(a.mlp[0].weight, b.mlp[0].weight) and not torch.equal(a.mlp[0].weight, c.mlp[0].weight)
    assert torch.equal(before, torch.get_rng_state())
