"""Command line, data flow, training loop, resume and ranks, on miniatures that take seconds."""
import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import envs
import losses
import naive
import stepagent as S
import test_mind2web
import test_qa
import test_rollout
import tiny
from model import make_tiny
from rollout import Encoded, InputError, Step, Trajectory, encode, episode_figures, score

ROOT = Path(S.__file__).resolve().parent
MINIATURE = ["--env-options", "receptacles=5 distractors=2 max_steps=13", "--experts", "6", "--sft-experts", "6",
             "--practice-experts", "6", "--sft-epochs", "1", "--sft-batch", "2", "--iterations", "2", "--practice", "2",
             "--batch", "8", "--dpo-nll", "0", "--max-new-tokens", "6",
             "--eval-each", "dev", "--eval-splits", "test", "--eval-tasks", "3"]
QUIET = ["--eval-each", "", "--eval-splits", ""]


def config(out, *words):
    return S.parse(["--out", str(out), *MINIATURE, *words])


def run(out, *words):
    S.main(config(out, *words))
    return out


def metrics(out, phase=None):
    """The log without times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "seconds")} for row in rows if phase in (None, row["phase"])]


def alike(one, two):
    """The logs of two runs agree, up to the order of additions."""
    for x, y in zip(metrics(one), metrics(two), strict=True):
        assert all(x.pop(k, None) == y.pop(k, None) for k in ("by_type", "secondary")) and x == pytest.approx(y, rel=2e-3, abs=2e-4)


def weights(folder):
    return load_file(folder / "model.safetensors")


def distance(a, b):
    """Euclidean, over all weights."""
    return math.sqrt(sum(((a[name] - b[name]).double() ** 2).sum().item() for name in a))


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- command line

@pytest.mark.parametrize("words", [["--no-such-flag", "1"], ["--method", "magic"], ["--practise", "3"], ["--prac", "3"],
                                   ["--seed", "x"],
                                   ["--dtype", "float8"], ["--checkpointing", "maybe"], ["stray"]])
def test_a_bad_command_line_exits_with_an_error(words, capsys):
    with pytest.raises(SystemExit) as stop:
        S.parse(words)
    assert stop.value.code != 0 and "error:" in capsys.readouterr().err.splitlines()[-1]


def test_tiny_has_its_own_column_of_defaults():
    small, real = S.parse([]), S.parse(["--model", "some/model"])
    assert (small.model, small.sft_lr, small.dtype, small.prompt, small.checkpointing) == ("tiny", 2e-3, "float32", "none", False)
    assert (real.sft_lr, real.sft_batch, real.sft_epochs, real.warmup) == (1e-5, 64, 4, 0.03)
    assert (real.lr, real.batch, real.beta) == (5e-7, 16, 0.1)
    assert (real.practice, real.clip, real.entropy, real.kl, real.ppo_passes, real.grad_norm) == (3, 0.2, 0.01, 0.0, 2, 1.0)
    assert (real.dtype, real.prompt, real.checkpointing) == ("bfloat16", "full", True)
    assert (real.max_new_tokens, real.temperature) == (512, 1.0)
    assert S.parse(["--sft-lr", "1"]).sft_lr == 1 and S.parse(["--checkpointing", "true"]).checkpointing is True


def test_the_paper_peaks_are_the_default_iterations():
    at = lambda method, *words: S.check(S.parse(["--model", "some/model", "--method", method, *words]))
    assert [at(m) for m in ("base", "sft", "stepagent-implicit", "stepagent-inverse", "spin", "eto", "dpo")] == [0, 0, 3, 7, 3, 3, 1]
    assert [at(m, "--iterations", "5") for m in ("sft", "stepagent-implicit", "rft")] == [0, 5, 1]


def test_some_tasks_come_from_everywhere_in_the_list():
    tasks = [f"{kind}-{i}" for kind in "abcd" for i in range(100)]
    few = envs.some(tasks, 40)
    assert len(few) == 40 and sorted(few, key=tasks.index) == few and envs.some(tasks, 0) == tasks
    assert all(sum(t.startswith(kind) for t in few) >= 3 for kind in "abcd")


@pytest.mark.parametrize("text, options", [("", {}), ("a=1 b=x,y c=0.5 d=-2", {"a": 1, "b": "x,y", "c": 0.5, "d": -2}),
                                           ("a=b=c", {"a": "b=c"})])
def test_environment_options(text, options):
    assert envs.env_options(text) == options


@pytest.mark.parametrize("words, says", [
    (["--env", "moon"], "unknown; choose one of"), (["--env-options", "receptacles"], "not key=value"),
    (["--env-options", "rooms=3"], "no option 'rooms'"),
    (["--env-options", "receptacles=many"], "receptacles"), (["--eval-splits", "moon"], "no split 'moon'"),
    (["--expert", "/no/such/file"], "cannot be read"),
    (["--model", "/no/such/tiny"], "cannot be loaded"), (["--init", "/no/such/folder"], "cannot be loaded"),
    (["--method", "stepagent-inverse", "--temperature", "0.7"], "temperature"),
    (["--method", "sft+", "--match", "/no/such/run"], "cannot be read")])
def test_bad_input_is_one_line_with_the_remedy(tmp_path, words, says):
    with pytest.raises(InputError, match=says) as error:
        run(tmp_path / "x", *QUIET, *words)
    assert len(str(error.value).splitlines()) == 1


def test_a_malformed_expert_file_ends_the_program_with_one_line(tmp_path):
    broken = tmp_path / "expert.jsonl"
    broken.write_text('{"task_id": "x"\n')
    command = [sys.executable, str(ROOT / "stepagent.py"), "--expert", str(broken), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    [line] = done.stderr.strip().splitlines()
    assert done.returncode != 0 and line.startswith(f"error: {broken}, line 1: broken JSON")


def test_a_mistake_does_not_occupy_the_run_directory(tmp_path):
    """The same command with the path corrected must work."""
    with pytest.raises(InputError):
        run(tmp_path / "x", *QUIET, "--method", "base", "--expert", str(tmp_path / "tipo.jsonl"))
    envs.save_trajectories(str(tmp_path / "right.jsonl"), [envs.make_env("household").expert(f"train-{i}") for i in range(6)])
    run(tmp_path / "x", *QUIET, "--method", "base", "--expert", str(tmp_path / "right.jsonl"))


def test_a_run_directory_of_another_configuration_is_refused(tmp_path):
    run(tmp_path / "x", *QUIET, "--method", "base")
    before = (tmp_path / "x" / "config.json").read_text()
    with pytest.raises(InputError, match="another configuration .*seed 0 -> 3.*another --out"):
        run(tmp_path / "x", *QUIET, "--method", "base", "--seed", "3")
    assert (tmp_path / "x" / "config.json").read_text() == before
    run(tmp_path / "x", *QUIET, "--method", "base")                      # the same command is welcome


def model_folder(folder, tokenizer, model=None):
    (model or tiny.model(vocab=len(tokenizer), context=4096).float()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ["--model", str(folder), "--practice-experts", "6", *QUIET]


def test_a_model_without_chat_template_is_refused(tmp_path):
    words = model_folder(tmp_path / "m", tiny.byte_level(["<s>", "</s>"], None, eos_token="</s>"))
    with pytest.raises(InputError, match="no chat template"):
        run(tmp_path / "x", *words)


def test_a_model_of_another_family_is_refused(tmp_path):
    tokenizer = tiny.chatml()
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=len(tokenizer)))
    words = model_folder(tmp_path / "m", tokenizer, other)
    with pytest.raises(InputError, match="family 'gpt2' is not supported"):
        run(tmp_path / "x", *words)


def test_a_trunk_longer_than_the_context_names_its_trajectory(tmp_path):
    path = tmp_path / "long.jsonl"
    step = lambda text: [Step(text, "Thought: x\nAction: look")]
    envs.save_trajectories(str(path), [Trajectory("short-one", [], step("A desk.")),
                                       Trajectory("long-one", [], step("w%d " * 3000))])
    with pytest.raises(InputError, match="trajectory long-one has [0-9]+ tokens, the model's context is 2048"):
        run(tmp_path / "x", *QUIET, "--expert", str(path), "--experts", "2", "--sft-experts", "2", "--practice-experts", "2")


def test_a_real_model_folder_runs_with_bfloat16_and_checkpointing(tmp_path):
    words = model_folder(tmp_path / "m", tiny.llama3())
    run(tmp_path / "x", *words, "--dtype", "bfloat16", "--checkpointing", "true", "--prompt", "full", "--iterations", "1",
        "--experts", "3", "--sft-experts", "3", "--practice-experts", "3")
    final = weights(tmp_path / "x" / "policy")
    assert all(x.dtype == torch.float32 for x in final.values())
    assert not same_bits(final, weights(tmp_path / "x" / "sft" / "policy"))


# ---- batches and rates

def learner(rank=0, world=1, steps=(3, 1, 5, 2, 4, 1, 6), **options):
    """A Learner with data only; trajectory j has steps[j] expert steps."""
    c = S.Config(**{f.name: f.metadata["tiny"] for f in S.dataclasses.fields(S.Config)} | {
        "experts": 0, "sft_experts": 0, "practice_experts": 0, "batch": 6, "practice": 2} | options)
    data = [Encoded(list(range(20)), [(s + 1, s + 2) for s in range(n)], f"t{j}") for j, n in enumerate(steps)]
    return S.Learner(SimpleNamespace(config=c, rank=rank, world=world, iterations=max(1, c.iterations)), None, [], None, None, [],
                     data)


def test_batches_reach_their_pairs_and_overshoot_by_one_trajectory_at_most():
    x = learner()
    pairs = lambda j: len(x.data[j].spans)
    batches = x._batches("implicit", 1, range(7), pairs)
    assert sorted(sum(batches, [])) == list(range(7)) and len(batches) >= 3
    for batch in batches[:-1]:
        assert sum(map(pairs, batch)) >= 6 > sum(map(pairs, batch[:-1]))


def test_batches_are_the_same_on_every_rank_and_differ_by_iteration_and_seed():
    made = lambda x, i=1: x._batches("implicit", i, range(7), lambda j: 2)
    batches = made(learner())
    assert batches == made(learner(rank=1, world=2)) == made(learner())
    assert len({json.dumps(x) for x in (batches, made(learner(), 2), made(learner(seed=5)))}) == 3
    assert sorted(sum(made(learner(epochs=2)), [])) == sorted(2 * list(range(7)))
    assert learner()._batches("implicit", 1, [], lambda j: 2) == []


def test_the_practised_set_is_the_end_of_the_data_and_sft_the_beginning():
    x = learner(sft_experts=3, practice_experts=4)
    assert list(x.sft_set) == [0, 1, 2] and list(x.practised) == [3, 4, 5, 6] and x.first_step == {3: 0, 4: 2, 5: 6, 6: 7}


def test_reward_gap_by_hand():
    equal = torch.tensor([[True, False, False], [True, True, True], [False, True, True], [False, False, False]])
    reward = torch.tensor([[-1.0, -2.0, -4.0], [-9.0, 0.0, 0.0], [-1.0, -3.0, -2.0], [-7.0, -7.0, 0.0]])
    assert losses.reward_gap(reward, equal)["log_d_gap"] == pytest.approx(((-1 + 3) + (-2.5 + 1)) / 2)
    assert losses.reward_gap(reward, torch.ones_like(equal)) == {}


def recorded_rates(x, phase):
    rates = []
    x._train = lambda name, i, pool, batches, loss, rate, *rest: rates.extend(rate(step) for step in range(len(batches)))
    x.save = lambda folder: None
    phase(x)
    return rates


def test_sft_rate_rises_then_follows_a_cosine():
    x = learner(steps=[1] * 20, sft_epochs=5, sft_batch=10, sft_lr=2.0, warmup=0.3)     # 10 updates, 3 of them rising
    rates = recorded_rates(x, lambda x: x.imitate())
    assert rates[:2] == pytest.approx([2 / 3, 4 / 3]) and len(rates) == 10
    assert rates[5] == pytest.approx(1.0) and rates[9] == pytest.approx(0.0489435)       # 1 + cos(pi / 2) ; 1 + cos(0.9 pi)
    assert all(a > b for a, b in zip(rates[2:], rates[3:])) and max(rates) <= 2


def test_reflection_rate_falls_to_zero_over_all_iterations():
    x = learner(iterations=2, lr=2.0)
    first, second = ([x._falling(i, 4)(step) for step in range(4)] for i in (1, 2))
    assert first[0] == 2.0 and second[0] == pytest.approx(1.0) and second[2] == pytest.approx(0.2928932)     # 1 + cos(3 pi / 4)
    assert all(a > b for a, b in zip(first + second, (first + second)[1:])) and second[-1] > 0


# ---- figures

def test_auc_is_the_share_of_ordered_pairs():
    gen = torch.Generator().manual_seed(0)
    for n, m in ((1, 1), (5, 8), (40, 17)):
        a, b = torch.randint(0, 6, (n,), generator=gen).float() + 1, torch.randint(0, 6, (m,), generator=gen).float()
        count = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in a.tolist() for y in b.tolist()) / (n * m)
        assert losses.area_under_curve(a, b) == pytest.approx(count, abs=1e-6)
    assert losses.area_under_curve(torch.ones(3), torch.zeros(2)) == 1.0 and losses.area_under_curve(torch.zeros(3), torch.ones(2)) == 0.0


def test_bootstrap_interval_has_the_right_width():
    low, high = losses.bootstrap([0.0, 1.0] * 50)                             # deviation of the mean 0.05, 95%: +- 0.098
    assert 0.38 < low < 0.43 and 0.57 < high < 0.62 and losses.bootstrap([1.0] * 9) == [1.0, 1.0]


def test_episode_figures_by_hand():
    env = SimpleNamespace(task_type=lambda task: task[0])
    made = [Trajectory("a1", [], [Step("", "")] * 2, 1.0, False, {"invalid": 1}),
            Trajectory("a2", [], [Step("", "")] * 4, 0.5, True, {"invalid": 2}),
            Trajectory("b1", [], [Step("", "")] * 4, 0.0, True, {"invalid": 0, "outgrown": 1})]
    figures = episode_figures(made, env)
    assert (figures["success"], figures["reward"], figures["steps"]) == pytest.approx((1 / 3, 0.5, 10 / 3))
    assert (figures["invalid"], figures["truncated"], figures["outgrown"], figures["tasks"]) == (0.3, 2, 1, 3)
    assert figures["by_type"] == {"a": [0.5, 2], "b": [0.0, 1]} and figures["unplayable"] == 0
    assert figures["secondary"] == {}
    made[0].info["f1"] = 0.6
    assert episode_figures(made, env)["secondary"] == {"f1": pytest.approx(0.2)}
    del made[0].info["f1"]
    failed = Trajectory("b2", [], [Step("", "")], 0.0, False, {"invalid": 0, "unplayable": 1, "restarts": 2})
    with_failed = episode_figures([*made, failed], env)
    assert with_failed == figures | {"unplayable": 1, "restarts": 2}     # counted, not scored
    with pytest.raises(InputError, match="failed in all of 1"):
        episode_figures([failed], env)


# ---- discriminator

def test_no_fold_is_judged_by_the_discriminator_that_learnt_from_it(tmp_path, monkeypatch):
    learnt = []

    def constant(d, features, loss_on, learn, held, *rest):
        """A D that says +1 (fold 0) or -1 (fold 1), whatever it sees."""
        learnt.append(set(learn.tolist()) | set(held.tolist()))
        for p in d.mlp.parameters():
            p.data.zero_()
        d.mlp[-1].bias.data.fill_((1.0, -1.0)[len(learnt) - 1])

    monkeypatch.setattr(S, "fit", constant)
    out = run(tmp_path / "x", *QUIET, "--method", "stepagent-inverse", "--iterations", "1", "--experts", "12",
              "--practice-experts", "12")
    found = load_file(out / "iter_1" / "log_d.safetensors")
    by = (found["expert"] < -1).long()                                   # log sigmoid(1) = -0.31, log sigmoid(-1) = -1.31
    assert 0 < by.sum() < len(by) and torch.equal((found["agent"] < -1).long(), by.repeat_interleave(2))
    assert not any(step in learnt[fold] for step, fold in enumerate(by.tolist()))
    assert not learnt[0] & learnt[1] and learnt[0] | learnt[1] == set(range(len(by)))
    rows = [json.loads(line) for line in (out / "iter_1" / "practice.jsonl").read_text().splitlines()]
    assert len({(row["task"], fold) for row, fold in zip(rows, by.tolist())}) == 12      # whole tasks


def test_the_discriminator_prefers_the_expert(tmp_path):
    out = run(tmp_path / "x", *QUIET, "--method", "stepagent-inverse", "--iterations", "1", "--experts", "24",
              "--practice-experts", "24")
    [row] = metrics(out, "discriminate")
    assert row["d_auc"] > 0.9 and row["log_d_expert"] > row["log_d_agent"] + 0.5


# ---- reflection, on forged practice

def forge(monkeypatch, write):
    """Practice actions written by `write(encoded, step, number)` instead of the policy."""
    def practice(model, encoded, k, *rest):
        return [[[write(e, s, n) for n in range(k)] for s in range(len(e.spans))] for e in encoded]
    monkeypatch.setattr(S, "practice", practice)


def expert_ids(e, s):
    return e.ids[e.spans[s][0]:e.spans[s][1]]


def test_equal_actions_leave_the_policy_as_it_is(tmp_path, monkeypatch):
    forge(monkeypatch, lambda e, s, n: expert_ids(e, s))
    out = run(tmp_path / "x", *QUIET)
    assert all((row["match_text"], row["match_action"], row["pairs_kept"], row["stopped"]) == (1, 1, 0, 1)
               for row in metrics(out, "inspect"))
    assert metrics(out, "implicit") == [] and same_bits(weights(out / "policy"), weights(out / "sft" / "policy"))


def test_only_pairs_that_differ_are_counted(tmp_path, monkeypatch):
    wrong = envs.some(envs.make_env("household").splits["train"], 6)[3]
    forge(monkeypatch, lambda e, s, n: [7, 8] + expert_ids(e, s)[-1:] if (e.task_id, s, n) == (wrong, 1, 1)
          else expert_ids(e, s))
    out = run(tmp_path / "x", *QUIET, "--iterations", "1")
    [row], [step] = metrics(out, "inspect"), metrics(out, "implicit")
    assert row["pairs_kept"] == 1 and json.loads((out / "iter_1" / "batches.json").read_text()) == [[wrong]]
    assert step["dpo_loss"] == pytest.approx(math.log(2), abs=1e-5) and step["trajectories"] == 1
    assert step["margin"] == pytest.approx(0, abs=1e-4)
    rows = [json.loads(line) for line in (out / "iter_1" / "practice.jsonl").read_text().splitlines()]
    assert [(r["task"], r["step"], r["differs"]) for r in rows if any(r["differs"])] == [(wrong, 1, [False, True])]


def judged(out, i=1):
    """-> the iteration's practice and how far each practice action's and each expert action's log-prob moved by reflection."""
    c = S.Config(**json.loads((out / "config.json").read_text())["config"])
    run_ = S.Run(c, S.check(c))
    env, experts, prompt = S.load_experts(run_)
    policy, tokenizer = S.load_policy(run_, experts)                     # the last saved one
    data = [encode(t, tokenizer) for t in experts]
    x = S.Learner(run_, env, prompt, policy, tokenizer, experts, data)
    p, k = x.load_practice(i), run_.config.practice
    leaves, flat = [], iter(p.leaves)
    for e in data:
        leaves.append([(s, next(flat)) for s in range(len(e.spans)) for _ in range(k)])
    with torch.no_grad():
        s = score(policy, data, leaves)
    return p, s.leaves - p.ref_leaves, s.trunk - p.ref_trunk


