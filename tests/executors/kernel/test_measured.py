"""What a run says of itself at its end: memory, seconds and speed, added up from its own events."""

import time

import pytest

from tunesmith.executors.kernel import measured
from tunesmith.executors.kernel import run as runs
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.executors.kernel.stack import processor, stack
from tunesmith.orchestrator.events import Kind, decode


def events(folder, kind=None):
    found = [decode(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    return [event for event in found if event is not None and kind in (None, event.kind)]


@pytest.fixture
def told(tmp_path):
    """The summary of a run whose steps had these (step, tokens so far, tokens/s)."""

    def tell(*steps, about=None):
        listener = measured.Measured()
        with Reporter(tmp_path, 1) as reporter:
            reporter.listeners.append(listener)
            if about is not None:
                reporter.emit(Kind.LOG, {"level": "info", "message": "", **about})
            for step, tokens, rate in steps:
                reporter.metric({"train/loss": 1.0, "train/num_tokens": tokens, "train/tokens_per_second": rate}, step)
                reporter.metric({"eval/loss": 1.0}, step)
            listener.tell(reporter)
        found = [event for event in events(tmp_path, Kind.METRIC) if "time/tokens" in event.values]
        return found[0] if found else None

    return tell


def test_steps_add_up_and_the_first_is_not_the_pace(told) -> None:
    event = told((1, 100, 10.0), (2, 300, 100.0), (3, 400, 50.0))
    assert event.step == 3
    assert event.values["time/tokens"] == 400
    assert event.values["time/train_seconds"] == pytest.approx(14)
    assert event.values["time/first_step_seconds"] == pytest.approx(10)
    assert event.values["time/tokens_per_second"] == pytest.approx(75)
    assert 0 < event.values["time/total_seconds"] < 60


def test_a_single_step_is_its_own_pace(told) -> None:
    assert told((1, 100, 10.0)).values["time/tokens_per_second"] == pytest.approx(10)


def test_a_run_that_goes_on_counts_its_own_tokens_only(told) -> None:
    values = told((11, 5000, 10.0), (12, 5100, 50.0), (13, 5200, 50.0)).values
    assert values["time/tokens"] == 200
    assert values["time/train_seconds"] == pytest.approx(4)
    assert "time/first_step_seconds" not in values


def test_without_a_step_nothing_is_told(told) -> None:
    assert told() is None


def test_without_tokens_there_is_no_speed(told) -> None:
    values = told((1, 0, 0.0), (2, 0, 0.0)).values
    assert "time/tokens_per_second" not in values
    assert values["time/tokens"] == 0


def test_memory_is_the_peak_and_not_what_is_held_now() -> None:
    before = measured.resident_peak()
    block = bytearray(64 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    del block
    assert measured.resident_peak() > 10 * 2**20
    assert measured.resident_peak() >= before
    assert set(measured.memory("cpu")) == {"memory/peak_bytes"}


def test_a_stack_is_the_same_twice_and_names_its_versions() -> None:
    import torch
    import transformers

    found = stack("cpu", processor())
    assert found == stack("cpu", processor())
    assert (found["torch"], found["transformers"]) == (torch.__version__, transformers.__version__)
    assert found["device"].endswith(("core", "cores"))


def test_an_attempt_measures_itself(attempt, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    folder = attempt()
    assert runs.run(folder) == 0
    (event,) = [event for event in events(folder, Kind.METRIC) if "memory/peak_bytes" in event.values]
    trained = [event for event in events(folder, Kind.METRIC) if "train/num_tokens" in event.values]
    assert event.step == trained[-1].step
    assert event.values["time/tokens"] == trained[-1].values["train/num_tokens"]
    assert event.values["memory/peak_bytes"] > 50 * 2**20
    assert 0 < event.values["time/first_step_seconds"] <= event.values["time/train_seconds"]
    assert event.values["time/train_seconds"] < event.values["time/total_seconds"] < time.monotonic() - began
    first, last = (event.values for event in events(folder, Kind.LOG) if "stack" in event.values)
    assert first["stack"] == last["stack"] == stack("cpu", processor())
    assert first["family"] == last["family"] == "llama"
    assert "GiB were held" in last["message"]
    assert [event.kind for event in events(folder)][-3:] == [Kind.METRIC, Kind.LOG, Kind.STATE]


def test_a_stopped_attempt_measures_itself_and_so_does_the_one_that_goes_on(attempt, monkeypatch) -> None:
    from tunesmith.executors.kernel.loops.engine import Engine

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    first = attempt()
    step = Engine._step

    def told_to_stop(engine) -> None:
        if engine.cursor.step == 2:
            (first / "control").write_text('{"signal": "stop", "serial": 1}')
        step(engine)

    monkeypatch.setattr(Engine, "_step", told_to_stop)
    assert runs.run(first) == 75
    (half,) = [event for event in events(first, Kind.METRIC) if "time/tokens" in event.values]
    assert half.step == 3
    assert half.values["memory/peak_bytes"] > 0
    monkeypatch.setattr(Engine, "_step", step)
    second = attempt(number=2, resume_from="attempts/1/checkpoints/step-00000003")
    assert runs.run(second) == 0
    (rest,) = [event for event in events(second, Kind.METRIC) if "time/tokens" in event.values]
    assert rest.step == 6
    assert "time/first_step_seconds" not in rest.values
    told = [event for event in events(second, Kind.METRIC) if "train/num_tokens" in event.values]
    counted = {event.step: event.values["train/num_tokens"] for event in told}
    assert rest.values["time/tokens"] == counted[6] - counted[4]
