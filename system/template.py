"""A tokenizer's chat template: from messages to tokens, and what can be wrong with it.

trajectory.py says what a conversation is made of; here its turns become the template's tokens.
"""

from __future__ import annotations

import re
import string
from datetime import datetime
from functools import lru_cache
from os.path import commonprefix

from system.errors import InputError


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


# ---------------------------------------------------------------------------- what is wrong with it


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


def check_whole(encoded, messages: list[dict], tokenizer) -> None:
    """InputError unless the template writes the whole conversation as the turns joined.

    encoded: trajectory.Encoded, whose first turn stands behind the prompt.
    """
    whole = rendered(tokenizer, messages, False)
    if begins(tokenizer, whole, encoded.ids):
        return
    # In which state, and whether by what was there before or by what came anew.
    problem, found, expected = "rewrites history", whole, encoded.ids
    prompt_messages, before = len(messages) - 2 * len(encoded.spans), 0
    for number, (start, end) in enumerate(encoded.spans):
        # The state before this action, as the template writes it at once.
        state = rendered(tokenizer, messages[: prompt_messages + 2 * number + 1], True)
        if not begins(tokenizer, state, encoded.ids[:start]):
            found, expected = state, encoded.ids[:start]
            if begins(tokenizer, state, encoded.ids[:before]):
                # What was there stands: the new turn differs.
                problem = "writes a turn differently by its place in the conversation"
            break
        before = end
    difference = parting(decoded(tokenizer, expected), decoded(tokenizer, found))
    problem = f"{problem} in trajectory {encoded.task_id}: {difference}"
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
