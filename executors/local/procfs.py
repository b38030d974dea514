"""Processes as they are now: who is who, who belongs to an attempt, and signals that cannot hit a stranger.

A pid alone proves nothing: it is reused. A process is named by (boot, pid, start ticks), and the members of an attempt
also by a cookie in their environment, which survives any fork, session or re-parenting. A zombie counts as dead once
its last thread is; a process that is on its way out, which shows no environment any more, does not.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.executors.local.shim import boot_id, stat_fields

LINUX = sys.platform.startswith("linux")
_EXITING = 0x4  # PF_EXITING of linux/sched.h, in the ninth field of /proc/PID/stat


@dataclass(frozen=True, slots=True)
class Process:
    """One process for ever: its pid is only meaningful together with its start, and both within one boot."""

    boot: str
    pid: int
    ticks: int | None

    @classmethod
    def recorded(cls, started: Mapping[str, Any], who: str) -> Process | None:
        """The process that a `started` record names (`who` is "shim" or "kernel"); None where it names none."""
        pid, ticks = started.get(f"{who}_pid"), started.get(f"{who}_ticks")
        if type(pid) is not int or pid <= 1 or not (ticks is None or type(ticks) is int):
            return None
        return cls(str(started.get("boot_id", "")), pid, ticks)

    @property
    def alive(self) -> bool:
        """Whether this very process runs now, in the eyes of this system."""
        if self.boot != boot_id():
            return False
        if not LINUX:
            return _exists(self.pid)
        fields = stat_fields(self.pid)
        return fields is not None and not _dead(fields) and int(fields[19]) == self.ticks

    def send(self, number: signal.Signals) -> bool:
        """Send a signal to this very process; False where it is gone or is not ours.

        The descriptor is opened first and the identity checked after: from then on the pid cannot change hands.
        """
        try:
            if not LINUX:
                if self.alive:
                    os.kill(self.pid, number)
                    return True
                return False
            descriptor = os.pidfd_open(self.pid)
            try:
                if not self.alive:
                    return False
                signal.pidfd_send_signal(descriptor, number)
                return True
            finally:
                os.close(descriptor)
        except OSError:
            return False


def carriers(cookie: Mapping[str, str]) -> list[Process]:
    """Every live process of ours whose environment holds all of `cookie`, the caller left out.

    Costs 1 to 2 ms for a hundred processes. A process that overwrote its environment, or hides it, is not found.
    """
    wanted = {f"{name}={value}".encode("utf-8", "surrogateescape") for name, value in cookie.items()}
    if not LINUX:
        return _carriers_by_psutil(cookie)
    boot = boot_id()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid() or not _holds(int(name), wanted):
            continue
        fields = stat_fields(int(name))
        if fields and not _dead(fields):
            found.append(Process(boot, int(name), int(fields[19])))
    return found


def leaving() -> bool:
    """Whether some process of this user is on its way out: it has lost its environment, and may still hold a GPU.

    True for milliseconds as a rule; whoever must know that a carrier of a cookie is gone waits until it is False.
    """
    if not LINUX:
        return False
    for name in os.listdir("/proc"):
        fields = stat_fields(int(name)) if name.isdigit() else None
        if fields and int(fields[6]) & _EXITING and not _dead(fields):
            try:
                if os.stat(f"/proc/{name}").st_uid == os.getuid():
                    return True
            except OSError:
                continue
    return False


def sweep(cookie: Mapping[str, str]) -> list[Process]:
    """KILL every live process that carries the cookie; returns those found. Never waits."""
    found = carriers(cookie)
    for process in found:
        process.send(signal.SIGKILL)
    return found


def _dead(fields: list[bytes]) -> bool:
    """Whether nothing of a process runs: it is a zombie, and so is its last thread."""
    return fields[0] in (b"Z", b"X") and int(fields[17]) <= 1


def _holds(pid: int, wanted: set[bytes]) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return wanted <= set(file.read().split(b"\0"))
    except OSError:
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _carriers_by_psutil(cookie: Mapping[str, str]) -> list[Process]:
    """The same on systems without /proc, as far as they show other processes' environments."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if process.pid != os.getpid() and all(environment.get(name) == value for name, value in cookie.items()):
                found.append(Process(boot_id(), process.pid, None))
        except (psutil.Error, OSError):
            continue
    return found
