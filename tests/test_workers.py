"""Worker processes: an environment that dies, hangs or talks nonsense on command is restarted, its episode replayed, and counted."""
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tiny
from envs import WORKER_FAILURES, Workers, parse_action
from rollout import InputError, Step, Trajectory, run_episodes


class Counter:
    """Says how many turns were played; done after `turns`. An action "die", "hang", "raise" or one of NONSENSE is obeyed as long
    as the file `once` does not say that it was already (without the file: always)."""

    slow, instruction, example = True, "Count.", "Action: one"

    def __init__(self, turns: int = 4, once: str = ""):
        if turns < 1:
            raise InputError("turns must be positive")
        self.turns, self.once = turns, Path(once) if once else None
        self.splits = {"train": [f"train-{i}" for i in range(6)]}

    def max_steps(self, task_id):
        return self.turns

    def task_type(self, task_id):
        return "count"

    def start(self, task_id):
        if task_id == "unknown":
            raise InputError("there is no task 'unknown'")
        if task_id == "stillborn":
            os._exit(1)
        return Episode(self, task_id), f"{task_id}: 0"

    def expert(self, task_id):
        if task_id == "stillborn":
            os._exit(1)
        return None if task_id == "shown to nobody" else Trajectory(task_id, [], [Step(f"{task_id}: 0", "Action: one")], 1.0)


class Episode:
    def __init__(self, env, task_id):
        self.env, self.task_id, self.count = env, task_id, 0

    def step(self, text):
        action = parse_action(text)
        if action in ("die", "hang", "raise", *NONSENSE):
            if self.env.once is None or not self.env.once.exists():
                if self.env.once:
                    self.env.once.touch()
                return self.fail(action)
        self.count += 1
        said = f"{self.task_id}: {self.count} {action}" + f" in {os.getpid()}" * (action == "where")
        return said, self.count / self.env.turns, self.count == self.env.turns, {"valid": action != "odd"}

    def fail(self, action):
        if action == "hang":
            time.sleep(60)
        if action == "raise":
            raise ValueError("an error of the environment")
        return NONSENSE[action]() if action in NONSENSE else os.kill(os.getpid(), signal.SIGKILL)


NONSENSE = {"nothing": lambda: None, "text": lambda: "four", "too much": lambda: ("x", 7.0, False, {"valid": True}),
            "not a number": lambda: ("x", float("nan"), False, {"valid": True}), "no info": lambda: ("x", 0.5, False, {}),
            "bytes": lambda: (b"\xff", 0.5, False, {"valid": True}), "unsendable": lambda: lambda: None}


@pytest.fixture
def pool():
    """Makes Workers of the Counter; afterwards no process of theirs may be left."""
    made = []

    def make(n=2, timeout=30.0, **options):
        made.append(Workers(Counter, options, n, timeout))
        return made[-1]
    yield make
    for workers in made:
        for worker in workers.workers:
            worker.end()
    assert multiprocessing.active_children() == []


def play(episode, actions):
    return [episode.step(f"Action: {action}") for action in actions]


def plain(steps):
    """The steps without the count of restarts."""
    return [(o, r, done, {k: v for k, v in info.items() if k != "restarts"}) for o, r, done, info in steps]


def alive(pid):
    return Path(f"/proc/{pid}").exists()


def test_the_protocol_is_the_environment_s(pool):
    env, alone = pool(), Counter()
    assert env.slow and env.splits == alone.splits and env.instruction == "Count." and env.max_steps("train-0") == 4
    assert env.expert("train-1") == alone.expert("train-1") and env.expert("shown to nobody") is None
    (one, first), (two, _) = env.start("train-1"), env.start("train-1")
    here, _ = alone.start("train-1")
    assert first == "train-1: 0" and plain(play(one, ["a", "odd"])) == play(here, ["a", "odd"])
    assert len({os.getpid(), *(int(play(episode, ["where"])[0][0].split()[-1]) for episode in (one, two))}) == 3
    assert one.step("Action: b")[2] is True and one.step("Action: b") == ("The task is over.", 1.0, True, {"valid": False, "restarts": 0})


def test_errors_of_the_user_are_not_failures(pool):
    env = pool(n=1)
    with pytest.raises(InputError, match="there is no task 'unknown'"):
        env.start("unknown")
    with pytest.raises(InputError, match="turns must be positive"):
        Workers(Counter, {"turns": 0}, 1)
    assert env.workers[0].lives == 0 and env.start("train-0")[1] == "train-0: 0"


@pytest.mark.parametrize("failure", ["die", "raise", *NONSENSE])
def test_one_failure_is_replayed_to_the_same_answers_and_counted(pool, tmp_path, failure, capfd):
    undisturbed = play(Counter().start("train-2")[0], ["a", "b"])
    env = pool(n=1, once=str(tmp_path / "once"))
    episode, _ = env.start("train-2")
    steps = play(episode, ["a", "b", failure, "c"])
    assert plain(steps[:2]) == undisturbed and steps[2][0] == f"train-2: 3 {failure}" and steps[3][2] is True
    assert [info["restarts"] for *_, info in steps] == [0, 0, 1, 1] and not any("unplayable" in info for *_, info in steps)
    assert "train-2: failure 1 of 3" in capfd.readouterr().err


