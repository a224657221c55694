"""experiments/compare.py and what reproduce.py keeps of a run, on small run directories."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import stepagent
from experiments import compare, reproduce

SPLITS = ["test", "test_unseen"]


def make(folder, seed, won, rate=1.0):
    """A finished run, its tasks in another order than their names': an inspection, two updates."""
    (folder / "eval").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"seed": seed}}))
    inspection = {"match_text": 0.5, "match_action": 0.75, "practice_tokens": 4000, "seconds": 60.0}
    rows = [{"phase": "inspect", "iteration": 1, "step": 0, "time": 1.0} | inspection]
    # The discriminator's updates are not the policy's.
    update = {"grad_norm": 1.0, "tokens": 1000, "seconds": 30.0}
    rows.append({"phase": "discriminator", "iteration": 1, "step": 0, "time": 2.0} | update)
    for step in (1, 2):
        update = {"grad_norm": rate * step, "tokens": 1000, "seconds": 30.0}
        rows.append({"phase": "implicit", "iteration": 1, "step": step, "time": 2.0} | update)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in SPLITS:
        rows = []
        for number, reward in enumerate(won):
            name = f"{split}-{number}"
            rows.insert(0, {"task_id": name, "reward": float(reward), "steps": ["long"] * 100})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"eval/final_{split}.jsonl").write_text(text)
    return str(folder)


def agree(run, matches):
    """What the policy does at the two and three held-out expert states of two tasks."""
    Path(run, "agreement").mkdir()
    for split in SPLITS:
        rows = []
        for task, match in (("b", matches[2:]), ("a", matches[:2])):
            row = {"task_id": task, "nll": [0.5] * len(match), "match": match}
            rows.append(json.dumps(row) + "\n")
        Path(run, f"agreement/final_{split}.jsonl").write_text("".join(rows))
        # A run keeps the experts of these tasks beside it.
        Path(run, f"agreement/experts_{split}.jsonl").write_text('{"task_id": "a", "steps": []}\n')


@pytest.fixture
def runs(tmp_path):
    won = {
        "SFT+": ([1, 0, 0, 0], [1, 1, 0, 0]),
        "StepAgent-Implicit": ([1, 1, 0, 0], [1, 1, 1, 0]),
    }
    found = {}
    for label, by_seed in won.items():
        found[label] = []
        for seed, outcomes in enumerate(by_seed):
            found[label].append(make(tmp_path / f"{label}{seed}", seed, outcomes))
    return found


def test_a_table_pairs_tasks_and_counts_what_was_spent(runs):
    figures = compare.compare(runs, "SFT+", SPLITS)
    ours = figures["StepAgent-Implicit"]
    assert ours["test"][0] == 0.625 and ours["minus SFT+"][0] == 0.25
    assert ours["by seed"] == [0.25, 0.25]
    assert (ours["updates"], ours["million tokens"]) == (2, 0.003)
    assert (ours["sampled, thousand"], ours["minutes"]) == (4, 2.5)
    assert "| 1 | 50.0 / 75.0 | 50.0 / 75.0 |" in compare.practice_match(runs)
    control, own = compare.table(figures)
    assert control["minus SFT+"] == control["by seed"] == ""
    assert own["by seed"] == "+25.0, +25.0" and own["updates"] == "2" and own["minutes"] == "2.5"


def test_what_is_kept_of_a_run_makes_the_same_table(runs, tmp_path):
    kept = {}
    for label, paths in runs.items():
        kept[label] = [str(tmp_path / f"kept/{label}{seed}.json") for seed in (0, 1)]
        for path, file in zip(paths, kept[label]):
            reproduce.keep(path, Path(file))
            assert Path(file).stat().st_size < 1000
    figures = compare.compare(runs, "SFT+", SPLITS)
    assert compare.compare(kept, "SFT+", SPLITS) == figures
    assert compare.practice_match(kept) == compare.practice_match(runs)
    metrics = compare.load(kept["SFT+"][0])["metrics"]
    assert [row.get("updates") for row in metrics] == [None, 1, 2]
    assert (metrics[2]["grad_norm"], metrics[2]["tokens"]) == (1.5, 2000)


