"""The policy: read from a Hugging Face folder and saved to one, whole on every rank, sharded over the ranks (FSDP2), or frozen with LoRA.

Nothing here belongs to the method; the forward pass over trunk and leaves is in rollout.py.
"""
from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from parallel import Run, move_into_place, read_text, write_text
from rollout import Encoded, InputError, Trajectory, score, stable_seed, stop_ids, use_tree_attention


def load_policy(run: Run, experts: list[Trajectory]):
    """-> policy in float32 with tree attention, and its tokenizer; where a run continues, its last saved policy."""
    c = run.config
    if c.model == "tiny" and not run.path("base").exists() and run.rank == 0:
        make_tiny(experts, run.path("base.tmp"), c.seed)
        os.replace(run.path("base.tmp"), run.path("base"))
    run.barrier()
    half = torch.bfloat16 if c.dtype == "bfloat16" else torch.float32
    saved = run.path(run.state["policy"]) if run.state["policy"] else None
    start = c.init or base_folder(run)
    folder = start if c.lora_rank else saved or start
    tokenizer = read_tokenizer(folder)
    stop_ids(tokenizer)
    if c.init and c.method in ("rft", "nat") and read_tokenizer(base_folder(run)).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--init {c.init}: its tokenizer is not the one of --model {c.model}, from which {c.method} starts again; give "
                         "the model that it was trained from")
    policy = _prepare(c, outline(folder))
    if must_shard(run, policy):
        shard(run, policy, half)
        fill(run, policy, folder)
        if run.rank == 0 and not policy.gathers_whole:
            print("practice and episodes gather the weights layer by layer, as a device cannot hold them all: slow; more devices are faster")
    else:
        policy = _prepare(c, read_policy(folder, half if c.lora_rank else torch.float32)).to(run.device)
        if c.lora_rank and saved:
            policy.load_state_dict(load_file(saved / "lora.safetensors"), strict=False)
    if run.heart:
        policy.model.register_forward_pre_hook(lambda *_: setattr(run.heart, "passes", run.heart.passes + 1))
    return policy, tokenizer


def _prepare(c, policy: nn.Module) -> nn.Module:
    use_tree_attention(policy)
    if c.lora_rank:
        add_lora(policy, c.lora_rank, c.seed)
    if c.checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy


def base_folder(run: Run) -> str | Path:
    """The model before any imitation."""
    return run.path("base") if run.config.model == "tiny" else run.config.model


