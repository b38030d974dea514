"""Questions answered from recorded facts: the figures are right, and what is not recorded is said to be unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.orchestrator import answers

NOW = datetime(2026, 11, 22, 13, 45, tzinfo=UTC)


class Recorded:
    """Documents as the daemon gives them."""

    def __init__(self, *jobs: dict[str, Any], **series: list[list[Any]]) -> None:
        self._jobs = jobs
        self._series = {key.replace("__", "/"): value for key, value in series.items()}

    def show(self, job: str) -> Mapping[str, Any]:
        return next(item for item in self._jobs if item["id"] == job)

    def jobs(self, limit: int = 50) -> Sequence[Mapping[str, Any]]:
        return self._jobs[:limit]

    def series(self, job: str, keys: tuple[str, ...] = ()) -> Mapping[str, Sequence[Sequence[Any]]]:
        return {key: value for key, value in self._series.items() if not keys or key in keys}


def job(state: str = "running", **fields: Any) -> dict[str, Any]:
    return {
        "id": "j-abc234",
        "name": None,
        "state": state,
        "spec": {
            "model": {"id": "Qwen/Qwen3-0.6B"},
            "data": [{"source": "rows.jsonl"}],
            "method": "sft",
            "train": {"epochs": 3, "effective_batch": 16, "learning_rate": 2e-4},
        },
        "progress": {"step": 850, "total_steps": 1200, "eta_seconds": 1200.0, "tokens_per_second": 2100.0},
        "last": {"train/loss": 1.23, "train/learning_rate": 1.4e-5},
        "attempts": [{"number": 1, "state": "running", "started_at": "2026-11-22T13:00:00.000Z", "ended_at": None}],
        "cost": {"usd": 0.0, "source": "measured", "hours": 0.75},
        "questions": [],
        "findings": [],
        "artifacts": [],
        "error": None,
        **fields,
    }


FALLING = [[step, 2.41 - 1.18 * (step - 10) / 840, "t"] for step in range(10, 851, 10)]


def ask(question: str, *jobs: dict[str, Any], which: str | None = None, **series: list[list[Any]]) -> dict[str, Any]:
    return answers.ask(question, job=which, read=Recorded(*jobs, **series), now=NOW)


@pytest.mark.parametrize(
    "question",
    ["How's my training job doing?", "What's the status of my training job?", "how is it going", "is it done yet?"],
)
def test_status_says_state_step_loss_speed_and_time_left(question: str) -> None:
    said = ask(question, job(), train__loss=FALLING)
    for part in ("running after 45 min", "step 850 of 1,200 (71 %)", "1.23 at step 850, down from 2.41 at step 10"):
        assert part in said["answer"]
    assert "still falling" in said["answer"]
    assert "1.4e-05" in said["answer"]
    assert "2,100 tokens/s" in said["answer"]
    assert "20 min left" in said["answer"]
    assert said["job"] == "j-abc234"
    assert {"key": "train/loss", "value": 1.23, "step": 850} in [
        {**fact, "value": round(fact["value"], 6)} for fact in said["facts"] if fact["key"] == "train/loss"
    ]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("What is the loss now?", "The training loss is 1.23 at step 850"),
        ("is it converging?", "still falling"),
        ("what's the learning rate", "The learning rate is"),
        ("When will it finish?", "About 20 min left."),
        ("how long left?", "About 20 min left."),
        ("How fast is it?", "2,100 tokens/s"),
        ("which step is it on", "step 850 of 1,200"),
        ("why did it fail?", "has not failed: it is running"),
        ("what's the batch size?", "train.effective_batch is 16."),
        ("which model is that", "model.id is Qwen/Qwen3-0.6B."),
        ("which dataset is it trained on", "data is rows.jsonl."),
        ("what has it cost so far", "$0"),
        ("where is the adapter?", "no result yet"),
        ("is it overfitting?", "No evaluation loss is recorded yet."),
        ("what is queued?", "1 running (j-abc234), 0 queued, 0 waiting for you."),
        ("write me a poem about gradients", "I do not understand the question"),
    ],
)
def test_each_question_gets_its_own_answer(question: str, said: str) -> None:
    assert said in ask(question, job(), train__loss=FALLING)["answer"]


def test_two_questions_at_once_get_two_answers() -> None:
    said = ask(
        "What are the loss and the learning rate?", job(), train__loss=FALLING, train__learning_rate=[[850, 1e-5, "t"]]
    )
    assert "loss is 1.23" in said["answer"]
    assert "learning rate is 1e-05 at step 850" in said["answer"]


def test_a_failure_is_told_with_its_reason_and_way_out() -> None:
    error = {
        "code": "memory.cuda",
        "message": "The GPU ran out of memory.",
        "why": "It needs 31 GiB.",
        "fix": "Halve it.",
    }
    said = ask("Why did it fail?", job("failed", error=error))
    assert said["answer"] == "j-abc234 failed at step 850: The GPU ran out of memory. It needs 31 GiB. Halve it."
    assert {"key": "error.code", "value": "memory.cuda"} in said["facts"]
    assert "reason is not recorded" in ask("why did it crash", job("lost"))["answer"]


def test_a_job_that_waits_says_for_what() -> None:
    asked = job("awaiting_input", questions=[{"field": "model.id", "text": "Which model?"}], attempts=[], progress={})
    assert "Which model?" in ask("what do you need from me?", asked)["answer"]
    approval = job("awaiting_approval", attempts=[], progress={})
    assert "tunesmith approve j-abc234" in ask("how's it going?", approval)["answer"]


def test_a_loss_that_became_nan_is_said_so() -> None:
    points = [[1, 2.0, "t"], [2, 1.5, "t"], [3, "NaN", "t"], [4, "NaN", "t"]]
    said = ask("how is the loss?", job(), train__loss=points)["answer"]
    assert "1.5 at step 2" in said
    assert "not a number at 2 steps, first at step 3" in said
    assert "not a number at any" in ask("loss?", job(), train__loss=[[1, "NaN", "t"]])["answer"]


def test_the_job_is_the_one_named_then_the_one_under_way_then_the_newest() -> None:
    newest, running = job("failed") | {"id": "j-newest"}, job() | {"id": "j-runnin"}
    named = job("succeeded") | {"id": "j-234567", "name": "support-bot"}
    assert ask("status?", newest, running, named)["job"] == "j-runnin"
    assert ask("how did support-bot do?", newest, running, named)["job"] == "j-234567"
    assert ask("and j-newest?", newest, running, named)["job"] == "j-newest"
    assert ask("status?", newest, named)["job"] == "j-newest"
    assert ask("status?", newest, running, which="j-newest")["job"] == "j-newest"


def test_without_a_job_there_is_nothing_to_tell() -> None:
    assert ask("status?")["job"] is None
    assert "no job yet" in ask("status?")["answer"]


def test_hostile_names_and_errors_come_out_inert() -> None:
    hostile = job("failed", name="\x1b[31mx\u202e", error={"code": "x", "message": "\x1b]52;c;AAAA\x07 boom"})
    said = ask("why did it fail?", hostile)["answer"]
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "boom" in said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([3 - 0.02 * step for step in range(100)], "still falling"),
        ([1 + 0.02 * step for step in range(100)], "rising"),
        ([1 + 0.1 * (-1) ** step for step in range(100)], "flat"),
        ([3.0, 2.0, 1.0], ""),
    ],
)
def test_the_trend_is_where_the_series_goes_now(values: list[float], said: str) -> None:
    assert said in answers.trend(values)
    assert bool(answers.trend(values)) == bool(said)


@given(
    st.text(max_size=60),
    st.sampled_from(["planning", "running", "failed", "succeeded", "queued", "weird"]),
    st.lists(st.tuples(st.integers(0, 99), st.floats() | st.none() | st.text(max_size=3)), max_size=12),
)
def test_any_question_about_any_record_is_answered(question: str, state: str, points: list[Any]) -> None:
    bare = {"id": "j-abc234", "state": state, "progress": None, "last": None, "attempts": None, "spec": None}
    for record in (job(state), bare):
        said = answers.ask(
            question, job=None, read=Recorded(record, train__loss=[[*item, "t"] for item in points]), now=NOW
        )
        assert said["answer"]
        assert all(not (isinstance(fact["value"], float) and math.isnan(fact["value"])) for fact in said["facts"])
