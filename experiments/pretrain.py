"""Pretrains the small base model that the household's main job starts from, on text of random play: no expert, none of
its thoughts, no task solved on purpose. It stands in for what a real language model brings along: copying names, remembering what was seen, what
follows from an action. The expert's words are in its tokenizer's vocabulary; no text of the expert is trained on.

    python experiments/pretrain.py --out runs/tiny-household        # then: stepagent.py --model runs/tiny-household

The committed models/tiny-household was made by it in 18 minutes of a shared core; as the budget is time, another machine makes other weights.
"""
from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from envs import OBJECTS, STATION, TASK_TYPES, House, HouseholdEpisode, kind, make_env  # noqa: E402
from rollout import Encoded, Step, Trajectory, encode, score  # noqa: E402
from stepagent import make_tiny  # noqa: E402


def random_play(env, seed: str, turns: int = 12) -> Trajectory:
    """A player that does something possible at random: mostly goes where it has not been, opens what is closed, now and then
    carries an object about. The task sentence stands there, and nobody minds it."""
    rng = random.Random(f"random play:{seed}")
    house: House = env.generate(rng, rng.choice(TASK_TYPES), held_out=False)
    episode = HouseholdEpisode(house, {r: list(objects) for r, objects in house.contents.items()})
    observation = f"{episode.view()} Your task: {house.sentence()}."
    trajectory, fresh = Trajectory(seed), list(house.contents)
    rng.shuffle(fresh)
    for _ in range(turns):
        here, hand = episode.place, episode.hand
        shut = bool(here) and episode.shut(here)
        visible = episode.contents[here] if here and not shut else []
        options = [("go", 3.0)]
        options += [("open", 8.0)] * shut
        options += [("take", 2.0)] * (not hand and any(kind(o) in OBJECTS for o in visible))
        options += [("put", 1.5)] * (bool(hand) and not shut and bool(here))
        options += [("treat", 4.0)] * (bool(hand) and here in STATION.values())
        options += [("use", 2.0)] * ("desklamp 1" in visible)
        options += [("again", 0.7), ("look", 0.3), ("inventory", 0.1)]
        what = rng.choices([o for o, _ in options], [w for _, w in options])[0]
        known = [r for r in house.contents if r not in fresh and r != here]
        if what == "go" or (what == "again" and not known):
            target = fresh.pop() if fresh and fresh[-1] != here else rng.choice([r for r in house.contents if r != here])
            action = f"go to {target}"
        elif what == "again":                                            # back to a place it has seen: text that rewards memory
            action = f"go to {rng.choice(known)}"
        elif what == "open":
            action = f"open {here}"
        elif what == "take":
            action = f"take {rng.choice([o for o in visible if kind(o) in OBJECTS])} from {here}"
        elif what == "put":
            action = f"put {hand} in/on {here}"
        elif what == "treat":
            verb = next(v for v, r in STATION.items() if r == here)
            action = f"{verb} {hand} with {here}"
        elif what == "use":
            action = "use desklamp 1"
        else:
            action = what                                                # look, inventory
        if action.startswith("go to ") and action[6:] in fresh:
            fresh.remove(action[6:])
        aim = action.split(" ", 2)[2] if action.startswith("go to ") else action.split(" ")[0]
        trajectory.steps.append(Step(observation, f"Thought: {aim}.\nAction: {action}"))
        observation, _, done, _ = episode.step(trajectory.steps[-1].action)
        if done:
            break
    return trajectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="a new folder; let its name begin with tiny")
    parser.add_argument("--minutes", type=float, default=18, help="of training on one core (default: 18); the rate falls to zero over them")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 0.002)")
    parser.add_argument("--batch", type=int, default=12, help="episodes per update (default: 12)")
    args = parser.parse_args()
    if Path(args.out).exists():
        sys.exit(f"error: {args.out} exists; give another --out")
    logging.set_verbosity_error()
    env = make_env("household")
    make_tiny([env.expert(t) for t in env.splits["train"][:2000]], Path(args.out), seed=0)       # random weights, tokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    start, step, done = time.time(), 0, 0.0
    while done < 1:
        batch = [encode(random_play(env, f"{step}-{i}"), tokenizer) for i in range(args.batch)]
        batch = [Encoded(e.ids, [(1, len(e.ids))]) for e in batch]       # a language model: every token is a target
        done = min(1.0, (time.time() - start) / (60 * args.minutes))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / 100, 1 - done)
        with torch.autocast("cpu", torch.bfloat16):
            logps = score(model, batch).trunk_tokens
        (-logps.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"update {step}  {time.time() - start:.0f} s  nll {-logps.mean().item():.4f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
