"""What goes wrong in a household run: python experiments/failures.py RUN [--iteration 1]

Says how practice differs from the expert, and how long the agent's test episodes keep to what the
scripted expert would do in the very same states (experiments/results/carry.md has both of four
methods).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

from compare import read_rows  # noqa: E402

from benchmarks.household import HouseholdExpert  # noqa: E402
from trajectory import parse_action  # noqa: E402

REFUSED = "Nothing happens."
# What the expert's thought says, what the agent's says -> what happened.
KINDS = {
    ("I look", "I look"): "searches in another order",
    ("I look", "I see"): "sees what is not there",
    ("I see", "I look"): "overlooks the object",
    ("I see", "I see"): "takes another object",
}


def kind_of(expert: str, agent: str) -> str:
    """How a practice action differs. Every situation has one wording."""
    for (in_expert, in_agent), kind in KINDS.items():
        if in_expert in expert and in_agent in agent:
            return kind
    return "other"


def follows_expert(steps: list[dict]) -> list[bool]:
    """For each turn of an episode: does the expert, who has read the same, act alike?"""
    expert = HouseholdExpert(steps[0]["observation"])
    same = []
    for step, following in zip(steps, [*steps[1:], {"observation": REFUSED}]):
        if step["observation"] != REFUSED:
            expert.read(step["observation"])
        try:
            _, wanted = expert.decide()
        except StopIteration:
            # It has looked everywhere.
            wanted = None
        action = parse_action(step["action"])
        same.append(action == wanted)
        went = action is not None and action.lower().startswith("go to ")
        if went and following["observation"] != REFUSED:
            expert.place, expert.closed = action.lower().removeprefix("go to "), False
    return same


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--iteration", type=int, default=1, help="whose practice (default: 1)")
    args = parser.parse_args()
    kinds, practised = Counter(), 0
    for row in read_rows(args.run / f"iter_{args.iteration}/practice.jsonl"):
        practised += len(row["practice"])
        for action, differs in zip(row["practice"], row["differs"]):
            if differs:
                kinds[kind_of(row["expert"], action)] += 1
    print(f"{kinds.total()} of {practised} practice actions differ from the expert's:")
    for kind, count in kinds.most_common():
        print(f"  {count / kinds.total():6.1%}  {kind}")

    until, alike, refused, after = [], 0, 0, 0
    for file in sorted(args.run.glob("eval/final_*.jsonl")):
        for episode in read_rows(file):
            same = follows_expert(episode["steps"])
            until.append(same.index(False) if False in same else len(same))
            after += len(same[until[-1] + 1 :])
            alike += sum(same[until[-1] + 1 :])
            later = episode["steps"][until[-1] + 1 :]
            refused += sum(step["observation"] == REFUSED for step in later)
    print(f"{len(until)} test episodes differ first after {sum(until) / len(until):.2f} turns.")
    print(f"Afterwards {alike / after:.1%} of the actions are what the expert would do,")
    print(f'and {refused / after:.1%} of the turns follow "{REFUSED}".')


if __name__ == "__main__":
    main()
