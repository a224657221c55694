"""Sharded weights: when, where, and that they are those of the folder."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import (
    QUIET,
    commands,
    distance,
    finish,
    metrics,
    run,
    same_bits,
    start,
    weights,
    words_of,
)
from torch.distributed.fsdp import FSDPModule

import envs
from rollout import score
from stepagent import Config
from system import sharding
from system.family import use_tree_attention
from system.model import (
    add_lora,
    forget,
    outline,
    read_back,
    read_policy,
    read_tokenizer,
    save_policy,
)
from system.ranks import Ranks
from system.sharding import Placement, fill, gathered, placement, room, shard, training_bytes
from trajectory import Encoded, InputError, encode

# ------------------------------------------------------------------------------------- arithmetic


def options(**more) -> Config:
    usual = {"dtype": "float32", "micro_tokens": 8192, "checkpointing": "false"}
    return Config(**(usual | more))


class Machine(Ranks):
    """So many ranks of so much memory; split: those of a node."""

    def __init__(self, world: int, memory: float, split: int = 0):
        self.world, self.rank = world, 0
        self.bytes = memory
        self.device = torch.device("cpu")
        self.node = split or world

    def memory(self):
        return self.bytes

    def split(self):
        return self.node

    def gather(self, part):
        return [part]


def test_sharding_is_chosen_by_arithmetic(model):
    policy = outline(model)
    need = training_bytes(policy, options(), device="cpu")
    count = sum(weight.numel() for weight in policy.parameters())
    assert need["held"] == 16 * count and need["generate"] == 4 * count < need["update"]
    update = need["update"]
    for world, memory, option, sharded in (
        (2, 1.2 * update, "auto", False),
        (2, 0.8 * update, "auto", True),
        (2, 0.8 * update, "false", False),
        (2, 1e12, "true", True),
        (1, update, "true", False),
    ):
        placed = placement(Machine(world, memory), policy, options(shard=option))
        assert placed.pieces == (2 if sharded else 1)
    assert placement(Machine(2, 0.8 * update), policy, options(lora_rank=3)).pieces == 1


def test_activations_are_kept_where_the_memory_holds_them(model):
    policy = outline(model)
    keeping = training_bytes(policy, options(), device="cpu")["update"]
    for memory, option, recomputes in (
        (1.2 * keeping, "auto", False),
        (keeping, "auto", True),
        (1.2 * keeping, "true", True),
        (keeping, "false", False),
    ):
        placed = placement(Machine(1, memory), policy, options(checkpointing=option))
        assert placed.recomputes == recomputes
    # Rather recomputed than sharded.
    placed = placement(Machine(2, keeping), policy, options(checkpointing="auto"))
    assert (placed.pieces, placed.recomputes) == (1, True)


def test_pieces_lie_on_a_node_or_on_all_ranks_if_those_are_too_few(model):
    policy = outline(model)
    count = sum(weight.numel() for weight in policy.parameters())
    # 16 bytes a weight: halves of a node take 8, a 64th takes 1 / 4.
    assert placement(Machine(64, 9 * count, split=2), policy, options()).pieces == 2
    assert placement(Machine(64, 5 * count, split=2), policy, options()).pieces == 64
    # All weights, 4 bytes each, in 0.7 of the memory.
    assert placement(Machine(64, 6 * count), policy, options()).gathers_whole
    assert not placement(Machine(64, 5 * count), policy, options()).gathers_whole


def test_what_fits_nowhere_is_refused_with_the_remedy(model):
    policy = outline(model)
    count = sum(weight.numel() for weight in policy.parameters())
    says = "weights, gradients and Adam's moments need .* --shard auto, or --lora-rank 16"
    with pytest.raises(InputError, match=says):
        placement(Machine(2, 8 * count), policy, options(shard="false"))
    says = "the weights that practice and evaluation read need .* take more devices, or --lora-rank"
    with pytest.raises(InputError, match=says):
        placement(Machine(64, 0.5 * count), policy, options())


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("bfloat16", 2)])
def test_the_room_for_keys_and_values_is_most_of_what_weights_leave(model, dtype, width):
    """Two layers, two heads of width 8, keys and values."""
    policy, chosen = read_policy(model), options(dtype=dtype)
    count = sum(weight.numel() for weight in policy.parameters())
    token = 2 * 2 * 2 * 8 * width
    # Weights in float32, and a copy in bfloat16.
    weights = (4 if width == 4 else 6) * count
    policy.placed = Placement(1, True)
    assert room(Machine(1, 10**6 + weights), policy, chosen) == 750_000 // token
    # Gathered layer by layer.
    policy.placed = Placement(2, False)
    least = training_bytes(policy, chosen, 2)["least"]
    assert room(Machine(2, 10**6 + least), policy, chosen) == 750_000 // token
    # 1 / 16 where weights leave less.
    assert room(Machine(1, 1.28 * 10**5), policy, chosen) == 6_000 // token


@pytest.mark.parametrize("rank", [0, 3])
def test_memory_held_is_what_lives_after_an_update(model, rank):
    chosen = options(dtype="bfloat16" if rank else "float32", lora_rank=rank)
    policy = read_policy(model, torch.bfloat16 if rank else torch.float32)
    use_tree_attention(policy)
    if rank:
        add_lora(policy, rank, 0)
    env = envs.make_env("household")
    learnt = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-3)
    data = [encode(env.expert("train-0"), read_tokenizer(model))]
    with torch.autocast("cpu", torch.bfloat16, enabled=rank > 0):
        score(policy, data)[0].trunk.sum().backward()
    optimizer.step()
    live = [*policy.parameters(), *(weight.grad for weight in learnt)]
    for weight in learnt:
        state = optimizer.state[weight]
        live += [state["exp_avg"], state["exp_avg_sq"]]
    assert all(w.grad is None for w in policy.parameters() if not w.requires_grad)
    held = sum(tensor.untyped_storage().nbytes() for tensor in live)
    assert held == training_bytes(policy, chosen)["held"]


# ---------------------------------------------------------------------------------------- weights

DATA = [Encoded(list(range(3, 25)), [(9, 12), (18, 22)])]
LEAVES = [[(0, [5, 6]), (1, [7, 8, 9])]]


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()


def sharded_copy(ranks: Ranks, folder: Path) -> torch.nn.Module:
    policy = outline(folder)
    use_tree_attention(policy)
    shard(ranks, policy, Placement(ranks.world, True), "float32")
    fill(ranks, policy, read_policy(folder) if ranks.rank == 0 else None)
    return policy


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.OTHER_FAMILIES])
def test_sharded_weights_are_those_of_the_folder(tmp_path, one_rank, family, tied):
    """Built without storage, then filled: what no file holds is there, and ties are kept."""
    made = tiny.model(family, tie_word_embeddings=tied).float()
    made.save_pretrained(tmp_path)
    use_tree_attention(made)
    policy = sharded_copy(one_rank, tmp_path)
    [expected], [found] = score(made, DATA, LEAVES), score(policy, DATA, LEAVES)
    assert torch.equal(found.trunk_tokens, expected.trunk_tokens)
    assert torch.equal(found.leaf_tokens, expected.leaf_tokens)
    for scores in (expected, found):
        (scores.trunk.sum() + scores.leaves.sum()).backward()
    ours = dict(policy.named_parameters())
    assert set(ours) == {name for name, _ in made.named_parameters()}
    for name, weight in made.named_parameters():
        assert torch.allclose(ours[name].grad.full_tensor(), weight.grad, atol=1e-6), name


def test_a_sharded_policy_forgets(tmp_path, one_rank):
    tiny.model().float().save_pretrained(tmp_path)
    policy, base = sharded_copy(one_rank, tmp_path), read_policy(tmp_path)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(2)
    run_dir = SimpleNamespace(config=options(model=str(tmp_path)), ranks=one_rank)
    forget(run_dir, policy)
    expected = dict(base.named_parameters())
    for name, weight in policy.named_parameters():
        assert torch.equal(weight.full_tensor(), expected[name]), name


def pass_and_learn(folder: str, gathers_whole: bool, name: str) -> None:
    """Rank r runs r passes on its own, then all learn together; twice."""
    if name == "before 2.13":
        del FSDPModule.reset_iter_state
    ranks = Ranks()
    policy = sharded_copy(ranks, Path(folder))
    policy.placed.gathers_whole = gathers_whole
    for _ in range(2):
        with torch.no_grad(), gathered(ranks, policy):
            for _ in range(ranks.rank):
                score(policy, DATA, LEAVES)
        (score(policy, DATA, LEAVES)[0].trunk.sum() / ranks.world).backward()
        norm = ranks.clip(policy, 1.0)
    if ranks.rank == 0:
        (Path(folder) / "norm").write_text(str(norm.item()))
    ranks.finish()


@pytest.mark.parametrize("gathers_whole", [True, False])
@pytest.mark.parametrize("name", ["this torch", "before 2.13"])
def test_ranks_that_made_different_numbers_of_passes_learn_together(tmp_path, gathers_whole, name):
    """Also where FSDP has no method of its own to forget its passes, as before torch 2.13."""
    made = tiny.model().float()
    made.save_pretrained(tmp_path)
    log = tmp_path / "log"
    processes = start(3, log, pass_and_learn, str(tmp_path), gathers_whole, name)
    assert finish(processes, 60) == [0, 0, 0], log.read_text()[-2000:]
    use_tree_attention(made)
    for _ in range(2):
        score(made, DATA, LEAVES)[0].trunk.sum().backward()
    # The second gradient is added to the first, which was clipped to norm 1.
    first = torch.nn.utils.get_total_norm([weight.grad for weight in made.parameters()]) / 2
    expected = first + 1
    norm = float((tmp_path / "norm").read_text())
    assert norm == pytest.approx(expected.item(), rel=1e-4)


def become_phi_and_back(folder: str, out: str) -> None:
    """A policy is saved, learns as D does, judges, and is read back."""
    ranks = Ranks()
    policy, tokenizer = sharded_copy(ranks, Path(folder)), read_tokenizer(folder)
    state = {"policy": "saved"}
    run_dir = SimpleNamespace(
        config=options(model=folder), ranks=ranks, state=state, path=Path(out).joinpath
    )
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.01)
    save_policy(run_dir, policy, tokenizer, run_dir.path("saved"))
    for gathers_whole in (True, False):
        policy.gathers_whole = gathers_whole
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        for _ in range(2):
            [scores] = score(policy, DATA, LEAVES)
            (scores.leaves.sum() - scores.trunk.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        save_policy(run_dir, policy, tokenizer, run_dir.path(f"phi_{gathers_whole}"))
        with torch.no_grad(), gathered(ranks, policy):
            score(policy, DATA, LEAVES)
        read_back(run_dir, policy)
        whole = {name: weight.full_tensor() for name, weight in policy.named_parameters()}
        with torch.no_grad(), gathered(ranks, policy):
            [scores] = score(policy, DATA, LEAVES)
        found = {"weights": whole, "trunk": scores.trunk_tokens, "leaves": scores.leaf_tokens}
        torch.save(found, run_dir.path(f"back_{gathers_whole}_{ranks.rank}"))
    ranks.finish()


def test_after_phi_the_sharded_policy_is_read_back_to_the_bit(tmp_path, model):
    """Two ranks: their weights, and what each of them computes with gathered ones."""
    log = tmp_path / "log"
    assert finish(start(2, log, become_phi_and_back, model, str(tmp_path)), 120) == [0, 0], (
        log.read_text()[-2000:]
    )
    expected, saved = weights(tmp_path / "saved"), read_policy(tmp_path / "saved")
    use_tree_attention(saved)
    [scores] = score(saved, DATA, LEAVES)
    assert distance(expected, weights(Path(model))) > 0.01
    for gathers_whole in (True, False):
        assert distance(expected, weights(tmp_path / f"phi_{gathers_whole}")) > 0.1
        for rank in (0, 1):
            found = torch.load(tmp_path / f"back_{gathers_whole}_{rank}")
            assert same_bits(found["weights"], expected)
            assert torch.equal(found["trunk"], scores.trunk_tokens)
            assert torch.equal(found["leaves"], scores.leaf_tokens)


# ------------------------------------------------------------------------------------- whole runs


def layer_by_layer() -> None:
    """By arithmetic no device holds all weights while it decodes."""
    arithmetic = sharding.training_bytes
    sharding.training_bytes = lambda *args: arithmetic(*args) | {"generate": 1e15}


def test_layer_by_layer_in_bfloat16_is_what_gathering_once_is(tmp_path, model):
    words = ["--model", model, "--shard", "true", "--dtype", "bfloat16", "--checkpointing", "true"]
    for name, before in (("once", None), ("layers", layer_by_layer)):
        runs = [({}, words_of(tmp_path / name, words))]
        assert finish(start(2, tmp_path / "log", commands, runs, before)) == [0, 0]
    once, layers = tmp_path / "once", tmp_path / "layers"
    assert same_bits(weights(once / "policy"), weights(layers / "policy"))
    assert metrics(once) == metrics(layers)
    assert "layer by layer" in (tmp_path / "log").read_text()


def test_a_sharded_run_in_bfloat16_with_recomputation_learns_what_a_plain_one_does(tmp_path, model):
    words = [*QUIET, "--model", model, "--method", "sft", "--sft-epochs", "4"]
    words += ["--dtype", "bfloat16", "--checkpointing", "true", "--shard"]
    runs = [({}, words_of(tmp_path / shard_, [*words, shard_])) for shard_ in ("true", "false")]
    log = tmp_path / "log"
    assert finish(start(2, log, commands, runs)) == [0, 0], log.read_text()[-2000:]
    sharded, plain = (
        [row["nll"] for row in metrics(tmp_path / x, "sft")] for x in ("true", "false")
    )
    assert sharded == pytest.approx(plain, rel=0.02) and sharded[-1] < 0.95 * sharded[0]


def test_episodes_played_together_fit_into_the_memory(tmp_path, monkeypatch, model):
    import training

    asked, plays = [], training.run_episodes

    def watched(*args, batch, **more):
        asked.append(batch)
        return plays(*args, batch=batch, **more)

    monkeypatch.setattr(training, "run_episodes", watched)
    words = ["--model", model, "--method", "base", "--eval-each", "", "--eval-splits", "test"]
    words += ["--eval-tasks", "5", "--episodes", "4"]
    whole = run(tmp_path / "x", *words)
    monkeypatch.setattr("system.model.placement", lambda *_: Placement(1, True))
    monkeypatch.setattr(Ranks, "memory", lambda self: 10**6)
    small = run(tmp_path / "y", *words)
    assert asked[0] == 4 and 1 <= asked[1] < 4
    episodes = "eval/final_test.jsonl"
    assert (whole / episodes).read_text() == (small / episodes).read_text()
