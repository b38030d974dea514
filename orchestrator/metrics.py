"""metrics.db: the event lines of every attempt, and series made from them.

Written in batches (WAL, synchronous=NORMAL: survives the daemon's death, may lose its last batches with the power). It
holds nothing that the attempts' own event files do not hold: missing or damaged, it is rebuilt from them.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.orchestrator.events import MAX_LINE_BYTES, Event, Kind, decode, encode, finite, number
from tunesmith.orchestrator.store import Row, sqlite_error

VERSION = 1
BATCH = 1000
Position = tuple[int, int]  # (attempt, line): attempts follow each other, so this is the order of arrival
T = TypeVar("T")

_TABLES = """
CREATE TABLE lines (
    job TEXT NOT NULL, attempt INTEGER NOT NULL, line INTEGER NOT NULL, kind TEXT NOT NULL, doc TEXT NOT NULL,
    PRIMARY KEY (job, attempt, line)
) WITHOUT ROWID;
CREATE INDEX lines_alert ON lines (job, attempt, line) WHERE kind = 'alert';
CREATE TABLE points (
    job TEXT NOT NULL, key TEXT NOT NULL, step INTEGER NOT NULL, attempt INTEGER NOT NULL, value, time TEXT NOT NULL,
    PRIMARY KEY (job, key, step, attempt)
) WITHOUT ROWID;
CREATE TABLE cursors (
    job TEXT NOT NULL, attempt INTEGER NOT NULL, cursor TEXT NOT NULL, PRIMARY KEY (job, attempt)
) WITHOUT ROWID;
CREATE TABLE latest (job TEXT PRIMARY KEY, doc TEXT NOT NULL) WITHOUT ROWID;
"""


class Metrics:
    """Event lines by (job, attempt, line), each stored once however often it comes. Safe to call from any thread.

    Methods raise StorageError where the disk is full or cannot be written. A damaged file is moved aside and begun
    anew; `incomplete` is then True until `rebuild` has run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self.incomplete = False
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if not _damaged(error):
                raise sqlite_error(error, path) from error
            self._begin_anew()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._reader.close()
            self._db.close()

    # --- writing -----------------------------------------------------------------------------------------------

    def ingest(self, job: str, attempt: int, events: Iterable[Event], cursor: str | None = None) -> None:
        """Store event lines and, in the same transaction, the executor's cursor after them.

        Lines already known, and lines that name another attempt, are passed over.
        """

        def write() -> None:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._insert(job, attempt, events)
                if cursor is not None:
                    self._db.execute("INSERT OR REPLACE INTO cursors VALUES (?, ?, ?)", (job, attempt, cursor))
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

        self._guarded(write)

    def rebuild(self, jobs: Path, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Read the event files of every attempt under the folder `jobs` again; what is known already stays."""
        for file in _event_files(jobs):
            job, attempt = file.parts[-4], int(file.parts[-2])
            for batch in _batches(_read(file)):
                if stop():
                    return
                self.ingest(job, attempt, batch)
        self.incomplete = False

    def _insert(self, job: str, attempt: int, events: Iterable[Event]) -> None:
        latest: dict[str, Any] | None = None
        for event in events:
            if event.attempt != attempt:
                continue
            added = self._db.execute(
                "INSERT OR IGNORE INTO lines VALUES (?, ?, ?, ?, ?)",
                (job, attempt, event.line, str(event.kind), encode(event)),
            ).rowcount
            if not added:
                continue
            if event.kind not in (Kind.METRIC, Kind.PROGRESS):
                continue
            latest = self._latest(job) if latest is None else latest
            _keep(latest, event)
            if event.kind is Kind.METRIC and event.step is not None:
                self._db.executemany(
                    "INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (job, _utf8(key), event.step, attempt, finite(value), event.time)
                        for key, value in event.values.items()
                        if number(value) is not None
                    ],
                )
        if latest is not None:
            text = json.dumps(latest, separators=(",", ":"))
            self._db.execute("INSERT OR REPLACE INTO latest VALUES (?, ?)", (job, text))

    # --- reading -----------------------------------------------------------------------------------------------

    def cursor(self, job: str, attempt: int) -> str:
        """Where to go on observing an attempt; "" is the beginning."""
        found = self._rows("SELECT cursor FROM cursors WHERE job = ? AND attempt = ?", job, attempt)
        return str(found[0]["cursor"]) if found else ""

    def position(self, job: str) -> Position:
        """The newest line that has arrived, (0, 0) before any."""
        found = self._rows(
            "SELECT attempt, line FROM lines WHERE job = ? ORDER BY attempt DESC, line DESC LIMIT 1", job
        )
        return (found[0]["attempt"], found[0]["line"]) if found else (0, 0)

    def lines(self, job: str, after: Position = (0, 0), limit: int = 1000) -> list[Row]:
        """Lines after a position, in the order of arrival: rows of attempt, line, kind, doc (JSON text)."""
        return self._rows(
            "SELECT attempt, line, kind, doc FROM lines WHERE job = ? AND (attempt, line) > (?, ?)"
            " ORDER BY attempt, line LIMIT ?",
            job,
            *after,
            limit,
        )

    def alerts(self, job: str, limit: int = 50) -> list[dict[str, Any]]:
        """The newest alerts of a job, oldest of them first: level, code, message, attempt, step, time."""
        found = self._rows(
            "SELECT doc FROM lines INDEXED BY lines_alert WHERE job = ? AND kind = 'alert'"
            " ORDER BY attempt DESC, line DESC LIMIT ?",
            job,
            limit,
        )
        docs = [json.loads(row["doc"]) for row in reversed(found)]
        return [{**doc["values"], "attempt": doc["attempt"], "step": doc["step"], "time": doc["time"]} for doc in docs]

    def series(self, job: str, keys: Sequence[str] = (), attempt: int | None = None) -> dict[str, list[list[Any]]]:
        """[[step, value, time], ...] for each key (all, where none is named), by step.

        Over all attempts the newest wins for each step; with `attempt`, that one alone.
        """
        where = ["job = ?"]
        values: list[Any] = [job, *keys]
        if keys:
            where.append(f"key IN ({', '.join('?' * len(keys))})")
        if attempt is not None:
            where.append("attempt = ?")
            values.append(attempt)
        found = self._rows(
            f"SELECT key, step, value, time, MAX(attempt) FROM points WHERE {' AND '.join(where)}"  # noqa: S608
            " GROUP BY key, step ORDER BY key, step",
            *values,
        )
        series: dict[str, list[list[Any]]] = {key: [] for key in keys}
        for row in found:
            series.setdefault(row["key"], []).append([row["step"], row["value"], row["time"]])
        return series

    def latest(self, jobs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{"progress": {...}, "last": {key: value}} of each job, from its newest lines."""
        found = self._rows(
            f"SELECT job, doc FROM latest WHERE job IN ({', '.join('?' * len(jobs))})",  # noqa: S608
            *jobs,
        )
        docs = {row["job"]: json.loads(row["doc"]) for row in found}
        return {
            job: {
                "progress": docs[job]["progress"] if job in docs else dict(NO_PROGRESS),
                "last": docs[job]["last"] if job in docs else {},
            }
            for job in jobs
        }

    def _latest(self, job: str) -> dict[str, Any]:
        found = self._db.execute("SELECT doc FROM latest WHERE job = ?", (job,)).fetchone()
        return json.loads(found["doc"]) if found else {"attempt": 0, "progress": dict(NO_PROGRESS), "last": {}}

    # --- the file ----------------------------------------------------------------------------------------------

    def _rows(self, sql: str, *values: Any) -> list[Row]:
        return self._guarded(lambda: self._reader.execute(sql, values).fetchall())

    def _guarded(self, work: Callable[[], T]) -> T:
        with self._lock:
            try:
                return work()
            except sqlite3.DatabaseError as error:
                if not _damaged(error):
                    raise sqlite_error(error, self.path) from error
                self._begin_anew()
                return work()

    def _open(self) -> None:
        self.incomplete = not self.path.exists()
        self._db = _connect(self.path)
        try:
            if self._db.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                if self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                    raise sqlite3.DatabaseError("of another version")
                self.incomplete = True
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._reader = _connect(self.path)
            self._reader.execute("PRAGMA query_only = ON")
            self._reader.execute("SELECT 1 FROM lines LIMIT 1").fetchone()
        except BaseException:
            self._db.close()
            raise

    def _begin_anew(self) -> None:
        for connection in (getattr(self, "_reader", None), getattr(self, "_db", None)):
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        if self.path.exists():
            self.path.replace(self.path.with_name(self.path.name + ".damaged"))
        self._open()


NO_PROGRESS: dict[str, Any] = {
    "phase": None,
    "step": None,
    "total_steps": None,
    "eta_seconds": None,
    "tokens_per_second": None,
    "updated_at": None,
}


def _keep(latest: dict[str, Any], event: Event) -> None:
    """Bring a job's newest figures up to date with one line."""
    progress = latest["progress"]
    if event.attempt > latest["attempt"]:
        latest["attempt"] = event.attempt
        progress.update(NO_PROGRESS)
    progress["updated_at"] = event.time
    if event.step is not None and event.kind is Kind.METRIC:
        progress["step"] = event.step
    if event.kind is Kind.METRIC:
        latest["last"].update(
            (_utf8(key), finite(value)) for key, value in event.values.items() if number(value) is not None
        )
        return
    values = event.values
    progress["phase"] = _utf8(str(values.get("phase")))
    if values.get("unit") == "steps":
        progress["step"] = values.get("done")
        progress["total_steps"] = values.get("total")
    for key in ("eta_seconds", "tokens_per_second"):
        if number(values.get(key)) is not None:
            progress[key] = finite(values[key])


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def _damaged(error: sqlite3.DatabaseError) -> bool:
    name = str(getattr(error, "sqlite_errorname", ""))
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "another version" in str(error)


def _event_files(jobs: Path) -> Iterator[Path]:
    found = [path for path in jobs.glob("*/attempts/*/events.jsonl") if path.parts[-2].isdecimal()]
    return iter(sorted(found, key=lambda path: (path.parts[-4], int(path.parts[-2]))))


def _read(file: Path) -> Iterator[Event]:
    with contextlib.suppress(OSError), file.open("rb") as source:
        while raw := source.readline(MAX_LINE_BYTES + 1):
            if not raw.endswith(b"\n"):
                continue
            event = decode(raw)
            if event is not None:
                yield event


def _batches(events: Iterator[Event]) -> Iterator[list[Event]]:
    batch: list[Event] = []
    for event in events:
        batch.append(event)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
