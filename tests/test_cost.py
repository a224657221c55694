"""experiments/cost.py: its parameter counts, FLOPs, token counts, bytes and token lengths against the real thing."""
import inspect
import itertools
import json
import os
import re
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
import rollout
import stepagent
from experiments import cost, recipe
from rollout import Encoded, Step, Trajectory, action_ids, encode, practice, prompt_ids, score, state_ids, use_tree_attention

SMALL = cost.Shape("small", 3, 64, 4, 2, 24, 160, 200)


def llama(shape: cost.Shape, **more) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, tie_word_embeddings=False),
        dtype=torch.float32, **more)


# ------------------------------------------------------------------------------------------------------------- shapes and FLOPs

@pytest.mark.parametrize("shape, billions", zip(cost.SHAPES, (7.24, 8.03, 12.25)), ids=lambda x: getattr(x, "name", None))
def test_parameters_are_the_published_ones_and_those_of_such_a_model(shape, billions):
    assert round(shape.parameters / 1e9, 2) == billions
    with torch.device("meta"):
        model = llama(shape)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer == sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_what_torch_counts(checkpointing):
    """Within 1% (rotary embedding is not in the formula); naive attention computes all T x T pairs. Here the head is not recomputed, and
    torch ends a layer's recomputation before its last matrix, whose output nobody asks for."""
    torch.manual_seed(0)
    model, T = llama(SMALL, attn_implementation="eager").train(), 48
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers, head = (cost.flops(SMALL, np.array(x)) for x in ([T, T * T, 0], [0, 0, T]))
    with FlopCounterMode(display=False) as forward:
        loss = model(torch.randint(SMALL.vocab, (1, T)), use_cache=False).logits.sum()
    assert forward.get_total_flops() == pytest.approx(layers + head, rel=0.01)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    again = layers - 2 * T * SMALL.layers * SMALL.inner * SMALL.hidden if checkpointing else 0
    assert backward.get_total_flops() == pytest.approx(2 * (layers + head) + again, rel=0.01)


# ----------------------------------------------------------------------------------------------- tokens, with and without trunk

@pytest.fixture(scope="module")
def toy() -> tuple[Encoded, list[list[int]]]:
    """An encoded trajectory of four steps, and the lengths of two practice actions at each."""
    steps = [Step(f"On desk {i}: mug {i}" + ", pen 2" * i, f"Thought: {'hm ' * (3 - i)}\nAction: go to desk {i}") for i in range(4)]
    encoded = encode(Trajectory("toy", [{"role": "user", "content": "Find the mug."}, {"role": "assistant", "content": "OK"}], steps),
                     tiny.chatml())
    return encoded, [[4, 7], [1, 12], [5, 5], [9, 2]]


def count(tokens: list[tuple[int, int]], window: int) -> list[int]:
    """[tokens, pairs] of one sequence; a token is (position, branch), branch -1 the trunk; who sees whom, one by one."""
    start = {b: min(p for p, c in tokens if c == b) for _, b in tokens}
    sees = lambda q, k: (k[1] == q[1] or k[1] == -1 and k[0] < start[q[1]]) and k[0] <= q[0] and (not window or q[0] - k[0] < window)
    return [len(tokens), sum(sees(q, k) for q in tokens for k in tokens)]


def total(sequences, window: int) -> list[int]:
    return np.sum([count(s, window) for s in sequences], 0).tolist()


