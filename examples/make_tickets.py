"""Writes examples/tickets.jsonl: support tickets answered as strict JSON, a task that a small model visibly learns.

Each row is a conversation: a short system line, a customer's message, and `{"area": ..., "urgent": ...}`. Every message
is a pair of a problem and a mood, both written for this project; the mood alone decides `urgent`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SYSTEM = "Sort the ticket. Answer in JSON."

PROBLEMS: dict[str, list[str]] = {
    "billing": [
        "I was charged twice for {thing} this month",
        "The invoice for {thing} shows the wrong amount",
        "My card was declined but the money is gone",
        "You billed me after I cancelled {thing}",
        "I need a receipt for {thing} with our tax number",
        "The discount code was not applied to {thing}",
        "Please move {thing} from monthly to yearly payment",
        "My refund for {thing} has not arrived",
    ],
    "login": [
        "I cannot sign in to my account",
        "The reset link for my password has expired",
        "The app says my password is wrong after I changed it",
        "I lost the phone that makes my sign-in codes",
        "My account is locked after three tries",
        "The sign-in page keeps sending me back to the start",
        "Our new colleague never got her invitation to sign in",
        "Single sign-on stopped working for our whole team",
    ],
    "delivery": [
        "My parcel with {thing} has not arrived",
        "The tracking page for {thing} has not changed since Monday",
        "{Thing} was delivered to the wrong address",
        "The box arrived open and {thing} was missing",
        "Can you send {thing} to my office instead",
        "The courier left {thing} in the rain",
        "I got somebody else's parcel instead of {thing}",
        "Which day will {thing} be delivered",
    ],
    "defect": [
        "{Thing} stopped working after a week",
        "The screen of {thing} stays black",
        "{Thing} makes a loud noise when I turn it on",
        "The battery of {thing} is empty after an hour",
        "A button on {thing} broke off",
        "{Thing} gets so hot that I cannot touch it",
        "The latest update made {thing} crash all the time",
        "{Thing} no longer connects to the network",
    ],
    "cancel": [
        "I want to end my contract for {thing}",
        "Please close my account and delete my data",
        "How do I stop the subscription for {thing}",
        "I no longer need {thing}, cancel it",
        "Take me off the plan for {thing} at the end of the month",
        "We are leaving your service, please cancel {thing}",
        "I would like to return {thing} and cancel the order",
        "Do not renew {thing} next year",
    ],
}
THINGS = [
    "the lamp",
    "the headset",
    "the router",
    "the camera",
    "the speaker",
    "the watch",
    "the tablet",
    "the scanner",
]
URGENT = [
    "I need this solved today.",
    "This is urgent!",
    "We cannot work until this is fixed.",
    "Please answer within the hour.",
    "Our customers are waiting right now.",
]
CALM = [
    "There is no hurry.",
    "Whenever you have time.",
    "Thanks in advance.",
    "Next week is fine.",
    "Just so that you know.",
]


def tickets(count: int = 320, seed: int = 7) -> list[dict[str, object]]:
    """`count` different conversations, areas and moods in balance, the same for the same seed."""
    source = random.Random(seed)
    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    areas = list(PROBLEMS)
    while len(rows) < count:
        area = areas[len(rows) % len(areas)]
        urgent = source.random() < 0.5
        thing = source.choice(THINGS)
        problem = source.choice(PROBLEMS[area]).format(thing=thing, Thing=thing[0].upper() + thing[1:])
        mood = source.choice(URGENT if urgent else CALM)
        text = f"{problem}. {mood}" if source.random() < 0.7 else f"{mood} {problem}."
        if text in seen:
            continue
        seen.add(text)
        answer = json.dumps({"area": area, "urgent": urgent})
        rows.append(
            {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    source.shuffle(rows)
    return rows


def text() -> str:
    """The file's whole content."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tickets())


if __name__ == "__main__":
    Path(__file__).with_name("tickets.jsonl").write_text(text(), encoding="utf-8")
