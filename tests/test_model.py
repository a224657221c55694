"""The policy's folder: read, saved, forgotten, adapted with LoRA."""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

import envs
from rollout import score
from system.family import use_tree_attention
from system.model import (
    add_lora,
    forget,
    load_policy,
    read_back,
    read_policy,
    save_policy,
)
from system.ranks import Ranks
from system.run_dir import RunDir
from system.sharding import Placement, training_bytes
from trajectory import InputError, encode


@dataclass
class Options:
    out: str
    model: str = "tiny"
    init: str = ""
    expert: str = ""
    prompt_file: str = ""
    match: str = ""
    method: str = "sft"
    env: str = "household"
    seed: int = 0
    save_minutes: float = 15.0
    shard: str = "auto"
    restart: bool = False
    dtype: str = "float32"
    lora_rank: int = 0
    micro_tokens: int = 8192
    checkpointing: str = "false"


@pytest.fixture(scope="module")
def experts():
    env = envs.make_env("household")
    return [env.expert(f"train-{i}") for i in range(4)]


def open_policy(out: Path, experts=(), starts_again=False, **options):
    """-> run, ranks, policy, tokenizer."""
    ranks = Ranks()
    run = RunDir(Options(str(out), **options), ranks, [])
    return run, ranks, *load_policy(run, list(experts), starts_again)


def learn(policy, tokenizer, experts, lr: float = 1e-2) -> None:
    """Three updates of SFT."""
    learnt = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=lr)
    half = policy.dtype == torch.bfloat16
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            scores = score(policy, [encode(expert, tokenizer) for expert in experts])
        (-torch.cat([one.trunk_tokens for one in scores]).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(run, ranks, policy, tokenizer, name: str = "policy") -> Path:
    save_policy(run, policy, tokenizer, run.path(name))
    return run.path(name)


# ------------------------------------------------------------------------------- reading and saving


def test_a_tiny_model_is_made_once_from_the_expert_text(tmp_path, experts):
    run, ranks, policy, tokenizer = open_policy(tmp_path / "x", experts)
    run.phase("first", lambda: None)
    made = (tmp_path / "x" / "base" / "model.safetensors").stat().st_mtime_ns
    assert sum(weight.numel() for weight in policy.parameters()) < 1e6
    assert tokenizer.decode(tokenizer("put mug in desk", add_special_tokens=False).input_ids)
    _, _, again, _ = open_policy(tmp_path / "x", experts)
    _, _, other, _ = open_policy(tmp_path / "y", experts)
    assert (tmp_path / "x" / "base" / "model.safetensors").stat().st_mtime_ns == made
    for one, two, three in zip(policy.parameters(), again.parameters(), other.parameters()):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_the_preset_is_a_field_that_a_saved_policy_keeps(tmp_path, experts):
    run, ranks, policy, tokenizer = open_policy(tmp_path / "x", experts)
    folder = save(run, ranks, policy, tokenizer)
    for config in (tmp_path / "x" / "base" / "config.json", folder / "config.json"):
        assert json.loads(config.read_text())["stepagent_preset"] == "tiny"


def test_a_run_that_goes_on_gets_its_last_policy(tmp_path, model, experts):
    run, ranks, policy, tokenizer = open_policy(tmp_path / "x", model=model)

    def sft():
        learn(policy, tokenizer, experts)
        save(run, ranks, policy, tokenizer, "sft/policy")
        run.state["policy"] = "sft/policy"

    run.phase("sft", sft)
    _, _, again, _ = open_policy(tmp_path / "x", model=model)
    for one, two in zip(policy.parameters(), again.parameters()):
        assert torch.equal(one, two)


def test_the_librarys_progress_bars_are_silent(tmp_path, capfd, model):
    run, ranks, policy, tokenizer = open_policy(tmp_path / "x", model=model)
    save(run, ranks, policy, tokenizer)
    assert capfd.readouterr() == ("", "")


def test_nothing_in_a_model_folder_is_run(tmp_path, model):
    trap = tmp_path / "trap"
    shutil.copytree(model, trap)
    (trap / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    config = json.loads((trap / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"}
    config["model_type"] = "trap"
    (trap / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="trap: cannot be loaded"):
        open_policy(tmp_path / "x", model=str(trap))
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled: cannot be loaded"):
        open_policy(tmp_path / "y", model=str(pickled))
    assert not (tmp_path / "sprung").exists()


def folder_of(folder: Path, tokenizer, made=None) -> str:
    made = made or tiny.model(vocab=len(tokenizer)).float()
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    folder = folder_of(tmp_path / "m", tiny.byte_level(["<s>", "</s>"], None, eos_token="</s>"))
    with pytest.raises(InputError, match="no chat template"):
        open_policy(tmp_path / "x", model=folder)


def test_a_family_without_attention_is_refused(tmp_path):
    tokenizer = tiny.chatml()
    config = MambaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=len(tokenizer))
    folder = folder_of(tmp_path / "m", tokenizer, MambaForCausalLM(config))
    with pytest.raises(InputError, match="model family 'mamba'"):
        open_policy(tmp_path / "x", model=folder)


def test_a_family_with_other_names_of_layers_is_welcome(tmp_path):
    tokenizer = tiny.chatml()
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=len(tokenizer))
    folder = folder_of(tmp_path / "m", tokenizer, GPT2LMHeadModel(config))
    _, _, policy, _ = open_policy(tmp_path / "x", model=folder)
    need = training_bytes(policy, Options(""), split=2)
    assert 0 < need["least"] < need["update"]
    with pytest.raises(InputError, match="--lora-rank: model family 'gpt2' has no linear layers"):
        open_policy(tmp_path / "x", model=folder, lora_rank=3)


def test_a_method_that_starts_again_refuses_another_tokenizer(tmp_path, model):
    other = folder_of(tmp_path / "m", tiny.chatml())
    open_policy(tmp_path / "x", model=model, init=other)
    with pytest.raises(
        InputError, match=f"--init {other}: its tokenizer is not the one of --model"
    ):
        open_policy(tmp_path / "x", model=model, init=other, starts_again=True)


def test_a_saved_policy_is_one_that_transformers_and_trl_open(tmp_path, model):
    """TRL is a peer of experiments/: where it is not installed, transformers alone."""
    folder = save(*open_policy(tmp_path / "x", model=model))
    policy = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "You are in a house."}]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = policy.generate(**ids, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > ids["input_ids"].shape[1]
    trl = pytest.importorskip("trl", reason="pip install -r experiments/requirements.txt")
    datasets = pytest.importorskip("datasets", reason="the same")
    answer = {"role": "assistant", "content": "Action: look"}
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=str(folder),
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"messages": [*turns, answer]}] * 2),
        processing_class=tokenizer,
    )
    trained = trainer.train()
    assert trained.global_step == 1 and 0 < trained.training_loss < 20


