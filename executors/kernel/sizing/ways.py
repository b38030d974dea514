"""What would fit where a job does not: each way out is tried, and named with what it needs.

First what leaves the result as it is and only undoes a setting of the user's, then what changes it and so is left to
them: precision, rank, length, another model; and last another card. None of it is done here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from tunesmith.executors.kernel import catalogue
from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.executors.kernel.sizing import defaults, elsewhere, size
from tunesmith.executors.kernel.sizing.job import Job
from tunesmith.executors.kernel.sizing.search import Found
from tunesmith.executors.kernel.sizing.settle import again
from tunesmith.executors.kernel.sizing.size import in_gib
from tunesmith.orchestrator.nouns import Finding, JobSpec

SHORTEST = 128  # tokens: what is cut shorter teaches little
LEAST_RANK = 4
_SAME = ("micro_batch", "activation_checkpointing", "packing")  # of train, with the same result
_FIELDS = {"rows": "micro_batch", "checkpointing": "activation_checkpointing", "packing": "packing"}


def does_not_fit(job: Job, found: Found) -> Finding:
    """The error for what does not fit, with what would. `found` is the least that could be had."""
    peak, sharers, device = size.peak(found.best.layout), job.sharers, job.device
    capped = job.budget < device.memory_bytes // sharers
    whole = in_gib(job.budget * sharers)
    there = f"limits.memory_gb allows {whole}" if capped else f"{device.hardware} has {whole}"
    each, shared = ("Each process", f", for {sharers:,} processes") if sharers > 1 else ("It", "")
    return Finding(
        level="error",
        code="size.does_not_fit",
        message=f"{each} needs about {in_gib(peak.expected)} (up to {in_gib(peak.high)}); {there}{shared}, "
        f"of which {in_gib(job.safe)} can be planned with{' for each' if shared else ''}.",
        where="limits.memory_gb" if capped else f"hardware {device.hardware}",
        fix="This would fit: " + "; ".join(out(job, found)) + ".",
    )


def out(job: Job, found: Found) -> Iterator[str]:
    """Every way out that is known, what changes least first; at least a device that is large enough."""
    same = _same_result(job)
    if same is not None:
        yield same
    others = list(_other_result(job))
    yield from others or (_together(job) if same is None else ())
    yield from _smaller_models(job)
    if job.sharers > 1 and again(job, spec=replace(job.spec, hardware={"processes": 1}))[1].fits:
        yield "hardware.processes=1"
    yield from _larger(job, found)


def _fitting(job: Job, **changes: Any) -> Found | None:
    """What would be found with some things changed; None where that does not fit either."""
    _, found = again(job, **changes)
    return found if found.fits else None


def _takes(found: Found) -> str:
    """ "up to 11.2 GiB"."""
    return f"up to {in_gib(found.best.need)}"


# --- the same result ------------------------------------------------------------------------------------------------


def _free(spec: JobSpec, names: tuple[str, ...]) -> JobSpec:
    """The spec with these of its `train` left to the search."""
    free: dict[str, Any] = dict.fromkeys(names, "auto")
    return replace(spec, train=replace(spec.train, **free))


def _same_result(job: Job) -> str | None:
    """The fewest settings to change that leave the result as it is, together with what they would become."""
    given = [name for name in _SAME if getattr(job.spec.train, name) != "auto"]
    for count in range(1, len(given) + 1):
        for names in combinations(given, count):
            found = _fitting(job, spec=_free(job.spec, names))
            if found is not None:
                changes = [_setting(f"train.{name}", _knob(found, name)) for name in names]
                return f"{' with '.join(changes)} (same result, {_takes(found)})"
    return None


def _knob(found: Found, name: str) -> Any:
    return next(getattr(found.best.knobs, knob) for knob, field in _FIELDS.items() if field == name)


def _setting(key: str, value: Any) -> str:
    return f"{key}={str(value).lower()}"


# --- another result, which a person decides on ----------------------------------------------------------------------


def _other_result(job: Job) -> Iterator[str]:
    """Single settings that would do, all else as it is but for what the search turns freely."""
    for key, value, what in _steps(job):
        yield from _tried(job, _setting(key, value), what, spec=_with(job.spec, key, value))
    yield from _smaller(job)


def _smaller(job: Job, before: str = "", after: str = "") -> Iterator[str]:
    """The largest rank, step or length that would do; `before` and `after`: settings that are needed with it."""
    for key, found, what in (_rank(job), _step(job), _length(job)):
        if found is not None:
            yield f"{before}{_setting(key, found[0])}{after} ({what}, {_takes(found[1])})"


def _tried(job: Job, way: str, what: str = "", **changes: Any) -> Iterator[str]:
    """The way in words where it fits, if need be with the user's settings of what is all the same to the result."""
    spec = changes.pop("spec", job.spec)
    for tried, more in ((spec, ""), (_free(spec, _SAME), _freed(job.spec))):
        found = _fitting(job, spec=tried, **changes)
        if found is not None:
            yield f"{way}{more} ({what}{', ' if what else ''}{_takes(found)})"
            return


def _freed(spec: JobSpec) -> str:
    """Settings of the user's that would have to go as well."""
    given = [name for name in _SAME if getattr(spec.train, name) != "auto"]
    return " with " + " and ".join(f"train.{name}=auto" for name in given) if given else ""


