"""Worker processes: one that fails is replaced, and its episodes are played again."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import counter
import pytest
import tiny
from counter import NONSENSE, Counter

from benchmarks.workers import MOST_FAILURES, Workers
from rollout import run_episodes
from trajectory import InputError

SOURCE = f"{counter.__file__}:Counter"


@pytest.fixture
def pool():
    """Makes Workers of the Counter; afterwards no process of theirs may be left."""
    made = []

    def make(count=2, timeout=30.0, **options):
        made.append(Workers(SOURCE, options, count, timeout))
        return made[-1]

    yield make
    for workers in made:
        pids = [worker.process.pid for worker in workers.workers if worker.process]
        for worker in workers.workers:
            worker.end()
        assert not any(map(alive, pids))


def play(episode, actions):
    return [episode.step(f"Action: {action}") for action in actions]


def without_restarts(steps):
    plain = []
    for observation, reward, done, info in steps:
        info = {key: value for key, value in info.items() if key != "restarts"}
        plain.append((observation, reward, done, info))
    return plain


def restarts_of(steps):
    return [info["restarts"] for *_, info in steps]


def alive(pid):
    return Path(f"/proc/{pid}").exists()


def test_the_protocol_is_the_environments(pool):
    env, alone = pool(), Counter()
    assert env.slow and env.splits == alone.splits and env.instruction == "Count."
    assert env.max_steps("train-0") == 4
    assert env.expert("train-1") == alone.expert("train-1")
    assert env.expert("shown to nobody") is None
    one, first = env.start("train-1")
    two, _ = env.start("train-1")
    here, _ = alone.start("train-1")
    assert first == "train-1: 0"
    assert without_restarts(play(one, ["a", "odd"])) == play(here, ["a", "odd"])
    said = [play(episode, ["where"])[0][0] for episode in (one, two)]
    pids = [int(text.split()[-1]) for text in said]
    assert len({os.getpid(), *pids}) == 3
    assert one.step("Action: b")[2] is True
    over = ("The task is over.", 1.0, True, {"valid": False, "restarts": 0})
    assert one.step("Action: b") == over


def test_a_worker_imports_no_torch(pool):
    """This process has torch; what a worker needs for a world is the world."""
    episode, _ = pool(count=1).start("train-0")
    assert play(episode, ["torch"])[0][0] == "train-0: 1 torch False"


def test_errors_of_the_user_are_not_failures(pool):
    env = pool(count=1)
    with pytest.raises(InputError, match="there is no task 'unknown'"):
        env.start("unknown")
    with pytest.raises(InputError, match="turns must be positive"):
        Workers(SOURCE, {"turns": 0}, 1)
    assert env.workers[0].generation == 0
    episode, first = env.start("train-0")
    assert first == "train-0: 0" and env.workers[0].playing == {episode.key}


@pytest.mark.parametrize("failure", ["die", "raise", *NONSENSE])
def test_one_failure_is_replayed_to_the_same_answers_and_counted(pool, tmp_path, failure, capfd):
    undisturbed = play(Counter().start("train-2")[0], ["a", "b"])
    env = pool(count=1, once=str(tmp_path / "once"))
    episode, _ = env.start("train-2")
    steps = play(episode, ["a", "b", failure, "c"])
    assert without_restarts(steps[:2]) == undisturbed
    assert steps[2][0] == f"train-2: 3 {failure}" and steps[3][2] is True
    assert restarts_of(steps) == [0, 0, 1, 1]
    assert not any("unplayable" in info for *_, info in steps)
    assert "train-2: failure 1 of 3" in capfd.readouterr().err


def test_numbers_of_numpy_are_no_failure(pool):
    episode, _ = pool(count=1).start("train-2")
    [(_, reward, _, info)] = play(episode, ["numpy"])
    assert (type(reward), reward, info["restarts"]) == (float, 0.25, 0)


def test_a_hanging_worker_is_ended_after_the_timeout(pool, tmp_path):
    env = pool(count=1, timeout=30.0, once=str(tmp_path / "once"))
    episode, _ = env.start("train-2")
    play(episode, ["a"])
    worker = env.workers[0]
    pid = worker.process.pid
    worker.timeout = 1.0
    # A new process may take its time.
    threading.Timer(1.5, setattr, (worker, "timeout", 30.0)).start()
    before = time.monotonic()
    assert episode.step("Action: hang")[3]["restarts"] == 1
    assert time.monotonic() - before < 25 and not alive(pid)


def test_kill_9_between_two_steps_changes_nothing_but_the_count(pool):
    actions = ["a", "odd", "b", "c"]
    undisturbed = play(Counter().start("train-3")[0], actions)
    env = pool(count=1)
    episode, _ = env.start("train-3")
    beside, _ = env.start("train-4")
    steps = play(episode, actions[:2])
    play(beside, ["x"])
    os.kill(env.workers[0].process.pid, signal.SIGKILL)
    steps += play(episode, actions[2:])
    assert without_restarts(steps) == undisturbed and restarts_of(steps)[-1] == 1
    after = beside.step("Action: y")
    assert after[0] == "train-4: 2 y" and after[3]["restarts"] == 1
    assert (episode.failures, beside.failures) == (1, 0)


@pytest.mark.parametrize("failure", ["die", "nothing"])
def test_a_task_that_always_fails_is_reported_and_the_others_go_on(pool, failure, capfd):
    env = pool(count=1)
    episode, _ = env.start("train-0")
    beside, _ = env.start("train-1")
    play(episode, ["a"])
    play(beside, ["a"])
    _, reward, done, info = episode.step(f"Action: {failure}")
    assert done and info["unplayable"] == 1 and reward == 0.25
    assert episode.failures == env.workers[0].generation == MOST_FAILURES
    assert "the task is not playable" in capfd.readouterr().err
    assert without_restarts(play(beside, ["b"])) == [("train-1: 2 b", 0.5, False, {"valid": True})]


def test_a_task_that_cannot_start_is_reported_at_its_first_turn(pool):
    env = pool(count=1)
    episode, first = env.start("dies at start")
    assert first == "dies at start cannot be played."
    info = {"valid": True, "restarts": 0, "unplayable": 1}
    assert episode.step("Action: a")[2:] == (True, info)
    assert env.expert("dies at start") is None
    assert env.start("train-0")[1] == "train-0: 0"


def test_a_world_that_replays_otherwise_is_unplayable(pool):
    env = pool(count=1)
    episode, _ = env.start("train-0")
    # The answer depends on the process.
    play(episode, ["where"])
    os.kill(env.workers[0].process.pid, signal.SIGKILL)
    assert episode.step("Action: a")[3]["unplayable"] == 1


def test_episodes_spread_over_the_workers_and_closed_ones_free_them(pool):
    env = pool(count=3)
    tasks = [f"train-{i}" for i in range(6)] * 2
    with ThreadPoolExecutor(8) as threads:
        episodes = [episode for episode, _ in threads.map(env.start, tasks)]
    assert [len(worker.playing) for worker in env.workers] == [4, 4, 4]
    for episode in episodes:
        episode.close()
        episode.close()
    assert [len(worker.playing) for worker in env.workers] == [0, 0, 0]
    assert episodes[0].step("Action: a")[2] is True


def test_dropped_workers_leave_no_process():
    env = Workers(SOURCE, {}, 2)
    # Kept: an episode that is dropped leaves its process.
    episodes = [env.start("train-0"), env.start("train-1")]
    pids = [worker.process.pid for worker in env.workers]
    assert len(set(pids)) == 2 and all(map(alive, pids))
    del env, episodes
    assert not any(map(alive, pids))


def test_run_episodes_plays_the_same_with_workers_after_kills(pool):
    """Episodes of a tiny model: in this process, in workers, and in workers that are killed."""
    tokenizer = tiny.chatml()
    agent = tiny.model(vocab=len(tokenizer), context=1024)
    tasks = [f"train-{i}" for i in range(6)]

    def play_all(env, progress=lambda count: None):
        played = run_episodes(
            agent,
            tokenizer,
            env,
            tasks,
            temperature=1.0,
            max_new_tokens=5,
            batch=4,
            seed=3,
            progress=progress,
        )
        shown = [(t.task_id, t.steps, t.reward, t.truncated, t.info["invalid"]) for t in played]
        return shown, sum(t.info.get("restarts", 0) for t in played)

    here, _ = play_all(Counter())
    assert play_all(pool()) == (here, 0)
    attacked, ended = pool(), []

    def kill_twice(count):
        ended.append(count)
        # Others are under way then.
        if len(ended) in (1, 4):
            os.kill(attacked.workers[len(ended) % 2].process.pid, signal.SIGKILL)

    after_kills, restarts = play_all(attacked, kill_twice)
    assert after_kills == here and restarts > 0
