"""Fits a spec to a device: every `auto` becomes a value with a reason, and what the user set stays as it is.

What does not depend on memory comes from defaults.py, the rest from the search; length, rank, targets, method and model
are never changed to make a job fit: ways.py names what would.
"""

from __future__ import annotations

import math

from tunesmith.executors.kernel import catalogue
from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.executors.kernel.sizing import advice, calibration, elsewhere, reasons, size, ways
from tunesmith.executors.kernel.sizing.job import Job
from tunesmith.executors.kernel.sizing.search import Found, search
from tunesmith.executors.kernel.sizing.settle import schedule, settle
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DataReport, Device, Finding, JobSpec, ModelRef, Resolved, Size, TimeEstimate


def unknown_model(ref: ModelRef) -> InputError:
    """The error for a model that neither the catalogue nor this machine knows."""
    near = catalogue.nearest(ref.id)
    return InputError(
        f"The model {ref.id[:200]!r} is not known.",
        why="It is not in the catalogue, no folder of that name is here, and it is not in the Hugging Face cache.",
        fix=f"Did you mean {', '.join(near[:-1])} or {near[-1]}? A local folder with config.json works too.",
        where="model.id",
        code="model.unknown",
    )


def resolve(
    spec: JobSpec, facts: ModelFacts | None, report: DataReport, device: Device, teacher: ModelFacts | None = None
) -> tuple[JobSpec, Size, TimeEstimate | None, list[Resolved], list[Finding]]:
    """The spec without any `auto`, what it needs, how long it takes, why each value was chosen, and what to know.

    A job that cannot fit is returned all the same, with `Size.fits` False and the error finding `size.does_not_fit`
    saying what would. The time is None where nothing is known of the device's speed, or nothing of the data.
    `teacher` is the model that a distillation learns from. Raises InputError("model.unknown") without facts. Cost:
    some milliseconds, tens where it does not fit; no I/O but /proc/cpuinfo.
    """
    if facts is None:
        raise unknown_model(spec.model)
    job, settings = settle(spec, facts, report, device, teacher)
    found = search(job)
    for key, (value, why) in reasons.of(job, found).items():
        settings.auto(key, value, why)
    rows = found.best.knobs.rows
    if settings.values["train.micro_batch"] != rows:
        settings.told.append(Resolved(key="train.micro_batch", value=rows, why=reasons.at_once(job, found)))
    foretold = job.duration(found.best.knobs)
    schedule(settings, job.total, foretold)
    chosen = settings.whole()
    findings = [] if found.fits else [ways.does_not_fit(job, found)]
    if job.known.runs:
        findings.append(Finding(level="info", code="size.calibrated", message=job.known.said()))
    findings += advice.notes(spec, chosen, facts, report, device, timed=foretold is not None)
    return chosen, _size(job, found), foretold, settings.in_order(), findings


def _size(job: Job, found: Found) -> Size:
    knobs, layout = found.best.knobs, found.best.layout
    peak, parts = size.peak(layout), size.parts(layout)
    return Size(
        params=job.facts.params,
        trainable=size.trainable(layout.facts, layout.kind, layout.rank, layout.targets),
        peak_bytes=peak,
        parts=parts if peak.source == "formula" else calibration.parted(parts, peak.expected),
        device_bytes=job.budget,
        fits=found.fits,
        micro_batch=knobs.rows,
        grad_accum=max(1, math.ceil(job.counted / knobs.rows)),
        max_length=job.length,
        activation_checkpointing=layout.checkpointing,
        quantization="nf4" if layout.kind == "qlora" else None,
        rank=None if layout.kind == "none" else layout.rank,
        elsewhere=elsewhere.around(job, found),
    )
