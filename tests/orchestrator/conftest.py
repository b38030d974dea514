"""What the tests of the core share: plans made by hand, a home, a daemon process, and the place of its driver."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tunesmith.orchestrator import processes
from tunesmith.orchestrator.errors import from_doc
from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.leases import Leases
from tunesmith.orchestrator.metrics import Metrics
from tunesmith.orchestrator.nouns import (
    Attempt,
    DataReport,
    DataSource,
    Finding,
    JobSpec,
    Limits,
    ModelRef,
    Plan,
    Question,
    Request,
    Stage,
    plan_hash,
)
from tunesmith.orchestrator.store import Store

SMALL_KERNEL = Path(__file__).parents[1] / "contracts" / "small_kernel.py"


def poll(look: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What `look` returns once it is true."""
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, "it did not come to pass in time"
        time.sleep(0.02)
    return found


def make_spec(**changes: Any) -> JobSpec:
    spec = JobSpec(model=ModelRef(id="tiny"), data=(DataSource(source="rows.jsonl"),))
    train = {key: changes.pop(key) for key in ("max_steps", "learning_rate") if key in changes}
    hours = changes.pop("hours", None)
    limits = replace(spec.limits, hours=hours) if hours is not None else Limits()
    return replace(spec, train=replace(spec.train, **train), limits=limits, **changes)


def make_plan(
    *, errors: tuple[Finding, ...] = (), questions: tuple[Question, ...] = (), stages: int = 1, **changes: Any
) -> Plan:
    spec = make_spec(**changes)
    data = DataReport(rows=4, used_rows=4, eval_rows=0, format="text", mapping=None, fingerprint="sha256:0")
    stage = Stage(spec=spec, resolved=(), data=data, size=None, time=None)
    return Plan(
        plan_hash=plan_hash([spec], fingerprints=["sha256:0"], model_commits=[None]),
        intent="train",
        command=("tunesmith", "run"),
        stages=(stage,) * stages,
        questions=questions,
        findings=errors,
    )


def make_attempt(job: str, plan: Plan, number: int = 1, **changes: Any) -> Attempt:
    return Attempt(job=job, number=number, spec=plan.stages[0].spec, plan_hash=plan.plan_hash, **changes)


class Core:
    """A store with everything beside it, in this process, and the shortest way to a queued job."""

    make_plan = staticmethod(make_plan)
    make_attempt = staticmethod(make_attempt)

    def __init__(self, home: Home) -> None:
        self.home = home
        self.metrics = Metrics(home.metrics_db)
        self.store = Store(home.state_db, position=self.metrics.position)
        self.leases = Leases(self.store, home)
        self.me = str(processes.identity(os.getpid()))

    def close(self) -> None:
        self.store.close()
        self.metrics.close()

    def create(self, yes: dict[str, Any] | None = None, **sets: Any) -> str:
        return self.store.create(Request(text="SFT tiny on rows.jsonl", sets=sets), yes)

    def lease(self) -> tuple[str, int]:
        leased = self.leases.lease(self.me)
        assert leased is not None
        return leased

    def queued(self, plan: Plan | None = None) -> str:
        """A job with a queued attempt, as a driver makes one."""
        plan = plan or make_plan()
        created = self.create({"by": "test"})
        job, fence = self.lease()
        assert job == created
        self.leases.save_plan(job, fence, plan)
        self.leases.submit(job, fence, make_attempt(job, plan))
        self.leases.release(job, fence)
        return job


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").make()


@pytest.fixture
def core(home: Home) -> Iterator[Core]:
    made = Core(home)
    yield made
    made.close()


