"""How an attempt ended, as a state and as an error for people."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.executors.local import shim, tail
from tunesmith.executors.local.folder import Folder
from tunesmith.orchestrator.errors import StorageError, TunesmithError
from tunesmith.orchestrator.states import AttemptState

_A = AttemptState


@dataclass(frozen=True, slots=True)
class Ending:
    """The end record of an attempt, or None for a lost one; `why` then says what is known."""

    record: Mapping[str, Any] | None
    why: str = ""

    @property
    def state(self) -> AttemptState:
        """The end told: a result is a result, even where a stop or the deadline came in between."""
        if self.record is None:
            return _A.LOST
        if self.record["code"] == 0:
            return _A.SUCCEEDED
        if self.record.get("reason") == "cancelled":
            return _A.CANCELLED
        if self.record.get("reason") == "deadline":
            return _A.FAILED
        return _A.CANCELLED if self.record["code"] == shim.TOLD_TO else _A.FAILED

    @property
    def exit_code(self) -> int | None:
        """The kernel's exit code, 128 + n for signal n; None for a lost attempt."""
        return None if self.record is None else int(self.record["code"])

    def error(self, folder: Folder, number: int) -> Mapping[str, Any] | None:
        """What went wrong: the kernel's own word where it had one, else what the end record tells."""
        if self.record is None:
            return lost(self.why).to_doc()
        if self.state is not _A.FAILED:
            return None
        if self.record.get("reason") == "deadline":
            return _deadline().to_doc()
        event = tail.last_state(folder, number)
        said = event.values.get("error") if event and tail.state_of(event) == "failed" else None
        if isinstance(said, Mapping):
            return said
        return (_killed(self.record) if self.record.get("signal") else _broken(self.record, folder.path)).to_doc()


def exit_record(folder: Folder) -> dict[str, Any] | None:
    """The end record; None where there is none, or none that can be believed: that is a loss, never a success."""
    try:
        record = folder.read("exit")
    except StorageError as error:
        if error.code != "storage.damaged":
            raise
        return None
    return record if record is not None and type(record.get("code")) is int else None


def lost(why: str) -> TunesmithError:
    """Why nothing is known of an attempt's end."""
    return TunesmithError(
        "The attempt is lost: it ended without a record.",
        why=why,
        fix="Retry the job: it goes on from its last good checkpoint.",
        code="attempt.lost",
    )


def _deadline() -> TunesmithError:
    return TunesmithError(
        "The attempt was ended because its time was up.",
        why="limits.hours caps how long it may run.",
        fix="Raise limits.hours and retry: it goes on from its last checkpoint.",
        code="attempt.deadline",
    )


def _killed(record: Mapping[str, Any]) -> TunesmithError:
    number = record["signal"]
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL and record.get("oom_kills"):
        return TunesmithError(
            "The kernel was killed because the machine ran out of memory.",
            why="It ended by SIGKILL, and the system's out-of-memory killer struck while it ran.",
            fix="Make it smaller (micro-batch, sequence length, adapter), or free memory.",
            code="memory.host",
        )
    why, fix = f"It ended by {name}.", "See the log."
    if number == signal.SIGKILL:
        why = "It ended by SIGKILL: somebody killed it, or the machine ran out of memory."
        fix = "See the system's log for an out-of-memory kill, then retry: it goes on from its last checkpoint."
    return TunesmithError("The kernel was killed.", why=why, fix=fix, code="killed")


def _broken(record: Mapping[str, Any], path: Path) -> TunesmithError:
    return TunesmithError(
        f"The kernel ended with exit code {record['code']} and did not say why.",
        fix=f"See {path / 'log'}.",
        code="kernel.exit",
        where=str(path / "log"),
    )
