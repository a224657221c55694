"""A run on one page, to look at instead of reading JSON: python experiments/report.py RUN [--out FILE]

Writes RUN/report.html, one file that needs no network: the curves of metrics.jsonl; every practised expert step with its practice
actions beside it; whole episodes. What a run does not have (base and sft practise nothing) is absent, and the page says so.

The data lie as JSON in a script tag. Text of a model or of a world is untrusted: it reaches the page as text nodes alone, "<" never
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
# How each world begins its answer to an invalid action, and to no other. WebShop and Mind2Web show their page again: not to be told.
REFUSALS = dict.fromkeys(("household", "alfworld"), ("Nothing happens.",)) | {"scienceworld": ("No known action", "Unknown action")} | \
    dict.fromkeys(("hotpotqa", "2wikimultihopqa", "musique"), ("That is not an action.",))


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
    state, about = run / "state.json", run / "config.json"
    done = parsed(state, 1, read(state), lambda r: list(r["done"]))
    if "policy" not in done:
        sys.exit(f"error: {state}: the run is not finished (last phase: {(done or ['none'])[-1]}); give the command that began it again, "
                 "it goes on from there")
    about = parsed(about, 1, read(about), lambda r: {k: r[k] for k in ("config", "versions", "commit", "ranks")})
    type_of, texts = task_types(about["config"]["env"]), Texts()
    number = lambda path: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", str(path))]             # iter_10 after iter_9

    def practice(r: dict) -> list:
        k = [r["practice"], r["practice_logp"], r["differs"], r.get("practice_log_d", r["practice"])]
        if len({len(x) for x in k}) > 1:
            raise ValueError("practice, practice_logp, differs and practice_log_d are not of one length")
        return [r["task"], r.get("task_type") or type_of(r["task"]), r["step"], texts[r["observation"]], texts[r["expert"]],
                r["expert_logp"], [texts[x] for x in r["practice"]], r["practice_logp"], r["differs"], r.get("expert_log_d"),
                r.get("practice_log_d")]

    def episode(r: dict) -> dict:
        bad, missed = invalid_turns(r["steps"], r["invalid"], r.get("last"), REFUSALS.get(about["config"]["env"]))
        known = ("task_id", "task_type", "reward", "truncated", "invalid")
        more = {k: x for k, x in r.items() if k not in (*known, "steps", "last")}
        return {**{k: r[k] for k in known}, "missed": missed, "last": texts[r.get("last") or ""], "more": more,
                "turns": [[texts[s["observation"]], texts[s["action"]], wrong] for s, wrong in zip(r["steps"], bad)]}

    files = [(f"iteration {p.parent.name[5:]}, own episodes", p) for p in sorted(run.glob("iter_*/episodes.jsonl"), key=number)]
    files += [(p.stem.replace("_", " "), p) for p in sorted(run.glob("eval/*.jsonl"), key=number)]
    return {"about": about, "glossary": glossary(),
            "metrics": lines(run / "metrics.jsonl", lambda r: {**{k: r[k] for k in ("phase", "iteration", "step")}, **r}),
            "practice": [{"iteration": int(p.parent.name[5:]), "rows": lines(p, practice)}
                         for p in sorted(run.glob("iter_*/practice.jsonl"), key=number)],
            "episodes": [{"name": name, "own": p.name == "episodes.jsonl", "rows": lines(p, episode)} for name, p in files],
            "texts": list(texts)}                                                  # last: the lines above have filled it


def invalid_turns(steps: list[dict], count: int, last: str | None, refusals: tuple[str, ...] | None) -> tuple[list[bool], int]:
    """An episode's file has the number of its invalid actions, not which; the next answer shows that where a world refuses in words of
    its own. -> a mark for each turn, and the number of invalid actions that could not be found."""
    if count in (0, len(steps)):
        return [count > 0] * len(steps), 0
    bad = [answer.startswith(refusals or ()) for answer in [s["observation"] for s in steps[1:]] + [last or ""]]
    if refusals and last is None and sum(bad) == count - 1:                        # evaluations lack the answer to the last action
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
    text = readme.read_text(encoding="utf-8").partition("## Glossary")[2] if readme.exists() else ""
    found = re.findall(r"^\| (`.+?) \| (.+) \|$", text, re.M)
    return {name: meaning.replace("`", "").replace("\\", "") for names, meaning in found for name in re.findall(r"`(\w+)`", names)}


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        sys.exit(f"error: {path} is missing; give the --out of a finished run of stepagent.py")
    except OSError as error:
        sys.exit(f"error: {path} cannot be read ({error.strerror}); give the --out of a finished run of stepagent.py")


def parsed(path: Path, n: int, text: str, form):
    """form(the object in a line). A NaN, which JSON does not have, becomes null."""
    try:
        return form(json.loads(text, parse_constant=lambda _: None))
    except Exception as error:                                                     # whatever a damaged line does
        what = f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0][:120] or type(error).__name__
        sys.exit(f"error: {path}, line {n}: not what stepagent.py writes ({what}); restore the file or run again into a new directory")


def lines(path: Path, form) -> list:
    return [parsed(path, n, line, form) for n, line in enumerate(read(path).split("\n"), 1) if line.strip()]


def page(data: dict) -> str:
    """The HTML. "<" is escaped in the JSON, so nothing in it ends the script tag or begins a comment."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return (f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
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
:root { --bg: #fbfaf7; --card: #fff; --ink: #1c2025; --soft: #5b636d; --line: #d9d6cf; --accent: #0b5cad; --bad: #a8330b;
  --c0: #0b5cad; --c1: #b5500a; --c2: #00756a; --c3: #7b3fa0; --edge-m: #b5500a; --edge-p: #0b5cad;
  --m3: #f9c49a; --m2: #fbd9bd; --m1: #fdeee1; --z: #f1f0ec; --p1: #e5f0fb; --p2: #c6dff6; --p3: #9cc7ef }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --card: #1c2025; --ink: #e6e8ea; --soft: #a3abb5; --line: #363c44;
  --accent: #79b8ff; --bad: #ff9a6b; --c0: #79b8ff; --c1: #ffa657; --c2: #56d4c0; --c3: #d2a8ff; --edge-m: #ffa657; --edge-p: #79b8ff;
  --m3: #74400f; --m2: #573414; --m1: #3a2a1b; --z: #282c32; --p1: #1d2c3d; --p2: #1b3c5f; --p3: #1a4f85 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 20px 24px 80px; background: var(--bg); color: var(--ink);
  font-variant-numeric: tabular-nums; font-family: system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; font-size: 15px;
  line-height: 1.5 }
