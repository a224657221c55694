"""Worker processes: a slow environment, or one that may crash, plays in other processes.

Workers follows the protocol of all environments. A process that dies, hangs or answers nonsense is
replaced, and its episodes are played again up to where they were. A process starts without the
parent's main script: it imports the environment, and no torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import signal
import subprocess
import sys
import threading
import weakref
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from benchmarks.files import need, sound_step, sound_text
from trajectory import InputError, Trajectory

# After this many failures a task is not playable.
MOST_FAILURES = 3
START = "import sys; sys.path[:] = {path}; from benchmarks.workers import serve; serve({pipe})"


class WorkerFailure(Exception):
    """A process died, hung, or answered what no environment answers."""


@functools.cache
def load_class(source: str) -> type:
    """The class that "package.module:Class" or "path/to/file.py:Class" names."""
    path, _, class_name = source.rpartition(":")
    if path.endswith(".py"):
        name = f"file_{Path(path).stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and pickle look for it there.
        sys.modules[name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(path)
    problem = f"has no class {class_name!r}; name one that it defines"
    need(hasattr(module, class_name), path, problem)
    return getattr(module, class_name)


def serve(pipe_number: int) -> None:
    """Runs in the process: answers requests until the pipe closes, or an error ends it."""
    # Ctrl-C is for the parent, whose end closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(pipe_number)
    source, options = pipe.recv()
    env, episodes = None, {}
    while True:
        try:
            call, key, argument, closed = pipe.recv()
        except (EOFError, OSError):
            return
        for old_key in closed:
            episode = episodes.pop(old_key, None)
            if hasattr(episode, "close"):
                episode.close()
        try:
            env = env or load_class(source)(**options)
            if call == "start":
                episodes[key], answer = env.start(argument)
            elif call == "step":
                answer = episodes[key].step(argument)
            else:
                answer = env.expert(argument)
            pipe.send((True, answer))
        except InputError as error:
            pipe.send((False, str(error)))


def sound(call: str, answer: Any) -> Any:
    """The answer as the protocol promises it, or WorkerFailure."""
    where = f"the answer to {call!r}"
    try:
        if call == "step":
            return sound_step(answer, where)
        if call == "start":
            return sound_text(answer, where, "the first observation")
        need(isinstance(answer, Trajectory | None), where, f"{answer!r:.60} is no Trajectory")
        return answer
    except InputError as error:
        raise WorkerFailure(str(error)) from None


class Worker:
    """A process and the pipe to it. Whoever asks holds the lock."""

    def __init__(self, source: str, options: dict, timeout: float):
        self.source, self.options, self.timeout = source, options, timeout
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        # The number of processes that have ended.
        self.generation = 0
        # Keys of running episodes, and of those to close with the next request.
        self.playing: set[int] = set()
        self.closed: list[int] = []

    def ask(self, call: str, key: int, argument: str) -> Any:
        """The answer to a request, from a new process if there is none.

        WorkerFailure: there is no sound answer, and the process is ended. InputError: from the
        environment.
        """
        try:
            if self.process is None:
                self.begin()
            closed, self.closed = self.closed, []
            self.pipe.send((call, key, argument, closed))
            if not self.pipe.poll(self.timeout):
                raise WorkerFailure(f"no answer within {self.timeout:g} s")
            understood, answer = self.pipe.recv()
            if understood:
                answer = sound(call, answer)
        except BaseException as error:
            # Also after Ctrl-C: the late answer would be taken for the next request's.
            self.end()
            if isinstance(error, Exception) and not isinstance(error, WorkerFailure):
                raise WorkerFailure("the process died") from None
            raise
        if not understood:
            raise InputError(answer)
        return answer

    def begin(self) -> None:
        self.pipe, theirs = Pipe()
        number = theirs.fileno()
        code = START.format(path=sys.path, pipe=number)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[number]
        )
        theirs.close()
        self.pipe.send((self.source, self.options))

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            self.generation += 1
            self.pipe.close()
            process.kill()
            process.wait()


class WorkerEpisode:
    """An episode in a process. After a failure its actions are played again, to the same answers.

    info["restarts"] counts that. After MOST_FAILURES failures the episode ends with
    info["unplayable"] = 1: it must not be scored.
    """

    def __init__(self, worker: Worker, key: int, call: str, task_id: str):
        self.worker, self.key, self.task_id = worker, key, task_id
        # (call, argument, answer) of each request.
        self.history: list[tuple[str, str, Any]] = []
        self.generation = worker.generation
        self.restarts = self.failures = 0
        self.reward = 0.0
        # The first observation, or the expert's trajectory.
        self.first = self.request(call, task_id)

    def request(self, call: str, argument: str) -> Any:
        """The answer, or None if the task has failed too often."""
        while self.failures < MOST_FAILURES:
            try:
                with self.worker.lock:
                    if self.generation != self.worker.generation:
                        self.replay()
                    answer = self.worker.ask(call, self.key, argument)
                self.history.append((call, argument, answer))
                return answer
            except WorkerFailure as error:
                self.failures += 1
                message = f"{self.task_id}: failure {self.failures} of {MOST_FAILURES} ({error})"
                if self.failures == MOST_FAILURES:
                    message += "; the task is not playable"
                print(message, file=sys.stderr)
        return None

    def replay(self) -> None:
        self.generation = self.worker.generation
        self.restarts += bool(self.history)
        for call, argument, answer in self.history:
            if self.worker.ask(call, self.key, argument) != answer:
                self.worker.end()
                raise WorkerFailure("the same actions led elsewhere")

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        if self.key not in self.worker.playing:
            info = {"valid": False, "restarts": self.restarts}
            return "The task is over.", self.reward, True, info
        answer = self.request("step", text)
        if answer is None:
            self.close()
            info = {"valid": True, "restarts": self.restarts, "unplayable": 1}
            return "The world has failed.", self.reward, True, info
        observation, self.reward, done, info = answer
        if done:
            self.close()
        return observation, self.reward, done, {**info, "restarts": self.restarts}

    def close(self) -> None:
        """Safe to repeat, and in a garbage collection: it takes no lock."""
        if self.key in self.worker.playing:
            self.worker.playing.discard(self.key)
            self.worker.closed.append(self.key)

    __del__ = close


class Workers:
    """The environment of a source, played by `count` processes.

    start, step and expert run there, each episode in the process with the fewest. Everything else
    is asked of an instance in this process. timeout: seconds for one answer.
    """

    def __init__(self, source: str, options: dict, count: int, timeout: float = 300.0):
        self.env = load_class(source)(**options)
        self.keys = itertools.count()
        self.lock = threading.Lock()
        self.workers = [Worker(source, options, timeout) for _ in range(count)]
        # Also at exit.
        weakref.finalize(self, end_all, self.workers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def start(self, task_id: str) -> tuple[WorkerEpisode, str]:
        episode = self.begin("start", task_id)
        return episode, episode.first or f"{task_id} cannot be played."

    def expert(self, task_id: str) -> Trajectory | None:
        """As the environment's; None, after a message, also where the task failed too often."""
        episode = self.begin("expert", task_id)
        episode.close()
        return episode.first

    def begin(self, call: str, task_id: str) -> WorkerEpisode:
        with self.lock:
            worker = min(self.workers, key=lambda worker: len(worker.playing))
            key = next(self.keys)
            worker.playing.add(key)
        return WorkerEpisode(worker, key, call, task_id)


def end_all(workers: list[Worker]) -> None:
    for worker in workers:
        worker.end()
