"""experiments/report.py on a small run directory made by hand, and the page in a real browser."""

import base64
import fcntl
import hashlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments import report

HOSTILE = (
    "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> <|end|> "
    '\x04\u2028\x85 \ud800 & "quoted" __DATA__ __SCRIPT_HASH__'
)


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def practice_row(task="train-2310", step=0, **more) -> dict:
    return {
        "task": task,
        "task_type": "boil",
        "step": step,
        "observation": HOSTILE,
        "expert": "Thought: a\nAction: go to safe 1",
        "expert_logp": -1.5,
        "practice": ["Thought: a\nAction: go to safe 1", "Action: fly"],
        "practice_logp": [-1.5, -9.25],
        "differs": [False, True],
    } | more


def episode_row(*observations, invalid=0, **more) -> dict:
    steps = []
    for number, observation in enumerate(observations):
        steps.append({"observation": observation, "action": f"Action: {number}"})
    return {
        "task_id": "test-0",
        "task_type": "put",
        "reward": 0.0,
        "truncated": True,
        "invalid": invalid,
        "steps": steps,
    } | more


def metrics_row(**figures) -> dict:
    return {"phase": "sft", "iteration": 0, "step": 0, "time": 1.0} | figures


@pytest.fixture
def run(tmp_path):
    """A finished run."""
    evaluation = metrics_row(
        phase="eval",
        name="final",
        split="test",
        tasks=1,
        success=0.25,
        success_interval=[0.1, 0.5],
        reward=0.25,
        reward_interval=[0.1, 0.5],
        steps=3.0,
        invalid=0.5,
        truncated=1,
        by_type={"put": [0.25, 1]},
    )
    config = {"method": HOSTILE, "env": "household", "model": "tiny", "seed": 0}
    about = {"config": config, "versions": {"torch": "2"}, "commit": "", "ranks": 1}
    refused = "Nothing happens."
    own = episode_row("start", refused, invalid=2, last=refused, sample=3)
    final = episode_row(HOSTILE, refused, "On bed 1: cd 1.", invalid=1, f1=0.5)
    judged = practice_row(step=1, expert_log_d=-0.5, practice_log_d=[-0.5, -4.0])
    files = {
        "state.json": json.dumps({"done": ["sft", "eval_0", "policy"], "policy": "policy"}),
        "config.json": json.dumps(about, indent=2),
        "metrics.jsonl": jsonl(
            metrics_row(nll=2.5, lr=0.1),
            metrics_row(step=1, nll=float("nan"), lr=0.1),
            metrics_row(step=2, nll=1.5, lr=0.1),
            evaluation,
        ),
        "iter_1/practice.jsonl": jsonl(practice_row(), judged),
        "iter_10/practice.jsonl": jsonl(practice_row()),
        "iter_2/practice.jsonl": jsonl(practice_row()),
        "iter_1/episodes.jsonl": jsonl(own),
        "eval/final_test.jsonl": jsonl(final),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def embedded(html: str) -> dict:
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(pattern, html, re.S)[1])


def without_data(html: str) -> str:
    before, _, rest = html.partition('id="data">')
    return before + rest.partition("</script>")[2]


def write(run, monkeypatch, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), *map(str, arguments)])
    report.main()
    file = arguments[-1] if arguments else run / "report.html"
    return file.read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


# ------------------------------------------------------------------------ what the page holds


