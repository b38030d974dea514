"""Seconds: the arithmetic by hand, and what must never fall."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.executors.kernel.catalogue import find
from tunesmith.executors.kernel.sizing.time import Work, estimate, flops_per_token, seconds_per_pass
from tunesmith.orchestrator.nouns import Estimate


def work(**changes):
    usual = {
        "facts": find("llama-3.1-8b"),
        "adapter": True,
        "quantised": False,
        "trained": 0,
        "checkpointing": False,
        "dtype": "bfloat16",
        "tokens": Estimate(low=9e5, expected=1e6, high=1.1e6, unit="tokens"),
        "supervised_share": 1.0,
        "mean": 512.0,
        "steps": 100,
        "micro_batches": 400,
    }
    return Work(**{**usual, **changes})


def test_operations_are_four_six_and_two_more_for_each_parameter():
    """facts of a traced 8B step: 30.2 GFLOP a token with an adapter (4N), 44.3 with recomputation (6N)."""
    assert flops_per_token(work(mean=0)) == pytest.approx(30.2e9, rel=0.01)
    assert flops_per_token(work(mean=0, checkpointing=True)) == pytest.approx(45.3e9, rel=0.01)
    assert flops_per_token(work(mean=0, adapter=False)) == pytest.approx(45.3e9, rel=0.01)
    assert flops_per_token(work(mean=0), forward_only=True) == pytest.approx(15.1e9, rel=0.01)


def test_a_known_run_lies_inside_the_range(make):
    """Published: Llama-3-8B LoRA, packed 4,096 tokens, one H100: 12.5 k tokens/s tuned, 8.9 k to 10.2 k others."""
    found = estimate(work(mean=4096.0, micro_batches=120), make.gpu("h100")).tokens_per_second
    assert found.low < 8_900 < 12_500 < found.high


def test_the_demos_speed_lies_inside_the_range(make):
    """Measured on two cores: about 200 real tokens/s for SmolLM2-135M in bfloat16."""
    some = work(facts=find("smollm2-135m"), mean=150.0, supervised_share=0.5)
    found = estimate(some, replace(make.cpu(), peak_flops=3.3e11, bandwidth=2e10)).tokens_per_second
    assert found.low < 200 < found.high


@given(st.floats(1e3, 1e9), st.floats(1, 10), st.booleans(), st.booleans())
def test_time_never_falls_with_more_tokens(make, count, times, adapter, checkpointing):
    for device in (make.cpu(), make.gpu("h100")):
        tokens = Estimate(low=count, expected=count, high=count, unit="tokens")
        more = Estimate(low=count * times, expected=count * times, high=count * times, unit="tokens")
        some = work(adapter=adapter, checkpointing=checkpointing, tokens=tokens)
        before, after = estimate(some, device), estimate(replace(some, tokens=more), device)
        assert before.seconds.expected <= after.seconds.expected
        assert before.seconds.low <= before.seconds.expected <= before.seconds.high
        slower = estimate(replace(some, checkpointing=True), device)
        assert slower.seconds.expected >= before.seconds.expected


def test_a_gpu_of_unknown_speed_has_no_time(make):
    assert estimate(work(), replace(make.gpu("h100"), peak_flops=0.0)) is None
    assert estimate(work(), replace(make.cpu(), peak_flops=0.0, bandwidth=0.0)) is not None


def test_small_steps_wait_for_launches(make):
    some = work(facts=find("qwen3-0.6b"), tokens=Estimate(low=1e5, expected=1e5, high=1e5, unit="tokens"))
    few, many = (estimate(replace(some, micro_batches=count), make.gpu("h100")) for count in (100, 2000))
    assert many.seconds.expected > few.seconds.expected


def test_gpus_share_the_work_and_send_their_gradients(make):
    """A million trained parameters are 4 MB of gradients: twice over a link of 10 GB/s, 100 times, is 0.08 s."""
    alone, card = work(trained=10**6, read=1e6), make.gpu("h100")
    one, four = (estimate(replace(alone, shared=count), card).seconds.expected for count in (1.0, 4.0))
    nothing = Estimate(low=0, expected=0, high=0, unit="tokens")
    start = estimate(replace(alone, tokens=nothing, micro_batches=0, read=0.0), card).seconds.expected
    assert four - start == pytest.approx((one - start) / 4 + 0.08)


def test_writing_reads_the_weights_once_for_all_slots(make):
    """Qwen3-0.6B in bfloat16 is 1.2 GB: at 85 % of an H100's 3.35 TB/s a pass cannot take less than 0.42 ms."""
    some = work(facts=find("qwen3-0.6b"), slots=1)
    alone, many = (seconds_per_pass(replace(some, slots=slots), make.gpu("h100")) for slots in (1, 64))
    assert 0.42e-3 < alone < 10e-3
    assert many < 2 * alone
    long = seconds_per_pass(replace(some, slots=64, context=30_000.0), make.gpu("h100"))
    assert long == pytest.approx((1.19e9 + 64 * 30_000 * 2 * 28 * 8 * 128 * 2) / (0.85 * 3.35e12), rel=0.01)
    assert seconds_per_pass(replace(some, eager=True), make.gpu("h100")) > alone


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 512))
def test_time_never_falls_with_more_passes(make, passes, read, slots):
    for device in (make.cpu(), make.gpu("h100")):
        some = work(slots=slots, context=100.0, passes=passes, read=read)
        for more in (replace(some, passes=2 * passes), replace(some, read=2 * read), replace(some, slots=2 * slots)):
            assert estimate(some, device).seconds.expected <= estimate(more, device).seconds.expected
