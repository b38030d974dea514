"""Which process is meant: boot, pid and start time together, so that a reused pid is never taken for its old owner."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil


def identity(pid: int) -> str | None:
    """Who a pid is now, as text to store; None where no such process lives (a zombie does not)."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
    except psutil.Error:
        return None
    ticks = _ticks(pid)
    started = ticks if ticks is not None else f"{process.create_time():.2f}"
    return f"{_boot()}:{pid}:{started}"


def alive(who: str) -> bool:
    """Whether the process that `identity` named still lives."""
    try:
        pid = int(who.rsplit(":", 2)[1])
    except (IndexError, ValueError):
        return False
    return identity(pid) == who


def kill(who: str) -> bool:
    """Send SIGKILL to exactly the process that `identity` named; False where it is gone. Never hits a reused pid."""
    try:
        pid = int(who.rsplit(":", 2)[1])
        handle = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    except (IndexError, ValueError, OSError):
        return False
    try:
        if not alive(who):
            return False
        if handle is None:
            os.kill(pid, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        return True
    except OSError:
        return False
    finally:
        if handle is not None:
            os.close(handle)


def _ticks(pid: int) -> str | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return text.rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return os.uname().nodename