@pytest.mark.parametrize("lora_rank", [0, 3])
def test_forgetting_brings_back_the_model_before_any_imitation(tmp_path, model, experts, lora_rank):
    options = {"model": model, "lora_rank": lora_rank}
    run, ranks, policy, tokenizer = open_policy(tmp_path / "x", **options)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    learn(policy, tokenizer, experts)
    assert not all(torch.equal(before[name], x) for name, x in policy.state_dict().items())
    forget(run, policy)
    assert all(torch.equal(before[name], x) for name, x in policy.state_dict().items())


# ----------------------------------------------------------------------------- what does not fit


def broken(folder: Path, change=None, tied: bool = False, tokenizer=None, **settings) -> str:
    """A model's folder after change(weights) and with other settings in config.json."""
    tokenizer = tokenizer or tiny.chatml()
    made = tiny.model(vocab=len(tiny.chatml()), tie_word_embeddings=tied, sharp=1.0).float()
    folder_of(folder, tokenizer, made)
    if change:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return str(folder)


DOWN = "model.layers.1.mlp.down_proj.weight"


def one_gone(weights):
    del weights[DOWN]


def prefixed(weights):
    for name in list(weights):
        weights[f"_orig_mod.{name}"] = weights.pop(name)


def packed(weights):
    parts = [weights.pop(f"model.layers.0.self_attn.{x}_proj.weight") for x in "qkv"]
    weights["model.layers.0.self_attn.qkv_proj.weight"] = torch.cat(parts)


def biased(weights):
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)


def value_head(weights):
    weights["v_head.summary.weight"] = torch.ones(1, 32)


def headless(weights):
    del weights["lm_head.weight"]


def embeddingless(weights):
    del weights["model.embed_tokens.weight"]


