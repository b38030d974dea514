"""The child of `guard.py`: reads items from its standard input, answers each on its standard output, ends with it.

{"kind": "boxed", "setup": {}}         first line; answered by {"ready": true} or {"refused": {message, code, ...}}
{...}                                  an item; answered by {"value": ...}, {"trouble": "..."} or {"slow": true}
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from tunesmith.executors.kernel.rewards import guarded
from tunesmith.orchestrator.errors import InputError

ALARM = 3.0  # seconds for an item, where Python can be interrupted
IDLE = 300.0  # seconds without an item, after which the memory is given back
PROCESSOR = 8  # seconds of processor time, where it cannot
MEMORY = 6 * 2**30


class Slow(BaseException):
    """The alarm rang."""


def main() -> None:
    """Work until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process is told, and ends this one
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _ring)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values).encode() + b"\n")

    first = json.loads(sys.stdin.buffer.readline() or b"null")
    if first is None:
        return
    try:
        work = guarded.WORK[first["kind"]](first["setup"])
    except InputError as error:
        refused = {key: getattr(error, key) for key in ("message", "why", "fix", "where", "code")}
        return answer({"refused": refused})
    _fence()
    answer({"ready": True})
    while select.select([0], [], [], IDLE)[0]:  # one line is sent at a time, so none waits in the buffer
        line = sys.stdin.buffer.readline()
        if not line:
            return
        answer(_one(work, json.loads(line)))


def _one(work: guarded.Work, item: dict[str, Any]) -> dict[str, Any]:
    """The answer to an item. "making" are the seconds for what comes before the work on the hostile text."""
    alarm = float(item.get("alarm", ALARM))
    try:
        found = _within(float(item.get("making", alarm)), lambda: work(item))
        return {"value": _within(alarm, found) if callable(found) else found}
    except (Slow, MemoryError):
        return {"slow": True}
    except (Exception, SystemExit) as error:
        return {"trouble": f"{type(error).__name__}: {error}"[:300]}


def _within(alarm: float, call: Callable[[], Any]) -> Any:
    """What a call gives. Raises Slow after so many seconds; a call that cannot be interrupted ends this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime + max(PROCESSOR, 2 * alarm))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    signal.setitimer(signal.ITIMER_REAL, alarm)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _ring(number: int, frame: FrameType | None) -> None:
    raise Slow


def _fence() -> None:
    """No more memory than this, no files written, no words to the log: what comes now is hostile."""
    for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(limit, (allowed, hard))
        except (OSError, ValueError):
            pass  # a system that knows no such limit; this side's patience remains
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.close(nothing)


if __name__ == "__main__":
    main()
