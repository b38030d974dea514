"""Ctrl-C while following: heard at once while waiting for news, and never in the middle of drawing.

An interrupt raised anywhere may be swallowed by a callback, or leave a lock of the drawing thread held for ever. Here
it is only raised where the next event is waited for; wherever it comes otherwise, it is remembered until then.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class CtrlC:
    """A context in which SIGINT is heard as described. Outside the main thread it changes nothing."""

    def __init__(self) -> None:
        self.heard = False
        self._waiting = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        if self._waiting:
            raise KeyboardInterrupt

    def each(self, items: Iterator[T]) -> Iterator[T]:
        """The same items. Raises KeyboardInterrupt between two of them, once it was heard."""
        while True:
            self._waiting = True
            try:
                if self.heard:
                    raise KeyboardInterrupt
                item = next(items)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield item
