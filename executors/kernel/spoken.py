"""What an attempt writes to its log: one readable line for each event that a person would follow."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from tunesmith.orchestrator.events import Event, Kind, number


def speak(event: Event) -> None:
    """Print an event to the log, which is stderr. A full disk never stops a job here."""
    text = line(event)
    if text is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"{event.time} {text}", file=sys.stderr, flush=True)


def line(event: Event) -> str | None:
    """An event in one line of printable text, or None for those that say nothing new: progress, heartbeats, samples."""
    values = event.values
    if event.kind is Kind.METRIC:
        text = f"step {event.step}  " + "  ".join(_figures(values))
    elif event.kind is Kind.STATE:
        error = values.get("error") or {}
        text = f"{values.get('state')}  {error.get('message', '')} {error.get('why', '')}"
    elif event.kind in (Kind.LOG, Kind.ALERT):
        text = f"{values.get('level')}: {values.get('message')}"
    elif event.kind in (Kind.CHECKPOINT, Kind.ARTIFACT):
        text = f"{event.kind} {values.get('path')}"
    else:
        return None
    shown = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(shown.split())[:2000]


def _figures(values: Mapping[str, Any]) -> list[str]:
    found = [(name, number(value)) for name, value in values.items()]
    return [f"{name} {value:.4g}" for name, value in found if value is not None]
