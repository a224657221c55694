"""Steps and trajectories, as text and as tokens: the data that every other file passes around.

The second half is the one renderer from text to tokens, for SFT, DPO, discriminator, PPO and
evaluation alike. It renders a conversation turn by turn: prompt_ids, then action_ids and state_ids
in turn. What a turn adds must not depend on the turns before it, so every state is a prefix of one
token sequence; encode checks this on the whole conversation, check_template before any is read.
The tokenizer's chat template itself is system/template.py's matter.

No torch here: playing a world starts at once.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import lru_cache

from system.errors import InputError
from system.template import (
    answered,
    broken_template,
    check_whole,
    decoded,
    name_of,
    rendered,
    special_ids,
)


@dataclass
class Step:
    """One turn: an observation, then the whole ReAct turn ("Thought: ...\\nAction: ...")."""

    observation: str
    action: str
    # The sampled token ids, stop token included, where the agent wrote the action.
    ids: list[int] | None = None


@dataclass
class Trajectory:
    """t = (o_1, a_1, ..., o_n, a_n) after a prompt of chat messages; reward in [0, 1]."""

    task_id: str
    prompt: list[dict[str, str]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    reward: float = 0.0
    # Cut by the step limit or by the model's context, not ended by the world.
    truncated: bool = False
    info: dict[str, float] = field(default_factory=dict)
    # What the world said after the last action.
    last: str = ""


@dataclass
class Encoded:
    """A trajectory as tokens.

    spans[i] = [start, end) of action i, stop token included. State i is ids[:start].
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    task_id: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that a forward pass over the trajectory reads."""
        return len(self.ids)

    @property
    def action_tokens(self) -> int:
        return sum(end - start for start, end in self.spans)


def render(trajectory: Trajectory) -> str:
    """A trajectory as readable text, one paragraph a turn."""
    return "\n".join(f"{step.observation}\n{step.action}" for step in trajectory.steps)


def segment(trajectory: Trajectory) -> list[tuple[Trajectory, str]]:
    """Eq. 4: the n step-wise learning targets of an expert trajectory, [(state s_i, action a_i)].

    A state is the trajectory so far. Its last step holds the observation o_i and an empty action.
    Training reads the same states as prefixes of one token sequence: state i is
    Encoded.ids[:start of span i].
    """
    targets = []
    for i, step in enumerate(trajectory.steps):
        seen = trajectory.steps[:i] + [Step(step.observation, "")]
        targets.append((Trajectory(trajectory.task_id, trajectory.prompt, seen), step.action))
    return targets


def stable_seed(*parts) -> int:
    """A 63-bit seed from the parts' text, the same in every process.

    Sampling then depends on what is sampled, not on where or beside what.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# What follows the first "Action:", to the end of the turn.
ACTION = re.compile(r"Action:\s?(.+)", re.DOTALL)
# "Action:" in any case and emphasis, with or without a number ("**Action 1:**"); then one line.
LOOSE_ACTION = re.compile(
    r"(?:(?im:^[ \t]*[*_#]*[ \t]*action)|Action|ACTION)[ \t]*\d*[ \t*_]*:[*_]*\s*([^\n]+)"
)


def parse_action(text: str) -> str | None:
    """The action in a ReAct turn, or None: all that follows the first "Action:", unchanged.

    This is how ETO reads a turn. A world understands what its original understands.
    """
    match = ACTION.search(text.strip())
    return match[1] if match else None


def lenient_action(text: str) -> str | None:
    """The action as a lenient reader takes it, for worlds with lenient=1.

    Only its line counts, or the next one if that is empty. Emphasis, backticks and a final period
    around it, quotes around the text in its brackets and double spaces go. What stands before the
    brackets, or all of it without brackets, becomes lower case.
    """
    match = LOOSE_ACTION.search(text)
    if not match:
        return None
    action = " ".join(match[1].split()).lstrip("`* ").rstrip("`* .")
    verb, bracket, rest = action.partition("[")
    rest = re.sub(r"^([\"'])(.*)\1\]$", r"\2]", rest)
    return verb.lower() + bracket + rest or None


# ---------------------------------------------------------------------------- from text to tokens

# A stand-in history, to find out what one more turn adds.
USER_TURN = [{"role": "user", "content": "x"}]
AGENT_TURN = [{"role": "assistant", "content": "x"}]


