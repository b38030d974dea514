"""Trackio beside a run: local, quiet, and unable to harm it."""

import json
import sqlite3
import subprocess
import sys
import threading
import types

from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.executors.kernel.track import Track
from tunesmith.orchestrator.events import Event, Kind, decode, now

# Trackio reads its folder when it is imported: a process of its own, as every attempt is
PROGRAM = """
import sys
from pathlib import Path
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.executors.kernel.track import Track

folder = Path(sys.argv[1])
with Reporter(folder, 1) as reporter:
    track = Track(folder, "j-aaaaaa", {"name": "x", "train": {"seed": 1}}, lambda text: reporter.log(text, "warning"))
    reporter.listeners.append(track)
    for step in range(int(sys.argv[2]), int(sys.argv[3])):
        reporter.metric({"train/loss": 1 / (step + 1)}, step)
    reporter.metric({"eval/loss": float("nan")}, step)
    reporter.progress("training", 1, 2, unit="steps")
    track.close()
"""


def track(folder, first, last):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(first), str(last)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )


def stored(folder):
    with sqlite3.connect(folder / "trackio" / "tunesmith.db") as connection:
        rows = connection.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
    connection.close()
    return rows


def test_metrics_are_stored_by_their_step_and_nothing_is_printed(tmp_path):
    done = track(tmp_path, 0, 5)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    rows = stored(tmp_path)
    assert {name for name, *_ in rows} == {"j-aaaaaa"}
    losses = {step: json.loads(doc).get("train/loss") for *_, step, doc in rows if b"train/loss" in doc}
    assert losses == {step: 1 / (step + 1) for step in range(5)}
    assert not any(b"progress" in doc or b"rss" in doc for *_, doc in rows)
    assert (tmp_path / "trackio").stat().st_mode & 0o077 == 0


def test_what_others_print_is_never_dropped(tmp_path, capsys, monkeypatch):
    """While Trackio runs, and even while it starts and ends: only what it prints itself is."""
    met = threading.Barrier(2, timeout=60)

    class Run:
        def log(self, values, step):
            met.wait()
            met.wait()

        def finish(self):
            print("a banner")

    def init(**_):
        print("a token")
        met.wait()
        met.wait()
        return Run()

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init))
    monkeypatch.setenv("TRACKIO_DIR", "")
    stdout = sys.stdout
    track = Track(tmp_path, "j-aaaaaa", {}, print)
    track(Event(attempt=1, line=1, time=now(), kind=Kind.METRIC, values={"loss": 1.0}, step=1))
    for words in ("while it starts", "while it runs"):
        met.wait()
        print(words)
        met.wait()
    track.close()
    assert capsys.readouterr().out == "while it starts\nwhile it runs\n"
    assert sys.stdout is stdout


def test_a_later_attempt_goes_on_in_the_same_run(tmp_path):
    track(tmp_path, 0, 3)
    track(tmp_path, 3, 6)
    rows = stored(tmp_path)
    assert len({run for _, run, *_ in rows}) == 1
    assert {step for *_, step, _ in rows} == set(range(6))


def test_a_broken_trackio_warns_once_and_harms_nothing(tmp_path):
    (tmp_path / "trackio").write_text("in the way")
    with Reporter(tmp_path, 1) as reporter:
        track = Track(tmp_path, "j-aaaaaa", {}, lambda text: reporter.log(text, "warning"))
        reporter.listeners.append(track)
        for step in range(20):
            reporter.metric({"train/loss": 1.0}, step)
        track.close()
    events = [decode(line) for line in (tmp_path / "events.jsonl").read_bytes().splitlines()]
    warnings = [event for event in events if event.kind is Kind.LOG]
    assert len(warnings) == 1
    assert "Trackio is off" in warnings[0].values["message"]
    assert sum(event.kind is Kind.METRIC for event in events) == 20


def test_without_metrics_trackio_is_never_loaded(tmp_path):
    track = Track(tmp_path, "j-aaaaaa", {}, print)
    track.close()
    assert not (tmp_path / "trackio").exists()
