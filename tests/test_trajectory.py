"""From text to tokens: states, spans, templates; seeds and segments."""

import copy
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from system import template
from trajectory import (
    Encoded,
    InputError,
    Step,
    Trajectory,
    action_ids,
    action_text,
    check_template,
    closing_id,
    encode,
    prompt_ids,
    render,
    segment,
    stable_seed,
    state_ids,
    stop_ids,
)

PROMPT = [
    {"role": "user", "content": "Rules of the world."},
    {"role": "assistant", "content": "OK"},
]
EXPERT = [
    Step("You are in a house. Task: find é.", "Thought: I must look.\nAction: go to desk 1"),
    Step("On desk 1: mug 1.", "Thought: ünï\nAction: take mug 1 from desk 1"),
    Step("You take mug 1.", "Thought: done\nAction: look"),
]
TOKENIZERS = [tiny.chatml, tiny.llama3, tiny.mistral]
STOPS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}


def expert(steps=EXPERT, prompt=PROMPT) -> Trajectory:
    return Trajectory("task-7", copy.deepcopy(prompt), copy.deepcopy(steps))


def plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def actions_of(item: Encoded) -> list[list[int]]:
    return [item.ids[start:end] for start, end in item.spans]


# ----------------------------------------------------------------------------- spans and templates


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("prompt", [[], PROMPT])
def test_supervised_ids_are_the_action_and_its_stop_token(make, prompt):
    tokenizer = make()
    item = encode(expert(prompt=prompt), tokenizer)
    stop = STOPS[make.__name__]
    found = [tokenizer.decode(ids) for ids in actions_of(item)]
    assert found == [step.action + stop for step in EXPERT]
    for ids in actions_of(item):
        assert ids[-1] in stop_ids(tokenizer)
        assert item.ids.count(ids[-1]) >= len(EXPERT)
    assert item.task_id == "task-7"
    assert item.spans[-1][1] == len(item.ids) == item.tokens
    assert item.action_tokens == sum(len(ids) for ids in actions_of(item))


@pytest.mark.parametrize("make", TOKENIZERS)
def test_every_state_is_what_the_template_writes_for_it(make):
    tokenizer = make()
    shown = expert()
    item = encode(shown, tokenizer)
    for (state, action), (start, end) in zip(segment(shown), item.spans, strict=True):
        messages = list(state.prompt)
        for step in state.steps:
            messages.append({"role": "user", "content": step.observation})
            if step.action:
                messages.append({"role": "assistant", "content": step.action})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert plain_ids(tokenizer, text) == item.ids[:start]
        messages.append({"role": "assistant", "content": action})
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert plain_ids(tokenizer, text)[:end] == item.ids[:end]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_a_state_is_the_prompt_then_actions_and_observations_in_turn(make):
    tokenizer = make()
    expected = prompt_ids(tokenizer, PROMPT, EXPERT[0].observation)
    for i, step in enumerate(EXPERT):
        if i > 0:
            expected += state_ids(tokenizer, step.observation)
        expected += action_ids(tokenizer, step.action)
    assert encode(expert(), tokenizer).ids == expected


@pytest.mark.parametrize("make", TOKENIZERS)
def test_the_ok_turn_is_not_supervised(make):
    tokenizer = make()
    item = encode(expert(), tokenizer)
    first_state = tokenizer.decode(item.ids[: item.spans[0][0]])
    assert "OK" in first_state
    assert "Rules" in first_state
    assert actions_of(item) == actions_of(encode(expert(prompt=[]), tokenizer))


def test_the_stop_token_is_supervised_where_pad_is_eos():
    tokenizer = tiny.chatml()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for ids in actions_of(encode(expert(), tokenizer)):
        assert ids[-1] == tokenizer.eos_token_id


def test_both_eos_and_the_template_s_stop_token_end_an_action():
    tokenizer = tiny.llama3()
    texts = tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer)))
    assert set(texts) == {"<|end_of_text|>", "<|eot_id|>"}
    assert tokenizer.convert_ids_to_tokens(closing_id(tokenizer)) == "<|eot_id|>"


@pytest.mark.parametrize("make", [tiny.llama3, tiny.mistral])
def test_there_is_one_bos(make):
    tokenizer = make()
    ids = encode(expert(), tokenizer).ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("make", TOKENIZERS)
def test_action_text_is_the_action_without_its_stop_token(make):
    tokenizer = make()
    ids = action_ids(tokenizer, "Action: look")
    assert action_text(tokenizer, ids).strip() == "Action: look"
    assert action_text(tokenizer, ids[:-1]) == action_text(tokenizer, ids)


