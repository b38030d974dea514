"""The driver: takes one job at a time under a lease, runs its graph until it waits or ends, and ends itself when idle.

It may be killed at any moment: what it knows is in the store, the kernel releases its locks, and the next driver takes
over. A step that ends its process again and again (hostile data, no memory) fails its job instead of looping for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Protocol

from tunesmith.graph import route as names
from tunesmith.graph.decisions import failed_state
from tunesmith.graph.machine import Halted, NodeFailed, Tools, advance, forget
from tunesmith.graph.route import newest, route
from tunesmith.orchestrator.errors import Conflict, NoDaemon, TunesmithError
from tunesmith.orchestrator.ports import JobPort
from tunesmith.orchestrator.states import ATTEMPT_ENDS, job_may

log = logging.getLogger("tunesmith.driver")

CRASHES = 4
POLL_SECONDS = 10.0
LOCK_SECONDS = 30.0
PAUSE_SECONDS = (0.2, 1.0, 5.0, 15.0)
_HOSTILE = (names.INTAKE, names.INSPECT, names.SIZE, names.ESTIMATE)  # they read what people wrote; only they can loop
_ORDER = {name: place for place, name in enumerate((*_HOSTILE, *names.ROUTES[1:]))}


class Leases(Protocol):
    """Where jobs that need a decision come from. Both calls raise NoDaemon where nobody answers."""

    def next(self, wait: float) -> tuple[str, JobPort] | None:
        """A leased job and the port bound to its fence, or None when none came within `wait` seconds."""
        ...

    def release(self, job: str) -> None:
        """Give the lease back: the job waits, has ended, or is left to another."""
        ...


class _Ended(BaseException):
    """SIGTERM while nothing was in hand."""


def run(leases: Leases, home: Path, *, idle_seconds: float = 60.0, lock_seconds: float = LOCK_SECONDS) -> None:
    """Drive jobs until none came for `idle_seconds`, SIGTERM, or no daemon answers. Returns normally in each case.

    SIGTERM ends it after the step in hand; a long poll is broken off at once. Call it from the main thread.
    """
    driver = _Driver(leases, home, lock_seconds)
    with contextlib.suppress(_Ended), driver.listening():
        try:
            driver.work(idle_seconds)
        except NoDaemon as error:
            log.warning("no daemon answers, the driver ends: %s", error)


class _Driver:
    def __init__(self, leases: Leases, home: Path, lock_seconds: float) -> None:
        self.leases = leases
        self.home = home
        self.lock_seconds = lock_seconds
        self.stop = threading.Event()
        self.polling = False
        self.troubles: dict[str, int] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT mean: end after this step."""

        def heard(number: int, frame: FrameType | None) -> None:
            self.stop.set()
            if self.polling:
                raise _Ended

        before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            self.polling = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def work(self, idle_seconds: float) -> None:
        """Take jobs one after the other."""
        until = time.monotonic() + idle_seconds
        while not self.stop.is_set() and (left := until - time.monotonic()) > 0:
            self.polling = True
            leased = self.leases.next(min(left, POLL_SECONDS))
            self.polling = False
            if leased is None:
                continue
            job, port = leased
            try:
                self.drive(job, port)
            finally:
                try:
                    self.leases.release(job)
                except TunesmithError as error:
                    log.info("%s: the lease was not given back: %s", job, error)
            until = time.monotonic() + idle_seconds

    def drive(self, job: str, port: JobPort) -> None:
        """One turn of one job. Only NoDaemon leaves it."""
        try:
            with Turn.hold(self.home / "jobs" / job, self.stop, self.lock_seconds) as turn:
                try:
                    where = advance(job, Tools(port, self.home / "cache", turn.enter), self.home / "graph.db")
                    log.info("%s: %s", job, "ended" if where == names.END else f"waits at {where}")
                except NodeFailed as error:
                    log.error("%s: %s", job, error)
                    fail(job, port, error)
                    forget(job, self.home / "graph.db")
            self.troubles.pop(job, None)
        except Halted as halt:
            log.info("%s: left where it stands: %s", job, halt)
        except Conflict as error:
            log.info("%s: dropped, the lease is lost: %s", job, error)
        except NoDaemon:
            raise
        except Exception:
            log.exception("%s: this turn failed", job)
            tried = self.troubles[job] = self.troubles.get(job, 0) + 1
            self.stop.wait(PAUSE_SECONDS[min(tried, len(PAUSE_SECONDS)) - 1])


def fail(job: str, port: JobPort, error: NodeFailed) -> None:
    """End a job that its graph cannot go on with: with the typed error behind it (a full disk), or as `internal`.

    A job whose attempt still runs is left alone.
    """
    view = port.view(job)
    last = newest(view)
    if route(view) == names.END or (last is not None and last.state not in ATTEMPT_ENDS):
        return
    state = failed_state(view)
    if state is not view.state and not job_may(view.state, state):
        return
    cause = error.__cause__
    if isinstance(cause, TunesmithError) and type(cause) is not TunesmithError:
        port.finish(job, state, cause.to_doc())
        return
    wrong = TunesmithError(
        str(error),
        why="This is a fault of Tunesmith or of its surroundings, not of the request.",
        fix=f"The log of the daemon has the details; `tunesmith retry {job}` tries again.",
        code="internal",
        where=error.node,
    )
    port.finish(job, state, wrong.to_doc())


class Turn:
    """The lock of a job (flock on graph.lock, released by the kernel) and its tally of steps that never came back.

    The file holds the furthest step reached, how many turns in a row died inside it (killed, crashed, out of memory),
    and whether it is in hand now. Every other end of a turn empties it.
    """

    def __init__(self, descriptor: int, stop: threading.Event) -> None:
        self.descriptor = descriptor
        self.stop = stop
        self.step, self.crashes, inside = _tally(descriptor)
        self.crashes += inside
        self._note(inside=False)  # a death before the step is reached again is not counted

    @classmethod
    @contextlib.contextmanager
    def hold(cls, folder: Path, stop: threading.Event, seconds: float) -> Iterator[Turn]:
        """Wait up to `seconds` for the lock, and hold it. Raises Halted where another driver keeps it."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(folder / "graph.lock", flags, 0o600)
        try:
            until = time.monotonic() + seconds
            while not _locked(descriptor):
                if time.monotonic() >= until or stop.wait(0.05):
                    raise Halted("another driver holds this job")
            turn = cls(descriptor, stop)
            try:
                yield turn
            finally:
                os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def enter(self, node: str) -> None:
        """Called before each step. Raises Halted when told to end, NodeFailed where this step keeps crashing."""
        if self.stop.is_set():
            raise Halted("told to end")
        if self.crashes >= CRASHES and node == self.step and node in _HOSTILE:
            raise NodeFailed(node, f"The step {node!r} ended its process {self.crashes} times in a row.")
        if _ORDER[node] > _ORDER.get(self.step, -1):
            self.step, self.crashes = node, 0
        self._note(inside=node == self.step)

    def _note(self, *, inside: bool) -> None:
        tally = json.dumps({"step": self.step, "crashes": self.crashes, "inside": inside}).encode()
        with contextlib.suppress(OSError):  # a full disk must not stop the job here
            os.pwrite(self.descriptor, tally.ljust(96), 0)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tally(descriptor: int) -> tuple[str, int, bool]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return str(found["step"]), int(found["crashes"]), bool(found["inside"])
    except (ValueError, KeyError, TypeError):
        return "", 0, False
