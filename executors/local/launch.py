"""Starting a shim: with the lock in hand, with an environment that holds no secret, and once its word is heard."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.executors.local import shim
from tunesmith.executors.local.folder import Folder, storage_error
from tunesmith.orchestrator.errors import BackendUnavailable

_LOCK_FD = 3

# Variables that look like secrets stay with the daemon. The Hub's token goes along: gated models and data need it.
_SECRET = re.compile(
    r"(?i)(^|_)(token|secrets?|password|passwd|credentials?|api_?key|access_?key|private_?key|key_id|key)($|_)"
    r"|^(langsmith|langchain|wandb)_|(?i:connection_string$|database_url$)"
)
_HUB = frozenset({"HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"})


def environment(home: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """What a kernel sees: the daemon's environment less its secrets, with the home and quiet libraries.

    A GPU's memory is taken in segments that can grow, so that less of it lies in pieces, unless the user says how.
    The Hub's token stays (HF_TOKEN and its kin); thread settings (OMP_NUM_THREADS...) and proxies are untouched.
    Output is unbuffered, so that the last line before a crash is in the log.
    """
    kept = {name: value for name, value in inherited.items() if name in _HUB or not _SECRET.search(name)}
    kept.pop("TUNESMITH_ATTEMPT", None)  # of an attempt that the daemon itself was started from
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & kept.keys():  # read once, when a GPU is first used
        kept["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return {
        **kept,
        "TUNESMITH_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def launch(folder: Folder, lock: int, command: Sequence[str], *, home: Path, grace: float, until: float) -> Pending:
    """Spawn a shim that inherits `lock`, for `command` with the folder added to it."""
    said, say = os.pipe()
    ends = [_high(say), _high(lock)]
    os.close(say)
    program = [sys.executable, "-I", "-S", shim.__file__, str(folder.path), "--lock", str(_LOCK_FD)]
    try:
        pid = os.posix_spawn(
            sys.executable,
            [*program, "--grace", str(grace), "--", *command, str(folder.path)],
            environment(home, os.environ),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, ends[0], 1),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, ends[1], _LOCK_FD),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT),
        )
    except OSError as error:
        os.close(said)
        raise BackendUnavailable(
            "The attempt could not be started on this machine.",
            why=f"The system says: {error.strerror}.",
            fix="Are there processes and memory to spare?",
            code="local.spawn",
        ) from error
    finally:
        for end in ends:
            os.close(end)
    return Pending(pid, said, folder.path, until)


@dataclass(frozen=True, slots=True)
class Pending:
    """A shim that was spawned and has not yet said how the start went. `until` is on the monotonic clock."""

    pid: int
    said: int
    path: Path
    until: float

    def heed(self) -> None:
        """Wait for the shim's word. Raises StorageError or BackendUnavailable where there was no start, or none yet."""
        try:
            line = b""
            while not line.endswith(b"\n"):
                left = self.until - time.monotonic()
                if left <= 0 or not select.select([self.said], [], [], left)[0]:
                    raise slow()
                part = os.read(self.said, 65536)
                if not part:
                    raise BackendUnavailable(
                        "The attempt's shim ended before it could start the kernel.",
                        why="It was killed, or could not run at all.",
                        fix="Ask again: nothing was started.",
                        code="local.spawn",
                        where=str(self.path),
                    )
                line += part
        finally:
            os.close(self.said)
        word = json.loads(line)
        if "error" in word:
            raise storage_error(word["errno"], word["error"], self.path)


def slow() -> BackendUnavailable:
    """No start was seen in time, which does not mean that there is none."""
    return BackendUnavailable(
        "The attempt has not started in time.",
        why="The machine or its disk is busy; it may still start.",
        fix="Ask again: it is never started twice.",
        code="local.slow_start",
    )


def _high(descriptor: int) -> int:
    """A copy above the numbers that the shim is given, so that no copy overwrites another."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
