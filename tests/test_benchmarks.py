"""Both reflections train on every benchmark, from small files in its official format."""

import pytest
from official import (
    NEEDS_PACKAGES,
    QA_FILES,
    shop_row,
    write_mind2web,
    write_questions,
    write_webshop,
)
from ranks import QUIET, metrics, run

from stepagent import METHODS

# Environment -> the scores that it has beside success.
BENCHMARKS = {
    "webshop": {"spacy_nouns"},
    "mind2web": {"operation_f1", "step_success"},
    **{name: {"f1"} for name in QA_FILES},
}


@pytest.mark.parametrize("method", ["stepagent-implicit", "stepagent-inverse"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_trains_from_its_own_files(tmp_path, name, method):
    folder = tmp_path / "data"
    folder.mkdir()
    options = f"data={folder}"
    if name == "webshop":
        pytest.importorskip("Stemmer", reason=NEEDS_PACKAGES)
        pytest.importorskip("rapidfuzz", reason=NEEDS_PACKAGES)
        write_webshop(folder, [shop_row(number) for number in range(30)])
    elif name == "mind2web":
        write_mind2web(folder)
        options += " dev=0"
    else:
        write_questions(folder, name)
    words = ["--env", name, "--env-options", options, "--method", method, "--iterations", "1"]
    out = run(tmp_path / "x", *QUIET, "--eval-splits", "test", "--eval-tasks", "2", *words)
    last = metrics(out, "eval")[-1]
    assert last["split"] == "test" and last["tasks"] in (1, 2)
    assert set(last["secondary"]) == BENCHMARKS[name]
    reflection = METHODS[method].iteration.__name__
    assert {row["phase"] for row in metrics(out)} >= {"sft", "inspect", reflection, "eval"}
    report = (out / "report.md").read_text()
    assert all(score in report for score in BENCHMARKS[name])