h1 { font-size: 26px; line-height: 1.2; margin: 0 } h2 { font-size: 18px; margin: 28px 0 8px } h3 { font-size: 14px; margin: 0 }
p { margin: 4px 0 } .soft { color: var(--soft) } .small { font-size: 13px } .c0 { --c: var(--c0) } .c1 { --c: var(--c1) }
.c2 { --c: var(--c2) } .c3 { --c: var(--c3) } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
nav { position: sticky; top: 0; z-index: 2; display: flex; gap: 24px; padding-top: 8px; margin: 8px 0 16px; background: var(--bg);
  border-bottom: 1px solid var(--line) } nav a { padding: 6px 2px; text-decoration: none; color: var(--soft) }
nav a[aria-current] { color: var(--ink); font-weight: 600; box-shadow: inset 0 -3px var(--accent) }
figure, .tile, .step, .episode { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px }
.tiles, .filters, .legend, .pages, .head, summary.row { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline }
.tiles { gap: 12px } .tile { padding: 8px 16px } .tile b { display: block; font-size: 24px; line-height: 1.25 }
.options { columns: 3 260px; margin: 8px 0; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(272px, 1fr)); gap: 12px; margin: 4px 0 }
figure { padding: 10px 12px 6px } figure > svg { display: block; width: 100%; touch-action: pan-y } svg { fill: none }
.c0, .c1, .c2, .c3 { stroke: var(--c) } .grid { stroke: var(--line) }
svg text { fill: var(--soft); stroke: none; font-size: 11px } svg text.dot { fill: var(--c); text-anchor: middle } .raw { opacity: .35 }
.c1 .dash { stroke-dasharray: 6 3 } .c2 .dash { stroke-dasharray: 2 3 } .c3 .dash { stroke-dasharray: 8 3 2 3 }
.dash { stroke-width: 2 } .read { font-size: 13px; min-height: 40px } .read span { display: inline-block; margin-right: 10px }
.key { width: 20px; margin-right: 4px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 14px } th { color: var(--soft) }
th, td { padding: 3px 20px 3px 0; text-align: right; border-bottom: 1px solid var(--line) } :is(th, td):first-child { text-align: left }
.filters { align-items: end; gap: 8px 16px } label { font-size: 13px; color: var(--soft); display: grid }
select, input, button { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 4px 8px; min-height: 34px; max-width: 100% } input { width: 240px } button { cursor: pointer }
button:disabled { opacity: .5; cursor: default }
button.link { border: 0; background: none; padding: 0; min-height: 0; color: var(--accent); text-decoration: underline }
.pages { align-items: center; margin: 12px 0 } .legend { gap: 4px; font-size: 13px; margin: 12px 0 } .legend p { flex-basis: 100% }
.step { padding: 10px 14px 14px; margin-bottom: 12px } .head { font-size: 13px; color: var(--soft) }
.text, .line { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; margin: 0 } .line.do { font-weight: 600 }
.text { max-height: 260px; overflow: auto } .step > .text { margin: 4px 0 8px }
mark { background: none; color: inherit; text-decoration: underline 1.5px; text-underline-offset: 3px }
.acts { display: grid; grid-template-columns: repeat(auto-fill, minmax(258px, 1fr)); gap: 8px }
.act, .swatch { border-radius: 6px; padding: 8px 12px; border-left: 4px solid var(--line) } .swatch { padding: 2px 10px }
.act .head { justify-content: space-between; color: inherit }
.act.expert { border: 1px solid var(--line); border-left: 4px double var(--ink) }
.m1, .m2, .m3 { border-left-color: var(--edge-m) } .p1, .p2, .p3 { border-left-color: var(--edge-p) } .m3 { background: var(--m3) }
.m2 { background: var(--m2) } .m1 { background: var(--m1) } .z { background: var(--z) } .p1 { background: var(--p1) }
.p2 { background: var(--p2) } .p3 { background: var(--p3) }
.episode { margin-bottom: 6px } summary { cursor: pointer } summary.row { padding: 8px 16px } summary.row::before { content: "\\25B8" }
[open] > summary.row::before { content: "\\25BE" }
.goal { flex: 1 1 300px; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.won { color: var(--c0); font-weight: 600 } .bad { color: var(--bad); font-weight: 600 }
ol { list-style: none; margin: 0; padding: 0 16px 12px } .list { scroll-margin-top: 56px }
li { display: grid; grid-template-columns: 28px minmax(0, 1fr) minmax(0, 1fr); gap: 4px 16px; padding: 8px 0 8px 8px;
  border-top: 1px solid var(--line); border-left: 4px solid transparent } li.wrong { border-left-color: var(--bad) }
@media (max-width: 700px) { body { padding: 12px } li { grid-template-columns: 28px minmax(0, 1fr) }
  li > :nth-child(3) { grid-column: 2 } }
"""

SCRIPT = r"""
"use strict";
const byId = id => document.getElementById(id), data = JSON.parse(byId("data").textContent), T = data.texts, c = data.about.config;

// A string among the children becomes a text node, never markup; control characters in it are spelt out (\x04).
function node(space, tag, attributes, children) {
  const made = document.createElementNS("http://www.w3.org/" + space, tag);
  for (const [name, x] of Object.entries(attributes))
    if (typeof x == "function") made.addEventListener(name, x);
    else if (x != null) made.setAttribute(name, x);
  const shown = text => text.replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f]/g, x => "\\x" + x.charCodeAt(0).toString(16).padStart(2, "0"));
  made.append(...children.flat(9).filter(x => x != null).map(x => x instanceof Node ? x : shown(String(x))));
  return made;
}
const el = (tag, attributes, ...children) => node("1999/xhtml", tag, attributes, children);
const sv = (tag, attributes, ...children) => node("2000/svg", tag, attributes, children);
const [div, span, para] = ["div", "span", "p"].map(tag => (style, ...children) => el(tag, {class: style}, ...children));
const bold = (...children) => el("b", {}, ...children);
const percent = x => (100 * x).toFixed(1) + "%", share = name => /^(accuracy|match|success|invalid|clip_share|stopped)/.test(name);
const extreme = x => x && (Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3);
const short = x => (extreme(x) ? x.toExponential(1) : String(+x.toPrecision(4))).replaceAll("-", "−");
const figure = (name, x) => x == null ? "–" : share(name) ? percent(x) : short(x);
const two = x => x.toFixed(2).replace("-", "−"), unique = items => [...new Set(items)];
const table = (head, rows) => div("scroll", el("table", {}, el("tr", {}, head.map(x => el("th", {scope: "col"}, x))),
  rows.map(r => el("tr", {}, r.map(x => el("td", {}, x))))));