def test_agreement_is_a_mean_over_states_and_paired_with_sft(runs, tmp_path):
    assert compare.agreement(runs, SPLITS) == []
    compare.load.cache_clear()
    found = {"SFT": runs["SFT+"], "Implicit": runs["StepAgent-Implicit"], "PPO": runs["SFT+"][:1]}
    for run in found["SFT"]:
        agree(run, [True, False, False, False, False])
    agree(found["Implicit"][0], [True, True, False, False, False])
    agree(found["Implicit"][1], [True, False, True, True, True])
    kept = {}
    for label, paths in found.items():
        kept[label] = [str(tmp_path / f"{label}{seed}.json") for seed in range(len(paths))]
        for path, file in zip(paths, kept[label]):
            reproduce.keep(path, Path(file))
    lines = compare.agreement(kept, SPLITS)
    assert lines == compare.agreement(found, SPLITS)
    _, head, _, sft, implicit, ppo = [line.split("|")[1:-1] for line in lines]
    assert head[0].strip() == "the expert's action, 10 held-out states"
    # 2 and 4 of 5 states against 1 of 5: states count, not tasks.
    assert sft[1].startswith(" 20.0 [") and implicit[1].startswith(" 60.0 [")
    assert implicit[3].startswith(" +40.0 [") and implicit[4].strip() == "+0.000 [+0.000, +0.000]"
    # Other seeds than SFT's are not paired.
    assert ppo[1].startswith(" 20.0 [") and ppo[3].strip() == ""
    Path(found["PPO"][0], "agreement/final_test.jsonl").unlink()
    compare.load.cache_clear()
    # Both rows of that run are left out.
    assert len(compare.agreement(found, SPLITS)) == 4


def test_runs_of_other_seeds_or_tasks_are_not_paired(runs, tmp_path):
    won = [1, 0, 0, 0]
    other = runs | {"PPO": [make(tmp_path / "a", 0, won), make(tmp_path / "b", 2, won)]}
    with pytest.raises(SystemExit, match=r"PPO has other seeds or tasks on test than SFT\+"):
        compare.rewards(other, "test")
    fewer = runs | {"PPO": [make(tmp_path / "c", 0, [1, 0]), make(tmp_path / "d", 1, [1, 0])]}
    with pytest.raises(SystemExit, match="other seeds or tasks"):
        compare.rewards(fewer, "test")
    with pytest.raises(SystemExit, match="has not played dev"):
        compare.rewards(runs, "dev")


def test_an_interval_covers_the_mean_and_narrows_with_tasks():
    generator = np.random.default_rng(1)
    few = (generator.random((2, 20)) < 0.5).astype(float)
    many = (generator.random((2, 2000)) < 0.5).astype(float)
    few_mean, few_low, few_high = compare.estimate(few)
    many_mean, many_low, many_high = compare.estimate(many)
    assert few_mean == few.mean() and few_low < few_mean < few_high
    assert many_low < many_mean < many_high
    assert many_high - many_low < (few_high - few_low) / 2


def test_the_finding_in_words():
    figures = {
        "SFT": {"minus SFT": None},
        "SFT+": {"minus SFT": [0.1, 0.05, 0.2]},
        "PPO": {"minus SFT": [0.1, 0.02, 0.2]},
        "DPO": {"minus SFT": [0.0, -0.1, 0.1]},
        "NAT": {"minus SFT": [-0.1, -0.2, -0.05]},
        "ETO": {"minus SFT": [0.1, 0.01, 0.2]},
    }
    assert compare.verdict(figures, figures, "SFT") == (
        "SFT+, PPO and ETO did better than SFT; NAT did worse than SFT; "
        "DPO could not be told from SFT"
    )


def test_the_command_prints_the_short_table_and_writes_the_full_one(
    runs, tmp_path, monkeypatch, capsys
):
    start = [make(tmp_path / f"start{seed}", seed, [1, 0, 0, 0]) for seed in (0, 1)]
    runs = {"SFT": start} | runs
    words = [f"{label}={','.join(paths)}" for label, paths in runs.items()]
    out = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["compare.py", *words, "--out", str(out)])
    compare.main()
    note, _, head, *rows, _, said, file = capsys.readouterr().out.splitlines()
    assert "2 seeds, 4 test tasks, 4 test_unseen tasks" in note
    assert re.split(" {3,}", head) == ["method", "test", "test_unseen", "minus SFT", "minutes"]
    assert [row.split()[0] for row in rows] == ["SFT", "SFT+", "StepAgent-Implicit"]
    assert said.startswith("What you just saw: ") and "SFT; " in said and str(out) in file
    full = out.read_text()
    assert "| by seed |" in full and "million tokens" in full and "match with the expert" in full
    monkeypatch.setattr(sys, "argv", ["compare.py", *words, "--to", "PPO"])
    with pytest.raises(SystemExit, match="no run has the label 'PPO'; give --to one of: SFT, SFT"):
        compare.main()


