"""The log's lines: readable, one line each, and inert."""

from __future__ import annotations

import math

import pytest

from tunesmith.executors.kernel.spoken import line, speak
from tunesmith.orchestrator.events import Event, Kind


def event(kind: Kind, values: dict, step: int | None = None) -> Event:
    return Event(attempt=1, line=1, time="2026-11-22T13:05:01.123Z", kind=kind, values=values, step=step)


@pytest.mark.parametrize(
    ("kind", "values", "step", "text"),
    [
        (Kind.METRIC, {"train/loss": 1.23456, "train/epoch": 0.5}, 7, "step 7 train/loss 1.235 train/epoch 0.5"),
        (Kind.METRIC, {"eval/loss": math.nan}, 7, "step 7 eval/loss nan"),
        (Kind.LOG, {"level": "info", "message": "Training 5 parameters."}, None, "info: Training 5 parameters."),
        (Kind.STATE, {"state": "running", "error": None}, None, "running"),
        (
            Kind.STATE,
            {"state": "failed", "error": {"message": "No room.", "why": "Full."}},
            None,
            "failed No room. Full.",
        ),
        (Kind.CHECKPOINT, {"path": "checkpoints/step-00000010"}, 10, "checkpoint checkpoints/step-00000010"),
        (Kind.LOG, {"level": "info", "message": "a\nb\x1b[31m\u202ec"}, None, "info: a b [31m c"),
    ],
)
def test_an_event_is_one_plain_line(kind, values, step, text) -> None:
    assert line(event(kind, values, step)) == text


@pytest.mark.parametrize("kind", [Kind.PROGRESS, Kind.HEARTBEAT, Kind.SAMPLE])
def test_what_says_nothing_new_is_left_out(kind, capsys) -> None:
    speak(event(kind, {"done": 1}))
    assert capsys.readouterr().err == ""


def test_it_goes_to_the_log_with_its_time(capsys) -> None:
    speak(event(Kind.LOG, {"level": "info", "message": "hello"}))
    assert capsys.readouterr() == ("", "2026-11-22T13:05:01.123Z info: hello\n")
