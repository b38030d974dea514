"""The local executor: starts attempts on this machine, follows them, ends them, and proves them ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.executors.local import manifest, procfs, shim, tail
from tunesmith.executors.local.ending import Ending, exit_record, lost
from tunesmith.executors.local.folder import Folder
from tunesmith.executors.local.launch import launch, slow
from tunesmith.orchestrator.errors import BackendUnavailable, Conflict, NotReady, StorageError
from tunesmith.orchestrator.nouns import SCHEMA_VERSION, Attempt, Device
from tunesmith.orchestrator.plain import plain
from tunesmith.orchestrator.ports import Artifact, Dead, Handle, Observation, Signal
from tunesmith.orchestrator.states import AttemptState

_A = AttemptState
_ALIVE = {"starting": _A.STARTING, "running": _A.RUNNING}


class LocalExecutor:
    """Runs attempts under a shim each (see shim.py), in HOME/jobs/JOB/attempts/N. Holds no state of its own.

    Any number of executors, in any number of processes, may look at the same home: the lock in an attempt's folder
    decides everything. `command` is what the kernel is (the folder is added to it); `grace_seconds` passes between
    TERM and KILL; `start_seconds` bounds how long `submit` waits for a durable start.
    """

    name = "local"

    def __init__(
        self,
        home: Path,
        *,
        command: Sequence[str] | None = None,
        grace_seconds: float = 30.0,
        start_seconds: float = 5.0,
    ) -> None:
        self.home = Path(os.path.abspath(home))
        self.command = tuple(command or (sys.executable, "-P", "-m", "tunesmith.executors.kernel"))
        self.grace_seconds = grace_seconds
        self.start_seconds = start_seconds
        self._shims: set[int] = set()

    def devices(self) -> Sequence[Device]:
        """GPUs first, then the CPU. See device.py for what is measured and what is estimated."""
        from tunesmith.executors.local.device import devices

        return devices()

    # --- start ---------------------------------------------------------------------------------------------------

    def submit(self, attempt: Attempt) -> Handle:
        """Start an attempt, once, and return when its start is on disk (70 ms).

        Repeated calls, also from other processes at the same moment, never start a second kernel: whoever takes the
        lock looks first, and the shim inherits that very lock. Raises Conflict where the folder belongs to another
        attempt, StorageError where the disk refuses, BackendUnavailable where no start was seen in time (ask again).
        """
        self._reap()
        handle = Handle(backend=self.name, key=attempt.key, job=attempt.job, number=attempt.number)
        document = {"schema_version": SCHEMA_VERSION, "key": attempt.key, **plain(attempt)}
        until = time.monotonic() + self.start_seconds
        with Folder.make(self.home, attempt.job, attempt.number) as folder:
            while True:
                lock = folder.take_lock()
                if lock is not None:
                    try:
                        if _key(folder) is None:
                            folder.write("attempt.json", document)
                        self._check_key(folder, handle)
                        if not (folder.has("started") or folder.has("exit")):
                            self._start(folder, lock, until)
                        return handle
                    finally:
                        os.close(lock)
                if folder.has("started") or folder.has("exit"):
                    self._check_key(folder, handle)
                    return handle
                if time.monotonic() > until:
                    raise slow()
                time.sleep(0.005)

    def _start(self, folder: Folder, lock: int, until: float) -> None:
        pending = launch(folder, lock, self.command, home=self.home, grace=self.grace_seconds, until=until)
        self._shims.add(pending.pid)
        pending.heed()

    # --- follow --------------------------------------------------------------------------------------------------

    def observe(self, handle: Handle, cursor: str) -> Observation:
        """Events after `cursor`, at most 4 MiB of them, and the state. An end is told only when no line is left.

        An attempt whose shim died is lost; whatever it left running is killed here, before the loss is told.
        """
        self._reap()
        at = tail.Cursor.parse(cursor)
        with self._open(handle) as folder:
            if folder is None:
                if not (self.home / "jobs").is_dir():
                    raise BackendUnavailable(
                        f"{self.home} is not there.", why="Its disk may not be mounted.", code="local.home"
                    )
                if procfs.sweep(self._cookie(handle)) or procfs.leaving():
                    return Observation(state=_A.UNKNOWN, events=(), cursor=str(at))
                error = lost("The attempt's folder is gone.").to_doc()
                return Observation(state=_A.LOST, events=(), cursor=str(at), error=error)
            ending = self._ending(folder, handle)
            batch = tail.read_on(folder, at, handle.number, ended=ending is not None)
            if ending is None or not batch.drained:
                state = _ALIVE.get(batch.cursor.state, _A.FINISHING)
                if not batch.cursor.state:
                    state = _A.STARTING if folder.has("started") else _A.SUBMITTED
                return Observation(state=state, events=batch.events, cursor=str(batch.cursor))
            return Observation(
                state=ending.state,
                events=batch.events,
                cursor=str(batch.cursor),
                exit_code=ending.exit_code,
                error=ending.error(folder, handle.number),
            )

    def _ending(self, folder: Folder, handle: Handle) -> Ending | None:
        """How the attempt ended; None while anything of it may still write."""
        record = exit_record(folder)
        if record is None:
            if folder.locked:
                return None
            record = exit_record(folder)  # the shim writes it before it lets go
        if record is not None:
            return Ending(record)
        started = folder.read("started")
        if started is None:
            return Ending(None, "It was never started.")
        kernel = procfs.Process.recorded(started, "kernel")
        if procfs.sweep(self._cookie(handle)) or (kernel and kernel.alive) or procfs.leaving():
            return None
        if started.get("boot_id") != shim.boot_id():
            return Ending(None, "The machine was started anew while it ran.")
        return Ending(None, "Its shim was killed, and the kernel died with it.")

    # --- steer and end -------------------------------------------------------------------------------------------

    def signal(self, handle: Handle, what: Signal) -> None:
        """Write the wish to `control`, where the kernel looks once a step. A stop asked for stays asked for.

        Nothing happens where the attempt has ended; before its start, a stop keeps it from starting.
        """
        with self._open(handle) as folder:
            if folder is None or exit_record(folder) is not None:
                return
            with folder.held():
                try:
                    before = folder.read("control") or {}
                except StorageError:
                    before = {}
                if before.get("signal") == "stop":
                    return
                serial = before.get("serial")
                serial = serial + 1 if type(serial) is int else 1
                folder.write("control", {"signal": what, "serial": serial, "time": shim.moment()})

    def cancel(self, handle: Handle) -> None:
        """Ask for a stop and send TERM to the shim, which passes it on and KILLs the whole family after the grace.

        The shim is named by boot, pid and start ticks, and its lock must be held: a stranger is never signalled. What
        an attempt that ended left behind is killed at once. Returns without waiting; may be repeated.
        """
        refused: StorageError | None = None
        try:
            self.signal(handle, "stop")
        except StorageError as error:  # a full disk must not keep anything alive
            refused = error
        with self._open(handle) as folder:
            if folder is None or not folder.locked:
                procfs.sweep(self._cookie(handle))
                return
            started = folder.read("started")
            shepherd = procfs.Process.recorded(started, "shim") if started else None
            if shepherd is not None and shepherd.send(signal.SIGTERM):
                return
            if refused is not None and exit_record(folder) is None:
                raise refused

    def prove_dead(self, handle: Handle) -> Dead:
        """Yes where the lock is free and no process carries the attempt's cookie.

        A folder that was removed cannot be locked, and the cookie alone must do; a home that is not there (a disk not
        mounted) proves nothing.
        """
        with self._open(handle) as folder:
            if folder is None:
                if procfs.carriers(self._cookie(handle)) or procfs.leaving():
                    return "no"
                return "yes" if procfs.LINUX and (self.home / "jobs").is_dir() else "unknown"
            if folder.locked:
                return "no"
            started = folder.read("started")
            kernel = procfs.Process.recorded(started, "kernel") if started else None
            if kernel is not None and procfs.LINUX and kernel.alive:
                return "no"
            return "no" if procfs.carriers(self._cookie(handle)) or procfs.leaving() else "yes"

    def collect(self, handle: Handle) -> Sequence[Artifact]:
        """The results, every byte verified. NotReady while the attempt runs, StorageError where they do not verify."""
        with self._open(handle) as folder:
            if folder is None:
                path = self.home / "jobs" / handle.job / "attempts" / str(handle.number)
                raise StorageError(f"{path} is gone.", why="The results were in it.", code="artifacts.missing")
            if exit_record(folder) is None:
                raise NotReady("The attempt has not ended, so it has no results yet.", code="attempt.not_ended")
            return manifest.verified(folder, number=handle.number, spec=handle.key.rpartition(":")[2])

    # --- common --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _open(self, handle: Handle) -> Iterator[Folder | None]:
        folder = Folder.find(self.home, handle.job, handle.number)
        if folder is None:
            yield None
            return
        with folder:
            self._check_key(folder, handle)
            yield folder

    def _check_key(self, folder: Folder, handle: Handle) -> None:
        key = _key(folder)
        if key is not None and key != handle.key:
            raise Conflict(
                f"{folder.path} belongs to another attempt.",
                why=f"It was started as {key}, and {handle.key} is asked for.",
                fix="Another spec needs another attempt number.",
                code="attempt.key",
                where=str(folder.path),
            )

    def _cookie(self, handle: Handle) -> dict[str, str]:
        return {"TUNESMITH_ATTEMPT": handle.key, "TUNESMITH_HOME": str(self.home)}

    def _reap(self) -> None:
        """Take the exit status of shims that we started ourselves, so that none stays a zombie of ours."""
        for pid in tuple(self._shims):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    continue
            self._shims.discard(pid)


def _key(folder: Folder) -> str | None:
    document = folder.read("attempt.json")
    return None if document is None else str(document.get("key"))
