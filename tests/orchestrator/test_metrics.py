from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.events import Event, Kind, encode
from tunesmith.orchestrator.metrics import Metrics
from tunesmith.orchestrator.states import JobState
from tunesmith.orchestrator.stream import page

JOB = "j-abcdef"


def event(
    line: int, values: dict[str, Any], *, attempt: int = 1, step: int | None = None, kind: Kind = Kind.METRIC
) -> Event:
    return Event(
        attempt=attempt, line=line, time=f"2026-01-01T00:00:{line:02d}.000Z", kind=kind, values=values, step=step
    )


@pytest.fixture
def metrics(tmp_path: Path):
    made = Metrics(tmp_path / "metrics.db")
    yield made
    made.close()


# --- lines and series ----------------------------------------------------------------------------------------------


def test_a_line_is_stored_once(metrics: Metrics) -> None:
    lines = [event(line, {"train/loss": float(line)}, step=line) for line in (1, 2, 3)]
    metrics.ingest(JOB, 1, lines, "30")
    metrics.ingest(JOB, 1, [event(2, {"train/loss": 99.0}, step=2), event(4, {"train/loss": 4.0}, step=4)], "40")
    assert [row["line"] for row in metrics.lines(JOB)] == [1, 2, 3, 4]
    assert [point[:2] for point in metrics.series(JOB, ["train/loss"])["train/loss"]] == [
        [1, 1.0],
        [2, 2.0],
        [3, 3.0],
        [4, 4.0],
    ]
    assert metrics.cursor(JOB, 1) == "40"
    assert metrics.position(JOB) == (1, 4)


def test_lines_of_another_attempt_are_passed_over(metrics: Metrics) -> None:
    metrics.ingest(JOB, 1, [event(1, {"a": 1.0}, step=1, attempt=2)])
    assert metrics.lines(JOB) == []


def test_the_newest_attempt_wins_for_each_step(metrics: Metrics) -> None:
    metrics.ingest(JOB, 1, [event(step, {"train/loss": 1.0}, step=step) for step in (1, 2, 3, 4)])
    metrics.ingest(JOB, 2, [event(step, {"train/loss": 2.0}, step=step + 2, attempt=2) for step in (1, 2, 3)])
    values = {step: value for step, value, _ in metrics.series(JOB, ["train/loss"])["train/loss"]}
    assert values == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0}
    first = {step: value for step, value, _ in metrics.series(JOB, ["train/loss"], attempt=1)["train/loss"]}
    assert first == {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}


def test_what_is_no_number_has_a_name_or_no_point(metrics: Metrics) -> None:
    values = {"a": float("nan"), "b": float("inf"), "c": "text", "d": True, "e": None, "f": 3}
    metrics.ingest(JOB, 1, [event(1, values, step=1)])
    series = metrics.series(JOB)
    assert {key: points[0][1] for key, points in series.items()} == {"a": "NaN", "b": "Infinity", "f": 3}
    assert metrics.latest([JOB])[JOB]["last"] == {"a": "NaN", "b": "Infinity", "f": 3}


def test_hostile_keys_are_only_text(metrics: Metrics) -> None:
    keys = ["'; DROP TABLE points; --", "\ud800", "\x00", "k" * 10000, "%"]
    metrics.ingest(JOB, 1, [event(1, dict.fromkeys(keys, 1.0), step=1)])
    assert len(metrics.series(JOB)) == len(keys)
    assert metrics.series(JOB, [keys[0]])[keys[0]][0][:2] == [1, 1.0]
    assert metrics.series(JOB, ["%"])["%"][0][1] == 1.0


def test_latest_follows_progress_and_attempts(metrics: Metrics) -> None:
    done = {"phase": "training", "done": 3, "total": 9, "unit": "steps", "eta_seconds": 4.5, "tokens_per_second": 7.0}
    metrics.ingest(JOB, 1, [event(1, done, step=3, kind=Kind.PROGRESS), event(2, {"train/loss": 1.5}, step=4)])
    rows = {"phase": "tokenizing", "done": 500, "total": 1000, "unit": "rows"}
    latest = metrics.latest([JOB, "j-other2"])
    assert latest[JOB]["progress"]["step"] == 4
    assert latest[JOB]["progress"]["total_steps"] == 9
    assert latest[JOB]["progress"]["eta_seconds"] == 4.5
    assert latest["j-other2"]["last"] == {}
    metrics.ingest(JOB, 2, [event(1, rows, attempt=2, kind=Kind.PROGRESS)])
    latest = metrics.latest([JOB])
    assert (latest[JOB]["progress"]["step"], latest[JOB]["progress"]["phase"]) == (None, "tokenizing")
    assert latest[JOB]["last"] == {"train/loss": 1.5}


def test_alerts_are_the_newest_in_order(metrics: Metrics) -> None:
    alerts = [event(n, {"level": "warning", "code": "x", "message": str(n)}, kind=Kind.ALERT) for n in range(1, 71)]
    metrics.ingest(JOB, 1, alerts)
    found = metrics.alerts(JOB)
    assert [item["message"] for item in found] == [str(n) for n in range(21, 71)]


# --- the file ------------------------------------------------------------------------------------------------------


def write_events(jobs: Path, job: str, attempt: int, lines: list[str]) -> None:
    folder = jobs / job / "attempts" / str(attempt)
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))


def whole(metrics: Metrics, job: str) -> Any:
    docs = [(row["attempt"], row["line"], row["doc"]) for row in metrics.lines(job, limit=10**6)]
    return docs, metrics.series(job), metrics.latest([job])


