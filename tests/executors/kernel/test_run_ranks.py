"""Attempts in two real processes: one of them killed, a stop, another life, and an error of the second one's own."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.executors.kernel import crew
from tunesmith.executors.kernel import run as runs
from tunesmith.executors.kernel.data import fingerprint
from tunesmith.executors.kernel.loops.engine import Engine
from tunesmith.orchestrator.events import Kind, decode
from tunesmith.orchestrator.nouns import DataSource

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small_and_offline(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("TUNESMITH_HOME", raising=False)
    yield
    torch.set_num_threads(before)


def events(folder, kind):
    found = map(decode, (folder / "events.jsonl").read_bytes().splitlines())
    return [event for event in found if event is not None and event.kind is kind]


def series(folder, key):
    return {event.step: event.values[key] for event in events(folder, Kind.METRIC) if key in event.values}


def ending(folder):
    return events(folder, Kind.STATE)[-1].values


@pytest.fixture
def others(monkeypatch):
    """The processes started beside rank 0, in order."""
    found = []
    usual = crew.Crew._start

    def start(self, rank):
        found.append(usual(self, rank))
        return found[-1]

    monkeypatch.setattr(crew.Crew, "_start", start)
    return found


@pytest.fixture
def after_step(monkeypatch):
    """Do something once, when rank 0 has taken a step."""
    usual = Engine._step

    def at(step, what):
        def stepping(self):
            usual(self)
            if self.cursor.step == step:
                monkeypatch.setattr(Engine, "_step", usual)
                what()

        monkeypatch.setattr(Engine, "_step", stepping)

    return at


def test_two_processes_through_a_kill_and_a_stop_are_as_good_as_one(attempt, others, after_step, capfd):
    whole = attempt(9)
    assert runs.run(whole) == 0
    folder = attempt(1, hardware={"processes": 2})

    after_step(3, lambda: others[0].kill())
    assert runs.run(folder) == 1
    error = ending(folder)["error"]
    assert (error["type"], error["code"]) == ("JobFailed", "ranks.lost")
    assert "Rank 1 of 2 was ended by SIGKILL" in error["why"]
    assert "Retry" in error["fix"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]

    after_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert runs.run(folder) == 75
    assert ending(folder)["state"] == "stopped"
    assert "step 5 of 6" in ending(folder)["error"]["message"]

    assert runs.run(folder) == 0
    assert [child.returncode for child in others] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert not (folder / "ranks").exists()
    assert not torch.distributed.is_initialized()
    for key in ("train/loss", "train/grad_norm", "eval/loss"):
        one, two = series(whole, key), series(folder, key)
        assert two.keys() == one.keys()
        assert two == pytest.approx(one, rel=1e-5), key
    ledgers = [json.loads((place / "checkpoints/step-00000006/ledger.json").read_text()) for place in (whole, folder)]
    assert ledgers[0] == ledgers[1]
    one, two = (load_file(place / "output/adapter/adapter_model.safetensors") for place in (whole, folder))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert [event.line for event in map(decode, (folder / "events.jsonl").read_bytes().splitlines())] == list(
        range(1, len((folder / "events.jsonl").read_bytes().splitlines()) + 1)
    )
    heard = capfd.readouterr().err
    assert "Traceback" not in heard
    assert "Warning" not in heard


def test_an_error_of_another_rank_is_the_error_of_the_attempt(attempt, data, others, monkeypatch):
    """The data changes after rank 0 has read it and before rank 1 does."""
    usual = crew.Crew._start

    def start(self, rank):
        data.write_text(data.read_text() + json.dumps({"prompt": "one", "completion": "more"}) + "\n")
        return usual(self, rank)

    monkeypatch.setattr(crew.Crew, "_start", start)
    seen = fingerprint([DataSource(source=str(data))])
    folder = attempt(hardware={"processes": 2}, fingerprint=seen)
    assert runs.run(folder) == 2
    error = ending(folder)["error"]
    assert (error["type"], error["code"]) == ("InputError", "data.changed")
    assert error["where"].endswith("rank 1")
    assert [child.returncode for child in others] == [2]


def test_a_rank_started_by_a_stranger_ends_at_once(attempt):
    command = [sys.executable, "-P", "-m", "tunesmith.executors.kernel", str(attempt()), "--rank", "1", "--world", "2"]
    done = subprocess.run([*command, "--parent", "1"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (crew.LOST, "", "")


def test_gpus_that_are_not_there_are_refused(attempt, others):
    if torch.cuda.device_count() >= 64:
        pytest.fail("This machine has more GPUs than this test can imagine.")
    folder = attempt(hardware={"gpus": 64})
    assert runs.run(folder) == 2
    assert ending(folder)["error"]["code"] == "hardware.gpus"