def test_the_page_holds_practice_episodes_and_figures(run, monkeypatch):
    data = embedded(write(run, monkeypatch))
    texts = data["texts"]
    assert len(texts) == len(set(texts))
    assert [practice["iteration"] for practice in data["practice"]] == [1, 2, 10]
    first, second = data["practice"][0]["steps"]
    assert (second["task"], second["task_type"], second["step"]) == ("train-2310", "boil", 1)
    assert (second["expert_logp"], second["practice_logp"]) == (-1.5, [-1.5, -9.25])
    assert second["differs"] == [False, True]
    assert (second["expert_log_d"], second["practice_log_d"]) == (-0.5, [-0.5, -4.0])
    assert texts[second["observation"]] == HOSTILE
    assert texts[second["expert"]] == texts[second["practice"][0]]
    assert texts[second["practice"][1]] == "Action: fly"
    assert first["expert_log_d"] is None and first["practice_log_d"] is None
    names = [file["name"] for file in data["episodes"]]
    assert names == ["iteration 1, own episodes", "final test"]
    own, final = (file["rows"][0] for file in data["episodes"])
    assert own["more"] == {"sample": 3} and texts[own["last"]] == "Nothing happens."
    assert final["more"] == {"f1": 0.5}
    observations = [texts[turn["observation"]] for turn in final["turns"]]
    assert observations == [HOSTILE, "Nothing happens.", "On bed 1: cd 1."]
    assert [turn["invalid"] for turn in final["turns"]] == [True, False, False]
    assert data["metrics"][0]["nll"] == 2.5 and data["metrics"][1]["nll"] is None
    assert "kept pairs" in data["glossary"]["margin"]
    assert "KL(policy || reference)" in data["glossary"]["kl"]


def test_a_task_without_a_type_gets_the_one_in_its_name(run):
    rows = [practice_row(task, task_type="") for task in ("boil/3", "plain")]
    (run / "iter_2/practice.jsonl").write_text(jsonl(*rows))
    steps = report.collect(run)["practice"][1]["steps"]
    assert [step["task_type"] for step in steps] == ["boil", "all"]


REFUSED = "Nothing happens."


@pytest.mark.parametrize(
    "world, replies, last, count, marks, missed",
    [
        ("household", ["s", REFUSED, REFUSED, "ok"], None, 2, [True, True, False, False], 0),
        # The answer to the last action is not in the file.
        ("household", ["s", REFUSED, "ok"], None, 2, [True, False, True], 0),
        # The answers contradict the count.
        ("household", ["s", REFUSED, REFUSED, "x"], None, 1, [False] * 4, 1),
        ("household", ["s", REFUSED], None, 0, [False, False], 0),
        ("household", ["s", "ok"], REFUSED, 1, [False, True], 0),
        ("household", ["s", "ok", "ok"], "ok", 1, [False] * 3, 1),
        ("scienceworld", ["s", "No known action matches it."], "ok", 1, [True, False], 0),
        # Not how this world refuses.
        ("scienceworld", ["s", REFUSED], "ok", 1, [False, False], 1),
        # Shows its page again.
        ("webshop", ["s", "page", "page"], None, 1, [False] * 3, 1),
        # All of them.
        ("webshop", ["s", "page"], None, 2, [True, True], 0),
        ("webshop", [], None, 0, [], 0),
    ],
)
def test_invalid_turns(world, replies, last, count, marks, missed):
    steps = [{"observation": reply} for reply in replies]
    refusals = report.REFUSALS.get(world, ())
    assert report.invalid_turns(steps, count, last, refusals) == (marks, missed)


def test_runs_without_practice_or_evaluation(run, monkeypatch):
    for path in [*run.glob("iter_*/*.jsonl"), *run.glob("eval/*")]:
        path.unlink()
    data = embedded(write(run, monkeypatch, "--out", run / "other.html"))
    assert data["practice"] == [] and data["episodes"] == [] and len(data["metrics"]) == 4
    assert not (run / "report.html").exists() and not list(run.glob("*.tmp"))


def test_the_page_of_metrics_is_the_glossary():
    page = Path(report.__file__).resolve().parent.parent / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == report.glossary() + "\n", (
        "run: python experiments/report.py --glossary > docs/metrics.md"
    )


# --------------------------------------------------------------------------- text stays text


