"""What a piece of work takes: seconds, and the most memory at once."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.executors.kernel.reporter import rss_bytes

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes and seconds.

    peak      on a GPU the most that tensors took, weights included; on a CPU how far the process's memory grew
    reserved  on a GPU the most that the allocator held, else None
    resident  the most memory of the machine that the process held
    """

    seconds: float
    peak: int
    reserved: int | None
    resident: int


class Gauge:
    """Measures from when it is made until it is read. Another gauge made in between would take its peak from it.

    What is unused at first is given back, or it would be used without being seen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        trim()
        self._wait()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with suppress(OSError):  # forbidden in some containers; then the peak is that of the process's whole life
            _RESET.write_text("5")
        self._before = _resident("VmRSS")
        self._began = time.perf_counter()

    def restart(self) -> None:
        """Count seconds from here on; of memory the most is kept."""
        self._wait()
        self._began = time.perf_counter()

    def read(self) -> Measured:
        """What was taken so far. Waits for the device."""
        self._wait()
        seconds = time.perf_counter() - self._began
        resident = _resident("VmHWM")
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            return Measured(seconds, peak, torch.cuda.max_memory_reserved(self.device), resident)
        return Measured(seconds, max(0, resident - self._before), None, resident)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def free() -> None:
    """Give unused memory back: what Python still holds in cycles, and what allocators keep for later."""
    gc.collect()
    trim()


def trim() -> None:
    """Give back what allocators keep for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _resident(name: str) -> int:
    """Bytes of VmRSS, held now, or VmHWM, the most; elsewhere than on Linux what is held now is both."""
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration, ValueError):
        return rss_bytes()
