"""The command line that is made from a dataclass."""

import json
import math
from dataclasses import dataclass
from typing import Literal

import pytest

from system.options import check_ranges, default, documented, parse
from trajectory import InputError


@dataclass
class Options:
    """Options of some program."""

    # ---- what to run
    # which row of the table
    method: Literal["fast", "slow", "still", "asleep"] = "fast"
    # a folder
    model: str = "tiny"
    # defaults for real models or for tiny ones
    preset: Literal["auto", "real", "tiny"] = "auto"

    # ---- learning
    # learning rate (paper), in
    # 100% of all updates
    rate: float = default(0.1, tiny=1.0)
    # passes over the data
    passes: int = default(4, least=0)
    # of all updates
    share: float = default(0.5, above=0, most=1)
    # recompute activations
    recompute: bool = default(True, tiny=False)


READS = {"fast": ["rate"], "slow": ["rate", "passes"], "still": [], "asleep": []}


def parsed(*words: str) -> Options:
    return parse(Options, list(words), "A program.", READS)


def test_words_become_values_of_the_fields_types():
    words = "--method slow --model some/folder --rate 1e-3 --passes 7 --recompute false"
    assert parsed(*words.split()) == Options("slow", "some/folder", "auto", 1e-3, 7, 0.5, False)


@pytest.mark.parametrize(
    "words, value",
    [("--recompute", True), ("--recompute TRUE", True), ("--recompute=False", False)],
)
def test_a_flag_alone_is_true(words, value):
    assert parsed("--model", "some/folder", *words.split()).recompute is value


@pytest.mark.parametrize(
    "words",
    [
        "--no-such-flag 1",
        # Neither misspelt nor cut short.
        "--pases 3",
        "--pass 3",
        "--method magic",
        "--rate fast",
        "--passes 1.5",
        "--recompute maybe",
        "--passes",
        "stray",
    ],
)
def test_a_bad_command_line_exits_with_an_error(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*words.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code != 0 and "error:" in last


def test_an_option_that_the_method_does_not_read_is_refused():
    says = "^--passes is not read by --method fast, only by slow; leave it out$"
    with pytest.raises(InputError, match=says):
        # The default value is refused, too: it was asked for.
        parsed("--passes", "4")
    with pytest.raises(InputError, match="--rate is not read by --method still, only by fast, slo"):
        parsed("--method", "still", "--rate", "1")
    # What nobody lists, all read.
    parsed("--method", "still", "--recompute", "true")


@pytest.mark.parametrize(
    "values, says",
    [
        ({"passes": -1}, "--passes -1: must be at least 0"),
        ({"share": 0.0}, "--share 0.0: must be above 0"),
        ({"share": -0.5}, "--share -0.5: must be above 0"),
        ({"share": 1.5}, "--share 1.5: must be at most 1"),
        # Without bounds of its own.
        ({"rate": math.nan}, "--rate nan: must be a finite number"),
        ({"share": math.inf}, "--share inf: must be a finite number"),
    ],
)
def test_a_number_out_of_its_range_is_named_with_the_range(values, says):
    with pytest.raises(InputError, match=f"^{says}$"):
        check_ranges(Options(**values))


def test_the_ends_of_a_range_belong_to_it():
    check_ranges(Options(passes=0, share=1.0, rate=-1e9))
    check_ranges(Options(passes=10**400, share=1e-300))


# ---------------------------------------------------------------------------------------- presets


def folder_with(tmp_path, name: str, text: str) -> str:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(text)
    return str(tmp_path / name)


def test_tiny_models_have_their_own_defaults():
    assert (parsed().rate, parsed().recompute, parsed().passes) == (1.0, False, 4)
    real = parsed("--model", "some/model")
    assert (real.rate, real.recompute, real.passes) == (0.1, True, 4)
    assert parsed("--rate", "0.5").rate == 0.5
    assert parsed("--model", "some/model", "--rate", "1.0").rate == 1.0


def test_a_field_of_the_models_config_chooses_the_preset_and_no_name(tmp_path):
    marked = folder_with(tmp_path, "copy", json.dumps({"stepagent_preset": "tiny"}))
    assert parsed("--model", marked).rate == 1.0
    unmarked = folder_with(tmp_path, "tiny-model", json.dumps({"model_type": "llama"}))
    assert parsed("--model", unmarked).rate == 0.1
    (tmp_path / "tiny").mkdir()
    assert parsed("--model", str(tmp_path / "tiny")).rate == 0.1


def test_a_preset_that_is_given_counts(tmp_path):
    assert parsed("--preset", "real").rate == 0.1
    assert parsed("--preset", "tiny", "--model", "some/model").rate == 1.0
    marked = folder_with(tmp_path, "copy", json.dumps({"stepagent_preset": "tiny"}))
    assert parsed("--model", marked, "--preset", "real").rate == 0.1
    assert parsed("--model", marked, "--preset", "auto").rate == 1.0


@pytest.mark.parametrize("text", ["{", "[]", '"tiny"', ""])
def test_a_models_config_that_is_no_object_is_refused(tmp_path, text):
    broken = folder_with(tmp_path, "broken", text)
    says = "broken/config.json: (not a JSON object|broken JSON); download the model again"
    with pytest.raises(InputError, match=says):
        parsed("--model", broken)


# ------------------------------------------------------------------------------------------- help


def test_the_comment_above_a_field_is_its_help():
    assert documented(Options) == {
        "what to run": {
            "method": "which row of the table",
            "model": "a folder",
            "preset": "defaults for real models or for tiny ones",
        },
        "learning": {
            "rate": "learning rate (paper), in 100% of all updates",
            "passes": "passes over the data",
            "share": "of all updates",
            "recompute": "recompute activations",
        },
    }


def test_help_shows_groups_both_defaults_and_who_reads_an_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "A program." in shown
    assert shown.index("what to run: --method") < shown.index("learning: --rate")
    assert "--rate FLOAT learning rate (paper), in 100% of all updates (default: 0.1;" in shown
    assert "(default: 0.1; tiny: 1.0; only fast, slow)" in shown
    assert "--passes INT passes over the data (default: 4; only slow)" in shown
    assert "--recompute [BOOL] recompute activations (default: True; tiny: False)" in shown
    assert "--method {fast,slow,still,asleep} which row" in shown