// ------------------------------------------------------------------ a chart of some series: {name, points: [[x, y, low, high], ..]}
function chart(title, meaning, series, unit, joints = [], where = x => "") {
  const W = 300, H = 150, left = 46, right = 288, base = 130, glyph = n => "●■▲◆"[n % 4], colour = n => "c" + n % 4;
  const all = series.flatMap(s => s.points), xs = unique(all.map(p => p[0])).sort((a, b) => a - b);
  const round = gap => [1, 2, 5, 10].map(x => x * 10 ** Math.floor(Math.log10(gap))).find(x => x >= gap * .999);
  const ticks = (a, b, d) => Array.from({length: b - a + 1}, (_, i) => +((a + i) * d).toPrecision(9));
  let low = Math.min(...all.map(p => p[2] ?? p[1])), high = Math.max(...all.map(p => p[3] ?? p[1]));
  if (high - low < 1e-9) {
    const room = Math.abs(low) / 10 || .1;
    [low, high] = [low == 0 ? 0 : low - room, share(title) ? Math.min(1, high + room) : high + room];
  }
  const dy = round((high - low) / 3), y0 = Math.floor(low / dy + 1e-6), y1 = Math.ceil(high / dy - 1e-6), [x0, x1] = [xs[0], xs.at(-1)];
  const dx = x1 > x0 ? Math.max(1, round((x1 - x0) / 5)) : 1;
  const X = x => x1 == x0 ? (left + right) / 2 : left + 8 + (x - x0) / (x1 - x0) * (right - left - 16);
  const Y = y => base - (y / dy - y0) / (y1 - y0) * (base - 10), aside = (p, n) => X(p[0]) + (p[2] == null ? 0 : 4 * n);
  const path = points => "M" + points.map(p => X(p[0]).toFixed(1) + " " + Y(p[1]).toFixed(1)).join("L");
  const draw = ({points}, n) => {
    const many = points.length > 60, half = Math.ceil(points.length / 60), mean = points.map((p, i) => {
      const near = points.slice(Math.max(0, i - half), i + half + 1);
      return [p[0], near.reduce((sum, q) => sum + q[1], 0) / near.length];
    });
    return sv("g", {class: colour(n)}, many ? sv("path", {d: path(points), class: "raw"}) : null,
      sv("path", {d: path(many ? mean : points), class: "dash"}),
      points.length > 30 ? null : points.map(p => [p[2] == null ? null : sv("path", {d: `M${aside(p, n)} ${Y(p[2])}V${Y(p[3])}`}),
        sv("text", {class: "dot", x: aside(p, n), y: Y(p[1]) + 4}, glyph(n))]));
  };
  const cursor = sv("g", {}), read = div("read soft");
  const svg = sv("svg", {viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "slider", "aria-label": `${title}, by ${unit}`,
      "aria-valuemin": 0, "aria-valuemax": xs.length - 1},
    ticks(y0, y1, dy).map(y => [sv("line", {class: "grid", x1: left, x2: right, y1: Y(y), y2: Y(y)}),
      sv("text", {x: left - 6, y: Y(y) + 4, "text-anchor": "end"}, share(title) ? short(100 * y) + "%" : short(y))]),
    joints.map(x => sv("line", {class: "grid", x1: X(x), x2: X(x), y1: 10, y2: base, "stroke-dasharray": "3 3"})),
    ticks(Math.ceil(x0 / dx), Math.floor(x1 / dx), dx).map(x => sv("text", {x: X(x), y: H - 4, "text-anchor": "middle"}, x)),
    series.map(draw), cursor);
  const maps = series.map(s => new Map(s.points.map(p => [p[0], p])));
  let at = xs.length - 1;
  const point = (to, seen = true) => {
    at = Math.max(0, Math.min(xs.length - 1, to));
    const x = xs[at], found = maps.flatMap((m, n) => m.has(x) ? [[m.get(x), n]] : []);
    cursor.replaceChildren(...seen ? [sv("line", {class: "grid", x1: X(x), x2: X(x), y1: 10, y2: base}),
      ...found.map(([p, n]) => sv("circle", {class: colour(n), cx: aside(p, n), cy: Y(p[1]), r: 6}))] : []);
    const key = n => sv("svg", {class: "key " + colour(n), viewBox: "0 0 20 10", height: 10}, sv("path", {d: "M0 5H20", class: "dash"}),
      sv("text", {class: "dot", x: 10, y: 9}, glyph(n)));
    read.replaceChildren(`${unit} ${x}${where(x)}: `, ...found.map(([p, n]) => span(null,
      series.length == 1 ? null : [key(n), series[n].name + " "], bold(figure(title, p[1])),
      p[2] == null ? "" : ` [${figure(title, p[2])}, ${figure(title, p[3])}]`)));
    svg.setAttribute("aria-valuenow", at);
    svg.setAttribute("aria-valuetext", read.textContent);
  };
  svg.addEventListener("pointermove", e => {
    const box = svg.getBoundingClientRect(), x = (e.clientX - box.left) / box.width * W;
    point(xs.reduce((best, v, i) => Math.abs(X(v) - x) < Math.abs(X(xs[best]) - x) ? i : best, 0));
  });
  for (const leave of ["pointerleave", "blur"]) svg.addEventListener(leave, () => point(xs.length - 1, false));
  svg.addEventListener("keydown", e => {
    const to = {ArrowLeft: at - 1, ArrowRight: at + 1, PageDown: at - 20, PageUp: at + 20, Home: 0, End: xs.length - 1}[e.key];
    if (to != null) { e.preventDefault(); point(to); }
  });
  point(at, false);
  return el("figure", {}, el("h3", {title: meaning || null}, title), svg, read);
}