def test_implicit_reflection_prefers_expert_to_practice(tmp_path):
    out = run(tmp_path / "x", *QUIET, "--iterations", "1", "--lr", "1e-3")
    p, leaf, trunk = judged(out)
    assert (trunk.repeat_interleave(2) - leaf)[p.kept].mean() > 1
    rows = metrics(out, "implicit")
    assert rows[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4) and rows[-1]["accuracy"] > 0.7


def test_inverse_reflection_prefers_what_the_discriminator_rewards(tmp_path, monkeypatch):
    """Reward 0 for the first practice action of every state, -1 for the second."""
    def discriminate(self, i):
        steps = len(self.load_practice(i).ref_trunk)
        save_file({"agent": torch.tensor([0.0, -1.0]).repeat(steps)}, self.run.path(f"iter_{i}/log_d.safetensors"))
    monkeypatch.setattr(S.Learner, "discriminate", discriminate)
    out = run(tmp_path / "x", *QUIET, "--method", "stepagent-inverse", "--iterations", "1", "--lr", "1e-3", "--entropy", "0")
    p, leaf, _ = judged(out)
    first, second = leaf.view(-1, 2).unbind(1)
    differ = torch.tensor([a != b for a, b in zip(p.leaves[::2], p.leaves[1::2])])
    assert (first - second)[differ].mean() > 0.05
    rows = metrics(out, "inverse")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-8)
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-5) and rows[0]["clip_share"] == 0 and rows[-1]["ratio"] != rows[0]["ratio"]


