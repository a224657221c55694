"""Steps and trajectories, as text and as tokens: the data that every other file passes around.

The second half is the one renderer from text to tokens, for SFT, DPO, discriminator, PPO and
evaluation alike. It renders a conversation turn by turn: prompt_ids, then action_ids and state_ids
in turn. What a turn adds must not depend on the turns before it, so every state is a prefix of one
token sequence; encode checks this on the whole conversation, check_template before any is read.

No torch here: playing a world starts at once.
"""

from __future__ import annotations

import hashlib
import re
import string
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from os.path import commonprefix


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


# "Action:" in any case and emphasis, with or without a number ("**Action 1:**"), then the action.
ACTION = re.compile(
    r"(?:(?im:^[ \t]*[*_#]*[ \t]*action)|Action|ACTION)[ \t]*\d*[ \t*_]*:[*_]*\s*([^\n]+)"
)


def parse_action(text: str) -> str | None:
    """The action in a ReAct turn, or None: what follows the first "Action:" to the end of its line.

    If that line is empty, the next one counts. Backticks or stars around the action and a final
    period do not matter.
    """
    match = ACTION.search(text)
    if not match:
        return None
    action = " ".join(match[1].replace("`", " ").split())
    return action.strip("* ").removesuffix(".").rstrip() or None


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
        check_whole(encoded, trajectory, tokenizer)
    return encoded


def prompt_ids(tokenizer, prompt: list[dict], observation: str) -> list[int]:
    """The first state: prompt, first observation, and the template's call for an answer."""
    return rendered(tokenizer, [*prompt, {"role": "user", "content": observation}], True)


@lru_cache(maxsize=10_000)
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


@lru_cache(maxsize=10_000)
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


# ------------------------------------------------------------------------------ the chat template


def rendered(tokenizer, messages: list[dict], generate: bool) -> list[int]:
    """The template's tokens for these messages; generate: with the call for an answer."""
    messages, crack = crack_control(tokenizer, messages)
    return tokenised(tokenizer, apply_template(tokenizer, messages, generate), crack)


def answered(tokenizer, messages: list[dict], generate: bool) -> list[int]:
    """The tokens behind the call for the first answer: messages are user, assistant, ..."""
    call = apply_template(tokenizer, messages[:1], True)
    messages, crack = crack_control(tokenizer, messages)
    text = apply_template(tokenizer, messages, generate)
    check_answer(tokenizer, call, text, messages)
    state, whole = tokenised(tokenizer, call), tokenised(tokenizer, text, crack)
    if whole[: len(state)] == state:
        return whole[len(state) :]
    # A token reaches across the place where the agent begins to write. The agent reads the call
    # and goes on behind it.
    crack = crack or unused_character(messages)
    broken = call + crack + text[len(call) :]
    ids = tokenised(tokenizer, broken, crack, len(call))
    if decoded(tokenizer, state + ids) != decoded(tokenizer, whole):
        raise InputError(
            f"{name_of(tokenizer)} writes one token across the start of the action, and no tokens "
            "behind the template's call for an answer read the same; begin it with another "
            "character"
        )
    return ids


def apply_template(tokenizer, messages: list[dict], generate: bool) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"{name_of(tokenizer)} has no chat template; use an instruct model, or set "
            "chat_template in its tokenizer_config.json"
        )
    fixed = {}
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = FIXED_CLOCK + template
            fixed = {"fixed_time": fixed_time(tokenizer)}
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generate,
            **fixed,
        )
    except Exception as error:
        # A template is a program of somebody else's. One raises where it knows no system role.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        roles = ", ".join(message["role"] for message in messages[:4])
        raise InputError(
            f"chat template of {name_of(tokenizer)} refuses the conversation ({reason}); "
            f"its roles are {roles}: change the prompt or the template"
        ) from None


# A template may ask for the date. It shall be the same on every day of a run: a macro in front of
# the template takes the place of the clock.
FIXED_CLOCK = (
    "{%- macro strftime_now(format) %}"
    "{%- set said = namespace(text=format) %}"
    "{%- for directive, text in fixed_time.items() %}"
    "{%- set said.text = said.text.replace(directive, text) %}"
    "{%- endfor %}{{- said.text }}"
    "{%- endmacro %}\n"
)


def fixed_time(tokenizer) -> dict[str, str]:
    """What strftime's directives, such as %d and %-d, say at .now: the run's first start.

    Without a run it is the first use.
    """
    if not hasattr(tokenizer, "now"):
        tokenizer.now = datetime.now()
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
    return {directive: tokenizer.now.strftime(directive) for directive in directives}


