"""One home, one local executor, and attempts whose kernel is tests/contracts/small_kernel.py."""

import sys
import time
from pathlib import Path

import pytest

from tunesmith.executors.local import procfs, shim
from tunesmith.executors.local.executor import LocalExecutor
from tunesmith.orchestrator.nouns import Attempt, DataSource, JobSpec, ModelRef
from tunesmith.orchestrator.states import ATTEMPT_ENDS

SMALL_KERNEL = Path(__file__).parents[2] / "contracts" / "small_kernel.py"


class Yard:
    """A home and what a daemon would do in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.executor = self.new()

    def new(self, **settings) -> LocalExecutor:
        command = [sys.executable, "-I", "-S", str(SMALL_KERNEL)]
        return LocalExecutor(self.home, **{"command": command, "grace_seconds": 0.5, **settings})

    def attempt(self, name: str = "ok", number: int = 1, job: str = "j-abc234", **more) -> Attempt:
        spec = JobSpec(name=name, model=ModelRef(id="none"), data=(DataSource(source="none.jsonl"),))
        return Attempt(job=job, number=number, spec=spec, plan_hash="none", **more)

    def submit(self, name: str = "ok", number: int = 1, **more):
        return self.executor.submit(self.attempt(name, number, **more))

    def folder(self, number: int = 1, job: str = "j-abc234") -> Path:
        return self.home / "jobs" / job / "attempts" / str(number)

    def end(self, handle, executor=None, seconds: float = 30.0):
        """The observation that tells the end."""
        executor, cursor, deadline = executor or self.executor, "", time.monotonic() + seconds
        while (seen := executor.observe(handle, cursor)).state not in ATTEMPT_ENDS:
            cursor = seen.cursor
            assert time.monotonic() < deadline, f"still {seen.state}"
            time.sleep(0.005)
        return seen

    def until(self, holds, seconds: float = 10.0):
        """The first true answer of `holds`."""
        deadline = time.monotonic() + seconds
        while not (answer := holds()):
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.005)
        return answer

    def family(self, count: int, number: int = 1) -> list[int]:
        """The pids that the kernel's relatives wrote down, once there are `count`."""
        file = self.folder(number) / "family"
        return self.until(
            lambda: file.exists() and (pids := list(map(int, file.read_text().split())))[count - 1 :] and pids
        )

    def starts(self, number: int = 1, job: str = "j-abc234") -> int:
        """How many kernels ever started."""
        file = self.folder(number, job) / "starts"
        return len(file.read_text().split()) if file.exists() else 0


def alive(pid: int) -> bool:
    """Whether a process runs; zombies, which PID 1 of a container may never reap, do not."""
    fields = shim.stat_fields(pid)
    return fields is not None and fields[0] not in (b"Z", b"X")


@pytest.fixture(name="alive")
def alive_function():
    return alive


@pytest.fixture
def yard(tmp_path):
    """A home, emptied of every process when the test ends."""
    yard = Yard(tmp_path / "home")
    yield yard
    left = procfs.sweep({"TUNESMITH_HOME": str(yard.home)})
    yard.until(lambda: not any(process.alive for process in left))
    yard.executor._reap()
