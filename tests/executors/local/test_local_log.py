"""The log: written by the kernel itself, and never larger than it may be."""

import os

import pytest

from tunesmith.executors.local import shim


def test_cutting_keeps_the_head_a_mark_and_the_latest_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(shim, "LOG_MOST", 1000)
    monkeypatch.setattr(shim, "LOG_HEAD", 500)
    monkeypatch.setattr(shim, "LOG_TAIL", 100)
    path = tmp_path / "log"
    log = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        os.write(log, b"a" * 1000)
        shim.cut_log(log)
        assert path.stat().st_size == 1000
        os.write(log, b"b" * 200)
        shim.cut_log(log)
        os.write(log, b"c")
    finally:
        os.close(log)
    text = path.read_text()
    assert text.startswith("a" * 500 + "\n[tunesmith: 600 bytes of log were cut here]\n")
    assert text.endswith("\n" + "b" * 100 + "c")


@pytest.mark.slow
def test_a_flood_leaves_the_first_and_the_last_lines_within_the_bound(yard):
    handle = yard.submit("flood 200 0.01")
    log = yard.folder() / "log"
    largest = 0
    while not (yard.folder() / "exit").exists():
        largest = max(largest, log.stat().st_size if log.exists() else 0)
    assert yard.end(handle).exit_code == 0
    assert log.stat().st_size <= shim.LOG_MOST
    content = log.read_bytes()
    assert content.startswith(b"the first line\n")
    assert content.endswith(b"the last line\n")
    assert content.count(b"bytes of log were cut here]\n") >= 1
    assert largest < 180 * 2**20  # it was cut while it grew
