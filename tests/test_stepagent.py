"""Algorithm 1: the command line, the phases of StepAgent, evaluation, and a whole run."""

import json
import shutil
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from forged import opened
from ranks import (
    QUIET,
    commands,
    finish,
    metrics,
    run,
    same_bits,
    start,
    weights,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import chat_template_utils

import envs
import stepagent
import system.run_dir
import training
from benchmarks import household
from stepagent import METHODS, Config, prepare, rounds
from system.model import make_tiny
from trajectory import InputError, Step, Trajectory

REAL = ["--model", "some/model"]
ONE = [*QUIET, "--iterations", "1"]


def practice_rows(out: Path, i: int = 1) -> list[dict]:
    return [json.loads(line) for line in (out / f"iter_{i}" / "practice.jsonl").open()]


# -------------------------------------------------------------------------------- the command line


def test_the_defaults_are_the_papers():
    real = stepagent.parse(REAL)
    sft = (real.sft_lr, real.sft_batch, real.sft_epochs, real.warmup)
    assert sft == (1e-5, 64, 4, 0.03)
    assert (real.lr, real.batch, real.epochs, real.beta) == (5e-7, 16, 1, 0.1)
    assert (real.practice, real.temperature, real.grad_norm) == (3, 1.0, 1.0)
    assert (real.clip, real.entropy, real.kl, real.ppo_passes) == (0.2, 0.01, 0.0, 2)
    assert (real.gamma, real.gae_lambda, real.value_lr) == (1.0, 0.95, 1e-4)
    assert (real.d_epochs, real.d_scores, real.expert_in_group) == (2, "learnt", False)
    assert (real.dtype, real.prompt, real.checkpointing) == ("bfloat16", "full", "auto")
    assert (real.max_new_tokens, real.dpo_nll, real.eval_splits) == (512, 0.0, "test")


def test_tiny_has_its_own_column_of_defaults():
    small = stepagent.parse([])
    assert (small.model, small.method) == ("tiny", "stepagent-implicit")
    assert (small.sft_lr, small.lr, small.beta, small.batch) == (2e-3, 5e-5, 1.0, 64)
    assert (small.dtype, small.prompt, small.checkpointing) == ("float32", "none", "false")


@pytest.mark.parametrize("folder", ["tiny-household", "tiny-household-small"])
def test_our_pretrained_models_are_tiny_by_their_config(folder):
    root = Path(stepagent.__file__).parent
    assert stepagent.parse(["--model", str(root / "models" / folder)]).sft_lr == 2e-3


@pytest.mark.parametrize(
    "method, iterations",
    [
        ("base", 0),
        ("sft", 0),
        ("sft+", 3),
        ("ppo", 7),
        ("dpo", 1),
        ("rft", 1),
        ("spin", 3),
        ("nat", 1),
        ("eto", 3),
        ("stepagent-implicit", 3),
        ("stepagent-inverse", 7),
    ],
)
def test_the_papers_peaks_are_the_default_iterations(method, iterations):
    config = stepagent.parse([*REAL, "--method", method])
    assert rounds(config, METHODS[method]) == iterations
    # The default of tiny models counts only where a method has iterations.
    config = stepagent.parse(["--method", method])
    assert rounds(config, METHODS[method]) == (iterations if iterations < 2 else 2)


def test_iterations_can_be_chosen():
    for number in (0, 5):
        config = stepagent.parse(["--method", "stepagent-implicit", "--iterations", str(number)])
        assert rounds(config, METHODS["stepagent-implicit"]) == number


def test_the_table_of_methods_agrees_with_the_options():
    assert Config.method in METHODS
    known = {field.name for field in fields(Config)}
    for name, method in METHODS.items():
        reads = method.reads.split()
        assert set(reads) <= known and len(reads) == len(set(reads)), name
        assert (method.rounds > 0) == (method.iteration is not None), name
        # Iterations are an option only where there can be several.
        assert ("iterations" in reads) == (method.rounds > 1), name
    playing = {name for name, method in METHODS.items() if method.plays}
    assert playing == {"ppo", "dpo", "rft", "spin", "nat", "eto"}
    assert {name for name, method in METHODS.items() if method.starts_again} == {"rft", "nat"}


class Watched:
    """Options that remember which of them were read."""

    def __init__(self, config: Config):
        self.config = config
        self.read = set()

    def __getattr__(self, name: str):
        self.read.add(name)
        return getattr(self.config, name)


def options_read(monkeypatch, out: Path, *words: str) -> set[str]:
    """By a run, once everything is prepared."""
    watched = []

    def prepare_and_watch(config, method):
        agent = prepare(config, method)
        agent.config = agent.run.config = Watched(config)
        watched.append(agent.config)
        return agent

    monkeypatch.setattr(stepagent, "prepare", prepare_and_watch)
    run(out, *QUIET, *words)
    return watched[0].read


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_the_options_of_its_row_and_no_others(tmp_path, monkeypatch, model, method):
    words = ["--method", method, "--model", model]
    if "samples" in METHODS[method].reads:
        words += ["--samples", "1"]
    found = options_read(monkeypatch, tmp_path / "x", *words)
    if method == "stepagent-inverse":
        words += ["--reward", "both"]
        found |= options_read(monkeypatch, tmp_path / "y", *words)
    only_some_read = set()
    for row in METHODS.values():
        only_some_read |= set(row.reads.split())
    # Their number is known before.
    assert found & only_some_read == set(METHODS[method].reads.split()) - {"iterations"}


@pytest.mark.parametrize(
    "method, option, value",
    [
        ("base", "--sft-lr", "1"),
        ("sft", "--practice", "3"),
        ("sft", "--lr", "1"),
        ("dpo", "--iterations", "1"),
        ("rft", "--iterations", "3"),
        ("nat", "--iterations", "3"),
        ("rft", "--lr", "1"),
        ("spin", "--practice", "3"),
        ("eto", "--temperature", "1"),
        ("eto", "--reward", "both"),
        ("ppo", "--beta", "0.1"),
        ("stepagent-implicit", "--clip", "0.2"),
        ("stepagent-implicit", "--match", "runs/x"),
        ("stepagent-inverse", "--beta", "0.1"),
        ("stepagent-inverse", "--dpo-nll", "1"),
    ],
)
def test_an_option_that_the_method_does_not_read_is_refused(method, option, value):
    says = f"{option} is not read by --method {method}, only by .*; leave it out"
    with pytest.raises(InputError, match=says.replace("+", r"\+")):
        stepagent.parse(["--method", method, option, value])


def test_a_refused_option_ends_the_program_with_one_line_and_an_exit_code(tmp_path):
    words = ["--method", "dpo", "--iterations", "3", "--out", str(tmp_path / "x")]
    assert finish(start(1, tmp_path / "log", commands, [({}, words)])) == [1]
    [line] = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("error: --iterations is not read by --method dpo, only by sft+, ppo")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        (["--env", "moon"], "unknown; choose one of"),
        (["--env-options", "receptacles"], "not key=value"),
        (["--env-options", "rooms=3"], "no option 'rooms'"),
        (["--env-options", "receptacles=many"], "receptacles"),
        (["--eval-splits", "moon"], "household has no split 'moon'; use train, dev"),
        (["--eval-each", "dev,moon"], "household has no split 'moon'"),
        (["--expert", "/no/such/file"], "cannot be read"),
        (["--prompt-file", "/no/such/file"], "cannot be read"),
        (["--model", "/no/such/tiny"], "cannot be loaded"),
        (["--init", "/no/such/folder"], "cannot be loaded"),
        (["--method", "stepagent-inverse", "--temperature", "0.7"], "--temperature 0.7: PPO's"),
        (["--method", "ppo", "--temperature", "0.5"], "--temperature 0.5: PPO's ratio"),
        (["--method", "sft+", "--match", "/no/such/run"], "cannot be read.*; give as --match the"),
        (["--sft-batch", "-1"], "--sft-batch -1: must be at least 1"),
        (["--sft-lr=-1e-3"], "--sft-lr -0.001: must be at least 0"),
        (["--practice", "0"], "--practice 0: must be at least 1"),
        (["--temperature", "nan"], "--temperature nan: must be a finite number"),
        (["--beta", "-1"], "--beta -1.0: must be above 0"),
        (["--leaves", "0"], "--leaves 0: must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--warmup", "1.5"], "--warmup 1.5: must be at most 1"),
        (["--eval-tasks", "-1"], "--eval-tasks -1: must be at least 0"),
        (["--method", "sft", "--init", "runs/sft/policy"], "--init: sft would not learn from it"),
        (
            ["--method", "rft", "--lora-rank", "4", "--init", "runs/sft/policy"],
            "--lora-rank with --init: rft starts again from --model",
        ),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(tmp_path, words, says):
    with pytest.raises(InputError, match=says) as error:
        run(tmp_path / "x", *QUIET, *words)
    assert len(str(error.value).splitlines()) == 1


