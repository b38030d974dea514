"""Stands over one kernel: holds the lock, records start and end durably, and takes the whole family down with it.

Run as a file, with the standard library only and nothing else on the path:

    python -I -S shim.py FOLDER [--lock FD] [--grace SECONDS] -- COMMAND...

The lock (flock on FOLDER/lock) is inherited from whoever submitted, so that it is held without a gap from the decision
to start until the last process is gone; run by hand, the shim takes it itself. One line of JSON on stdout says how the
start went. What follows goes to FOLDER/log, which the kernel writes directly.

On Linux the kernel dies with the shim (parent-death signal) and orphans of any session come home to it (subreaper).
Elsewhere neither exists: the kernel's process group is ended, and the log says what cannot be kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

LOG_MOST = 64 * 2**20  # bytes of log on disk; the head and the latest lines stay, the middle is cut
LOG_HEAD = 32 * 2**20
LOG_TAIL = 256 * 2**10
TICK = 0.25  # seconds between two looks at the log's size and the deadline
SWEEP_SECONDS = 30.0
TOLD_TO = 75  # exit code of an attempt that ended because it was told to

_SET_PDEATHSIG = 1
_SET_CHILD_SUBREAPER = 36
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OURS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}


# --- facts about processes and files, also used by the executor ----------------------------------------------------


def boot_id() -> str:
    """The kernel's name for this boot, or "" where there is none: pids of another boot mean nothing."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def stat_fields(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat from the third on (state, parent...); None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return None


def ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the pid and the boot, its identity."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields else None


def moment() -> str:
    """The time as event lines write it: UTC, RFC 3339, milliseconds."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"


def read_document(directory: int, name: str, most: int = 16 * 2**20) -> dict[str, Any] | None:
    """The JSON object in a file of the folder, or None where there is no such file. OSError, ValueError if unusable."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        return None
    with open(file, "rb") as stream:
        document = json.loads(stream.read(most))
    if not isinstance(document, dict):
        raise ValueError(f"{name} does not hold a JSON object")
    return document


def write_document(directory: int, name: str, document: dict[str, Any]) -> None:
    """Write a file of the folder so that it is whole or absent, whatever happens: aside, fsync, rename, fsync."""
    aside = f"{name}.{os.getpid()}.tmp"
    file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        with open(file, "wb") as stream:
            stream.write(json.dumps(document).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(aside, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside, dir_fd=directory)
        raise
    os.fsync(directory)


def exists(directory: int, name: str) -> bool:
    """Whether the folder has an entry of that name."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def stop_asked(directory: int) -> bool:
    """Whether the control file asks the attempt to end."""
    try:
        return (read_document(directory, "control") or {}).get("signal") == "stop"
    except (OSError, ValueError):
        return False


# --- the end record ------------------------------------------------------------------------------------------------


def reserve_exit(directory: int) -> None:
    """Take the room of the end record now, so that a disk full by then cannot keep the end from being recorded."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open("exit.tmp", flags, 0o600, dir_fd=directory)
    try:
        os.write(file, b" " * 4096)
        os.fsync(file)
    finally:
        os.close(file)


def record_exit(directory: int, document: dict[str, Any]) -> None:
    """Write `exit` durably, in the room reserved. A file system that wants more room is waited for, lock in hand."""
    text = json.dumps(document).encode() + b"\n"
    while True:
        try:
            file = os.open("exit.tmp", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
            try:
                os.pwrite(file, text, 0)
                os.ftruncate(file, len(text))
                os.fsync(file)
            finally:
                os.close(file)
            os.rename("exit.tmp", "exit", src_dir_fd=directory, dst_dir_fd=directory)
            os.fsync(directory)
            return
        except OSError as error:
            if error.errno not in _FULL:
                raise
            time.sleep(1.0)


def oom_kills() -> int | None:
    """How often the machine's out-of-memory killer has struck since boot, containers included."""
    try:
        with open("/proc/vmstat") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), None)
    except OSError:
        return None