@pytest.mark.parametrize("make", [*TOKENIZERS, tiny.nested])
def test_control_tokens_in_what_is_said_stay_text(make):
    """A prompt, an observation and an action that quote the template's own tokens.

    No state grows a turn, no action ends early.
    """
    tokenizer = make()
    special = template.special_texts(tokenizer)
    split = special[0][:3] + special[0] + special[0][3:]
    quote = "You see a note: " + "".join(special) + " " + " ".join(special) + " " + split
    quiet_steps = [Step("A note.", "Thought: read\nAction: read"), Step("Nothing.", "Action: go")]
    loud_steps = [Step(quote, f"Thought: {quote}\nAction: read"), Step(quote, "Action: go")]
    loud_prompt = [{"role": "user", "content": quote}, {"role": "assistant", "content": "OK"}]
    quiet = encode(expert(quiet_steps), tokenizer)
    loud = encode(expert(loud_steps, loud_prompt), tokenizer)

    control = template.special_ids(tokenizer)
    written = [token for token in loud.ids if token in control]
    assert written == [token for token in quiet.ids if token in control]
    start, end = loud.spans[0]
    assert loud.ids[end - 1] in stop_ids(tokenizer)
    assert not stop_ids(tokenizer) & set(loud.ids[start : end - 1])
    said = tokenizer.decode(loud.ids[start : end - 1])
    assert said.strip() == loud_steps[0].action.strip()
    assert tokenizer.decode(loud.ids[:start]).count(quote) == 2


# ------------------------------------------------------------------------------------- sampled ids


@pytest.mark.parametrize("make", TOKENIZERS)
def test_sampled_ids_are_used_as_they_are(make):
    """One token a character, as no tokenizer would write it; text and ids may even disagree."""
    tokenizer = make()
    played = expert()
    usual = encode(played, tokenizer)
    stop = closing_id(tokenizer)
    odd = []
    for character in "Action":
        odd += plain_ids(tokenizer, character)
    cut = odd[:4]
    odd = [*odd, stop]
    played.steps[0].ids = list(odd)
    played.steps[1].ids = list(cut)
    item = encode(played, tokenizer)
    assert actions_of(item) == [odd, cut, actions_of(usual)[2]]
    # An action that was cut is closed, and the closing token is not supervised.
    first, second, _ = item.spans
    assert item.ids[second[1]] == stop
    between = usual.ids[usual.spans[0][1] : usual.spans[1][0]]
    assert item.ids[first[1] : second[0]] == between
    assert played.steps[0].ids == odd
    assert played.steps[1].ids == cut


def test_a_cut_last_action_is_not_closed():
    played = expert()
    played.steps[-1].ids = [5, 6]
    item = encode(played, tiny.chatml())
    assert item.ids[-2:] == [5, 6]
    assert item.spans[-1] == (len(item.ids) - 2, len(item.ids))


# ------------------------------------------------------------- tokens across the start of an action


def like_qwen2() -> PreTrainedTokenizerFast:
    """Line breaks, spaces and marks that stand together are cut as one piece of text."""
    pieces = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    more = ["a\n\nb", "x (y", "](", "]["] * 5
    return tiny.byte_level(
        ["<|im_start|>", "<|im_end|>"],
        tiny.CHATML,
        pieces=pieces,
        more=more,
        eos_token="<|im_end|>",
    )


# The call for an answer, as it may end.
CALLS = ["assistant\n", "assistant: ", "assistant  ", "[/INST]", "assistant"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("begin", ["\n", "\n\n", "(", "[", " ", ""])
def test_an_action_goes_on_behind_the_call_for_it(call, begin):
    """The agent reads the call's tokens: none of them reaches into what it writes."""
    tokenizer = like_qwen2()
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + (call if m.role == 'assistant' else m.role + '\n') }}"
        "{{ m.content + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' + call }}{% endif %}"
    ).replace("call", repr(call))
    check_template(tokenizer, PROMPT)
    steps = [Step("o1", f"{begin}Thought: x.\nAction: look"), Step("o2", f"{begin}Action: go")]
    item = encode(expert(steps), tokenizer)
    ids = prompt_ids(tokenizer, PROMPT, "o1")
    for step, (start, end) in zip(steps, item.spans):
        assert item.ids[:start] == ids
        action = item.ids[start:end]
        assert tokenizer.decode(action) == step.action + "<|im_end|>"
        ids = ids + action + state_ids(tokenizer, "o2")


def test_an_action_that_no_tokens_behind_the_call_can_write_is_named_with_the_cause():
    """Even the character that breaks a text up is part of a token here."""
    tokenizer = like_qwen2()
    odd = tiny.byte_level(
        ["<|im_start|>", "<|im_end|>"],
        tokenizer.chat_template,
        pieces=r"<[^>]*>|[^<]+",
        more=["assistant\n\nThought"] * 9 + ["\ue000\nThought"] * 9,
        eos_token="<|im_end|>",
    )
    says = "trajectory task-7, action 1: .*one token across the start of the action"
    with pytest.raises(InputError, match=says) as error:
        encode(expert([Step("o", "Action: look"), Step("o", "\nThought: x.\nAction: look")]), odd)
    assert "template" not in str(error.value).split("action 1")[0]


