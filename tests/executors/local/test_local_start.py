"""Starting an attempt: once, durably, in a folder that is ours, with an environment that holds no secret."""

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tunesmith.executors.local import procfs, shim
from tunesmith.executors.local.folder import Folder
from tunesmith.executors.local.launch import environment
from tunesmith.orchestrator.errors import Conflict, InputError, StorageError
from tunesmith.orchestrator.nouns import Attempt
from tunesmith.orchestrator.plain import build
from tunesmith.orchestrator.ports import Handle
from tunesmith.orchestrator.states import AttemptState


def test_the_folder_holds_what_the_kernel_needs_and_is_private(yard):
    attempt = yard.attempt(seconds_cap=60.0, resume_from="attempts/1/checkpoints/step-00000010")
    yard.end(yard.executor.submit(attempt))
    document = json.loads((yard.folder() / "attempt.json").read_text())
    assert build(Attempt, document) == attempt
    assert document["schema_version"] == 1
    assert document["key"] == attempt.key
    for place in (yard.home, *yard.folder().relative_to(yard.home).parents):
        assert stat.S_IMODE((yard.home / place).stat().st_mode) == 0o700
    for file in ("attempt.json", "lock", "started", "exit", "log", "events.jsonl"):
        assert stat.S_IMODE((yard.folder() / file).stat().st_mode) == 0o600


def test_started_names_two_live_processes_and_is_there_when_submit_returns(yard):
    yard.submit("wait")
    started = json.loads((yard.folder() / "started").read_text())
    assert started["boot_id"] == shim.boot_id()
    for who in ("shim", "kernel"):
        assert procfs.Process.recorded(started, who).alive
    assert os.getsid(started["shim_pid"]) == started["shim_pid"] == os.getsid(started["kernel_pid"])


def test_exit_is_recorded_and_stays(yard):
    handle = yard.submit("exit_with 3")
    assert yard.end(handle).exit_code == 3
    record = json.loads((yard.folder() / "exit").read_text())
    assert (record["code"], record["signal"], record["reason"]) == (3, None, None)
    assert not list(yard.folder().glob("*.tmp"))


def test_a_hand_run_shim_refuses_a_folder_that_is_held_or_over(yard):
    yard.submit("wait")
    command = [sys.executable, "-I", "-S", shim.__file__, str(yard.folder()), "--", "true"]
    assert json.loads(subprocess.run(command, capture_output=True, check=True).stdout) == {"status": "held"}
    handle = yard.submit("ok", 2)
    yard.end(handle)
    yard.until(lambda: yard.executor.prove_dead(handle) == "yes")
    command[4] = str(yard.folder(2))
    assert json.loads(subprocess.run(command, capture_output=True, check=True).stdout) == {"status": "over"}
    assert yard.starts(2) == 1


def test_a_hand_run_shim_takes_the_lock_itself(yard):
    attempt = yard.attempt("wait")
    with Folder.make(yard.home, attempt.job, attempt.number) as folder:
        folder.write("attempt.json", {"key": attempt.key, "number": 1, "spec": {"name": "wait"}})
        command = [sys.executable, "-I", "-S", shim.__file__, str(folder.path), "--", *yard.executor.command]
        process = subprocess.Popen(
            [*command, str(folder.path)], stdout=subprocess.PIPE, env={**os.environ, "TUNESMITH_HOME": str(yard.home)}
        )
        with process:
            assert json.loads(process.stdout.readline()) == {"status": "started"}
            assert folder.locked
            yard.until(yard.starts)
            yard.executor.cancel(yard.executor.submit(attempt))
            assert process.wait(10) == 0
        assert not folder.locked
    assert yard.starts() == 1


def _submit_and_report(yard, attempt, gate, answers):
    gate.wait()
    try:
        answers.put(yard.new().submit(attempt).key)
    except Conflict:
        answers.put("conflict")