def test_no_text_becomes_markup(run, monkeypatch):
    html = write(run, monkeypatch)
    assert embedded(html)["about"]["config"]["method"] == HOSTILE
    tags = Tags(html).found
    scripts = [attributes for tag, attributes in tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    data = html.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in data and data.isascii()
    assert not {"img", "link", "iframe", "object"} & {tag for tag, _ in tags}
    makes_markup = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function"
    connects = r"fetch\(|XMLHttp|import\("
    assert not re.search(f"{makes_markup}|{connects}", without_data(html))


def test_the_policy_allows_this_script_alone_and_no_connection(run, monkeypatch):
    html = write(run, monkeypatch)
    policies = []
    for _, attributes in Tags(html).found:
        if attributes.get("http-equiv") == "Content-Security-Policy":
            policies.append(attributes["content"])
    [policy] = policies
    script = html.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|url\(", without_data(html))


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "name, text, error",
    [
        ("state.json", None, r"state\.json is missing; give the --out"),
        ("config.json", None, r"config\.json is missing"),
        ("metrics.jsonl", None, r"metrics\.jsonl is missing"),
        (
            "state.json",
            '{"done": ["sft", "eval_0"]}',
            r"not finished \(last phase: eval_0\); give the command that began",
        ),
        ("state.json", '{"done": []}', r"not finished \(last phase: none\)"),
        ("state.json", "", r"state\.json, line 1: not what stepagent.py writes"),
        ("state.json", "[]\n", r"state\.json, line 1: not what"),
        ("config.json", "{}", r"config\.json.*no 'config'"),
        (
            "metrics.jsonl",
            jsonl({"phase": "sft"}),
            r"metrics\.jsonl, line 1: not what stepagent.py writes \(no 'iteration'\); restore",
        ),
        ("metrics.jsonl", '{"phase"', r"metrics\.jsonl, line 1: "),
        (
            "iter_1/practice.jsonl",
            jsonl(practice_row()) + '{"task": "tr',
            r"iter_1/practice\.jsonl, line 2: ",
        ),
        (
            "iter_1/practice.jsonl",
            jsonl(practice_row(practice=["one"])),
            r"iter_1/practice\.jsonl, line 1: .*not of one length",
        ),
        (
            "iter_1/practice.jsonl",
            jsonl(practice_row(observation=3)),
            r"iter_1/practice\.jsonl, line 1: .*3 is not a text",
        ),
        (
            "iter_1/practice.jsonl",
            jsonl(practice_row(task=7, task_type=None)),
            r"practice\.jsonl, line 1: .*'int' object has no attribute",
        ),
        (
            "eval/final_test.jsonl",
            jsonl(episode_row("a"), [1]),
            r"eval/final_test\.jsonl, line 2: ",
        ),
        ("eval/final_test.jsonl", jsonl({"task_id": "a", "steps": []}), r"line 1: .*no 'invalid'"),
    ],
)
def test_what_cannot_be_shown_is_one_line_with_the_file(run, monkeypatch, name, text, error):
    (run / name).unlink()
    if text is not None:
        (run / name).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        write(run, monkeypatch)
    message = stopped.value.code
    assert re.search(error, message) and message.startswith("error: ") and "\n" not in message
    assert not (run / "report.html").exists()


def test_only_names_of_iterations_are_read(run, monkeypatch):
    for name in ("iter_1.bak", "iter_x", "iter_2 copy"):
        (run / name).mkdir()
        (run / name / "practice.jsonl").write_text("not ours")
    shown = embedded(write(run, monkeypatch))
    assert [one["iteration"] for one in shown["practice"]] == [1, 2, 10]


def test_places_that_are_not_there(run, monkeypatch):
    with pytest.raises(SystemExit, match="there is no such directory; give the --out of a finish"):
        write(run / "nowhere", monkeypatch)
    with pytest.raises(SystemExit, match="cannot be written .*give another place with --out"):
        write(run, monkeypatch, "--out", run / "nowhere" / "x.html")


# ------------------------------------------------------------------------- in a real browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VISIBLE = """(selector => [...document.querySelectorAll(selector)].filter(element => {
  const box = element.getBoundingClientRect();
  return element.checkVisibility() && box.width > 0 && box.height > 0;
}).length)"""


class Browser:
    """A headless browser, spoken to over pipes in its DevTools protocol."""

    def __init__(self, program: str, profile: Path):
        from_here, self.to_browser = os.pipe()
        self.from_browser, to_here = os.pipe()
        # The protocol wants the file descriptors 3 and 4.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (from_here, to_here)]
        words = [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        words += ["--disable-background-networking", "--remote-debugging-pipe"]
        words += [f"--user-data-dir={profile}", "about:blank"]
        command = f'exec "$@" 3<&{high[0]} 4>&{high[1]} 2>/dev/null'
        self.process = subprocess.Popen(["bash", "-c", command, "bash", *words], pass_fds=high)
        for end in (from_here, to_here, *high):
            os.close(end)
        self.sent, self.session, self.errors, self.buffer = 0, None, [], b""
        targets = self.call("Target.getTargets")["targetInfos"]
        [page] = [target["targetId"] for target in targets if target["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.sent:
                return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            readable, _, _ = select.select([self.from_browser], [], [], 60)
            assert readable, "the browser does not answer"
            part = os.read(self.from_browser, 1 << 16)
            assert part, "the browser has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        answer = json.loads(message)
        event = answer.get("method")
        if event in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.errors.append(answer["params"])
        return answer

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def visible(self, selector: str) -> int:
        """How many elements of this kind have an area on the page."""
        return self.run(f"{VISIBLE}({json.dumps(selector)})")

    def show(self, section: str) -> None:
        self.run(f"document.querySelector('nav a[href=\"#{section}\"]').click()")
        # The page draws when the hash has changed.
        shown = f"document.querySelector('main section').ariaLabel == '{section}'"
        for _ in range(1000):
            if self.run(shown):
                return
        raise AssertionError(f"{section} is not shown")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to_browser)
        os.close(self.from_browser)


@pytest.fixture
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


def test_a_browser_shows_curves_practice_and_episodes(run, monkeypatch, browser):
    write(run, monkeypatch)
    browser.open(run / "report.html")
    assert browser.run("document.title").startswith("</script><script>alert(1)")
    assert browser.visible(".curve") >= 1 and browser.visible(".point") == 6
    assert browser.visible("h1") == 1 and browser.visible(".tile") == 1
    # The right end of a curve is its last value; the home key reads the first.
    chart = "[...document.querySelectorAll('figure')].find(f => f.textContent.includes('nll'))"
    assert "1.5" in browser.run(f"{chart}.querySelector('.readout').textContent")
    arrow = "new KeyboardEvent('keydown', {key: 'Home'})"
    browser.run(f"{chart}.querySelector('svg').dispatchEvent({arrow})")
    assert "2.5" in browser.run(f"{chart}.querySelector('.readout').textContent")

    browser.show("practice")
    assert browser.visible(".step") == 2 and browser.visible(".turn") == 6
    shown = browser.run("document.querySelector('.step').textContent")
    assert "<img src=x onerror=alert(2)>" in shown and r"\x04" in shown
    assert "▼ log D −4.00" in browser.run("document.querySelector('main').textContent")
    search = "const field = document.querySelector('input[type=search]');"
    event = "field.dispatchEvent(new Event('input'));"
    browser.run(f"{{ {search} field.value = 'no such text'; {event} }}")
    assert browser.visible(".step") == 0
    assert "Nothing matches" in browser.run("document.querySelector('main').textContent")

    browser.show("episodes")
    assert browser.visible(".episode") == 1 and browser.visible("li") == 0
    browser.run("document.querySelector('.episode summary').click()")
    for _ in range(1000):
        if browser.visible("li"):
            break
    assert browser.visible("li") == 3 and browser.visible("li.invalid") == 1
    assert browser.errors == []


def test_a_browser_shows_a_run_without_practice(run, monkeypatch, browser):
    for path in [*run.glob("iter_*/*.jsonl"), *run.glob("eval/*")]:
        path.unlink()
    write(run, monkeypatch)
    browser.open(run / "report.html")
    for section in ("curves", "practice", "episodes"):
        browser.show(section)
        assert browser.visible("main section") == 1
    assert browser.errors == []
