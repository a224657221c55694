"""Tiny random models, tokenizers with the chat templates of real ones, and short trajectories."""

import json

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trajectory import Encoded

# ------------------------------------------------------------------------------------------ models

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}

# model_type -> its options. These run through all tests: the paper's backbones, and windows.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
}
# Supported as well.
OTHER_FAMILIES = {
    "qwen3_moe": EXPERTS | {"head_dim": 16, "moe_intermediate_size": 32},
    "olmo2": {},
    "phi3": {"sliding_window": 9},
    "smollm3": {},
    "granite": {"logits_scaling": 3.0},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "glm": {"head_dim": 8},
    "starcoder2": {"sliding_window": 9},
    "exaone4": {"sliding_window": 9, "sliding_window_pattern": 2},
    "cohere": {"logit_scale": 0.5},
    # Learned positions, no grouped heads.
    "gpt2": {"num_key_value_heads": 4},
}
# Attention that is not plain softmax over the tokens seen.
REFUSED = {
    "gemma2": {"head_dim": 8},
    "stablelm": {},
    "gpt_oss": EXPERTS | {"head_dim": 8},
    "mamba": {},
    "falcon": {},
    # The window is in the library's mask alone.
    "phimoe": EXPERTS | {"sliding_window": 30},
    "doge": {"sliding_window": 30},
}
# Their grouped matrix product refuses float64.
FLOAT32 = {"qwen3_moe", "gpt_oss", "phimoe"}


def model(
    family: str = "llama",
    vocab: int = 97,
    context: int = 256,
    sharp: float = 12.0,
    seed: int = 0,
    **more,
):
    """float64, random, eager; weights enlarged, or tokens would not depend on the ones before."""
    options = SIZES | (FAMILIES | OTHER_FAMILIES | REFUSED)[family] | more
    options |= {"vocab_size": vocab, "max_position_embeddings": context}
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if family not in FLOAT32:
        made = made.double()
    for weight in made.parameters():
        if weight.dim() > 1:
            weight.data *= sharp
    return made.eval()


# ------------------------------------------------------------------------------------ trajectories

# Of 97 tokens: some practice actions stop early, some do not.
STOPS = set(range(1, 14))


def random_ids(count: int, generator: torch.Generator, vocab: int = 97) -> list[int]:
    return torch.randint(3, vocab, (count,), generator=generator).tolist()


def example(vocab: int = 97):
    """Three trajectories, longer than the sliding windows, and their leaves.

    Leaves come in no order, several at one step, none at another.
    """
    generator = torch.Generator().manual_seed(1)
    encoded = [
        Encoded(random_ids(30, generator, vocab), [(8, 12), (15, 16), (22, 30)], "a"),
        Encoded(random_ids(14, generator, vocab), [(5, 9)], "b"),
        Encoded(random_ids(21, generator, vocab), [(3, 7), (12, 18)], "c"),
    ]
    lengths = [[(2, 4), (0, 3), (0, 1), (2, 2), (0, 12)], [(0, 5)], []]
    leaves = []
    for of_trajectory in lengths:
        actions = [(step, random_ids(count, generator, vocab)) for step, count in of_trajectory]
        leaves.append(actions)
    return encoded, leaves


def late_branches():
    """The same trajectories with leaves that branch off the expert's action late or never.

    They branch off after some tokens, at the action's end, or go on behind it. Some stand twice,
    some part from one another later than from the expert.
    """
    encoded, _ = example()
    first, second, third = encoded
    of_first = [
        follow(first, 2, 8),
        follow(first, 0, 2, 90, 91),
        follow(first, 2, 3, 90),
        follow(first, 0, 4, 92, 93),
        follow(first, 0, 2, 90, 91),
        follow(first, 1, 1),
        follow(first, 2, 5, 90, 91, 92),
        follow(first, 2, 3, 90, 94),
        follow(first, 2, 6),
        follow(first, 0, 0, 95, 96),
    ]
    of_second = [follow(second, 0, 1, 90)]
    of_third = [follow(third, 1, 6), follow(third, 1, 5, 90)]
    return encoded, [of_first, of_second, of_third]


def follow(item: Encoded, step: int, count: int, *more: int) -> tuple[int, list[int]]:
    """A leaf of the expert's first `count` tokens, and then others."""
    start, _ = item.spans[step]
    return step, [*item.ids[start : start + count], *more]


# -------------------------------------------------------------------------------------- tokenizers

# Chat templates in the shape of real ones.
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}"
    "{% set text = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}"
    "{% set text = m.content.split('</think>')[-1] %}"
    "{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "Thought: I look around.\nAction: go to desk 1",
    "On desk 1: mug 1, pen 2. Nothing happens.",
    "OK",
    "user assistant system",
]


def byte_level(
    special: list[str],
    template: str | None,
    like_llama: bool = False,
    pieces: str = "",
    more: list[str] = (),
    **names,
) -> PreTrainedTokenizerFast:
    """GPT-2-like byte-level BPE.

    like_llama: the tokenizer itself adds a BOS, and most special tokens have no name. pieces: a
    pattern that cuts the text, instead of GPT-2's. more: text to learn from.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pieces)
    if pieces:
        cut = pre_tokenizers.Split(Regex(pieces), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([cut, bpe.pre_tokenizer])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([*TEXT * 3, *more], trainer)
    if like_llama:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
    else:
        unnamed = [token for token in special if token not in names.values()]
        names["additional_special_tokens"] = unnamed
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **names)


def chatml() -> PreTrainedTokenizerFast:
    """SmolLM2's habit: the pad token is the stop token."""
    return byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        CHATML,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )


def llama3() -> PreTrainedTokenizerFast:
    """EOS is not the token that ends a turn; the tokenizer adds a BOS of its own."""
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    return byte_level(special, LLAMA3, like_llama=True, bos_token=special[0], eos_token=special[1])


def nested() -> PreTrainedTokenizerFast:
    """One control token inside another."""
    special = ["<|im_start|>", "<|im_end|>", "<tool><|im_end|>"]
    return byte_level(special, CHATML, eos_token="<|im_end|>")


def mistral() -> PreTrainedTokenizerFast:
    """SentencePiece-like, without a system role.

    Spaces are a visible mark, unknown characters fall back to bytes.
    """
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    bpe.train_from_iterator(TEXT * 3 + ["[INST] x [/INST]"] * 3, trainer)
    # The trainer knows no byte tokens.
    made = json.loads(bpe.to_str())
    vocabulary = made["model"]["vocab"]
    size = len(vocabulary)
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = size + byte
    bpe = Tokenizer.from_str(json.dumps(made))
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    bpe.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=MISTRAL,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def qwen3() -> PreTrainedTokenizerFast:
    """Drops what an earlier turn thought."""
    return byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        QWEN3,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
