"""docs/forking.md: every recipe is applied to a copy of the repository and its command is run."""

import __future__

import inspect
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from ranks import QUIET, WORLD, finish, metrics, same_bits, start, two_layers, weights
from transformers import AutoTokenizer

import envs
import losses
import rollout
import training
import trajectory
from trajectory import prompt_ids

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "forking.md").read_text(encoding="utf-8")
RECIPES = [
    "Another loss",
    "Another step reward",
    "Your own environment",
    "Your own method",
    "Another prompt",
    "Logging to TensorBoard",
]
# What makes the commands of the page end within seconds.
SMALL = ["--experts", "6", "--sft-experts", "6", "--practice-experts", "6", "--sft-epochs", "1"]
SMALL += ["--sft-batch", "2", "--iterations", "1", "--batch", "8", "--max-new-tokens", "6"]
SMALL_HOUSEHOLD = [*SMALL, "--env-options", WORLD, *QUIET]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "two-layers"
    two_layers(folder)
    return folder


@pytest.fixture
def copy(tmp_path, model):
    """The product's files, with a small policy in the place of the pretrained one."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("system", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copytree(model, folder / "models" / "tiny-household")
    return folder


# ------------------------------------------------------------------------------------ the page


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(title: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", section(title), re.DOTALL)


def commands_of(title: str) -> list[list[str]]:
    """The words of every python command."""
    lines = [line for block in blocks(title, "bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


def apply(title: str, folder: Path) -> None:
    """Makes the recipe's edit; a hunk must fit at exactly one place, after the one before."""
    for diff in blocks(title, "diff"):
        header, *lines = diff.splitlines()
        path = folder / header.removeprefix("--- ")
        text = path.read_text()
        for hunk in "\n".join(lines).split("\n@@\n"):
            old, new = [], []
            for line in hunk.splitlines():
                assert line[:1] in (" ", "-", "+"), line
                if line[0] != "+":
                    old.append(line[1:])
                if line[0] != "-":
                    new.append(line[1:])
            before, after = "\n".join(old) + "\n", "\n".join(new) + "\n"
            assert text.count(before) == 1, f"{path.name} has not once:\n{before}"
            text = text.replace(before, after)
        path.write_text(text)
    for kind in ("python", "text"):
        for block in blocks(title, kind):
            header, content = block.split("\n", 1)
            (folder / header.removeprefix("# ")).write_text(content)


def edited(title: str) -> dict[str, int]:
    """File -> lines that go or come."""
    found = {}
    for diff in blocks(title, "diff"):
        header, *lines = diff.splitlines()
        found[header] = sum(line[:1] in ("-", "+") for line in lines)
    for kind in ("python", "text"):
        for block in blocks(title, kind):
            header, content = block.split("\n", 1)
            found[header] = sum(bool(line.strip()) for line in content.splitlines())
    return found


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_edits_one_file_by_fewer_than_30_lines(title):
    [(_, lines)] = edited(title).items()
    assert 0 < lines < 30


def test_the_page_has_these_recipes_and_a_list_of_functions():
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert titles == [*RECIPES, "Use it from your own code"]


# ---------------------------------------------------------------------------------- running a copy


class Recorder:
    """Stands for TensorBoard, which the tests do not install."""

    def __init__(self, folder):
        self.file = open(Path(folder).parent / "scalars.jsonl", "a")  # noqa: SIM115

    def add_scalar(self, name, value, x):
        self.file.write(json.dumps([name, value, x]) + "\n")

    def close(self):
        self.file.close()