def test_two_specs_that_race_for_one_number_start_one_kernel(yard):
    context = multiprocessing.get_context("fork")
    gate, answers = context.Barrier(8), context.Queue()
    attempts = [yard.attempt("wait"), yard.attempt("wait 61")]
    others = [
        context.Process(target=_submit_and_report, args=(yard, attempts[turn % 2], gate, answers)) for turn in range(8)
    ]
    for other in others:
        other.start()
    told = [answers.get(timeout=30) for _ in others]
    for other in others:
        other.join(30)
        other.close()
    assert told.count("conflict") == 4
    assert len(set(told)) == 2
    yard.until(yard.starts)
    assert yard.starts() == 1


def test_a_start_can_be_adopted_when_its_submitter_dies(yard):
    handle_key = yard.attempt("nap 0.1").key
    child = os.fork()
    if child == 0:
        yard.new().submit(yard.attempt("nap 0.1"))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    handle = yard.submit("nap 0.1")
    assert handle.key == handle_key
    end = yard.end(handle)
    assert (end.state, end.exit_code) == (AttemptState.SUCCEEDED, 0)
    assert yard.starts() == 1


def test_the_shim_is_reaped_by_a_submitter_that_lives(yard):
    handle = yard.submit("ok")
    yard.end(handle)
    pid = json.loads((yard.folder() / "started").read_text())["shim_pid"]
    assert shim.stat_fields(pid)  # running, or a zombie of ours
    yard.until(lambda: yard.executor.observe(handle, "") and shim.stat_fields(pid) is None)


def test_a_stop_asked_before_the_start_starts_nothing(yard):
    attempt = yard.attempt("wait")
    with Folder.make(yard.home, attempt.job, attempt.number) as folder:
        folder.write("control", {"signal": "stop", "serial": 1})
    end = yard.end(yard.executor.submit(attempt))
    assert (end.state, end.exit_code) == (AttemptState.CANCELLED, 75)
    assert yard.starts() == 0


def test_a_cancel_at_any_moment_of_the_start_is_heard(yard):
    for number in range(1, 9):
        attempt = yard.attempt("wait", number)
        thread = threading.Thread(target=yard.new().submit, args=(attempt,))
        thread.start()
        yard.until((yard.folder(number) / "attempt.json").exists)
        handle = Handle(backend="local", key=attempt.key, job=attempt.job, number=number)
        if number % 2:
            assert yard.executor.submit(attempt) == handle
        yard.executor.cancel(handle)
        thread.join(30)
        end = yard.end(handle)
        assert end.state is AttemptState.CANCELLED
        assert yard.starts(number) <= 1


LATE_STOP = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("shim", sys.argv[1])
shim = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shim)
write = shim.write_document

def stop_first(directory, name, document):
    write(directory, "control", {"signal": "stop", "serial": 1})
    write(directory, name, document)

