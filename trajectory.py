"""Steps and trajectories, as text and as tokens: the data that every other file passes around.

The second half is the one renderer from text to tokens, for SFT, DPO, discriminator, PPO and
evaluation alike. It renders a conversation turn by turn: prompt_ids, then action_ids and state_ids
in turn. What a turn adds must not depend on the turns before it, so every state is a prefix of one
token sequence; encode checks this on the whole conversation.

No torch here: playing a world starts at once.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import lru_cache


class InputError(Exception):
    """Bad input, in one line that names the file, row or option and the remedy."""


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
    is checked on token ids against the template's rendering of the whole conversation.
    InputError: no actions, or a template that rewrites history.
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
            action = action_ids(tokenizer, step.action)
        spans.append((len(ids), len(ids) + len(action)))
        ids += action
        is_last = i == len(trajectory.steps) - 1
        if action[-1] not in stops and not is_last:
            # An action that was cut short: its turn is closed, but not supervised.
            ids.append(closing_id(tokenizer))
    if all(step.ids is None for step in trajectory.steps):
        check_prefix(ids, whole_conversation(trajectory, tokenizer), tokenizer, trajectory.task_id)
    return Encoded(ids, spans, trajectory.task_id)


def prompt_ids(tokenizer, prompt: list[dict], observation: str) -> list[int]:
    """The first state: prompt, first observation, and the template's call for an answer."""
    return rendered(tokenizer, [*prompt, {"role": "user", "content": observation}], True)


@lru_cache(maxsize=100_000)
def action_ids(tokenizer, action: str) -> list[int]:
    """An action as the agent would write it, stop token included."""
    state = rendered(tokenizer, USER_TURN, True)
    answered = rendered(tokenizer, [*USER_TURN, {"role": "assistant", "content": action}], False)
    check_prefix(state, answered, tokenizer)
    turn = answered[len(state) :]
    return turn[: stop_index(tokenizer, turn) + 1]


@lru_cache(maxsize=100_000)
def state_ids(tokenizer, observation: str) -> list[int]:
    """What stands between an action's stop token and the next action: the next observation."""
    state = rendered(tokenizer, USER_TURN, True)
    answered = rendered(tokenizer, USER_TURN + AGENT_TURN, False)
    check_prefix(state, answered, tokenizer)
    stop = len(state) + stop_index(tokenizer, answered[len(state) :])
    asked_again = USER_TURN + AGENT_TURN + [{"role": "user", "content": observation}]
    longer = rendered(tokenizer, asked_again, True)
    check_prefix(answered[: stop + 1], longer, tokenizer)
    return longer[stop + 1 :]


def stop_ids(tokenizer) -> set[int]:
    """The tokens that end an action: the template's own after an assistant turn, and EOS."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{name_of(tokenizer)} has no chat template; use an instruct model, or set "
            "chat_template in its tokenizer_config.json"
        )
    return {closing_id(tokenizer)} | ({tokenizer.eos_token_id} - {None})


def closing_id(tokenizer) -> int:
    """The token that the template writes after an assistant turn."""
    return action_ids(tokenizer, "x")[-1]


def action_text(tokenizer, ids: list[int]) -> str:
    """The text of an action's tokens, without its stop token."""
    if ids[-1] in stop_ids(tokenizer):
        ids = ids[:-1]
    return tokenizer.decode(ids)


# ------------------------------------------------------------------------------ the chat template


def rendered(tokenizer, messages: list[dict], generate: bool) -> list[int]:
    """The template's tokens for these messages; generate: with the call for an answer.

    Control tokens are the template's alone. One that stands in a message must stay text, so a
    character that occurs nowhere breaks it up until it is tokenised.
    """
    control = []
    for token in special_texts(tokenizer):
        if any(token in message["content"] for message in messages):
            control.append(token)
    if not control:
        # The template writes its own BOS: never add a second one.
        text = apply_template(tokenizer, messages, generate)
        return tokenizer(text, add_special_tokens=False).input_ids

    crack = unused_character(messages)
    # The first character of every control token, also of one inside another.
    beginning = re.compile("(?=" + "|".join(map(re.escape, control)) + ")(.)", re.DOTALL)
    broken = []
    for message in messages:
        content = beginning.sub(rf"\1{crack}", message["content"])
        broken.append(message | {"content": content})
    text = apply_template(tokenizer, broken, generate)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = []
    for token, (start, end) in zip(tokens.input_ids, tokens.offset_mapping):
        if text[start:end] != crack:
            ids.append(token)
    return ids


def apply_template(tokenizer, messages: list[dict], generate: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
    except TemplateError as error:
        # For instance a system role where the template knows none.
        roles = ", ".join(message["role"] for message in messages[:4])
        raise InputError(
            f"chat template of {name_of(tokenizer)} refuses the conversation ({error}); "
            f"its roles are {roles}: change the prompt or the template"
        ) from None


def unused_character(messages: list[dict]) -> str:
    for code in range(0xE000, 0xF8FF):
        if not any(chr(code) in message["content"] for message in messages):
            return chr(code)
    raise InputError("a conversation uses every private character of Unicode; remove some")


def whole_conversation(trajectory: Trajectory, tokenizer) -> list[int]:
    messages = list(trajectory.prompt)
    for step in trajectory.steps:
        messages.append({"role": "user", "content": step.observation})
        messages.append({"role": "assistant", "content": step.action})
    return rendered(tokenizer, messages, False)


def check_prefix(shorter: list[int], longer: list[int], tokenizer, task_id: str = "") -> None:
    """InputError unless a longer conversation begins with the tokens of a shorter one."""
    if longer[: len(shorter)] != shorter:
        where = f" in trajectory {task_id}" if task_id else ""
        raise InputError(
            f"chat template of {name_of(tokenizer)} breaks the prefix property{where}: a longer "
            "conversation does not begin with the tokens of a shorter one (it rewrites history); "
            "give the tokenizer a chat_template that keeps every turn as it was"
        )


def stop_index(tokenizer, ids: list[int]) -> int:
    """Where an assistant turn ends: its first special token."""
    for i, token in enumerate(ids):
        if token in special_ids(tokenizer):
            return i
    raise InputError(
        f"chat template of {name_of(tokenizer)} ends an assistant turn without a special stop "
        "token; give the tokenizer a chat_template that writes one"
    )


@lru_cache(maxsize=16)
def special_ids(tokenizer) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


@lru_cache(maxsize=16)
def special_texts(tokenizer) -> tuple[str, ...]:
    texts = set(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))) - {None}
    return tuple(sorted(texts))


def name_of(tokenizer) -> str:
    return tokenizer.name_or_path or "the tokenizer"