class Daemon:
    """A real daemon process with a backend `toy`: the local executor and its shim around a small kernel.

    What a job does is told by its name (see small_kernel.py): "ok 3", "nap 0.5", "wait 60", "deaf", "fail", "die".
    """

    make_plan = staticmethod(make_plan)
    poll = staticmethod(poll)

    def __init__(self, home: Home, site: Path) -> None:
        self.home = home
        self.site = site
        self.process: subprocess.Popen[bytes] | None = None
        site.mkdir()
        (site / "toy_backend.py").write_text(
            "import sys\n"
            "from tunesmith.executors.local.executor import LocalExecutor\n"
            "def make(home):\n"
            f"    command = [sys.executable, '-I', '-S', {str(SMALL_KERNEL)!r}]\n"
            "    return LocalExecutor(home, command=command, grace_seconds=1.0)\n"
            "class Costly(LocalExecutor):\n"
            "    def devices(self):\n"
            "        from dataclasses import replace\n"
            "        return [replace(item, usd_per_hour=2.0) for item in super().devices()]\n"
        )
        info = site / "toy_backend-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backend\nVersion: 1\n")
        (info / "entry_points.txt").write_text(
            "[tunesmith.executors]\ntoy = toy_backend:make\ncostly = toy_backend:Costly\nbroken = no_such_module:make\n"
        )

    def start(self) -> Daemon:
        command = [sys.executable, "-P", "-m", "tunesmith.orchestrator.daemon", "run", "--home", str(self.home.path)]
        environment = {**os.environ, "PYTHONPATH": str(self.site)}
        with self.home.path.parent.joinpath("daemon.out").open("ab") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        poll(self.answers)
        return self

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.said()
        with socket.socket(socket.AF_UNIX) as probe:  # httpcore leaves its socket open where nobody listens
            try:
                probe.connect(self.home.address)
            except OSError:
                return False
        return bool(self.get("/health")["pid"] == self.process.pid)

    def said(self) -> str:
        return self.home.path.parent.joinpath("daemon.out").read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(20)

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=self.home.address)
        return httpx.Client(transport=transport, base_url="http://localhost", timeout=30.0)

    def get(self, path: str, **query: Any) -> Any:
        with self.client() as client:
            return read(client.get(path, params=query))

    def post(self, path: str, body: Any = None, **headers: str) -> Any:
        with self.client() as client:
            return read(client.post(path, json={} if body is None else body, headers=headers))

    def drive(self) -> None:
        """Do what a driver does, once for each job that needs it, until none does: a short graph without LangGraph."""
        from tunesmith.orchestrator.remote import Line, RemoteLeases

        with contextlib.closing(Line(self.home, patience_seconds=2.0)) as line:
            leases = RemoteLeases(line)
            while (leased := leases.next(0)) is not None:
                job, port = leased
                step(port, job)
                leases.release(job)


def read(response: httpx.Response) -> Any:
    doc = response.json()
    if response.is_success:
        return doc
    raise from_doc(doc["error"])


def step(port: Any, job: str) -> None:
    """One turn of a job: plan from its request's sets, submit, diagnose, collect, finish."""
    from tunesmith.orchestrator.states import ATTEMPT_ENDS, JOB_ENDS, AttemptState, JobState

    view = port.view(job)
    last = view.attempts[-1] if view.attempts else None
    if last is not None and last.state not in ATTEMPT_ENDS:
        return
    if view.state is JobState.PLANNING:
        sets = {key.removeprefix("train."): value for key, value in view.request.sets.items()}
        sets["hours"] = sets.pop("limits.hours", None)
        port.save_plan(job, make_plan(**{"backend": "toy", **sets}))
        view = port.view(job)
    if last is not None and view.state in (JobState.QUEUED, JobState.RUNNING, JobState.DELIVERING):
        if last.cause is None:
            port.diagnose(job, last.number, "test", (), ())
        if last.state is AttemptState.SUCCEEDED:
            deliver(port, job)
        else:
            port.finish(job, JobState(str(last.state)), last.error)
        return
    if view.approval is not None and (view.state is JobState.QUEUED or view.wanted == "retry"):
        number = last.number + 1 if last else 1
        resume = last.checkpoint if last else None
        port.submit(job, make_attempt(job, view.plan, number, resume_from=resume))
        return
    assert view.state in (*JOB_ENDS, JobState.AWAITING_APPROVAL)


def deliver(port: Any, job: str) -> None:
    from tunesmith.orchestrator.errors import StorageError
    from tunesmith.orchestrator.states import JobState

    try:
        port.collect(job)
        port.finish(job, JobState.SUCCEEDED)
    except StorageError as error:
        port.finish(job, JobState.FAILED, error.to_doc())


@pytest.fixture
def driver_place(home: Home) -> Iterator[None]:
    """Hold driver.lock, so that the daemon leaves driving to the test."""
    descriptor = os.open(home.driver_lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


@pytest.fixture
def daemon(home: Home, driver_place: None, tmp_path: Path) -> Iterator[Daemon]:
    with _serving(home, tmp_path / "site") as made:
        yield made


@pytest.fixture
def serving() -> Any:
    """A daemon that starts its own driver, as a context manager: serving(home, site)."""
    return _serving


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for a module's tests that store nothing."""
    place = tmp_path_factory.mktemp("idle")
    with _serving(Home(place / "home").make(), place / "site") as made:
        yield made


@contextlib.contextmanager
def _serving(home: Home, site: Path) -> Iterator[Daemon]:
    """A daemon; afterwards neither it nor anything that it started is left."""
    made = Daemon(home, site)
    try:
        yield made.start()
    finally:
        if made.process is not None and made.process.poll() is None:
            made.end(signal.SIGTERM)
        for started in home.jobs.glob("*/attempts/*/started"):
            found = json.loads(started.read_text())
            if (processes.identity(found["shim_pid"]) or "").endswith(f":{found['shim_ticks']}"):
                os.kill(found["shim_pid"], signal.SIGKILL)
