"""Ranks, sharding, LoRA, and the folder that a policy is saved to."""
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import envs
import parallel
import stepagent as S
import tiny
from model import add_lora, fill, must_shard, outline, read_policy, read_tokenizer, shard, training_bytes
from ranks import finish, start, two_layers
from rollout import Encoded, InputError, encode, score, use_tree_attention
from test_stepagent import MINIATURE, QUIET, alike, distance, killed_and_continued, metrics, run, same_bits, weights

SEVEN = ["--experts", "7", "--sft-experts", "7", "--practice-experts", "7", "--sft-batch", "3", "--iterations", "1"]
METHODS = ("stepagent-implicit", "stepagent-inverse", "ppo")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers of width 32, and words for tokens. Its folder's name brings the tiny defaults."""
    folder = tmp_path_factory.mktemp("models") / "tiny-two-layers"
    two_layers(folder, MINIATURE[1])
    return str(folder)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """The runs of one process, by method."""
    where = tmp_path_factory.mktemp("alone")
    return {method: run(where / method, *SEVEN, "--model", model, "--method", method) for method in (*METHODS, "sft+")}


def together(where: Path, ranks: int, cases: list, before=None) -> None:
    """cases: (name, environment variables, words), run one after the other by the same ranks."""
    runs = [(variables, ["--out", str(where / name), *MINIATURE, *more]) for name, variables, more in cases]
    assert set(finish(start(ranks, runs, where / "log", before), 600)) == {0}, (where / "log").read_text()[-3000:]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_the_updates_of_one_process(tmp_path, model, alone, ranks):
    """Plain and sharded, SFT, DPO, D and PPO on 7 trajectories; eval has 3 tasks and late batches 1 trajectory: some of 4 ranks have
    none; SFT+ learns right after such an eval. `nodes`: two nodes of two ranks. Tolerance: 0.1% of what the update moved; fp32, other orders of addition."""
    every = [(method, shard) for method in METHODS for shard in ("true", "false")]
    which = every if ranks == 2 else [("stepagent-inverse", "true"), ("ppo", "false"), ("sft+", "true")]
    cases = [(f"{method}-{shard}", {}, [*SEVEN, "--model", model, "--method", method, "--shard", shard]) for method, shard in which]
    if ranks == 4:
        cases.append(("stepagent-implicit-nodes", {"LOCAL_WORLD_SIZE": "2"}, [*SEVEN, "--model", model, "--shard", "true"]))
    together(tmp_path, ranks, cases)
    for name, _, _ in cases:
        one, many = alone[name.rpartition("-")[0]], tmp_path / name
        moved = distance(weights(one / "policy"), weights(one / "sft" / "policy"))
        assert moved > 1e-3, name
        assert distance(weights(one / "policy"), weights(many / "policy")) < 1e-3 * moved, name
        alike(one, many)
        assert (one / "eval" / "final_test.jsonl").read_text() == (many / "eval" / "final_test.jsonl").read_text(), name


def no_room_for_all_weights(rank):
    """By arithmetic no device can hold them all while it decodes; and no rank but 0 may read them."""
    module = sys.modules["model"]
    arithmetic = module.training_bytes
    module.training_bytes = lambda *about: arithmetic(*about) | {"generate": 1e15}
    module.read_policy = module.read_policy if rank == 0 else None


@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_too_large_for_a_device_are_gathered_layer_by_layer_while_ranks_decode(tmp_path, model, alone, ranks):
    """Unequal shares: 7 trajectories, 3 tasks of an evaluation, so that one of 4 ranks only makes empty passes. 4 ranks: two nodes of two."""
    together(tmp_path, ranks, [(method, {"LOCAL_WORLD_SIZE": "2"}, [*SEVEN, "--model", model, "--method", method, "--shard", "true"])
                               for method in ("stepagent-implicit", "ppo")], no_room_for_all_weights)
    for method in ("stepagent-implicit", "ppo"):
        one, many = alone[method], tmp_path / method
        moved = distance(weights(one / "policy"), weights(one / "sft" / "policy"))
        assert distance(weights(one / "policy"), weights(many / "policy")) < 1e-3 * moved
        alike(one, many)
        assert (one / "eval" / "final_test.jsonl").read_text() == (many / "eval" / "final_test.jsonl").read_text()


