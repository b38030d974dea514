"""Past runs on a device reach its plans: estimates are corrected, the choice follows, and it is said."""

from dataclasses import replace

import pytest

from tunesmith.executors.kernel import catalogue
from tunesmith.executors.kernel.sizing import resolve
from tunesmith.orchestrator.nouns import (
    DataReport,
    DataSource,
    Device,
    Estimate,
    JobSpec,
    Limits,
    ModelRef,
    Past,
    TokenStats,
)

GIB = 2**30
DEVICE = Device(backend="local", hardware="cpu", kind="cpu", memory_bytes=64 * GIB, peak_flops=2e11, bandwidth=2e10)
SPEC = JobSpec(model=ModelRef(id="HuggingFaceTB/SmolLM2-135M"), data=(DataSource(source="rows.jsonl"),))
TOKENS = TokenStats(p50=200, p95=400, max=512, total=Estimate(low=2e5, expected=2e5, high=2e5, unit="tokens"))
REPORT = DataReport(
    rows=1000, used_rows=1000, eval_rows=0, format="text", mapping=None, fingerprint="sha256:0", tokens=TOKENS
)


def plan(*past: Past, spec: JobSpec = SPEC):
    facts = catalogue.find(spec.model.id)
    chosen, size, time, _, findings = resolve(spec, facts, REPORT, replace(DEVICE, past=past))
    return chosen, size, time, {item.code: item for item in findings}


def ran(memory: float, pace: float = 1.0, method: str = "sft", **changes) -> Past:
    pairs = {"bytes": (2e9, 2e9 * memory), "rate": (100.0, 100.0 / pace)}
    return Past(**{"method": method, "family": "llama", **pairs, **changes})


def test_without_past_runs_the_formulas_stand() -> None:
    _, size, time, findings = plan()
    assert (size.peak_bytes.source, size.peak_bytes.formula, time.seconds.source) == ("formula", None, "formula")
    assert "size.calibrated" not in findings


def test_past_runs_correct_the_estimates_and_it_is_said() -> None:
    _, before, slow, _ = plan()
    _, size, time, findings = plan(*[ran(1.25, 3.0)] * 40)
    assert size.peak_bytes.source == time.seconds.source == time.tokens_per_second.source == "calibrated"
    assert size.peak_bytes.expected == pytest.approx(1.25 * before.peak_bytes.expected, rel=0.02)
    assert size.peak_bytes.formula == before.peak_bytes.expected
    assert sum(size.parts.values()) == pytest.approx(size.peak_bytes.expected, abs=len(size.parts))
    assert time.tokens_per_second.expected == pytest.approx(slow.tokens_per_second.expected / 3, rel=0.02)
    assert time.seconds.high / time.seconds.low < slow.seconds.high / slow.seconds.low
    assert findings["size.calibrated"].level == "info"
    assert "40 earlier runs" in findings["size.calibrated"].message
    assert "memory x 1.2" in findings["size.calibrated"].message


def test_runs_of_another_method_or_family_do_not_count() -> None:
    _, before, _, _ = plan()
    _, size, _, findings = plan(ran(2.0, method="dpo"), ran(2.0, family="qwen3"))
    assert size == before
    assert "size.calibrated" not in findings


def test_what_is_chosen_follows_what_was_measured() -> None:
    """Where jobs turn out to need half as much again, less is put on the device at once."""
    _, free, _, _ = plan()
    tight = replace(SPEC, limits=Limits(memory_gb=1.3 * free.peak_bytes.high / GIB))
    _, before, _, _ = plan(spec=tight)
    _, after, _, _ = plan(*[ran(1.6)] * 30, spec=tight)
    assert before.fits
    assert after.peak_bytes.high <= 0.85 * after.device_bytes or not after.fits
    less = (after.micro_batch, not after.activation_checkpointing) < (
        before.micro_batch,
        not before.activation_checkpointing,
    )
    assert less or not after.fits


def test_a_plan_is_corrected_by_what_the_formulas_said_and_not_by_earlier_corrections() -> None:
    """What a calibrated plan foretold is kept beside it, so that a correction is never corrected away again."""
    _, size, _, _ = plan(*[ran(1.25)] * 40)
    again = Past(method="sft", family="llama", bytes=(size.peak_bytes.formula, 1.25 * size.peak_bytes.formula))
    _, later, _, _ = plan(*[again] * 40)
    assert later.peak_bytes.expected == pytest.approx(size.peak_bytes.expected, rel=0.001)
