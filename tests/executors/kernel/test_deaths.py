"""An attempt that dies anywhere, inside a save or a step, goes on and ends with the same bytes: all three methods."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.executors.kernel import checkpoint
from tunesmith.orchestrator.events import Kind, decode
from tunesmith.orchestrator.nouns import DataSource, GrpoSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

WORDS = ["red", "green", "blue", "black", "white", "brown", "grey", "pink"]


def rows_of(method):
    """Data for a method: 24 rows."""
    for number in range(24):
        word = WORDS[number % 8]
        question = f"Say {word} {number}."
        if method == "sft":
            yield {"prompt": question, "completion": f"{word} {number}"}
        elif method == "dpo":
            yield {"prompt": question, "chosen": f"{word} {number}", "rejected": f"no, {WORDS[number % 7]}"}
        else:
            yield {"prompt": question, "answer": word}


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A warm process; call it with a folder and when to die to get the status of the fork."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env.pop("TUNESMITH_HOME", None)
    log = tmp_path_factory.mktemp("dying") / "log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("dying.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env,
        ) as process,
    ):  # fmt: skip

        def run(folder, *when):
            print(folder, *when, file=process.stdin, flush=True)
            for line in process.stdout:
                if line.startswith("status "):
                    return int(line.split()[1])
            raise AssertionError(log.read_text())

        yield run
        process.stdin.close()


@pytest.fixture
def job(attempt, tmp_path):
    """Writes an attempt of a method in a job of its own; returns its folder."""

    def make(method, name, **train):
        source = tmp_path / f"{method}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows_of(method)))
        grpo = GrpoSpec(num_generations=4, max_completion=8, num_iterations=2, rewards=("length:5 characters",))
        length = {"max_length": 128, "max_steps": 8, "save_steps": 1, "eval_steps": 4, **train}
        folder = attempt(method=method, data=(DataSource(source=str(source)),), train=length, grpo=grpo)
        own = tmp_path / "home" / "jobs" / name / "attempts" / "1"
        own.parent.mkdir(parents=True)
        folder.rename(own)
        return own

    return make


def events(folder):
    return [event for line in (folder / "events.jsonl").read_bytes().splitlines() if (event := decode(line))]


def outcome(folder):
    """What a run left: the adapter's bytes, the ledger, and the loss of every step."""
    adapter = (folder / "output" / "adapter" / "adapter_model.safetensors").read_bytes()
    newest = checkpoint.newest_verified(folder / "checkpoints").path
    losses = {e.step: e.values["train/loss"] for e in events(folder) if "train/loss" in e.values}
    return adapter, json.loads((newest / "ledger.json").read_text()), losses


def deaths(draw, writes, lines, seconds):
    """Up to three deaths of one attempt: one in two inside a save."""
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(["write", "write", "event", "after"])
        if kind == "after":
            yield kind, f"{draw.uniform(0.02, seconds):.3f}"
        else:
            yield kind, str(draw.randint(1, writes if kind == "write" else lines))


def run_trials(count, seed, warm, job):
    """Runs until `count` of them ended and `count` deaths were died; a run may end before the death drawn for it."""
    draw = random.Random(seed)
    ran = died = resumed = 0
    references = {}
    for method in ("sft", "dpo", "grpo"):
        folder = job(method, f"j-{method}aa"[:8])
        status = warm(folder, "here")
        assert status == 0, (folder / "events.jsonl").read_text()
        found = events(folder)
        begun, ended = found[0].time, found[-1].time
        seconds = (_stamp(ended) - _stamp(begun)).total_seconds()
        references[method] = (outcome(folder), len(found), seconds)
    while ran < count or died < count:
        number, ran = ran, ran + 1
        method = ("sft", "dpo", "grpo")[number % 3]
        expected, lines, seconds = references[method]
        folder = job(method, f"j-{number:06d}")
        for when in deaths(draw, 150, lines, seconds):
            status = warm(folder, *when)
            if os.WIFSIGNALED(status):
                assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM)
                died += 1
            else:
                assert os.WEXITSTATUS(status) == 0, (method, when, (folder / "events.jsonl").read_text())
        assert warm(folder, "never") == 0, (method, (folder / "events.jsonl").read_text())
        alerts = [event.values for event in events(folder) if event.kind is Kind.ALERT]
        assert not [alert for alert in alerts if alert["code"].startswith("checkpoint.")], alerts
        logs = [event.values["message"] for event in events(folder) if event.kind is Kind.LOG]
        resumed += sum(bool(re.match(r"Going on from step [1-9]", line)) for line in logs)
        assert outcome(folder) == expected, (method, number)
    return ran, died, resumed


def _stamp(text):
    from datetime import datetime

    return datetime.fromisoformat(text)


def test_a_few_deaths(warm, job):
    _, _, resumed = run_trials(6, 1, warm, job)
    assert resumed >= 3


@pytest.mark.proof
def test_a_hundred_deaths(warm, job, capsys):
    """100 deaths or more in 100 runs or more: each run ends with the bytes of a run that nobody disturbed."""
    ran, died, resumed = run_trials(100, int(os.environ.get("TUNESMITH_SEED", "1")), warm, job)
    with capsys.disabled():
        print(f"\n{ran} runs of {ran} ended bit for bit the same; {died} deaths, {resumed} resumes from a checkpoint")
    assert resumed >= 60


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty"])
def test_no_damage_is_accepted(method, damage, warm, job):
    """Every file of the newest checkpoint, damaged in turn, sends the run back to the older one, with a word."""
    whole = job(method, "j-whole0", max_steps=6)
    assert warm(whole, "never") == 0
    expected = outcome(whole)
    folder = job(method, "j-hurt00", max_steps=6)
    names = ("cursor.json", "optimizer.safetensors", "adapter_model.safetensors", "manifest.json")
    names += ("rollouts.json",) if method == "grpo" else ()
    for name in names[:1] if damage == "empty" else names:
        for item in folder.iterdir():
            if item.name != "attempt.json":
                subprocess.run(["rm", "-rf", str(item)], check=True)
        assert warm(folder, "event", "40") != 0
        (newest, place), (older, _) = checkpoint.steps(folder / "checkpoints")[:2]
        if name == "rollouts.json" and not (place / name).exists():
            subprocess.run(["rm", "-rf", str(place)], check=True)
            newest, place, older = older, checkpoint.step_folder(folder / "checkpoints", older), 0
        hurt(place, name, damage)
        assert warm(folder, "never") == 0
        (alert,) = [e.values for e in events(folder) if e.values.get("code") == "checkpoint.corrupt"]
        assert alert["where"] == f"step-{newest:08d}"
        assert outcome(folder)[0] == expected[0]


def hurt(place, name, damage):
    path = place / name
    if damage == "empty":
        for item in place.iterdir():
            item.unlink()
    elif damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
