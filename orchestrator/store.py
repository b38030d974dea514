"""The store: state.db, the truth about every job. One writer, the daemon.

Every change is one transaction (BEGIN IMMEDIATE, WAL, synchronous=FULL) that appends to the job's events and brings its
row up to date together. A commit costs about 4 ms; a read far less than 1 ms.
"""

from __future__ import annotations

import json
import re
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.orchestrator import home, schema
from tunesmith.orchestrator.errors import Conflict, InputError, StorageError
from tunesmith.orchestrator.events import finite, now
from tunesmith.orchestrator.inert import mask
from tunesmith.orchestrator.nouns import Approval, Plan, Request
from tunesmith.orchestrator.plain import build, plain
from tunesmith.orchestrator.states import JOB_ENDS, JobState, job_may

KEYS = 10_000
ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
Row = sqlite3.Row


class Store:
    """Jobs, their events, plans, approvals, answers and attempts, in one SQLite file.

    `position(job)` gives the newest event line that has arrived, (attempt, line), so that state events and kernel lines
    merge in the order of arrival. `on_change(jobs)` is called after each commit, from the thread that committed.
    Every method raises StorageError where the disk is full or cannot be written; what was there stays intact.
    """

    def __init__(
        self,
        path: Path,
        *,
        position: Callable[[str], tuple[int, int]] = lambda job: (0, 0),
        on_change: Callable[[frozenset[str]], None] = lambda jobs: None,
    ) -> None:
        self.path = path
        self.position = position
        self.on_change = on_change
        self._write = threading.RLock()
        self._read = threading.Lock()
        self._writer: int | None = None  # the thread inside a transaction
        self._touched: set[str] = set()
        with _typed(path):
            self._db = _connect(path)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            schema.migrate(self._db)
            self._reader = _connect(path)
            self._reader.execute("PRAGMA query_only = ON")

    def close(self) -> None:
        """Close both connections; the next opening needs no recovery."""
        with self._write, self._read:
            self._reader.close()
            self._db.close()

    # --- transactions and reads --------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. Transactions of one thread nest: an inner one can fail alone, the outermost commits."""
        with self._write:
            if self._writer is not None:
                yield from self._inner()
                return
            with _typed(self.path):
                self._db.execute("BEGIN IMMEDIATE")
                self._writer = threading.get_ident()
                self._touched = set()
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
                finally:
                    self._writer = None
                touched = frozenset(self._touched)
        self.on_change(touched)

    def _inner(self) -> Iterator[None]:
        self._db.execute("SAVEPOINT inner")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK TO inner")
            raise
        finally:
            if self._db.in_transaction:
                self._db.execute("RELEASE inner")

    def rows(self, sql: str, *values: Any) -> list[Row]:
        """What a query finds; inside a transaction with what it has written."""
        if self._writer == threading.get_ident():
            return self._db.execute(sql, values).fetchall()
        with self._read, _typed(self.path):
            return self._reader.execute(sql, values).fetchall()

    def row(self, sql: str, *values: Any) -> Row | None:
        """The first row a query finds."""
        found = self.rows(sql, *values)
        return found[0] if found else None

    def write(self, sql: str, *values: Any) -> int:
        """Run one statement inside the transaction; how many rows it changed."""
        if self._writer != threading.get_ident():
            raise RuntimeError("a write outside a transaction")
        return self._db.execute(sql, values).rowcount

    # --- jobs --------------------------------------------------------------------------------------------------

    def create(self, request: Request, yes: Mapping[str, Any] | None = None) -> str:
        """Store a new job in `planning`, marked for the graph; its id. `yes` are the caps of --yes."""
        spec: Mapping[str, Any] = request.spec or {}
        model = request.sets.get("model.id") or _model(spec.get("model"))
        with self.transaction():
            while True:
                job = "j-" + "".join(secrets.choice(ALPHABET) for _ in range(6))
                if self.row("SELECT 1 FROM jobs WHERE id = ?", job) is None:
                    break
            moment = now()
            self.write(
                "INSERT INTO jobs (id, name, state, backend, method, model, request, yes, created_at, updated_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                job,
                _text(request.sets.get("name") or spec.get("name")),
                JobState.PLANNING,
                _text(request.backend or request.sets.get("backend") or spec.get("backend")),
                _text(request.sets.get("method") or spec.get("method")),
                _text(model),
                dumps(plain(request)),
                None if yes is None else dumps(yes),
                moment,
                moment,
            )
            self.record(job, {"state": JobState.PLANNING, "from": None})
            self.mark(job)
        return job

    def job(self, job: str) -> Row:
        """The row of a job. Raises InputError (code job.unknown)."""
        found = self.row("SELECT * FROM jobs WHERE id = ?", job)
        if found is None:
            raise unknown(job)
        return found

    def find(self, ref: str) -> str:
        """The id that `ref` means: an id, `last`, a name, or a unique prefix of an id (with or without its `j-`).

        Raises InputError: job.unknown, or job.ambiguous with the jobs it could mean.
        """
        if ref == "last":
            newest = self.row("SELECT id FROM jobs ORDER BY number DESC LIMIT 1")
            if newest is None:
                raise InputError(
                    "There is no job yet.", code="job.unknown", fix='Start one: tunesmith run "SFT MODEL on DATA"'
                )
            return str(newest["id"])
        if self.row("SELECT 1 FROM jobs WHERE id = ?", ref) is not None:
            return ref
        found = self.rows("SELECT id, name, state FROM jobs WHERE name = ? ORDER BY number DESC LIMIT 9", ref)
        if not found and re.fullmatch(r"(j-)?[a-z2-7]{1,6}", ref, re.ASCII):
            start = ref if ref.startswith("j-") else f"j-{ref}"
            found = self.rows(
                "SELECT id, name, state FROM jobs WHERE id >= ? AND id < ? ORDER BY number DESC LIMIT 9",
                start,
                start + "\x7f",
            )
        if not found:
            raise unknown(ref)
        if len(found) > 1:
            listing = ", ".join(f"{row['id']} ({row['state']})" for row in found[:8])
            raise InputError(
                f"{ref[:80]!r} could mean several jobs: {listing}{', ...' if len(found) > 8 else ''}.",
                code="job.ambiguous",
                fix="Give the whole id.",
                where=ref[:80],
            )
        return str(found[0]["id"])

    def page(self, *, limit: int = 200, before: str | None = None, state: str | None = None) -> tuple[list[Row], bool]:
        """Jobs, newest first, that were submitted before the job `before`; and whether there are more."""
        where, values = ["1"], list[Any]()
        if before is not None:
            where.append("number < ?")
            values.append(self.job(before)["number"])
        if state is not None:
            if state not in JobState.__members__.values():
                raise InputError(f"{state[:80]!r} is no state of a job.", fix=f"One of: {', '.join(JobState)}.")
            where.append("state = ?")
            values.append(state)
        sql = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ?"  # noqa: S608
        found = self.rows(sql, *values, limit + 1)
        return found[:limit], len(found) > limit

    def move(self, job: str, new: JobState, **values: Any) -> None:
        """Take a job to another state, checked against the table; `values` go into the event.

        Staying is no move and writes nothing. Raises Conflict where the table does not allow it.
        """
        old = JobState(self.job(job)["state"])
        if old == new:
            return
        if not job_may(old, new):
            raise Conflict(f"A job that is {old} cannot become {new}.", code="job.state", where=job)
        moment = now()
        self.write(
            "UPDATE jobs SET state = ?, updated_at = ?, ended_at = ? WHERE id = ?",
            new,
            moment,
            moment if new in JOB_ENDS else None,
            job,
        )
        self.record(job, {"state": new, "from": old, **values})

    def set(self, job: str, **columns: Any) -> None:
        """Set columns of a job's row, inside the transaction. Column names come from the code, never from outside."""
        names = ", ".join(f"{name} = ?" for name in columns)
        self.write(f"UPDATE jobs SET {names}, updated_at = ? WHERE id = ?", *columns.values(), now(), job)  # noqa: S608
        self._touched.add(job)

    def mark(self, job: str) -> None:
        """Something happened that the graph must see. Marks are counted: one set while a driver works is not lost."""
        self.write("UPDATE jobs SET wake = wake + 1 WHERE id = ?", job)
        self._touched.add(job)

    def settle(self, job: str) -> None:
        """Nothing is left for the graph to do: the marks so far are worked off."""
        self.write("UPDATE jobs SET seen = wake WHERE id = ?", job)

    def revoke(self, job: str) -> None:
        """Take the lease from whoever works on the job: a person changed what the work rests on."""
        self.write("UPDATE jobs SET fence = fence + 1, holder = NULL, tries = 0 WHERE id = ?", job)

    # --- events ------------------------------------------------------------------------------------------------

    def record(self, job: str, values: Mapping[str, Any], kind: str = "state") -> None:
        """Append an event to a job, inside the transaction."""
        attempt, line = self.position(job)
        self.write(
            "INSERT INTO events (job, seq, time, kind, doc, attempt, line) SELECT ?,"
            " COALESCE((SELECT MAX(seq) FROM events WHERE job = ?), 0) + 1, ?, ?, ?, ?, ?",
            job,
            job,
            now(),
            kind,
            dumps(values),
            attempt,
            line,
        )
        self._touched.add(job)

    def events(self, job: str, after: int = 0, limit: int = 1000) -> list[Row]:
        """Events of a job with a sequence number above `after`, in order."""
        return self.rows("SELECT * FROM events WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?", job, after, limit)

    # --- what belongs to a job ---------------------------------------------------------------------------------

    def request(self, job: str) -> Request:
        """What was submitted, with every edit since."""
        return build(Request, json.loads(self.job(job)["request"]))

    def plan(self, job: str) -> Plan | None:
        """The newest plan, stale or not."""
        found = self.row("SELECT doc FROM plans WHERE job = ? ORDER BY version DESC LIMIT 1", job)
        return None if found is None else build(Plan, json.loads(found["doc"]))

    def approval(self, job: str) -> Approval | None:
        """The approval that stands: not voided, and of the newest plan."""
        found = self.row(
            "SELECT a.* FROM approvals a JOIN jobs j ON j.id = a.job"
            " JOIN plans p ON p.job = j.id AND p.version = j.plan"
            " WHERE a.job = ? AND NOT a.void AND NOT j.plan_stale AND a.hash = p.hash ORDER BY a.number DESC LIMIT 1",
            job,
        )
        if found is None:
            return None
        return Approval(plan_hash=found["hash"], by=found["by"], usd=found["usd"], hours=found["hours"])

    def answers(self, job: str) -> dict[str, Any]:
        """Every answer given, by field."""
        found = self.rows("SELECT field, value FROM answers WHERE job = ? ORDER BY field", job)
        return {row["field"]: json.loads(row["value"]) for row in found}

    def attempts(self, job: str) -> list[Row]:
        """The attempts of a job, oldest first."""
        return self.rows("SELECT * FROM attempts WHERE job = ? ORDER BY number", job)

    # --- idempotency -------------------------------------------------------------------------------------------

    def remembered(self, key: str, body: str) -> str | None:
        """The answer given to this key before. Raises Conflict where the key stood for another request."""
        found = self.row("SELECT body, answer FROM keys WHERE key = ?", key)
        if found is None:
            return None
        if found["body"] != body:
            raise Conflict(
                "This Idempotency-Key was used for another request.",
                code="idempotency.reused",
                fix="Make a new key for each new request.",
            )
        return str(found["answer"])

    def remember(self, key: str, body: str, answer: str) -> None:
        """Keep an answer, in the same transaction as what it tells of. The last 10,000 are kept."""
        self.write("INSERT INTO keys (key, body, answer, time) VALUES (?, ?, ?, ?)", key, body, answer, now())
        if secrets.randbelow(100) == 0:
            self.write(
                "DELETE FROM keys WHERE time < (SELECT time FROM keys ORDER BY time DESC LIMIT 1 OFFSET ?)", KEYS
            )


