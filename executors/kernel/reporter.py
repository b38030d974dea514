"""The attempt's own voice: event lines appended to events.jsonl, a heartbeat, and the lease."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tunesmith.orchestrator.errors import TunesmithError
from tunesmith.orchestrator.events import MAX_LINE_BYTES, Event, Kind, decode, encode, now

HEARTBEAT_SECONDS = 5.0
PROGRESS_SECONDS = 0.5
TAIL_BYTES = 4 * MAX_LINE_BYTES
BACKLOG_BYTES = 4 * 1024 * 1024


class Reporter:
    """Appends events, each whole and flushed; safe to call from any thread.

    Line numbers go on where an earlier start in the same file ended, also behind a torn last line. While the disk is
    full, lines wait in memory (up to BACKLOG_BYTES) and are written when there is room again. `listeners` hear every
    event after it was written; they must not raise.
    """

    def __init__(self, folder: Path, attempt: int) -> None:
        self.folder = folder
        self.attempt = attempt
        self.listeners: list[Callable[[Event], None]] = []
        self._lock = threading.RLock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._progress_at = 0.0
        self._phase = ""
        self._backlog = bytearray()
        path = folder / "events.jsonl"
        self._line, torn = _last_line(path)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if torn:
            self._backlog += b"\n"

    def __enter__(self) -> Self:
        self._beat()
        self._thread = threading.Thread(target=self._beats, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=HEARTBEAT_SECONDS)
        with self._lock:
            self._drain()
            os.close(self._fd)
            self._fd = -1

    def emit(self, kind: Kind, values: Mapping[str, Any], step: int | None = None) -> None:
        """Append one event."""
        with self._lock:
            if self._fd < 0:
                return
            event = Event(self.attempt, self._line + 1, now(), kind, values, step)
            data = encode(event).encode() + b"\n"
            if len(data) > MAX_LINE_BYTES:
                event = Event(self.attempt, self._line + 1, event.time, kind, _shortened(values), step)
                data = encode(event).encode() + b"\n"
            if len(self._backlog) > BACKLOG_BYTES:
                return
            self._line += 1
            self._backlog += data
            self._drain()
            if kind is Kind.STATE:
                _flush(self._fd)
        for listener in self.listeners:
            listener(event)

    def state(self, name: str, error: TunesmithError | None = None) -> None:
        """Where the attempt stands; the last one carries the error it ended with."""
        self.emit(Kind.STATE, {"state": name, "error": None if error is None else error.to_doc()})

    def metric(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of an optimizer step."""
        self.emit(Kind.METRIC, values, step)

    def log(self, message: str, level: str = "info") -> None:
        """A line for people."""
        self.emit(Kind.LOG, {"level": level, "message": message})

    def alert(self, code: str, message: str, level: str = "warning", **more: Any) -> None:
        """Something a person should know of without having looked."""
        self.emit(Kind.ALERT, {"level": level, "code": code, "message": message, **more})

    def progress(
        self,
        phase: str,
        done: int,
        total: int,
        *,
        unit: str,
        eta_seconds: float | None = None,
        tokens_per_second: float | None = None,
        step: int | None = None,
    ) -> None:
        """How far a phase is; at most one line every half second, but for its first and its last."""
        at = time.monotonic()
        if phase == self._phase and done < total and at - self._progress_at < PROGRESS_SECONDS:
            return
        self._phase, self._progress_at = phase, at
        values = {
            "phase": phase,
            "done": done,
            "total": total,
            "unit": unit,
            "eta_seconds": None if eta_seconds is None else round(eta_seconds, 1),
            "tokens_per_second": None if tokens_per_second is None else round(tokens_per_second, 1),
        }
        self.emit(Kind.PROGRESS, values, step)

    def _beats(self) -> None:
        while not self._end.wait(HEARTBEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        try:
            (self.folder / "lease").touch()
        except OSError:
            pass
        self.emit(Kind.HEARTBEAT, {"rss_bytes": rss_bytes()})

    def _drain(self) -> None:
        # a short write leaves the rest in the backlog, so a line is never followed by another before it is whole
        while self._backlog:
            try:
                done = os.write(self._fd, self._backlog)
            except OSError:
                return
            del self._backlog[:done]


def rss_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import psutil

        return int(psutil.Process().memory_info().rss)


def _last_line(path: Path) -> tuple[int, bool]:
    """Number of the last whole event line (0 for none), and whether torn bytes follow it."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read()
    except FileNotFoundError:
        return 0, False
    events = [decode(line) for line in tail.split(b"\n")]
    last = max((event.line for event in events if event is not None), default=0)
    return last, bool(tail) and not tail.endswith(b"\n")


def _shortened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values cut so that they fit into a line: long texts lose their end, other large things become their size."""
    room = MAX_LINE_BYTES // (8 * max(1, len(values)))
    short: dict[str, Any] = {"shortened": True}
    for key, value in list(values.items())[:256]:
        if isinstance(value, (str, int, float)) or value is None:
            short[key[:200]] = value[:room] if isinstance(value, str) else value
        else:
            text = str(value)
            short[key[:200]] = value if len(text) <= room else text[:room]
    return short


def _flush(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError:
        pass