def test_a_hanging_worker_is_ended_after_the_timeout(pool, tmp_path):
    env = pool(n=1, timeout=30.0, once=str(tmp_path / "once"))
    episode, _ = env.start("train-2")
    play(episode, ["a"])
    pid, env.workers[0].timeout, before = env.workers[0].process.pid, 1.0, time.monotonic()
    threading.Timer(1.5, setattr, (env.workers[0], "timeout", 30.0)).start()                     # a new process may take its time
    assert episode.step("Action: hang")[3]["restarts"] == 1 and time.monotonic() - before < 25 and not alive(pid)


def test_kill_9_between_two_steps_changes_nothing_but_the_count(pool):
    actions = ["a", "odd", "b", "c"]
    undisturbed = play(Counter().start("train-3")[0], actions)
    env = pool(n=1)
    (episode, _), (beside, _) = env.start("train-3"), env.start("train-4")
    steps = play(episode, actions[:2])
    play(beside, ["x"])
    os.kill(env.workers[0].process.pid, signal.SIGKILL)
    steps += play(episode, actions[2:])
    assert plain(steps) == undisturbed and steps[-1][3]["restarts"] == 1
    after = beside.step("Action: y")
    assert after[0] == "train-4: 2 y" and after[3]["restarts"] == 1 and (episode.failures, beside.failures) == (1, 0)


@pytest.mark.parametrize("failure", ["die", "nothing"])
def test_a_task_that_always_fails_is_reported_and_the_others_go_on(pool, failure, capfd):
    env = pool(n=1)
    (episode, _), (beside, _) = env.start("train-0"), env.start("train-1")
    play(episode, ["a"]), play(beside, ["a"])
    observation, reward, done, info = episode.step(f"Action: {failure}")
    assert done and info["unplayable"] == 1 and reward == 0.25 and episode.failures == env.workers[0].lives == WORKER_FAILURES
    assert "the task is not playable" in capfd.readouterr().err
    assert plain(play(beside, ["b"])) == [("train-1: 2 b", 0.5, False, {"valid": True})]


def test_a_task_that_cannot_start_is_reported_at_its_first_turn(pool):
    env = pool(n=1)
    episode, first = env.start("stillborn")
    assert first == "stillborn cannot be played." and episode.step("Action: a")[2:] == (True, {"valid": True, "restarts": 0, "unplayable": 1})
    assert env.expert("stillborn") is None and env.start("train-0")[1] == "train-0: 0"


def test_a_world_that_replays_otherwise_is_unplayable(pool):
    env = pool(n=1)
    episode, _ = env.start("train-0")
    play(episode, ["where"])                                         # the answer depends on the process
    os.kill(env.workers[0].process.pid, signal.SIGKILL)
    assert episode.step("Action: a")[3]["unplayable"] == 1


def test_episodes_spread_over_the_workers_and_closed_ones_make_room(pool):
    env = pool(n=3)
    with ThreadPoolExecutor(8) as threads:
        episodes = [episode for episode, _ in threads.map(env.start, [f"train-{i}" for i in range(6)] * 2)]
    assert [len(worker.playing) for worker in env.workers] == [4, 4, 4]
    for episode in episodes:
        episode.close(), episode.close()
    assert [len(worker.playing) for worker in env.workers] == [0, 0, 0]
    assert episodes[0].step("Action: a")[2] is True


def test_dropped_workers_leave_no_process(pool):
    env = Workers(Counter, {}, 2)
    env.start("train-0"), env.start("train-1")
    pids = [worker.process.pid for worker in env.workers]
    assert all(map(alive, pids))
    del env
    assert not any(map(alive, pids)) and multiprocessing.active_children() == []


def test_run_episodes_plays_the_same_with_workers_under_fire(pool):
    """Episodes of a tiny model: in this process, in workers, and in workers of which some are killed on the way."""
    tokenizer = tiny.chatml()
    agent, tasks = tiny.model(vocab=len(tokenizer), context=1024), [f"train-{i}" for i in range(6)]

    def play_all(env, progress=lambda n: None):
        played = run_episodes(agent, tokenizer, env, tasks, temperature=1.0, max_new_tokens=5, batch=4, seed=3, progress=progress)
        return [(t.task_id, t.steps, t.reward, t.truncated, t.info["invalid"]) for t in played], sum(t.info.get("restarts", 0) for t in played)
    here, _ = play_all(Counter())
    assert play_all(pool()) == (here, 0)
    fired, ended = pool(), []

    def fire(n):
        ended.append(n)
        if len(ended) in (1, 4):                                     # others are under way then
            os.kill(fired.workers[len(ended) % 2].process.pid, signal.SIGKILL)
    under_fire, restarts = play_all(fired, fire)
    assert under_fire == here and restarts > 0