def test_layer_by_layer_in_bfloat16_is_what_gathering_once_is(tmp_path, model):
    words = [*SEVEN, "--model", model, "--shard", "true", "--dtype", "bfloat16", "--checkpointing", "true"]
    for name, before in (("once", None), ("layers", no_room_for_all_weights)):
        together(tmp_path, 2, [(name, {}, words)], before)
    assert same_bits(weights(tmp_path / "once" / "policy"), weights(tmp_path / "layers" / "policy"))
    assert metrics(tmp_path / "once") == metrics(tmp_path / "layers")


def test_shares_are_balanced_whole_and_the_same_everywhere():
    run_ = parallel.Run.__new__(parallel.Run)
    run_.world, run_.rank, run_.config = 3, 0, S.Config(micro_tokens=50)
    sizes = [5, 40, 9, 31, 7, 20, 20]
    parts = run_.shares(range(7), lambda j: sizes[j])
    assert sorted(j for part in parts for j in part) == list(range(7)) and [sum(sizes[j] for j in part) for part in parts] == [47, 45, 40]
    assert run_.shares([6], lambda j: 1) == [[6], [], []]
    plain = torch.nn.Linear(1, 1)
    got = {}
    for run_.rank in range(3):
        got[run_.rank] = run_.micro_batches(plain, [1, 3, 5], lambda j: sizes[j])
    assert got == {0: [([1], 1.0)], 1: [([3], 1.0)], 2: [([5], 1.0)]}


def test_sharding_is_chosen_by_arithmetic(model, monkeypatch):
    """auto: where an update does not fit on one device. 1M tokens a pass stand in for a large model."""
    policy = read_policy(model)
    p = sum(x.numel() for x in policy.parameters())
    fake = lambda world, memory, **options: SimpleNamespace(world=world, memory=lambda: memory, split=lambda: world, gather=lambda part: [part],
                                                            config=S.Config(model=model, dtype="float32", **options))
    need = training_bytes(policy, S.Config(dtype="float32"))
    assert need["held"] == 16 * p and need["generate"] == 4 * p < need["update"]
    assert not must_shard(fake(2, 1.2 * need["update"]), policy) and must_shard(fake(2, 0.8 * need["update"]), policy)
    assert not must_shard(fake(1, need["update"], shard="true"), policy) and must_shard(fake(2, 1e12, shard="true"), policy)
    assert not must_shard(fake(2, 0.8 * need["update"], shard="false"), policy)
    with pytest.raises(InputError, match=r"weights, gradients and Adam's moments need .* --shard auto, or --lora-rank 16"):
        must_shard(fake(2, 8 * p, shard="false"), policy)
    nodes = fake(64, 5 * p)                                              # 16 p / 2 of a node are too much, 16 p / 64 are not
    nodes.split = lambda: 2
    assert must_shard(nodes, policy) and policy.pieces == 64
    nodes.memory = lambda: 9 * p
    assert must_shard(nodes, policy) and policy.pieces == 2
    with pytest.raises(InputError, match="the weights that practice and evaluation read need .* take more devices, or --lora-rank 16"):
        must_shard(fake(64, 0.5 * p), policy)
    for world, memory, whole in ((64, 5 * p, False), (64, 6 * p, True)):           # 4 p / 64 + 4 p bytes, beside a quarter for keys and values
        assert must_shard(fake(world, memory), policy) and policy.gathers_whole is whole


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sharded_weights_are_those_of_the_folder(tmp_path, family, tied):
    """Built without storage, then filled by rank 0: nothing that no file holds (rotary frequencies) is missing, ties are kept."""
    made = tiny.model(family, tie_word_embeddings=tied).float()
    made.save_pretrained(tmp_path)
    use_tree_attention(made)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        here = parallel.Run.__new__(parallel.Run)
        here.rank, here.world, here.device, here.config = 0, 1, torch.device("cpu"), S.Config(dtype="float32")
        policy = outline(tmp_path)
        use_tree_attention(policy)
        policy.pieces = 1
        shard(here, policy, torch.float32)
        fill(here, policy, tmp_path)
        data, leaves = [Encoded(list(range(3, 25)), [(9, 12), (18, 22)])], [[(0, [5, 6]), (1, [7, 8, 9])]]
        expected, found = score(made, data, leaves), score(policy, data, leaves)
        assert torch.equal(found.trunk_tokens, expected.trunk_tokens) and torch.equal(found.leaf_tokens, expected.leaf_tokens)
        for scores in (expected, found):
            (scores.trunk.sum() + scores.leaves.sum()).backward()
        ours = dict(policy.named_parameters())
        assert set(ours) == {name for name, _ in made.named_parameters()}
        for name, p in made.named_parameters():
            assert torch.allclose(ours[name].grad.full_tensor(), p.grad, atol=1e-6), name
    finally:
        dist.destroy_process_group()