shim.write_document = stop_first
sys.exit(shim.main(sys.argv[2:]))
"""


def test_a_stop_just_before_the_start_is_on_disk_keeps_the_kernel_behind_its_gate(yard):
    attempt = yard.attempt("wait")
    with Folder.make(yard.home, attempt.job, attempt.number) as folder:
        folder.write("attempt.json", {"key": attempt.key, "number": 1, "spec": {"name": "wait"}})
        arguments = [shim.__file__, str(folder.path), "--", *yard.executor.command, str(folder.path)]
        subprocess.run([sys.executable, "-I", "-S", "-c", LATE_STOP, *arguments], check=True, capture_output=True)
    end = yard.end(yard.executor.submit(attempt))
    assert end.state is AttemptState.CANCELLED
    assert yard.starts() == 0


@pytest.mark.parametrize("job", ["../x", "j-ABC234", "j-abc23", "j-abc2345", "j-abc234/..", "/etc", "j-abc234\n", ""])
def test_a_name_that_is_no_job_is_refused(yard, job):
    with pytest.raises(InputError, match="job id"):
        yard.submit(job=job)
    assert not yard.home.exists()


@pytest.mark.parametrize("number", [0, -1, 10**6, "1", True])
def test_a_number_that_is_no_attempt_is_refused(yard, number):
    with pytest.raises(InputError):
        yard.submit(number=number)


@pytest.mark.parametrize("depth", range(4))
def test_a_link_in_the_way_is_refused(yard, tmp_path, depth):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    parts = ["jobs", "j-abc234", "attempts", "1"]
    here = yard.home.joinpath(*parts[:depth])
    here.mkdir(parents=True)
    (here / parts[depth]).symlink_to(elsewhere)
    with pytest.raises(StorageError) as caught:
        yard.submit()
    assert caught.value.code == "storage.link"
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["attempt.json", "lock", "log", "exit.tmp"])
def test_a_link_in_place_of_a_file_is_not_followed(yard, tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    yard.folder().mkdir(parents=True)
    (yard.folder() / name).symlink_to(victim)
    with pytest.raises(StorageError):
        yard.submit()
    assert victim.read_text() == "untouched"
    assert yard.starts() == 0


def test_a_home_that_cannot_be_used_says_so(yard):
    yard.home.parent.mkdir(exist_ok=True)
    yard.home.write_text("a file")
    with pytest.raises(StorageError) as caught:
        yard.submit()
    assert str(yard.home) in caught.value.message
    assert caught.value.fix


def test_a_damaged_attempt_file_starts_nothing(yard):
    yard.folder().mkdir(parents=True)
    (yard.folder() / "attempt.json").write_text('{"key": ')
    with pytest.raises(StorageError) as caught:
        yard.submit()
    assert caught.value.code == "storage.damaged"
    assert yard.starts() == 0


def test_a_kernel_that_cannot_be_executed_fails_with_the_reason_in_the_log(yard):
    executor = yard.new(command=["/nowhere/python"])
    end = yard.end(executor.submit(yard.attempt()), executor)
    assert (end.state, end.exit_code) == (AttemptState.FAILED, 127)
    assert "/nowhere/python" in (yard.folder() / "log").read_text()


def test_the_kernel_gets_its_environment_and_no_secret(yard, monkeypatch):
    for name in ("OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DB_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("TUNESMITH_ATTEMPT", "of another")
    handle = yard.submit("speak")
    yard.end(handle)
    events = yard.executor.observe(handle, "").events
    said = next(event for event in events if "environment" in str(event.values.get("message")))
    told = json.loads(said.values["message"])
    seen = told["environment"]
    assert {name for name, value in seen.items() if value == "canary"} == {"HF_TOKEN"}
    assert not [name for name in seen if name.startswith(("LANGSMITH", "WANDB"))]
    assert seen["OMP_NUM_THREADS"] == "3"
    assert seen["TOKENIZERS_PARALLELISM"] == "false"
    assert seen["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert seen["TUNESMITH_HOME"] == str(yard.home)
    assert seen["TUNESMITH_ATTEMPT"] == handle.key
    assert Path(told["cwd"]) == yard.folder()
    assert sorted((yard.folder() / "log").read_text().split("\n")) == ["", "to stderr", "to stdout"]


def test_environment_is_a_pure_function():
    given = {"PATH": "/bin", "HF_TOKEN": "a", "HTTPS_PROXY": "b", "SECRET": "c", "MY_TOKEN_FILE": "d", "KEYBOARD": "e"}
    assert environment(Path("/home"), given).keys() - {"TUNESMITH_HOME", "HF_HUB_DISABLE_TELEMETRY"} == {
        "PATH",
        "HF_TOKEN",
        "HTTPS_PROXY",
        "KEYBOARD",
        "PYTHONUNBUFFERED",
        "PYTHONFAULTHANDLER",
        "PYTORCH_CUDA_ALLOC_CONF",
    }


def test_the_users_own_wish_for_a_gpus_memory_goes_first():
    assert environment(Path("/home"), {})["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        found = environment(Path("/home"), {name: "backend:native"})
        assert {key: value for key, value in found.items() if "ALLOC_CONF" in key} == {name: "backend:native"}
