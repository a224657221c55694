"""Pretrains the small base model of the household's main job, on text of random play.

It sees no expert, none of its thoughts, and no task solved on purpose. It stands in for what a real
language model brings along: copying names, remembering what was seen where, what follows from an
action, that another one is worth a try after "Nothing happens.". The expert's words are in its
tokenizer's vocabulary; no text of the expert is trained on.

    python experiments/pretrain.py --out runs/base     # then: stepagent.py --model runs/base
    python experiments/pretrain.py --out models/tiny-household-small --width 64   # for reproduce.py
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from benchmarks.files import kind
from benchmarks.household import OBJECTS, STATION, TASK_TYPES, House, HouseholdEpisode
from envs import make_env
from rollout import score
from system.family import use_tree_attention
from system.model import make_tiny
from trajectory import Encoded, Step, Trajectory, encode


class RandomPlayer:
    """Goes where it has not been, opens what is closed, now and then carries an object about,
    returns to what it saw, or tries what cannot be done."""

    def __init__(self, rng: random.Random, house: House):
        self.rng, self.house = rng, house
        self.fresh = list(house.contents)
        rng.shuffle(self.fresh)
        # Object -> where it was seen last.
        self.remembered: dict[str, str] = {}

    def options(self, episode: HouseholdEpisode) -> dict[str, float]:
        """What it may do here, and how likely each is."""
        here, hand, visible = episode.place, episode.hand, episode.visible()
        shut = here is not None and episode.shut(here)
        likely = {
            "go": 3.0,
            "open": 8.0 * shut,
            "take": 2.0 * (not hand and any(kind(name) in OBJECTS for name in visible)),
            "put": 1.5 * (hand is not None and here is not None and not shut),
            "treat": 4.0 * (hand is not None and here in STATION.values()),
            "use": 2.0 * ("desklamp 1" in visible),
            "again": 0.7,
            "look": 0.3,
            "inventory": 0.1,
            "impossible": 0.5 * (here is not None),
            "recall": 1.0 * any(place != here for place in self.remembered.values()),
        }
        return {name: weight for name, weight in likely.items() if weight}

    def turn(self, episode: HouseholdEpisode) -> str:
        rng, house, here, hand = self.rng, self.house, episode.place, episode.hand
        likely = self.options(episode)
        [what] = rng.choices(list(likely), list(likely.values()))
        places = [place for place in house.contents if place != here]
        known = [place for place in places if place not in self.fresh]
        if what == "go" or (what == "again" and not known):
            unseen = self.fresh and self.fresh[-1] != here
            return self.go(self.fresh.pop() if unseen else rng.choice(places), known)
        if what == "again":
            # Text that rewards memory.
            return self.go(rng.choice(known), known)
        if what == "recall":
            elsewhere = [pair for pair in self.remembered.items() if pair[1] != here]
            thing, place = rng.choice(sorted(elsewhere))
            return self.go(place, known, f"{thing} is there")
        plain = {"open": f"open {here}", "put": f"put {hand} in/on {here}", "use": "use desklamp 1"}
        action = plain.get(what, what)
        if what == "take":
            taken = rng.choice([name for name in episode.visible() if kind(name) in OBJECTS])
            self.remembered.pop(taken, None)
            action = f"take {taken} from {here}"
        elif what == "treat":
            [verb] = [verb for verb, place in STATION.items() if place == here]
            action = f"{verb} {hand} with {here}"
        elif what == "impossible":
            action = self.impossible(here, episode.visible())
        return f"Thought: {action.split()[0]}.\nAction: {action}"

    def go(self, place: str, known: list[str], thought: str = "") -> str:
        if place in self.fresh:
            self.fresh.remove(place)
        thought = thought or f"{place} {'again' if place in known else 'is new'}"
        return f"Thought: {thought}.\nAction: go to {place}"

    def impossible(self, here: str, visible: list[str]) -> str:
        absent = []
        for objects in self.house.contents.values():
            absent += [name for name in objects if name not in visible]
        thing = self.rng.choice(absent)
        elsewhere = self.rng.choice(list(self.house.contents))
        actions = [f"take {thing} from {here}", f"put {thing} in/on {here}", f"open {elsewhere}"]
        return self.rng.choice(actions)

    def remember(self, episode: HouseholdEpisode) -> None:
        here = episode.place
        if here and not episode.shut(here):
            elsewhere = {name: place for name, place in self.remembered.items() if place != here}
            self.remembered = elsewhere | dict.fromkeys(episode.visible(), here)


def random_play(env, seed: str, turns: int = 14) -> Trajectory:
    """The task sentence stands there, and nobody minds it."""
    rng = random.Random(f"random play:{seed}")
    house = env.generate(rng, rng.choice(TASK_TYPES), held_out=False)
    contents = {place: list(objects) for place, objects in house.contents.items()}
    episode = HouseholdEpisode(house, contents)
    observation = f"{episode.view()} Your task: {house.sentence()}."
    player, trajectory, done = RandomPlayer(rng, house), Trajectory(seed), False
    while not done and len(trajectory.steps) < turns:
        trajectory.steps.append(Step(observation, player.turn(episode)))
        observation, _, done, _ = episode.step(trajectory.steps[-1].action)
        player.remember(episode)
    return trajectory


def train(model, tokenizer, env, options: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    started = time.time()
    for update in range(options.updates):
        batch = []
        for i in range(options.batch):
            ids = encode(random_play(env, f"{update}-{i}"), tokenizer).ids
            # A language model: every token is a target.
            batch.append(Encoded(ids, [(1, len(ids))]))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min((update + 1) / 100, 1 - update / options.updates)
        with torch.autocast("cpu", torch.bfloat16):
            scores = score(model, batch)
        loss = -torch.cat([one.trunk_tokens for one in scores]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if update % 50 == 49:
            seconds = time.time() - started
            print(f"update {update + 1}  {seconds:.0f} s  nll {loss.item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--width", type=int, default=128, help="hidden size (default: 128)")
    parser.add_argument("--updates", type=int, default=3000, help="of training (default: 3000)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    parser.add_argument("--batch", type=int, default=10, help="episodes an update (default: 10)")
    options = parser.parse_args()
    if options.width < 8 or options.width % 8:
        parser.error("--width must be a multiple of 8")
    if Path(options.out).exists():
        parser.error(f"{options.out} exists; give another --out")
    logging.set_verbosity_error()
    env = make_env("household")
    experts = [env.expert(task) for task in env.splits["train"][:2000]]
    make_tiny(experts, Path(options.out), seed=0, width=options.width)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    model = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    # Outside autocast, as it compares the model with itself in float32.
    use_tree_attention(model)
    train(model, tokenizer, env, options)
    model.to(torch.bfloat16).save_pretrained(options.out)


if __name__ == "__main__":
    main()
