"""experiments/report.py on a small run directory made by hand: what the page holds, that text stays text, error lines."""
import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from experiments import report

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> <|end|> \x04\u2028\x85 \ud800 & \"quoted\""


def dump(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def practice_row(task="train-2310", step=0, **more) -> dict:
    return {"task": task, "task_type": "boil", "step": step, "observation": HOSTILE,
            "expert": "Thought: a\nAction: go to safe 1", "expert_logp": -1.5, "practice": ["Thought: a\nAction: go to safe 1", "Action: fly"],
            "practice_logp": [-1.5, -9.25], "differs": [False, True]} | more


def episode_row(*replies, invalid=0, **more) -> dict:
    """An episode whose first observation and what the world said after each action but the last are `replies`."""
    return {"task_id": "test-0", "task_type": "put", "reward": 0.0, "truncated": True, "invalid": invalid,
            "steps": [{"observation": reply, "action": f"Action: {n}"} for n, reply in enumerate(replies)]} | more


@pytest.fixture
def run(tmp_path):
    """A finished run of one iteration."""
    for folder in ("iter_1", "iter_2", "iter_10", "eval"):
        (tmp_path / folder).mkdir()
    files = {
        "state.json": json.dumps({"done": ["sft", "eval_0", "policy"], "policy": "policy", "log_bytes": 1}),
        "config.json": json.dumps({"config": {"method": HOSTILE, "env": "household", "model": "tiny", "seed": 0}, "versions": {"torch": "2"},
                                   "commit": "", "ranks": 1}, indent=2),
        "metrics.jsonl": dump({"phase": "sft", "iteration": 0, "step": 0, "time": 1.0, "nll": 2.5, "lr": 0.1}) +
                         '{"phase": "sft", "iteration": 0, "step": 1, "time": 2.0, "nll": NaN, "lr": 0.1}\n',
        "iter_1/practice.jsonl": dump(practice_row(), practice_row(step=1, expert_log_d=-0.5, practice_log_d=[-0.5, -4.0])),
        "iter_10/practice.jsonl": dump(practice_row()),
        "iter_2/practice.jsonl": dump(practice_row()),
        "iter_1/episodes.jsonl": dump(episode_row("start", "Nothing happens.", invalid=2, last="Nothing happens.", sample=3)),
        "eval/final_test.jsonl": dump(episode_row(HOSTILE, "Nothing happens.", "On bed 1: cd 1.", invalid=1, f1=0.5)),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def embedded(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def write(run, monkeypatch, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), *map(str, arguments)])
    report.main()
    return (run / "report.html").read_text(encoding="utf-8") if not arguments else arguments[-1].read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


# ------------------------------------------------------------------------------------------------------------- what the page holds

def test_the_page_holds_practice_episodes_and_figures(run, monkeypatch):
    data = embedded(write(run, monkeypatch))
    text = data["texts"]
    assert len(text) == len(set(text))
    assert [p["iteration"] for p in data["practice"]] == [1, 2, 10]
    task, kind, step, observation, expert, logp, practice, logps, differs, log_d, log_ds = data["practice"][0]["rows"][1]
    assert (task, kind, step, logp, logps, differs) == ("train-2310", "boil", 1, -1.5, [-1.5, -9.25], [False, True])
    assert (log_d, log_ds) == (-0.5, [-0.5, -4.0])
    assert text[observation] == HOSTILE and text[expert] == text[practice[0]] and text[practice[1]] == "Action: fly"
    assert data["practice"][0]["rows"][0][9:] == [None, None]
    assert [e["name"] for e in data["episodes"]] == ["iteration 1, own episodes", "final test"]
    own, final = (e["rows"][0] for e in data["episodes"])
    assert own["more"] == {"sample": 3} and text[own["last"]] == "Nothing happens." and final["more"] == {"f1": 0.5}
    assert [text[t[0]] for t in final["turns"]] == [HOSTILE, "Nothing happens.", "On bed 1: cd 1."]
    assert data["metrics"][0]["nll"] == 2.5 and data["metrics"][1]["nll"] is None
    assert "kept pairs" in data["glossary"]["margin"] and "KL(policy || reference)" in data["glossary"]["kl"]


def test_the_type_of_a_practised_task_is_found_where_its_line_lacks_it(run):
    from envs import make_env
    (run / "iter_2/practice.jsonl").write_text(dump({k: x for k, x in practice_row().items() if k != "task_type"}))
    kinds = [p["rows"][0][1] for p in report.collect(run)["practice"]]
    assert kinds == ["boil", make_env("household").task_type("train-2310"), "boil"]
    assert [report.task_types("scienceworld")(t) for t in ("boil/3", "plain")] == ["boil", "all"]


@pytest.mark.parametrize("world, replies, last, invalid, marks, missed", [
    ("household", ["s", "Nothing happens.", "Nothing happens.", "ok"], None, 2, [True, True, False, False], 0),
    ("household", ["s", "Nothing happens.", "ok"], None, 2, [True, False, True], 0),       # the answer to the last is not in the file
    ("household", ["s", "Nothing happens.", "Nothing happens.", "x"], None, 1, [False] * 4, 1),     # answers contradict the count
    ("household", ["s", "Nothing happens."], None, 0, [False, False], 0),
    ("household", ["s", "ok"], "Nothing happens.", 1, [False, True], 0),
    ("household", ["s", "ok", "ok"], "ok", 1, [False] * 3, 1),
    ("scienceworld", ["s", "No known action matches that input."], "ok", 1, [True, False], 0),
    ("scienceworld", ["s", "Nothing happens."], "ok", 1, [False, False], 1),               # not how this world refuses
    ("webshop", ["s", "page", "page"], None, 1, [False] * 3, 1),                           # shows its page again
    ("webshop", ["s", "page"], None, 2, [True, True], 0),                                  # all of them
    ("webshop", [], None, 0, [], 0)])
def test_invalid_turns(world, replies, last, invalid, marks, missed):
    assert report.invalid_turns([{"observation": r} for r in replies], invalid, last, report.REFUSALS.get(world)) == (marks, missed)


def test_runs_without_practice_or_evaluation(run, monkeypatch):
    for path in [*run.glob("iter_*/*.jsonl"), *run.glob("eval/*")]:
        path.unlink()
    data = embedded(write(run, monkeypatch, "--out", run / "other.html"))
    assert data["practice"] == [] and data["episodes"] == [] and len(data["metrics"]) == 2
    assert not (run / "report.html").exists() and not list(run.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------------- text stays text

def test_no_text_becomes_markup(run, monkeypatch):
    html = write(run, monkeypatch)
    assert embedded(html)["about"]["config"]["method"] == HOSTILE
    scripts = [attributes for tag, attributes in Tags(html).found if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    data = html.split('id="data">')[1].split("</script>")[0]
    assert "<" not in data and data.isascii()
    assert not {"img", "link", "iframe", "object"} & {tag for tag, _ in Tags(html).found}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|fetch\(|XMLHttp|import\(", report.SCRIPT)
    assert "</script" not in report.SCRIPT and "</style" not in report.STYLE


def test_the_policy_allows_this_script_alone_and_no_connection(run, monkeypatch):
    html = write(run, monkeypatch)
    [policy] = [a["content"] for tag, a in Tags(html).found if a.get("http-equiv") == "Content-Security-Policy"]
    script = html.rsplit("<script>", 1)[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|url\(", html.replace(html.split('id="data">')[1].split("</script>")[0], ""))


# ------------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("name, text, error", [
    ("state.json", None, r"state\.json is missing; give the --out"),
    ("config.json", None, r"config\.json is missing"),
    ("metrics.jsonl", None, r"metrics\.jsonl is missing"),
    ("state.json", '{"done": ["sft", "eval_0"]}', r"state\.json: the run is not finished \(last phase: eval_0\); give the command that began"),
    ("state.json", '{"done": []}', r"not finished \(last phase: none\)"),
    ("state.json", "", r"state\.json, line 1: not what stepagent.py writes"),
    ("state.json", "[]\n", r"state\.json, line 1: not what"),
    ("config.json", "{}", r"config\.json.*no 'config'"),
    ("metrics.jsonl", dump({"phase": "sft"}), r"metrics\.jsonl, line 1: not what stepagent.py writes \(no 'iteration'\); restore"),
    ("metrics.jsonl", '{"phase"', r"metrics\.jsonl, line 1: "),
    ("iter_1/practice.jsonl", dump(practice_row()) + '{"task": "tr', r"iter_1/practice\.jsonl, line 2: "),
    ("iter_1/practice.jsonl", dump(practice_row(practice=["one"])), r"iter_1/practice\.jsonl, line 1: .*not of one length"),
    ("iter_1/practice.jsonl", dump(practice_row(observation=3)), r"iter_1/practice\.jsonl, line 1: .*3 is not a text"),
    ("iter_1/practice.jsonl", dump(practice_row(task="train-x", task_type=None)), r"practice\.jsonl, line 1: .*there is no task 'train-x'"),
    ("eval/final_test.jsonl", dump(episode_row("a"), [1]), r"eval/final_test\.jsonl, line 2: "),
    ("eval/final_test.jsonl", dump({k: x for k, x in episode_row("a").items() if k != "invalid"}), r"line 1: .*no 'invalid'")])
def test_what_cannot_be_shown_is_one_line_that_names_the_file(run, monkeypatch, name, text, error):
    (run / name).unlink()
    if text is not None:
        (run / name).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        write(run, monkeypatch)
    assert re.search(error, stopped.value.code) and stopped.value.code.startswith("error: ") and "\n" not in stopped.value.code
    assert not (run / "report.html").exists()


def test_places_that_are_not_there(run, monkeypatch):
    with pytest.raises(SystemExit, match="there is no such directory; give the --out of a finished run"):
        write(run / "nowhere", monkeypatch)
    with pytest.raises(SystemExit, match="cannot be written .*give another place with --out"):
        write(run, monkeypatch, "--out", run / "nowhere" / "x.html")