def read_policy(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights from safetensors alone, no code from the folder: nothing in it is run."""
    with _loading(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)


def read_tokenizer(folder: str | Path):
    with _loading(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def outline(folder: str | Path) -> nn.Module:
    """The model without storage (meta device), in float32: what must be known before weights are read."""
    with _loading(folder), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype=torch.float32)


@contextmanager
def _loading(folder: str | Path):
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"model {folder}: cannot be loaded ({str(error).splitlines()[0][:200]}); give a Hugging Face id that this "
                         "machine can reach, or a local folder with config.json, safetensors and tokenizer files") from None


def forget(run: Run, policy: nn.Module) -> None:
    """The policy's weights become those of the model before any imitation; under LoRA they are, and the adapters begin again."""
    if run.config.lora_rank:
        for name, module in policy.named_modules():
            if isinstance(module, LoRA):
                module.begin(run.config.seed, name)
        return
    if isinstance(policy, FSDPModule):
        fill(run, policy, base_folder(run))
    else:
        policy.load_state_dict(read_policy(base_folder(run)).state_dict())


def fill(run: Run, policy: nn.Module, folder: str | Path) -> None:
    """Sharded weights become those of the folder. Rank 0 alone reads it (the host memory of one whole model), and
    sends it to the others weight by weight, of which each keeps its piece."""
    state = {}
    if run.rank == 0:
        whole = read_policy(folder)
        if policy.config.tie_word_embeddings and whole.lm_head.weight is not whole.model.embed_tokens.weight:
            raise InputError(f"model {folder}: config.json says that head and embeddings are tied, the weights differ; set tie_word_embeddings "
                             "to false there")
        state, policy.generation_config = whole.state_dict(), whole.generation_config
    set_model_state_dict(policy, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def save_policy(run: Run, policy: nn.Module, tokenizer, target: Path) -> None:
    """An ordinary Hugging Face folder in float32, written beside and moved into place. Sharded weights are gathered (every rank calls
    this), LoRA is merged; lora.safetensors keeps it apart as well, for the phases to come."""
    state, adapters = None, {}
    if isinstance(policy, FSDPModule):
        state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    elif run.config.lora_rank and run.rank == 0:
        state, adapters = merged(policy)
    if run.rank == 0:
        if state is not None and policy.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        beside = target.with_name(target.name + ".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        policy.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
        if adapters:
            save_file(adapters, beside / "lora.safetensors")
            config = json.loads(read_text(beside / "config.json"))
            write_text(beside / "config.json", json.dumps(config | {"dtype": "float32"}, indent=2))      # not that of the frozen base
        move_into_place(beside, target)
    run.barrier()


# ----------------------------------------------------------------------------------------------------------------- LoRA, sharding

class LoRA(nn.Linear):
    """W x + 2 B A x (Hu et al., 2021; alpha = 2 R): W [out, in] is frozen, A [R, in] and B [out, R] are learnt, B from 0."""

    def begin(self, seed: int, name: str) -> None:
        gen = torch.Generator().manual_seed(stable_seed(seed, "lora", name))
        with torch.no_grad():
            self.A.copy_((2 * torch.rand(self.A.shape, generator=gen) - 1) / self.in_features ** 0.5)
            self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 2 * F.linear(F.linear(x, self.A), self.B)

    def whole(self) -> Tensor:
        return self.weight.float() + 2 * self.B @ self.A


def add_lora(policy: nn.Module, rank: int, seed: int) -> None:
    """Freezes the policy, and puts float32 adapters of this rank on every projection of attention and MLP, in place."""
    policy.requires_grad_(False)
    for name, module in policy.named_modules():
        if type(module) is nn.Linear and name.startswith("model.layers."):
            module.__class__ = LoRA                                                # its weights stay where, and what they are called
            module.A = nn.Parameter(torch.empty(rank, module.in_features))
            module.B = nn.Parameter(torch.empty(module.out_features, rank))
            module.begin(seed, name)


@torch.no_grad()
def merged(policy: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> the weights of the ordinary model that computes the same, in float32 on the CPU, and the adapters alone."""
    whole = {f"{name}.weight": m.whole().cpu() for name, m in policy.named_modules() if isinstance(m, LoRA)}
    adapters = {name: x.cpu() for name, x in policy.state_dict().items() if name.endswith((".A", ".B"))}
    rest = {name: x.float().cpu() for name, x in policy.state_dict().items() if name not in adapters and name not in whole}
    return rest | whole, adapters


def training_bytes(policy: nn.Module, c, split: int = 1) -> dict[str, float]:
    """Bytes on one device by arithmetic, what an update needs and what generation needs before any keys and values (least: layers gathered
    one by one). split: ranks that share the weights. Works for a model on the meta device; experiments/memory.py compares it with live storage."""
    h, width = policy.config, 2 if c.dtype == "bfloat16" else 4
    p, learnt = sum(x.numel() for x in policy.parameters()), sum(x.numel() for x in policy.parameters() if x.requires_grad)
    layer = sum(x.numel() for x in policy.model.layers[0].parameters())
    rest = p - layer * h.num_hidden_layers                                         # embeddings, head
    heads = (getattr(h, "head_dim", None) or h.hidden_size // h.num_attention_heads)
    inside = 12 * h.intermediate_size + 26 * h.hidden_size + (8 * h.num_attention_heads + 4 * h.num_key_value_heads) * heads
    inside *= width / 2                                                            # bytes a token inside one layer
    kept = 4 * h.hidden_size * h.num_hidden_layers + inside if c.checkpointing else inside * h.num_hidden_layers
    if c.lora_rank:
        held, copies, whole = width * (p - learnt) + 16 * learnt, 0, width * (p - learnt) + 4 * learnt
        least = whole
    elif split > 1:                                  # all-gathered: head and embeddings, this layer and the next; their gradients in float32
        held, copies, whole = 16 * p / split, (width + 4) * (rest + 2 * layer), 4 * p / split + width * p
        least = 4 * p / split + width * max(2 * rest, rest + 2 * layer)            # what is gathered is copied once
    else:
        held, copies, whole = 16 * p, width * p if width == 2 else 0, (4 + (width == 2) * 2) * p
        least = whole
    return {"held": held, "update": held + copies + c.micro_tokens * kept + 24 * max(2 ** 23, 256 * h.vocab_size), "generate": whole, "least": least}


def must_shard(run: Run, policy: nn.Module) -> bool:
    """--shard, or for auto: does an update fit where every rank holds all? Notes on the policy over how many ranks (`pieces`: of a node, or
    all where those are too few), and whether they can hold all weights while they decode, beside a quarter for keys and values (Run.room;
    `gathers_whole`). InputError where by arithmetic nothing fits."""
    c = run.config
    room = min(part["memory"] for part in run.gather({"memory": run.memory()}))                       # one decision for all
    sharded = run.world > 1 and not c.lora_rank and (c.shard == "true" or c.shard == "auto" and training_bytes(policy, c)["update"] > 0.9 * room)
    policy.pieces = run.split() if training_bytes(policy, c, run.split())["held"] <= room else run.world
    need = training_bytes(policy, c, policy.pieces if sharded else 1)
    policy.gathers_whole = need["generate"] <= 0.7 * room
    for what, name in (("held", "weights, gradients and Adam's moments"), ("least", "the weights that practice and evaluation read")):
        if need[what] > room:
            raise InputError(f"{c.model}: {name} need {need[what] / 1e9:.0f} GB a device, each has {room / 1e9:.0f}; take more devices"
                             f"{'' if sharded or c.lora_rank or run.world == 1 else ' or --shard auto'}{'' if c.lora_rank else ', or --lora-rank 16'}")
    return sharded


def shard(run: Run, policy: nn.Module, half: torch.dtype) -> None:
    """FSDP2: float32 weights, gradients and moments lie in policy.pieces on as many ranks (other nodes keep copies); each layer is gathered
    in the compute type as it runs."""
    split = policy.pieces
    mesh = dist.init_device_mesh(run.device.type, (run.world // split, split), mesh_dim_names=("copies", "pieces"))
    mesh = mesh["pieces"] if split == run.world else mesh
    kind = MixedPrecisionPolicy(param_dtype=half if half != torch.float32 else None, reduce_dtype=torch.float32)
    for part in (*policy.model.layers, policy):
        fully_shard(part, mesh=mesh, mp_policy=kind)
        part.set_gradient_divide_factor(1.0)                                       # losses are divided by global counts
        part.set_force_sum_reduction_for_comms(True)                               # gloo can do no other
    register_fsdp_forward_method(policy, "scoring")
    policy.to_empty(device=run.device)
    policy.tie_weights()
    policy.model.rotary_emb = type(policy.model.rotary_emb)(policy.config).to(run.device)         # what no file holds
    with torch.no_grad(), run.autocast():
        score(policy, [Encoded([0, 0], [(1, 2)])])                                 # tells every part who the root is, before any is gathered
    policy.set_reshard_after_forward(True)
    policy.reshard()                                                               # the root keeps its first gathering otherwise


def make_tiny(experts: list[Trajectory], folder: Path, seed: int, width: int = 128) -> None:
    """A Llama with random weights, 0.9M parameters at width 128, and a byte-level BPE tokenizer made from the expert text (in a small
    world every word becomes one token), as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = [x for t in experts for s in t.steps for x in (s.observation, s.action)]
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=1024, special_tokens=special, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>",
                                        additional_special_tokens=special[1:])
    tokenizer.chat_template = ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'assistant' %}<|end|>"
                               "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    torch.manual_seed(stable_seed(seed, "tiny"))
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        initializer_range=0.08 * (128 / width) ** 0.5,         # 1 / sqrt(width): at the library's 0.02, for wide models, copying forms late
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