@pytest.mark.parametrize("window", [0, 40])
def test_loads_are_those_of_brute_force(toy, window):
    encoded, leaves = toy
    alone = lambda state, n: [(p, -1) for p in range(state + n)]
    expert = [alone(s, e - s) for s, e in encoded.spans]
    own = [alone(s, n) for (s, _), two in zip(encoded.spans, leaves) for n in two]
    trunk = [(p, -1) for p in range(len(encoded.ids))]
    tree = trunk + [(s + t, 2 * i + j) for i, (s, _) in enumerate(encoded.spans) for j, n in enumerate(leaves[i]) for t in range(n)]
    a, n = sum(e - s for s, e in encoded.spans), sum(map(sum, leaves))                       # expert and practice tokens

    got = {(shared, inverse): {phase: x.tolist() for phase, x in cost.loads(encoded.spans, leaves, window, shared, inverse).items()}
           for shared in (True, False) for inverse in (True, False)}
    for inverse in (True, False):
        assert got[True, inverse]["score"] == got[True, inverse]["reflect"] == count(tree, window) + [a + n]
        assert got[True, inverse]["prefill"] == count(trunk[:encoded.spans[-1][1] - 1], window) + [8]
        assert got[False, inverse]["prefill"] == total([alone(s, 0) for s, _ in encoded.spans for _ in range(2)], window) + [8]
        assert got[True, inverse]["decode"] == got[False, inverse]["decode"]
    states = total([alone(s, 0) for (s, _), two in zip(encoded.spans, leaves) for _ in two], window)
    read = total([alone(s, m - 1) for (s, _), two in zip(encoded.spans, leaves) for m in two], window)
    assert got[True, True]["decode"] == [x - y for x, y in zip(read, states)] + [n - 8]
    assert got[False, False]["score"] == got[False, False]["reflect"] == total(expert + expert + own, window) + [2 * a + n]
    assert got[False, True]["score"] == total(expert + own, window) + [a + n]
    assert got[False, True]["reflect"] == total(own, window) + [n]


def test_loads_are_what_score_and_practice_compute(toy):
    encoded, leaves = toy
    model = tiny.model(vocab=len(tiny.chatml()))
    seen = {"tokens": 0, "rows": 0}
    model.model.register_forward_pre_hook(
        lambda m, args, kw: seen.update(tokens=seen["tokens"] + kw["input_ids"].numel()), with_kwargs=True)
    model.lm_head.register_forward_pre_hook(lambda m, args: seen.update(rows=seen["rows"] + args[0].shape[:-1].numel()))
    with torch.no_grad():
        score(model, [encoded], [[(i, [1 + j] * n) for i, two in enumerate(leaves) for j, n in enumerate(two)]])
    tokens, _, rows = cost.loads(encoded.spans, leaves, 0, True, False)["score"]
    assert seen == {"tokens": tokens, "rows": rows}
    seen.update(tokens=0, rows=0)
    practice(model, [encoded], 2, 1.0, 6, {10 ** 6})                                         # never stops: six tokens a leaf
    expected = cost.loads(encoded.spans, [[6, 6]] * 4, 0, True, False)
    assert seen == {"tokens": expected["prefill"][0] + expected["decode"][0], "rows": expected["prefill"][2] + expected["decode"][2]}


def test_mean_loads_mix_whole_numbers_of_turns():
    b = replace(cost.BENCHMARKS[2], turns=2.25)
    two, three = (cost.loads(b.spans(n), [[b.action] * 3] * n, 0, False, False)["reflect"] for n in (2, 3))
    assert cost.mean_loads(cost.SHAPES[1], b, 3, False, False)["reflect"] == pytest.approx(0.75 * two + 0.25 * three)
    assert [e - s for s, e in b.spans(3)] == [b.action] * 3 and b.spans(2)[1][0] - b.spans(2)[0][1] == b.observation


# -------------------------------------------------------------------------------------------------------------------- bytes, time