def test_every_number_but_the_seed_has_a_range():
    for field in fields(Config):
        if field.type in ("int", "float") and field.name != "seed":
            assert set(field.metadata) & {"least", "above"}, field.name
            with pytest.raises(InputError, match="must be (at least|above)"):
                Config(**{field.name: -2})


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_split_without_tasks_is_told_at_the_start(tmp_path, monkeypatch, model, split):
    make_env = stepagent.make_env

    def emptied(name, **options):
        env = make_env(name, **options)
        env.splits = env.splits | {split: []}
        return env

    monkeypatch.setattr(stepagent, "make_env", emptied)
    with pytest.raises(InputError, match=f"household has no task in split '{split}'; use train, "):
        run(tmp_path / "x", "--model", model)
    assert not (tmp_path / "x" / "experts.jsonl").exists()


@pytest.mark.parametrize("method", ["sft", "eto"])
def test_a_world_that_answers_nonsense_is_told_at_the_start(tmp_path, monkeypatch, model, method):
    """In the evaluated tasks, and in those that the agent will play."""
    make_env = stepagent.make_env

    def strange(name, **options):
        env = make_env(name, **options)
        usual = env.start

        def start(task):
            episode, observation = usual(task)
            if not task.startswith("test" if method == "sft" else "train"):
                return episode, observation
            return SimpleNamespace(step=lambda text: (*episode.step(text)[:3], {})), observation

        env.expert, env.start = make_env(name, **options).expert, start
        return env

    monkeypatch.setattr(stepagent, "make_env", strange)
    says = 'environment, task (test|train)-[0-9]+, turn 1: info is no dict with "valid"'
    with pytest.raises(InputError, match=says):
        run(tmp_path / "x", "--model", model, "--method", method)
    assert json.loads((tmp_path / "x" / "state.json").read_text())["done"] == []


