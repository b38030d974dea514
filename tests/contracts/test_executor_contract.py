"""What every executor must keep, asked through the port alone. A real process plays the kernel (small_kernel.py)."""

import multiprocessing

import pytest

from tunesmith.orchestrator.errors import Conflict, InputError, NotReady, StorageError
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.ports import Executor
from tunesmith.orchestrator.states import AttemptState


def starts(events) -> int:
    return sum(event.kind is Kind.LOG and event.values["message"].startswith("start ") for event in events)


def running(seen, events) -> bool:
    return seen.state is AttemptState.RUNNING


def test_it_is_an_executor(bench):
    executor = bench.executor()
    assert isinstance(executor, Executor)
    assert executor.name == bench.backend


def test_devices_are_described(bench):
    for device in bench.executor().devices():
        assert device.backend == bench.backend
        assert device.memory_bytes > 0
        assert device.count >= 1
        assert device.peak_flops > 0
        assert device.bandwidth > 0


def test_a_good_attempt_succeeds_with_every_event_once_and_in_order(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("ok 200"))
    events, end = bench.follow(executor, handle)
    assert end.state is AttemptState.SUCCEEDED
    assert end.exit_code == 0
    assert end.error is None
    assert [event.line for event in events] == list(range(1, len(events) + 1))
    assert [event.step for event in events if event.kind is Kind.METRIC] == list(range(1, 201))
    assert starts(events) == 1


def test_the_end_can_be_read_again_and_from_the_beginning(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("ok"))
    events, end = bench.follow(executor, handle)
    again = executor.observe(handle, end.cursor)
    assert (again.state, again.events, again.exit_code) == (end.state, (), 0)
    afresh, last = bench.follow(bench.executor(), handle)
    assert afresh == events
    assert last.state is end.state


def test_an_end_is_never_told_before_its_last_event(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("ok 60000"))  # several times what one look reads
    bench.poll(lambda: executor.prove_dead(handle), "yes", seconds=30)
    looks, cursor, events = 0, "", []
    while True:
        seen = executor.observe(handle, cursor)
        looks, cursor, events = looks + 1, seen.cursor, [*events, *seen.events]
        if seen.state is AttemptState.SUCCEEDED:
            break
        assert seen.exit_code is None
    assert looks > 1
    assert len(events) == 60005


def test_another_executor_takes_over_in_the_middle(bench):
    first = bench.executor()
    handle = first.submit(bench.attempt("wait"))
    events, seen = bench.follow(first, handle, until=running)
    del first
    second = bench.executor()
    assert second.submit(bench.attempt("wait")) == handle
    second.signal(handle, "stop")
    more, end = bench.follow(second, handle, cursor=seen.cursor)
    assert end.state is AttemptState.CANCELLED
    assert starts([*events, *more]) == 1
    assert [event.line for event in [*events, *more]] == list(range(1, len(events) + len(more) + 1))


def _submit(bench, gate, answers):
    gate.wait()
    answers.put(bench.executor().submit(bench.attempt("wait")))


def test_eight_processes_that_submit_at_once_start_one_kernel(bench):
    context = multiprocessing.get_context("fork")
    gate, answers = context.Barrier(8), context.Queue()
    others = [context.Process(target=_submit, args=(bench, gate, answers)) for _ in range(8)]
    for other in others:
        other.start()
    handles = [answers.get(timeout=30) for _ in others]
    for other in others:
        other.join(30)
        other.close()
    assert handles == [handles[0]] * 8
    executor = bench.executor()
    bench.follow(executor, handles[0], until=running)
    executor.signal(handles[0], "stop")
    events, end = bench.follow(executor, handles[0])
    assert end.exit_code == 75
    assert starts(events) == 1


def test_a_repeated_submit_after_the_end_starts_nothing(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("ok"))
    bench.follow(executor, handle)
    assert executor.submit(bench.attempt("ok")) == handle
    events, end = bench.follow(executor, handle)
    assert end.state is AttemptState.SUCCEEDED
    assert starts(events) == 1


