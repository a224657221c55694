"""The policy: read from a Hugging Face folder, saved to one, and adapted with LoRA."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from system.family import use_tree_attention
from system.files import move_into_place, read_tensors, write_text
from system.run_dir import RunDir
from system.sharding import Placement, fill, placement, shard
from trajectory import (
    InputError,
    Trajectory,
    action_ids,
    check_template,
    prompt_ids,
    special_ids,
    stable_seed,
    state_ids,
)

# "Loading weights" and "Writing model shards" would stand between our own bars.
transformers.logging.disable_progress_bar()


def is_news(record: logging.LogRecord) -> bool:
    """Not the table of weights that do not fit, of which check_weights makes one line."""
    text = record.getMessage()
    return "LOAD REPORT" not in text or "CONVERSION" in text


logging.getLogger("transformers.modeling_utils").addFilter(is_news)


def load_policy(
    run: RunDir, experts: list[Trajectory], starts_again: bool = False
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """The policy with tree attention, and its tokenizer; a continued run gets its last policy.

    Weights are float32, those that LoRA freezes have the compute type. experts: the text for the
    tokenizer of `--model tiny`. starts_again: forget() will be called.
    """
    config = run.config
    base = base_folder(run)
    if config.model == "tiny" and run.ranks.rank == 0 and not base.exists():
        make_tiny(experts, run.path("base.tmp"), config.seed)
        move_into_place(run.path("base.tmp"), base)
    run.ranks.barrier()
    saved = run.path(run.state["policy"]) if run.state["policy"] else None
    start = start_folder(run)
    # LoRA's adapters are learnt on the weights that the run began with.
    folder = start if config.lora_rank else saved or start
    tokenizer = read_tokenizer(folder)
    # What a template that writes the date takes for now.
    tokenizer.now = run.begun
    check_template(tokenizer, experts[0].prompt if experts else [])
    policy = outline(folder)
    check_tokens(folder, policy, tokenizer)
    if config.init and starts_again:
        other = ""
        if read_tokenizer(base).get_vocab() != tokenizer.get_vocab():
            other = "tokenizer"
        elif shapes(outline(base)) != shapes(policy):
            other = "architecture"
        if other:
            raise InputError(
                f"--init {config.init}: its {other} is not the one of --model {config.model}, "
                f"from which {config.method} starts again; give the model that it was trained from"
            )
        if run.ranks.rank == 0:
            # Its weights are needed later; a fault of theirs is said now.
            read_policy(base)
    policy = prepare(policy, config)
    placed = placement(run.ranks, policy, config)
    if placed.pieces > 1:
        recompute(policy, placed)
        whole = prepare(read_policy(folder), config) if run.ranks.rank == 0 else None
        shard(run.ranks, policy, placed, config.dtype)
        fill(run.ranks, policy, whole)
        if not placed.gathers_whole:
            run.say("no device can hold all weights: passes gather them layer by layer, slowly")
        return policy, tokenizer
    half = config.lora_rank and config.dtype == "bfloat16"
    policy = prepare(read_policy(folder, torch.bfloat16 if half else torch.float32), config)
    if config.lora_rank and saved:
        read_weights(run, policy, saved)
    policy.placed = placed
    recompute(policy, placed)
    return policy.to(run.ranks.device), tokenizer


def prepare(policy: nn.Module, config) -> nn.Module:
    """InputError where tree attention is not exact for the model."""
    use_tree_attention(policy)
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.seed)
    return policy


def recompute(policy: nn.Module, placed: Placement) -> None:
    if not placed.recomputes:
        return
    settings = {"use_reentrant": False}
    if hasattr(policy, "activation_checkpointing_enable"):
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        # Its name in older transformers.
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def forget(run: RunDir, policy: nn.Module) -> None:
    """The policy's weights become those of the model before any imitation."""
    if run.config.lora_rank:
        begin_lora(policy, run.config.seed)
    else:
        read_weights(run, policy, base_folder(run))


def read_back(run: RunDir, policy: nn.Module) -> None:
    """The policy's weights become those last saved as the run's policy, to the bit."""
    saved = run.state["policy"]
    if run.config.lora_rank and not saved:
        begin_lora(policy, run.config.seed)
    else:
        read_weights(run, policy, run.path(saved) if saved else start_folder(run))


