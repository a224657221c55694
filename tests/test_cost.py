"""experiments/cost.py: its parameters, FLOPs, tokens and bytes against the real thing."""

import itertools
import json
import os
import re
import shlex
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import envs
import stepagent
from experiments import cost
from rollout import practice, score
from system.family import use_tree_attention
from system.options import parse
from system.sharding import training_bytes
from trajectory import Encoded, Step, Trajectory, action_ids, encode, prompt_ids, state_ids
from tree import chunk_rows, chunked_head

ROOT = Path(__file__).resolve().parents[1]


def small(**changes) -> cost.Backbone:
    sizes = {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "tie_word_embeddings": False,
    }
    return cost.Backbone("small", LlamaConfig(**sizes | changes))


def real(backbone: cost.Backbone, **options):
    """The same with storage."""
    return AutoModelForCausalLM.from_config(backbone.config, dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def backbones() -> dict[str, cost.Backbone]:
    return {name: cost.Backbone(name, config) for name, config in cost.CONFIGS.items()}


def named(benchmark: str) -> cost.Benchmark:
    [found] = [one for one in cost.BENCHMARKS if one.name == benchmark]
    return found


# ------------------------------------------------------------------------------- shapes and FLOPs


def test_parameters_are_the_published_ones(backbones):
    billions = [round(model.parameters / 1e9, 2) for model in backbones.values()]
    assert billions == [7.24, 8.03, 12.25]
    # Two norms in a layer, one at the end, embedding and head.
    for model in backbones.values():
        config = model.config
        layers = config.num_hidden_layers * (model.layer + 2 * config.hidden_size)
        ends = 2 * config.vocab_size * config.hidden_size + config.hidden_size
        assert model.parameters == layers + ends


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_what_torch_counts(checkpointing):
    """Within 1%: rotary embedding is not in the formula. Naive attention computes all T x T pairs.

    Here the head is not recomputed, and torch ends a layer's recomputation before its last matrix,
    whose output nobody asks for.
    """
    torch.manual_seed(0)
    backbone, tokens = small(), 48
    model = real(backbone, attn_implementation="eager").train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = cost.flops(backbone, np.array([tokens, tokens * tokens, 0]))
    head = cost.flops(backbone, np.array([0, 0, tokens]))
    with FlopCounterMode(display=False) as forward:
        loss = model(torch.randint(200, (1, tokens)), use_cache=False).logits.sum()
    assert forward.get_total_flops() == pytest.approx(layers + head, rel=0.01)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    expected = 2 * (layers + head)
    if checkpointing:
        expected += layers - 2 * tokens * 3 * 160 * 64
    assert backward.get_total_flops() == pytest.approx(expected, rel=0.01)


# --------------------------------------------------------------- tokens, with and without a trunk


@pytest.fixture(scope="module")
def toy() -> tuple[Encoded, list[list[int]]]:
    """A trajectory of four steps, and the lengths of two practice actions at each."""
    steps = []
    for i in range(4):
        observation = f"On desk {i}: mug {i}" + ", pen 2" * i
        steps.append(Step(observation, f"Thought: {'hm ' * (3 - i)}\nAction: go to desk {i}"))
    prompt = [
        {"role": "user", "content": "Find the mug."},
        {"role": "assistant", "content": "OK"},
    ]
    encoded = encode(Trajectory("toy", prompt, steps), tiny.chatml())
    return encoded, [[4, 7], [1, 12], [5, 5], [9, 2]]


def count(tokens: list[tuple[int, int]], window: int) -> np.ndarray:
    """[tokens, pairs] of a sequence, one by one. A token is (position, leaf); -1 is the trunk."""
    branch: dict[int, int] = {}
    for position, leaf in tokens:
        branch[leaf] = min(position, branch.get(leaf, position))
    pairs = 0
    for query, query_leaf in tokens:
        for key, key_leaf in tokens:
            on_trunk = key_leaf == -1 and key < branch[query_leaf]
            near = not window or query - key < window
            pairs += (key_leaf == query_leaf or on_trunk) and key <= query and near
    return np.array([len(tokens), pairs])


def alone(length: int, window: int) -> np.ndarray:
    return count([(position, -1) for position in range(length)], window)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("inverse", [False, True])
def test_loads_of_a_shared_trunk_are_those_of_brute_force(toy, window, inverse):
    encoded, leaves = toy
    tree = [(position, -1) for position in range(len(encoded.ids))]
    scored = leaf = 0
    for (start, end), lengths in zip(encoded.spans, leaves):
        scored += end - start + sum(lengths)
        for length in lengths:
            tree += [(start + i, leaf) for i in range(length)]
            leaf += 1
    loads = cost.loads(encoded.spans, leaves, window, True, inverse)
    for phase in ("score", "reflect"):
        assert loads[phase].tolist() == [*count(tree, window), scored]
    assert loads["prefill"].tolist() == [*alone(encoded.spans[-1][1] - 1, window), 8]


@pytest.mark.parametrize("window", [0, 40])
def test_loads_of_separate_sequences_are_those_of_brute_force(toy, window):
    encoded, leaves = toy
    states, decoded, practised, expert = 0, 0, 0, 0
    actions = sum(end - start for start, end in encoded.spans)
    leaf_tokens = sum(map(sum, leaves))
    for (start, end), lengths in zip(encoded.spans, leaves):
        expert = expert + alone(end, window)
        for length in lengths:
            state = alone(start, window)
            states = states + state
            # The last token is written, never read.
            decoded = decoded + alone(start + length - 1, window) - state
            practised = practised + alone(start + length, window)
    implicit = cost.loads(encoded.spans, leaves, window, False, False)
    inverse = cost.loads(encoded.spans, leaves, window, False, True)
    for loads in (implicit, inverse, cost.loads(encoded.spans, leaves, window, True, True)):
        assert loads["decode"].tolist() == [*decoded, leaf_tokens - 8]
    for loads in (implicit, inverse):
        assert loads["prefill"].tolist() == [*states, 8]
    # Two practice actions a step: the expert's is read twice.
    twice = [*(2 * expert + practised), 2 * actions + leaf_tokens]
    assert implicit["score"].tolist() == implicit["reflect"].tolist() == twice
    assert inverse["score"].tolist() == [*(expert + practised), actions + leaf_tokens]
    assert inverse["reflect"].tolist() == [*practised, leaf_tokens]


def test_loads_are_what_score_and_practice_compute(toy):
    encoded, leaves = toy
    model = tiny.model(vocab=len(tiny.chatml()))
    # The check of the family reads tokens, too.
    use_tree_attention(model)
    seen = {"tokens": 0, "rows": 0}

    def count_tokens(module, args, kwargs):
        seen["tokens"] += kwargs["input_ids"].numel()

    def count_rows(module, args):
        seen["rows"] += args[0].shape[:-1].numel()

    model.model.register_forward_pre_hook(count_tokens, with_kwargs=True)
    model.lm_head.register_forward_pre_hook(count_rows)
    different = []
    for step, lengths in enumerate(leaves):
        for number, length in enumerate(lengths):
            different.append((step, [1 + number] * length))
    with torch.no_grad():
        score(model, [encoded], [different])
    tokens, _, rows = cost.loads(encoded.spans, leaves, 0, True, False)["score"]
    assert seen == {"tokens": tokens, "rows": rows}
    seen.update(tokens=0, rows=0)
    # Never stops: six tokens a leaf.
    practice(model, [encoded], 2, 1.0, 6, {10**6})
    expected = cost.loads(encoded.spans, [[6, 6]] * 4, 0, True, False)
    tokens, _, rows = expected["prefill"] + expected["decode"]
    assert seen == {"tokens": tokens, "rows": rows}


def test_mean_loads_mix_whole_numbers_of_turns(backbones):
    benchmark = replace(named("ScienceWorld"), turns=2.25)
    reflect = []
    for turns in (2, 3):
        leaves = [[benchmark.action] * 3] * turns
        loads = cost.loads(benchmark.spans(turns), leaves, 0, False, False)
        reflect.append(loads["reflect"])
    found = cost.mean_loads(backbones["Llama-3-8B"], benchmark, 3, False, False)
    assert found["reflect"] == pytest.approx(0.75 * reflect[0] + 0.25 * reflect[1])
    (first, first_end), (second, second_end), _ = benchmark.spans(3)
    assert first_end - first == second_end - second == benchmark.action
    assert second - first_end == benchmark.observation


# ------------------------------------------------------------------------------------ bytes, time


def test_kv_bytes_are_those_of_a_cache():
    backbone = small()
    cache = real(backbone).bfloat16()(torch.ones(1, 10, dtype=torch.long), use_cache=True)
    held = 0
    for layer in cache.past_key_values.layers:
        held += layer.keys.nbytes + layer.values.nbytes
    assert held == 10 * backbone.kv_bytes


class Live(TorchDispatchMode):
    """Bytes of all storages made inside that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor):
                self.note(made.untyped_storage())
        return out

    def note(self, storage):
        if storage._cdata not in self.held:
            self.held[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key):
        self.now -= self.held.pop(key)


def peak(backbone: cost.Backbone, tokens: int, scored: int, entropy: bool) -> int:
    """Bytes of a training pass beside weights and gradients."""
    model = real(backbone).train()
    use_tree_attention(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    item = Encoded([1] * tokens, [(tokens - scored, tokens)])
    with Live() as live:
        with torch.autocast("cpu", torch.bfloat16):
            [scores] = score(model, [item], with_entropy=entropy)
            loss = scores.trunk_tokens.sum()
            if entropy:
                loss = loss + scores.trunk_entropy.sum()
        loss.backward()
    return live.peak


def needs(backbone: cost.Backbone, micro_tokens: int, device: str = "cpu") -> dict[str, float]:
    settings = replace(cost.SETTINGS)
    # No run has 0, which leaves what does not grow with tokens.
    settings.micro_tokens = micro_tokens
    return training_bytes(backbone.policy, settings, device=device)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 6},
        {"intermediate_size": 320},
        {"num_attention_heads": 8},
        {"hidden_size": 128},
    ],
)
def test_bytes_of_activations_are_those_of_a_checkpointed_pass(changes):
    """Within 10%: the bf16 copy of the weights, 2 bytes each, is counted apart."""
    backbone = small(vocab_size=8, **changes)
    activations = needs(backbone, 2048)["update"] - needs(backbone, 0)["update"]
    live = peak(backbone, 2048, 8, False) - 2 * backbone.parameters
    assert live == pytest.approx(activations, rel=0.1)


def test_bytes_of_a_chunk_of_logits():
    """1024 scored tokens are more logits than are kept."""
    backbone = small(num_hidden_layers=1, vocab_size=40000)
    need = needs(backbone, 0)
    chunk = need["update"] - need["held"] - 2 * backbone.parameters
    assert chunk == 24 * 256 * 40000
    assert peak(backbone, 1025, 1024, True) == pytest.approx(chunk, rel=0.1)


@pytest.mark.parametrize("vocab, rows", [(4000, 2048), (128256, 1046), (10**6, 256)])
def test_chunks_of_a_gpu_are_larger_and_counted(vocab, rows):
    assert chunk_rows(vocab, "cuda") == rows
    backbone = small(num_hidden_layers=1, vocab_size=vocab)
    need = needs(backbone, 0, "cuda")
    chunk = need["update"] - need["held"] - 2 * backbone.parameters
    assert chunk == 24 * max(2**23, rows * vocab)


@pytest.mark.parametrize("vocab", [4000, 131072])
def test_a_chunk_is_the_heads(vocab):
    """The head has at most as many logits at once as the formula has bytes for."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    model, seen = LlamaForCausalLM(config), []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel() // 4))
    with torch.no_grad():
        chunked_head(model, torch.zeros(600, 4), torch.zeros(600, dtype=torch.long), False)
    most = max(2**21, 256 * vocab)
    assert most - vocab < max(seen) * vocab <= most and sum(seen) == 600


def test_memory_is_the_larger_of_an_update_and_of_generation(backbones):
    model, benchmark = backbones["Mistral-7B"], named("ScienceWorld")
    for split in (1, 8):
        need = training_bytes(model.policy, cost.SETTINGS, split)
        assert cost.memory(model, benchmark, 3, split) == need["update"] > need["generate"]
    # Tokens of a batch: five trajectories.
    cached = cost.cache_bytes(model, benchmark, 3, True)
    tokens = 5 * (842 + 34 + 13.4 * 88 + 14.4 * 3 * 34)
    assert cached / model.kv_bytes == pytest.approx(tokens)
    # On very many GPUs the keys and values decide.
    need = training_bytes(model.policy, cost.SETTINGS, 10**4)
    crowded = replace(benchmark, observation=20_000)
    cached = cost.cache_bytes(model, crowded, 3, True)
    assert cost.memory(model, crowded, 3, 10**4) == need["generate"] + cached > need["update"]


def test_hours_by_hand(backbones):
    """Llama-3 on ScienceWorld, one GPU, implicit: from the totals of the formulas."""
    model, benchmark, rate = backbones["Llama-3-8B"], named("ScienceWorld"), 989e12 * 0.4
    found = cost.cost(model, benchmark, 3, 1, True, False)
    load = cost.mean_loads(model, benchmark, 3, True, False)
    assert load["reflect"][0] == pytest.approx(842 + 35 + 13.4 * 88 + 14.4 * 3 * 35)
    training = 1483 * 4 * cost.flops(model, load["reflect"]) / rate
    assert found["reflection"] == pytest.approx(training)
    optimizer = 1483 * 28 * model.parameters / (3.35e12 * 0.6)
    assert found["optimizer_and_links"] == pytest.approx(optimizer)
    seconds = sum(found[phase] for phase in cost.PHASES)
    assert found["h100_hours"] * 3600 == pytest.approx(seconds)
    # The optimizer comes on top.
    assert found["pflop"] * 1e15 / rate < seconds

    separate = cost.cost(model, benchmark, 3, 1, False, False)
    weights = 2 * (model.parameters - 128256 * 4096)
    # Tokens held: each leaf has its own state.
    of_leaves = 0
    for turns, share in ((14, 0.6), (15, 0.4)):
        of_leaves += 3 * share * sum(842 + 88 * i for i in range(turns))
    for costs, tokens in ((found, 842 + 13.4 * 88), (separate, of_leaves)):
        work = cost.mean_loads(model, benchmark, 3, costs is found, False)
        held = model.kv_bytes * (tokens + 14.4 * 3 * 34 / 2)
        by_memory = (weights + 5 * held) / (3.35e12 * 0.6)
        by_compute = 5 * cost.flops(model, work["decode"]) / 34 / rate
        # 297 batches of five, 34 steps each.
        prefill = 1483 * cost.flops(model, work["prefill"]) / rate
        inspection = prefill + 297 * 34 * max(by_memory, by_compute)
        assert costs["inspection"] == pytest.approx(inspection)
    assert separate["updates"] == pytest.approx(1483 * 14.4 * 3 / 16)
    load = cost.mean_loads(model, benchmark, 3, False, False)
    training = 1483 * 4 * cost.flops(model, load["reflect"]) / rate
    assert separate["reflection"] == pytest.approx(training)


def test_gpus_at_work_and_passes(backbones):
    model, benchmark = backbones["Llama-3-8B"], named("ScienceWorld")
    reflection = cost.cost(model, benchmark, 3, 1, True, False)["reflection"]
    for shared, inverse, at_work in ((True, False, 1), (False, False, 32), (False, True, 16)):
        found = cost.cost(model, benchmark, 3, 64, shared, inverse)
        assert found["gpus_at_work"] == at_work
    wide = cost.cost(model, benchmark, 3, 8, True, False, pairs=8 * 14.4 * 3)
    assert wide["gpus_at_work"] == 8 and wide["reflection"] == pytest.approx(reflection / 8)
    inverse = cost.cost(model, benchmark, 3, 1, True, True)
    assert inverse["reflection"] == pytest.approx(2 * reflection)


def test_the_discriminator_by_hand(backbones):
    """Llama-3 on ScienceWorld: two passes over all that was scored, then a forward pass of it."""
    model, benchmark, rate = backbones["Llama-3-8B"], named("ScienceWorld"), 989e12 * 0.4
    for shared, updates in ((True, 1483 / 2), (False, 1483 * 14.4 * 3 / 64)):
        found = cost.cost(model, benchmark, 3, 1, shared, True)
        load = cost.mean_loads(model, benchmark, 3, shared, True)
        forward = 1483 * cost.flops(model, load["score"]) / rate
        # 64 practice actions with their 64 / 3 expert actions make 86 separate sequences.
        rounding = 1 if shared else 86 / (64 + 64 / 3)
        assert found["discriminator"] == pytest.approx((2 * 4 * rounding + 1) * forward)
        reflection = 2 * 1483 * (1 if shared else 14.4 * 3 / 16)
        assert found["updates"] == pytest.approx(reflection)
        optimizer = 28 * model.parameters / (3.35e12 * 0.6)
        assert found["optimizer_and_links"] == pytest.approx((reflection + 2 * updates) * optimizer)
    # On 64 GPUs two rounds of them.
    wide = cost.cost(model, benchmark, 3, 64, False, True)
    assert wide["discriminator"] < found["discriminator"] / 42
    assert cost.cost(model, benchmark, 3, 1, True, False)["discriminator"] == 0


# ------------------------------------------------------------------------------- the pages kept


def test_the_tables_kept_are_the_ones_printed(monkeypatch, capsys):
    written = {}
    monkeypatch.setattr(cost, "write_text", lambda path, text: written.update({path.name: text}))
    monkeypatch.setattr("sys.argv", ["cost.py"])
    cost.main()
    printed = capsys.readouterr().out
    assert set(written) == {"cost.md", "memory.md"}
    for name, text in written.items():
        assert text == (ROOT / "experiments/results" / name).read_text(encoding="utf-8")
        assert text.split("\n\n```")[0].strip() in printed


RECIPE = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")


def recipe_rows(first: str) -> list[list[str]]:
    """The rows of the table whose head begins with `first`."""
    _, _, rest = RECIPE.partition(f"\n| {first} |")
    rows = []
    for line in rest.splitlines()[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows, first
    return rows


@pytest.mark.parametrize("name, more", [row[:2] for row in recipe_rows("ENV")])
def test_a_full_size_command_is_one_that_the_program_takes_with_the_papers_settings(name, more):
    runs = re.findall(r"^  run (.*)$", RECIPE, re.M)
    assert len(runs) == 4
    reads = {method: row.reads.split() for method, row in stepagent.METHODS.items()}
    for run in runs:
        words = ["--env", name, "--model", "m", *shlex.split(more.strip("`()")), *shlex.split(run)]
        config = parse(stepagent.Config, words, "", reads)
        if not config.match:
            stepagent.check(config, stepagent.METHODS[config.method])
        sft = (config.sft_lr, config.sft_batch, config.sft_epochs, config.warmup)
        assert sft == (1e-5, 64, 4, 0.03)
        reflection = (config.lr, config.batch, config.epochs, config.practice)
        assert reflection == (5e-7, 16, 1, 3) and not config.experts
        options = envs.env_options(config.env_options)
        assert set(options) <= set(envs.known_options(config.env))


def test_hours_and_memory_of_the_full_size_page_are_these(backbones):
    rounds = [stepagent.METHODS[f"stepagent-{kind}"].rounds for kind in ("implicit", "inverse")]
    [*hours, memory] = recipe_rows("benchmark | Mistral-7B | Llama-3-8B | Mistral-Nemo-12B")
    for benchmark, row in zip(cost.BENCHMARKS, hours, strict=True):
        expected = [benchmark.name]
        for model in backbones.values():
            both = []
            for times, inverse in zip(rounds, (False, True)):
                found = cost.cost(model, benchmark, 3, 8, True, inverse)
                both.append(cost.short(times * found["h100_hours"]))
            expected.append(" / ".join(both))
        assert row == expected
    expected = []
    for model in backbones.values():
        need = training_bytes(model.policy, cost.SETTINGS, 8)
        expected.append(f"{need['update'] / 1e9:.0f} / {need['generate'] / 1e9:.0f}")
    assert memory[1:] == expected


# ------------------------------------------------------------------------ measured token lengths


def page_text(words: list[str], buttons: list[str]) -> str:
    clickables = [button.lower() for button in buttons]
    actions = f"{{'has_search_bar': False, 'clickables': {clickables}}}"
    return f"Observation:\n{' [SEP] '.join(words)}\n\nAvailable Actions: {actions}"


def product_page(item: dict, top: list[str]) -> str:
    choices = {}
    for name, values in (item["customization_options"] or {}).items():
        choices[name] = [value["value"] for value in values or []]
    words = [*top, "< Prev"]
    for name, values in choices.items():
        if values:
            words += [name, *values]
    words += [item["name"], f"Price: {item['pricing']}", "Rating: N.A."]
    words += ["Description", "Features", "Reviews", "Buy Now"]
    buttons = ["back to search", "< prev", "description", "features", "reviews", "buy now"]
    return page_text(words, buttons + sum(choices.values(), []))


def webshop(items: list[dict], goals: list[str], state, turn) -> tuple[float, float, float]:
    """WebShop's text pages: start, one page of results, then product pages (of 4.9 turns)."""
    start = []
    for goal in goals:
        words = f"WebShop [SEP] Instruction: [SEP] {goal} [SEP] Search"
        actions = "{'has_search_bar': True, 'clickables': ['search']}"
        start.append(state(f"Observation:\n{words}\n\nAvailable Actions: {actions}"))
    results, products, turns = [], [], []
    for first, goal in zip(range(0, len(items), 10), itertools.cycle(goals)):
        ten, top = items[first : first + 10], ["Instruction:", goal, "Back to Search"]
        listed = []
        for item in ten:
            listed += [item["asin"], item["name"], item["pricing"] or ""]
        words = [*top, "Page 1 (Total results: 50)", "Next >", *listed]
        results.append(state(page_text(words, ["back to search", "next >", *listed[::3]])))
        products += [state(product_page(item, top)) for item in ten]
        clicks = (ten[0]["asin"].lower(), "black", "Buy Now")
        turns += [turn(f"search[{goal}]"), *(turn(f"click[{click}]") for click in clicks)]
    return mean(start), (mean(results) + 2.9 * mean(products)) / 3.9, mean(turns)


class Lengths:
    """Token lengths of real text, chat template included."""

    def __init__(self, data: Path, tokenizer):
        self.data, self.tokenizer = data, tokenizer
        self.react = []
        for row in self.read("hotpotqa/fireact_react_trajectories_500.json"):
            pairs = re.findall("Thought: (.*)\nAction: (.*)\nObservation: ", row["output"])
            self.react += pairs
        thoughts = [self.action(f"Thought: {thought}\nAction: x") for thought, _ in self.react]
        self.thought = mean(thoughts) - self.action("Thought: I\nAction: x")

    def read(self, name: str):
        return json.loads((self.data / name).read_text(encoding="utf-8"))

    def state(self, text: str) -> int:
        return len(state_ids(self.tokenizer, text))

    def action(self, text: str) -> int:
        return len(action_ids(self.tokenizer, text))

    def turn(self, action: str) -> float:
        """An action with a thought of mean length."""
        return self.action(f"Thought: I\nAction: {action}") + self.thought

    def question_answering(self) -> dict[str, tuple]:
        turns = [self.action(f"Thought: {t}\nAction: {a}") for t, a in self.react]
        path = self.data / "musique/musique_ans_v1.0_dev_120.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        questions = {
            "HotpotQA": self.read("hotpotqa/hotpot_train_500.json"),
            "2WikiMultihopQA": self.read("2wikimultihopqa/train_500.json"),
            "MuSiQue": [json.loads(line) for line in lines],
        }
        found = {}
        for name, rows in questions.items():
            paragraphs = []
            for row in rows[:100]:
                paragraphs += self.paragraphs(row)
            asked = mean(self.state(row["question"]) for row in rows[:100])
            found[name] = asked, mean(map(self.state, paragraphs)), mean(turns)
        return found

    def paragraphs(self, row: dict) -> list[str]:
        if "paragraphs" in row:
            return [paragraph["paragraph_text"] for paragraph in row["paragraphs"]]
        context = row["context"]
        if isinstance(context, str):
            context = json.loads(context)
        return ["".join(lines) for _, lines in context]

    def alfworld(self) -> tuple[float, float, float]:
        first, later, turns = [], [], []
        for file in sorted(self.data.glob("alfworld/json_2.1.1/train/**/gt_traj.json")):
            said = {"human": [], "gpt": []}
            for message in json.loads(file.read_text(encoding="utf-8")):
                said[message["from"]].append(message["value"])
            first.append(self.state(said["human"][0]))
            later.append(mean(map(self.state, said["human"][1:-1])))
            turns.append(mean(map(self.turn, said["gpt"])))
        return mean(first), mean(later), mean(turns)

    def scienceworld(self) -> tuple[float, float, float, float]:
        """Of prompt and first state together, first observation, later ones, turns."""
        env = envs.make_env("scienceworld", variations=1)
        prompt, first, later, turns = [], [], [], []
        for shown in map(env.expert, env.splits["train"]):
            if shown.reward >= 1 and len(shown.steps) > 1:
                observations = [step.observation for step in shown.steps]
                messages = envs.prompt_messages(env)
                prompt.append(len(prompt_ids(self.tokenizer, messages, observations[0])))
                first.append(self.state(observations[0]))
                later.append(mean(map(self.state, observations[1:])))
                actions = [step.action.split("Action: ")[1] for step in shown.steps]
                turns.append(mean(map(self.turn, actions)))
        return mean(prompt), mean(first), mean(later), mean(turns)


@pytest.mark.skipif(
    not (os.environ.get("STEPAGENT_DATA") and os.environ.get("STEPAGENT_TOKENIZER")),
    reason="STEPAGENT_DATA names no folder of benchmark files, or STEPAGENT_TOKENIZER none of "
    "SmolLM2's tokenizer",
)
def test_token_lengths_are_those_of_the_data():
    tokenizer = AutoTokenizer.from_pretrained(os.environ["STEPAGENT_TOKENIZER"])
    lengths = Lengths(Path(os.environ["STEPAGENT_DATA"]), tokenizer)
    found = lengths.question_answering() | {"ALFWorld": lengths.alfworld()}
    goals = []
    for many in lengths.read("webshop/items_human_ins.json").values():
        goals += [goal["instruction"] for goal in many]
    items = lengths.read("webshop/items_shuffle_1000.json")
    found["WebShop"] = webshop(items, goals, lengths.state, lengths.turn)
    if shutil.which("java"):
        pytest.importorskip("scienceworld")
        prompt, *found["ScienceWorld"] = lengths.scienceworld()
        benchmark = named("ScienceWorld")
        whole = benchmark.instruction + benchmark.example + benchmark.first
        assert whole == pytest.approx(prompt, abs=1)
    for name, measured in found.items():
        benchmark = named(name)
        kept = (benchmark.first, benchmark.observation, benchmark.action)
        assert kept == pytest.approx(tuple(measured), abs=0.6), name