def test_another_spec_under_the_same_number_is_a_conflict(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("wait"))
    with pytest.raises(Conflict):
        executor.submit(bench.attempt("ok"))
    assert executor.prove_dead(handle) == "no"


def test_a_failure_tells_the_kernels_own_error(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("fail"))
    _, end = bench.follow(executor, handle)
    assert (end.state, end.exit_code) == (AttemptState.FAILED, 2)
    assert end.error["code"] == "data.row"
    assert bench.executor().observe(handle, end.cursor).error == end.error


@pytest.mark.parametrize("behaviour, code", [("die 9", 137), ("die 11", 139), ("exit_with 3", 3)])
def test_a_kernel_that_falls_silent_gets_an_error_from_its_exit(bench, behaviour, code):
    executor = bench.executor()
    _, end = bench.follow(executor, executor.submit(bench.attempt(behaviour)))
    assert (end.state, end.exit_code) == (AttemptState.FAILED, code)
    assert end.error["code"]
    assert end.error["message"]
    assert end.error["fix"]


def test_a_checkpoint_is_asked_for_and_the_attempt_goes_on(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("wait"))

    def saved(count):
        return lambda seen, events: sum(event.kind is Kind.CHECKPOINT for event in events) == count

    executor.signal(handle, "checkpoint")
    _, seen = bench.follow(executor, handle, until=saved(1))
    executor.signal(handle, "checkpoint")
    _, seen = bench.follow(executor, handle, cursor=seen.cursor, until=saved(1))
    assert seen.state is AttemptState.RUNNING


def test_a_stop_ends_it_at_a_checkpoint(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("wait"))
    executor.signal(handle, "stop")
    executor.signal(handle, "checkpoint")  # does not take the stop back
    _, end = bench.follow(executor, handle)
    assert (end.state, end.exit_code) == (AttemptState.CANCELLED, 75)


def test_cancel_ends_it_and_death_can_be_proven(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("wait"))
    bench.follow(executor, handle, until=running)
    assert executor.prove_dead(handle) == "no"
    executor.cancel(handle)
    executor.cancel(handle)
    _, end = bench.follow(executor, handle)
    assert (end.state, end.exit_code) == (AttemptState.CANCELLED, 75)
    bench.poll(lambda: executor.prove_dead(handle), "yes")
    executor.cancel(handle)
    executor.signal(handle, "stop")
    assert executor.observe(handle, end.cursor).state is AttemptState.CANCELLED


def test_cancel_ends_what_will_not_listen(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("tree"))
    bench.follow(executor, handle, until=lambda seen, events: len(events) == 4)  # its second "running": all are there
    executor.cancel(handle)
    _, end = bench.follow(executor, handle)
    assert (end.state, end.exit_code) == (AttemptState.CANCELLED, 137)
    bench.poll(lambda: executor.prove_dead(handle), "yes")


def test_results_come_home_verified(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("ok"))
    bench.follow(executor, handle)
    artifacts = {artifact.kind: artifact for artifact in executor.collect(handle)}
    assert artifacts.keys() == {"adapter", "eval"}
    assert all(artifact.bytes > 0 and len(artifact.sha256) == 64 for artifact in artifacts.values())
    assert executor.collect(handle) == bench.executor().collect(handle)


def test_there_are_no_results_before_the_end_nor_of_a_failure(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("wait"))
    with pytest.raises(NotReady):
        executor.collect(handle)
    failed = executor.submit(bench.attempt("fail", number=2))
    bench.follow(executor, failed)
    with pytest.raises(StorageError):
        executor.collect(failed)


def test_time_is_up(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("deaf", seconds_cap=0.3))
    _, end = bench.follow(executor, handle)
    assert (end.state, end.exit_code) == (AttemptState.FAILED, 137)
    assert end.error["code"] == "attempt.deadline"


def test_a_foreign_cursor_is_refused(bench):
    executor = bench.executor()
    handle = executor.submit(bench.attempt("ok"))
    with pytest.raises(InputError):
        executor.observe(handle, "yesterday")
