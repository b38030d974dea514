"""The records as documents, for those who may read but never touch the store."""

from __future__ import annotations

from typing import Any

from tunesmith.orchestrator import show
from tunesmith.orchestrator.metrics import Metrics
from tunesmith.orchestrator.store import Store

Doc = dict[str, Any]


class Reading:
    """What orchestrator/answers.py looks at."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics

    def show(self, job: str) -> Doc:
        """The `show` document of a job."""
        return show.show(self._store, self._metrics, job)

    def jobs(self, limit: int = 50) -> list[Doc]:
        """Summaries, newest first."""
        rows, _ = self._store.page(limit=limit)
        return show.summaries(self._store, self._metrics, rows)

    def series(self, job: str, keys: tuple[str, ...] = ()) -> dict[str, list[list[Any]]]:
        """{key: [[step, value, time], ...]} of the keys asked for."""
        return self._metrics.series(job, keys)
