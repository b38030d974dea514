"""Ctrl-C is heard once, between two events, whatever was going on when it came."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tunesmith.orchestrator.ctrlc import CtrlC


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_while_drawing_it_waits_for_the_next_event() -> None:
    drawn = []

    def draw(item: int) -> None:
        press()
        drawn.append(item)

    with CtrlC() as ctrl_c, pytest.raises(KeyboardInterrupt):
        list(map(draw, ctrl_c.each(iter([1, 2, 3]))))
    assert drawn == [1]


def test_while_waiting_it_breaks_the_wait() -> None:
    def items():
        yield 1
        press()
        threading.Event().wait(60)
        yield 2

    with CtrlC() as ctrl_c, pytest.raises(KeyboardInterrupt):
        assert list(ctrl_c.each(items())) == [1]


def test_one_that_was_swallowed_is_remembered() -> None:
    def items():
        while True:
            try:
                press()
            except KeyboardInterrupt:
                yield "swallowed"

    with CtrlC() as ctrl_c, pytest.raises(KeyboardInterrupt):
        list(ctrl_c.each(items()))


def test_without_it_everything_passes_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with CtrlC() as ctrl_c:
        assert list(ctrl_c.each(iter("abc"))) == ["a", "b", "c"]
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_it_changes_nothing() -> None:
    seen = []

    def work() -> None:
        with CtrlC() as ctrl_c:
            seen.extend(ctrl_c.each(iter([1, 2])))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1, 2]