@pytest.mark.parametrize("option", ["--model", "--init", "--prompt-file"])
def test_what_is_missing_is_found_before_the_expert_plays(tmp_path, option):
    with pytest.raises(InputError, match="/no/such/thing"):
        run(tmp_path / "x", *QUIET, option, "/no/such/thing")
    assert not (tmp_path / "x" / "experts.jsonl").exists()


def test_rewards_of_whole_episodes_want_tasks_of_the_environment(tmp_path, model):
    """Practice alone takes any trajectory."""
    trajectories = []
    for number in range(6):
        step = Step("A desk.", "Thought: x\nAction: look")
        trajectories.append(Trajectory(f"somewhere else {number}", [], [step], 1.0))
    envs.save_trajectories(str(tmp_path / "own.jsonl"), trajectories)
    words = ["--method", "stepagent-inverse", "--expert", str(tmp_path / "own.jsonl")]
    for reward in ("final", "both"):
        with pytest.raises(InputError, match="'somewhere else 0' is no task of household"):
            run(tmp_path / "x", *ONE, "--model", model, *words, "--reward", reward)
    out = run(tmp_path / "x", *ONE, "--model", model, *words)
    assert {row["task_type"] for row in practice_rows(out)} == {""}


def test_a_trajectory_longer_than_the_context_is_named(tmp_path):
    trajectories = []
    for name, observation in (("short-one", "A desk."), ("long-one", "w%d " * 3000)):
        step = Step(observation, "Thought: x\nAction: look")
        trajectories.append(Trajectory(name, [], [step], 1.0))
    envs.save_trajectories(str(tmp_path / "long.jsonl"), trajectories)
    says = "trajectory long-one has [0-9]+ tokens, the model's context is 2048; remove it from"
    with pytest.raises(InputError, match=says):
        run(tmp_path / "x", *QUIET, "--expert", str(tmp_path / "long.jsonl"))