def test_accounted_tokens_are_those_that_a_forward_pass_takes():
    model, (encoded, leaves), seen = tiny.model(), test_rollout.late_branches(), []
    model.model.register_forward_pre_hook(lambda _, args, more: seen.append(more["input_ids"].numel()), with_kwargs=True)
    learner = S.Learner.__new__(S.Learner)
    learner.data = encoded
    for j in range(3):
        score(model, [encoded[j]], [leaves[j]])
        assert learner._tokens(j, leaves[j]) == seen[-1]
    assert seen[0] < len(encoded[0].ids) + sum(len(ids) for _, ids in leaves[0])               # what is shared is not counted


def test_sft_plus_takes_the_updates_of_the_run_it_is_matched_to(tmp_path, monkeypatch):
    first = run(tmp_path / "a", *QUIET)
    taken, train = [], S.Learner._train

    def recording(self, name, i, pool, batches, *rest):
        taken.append((name, i, batches))
        task_ids[:] = [item.task_id for item in pool]
        train(self, name, i, pool, batches, *rest)

    task_ids = []
    monkeypatch.setattr(S.Learner, "_train", recording)
    second = run(tmp_path / "b", *QUIET, "--method", "sft+", "--init", str(first / "sft" / "policy"), "--match", str(first))
    for name, i, batches in taken:
        matched = json.loads((first / f"iter_{i}" / "batches.json").read_text())
        assert name == "sft+" and [[task_ids[j] for j in batch] for batch in batches] == matched
    assert all(batches for *_, batches in taken)
    assert [row["trajectories"] for row in metrics(second, "sft+")] == [row["trajectories"] for row in metrics(first, "implicit")]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tmp_path, monkeypatch):
    load = S.load_policy

    def poisoned(run_, experts):
        policy, tokenizer = load(run_, experts)
        policy.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
        return policy, tokenizer

    monkeypatch.setattr(S, "load_policy", poisoned)
    with pytest.raises(InputError, match="sft, iteration 0, update 0: loss or gradient is not finite; .*failed_batch.json"):
        run(tmp_path / "x", *QUIET)
    saved = json.loads((tmp_path / "x" / "failed_batch.json").read_text())
    assert [len(item["ids"]) > 50 for item in saved["batch"]] == [True, True] and saved["phase"] == "sft" and not (tmp_path / "x" / "sft").exists()