def crack_control(tokenizer, messages: list[dict]) -> tuple[list[dict], str]:
    """The messages, and the character that breaks up control tokens that stand in them.

    Control tokens are the template's alone. One that stands in a message must stay text, so a
    character that occurs nowhere breaks it up until it is tokenised.
    """
    control = []
    for token in special_texts(tokenizer):
        if any(token in message["content"] for message in messages):
            control.append(token)
    if not control:
        return messages, ""
    crack = unused_character(messages)
    # The first character of every control token, also of one inside another.
    beginning = re.compile("(?=" + "|".join(map(re.escape, control)) + ")(.)", re.DOTALL)
    broken = []
    for message in messages:
        content = beginning.sub(rf"\1{crack}", message["content"])
        broken.append(message | {"content": content})
    return broken, crack


def unused_character(messages: list[dict]) -> str:
    for code in range(0xE000, 0xF8FF):
        if not any(chr(code) in message["content"] for message in messages):
            return chr(code)
    raise InputError("a conversation uses every private character of Unicode; remove some")


def tokenised(tokenizer, text: str, crack: str = "", start: int = -1) -> list[int]:
    """A template's text as tokens, without those of the crack and those that end by `start`."""
    # The template writes its own BOS: never add a second one.
    if not crack:
        return tokenizer(text, add_special_tokens=False).input_ids
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = []
    for token, (begin, end) in zip(tokens.input_ids, tokens.offset_mapping):
        if text[begin:end] != crack and end > start:
            ids.append(token)
    return ids


def decoded(tokenizer, ids: list[int]) -> str:
    """Tokens as text, to the character."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=16)
def special_ids(tokenizer) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


@lru_cache(maxsize=16)
def special_texts(tokenizer) -> tuple[str, ...]:
    texts = set(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))) - {None}
    return tuple(sorted(texts))


# -------------------------------------------------------------------- what is wrong with a template

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


def check_answer(tokenizer, call: str, text: str, messages: list[dict]) -> None:
    """InputError unless the template's text is its call for an answer and then the answer."""
    answer, turn = messages[1]["content"].strip(), text.removeprefix(call)
    before = turn.partition(answer)[0] if answer else ""
    problem = ""
    if not text.startswith(call):
        problem = f"does not open an answer as it calls for one: {parting(call, text)}"
    elif answer not in turn:
        problem = f"changes the text of an answer: {parting(answer, turn.strip())}"
    elif before.strip() and call == apply_template(tokenizer, messages[:1], False):
        problem = f"ignores add_generation_prompt: {before!r} is no part of an action"
    elif before.strip():
        problem = f"writes {before!r} between its call for an answer and the answer"
    if problem and len(messages) > 2:
        # The answer alone was right.
        problem = f"rewrites history: it {problem}"
    if problem:
        raise broken_template(tokenizer, problem)


def check_whole(encoded: Encoded, trajectory: Trajectory, tokenizer) -> None:
    """InputError unless the template writes the whole conversation as the turns joined."""
    messages = list(trajectory.prompt)
    for step in trajectory.steps:
        messages.append({"role": "user", "content": step.observation})
        messages.append({"role": "assistant", "content": step.action})
    whole = rendered(tokenizer, messages, False)
    if begins(tokenizer, whole, encoded.ids):
        return
    # In which state, and whether by what was there before or by what came anew.
    first, end = len(trajectory.prompt) + 1, 0
    problem, found, expected = "rewrites history", whole, encoded.ids
    for i, (start, next_end) in enumerate(encoded.spans):
        state = rendered(tokenizer, messages[: first + 2 * i], True)
        if not begins(tokenizer, state, encoded.ids[:start]):
            found, expected = state, encoded.ids[:start]
            if begins(tokenizer, state, encoded.ids[:end]):
                problem = "writes a turn differently by its place in the conversation"
            break
        end = next_end
    difference = parting(decoded(tokenizer, expected), decoded(tokenizer, found))
    problem = f"{problem} in trajectory {trajectory.task_id}: {difference}"
    raise broken_template(tokenizer, problem, "that keeps every turn as it was")


def begins(tokenizer, longer: list[int], shorter: list[int]) -> bool:
    """Whether one conversation begins with another.

    Its text counts: in the longer one a token may reach across the start of an action.
    """
    if longer[: len(shorter)] == shorter:
        return True
    return decoded(tokenizer, longer).startswith(decoded(tokenizer, shorter))


def parting(expected: str, found: str) -> str:
    """Where two texts part."""
    at = len(commonprefix([expected, found]))
    start = max(0, at - 10)
    return f"{found[start : at + 30]!r}, not {expected[start : at + 30]!r}"


def broken_template(tokenizer, problem: str, remedy: str = "that does not") -> InputError:
    return InputError(
        f"chat template of {name_of(tokenizer)} {problem}; give the tokenizer a chat_template "
        f"{remedy}"
    )


def name_of(tokenizer) -> str:
    return tokenizer.name_or_path or "the tokenizer"
