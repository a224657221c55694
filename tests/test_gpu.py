"""experiments/gpu.py and gpu_job.py with tiny shapes on a CPU: they run, and find no difference."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import naive
import rollout
import stepagent
import tree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import gpu  # noqa: E402
import gpu_job  # noqa: E402


@pytest.fixture
def check(tmp_path, monkeypatch):
    # naive_on replaces these for the rest of a section.
    monkeypatch.setattr(naive, "logits", naive.logits)
    monkeypatch.setattr(naive, "token_logps", naive.token_logps)
    gpu.naive_on("cpu")
    return gpu.Check(tmp_path, "a", cpu=True)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_exactness_finds_nothing_on_a_cpu(check, family):
    found = gpu.exactness(check, family, "float32")
    assert found["ours: log-probs off"] < 1e-3
    assert found["ours: gradient off"] < 1e-3
    assert found["greedy actions equal"] == "6 of 6"


def test_exactness_finds_a_wrong_mask(check, monkeypatch):
    def sees(position, leaf, branch, query, key, window=None):
        return position[key] <= position[query]

    model = gpu.tiny_model("llama")
    gpu.use_tree_attention(model)
    monkeypatch.setattr(gpu, "tiny_model", lambda family: model)
    monkeypatch.setattr(tree, "sees", sees)
    monkeypatch.setattr(gpu.rollout, "use_tree_attention", lambda model: None)
    item, leaves = gpu.example()
    [right, _] = naive.leaf_pairs(item, leaves)[:2]
    scores = rollout.score(model, item, leaves)
    expected = naive.token_logps(gpu.cast(gpu.tiny_model("llama"), "cpu", torch.float64), *right)
    assert (scores[0].leaves[0] - expected.sum()).abs() > 1e-3


def test_speeds_are_measured_at_tiny_shapes(check):
    model = gpu.make(check, "1B")
    padded = gpu.padded_update_speed(check, model, 2)
    generated = gpu.generate_speed(check, model.eval(), 2, 4, 1)
    gpu.use_tree_attention(model)
    ours = gpu.update_speed(check, model, 2)
    practised = gpu.practice_speed(check, model, 1, 2)
    # Ours computes each trunk once.
    assert 0 < ours["TFLOP"] <= padded["TFLOP"] and generated["states"] == 4
    assert practised["rows"] == 8 and practised["tokens/s"] > 0
    assert gpu.graph_speed(check, model)["eager, ms"] > 0


def test_flops_of_one_sequence_by_hand():
    shape = {"num_hidden_layers": 2, "hidden_size": 3, "intermediate_size": 5, "vocab_size": 7}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    # Query, output: 3 x 8; key, value: 3 x 4; MLP: 3 x 3 x 5. Two tokens after one: 2 + 3 pairs.
    layer = 2 * (2 * 24 + 2 * 12 + 45) * 2 + 4 * 8 * 5
    assert gpu.flops(SimpleNamespace(**shape), [(1, 2)], 1) == 3 * (2 * layer + 2 * 3 * 7)


def test_flex_attention_scores_as_the_pieces_do(check):
    model = gpu.make(check, "1B")
    gpu.use_tree_attention(model)
    assert gpu.flex_difference(check, model)["log-probs apart"] < 1e-4
    assert rollout.TrunkAndLeaves is tree.TrunkAndLeaves


def test_figures_are_kept_and_only_failures_are_repeated(tmp_path):
    check = gpu.Check(tmp_path, "a", cpu=True)
    calls = []

    def work(value):
        calls.append(value)
        return {"ms": 1 / value}

    check.attempt("good", work, 2)
    check.attempt("bad", work, 0)
    check.until = 0
    check.attempt("late", work, 4, needs=9)
    again = gpu.Check(tmp_path, "a", cpu=True)
    again.attempt("good", work, 3)
    again.attempt("bad", work, 5)
    assert calls == [2, 0, 5]
    assert again.figures["good"] == {"ms": 0.5} and again.figures["bad"] == {"ms": 0.2}
    assert "ZeroDivisionError" in check.figures["bad"]["error"]
    data = {"machine": gpu.machine(cpu=True), "sections": {"a": again.figures}}
    text = gpu.report(json.loads(json.dumps(data)))
    assert "not a measurement" in text
    assert "| good | ms 0.5 |" in text and "| late | needs 9 s |" in text


def test_the_job_runs_from_sft_to_a_table_and_continues(tmp_path, model, monkeypatch, capfd):
    """Its runs in this process; the second start finds all of them done."""
    started, usual = [], subprocess.run

    def run(words, *rest, **options):
        if isinstance(words, str):
            return usual(words, *rest, **options)
        if words[1] == "stepagent.py":
            started.append(words[words.index("--method") + 1])
            stepagent.main(stepagent.parse(words[2:]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu_job.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["gpu_job.py", model, "--few", "--out", str(tmp_path)])
    gpu_job.main()
    chain = ["stepagent-implicit", "sft+", "stepagent-inverse"]
    assert started[-3:] == chain and set(started[:-3]) == {"sft"}
    table = (tmp_path / "few/seed0/table.md").read_text()
    for name in ("SFT", "SFT+", "StepAgent-Implicit", "StepAgent-Inverse"):
        assert f"| {name} | " in table
    started.clear()
    gpu_job.main()
    assert started == []
