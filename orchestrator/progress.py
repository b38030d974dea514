"""What a follower knows of a job, folded from its events one by one: the same for the command line and for screens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.orchestrator.events import number


@dataclass(slots=True)
class Progress:
    """A job as its events tell it. `apply` is cheap (no I/O, no copies) and ignores what it does not know."""

    state: str = "planning"
    attempt: int | None = None
    phase: str = ""
    step: int | None = None
    total: int | None = None
    done: float | None = None
    of: float | None = None
    unit: str = ""
    eta_seconds: float | None = None
    tokens_per_second: float | None = None
    first_loss: float | None = None
    last: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    alerts: list[str] = field(default_factory=list)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the daemon's stream: a state of the job, or a line of an attempt."""
        values = event.get("values")
        if not isinstance(values, Mapping):
            return
        attempt = event.get("attempt")
        if isinstance(attempt, int) and attempt != self.attempt:
            self._begin(attempt)
        kind = event.get("kind")
        if kind == "state" and attempt is None:
            self.state = str(values.get("state", self.state))
        elif kind == "metric":
            self._metric(event.get("step"), values)
        elif kind == "progress":
            self._progress(values)
        elif kind == "checkpoint":
            self.checkpoint = str(values.get("path", ""))
        elif kind == "alert":
            self.alerts.append(str(values.get("message", "")))

    def _begin(self, attempt: int) -> None:
        """A new attempt starts its own count; what was measured before stays until it is measured again."""
        self.attempt = attempt
        self.phase, self.done, self.of = "", None, None
        self.eta_seconds = self.tokens_per_second = None

    def _metric(self, step: Any, values: Mapping[str, Any]) -> None:
        self.last.update(values)
        if isinstance(step, int):
            self.step = step
        loss = number(values.get("train/loss"))
        if loss is not None and self.first_loss is None:
            self.first_loss = loss

    def _progress(self, values: Mapping[str, Any]) -> None:
        self.phase = str(values.get("phase", self.phase))
        self.done, self.of = number(values.get("done")), number(values.get("total"))
        self.unit = str(values.get("unit", ""))
        self.eta_seconds = number(values.get("eta_seconds"))
        self.tokens_per_second = number(values.get("tokens_per_second")) or self.tokens_per_second
        if self.phase == "training" and self.unit in ("steps", ""):
            self.step = int(self.done) if self.done is not None else self.step
            self.total = int(self.of) if self.of is not None else self.total

    @property
    def loss(self) -> float | None:
        """The last training loss."""
        return number(self.last.get("train/loss"))

    @property
    def share(self) -> float | None:
        """How much of the present phase is done, 0 to 1, or None where that is not known."""
        if not self.of or self.done is None:
            return None
        return min(max(self.done / self.of, 0.0), 1.0)