# --- the log -------------------------------------------------------------------------------------------------------


def cut_log(log: int) -> None:
    """Keep the log within LOG_MOST: its head, a mark, and the latest lines. The kernel goes on appending meanwhile.

    Costs one fstat when nothing is to be cut. Lines written between the look and the cut are lost with the middle.
    """
    size = os.fstat(log).st_size
    if size <= LOG_MOST:
        return
    latest = os.pread(log, LOG_TAIL, size - LOG_TAIL)
    os.ftruncate(log, LOG_HEAD)
    mark = f"\n[tunesmith: {size - LOG_HEAD - len(latest)} bytes of log were cut here]\n"
    os.write(log, mark.encode() + latest)


# --- the family ----------------------------------------------------------------------------------------------------


def system_call() -> Callable[..., int] | None:
    """prctl, or None on a system that has none."""
    if not sys.platform.startswith("linux"):
        return None
    prctl: Callable[..., int] = ctypes.CDLL(None, use_errno=True).prctl
    return prctl


def start_kernel(
    command: list[str], environment: dict[str, str], directory: int, log: int, prctl: Callable[..., int] | None
) -> tuple[int, int]:
    """Fork the kernel behind a gate: it becomes COMMAND only when one byte arrives, and ends if the gate closes.

    Returns its pid and the gate. So no line of the kernel runs before its start is on disk.
    """
    shim = os.getpid()
    behind, gate = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
        os.close(behind)
        return pid, gate
    code = 127
    try:
        signal.set_wakeup_fd(-1)
        for number in (*_OURS, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.close(gate)
        if prctl is None:
            os.setpgid(0, 0)
        else:
            prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != shim:
                os._exit(127)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.fchdir(directory)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
        if os.read(behind, 1) != b"g":
            os._exit(TOLD_TO)
        os.execvpe(command[0], command, environment)  # noqa: S606  (an argument list, no shell)
    except OSError as error:
        code = 126 if isinstance(error, PermissionError) else 127
        os.write(2, f"The kernel could not be started: {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(code)


def children() -> list[int]:
    """Our children, those that came home as orphans included."""
    me = str(os.getpid()).encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = stat_fields(int(name))
            if fields and fields[1] == me:
                found.append(int(name))
    return found


def end_family(kernel: int, subreaper: bool) -> bool:
    """KILL and reap every descendant left, whatever session it made. False where one would not die in time.

    Costs one system call when nobody is left. A killed child's own children come home and are killed in turn.
    """
    if not subreaper:
        with contextlib.suppress(OSError):
            os.killpg(kernel, signal.SIGKILL)
        return True
    until = time.monotonic() + SWEEP_SECONDS
    while time.monotonic() < until:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return True
        for pid in children():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return False


# --- one attempt ---------------------------------------------------------------------------------------------------


class Shim:
    """One attempt from the lock to the end record."""

    def __init__(self, directory: int, grace: float) -> None:
        self.directory = directory
        self.grace = grace
        self.told = False
        self.log = -1

    def run(self, command: list[str]) -> None:
        """Start the kernel, watch it, and record its end; the caller holds the lock."""
        if exists(self.directory, "started") or exists(self.directory, "exit"):
            tell({"status": "over"})
            return
        attempt = read_document(self.directory, "attempt.json") or {}
        reserve_exit(self.directory)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self.log = os.open("log", flags, 0o600, dir_fd=self.directory)
        if stop_asked(self.directory):
            record_exit(self.directory, ending(TOLD_TO, "cancelled"))
            tell({"status": "over"})
            return
        prctl = system_call()
        subreaper = prctl is not None and prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
        kills = oom_kills()
        wake = self._listen()
        environment = {**os.environ, "TUNESMITH_ATTEMPT": str(attempt.get("key", ""))}
        kernel, gate = start_kernel(command, environment, self.directory, self.log, prctl)
        begun = time.monotonic()
        write_document(
            self.directory,
            "started",
            {
                "boot_id": boot_id(),
                "shim_pid": os.getpid(),
                "shim_ticks": ticks(os.getpid()),
                "kernel_pid": kernel,
                "kernel_ticks": ticks(kernel),
                "time": moment(),
            },
        )
        # Whoever asks for the end writes `control` and then looks for `started`; we do it the other way round, so that
        # one of us sees the other.
        self.told = self.told or stop_asked(self.directory)
        if not self.told:
            with contextlib.suppress(BrokenPipeError):
                os.write(gate, b"g")
        os.close(gate)
        tell({"status": "started"})
        os.dup2(self.log, 1)
        os.dup2(self.log, 2)
        if not subreaper:
            self._note("this system has no subreaper: processes that the kernel leaves behind may live on")
        cap = attempt.get("seconds_cap")
        code, reason = self._watch(kernel, wake, begun + cap if isinstance(cap, (int, float)) else None)
        if not end_family(kernel, subreaper):
            self._note("some processes of this attempt could not be killed")
        with contextlib.suppress(OSError):
            cut_log(self.log)
            os.fsync(self.log)
            self._sync("events.jsonl")
        struck = oom_kills()
        record_exit(self.directory, ending(code, reason, (struck or 0) - (kills or 0)))

    def _listen(self) -> int:
        """Let signals wake the watch; TERM, INT and HUP ask for the end."""
        wake, write = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._tell_to_end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        return wake

    def _tell_to_end(self, *_: object) -> None:
        self.told = True

    def _watch(self, kernel: int, wake: int, deadline: float | None) -> tuple[int, str | None]:
        """Wait for the kernel: its exit code (-n for signal n) and why it was ended, if it was. Reaps orphans too.

        The deadline counts on the monotonic clock: a machine asleep does not use it up.
        """
        reason: str | None = None
        kill_at: float | None = None
        while True:
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    if ended[0] == kernel:
                        return os.waitstatus_to_exitcode(ended[1]), reason
            now = time.monotonic()
            if reason is None and (self.told or (deadline is not None and now >= deadline)):
                reason = "cancelled" if self.told else "deadline"
                kill_at = now + self.grace
                os.kill(kernel, signal.SIGTERM)
                os.kill(kernel, signal.SIGCONT)
            if kill_at is not None and now >= kill_at:
                os.kill(kernel, signal.SIGKILL)
            with contextlib.suppress(OSError):
                cut_log(self.log)
            if select.select([wake], [], [], TICK)[0]:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)

    def _note(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self.log, f"[tunesmith: {text}]\n".encode())

    def _sync(self, name: str) -> None:
        """Put what the kernel wrote on disk before its end is."""
        with contextlib.suppress(FileNotFoundError):
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.directory)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def ending(code: int, reason: str | None, kills: int = 0) -> dict[str, Any]:
    """The end record; `code` is -n for signal n. `oom_kills`: how often that killer struck anywhere meanwhile."""
    number = -code if code < 0 else None
    plain = code if number is None else 128 + number
    return {"code": plain, "signal": number, "time": moment(), "reason": reason, "oom_kills": kills}


def tell(document: dict[str, Any]) -> None:
    """Say to whoever submitted how the start went; they may be gone."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(document).encode() + b"\n")


def main(arguments: list[str]) -> int:
    """Parse the command line, take the lock, run. Exit code 0 unless the attempt could not be started."""
    split = arguments.index("--")
    folder, options, command = arguments[0], arguments[1:split], arguments[split + 1 :]
    given = dict(zip(options[::2], options[1::2], strict=True))
    os.umask(0o077)
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.chdir("/")  # whatever folder the daemon was started in is not kept busy
        if "--lock" in given:
            lock = int(given["--lock"])
            os.set_inheritable(lock, False)
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.open("lock", flags, 0o600, dir_fd=directory)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell({"status": "held"})
            return 0
        Shim(directory, float(given.get("--grace", 30.0))).run(command)
    except (OSError, ValueError) as error:
        tell({"error": str(error), "errno": getattr(error, "errno", None)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
