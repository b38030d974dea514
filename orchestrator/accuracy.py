"""What was foretold of past runs against what they took: read from the two databases of a home, which stay as they are.

Nothing is kept for this alone: the plan holds the estimates, the attempt's last lines what was measured, and what it
ran on. A run on other versions, or on another device, is shown, and does not count for the estimates of this one.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.orchestrator import schema
from tunesmith.orchestrator.errors import StorageError
from tunesmith.orchestrator.events import number
from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.nouns import Device, Past
from tunesmith.orchestrator.store import sqlite_error

RUNS = 40  # the latest that are read
TAIL = 20  # lines at the end of an attempt among which its figures stand
HEAD = 5000  # lines at its beginning among which it says what it runs on
WAIT_SECONDS = 0.05  # for a lock: an estimate is worth no more
_LAST = """
SELECT doc FROM (SELECT doc FROM lines WHERE job = ? AND attempt = ? ORDER BY line DESC LIMIT ?)
WHERE instr(doc, '"time/total_seconds":') OR instr(doc, '"stack":')
"""
_EASED = '%"code":"oom.rung"%'  # what a run says when it gives something up for want of memory
Doc = dict[str, Any]

_ENDED = """
SELECT a.job, a.number, a.state, a.cause, json_extract(a.error, '$.code') AS error,
    json_extract(a.doc, '$.resume_from') AS resumed, j.name,
    json_extract(p.doc, '$.stages[0].spec.model.id') AS model, json_extract(p.doc, '$.stages[0].spec.method') AS method,
    json_extract(p.doc, '$.stages[0].spec.train.early_stopping') AS early,
    json_extract(p.doc, '$.stages[0].size.peak_bytes') AS bytes,
    json_extract(p.doc, '$.stages[0].size.device_bytes') AS capacity,
    json_extract(p.doc, '$.stages[0].time.seconds') AS seconds,
    json_extract(p.doc, '$.stages[0].time.tokens_per_second') AS rate
FROM (SELECT * FROM attempts WHERE started_at IS NOT NULL AND ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT ?) a
JOIN jobs j ON j.id = a.job
JOIN plans p ON p.job = a.job AND p.version =
    (SELECT MAX(version) FROM plans WHERE job = a.job AND hash = json_extract(a.doc, '$.plan_hash'))
ORDER BY a.ended_at DESC
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One ended attempt: estimates as the plan's documents, measured figures by their keys, and what it ran on.

    `whole`: it did all of its job, from the first step to the last. `exceeded`: it wanted more memory than there was,
    and ended for it or went on with less at a time.
    """

    job: str
    attempt: int
    name: str | None
    state: str
    model: str
    method: str
    whole: bool
    exceeded: bool
    bytes: Doc | None
    capacity: float | None
    seconds: Doc | None
    rate: Doc | None
    figures: Doc = field(default_factory=dict)
    stack: dict[str, str] = field(default_factory=dict)
    family: str = ""

    @property
    def held(self) -> float | None:
        """Bytes that the device held at most; where that was too little, those that there were."""
        if self.exceeded:
            return self.capacity
        return self._figure("memory/device_bytes") or self._figure("memory/peak_bytes")

    @property
    def took(self) -> float | None:
        """Seconds of a run that did all of its job."""
        return self._figure("time/total_seconds") if self.whole else None

    @property
    def speed(self) -> float | None:
        """Real tokens a second while training."""
        return self._figure("time/tokens_per_second")

    def past(self) -> Past:
        """What estimates can learn from it."""
        return Past(
            method=self.method,
            family=self.family,
            bytes=_pair(_formula(self.bytes), self.held),
            exceeded=self.exceeded,
            rate=None if self.exceeded else _pair(_formula(self.rate), self.speed),
            rest=None if self.exceeded else _pair(*self._rest()),
        )

    def _rest(self) -> tuple[float | None, float | None]:
        """Seconds beside training, foretold and measured."""
        seconds, rate = _formula(self.seconds), _formula(self.rate)
        tokens, trained = self._figure("time/tokens"), self._figure("time/train_seconds")
        if seconds is None or not rate or tokens is None or trained is None or self.took is None:
            return None, None
        return seconds - tokens / rate, self.took - trained

    def _figure(self, key: str) -> float | None:
        return number(self.figures.get(key))


def recalled(home: Path, devices: Sequence[Device]) -> list[Device]:
    """The devices, each with the past runs of this home on the very same stack. A store that cannot be read has none.

    Cost: some milliseconds.
    """
    known: list[Record] = []
    if any(device.stack for device in devices):
        with contextlib.suppress(StorageError):
            known = records(Home(home))
    runs = [(record.stack, record.past()) for record in known if record.stack]
    return [
        replace(device, past=tuple(past for stack, past in runs if stack == device.stack)) if device.stack else device
        for device in devices
    ]


def records(home: Home, limit: int = RUNS) -> list[Record]:
    """The latest attempts that ended and that had a plan, the latest first; none where there is no store.

    Raises StorageError for a store that is locked, damaged or of another version.
    """
    if not home.state_db.is_file():
        return []
    with _reading(home.state_db) as store:
        version = int(store.execute("PRAGMA user_version").fetchone()[0])
        if version == 0:
            return []
        if version != len(schema.MIGRATIONS):
            raise StorageError(
                "This home was written by another version of Tunesmith.",
                code="storage.version",
                why=f"state.db has version {version}; this Tunesmith reads {len(schema.MIGRATIONS)}.",
                where=str(home.state_db),
            )
        found = [_record(row) for row in store.execute(_ENDED, (limit,))]
    if not found or not home.metrics_db.is_file():
        return found
    with _reading(home.metrics_db) as metrics:
        return [_measured(metrics, record) for record in found]


def accuracy(home: Home) -> Doc:
    """The `models --accuracy` document: past runs, the latest first, and how good the estimates were over all of them.

    Raises StorageError as `records` does.
    """
    runs = [_compared(record) for record in records(home)]
    return {"runs": runs, **{what: _summary([run[what] for run in runs]) for what in ("memory", "seconds")}}


def _compared(record: Record) -> Doc:
    return {
        "job": record.job,
        "attempt": record.attempt,
        "name": record.name,
        "state": record.state,
        "model": record.model,
        "family": record.family,
        "method": record.method,
        "device": record.stack.get("device"),
        "stack": record.stack,
        "memory": {**_against(record.bytes, record.held, counts=not record.exceeded), "exceeded": record.exceeded},
        "seconds": _against(record.seconds, record.took),
        "tokens_per_second": _against(record.rate, record.speed),
    }


def _against(predicted: Doc | None, actual: float | None, *, counts: bool = True) -> Doc:
    """An estimate beside what came; the error is that of the expected value, in percent of what came."""
    error = inside = None
    if predicted is not None and actual and counts:
        error = 100 * (float(predicted["expected"]) / actual - 1)
        inside = bool(predicted["low"] <= actual <= predicted["high"])
    return {"predicted": predicted, "actual": actual, "error_percent": error, "inside": inside}


def _summary(compared: Sequence[Doc]) -> Doc:
    counted = [item for item in compared if item["error_percent"] is not None]
    count = len(counted)
    return {
        "runs": count,
        "mean_abs_error_percent": sum(abs(item["error_percent"]) for item in counted) / count if count else None,
        "inside_percent": 100 * sum(item["inside"] for item in counted) / count if count else None,
    }


# --- the two databases -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A database opened for reading. What SQLite says against it comes as a StorageError."""
    try:
        address = f"{path.as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True, isolation_level=None, timeout=WAIT_SECONDS)) as db:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA trusted_schema = OFF")
            yield db
    except sqlite3.DatabaseError as error:
        raise sqlite_error(error, path) from error


