"""experiments/faults.py, a few faults of each kind. The long version is the script itself."""

import json

import pytest
from ranks import two_layers
from safetensors.torch import load_file, save_file

from experiments import faults


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    two_layers(folder / "model")
    return folder


def launch_whole(work):
    whole = work / "whole-stepagent-implicit-1"
    faults.end(faults.launch(work, whole), work, whole)
    return whole


def test_runs_that_are_killed_end_as_if_they_were_not(work):
    rows = faults.kills(work, 3)
    assert len(rows) == 6
    for row, places in zip(rows[::2], rows[1::2]):
        assert row.endswith("| weights to the bit, log the same, 0 lines doubled |")
        assert "after " in places


def test_damaged_checkpoints_and_full_disks_change_nothing(work):
    whole = launch_whole(work)
    [row] = faults.damage(work, whole, 2)
    assert row.endswith(
        "| 1 | 2 | named and the one before used, then weights and log to the bit: 2 |"
    )
    [row] = faults.full_disk(work, whole)
    if "no permission" in row:
        pytest.skip("mounting a small file system takes root")
    assert "`error: " in row and "weights to the bit, log the same, 0 lines doubled" in row


def test_a_difference_is_seen(work, tmp_path):
    whole = launch_whole(work)
    assert faults.compare(whole, whole) == "weights to the bit, log the same, 0 lines doubled"
    for folder in ("policy", "sft/policy"):
        (tmp_path / folder).mkdir(parents=True)
        tensors = load_file(whole / folder / "model.safetensors")
        name = min(tensors)
        tensors[name] = tensors[name] + 1.0
        save_file(tensors, tmp_path / folder / "model.safetensors")
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, lines[0]]))
    outcome = faults.compare(whole, tmp_path)
    assert outcome.startswith("weights within 1.0e+00 (reflection moved them by ")
    assert outcome.endswith("log other, 1 lines doubled")


def test_where_a_run_was_killed(tmp_path):
    assert faults.place_of(tmp_path) == "after nothing"
    (tmp_path / "state.json").write_text(json.dumps({"done": ["sft", "eval_0"]}))
    (tmp_path / "checkpoints/00000002").mkdir(parents=True)
    assert faults.place_of(tmp_path) == "after eval_0, with checkpoints"
    (tmp_path / "checkpoints/00000003.tmp").mkdir()
    assert faults.place_of(tmp_path) == "after eval_0, in a checkpoint"
