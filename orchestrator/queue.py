"""The queue: starts attempts when their turn comes, follows them, and ends them when told to. One lane per backend.

A lane looks and acts in `tick`, which is deterministic given the store, the executor and the clock; a thread only calls
it again and again. All it must know is in the store: after a restart it goes on from there, so that every attempt is
adopted and none is started twice. Executors' calls may block, so each backend has a lane, and a thread, of its own.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tunesmith.orchestrator.attempts import Attempts, attempt_of, handle_of
from tunesmith.orchestrator.backends import Backends
from tunesmith.orchestrator.errors import BackendUnavailable, InputError, StorageError, TunesmithError
from tunesmith.orchestrator.events import Event, Kind, now
from tunesmith.orchestrator.inert import inert
from tunesmith.orchestrator.metrics import Metrics
from tunesmith.orchestrator.ports import Executor, Handle, Observation
from tunesmith.orchestrator.states import ATTEMPT_ENDS, AttemptState, attempt_may
from tunesmith.orchestrator.store import Row, Store

log = logging.getLogger("tunesmith.queue")

SLOTS: Mapping[str, int] = {"local": 1}
REMOTE_SLOTS = 4
BUSY_SECONDS = 0.2
IDLE_SECONDS = 5.0
STOP_GRACE_SECONDS = 60.0
LONGEST_PAUSE = 30.0
UNREACHABLE_AFTER = 3
START_TRIES = 5
_CHECKPOINT = re.compile(r"checkpoints/[A-Za-z0-9_-][A-Za-z0-9._-]{0,100}", re.ASCII)
ROUNDS = 64  # pages of events in one look; more come with the next tick


@dataclass(slots=True)
class _Note:
    """What a lane remembers of one attempt between ticks; nothing here matters after a restart."""

    failures: int = 0
    next_try: float = 0.0
    deadline: float | None = None
    timed: bool = False
    asked_to_stop: float | None = None
    cancelled: float | None = None
    checkpoint: str | None = None


@dataclass(slots=True)
class Lane:
    """The attempts of one backend. `rung(job)` is called when event lines of a job have arrived."""

    backend: str
    store: Store
    metrics: Metrics
    backends: Backends
    slots: int
    clock: Callable[[], float] = time.monotonic
    rung: Callable[[str], None] = lambda job: None
    grace_seconds: float = STOP_GRACE_SECONDS
    reasons: dict[tuple[str, int], str] = field(default_factory=dict)
    _notes: dict[tuple[str, int], _Note] = field(default_factory=dict)

    def tick(self) -> float:
        """Look after every attempt once; how many seconds may pass until the next look. Never raises."""
        try:
            attempts = Attempts(self.store)
            live = attempts.live(self.backend)
            waiting = attempts.waiting(self.backend)
            if not live and not waiting:
                self._notes.clear()
                self.reasons.clear()
                return IDLE_SECONDS
            executor = self.backends.get(self.backend)
            for row in live:
                self._guard(row, lambda row=row: self._follow(executor, row))  # type: ignore[misc]
            free = self.slots - len(attempts.live(self.backend))
            ready = [row for row in waiting if self.clock() >= self._note(row).next_try]
            for row in ready[: max(free, 0)]:
                self._guard(row, lambda row=row: self._begin(executor, row))  # type: ignore[misc]
            self._forget({(row["job"], row["number"]) for row in (*live, *waiting)})
            return BUSY_SECONDS if live or free > 0 else IDLE_SECONDS
        except (BackendUnavailable, InputError) as error:
            self._without_executor(error)
            return IDLE_SECONDS
        except Exception as error:
            log.error("%s: a look failed: %s", self.backend, error, exc_info=not isinstance(error, StorageError))
            return IDLE_SECONDS

    def _without_executor(self, error: TunesmithError) -> None:
        """The backend is broken or gone: what it runs is unknown, what waits goes on waiting, and everybody is told."""
        attempts = Attempts(self.store)
        for row in (*attempts.live(self.backend), *attempts.waiting(self.backend)):
            if row["intent"]:
                self._guard(row, lambda row=row: self._out_of_reach(error, row))  # type: ignore[misc]
            elif isinstance(error, InputError):
                self._guard(row, lambda row=row: self._fail(row, error))  # type: ignore[misc]
            self.reasons[row["job"], row["number"]] = str(error)

    # --- one attempt -------------------------------------------------------------------------------------------

    def _guard(self, row: Row, act: Callable[[], None]) -> None:
        """One attempt's trouble is its own: it is noted, and tried again after a growing pause."""
        key = (row["job"], row["number"])
        note = self._note(row)
        if self.clock() < note.next_try and not self._urgent(row, note):
            return
        try:
            act()
            note.failures, note.next_try = 0, 0.0
            self.reasons.pop(key, None)
        except Exception as error:
            note.failures += 1
            note.next_try = self.clock() + min(0.25 * 2**note.failures, LONGEST_PAUSE)
            self.reasons[key] = inert(error, limit=500) or type(error).__name__
            expected = isinstance(error, TunesmithError)
            log.warning("%s attempt %d: %s", *key, self.reasons[key], exc_info=not expected)
            if note.failures >= UNREACHABLE_AFTER and not isinstance(error, StorageError):
                try:
                    self._out_of_reach(error, row)
                except Exception:
                    log.exception("%s attempt %d cannot be judged", *key)

    def _urgent(self, row: Row, note: _Note) -> bool:
        return bool(row["wanted"] == "cancel" and note.cancelled is None and note.failures == 1)

    def _begin(self, executor: Executor, row: Row) -> None:
        """Start an attempt whose turn has come, after proof that nothing of the job's lost attempts still runs."""
        attempts = Attempts(self.store)
        for earlier in attempts.before(row["job"], row["number"]):
            if executor.prove_dead(handle_of(earlier)) != "yes":
                raise BackendUnavailable(
                    f"Attempt {earlier['number']} is lost, and it is not proven that it has ended.",
                    why="Two attempts of one job must never run at once.",
                    code="attempt.not_proven",
                )
        if attempts.begin(row["job"], row["number"]):
            self._start(executor, row)

    def _start(self, executor: Executor, row: Row) -> None:
        """Ask the executor to start an attempt; asked again after any doubt, it never starts a second one."""
        try:
            handle = executor.submit(attempt_of(row))
        except BackendUnavailable:
            raise
        except TunesmithError as error:
            self._fail(row, error)
            return
        Attempts(self.store).started(handle)
        log.info("%s attempt %d started on %s", row["job"], row["number"], self.backend)

    def _follow(self, executor: Executor, row: Row) -> None:
        if row["handle"] is None:
            self._start(executor, row)
            return
        handle = handle_of(row)
        seen = self._take_in(executor, handle)
        attempts = Attempts(self.store)
        if seen.state in ATTEMPT_ENDS:
            attempts.end(row["job"], row["number"], seen.state, seen.exit_code, seen.error)
            log.info("%s attempt %d ended: %s", row["job"], row["number"], seen.state)
            return
        state = seen.state
        if row["state"] == AttemptState.UNKNOWN and state in (AttemptState.SUBMITTED, AttemptState.STARTING):
            state = AttemptState.RUNNING
        if attempt_may(AttemptState(row["state"]), state):
            attempts.move(row["job"], row["number"], state)
        if state is AttemptState.UNKNOWN and executor.prove_dead(handle) == "yes":
            attempts.end(row["job"], row["number"], AttemptState.LOST, None, _lost())
            return
        self._steer(executor, row, handle)

    def _take_in(self, executor: Executor, handle: Handle) -> Observation:
        """Store what became known since the last look; an end only counts once no event is left."""
        job, number = handle.job, handle.number
        cursor = self.metrics.cursor(job, number)
        for turn in range(ROUNDS):
            seen = executor.observe(handle, cursor)
            if seen.events or seen.cursor != cursor:
                self.metrics.ingest(job, number, seen.events, seen.cursor)
                self._checkpoints(job, number, seen.events)
                self.rung(job)
            cursor = seen.cursor
            if not seen.events:
                break
            if seen.state not in ATTEMPT_ENDS and turn >= 4:
                break
        return seen

    def _checkpoints(self, job: str, number: int, events: Iterable[Event]) -> None:
        told = [str(event.values.get("path")) for event in events if event.kind is Kind.CHECKPOINT]
        paths = [
            path for path in told if _CHECKPOINT.fullmatch(path)
        ]  # a line is a file's word: no path leads elsewhere
        if paths:
            Attempts(self.store).checkpoint(job, number, f"attempts/{number}/{paths[-1]}")

    # --- ending an attempt -------------------------------------------------------------------------------------

    def _steer(self, executor: Executor, row: Row, handle: Handle) -> None:
        """End an attempt that a person cancelled, or whose time is up: for the latter at a checkpoint, with a grace."""
        note = self._note(row)
        moment = self.clock()
        why = "cancel" if row["wanted"] == "cancel" else row["ending"]
        if why is None and self._time_is_up(row, note, moment):
            why = "deadline"
        if why is None:
            return
        if row["ending"] is None:
            Attempts(self.store).ending(row["job"], row["number"], why)
        if why == "cancel":
            self._cancel(executor, handle, note, moment)
        elif note.asked_to_stop is None:
            executor.signal(handle, "stop")
            note.asked_to_stop = moment
        elif moment - note.asked_to_stop >= self.grace_seconds:
            self._cancel(executor, handle, note, moment)

    def _cancel(self, executor: Executor, handle: Handle, note: _Note, moment: float) -> None:
        """Ask the executor to end it: TERM, and after its grace KILL of the family. Said again without effect."""
        if note.cancelled is None or moment - note.cancelled >= self.grace_seconds:
            if note.asked_to_stop is None:
                note.asked_to_stop = moment
                executor.signal(handle, "stop")
            executor.cancel(handle)
            note.cancelled = moment

    def _time_is_up(self, row: Row, note: _Note, moment: float) -> bool:
        """Whether the job's hours are used up, by this clock; wall time is read once, when an attempt is first seen."""
        if not note.timed:
            note.timed = True
            left = self._seconds_left(row)
            note.deadline = None if left is None else moment + left
        return note.deadline is not None and moment >= note.deadline

    def _seconds_left(self, row: Row) -> float | None:
        approval = self.store.approval(row["job"])
        attempt = attempt_of(row)
        ran = _seconds(row["started_at"], now())
        hours = [cap for cap in (attempt.spec.limits.hours, approval.hours if approval else None) if cap is not None]
        left = [cap * 3600 - ran - self._spent(row) for cap in hours]
        if attempt.seconds_cap is not None:
            left.append(attempt.seconds_cap - ran)
        return min(left) if left else None

    def _spent(self, row: Row) -> float:
        """Seconds that earlier attempts of the job ran."""
        rows = [item for item in self.store.attempts(row["job"]) if item["number"] < row["number"]]
        return sum(_seconds(item["started_at"], item["ended_at"]) for item in rows)

    # --- trouble -----------------------------------------------------------------------------------------------

    def _out_of_reach(self, error: Exception, row: Row) -> None:
        """An attempt that its executor cannot speak of: unknown, which is left by proof only."""
        attempts = Attempts(self.store)
        row = attempts.get(row["job"], row["number"])
        if row["state"] in ATTEMPT_ENDS or not row["intent"]:
            return
        if row["handle"] is not None:
            attempts.move(row["job"], row["number"], AttemptState.UNKNOWN)
        if not self._proven_dead(row):
            return
        if row["handle"] is not None:
            attempts.end(row["job"], row["number"], AttemptState.LOST, None, _lost())
            return
        hopeless = not isinstance(error, BackendUnavailable) and self._note(row).failures >= START_TRIES
        if hopeless or row["wanted"] == "cancel":
            self._fail(row, error)

    def _proven_dead(self, row: Row) -> bool:
        try:
            return self.backends.get(self.backend).prove_dead(handle_of(row)) == "yes"
        except Exception as error:
            log.info("%s attempt %d: no proof: %s", row["job"], row["number"], error)
            return False

    def _fail(self, row: Row, error: Exception) -> None:
        """End an attempt that never started."""
        if not isinstance(error, TunesmithError):
            error = TunesmithError(
                "The attempt could not be started.",
                why=f"{type(error).__name__}: {inert(error, limit=500)}",
                fix="daemon.log in the home folder has the details.",
                code="backend.submit",
            )
        state = AttemptState.CANCELLED if row["wanted"] == "cancel" else AttemptState.FAILED
        Attempts(self.store).end(row["job"], row["number"], state, None, error.to_doc())

    def _note(self, row: Row) -> _Note:
        return self._notes.setdefault((row["job"], row["number"]), _Note())

    def _forget(self, keep: set[tuple[str, int]]) -> None:
        for key in self._notes.keys() - keep:
            del self._notes[key]
        for key in self.reasons.keys() - keep:
            del self.reasons[key]


