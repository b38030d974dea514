"""What auto becomes, choice by choice."""

from __future__ import annotations

import pytest

from tunesmith.executors.kernel.catalogue import find
from tunesmith.executors.kernel.sizing import defaults
from tunesmith.orchestrator.nouns import DataSource, GrpoSpec, TrainSpec


@pytest.mark.parametrize(
    "model, full, rate",
    [
        ("llama-3.1-8b", False, 2.9e-4),  # 5e-5 x 10 x (2000 / 4096) ** 0.781
        ("llama-3.1-8b", True, 2.9e-5),
        ("llama-3.1-70b", False, 1.7e-4),
        ("qwen3-8b", False, 4.7e-4),  # 5e-5 x 10 x (2000 / 4096) ** 0.0775
        ("qwen3-0.6b", False, 5.3e-4),
        ("smollm2-135m", False, 1e-3),  # bounded
        ("smollm2-135m", True, 1e-4),
    ],
)
def test_the_learning_rate_follows_the_rule(model, full, rate):
    assert defaults.learning_rate(find(model), "sft", full)[0] == pytest.approx(rate)


@pytest.mark.parametrize(
    "method, full", [("dpo", 1e-6), ("grpo", 1e-6), ("kto", 1e-6), ("rloo", 1e-6), ("distill", 1e-6), ("reward", 1e-5)]
)
def test_other_methods_take_smaller_steps(method, full):
    """TRL's defaults for full training, and ten times that for an adapter."""
    assert defaults.learning_rate(find("qwen3-0.6b"), method, True)[0] == full
    assert defaults.learning_rate(find("qwen3-0.6b"), method, False)[0] == pytest.approx(10 * full, rel=1e-12)


@pytest.mark.parametrize(
    "rows, epochs, steps, size",
    [(7473, 1, None, 64), (1000, 1, None, 8), (1000, 3, None, 16), (200, 1, None, 4), (200, 1, 20, 8), (3, 1, None, 3),
     (100_000, 1, 50, 64), (None, 1, None, 16)],
)  # fmt: skip
def test_the_effective_batch(make, rows, epochs, steps, size):
    spec = make.spec(train=TrainSpec(epochs=float(epochs), max_steps=steps))
    assert defaults.effective_batch(spec, rows)[0] == size


@pytest.mark.parametrize("method", ["grpo", "rloo"])
@pytest.mark.parametrize("answers, rows, prompts", [(8, 7473, 8), (8, None, 8), (16, 500, 4), (6, 500, 8), (128, 9, 1),
                                                    (2, 500, 32), (8, 3, 3)])  # fmt: skip
def test_a_step_has_some_64_answers(make, method, answers, rows, prompts):
    spec = make.spec(method=method, grpo=GrpoSpec(num_generations=answers))
    size, why = defaults.effective_batch(spec, rows)
    assert size == prompts
    assert f"{size * answers} answers" in why


def test_the_rank_grows_with_the_data():
    assert [defaults.rank(rows)[0] for rows in (None, 10, 10_000, 10_001)] == [16, 16, 16, 32]


def test_the_length_covers_every_row_but_outliers(make):
    facts = find("qwen3-0.6b")
    assert defaults.max_length(facts, make.report(most=600).tokens)[0] == 640
    assert defaults.max_length(facts, make.report(p95=400, most=9000).tokens)[0] == 1600
    assert defaults.max_length(facts, make.report(p95=90_000, most=90_000).tokens)[0] == facts.context
    assert defaults.max_length(facts, None)[0] == 2048
    assert defaults.max_length(find("TinyLlama/TinyLlama-1.1B-Chat-v1.0"), None)[0] == 2048


def test_the_length_has_room_for_what_is_written(make):
    facts, report = find("qwen3-0.6b"), make.report(most=600)
    assert defaults.max_length(facts, report.tokens, 256)[0] == 640 + 256
    assert defaults.max_length(facts, None, 256)[0] == 2048 + 256
    whole = make.report(p95=90_000, most=90_000).tokens
    assert defaults.max_length(facts, whole, 512)[0] == facts.context
    assert "512 are written" in defaults.max_length(facts, whole, 512)[1]


def test_packing_where_it_saves_something(make):
    assert defaults.packing("sft", 640, make.report().tokens)[0] is True
    assert defaults.packing("sft", 640, make.report(p50=630).tokens)[0] is False
    assert defaults.packing("dpo", 640, make.report(p50=630).tokens)[0] is True
    assert defaults.packing("grpo", 640, None)[0] is True
    assert not any(defaults.packing(method, 640, None)[0] for method in ("kto", "rloo", "reward", "distill"))
    assert defaults.packing("sft", 640, None)[0] is True


@pytest.mark.parametrize(
    "flags, found",
    [("flags : fpu avx2 avx512f avx512_bf16", True), ("flags: amx_tile amx_bf16", True), ("Features: asimd bf16", True),
     ("flags : fpu avx2 avx512f", False), ("", False)],
)  # fmt: skip
def test_bfloat16_where_the_cpu_has_it(flags, found):
    assert defaults.cpu_prefers_bf16(flags) is found


def test_the_type_computed_in(make):
    assert defaults.dtype(make.gpu("h100"), False)[0] == "bfloat16"
    assert defaults.dtype(make.gpu("t4"), False)[0] == "float32"
    assert defaults.dtype(make.cpu(backend="ray"), False)[0] == "float32"  # nothing is known of that CPU
    here = "bfloat16" if defaults.cpu_prefers_bf16() else "float32"
    assert defaults.dtype(make.cpu(backend="local"), False)[0] == here


def test_rows_of_an_epoch(make):
    twice = make.spec()
    twice = type(twice)(model=twice.model, data=(DataSource(source="a", weight=2.0),))
    assert defaults.rows_of(make.spec(), make.report(100, held=5)) == 95
    assert defaults.rows_of(twice, make.report(100, held=5)) == 190
    assert defaults.rows_of(make.spec(), make.unread()) is None


def test_steps_between_saves():
    assert defaults.save_steps(20, None)[0] == 10
    assert defaults.save_steps(5, None)[0] == 5
    assert defaults.save_steps(1000, 1.0)[0] == 100
    assert defaults.save_steps(1000, 60.0)[0] == 15  # every 15 minutes
    assert defaults.save_steps(None, None)[0] == 100
    assert defaults.eval_steps(7)[0] == 7
    assert defaults.eval_steps(1000)[0] == 200
    assert defaults.warmup_steps(1)[0] == 1
    assert defaults.warmup_steps(100_000)[0] == 100
