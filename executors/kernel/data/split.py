"""Which rows are held out, and how often a row is seen: decided by a seed and a count, the same on every machine."""

from __future__ import annotations

import heapq
import random


def held_out(count: int, fraction: float) -> int:
    """How many of `count` rows are held out: the nearest whole number, at least 1 and never all; 0 for fraction 0."""
    if fraction <= 0 or count < 2:
        return 0
    return min(count - 1, max(1, round(count * fraction)))


def split(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(train rows, eval rows): ascending, disjoint, together range(count).

    Each row draws a number from Python's Mersenne Twister, whose `random()` is the same in every version and on every
    machine; the rows with the smallest draws are held out.
    """
    draw = random.Random(f"tunesmith split {seed}")
    draws = [draw.random() for _ in range(count)]
    out = heapq.nsmallest(held_out(count, fraction), range(count), key=draws.__getitem__)
    chosen = set(out)
    return [row for row in range(count) if row not in chosen], sorted(out)


def repeats(count: int, weight: float, seed: int) -> list[int]:
    """How often each of `count` rows of a source is seen in an epoch: weight 2 twice, 0.5 a seeded half of them once.

    The total is round(count * weight); no row is seen more than one time oftener than another.
    """
    whole, rest = divmod(round(count * weight), count) if count else (0, 0)
    draw = random.Random(f"tunesmith weight {seed}")
    draws = [draw.random() for _ in range(count)]
    more = set(heapq.nsmallest(rest, range(count), key=draws.__getitem__))
    return [whole + (row in more) for row in range(count)]