def dumps(value: Any) -> str:
    """Plain JSON for a column or the wire: no NaN, lone surrogates escaped. What is plain already is not copied."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(finite(plain(value)), separators=(",", ":"), allow_nan=False)


def safe(value: Any) -> Any:
    """Plain values as they may be kept: everything in text that looks like a secret masked."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {str(key): safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [safe(item) for item in value]
    return value


def unknown(ref: str) -> InputError:
    """The error for a reference that means no job."""
    return InputError(
        f"There is no job {ref[:80]!r}.", code="job.unknown", fix="List jobs: tunesmith jobs", where=ref[:80]
    )


def _text(value: Any) -> str | None:
    if not isinstance(value, str) or not value:
        return None
    return value.encode("utf-8", "replace").decode("utf-8")[:300]


def _model(value: Any) -> Any:
    return value.get("id") if isinstance(value, Mapping) else value


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0, cached_statements=200)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA trusted_schema = OFF")
    return db


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        raise sqlite_error(error, path) from error


def sqlite_error(error: sqlite3.DatabaseError, path: Path) -> StorageError:
    """The typed error for what SQLite said about a file."""
    name = str(getattr(error, "sqlite_errorname", ""))
    if name.startswith("SQLITE_FULL"):
        return home.full(path)
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_IOERR")):
        return StorageError(
            f"{path} cannot be written: {error}.",
            code="storage.denied",
            why="Its folder is read-only, belongs to somebody else, or its disk fails.",
            fix="Set TUNESMITH_HOME to a folder of your own.",
            where=str(path),
        )
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StorageError(
            f"{path} is damaged: {error}.",
            code="storage.corrupt",
            why="What jobs wrote in their own folders is not touched by this.",
            fix="Put back a copy of the file, or move it away to begin anew.",
            where=str(path),
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StorageError(
            f"{path} is held by another process.",
            code="storage.locked",
            fix="Only the daemon may write there: end what else has it open.",
            where=str(path),
        )
    return StorageError(f"{path}: {error}.", where=str(path))


def split(rows: Sequence[Row], column: str) -> dict[Any, list[Row]]:
    """Rows in lists by the value of a column, each in its old order."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return found
