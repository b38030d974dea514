"""Trackio, fed from the events: local, private, without telemetry, in a thread of its own.

It may be missing, slow or broken: training never waits for it and never fails by it. One warning says so.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.orchestrator.events import Event, Kind

PROJECT = "tunesmith"
CLOSE_SECONDS = 10.0


class Track:
    """A listener of the reporter's. One Trackio run per job, named by its id; a later attempt appends to it."""

    def __init__(self, home: Path, job: str, config: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self._folder = home / "trackio"
        self._job = job
        self._config = dict(config)
        self._warn = warn
        self._queue: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="trackio", daemon=True)
        self._started = False

    def __call__(self, event: Event) -> None:
        """Pass a metric on. Returns at once."""
        if event.kind is not Kind.METRIC or event.step is None:
            return
        if not self._started:
            self._started = True
            self._thread.start()
        self._queue.put((dict(event.values), event.step))

    def close(self) -> None:
        """Let the thread write what is waiting, for CLOSE_SECONDS at most."""
        if self._started:
            self._queue.put(None)
            self._thread.join(timeout=CLOSE_SECONDS)

    def _work(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.environ["TRACKIO_DIR"] = str(self._folder)
            os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
            with _quiet():
                import trackio

                run = trackio.init(
                    project=PROJECT,
                    name=self._job,
                    config=self._config,
                    resume="allow",
                    space_id=None,
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
            while (item := self._queue.get()) is not None:
                run.log(item[0], step=item[1])
            with _quiet():
                run.finish()
        except Exception as error:
            self._warn(f"Trackio is off for this run: {type(error).__name__}: {str(error)[:200]}")
            while self._queue.get() is not None:
                pass


class _Others:
    """A stream for every thread but the one that makes it, whose words are dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._dropped = threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() != self._dropped:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what this thread prints: Trackio's banners, with a token in the dashboard's address."""
    with contextlib.redirect_stdout(_Others(sys.stdout)):
        yield
