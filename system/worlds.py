"""The worlds' side of episodes: who plays, and what the world answers.

No model here. rollout.py reads what a player has pending, and writes the player's action.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from benchmarks.files import need, sound_number, sound_step, sound_text
from trajectory import (
    InputError,
    Step,
    Trajectory,
    action_text,
    closing_id,
    prompt_ids,
    stable_seed,
    state_ids,
    stop_ids,
)


def start(env, task_id: str) -> tuple:
    """(episode, first observation)"""
    where = f"environment, task {task_id}"
    answer = env.start(task_id)
    problem = f"start answered {answer!r:.60}; it must be (episode, first observation)"
    need(isinstance(answer, tuple) and len(answer) == 2, where, problem)
    return answer[0], sound_text(answer[1], where, "the first observation")


def try_out(env, tasks: list[str], action: str) -> None:
    """InputError if these tasks cannot be played, before hours are spent: one turn shows it."""
    for task in tasks:
        where = f"environment, task {task}"
        sound_text(task, where, "its id")
        sound_text(env.task_type(task), where, "its task_type")
        sound_number(env.max_steps(task), where, "its max_steps", 1, 1e6)
    for task in tasks[:3]:
        episode, _ = start(env, task)
        *_, info = sound_step(episode.step(action), f"environment, task {task}, turn 1")
        if hasattr(episode, "close"):
            episode.close()
        if not info.get("unplayable"):
            return
    raise InputError(f"the world failed in {', '.join(tasks[:3])}; see the messages above")


@dataclass
class Player:
    """One running episode: its world, what is written so far, what the model has not read yet."""

    trajectory: Trajectory
    generator: torch.Generator
    # Its world starts or answers, in a thread; and the others wrote a stretch meanwhile.
    job: Future | None = None
    waited: bool = False
    episode: object = None
    observation: str = ""
    # Tokens that the model has not read, and the number of those that it has.
    pending: list[int] = field(default_factory=list)
    length: int = 0
    # The action, the number of tokens it may have, and each token's random number.
    action: list[int] = field(default_factory=list)
    allowed: int = 0
    noise: list[float] = field(default_factory=list)
    done: bool = False


class Worlds:
    """The worlds of all tasks: those of the players start and answer in threads."""

    def __init__(self, env, tokenizer, context: int, task_ids, prompt, seed: int):
        """context: tokens that the model can read."""
        self.env = env
        self.tokenizer = tokenizer
        self.context = context
        self.prompt = prompt
        self.seed = seed
        self.slow = getattr(env, "slow", False)
        self.waiting = deque(task_ids)
        self.threads = ThreadPoolExecutor(8)

    def next_player(self) -> Player | None:
        """A player for the next task; None after the last one."""
        if not self.waiting:
            return None
        task = self.waiting.popleft()
        generator = torch.Generator().manual_seed(stable_seed(self.seed, task))
        player = Player(Trajectory(task, list(self.prompt), info={"invalid": 0}), generator)
        player.job = self.threads.submit(self._start, player)
        return player

    def ask(self, player: Player) -> None:
        """The player has written an action."""
        player.job = self.threads.submit(self._answer, player)

    def endings(self, players: list[Player]) -> Iterator[Trajectory]:
        """Waits for the worlds that are due; -> episodes that are over.

        The player of the next task takes the place of one that is done.
        """
        due = deque(self._due(players))
        while due:
            index = due.popleft()
            player = players[index]
            # Waits for the world, and raises what it raised.
            player.job.result()
            player.job = None
            if not player.done:
                continue
            yield player.trajectory
            successor = self.next_player()
            if successor:
                players[index] = successor
                if not self.slow:
                    due.append(index)
        for player in players:
            player.waited = player.job is not None

    def _due(self, players: list[Player]) -> list[int]:
        """Whose worlds must have answered before anybody writes on."""
        asked = [i for i, player in enumerate(players) if player.job]
        if not self.slow:
            return asked
        overdue = [i for i in asked if players[i].waited]
        if not overdue and 4 * len(asked) > 3 * len(players):
            # Too few would write: half of the worlds are due at once, the others a stretch later.
            return asked[: (len(asked) + 1) // 2]
        return overdue

    def _start(self, player: Player) -> None:
        trajectory = player.trajectory
        player.episode, player.observation = start(self.env, trajectory.task_id)
        player.pending = prompt_ids(self.tokenizer, trajectory.prompt, player.observation)
        self._end_if_over(player, ended=False, out_of_steps=False)

    def _answer(self, player: Player) -> None:
        """The world answers one action; `pending` becomes what the model reads next."""
        trajectory, action = player.trajectory, player.action
        text = action_text(self.tokenizer, action)
        where = f"environment, task {trajectory.task_id}, turn {len(trajectory.steps) + 1}"
        answer = sound_step(player.episode.step(text), where)
        observation, trajectory.reward, ended, info = answer
        trajectory.steps.append(Step(player.observation, text, action))
        invalid = trajectory.info["invalid"] + (not info.pop("valid"))
        trajectory.info = {"invalid": invalid, **info}
        if action[-1] not in stop_ids(self.tokenizer):
            player.pending = player.pending + [closing_id(self.tokenizer)]
        player.pending = player.pending + state_ids(self.tokenizer, observation)
        player.observation = trajectory.last = observation
        out_of_steps = len(trajectory.steps) >= self.env.max_steps(trajectory.task_id)
        self._end_if_over(player, ended, out_of_steps)

    def _end_if_over(self, player: Player, ended: bool, out_of_steps: bool) -> None:
        """An episode ends by itself (`ended`), at the step limit or at the model's context."""
        trajectory = player.trajectory
        outgrown = player.length + len(player.pending) >= self.context
        trajectory.truncated = not ended and (outgrown or out_of_steps)
        if outgrown and not ended:
            trajectory.info["outgrown"] = 1
        player.done = ended or trajectory.truncated
        if player.done and hasattr(player.episode, "close"):
            player.episode.close()
