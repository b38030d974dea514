"""Products with a frozen matrix on CPUs: by oneDNN where that is faster than torch's own way.

In training that is float32 on processors that are not Intel's, for which MKL takes slow paths; in writing samples,
where few rows meet every weight, a matrix that lies packed as oneDNN reads it. Which is asked follows from the
processor and the shapes alone, never from a measurement, so that a resumed run computes what it would have computed.
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
    """oneDNN's linear layer, None where this torch has none."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
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
    linear = _linear() if plain and other_vendor() else None
    if linear is None:
        return x @ w.t()
    y: Tensor = linear(x.contiguous(), w, None, "none", [], "")
    return y


class Packed:
    """The forward of a frozen linear layer whose weight lies as oneDNN reads it.

    `pack` takes a weight [out, in]; the product is x [..., in] @ weight.T + bias in its type. For 16 rows and layers
    of SmolLM2-135M it takes 0.6 of the time of torch's own, which packs the weight anew each time.
    """

    def __init__(self, bias: Tensor | None) -> None:
        self.bias = bias
        self.weight: Tensor | None = None

    @staticmethod
    def possible(dtype: torch.dtype, device: torch.device) -> bool:
        """Whether weights of this type can be packed here."""
        if device.type != "cpu" or _linear() is None:
            return False
        try:
            with torch.no_grad():
                probe = Packed(None)
                probe.pack(torch.zeros(16, 16, dtype=dtype))
                return bool((probe(torch.zeros(2, 16, dtype=dtype)) == 0).all())
        except (AttributeError, NotImplementedError, RuntimeError):
            return False

    def pack(self, weight: Tensor) -> None:
        """Take this weight from now on. Costs one reading and writing of it."""
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _linear()(x, self.weight, self.bias, "none", [], "")
        return y
