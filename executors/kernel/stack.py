"""A device with the versions that decide how much it holds and how fast it is: only runs on the same stack compare.

Standard library alone, and no torch: executors describe their devices by it, runs what they ran on.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def stack(kind: str, device: str) -> dict[str, str]:
    """A device with the versions that decide how much it holds and how fast it is; some milliseconds, no torch."""
    driver = ""
    if kind == "cuda":
        found = re.search(r"Kernel Module\D*\s([\d.]+)\s", _text("/proc/driver/nvidia/version"))
        driver = found[1] if found else ""
    names = {name: _version(name) for name in ("torch", "transformers")}
    return {"kind": kind, "device": device, "driver": driver, **names}


def processor() -> str:
    """The CPU's name and how many cores of it may be used: "Intel(R) Xeon(R) Processor, 2 cores"."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{found[1].strip() if found else os.uname().machine}, {count} core{'s' * (count > 1)}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