def test_micro_batches_do_not_change_the_update(tmp_path):
    words = [*QUIET, "--iterations", "1", "--method", "stepagent-inverse"]
    whole, parts = (run(tmp_path / name, *words, "--micro-tokens", n, "--leaves", m)
                    for name, n, m in (("a", "8192", "1024"), ("b", "1", "1")))
    a, b, start = weights(whole / "policy"), weights(parts / "policy"), weights(whole / "base")
    assert distance(a, b) < 1e-3 * distance(a, start)
    alike(whole, parts)


def test_sft_is_adamw_on_the_naive_loss(tmp_path, monkeypatch):
    """Three updates by hand: ordinary passes, mean over the batch's action tokens, clipped, no decay, zeroed gradients."""
    taken, train = [], S.Learner._train

    def recording(self, name, i, pool, batches, *rest):
        taken.extend(batches)
        train(self, name, i, pool, batches, *rest)

    monkeypatch.setattr(S.Learner, "_train", recording)
    out = run(tmp_path / "x", *QUIET, "--method", "sft", "--micro-tokens", "400")
    model = LlamaForCausalLM.from_pretrained(out / "base", attn_implementation="eager").double()
    tokenizer, env = AutoTokenizer.from_pretrained(out / "base"), envs.make_env("household", **envs.env_options(MINIATURE[1]))
    data = [encode(env.expert(task), tokenizer) for task in envs.some(env.splits["train"], 6)]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for batch, row in zip(taken, metrics(out, "sft"), strict=True):
        logps = torch.cat([naive.token_logps(model, *pair) for pair in naive.expert_pairs([data[j] for j in batch])])
        model.zero_grad()
        (-logps.mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert (row["nll"], row["grad_norm"]) == pytest.approx((-logps.mean().item(), norm.item()), rel=1e-4)
        optimizer.param_groups[0]["lr"] = row["lr"]
        optimizer.step()
    expected, found, base = dict(model.named_parameters()), weights(out / "policy"), weights(out / "base")
    found = {name: found[name] for name in expected if name in found}
    assert len(taken) == 3 and distance(found, expected) < 1e-3 * distance(found, base)


# ---- resume

class Killed(Exception):
    pass


def at_the_end(monkeypatch, killed):
    """Every phase dies once, its work done but not yet recorded."""
    phase = S.Run.phase

    def dying(self, name, work, *args):
        def work_and_die(*rest):
            work(*rest)
            if name not in killed:
                killed.append(name)
                raise Killed
        phase(self, name, work_and_die, *args)
    monkeypatch.setattr(S.Run, "phase", dying)


def killed_and_continued(monkeypatch, out, *words):
    """-> the run's directory, and the phases at whose end it was killed."""
    killed = []
    at_the_end(monkeypatch, killed)
    for _ in range(30):
        try:
            return run(out, *words), killed
        except Killed:
            pass
    raise AssertionError(f"killed again and again: {killed}")


def in_the_middle(monkeypatch, killed):
    """Every phase that trains, practises, judges or evaluates dies once, after its first line in the log."""
    log = S.Run.log

    def dying(self, phase, iteration, step, **figures):
        log(self, phase, iteration, step, **figures)
        if (phase, iteration, figures.get("name")) not in killed:
            killed.append((phase, iteration, figures.get("name")))
            raise Killed
    monkeypatch.setattr(S.Run, "log", dying)


@pytest.mark.parametrize("kill, method, times", [(at_the_end, "stepagent-inverse", 12), (in_the_middle, "stepagent-implicit", 9)])
def test_a_killed_run_resumed_is_an_uninterrupted_run_to_the_bit(tmp_path, monkeypatch, kill, method, times):
    whole, killed = run(tmp_path / "whole", "--method", method), []
    kill(monkeypatch, killed)
    for _ in range(30):
        try:
            parts = run(tmp_path / "parts", "--method", method)
            break
        except Killed:
            pass
    assert len(killed) == times
    assert same_bits(weights(whole / "policy"), weights(parts / "policy"))
    assert not same_bits(weights(whole / "policy"), weights(whole / "sft" / "policy"))
    assert metrics(whole) == metrics(parts)
    files = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    assert files == sorted(str(p.relative_to(parts)) for p in parts.rglob("*") if p.is_file()) and "report.md" in files
    for name in files:
        if not name.endswith(("metrics.jsonl", "state.json", "config.json")):
            assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_a_finished_run_does_nothing_more(tmp_path, monkeypatch):
    out = run(tmp_path / "x", "--method", "sft")
    before = metrics(out)
    monkeypatch.setattr(S.Learner, "_train", None)
    monkeypatch.setattr(S, "run_episodes", None)
    run(out, "--method", "sft")
    assert metrics(out) == before


def test_the_last_two_iterations_keep_their_policy(tmp_path):
    out = run(tmp_path / "x", *QUIET, "--iterations", "3")
    assert sorted(p.parent.name for p in out.glob("iter_*/policy")) == ["iter_2", "iter_3"]
    assert same_bits(weights(out / "iter_3" / "policy"), weights(out / "policy"))
    assert sorted(p.name for p in out.glob("iter_*/practice.jsonl")) == ["practice.jsonl"] * 3


# ---- ranks

@pytest.mark.parametrize("method", ["stepagent-implicit", "stepagent-inverse", "ppo"])
def test_two_ranks_give_the_update_of_one(tmp_path, method):
    words = ["--method", method, "--experts", "7", "--sft-experts", "7", "--practice-experts", "7", "--sft-batch", "3",
             "--iterations", "1"]
    one, two = run(tmp_path / "one", *words), tmp_path / "two"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
               str(ROOT / "stepagent.py"),
               "--out", str(two), *MINIATURE, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((two / "config.json").read_text())["ranks"] == 2
    a, b = weights(one / "policy"), weights(two / "policy")
    assert distance(a, b) < 1e-3 * distance(a, weights(one / "sft" / "policy"))      # of what reflection moved
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-4
    alike(one, two)
    name, key = ("episodes.jsonl", "steps") if method == "ppo" else ("practice.jsonl", "practice")
    texts = lambda out: [json.loads(line)[key] for line in (out / "iter_1" / name).read_text().splitlines()]
    assert texts(one) == texts(two)
    assert (one / "eval" / "final_test.jsonl").read_text() == (two / "eval" / "final_test.jsonl").read_text()


# ---- end to end

def test_end_to_end_sft_learns_a_miniature_world_and_a_reflection_iteration_follows(tmp_path, monkeypatch):
    """One kind of object in houses of five single receptacles: the untrained model solves nothing, SFT most of it."""
    monkeypatch.setattr(envs, "OBJECTS", {"mug": envs.OBJECTS["mug"]})
    monkeypatch.setattr(envs, "TASK_TYPES", ["put"])
    monkeypatch.setattr(envs, "HELD_OUT", 0.0)
    monkeypatch.setattr(envs, "LAMP", ["desk"])
    monkeypatch.setattr(envs, "GOALS", {"ware": "sinkbasin desk"})
    places = ("fridge", "microwave", "sinkbasin", "desk", "countertop", "cabinet", "diningtable")
    monkeypatch.setattr(envs, "RECEPTACLES", {r: (1, envs.RECEPTACLES[r][1]) for r in places})
    options = {"receptacles": 5, "distractors": 0, "likely": 1.0, "max_steps": 12}
    env = envs.make_env("household", **options)
    make_tiny([env.expert(f"train-{i}") for i in range(200)], tmp_path / "tiny-model", 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny-model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).save_pretrained(tmp_path / "tiny-model")

    def figures(method, *words):
        S.main(S.parse([
            "--out", str(tmp_path / method), "--method", method, "--model", str(tmp_path / "tiny-model"), "--experts", "200",
            "--sft-experts", "200", "--practice-experts", "30", "--sft-epochs", "11", "--sft-lr", "3e-3", "--sft-batch", "8",
            "--iterations", "1", "--eval-each", "dev", "--eval-splits", "", "--eval-tasks", "30", "--max-new-tokens", "36",
            "--env-options", " ".join(f"{k}={v}" for k, v in options.items()), *words]))
        return metrics(tmp_path / method, "eval")

    [base], [sft, reflected] = figures("base"), figures("stepagent-implicit")
    nll = [row["nll"] for row in metrics(tmp_path / "stepagent-implicit", "sft")]
    [inspection] = metrics(tmp_path / "stepagent-implicit", "inspect")
    assert base["success"] == 0 and base["tasks"] == 30 and nll[0] > 5 and sum(nll[-5:]) / 5 < 0.1
    assert sft["success_interval"][0] > base["success_interval"][1] + 0.3 and sft["invalid"] < base["invalid"]
    assert inspection["match_text"] > 0.5 and inspection["pairs_kept"] > 0 and inspection["stopped"] > 0.95
    assert metrics(tmp_path / "stepagent-implicit", "implicit") and reflected["success"] > sft["success"] - 0.2
    assert "stepagent-implicit" in (tmp_path / "stepagent-implicit" / "report.md").read_text()


# ---- what an expert's file and an expert's plays are sifted by

def test_an_expert_file_is_sifted_by_the_world_and_plays_too_long_are_counted(tmp_path, monkeypatch, capsys):
    world = envs.make_env("household")
    plays = [world.expert(f"train-{i}") for i in range(6)]
    envs.save_trajectories(str(tmp_path / "given.jsonl"), plays)
    world.right = lambda given: [t for t in given if t.task_id != "train-1"]
    monkeypatch.setattr(S, "make_env", lambda *a, **k: world)
    make = lambda out, **more: SimpleNamespace(config=SimpleNamespace(**vars(S.parse([*QUIET, "--out", str(tmp_path / out)])) | more), rank=0,
                                               path=lambda name: tmp_path / name, bar=lambda x, *_: x, barrier=lambda: None)
    _, experts, _ = S.load_experts(make("a", expert=str(tmp_path / "given.jsonl"), experts=3))
    assert [t.task_id for t in experts] == ["train-0", "train-2", "train-3"]
    assert "1 of 6 plays whose answer is no exact match are left out" in capsys.readouterr().out
    world.right = lambda given: []
    with pytest.raises(InputError, match="none of its 6 answers is right"):
        S.load_experts(make("b", expert=str(tmp_path / "given.jsonl")))
    most = sorted(len(t.steps) for t in plays)[2]
    world.max_steps, expert = lambda task: most, world.expert
    world.splits = {**world.splits, "train": [t.task_id for t in plays]}
    world.expert = lambda task: None if task == "train-0" else expert(task)
    fits = [t.task_id for t in plays if len(t.steps) <= most and t.task_id != "train-0"]
    _, experts, _ = S.load_experts(make("c", expert="", experts=0))
    assert [t.task_id for t in experts] == fits
    assert f"6 tasks; 1 not solved and {5 - len(fits)} solved in more steps than allowed are left out" in capsys.readouterr().out


def test_the_readme_s_own_world_trains(tmp_path, monkeypatch):
    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names = dict(vars(envs))
    exec(code, names)
    monkeypatch.setitem(envs.ENVIRONMENTS, "doors", names["Doors"])
    words = ["--env", "doors", "--prompt", "full", "--experts", "6", "--sft-experts", "6", "--practice-experts", "6", "--sft-epochs", "1", "--iterations", "1", "--practice",
             "2", "--eval-splits", "test", "--eval-each", "dev", "--eval-tasks", "2", "--max-new-tokens", "6", "--env-options", ""]
    out = run(tmp_path / "x", *words)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["phase"] == "eval" and rows[-1]["tasks"] == 2 and rows[-1]["unparsed"] >= 0 and rows[-1]["secondary"] == {}
    assert [t.reward for t in map(names["Doors"]().expert, ["door-1", "door-2"])] == [1.0, 1.0]


def small_files(name: str, folder: Path) -> str:
    """Files of our own in the benchmark's official format."""
    folder.mkdir()
    if name == "webshop":
        import test_webshop                          # skips where its packages are missing
        return test_webshop.write(folder, [test_webshop.row(i) for i in range(30)])
    return test_mind2web.write(folder) if name == "mind2web" else test_qa.write(folder, name)


@pytest.mark.parametrize("method", ["stepagent-implicit", "stepagent-inverse"])
@pytest.mark.parametrize("name, metrics_of_its_own", [("webshop", set()), ("mind2web", {"operation_f1", "step_success"}), ("hotpotqa", {"f1"}),
                                                      ("2wikimultihopqa", {"f1"}), ("musique", {"f1"})])
def test_each_benchmark_trains_from_its_own_files(name, metrics_of_its_own, method, tmp_path):
    data = small_files(name, tmp_path / "data")
    out = run(tmp_path / "x", "--env", name, "--env-options", f"data={data}" + " dev=0" * (name == "mind2web"), "--method", method, "--experts", "6",
              "--iterations", "1", "--eval-each", "", "--eval-tasks", "2")
    last = metrics(out, "eval")[-1]
    assert last["split"] == "test" and last["tasks"] in (1, 2) and set(last["secondary"]) == metrics_of_its_own
    assert {r["phase"] for r in metrics(out)} >= {"sft", "inspect", method.split("-")[1], "eval"}
    assert all(name in (out / "report.md").read_text() for name in metrics_of_its_own)