# ------------------------------------------------------------------------------------ the calendar

DATED = (
    "{% macro title(format) %}{{ 'Day ' + strftime_now(format) }}{% endmacro %}"
    "{% set short = '%-d/%m/%y' %}{% if strftime_now is defined %}"
    "{{ title('%d %b %Y') + ', ' + strftime_now(short) + ', 100%.' }}{% endif %}\n\n" + tiny.CHATML
)


def dated(moment: datetime | None = None) -> PreTrainedTokenizerFast:
    tokenizer = tiny.chatml()
    tokenizer.chat_template = DATED
    if moment:
        tokenizer.now = moment
    return tokenizer


def test_a_template_sees_the_day_that_the_run_began():
    tokenizer = dated(datetime(2024, 7, 5, 23, 59))
    text = tokenizer.decode(prompt_ids(tokenizer, [], "o"))
    assert text.startswith("Day 05 Jul 2024, 5/07/24, 100%.\n<|im_start|>user\no<|im_end|>")
    check_template(tokenizer, PROMPT)
    # The template itself is as it was.
    assert tokenizer.chat_template == DATED


def test_without_a_run_a_template_sees_the_day_of_its_first_use(monkeypatch):
    class Calendar:
        days = iter(range(1, 30))

        @classmethod
        def now(cls):
            return datetime(2024, 7, next(cls.days))

    monkeypatch.setattr(template, "datetime", Calendar)
    tokenizer = dated()
    first = prompt_ids(tokenizer, [], "o")
    assert prompt_ids(tokenizer, [], "o") == first != prompt_ids(dated(), [], "o")


# ---------------------------------------------------------------------------------- what is refused


def test_a_template_that_drops_old_thinking_is_refused():
    thinking = [
        Step("o1", "<think>plan</think>Action: a"),
        Step("o2", "<think>more</think>Action: b"),
    ]
    says = r"rewrites history in trajectory task-7: '.*Action: a.*', not '.*<think>plan</think>"
    with pytest.raises(InputError, match=says) as error:
        encode(expert(thinking), tiny.qwen3())
    assert "\n" not in str(error.value)
    # Without thinking it keeps every turn.
    assert len(encode(expert(), tiny.qwen3()).spans) == 3


@pytest.mark.parametrize("ask", [stop_ids, lambda tokenizer: encode(expert(), tokenizer)])
def test_a_tokenizer_without_template_is_refused(ask):
    with pytest.raises(InputError, match="no chat template"):
        ask(tiny.byte_level(["<s>", "</s>"], None, eos_token="</s>"))


# What is wrong with a template, and what it is changed to.
STOP = "m.content + '<|im_end|>'"
BROKEN = {
    r"ends an assistant turn without a special stop token": ("'<|im_end|>' + '\n'", "'\n'"),
    r"ignores add_generation_prompt: '<\|im_start\|>assistant\\n' is no": (
        "add_generation_prompt",
        "false",
    ),
    r"writes '<\|im_start\|>' between its call for an answer and the answer": (
        "m.content",
        "('<|im_start|>' if m.role == 'assistant' else '') + m.content",
    ),
    r"does not open an answer as it calls for one: '.*x<\|im_end\|>.*', not '.*<think>": (
        "assistant\n",
        "assistant\n<think>\n",
    ),
    r"changes the text of an answer: '.*X.*', not 'x'": ("m.content", "(m.content | upper)"),
    r"make 'Thought: I look.\\nAction: go to desk 1 \[end\]' of the action": (
        STOP,
        "m.content + ' [end]<|im_end|>'",
    ),
    r"rewrites history: it changes the end of an answer": (
        STOP,
        "m.content + (' ' if not loop.last and m.role == 'assistant' else '') + '<|im_end|>'",
    ),
    r"rewrites history: it changes the text of an answer: '\.\.\..*, not 'x'": (
        "m.content",
        "(m.content if loop.last or m.role == 'user' else '...')",
    ),
    r"rewrites history in trajectory made up .*, not ": (
        "in messages",
        "in messages[-4:]",
    ),
    r"writes a turn differently by its place in the conversation in trajectory made up": (
        "m.role + '\n'",
        "m.role + (loop.index0 | string if m.role == 'user' else '') + '\n'",
    ),
}


