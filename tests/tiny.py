"""Tiny random models of every supported family, and small tokenizers with the chat templates of real ones."""
import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

FAMILIES = {"llama": (LlamaConfig, {}), "mistral": (MistralConfig, {"sliding_window": 9}),
            "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
            "qwen3": (Qwen3Config, {"head_dim": 16})}


def model(family: str = "llama", vocab: int = 97, context: int = 256, sharp: float = 12.0, seed: int = 0, **more):
    """float64, random, eager; weights enlarged so that tokens depend on what came before."""
    config, own = FAMILIES[family]
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(**{
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": context, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None} | own | more), attn_implementation="eager").double()
    for p in made.parameters():
        p.data *= sharp if p.dim() > 1 else 1
    return made.eval()


# Chat templates in the shape of real ones ---------------------------------------------------------------------------------
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
          " + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
           "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
           "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
           "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}")
QWEN3 = ("{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
         "{% endif %}{% endfor %}{% for m in messages %}{% set text = m.content %}"
         "{% if m.role == 'assistant' and loop.index0 < ns.last %}"
         "{% set text = m.content.split('</think>')[-1] %}{% endif %}"
         "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>' + '\n' }}"
         "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXT = ["Thought: I look around.\nAction: go to desk 1", "On desk 1: mug 1, pen 2. Nothing happens.", "OK",
        "user assistant system"]


def _fast(tokenizer, template, **special):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def byte_level(special: list[str], template: str | None, double_bos: bool = False, **names) -> PreTrainedTokenizerFast:
    """GPT-2-like byte-level BPE; double_bos: the tokenizer itself adds a BOS, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(TEXT * 3, trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if double_bos:
        bpe.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    return _fast(bpe, template, additional_special_tokens=[s for s in special if s not in names.values()], **names)


def chatml() -> PreTrainedTokenizerFast:
    """SmolLM2's habit: the pad token is the stop token."""
    return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")


def llama3() -> PreTrainedTokenizerFast:
    """EOS is not the token that ends a turn; the tokenizer adds a BOS of its own."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level(special, LLAMA3, double_bos=True, bos_token=special[0], eos_token=special[1])


def mistral() -> PreTrainedTokenizerFast:
    """SentencePiece-like: spaces are a visible mark, unknown characters fall back to bytes, no system role."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.train_from_iterator(TEXT * 3 + ["[INST] x [/INST]"] * 3, trainers.BpeTrainer(
        vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    made = json.loads(bpe.to_str())
    made["model"]["vocab"] |= {f"<0x{i:02X}>": len(made["model"]["vocab"]) + i for i in range(256)}
    bpe = Tokenizer.from_str(json.dumps(made))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    return _fast(bpe, MISTRAL, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def qwen3() -> PreTrainedTokenizerFast:
    """Drops what an earlier turn thought."""
    return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], QWEN3, eos_token="<|im_end|>", pad_token="<|endoftext|>")
