"""Products with a frozen matrix in float32 on CPUs: by oneDNN where MKL, torch's own way, does not know the processor.

MKL takes slow paths on processors that are not Intel's. Which of the two is asked follows from the processor and the
shapes alone, never from a measurement, so that a run that is resumed computes what it would have computed.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@cache
def other_vendor(info: str | None = None) -> bool:
    """Whether this is an x86 processor that is not Intel's: by its vendor in /proc/cpuinfo (`info`)."""
    if info is None:
        if platform.machine() not in ("x86_64", "AMD64"):
            return False
        try:
            with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
                info = file.read(4096)
        except OSError:
            return False
    vendor = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("vendor_id")), "")
    return bool(vendor) and vendor != "GenuineIntel"


@cache
def _linear() -> Any:
    """oneDNN's linear layer, None where this torch has none or the processor is better served otherwise."""
    if not other_vendor() or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except (AttributeError, RuntimeError):
        return None


def onto(x: Tensor, w: Tensor) -> Tensor:
    """x [n, in] @ w.T for w [out, in]. No gradients: for the inside of autograd functions.

    The way back, grad @ w, is left to torch: oneDNN is no faster there, even on a weight that is packed for it.
    """
    plain = x.device.type == "cpu" and x.dtype == w.dtype == torch.float32 and x.dim() == 2 and x.shape[0] > 0
    linear = _linear() if plain else None
    if linear is None:
        return x @ w.t()
    y: Tensor = linear(x.contiguous(), w, None, "none", [], "")
    return y
