"""Ending an attempt: cancelled, lost, out of time, with its whole family and never with a stranger."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tunesmith.executors.local import procfs, shim
from tunesmith.executors.local.folder import Folder
from tunesmith.orchestrator.errors import BackendUnavailable, StorageError
from tunesmith.orchestrator.states import AttemptState


def started(yard, number=1):
    return json.loads((yard.folder(number) / "started").read_text())


def kill_shim(yard, number=1):
    record = started(yard, number)
    assert procfs.Process.recorded(record, "shim").send(signal.SIGKILL)
    return record


def test_when_the_shim_is_killed_the_kernel_dies_and_the_attempt_is_lost(yard, alive):
    handle = yard.submit("tree")
    relatives = yard.family(2)
    record = kill_shim(yard)
    end = yard.end(handle)
    assert end.state is AttemptState.LOST
    assert end.exit_code is None
    assert end.error["code"] == "attempt.lost"
    assert not any(alive(pid) for pid in (record["kernel_pid"], *relatives))
    assert yard.executor.prove_dead(handle) == "yes"
    assert yard.executor.submit(yard.attempt("tree")) == handle  # a lost attempt is not started again
    assert yard.end(handle).state is AttemptState.LOST
    assert yard.starts() == 1


def test_stragglers_of_a_killed_shim_are_found_by_their_cookie(yard, alive):
    handle = yard.submit("tree")
    relatives = yard.family(2)
    record = kill_shim(yard)
    yard.until(lambda: not alive(record["kernel_pid"]))
    cookie = {"TUNESMITH_ATTEMPT": handle.key, "TUNESMITH_HOME": str(yard.home)}
    assert {process.pid for process in procfs.carriers(cookie)} == set(relatives)
    assert yard.executor.prove_dead(handle) == "no"
    yard.executor.cancel(handle)
    yard.until(lambda: yard.executor.prove_dead(handle) == "yes")
    assert not any(map(alive, relatives))


def test_the_same_key_in_another_home_is_a_stranger(yard, tmp_path, alive):
    yard.submit("tree")
    relatives = yard.family(2)
    other = type(yard)(tmp_path / "other")
    handle = other.submit("exit_with 0")
    other.end(handle)
    other.executor.cancel(handle)
    assert all(map(alive, relatives))
    other.until(lambda: other.executor.prove_dead(handle) == "yes")


def test_a_kernel_that_succeeds_leaves_nobody_behind(yard, alive):
    handle = yard.submit("nap 0.05")
    (sleeper,) = yard.family(1)
    assert yard.end(handle).state is AttemptState.SUCCEEDED
    assert not alive(sleeper)


def test_cancel_takes_a_tree_of_sessions_down(yard, alive):
    _cancel_trees(yard, alive, 3)


@pytest.mark.proof
def test_cancel_takes_fifty_trees_down(yard, alive):
    _cancel_trees(yard, alive, 50)


def _cancel_trees(yard, alive, count):
    executor = yard.new(grace_seconds=0.1)
    for number in range(1, count + 1):
        handle = executor.submit(yard.attempt("tree", number))
        relatives = yard.family(2, number)
        executor.cancel(handle)
        end = yard.end(handle, executor)
        assert (end.state, end.exit_code) == (AttemptState.CANCELLED, 137)
        assert not any(map(alive, relatives))
        yard.until(lambda handle=handle: executor.prove_dead(handle) == "yes")


def test_the_grace_is_kept_by_the_shim_when_whoever_cancelled_is_gone(yard, alive):
    handle = yard.submit("tree")
    relatives = yard.family(2)
    child = os.fork()
    if child == 0:
        yard.new().cancel(handle)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    yard.until(lambda: (yard.folder() / "exit").exists())
    assert not any(map(alive, relatives))
    assert yard.end(handle).state is AttemptState.CANCELLED


def test_a_stopped_kernel_can_be_cancelled(yard):
    handle = yard.submit("wait")
    yard.until(lambda: yard.executor.observe(handle, "").state is AttemptState.RUNNING)
    procfs.Process.recorded(started(yard), "kernel").send(signal.SIGSTOP)
    yard.executor.cancel(handle)
    assert yard.end(handle).exit_code == 75


def test_a_result_counts_even_when_cancel_came_meanwhile(yard):
    handle = yard.submit("nap 0.3")
    yard.family(1)
    yard.executor.cancel(handle)  # this kernel notes TERM and goes on to its end
    end = yard.end(handle)
    assert (end.state, end.exit_code) == (AttemptState.SUCCEEDED, 0)
    assert json.loads((yard.folder() / "exit").read_text())["reason"] == "cancelled"


def test_the_deadline_is_the_kernels_chance_to_save(yard):
    handle = yard.submit("wait", seconds_cap=0.2)
    end = yard.end(handle)
    assert (end.state, end.exit_code) == (AttemptState.FAILED, 75)
    assert end.error["code"] == "attempt.deadline"
    assert json.loads((yard.folder() / "exit").read_text())["reason"] == "deadline"


def test_after_a_reboot_the_attempt_is_lost_and_nobody_is_signalled(yard):
    handle = yard.submit("wait")
    record = kill_shim(yard)
    yard.until(lambda: yard.executor.observe(handle, "").state is AttemptState.LOST)
    with stranger() as process:
        record |= {"boot_id": "of another boot", "kernel_pid": process.pid, "kernel_ticks": shim.ticks(process.pid)}
        (yard.folder() / "started").write_text(json.dumps(record))
        end = yard.end(handle)
        assert end.state is AttemptState.LOST
        assert "anew" in end.error["why"]
        assert yard.executor.prove_dead(handle) == "yes"
        assert process.poll() is None


@contextmanager
def stranger(pid: int | None = None):
    """A process of somebody else's, under a wanted pid where the system lets us choose."""
    for _ in range(200):
        if pid is not None:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"], env={})
        if pid in (None, process.pid):
            break
        process.kill()
        process.wait()
    else:
        pytest.skip(f"pid {pid} could not be had again")
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def held_lock(yard):
    """The attempt's lock in the hands of another process."""
    with Folder.find(yard.home, "j-abc234", 1) as folder:
        lock = yard.until(folder.take_lock)
    try:
        yield
    finally:
        os.close(lock)


