"""Where an attempt runs: its home, its network, its device and cores."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.executors.kernel.crew import Seat, devices

if TYPE_CHECKING:
    import torch


def home_of(folder: Path) -> Path:
    """The home that an attempt's folder belongs to: TUNESMITH_HOME, else by where the folder lies."""
    named = os.environ.get("TUNESMITH_HOME")
    if named:
        return Path(named)
    parents = folder.parents
    return parents[3] if len(parents) > 3 and parents[0].name == "attempts" and parents[2].name == "jobs" else folder


def offline() -> bool:
    """Whether the environment forbids asking the Hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def choose_device(hardware: Any, seat: Seat) -> torch.device:
    """The device to train on, as the spec says; a GPU where it says nothing and there is one. Sets a CPU's threads."""
    import torch

    device = devices(hardware)[seat.rank]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // seat.world))
    return device


def cores() -> int:
    """Cores this process may use: its affinity, and the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return count
