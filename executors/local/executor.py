"""The local executor: starts attempts on this machine, follows them, ends them, and proves them ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.executors.local import manifest, procfs, shim, tail
from tunesmith.executors.local.folder import Folder, storage_error
from tunesmith.orchestrator.errors import BackendUnavailable, Conflict, NotReady, StorageError, TunesmithError
from tunesmith.orchestrator.nouns import SCHEMA_VERSION, Attempt, Device, plain
from tunesmith.orchestrator.ports import Artifact, Dead, Handle, Observation, Signal
from tunesmith.orchestrator.states import AttemptState

_A = AttemptState
_ALIVE = {"starting": _A.STARTING, "running": _A.RUNNING}
_LOCK_FD = 3

# Variables that look like secrets stay with the daemon. The Hub's token goes along: gated models and data need it.
_SECRET = re.compile(
    r"(?i)(^|_)(token|secrets?|password|passwd|credentials?|api_?key|access_?key|private_?key|key_id|key)($|_)"
    r"|^(langsmith|langchain|wandb)_|(?i:connection_string$|database_url$)"
)
_HUB = frozenset({"HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"})


def environment(home: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """What a kernel sees: the daemon's environment less its secrets, with the home and quiet libraries.

    The Hub's token stays (HF_TOKEN and its kin); thread settings (OMP_NUM_THREADS...) and proxies are untouched.
    Output is unbuffered, so that the last line before a crash is in the log.
    """
    kept = {name: value for name, value in inherited.items() if name in _HUB or not _SECRET.search(name)}
    kept.pop("TUNESMITH_ATTEMPT", None)  # of an attempt that the daemon itself was started from
    return {
        **kept,
        "TUNESMITH_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended: its exit record, or None for a lost one (`why` says what is known)."""

    record: Mapping[str, Any] | None
    why: str = ""


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
        start_seconds: float = 10.0,
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
                    raise self._slow()
                time.sleep(0.005)

    def _start(self, folder: Folder, lock: int, until: float) -> None:
        """Spawn the shim, lock in hand, and wait for its word."""
        said, say = os.pipe()
        descriptors = [_high(say), _high(lock)]
        os.close(say)
        program = [sys.executable, "-I", "-S", shim.__file__, str(folder.path), "--lock", str(_LOCK_FD)]
        try:
            pid = os.posix_spawn(
                sys.executable,
                [*program, "--grace", str(self.grace_seconds), "--", *self.command, str(folder.path)],
                environment(self.home, os.environ),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, descriptors[0], 1),
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, descriptors[1], _LOCK_FD),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT),
            )
        except OSError as error:
            os.close(said)
            raise BackendUnavailable(
                "The attempt could not be started on this machine.",
                why=f"The system says: {error.strerror}.",
                fix="Are there processes and memory to spare?",
                code="local.spawn",
            ) from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._shims.add(pid)
        try:
            self._heed(folder, said, until)
        finally:
            os.close(said)

    def _heed(self, folder: Folder, said: int, until: float) -> None:
        """Wait for the shim's line and raise what it says; silence until the end of the pipe means that it died."""
        line = b""
        while not line.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([said], [], [], left)[0]:
                raise self._slow()
            part = os.read(said, 65536)
            if not part:
                raise BackendUnavailable(
                    "The attempt's shim ended before it could start the kernel.",
                    fix="Ask again; see the log in the attempt's folder.",
                    code="local.spawn",
                    where=str(folder.path),
                )
            line += part
        word = json.loads(line)
        if "error" in word:
            raise storage_error(word["errno"], word["error"], folder.path)

    def _slow(self) -> BackendUnavailable:
        return BackendUnavailable(
            f"The attempt has not started within {self.start_seconds:g} seconds.",
            why="The machine or its disk is busy; it may still start.",
            fix="Ask again: it is never started twice.",
            code="local.slow_start",
        )

    # --- follow --------------------------------------------------------------------------------------------------

    def observe(self, handle: Handle, cursor: str) -> Observation:
        """Events after `cursor`, at most 4 MiB of them, and the state. An end is told only when no line is left.

        An attempt whose shim died is lost; whatever it left running is killed here, before the loss is told.
        """
        self._reap()
        at = tail.Cursor.parse(cursor)
        with self._open(handle) as folder:
            if folder is None:
                if procfs.sweep(self._cookie(handle)) or procfs.leaving():
                    return Observation(state=_A.UNKNOWN, events=(), cursor=str(at))
                return _lost(at, (), "The attempt's folder is gone.")
            ending = self._ending(folder, handle)
            batch = tail.read_on(folder, at, handle.number, ended=ending is not None)
            if ending is None or not batch.drained:
                state = _ALIVE.get(batch.cursor.state, _A.FINISHING)
                if not batch.cursor.state:
                    state = _A.STARTING if folder.has("started") else _A.SUBMITTED
                return Observation(state=state, events=batch.events, cursor=str(batch.cursor))
            if ending.record is None:
                return _lost(batch.cursor, batch.events, ending.why)
            state = _end_state(ending.record)
            error = self._error(folder, handle, ending.record) if state is _A.FAILED else None
            return Observation(
                state=state,
                events=batch.events,
                cursor=str(batch.cursor),
                exit_code=ending.record["code"],
                error=error,
            )

    def _ending(self, folder: Folder, handle: Handle) -> Ending | None:
        """How the attempt ended; None while anything of it may still write."""
        record = _exit_record(folder)
        if record is None:
            if folder.locked:
                return None
            record = _exit_record(folder)  # the shim writes it before it lets go
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

    def _error(self, folder: Folder, handle: Handle, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """What went wrong: the kernel's own word where it had one, else what the end record tells."""
        if record.get("reason") == "deadline":
            return _deadline().to_doc()
        event = tail.last_state(folder, handle.number)
        said = event.values.get("error") if event and tail.state_of(event) == "failed" else None
        if isinstance(said, Mapping):
            return said
        return _killed(record).to_doc() if record.get("signal") else _broken(record, folder.path).to_doc()

    # --- steer and end -------------------------------------------------------------------------------------------

    def signal(self, handle: Handle, what: Signal) -> None:
        """Write the wish to `control`, where the kernel looks once a step. A stop asked for stays asked for.

        Nothing happens where the attempt has ended; before its start, a stop keeps it from starting.
        """
        with self._open(handle) as folder:
            if folder is None or _exit_record(folder) is not None:
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
            if refused is not None and _exit_record(folder) is None:
                raise refused

    def prove_dead(self, handle: Handle) -> Dead:
        """Yes where the lock is free and no process carries the attempt's cookie; a missing folder proves nothing."""
        with self._open(handle) as folder:
            if folder is None:
                return "no" if procfs.carriers(self._cookie(handle)) else "unknown"
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
            if _exit_record(folder) is None:
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


def _high(descriptor: int) -> int:
    """A copy above the numbers that the shim is given, so that no copy overwrites another."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)


def _key(folder: Folder) -> str | None:
    document = folder.read("attempt.json")
    return None if document is None else str(document.get("key"))


def _exit_record(folder: Folder) -> dict[str, Any] | None:
    """The end record; None where there is none, or none that can be believed: that is a loss, never a success."""
    try:
        record = folder.read("exit")
    except StorageError as error:
        if error.code != "storage.damaged":
            raise
        return None
    return record if record is not None and type(record.get("code")) is int else None


def _end_state(record: Mapping[str, Any]) -> AttemptState:
    """The end that a record tells: a result is a result, even where a stop or the deadline came in between."""
    if record["code"] == 0:
        return _A.SUCCEEDED
    if record.get("reason") == "cancelled":
        return _A.CANCELLED
    if record.get("reason") == "deadline":
        return _A.FAILED
    return _A.CANCELLED if record["code"] == shim.TOLD_TO else _A.FAILED


def _lost(cursor: tail.Cursor, events: tuple[Any, ...], why: str) -> Observation:
    error = TunesmithError(
        "The attempt is lost: it ended without a record.",
        why=why,
        fix="Retry the job: it goes on from its last good checkpoint.",
        code="attempt.lost",
    )
    return Observation(state=_A.LOST, events=events, cursor=str(cursor), error=error.to_doc())


def _deadline() -> TunesmithError:
    return TunesmithError(
        "The attempt was ended because its time was up.",
        why="limits.hours caps how long it may run.",
        fix="Raise limits.hours and retry: it goes on from its last checkpoint.",
        code="attempt.deadline",
    )


def _killed(record: Mapping[str, Any]) -> TunesmithError:
    number = record["signal"]
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL and record.get("oom_kills"):
        return TunesmithError(
            "The kernel was killed because the machine ran out of memory.",
            why="It ended by SIGKILL, and the system's out-of-memory killer struck while it ran.",
            fix="Make it smaller (micro-batch, sequence length, adapter), or free memory.",
            code="memory.host",
        )
    why, fix = f"It ended by {name}.", "See the log."
    if number == signal.SIGKILL:
        why = "It ended by SIGKILL: somebody killed it, or the machine ran out of memory."
        fix = "See the system's log for an out-of-memory kill, then retry: it goes on from its last checkpoint."
    return TunesmithError("The kernel was killed.", why=why, fix=fix, code="killed")


def _broken(record: Mapping[str, Any], path: Path) -> TunesmithError:
    return TunesmithError(
        f"The kernel ended with exit code {record['code']} and did not say why.",
        fix=f"See {path / 'log'}.",
        code="kernel.exit",
        where=str(path / "log"),
    )
