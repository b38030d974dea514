"""Which checkpoint an attempt goes on from: its own, one it names, or those of earlier attempts at the same plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.errors import InputError, StorageError
from tunesmith.orchestrator.nouns import Attempt, Finding


def newest(folder: Path, attempt: Attempt, reporter: Reporter) -> Path | None:
    """The first checkpoint that verifies. Each one that does not is named, once.

    Raises InputError (checkpoint.outside) where the attempt names one that is not the job's own.
    """
    checkpoint.sweep(folder / "checkpoints")
    tried: set[Path] = set()
    for path in _candidates(folder, attempt):
        if path.resolve() in tried:
            continue
        tried.add(path.resolve())
        finding = _damage(path)
        if finding is None:
            return path
        reporter.alert(finding.code, finding.message, where=finding.where)
    if attempt.resume_from is not None:
        reporter.alert("checkpoint.none", "No checkpoint verifies, so training starts from the beginning.")
    return None


def _candidates(folder: Path, attempt: Attempt) -> Iterator[Path]:
    """Checkpoints to go on from, best first: own ones, the one named, then of all attempts at this plan the newest.

    An attempt that names none goes on from nobody else's: it was approved to start anew.
    """
    yield from (path for _, path in checkpoint.steps(folder / "checkpoints"))
    named = attempt.resume_from
    if named is None:
        return
    job = folder.parent.parent.resolve()
    path = (job / named).resolve()
    if not path.is_relative_to(job):
        raise InputError("A checkpoint must lie in the job's own folder.", code="checkpoint.outside", where=named)
    if checkpoint.STEP.match(path.name):
        yield path
    places = [path, path.parent, *(place / "checkpoints" for place in _attempts(job, attempt))]
    found = [item for place in places for item in checkpoint.steps(place)]
    yield from (path for _, path in sorted(found, key=lambda item: item[0], reverse=True))


def _attempts(job: Path, attempt: Attempt) -> Iterator[Path]:
    """The folders of earlier attempts at the same plan, the latest first."""
    for number in range(attempt.number - 1, 0, -1):
        folder = job / "attempts" / str(number)
        try:
            doc = json.loads((folder / "attempt.json").read_bytes())
            if doc["plan_hash"] == attempt.plan_hash:
                yield folder
        except (OSError, ValueError, TypeError, KeyError):
            continue


def _damage(folder: Path) -> Finding | None:
    """Why a checkpoint cannot be gone on from; None where it verifies."""
    try:
        step = checkpoint.verify(folder).get("step")
    except StorageError as error:
        return Finding(level="warning", code=error.code, message=f"{error.message} {error.why}", where=folder.name)
    if (step, folder) in checkpoint.steps(folder.parent):
        return None
    message = f"The checkpoint {folder.name} is damaged: it speaks of another step."
    return Finding(level="warning", code="checkpoint.corrupt", message=message, where=folder.name)
