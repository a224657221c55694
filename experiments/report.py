"""A run on one page, to look at instead of reading JSON: python experiments/report.py RUN [--out FILE]

Writes RUN/report.html, one file that needs no network: the curves of metrics.jsonl; every practised expert step with its practice
actions beside it; whole episodes. What a run does not have (base and sft practise nothing) is absent, and the page says so.

The data lie as JSON in a script tag. Text of a model or of a world is untrusted: it reaches the page through textContent alone, "<" never
stands in the JSON, and the page's security policy allows its own script (by hash) and no connection.
"""
from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFUSALS = ("Nothing happens.", "No known action", "Unknown action", "That is not an action.")      # how the worlds begin "not understood"


class Texts(dict):
    """Each different text once, by number: the expert's steps return in every iteration, most practice actions equal the expert's."""

    def __missing__(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is not a text")
        return self.setdefault(text, len(self))


def collect(run: Path) -> dict:
    """Everything that the page shows. SystemExit with one line that names the file and the remedy if it is not a finished run."""
    if not run.is_dir():
        sys.exit(f"error: {run}: there is no such directory; give the --out of a finished run of stepagent.py")
    state, about = (whole(run / name) for name in ("state.json", "config.json"))
    if "policy" not in state.get("done", []):
        sys.exit(f"error: {run}/state.json: the run is not finished (last phase: {(state.get('done') or ['none'])[-1]}); give the "
                 "command that began it again, it goes on from there")
    config, texts = about["config"], Texts()
    type_of = task_types(config["env"])
    number = lambda path: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", str(path))]             # iter_10 after iter_9

    def practice(r: dict) -> list:
        k = [r["practice"], r["practice_logp"], r["differs"], r.get("practice_log_d", r["practice"])]
        if len({len(x) for x in k}) > 1:
            raise ValueError("practice, practice_logp, differs and practice_log_d are not of one length")
        return [r["task"], r.get("task_type") or type_of(r["task"]), r["step"], texts[r["observation"]], texts[r["expert"]], r["expert_logp"],
                [texts[x] for x in r["practice"]], r["practice_logp"], r["differs"], r.get("expert_log_d"), r.get("practice_log_d")]

    def episode(r: dict) -> dict:
        bad, missed = invalid_turns(r["steps"], r["invalid"], r.get("last"))
        known = ("task_id", "task_type", "reward", "truncated", "invalid", "steps", "last")
        return {"task": r["task_id"], "type": r["task_type"], "reward": r["reward"], "truncated": r["truncated"], "invalid": r["invalid"],
                "missed": missed, "last": texts[r.get("last") or ""], "more": {k: x for k, x in r.items() if k not in known},
                "turns": [[texts[s["observation"]], texts[s["action"]], wrong] for s, wrong in zip(r["steps"], bad)]}

    files = [(f"{p.parent.name.replace('iter_', 'iteration ')}, own episodes", p) for p in sorted(run.glob("iter_*/episodes.jsonl"), key=number)]
    files += [(p.stem.replace("_", " "), p) for p in sorted(run.glob("eval/*.jsonl"), key=number)]
    return {"about": about, "glossary": glossary(),
            "metrics": lines(run / "metrics.jsonl", lambda r: {"phase": r["phase"], "iteration": r["iteration"], "step": r["step"], **r}),
            "practice": [{"iteration": int(p.parent.name[5:]), "rows": lines(p, practice)}
                         for p in sorted(run.glob("iter_*/practice.jsonl"), key=number)],
            "episodes": [{"name": name, "rows": lines(p, episode)} for name, p in files],
            "texts": list(texts)}                                                  # last: the lines above have filled it


def invalid_turns(steps: list[dict], count: int, last: str | None) -> tuple[list[bool], int]:
    """An episode's file has the number of invalid actions, not which: the world's next answer shows it, where it is one of REFUSALS.
    -> a mark for each turn, and how many invalid ones could not be found."""
    if count in (0, len(steps)):
        return [count > 0] * len(steps), 0
    answers = [s["observation"] for s in steps[1:]] + [last or ""]
    bad = [answer.startswith(REFUSALS) for answer in answers]
    if last is None and sum(bad) == count - 1:                                     # older files lack the answer to the last action
        bad[-1] = True
    return (bad, count - sum(bad)) if sum(bad) <= count else ([False] * len(steps), count)


def task_types(env: str):
    """For practice files whose lines do not have the task's type: household knows it, elsewhere it is what precedes the "/"."""
    @cache
    def household():
        sys.path.insert(0, str(ROOT))
        from envs import make_env
        return make_env("household")
    return lambda task: household().task_type(task) if env == "household" else task.rpartition("/")[0] or "all"


def glossary() -> dict[str, str]:
    """What each figure means, from the README's table."""
    readme = ROOT / "README.md"
    found = re.findall(r"^\| (`.+?) \| (.+) \|$", readme.read_text(encoding="utf-8").partition("## Glossary")[2], re.M) if readme.exists() else []
    return {name: meaning.replace("`", "").replace("\\", "") for names, meaning in found for name in re.findall(r"`(\w+)`", names)}


def whole(path: Path) -> dict:
    if not path.exists():
        sys.exit(f"error: {path} is missing; give the --out of a finished run of stepagent.py")
    [value] = lines(path, dict, path.read_text(encoding="utf-8", errors="replace").strip())
    return value


def lines(path: Path, form, text: str | None = None) -> list:
    """form(object) of each line; a NaN, which JSON does not have, becomes null."""
    if text is None and not path.exists():
        sys.exit(f"error: {path} is missing; give the --out of a finished run of stepagent.py")
    found, rows = [text] if text is not None else path.read_text(encoding="utf-8", errors="replace").split("\n"), []
    for n, line in enumerate(found, 1):
        try:
            if line.strip():
                rows.append(form(json.loads(line, parse_constant=lambda _: None)))
        except Exception as error:                                                 # whatever a damaged line does
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            sys.exit(f"error: {path}, line {n}: not what stepagent.py writes ({what.splitlines()[0][:120] if what else type(error).__name__}); "
                     "restore the file or run again into a new directory")
    return rows


def page(data: dict) -> str:
    """The HTML. "<" is escaped in the JSON, so nothing in it ends the script tag or begins a comment."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'">
<meta name="color-scheme" content="light dark"><title>Run</title><style>{STYLE}</style></head>
<body><header id="top"></header><nav id="nav" aria-label="Sections"></nav><main id="main"></main>
<noscript>This page draws itself with its own script; allow it.</noscript>
<script type="application/json" id="data">{embedded}</script><script>{SCRIPT}</script></body></html>
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="the file to write (default: RUN/report.html)")
    args = parser.parse_args()
    out = args.out or args.run / "report.html"
    html = page(collect(args.run))
    try:
        beside = out.with_name(out.name + ".tmp")
        beside.write_text(html, encoding="utf-8")
        os.replace(beside, out)
    except OSError as error:
        sys.exit(f"error: {out} cannot be written ({error.strerror}); give another place with --out")
    print(f"{out} ({len(html) / 1e6:.1f} MB)")


STYLE = """
:root { --bg: #fbfaf7; --card: #fff; --ink: #1c2025; --soft: #5b636d; --line: #d9d6cf; --accent: #0b5cad; --bad: #a8330b; --mark: #1c2025;
  --s0: #0b5cad; --s1: #b5500a; --s2: #00756a; --s3: #7b3fa0;
  --m3: #f9c49a; --m2: #fbd9bd; --m1: #fdeee1; --z: #f1f0ec; --p1: #e5f0fb; --p2: #c6dff6; --p3: #9cc7ef; --edge-m: #b5500a; --edge-p: #0b5cad }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --card: #1c2025; --ink: #e6e8ea; --soft: #a3abb5; --line: #363c44; --accent: #79b8ff;
  --bad: #ff9a6b; --mark: #e6e8ea; --s0: #79b8ff; --s1: #ffa657; --s2: #56d4c0; --s3: #d2a8ff;
  --m3: #74400f; --m2: #573414; --m1: #3a2a1b; --z: #282c32; --p1: #1d2c3d; --p2: #1b3c5f; --p3: #1a4f85; --edge-m: #ffa657; --edge-p: #79b8ff } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 24px 24px 80px; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 26px; line-height: 1.2; margin: 0 } h2 { font-size: 18px; margin: 32px 0 8px } h3 { font-size: 14px; margin: 0 }
p { margin: 4px 0 } .soft { color: var(--soft) } small, .small { font-size: 13px } a { color: var(--accent) }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
nav#nav { position: sticky; top: 0; z-index: 2; display: flex; gap: 24px; padding: 12px 0 0; margin: 16px 0; background: var(--bg); border-bottom: 1px solid var(--line) }
nav#nav a { padding: 6px 2px; text-decoration: none; color: var(--soft) }
nav#nav a[aria-current] { color: var(--ink); font-weight: 600; box-shadow: inset 0 -3px var(--accent) }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0 8px } .tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 16px }
.tile b { display: block; font-size: 24px; line-height: 1.25 }
.options { columns: 3 260px; margin: 8px 0; font-size: 13px; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 16px }
figure, .step, .episode { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px } figure { padding: 12px 12px 6px }
figure svg { display: block; width: 100%; touch-action: pan-y } svg text { fill: var(--soft); font-size: 11px } .grid { stroke: var(--line); stroke-width: 1 }
.read { font-size: 13px; min-height: 40px } .read b { font-weight: 600; white-space: nowrap } .key { display: inline-block; width: 16px; margin-right: 4px; vertical-align: middle }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 14px } th, td { padding: 4px 16px 4px 0; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } th { font-weight: 600; color: var(--soft) }
.filters { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: end; margin: 8px 0 } label { font-size: 13px; color: var(--soft); display: grid }
select, input, button { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 4px 8px; min-height: 34px }
input { width: 260px } button { cursor: pointer } button:disabled { opacity: .5; cursor: default } button.link { border: 0; background: none; padding: 0; min-height: 0; color: var(--accent); text-decoration: underline }
.pages { display: flex; gap: 12px; align-items: center; margin: 12px 0; font-size: 14px }
.step { padding: 12px 16px; margin-bottom: 12px } .head { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline; font-size: 13px; color: var(--soft) }
.text, .line { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; margin: 0 } .text { max-height: 260px; overflow: auto; margin: 6px 0 10px }
.acts { display: grid; grid-template-columns: repeat(auto-fill, minmax(265px, 1fr)); gap: 8px }
.act { border-radius: 6px; padding: 8px 12px; border-left: 4px solid var(--line); background: var(--z) } .act .head { justify-content: space-between; color: var(--ink); opacity: .85 }
.act.expert { background: none; border: 1px solid var(--line); border-left: 4px double var(--ink) }
.m1, .m2, .m3 { border-left-color: var(--edge-m) } .p1, .p2, .p3 { border-left-color: var(--edge-p) }
.m3 { background: var(--m3) } .m2 { background: var(--m2) } .m1 { background: var(--m1) } .z { background: var(--z) } .p1 { background: var(--p1) } .p2 { background: var(--p2) } .p3 { background: var(--p3) }
.line.do { font-weight: 600 } mark { background: none; color: inherit; text-decoration: underline 2px; text-underline-offset: 3px; text-decoration-color: var(--mark) }
.legend { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; font-size: 13px; margin: 8px 0 } .legend span.sw { padding: 2px 10px; border-radius: 4px; border-left: 4px solid var(--line) }
.legend .m1, .legend .m2, .legend .m3 { border-left-color: var(--edge-m) } .legend .p1, .legend .p2, .legend .p3 { border-left-color: var(--edge-p) }
.episode { margin-bottom: 6px } .episode summary { padding: 8px 16px; cursor: pointer; display: flex; flex-wrap: wrap; gap: 4px 14px } .episode summary::before { content: "\\25B8"; color: var(--soft) }
.episode[open] summary::before { content: "\\25BE" } .goal { flex: 1 1 320px; color: var(--soft); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-width: 0 }
.won { color: var(--s0); font-weight: 600 } .lost, .bad { color: var(--bad); font-weight: 600 } ol.turns { list-style: none; margin: 0; padding: 0 16px 12px }
.turn { display: grid; grid-template-columns: 28px minmax(0, 1fr) minmax(0, 1fr); gap: 4px 16px; padding: 8px 0 8px 8px; border-top: 1px solid var(--line); border-left: 4px solid transparent }
.turn .text { margin: 0 } .turn.wrong { border-left-color: var(--bad) } @media (max-width: 700px) { .turn { grid-template-columns: 28px 1fr } .turn > :nth-child(3) { grid-column: 2 } }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent), T = data.texts, c = data.about.config;
const node = (space, tag, attributes, children) => {
  const made = document.createElementNS("http://www.w3.org/" + space, tag);
  for (const [name, x] of Object.entries(attributes ?? {})) if (typeof x == "function") made.addEventListener(name, x); else if (x != null && x !== false) made.setAttribute(name, x);
  made.append(...children.flat(9).filter(x => x != null).map(x => x instanceof Node ? x : shown(String(x))));      // a string becomes a text node, never markup
  return made;
};
const el = (tag, attributes, ...children) => node("1999/xhtml", tag, attributes, children), sv = (tag, attributes, ...children) => node("2000/svg", tag, attributes, children);
const shown = text => text.replace(/[\x00-\x08\x0b-\x1f]/g, x => String.fromCharCode(0x2400 + x.charCodeAt(0)));    // control characters as their pictures
const percent = x => (100 * x).toFixed(1) + "%", share = name => /^(accuracy|match|success|invalid|clip_share|stopped|d_auc)/.test(name);
const figure = (x, name = "") => x == null ? "–" : share(name) ? percent(x) : (Math.abs(x) >= 1e4 || (x && Math.abs(x) < 1e-3) ? x.toExponential(2) : String(+x.toPrecision(4))).replace("-", "−");
const signed = x => (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(1);
const table = (head, rows) => el("div", {class: "scroll"}, el("table", {}, el("tr", {}, head.map(x => el("th", {scope: "col"}, x))), rows.map(r => el("tr", {}, r.map(x => el("td", {}, x))))));

// ---------------------------------------------------------------- a chart: lines = [{name, points: [[x, y, low, high]]}]
function chart(title, meaning, lines, xname, {name = title, joints = [], where = x => ""} = {}) {
  const W = 360, H = 170, L = 50, R = 12, B = 22, top = 8, all = lines.flatMap(l => l.points), xs = [...new Set(all.map(p => p[0]))].sort((a, b) => a - b);
  let low = Math.min(...all.map(p => p[2] ?? p[1])), high = Math.max(...all.map(p => p[3] ?? p[1]));
  if (high - low < 1e-9) { const room = Math.abs(low) * .1 || .05; low -= low == 0 && share(name) ? 0 : room; high += room; }
  const [x0, x1] = [xs[0], xs.at(-1)], X = x => x1 == x0 ? (L + W - R) / 2 : L + 8 + (x - x0) / (x1 - x0) * (W - L - R - 16), Y = y => H - B - (y - low) / (high - low) * (H - B - top);
  const ticks = (a, b, n) => { const raw = (b - a) / n, ten = 10 ** Math.floor(Math.log10(raw)), s = [1, 2, 5, 10].map(x => x * ten).find(x => x >= raw);
    return Array.from({length: Math.floor(b / s + 1e-6) - Math.ceil(a / s - 1e-6) + 1}, (_, i) => +((Math.ceil(a / s - 1e-6) + i) * s).toPrecision(6)); };
  const tick = y => share(name) ? +(100 * y).toPrecision(4) + "%" : figure(y);
  const marks = [(x, y) => sv("circle", {cx: x, cy: y, r: 3.5}), (x, y) => sv("rect", {x: x - 3.2, y: y - 3.2, width: 6.4, height: 6.4}),
                 (x, y) => sv("path", {d: `M${x} ${y - 4.5}l4.5 8h-9z`}), (x, y) => sv("path", {d: `M${x} ${y - 5}l5 5l-5 5l-5-5z`})];
  const path = points => "M" + points.map(p => X(p[0]).toFixed(1) + " " + Y(p[1]).toFixed(1)).join("L"), cursor = sv("line", {class: "grid", y1: top, y2: H - B, visibility: "hidden"}), dots = sv("g");
  const draw = (l, n) => { const colour = `var(--s${n % 4})`, dash = ["", "6 3", "2 3", "8 3 2 3"][n % 4], many = l.points.length > 60, half = Math.ceil(l.points.length / 60);
    const mean = l.points.map((p, i) => { const w = l.points.slice(Math.max(0, i - half), i + half + 1); return [p[0], w.reduce((s, q) => s + q[1], 0) / w.length]; });
    return sv("g", {stroke: colour, fill: "none"}, many ? sv("path", {d: path(l.points), "stroke-opacity": .35, "stroke-width": 1}) : null,
      sv("path", {d: path(many ? mean : l.points), "stroke-width": 2, "stroke-dasharray": dash}),
      l.points.filter(p => p[2] != null).map(p => sv("path", {d: `M${X(p[0]) + n * 4} ${Y(p[2])}V${Y(p[3])}`, "stroke-width": 1.5})),
      l.points.length > 30 ? null : sv("g", {fill: colour, stroke: "none"}, l.points.map(p => marks[n % 4](X(p[0]) + (p[2] != null ? n * 4 : 0), Y(p[1])))));
  };
  const maps = lines.map(l => new Map(l.points.map(p => [p[0], p]))), read = el("div", {class: "read soft"}), svg = sv("svg", {viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "slider",
    "aria-label": `${title}, by ${xname}`, "aria-valuemin": 0, "aria-valuemax": xs.length - 1},
    ticks(low, high, 3).map(y => [sv("line", {class: "grid", x1: L, x2: W - R, y1: Y(y), y2: Y(y)}), sv("text", {x: L - 6, y: Y(y) + 4, "text-anchor": "end"}, tick(y))]),
    joints.map(x => sv("line", {class: "grid", x1: X(x), x2: X(x), y1: top, y2: H - B, "stroke-dasharray": "3 3"})),
    (x1 == x0 ? [x0] : ticks(x0, x1, Math.min(5, x1 - x0)).filter(Number.isInteger)).map(x => sv("text", {x: X(x), y: H - 6, "text-anchor": "middle"}, x)), cursor, lines.map(draw), dots);
  let at = xs.length - 1;
  const point = (i, visible = true) => {
    at = Math.max(0, Math.min(xs.length - 1, i));
    const x = xs[at], found = maps.map(m => m.get(x));
    for (const [k, y] of [["x1", X(x)], ["x2", X(x)], ["visibility", visible ? "visible" : "hidden"]]) cursor.setAttribute(k, y);
    dots.replaceChildren(...found.map((p, n) => p && visible ? sv("circle", {cx: X(x) + (p[2] != null ? n * 4 : 0), cy: Y(p[1]), r: 5, fill: "none", stroke: `var(--s${n % 4})`, "stroke-width": 2}) : "").filter(Boolean));
    const says = found.map((p, n) => p && [lines[n].name, figure(p[1], name) + (p[2] != null ? ` [${figure(p[2], name)}, ${figure(p[3], name)}]` : ""), n]).filter(Boolean);
    read.replaceChildren(`${xname} ${x}${where(x)}: `, ...says.flatMap(([label, value, n]) => [lines.length > 1 ? sv("svg", {class: "key", viewBox: "0 0 16 8", height: 8},
      sv("line", {x1: 0, x2: 16, y1: 4, y2: 4, stroke: `var(--s${n % 4})`, "stroke-width": 2.5, "stroke-dasharray": ["", "4 2", "2 2", "5 2 2 2"][n % 4]})) : "", el("b", {}, (lines.length > 1 ? label + " " : "") + value), " "]));
    svg.setAttribute("aria-valuenow", at); svg.setAttribute("aria-valuetext", read.textContent);
  };
  const nearest = e => { const box = svg.getBoundingClientRect(), x = (e.clientX - box.left) / box.width * W; return xs.reduce((best, v, i) => Math.abs(X(v) - x) < Math.abs(X(xs[best]) - x) ? i : best, 0); };
  svg.addEventListener("pointermove", e => point(nearest(e)));
  svg.addEventListener("pointerleave", () => point(xs.length - 1, false));
  svg.addEventListener("blur", () => point(at, false));
  svg.addEventListener("keydown", e => { const to = {ArrowLeft: at - 1, ArrowRight: at + 1, PageDown: at - 20, PageUp: at + 20, Home: 0, End: xs.length - 1}[e.key]; if (to != null) { e.preventDefault(); point(to); } });
  point(at, false);
  return el("figure", {}, el("h3", {title: meaning || null}, title), svg, read);
}

// ---------------------------------------------------------------- curves
const TOGETHER = [["accuracy", "accuracy_all"], ["chosen_reward", "rejected_reward"], ["logp_chosen", "logp_rejected"], ["match_text", "match_action"],
  ["log_d_expert", "log_d_agent"], ["d_loss", "d_loss_held"], ["value_loss", "value_loss_held"]], HOUSE = ["lr", "grad_norm", "trajectories", "tokens", "seconds", "d_passes", "value_passes", "practice_tokens"];
const PHASES = {sft: "Imitation (SFT)", "sft+": "Imitation goes on (SFT+)", inspect: "Inspection", discriminate: "Discriminator", implicit: "Reflection, implicit (DPO)", inverse: "Reflection, inverse (PPO)",
  explore: "The agent's own episodes", judge: "Rewards and values", pair: "Pairs of trajectories", retrain: "What is imitated anew"};
const evals = data.metrics.filter(r => r.phase == "eval");
function curves() {
  const parts = [], by = new Map();
  for (const r of data.metrics) by.set(r.phase, [...(by.get(r.phase) ?? []).concat(r)]);
  if (evals.length) {
    const splits = [...new Set(evals.map(r => r.split))], lines = (name, low) => splits.map(s => ({name: s, points: evals.filter(r => r.split == s && r[name] != null).map(r => [r.iteration, r[name], ...(low ? r[low] ?? [] : [])])})).filter(l => l.points.length);
    const types = [...new Set(evals.flatMap(r => Object.keys(r.by_type ?? {})))], last = splits.map(s => evals.findLast(r => r.split == s));
    parts.push(el("h2", {}, "Evaluation"), el("div", {class: "charts"}, [["success", "success_interval"], ["reward", "reward_interval"], ["invalid"], ["steps"]].map(([name, low]) => chart(name, data.glossary[name], lines(name, low), "iteration"))),
      el("p", {class: "small soft"}, "Bars: 95% bootstrap interval over tasks. Iteration 0 is the start."),
      table(["evaluated", "split", "tasks", "success", "95% interval", "mean reward", "turns", "invalid", "truncated"], evals.map(r => [r.name, r.split, r.tasks, percent(r.success), r.success_interval.map(percent).join(" – "), figure(r.reward), figure(r.steps), percent(r.invalid), r.truncated])),
      el("h2", {}, "Success by task type, each split's last evaluation"), table(["task type", ...last.map(r => `${r.split} (${r.name})`)], types.map(t => [t, ...last.map(r => r.by_type?.[t] ? `${percent(r.by_type[t][0])} of ${r.by_type[t][1]}` : "–")])));
  } else parts.push(el("p", {}, "This run was not evaluated."));
  for (const [phase, rows] of by) if (phase != "eval") {
    const updates = rows.some(r => r.lr != null), names = [...new Set(rows.flatMap(r => Object.keys(r).filter(k => typeof r[k] == "number" && !["iteration", "step", "time"].includes(k))))];
    const x = (r, i) => updates ? i : r.iteration, joints = updates ? rows.flatMap((r, i) => i && r.step == 0 ? [i] : []) : [], where = i => updates && rows[i].iteration ? `, iteration ${rows[i].iteration}` : "";
    const draw = some => el("div", {class: "charts"}, some.map(set => chart(set.join(" / "), set.map(n => data.glossary[n]).filter((m, i, a) => m && a.indexOf(m) == i).join("; "),
      set.map(n => ({name: n, points: rows.flatMap((r, i) => r[n] == null ? [] : [[x(r, i), r[n]]])})), updates ? "update" : "iteration", {name: set[0], joints, where})));
    const sets = names.map(n => TOGETHER.find(t => t.includes(n))?.filter(m => names.includes(m)) ?? [n]).filter((s, i, a) => a.findIndex(o => o[0] == s[0]) == i);
    const house = sets.filter(s => HOUSE.includes(s[0])), rest = el("details", {class: "small"}, el("summary", {}, house.map(s => s[0]).join(", ")));
    rest.addEventListener("toggle", () => rest.children.length > 1 || rest.append(draw(house)));
    parts.push(el("h2", {}, PHASES[phase] ?? phase), updates && rows.length > 60 ? el("p", {class: "small soft"}, `${rows.length} updates. Thin: each update; bold: mean of the updates around it. Dashed uprights: a new iteration.`) : null,
      draw(sets.filter(s => !house.includes(s))), house.length ? rest : null);
  }
  return parts;
}

// ---------------------------------------------------------------- long lists: filters above, a page at a time
function listing(controls, choose, render, size) {
  const list = el("div"), count = [el("span"), el("span")], state = {};
  let items = [], page = 0;
  const show = to => {
    const pages = Math.max(1, Math.ceil(items.length / size));
    page = Math.max(0, Math.min(pages - 1, to));
    list.replaceChildren(...items.slice(page * size, page * size + size).map(render), ...(items.length ? [] : [el("p", {}, "Nothing matches; loosen the filters.")]));
    for (const x of count) x.replaceChildren(`${items.length.toLocaleString("en")} found, page ${page + 1} of ${pages}`);
    for (const [b, off] of buttons) b.disabled = off(pages);
  };
  const buttons = [], bar = n => { const back = el("button", {type: "button", click: () => turn(-1)}, "Back"), on = el("button", {type: "button", click: () => turn(1)}, "Next");
    buttons.push([back, () => page == 0], [on, p => page >= p - 1]); return el("div", {class: "pages"}, back, on, count[n]); };
  const turn = by => { show(page + by); if (list.getBoundingClientRect().top < 0) list.scrollIntoView(); };
  const again = () => { items = choose(Object.fromEntries(Object.entries(fields).map(([k, f]) => [k, f.value]))); show(0); };
  const fields = {}, boxes = Object.entries(controls).map(([name, [label, options]]) => el("label", {}, label, fields[name] = options ? el("select", {change: again}, options.map(([v, text]) => el("option", {value: v}, text)))
    : el("input", {type: "search", input: () => { clearTimeout(state.wait); state.wait = setTimeout(again, 150); }})));
  return {part: [el("div", {class: "filters"}, boxes), bar(0), list, bar(1)], again, fields};
}
const matcher = wanted => { const q = wanted.trim().toLowerCase(); if (!q) return () => true; const hits = T.map(t => t.toLowerCase().includes(q)); return (task, numbers) => task.toLowerCase().includes(q) || numbers.some(n => hits[n]); };
const types = rows => [["", "all"], ...[...new Set(rows)].sort().map(t => [t, t])];

/** A turn, its "Action:" line in bold; words that differ from the same line of another turn underlined. */
function turnText(text, other) {
  const compare = other?.split("\n"), words = t => t.split(/(?<=\s)/);
  return text.split("\n").map((line, n) => {
    const a = words(line), b = words(compare?.[n] ?? "");
    let p = 0, q = 0;
    while (p < a.length && p < b.length && a[p].trim() == b[p].trim()) p++;
    while (q < a.length - p && q < b.length - p && a.at(-1 - q) == b.at(-1 - q)) q++;
    const middle = a.slice(p, a.length - q).join("");
    return el("p", {class: /^\W*action\W*:/i.test(line) ? "line do" : "line"}, other == null || !middle ? line : [a.slice(0, p).join(""), el("mark", {}, middle), a.slice(a.length - q).join("")]);
  });
}

// ---------------------------------------------------------------- practice
const action = text => (text.match(/action\W*:\s*(.*)/i)?.[1] ?? text).split(/\s+/).join(" ").trim();
const SCALES = {
  margin: {label: "expert's log-prob minus practice action's", bounds: [-10, -3, -.05, .05, 3, 10], names: ["≤ −10", "−10 to −3", "−3 to 0", "0", "0 to 3", "3 to 10", "≥ 10"], text: x => signed(x) + " nats",
    says: "log-prob of the expert's action minus that of the practice action, under the policy that practised. Below 0 (orange, ▼) the agent prefers its own. It is what DPO's margin is made of; the margin itself, measured against this same policy, is 0 here.", ends: ["agent prefers its own", "agent prefers the expert's"]},
  logd: {label: "log D", bounds: [-2.303, -1.386, -.799, -.598, -.288, -.105], names: ["D < 0.1", "0.1–0.25", "0.25–0.45", "0.45–0.55", "0.55–0.75", "0.75–0.9", "D > 0.9"], text: x => `log D ${figure(x)}`,
    says: "log D, PPO's reward; D is the discriminator's belief that the expert wrote it. −0.69 (D = 0.5): it cannot tell.", ends: ["taken for the agent's", "taken for the expert's"]}};
const LEVELS = ["m3", "m2", "m1", "z", "p1", "p2", "p3"], level = (scale, x) => LEVELS[scale.bounds.filter(b => x > b).length], sign = l => ({m: "▼ ", p: "▲ ", z: ""})[l[0]];
function practice() {
  if (!data.practice.length) return [el("p", {}, `There is no practice: ${c.method} does not inspect itself.`)];
  const steps = data.practice.map(p => p.rows.reduce((m, r) => m.set(r[0], Math.max(m.get(r[0]) ?? 0, r[2] + 1)), new Map())), hasD = data.practice.some(p => p.rows.some(r => r[10])), legend = el("div", {class: "legend"});
  let scale, now = 0;
  const value = (r, k) => scale == SCALES.logd ? r[10]?.[k] : r[5] - r[7][k], worst = r => Math.min(...r[8].flatMap((d, k) => d ? [value(r, k) ?? 0] : [1e9]));
  const choose = f => {
    scale = SCALES[f.colour ?? "margin"]; now = +f.iteration;
    legend.replaceChildren(...[scale.ends[0], ...scale.names.map((n, i) => el("span", {class: "sw " + LEVELS[i]}, sign(LEVELS[i]) + n)), scale.ends[1]].map(x => typeof x == "string" ? el("span", {class: "soft"}, x) : x), el("p", {class: "soft", style: null}, "Colour: " + scale.says));
    const found = matcher(f.search), rows = data.practice[now].rows.filter(r => (!f.type || r[1] == f.type) && found(r[0], [r[3], r[4], ...r[6]])
      && (f.differs == "" || (f.differs == "text" ? r[8].some(x => x) : f.differs == "all" ? r[8].every(x => x) : r[6].some(t => action(T[t]) != action(T[r[4]])))));
    return f.order ? rows.map(r => [worst(r), r]).sort((a, b) => a[0] - b[0]).map(x => x[1]) : rows;
  };
  const card = (r, k) => { const x = value(r, k), l = x == null ? "z" : level(scale, x);
    return el("div", {class: "act " + l}, el("div", {class: "head"}, el("span", {}, `practice ${k + 1}`), el("b", {}, x == null ? "" : sign(l) + scale.text(x))), r[8][k] ? turnText(T[r[6][k]], T[r[4]]) : el("p", {class: "line"}, "= the expert's text"),
      el("div", {class: "head"}, `log-prob ${figure(r[7][k])}`)); };
  const render = r => el("article", {class: "step"}, el("div", {class: "head"}, el("button", {class: "link", type: "button", title: "show this task's steps alone", click: () => { for (const k of ["type", "differs", "order"]) all.fields[k].value = ""; all.fields.search.value = r[0]; all.again(); }}, r[0]),
      el("span", {}, r[1]), el("span", {}, `step ${r[2] + 1} of ${steps[now].get(r[0])}`), el("b", {}, `${r[8].filter(x => x).length} of ${r[8].length} differ`)), el("p", {class: "text"}, T[r[3]]),
    el("div", {class: "acts"}, el("div", {class: "act expert"}, el("div", {class: "head"}, el("b", {}, "expert"), el("span", {}, r[9] != null && scale == SCALES.logd ? scale.text(r[9]) : "")), turnText(T[r[4]]), el("div", {class: "head"}, `log-prob ${figure(r[5])}`)), r[6].map((_, k) => card(r, k))));
  const all = listing({iteration: ["iteration", data.practice.map((p, i) => [i, p.iteration])], type: ["task type", types(data.practice.flatMap(p => p.rows.map(r => r[1])))],
    differs: ["disagrees", [["", "every step"], ["text", "a practice text differs"], ["action", "a practice action differs"], ["all", "all texts differ"]]],
    ...(hasD ? {colour: ["colour", [["logd", "log D"], ["margin", SCALES.margin.label]]]} : {}), order: ["order", [["", "as practised"], ["worst", "lowest value first"]]], search: ["search in texts and task"]}, choose, render, 20);
  all.again();
  return [all.part[0], legend, ...all.part.slice(1)];
}

// ---------------------------------------------------------------- episodes
function episodes() {
  if (!data.episodes.length) return [el("p", {}, "This run has no episodes: it was not evaluated.")];
  const last = Math.max(0, data.episodes.findIndex(e => e.name.startsWith("final"))), goal = e => (T[e.turns[0]?.[0]] ?? "").match(/your task[^.]*\.?/i)?.[0] ?? (T[e.turns[0]?.[0]] ?? "").trim().split("\n").at(-1);
  const turns = e => el("ol", {class: "turns"}, e.turns.map(([o, a, wrong], n) => el("li", {class: wrong ? "turn wrong" : "turn"}, el("span", {class: "soft"}, n + 1), el("p", {class: "text"}, T[o]), el("div", {}, turnText(T[a]), wrong ? el("span", {class: "bad small"}, "✗ invalid: the world did not understand it") : null))),
    T[e.last] ? el("li", {class: "turn"}, el("span", {}, ""), el("p", {class: "text"}, T[e.last]), el("span", {})) : null,
    e.missed ? el("li", {class: "turn"}, el("span", {}, ""), el("p", {class: "bad"}, `${e.missed} of ${e.invalid} invalid actions cannot be told from this world's answers.`)) : null);
  const render = e => { const won = e.reward >= 1, d = el("details", {class: "episode"}, el("summary", {}, el("span", {class: won ? "won" : "lost"}, won ? "✓ success" : "✗ failure"), el("b", {}, e.task), el("span", {}, e.type), el("span", {class: "goal"}, goal(e)),
      el("span", {}, `reward ${figure(e.reward)}`), el("span", {}, `${e.turns.length} turns`), el("span", {class: e.invalid ? "bad" : "soft"}, `${e.invalid} invalid`), e.truncated ? el("span", {}, "cut off") : null, Object.entries(e.more).map(([k, x]) => el("span", {class: "soft"}, `${k} ${typeof x == "number" ? figure(x) : JSON.stringify(x)}`))));
    d.addEventListener("toggle", () => d.children.length > 1 || d.append(turns(e)));
    return d; };
  const all = listing({file: ["played", data.episodes.map((e, i) => [i, `${e.name} (${e.rows.length})`])], outcome: ["outcome", [["", "all"], ["won", "success"], ["lost", "failure"], ["cut", "cut off"], ["bad", "with invalid actions"]]],
    type: ["task type", types(data.episodes.flatMap(e => e.rows.map(r => r.type)))], search: ["search in texts and task"]}, f => { const found = matcher(f.search);
      return data.episodes[f.file].rows.filter(e => (!f.type || e.type == f.type) && ({won: e.reward >= 1, lost: e.reward < 1, cut: e.truncated, bad: e.invalid > 0}[f.outcome] ?? true) && found(e.task, e.turns.flatMap(t => t.slice(0, 2)))); }, render, 50);
  all.fields.file.value = last;
  all.again();
  return all.part;
}

// ---------------------------------------------------------------- the page
const final = evals.filter(r => r.name == "final"), sections = {curves: ["Curves", curves], practice: ["Practice", practice], episodes: ["Episodes", episodes]};
document.title = `${c.method} on ${c.env}`;
document.getElementById("top").append(el("h1", {}, `${c.method} on ${c.env}`), el("p", {class: "soft"}, `${c.model}, seed ${c.seed}, ${data.about.ranks} rank${data.about.ranks == 1 ? "" : "s"}`,
    Object.entries(data.about.versions ?? {}).map(([k, v]) => `, ${k} ${v}`).join(""), data.about.commit ? `, commit ${data.about.commit.slice(0, 10)}` : ""),
  el("div", {class: "tiles"}, final.map(r => el("div", {class: "tile"}, el("b", {}, percent(r.success)), el("span", {class: "soft small"}, `success on ${r.split}, ${r.tasks} tasks`, el("br"), `95% ${r.success_interval.map(percent).join(" – ")}`)))),
  el("details", {class: "small"}, el("summary", {}, "All options"), el("div", {class: "options"}, Object.entries(c).map(([k, v]) => el("div", {}, el("span", {class: "soft"}, k + " "), JSON.stringify(v))))));
const links = Object.entries(sections).map(([id, [name]]) => el("a", {href: "#" + id}, name));
document.getElementById("nav").append(...links);
const made = {};
function go() {
  const id = sections[location.hash.slice(1)] ? location.hash.slice(1) : "curves";
  made[id] ??= el("section", {"aria-label": sections[id][0]}, sections[id][1]());
  document.getElementById("main").replaceChildren(made[id]);
  links.forEach(a => a.hash == "#" + id ? a.setAttribute("aria-current", "page") : a.removeAttribute("aria-current"));
}
addEventListener("hashchange", go);
go();
"""


if __name__ == "__main__":
    main()
