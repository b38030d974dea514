"""Event lines: the append-only facts an attempt writes, one JSON object a line, the same on every backend.

Values by kind (fields may be added, never renamed):

    state       {"state": "starting|running|finishing|succeeded|failed|stopped", "error": ErrorDoc | null}
    metric      {"train/loss": 1.9, "train/num_tokens": 5120, ...}; `step` is the optimizer step
    log         {"level": "info|warning|error", "message": "..."}
    sample      {"prompt": ..., "completion": ..., "reference": ..., ...}
    alert       {"level": "info|warning|error", "code": "...", "message": "..."}
    checkpoint  {"path": "checkpoints/step-00000010", "bytes": 123, "sha256": "<of its manifest>"}
    artifact    {"kind": "adapter|model|metrics|eval", "path": "output/adapter", "bytes": 123, "sha256": "<manifest>"}
    progress    {"phase": "loading|tokenizing|preflight|training|evaluating|saving", "done": 3, "total": 20,
                 "unit": "steps", "eta_seconds": 41.0, "tokens_per_second": 210.0}
    heartbeat   {"rss_bytes": 123}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

MAX_LINE_BYTES = 256 * 1024


class Kind(StrEnum):
    """What an event line is about."""

    STATE = "state"
    METRIC = "metric"
    LOG = "log"
    SAMPLE = "sample"
    ALERT = "alert"
    CHECKPOINT = "checkpoint"
    ARTIFACT = "artifact"
    PROGRESS = "progress"
    HEARTBEAT = "heartbeat"


@dataclass(frozen=True, slots=True)
class Event:
    """One fact. `line` counts from 1 within an attempt; `time` is UTC, RFC 3339 with milliseconds."""

    attempt: int
    line: int
    time: str
    kind: Kind
    values: Mapping[str, Any]
    step: int | None = None


def now() -> str:
    """The present moment as event lines write it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as the strings "NaN", "Infinity" and "-Infinity", at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def number(value: Any) -> float | None:
    """The float that `finite` wrote, or None where the value is not a number."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value.replace("Infinity", "inf"))
    return None


def encode(event: Event) -> str:
    """One line of JSON, without its newline; lone surrogates are replaced, so that it is always valid UTF-8."""
    doc: dict[str, Any] = {
        "attempt": event.attempt,
        "line": event.line,
        "time": event.time,
        "kind": str(event.kind),
        "step": event.step,
        "values": finite(event.values),
    }
    text = json.dumps(doc, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")


def decode(line: str | bytes) -> Event | None:
    """The event in a line, or None where the line is torn, foreign or malformed: readers skip it and go on."""
    try:
        doc = json.loads(line)
        values = doc["values"]
        if not isinstance(values, dict):
            return None
        step = doc.get("step")
        return Event(
            attempt=int(doc["attempt"]),
            line=int(doc["line"]),
            time=str(doc["time"]),
            kind=Kind(doc["kind"]),
            values=values,
            step=None if step is None else int(step),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
