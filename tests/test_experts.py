"""Where expert trajectories and the prompt come from."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ranks import QUIET, commands, finish, run, start

import envs
from stepagent import Config
from system.experts import give_prompt, load_experts, product_files, read_prompt
from system.ranks import Ranks
from system.run_dir import RunDir
from trajectory import InputError, Step, Trajectory

ROOT = Path(__file__).resolve().parent.parent
OPENING = [{"role": "user", "content": "Rules."}, {"role": "assistant", "content": "OK"}]


def run_dir(out: Path, **options) -> RunDir:
    return RunDir(Config(out=str(out), **options), Ranks(), [])


@pytest.fixture
def world():
    """A new household, whose parts a test may replace."""
    return envs.make_env("household")


@pytest.fixture(scope="module")
def plays():
    env = envs.make_env("household")
    return [env.expert(f"train-{number}") for number in range(6)]


def names(trajectories) -> list[str]:
    return [trajectory.task_id for trajectory in trajectories]


# --------------------------------------------------------------------------- trajectories of a file


def saved(path: Path, trajectories: list[Trajectory]) -> str:
    envs.save_trajectories(str(path), trajectories)
    return str(path)


def test_the_first_trajectories_of_a_file_are_taken(tmp_path, world, plays):
    path = saved(tmp_path / "given.jsonl", plays)
    all_of_it = load_experts(run_dir(tmp_path / "x", expert=path), world, False)
    assert all_of_it == plays
    two = load_experts(run_dir(tmp_path / "y", expert=path, experts=2), world, False)
    assert two == plays[:2] and not (tmp_path / "x" / "experts.jsonl").exists()


def test_a_file_is_sifted_by_the_worlds_own_measure(tmp_path, world, plays, capsys):
    path = saved(tmp_path / "given.jsonl", plays)
    world.right = lambda experts: [one for one in experts if one.task_id != "train-1"]
    experts = load_experts(run_dir(tmp_path / "x", expert=path, experts=3), world, False)
    assert names(experts) == ["train-0", "train-2", "train-3"]
    assert "1 of 6 plays whose answer is no exact match are left out" in capsys.readouterr().out
    world.right = lambda experts: []
    with pytest.raises(
        InputError, match="given.jsonl: all 6 plays whose answer is no exact match are left out"
    ):
        load_experts(run_dir(tmp_path / "y", expert=path), world, False)


def test_tasks_that_are_played_must_be_tasks_of_the_environment(tmp_path, world, plays, capsys):
    strange = Trajectory("a task of ETO's", [], plays[0].steps, 1.0)
    path = saved(tmp_path / "given.jsonl", [*plays, strange])
    says = "\"a task of ETO's\" is no task of household, but dpo plays .* such as .'train-0'."
    with pytest.raises(InputError, match=says):
        load_experts(run_dir(tmp_path / "x", expert=path, method="dpo"), world, True)
    # Nobody plays it.
    assert len(load_experts(run_dir(tmp_path / "y", expert=path), world, False)) == 7
    told = '1 of 7 plays, such as "a task of ETO\'s", are of no task that household has'
    assert told in capsys.readouterr().out
    few = run_dir(tmp_path / "z", expert=path, experts=6)
    assert load_experts(few, world, True) == plays


def test_a_file_without_any_success_is_refused_and_failures_in_it_are_named(
    tmp_path, world, plays, capsys
):
    failures = [replace(play, reward=0.0) for play in plays[:2]]
    path = saved(tmp_path / "given.jsonl", [plays[2], *failures, replace(plays[3], reward=0.1)])
    assert len(load_experts(run_dir(tmp_path / "x", expert=path), world, False)) == 4
    says = "given.jsonl: 2 of 4 trajectories have reward 0, 'train-0' first; they are imitated"
    assert says in capsys.readouterr().out
    load_experts(run_dir(tmp_path / "y", expert=path, experts=1), world, False)
    assert capsys.readouterr().out == ""
    path = saved(tmp_path / "failed.jsonl", failures)
    with pytest.raises(InputError, match="failed.jsonl: all 2 rewards are 0; give successful"):
        load_experts(run_dir(tmp_path / "z", expert=path), world, False)


def test_a_world_finds_its_tasks_under_the_names_of_a_file(tmp_path, world, plays, capsys):
    path = saved(tmp_path / "given.jsonl", plays)
    numbers = {play.task_id: f"train-{5 - i // 2}" for i, play in enumerate(plays)}
    world.task_of = lambda expert: numbers.get(expert.task_id, expert.task_id)
    experts = load_experts(run_dir(tmp_path / "x", expert=path, method="dpo"), world, True)
    assert [(one.task_id, one.steps) for one in experts] == [
        (f"train-{5 - i}", plays[2 * i].steps) for i in range(3)
    ]
    assert "given.jsonl: 3 of 6 plays that repeat a task are left out" in capsys.readouterr().out


def test_nobody_trains_on_test_tasks_unasked(tmp_path, world, plays, capsys):
    tested = [world.expert(name) for name in ("test-0", "test_unseen-4", "dev-1")]
    path = saved(tmp_path / "given.jsonl", [*plays[:2], *tested])
    experts = load_experts(run_dir(tmp_path / "x", expert=path), world, False)
    assert names(experts) == ["train-0", "train-1", "dev-1"]
    said = capsys.readouterr().out
    assert "given.jsonl: 2 of 5 plays of test tasks, unless --train-on-test, are left out" in said
    assert "given.jsonl: 1 of 3 plays are of dev tasks" in said
    asked = run_dir(tmp_path / "y", expert=path, train_on_test=True)
    assert len(load_experts(asked, world, False)) == 5
    # It only looks like a test task.
    world.task_of = lambda expert: None if expert.task_id == "test-0" else expert.task_id
    kept = load_experts(run_dir(tmp_path / "v", expert=path), world, False)
    assert names(kept) == ["train-0", "train-1", "test-0", "dev-1"]
    del world.task_of
    # A world may train and test on a task.
    world.splits = world.splits | {"train": [*world.splits["train"], "test-0"]}
    assert len(load_experts(run_dir(tmp_path / "z", expert=path), world, False)) == 4
    only = saved(tmp_path / "only.jsonl", tested[1:2])
    with pytest.raises(InputError, match="all 1 plays of test tasks, unless --train-on-test, are"):
        load_experts(run_dir(tmp_path / "w", expert=only), world, False)


def test_a_malformed_file_ends_the_program_with_one_line(tmp_path):
    (tmp_path / "given.jsonl").write_text('{"task_id": "x"\n')
    words = ["--expert", str(tmp_path / "given.jsonl"), "--out", str(tmp_path / "run")]
    assert finish(start(1, tmp_path / "log", commands, [({}, words)])) == [1]
    [line] = (tmp_path / "log").read_text().splitlines()
    assert line.startswith(f"error: {tmp_path}/given.jsonl, line 1: broken JSON")


def test_a_mistake_does_not_occupy_the_run_directory(tmp_path, plays):
    """The same command with the path corrected must work."""
    words = [*QUIET, "--method", "base", "--expert"]
    with pytest.raises(InputError, match="tipo.jsonl: cannot be read"):
        run(tmp_path / "x", *words, str(tmp_path / "tipo.jsonl"))
    run(tmp_path / "x", *words, saved(tmp_path / "right.jsonl", plays))


# ------------------------------------------------------------------------- the environment's expert


def test_the_expert_shows_train_tasks_from_everywhere_once(tmp_path, world):
    here = run_dir(tmp_path / "x", experts=5)
    experts = load_experts(here, world, False)
    assert names(experts) == envs.some(world.splits["train"], 5)
    world.expert = None
    # The second time they come from the run directory.
    assert load_experts(here, world, False) == experts


def test_what_the_expert_does_not_solve_in_time_is_left_out(tmp_path, world, plays, capsys):
    most = sorted(len(play.steps) for play in plays)[2]
    expert = world.expert
    world.max_steps = lambda task: most
    world.splits = world.splits | {"train": names(plays)}
    world.expert = lambda task: None if task == "train-0" else expert(task)
    fits = [play.task_id for play in plays[1:] if len(play.steps) <= most]
    experts = load_experts(run_dir(tmp_path / "x", experts=0), world, False)
    assert names(experts) == fits and 0 < len(fits) < 5
    says = f"6 tasks; {6 - len(fits)} that are not solved, or in more steps than allowed, are left"
    assert says in capsys.readouterr().out
    for shows in (lambda task: None, lambda task: Trajectory(task, [], [Step("o", "a")], 0.5)):
        world.expert = shows
        with pytest.raises(InputError, match="household: no expert trajectory; give a file with"):
            load_experts(run_dir(tmp_path / "y"), world, False)


@pytest.mark.parametrize(
    "answer, says",
    [
        (Trajectory("train-0", [], [Step("o", "Action: a")], 70), "the reward is 70; it must be"),
        (Trajectory("train-0", [], [Step("o", "Action: a")], float("nan")), "the reward is nan"),
        (Trajectory("elsewhere", [], [Step("o", "Action: a")], 1.0), "a Trajectory of this task"),
        (["o", "a"], "must be a Trajectory of this task"),
        (Trajectory("train-0", [], [Step("\ud83d", "Action: a")], 1.0), "half of a surrogate pair"),
        (Trajectory("train-0", [], [Step("o", None)], 1.0), "an action is not text but NoneType"),
    ],
)
def test_what_the_environments_expert_shows_is_checked(tmp_path, world, answer, says):
    world.splits = world.splits | {"train": ["train-0"]}
    world.expert = lambda task: answer
    with pytest.raises(InputError, match="the expert of the environment, task train-0: ") as error:
        load_experts(run_dir(tmp_path / "x"), world, False)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


def test_numbers_of_numpy_are_numbers(tmp_path, world):
    world.splits = world.splits | {"train": ["train-0"]}
    reward = np.float32(1)
    world.expert = lambda task: Trajectory(task, [], [Step("o", "Action: a")], reward)
    [shown] = load_experts(run_dir(tmp_path / "x"), world, False)
    assert type(shown.reward) is float and shown.reward == 1


def test_experts_of_a_slow_world_keep_their_order(tmp_path, world):
    world.slow = True
    experts = load_experts(run_dir(tmp_path / "x", experts=20), world, False)
    assert names(experts) == envs.some(world.splits["train"], 20)


# -------------------------------------------------------------------------------------- the prompt


def shown(prompt: list[dict]) -> list[Trajectory]:
    return [Trajectory(name, prompt, [Step("o", "Action: a")]) for name in "ab"]


@pytest.mark.parametrize("words", ["Rules.", f"\n{json.dumps(OPENING)}", " Rules.\n"])
def test_a_prompt_file_has_messages_or_the_instruction(tmp_path, words):
    (tmp_path / "prompt").write_text(words)
    assert read_prompt(str(tmp_path / "prompt")) == OPENING


def test_a_prompt_file_of_another_system(tmp_path):
    """With a byte order mark, and with its ends of lines."""
    for text, content in ((json.dumps(OPENING), "Rules."), ("Rules.\r\nMore.", "Rules.\nMore.")):
        (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_prompt(str(tmp_path / "prompt"))[0]["content"] == content


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "empty; give the instruction, or a JSON list of chat messages"),
        (" \n", "empty"),
        ("[{", "broken JSON"),
        ('["Rules."]', 'entry 0: is not {"role": text, "content": text}'),
        (json.dumps([*OPENING, {"role": "user"}]), "entry 2: is not"),
        (json.dumps([{"role": "user", "content": 3}]), "entry 0: 'content' is not text but int"),
        (json.dumps([OPENING[0] | {"name": "x"}]), "entry 0: is not"),
        # What an expert file is asked for, too.
        (json.dumps(OPENING[:1]), "must be an optional system message, then user and assistant"),
        (json.dumps(OPENING[::-1]), "must be an optional system message"),
        ('[{"role": "user", "content": "\\ud83d"}]', "half of a surrogate pair"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_prompt_file_is_refused(tmp_path, text, says):
    if text is not None:
        (tmp_path / "prompt").write_text(text)
    with pytest.raises(InputError, match="/prompt[:,] ") as error:
        read_prompt(str(tmp_path / "prompt"))
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_prompt_is_the_worlds_or_none(world):
    experts = shown([])
    assert give_prompt(Config(prompt="full"), world, experts) == envs.prompt_messages(world)
    assert [one.prompt for one in experts] == [envs.prompt_messages(world)] * 2
    assert give_prompt(Config(prompt="none"), world, experts) == []
    assert [one.prompt for one in experts] == [[], []]


@pytest.mark.parametrize("prompts", [[OPENING, []], [[], OPENING], [OPENING, OPENING[:1]]])
def test_the_rows_of_a_file_share_one_prompt(tmp_path, world, prompts):
    """Which of them the agent would play with, nobody could tell."""
    experts = shown(OPENING)
    for expert, prompt in zip(experts, prompts):
        expert.prompt = prompt
    names_of = [repr(one.task_id) for one in experts]
    says = f"given.jsonl: {names_of[1]} has another prompt than {names_of[0]}, .* or --prompt-file"
    with pytest.raises(InputError, match=says):
        give_prompt(Config(prompt="none", expert="given.jsonl"), world, experts)
    (tmp_path / "prompt").write_text("Be brief.")
    config = Config(expert="given.jsonl", prompt_file=str(tmp_path / "prompt"))
    prompt = give_prompt(config, world, experts)
    assert prompt[0]["content"] == "Be brief." and [one.prompt for one in experts] == [prompt] * 2


def test_an_expert_files_prompt_gets_the_worlds_example(world):
    """As in section 6.4, and the same in training and evaluation."""
    experts = shown(OPENING)
    prompt = give_prompt(Config(prompt="full", expert="given.jsonl"), world, experts)
    text = f"Rules.\n\nHere is an example.\n{world.example}"
    assert prompt == [{"role": "user", "content": text}, OPENING[1]]
    assert [one.prompt for one in experts] == [prompt] * 2
    assert OPENING[0]["content"] == "Rules."
    told = [{"role": "system", "content": "For example, be brief."}, *OPENING]
    config = Config(prompt="full", expert="given.jsonl")
    assert give_prompt(config, world, shown(told)) == [told[0], *prompt]
    # A file without prompts gets the world's.
    assert give_prompt(config, world, shown([])) == envs.prompt_messages(world)
    world.example = ""
    assert give_prompt(config, world, shown(OPENING)) == OPENING


HAS_ONE = [
    [{"role": "user", "content": "Rules.\nExample:\nAction: look"}, OPENING[1]],
    [
        *OPENING,
        {"role": "user", "content": "A task."},
        {"role": "assistant", "content": "Action: a"},
    ],
    [{"role": "system", "content": "Rules."}],
]


@pytest.mark.parametrize("choice, given", [("none", OPENING), *(("full", one) for one in HAS_ONE)])
def test_an_expert_files_prompt_stands(world, choice, given):
    experts = shown(given)
    assert give_prompt(Config(prompt=choice, expert="given.jsonl"), world, experts) == given
    assert [one.prompt for one in experts] == [given] * 2


@pytest.mark.parametrize("expert", ["", "given.jsonl"])
def test_a_prompt_file_counts_more_than_any_other_prompt(tmp_path, world, expert):
    (tmp_path / "prompt").write_text("Be brief.")
    config = Config(prompt="full", expert=expert, prompt_file=str(tmp_path / "prompt"))
    experts = shown(OPENING)
    prompt = give_prompt(config, world, experts)
    assert prompt[0]["content"] == "Be brief." and [one.prompt for one in experts] == [prompt] * 2


# ---------------------------------------------------------------------------------- what is hashed


def test_the_code_of_a_run_is_the_product_and_its_world():
    files = {path.relative_to(ROOT).as_posix() for path in product_files(Config(env="hotpotqa"))}
    assert {"stepagent.py", "losses.py", "baselines.py", "system/ranks.py"} <= files
    assert "benchmarks/qa.py" in files and "benchmarks/household.py" not in files
    assert not any(name.startswith(("tests/", "experiments/")) for name in files)
    assert Path(__file__) in product_files(SimpleNamespace(env=f"{__file__}:World"))


# -------------------------------------------------------------------- options and tasks of a world


def test_some_tasks_come_from_everywhere_in_the_list():
    tasks = [f"{kind}-{number}" for kind in "abcd" for number in range(100)]
    few = envs.some(tasks, 40)
    assert len(few) == 40 and sorted(few, key=tasks.index) == few and envs.some(tasks, 0) == tasks
    for kind in "abcd":
        assert sum(task.startswith(kind) for task in few) >= 3


@pytest.mark.parametrize(
    "text, options",
    [
        ("", {}),
        ("a=1 b=x,y c=0.5 d=-2", {"a": 1, "b": "x,y", "c": 0.5, "d": -2}),
        ("a=b=c", {"a": "b=c"}),
    ],
)
def test_environment_options(text, options):
    assert envs.env_options(text) == options