def other_head(weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1


def same_head(weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


def head_alone(weights):
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")


def one_nan(weights):
    weights[DOWN][3, 4] = torch.nan


def one_infinite_embedding(weights):
    weights["model.embed_tokens.weight"][7, 7] = -torch.inf


UNFIT = [
    (one_gone, {}, rf"missing from its files: {DOWN} \(1\)"),
    (prefixed, {}, r"from its files: lm_head.* \(30\); .*a place in the model: _orig_mod.* \(30\)"),
    (packed, {}, "without a place in the model: model.layers.0.self_attn.qkv_proj.weight"),
    (biased, {}, "without a place in the model: model.layers.0.self_attn.q_proj.bias"),
    (value_head, {"tied": True}, "without a place in the model: v_head.summary.weight"),
    (headless, {}, r"missing from its files: lm_head.weight \(1\)"),
    (embeddingless, {"tied": True}, "missing from its files: lm_head.weight, model.embed_tokens"),
    (None, {"num_hidden_layers": 2}, r"place in the model: model.layers.2.*, \.\. \(9\)"),
    (None, {"num_hidden_layers": 4}, r"missing from its files: model.layers.3.*, \.\. \(9\)"),
    (None, {"intermediate_size": 96}, "of another size than config.json says: model.layers.0.mlp"),
    (None, {"vocab_size": 999}, "of another size than config.json says: lm_head.weight, model.emb"),
    (None, {"tie_word_embeddings": True}, "set tie_word_embeddings to false there"),
    (other_head, {"tied": True}, "set tie_word_embeddings to false there"),
    (one_nan, {}, rf"that are not finite: {DOWN} \(1\)"),
    (one_infinite_embedding, {}, "that are not finite: model.embed_tokens.weight"),
]


@pytest.mark.parametrize("change, settings, says", UNFIT)
def test_weights_that_do_not_fit_are_one_line(tmp_path, change, settings, says):
    folder = broken(tmp_path / "m", change, **settings)
    with pytest.raises(InputError, match=f"{folder}: weights .*{says}") as error:
        read_policy(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [one_gone, other_head, one_nan])
@pytest.mark.parametrize("path", ["whole", "sharded", "lora"])
def test_the_rule_is_the_same_on_all_paths(tmp_path, monkeypatch, change, path):
    """Refused before a weight is shared or saved."""
    if path == "sharded":
        monkeypatch.setattr("system.model.placement", lambda *_: Placement(2, True))
    folder = broken(tmp_path / "m", change, tied=True)
    with pytest.raises(InputError, match=f"{folder}: weights"):
        open_policy(tmp_path / "x", model=folder, lora_rank=3 * (path == "lora"))


@pytest.mark.parametrize("change", [same_head, head_alone])
def test_a_tied_weight_may_have_either_name_or_both(tmp_path, change):
    made = read_policy(broken(tmp_path / "m", change, tied=True))
    assert made.lm_head.weight is made.model.embed_tokens.weight
    expected = load_file(tmp_path / "m" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(made.lm_head.weight, expected)


def test_a_head_of_its_own_stays_one(tmp_path):
    """Also where it equals the embeddings."""
    made = read_policy(broken(tmp_path / "m", same_head))
    assert torch.equal(made.lm_head.weight, made.model.embed_tokens.weight)
    assert made.lm_head.weight is not made.model.embed_tokens.weight


class Printed(logging.Handler):
    """The messages that reach a logger, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_the_librarys_table_of_such_weights_is_not_printed(tmp_path):
    library = logging.getLogger("transformers.modeling_utils")
    printed = Printed()
    library.addHandler(printed)
    transformers.logging.set_verbosity_warning()
    try:
        with pytest.raises(InputError, match="missing from its files"):
            read_policy(broken(tmp_path / "m", one_gone))
        library.warning("an expert: CONVERSION of its weights, LOAD REPORT")
    finally:
        transformers.logging.set_verbosity_error()
        library.removeHandler(printed)
    assert [message[:9] for message in printed.messages] == ["an expert"]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\); give"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantised \(awq\); give"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            r"quantised \(bitsandbytes\); give the original weights",
        ),
        ({"quantization_config": {"quant_method": "of tomorrow"}}, r"quantised \(of tomorrow\)"),
        ({"max_position_embeddings": None}, "cannot be loaded .*max_position_embeddings"),
        ({"max_position_embeddings": -1}, "no max_position_embeddings in config.json"),
        ({"pad_token_id": 10**6}, "cannot be loaded .*[Pp]adding"),
        ({"vocab_size": None}, "cannot be loaded .*vocab_size"),
        ({"num_attention_heads": 5}, "cannot be loaded .*attention heads"),
        ({"num_key_value_heads": 3}, "of another size than config.json says: .*k_proj"),
        ({"head_dim": 5}, "cannot be loaded .*head_dim"),
        ({"rope_parameters": {"rope_type": "of tomorrow"}}, "KeyError: 'of tomorrow'"),
        ({"hidden_act": "of tomorrow"}, "cannot be loaded .*of tomorrow"),
        ({"layer_types": ["of tomorrow"]}, "cannot be loaded .*layer_types"),
        ({"per_layer_config": {"1": {"head_dim": 16}}}, "layers that differ in shape"),
        ({"model_type": "gpt2"}, "weights missing from its files: transformer.h.0"),
        ({"model_type": "fuyu"}, "model family 'fuyu', no vocab_size in config.json"),
    ],
)
def test_a_config_that_makes_no_model_is_one_line(tmp_path, settings, says):
    folder = broken(tmp_path / "m", **settings)
    with pytest.raises(InputError, match=says) as error:
        open_policy(tmp_path / "x", model=folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "{"),
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"watermarking_config": {"x": 1}}'),
        ("model.safetensors", "x"),
        ("config.json", "[]"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, text):
    folder = broken(tmp_path / "m")
    (tmp_path / "m" / name).write_text(text)
    with pytest.raises(InputError, match=f"{folder}: cannot be loaded") as error:
        open_policy(tmp_path / "x", model=folder)
    assert "\n" not in str(error.value)


def test_adapters_beside_the_weights_are_refused(tmp_path):
    """The library would apply them where peft is installed, and else leave them out."""
    folder = broken(tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="has adapters; .* merged"):
        open_policy(tmp_path / "x", model=folder)
    # Adapters alone.
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(InputError, match="has adapters; .* merged"):
        open_policy(tmp_path / "x", model=folder)


def test_a_tokenizer_with_words_beyond_the_embeddings_is_refused(tmp_path):
    tokenizer = tiny.chatml()
    size = len(tokenizer)
    tokenizer.add_tokens(["mug", "fridge"])
    says = rf"tokens up to {size + 1} \('fridge'\), the model has {size} embeddings"
    with pytest.raises(InputError, match=says):
        folder = broken(tmp_path / "m", tokenizer=tokenizer)
        open_policy(tmp_path / "x", model=folder)


def test_special_tokens_beyond_the_embeddings_are_refused_if_the_template_writes_them(tmp_path):
    """Gemma 3 has one for images, which text never contains."""
    tokenizer = tiny.chatml()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>", "<|turn|>"]})
    open_policy(tmp_path / "x", model=broken(tmp_path / "m", tokenizer=tokenizer))
    tokenizer.chat_template = tiny.CHATML.replace("<|im_start|>", "<|turn|>")
    folder = broken(tmp_path / "n", tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"\('<\|turn\|>'\), the model has"):
        open_policy(tmp_path / "y", model=folder)


@pytest.mark.parametrize(
    "change, settings, says",
    [
        (None, {"sharp": 1.0}, ""),
        (None, {"intermediate_size": 96}, "--init .*: its architecture is not the one of --model"),
        (None, {"tie_word_embeddings": True}, "its architecture is not the one of --model"),
        (one_gone, {}, f"/base: weights missing from its files: {DOWN}"),
    ],
)
def test_a_model_that_is_needed_later_is_checked_at_the_start(tmp_path, change, settings, says):
    """A method that starts again from --model, at the end of its first iteration."""
    tokenizer = tiny.chatml()
    base = folder_of(tmp_path / "base", tokenizer, tiny.model(vocab=len(tokenizer), **settings))
    if change:
        base = broken(tmp_path / "base", change)
    options = {"model": base, "init": broken(tmp_path / "init"), "starts_again": True}
    if says:
        with pytest.raises(InputError, match=says):
            open_policy(tmp_path / "x", **options)
    else:
        open_policy(tmp_path / "x", **options)


# ------------------------------------------------------------------------------------------- LoRA


def test_an_adapter_starts_as_nothing(model):
    plain, adapted = read_policy(model), read_policy(model)
    add_lora(adapted, 4, 0)
    ids = torch.arange(20)[None]
    assert torch.equal(plain(ids).logits, adapted(ids).logits)
    expected = 0
    for module in adapted.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            expected += 4 * (module.in_features + module.out_features)
    assert sum(x.numel() for x in adapted.parameters() if x.requires_grad) == expected


def test_lora_learns_adapters_alone_and_is_saved_merged(tmp_path, model, experts):
    """The frozen weights keep their bits, the saved folder computes what the adapted policy did."""
    options = {"model": model, "lora_rank": 3}
    run, ranks, policy, tokenizer = open_policy(tmp_path / "x", **options)
    learn(policy, tokenizer, experts)
    folder = save(run, ranks, policy, tokenizer)
    adapters = load_file(folder / "lora.safetensors")
    # A and B on seven projections of two layers.
    assert len(adapters) == 2 * 2 * 7
    assert all(x.dtype == torch.float32 and x.abs().sum() > 0 for x in adapters.values())
    saved, base = read_policy(folder), read_policy(model)
    for name, tensor in base.state_dict().items():
        adapted = name.removesuffix(".weight")
        if f"{adapted}.A" in adapters:
            tensor = tensor + 2 * adapters[f"{adapted}.B"] @ adapters[f"{adapted}.A"]
        assert torch.allclose(saved.state_dict()[name], tensor, atol=1e-6), name
    use_tree_attention(saved)
    data = [encode(expert, tokenizer) for expert in experts]
    for one, other in zip(score(policy, data), score(saved, data)):
        assert torch.allclose(one.trunk_tokens, other.trunk_tokens, atol=1e-4)


def test_a_lora_run_that_goes_on_gets_its_adapters(tmp_path, model, experts):
    options = {"model": model, "lora_rank": 3}
    run, ranks, policy, tokenizer = open_policy(tmp_path / "x", **options)

    def sft():
        learn(policy, tokenizer, experts)
        save(run, ranks, policy, tokenizer, "sft/policy")
        run.state["policy"] = "sft/policy"

    run.phase("sft", sft)
    _, _, again, _ = open_policy(tmp_path / "x", **options)
    assert all(torch.equal(again.state_dict()[name], x) for name, x in policy.state_dict().items())


def test_lora_on_a_bfloat16_base_is_saved_in_float32(tmp_path, model, experts):
    """A merge rounded to bfloat16 would lose most of what small rates learn."""
    options = {"model": model, "lora_rank": 3, "dtype": "bfloat16", "checkpointing": "true"}
    run, ranks, policy, tokenizer = open_policy(tmp_path / "x", **options)
    policy.train()
    learn(policy, tokenizer, experts)
    folder = save(run, ranks, policy, tokenizer)
    base, saved = read_policy(model, torch.bfloat16), AutoModelForCausalLM.from_pretrained(folder)
    adapters = load_file(folder / "lora.safetensors")
    name = "model.layers.1.mlp.up_proj"
    whole = base.get_submodule(name).weight.float()
    whole = whole + 2 * adapters[f"{name}.B"] @ adapters[f"{name}.A"]
    found = saved.get_submodule(name).weight
    assert found.dtype == torch.float32 and torch.allclose(found, whole, atol=1e-6)
    assert not torch.equal(found, found.bfloat16().float())
    assert torch.equal(saved.model.norm.weight, base.model.norm.weight.float())


def test_adapters_that_lack_one_are_refused(tmp_path, model):
    run, ranks, policy, tokenizer = open_policy(tmp_path / "x", model=model, lora_rank=3)
    folder = save(run, ranks, policy, tokenizer)
    run.state["policy"] = "policy"
    read_back(run, policy)
    adapters = load_file(folder / "lora.safetensors")
    gone = adapters.pop("model.layers.1.mlp.up_proj.B")
    for more in (
        {},
        {"model.layers.1.mlp.up_proj.B": gone, "model.layers.9.mlp.up_proj.B": gone.clone()},
    ):
        save_file(adapters | more, folder / "lora.safetensors")
        with pytest.raises(InputError, match="lora.safetensors: not the adapters of this run"):
            read_back(run, policy)