// ------------------------------------------------------------------ curves
const evals = data.metrics.filter(r => r.phase == "eval");
const TOGETHER = [["accuracy", "accuracy_all"], ["chosen_reward", "rejected_reward"], ["logp_chosen", "logp_rejected"],
  ["match_text", "match_action"], ["log_d_expert", "log_d_agent"], ["d_loss", "d_loss_held"], ["value_loss", "value_loss_held"]];
const ASIDE = ["lr", "grad_norm", "trajectories", "tokens", "seconds", "d_passes", "value_passes", "practice_tokens"];
const PHASES = {sft: "Imitation (SFT)", "sft+": "Imitation goes on (SFT+)", inspect: "Inspection", discriminate: "Discriminator",
  implicit: "Reflection, implicit (step-wise DPO)", inverse: "Reflection, inverse (PPO)", explore: "The agent's own episodes",
  judge: "Rewards and values", pair: "Pairs of trajectories", retrain: "Imitation anew"};

function evaluation() {
  const splits = unique(evals.map(r => r.split)), last = splits.map(s => evals.findLast(r => r.split == s));
  const curve = name => chart(name, data.glossary[name], splits.map(s => ({name: s, points: evals.filter(r => r.split == s)
    .map(r => [r.iteration, r[name], ...r[name + "_interval"] ?? []])})), "iteration");
  const interval = r => r.success_interval.map(percent).join(" – ");
  return [div("tiles", evals.filter(r => r.name == "final").map(r => div("tile", bold(percent(r.success)),
      span("soft small", `success on ${r.split}, ${r.tasks} tasks`, el("br", {}), "95% " + interval(r))))),
    el("h2", {}, "Evaluation"), div("charts", ["success", "reward", "invalid", "steps"].map(curve)),
    para("small soft", "Bars and brackets: 95% bootstrap interval over tasks. Iteration 0 is the start."),
    table(["evaluated", "split", "tasks", "success", "95% interval", "mean reward", "turns", "invalid", "truncated"],
      evals.map(r => [r.name, r.split, r.tasks, percent(r.success), interval(r), r.reward.toFixed(3), r.steps.toFixed(1),
        percent(r.invalid), r.truncated])),
    el("h2", {}, "Success by task type, each split's last evaluation"),
    table(["task type", ...last.map(r => `${r.split} (${r.name})`)], unique(last.flatMap(r => Object.keys(r.by_type))).map(t => [t,
      ...last.map(r => r.by_type[t] ? `${percent(r.by_type[t][0])} of ${r.by_type[t][1]}` : "–")]))];
}

