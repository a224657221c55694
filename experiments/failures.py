"""Where a household run's practice differs from the expert, and how its failed episodes first go wrong:
python experiments/failures.py RUN [--iteration 1]
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path


def difference(expert: str, agent: str) -> str:
    """By the one wording that each situation has."""
    if "I look" in expert:
        return "searches in another order" if "I look" in agent else "sees what is not there" if "I see" in agent else "other"
    if "I see" in expert:
        return "overlooks the object" if "I look" in agent else "takes another object" if "I see" in agent else "other"
    return "other"


def shares(counts: Counter) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {n} ({n / total:.0%})" for name, n in counts.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--iteration", type=int, default=1, help="whose practice (default: 1)")
    args = parser.parse_args()
    path = args.run / f"iter_{args.iteration}/practice.jsonl"
    if not path.exists():
        sys.exit(f"error: {path} is missing; give the directory of a run that practised")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    found = Counter(difference(r["expert"], p) for r in rows for p, differs in zip(r["practice"], r["differs"]) if differs)
    print(f"{sum(found.values())} of {sum(len(r['practice']) for r in rows)} practice actions differ: {shares(found)}")

    first, failed, invalid, turns = Counter(), 0, 0, 0
    for file in sorted(args.run.glob("eval/final_*.jsonl")):
        for episode in map(json.loads, file.read_text(encoding="utf-8").split("\n")[:-1]):
            steps, invalid, turns = episode["steps"], invalid + episode["invalid"], turns + len(episode["steps"])
            if episode["reward"] < 1:
                failed += 1
                wrong = next((a["action"] for a, b in zip(steps, steps[1:]) if b["observation"] == "Nothing happens."), None)
                verb = re.search(r"Action: (\w+)", wrong or "")
                first["no invalid action" if wrong is None else verb[1] if verb else "no action"] += 1
    print(f"{failed} failed episodes, by the first action that the world did not understand or allow: {shares(first)}")
    print(f"invalid actions, all episodes: {invalid / turns:.0%}")


if __name__ == "__main__":
    main()