def program_of(folder: str, words: list[str]) -> None:
    """A program of the copy, in a process that has imported the libraries but nothing of ours."""
    own = (ROOT, ROOT / "system", ROOT / "benchmarks", ROOT / "tests")
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name != "__main__" and file and Path(file).parent in own:
            del sys.modules[name]
    tensorboard = ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = Recorder
    sys.modules[tensorboard.__name__] = tensorboard
    sys.path[:] = [folder, *(path for path in sys.path if Path(path) not in own)]
    os.chdir(folder)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def call(folder: Path, words: list[str]) -> tuple[int, str]:
    """-> exit code, and what the program said."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    [code] = finish(start(1, log, program_of, str(folder), words))
    return code, log.read_text()


def follow(title: str, folder: Path, *words: str) -> Path:
    """Applies a recipe and runs its last command with these words; -> the run directory."""
    apply(title, folder)
    command = commands_of(title)[-1]
    code, said = call(folder, [*command, *words])
    assert code == 0, said[-3000:]
    return folder / command[command.index("--out") + 1]


def test_another_loss(copy):
    """IPO's first loss is (1 / 2 beta)^2; the same command before and after the edit is refused."""
    [command] = commands_of("Another loss")
    assert call(copy, [*command, *SMALL_HOUSEHOLD])[0] == 0
    before = metrics(copy / "runs/ipo", "implicit")
    assert before[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    apply("Another loss", copy)
    code, said = call(copy, [*command, *SMALL_HOUSEHOLD])
    assert code == 1 and "losses.py" in said.splitlines()[-1] and "--restart" in said
    code, said = call(copy, [*command, *SMALL_HOUSEHOLD, "--restart", "--lr", "1e-4"])
    assert code == 0, said[-3000:]
    after = metrics(copy / "runs/ipo", "implicit")
    assert after[0]["dpo_loss"] == pytest.approx(0.25, abs=1e-3)
    assert after[-1]["margin"] > after[0]["margin"]


def test_another_step_reward(copy):
    """Above 0 where D is surer than even that the action is the expert's."""
    out = follow("Another step reward", copy, *SMALL_HOUSEHOLD)
    rows = [json.loads(line) for line in (out / "iter_1" / "practice.jsonl").open()]
    of_agent = [log_d for row in rows for log_d in row["practice_log_d"]]
    assert 0 < max(row["expert_log_d"] for row in rows) <= 5 and -5 <= min(of_agent) < 0
    assert metrics(out, "inverse")


def test_an_own_environment(copy):
    words = [*SMALL, "--eval-tasks", "2"]
    out = follow("Your own environment", copy, *words)
    last = metrics(out, "eval")[-1]
    assert (last["name"], last["split"], last["tasks"]) == ("final", "test", 2)
    assert last["secondary"] == {} and set(last["by_type"]) == {"door"}
    demonstrations = [json.loads(line) for line in (out / "experts.jsonl").open()]
    assert [one["reward"] for one in demonstrations] == [1.0] * 6
    code, said = call(copy, commands_of("Your own environment")[0])
    assert code == 0 and "200 tasks, 200 with an expert" in said


def test_an_own_method(copy):
    out = follow("Your own method", copy, *SMALL_HOUSEHOLD)
    assert [row["phase"] for row in metrics(out)][:4] == ["sft"] * 3 + ["inspect"]
    updates = metrics(out, "mistakes")
    assert updates and all(row["nll"] > 0 for row in updates)
    assert not same_bits(weights(out / "policy"), weights(out / "sft" / "policy"))
    code, said = call(copy, ["stepagent.py", "--method", "mistakes", "--beta", "1"])
    assert code == 1 and "--beta is not read by --method mistakes" in said


def test_another_prompt(copy):
    """Every trajectory gets longer by the prompt."""
    out = follow("Another prompt", copy, *SMALL_HOUSEHOLD)
    bare = ["stepagent.py", "--model", "models/tiny-household", "--out", "runs/bare"]
    assert call(copy, [*bare, *SMALL_HOUSEHOLD])[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(copy / "models" / "tiny-household")
    rules = {"role": "user", "content": (copy / "rules.txt").read_text().strip()}
    prompt = [rules, {"role": "assistant", "content": "OK"}]
    longer = len(prompt_ids(tokenizer, prompt, "x")) - len(prompt_ids(tokenizer, [], "x"))
    rows, bare_rows = metrics(out, "sft"), metrics(copy / "runs/bare", "sft")
    assert longer > 20 and len(rows) == 3
    for row, bare_row in zip(rows, bare_rows, strict=True):
        assert row["tokens"] == bare_row["tokens"] + 2 * longer


def test_logging_to_tensorboard(copy):
    """Every number of the log, under a name and a step of its own."""
    words = [*SMALL_HOUSEHOLD, "--eval-each", "dev", "--eval-tasks", "2"]
    out = follow("Logging to TensorBoard", copy, *words)
    scalars = [tuple(json.loads(line)) for line in (out / "scalars.jsonl").open()]
    expected = []
    for row in map(json.loads, (out / "metrics.jsonl").open()):
        figures = {name: value for name, value in row.items() if name not in ("step", "time")}
        del figures["iteration"]
        group, x = f"{row['phase']}_{row.get('split', '')}", row["iteration"]
        if "lr" in row:
            group, x = f"{row['phase']}_{row['iteration']}", row["step"]
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                expected.append((f"{group}/{name}", value, x))
    assert scalars == expected
    assert ("sft_0/nll", metrics(out, "sft")[2]["nll"], 2) in scalars
    points = [(name, x) for name, _, x in scalars]
    assert len(set(points)) == len(points)


# --------------------------------------------------------------------------- use it from other code

MODULES = {
    "trajectory.py": trajectory,
    "envs.py": envs,
    "rollout.py": rollout,
    "losses.py": losses,
    "training.py": training,
}


def promised() -> dict[str, dict]:
    """File -> function -> what the page says of it."""
    listing, _ = blocks("Use it from your own code", "python")
    found = {}
    for part in re.split(r"^# ", listing, flags=re.MULTILINE)[1:]:
        file, source = part.split("\n", 1)
        names = {}
        flags = __future__.annotations.compiler_flag
        exec(compile(source, "docs/forking.md", "exec", flags), names)
        del names["__builtins__"]
        found[file] = names
    return found


def signature(function) -> tuple[list, str]:
    """([(name, kind, annotation, default)], what it returns)."""
    found = inspect.signature(function)
    return list(found.parameters.values()), found.return_annotation


@pytest.mark.parametrize("file", MODULES)
def test_functions_have_the_signatures_of_the_page(file):
    for name, stub in promised()[file].items():
        expected, returns = signature(stub)
        parameters, real_returns = signature(getattr(MODULES[file], name))
        assert real_returns == returns, name
        for parameter, real in zip(expected, parameters, strict=True):
            if parameter.default is ...:
                # Some default, which is not written as an expression.
                assert real.default is not inspect.Parameter.empty
                real = real.replace(default=...)
            assert real == parameter, name


def test_the_list_of_functions_is_whole():
    listed = promised()
    assert set(listed) == set(MODULES)
    everywhere = set().union(*listed.values())
    assert set(rollout.__all__) <= everywhere and "make_env" in listed["envs.py"]
    functions = inspect.getmembers(losses, inspect.isfunction)
    for name, function in functions:
        if function.__module__ == "losses" and name.endswith(("_loss", "_reward")):
            assert name in listed["losses.py"]


def test_the_example_runs(copy):
    _, example = blocks("Use it from your own code", "python")
    header, content = example.split("\n", 1)
    (copy / header.removeprefix("# ")).write_text(content)
    [command] = commands_of("Use it from your own code")
    code, said = call(copy, command)
    assert code == 0, said[-3000:]
    steps, leaves = re.findall(r"\[(\d+)\]\)", said)
    assert int(leaves) == 3 * int(steps) > 6
