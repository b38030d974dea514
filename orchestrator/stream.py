"""One job's events in the order of arrival: the store's state events and the kernels' lines, behind one opaque cursor.

A state event remembers the newest line that had arrived when it was committed, so the order needs no clock. The cursor
is `seq.attempt.line`, how far the reader has come in each: nothing is lost or told twice between pages.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.metrics import Metrics
from tunesmith.orchestrator.states import JOB_ENDS
from tunesmith.orchestrator.store import Row, Store


@dataclass(frozen=True, slots=True)
class Page:
    """`items` are (cursor after it, event as JSON text). `ended`: the job has ended and this page is empty."""

    items: tuple[tuple[str, str], ...]
    cursor: str
    state: str
    ended: bool


def page(store: Store, metrics: Metrics, job: str, after: str = "", limit: int = 1000) -> Page:
    """The events after a cursor ("" is the beginning), at most `limit`. Raises InputError for a foreign cursor."""
    seq, attempt, line = _parse(after)
    row = store.job(job)
    states = store.events(job, seq, limit)
    certain = len(states)
    lines = metrics.lines(job, (attempt, line), limit)
    if lines and certain < limit:  # a state event may have come between the two reads, and before some of the lines
        states += store.events(job, states[-1]["seq"] if states else seq, limit)
    items: list[tuple[str, str]] = []
    i = j = 0
    while len(items) < limit:
        if i < len(states) and (j == len(lines) or _mark(states[i]) < _mark(lines[j])):
            if i >= certain and j == len(lines):
                break
            seq = states[i]["seq"]
            items.append((f"{seq}.{attempt}.{line}", state_event(states[i])))
            i += 1
        elif j < len(lines):
            attempt, line = _mark(lines[j])
            items.append((f"{seq}.{attempt}.{line}", lines[j]["doc"]))
            j += 1
        else:
            break
    return Page(tuple(items), f"{seq}.{attempt}.{line}", row["state"], not items and over(row))


def over(row: Row) -> bool:
    """Whether nothing more will come of a job, unless a person asks for it."""
    return row["state"] in JOB_ENDS and row["wanted"] is None


def state_event(row: Row) -> str:
    """A state event as JSON text."""
    head = json.dumps({"seq": row["seq"], "time": row["time"], "kind": row["kind"]}, separators=(",", ":"))
    return f'{head[:-1]},"values":{row["doc"]}}}'


def _mark(row: Row) -> tuple[int, int]:
    return row["attempt"], row["line"]


def _parse(cursor: str) -> tuple[int, int, int]:
    if not cursor:
        return 0, 0, 0
    found = re.fullmatch(r"([0-9]{1,15})\.([0-9]{1,9})\.([0-9]{1,15})", cursor, re.ASCII)
    if found is None:
        raise InputError(
            f"{cursor[:40]!r} is not a cursor.",
            code="cursor.unknown",
            fix="Give the cursor of an earlier answer, or none to begin at the first event.",
        )
    seq, attempt, line = found.groups()
    return int(seq), int(attempt), int(line)
