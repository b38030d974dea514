"""How the rows of a job go through one of TRL's trainers: in which order, how many at once, and what follows a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from tunesmith.executors.kernel.loops.batches import Sampler
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import JobSpec, KtoSpec


@dataclass(frozen=True, slots=True)
class Wish:
    """What shall follow a step or an evaluation."""

    evaluate: bool = False
    save: bool = False
    end: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """How rows become batches: `total` steps of `micro` sequences, `accumulate` times, in the sampler's order.

    `each` sequences are made of a row; `repeats` optimizer steps are taken on the same rows.
    """

    sampler: Sampler
    total: int
    start: int
    micro: int
    accumulate: int
    each: int = 1
    repeats: int = 1


def filled(order: Sequence[int], start: int, count: int) -> list[int]:
    """`count` rows of an epoch from `start` on, going round at its end."""
    return list(islice(cycle(order), start, start + count))


def micro_batch(spec: JobSpec) -> int:
    """Rows that go through the model at once: no more than train.micro_batch, and a whole share of a step.

    With rloo these are answers, of which a step has effective_batch times num_generations. A step of 10 goes by 2, five
    times, where micro-batches may hold 4: TRL weighs them alike, so they must be.
    Raises InputError (kto.batch) where a step has one row: KTO compares the rows of a micro-batch.
    """
    rows = int(spec.train.effective_batch) * (spec.grpo.num_generations if spec.method == "rloo" else 1)
    least = 2 if spec.method == "kto" else 1
    shares = [count for count in range(least, rows + 1) if rows % count == 0]
    if not shares:
        raise InputError(
            "KTO cannot train one row at a time.",
            code="kto.batch",
            why="It compares each prompt with the answer of another row of its batch.",
            where="train.effective_batch",
            fix="Set train.effective_batch to 2 or more.",
        )
    return max((count for count in shares if count <= int(spec.train.micro_batch)), default=shares[0])


def balance(labels: Sequence[bool], kto: KtoSpec) -> str | None:
    """What to change where one kind of answer weighs more than 4/3 of the other.

    The KTO paper's equation 8 asks for 1 <= good / bad <= 4/3; TRL warns by it, even of 112 good among 225.
    """
    good = max(1, sum(labels))
    bad = max(1, len(labels) - sum(labels))
    ratio = kto.desirable_weight * good / (kto.undesirable_weight * bad)
    if ratio < 3 / 4:
        return f"Set kto.desirable_weight to {kto.desirable_weight / ratio:.3g}."
    if ratio > 4 / 3:
        return f"Set kto.undesirable_weight to {kto.undesirable_weight * ratio:.3g}."
    return None