def read_weights(run: RunDir, policy: nn.Module, folder: Path | str) -> None:
    """The policy's weights become those that save_policy left in a folder."""
    if run.config.lora_rank:
        file = folder / "lora.safetensors"
        report = policy.load_state_dict(read_tensors(file), strict=False)
        lost = [name for name in report.missing_keys if name.endswith((".A", ".B"))]
        lost += report.unexpected_keys
        if lost:
            raise InputError(f"{file}: not the adapters of this run ({lost[0]}); add --restart")
    elif isinstance(policy, FSDPModule):
        fill(run.ranks, policy, read_policy(folder) if run.ranks.rank == 0 else None)
    else:
        policy.load_state_dict(read_policy(folder).state_dict())


# ------------------------------------------------------------------------------------- the folder


def base_folder(run: RunDir) -> Path | str:
    """The model before any imitation."""
    return run.path("base") if run.config.model == "tiny" else run.config.model


def start_folder(run: RunDir) -> Path | str:
    """What the run began with."""
    return run.config.init or base_folder(run)


def read_policy(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights from safetensors alone: nothing in the folder is run as code.

    InputError unless they are the model's, one for one.
    """
    with loading(folder):
        policy, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            # They are refused below.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_weights(folder, policy, report)
    return policy


def check_weights(folder: str | Path, policy: nn.Module, report: dict) -> None:
    """InputError for weights that the library, by its report, makes up, drops or leaves untied."""
    tied = policy.get_expanded_tied_weights_keys(all_submodels=True)
    not_finite = set()
    for name, weight in policy.state_dict().items():
        if not weight.sum().isfinite():
            not_finite.add(name)
    faults = {
        "missing from its files": report["missing_keys"],
        "without a place in the model": report["unexpected_keys"],
        "of another size than config.json says": {row[0] for row in report["mismatched_keys"]},
        "tied by config.json (set tie_word_embeddings to false there), but different": (
            tied.keys() - policy.all_tied_weights_keys.keys()
        ),
        "that are not finite": not_finite,
    }
    found = []
    for fault, names in faults.items():
        if names:
            first = ", ".join(sorted(names)[:3]) + ", .." * (len(names) > 3)
            found.append(f"weights {fault}: {first} ({len(names)})")
    if found:
        raise InputError(
            f"model {folder}: {'; '.join(found)}; give files and a config.json that belong together"
        )


def check_tokens(folder: str | Path, policy: nn.Module, tokenizer) -> None:
    """InputError for a token without an embedding, if a conversation can contain it."""
    rows = len(policy.get_input_embeddings().weight)
    # A special token occurs only where the template writes it.
    written = {*prompt_ids(tokenizer, [], "x"), *action_ids(tokenizer, "x")}
    occur = written.union(state_ids(tokenizer, "x"), tokenizer.get_vocab().values())
    occur -= special_ids(tokenizer) - written
    if max(occur) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(occur))
        raise InputError(
            f"model {folder}: its tokenizer has tokens up to {max(occur)} ({token!r}), the model "
            f"has {rows} embeddings; give the tokenizer that belongs to the model, or save the "
            "model after resize_token_embeddings"
        )


def read_tokenizer(folder: str | Path) -> transformers.PreTrainedTokenizerBase:
    with loading(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def outline(folder: str | Path) -> nn.Module:
    """The model in float32 on the meta device, without storage."""
    with loading(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        reason = refusal(config)
        if reason:
            raise InputError(f"model {folder}: model family {config.model_type!r}, {reason}")
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def refusal(config) -> str:
    """Why this is no plain language model, or nothing."""
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        return f"quantised ({quantised.get('quant_method')}); give the original weights"
    if getattr(config, "is_heterogeneous", False):
        return "layers that differ in shape; use a model whose layers are alike"
    for size in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
        if (getattr(config, size, None) or 0) < 1:
            return f"no {size} in config.json; use a language model with attention"
    return ""


def shapes(policy: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in policy.named_parameters()}


@contextmanager
def loading(folder: str | Path):
    """Whatever the library raises inside becomes one line."""
    try:
        # With peft installed the library would apply them, without it leave them out.
        if find_adapter_config_file(str(folder)):
            remedy = "give the model into which they are merged"
            raise InputError(f"model {folder}: has adapters; {remedy}")
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"model {folder}: cannot be loaded ({reason}); give a Hugging Face id that this "
            "machine can reach, or a local folder with config.json, safetensors and tokenizer files"
        ) from error


def save_policy(run: RunDir, policy: nn.Module, tokenizer, target: Path) -> None:
    """An ordinary Hugging Face folder in float32. Every rank calls this.

    LoRA is merged; lora.safetensors keeps the adapters for later phases.
    """
    state, adapters = None, {}
    if isinstance(policy, FSDPModule):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(policy, options=options)
    elif run.config.lora_rank and run.ranks.rank == 0:
        state, adapters = merged(policy)
    if run.ranks.rank == 0:
        if state is not None:
            for name in policy.all_tied_weights_keys:
                state.pop(name, None)
        beside = target.with_name(target.name + ".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        policy.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
        if adapters:
            save_file(adapters, beside / "lora.safetensors")
            # It has the type of the frozen weights.
            saved = json.loads((beside / "config.json").read_text(encoding="utf-8"))
            write_text(beside / "config.json", json.dumps(saved | {"dtype": "float32"}, indent=2))
        move_into_place(beside, target)
    run.ranks.barrier()


def make_tiny(experts: list[Trajectory], folder: Path, seed: int, width: int = 128) -> None:
    """A Llama of random weights, 0.9M parameters at width 128, as a Hugging Face folder.

    Its tokenizer is a byte-level BPE of the expert text: in a small world a word is a token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = []
    for trajectory in experts:
        for step in trajectory.steps:
            text += [step.observation, step.action]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    roles = ["<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|end|>", *roles],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(text, trainer)
    names = {"eos_token": "<|end|>", "pad_token": "<|end|>", "additional_special_tokens": roles}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = transformers.LlamaConfig(
        **shape,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Falls as 1 / sqrt(width): with the library's 0.02 wide models learn to copy late.
        initializer_range=0.08 * (128 / width) ** 0.5,
        # Chooses the defaults of stepagent.py.
        stepagent_preset="tiny",
    )
    torch.manual_seed(stable_seed(seed, "tiny"))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------- LoRA


class LoRA(nn.Linear):
    """W x + 2 B A x (Hu et al., 2021; alpha = 2 R): W [out, in] frozen, A [R, in], B [out, R]."""

    def begin(self, seed: int, name: str) -> None:
        generator = torch.Generator().manual_seed(stable_seed(seed, "lora", name))
        uniform = 2 * torch.rand(self.A.shape, generator=generator) - 1
        with torch.no_grad():
            self.A.copy_(uniform / self.in_features**0.5)
            self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 2 * F.linear(F.linear(x, self.A), self.B)

    def whole(self) -> Tensor:
        return self.weight.float() + 2 * self.B @ self.A


def add_lora(policy: nn.Module, rank: int, seed: int) -> None:
    """Freezes the policy and puts float32 adapters on every linear layer but the head."""
    policy.requires_grad_(False)
    for module in policy.modules():
        if type(module) is nn.Linear and module is not policy.get_output_embeddings():
            # The frozen weight stays where it is and keeps its name.
            module.__class__ = LoRA
            module.A = nn.Parameter(torch.empty(rank, module.in_features))
            module.B = nn.Parameter(torch.empty(module.out_features, rank))
    begin_lora(policy, seed)
    if not any(weight.requires_grad for weight in policy.parameters()):
        family = policy.config.model_type
        raise InputError(f"--lora-rank: model family {family!r} has no linear layers; leave it out")


def begin_lora(policy: nn.Module, seed: int) -> None:
    """The policy computes what its frozen weights do."""
    for name, module in policy.named_modules():
        if isinstance(module, LoRA):
            module.begin(seed, name)


@torch.no_grad()
def merged(policy: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the ordinary model that computes the same, and the adapters; float32, CPU."""
    state, adapters = {}, {}
    for name, tensor in policy.state_dict().items():
        of = adapters if name.endswith((".A", ".B")) else state
        of[name] = tensor.float().cpu()
    for name, module in policy.named_modules():
        if isinstance(module, LoRA):
            state[f"{name}.weight"] = module.whole().cpu()
    return state, adapters
