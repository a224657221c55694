"""experiments/bench.py, run as a program: it sets the number of threads when it is imported."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "experiments/bench.py", "--quick", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_our_own_seconds_need_no_peers():
    done = bench("--ours", "--only", "update", "inspect", "--shape", "reference")
    assert done.returncode == 0, done.stderr
    figures = r"median \d+\.\d+ s, least \d+\.\d+ s"
    for K in (1, 3):
        for part in ("update", "inspect"):
            assert re.search(f"^reference {part} K={K}: {figures}$", done.stdout, re.M)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Folder and figures of a small run beside the peers."""
    pytest.importorskip("trl", reason="experiments/requirements.txt is not installed")
    out = tmp_path_factory.mktemp("bench")
    parts = ("update", "inspect", "episodes")
    done = bench("--out", str(out), "--shape", "reference", "--only", *parts)
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "bench.json").read_text(encoding="utf-8"))


def test_peers_do_the_same_work(measured):
    """TRL's first update agrees with ours, and its greedy episodes have the same tokens."""
    _, data = measured
    updates = data["parts"]["update"]["reference"]
    assert [line["K"] for line in updates] == [1, 1, 3, 3]
    assert all(line["apart"] < 1e-5 for line in updates)
    episodes = data["parts"]["episodes"]["reference"]
    assert len(episodes) == 3
    assert all(line["setting"].endswith("same tokens") for line in episodes)
    # A peer that shares nothing reads every prefix, K times; one that shares reads no more than us.
    for line in data["parts"]["inspect"]["reference"]:
        by_hand = "by hand" in line["figure"]
        assert by_hand or line["peer"]["tokens"] >= line["ours"]["tokens"]


def test_the_table_has_every_line_and_whole_iterations(measured):
    out, data = measured
    rows = (out / "bench.md").read_text(encoding="utf-8").splitlines()
    rows = [row for row in rows if row.startswith("| reference |")]
    lines = sum(len(data["parts"][part]["reference"]) for part in data["parts"])
    # One whole iteration for each update.
    assert len(rows) == lines + 4
    assert sum("whole iteration" in row for row in rows) == 4


def test_a_table_is_of_one_machine(measured):
    out, data = measured
    other = data | {"machine": data["machine"] | {"cpu": "another"}}
    (out / "bench.json").write_text(json.dumps(other), encoding="utf-8")
    done = bench("--out", str(out), "--only", "update", "--shape", "reference")
    (out / "bench.json").write_text(json.dumps(data), encoding="utf-8")
    assert done.returncode == 1 and "of another machine or other versions" in done.stderr


def test_a_table_without_its_figures_is_not_overwritten(measured, tmp_path):
    (tmp_path / "bench.md").write_text("all parts", encoding="utf-8")
    done = bench("--out", str(tmp_path), "--only", "update", "--shape", "reference")
    assert done.returncode == 1 and "would lose its other parts" in done.stderr
    assert (tmp_path / "bench.md").read_text(encoding="utf-8") == "all parts"