def test_a_file_that_breaks_the_tie_that_its_config_promises_is_refused(tmp_path):
    """Where a model is built from its config alone, head and embeddings would be one."""
    tiny.model(tie_word_embeddings=False).float().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(InputError, match="are tied, the weights differ; set tie_word_embeddings to false"):
        fill(SimpleNamespace(rank=0), outline(tmp_path), tmp_path)


def test_all_machines_must_see_the_run_directory(tmp_path, monkeypatch):
    """A rank whose folder of that name is another one: it holds no lock of rank 0's."""
    other = parallel.Run.__new__(parallel.Run)
    other.out, other.config, other.rank = tmp_path, S.Config(), 1
    other.gather = lambda part: [{"owner": "17 on node-0\n"}, part]
    with pytest.raises(InputError, match="is not the same folder on all machines"):
        other._open_directory()


def test_episodes_played_together_fit_into_the_memory(tmp_path, monkeypatch):
    import rollout
    asked, plays = [], rollout.run_episodes

    def watched(*args, batch, **more):
        asked.append(batch)
        return plays(*args, batch=batch, **more)
    monkeypatch.setattr(S, "run_episodes", watched)
    words = [*QUIET, "--method", "base", "--eval-splits", "test", "--eval-tasks", "5", "--episodes", "4"]
    whole = run(tmp_path / "x", *words)
    monkeypatch.setattr(parallel.Run, "memory", lambda self: 10 ** 7)
    monkeypatch.setattr("model.must_shard", lambda *_: False)
    small = run(tmp_path / "y", *words)
    assert asked[0] == 4 and 1 <= asked[1] < 4
    assert (whole / "eval/final_test.jsonl").read_text() == (small / "eval/final_test.jsonl").read_text()


def test_experts_are_made_once_for_all_ranks_and_starts(tmp_path, monkeypatch):
    out = run(tmp_path / "x", *QUIET, "--method", "base")
    assert len((out / "experts.jsonl").read_text().splitlines()) == 6
    made = []
    monkeypatch.setattr(S, "save_trajectories", lambda *_: made.append(1))
    run(tmp_path / "x", *QUIET, "--method", "base")
    assert not made


# ---- LoRA

LORA = ["--lora-rank", "3", "--sft-lr", "1e-2", "--lr", "1e-2", "--iterations", "1"]