def test_kv_bytes_are_those_of_a_cache():
    cache = llama(SMALL).bfloat16()(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    assert 10 * SMALL.kv_bytes == sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


class Live(TorchDispatchMode):
    """Bytes of all storages made inside that are alive, and their peak."""
    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.now -= self.held.pop(key)


def peak(shape: cost.Shape, tokens: int, scored: int, entropy: bool) -> int:
    """Bytes of a training step above weights and gradients."""
    model = llama(shape).train()
    use_tree_attention(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with Live() as live:
        with torch.autocast("cpu", torch.bfloat16):
            got = score(model, [Encoded([1] * tokens, [(tokens - scored, tokens)])], with_entropy=entropy)
            loss = got.trunk_tokens.sum() + (got.trunk_entropy.sum() if entropy else 0)
        loss.backward()
    return live.peak


@pytest.mark.parametrize("more", [{}, {"layers": 6}, {"inner": 320}, {"heads": 8}, {"hidden": 128}])
def test_activation_bytes_are_those_of_a_checkpointed_step(more):
    """Within 10%: autocast's bf16 copy of the weights, 2 bytes each, is counted apart."""
    shape = replace(SMALL, vocab=8, **more)
    assert peak(shape, 2048, 8, False) - 2 * shape.parameters == pytest.approx(2048 * shape.activation_bytes, rel=0.1)


def test_bytes_of_a_chunk_of_logits():
    """1024 scored tokens are more logits than are kept."""
    shape = replace(SMALL, layers=1, vocab=40000)
    assert peak(shape, 1025, 1024, True) == pytest.approx(cost.LOGIT_BYTES * shape.vocab * 256, rel=0.1)


@pytest.mark.parametrize("vocab", [4000, 131072])
def test_a_chunk_is_the_heads(vocab):
    """As many logits at once as the formula has bytes for, within a row."""
    model, seen = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)), []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad():
        rollout._head(model, torch.zeros(600, 4), torch.zeros(600, dtype=torch.long), False)
    assert max(2 ** 21, 256 * vocab) - vocab < max(seen) * vocab <= max(2 ** 21, 256 * vocab) and sum(seen) == 600


def test_memory_is_the_sum_of_its_parts():
    shape, b = cost.SHAPES[0], cost.BENCHMARKS[2]
    moving = cost.MICRO * shape.activation_bytes + 24 * 256 * 32000
    assert cost.memory(shape, b, 3, 8, False) == cost.memory(shape, b, 3, 1, True) == pytest.approx(18 * shape.parameters + moving)
    assert cost.memory(shape, b, 3, 8, True) == pytest.approx(
        2 * shape.parameters + 2 * (2 * shape.layer + 2 * 32000 * 4096) + moving)
    huge = cost.kv(shape, b, 3, True) / shape.kv_bytes                                       # tokens of a batch: five trajectories
    assert huge == pytest.approx(5 * (842 + 34 + 13.4 * 88 + 14.4 * 3 * 34))


def test_hours_by_hand():
    """Llama-3 on ScienceWorld, one GPU, implicit: from the totals of the formulas."""
    shape, b, rate = cost.SHAPES[1], cost.BENCHMARKS[2], 989e12 * 0.4
    got, load = cost.cost(shape, b, 3, 1, True, False), cost.mean_loads(shape, b, 3, True, False)
    assert load["reflect"][0] == pytest.approx(842 + 35 + 13.4 * 88 + 14.4 * 3 * 35)
    assert got["reflection"] == pytest.approx(1483 * 4 * cost.flops(shape, load["reflect"]) / rate)
    assert got["optimizer_and_links"] == pytest.approx(1483 * 28 * shape.parameters / (3.35e12 * 0.6))
    assert got["h100_hours"] * 3600 == pytest.approx(sum(got[x] for x in ("inspection", "scoring", "reflection", "optimizer_and_links")))
    assert got["pflop"] * 1e15 / rate < got["h100_hours"] * 3600                             # the optimizer comes on top

    separate = cost.cost(shape, b, 3, 1, False, False)
    weights, states = 2 * (shape.parameters - 128256 * 4096), 3 * (0.6 * sum(842 + 88 * i for i in range(14)) + 0.4 * sum(
        842 + 88 * i for i in range(15)))                                                    # tokens held: each leaf its own state
    for costs, tokens in ((got, 842 + 13.4 * 88), (separate, states)):                       # 297 batches of five, 34 steps each
        work = cost.mean_loads(shape, b, 3, costs is got, False)
        by_memory = (weights + 5 * shape.kv_bytes * (tokens + 14.4 * 3 * 34 / 2)) / (3.35e12 * 0.6)
        by_compute = 5 * cost.flops(shape, work["decode"]) / 34 / rate
        assert costs["inspection"] == pytest.approx(
            1483 * cost.flops(shape, work["prefill"]) / rate + 297 * 34 * max(by_memory, by_compute))
    assert separate["updates"] == pytest.approx(1483 * 14.4 * 3 / 16)
    assert separate["reflection"] == pytest.approx(
        1483 * 4 * cost.flops(shape, cost.mean_loads(shape, b, 3, False, False)["reflect"]) / rate)
    for shared, inverse, at_work in ((True, False, 1), (False, False, 32), (False, True, 16)):
        assert cost.cost(shape, b, 3, 64, shared, inverse)["gpus_at_work"] == at_work
    wide = cost.cost(shape, b, 3, 8, True, False, pairs=8 * 14.4 * 3)
    assert wide["gpus_at_work"] == 8 and wide["reflection"] == pytest.approx(got["reflection"] / 8)
    assert cost.cost(shape, b, 3, 1, True, True)["reflection"] == pytest.approx(2 * got["reflection"])