def _record(row: sqlite3.Row) -> Record:
    error = str(row["error"] or "")
    exceeded = error.startswith(("oom.", "memory.")) or str(row["cause"] or "").startswith("oom.")
    return Record(
        job=row["job"],
        attempt=row["number"],
        name=row["name"],
        state=row["state"],
        model=str(row["model"]),
        method=str(row["method"]),
        whole=row["state"] == "succeeded" and row["resumed"] is None and row["early"] is None,
        exceeded=exceeded and row["state"] != "succeeded",
        bytes=_estimate(row["bytes"]),
        capacity=number(row["capacity"]),
        seconds=_estimate(row["seconds"]),
        rate=_estimate(row["rate"]),
    )


def _measured(metrics: sqlite3.Connection, record: Record) -> Record:
    """The record with what the attempt said at its end; one that was killed said at its beginning what it ran on."""
    key = (record.job, record.attempt)
    lines = metrics.execute(_LAST, (*key, TAIL)).fetchall()
    eased = metrics.execute(
        "SELECT 1 FROM lines INDEXED BY lines_alert"
        " WHERE job = ? AND attempt = ? AND kind = 'alert' AND doc LIKE ? LIMIT 1",
        (*key, _EASED),
    ).fetchone()
    record = replace(record, exceeded=record.exceeded or eased is not None)
    if record.exceeded:
        lines += metrics.execute(
            "SELECT doc FROM lines WHERE job = ? AND attempt = ? AND line < ? AND kind = 'log'", (*key, HEAD)
        ).fetchall()
    said = [json.loads(line["doc"])["values"] for line in lines]
    figures: Doc = next((values for values in said if "time/total_seconds" in values), {})
    about: Doc = next((values for values in said if isinstance(values.get("stack"), dict)), {})
    return replace(
        record,
        figures=figures,
        stack={str(name): str(value) for name, value in about.get("stack", {}).items()},
        family=str(about.get("family", "")),
    )


def _estimate(text: str | None) -> Doc | None:
    """An Estimate's document, if it is one."""
    doc = json.loads(text) if text else None
    if not isinstance(doc, Mapping) or any(number(doc.get(key)) is None for key in ("low", "expected", "high")):
        return None
    return dict(doc)


def _formula(estimate: Doc | None) -> float | None:
    """What the formulas alone had expected."""
    if estimate is None:
        return None
    alone = number(estimate.get("formula"))
    return number(estimate["expected"]) if alone is None else alone


def _pair(foretold: float | None, measured: float | None) -> tuple[float, float] | None:
    return None if foretold is None or measured is None else (foretold, measured)
