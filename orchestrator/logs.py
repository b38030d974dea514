"""The plain log of an attempt, read on by byte offset: however long it is, one answer holds at most 256 KiB."""

from __future__ import annotations

import os
from typing import Any

from tunesmith.orchestrator.home import Home, storage_error
from tunesmith.orchestrator.inert import mask
from tunesmith.orchestrator.states import ATTEMPT_ENDS
from tunesmith.orchestrator.store import Store, unknown

MOST = 256 * 1024


def read_log(store: Store, home: Home, job: str, number: int = 0, after: int = 0) -> dict[str, Any]:
    """{"text", "next", "ended", "attempt"} from byte `after` of attempt `number` (0: the newest).

    A character is never cut; bytes that are no UTF-8 are replaced, and what looks like a secret is masked. `ended` says
    that nothing more will come.
    """
    rows = store.attempts(job)
    if not rows and not number:
        return {"text": "", "next": 0, "ended": False, "attempt": None}
    row = rows[-1] if not number else next((row for row in rows if row["number"] == number), None)
    if row is None:
        raise unknown(f"{job}, attempt {number}")
    over = row["state"] in ATTEMPT_ENDS  # looked up before reading: what was written before the end is then there
    path = home.attempt(job, row["number"]) / "log"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return {"text": "", "next": after, "ended": over, "attempt": row["number"]}
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        size = os.fstat(descriptor).st_size
        data = os.pread(descriptor, MOST, after)
    finally:
        os.close(descriptor)
    if not over or after + len(data) < size:
        data = data[: len(data) - _torn(data)]
    end = after + len(data)
    text = mask(data.decode("utf-8", "replace"))
    return {"text": text, "next": end, "ended": over and end >= size, "attempt": row["number"]}


def _torn(data: bytes) -> int:
    """How many bytes at the end begin a character whose rest is missing."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return 0
        if byte >= 0xC0:
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if wanted > back else 0
    return 0