function phase(name) {
  const rows = data.metrics.filter(r => r.phase == name), updates = rows.some(r => r.lr != null), unit = updates ? "update" : "iteration";
  const isFigure = k => !["iteration", "step", "time"].includes(k) && rows.some(r => typeof r[k] == "number");
  const names = unique(rows.flatMap(Object.keys)).filter(isFigure), whole = set => set.every(n => names.includes(n));
  const sets = unique(names.map(n => TOGETHER.find(t => t.includes(n) && whole(t)) ?? n)).map(s => [s].flat());
  const joints = updates ? rows.flatMap((r, i) => i && r.step == 0 ? [i] : []) : [];
  const points = n => rows.flatMap((r, i) => r[n] == null ? [] : [[updates ? i : r.iteration, r[n]]]);
  const where = x => updates && rows[x].iteration ? ` (iteration ${rows[x].iteration})` : "";
  const draw = some => div("charts", some.map(set => chart(set.join(" / "), unique(set.map(n => data.glossary[n])).join("; "),
    set.map(n => ({name: n, points: points(n)})), unit, joints, where)));
  const [main, aside] = [false, true].map(w => sets.filter(s => ASIDE.includes(s[0]) == w));
  const more = el("details", {class: "small", toggle: () => more.children.length > 1 || more.append(draw(aside))},
    el("summary", {}, aside.flat().join(", ")));
  const note = `${rows.length} updates. Thin: each; bold: the mean around it. Dashed uprights: a new iteration.`;
  return [el("h2", {}, PHASES[name] ?? name), updates && rows.length > 60 ? para("small soft", note) : null, draw(main),
    aside.length ? more : null];
}
const curves = () => [evals.length ? evaluation() : para(null, "This run was not evaluated."),
  unique(data.metrics.map(r => r.phase)).filter(name => name != "eval").map(phase)].flat();

