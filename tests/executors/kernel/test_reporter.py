"""Event lines: whole, numbered, and never lost to a torn end or a full disk."""

import json
import math
import os
import resource
import signal
import threading
import time

import pytest

from tunesmith.executors.kernel import reporter as reporters
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.events import MAX_LINE_BYTES, Kind, decode


def lines(folder):
    return [decode(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]


@pytest.fixture
def opened(tmp_path):
    made = []

    def make(attempt=1):
        made.append(Reporter(tmp_path, attempt))
        return made[-1]

    yield make
    for item in made:
        item.__exit__()


def test_lines_are_numbered_from_one(opened, tmp_path):
    reporter = opened(attempt=3)
    reporter.state("starting")
    reporter.metric({"train/loss": math.nan}, step=2)
    first, second = lines(tmp_path)
    assert (first.attempt, first.line, first.kind, first.values["state"]) == (3, 1, Kind.STATE, "starting")
    assert (second.line, second.step, second.values) == (2, 2, {"train/loss": "NaN"})
    json.loads((tmp_path / "events.jsonl").read_bytes().splitlines()[1])


def test_each_line_is_there_at_once(opened, tmp_path):
    reporter = opened()
    for number in range(1, 20):
        reporter.log(f"line {number}")
        assert len(lines(tmp_path)) == number


def test_numbers_go_on_behind_a_torn_line(opened, tmp_path):
    reporter = opened()
    for _ in range(3):
        reporter.log("whole")
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"attempt":1,"line":4,"time":"2026-01')
    again = opened()
    again.log("after")
    found = lines(tmp_path)
    assert [event and event.line for event in found] == [1, 2, 3, None, 4]
    assert found[-1].values["message"] == "after"


def test_numbers_go_on_where_lines_are_whole(opened, tmp_path):
    opened().log("one")
    opened().log("two")
    assert [event.line for event in lines(tmp_path)] == [1, 2]


def test_an_error_travels_whole(opened, tmp_path):
    opened().state("failed", InputError("No.", why="Because.", fix="Do.", code="data.x"))
    error = lines(tmp_path)[0].values["error"]
    assert (error["type"], error["code"], error["fix"]) == ("InputError", "data.x", "Do.")


def test_many_threads_write_whole_lines_in_order(opened, tmp_path):
    reporter = opened()
    threads = [threading.Thread(target=lambda: [reporter.log("x" * 500) for _ in range(100)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.line for event in lines(tmp_path)] == list(range(1, 801))


def test_progress_is_thinned_but_keeps_its_ends(opened, tmp_path):
    reporter = opened()
    for done in range(1001):
        reporter.progress("tokenizing", done, 1000, unit="rows")
    found = [event.values["done"] for event in lines(tmp_path)]
    assert found[0] == 0
    assert found[-1] == 1000
    assert len(found) < 100


def test_a_line_too_long_is_cut(opened, tmp_path):
    reporter = opened()
    reporter.emit(Kind.SAMPLE, {"prompt": "\u00e4" * MAX_LINE_BYTES, "completion": ["x"] * MAX_LINE_BYTES, "n": 3})
    raw = (tmp_path / "events.jsonl").read_bytes()
    assert len(raw) <= MAX_LINE_BYTES
    (event,) = lines(tmp_path)
    assert event.values["shortened"] is True
    assert event.values["prompt"].startswith("\u00e4\u00e4")
    assert event.values["n"] == 3


def test_hostile_text_stays_one_line(opened, tmp_path):
    opened().log('a\nb\r\u2028{"kind":"state"}\ud800\x00')
    raw = (tmp_path / "events.jsonl").read_bytes()
    assert raw.count(b"\n") == 1
    assert decode(raw.strip()).values["message"].startswith("a\nb")


def test_lines_wait_while_the_disk_is_full(opened, tmp_path):
    reporter = opened()
    reporter.log("before")
    size = (tmp_path / "events.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))  # ten bytes of the next line still fit
    try:
        for number in range(5):
            reporter.log(f"waiting {number}")
        assert (tmp_path / "events.jsonl").stat().st_size == size + 10
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    reporter.log("after")
    found = lines(tmp_path)
    assert [event.line for event in found] == list(range(1, 8))
    assert found[-1].values["message"] == "after"


def test_heart_and_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(reporters, "HEARTBEAT_SECONDS", 0.02)
    os.makedirs(tmp_path, exist_ok=True)
    with Reporter(tmp_path, 1):
        deadline = time.monotonic() + 20
        while len(lines(tmp_path)) < 3 and time.monotonic() < deadline:
            pass
    found = lines(tmp_path)
    assert len(found) >= 3
    assert all(event.kind is Kind.HEARTBEAT and event.values["rss_bytes"] > 1_000_000 for event in found)
    assert (tmp_path / "lease").exists()


def test_listeners_hear_what_was_written(opened):
    reporter = opened()
    heard = []
    reporter.listeners.append(heard.append)
    reporter.metric({"train/loss": 1.0}, 4)
    assert [(event.kind, event.step) for event in heard] == [(Kind.METRIC, 4)]


def test_nothing_is_written_after_the_end(tmp_path):
    reporter = Reporter(tmp_path, 1)
    with reporter:
        pass
    size = (tmp_path / "events.jsonl").stat().st_size
    reporter.log("late")
    assert (tmp_path / "events.jsonl").stat().st_size == size
