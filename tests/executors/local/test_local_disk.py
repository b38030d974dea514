"""A full disk: new work is refused with the reason, and what runs still ends, with its end recorded."""

import errno
import os
import signal
import subprocess

import pytest

from tunesmith.executors.local import procfs
from tunesmith.orchestrator.errors import StorageError
from tunesmith.orchestrator.states import AttemptState


@pytest.fixture
def small_disk(yard, tmp_path):
    """The yard's home on a file system of 3 MiB; `yard.fill()` and `yard.free()` take and give its room."""
    yard.home.mkdir(mode=0o700)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "none", yard.home], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.strip()}")
    ballast = yard.home / "ballast"

    def fill():
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    yard.fill, yard.free = fill, ballast.unlink
    yield yard
    left = procfs.sweep({"TUNESMITH_HOME": str(yard.home)})
    yard.until(lambda: not any(process.alive for process in left))
    subprocess.run(["umount", "-l", yard.home], check=True)


def test_new_work_is_refused_and_taken_once_there_is_room(small_disk):
    small_disk.fill()
    with pytest.raises(StorageError) as caught:
        small_disk.submit("ok")
    assert caught.value.code == "storage.full"
    small_disk.free()
    assert small_disk.end(small_disk.submit("ok")).state is AttemptState.SUCCEEDED
    assert small_disk.starts() == 1


def test_a_shim_that_finds_no_room_starts_nothing_and_says_why(small_disk, monkeypatch):
    spawn = os.posix_spawn

    def fill_and_spawn(*arguments, **more):
        small_disk.fill()
        return spawn(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_spawn", fill_and_spawn)
        with pytest.raises(StorageError) as caught:
            small_disk.submit("ok")
    assert caught.value.code == "storage.full"
    small_disk.free()
    assert small_disk.starts() == 0
    assert small_disk.end(small_disk.submit("ok")).state is AttemptState.SUCCEEDED
    assert small_disk.starts() == 1


def test_an_end_is_recorded_on_a_full_disk(small_disk):
    handle = small_disk.submit("deaf")
    small_disk.until(lambda: small_disk.executor.observe(handle, "").state is AttemptState.RUNNING)
    small_disk.fill()
    for process in procfs.carriers({"TUNESMITH_ATTEMPT": handle.key}):
        process.send(signal.SIGKILL)
    end = small_disk.end(handle)
    assert (end.state, end.exit_code) == (AttemptState.FAILED, 137)


def test_a_full_disk_keeps_nothing_from_being_cancelled(small_disk):
    handle = small_disk.submit("tree")
    small_disk.family(2)
    small_disk.fill()
    with pytest.raises(StorageError):
        small_disk.executor.signal(handle, "stop")
    small_disk.executor.cancel(handle)
    end = small_disk.end(handle)
    assert (end.state, end.exit_code) == (AttemptState.CANCELLED, 137)
    small_disk.until(lambda: small_disk.executor.prove_dead(handle) == "yes")
