"""What a run turned out to need: memory, seconds and speed, told once at its end to stand against what was foretold."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.executors.kernel.stack import processor, stack
from tunesmith.orchestrator.events import Event, Kind, number

OUTSIDE_BYTES = 2**30  # of a GPU's memory beyond our allocator's: more than this is another process's


class Measured:
    """A listener of the reporter's, which adds up steps; `tell` says the sums in one metric event and one log line.

    memory/peak_bytes         CUDA: the most that tensors took at once; else the most resident memory of this process
    memory/reserved_bytes     CUDA: the most that the allocator had taken from the device
    memory/device_bytes       CUDA: that, and what libraries and the context hold beside it
    time/train_seconds        optimizer steps alone, no loading, evaluation or saving; those that time/tokens counts
    time/total_seconds        from the start of the attempt to now
    time/first_step_seconds   of a run from its first step
    time/tokens               real tokens of those steps; where another attempt began the run, without this one's first
    time/tokens_per_second    of all steps but the first, where there are any
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._about: dict[str, Any] = {}
        self._step = 0
        self._counted: float | None = None  # tokens at the end of the last step; None where they are not known
        self._steps: tuple[float, float] = (0.0, 0.0)  # tokens, seconds
        self._first: tuple[float, float] | None = None

    def __call__(self, event: Event) -> None:
        """Take one event in."""
        if event.kind is Kind.LOG and "stack" in event.values:
            self._about = {key: event.values[key] for key in ("stack", "family") if key in event.values}
        total, rate = (number(event.values.get(f"train/{name}")) for name in ("num_tokens", "tokens_per_second"))
        if event.kind is not Kind.METRIC or event.step is None or total is None or rate is None:
            return
        before = 0.0 if event.step == 1 else self._counted
        self._step, self._counted = event.step, total
        if before is None or rate <= 0:
            return
        taken = (total - before, (total - before) / rate)
        if event.step == 1:
            self._first = taken
        self._steps = (self._steps[0] + taken[0], self._steps[1] + taken[1])

    def tell(self, reporter: Reporter) -> None:
        """Say what was measured; nothing where no step was taken. Never raises."""
        if not self._step:
            return
        try:
            figures = {**memory(str(self._about.get("stack", {}).get("kind", "cpu"))), **self.times()}
        except Exception as error:
            reporter.log(f"What the run needed was not measured: {type(error).__name__}: {error}", "warning")
            return
        reporter.metric(figures, self._step)
        held = figures.get("memory/device_bytes", figures["memory/peak_bytes"]) / 2**30
        said = f"At most {held:.2f} GiB were held; it took {figures['time/total_seconds']:.1f} s"
        reporter.emit(
            Kind.LOG,
            {
                "level": "info",
                "message": f"{said}, {figures['time/train_seconds']:.1f} s of them steps.",
                **self._about,
            },
        )

    def times(self) -> dict[str, float]:
        """The figures about time."""
        tokens, seconds = self._steps
        figures = {
            "time/train_seconds": seconds,
            "time/total_seconds": time.monotonic() - self._began,
            "time/tokens": tokens,
        }
        if self._first is not None:
            figures["time/first_step_seconds"] = self._first[1]
        first = self._first or (0.0, 0.0)
        steady = (tokens - first[0], seconds - first[1]) if tokens > first[0] else (tokens, seconds)
        if steady[1] > 0:
            figures["time/tokens_per_second"] = steady[0] / steady[1]
        return figures


def ran_on(model: Any, device: Any) -> dict[str, Any]:
    """What a run's figures depend on beside its spec, to be told once the model is loaded: stack and model family."""
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    else:
        name = processor() if device.type == "cpu" else str(device.type)
    return {"stack": stack(device.type, name), "family": str(model.config.model_type)}


def memory(kind: str) -> dict[str, float]:
    """The most memory held so far, in bytes, by this process on a device of this kind."""
    if kind != "cuda":
        return {"memory/peak_bytes": float(resident_peak())}
    import torch

    free, total = torch.cuda.mem_get_info()
    outside = min(max(0, total - free - torch.cuda.memory_reserved()), OUTSIDE_BYTES)
    reserved = torch.cuda.max_memory_reserved()
    return {
        "memory/peak_bytes": float(torch.cuda.max_memory_allocated()),
        "memory/reserved_bytes": float(reserved),
        "memory/device_bytes": float(reserved + outside),
    }


def resident_peak() -> int:
    """The most resident memory that this process ever had, in bytes."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    import resource  # counts a parent's memory too where it was forked from one, so only second best

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