// ------------------------------------------------------------------ long lists: filters above, a page at a time
function listing(controls, choose, render, size) {
  const list = div("list"), fields = {}, bars = [];
  let items = [], page = 0, wait = 0;
  const show = () => {
    const pages = Math.max(1, Math.ceil(items.length / size));
    list.replaceChildren(...items.slice(page * size, page * size + size).map(render));
    for (const [back, next, count] of bars) {
      [back.disabled, next.disabled] = [page == 0, page == pages - 1];
      count.textContent = items.length ? `${items.length} found, page ${page + 1} of ${pages}` : "Nothing matches; loosen the filters.";
    }
  };
  const turn = by => { page += by; show(); if (list.getBoundingClientRect().top < 0) list.scrollIntoView(); };
  const again = () => { items = choose(Object.fromEntries(Object.entries(fields).map(([k, f]) => [k, f.value]))); page = 0; show(); };
  const bar = () => {
    const [back, next] = [["Back", -1], ["Next", 1]].map(([name, by]) => el("button", {type: "button", click: () => turn(by)}, name));
    bars.push([back, next, el("span", {role: "status"})]);
    return div("pages", bars.at(-1));
  };
  const field = options => options ? el("select", {change: again}, options.map(([value, text]) => el("option", {value}, text)))
    : el("input", {type: "search", input: () => { clearTimeout(wait); wait = setTimeout(again, 150); }});
  const filters = div("filters", Object.entries(controls).map(([k, [label, options]]) =>
    el("label", {}, label, fields[k] = field(options))));
  return {filters, again, fields, rest: [bar(), list, bar()]};
}

function matcher(wanted) {
  const q = wanted.trim().toLowerCase(), hits = q && T.map(t => t.toLowerCase().includes(q));
  return (task, texts) => !q || task.toLowerCase().includes(q) || texts.some(n => hits[n]);
}
const choices = types => [["", "all"], ...unique(types).sort().map(t => [t, t])];

// A turn, its "Action:" line bold; the words that differ from the same line of another turn are underlined.
function turnText(text, other) {
  const words = t => t.split(/(?<=\s)/);
  return text.split("\n").map((line, n) => {
    const a = words(line), b = words(other?.split("\n")[n] ?? "");
    let p = 0, q = 0;
    while (p < Math.min(a.length, b.length) && a[p].trim() == b[p].trim()) p++;
    while (q < Math.min(a.length, b.length) - p && a.at(-1 - q) == b.at(-1 - q)) q++;
    const [before, middle, after] = [a.slice(0, p), a.slice(p, a.length - q), a.slice(a.length - q)].map(x => x.join(""));
    return para(/^\W*action\W*:/i.test(line) ? "line do" : "line", other == null ? line
      : [before, el("mark", {}, middle.trimEnd()), middle.slice(middle.trimEnd().length) + after]);
  });
}