def test_lora_learns_adapters_alone_and_is_saved_merged(tmp_path, model):
    """Over SFT and reflection the frozen weights keep their bits, the saved folder computes what the adapted policy did."""
    out = run(tmp_path / "x", *QUIET, *LORA, "--model", model)
    base, tokenizer = read_policy(model), read_tokenizer(model)
    saved = AutoModelForCausalLM.from_pretrained(out / "policy")
    adapters = load_file(out / "policy" / "lora.safetensors")
    assert len(adapters) == 2 * 2 * 7 and all(x.dtype == torch.float32 and x.abs().sum() > 0 for x in adapters.values())
    adapted = {name[:-2] for name in adapters}
    for name, x in base.state_dict().items():
        whole = x + 2 * adapters[f"{name[:-7]}.B"] @ adapters[f"{name[:-7]}.A"] if name[:-7] in adapted else x
        assert torch.allclose(saved.state_dict()[name], whole, atol=1e-6), name
    use_tree_attention(base)
    add_lora(base, 3, 0)
    base.load_state_dict(adapters, strict=False)
    env = envs.make_env("household", **envs.env_options(MINIATURE[1]))
    data = [encode(env.expert(task), tokenizer) for task in envs.some(env.splits["train"], 3)]
    before, after = score(base, data), score(saved, data)
    assert torch.allclose(before.trunk_tokens, after.trunk_tokens, atol=1e-4)
    before.trunk.sum().backward()
    assert {name for name, p in base.named_parameters() if p.grad is not None} == set(adapters)


def test_lora_on_a_bfloat16_base_is_saved_in_float32(tmp_path, model):
    """A merge rounded to bfloat16 would lose most of what small rates learn."""
    out = run(tmp_path / "x", *QUIET, *LORA, "--model", model, "--dtype", "bfloat16", "--checkpointing", "true")
    base, saved = read_policy(model, torch.bfloat16), AutoModelForCausalLM.from_pretrained(out / "policy")
    adapters = load_file(out / "policy" / "lora.safetensors")
    name = "model.layers.1.mlp.up_proj"
    whole = base.get_submodule(name).weight.float() + 2 * adapters[f"{name}.B"] @ adapters[f"{name}.A"]
    found = saved.get_submodule(name).weight
    assert found.dtype == torch.float32 and torch.allclose(found, whole, atol=1e-6) and not torch.equal(found, found.bfloat16().float())
    assert torch.equal(saved.model.norm.weight, base.model.norm.weight.float())
    nll = [row["nll"] for row in metrics(out, "sft")]
    assert nll[-1] < nll[0]


def test_an_adapter_starts_as_nothing(model):
    plain, adapted = read_policy(model), read_policy(model)
    add_lora(adapted, 4, 0)
    ids = torch.arange(20)[None]
    assert torch.equal(plain(ids).logits, adapted(ids).logits)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == sum(
        4 * (m.in_features + m.out_features) for m in adapted.model.layers.modules() if isinstance(m, torch.nn.Linear))


def test_a_killed_lora_run_resumed_is_an_uninterrupted_one(tmp_path, monkeypatch, model):
    words = [*QUIET, *LORA, "--model", model]
    whole = run(tmp_path / "whole", *words)
    parts, killed = killed_and_continued(monkeypatch, tmp_path / "parts", *words)
    assert len(killed) == 7 and same_bits(weights(whole / "policy"), weights(parts / "policy")) and metrics(whole) == metrics(parts)


def test_rft_forgets_what_the_adapters_learnt(tmp_path, model):
    out = run(tmp_path / "x", *QUIET, *LORA[:4], "--model", model, "--method", "rft", "--samples", "1")
    first, second = ([row["nll"] for row in metrics(out, "sft")][n] for n in (0, 3))
    assert first == pytest.approx(second, rel=0.2)                       # both begin at the base model
    with pytest.raises(InputError, match="--lora-rank with --init: rft starts again from --model"):
        run(tmp_path / "y", *QUIET, *LORA, "--model", model, "--method", "rft", "--init", model)


# ---- half precision, recomputation, other numbers of ranks

