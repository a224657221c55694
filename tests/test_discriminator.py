"""The value head (fitting, early stop, folds), and what is said of a discriminator's logits."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import losses
from discriminator import (
    FOLDS,
    ActionValues,
    Fold,
    Head,
    figures_of,
    fit,
    fold_of,
    reward_figures,
)
from trajectory import InputError

NOBODY = torch.arange(0)


def new_head(tmp_path, seed: int = 0) -> Head:
    return Head.load_or_make(tmp_path / "none.safetensors", 5, seed)


def practice_of(*differs: list[bool]) -> SimpleNamespace:
    return SimpleNamespace(differs=torch.tensor(differs))


def test_figures_of_a_discriminator_by_hand():
    """Two trajectories, of two steps and of one, K = 2."""
    judged = [
        ActionValues(torch.tensor([2.0, 0.0]), torch.tensor([[1.0, 3.0], [0.0, -1.0]])),
        ActionValues(torch.tensor([1.0]), torch.tensor([[-2.0, 1.0]])),
    ]
    practised = [practice_of([True, True], [True, True]), practice_of([True, False])]
    found = figures_of(judged, practised, "held_out")
    expert, agent = [2.0, 0.0, 1.0], [1.0, 3.0, 0.0, -1.0, -2.0, 1.0]
    wins = sum((a > b) + (a == b) / 2 for a in expert for b in agent)
    assert found["d_auc_held_out"] == pytest.approx(wins / 18)
    # 2 > 1, not 2 > 3, not 0 > 0, 0 > -1, 1 > -2.
    assert found["d_pairs_held_out"] == pytest.approx(3 / 5)
    loss = sum(math.log1p(math.exp(-value)) for value in expert) / 3
    loss += sum(math.log1p(math.exp(value)) for value in agent) / 6
    assert found["d_loss_held_out"] == pytest.approx(loss)
    assert found["js"] == pytest.approx(math.log(2) - loss / 2)
    assert "js" not in figures_of(judged, practised, "learnt")
    assert figures_of([], [], "held_out") == {}
    # Nothing differs: no pair to put in order.
    alike = [practice_of([False, False], [False, False]), practice_of([False, False])]
    assert "d_pairs_learnt" not in figures_of(judged, alike, "learnt")


def test_the_bound_on_the_divergence_is_met_by_the_best_discriminator():
    """Expert 3/4, 1/4 and agent 1/4, 3/4 over two actions; D = p_E / (p_E + p)."""
    log3 = math.log(3)
    expert = torch.tensor([log3, log3, log3, -log3])
    agent = torch.tensor([[log3], [-log3], [-log3], [-log3]])
    practised = [SimpleNamespace(differs=torch.ones(4, 1, dtype=torch.bool))]
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    best = figures_of([ActionValues(expert, agent)], practised, "held_out")["js"]
    assert best == pytest.approx(divergence)
    for factor in (0.5, 2.0):
        other = ActionValues(factor * expert, factor * agent)
        assert figures_of([other], practised, "held_out")["js"] < best


def test_reward_figures_by_hand():
    log_d = [ActionValues(torch.tensor([-0.1, -0.3]), torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))]
    found = reward_figures(log_d, [practice_of([False, True], [True, True])])
    assert found["log_d_expert"] == pytest.approx(-0.2)
    assert found["log_d_agent"] == pytest.approx(-2.5)
    assert found["log_d_gap"] == pytest.approx(1.0)


def test_a_head_that_no_longer_gets_better_is_given_four_more_passes(tmp_path):
    """The held-out loss is 1 first and rises: the weights are those of the beginning."""
    held_out_losses, head = [], new_head(tmp_path)
    before = {name: weight.clone() for name, weight in head.mlp.state_dict().items()}

    def loss_on(steps):
        if steps is fold.held_out:
            held_out_losses.append(len(held_out_losses) + 1.0)
            return torch.tensor(held_out_losses[-1])
        return head(torch.ones(5))

    fold = Fold(torch.arange(10), torch.arange(10, 20), NOBODY)
    figures = fit(head, torch.randn(20, 5), loss_on, fold, 1e-2, 0)
    assert figures["passes"] == 4 and figures["loss_held"] == 1.0
    for name, weight in head.mlp.state_dict().items():
        assert torch.equal(weight, before[name])


def test_features_are_standardised_by_what_the_head_may_see(tmp_path):
    """A feature that is constant there does no harm."""
    head, features = new_head(tmp_path), torch.randn(100, 5) * 7 + 3
    features[:, 2] = 4.0
    fold = Fold(torch.arange(50), torch.arange(50, 100), NOBODY)
    fit(head, features, lambda steps: head(features[steps]).square().mean(), fold, 1e-2, 0)
    assert torch.allclose(head.mean, features.mean(0)) and head.mean[2] == 4
    assert torch.allclose(head.std, features.std(0) + 1e-6)
    assert head(features).isfinite().all()


def test_features_that_are_not_finite_are_refused(tmp_path):
    head, fold = new_head(tmp_path), Fold(torch.arange(5), torch.arange(5), NOBODY)
    features = torch.full((5, 5), math.nan)
    with pytest.raises(InputError, match="a head's loss is not finite"):
        fit(head, features, lambda steps: head(features[steps]).mean(), fold, 1e-2, 0)


def test_a_value_head_learns_a_linear_value(tmp_path):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(400, 5, generator=generator)
    returns = states @ torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0]) + 3
    head = new_head(tmp_path)
    fold = Fold(torch.arange(200), torch.arange(200, 300), NOBODY)

    def loss_on(steps):
        return losses.value_loss(head(states[steps]), returns[steps])[0]

    fit(head, states[:200], loss_on, fold, 1e-2, 0)
    with torch.no_grad():
        error = (head(states[300:]) - returns[300:]).var()
    assert 1 - error / returns[300:].var() > 0.9


# ------------------------------------------------------------------------------------------- folds


def test_folds_are_whole_tasks_and_no_head_judges_what_it_learnt_from():
    """40 tasks of 3 steps. A fifth of the 20 that a head may see is held out."""
    places = torch.arange(40).repeat_interleave(3)
    judged = []
    for number in FOLDS:
        fold = fold_of(places, number)
        learn, held_out, judge = (
            set(places[steps].tolist()) for steps in (fold.learn, fold.held_out, fold.judge)
        )
        assert not learn & held_out and not (learn | held_out) & judge
        assert (len(learn), len(held_out), len(judge)) == (16, 4, 20)
        assert len(fold.learn) + len(fold.held_out) + len(fold.judge) == 120
        judged += fold.judge.tolist()
    assert sorted(judged) == list(range(120))


def test_too_few_tasks_to_hold_any_out_are_learnt_from_all_the_same():
    fold = fold_of(torch.tensor([2, 3]), 0)
    assert fold.learn.tolist() == fold.held_out.tolist() == [1] and fold.judge.tolist() == [0]
    # Place 1 alone would be held out.
    fold = fold_of(torch.tensor([0, 1, 1]), 0)
    assert fold.learn.tolist() == fold.held_out.tolist() == [1, 2]


# ------------------------------------------------------------------------------------------- heads


def test_heads_are_seeded_apart_from_the_global_generator(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (new_head(tmp_path, seed) for seed in (0, 0, 1))
    assert torch.equal(one.mlp[0].weight, same.mlp[0].weight)
    assert not torch.equal(one.mlp[0].weight, other.mlp[0].weight)
    assert torch.equal(before, torch.get_rng_state())


def test_the_head_of_the_iteration_before_goes_on(tmp_path):
    head = new_head(tmp_path, 1)
    head.mean += 2
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    loaded = Head.load_or_make(tmp_path / "head.safetensors", 5, 0)
    features = torch.randn(7, 5)
    assert torch.equal(loaded(features), head(features))
