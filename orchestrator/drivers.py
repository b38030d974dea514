"""The driver process: started when a job needs the graph and none runs, again after a crash, with growing pauses."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from tunesmith.orchestrator import processes
from tunesmith.orchestrator.errors import TunesmithError
from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.inert import inert
from tunesmith.orchestrator.leases import Leases

log = logging.getLogger("tunesmith.daemon")

LOOK_SECONDS = 5.0
BUSY_SECONDS = 0.5
LONGEST_PAUSE = 30.0
CRASHES = 5  # in a row, without one job released between: then the jobs that wait are told so
LOG_BYTES = 8 * 1024 * 1024


class Drivers:
    """Sees that a driver runs while there is work for one. At most one per home: it holds driver.lock."""

    def __init__(
        self,
        leases: Leases,
        home: Home,
        *,
        command: Sequence[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.leases = leases
        self.home = home
        self.clock = clock
        self.command = tuple(
            command or (sys.executable, "-P", "-m", "tunesmith.orchestrator.daemon", "drive", "--home", str(home.path))
        )
        self._child: subprocess.Popen[bytes] | None = None
        self._crashes = 0
        self._next_start = 0.0
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # --- the thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look, in a thread."""
        self._thread = threading.Thread(target=self._run, name="drivers", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """Something changed: look now."""
        self._wake.set()

    def stop(self, seconds: float = 3.0) -> None:
        """Tell the driver that we started to end (it ends after its step), and look no more."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(seconds)
        child = self._child
        if child is not None and child.poll() is None:
            child.terminate()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                pause = self.tick()
            except Exception:
                log.exception("the driver cannot be looked after")
                pause = LOOK_SECONDS
            self._wake.wait(pause)

    # --- one look ----------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The pid of the driver that we started, while it lives."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def tick(self) -> float:
        """Take what a dead driver held, start one where it is needed; the seconds until the next look."""
        self._reap()
        for holder in self.leases.silent():
            log.warning("driver %s hangs and is killed", holder)
            processes.kill(holder)
        self.leases.reap()
        if not self.leases.wanted():
            return LOOK_SECONDS if self._child is None else BUSY_SECONDS
        if self._child is not None or self._locked():
            return BUSY_SECONDS
        left = self._next_start - self.clock()
        if left > 0:
            return min(left, BUSY_SECONDS)
        self._start()
        return BUSY_SECONDS

    def _start(self) -> None:
        log_path = self.home.driver_log
        if log_path.exists() and log_path.stat().st_size > LOG_BYTES:
            log_path.replace(log_path.with_suffix(".log.1"))
        output = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.home.path,
                start_new_session=True,
            )
        finally:
            os.close(output)
        log.info("driver %d started", self._child.pid)

    def _reap(self) -> None:
        child = self._child
        if child is None or child.poll() is None:
            return
        self._child = None
        if child.returncode == 0 or self.leases.take_released():
            self._crashes = 0
        if child.returncode == 0:
            self._next_start = self.clock() + 0.2
            return
        self._crashes += 1
        self._next_start = self.clock() + min(0.2 * 2**self._crashes, LONGEST_PAUSE)
        log.warning("driver %d ended with code %d (%d in a row)", child.pid, child.returncode, self._crashes)
        if self._crashes >= CRASHES:
            self._crashes = 0
            self.leases.give_up(
                TunesmithError(
                    "The driver, which plans jobs, cannot be kept running.",
                    why=self._last_words(),
                    fix=f"See {self.home.driver_log}; tunesmith doctor says what is missing.",
                    code="graph.unavailable",
                )
            )

    def _locked(self) -> bool:
        """Whether a driver (perhaps of an earlier daemon) lives."""
        try:
            descriptor = os.open(self.home.driver_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _last_words(self) -> str:
        try:
            with self.home.driver_log.open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
                lines = file.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return inert(lines[-1], limit=300) if lines else ""
