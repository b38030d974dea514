"""Batches made a step ahead, in pinned memory, while the device is busy with the present one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from tunesmith.executors.kernel.loops.batches import Batch


class Ahead:
    """Gives the batches of a step, and begins to make those of the next one.

    `make` must depend on the step alone. Any step may be asked for; one that was not foreseen is made on the spot.
    """

    def __init__(self, make: Callable[[int], list[Batch]], *, pin: bool) -> None:
        self._make = make
        self._pin = pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def take(self, step: int) -> list[Batch]:
        """The batches of `step`; whatever made them fail is raised here."""
        foreseen, self._next = self._next, None
        ready = foreseen[1].result() if foreseen is not None and foreseen[0] == step else self._made(step)
        self._next = (step + 1, self._thread.submit(self._made, step + 1))
        return ready

    def close(self) -> None:
        """End the thread; what it was making is thrown away."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _made(self, step: int) -> list[Batch]:
        batches = self._make(step)
        return [batch.pinned() for batch in batches] if self._pin else batches