def test_a_real_models_folder_runs_with_bfloat16_and_checkpointing(tmp_path):
    tokenizer = tiny.llama3()
    folder = tmp_path / "model"
    tiny.model(vocab=len(tokenizer), context=4096).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = ["--model", str(folder), "--dtype", "bfloat16", "--checkpointing", "true"]
    words += ["--prompt", "full", "--experts", "3", "--sft-experts", "3", "--practice-experts", "3"]
    out = run(tmp_path / "x", *ONE, *words)
    config = json.loads((out / "config.json").read_text())["config"]
    # The folder's config names no preset.
    assert (config["lr"], config["beta"]) == (5e-7, 0.1)
    final = weights(out / "policy")
    assert all(weight.dtype == torch.float32 for weight in final.values())
    assert not same_bits(final, weights(out / "sft" / "policy"))


# -------------------------------------------------------------------------- known before it begins


def with_template(model: str, folder: Path, template: str) -> str:
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_a_broken_template_is_found_although_the_experts_have_one_step(tmp_path, model):
    """Otherwise <|user|> would be all that SFT learns."""
    template = (Path(model) / "chat_template.jinja").read_text()
    broken = template.replace("add_generation_prompt", "false")
    step = Step("You are in a room.", "Thought: I look.\nAction: look")
    experts = [Trajectory(f"task-{number}", [], [step], 1.0) for number in range(6)]
    envs.save_trajectories(str(tmp_path / "own.jsonl"), experts)
    words = ["--method", "sft", *QUIET, "--expert", str(tmp_path / "own.jsonl"), "--model"]
    with pytest.raises(InputError, match=r"ignores add_generation_prompt: '<\|assistant\|>' is"):
        run(tmp_path / "x", *words, with_template(model, tmp_path / "m", broken))
    assert not (tmp_path / "x" / "sft").exists()


def test_prompts_have_the_date_of_the_runs_first_start(tmp_path, monkeypatch, model):
    template = (Path(model) / "chat_template.jinja").read_text()
    template = "{{ strftime_now('%d %b %Y') }}" + template
    words = ["--method", "sft", *QUIET]
    words += ["--model", with_template(model, tmp_path / "m", template)]

    class Calendar(datetime):
        day = 1

        @classmethod
        def now(cls):
            return cls(2024, 7, cls.day)

    monkeypatch.setattr(system.run_dir, "datetime", Calendar)
    monkeypatch.setattr(chat_template_utils, "datetime", Calendar)

    def first_state() -> str:
        agent = opened(tmp_path / "x", *words)
        encoded = agent.experts[0].encoded
        agent.run.phase("first", agent.save, "policy")
        # Elsewhere the policy sees its own day.
        assert (tmp_path / "x/policy/chat_template.jinja").read_text() == template
        return agent.tokenizer.decode(encoded.ids[: encoded.spans[0][0]])

    first = first_state()
    assert first.startswith("01 Jul 2024<|user|>")
    Calendar.day = 2
    assert first_state() == first


def test_actions_that_the_agent_may_not_write_to_the_end_are_said(tmp_path, capsys, model):
    words = ["--method", "sft", *QUIET, "--model", model, "--max-new-tokens"]
    agent = opened(tmp_path / "x", *words, "22")
    lengths = []
    for one in agent.experts:
        lengths += [end - start for start, end in one.encoded.spans]
    long = sum(length > 22 for length in lengths)
    assert 0 < long < len(lengths)
    said = capsys.readouterr().out
    assert f"{long} of {len(lengths)} expert actions are longer than --max-new-tokens 22" in said
    assert f": the longest has {max(lengths)}" in said
    opened(tmp_path / "y", *words, str(max(lengths)))
    assert "longer than" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------ the control


