"""Why an attempt ended: a typed cause from its state, exit code and last error, with the evidence. Pure.

The causes: succeeded, stopped, cancelled, timeout, lost, oom.cuda, oom.host, nan, storage, data, input, backend,
killed, code. Remedies are proposed elsewhere; `retry` by a person continues from the newest checkpoint.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.graph.route import newest
from tunesmith.orchestrator.nouns import Finding, JobSpec
from tunesmith.orchestrator.ports import AttemptView, JobView
from tunesmith.orchestrator.states import AttemptState

MAX_TEXT = 2000
EXIT_STOPPED = 75
EXIT_KILLED = 128 + signal.SIGKILL

_CUDA_MEMORY = re.compile(
    r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation", re.I
)
_HOST_MEMORY = re.compile(r"MemoryError|can't allocate memory|Cannot allocate memory|std::bad_alloc", re.I)
_STORAGE = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|Input/output error|File too large", re.I
)
_NAN = re.compile(r"\b(nan|non-finite|not finite)\b", re.I)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A cause, the findings that show it, and one sentence for a person with the way out."""

    cause: str
    evidence: tuple[Finding, ...]
    message: str
    fix: str


def diagnose(attempt: AttemptView, spec: JobSpec | None, view: JobView) -> Diagnosis:
    """The cause of an ended attempt. ValueError where the attempt has not ended."""
    cause = _cause(attempt, view)
    message, fix = _WORDS[cause]
    words = {
        "number": attempt.number,
        "batch": spec.train.micro_batch if spec else "?",
        "length": spec.train.max_length if spec else "?",
    }
    return Diagnosis(cause, _evidence(cause, attempt), message.format(**words), fix.format(**words, job=view.id))


def resume_point(view: JobView) -> str | None:
    """The newest checkpoint that the newest attempt can go on from, relative to the job's folder; None without one.

    That is its own, or the one it began with. Those of earlier attempts may belong to another plan: an attempt that
    began with none is the first, the first of another plan, or follows one that had nothing to hand on.
    """
    last = newest(view)
    return None if last is None else last.checkpoint or last.resumed_from


def error_doc(attempt: AttemptView, found: Diagnosis) -> dict[str, Any]:
    """The error that ends the job: the attempt's own where it left one, otherwise the diagnosis in words."""
    own = attempt.error or {}
    message = str(own.get("message") or "")[:MAX_TEXT]
    return {
        "type": "JobFailed",
        "code": str(own.get("code") or f"attempt.{found.cause}"),
        "message": message or found.message,
        "why": str(own.get("why") or "")[:MAX_TEXT] or (found.message if message else ""),
        "fix": str(own.get("fix") or "")[:MAX_TEXT] or found.fix,
        "where": str(own.get("where") or f"attempt {attempt.number}")[:MAX_TEXT],
        "cause": found.cause,
        "exit_code": 1,
    }


def _cause(attempt: AttemptView, view: JobView) -> str:
    match attempt.state:
        case AttemptState.SUCCEEDED:
            return "succeeded"
        case AttemptState.LOST:
            return "lost"
        case AttemptState.FAILED | AttemptState.CANCELLED:
            pass
        case _:
            raise ValueError(f"attempt {attempt.number} has not ended: {attempt.state}")
    error = attempt.error or {}
    parts = set(str(error.get("code") or "").lower().replace("_", ".").split("."))
    if parts & {"deadline", "timeout"}:
        return "timeout"
    if attempt.state is AttemptState.CANCELLED or view.wanted == "cancel":
        asked = view.wanted == "cancel" or "cancelled" in parts
        return "stopped" if attempt.exit_code == EXIT_STOPPED and not asked else "cancelled"
    if attempt.exit_code == EXIT_STOPPED or "stopped" in parts:
        return "stopped"
    return _failure(attempt, error, parts)