@pytest.mark.parametrize("name", ["tune", "main", "table3", "experts"])
def test_the_kept_runs_make_the_kept_tables(tmp_path, name):
    results = Path(__file__).resolve().parent.parent / "experiments" / "results"
    (tmp_path / "runs").symlink_to(results / "runs")
    runs = reproduce.Runs(tmp_path, tmp_path, jobs=1, execute=False, quick=False)
    reproduce.PARTS[name](runs, list(reproduce.SEEDS[name]))
    assert (tmp_path / f"{name}.md").read_text() == (results / f"{name}.md").read_text()


@pytest.mark.parametrize("label", reproduce.METHODS)
def test_reproduce_gives_a_method_only_what_it_reads(tmp_path, label):
    runs = reproduce.Runs(tmp_path, tmp_path, jobs=1, execute=False, quick=False)
    asked = []
    runs.start = lambda name, options, needs=(): asked.append(options)
    runs.method(label, 0, reproduce.TEST)
    assert len(asked) == (4 if label == "SFT+" else 2)
    for options in asked:
        quick = options | reproduce.only_read(options["method"], reproduce.QUICK)
        assert stepagent.parse(reproduce.words_of(quick)).method == options["method"]


def test_reproduce_leaves_a_run_directory_to_the_run(tmp_path, monkeypatch):
    """Its log stands beside: a folder with files is refused."""
    found = []

    def ran(command, cwd, stdout, stderr, env):
        out = Path(command[command.index("--out") + 1])
        stdout.write("said")
        found.append(out.exists() and list(out.iterdir()))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(reproduce.subprocess, "run", ran)
    runs = reproduce.Runs(tmp_path, tmp_path, jobs=1, execute=True, quick=True)
    runs.start("test/base", {"method": "base"})
    with pytest.raises(SystemExit, match="error: .*test/base failed; see .*test/base.log"):
        runs.wait()
    assert found == [False] and (tmp_path / "test" / "base.log").read_text() == "said"


@pytest.mark.parametrize(
    "script, arguments, runs",
    [
        ("main_job.sh", ["3"], 4),
        ("real_model.sh", ["model", "scienceworld"], 5),
        ("real_model.sh", ["model", "alfworld"], 4),
        ("real_model.sh", ["model", "hotpotqa"], 4),
    ],
)
def test_a_script_gives_a_method_only_what_it_reads(tmp_path, script, arguments, runs):
    """With programs that write down what they are called with, in place of python and torchrun."""
    calls = tmp_path / "calls"
    for name in ("python", "torchrun"):
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\nprintf "%q " "$@" >> {calls}\necho >> {calls}\necho 1\n')
        program.chmod(0o755)
    root = Path(reproduce.__file__).parent
    words = ["bash", str(root / script), str(tmp_path), *arguments]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    methods = []
    for line in calls.read_text().splitlines():
        called = shlex.split(line)
        if "stepagent.py" in called:
            options = called[called.index("stepagent.py") + 1 :]
            methods.append(stepagent.parse(options).method)
    assert len(methods) == runs
    assert set(methods) == {"sft", "sft+", "stepagent-implicit", "stepagent-inverse"}


def test_the_documents_quote_the_computed_tables():
    """Each interval in a row of a method stands in its row of one of these tables."""
    root = Path(__file__).resolve().parent.parent
    computed: dict[str, set[str]] = {}
    for name in ("main", "one_set", "table2", "nine"):
        figures = json.loads((root / f"experiments/results/{name}.json").read_text())
        for row in compare.table(figures):
            computed.setdefault(row["method"], set()).update(row.values())
    results = (root / "docs/results.md").read_text()
    tables = results.partition("## SFT, SFT+ and the two")[2].partition("**Section 5")[0]
    tables += results.partition("## The methods of Table 2")[2].partition("## What it shows")[0]
    quoted = {"README.md": (root / "README.md").read_text(), "docs/results.md": tables}
    for name, text in quoted.items():
        rows = 0
        for line in text.splitlines():
            label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            intervals = [cell for cell in cells if re.search(r"\[.*\]$", cell)]
            if label in computed and intervals:
                rows += 1
                assert set(intervals) <= computed[label], f"{name}: {line}"
        assert rows >= 5, f"{name} has {rows} rows of results"
