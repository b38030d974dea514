"""Memory that ran out: whose it was, and how an attempt ends for want of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.orchestrator.errors import JobFailed

_HOST = "DefaultCPUAllocator: can't allocate memory"  # behind torch's note of where it was found out


@dataclass(frozen=True, slots=True)
class Shortage:
    """An allocator, a GPU's or the machine's, had nothing to give; `said` are its words."""

    gpu: bool
    said: str

    @classmethod
    def of(cls, error: BaseException) -> Shortage | None:
        """The shortage that an error speaks of, torch's or Python's; None where it is of something else."""
        said = " ".join(str(error).split())
        if type(error).__name__ == "OutOfMemoryError":
            return cls(True, said)
        at = said.find(_HOST)
        if at >= 0 or isinstance(error, MemoryError):
            return cls(False, said[max(0, at) :])
        return None

    @property
    def words(self) -> str:
        """The allocator's first sentence, at most 160 characters."""
        return self.said.split(". ")[0][:160].rstrip(".")

    def ends(self, left: Sequence[str], *, why: str = "", step: int | None = None) -> JobFailed:
        """The error that ends an attempt. `left` is what a person may still change, `why` what stood in the way."""
        parts = [f"{part}." for part in (self.words, why) if part]
        return JobFailed(
            f"The {'GPU' if self.gpu else 'machine'} ran out of memory{'' if step is None else f' at step {step:,}'}.",
            code="oom.cuda" if self.gpu else "oom.host",
            why=" ".join(parts),
            fix=f"Use {', or '.join(left)}." if left else "",
            where="" if step is None else f"step {step}",
        )
