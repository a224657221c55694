"""ScienceWorld itself: needs `pip install -r requirements-envs.txt` and Java, and is skipped without them."""
import shutil

import pytest

pytest.importorskip("scienceworld", reason="pip install -r requirements-envs.txt")
if not shutil.which("java"):
    pytest.skip("Java is missing", allow_module_level=True)

from envs import make_env  # noqa: E402
from rollout import InputError  # noqa: E402


@pytest.fixture(scope="module")
def world():
    return make_env("scienceworld", tasks="lifespan-longest-lived,find-plant,power-component", variations=2)


def test_splits_are_the_package_s_and_disjoint(world):
    assert {split: len(ids) for split, ids in world.splits.items()} == {"train": 6, "dev": 6, "test": 6}
    assert len(set(sum(world.splits.values(), []))) == 18


def test_the_gold_path_earns_full_reward(world):
    for task in world.splits["train"][::2] + world.splits["test"][::2]:
        expert = world.expert(task)
        assert expert.reward == 1 and len(expert.steps) <= world.max_steps(task)
        assert all(s.action.startswith("Thought: ") and "\nAction: " in s.action for s in expert.steps)


def test_episodes_are_deterministic_and_side_by_side(world):
    task = world.splits["dev"][0]
    actions = [s.action for s in world.expert(task).steps]
    (one, first), (two, second) = world.start(task), world.start(task)
    assert first == second
    for action in actions:
        assert one.step(action) == two.step(action)
    one.close(), two.close()


def test_the_reward_is_the_best_score_and_a_wrong_focus_ends_the_episode(world):
    episode, _ = world.start("find-plant/0")
    before = episode.step("Action: look around")
    assert before[2] is False and before[3] == {"valid": True}
    _, reward, done, _ = episode.step("Action: focus on air")
    assert done and reward == before[1] >= 0


def test_an_invalid_action_is_said_to_be_and_costs_nothing(world):
    episode, _ = world.start("find-plant/0")
    for text in ("Action: sing a song", "I do not know"):
        observation, _, done, info = episode.step(text)
        assert observation.startswith("No known action") and not done and info == {"valid": False}
    episode.close()


@pytest.mark.parametrize("options", [{"tasks": "cook"}, {"variations": 0}, {"simplification": "simple"}])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError):
        make_env("scienceworld", **options)