class Queue:
    """The lanes of every backend that has work, each in a thread of its own, started when its first attempt comes."""

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        backends: Backends,
        *,
        rung: Callable[[str], None] = lambda job: None,
        slots: Mapping[str, int] = SLOTS,
    ) -> None:
        self.store = store
        self.metrics = metrics
        self.backends = backends
        self.rung = rung
        self.slots = slots
        self._lanes: dict[str, tuple[Lane, threading.Event]] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def nudge(self) -> None:
        """Something changed: look now. Cheap, from any thread."""
        if self._stopping.is_set():
            return
        for backend in Attempts(self.store).backends():
            with self._lock:
                known = self._lanes.get(backend)
                if known is None:
                    known = self._open(backend)
            known[1].set()

    def stop(self, seconds: float = 5.0) -> None:
        """End the lanes, never an attempt. A lane that hangs in an executor is left behind: it is a daemon thread."""
        self._stopping.set()
        for _, wake in self._lanes.values():
            wake.set()
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))

    def reasons(self) -> dict[tuple[str, int], str]:
        """Why attempts wait or cannot be followed, by (job, number)."""
        with self._lock:
            return {key: why for lane, _ in self._lanes.values() for key, why in dict(lane.reasons).items()}

    def _open(self, backend: str) -> tuple[Lane, threading.Event]:
        lane = Lane(
            backend,
            self.store,
            self.metrics,
            self.backends,
            slots=self.slots.get(backend, REMOTE_SLOTS),
            rung=self.rung,
        )
        wake = threading.Event()
        self._lanes[backend] = (lane, wake)
        thread = threading.Thread(target=self._run, args=(lane, wake), name=f"lane-{backend}", daemon=True)
        self._threads.append(thread)
        thread.start()
        return lane, wake

    def _run(self, lane: Lane, wake: threading.Event) -> None:
        while not self._stopping.is_set():
            wake.clear()
            pause = lane.tick()
            wake.wait(pause)


def _seconds(start: str | None, end: str | None) -> float:
    if not start or not end:
        return 0.0
    return max((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds(), 0.0)


def _lost() -> dict[str, Any]:
    return TunesmithError(
        "The attempt is lost: it has ended, and nobody can say how.",
        fix="Retry the job: it goes on from its newest checkpoint.",
        code="attempt.lost",
    ).to_doc()
