"""Any exception that ends an attempt, as an error with a code and words for people."""

from __future__ import annotations

from pathlib import Path

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.shortage import Shortage
from tunesmith.orchestrator.errors import JobFailed, Stopped, StorageError, TunesmithError


def explained(error: BaseException) -> TunesmithError:
    """Any exception as one with a code: oom.cuda, oom.host, storage.*, internal, or its own."""
    if isinstance(error, TunesmithError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return stopped("by an interrupt")
    text = str(error)
    shortage = Shortage.of(error)
    if shortage is not None:
        return shortage.ends(["a lower train.micro_batch or train.max_length", "a smaller model"])
    if isinstance(error, OSError):
        try:
            with checkpoint.storage_errors(Path(error.filename or "results")):
                raise error
        except StorageError as known:
            return known
        except OSError:
            pass
    return JobFailed(
        "The training process met an error that it did not expect.",
        code="internal",
        why=f"{type(error).__name__}: {(text.splitlines() or [''])[0][:200]}",
        fix="The log holds the details. Retry the job: it goes on from its last checkpoint.",
    )


def stopped(where: str) -> Stopped:
    """The end of an attempt that was told to end."""
    return Stopped(f"The attempt was told to end {where}.", code="stopped")
