"""Means that nobody waits for, and batches that are made a step ahead."""

import threading

import pytest
import torch

from tunesmith.executors.kernel.loops.ahead import Ahead
from tunesmith.executors.kernel.loops.batches import packed
from tunesmith.executors.kernel.loops.method import Meter

CPU = torch.device("cpu")


def test_a_meter_gives_weighted_means_and_forgets():
    meter = Meter("a", "b", "c")
    meter.add("a", torch.tensor(6.0), 2)
    meter.add("a", 3.0)
    meter.add("c", 5.0, 0)
    drained = meter.drain(CPU)
    assert drained.shape == (3, 2)
    assert meter.means(drained.flatten().tolist()) == {"a": 3.0}
    assert not meter.drain(CPU).any()


def test_a_meter_knows_its_names():
    with pytest.raises(KeyError):
        Meter("a").add("b", 1.0)
    assert Meter().drain(CPU).shape == (0, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to wait for")
def test_a_meter_waits_for_no_gpu():
    meter, total = Meter("a"), torch.tensor(6.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter.add("a", total, 2)
        meter.add("a", 3.0, torch.ones((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.means(meter.drain(CPU).flatten().tolist()) == {"a": 3.0}


def test_batches_come_in_order_and_a_step_ahead(make_rows):
    rows, made, threads = make_rows(8), [], set()
    caught_up = threading.Event()

    def make(step):
        made.append(step)
        threads.add(threading.current_thread().name)
        if step == 1:
            caught_up.set()
        return packed(rows[step : step + 2], 100)

    ahead = Ahead(make, pin=False)
    assert [batch.rows for batch in ahead.take(0)] == [batch.rows for batch in packed(rows[0:2], 100)]
    assert caught_up.wait(10)
    assert [batch.rows for batch in ahead.take(1)] == [batch.rows for batch in packed(rows[1:3], 100)]
    assert [batch.rows for batch in ahead.take(5)] == [batch.rows for batch in packed(rows[5:7], 100)]
    ahead.close()
    assert made[:2] == [0, 1]
    assert made.count(5) == 1
    assert any(name.startswith("batches") for name in threads)


def test_what_fails_ahead_is_raised_in_its_turn():
    def make(step):
        if step == 1:
            raise ValueError("step 1")
        return []

    ahead = Ahead(make, pin=False)
    assert ahead.take(0) == []
    with pytest.raises(ValueError, match="step 1"):
        ahead.take(1)
    ahead.close()