def encode(trajectory: Trajectory, tokenizer) -> Encoded:
    """Tokens and action spans of a trajectory.

    Where a step kept its sampled ids they are used, never re-tokenised. A trajectory of text alone
    is checked against the template's rendering of the whole conversation.
    InputError: no actions, an action that the tokens cannot write, a template that rewrites
    history.
    """
    if not trajectory.steps:
        raise InputError(
            f"trajectory {trajectory.task_id} has no actions; remove it from the expert file"
        )
    stops = stop_ids(tokenizer)
    ids = prompt_ids(tokenizer, trajectory.prompt, trajectory.steps[0].observation)
    spans = []
    for i, step in enumerate(trajectory.steps):
        if i > 0:
            ids += state_ids(tokenizer, step.observation)
        action = step.ids
        if action is None:
            try:
                action = action_ids(tokenizer, step.action)
            except InputError as error:
                where = f"trajectory {trajectory.task_id}, action {i}"
                raise InputError(f"{where}: {error}") from None
        spans.append((len(ids), len(ids) + len(action)))
        ids += action
        is_last = i == len(trajectory.steps) - 1
        if action[-1] not in stops and not is_last:
            # An action that was cut short: its turn is closed, but not supervised.
            ids.append(closing_id(tokenizer))
    encoded = Encoded(ids, spans, trajectory.task_id)
    if all(step.ids is None for step in trajectory.steps):
        check_whole(encoded, as_messages(trajectory), tokenizer)
    return encoded


def as_messages(trajectory: Trajectory) -> list[dict]:
    messages = list(trajectory.prompt)
    for step in trajectory.steps:
        messages.append({"role": "user", "content": step.observation})
        messages.append({"role": "assistant", "content": step.action})
    return messages


def prompt_ids(tokenizer, prompt: list[dict], observation: str) -> list[int]:
    """The first state: prompt, first observation, and the template's call for an answer."""
    return rendered(tokenizer, [*prompt, {"role": "user", "content": observation}], True)


# Observations may be pages: 4,096 of 1,500 tokens take a quarter of a GB.
@lru_cache(maxsize=4096)
def action_ids(tokenizer, action: str) -> list[int]:
    """An action as the agent would write it, stop token included."""
    turns = [*USER_TURN, {"role": "assistant", "content": action}]
    ids = answered(tokenizer, turns, False)
    for i, token in enumerate(ids):
        if token == closing_id(tokenizer):
            return ids[: i + 1]
        if token in special_ids(tokenizer):
            written = tokenizer.convert_ids_to_tokens(token)
            raise InputError(
                f"{name_of(tokenizer)} writes {written!r} for a part of the action that it has no "
                "tokens for; change the action"
            )
    raise broken_template(tokenizer, "does not end every assistant turn with its stop token")


@lru_cache(maxsize=4096)
def state_ids(tokenizer, observation: str) -> list[int]:
    """What stands between an action's stop token and the next action: the next observation."""
    action = action_ids(tokenizer, "x")
    asked_again = [*USER_TURN, *AGENT_TURN, {"role": "user", "content": observation}]
    ids = answered(tokenizer, asked_again, True)
    if ids[: len(action)] != action:
        raise broken_template(tokenizer, "rewrites history: it changes the end of an answer")
    return ids[len(action) :]


def stop_ids(tokenizer) -> set[int]:
    """The tokens that end an action: the template's own after an assistant turn, and EOS."""
    return {closing_id(tokenizer)} | ({tokenizer.eos_token_id} - {None})


@lru_cache(maxsize=16)
def closing_id(tokenizer) -> int:
    """The token that the template writes after an assistant turn: its first special one."""
    for token in answered(tokenizer, USER_TURN + AGENT_TURN, False):
        if token in special_ids(tokenizer) - {tokenizer.unk_token_id}:
            return token
    raise broken_template(
        tokenizer, "ends an assistant turn without a special stop token", "that writes one"
    )


def action_text(tokenizer, ids: list[int]) -> str:
    """The text of an action's tokens, without its stop token."""
    if ids[-1] in stop_ids(tokenizer):
        ids = ids[:-1]
    return decoded(tokenizer, ids)


# What a template is tried on at the start, whatever the experts say.
MADE_UP = [
    Step("You are in a room. Your task: find the pen.", "Thought: I look.\nAction: go to desk 1"),
    Step("On desk 1: pen 2.", "Thought: There it is.\nAction: take pen 2"),
    Step("You hold pen 2.", "Thought: Done.\nAction: stop"),
]


def check_template(tokenizer, prompt: list[dict]) -> None:
    """InputError unless the template keeps a made-up conversation, without a prompt and with it.

    Each action must read as its text and one stop token, and the turns must join to the whole.
    """
    for opening in ([], prompt):
        encoded = encode(Trajectory("made up to try the template", opening, MADE_UP), tokenizer)
        for step, (start, end) in zip(MADE_UP, encoded.spans):
            text = action_text(tokenizer, encoded.ids[start:end])
            if text.strip() != step.action:
                raise InputError(
                    f"{name_of(tokenizer)}: its template and tokens make {text!r} of the action "
                    f"{step.action!r}; give it a chat_template that writes the answer's text and "
                    "one stop token, or take another model"
                )
