"""What the sizing tests share: devices, data reports and specs."""

from __future__ import annotations

import pytest

from tunesmith.executors.kernel.sizing.size import GIB
from tunesmith.orchestrator.nouns import DataReport, DataSource, Device, Estimate, JobSpec, ModelRef, TokenStats

_GPUS = {
    "t4": ("Tesla T4", 15, 65e12, 320e9),
    "rtx3060": ("NVIDIA GeForce RTX 3060", 12, 25e12, 360e9),
    "l40s": ("NVIDIA L40S", 44, 362e12, 864e9),
    "h100": ("NVIDIA H100 80GB HBM3", 79, 989e12, 3350e9),
}


class Makers:
    """Builds nouns with the few values that a test cares for."""

    @staticmethod
    def gpu(name: str, gib: float | None = None) -> Device:
        hardware, memory, flops, bandwidth = _GPUS[name]
        return Device(
            backend="local", hardware=hardware, kind="cuda", memory_bytes=int((gib or memory) * GIB), peak_flops=flops,
            bandwidth=bandwidth,
        )  # fmt: skip

    @staticmethod
    def cpu(gib: float = 16, backend: str = "elsewhere") -> Device:
        return Device(
            backend=backend, hardware="cpu", kind="cpu", memory_bytes=int(gib * GIB), peak_flops=3e11, bandwidth=2e10
        )

    @staticmethod
    def report(rows: int = 1000, p50: int = 200, p95: int = 400, most: int = 600, held: int = 0) -> DataReport:
        total = Estimate(low=rows * p50 * 0.9, expected=rows * p50 * 1.1, high=rows * p50 * 1.3, unit="tokens")
        tokens = TokenStats(
            p50=p50, p95=p95, max=most, total=total, supervised_share=0.5, exact=True, method="tokenizer"
        )
        return DataReport(
            rows=rows, used_rows=rows, eval_rows=held, format="messages", mapping=None, fingerprint=None, tokens=tokens
        )

    @staticmethod
    def unread() -> DataReport:
        return DataReport(rows=None, used_rows=None, eval_rows=None, format=None, mapping=None, fingerprint=None)

    @staticmethod
    def spec(**changes: object) -> JobSpec:
        return JobSpec(model=ModelRef(id="m"), data=(DataSource(source="d.jsonl"),), **changes)


@pytest.fixture(scope="session")
def make() -> Makers:
    return Makers()
