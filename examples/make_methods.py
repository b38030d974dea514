"""Writes the small data sets for methods beyond SFT, all from texts written for this project.

preferences.jsonl   DPO, reward models: a customer's message with a good and a poor reply
ratings.jsonl       KTO: the same kind of replies, each rated by itself
sums.jsonl          GRPO, RLOO, distillation: sums with their results, to be rewarded and never imitated
"""

from __future__ import annotations

import json
import random
from pathlib import Path

MESSAGES = [
    ("My parcel has not arrived.", "track your parcel", "the parcel"),
    ("I was charged twice this month.", "check both charges", "the charge"),
    ("I cannot sign in any more.", "reset your sign-in", "your account"),
    ("The lamp stopped working after a week.", "send you a new lamp", "the lamp"),
    ("Please cancel my subscription.", "end it today", "the subscription"),
    ("The invoice shows the wrong amount.", "correct the invoice", "the invoice"),
    ("The courier left the box in the rain.", "replace what got wet", "the box"),
    ("The app crashes when I open it.", "mend the app", "the app"),
    ("I never got my refund.", "send the refund again", "the refund"),
    ("The screen of the tablet stays black.", "have the tablet repaired", "the tablet"),
    ("You sent me somebody else's order.", "exchange the order", "the order"),
    ("My discount was not applied.", "apply the discount", "the discount"),
]
OPENINGS = ["Hello.", "Good morning.", "Hi there.", "Hello again.", "Good day."]
GOOD = [
    "I am sorry about that. I will {do} and write to you before tomorrow noon.",
    "Thank you for telling us. I will {do} now; you need to do nothing.",
    "That should not have happened. We {do} at once, at no cost to you.",
    "I understand. I will {do} and stay with it until it is done.",
]
POOR = [
    "Please read our help pages about {thing}.",
    "We cannot say anything about {thing}. Somebody may look at it some day.",
    "Are you sure that {thing} is the problem? Most people make a mistake here.",
    "Unfortunately there is nothing to be done about {thing}. Have a nice day!!!",
]


def preferences(count: int = 160, seed: int = 7) -> list[dict[str, object]]:
    """`count` different pairs in a mixed order, the same for the same seed."""
    source = random.Random(seed)
    every = [
        (f"{opening} {message}", good.format(do=do), poor.format(thing=thing))
        for message, do, thing in MESSAGES
        for opening in OPENINGS
        for good in GOOD
        for poor in POOR
    ]
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in source.sample(every, count)
    ]


def ratings(count: int = 160, seed: int = 8) -> list[dict[str, object]]:
    """`count` different replies, half of them good."""
    rows: dict[str, dict[str, object]] = {}
    for row in preferences(4 * count, seed):
        good = len(rows) % 2 == 0
        made = {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
        rows.setdefault(f"{made['prompt']} {made['completion']}", made)
    return list(rows.values())[:count]


def sums(count: int = 160, seed: int = 9) -> list[dict[str, object]]:
    """`count` different sums of two small numbers. The small model gets one answer in six right before training."""
    every = [(first, second) for first in range(2, 20) for second in range(2, 20)]
    return [
        {"question": f"What is {first} + {second}? Answer with a number.", "answer": str(first + second)}
        for first, second in random.Random(seed).sample(every, count)
    ]


FILES = {"preferences.jsonl": preferences, "ratings.jsonl": ratings, "sums.jsonl": sums}


def text(name: str) -> str:
    """A file's whole content."""
    return "".join(json.dumps(row) + "\n" for row in FILES[name]())


if __name__ == "__main__":
    for file in FILES:
        Path(__file__).with_name(file).write_text(text(file), encoding="utf-8")
