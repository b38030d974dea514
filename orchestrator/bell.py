"""Wakes what waits in the event loop when something changed, from any thread. Ringing costs microseconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator


class Bell:
    """Listeners by topic: a job's id, or "" for any change. After `close` everyone is woken, and nobody waits again."""

    def __init__(self) -> None:
        self.closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: dict[str, set[asyncio.Event]] = {}

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say in which loop the listeners live, from within it."""
        self._loop = loop

    def ring(self, topics: Iterable[str]) -> None:
        """Wake the listeners of these topics and those of ""."""
        loop = self._loop
        if loop is None or self.closed:
            return
        with contextlib.suppress(RuntimeError):  # the loop has just been closed
            loop.call_soon_threadsafe(self._wake, (*topics, ""))

    def close(self) -> None:
        """Wake everyone for good; from within the loop."""
        self.closed = True
        self._wake(tuple(self._listeners))

    @contextlib.contextmanager
    def listen(self, topic: str) -> Iterator[asyncio.Event]:
        """An event that is set from now on whenever the topic rings; clear it before looking, wait after."""
        event = asyncio.Event()
        self._listeners.setdefault(topic, set()).add(event)
        try:
            yield event
        finally:
            mine = self._listeners[topic]
            mine.discard(event)
            if not mine:
                del self._listeners[topic]

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Wait until the event is set, at most so long."""
        if not self.closed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), seconds)

    def _wake(self, topics: tuple[str, ...]) -> None:
        for topic in topics:
            for event in self._listeners.get(topic, ()):
                event.set()
