"""Pretrains the small base model that the household's main job starts from, on text of random play: no expert, none of its thoughts,
no task solved on purpose. It stands in for what a real language model brings along: copying names, remembering what was seen where and
what was not, what follows from an action, that another one is worth a try after "Nothing happens.". The expert's words are in its
tokenizer's vocabulary; no text of the expert is trained on.

    python experiments/pretrain.py --out runs/tiny-household        # then: stepagent.py --model runs/tiny-household
    python experiments/pretrain.py --width 64 --out models/tiny-household-small         # the 0.23M parameters of `reproduce.py sizes`
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
from rollout import Encoded, Step, Trajectory, score  # noqa: E402
from model import make_tiny  # noqa: E402


def random_play(env, seed: str, turns: int = 14) -> Trajectory:
    """A player at random: mostly goes where it has not been, opens what is closed, now and then carries an object about, returns to
    what it saw, or tries what cannot be done. The task sentence stands there, and nobody minds it."""
    rng = random.Random(f"random play:{seed}")
    house: House = env.generate(rng, rng.choice(TASK_TYPES), held_out=False)
    episode = HouseholdEpisode(house, {r: list(objects) for r, objects in house.contents.items()})
    observation = f"{episode.view()} Your task: {house.sentence()}."
    trajectory, fresh, remembered = Trajectory(seed), list(house.contents), {}
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
        options += [("again", 0.7), ("look", 0.3), ("inventory", 0.1), ("impossible", 0.5 * bool(here))]
        elsewhere = {o: r for o, r in remembered.items() if r != here}
        options += [("recall", 1.0)] * bool(elsewhere)
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
        elif what == "recall":
            thing, place = rng.choice(sorted(elsewhere.items()))
            action = f"go to {place}"
        elif what == "impossible":
            thing = rng.choice([o for objects in house.contents.values() for o in objects if o not in visible])
            action = rng.choice([f"take {thing} from {here}", f"put {thing} in/on {here}", f"open {rng.choice(list(house.contents))}"])
        else:
            action = what                                                # look, inventory
        aim = action.split(" ")[0]
        if action.startswith("go to "):
            aim = f"{thing} is there" if what == "recall" else f"{action[6:]} {'again' if action[6:] in known else 'is new'}"
        if action.startswith("go to ") and action[6:] in fresh:
            fresh.remove(action[6:])
        if what == "take":
            remembered.pop(action.split(" from ")[0][5:], None)
        trajectory.steps.append(Step(observation, f"Thought: {aim}.\nAction: {action}"))
        observation, _, done, _ = episode.step(trajectory.steps[-1].action)
        if episode.place and not episode.shut(episode.place):
            remembered = {o: r for o, r in remembered.items() if r != episode.place}
            remembered |= {o: episode.place for o in episode.contents[episode.place]}
        if done:
            break
    return trajectory


def conversation(trajectory: Trajectory, tokenizer) -> str:
    messages = [{"role": role, "content": text} for s in trajectory.steps for role, text in (("user", s.observation), ("assistant", s.action))]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="a new folder; let its name begin with tiny")
    parser.add_argument("--width", type=int, default=128, help="hidden size, a multiple of 8 (default: 128, which is 0.85M parameters)")
    parser.add_argument("--updates", type=int, default=3000, help="of training (default: 3000); the rate falls to zero over them")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 0.002)")
    parser.add_argument("--batch", type=int, default=10, help="episodes per update (default: 10)")
    args = parser.parse_args()
    if args.width < 8 or args.width % 8:
        parser.error("--width must be a multiple of 8")
    if Path(args.out).exists():
        sys.exit(f"error: {args.out} exists; give another --out")
    logging.set_verbosity_error()
    env = make_env("household")
    make_tiny([env.expert(t) for t in env.splits["train"][:2000]], Path(args.out), seed=0, width=args.width)       # random weights, tokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    start = time.time()
    for step in range(args.updates):
        texts = [tokenizer(conversation(random_play(env, f"{step}-{i}"), tokenizer)).input_ids for i in range(args.batch)]
        batch = [Encoded(ids, [(1, len(ids))]) for ids in texts]         # a language model: every token is a target
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / 100, 1 - step / args.updates)
        with torch.autocast("cpu", torch.bfloat16):
            logps = score(model, batch).trunk_tokens
        (-logps.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"update {step + 1}  {time.time() - start:.0f} s  nll {-logps.mean().item():.4f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