def test_rebuilt_from_the_event_files(tmp_path: Path) -> None:
    random.seed(7)
    metrics = Metrics(tmp_path / "metrics.db")
    for job in ("j-aaaaaa", "j-bbbbbb"):
        for attempt in (1, 2, 10):
            events = [event(n, {"train/loss": random.random()}, step=n, attempt=attempt) for n in range(1, 60)]
            metrics.ingest(job, attempt, events)
            torn = ['{"attempt": 1, "li', "\x00\x00", "x" * 400_000]
            write_events(tmp_path / "jobs", job, attempt, [*torn, *map(encode, events), *torn])
    before = [whole(metrics, job) for job in ("j-aaaaaa", "j-bbbbbb")]
    metrics.close()
    (tmp_path / "metrics.db").unlink()
    metrics = Metrics(tmp_path / "metrics.db")
    assert metrics.incomplete
    metrics.rebuild(tmp_path / "jobs")
    assert not metrics.incomplete
    assert [whole(metrics, job) for job in ("j-aaaaaa", "j-bbbbbb")] == before
    metrics.rebuild(tmp_path / "jobs")
    assert [whole(metrics, job) for job in ("j-aaaaaa", "j-bbbbbb")] == before
    metrics.close()


@pytest.mark.parametrize("damage", ["header", "middle", "version"])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.db"
    metrics = Metrics(path)
    events = [event(n, {"train/loss": 1.0, "text": "x" * 500}, step=n) for n in range(1, 400)]
    metrics.ingest(JOB, 1, events)
    write_events(tmp_path / "jobs", JOB, 1, [encode(item) for item in events])
    if damage == "version":
        metrics._db.execute("PRAGMA user_version = 77")
    metrics.close()
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[:64] = b"\xff" * 64
    elif damage == "middle":
        data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    metrics = Metrics(path)
    try:
        metrics.series(JOB)
        metrics.ingest(JOB, 1, [event(1000, {"a": 1.0}, step=1000)])
        assert metrics.incomplete
        metrics.rebuild(tmp_path / "jobs")
        assert len(metrics.lines(JOB)) == 400
        assert path.with_name("metrics.db.damaged").exists()
    finally:
        metrics.close()


# --- merged with state events ---------------------------------------------------------------------------------------


def texts(found: Any) -> list[str]:
    docs = [json.loads(text) for _, text in found.items]
    return [str(doc["values"].get("state") or doc["line"]) for doc in docs]


def test_state_events_and_lines_in_the_order_of_arrival(core) -> None:
    job = core.queued()
    with core.store.transaction():
        core.store.move(job, JobState.RUNNING)
    core.metrics.ingest(job, 1, [event(n, {"a": 1.0}, step=n) for n in (1, 2)])
    with core.store.transaction():
        core.store.move(job, JobState.QUEUED)
    core.metrics.ingest(job, 1, [event(3, {"a": 1.0}, step=3)])
    with core.store.transaction():
        core.store.move(job, JobState.CANCELLED)
    found = texts(page(core.store, core.metrics, job))
    start = found.index("running")
    assert found[start:] == ["running", "1", "2", "queued", "3", "cancelled"]


def test_any_page_size_gives_the_same_events(core) -> None:
    job = core.queued()
    rng = random.Random(3)
    line = 0
    for _ in range(40):
        if rng.random() < 0.5:
            with core.store.transaction():
                core.store.record(job, {"state": f"s{line}"})
        else:
            count = rng.randint(1, 4)
            core.metrics.ingest(job, 1, [event(line + n, {"a": 1.0}, step=1) for n in range(1, count + 1)])
            line += count
    expected = texts(page(core.store, core.metrics, job, limit=10**6))
    for limit in (1, 2, 3, 7, 50):
        cursor, found = "", []
        while (part := page(core.store, core.metrics, job, cursor, limit)).items:
            assert len(part.items) <= limit
            assert part.items[-1][0] == part.cursor
            found += texts(part)
            cursor = part.cursor
        assert found == expected


def test_cursors_survive_a_rebuild(core) -> None:
    job = core.queued()
    events = [event(n, {"a": float(n)}, step=n) for n in range(1, 11)]
    core.metrics.ingest(job, 1, events)
    write_events(core.home.jobs, job, 1, [encode(item) for item in events])
    half = page(core.store, core.metrics, job, limit=8)
    rest = texts(page(core.store, core.metrics, job, half.cursor))
    core.metrics.close()
    core.home.metrics_db.unlink()
    core.metrics = Metrics(core.home.metrics_db)
    core.metrics.rebuild(core.home.jobs)
    assert texts(page(core.store, core.metrics, job, half.cursor)) == rest
    assert len(half.items) + len(rest) == len(core.store.events(job)) + 10


@pytest.mark.parametrize("cursor", ["x", "1", "1.2", "-1.0.0", "1.2.3.4", "9" * 99 + ".0.0", "1.2.\u0663"])
def test_a_foreign_cursor_is_refused(core, cursor: str) -> None:
    with pytest.raises(InputError) as caught:
        page(core.store, core.metrics, core.create(), cursor)
    assert caught.value.code == "cursor.unknown"


def test_ended_is_told_with_the_last_empty_page(core) -> None:
    job = core.create()
    with core.store.transaction():
        core.store.move(job, JobState.CANCELLED)
    first = page(core.store, core.metrics, job)
    assert (len(first.items), first.ended) == (2, False)
    assert page(core.store, core.metrics, job, first.cursor).ended
