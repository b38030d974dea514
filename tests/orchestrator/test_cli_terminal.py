"""The command line at a terminal: the plan is shown, a person decides, Ctrl-C detaches and the job goes on."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.orchestrator import commands
from tunesmith.orchestrator.client import Client
from tunesmith.orchestrator.home import Home

TICKETS = Path(__file__).parents[2] / "examples" / "tickets.jsonl"

pytestmark = pytest.mark.slow


class Terminal:
    """A program on a terminal of its own: what it drew, and keys to press."""

    def __init__(self, home: Home, *args: str) -> None:
        self._master, slave = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tunesmith.orchestrator.cli", *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=home.path.parent,
            env={
                **os.environ,
                "TUNESMITH_HOME": str(home.path),
                "HF_HUB_OFFLINE": "1",
                "TERM": "xterm",
                "COLUMNS": "120",
            },
            start_new_session=True,
        )
        os.close(slave)

    def until(self, pattern: str, seconds: float = 120.0) -> re.Match[str]:
        """Wait until `pattern` is on the screen."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.search(pattern, self.text)
            if found or not self._read(0.2):
                assert found, f"{pattern!r} never came:\n{self.text}"
                return found
        raise AssertionError(f"{pattern!r} did not come in time:\n{self.text}")

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._master, keys.encode())

    def end(self) -> int:
        """Read on to the end; the exit code."""
        while self._read(0.5):
            pass
        code = self.process.wait(timeout=60)
        os.close(self._master)
        return code

    def _read(self, seconds: float) -> bool:
        """False once nothing more can come."""
        ready, _, _ = select.select([self._master], [], [], seconds)
        if not ready:
            return self.process.poll() is None
        try:
            data = os.read(self._master, 65536)
        except OSError:
            return False
        self.text += data.decode("utf-8", "replace").replace("\r", "")
        return bool(data)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    made = Home(tmp_path_factory.mktemp("terminal") / "home")
    yield made
    commands.daemon_stop(made)


def state(home: Home, job: str) -> str:
    with Client(home) as client:
        return str(client.show(job)["state"])


def test_enter_decides_nothing_and_no_rejects(home: Home) -> None:
    terminal = Terminal(home, "run", f"SFT smollm2-135m on {TICKETS}, 2 steps")
    job = terminal.until(r"(j-\w{6}): planning").group(1)
    terminal.until("Start\\?")
    assert "Memory" in terminal.text
    terminal.press("\n")
    assert terminal.end() == 3
    assert state(home, job) == "awaiting_approval"

    terminal = Terminal(home, "run", f"SFT smollm2-135m on {TICKETS}, 2 steps")
    job = terminal.until(r"(j-\w{6}): planning").group(1)
    terminal.until("Start\\?")
    terminal.press("n\n")
    assert terminal.end() == 1
    assert state(home, job) == "rejected"


def test_a_question_is_asked_and_a_change_is_shown(home: Home) -> None:
    terminal = Terminal(home, "run", f"Fine-tune on {TICKETS}, 2 steps")
    job = terminal.until(r"(j-\w{6}): planning").group(1)
    terminal.until("Which model should be trained\\?.*\n?.*: ")
    terminal.press("smollm2-135m\n")
    terminal.until("Start\\?")
    terminal.press("e\n")
    terminal.until("KEY=VALUE")
    terminal.press("train.max_steps=no\n")
    terminal.until("train.max_steps must be a whole number")
    terminal.text = ""
    terminal.press("e\n")
    terminal.until("KEY=VALUE")
    terminal.press("train.max_steps=5\n")
    terminal.until("5 steps(.|\n)*Start\\?")
    terminal.press("\x04")
    assert terminal.end() in (3, 130)
    assert state(home, job) == "awaiting_approval"


def test_ctrl_c_detaches_and_the_job_goes_on_until_it_is_cancelled(home: Home) -> None:
    terminal = Terminal(home, "run", f"SFT smollm2-135m on {TICKETS}, 500 steps")
    job = terminal.until(r"(j-\w{6}): planning").group(1)
    terminal.until("Start\\?")
    terminal.press("y\n")
    terminal.until("queued|running")
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 130
    assert f"Detached from {job}; the job goes on." in terminal.text
    assert "Traceback" not in terminal.text
    assert state(home, job) in ("queued", "running")

    watcher = Terminal(home, "watch", job)
    watcher.until("running|loading")
    with Client(home) as client:
        commands.cancel(client, job)
    assert watcher.end() == 1
    assert state(home, job) == "cancelled"
    assert "cancelled" in watcher.text
