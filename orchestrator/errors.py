"""The one exception tree. Every error that a person can meet says what happened, why, and what to do next.

TunesmithError          exit 1
  InputError            exit 2   bad input or usage
  NotReady              exit 2   the right request at the wrong moment
  Waiting               exit 3   an answer or an approval is missing
  BackendUnavailable    exit 4
  NoDaemon              exit 5
  Conflict              exit 6   another daemon, a stale plan hash, a lost lease
  StorageError          exit 1   a disk that is full or cannot be written
  JobFailed             exit 1
  Stopped               exit 0   an attempt ended at a checkpoint because it was told to
"""

from __future__ import annotations

from typing import Any, ClassVar


class TunesmithError(Exception):
    """An error with a stable code, a message, the reason and the way out.

    `code` is dotted and stable ("data.missing_file"); scripts may match it. `where` names a row, a line or a key.
    """

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, why: str = "", fix: str = "", where: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.why = why
        self.fix = fix
        self.where = where
        self.code = code or self.default_code

    def to_doc(self) -> dict[str, Any]:
        """The error as plain JSON, as it travels over the socket, in events and in `--json` output."""
        return {
            "type": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "why": self.why,
            "fix": self.fix,
            "where": self.where,
            "exit_code": self.exit_code,
        }

    def __str__(self) -> str:
        return " ".join(part for part in (self.message, self.why, self.fix) if part)


class InputError(TunesmithError):
    """What the user gave cannot be used: a missing file, a broken row, an unknown key."""

    exit_code = 2
    default_code = "input"


class NotReady(TunesmithError):
    """The request is fine, but not in this state: approving a job that is still planning."""

    exit_code = 2
    default_code = "not_ready"


class Waiting(TunesmithError):
    """The job waits for an answer or an approval."""

    exit_code = 3
    default_code = "waiting"


class BackendUnavailable(TunesmithError):
    """A backend cannot take or report on work now."""

    exit_code = 4
    default_code = "backend.unavailable"


class NoDaemon(TunesmithError):
    """No daemon answers on the socket, and none could be started."""

    exit_code = 5
    default_code = "daemon.none"


class Conflict(TunesmithError):
    """Somebody else was first: another daemon, another plan, a newer lease."""

    exit_code = 6
    default_code = "conflict"


class StorageError(TunesmithError):
    """A disk that is full, read-only or not ours."""

    default_code = "storage"


class JobFailed(TunesmithError):
    """The job ended without a result."""

    default_code = "job.failed"


class Stopped(TunesmithError):
    """An attempt ended at a checkpoint because it was told to; nothing went wrong."""

    exit_code = 0
    default_code = "stopped"


_TYPES: dict[str, type[TunesmithError]] = {
    kind.__name__: kind
    for kind in (
        TunesmithError,
        InputError,
        NotReady,
        Waiting,
        BackendUnavailable,
        NoDaemon,
        Conflict,
        StorageError,
        JobFailed,
        Stopped,
    )
}


def from_doc(doc: dict[str, Any]) -> TunesmithError:
    """The error that `to_doc` described; an unknown type becomes a TunesmithError."""
    kind = _TYPES.get(str(doc.get("type")), TunesmithError)
    return kind(
        str(doc.get("message", "unknown error")),
        why=str(doc.get("why", "")),
        fix=str(doc.get("fix", "")),
        where=str(doc.get("where", "")),
        code=str(doc.get("code", "")),
    )
