"""A world that counts turns, and that dies, hangs or talks nonsense when told to."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from trajectory import InputError, Step, Trajectory, parse_action

# What an environment must not answer.
NONSENSE = {
    "nothing": None,
    "text": "four",
    "too much": ("x", 7.0, False, {"valid": True}),
    "not a number": ("x", float("nan"), False, {"valid": True}),
    "no info": ("x", 0.5, False, {}),
    "bytes": (b"\xff", 0.5, False, {"valid": True}),
    # A generator cannot be sent through a pipe.
    "unsendable": (i for i in range(3)),
}
FAILURES = ["die", "hang", "raise", *NONSENSE]


class Counter:
    """Done after `turns`. An action of FAILURES is obeyed.

    With a file `once` it is obeyed once only: the file says that it was.
    """

    slow = True
    instruction = "Count."
    example = "Action: one"

    def __init__(self, turns: int = 4, once: str = ""):
        if turns < 1:
            raise InputError("turns must be positive")
        self.turns = turns
        self.once = Path(once) if once else None
        self.splits = {"train": [f"train-{i}" for i in range(6)]}

    def max_steps(self, task_id):
        return self.turns

    def task_type(self, task_id):
        return "count"

    def start(self, task_id):
        if task_id == "unknown":
            raise InputError("there is no task 'unknown'")
        if task_id == "dies at start":
            os._exit(1)
        return Episode(self, task_id), f"{task_id}: 0"

    def expert(self, task_id):
        if task_id == "dies at start":
            os._exit(1)
        if task_id == "shown to nobody":
            return None
        return Trajectory(task_id, [], [Step(f"{task_id}: 0", "Action: one")], 1.0)


class Episode:
    def __init__(self, env, task_id):
        self.env = env
        self.task_id = task_id
        self.count = 0

    def step(self, text):
        action = parse_action(text)
        if action in FAILURES and not (self.env.once and self.env.once.exists()):
            if self.env.once:
                self.env.once.touch()
            return self.fail(action)
        self.count += 1
        said = f"{self.task_id}: {self.count} {action}"
        reward = self.count / self.env.turns
        if action == "numpy":
            reward = np.float32(reward)
        if action == "where":
            said += f" in {os.getpid()}"
        if action == "torch":
            said += f" {'torch' in sys.modules}"
        done = self.count == self.env.turns
        return said, reward, done, {"valid": action != "odd"}

    def fail(self, action):
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "hang":
            time.sleep(60)
        if action == "raise":
            raise ValueError("an error of the environment")
        return NONSENSE[action]