// ------------------------------------------------------------------ practice
const LEVELS = ["m3", "m2", "m1", "z", "p1", "p2", "p3"], sign = level => ({m: "▼ ", p: "▲ ", z: ""})[level[0]];
const SCALES = {
  margin: {bounds: [-10, -3, -.005, .005, 3, 10], names: ["under −10", "−10 to −3", "−3 to 0", "0", "0 to 3", "3 to 10", "over 10"],
    text: x => (x > 0 ? "+" : "") + two(x) + " nats", ends: ["agent prefers its own", "agent prefers the expert's"],
    says: "Log-prob of the expert's action minus the practice action's, under the policy that practised: what DPO's margin grows from " +
      "(the margin itself, measured against that same policy, is 0 there)."},
  logd: {bounds: [.1, .25, .45, .55, .75, .9].map(Math.log),
    names: ["D under 0.1", "to 0.25", "to 0.45", "to 0.55", "to 0.75", "to 0.9", "over 0.9"],
    text: x => "log D " + two(x), ends: ["taken for the agent's", "taken for the expert's"],
    says: "log D, PPO's reward: D is the discriminator's belief that the expert wrote the action in this state. At log D −0.69, D = 0.5, " +
      "it cannot tell."}};
// The row of one expert step, as report.py packs it.
const unpack = ([task, type, step, observation, expert, logp, texts, logps, differs, logD, logDs]) =>
  ({task, type, step, observation, expert, logp, texts, logps, differs, logD, logDs});

function practice() {
  if (!data.practice.length) {
    const from = data.episodes.some(e => e.own) ? "whole episodes" : "the expert alone";
    return [para(null, `This run has no practice: ${c.method} ${c.method == "base" ? "does not learn" : "learns from " + from}.`)];
  }
  const iterations = data.practice.map(p => p.rows.map(unpack)), every = iterations.flat(), lengths = new Map(), legend = div("legend");
  for (const r of every) lengths.set(r.task, Math.max(lengths.get(r.task) ?? 0, r.step + 1));
  const action = n => (T[n].match(/action\W*:\s*(.*)/i)?.[1] ?? T[n]).trim();
  const DIFFERS = {"": () => true, text: r => r.differs.some(Boolean), action: r => r.texts.some(t => action(t) != action(r.expert)),
    all: r => r.differs.every(Boolean)};
  let scale;
  const value = (r, k) => scale == SCALES.logd ? r.logDs?.[k] : r.logp - r.logps[k];
  const lowest = r => Math.min(...r.differs.map((d, k) => d ? value(r, k) ?? 0 : Infinity));
  const choose = f => {
    scale = SCALES[f.colour ?? "margin"];
    const swatches = scale.names.map((name, i) => span("swatch " + LEVELS[i], sign(LEVELS[i]) + name));
    legend.replaceChildren(span("soft", scale.ends[0]), ...swatches, span("soft", scale.ends[1]), para("soft", scale.says));
    const found = matcher(f.search), rows = iterations[f.iteration].filter(r => (!f.type || r.type == f.type) && DIFFERS[f.differs](r)
      && found(r.task, [r.observation, r.expert, ...r.texts]));
    return f.order ? rows.map(r => [lowest(r), r]).sort((a, b) => a[0] - b[0]).map(x => x[1]) : rows;
  };
  const card = (r, k) => {
    const x = value(r, k), level = x == null ? "z" : LEVELS[scale.bounds.filter(b => x > b).length];
    return div("act " + level, div("head", `practice ${k + 1}`, bold(x == null ? "" : sign(level) + scale.text(x))),
      r.differs[k] ? turnText(T[r.texts[k]], T[r.expert]) : para("line", "= the expert's text"),
      div("head", "log-prob " + two(r.logps[k])));
  };
  const alone = task => {
    for (const k of ["type", "differs", "order"]) all.fields[k].value = "";
    all.fields.search.value = task;
    all.fields.search.focus();
    all.again();
  };
  const render = r => el("article", {class: "step"},
    div("head", el("button", {class: "link", type: "button", title: "this task's steps alone", click: () => alone(r.task)}, r.task),
      span(null, r.type), span(null, `step ${r.step + 1} of ${lengths.get(r.task)}`),
      bold(`${r.differs.filter(Boolean).length} of ${r.differs.length} differ`)),
    para("text", T[r.observation]),
    div("acts", div("act expert", div("head", bold("expert"), scale == SCALES.logd && r.logD != null ? scale.text(r.logD) : ""),
      turnText(T[r.expert]), div("head", "log-prob " + two(r.logp))), r.texts.map((_, k) => card(r, k))));
  const colours = [["logd", "log D"], ["margin", "log-prob, expert's minus practice's"]];
  const all = listing({iteration: ["iteration", data.practice.map((p, i) => [i, p.iteration])],
    type: ["task type", choices(every.map(r => r.type))],
    differs: ["disagrees", [["", "every step"], ["text", "a text differs"], ["action", "an action differs"], ["all", "all texts differ"]]],
    ...(every.some(r => r.logDs) ? {colour: ["colour", colours]} : {}),
    order: ["order", [["", "as practised"], ["lowest", "lowest value first"]]], search: ["search texts and tasks"]}, choose, render, 20);
  all.again();
  return [all.filters, legend, all.rest];
}

