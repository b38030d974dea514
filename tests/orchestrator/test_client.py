"""The client against a real daemon: typed errors, idempotent writes, and a daemon that is killed under it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith.orchestrator import commands
from tunesmith.orchestrator.client import Client, ensure_daemon, running
from tunesmith.orchestrator.errors import InputError, NoDaemon, NotReady, StorageError, from_doc
from tunesmith.orchestrator.home import Home


def until(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come true in time")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    made = Home(tmp_path_factory.mktemp("client") / "home")
    ensure_daemon(made)
    yield made
    commands.daemon_stop(made)


@pytest.fixture
def client(home: Home) -> Iterator[Client]:
    ensure_daemon(home)
    with Client(home) as made:
        yield made


def request(**fields: Any) -> dict[str, Any]:
    return {"text": None, "spec": {"model": {"id": "no/such"}, "data": [{"source": "no.jsonl"}]}, "cwd": "/", **fields}


def test_health_names_the_home(home: Home, client: Client) -> None:
    health = client.health()
    assert health["home"] == str(home.path)
    assert health["pid"] == int(home.daemon_lock.read_text().split()[0])


def test_a_job_goes_in_and_comes_out(client: Client) -> None:
    job = client.submit(request(quick=True))["id"]
    shown = client.show(job)
    assert shown["id"] == job
    assert shown["request"]["quick"] is True
    assert job in [row["id"] for row in client.jobs()["jobs"]]
    assert client.show(job[:6])["id"] == job
    assert set(client.queue()) >= {"running", "queued"}
    assert [doc["name"] for doc in client.backends()["backends"]][:1] == ["local"]
    assert client.metrics(job)["series"] == {}
    assert client.logs(job)["text"] == ""


def test_a_write_repeated_under_its_key_is_done_once(client: Client) -> None:
    first = client.submit(request(), key="once-and-only-once")
    assert client.submit(request(), key="once-and-only-once") == first
    assert client.submit(request())["id"] != first["id"]


def test_errors_come_back_as_they_were_raised(client: Client) -> None:
    with pytest.raises(InputError) as caught:
        client.show("j-zzzzzz")
    assert caught.value.code == "job.unknown"
    with pytest.raises(InputError) as caught:
        client.submit({"text": ""})
    assert caught.value.exit_code == 2
    with pytest.raises(InputError) as caught:
        client.submit(request(spec={"model": "x", "data": "y", "train": {"epoch": 1}}))
    assert "train.epochs" in caught.value.message
    job = client.submit(request())["id"]
    client.cancel(job)
    until(lambda: client.show(job)["state"] in ("cancelled", "failed"))
    with pytest.raises(NotReady):
        client.approve(job, by="me")


@pytest.mark.parametrize("ref", ["", " ", ".", "..", "x" * 500])
def test_what_cannot_be_a_job_is_refused_here(client: Client, ref: str) -> None:
    with pytest.raises(InputError) as caught:
        client.show(ref)
    assert caught.value.code == "job.unknown"


@pytest.mark.parametrize("ref", ["../../etc/passwd", "a/b", "a?b=c#d", "%00", "\udc80", "last job", "\u202e"])
def test_hostile_references_find_nothing(client: Client, ref: str) -> None:
    with pytest.raises(InputError):
        client.show(ref)


def watched(home: Home, job: str, seen: list[dict[str, Any]], **options: Any) -> threading.Thread:
    """A thread that follows a job with a client of its own."""

    def follow() -> None:
        with Client(home) as client:
            for event in commands.watch(client, job, **options):
                seen.append(event)

    thread = threading.Thread(target=follow)
    thread.start()
    return thread


def test_events_wait_for_the_first(client: Client) -> None:
    job = client.submit(request())["id"]
    seen: list[dict[str, Any]] = []
    reader = watched(client.home, job, seen)
    client.cancel(job)
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert seen[-1]["values"]["state"] in ("cancelled", "failed")
    assert [event["seq"] for event in seen] == sorted({event["seq"] for event in seen})


def test_without_a_daemon_every_call_says_so(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert running(home) is None
    for made in (home, Home(tmp_path / "home").make()):
        with Client(made) as client, pytest.raises(NoDaemon) as caught:
            client.jobs()
        assert "tunesmith daemon start" in caught.value.fix
        assert caught.value.exit_code == 5
    # A socket that nobody listens on any more: what a killed daemon leaves.
    program = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({str(home.socket)!r})"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert running(home) is None


def test_a_home_that_cannot_be_used_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        ensure_daemon(Home(tmp_path / "file"))


@pytest.mark.slow
def test_many_starters_share_one_daemon(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    program = (
        "from pathlib import Path; from tunesmith.orchestrator.client import ensure_daemon;"
        "from tunesmith.orchestrator.home import Home;"
        f"print(ensure_daemon(Home(Path({str(home.path)!r})))['pid'])"
    )
    starters = [
        subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(5)
    ]
    pids = {starter.communicate(timeout=90)[0].strip() for starter in starters}
    try:
        assert [starter.returncode for starter in starters] == [0] * 5
        assert len(pids) == 1
        health = running(home)
        assert health is not None
        assert pids == {str(health["pid"])}
    finally:
        commands.daemon_stop(home)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*<socket.socket:pytest.PytestUnraisableExceptionWarning")
def test_a_watch_outlives_a_killed_daemon_and_misses_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    pid = ensure_daemon(home)["pid"]
    said: list[str] = []
    seen: list[dict[str, Any]] = []
    try:
        with Client(home) as client:
            job = client.submit(request(text="status of nothing in particular", spec=None))["id"]
            first = client.events(job)["events"]
            reader = watched(home, job, seen, restart=True, notice=said.append)
            until(lambda: len(seen) >= len(first))
            os.kill(pid, signal.SIGKILL)
            until(lambda: (running(home) or {}).get("pid") not in (None, pid))
            client.cancel(job)
            reader.join(timeout=60)
            assert not reader.is_alive()
            every = client.events(job)["events"]
        assert seen == every
        assert any("went away" in text for text in said)
    finally:
        commands.daemon_stop(home)
        gc.collect()  # httpcore leaves the socket of a refused connection to the collector: here, not in another test


@pytest.mark.slow
def test_a_daemon_that_cannot_start_says_what_its_log_says(tmp_path: Path) -> None:
    home = Home(tmp_path / "home").make()
    home.state_db.mkdir()
    with pytest.raises(NoDaemon) as caught:
        ensure_daemon(home, seconds=20)
    assert caught.value.code == "daemon.start"
    assert caught.value.why
    assert "Traceback" not in caught.value.why


def test_an_unknown_error_document_is_still_an_error() -> None:
    assert from_doc({"type": "FromTheFuture", "message": "odd"}).exit_code == 1
