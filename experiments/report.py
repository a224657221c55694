"""A run on one page: python experiments/report.py RUN [--out FILE]

Writes RUN/report.html, one file that needs no network: the curves of metrics.jsonl, every
practised expert step with its practice actions beside it, and whole episodes. report.html beside
this script is the template.

    python experiments/report.py --glossary > docs/metrics.md

writes the page that explains every metric.

Text of a model or of a world is untrusted. It stands in the page as JSON without "<", becomes
text nodes only, and the page's policy allows its own script (by hash) and no connection.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

TEMPLATE = Path(__file__).with_suffix(".html")
REMEDY = "give the --out of a finished run of stepagent.py"

# How a world begins its answer to an invalid action, and to no other. WebShop and Mind2Web show
# their page again, which does not tell.
REFUSALS = {
    "household": ("Nothing happens.",),
    "alfworld": ("Nothing happens.",),
    "scienceworld": ("No known action", "Unknown action"),
    "hotpotqa": ("That is not an action.",),
    "2wikimultihopqa": ("That is not an action.",),
    "musique": ("That is not an action.",),
}

# Every figure of metrics.jsonl. docs/metrics.md is made of this.
METRICS = {
    "nll": "mean negative log-prob of an expert action's token, nats (SFT, SFT+; in Implicit over "
    "all expert actions of the update's trajectories)",
    "dpo_loss": "eq. 6, over kept pairs: those whose practice action differs from the expert's",
    "margin": "the argument of eq. 6's sigmoid, over kept pairs",
    "accuracy": "share of kept pairs with a positive margin (0 before the first update, when all "
    "margins are 0)",
    "accuracy_all": "the same over all pairs of the update's trajectories",
    "chosen_reward": "beta log(pi / ref) of the expert's action",
    "rejected_reward": "beta log(pi / ref) of the practice action",
    "logp_chosen": "log-prob of the expert's action, nats (DPO, SPIN, ETO: of the trajectory)",
    "logp_rejected": "log-prob of the practice action, nats (DPO, SPIN, ETO: of the trajectory)",
    "ppo_loss": "PPO's clipped loss",
    "ratio": "PPO's mean probability ratio",
    "clip_share": "share of tokens with a ratio outside 1 +- clip",
    "entropy": "exact token entropy on practice tokens (with whole-episode rewards: on the "
    "episodes'), nats",
    "kl": "k3 estimate of KL(policy || reference) on the same tokens, nats",
    "lr": "learning rate of the update",
    "grad_norm": "gradient norm before clipping",
    "trajectories": "trajectories in the update",
    "tokens": "tokens that the update reads; in explore, tokens that the agent wrote",
    "seconds": "time that the update or the inspection took",
    "match_text": "share of practice actions with the expert's text",
    "match_action": "share of practice actions whose parsed action is the expert's",
    "pairs_kept": "practice actions that differ from the expert's text",
    "stopped": "share of practice actions that ended with the stop token",
    "practice_tokens": "tokens of practice that the agent wrote",
    "d_loss": "the discriminator's loss, eq. 11; 2 log 2 = 1.386 where D is 1/2",
    "part": "which of two discriminators (--d-scores held-out)",
    "d_loss_learnt": "the discriminator's loss, once it is trained, on what it learnt from",
    "d_loss_held_out": "the same on tasks that it did not learn from",
    "d_auc_learnt": "P(D puts an expert action above a practice action), where it learnt",
    "d_auc_held_out": "the same on tasks that it did not learn from",
    "d_pairs_learnt": "how often D puts the expert's action above a different one of the same "
    "state, where it learnt",
    "d_pairs_held_out": "the same on tasks that it did not learn from",
    "js": "log 2 - d_loss_held_out / 2: in expectation a lower bound of the Jensen-Shannon "
    "divergence of expert and agent at expert states, in nats; below 0 where D is overconfident",
    "log_d_expert": "mean log D of expert actions, clamped at -5",
    "log_d_agent": "mean log D of practice actions, clamped at -5",
    "log_d_gap": "mean log D of practice actions that equal the expert's minus that of others in "
    "the same state: does the reward lead to the expert?",
    "expert_nll": "nats of the expert's action at its states in tasks that are not trained on",
    "expert_match": "how often the greedy action there has the expert's text",
    "expert_match_sampled": "how often a sampled action there is the expert's",
    "expert_states": "number of states over which these three are averaged",
    "episodes": "episodes played in the iteration (explore)",
    "pairs": "trajectory pairs of DPO, SPIN and ETO",
    "expert_trajectories": "expert trajectories that RFT and NAT train on",
    "own_trajectories": "trajectories of the agent that RFT and NAT train on",
    "own_successes": "successes among own_trajectories",
    "returns": "mean return per turn (judge)",
    "step_rewards": "mean sum of an episode's step rewards (judge)",
    "explained": "share of the returns' variance that the value head explains on tasks that it "
    "did not learn from",
    "value_loss": "the value head's loss on the tasks that it learns from",
    "value_loss_held": "the value head's loss on held-out tasks",
    "value_passes": "passes that the value head was fitted for, including the last ones without "
    "improvement",
    "name": "which evaluation: eval_0 is the start, eval_i follows iteration i, final is the last",
    "split": "the split evaluated",
    "tasks": "number of tasks evaluated",
    "success": "share of episodes with a reward of 1; success_interval: 95% percentile bootstrap "
    "over tasks",
    "reward": "mean reward of an episode; reward_interval as for success",
    "steps": "mean turns of an episode",
    "invalid": "share of actions that the world did not understand or allow",
    "truncated": "episodes cut by the step limit or by the model's context",
    "outgrown": "of these, those cut by the context",
    "secondary": "means of the world's other scores: f1 (question answering), operation_f1 and "
    "step_success (Mind2Web)",
    "unparsed": 'actions without an "Action:" that can be read',
    "unplayable": "episodes that are not scored, as their world failed three times",
    "restarts": "worlds that were restarted, and their episodes replayed",
    "by_type": "success and number of tasks, by task type",
}


def glossary() -> str:
    """docs/metrics.md"""
    rows = [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in METRICS.items()]
    return "\n".join(
        [
            "# Metrics",
            "",
            "metrics.jsonl has one JSON object per line: `phase`, `iteration`, `step`, `time`",
            "(seconds since 1970) and the phase's figures. This page is made by",
            "`python experiments/report.py --glossary > docs/metrics.md`.",
            "",
            "| metric | meaning |",
            "|---|---|",
            *rows,
        ]
    )


# ------------------------------------------------------------------------- reading the run


class Texts(dict):
    """text -> its number. The same texts return in every iteration, so each is stored once."""

    def number(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is not a text")
        return self.setdefault(text, len(self))


def collect(run: Path) -> dict:
    """Everything that the page shows. Exits with one line unless the run is finished."""
    if not run.is_dir():
        sys.exit(f"error: {run}: there is no such directory; {REMEDY}")
    state, config = run / "state.json", run / "config.json"
    done = parse(state, 1, read(state), lambda row: list(row["done"]))
    if "policy" not in done:
        last = done[-1] if done else "none"
        sys.exit(
            f"error: {state}: the run is not finished (last phase: {last}); "
            "give the command that began it again, it goes on from there"
        )
    names = ("config", "versions", "commit", "ranks")
    about = parse(config, 1, read(config), lambda row: {name: row[name] for name in names})
    texts = Texts()
    refusals = REFUSALS.get(about["config"]["env"], ())

    practice, files = [], []
    for folder in sorted(run.glob("iter_*"), key=in_order):
        if not re.fullmatch("iter_[0-9]+", folder.name):
            continue
        iteration = int(folder.name[5:])
        path = folder / "practice.jsonl"
        if path.exists():
            steps = read_lines(path, lambda row: practised_step(row, texts))
            practice.append({"iteration": iteration, "steps": steps})
        if (folder / "episodes.jsonl").exists():
            files.append((f"iteration {iteration}, own episodes", folder / "episodes.jsonl"))
    for path in sorted(run.glob("eval/*.jsonl"), key=in_order):
        files.append((path.stem.replace("_", " "), path))
    episodes = []
    for name, path in files:
        rows = read_lines(path, lambda row: episode(row, texts, refusals))
        episodes.append({"name": name, "own": path.name == "episodes.jsonl", "rows": rows})
    return {
        "about": about,
        "glossary": METRICS,
        "metrics": read_lines(run / "metrics.jsonl", metrics_row),
        "practice": practice,
        "episodes": episodes,
        "texts": list(texts),
    }


def in_order(path: Path) -> list:
    """Sorts eval_10 after eval_9."""
    parts = re.split(r"([0-9]+)", path.stem)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def metrics_row(row: dict) -> dict:
    return {name: row[name] for name in ("phase", "iteration", "step")} | row


def practised_step(row: dict, texts: Texts) -> dict:
    """A line of practice.jsonl."""
    lists = ["practice", "practice_logp", "differs"]
    lists += ["practice_log_d"] if "practice_log_d" in row else []
    if len({len(row[name]) for name in lists}) > 1:
        raise ValueError(f"{', '.join(lists)} are not of one length")
    known = ("task", "step", "expert_logp", "practice_logp", "differs")
    # Tasks of an expert file have no type, but some name it: "boil/3".
    task_type = row.get("task_type") or row["task"].rpartition("/")[0] or "all"
    return {name: row[name] for name in known} | {
        "task_type": task_type,
        "observation": texts.number(row["observation"]),
        "expert": texts.number(row["expert"]),
        "practice": [texts.number(text) for text in row["practice"]],
        "expert_log_d": row.get("expert_log_d"),
        "practice_log_d": row.get("practice_log_d"),
    }


def episode(row: dict, texts: Texts, refusals: tuple[str, ...]) -> dict:
    """A line of eval/*.jsonl or iter_*/episodes.jsonl."""
    known = ("task_id", "task_type", "reward", "truncated", "invalid")
    last = row.get("last")
    invalid, missed = invalid_turns(row["steps"], row["invalid"], last, refusals)
    turns = []
    for step, is_invalid in zip(row["steps"], invalid):
        observation, action = texts.number(step["observation"]), texts.number(step["action"])
        turns.append({"observation": observation, "action": action, "invalid": is_invalid})
    more = {name: row[name] for name in row if name not in (*known, "steps", "last")}
    return {name: row[name] for name in known} | {
        "missed": missed,
        "last": texts.number(last or ""),
        "more": more,
        "turns": turns,
    }


def invalid_turns(
    steps: list[dict], count: int, last: str | None, refusals: tuple[str, ...]
) -> tuple[list[bool], int]:
    """Which turns were invalid, and how many invalid turns could not be found.

    An episode's file has their number. The next observation tells which where a world refuses in
    words of its own.
    """
    if count in (0, len(steps)):
        return [count > 0] * len(steps), 0
    answers = [step["observation"] for step in steps[1:]] + [last or ""]
    invalid = [answer.startswith(refusals) for answer in answers]
    # Evaluations do not keep the answer to the last action.
    if refusals and last is None and sum(invalid) == count - 1:
        invalid[-1] = True
    if sum(invalid) > count:
        return [False] * len(steps), count
    return invalid, count - sum(invalid)


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        sys.exit(f"error: {path} is missing; {REMEDY}")
    except OSError as error:
        sys.exit(f"error: {path} cannot be read ({error.strerror}); {REMEDY}")


def parse(path: Path, number: int, text: str, form: Callable):
    """form(the object in a line). NaN, which JSON lacks, becomes null."""
    try:
        return form(json.loads(text, parse_constant=lambda _: None))
    # A damaged line may raise anything.
    except Exception as error:
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        reason = f"no {error}" if isinstance(error, KeyError) else reason
        sys.exit(
            f"error: {path}, line {number}: not what stepagent.py writes ({reason}); "
            "restore the file or run again into a new directory"
        )


def read_lines(path: Path, form: Callable) -> list:
    lines = enumerate(read(path).split("\n"), 1)
    return [parse(path, number, line, form) for number, line in lines if line.strip()]


# -------------------------------------------------------------------------------- the page


def page(data: dict) -> str:
    """The template with the data and with its script's hash, which the policy names."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.rpartition("<script>")[2].partition("</script>")[0]
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Without "<" nothing in the data ends the script tag or begins a comment.
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.replace("__SCRIPT_HASH__", script_hash).replace("__DATA__", embedded)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, help="the file to write (default: RUN/report.html)")
    parser.add_argument("--glossary", action="store_true", help="print docs/metrics.md")
    args = parser.parse_args()
    if args.glossary:
        print(glossary())
        return
    if args.run is None:
        parser.error("give the directory of a finished run")
    out = args.out or args.run / "report.html"
    html = page(collect(args.run))
    beside = out.with_name(out.name + ".tmp")
    try:
        beside.write_text(html, encoding="utf-8")
        os.replace(beside, out)
    except OSError as error:
        sys.exit(
            f"error: {out} cannot be written ({error.strerror}); give another place with --out"
        )
    print(f"{out} ({len(html) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