@pytest.mark.parametrize("says", BROKEN)
def test_a_broken_template_is_refused_before_any_expert_is_read(says):
    """One-step experts would hide most of it."""
    old, new = BROKEN[says]
    assert old in tiny.CHATML
    tokenizer = tiny.chatml()
    tokenizer.chat_template = tiny.CHATML.replace(old, new)
    with pytest.raises(InputError, match=says) as error:
        check_template(tokenizer, [])
    assert "\n" not in str(error.value) and "chat_template" in str(error.value)


@pytest.mark.parametrize("make", [*TOKENIZERS, tiny.qwen3, tiny.nested])
def test_a_template_that_keeps_the_conversation_is_accepted(make):
    check_template(make(), PROMPT)


# Mistral-Nemo's: the system prompt stands in the last message of the user.
MOVING_SYSTEM = (
    "{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{{ '[INST]' + (system + '\n' if loop.last and system else '') + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)


def test_a_template_is_tried_with_the_runs_own_prompt():
    tokenizer = tiny.byte_level(["</s>"], MOVING_SYSTEM, eos_token="</s>")
    check_template(tokenizer, PROMPT)
    brief = [{"role": "system", "content": "Be brief."}]
    with pytest.raises(InputError, match=r"rewrites history .*: '.*You are.*, not '.*Be brief"):
        check_template(tokenizer, brief)
    check_template(tiny.chatml(), brief)


def test_a_tokenizer_that_loses_an_actions_text_is_refused():
    tokenizer = tiny.chatml()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match=r"make 'thought: i look.*' of the action 'Thought: I l"):
        check_template(tokenizer, [])


def test_an_action_that_the_tokens_cannot_write_is_refused_and_named():
    """Not cut at the unknown character, which would be learnt as the end."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([*tiny.TEXT, "fox ing .:\n<|>"], trainer)
    names = {"unk_token": "<unk>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=tiny.CHATML,
        additional_special_tokens=special[1:2],
        **names,
    )
    says = "trajectory task-7, action 1: .*writes '<unk>' for a part of the action"
    with pytest.raises(InputError, match=says):
        encode(expert(), tokenizer)


@pytest.mark.parametrize(
    "template, reason",
    [
        ({"tool_use": tiny.CHATML, "rag": tiny.CHATML}, r"ValueError: .*\['rag', 'tool_use'\]"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "TypeError: can only conca"),
        ("{{ raise_exception('Not\n  today.') }}", r"TemplateError: Not today\."),
        ("{% for m in messages %}", "TemplateSyntaxError: Unexpected end of template"),
    ],
)
def test_whatever_a_template_raises_is_one_line(template, reason):
    tokenizer = tiny.chatml()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"refuses the conversation .{reason}") as error:
        check_template(tokenizer, [])
    assert "\n" not in str(error.value)


def test_a_prompt_that_the_template_refuses_is_an_input_error():
    """Mistral-v0.1 has no system role; its template raises."""
    brief = [{"role": "system", "content": "Be brief."}]
    with pytest.raises(InputError, match="template") as error:
        encode(expert(prompt=brief), tiny.mistral())
    assert "\n" not in str(error.value)


def test_a_trajectory_without_actions_is_refused():
    with pytest.raises(InputError, match="task-7 has no actions"):
        encode(expert([]), tiny.chatml())


# --------------------------------------------------------------------------- trajectories and seeds


def test_encode_does_not_mutate_its_trajectory():
    shown = expert()
    encode(shown, tiny.chatml())
    assert shown == expert()


def test_segment_gives_every_state_with_its_expert_action():
    shown = expert()
    targets = segment(shown)
    assert [action for _, action in targets] == [step.action for step in EXPERT]
    for i, (state, _) in enumerate(targets):
        assert state.steps == EXPERT[:i] + [Step(EXPERT[i].observation, "")]
        assert state.task_id == "task-7"
        assert state.prompt == PROMPT
    assert shown == expert()


def test_render_shows_a_turn_a_paragraph():
    shown = expert([Step("A room.", "Action: look"), Step("A desk.", "Action: go")])
    assert render(shown) == "A room.\nAction: look\nA desk.\nAction: go"


def printed(code: str) -> str:
    """What another Python process prints."""
    command = [sys.executable, "-c", code]
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def test_a_stable_seed_is_the_same_in_every_process():
    code = "from trajectory import stable_seed; print(stable_seed('practice', 3, 'task-7'))"
    assert int(printed(code)) == stable_seed("practice", 3, "task-7") == 6597199672062961222


def test_stable_seeds_differ_by_every_part_and_fit_a_generator():
    parts = [("a", 1), ("a", 2), ("b", 1), ("a1",), ("a", "1"), (1, "a")]
    seeds = {stable_seed(*one) for one in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_renderer_needs_no_torch():
    code = "import sys, trajectory; print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert printed(code) == "False\n"