def test_sft_plus_takes_the_updates_of_the_run_it_is_matched_to(tmp_path, monkeypatch, model):
    first = run(tmp_path / "a", *QUIET, "--model", model)
    taken, train = [], training.train

    def recording(agent, name, iteration, batches, *rest):
        tasks = []
        for batch in batches:
            tasks.append([item.task_id for item in batch])
        taken.append((name, iteration, tasks))
        train(agent, name, iteration, batches, *rest)

    monkeypatch.setattr(training, "train", recording)
    words = ["--method", "sft+", "--init", str(first / "sft" / "policy"), "--match", str(first)]
    second = run(tmp_path / "b", *QUIET, "--model", model, *words)
    assert [(name, iteration) for name, iteration, _ in taken] == [("sft+", 1), ("sft+", 2)]
    for _, iteration, tasks in taken:
        assert tasks == json.loads((first / f"iter_{iteration}" / "batches.json").read_text())
        assert tasks
    matched, learnt = metrics(first, "implicit"), metrics(second, "sft+")
    assert [row["trajectories"] for row in learnt] == [row["trajectories"] for row in matched]
    assert [row["lr"] for row in learnt] == [row["lr"] for row in matched]
    assert all("nll" in row for row in learnt)


def test_a_match_with_other_data_is_refused(tmp_path, model):
    first = run(tmp_path / "a", *ONE, "--method", "stepagent-implicit", "--model", model)
    words = ["--method", "sft+", "--match", str(first), "--model", model]
    for option, was in (("--experts", "6, not 5"), ("--iterations", "1, not 2")):
        asked = was.split()[-1]
        says = f"--match .*: its {option} is {was}; give this run the same"
        with pytest.raises(InputError, match=says):
            run(tmp_path / "b", *ONE, *words, option, asked)


def test_a_match_that_cannot_be_taken_is_told_at_the_start(tmp_path, model):
    first = run(tmp_path / "a", *ONE, "--method", "stepagent-implicit", "--model", model)
    words = [*ONE, "--method", "sft+", "--match", str(first), "--model", model]
    file = first / "iter_1" / "batches.json"
    for text, says in (
        ('[["train-0"], ["elsewhere"]]', "'elsewhere' is none of this run's trajectories"),
        ("[[", "batches.json: broken JSON; give as --match a finished run"),
        (None, "batches.json: cannot be read .*; give as --match a finished run"),
    ):
        file.unlink()
        if text is not None:
            file.write_text(text)
        with pytest.raises(InputError, match=says):
            run(tmp_path / "b", *words)
        assert json.loads((tmp_path / "b" / "state.json").read_text())["done"] == []
    # A model's folder is no run.
    with pytest.raises(InputError, match="'config' is missing or broken; give as --match the --ou"):
        run(tmp_path / "b", *words[:-3], model, *words[-2:])


def test_sft_plus_alone_makes_the_updates_of_a_reflection_that_drops_no_pair(tmp_path, model):
    """Two practice actions a step, eight pairs an update."""
    out = run(tmp_path / "x", *QUIET, "--method", "sft+", "--model", model)
    experts = envs.load_trajectories(str(out / "experts.jsonl"))
    pairs = {expert.task_id: 2 * len(expert.steps) for expert in experts}
    orders = []
    for i in (1, 2):
        made = json.loads((out / f"iter_{i}" / "batches.json").read_text())
        for batch in made[:-1]:
            assert sum(pairs[task] for task in batch) >= 8
            assert sum(pairs[task] for task in batch[:-1]) < 8
        orders.append([task for batch in made for task in batch])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(pairs) and orders[0] != orders[1]


# --------------------------------------------------------------------------------------- evaluation


def test_evaluations_and_their_names(tmp_path, model):
    """After SFT, after each iteration on --eval-each, at the end on --eval-splits."""
    words = ["--eval-each", "dev", "--eval-splits", "test, test_unseen,test", "--model", model]
    out = run(tmp_path / "x", *words)
    rows = metrics(out, "eval")
    assert [(row["name"], row["split"], row["iteration"]) for row in rows] == [
        ("eval_0", "dev", 0),
        ("eval_1", "dev", 1),
        ("eval_2", "dev", 2),
        ("final", "test", 2),
        ("final", "test_unseen", 2),
    ]
    assert all(row["tasks"] == 3 for row in rows)
    env = envs.make_env("household")
    for row in rows:
        lines = (out / "eval" / f"{row['name']}_{row['split']}.jsonl").read_text().splitlines()
        episodes = [json.loads(line) for line in lines]
        assert [one["task_id"] for one in episodes] == envs.some(env.splits[row["split"]], 3)
        assert row["reward"] == pytest.approx(sum(one["reward"] for one in episodes) / 3)
        # Six tokens are too few for an action.
        assert row["unparsed"] == sum(len(one["steps"]) for one in episodes)
    assert [row["phase"] for row in metrics(out)][0:4] == ["sft"] * 3 + ["eval"]