def test_a_started_record_with_anothers_pid_signals_nobody(yard):
    handle = yard.submit("ok")
    yard.end(handle)
    yard.until(lambda: yard.executor.prove_dead(handle) == "yes")
    (yard.folder() / "exit").unlink()
    with stranger() as process, held_lock(yard):
        true = {"boot_id": shim.boot_id(), "shim_pid": process.pid, "shim_ticks": shim.ticks(process.pid)}
        wrong = (
            true | {"shim_ticks": true["shim_ticks"] + 1},
            true | {"boot_id": "another"},
            true | {"shim_ticks": None},
            true | {"shim_pid": -1},
            true | {"shim_pid": 1},
            true | {"shim_pid": "7"},
            {},
        )
        for record in wrong:
            (yard.folder() / "started").write_text(json.dumps(record))
            yard.executor.cancel(handle)
            time.sleep(0.01)  # a signal, had one been sent, would be there by now
            assert process.poll() is None
        (yard.folder() / "started").write_text(json.dumps(true))
        yard.executor.cancel(handle)  # the same record, true: the test can fail
        assert process.wait(10) == -signal.SIGTERM


def uptime_ticks() -> int:
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def _reuse_pids(yard, count):
    if not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK):
        pytest.skip("pids cannot be chosen here: /proc/sys/kernel/ns_last_pid is not writable")
    handle = yard.submit("ok")
    yard.end(handle)
    yard.until(lambda: yard.executor.prove_dead(handle) == "yes")
    (yard.folder() / "exit").unlink()
    for _ in range(count):
        with stranger() as first:
            record = {"boot_id": shim.boot_id()}
            for who in ("shim", "kernel"):
                record |= {f"{who}_pid": first.pid, f"{who}_ticks": shim.ticks(first.pid)}
        assert first.returncode == -signal.SIGKILL
        # A start is known to the tick. No system uses up its pids within one; we, who choose them, must wait for it.
        yard.until(lambda at=record["shim_ticks"]: uptime_ticks() > at)
        (yard.folder() / "started").write_text(json.dumps(record))
        with stranger(first.pid) as second:
            assert not procfs.Process.recorded(record, "shim").alive
            assert not procfs.Process.recorded(record, "shim").send(signal.SIGKILL)
            with held_lock(yard):
                yard.executor.cancel(handle)
            yard.executor.cancel(handle)
            assert yard.executor.prove_dead(handle) == "yes"
            assert yard.executor.observe(handle, "").state is AttemptState.LOST
            assert second.poll() is None


def test_a_pid_used_again_is_a_stranger(yard):
    _reuse_pids(yard, 3)


@pytest.mark.proof
def test_a_hundred_pids_used_again_are_strangers(yard):
    _reuse_pids(yard, 100)


def test_a_folder_that_is_gone_loses_the_attempt(yard, alive):
    handle = yard.submit("tree")
    relatives = yard.family(2)
    yard.folder().rename(yard.home / "elsewhere")
    assert yard.executor.prove_dead(handle) == "no"
    assert yard.executor.observe(handle, "").state is AttemptState.UNKNOWN
    assert yard.end(handle).state is AttemptState.LOST
    assert not any(map(alive, relatives))
    yard.until(lambda: yard.executor.prove_dead(handle) == "yes")
    with pytest.raises(StorageError) as caught:
        yard.executor.collect(handle)
    assert caught.value.code == "artifacts.missing"


def test_a_home_that_is_gone_proves_nothing(yard):
    handle = yard.submit("ok")
    yard.end(handle)
    yard.until(lambda: yard.executor.prove_dead(handle) == "yes")
    yard.home.rename(yard.home.with_name("unmounted"))
    yard.until(lambda: yard.executor.prove_dead(handle) == "unknown")
    with pytest.raises(BackendUnavailable):
        yard.executor.observe(handle, "")


def test_an_exit_record_that_cannot_be_read_is_never_a_success(yard):
    handle = yard.submit("ok")
    yard.end(handle)
    yard.until(lambda: yard.executor.prove_dead(handle) == "yes")
    for damage in ("", '{"code": ', '{"code": "0"}', "[]", '{"code": true}'):
        (yard.folder() / "exit").write_text(damage)
        assert yard.end(handle).state is AttemptState.LOST


@pytest.mark.parametrize("kills, code", [(0, "killed"), (1, "memory.host")])
def test_a_kill_from_outside_is_told_apart_from_the_memory_running_out(yard, kills, code):
    handle = yard.submit("die")
    end = yard.end(handle)
    assert (end.state, end.exit_code) == (AttemptState.FAILED, 137)
    yard.until(lambda: yard.executor.prove_dead(handle) == "yes")
    record = json.loads((yard.folder() / "exit").read_text())
    (yard.folder() / "exit").write_text(json.dumps(record | {"oom_kills": kills}))
    assert yard.end(handle).error["code"] == code