def _failure(attempt: AttemptView, error: Mapping[str, Any], parts: set[str]) -> str:
    """What broke. Codes of our own come first; text is only matched where no code speaks."""
    kind, text = str(error.get("type") or ""), f"{error.get('message') or ''} {error.get('why') or ''}"[:MAX_TEXT]
    memory = "oom" in parts or "memory" in parts
    if _CUDA_MEMORY.search(text) or (memory and "cuda" in parts):
        return "oom.cuda"
    if memory or kind == "MemoryError" or _HOST_MEMORY.search(text):
        return "oom.host"
    if parts & {"nan", "nonfinite"}:
        return "nan"
    if kind == "StorageError" or "storage" in parts or _STORAGE.search(text):
        return "storage"
    if "data" in parts:
        return "data"
    if kind in ("InputError", "NotReady"):
        return "input"
    if kind == "BackendUnavailable" or "backend" in parts:
        return "backend"
    if "killed" in parts:  # the executor saw the signal, and no memory kill beside it
        return "killed"
    if _NAN.search(text):
        return "nan"
    if error and parts != {"kernel", "exit"}:  # that one only says that nothing was said
        return "code"
    if attempt.exit_code == EXIT_KILLED:
        return "oom.host"
    if attempt.exit_code is not None and 128 < attempt.exit_code < 128 + signal.NSIG:
        return "killed"
    return "input" if attempt.exit_code == 2 else "code"


def _evidence(cause: str, attempt: AttemptView) -> tuple[Finding, ...]:
    where = f"attempt {attempt.number}"
    found: list[Finding] = []
    error = attempt.error or {}
    if error and cause != "succeeded":
        found.append(
            Finding(
                level="error" if attempt.state is AttemptState.FAILED else "info",
                code=str(error.get("code") or "attempt.error"),
                message=str(error.get("message") or "no message")[:MAX_TEXT],
                where=str(error.get("where") or where)[:MAX_TEXT],
                fix=str(error.get("fix") or "")[:MAX_TEXT],
            )
        )
    if attempt.exit_code is not None:
        message = f"The process ended with code {attempt.exit_code}{_signal_name(attempt.exit_code)}."
        if attempt.exit_code == EXIT_KILLED and cause == "oom.host":
            message += " The system sends this when memory runs out; a `kill -9` looks the same."
        found.append(Finding(level="info", code="attempt.exit", message=message, where=where))
    elif attempt.state is AttemptState.LOST:
        message = "The process is gone and left no exit record."
        found.append(Finding(level="error", code="attempt.lost", message=message, where=where))
    if attempt.checkpoint is not None and cause != "succeeded":
        message = f"The newest checkpoint is {attempt.checkpoint}."
        found.append(Finding(level="info", code="attempt.checkpoint", message=message, where=where))
    return tuple(found)


def _signal_name(code: int) -> str:
    if not 128 < code < 128 + signal.NSIG:
        return ""
    try:
        return f" ({signal.Signals(code - 128).name})"
    except ValueError:
        return f" (signal {code - 128})"


_RETRY = "`tunesmith retry {job}` continues from the newest checkpoint."
_LOGS = "See `tunesmith logs {job}`; " + _RETRY
_WORDS: dict[str, tuple[str, str]] = {
    "succeeded": ("Attempt {number} succeeded.", ""),
    "stopped": ("Attempt {number} was told to end at a checkpoint, and did.", _RETRY),
    "cancelled": ("Attempt {number} was cancelled.", _RETRY),
    "timeout": ("Attempt {number} reached its time limit.", "Raise limits.hours, then retry: " + _RETRY),
    "lost": ("Attempt {number} ended without leaving a trace of how.", _RETRY),
    "oom.cuda": (
        "Attempt {number} ran out of GPU memory at micro-batch {batch} and length {length}.",
        "Use a smaller train.micro_batch or train.max_length.",
    ),
    "oom.host": (
        "Attempt {number} most likely ran out of main memory, at micro-batch {batch} and length {length}.",
        "Use a smaller train.micro_batch or train.max_length, or free memory.",
    ),
    "nan": (
        "The loss or the gradients of attempt {number} stopped being numbers.",
        "Lower train.learning_rate, or look for broken rows.",
    ),
    "storage": ("Attempt {number} could not write to its disk.", "Free space or make the folder writable; " + _RETRY),
    "data": (
        "Attempt {number} met data that it cannot train on.",
        "Run `tunesmith check` on the data and mend the rows named.",
    ),
    "input": ("Attempt {number} cannot run with this spec.", _LOGS),
    "backend": ("The backend of attempt {number} could not run it.", "Run `tunesmith backends`; " + _RETRY),
    "killed": ("Attempt {number} was ended by a signal.", _LOGS),
    "code": ("Attempt {number} ended with an unexpected error.", _LOGS),
}