def test_the_table_kept_is_the_one_printed(monkeypatch, capsys):
    monkeypatch.setattr(cost.Path, "write_text", lambda *args, **kw: None)
    monkeypatch.setattr("sys.argv", ["cost.py"])
    cost.main()
    kept = Path(cost.__file__).parent / "results/cost.md"
    assert kept.read_text(encoding="utf-8").startswith(capsys.readouterr().out)
    assert len(json.loads(kept.with_suffix(".json").read_text(encoding="utf-8"))["main"]) == len(cost.SHAPES) * len(cost.GPUS)


# ---------------------------------------------------------------------------------------------------------- measured token lengths

def webshop(items: list[dict], goals: list[str], state, turn) -> tuple[float, float, float]:
    """WebShop's text pages: start, one page of results, then product pages (of 4.9 turns); three kinds of click."""
    page = lambda words, buttons: state(f"Observation:\n{' [SEP] '.join(words)}\n\nAvailable Actions: {{'has_search_bar': False, "
                                        f"'clickables': {[b.lower() for b in buttons]}}}")
    start = [state(f"Observation:\nWebShop [SEP] Instruction: [SEP] {goal} [SEP] Search\n\nAvailable Actions: "
                   "{'has_search_bar': True, 'clickables': ['search']}") for goal in goals]
    results, products, turns = [], [], []
    for j, goal in zip(range(0, len(items), 10), itertools.cycle(goals)):
        ten, top = items[j:j + 10], ["Instruction:", goal, "Back to Search"]
        listed = [w for x in ten for w in (x["asin"], x["name"], x["pricing"] or "")]
        results.append(page(top + ["Page 1 (Total results: 50)", "Next >"] + listed, ["back to search", "next >"] + listed[::3]))
        for x in ten:
            choices = {name: [o["value"] for o in many or []] for name, many in (x["customization_options"] or {}).items()}
            products.append(page(
                top + ["< Prev"] + [w for name, many in choices.items() if many for w in (name, *many)] +
                [x["name"], f"Price: {x['pricing']}", "Rating: N.A.", "Description", "Features", "Reviews", "Buy Now"],
                ["back to search", "< prev", "description", "features", "reviews", "buy now"] + sum(choices.values(), [])))
        turns += [turn(a) for a in (f"search[{goal}]", f"click[{ten[0]['asin'].lower()}]", "click[black]", "click[Buy Now]")]
    return mean(start), (mean(results) + 2.9 * mean(products)) / 3.9, mean(turns)


@pytest.mark.skipif(not (os.environ.get("STEPAGENT_DATA") and os.environ.get("STEPAGENT_TOKENIZER")),
                    reason="STEPAGENT_DATA names no folder of benchmark files, or STEPAGENT_TOKENIZER none of SmolLM2's tokenizer")