def test_evaluation_is_greedy(tmp_path, model):
    """The seed makes no difference."""
    texts = []
    for seed in ("0", "1"):
        words = ["--method", "base", "--model", model, "--seed", seed]
        out = run(tmp_path / seed, *words)
        texts.append((out / "eval" / "final_test.jsonl").read_text())
    assert texts[0] == texts[1]


def test_a_run_prints_one_short_line_a_phase(tmp_path, model, capsys):
    run(tmp_path / "x", "--method", "stepagent-inverse", "--iterations", "1", "--model", model)
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    firsts = [line.split(":")[0] for line in said]
    inspected = ["inspect 1", "discriminate 1", "reflect 1"]
    assert "longer than --max-new-tokens 6" in firsts.pop(0)
    assert firsts == ["sft", "eval_0", *inspected, "eval_1", "final", "finished"]
    # The last one has two paths.
    assert all(len(line) <= 110 for line in said[:-1])


# ------------------------------------------------------------------------------------- a whole run


def mugs_only(monkeypatch) -> None:
    """A world of one kind of object, in houses of five single receptacles."""
    places = ("fridge", "microwave", "sinkbasin", "desk", "countertop", "cabinet", "diningtable")
    single = {place: (1, household.RECEPTACLES[place][1]) for place in places}
    monkeypatch.setattr(household, "OBJECTS", {"mug": household.OBJECTS["mug"]})
    monkeypatch.setattr(household, "TASK_TYPES", ["put"])
    monkeypatch.setattr(household, "HELD_OUT", 0.0)
    monkeypatch.setattr(household, "LAMP", ["desk"])
    monkeypatch.setattr(household, "GOALS", {"ware": "sinkbasin desk"})
    monkeypatch.setattr(household, "RECEPTACLES", single)


def small_model(folder: Path, options: dict) -> None:
    env = envs.make_env("household", **options)
    make_tiny([env.expert(f"train-{number}") for number in range(200)], folder, 0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_end_to_end_sft_learns_a_small_world_and_reflection_keeps_it(tmp_path, monkeypatch):
    """The untrained model solves nothing, SFT most of it."""
    mugs_only(monkeypatch)
    options = {"receptacles": 5, "distractors": 0, "likely": 1.0, "max_steps": 12}
    small_model(tmp_path / "model", options)
    small = ["--model", str(tmp_path / "model"), "--preset", "tiny", "--experts", "200"]
    small += ["--env-options", " ".join(f"{name}={value}" for name, value in options.items())]
    small += ["--eval-splits", "", "--eval-tasks", "30", "--max-new-tokens", "36"]
    sft_words = ["--sft-experts", "200", "--sft-epochs", "9", "--sft-lr", "5e-3"]
    sft_words += ["--sft-batch", "8", "--practice-experts", "30", "--iterations", "1"]

    def evaluations(method, *words):
        out = tmp_path / method
        stepagent.main(stepagent.parse(["--out", str(out), "--method", method, *small, *words]))
        return metrics(out, "eval")

    [base] = evaluations("base")
    sft, reflected = evaluations("stepagent-implicit", *sft_words)
    out = tmp_path / "stepagent-implicit"
    nll = [row["nll"] for row in metrics(out, "sft")]
    [inspection] = metrics(out, "inspect")
    assert base["success"] == 0 and base["tasks"] == 30
    assert nll[0] > 5 and sum(nll[-5:]) / 5 < 0.1
    assert sft["success_interval"][0] > base["success_interval"][1] + 0.3
    assert sft["invalid"] < base["invalid"]
    assert inspection["match_text"] > 0.5 and inspection["stopped"] > 0.95
    assert inspection["pairs_kept"] > 0 and metrics(out, "implicit")
    assert reflected["success"] > sft["success"] - 0.2
    assert "stepagent-implicit" in (out / "report.md").read_text()