def _steps(job: Job) -> Iterator[tuple[str, Any, str]]:
    """(key, value, what that means) of what may be set otherwise, the least loss first."""
    spec, device = job.spec, job.device
    cap = spec.limits.memory_gb
    if cap is not None and cap * size.GIB < device.memory_bytes:
        yield "limits.memory_gb", math.floor(device.memory_bytes / size.GIB), f"all that {device.hardware} has"
    if spec.train.dtype == "float32" and (device.kind == "cpu" or defaults.has_bf16(device)):
        yield "train.dtype", "bfloat16", ""
    if spec.adapter.kind == "none":
        if spec.train.optimizer == "adamw" and defaults.no_8bit(device) is None:
            yield "train.optimizer", "adamw-8bit", "Adam's moments in 8 bits"
        yield "adapter.kind", "lora", "an adapter instead of all weights"
    if spec.adapter.kind == "dora":
        yield "adapter.kind", "lora", "without DoRA's magnitudes"
    if spec.adapter.kind not in ("auto", "qlora") and defaults.no_4bit(device) is None:
        yield "adapter.kind", "qlora", "the model in 4 bits"


def _with(spec: JobSpec, key: str, value: Any) -> JobSpec:
    section, name = key.split(".")
    return replace(spec, **{section: replace(getattr(spec, section), **{name: value})})


Largest = tuple[str, tuple[int, Found] | None, str]  # key, (value, what is found with it), what that means


def _rank(job: Job) -> Largest:
    full = job.spec.adapter.kind == "none"
    return "adapter.rank", None if full else _halved(job, "adapter.rank", job.rank, LEAST_RANK), "a smaller adapter"


def _step(job: Job) -> Largest:
    key, written = "train.effective_batch", job.made(False).written
    return key, _halved(job, key, job.effective, 1) if written else None, "fewer answers to a step"


def _halved(job: Job, key: str, value: int, least: int) -> tuple[int, Found] | None:
    """(value, found) of the largest power of two below a value, `least` or more, with which it fits."""
    power = 1 << max(0, (value - 1).bit_length() - 1)
    while least <= power < value:
        found = _fitting(job, spec=_with(job.spec, key, power))
        if found is not None:
            return power, found
        power //= 2
    return None


def _length(job: Job) -> Largest:
    """The longest sequences that fit; where the model writes them, the longest answers."""
    written = job.made(False).written
    key, most, what = "train.max_length", job.length, "the largest that fits, longer rows are left out"
    if written:
        section = "distill" if job.spec.method == "distill" else "grpo"
        key, most, what = f"{section}.max_completion", written, "the largest that fits"
    low, high, best = 0, math.ceil(most / 64), None
    while high - low > 1:  # the steps of 64 from `high` on do not fit, those up to `low` do
        middle = (low + high) // 2
        found = _fitting(job, spec=_with(job.spec, key, 64 * middle))
        low, high, best = (middle, high, found) if found is not None else (low, middle, best)
    return key, (64 * low, best) if best is not None and 64 * low >= SHORTEST else None, what


def _together(job: Job) -> Iterator[str]:
    """Settings that would do together, where no single one does."""
    spec, said = _free(job.spec, _SAME), {}
    for key, value, _ in _steps(job):
        if not key.startswith("limits"):
            spec, said[key] = _with(spec, key, value), f"{_setting(key, value)} with "
    tight, _ = again(job, spec=spec)
    ways = [*_smaller(tight, "".join(said.values()), _freed(job.spec))]
    if not ways and tight.rank > LEAST_RANK and spec.adapter.kind != "none":
        said["adapter.rank"] = f"{_setting('adapter.rank', LEAST_RANK)} with "
        tight, _ = again(job, spec=_with(spec, "adapter.rank", LEAST_RANK))
        ways = [*_smaller(tight, "".join(said.values()), _freed(job.spec))]
    yield from ways


def _smaller_models(job: Job) -> Iterator[str]:
    """The next two smaller sizes of the same family and kind, where they fit."""
    facts, sizes = job.facts, dict[int, list[ModelFacts]]()
    for model in catalogue.known():
        if model.family == facts.family and model.instruct == facts.instruct and model.params < facts.params:
            sizes.setdefault(model.params, []).append(model)
    words = {*facts.id.split("-")}
    for count in sorted(sizes, reverse=True)[:2]:
        model = max(sizes[count], key=lambda one: len(words & {*one.id.split("-")}))
        said = [*_tried(job, model.id, facts=model)]
        if not said and job.spec.adapter.kind == "none":
            spec = _with(job.spec, "adapter.kind", "lora")
            said = [*_tried(job, f"{model.id} with adapter.kind=lora", facts=model, spec=spec)]
        yield from said


def _larger(job: Job, found: Found) -> Iterator[str]:
    """The smallest usual card that would do, and how much memory of any device."""
    if job.device.kind == "cuda":
        would = elsewhere.smallest(job)
        if would is not None:
            card, there = would
            yield f"a card of {card.gb} GB such as the {card.name} ({_takes(there)})"
    need = job.sharers * found.best.need / size.SAFE_SHARE[job.device.kind]
    yield f"a device with {math.ceil(need / size.GIB)} GiB"
