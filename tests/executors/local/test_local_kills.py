"""Whoever submits and observes is killed at random moments: nothing is lost, doubled or left behind."""

import os
import random
import signal
import time

import pytest

from tunesmith.executors.local import procfs
from tunesmith.orchestrator.states import ATTEMPT_ENDS, AttemptState

IN_FLIGHT = 8
PLAN = (("nap 0.15", AttemptState.SUCCEEDED), ("fail", AttemptState.FAILED), ("nap 0.3", AttemptState.SUCCEEDED))


def _daemon(yard, attempts):
    """Submit and follow all attempts, a few at a time, as a daemon does that remembers nothing."""
    executor, waiting, flying = yard.new(), list(attempts), []
    while waiting or flying:
        while waiting and len(flying) < IN_FLIGHT:
            flying.append((executor.submit(waiting.pop(0)), ""))
        looks = [(handle, executor.observe(handle, cursor)) for handle, cursor in flying]
        flying = [(handle, seen.cursor) for handle, seen in looks if seen.state not in ATTEMPT_ENDS]
        time.sleep(0.002)


def _kill_and_check(yard, alive, kills, count, seed):
    rng = random.Random(seed)
    attempts = [yard.attempt(PLAN[turn % len(PLAN)][0], turn + 1) for turn in range(count)]
    done = 0
    for turn in range(kills + 1):
        child = os.fork()
        if child == 0:
            try:
                _daemon(yard, attempts[done:])
            finally:
                os._exit(0)
        if turn == kills:
            assert os.waitpid(child, 0)[1] == 0
            break
        time.sleep(rng.uniform(0.03, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # Move on as the attempts do, so that the kills strike fresh starts to the last.
        done = max(done, min(turn * count // kills - IN_FLIGHT, count))
    for turn, attempt in enumerate(attempts):
        handle = yard.executor.submit(attempt)
        end = yard.end(handle)
        assert end.state is PLAN[turn % len(PLAN)][1], attempt.number
        assert yard.starts(attempt.number) == 1, attempt.number
        if end.state is AttemptState.SUCCEEDED:
            assert yard.executor.collect(handle)
        yard.until(lambda handle=handle: yard.executor.prove_dead(handle) == "yes")
        family = yard.folder(attempt.number) / "family"
        assert not family.exists() or not any(alive(int(pid)) for pid in family.read_text().split())
    assert procfs.carriers({"TUNESMITH_HOME": str(yard.home)}) == []


@pytest.mark.slow
def test_a_few_kills_of_the_submitter(yard, alive):
    _kill_and_check(yard, alive, kills=12, count=16, seed=1)


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_hundred_kills_of_the_submitter(yard, alive, seed):
    _kill_and_check(yard, alive, kills=200, count=240, seed=seed)


def test_while_nobody_watches_an_attempt_ends_and_is_told_in_full(yard):
    child = os.fork()
    if child == 0:
        yard.new().submit(yard.attempt("ok 500"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    yard.until(lambda: (yard.folder() / "exit").exists())
    handle = yard.submit("ok 500")
    events, cursor = [], ""
    while True:
        seen = yard.executor.observe(handle, cursor)
        events, cursor = [*events, *seen.events], seen.cursor
        if seen.state in ATTEMPT_ENDS:
            break
    assert seen.exit_code == 0
    assert [event.step for event in events if event.step] == list(range(1, 501))
