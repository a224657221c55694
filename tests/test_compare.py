"""experiments/compare.py on small run directories of known figures."""
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import compare


def make(folder, seed, won, rate=1.0):
    """A finished run: the tasks in another order than their names', two updates, an inspection."""
    (folder / "eval").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"seed": seed}}))
    lines = [{"phase": "inspect", "iteration": 1, "step": 0, "time": 1.0, "match_text": 0.5, "match_action": 0.75, "practice_tokens": 4000, "seconds": 60.0},
             *({"phase": "implicit", "iteration": 1, "step": n, "time": 2.0, "grad_norm": rate * n, "tokens": 1000, "seconds": 30.0} for n in (1, 2))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    for split in ("test", "test_unseen"):
        rows = [{"task_id": f"{split}-{n}", "reward": float(x), "steps": ["long"] * 100} for n, x in enumerate(won)]
        (folder / f"eval/final_{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[::-1]))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    won = {"SFT+": ([1, 0, 0, 0], [1, 1, 0, 0]), "StepAgent-Implicit": ([1, 1, 0, 0], [1, 1, 1, 0])}
    return {label: [make(tmp_path / f"{label}{seed}", seed, x) for seed, x in enumerate(both)] for label, both in won.items()}


def test_a_table_pairs_tasks_and_counts_what_was_spent(runs):
    lines, figures = compare.table(runs, "SFT+", ["test", "test_unseen"])
    ours = figures["StepAgent-Implicit"]
    assert ours["test"][0] == 0.625 and ours["minus SFT+"][0] == 0.25 and ours["by seed"] == [0.25, 0.25]
    assert (ours["updates"], ours["million_tokens"], ours["sampled_thousand"], ours["minutes"]) == (2, 0.002, 4, 2)
    assert "| 1 | 50.0 / 75.0 | 50.0 / 75.0 |" in lines


def test_what_is_kept_of_a_run_makes_the_same_table(runs, tmp_path):
    kept = {label: [str(tmp_path / f"kept/{label}{n}.json") for n in (0, 1)] for label in runs}
    for label, paths in runs.items():
        for path, file in zip(paths, kept[label]):
            compare.keep(path, tmp_path / file)
    assert compare.table(kept, "SFT+", ["test", "test_unseen"]) == compare.table(runs, "SFT+", ["test", "test_unseen"])
    assert max(len((tmp_path / f).read_text()) for files in kept.values() for f in files) < 1000


def test_runs_of_other_seeds_or_tasks_are_not_paired(runs, tmp_path):
    other = runs | {"PPO": [make(tmp_path / "a", 0, [1, 0, 0, 0]), make(tmp_path / "b", 2, [1, 0, 0, 0])]}
    with pytest.raises(SystemExit, match="PPO has other seeds or tasks on test than SFT+"):
        compare.rewards(other, "test")
    fewer = runs | {"PPO": [make(tmp_path / "c", 0, [1, 0]), make(tmp_path / "d", 1, [1, 0])]}
    with pytest.raises(SystemExit, match="other seeds or tasks"):
        compare.rewards(fewer, "test")
    with pytest.raises(SystemExit, match="has not played dev"):
        compare.rewards(runs, "dev")


def test_an_interval_covers_the_mean_and_narrows_with_tasks():
    gen = np.random.default_rng(1)
    few, many = ((gen.random((2, n)) < 0.5).astype(float) for n in (20, 2000))
    (a, b), (c, d) = compare.interval(few), compare.interval(many)
    assert a < few.mean() < b and c < many.mean() < d and d - c < (b - a) / 2


def test_the_readme_shows_table2_as_it_was_computed():
    root = Path(__file__).resolve().parent.parent
    results = root / "experiments" / "results" / "table2.json"
    rows = compare.short(json.loads(results.read_text()), ["test", "test_unseen"], "SFT+")
    readme = (root / "README.md").read_text()
    assert len(rows) == 13 and all(f"\n{row}\n" in readme for row in rows)
