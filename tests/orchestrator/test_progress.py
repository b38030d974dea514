"""Events folded into what a follower knows."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.orchestrator.progress import Progress

STREAM: list[dict[str, Any]] = [
    {"seq": 1, "kind": "state", "values": {"state": "queued"}},
    {"seq": 2, "kind": "state", "values": {"state": "running"}},
    {"attempt": 1, "line": 1, "kind": "state", "values": {"state": "starting"}},
    {
        "attempt": 1,
        "line": 2,
        "kind": "progress",
        "values": {"phase": "tokenizing", "done": 50, "total": 200, "unit": "rows"},
    },
    {
        "attempt": 1,
        "line": 3,
        "kind": "progress",
        "values": {
            "phase": "training",
            "done": 1,
            "total": 20,
            "unit": "steps",
            "eta_seconds": 40.0,
            "tokens_per_second": 210,
        },
    },
    {"attempt": 1, "line": 4, "kind": "metric", "step": 1, "values": {"train/loss": 2.5, "train/learning_rate": 1e-4}},
    {"attempt": 1, "line": 5, "kind": "metric", "step": 2, "values": {"train/loss": "NaN"}},
    {"attempt": 1, "line": 6, "kind": "checkpoint", "values": {"path": "checkpoints/step-00000002"}},
    {"attempt": 1, "line": 7, "kind": "alert", "values": {"level": "warning", "message": "loss is not a number"}},
]


def test_a_stream_is_folded() -> None:
    progress = Progress()
    for event in STREAM[:4]:
        progress.apply(event)
    assert (progress.state, progress.phase, progress.share, progress.step) == ("running", "tokenizing", 0.25, None)
    for event in STREAM[4:]:
        progress.apply(event)
    assert (progress.step, progress.total, progress.first_loss) == (2, 20, 2.5)
    assert progress.tokens_per_second == 210.0
    assert progress.checkpoint == "checkpoints/step-00000002"
    assert progress.alerts == ["loss is not a number"]
    assert progress.loss is not None
    assert progress.loss != progress.loss


def test_a_new_attempt_begins_its_own_count() -> None:
    progress = Progress()
    for event in STREAM:
        progress.apply(event)
    progress.apply({"attempt": 2, "line": 1, "kind": "state", "values": {"state": "starting"}})
    assert (progress.attempt, progress.phase, progress.eta_seconds) == (2, "", None)
    assert progress.last["train/learning_rate"] == 1e-4


@given(
    st.dictionaries(
        st.sampled_from(["attempt", "kind", "step", "values", "line"]), st.one_of(st.integers(), st.text(), st.none())
    ),
    st.dictionaries(
        st.sampled_from(["state", "done", "total", "phase", "train/loss", "tokens_per_second", "eta_seconds"]),
        st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(), st.none(), st.booleans()),
    ),
    st.sampled_from(["state", "metric", "progress", "checkpoint", "alert", "log", "edit", "?"]),
)
def test_foreign_events_change_nothing_for_the_worse(event: dict[str, Any], values: dict[str, Any], kind: str) -> None:
    progress = Progress()
    progress.apply(event)
    progress.apply({"attempt": 1, "kind": kind, "step": 3, "values": values})
    assert progress.share is None or 0 <= progress.share <= 1