def test_a_sharded_run_in_bfloat16_with_recomputation_learns_what_a_plain_one_does(tmp_path, model):
    words = [*SEVEN, *QUIET, "--model", model, "--method", "sft", "--sft-epochs", "4", "--dtype", "bfloat16", "--checkpointing", "true"]
    together(tmp_path, 2, [(shard, {}, [*words, "--shard", shard]) for shard in ("true", "false")])
    nll = {shard: [row["nll"] for row in metrics(tmp_path / shard, "sft")] for shard in ("true", "false")}
    assert nll["true"] == pytest.approx(nll["false"], rel=0.02) and nll["true"][-1] < 0.95 * nll["true"][0]


def stop_after_two(rank):
    """Ends every process with SIGTERM's code after the second update of SFT, as if it had come."""
    save = parallel.Run._save_if_due

    def save_and_stop(self, policy, optimizer, step):
        self.asked = 15 if step == 2 else 0
        save(self, policy, optimizer, step)
    parallel.Run._save_if_due = save_and_stop


@pytest.mark.parametrize("shard", ["true", "false"])
def test_a_run_continues_on_another_number_of_ranks(tmp_path, model, alone, shard):
    """Two ranks leave a checkpoint inside SFT, one process goes on."""
    out, words = tmp_path / "x", [*SEVEN, "--model", model, "--shard", shard]
    codes = finish(start(2, [({}, ["--out", str(out), *MINIATURE, *words])], tmp_path / "log", stop_after_two))
    assert codes == [143, 143] and (out / "checkpoints" / "00000002" / "manifest.json").exists(), (tmp_path / "log").read_text()[-2000:]
    assert len(list((out / "checkpoints" / "00000002").glob("*.safetensors"))) == 2
    run(out, *words)
    one = alone["stepagent-implicit"]
    alike(one, out)
    moved = distance(weights(one / "policy"), weights(one / "sft" / "policy"))
    assert distance(weights(one / "policy"), weights(out / "policy")) < 1e-3 * moved


@pytest.mark.parametrize("rank", [0, 3])
def test_memory_held_is_what_lives_after_an_update(model, rank):
    policy, tokenizer = read_policy(model, torch.bfloat16 if rank else torch.float32), read_tokenizer(model)
    use_tree_attention(policy)
    if rank:
        add_lora(policy, rank, 0)
    env = envs.make_env("household", **envs.env_options(MINIATURE[1]))
    learnt = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16, enabled=rank > 0):
        score(policy, [encode(env.expert("train-0"), tokenizer)]).trunk.sum().backward()
    optimizer.step()
    live = [*policy.parameters(), *(p.grad for p in learnt), *(x for p in learnt for name, x in optimizer.state[p].items() if name != "step")]
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)
    expected = training_bytes(policy, S.Config(dtype="bfloat16" if rank else "float32", lora_rank=rank))["held"]
    assert sum(x.untyped_storage().nbytes() for x in live) == expected


def test_a_saved_policy_is_one_that_transformers_and_trl_open(tmp_path, model):
    """TRL is a peer of experiments/: where it is not installed, transformers alone."""
    out = run(tmp_path / "x", *QUIET, *SEVEN, "--model", model, "--method", "sft")
    policy, tokenizer = (kind.from_pretrained(out / "policy") for kind in (AutoModelForCausalLM, AutoTokenizer))
    turns = [{"role": "user", "content": "You are in a house."}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert policy.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    trl, datasets = (pytest.importorskip(name, reason="pip install -r experiments/requirements.txt") for name in ("trl", "datasets"))
    data = datasets.Dataset.from_list([{"messages": turns + [{"role": "assistant", "content": "Action: look"}]}] * 2)
    settings = trl.SFTConfig(output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
                             save_strategy="no", disable_tqdm=True)
    trained = trl.SFTTrainer(model=str(out / "policy"), args=settings, train_dataset=data, processing_class=tokenizer).train()
    assert trained.global_step == 1 and 0 < trained.training_loss < 20
