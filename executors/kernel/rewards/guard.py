"""Child processes for work on hostile text that may never end, eat all memory, or run what a model wrote.

Mathematics, patterns, schemas and the scorers of Reasoning Gym run here, never in the process that trains. A child
has a time limit for each item (its own alarm, then a limit of the kernel on its processor time, then this side's
patience, which ends it), a limit on memory, no environment but what Python needs, and may not write files. Signals of
the training process play no part, so a reward may be asked from any thread. The text travels as JSON lines.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.orchestrator.errors import InputError, JobFailed

PATIENCE = 10.0  # seconds for one item, after which its child is ended; its own alarm rings at a third of that
LOADING = 120.0  # seconds for a child to import what it needs
CHILDREN = 4
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TMPDIR")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one item: a value, or `trouble` (what the library raised), or `slow` (out of time or memory)."""

    value: Any = None
    trouble: str = ""
    slow: bool = False


class Guard:
    """Up to four children that work off items of one kind ("boxed", "regex", "json", "reasoning-gym")."""

    def __init__(self, kind: str, setup: Mapping[str, Any] | None = None, *, children: int = 0) -> None:
        self.kind = kind
        self.setup = dict(setup or {})
        self.most = children or min(CHILDREN, _cores())
        self.slow = 0
        self._children: list[_Child] = []
        self._end = weakref.finalize(self, _close, self._children)

    def map(self, items: Sequence[Mapping[str, Any]], patience: float = PATIENCE) -> list[Outcome]:
        """The outcome of each item, in order; equal items are worked on once. One child per four items, at most four.

        Raises InputError where a package is missing or the setup is refused, JobFailed where no child can be started.
        """
        texts = [json.dumps(item) for item in items]
        unique = list(dict.fromkeys(texts))
        found: dict[str, Outcome] = {}
        for _ in range(min(self.most, max(1, len(unique) // 4)) - len(self._children)):
            self._children.append(_Child())
        queue = iter(unique)
        lock = threading.Lock()
        failures: list[BaseException] = []

        def work(child: _Child) -> None:
            try:
                for text in _shared(queue, lock):
                    found[text] = child.ask(self.kind, self.setup, text, patience)
            except BaseException as error:
                failures.append(error)

        # Threads only wait for pipes here; one child alone needs none.
        helpers = [threading.Thread(target=work, args=(child,), daemon=True) for child in self._children[1:]]
        if len(unique) < 2:
            helpers = []
        for helper in helpers:
            helper.start()
        if unique:
            work(self._children[0])
        for helper in helpers:
            helper.join()
        if failures:
            raise failures[0]
        self.slow += sum(found[text].slow for text in texts)
        return [found[text] for text in texts]

    def close(self) -> None:
        """End the children."""
        self._end()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _close(children: list[_Child]) -> None:
    for child in children:
        child.end()
    children.clear()


def _shared(queue: Iterator[str], lock: threading.Lock) -> Iterator[str]:
    while True:
        with lock:
            text = next(queue, None)
        if text is None:
            return
        yield text


class _Child:
    """One child process, started when it is first asked and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def ask(self, kind: str, setup: Mapping[str, Any], text: str, patience: float) -> Outcome:
        """One item's outcome, within `patience` seconds. A child that went because nobody asked is started again."""
        answer = None
        for _ in range(2):
            if self._process is None or self._process.poll() == 0:
                self.end()
                self._start(kind, setup)
            answer = self._exchange(text.encode(), patience)
            if answer is not None or not self._went():
                break
        if answer is None:
            self.end()
            return Outcome(slow=True)
        return Outcome(answer.get("value"), str(answer.get("trouble", "")), bool(answer.get("slow")))

    def _went(self) -> bool:
        """Whether the child ended by itself, in peace."""
        if self._process is None:
            return False
        try:
            return self._process.wait(0.1) == 0
        except subprocess.TimeoutExpired:
            return False

    def end(self) -> None:
        """Kill the child and take its exit; nothing is lost with it."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass  # what was not yet written has nobody to read it
        process.wait()

    def _start(self, kind: str, setup: Mapping[str, Any]) -> None:
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        # One seed of hashes: some tasks of Reasoning Gym walk through sets. One thread: the cores are shared already.
        environment |= {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tunesmith.executors.kernel.rewards.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                cwd="/",
            )
        except OSError as error:
            raise _no_child(str(error)) from error
        ready = self._exchange(json.dumps({"kind": kind, "setup": dict(setup)}).encode(), LOADING)
        if ready is None:
            code = self._process.poll()
            self.end()
            raise _no_child(f"It ended with code {code}." if code is not None else "It did not answer.")
        if "refused" in ready:
            self.end()
            raise InputError(**ready["refused"])

    def _exchange(self, line: bytes, patience: float) -> dict[str, Any] | None:
        """Send a line and read one; None where the child ended or said nothing in time."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
        except OSError:
            return None
        give_up = time.monotonic() + patience
        reader = select.poll()
        reader.register(process.stdout, select.POLLIN)
        while b"\n" not in self._buffer:
            left = give_up - time.monotonic()
            if left <= 0 or not reader.poll(left * 1000):
                return None
            part = os.read(process.stdout.fileno(), 1 << 20)
            if not part:
                return None
            self._buffer += part
        answer, _, self._buffer = self._buffer.partition(b"\n")
        found = json.loads(answer)
        return found if isinstance(found, dict) else None


def _no_child(why: str) -> JobFailed:
    return JobFailed(
        "The process that scores completions could not be started.",
        code="reward.guard",
        why=why,
        fix="The log holds what it said. Check that the machine has memory left.",
    )


__all__ = ["Guard", "Outcome"]
