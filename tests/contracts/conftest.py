"""The backends that must keep the contract. A backend joins by adding its factory to BACKENDS."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunesmith.orchestrator.nouns import Attempt, DataSource, JobSpec, ModelRef
from tunesmith.orchestrator.ports import Executor, Handle, Observation
from tunesmith.orchestrator.states import ATTEMPT_ENDS, attempt_may

SMALL_KERNEL = Path(__file__).with_name("small_kernel.py")
GRACE = 0.5


def local(home: Path) -> Executor:
    from tunesmith.executors.local.executor import LocalExecutor

    return LocalExecutor(home, command=[sys.executable, "-I", "-S", str(SMALL_KERNEL)], grace_seconds=GRACE)


BACKENDS: dict[str, Callable[[Path], Executor]] = {"local": local}


@dataclass
class Bench:
    """One backend and one home, with what a daemon would do around them."""

    backend: str
    home: Path

    def executor(self) -> Executor:
        """A new executor, as after a restart of the daemon."""
        return BACKENDS[self.backend](self.home)

    def attempt(self, name: str, number: int = 1, **more) -> Attempt:
        spec = JobSpec(name=name, model=ModelRef(id="none"), data=(DataSource(source="none.jsonl"),))
        return Attempt(job="j-abc234", number=number, spec=spec, plan_hash="none", **more)

    def follow(self, executor: Executor, handle: Handle, cursor: str = "", until=None, seconds: float = 30.0):
        """Observe until the attempt ends or `until(observation, events)` holds: every event seen, and the last look.

        Checks on the way what holds for every backend: states move only as the table says.
        """
        events, deadline, before = [], time.monotonic() + seconds, None
        while True:
            seen: Observation = executor.observe(handle, cursor)
            events += seen.events
            cursor = seen.cursor
            assert before in (None, seen.state) or attempt_may(before, seen.state), (before, seen.state)
            before = seen.state
            if seen.state in ATTEMPT_ENDS or (until is not None and until(seen, events)):
                return events, seen
            assert time.monotonic() < deadline, f"still {seen.state} with {len(events)} events"
            time.sleep(0.005)

    def poll(self, question, answer, seconds: float = 10.0) -> None:
        """Ask until the answer comes."""
        deadline = time.monotonic() + seconds
        while (got := question()) != answer:
            assert time.monotonic() < deadline, f"still {got!r}, not {answer!r}"
            time.sleep(0.005)


@pytest.fixture(params=sorted(BACKENDS))
def bench(request, tmp_path):
    bench = Bench(request.param, tmp_path / "home")
    yield bench
    for name in bench.home.glob("jobs/*/attempts/*/attempt.json"):
        document = json.loads(name.read_text())
        executor = bench.executor()
        handle = Handle(backend=executor.name, key=document["key"], job=document["job"], number=document["number"])
        executor.cancel(handle)
        bench.poll(lambda executor=executor, handle=handle: executor.prove_dead(handle), "yes")
