"""Why the search turned a knob as it did, in words for a person, with what the other way would have meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from tunesmith.executors.kernel.sizing import defaults, size
from tunesmith.executors.kernel.sizing.job import Job
from tunesmith.executors.kernel.sizing.search import Found, Tried
from tunesmith.executors.kernel.sizing.size import in_gib

Test = Callable[[Tried], bool]


def of(job: Job, found: Found) -> dict[str, tuple[object, str]]:
    """Spec key -> (value, why) for each knob that memory and speed decide."""
    knobs = found.best.knobs
    return {
        "adapter.kind": (knobs.kind, _kind(job, found)),
        "train.dtype": (knobs.dtype, _dtype(job, found)),
        "train.micro_batch": (knobs.rows, _rows(job, found)),
        "train.packing": (knobs.packing, _packing(job, found)),
        "train.activation_checkpointing": (knobs.checkpointing, _checkpointing(job, found)),
        "train.optimizer": (knobs.optimizer, _optimizer(job, found)),
    }


def at_once(job: Job, found: Found) -> str:
    """Why TRL takes fewer rows at once than the user allowed."""
    rows, given = found.best.knobs.rows, job.spec.train.micro_batch
    return f"steps are cut into equal micro-batches: of {job.counted} {_what(job)}, {rows} go at once where {given} may"


def _kind(job: Job, found: Found) -> str:
    if found.best.knobs.kind != "qlora":
        return "LoRA trains a small adapter and leaves the model as it is"
    whole = [one for one in found.refused if one.knobs.kind == "lora"]
    bits = 8 * min((size.BYTES[one.knobs.dtype] for one in whole), default=2)
    return f"in {bits} bits the model {_needs(job, whole)}; its weights are held in 4 bits"


def _dtype(job: Job, found: Found) -> str:
    usual, why = defaults.dtype(job.device, found.best.knobs.kind == "none")
    if found.best.knobs.dtype == usual:
        return why
    same = [one for one in found.refused if one.knobs.dtype == usual and one.knobs.kind == found.best.knobs.kind]
    return f"{job.device.hardware} has no bfloat16, and in {usual} it {_needs(job, same)}; losses are scaled"


def _optimizer(job: Job, found: Found) -> str:
    if found.best.knobs.optimizer == "adamw":
        return "the usual one"
    return f"Adam's moments in 8 bits: in 32 it {_needs(job, [one for one in found.refused if _usual(one)])}"


def _usual(one: Tried) -> bool:
    return one.knobs.optimizer == "adamw"


def _packing(job: Job, found: Found) -> str:
    usual, why = defaults.packing(job.spec.method, job.length, job.report.tokens)
    if found.best.knobs.packing == usual:
        return why
    if any(one.knobs.packing for one in found.fitted):
        return f"padded, it is {_times(found, lambda one: one.knobs.packing)} as fast as packed"
    packed = [one for one in found.refused if one.knobs.packing and _alike(one, found)]
    return f"packed, a micro-batch of {job.length:,} tokens {_needs(job, packed)}"


def _checkpointing(job: Job, found: Found) -> str:
    best = found.best.knobs
    if not found.fits:
        return "the least memory that can be had" if best.checkpointing else "asked for"
    other = [one for one in found.fitted if one.knobs.checkpointing != best.checkpointing]
    if not best.checkpointing:
        faster = _times(found, lambda one: one.knobs.checkpointing) if other else ""
        return f"it fits without, {faster} as fast" if faster else "it fits without, and faster"
    if not other:
        return (
            f"without it the step {_needs(job, [one for one in found.refused if _saved(one) and _alike(one, found)])}"
        )
    most = max(one.knobs.rows for one in other)
    faster = _times(found, _saved)
    return f"with it {best.rows} {_what(job)} go at once where {most} would without, {faster} as fast"


def _saved(one: Tried) -> bool:
    """Whether all activations are kept."""
    return not one.knobs.checkpointing


def _alike(one: Tried, found: Found) -> bool:
    """Whether it has the quality of the best."""
    mine, best = one.knobs, found.best.knobs
    return (mine.kind, mine.dtype, mine.optimizer) == (best.kind, best.dtype, best.optimizer)


def _rows(job: Job, found: Found) -> str:
    best = found.best.knobs
    why = _how_many(job, found) if found.fits else "the fewest there can be"
    times = math.ceil(job.counted / best.rows)
    said = f"{why}; {times} of them make a step of {job.counted} {_what(job)}" if times > 1 else why
    return f"{said}, which {job.ranks} processes share" if job.ranks > 1 else said


def _how_many(job: Job, found: Found) -> str:
    best = found.best.knobs

    def series(one: Tried) -> bool:
        mine = one.knobs
        same = (mine.packing, mine.checkpointing) == (best.packing, best.checkpointing)
        return same and _alike(one, found) and mine.rows > best.rows

    if any(series(one) for one in found.fitted):
        return "the fastest foretold"
    over = next((one for one in found.refused if series(one)), None)
    if over is not None:
        return f"the most that fits, as {over.knobs.rows} {_need_up_to(over)} of {in_gib(job.safe)}"
    return "a whole step at once" if best.rows >= job.counted else "as many as make it faster"


def _what(job: Job) -> str:
    return "answers" if job.spec.method == "rloo" else "rows"


def _needs(job: Job, tried: Iterable[Tried]) -> str:
    """ "needs 17.9 GiB at least, of 11.4 GiB that can be planned with"."""
    least = min((one.need for one in tried), default=0)
    return f"needs up to {in_gib(least)} even at its smallest, and {in_gib(job.safe)} can be planned with"


def _need_up_to(one: Tried) -> str:
    return f"would need up to {in_gib(one.need)}"


def _times(found: Found, other: Test) -> str:
    """How many times as fast as the best of the others; empty where there is no telling apart."""
    rate = max((one.rate for one in found.fitted if other(one)), default=0.0)
    ratio = found.best.rate / rate if rate else 0.0
    return f"{ratio:.2f} times" if ratio >= 1.005 else ""