def test_token_lengths_are_those_of_the_data():
    data, tokenizer = Path(os.environ["STEPAGENT_DATA"]), AutoTokenizer.from_pretrained(os.environ["STEPAGENT_TOKENIZER"])
    state, action = (lambda text: len(state_ids(tokenizer, text))), (lambda text: len(action_ids(tokenizer, text)))
    read = lambda name: json.loads((data / name).read_text(encoding="utf-8"))
    react = [re.findall("Thought: (.*)\nAction: (.*)\nObservation: ", row["output"])
             for row in read("hotpotqa/fireact_react_trajectories_500.json")]
    thought = mean(action(f"Thought: {t}\nAction: x") for row in react for t, _ in row) - action("Thought: I\nAction: x")
    turn = lambda a: action(f"Thought: I\nAction: {a}") + thought
    qa = mean(action(f"Thought: {t}\nAction: {a}") for row in react for t, a in row)
    found = {}

    musique = (data / "musique/musique_ans_v1.0_dev_120.jsonl").read_text(encoding="utf-8").splitlines()
    context = lambda q: ["".join(lines) for _, lines in (json.loads(q["context"]) if isinstance(q["context"], str) else q["context"])]
    for name, questions, paragraphs in (
            ("HotpotQA", read("hotpotqa/hotpot_train_500.json"), context),
            ("2WikiMultihopQA", read("2wikimultihopqa/train_500.json"), context),
            ("MuSiQue", [json.loads(line) for line in musique], lambda q: [p["paragraph_text"] for p in q["paragraphs"]])):
        some = questions[:100]
        found[name] = mean(state(q["question"]) for q in some), mean(state(p) for q in some for p in paragraphs(q)), qa

    games = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(data.glob("alfworld/json_2.1.1/train/**/gt_traj.json"))]
    said = lambda game, who: [x["value"] for x in game if x["from"] == who]
    found["ALFWorld"] = (mean(state(g[0]["value"]) for g in games), mean(mean(map(state, said(g, "human")[1:-1])) for g in games),
                         mean(mean(map(turn, said(g, "gpt"))) for g in games))
    goals = [goal["instruction"] for many in read("webshop/items_human_ins.json").values() for goal in many]
    found["WebShop"] = webshop(read("webshop/items_shuffle_1000.json"), goals, state, turn)

    prompt = None
    if shutil.which("java"):
        pytest.importorskip("scienceworld")
        from envs import make_env, prompt_messages
        env = make_env("scienceworld", variations=1)
        shown = [t for t in map(env.expert, env.splits["train"]) if t.reward >= 1 and len(t.steps) > 1]
        prompt = mean(len(prompt_ids(tokenizer, prompt_messages(env), t.steps[0].observation)) for t in shown)
        found["ScienceWorld"] = (mean(state(t.steps[0].observation) for t in shown),
                                 mean(mean(state(s.observation) for s in t.steps[1:]) for t in shown),
                                 mean(mean(turn(s.action.split("Action: ")[1]) for s in t.steps) for t in shown))
    for b in cost.BENCHMARKS:
        if b.name in found:
            assert (b.first, b.observation, b.action) == pytest.approx(found[b.name], abs=0.6), b.name
        if b.name == "ScienceWorld" and prompt:
            assert b.instruction + b.example + b.first == pytest.approx(prompt, abs=1)


# ---------------------------------------------------------------------------------------------------------- the full-size commands

@pytest.mark.parametrize("name", [b.name for b in cost.BENCHMARKS])
def test_a_full_size_command_is_one_that_the_program_takes_with_the_papers_settings(name):
    for method in ("sft", "stepagent-implicit", "stepagent-inverse"):
        config = stepagent.parse(recipe.command(name, method, "m", "o")[4:])
        stepagent.check(config)
        assert (config.sft_lr, config.sft_batch, config.sft_epochs, config.warmup) == (1e-5, 64, 4, 0.03)
        assert (config.lr, config.batch, config.epochs, config.practice) == (5e-7, 16, 1, 3) and not config.experts
        known = inspect.signature(envs.ENVIRONMENTS[config.env]).parameters
        assert set(envs.env_options(config.env_options)) <= set(known)


def test_the_page_of_full_size_commands_is_up_to_date():
    assert recipe.page() == (Path(recipe.ROOT) / "experiments/results/recipe.md").read_text(encoding="utf-8")
