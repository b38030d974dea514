"""The reporter of the ranks that do not speak: rank 0 tells everything once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.events import Kind


class Silent(Reporter):
    """A reporter that opens no file, beats no heart and drops whatever it is told."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self.folder = folder
        self.attempt = attempt
        self.listeners = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def emit(self, kind: Kind, values: Mapping[str, Any], step: int | None = None) -> None:
        """Nothing is written, and nobody listens."""

    def progress(self, phase: str, done: int, total: int, **_: Any) -> None:
        """Nothing is written."""