// ------------------------------------------------------------------ episodes
function episodes() {
  if (!data.episodes.length) return [para(null, "This run has no episodes: it was not evaluated.")];
  const goal = text => text.match(/your task[^.]*\.?/i)?.[0] ?? text.trim().split("\n").at(-1);
  const row = (n, seen, done, wrong) => el("li", {class: wrong ? "wrong" : null}, span("soft", n), para("text", seen), div(null, done,
    wrong ? span("bad small", "✗ invalid: the world did not understand it, or cannot do it") : null));
  const turns = e => el("ol", {}, e.turns.map(([seen, done, wrong], n) => row(n + 1, T[seen], turnText(T[done]), wrong)),
    T[e.last] ? row("", T[e.last]) : null,
    e.missed ? row("", `Invalid actions not marked here: ${e.missed}; this world's answers do not tell which.`) : null);
  const render = e => {
    const won = e.reward >= 1, plain = x => typeof x == "number" ? short(x) : JSON.stringify(x);
    const more = Object.entries(e.more).map(([k, x]) => span("soft", `${k} ${plain(x)}`));
    const fill = () => made.children.length > 1 || made.append(turns(e));
    const made = el("details", {class: "episode", toggle: fill}, el("summary", {class: "row"},
      span(won ? "won" : "bad", won ? "✓ success" : "✗ failure"), bold(e.task_id), span(null, e.task_type),
      span("goal soft", goal(T[e.turns[0]?.[0]] ?? "")), span(null, `reward ${short(e.reward)}`), span(null, `${e.turns.length} turns`),
      span(e.invalid ? "bad" : "soft", `${e.invalid} invalid`), e.truncated ? span(null, "cut off") : null, more));
    return made;
  };
  const OUTCOME = {"": () => true, won: e => e.reward >= 1, lost: e => e.reward < 1, cut: e => e.truncated, bad: e => e.invalid > 0};
  const choose = f => {
    const found = matcher(f.search);
    return data.episodes[f.file].rows.filter(e => (!f.type || e.task_type == f.type) && OUTCOME[f.outcome](e)
      && found(e.task_id, e.turns.flatMap(t => [t[0], t[1]])));
  };
  const all = listing({file: ["played", data.episodes.map((e, i) => [i, `${e.name} (${e.rows.length})`])],
    outcome: ["outcome", [["", "all"], ["won", "success"], ["lost", "failure"], ["cut", "cut off"], ["bad", "with invalid actions"]]],
    type: ["task type", choices(data.episodes.flatMap(e => e.rows.map(r => r.task_type)))],
    search: ["search texts and tasks"]}, choose, render, 50);
  all.fields.file.value = Math.max(0, data.episodes.findIndex(e => e.name.startsWith("final")));
  all.again();
  return [all.filters, all.rest];
}

// ------------------------------------------------------------------ the page
const about = data.about, sections = {curves, practice, episodes}, made = {};
document.title = `${c.method} on ${c.env}`;
const facts = {seed: c.seed, ranks: about.ranks, ...about.versions, ...about.commit && {commit: about.commit.slice(0, 10)}};
byId("top").append(el("h1", {}, document.title), para("soft", [c.model, ...Object.entries(facts).map(x => x.join(" "))].join(", ")),
  el("details", {class: "small"}, el("summary", {}, "All options"),
    div("options", Object.entries(c).map(([k, v]) => div(null, span("soft", k + " "), JSON.stringify(v))))));
const links = Object.keys(sections).map(id => el("a", {href: "#" + id}, id[0].toUpperCase() + id.slice(1)));
byId("nav").append(...links);
function go() {
  const id = location.hash.slice(1) in sections ? location.hash.slice(1) : "curves";
  made[id] ??= el("section", {"aria-label": id}, sections[id]());
  byId("main").replaceChildren(made[id]);
  for (const a of links) a.hash == "#" + id ? a.setAttribute("aria-current", "page") : a.removeAttribute("aria-current");
}
addEventListener("hashchange", go);
go();
"""


if __name__ == "__main__":
    main()
