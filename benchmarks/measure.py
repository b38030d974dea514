"""What every benchmark shares: interleaved timing of commands, the machine's description, the closing JSON line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def run(command: Sequence[str], **kwargs: Any) -> float:
    """Seconds that one fresh process takes; raises CalledProcessError where it fails."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kwargs)
    return time.perf_counter() - begun


def interleave(sides: Mapping[str, Callable[[], float]], pairs: int) -> dict[str, list[float]]:
    """Every side once a round, in turn, after one warm-up round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(pairs + 1):
        for name, side in sides.items():
            seconds = side()
            if number:
                taken[name].append(seconds)
    return taken


def ratio(top: Sequence[float], bottom: Sequence[float]) -> float:
    """The median of the ratios pair by pair."""
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


def machine() -> str:
    """The processor and its cores, in words."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def versions(*names: str) -> dict[str, str]:
    """The versions of Python and of the named distributions."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def commit() -> str:
    """The last commit that changed anything but recorded results, marked "-dirty" where the tree has other changes."""
    code = [".", ":!benchmarks/results"]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments, "--", *code], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    name = git("log", "-1", "--format=%h", "--abbrev=12") or "unknown"
    return f"{name}-dirty" if git("status", "--porcelain") else name


def close(name: str, figures: Mapping[str, Any], *packages: str) -> None:
    """Print the last line: one JSON object that scripts read."""
    print(
        json.dumps({"benchmark": name, **figures, "device": machine(), "versions": versions(*packages)}),
        file=sys.stdout,
        flush=True,
    )
