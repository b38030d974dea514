"""What an attempt is told while it runs: a file it looks at once a step, and SIGTERM."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Control:
    """Orders from the `control` file and from SIGTERM, which means stop.

    The file holds `{"signal": "checkpoint" | "stop", "serial": n}`. A serial is obeyed once; a stop stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._serial = -1
        self._stop = False
        self._checkpoint = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While inside, SIGTERM and SIGINT are orders to stop. For the main thread."""
        before = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def stop(self) -> bool:
        """Whether the attempt shall end. Costs one failed open where there is no file."""
        self._look()
        return self._stop

    def checkpoint(self) -> bool:
        """Whether a checkpoint was asked for; each request is told once."""
        self._look()
        wanted, self._checkpoint = self._checkpoint, False
        return wanted

    def _look(self) -> None:
        try:
            doc = json.loads(self.path.read_bytes())
            serial, wanted = int(doc["serial"]), doc["signal"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return
        if serial > self._serial:
            self._serial = serial
            self._stop |= wanted == "stop"
            self._checkpoint |= wanted == "checkpoint"
