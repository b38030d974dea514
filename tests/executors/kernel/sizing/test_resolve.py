"""Fitting: no auto is left, what the user set stays, and what cannot fit says what would."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.catalogue import find, known
from tunesmith.executors.kernel.loops import trl_plan
from tunesmith.executors.kernel.sizing import resolve
from tunesmith.executors.kernel.sizing.size import GIB
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import (
    METHODS,
    SAMPLED,
    AdapterSpec,
    Device,
    DistillSpec,
    DpoSpec,
    EvalSpec,
    GrpoSpec,
    JobSpec,
    Limits,
    ModelRef,
    TrainSpec,
)
from tunesmith.orchestrator.plain import build, plain


def codes(findings, level=None):
    return {item.code for item in findings if level in (None, item.level)}


# --- whole plans ---------------------------------------------------------------------------------------------------


def test_a_small_job_on_a_cpu(make):
    spec, size, time, resolved, findings = resolve(
        make.spec(), find("smollm2-135m"), make.report(rows=400, held=20), make.cpu()
    )
    assert size.fits
    assert (size.params, size.rank, size.quantization) == (134_515_008, 16, None)
    assert spec.adapter.kind == "lora"
    assert spec.adapter.targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert spec.train.packing is True
    assert spec.train.dtype == "float32"
    assert spec.train.max_length == 640  # the longest row, rounded up
    assert size.peak_bytes.expected < 4 * GIB
    assert time.seconds.low < time.seconds.expected < time.seconds.high
    assert not findings
    assert all(item.why for item in resolved)


def test_no_auto_is_left_and_each_is_explained(make):
    auto = make.spec()
    spec, *_, resolved, _ = resolve(auto, find("qwen3-0.6b"), make.report(), make.gpu("h100"))
    left = [
        item.name for part in (spec.adapter, spec.train) for item in fields(part) if getattr(part, item.name) == "auto"
    ]
    assert left == []
    expected = {
        f"{name}.{item.name}"
        for name, part in (("adapter", auto.adapter), ("train", auto.train))
        for item in fields(part)
        if getattr(part, item.name) == "auto"
    }
    assert {item.key for item in resolved} == expected
    assert len(resolved) == len(expected)
    for item in resolved:
        section, name = item.key.split(".")
        assert getattr(getattr(spec, section), name) == item.value
    assert build(JobSpec, plain(spec)) == spec  # plain data all through


def test_unread_data_still_gives_a_size(make):
    spec, size, time, _, findings = resolve(make.spec(), find("qwen3-0.6b"), make.unread(), make.gpu("t4"))
    assert size.fits
    assert time is None
    assert codes(findings) == {"size.assumed"}
    assert spec.train.max_length == 2048
    assert isinstance(spec.train.warmup_steps, int)
    steps = resolve(make.spec(train=TrainSpec(max_steps=50)), find("qwen3-0.6b"), make.unread(), make.gpu("t4"))
    assert steps[2] is not None  # so many steps take so long, roughly


def test_an_unknown_model_names_its_neighbours(make):
    with pytest.raises(InputError) as error:
        resolve(replace(make.spec(), model=ModelRef(id="qwen3-0.7b")), None, make.report(), make.cpu())
    assert error.value.code == "model.unknown"
    assert "Qwen/Qwen3-0.6B" in error.value.fix


def test_steps_and_what_follows_from_them(make):
    spec, *_ = resolve(
        make.spec(train=TrainSpec(epochs=3.0, effective_batch=8)), find("qwen3-0.6b"), make.report(1000, held=50),
        make.gpu("h100"),
    )  # fmt: skip
    total = math.ceil(950 / 8) * 3
    assert spec.train.warmup_steps == math.ceil(0.05 * total)
    assert 0 < spec.train.save_steps <= math.ceil(total / 10)
    assert spec.train.eval_steps == math.ceil(total / 5)


def test_separate_evaluation_data_takes_nothing_from_training(make):
    report = make.report(800, held=200)
    for source, steps in ((None, 600 / 8), ("eval.jsonl", 800 / 8)):
        task = make.spec(train=TrainSpec(effective_batch=8), eval=EvalSpec(source=source))
        spec, *_ = resolve(task, find("qwen3-0.6b"), report, make.gpu("h100"))
        assert spec.train.eval_steps == math.ceil(steps / 5)


# --- the knobs -----------------------------------------------------------------------------------------------------


def test_checkpointing_only_where_it_does_not_fit_without(make):
    report = make.report(p95=1800, most=4000)
    roomy = resolve(make.spec(), find("llama-3.1-8b"), report, make.gpu("h100"))[1]
    tight = resolve(make.spec(), find("llama-3.1-8b"), report, make.gpu("l40s", 24))[1]
    assert (roomy.fits, roomy.activation_checkpointing) == (True, False)
    assert (tight.fits, tight.activation_checkpointing) == (True, True)


def test_a_model_too_large_says_what_would_fit(make):
    task = make.spec(adapter=AdapterSpec(kind="lora"))
    _, size, _, _, findings = resolve(task, find("llama-3.1-8b"), make.report(), make.gpu("rtx3060"))
    (finding,) = [item for item in findings if item.level == "error"]
    assert not size.fits
    assert finding.code == "size.does_not_fit"
    assert "12.0 GiB" in finding.message
    assert "meta-llama/Llama-3.2-3B" in finding.fix
    assert "a device with" in finding.fix


def test_what_would_fit_does_fit(make):
    report, card = make.report(p95=1500, most=3000), make.gpu("l40s", 24)
    task = make.spec(train=TrainSpec(micro_batch=16, effective_batch=16, activation_checkpointing=False))
    _, size, _, _, findings = resolve(task, find("llama-3.1-8b"), report, card)
    assert not size.fits
    (finding,) = findings
    first = finding.fix.removeprefix("This would fit: ").partition("; ")[0]
    assert "(same result, " in first
    changes = {name: json.loads(value) for name, value in re.findall(r"train\.(\w+)=(\w+)", first)}
    better = replace(task, train=replace(task.train, **changes))
    assert resolve(better, find("llama-3.1-8b"), report, card)[1].fits
    need = int(finding.fix.rsplit("a device with ", 1)[1].split()[0])
    assert resolve(task, find("llama-3.1-8b"), report, make.gpu("l40s", need))[1].fits


def test_full_training_that_does_not_fit_offers_an_adapter(make):
    task = make.spec(adapter=AdapterSpec(kind="none"))
    _, size, _, _, findings = resolve(task, find("qwen3-1.7b"), make.report(), make.gpu("rtx3060"))
    assert not size.fits
    assert size.rank is None
    assert "adapter.kind=lora" in findings[0].fix


def test_processes_on_one_cpu_share_its_memory_and_its_cores(make):
    facts, report = find("qwen3-1.7b"), make.report()
    train = TrainSpec(micro_batch=1, dtype="float32")
    task = make.spec(train=train, adapter=AdapterSpec(kind="lora"), hardware={"processes": 3})
    _, alone, time, *_ = resolve(replace(task, hardware="cpu"), facts, report, make.cpu(16))
    _, size, shared, _, findings = resolve(task, facts, report, make.cpu(16))
    assert (alone.fits, alone.device_bytes) == (True, 16 * GIB)
    assert (size.fits, size.device_bytes) == (False, 16 * GIB // 3)
    assert shared.seconds.expected >= time.seconds.expected
    (finding,) = findings
    assert "16.0 GiB, for 3 processes" in finding.message
    assert "hardware.processes=1" in finding.fix
    need = int(finding.fix.rsplit("a device with ", 1)[1].split()[0])
    assert resolve(task, facts, report, make.cpu(need))[1].fits
    capped = replace(task, limits=Limits(memory_gb=9))
    assert resolve(capped, facts, report, make.cpu(16))[1].device_bytes == 3 * GIB


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_each_gpu_has_its_own_memory_and_a_part_of_every_step(make, method):
    facts, report, card = find("qwen3-1.7b"), make.report(100_000), make.gpu("h100")
    task = make.spec(method=method, train=TrainSpec(effective_batch=32, micro_batch=2))
    times = []
    for count in (1, 2, 4):
        _, size, time, _, findings = resolve(replace(task, hardware={"gpus": count}), facts, report, card)
        assert (size.fits, size.device_bytes, findings) == (True, card.memory_bytes, [])
        times.append(time.seconds.expected)
    assert times[0] / 2 < times[1] < times[0]
    assert times[0] / 4 < times[2] < times[1]


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_a_step_is_cut_so_that_no_process_is_left_without_work(make, method):
    facts, report, card = find("qwen3-0.6b"), make.report(), make.gpu("h100")
    task = make.spec(method=method, train=TrainSpec(effective_batch=8, packing=False))
    alone, shared = (resolve(replace(task, hardware={"gpus": count}), facts, report, card) for count in (1, 4))
    assert alone[1].micro_batch > shared[1].micro_batch == 2
    assert "4 processes" in next(item.why for item in shared[3] if item.key == "train.micro_batch")


def test_a_memory_cap_is_kept(make):
    task = make.spec(limits=Limits(memory_gb=2.0))
    _, size, _, _, findings = resolve(task, find("smollm2-135m"), make.report(), make.cpu(64))
    assert size.device_bytes == 2 * GIB
    assert size.fits
    assert size.peak_bytes.high <= 2 * GIB
    small = make.spec(limits=Limits(memory_gb=0.5))
    _, size, _, _, findings = resolve(small, find("smollm2-135m"), make.report(), make.cpu(64))
    assert not size.fits
    assert findings[0].where == "limits.memory_gb"


def test_a_base_in_4_bits_needs_its_package_and_a_device_it_knows(make, monkeypatch):
    task = make.spec(adapter=AdapterSpec(kind="qlora"))
    mac = Device(backend="elsewhere", hardware="Apple M4", kind="mps", memory_bytes=64 * GIB)
    *_, findings = resolve(task, find("qwen3-0.6b"), make.report(), mac)
    assert codes(findings, "error") == {"adapter.unavailable"}
    for device in (make.gpu("h100"), make.cpu(64)):
        spec, size, *_, findings = resolve(task, find("qwen3-0.6b"), make.report(), device)
        assert codes(findings, "error") == set()
        assert (spec.adapter.kind, size.quantization) == ("qlora", "nf4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    *_, findings = resolve(task, find("qwen3-0.6b"), make.report(), make.gpu("h100"))
    assert codes(findings, "error") == {"adapter.unavailable"}
    assert "bitsandbytes" in findings[0].message


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_a_base_in_4_bits_is_taken_where_nothing_else_fits(make, where):
    device = make.gpu("h100", 12) if where == "cuda" else make.cpu(16)
    spec, size, _, resolved, findings = resolve(make.spec(), find("llama-3.1-8b"), make.report(), device)
    assert size.fits
    assert (spec.adapter.kind, size.quantization) == ("qlora", "nf4")
    assert "4 bits" in next(item.why for item in resolved if item.key == "adapter.kind")
    kept = make.spec(adapter=AdapterSpec(kind="lora"))
    *_, findings = resolve(kept, find("llama-3.1-8b"), make.report(), device)
    assert "adapter.kind=qlora" in next(item.fix for item in findings if item.code == "size.does_not_fit")


def test_the_8bit_optimizer_needs_a_device_it_knows(make):
    task = make.spec(adapter=AdapterSpec(kind="none"), train=TrainSpec(optimizer="adamw-8bit"))
    mac = Device(backend="elsewhere", hardware="Apple M4", kind="mps", memory_bytes=64 * GIB)
    *_, findings = resolve(task, find("smollm2-135m"), make.report(), mac)
    assert codes(findings, "error") == {"train.unavailable"}
    *_, findings = resolve(task, find("smollm2-135m"), make.report(), make.cpu())
    assert codes(findings, "error") == set()
    remote = replace(make.gpu("h100"), backend="hf-jobs")
    _, size, _, _, findings = resolve(task, find("smollm2-135m"), make.report(), remote)
    assert codes(findings) == set()
    assert size.parts["optimizer"] == 2 * size.trainable
    tight = replace(make.gpu("h100", 30), backend="hf-jobs")  # 1.7 B: 16 bytes a parameter do not fit, 10 do
    spec, size, *_ = resolve(make.spec(adapter=AdapterSpec(kind="none")), find("qwen3-1.7b"), make.report(), tight)
    assert size.fits
    assert spec.train.optimizer == "adamw-8bit"


def test_float16_only_where_float32_does_not_fit(make):
    small = resolve(make.spec(), find("qwen3-0.6b"), make.report(), make.gpu("t4"))[0]
    spec, size, _, resolved, _ = resolve(make.spec(), find("qwen3-4b"), make.report(), make.gpu("t4"))
    assert small.train.dtype == "float32"
    assert size.fits
    assert spec.train.dtype == "float16"
    assert "no bfloat16" in next(item.why for item in resolved if item.key == "train.dtype")
    task = make.spec(adapter=AdapterSpec(kind="lora"))
    overflows = resolve(task, find("gemma-3-4b-it"), make.report(), make.gpu("t4"))
    assert overflows[0].train.dtype == "float32"
    assert not overflows[1].fits


def test_float16_needs_a_gpu(make):
    task = make.spec(train=TrainSpec(dtype="float16"))
    (finding,) = resolve(task, find("qwen3-0.6b"), make.report(), make.cpu())[4]
    assert (finding.level, finding.where) == ("error", "train.dtype")
    assert resolve(task, find("qwen3-0.6b"), make.report(), make.gpu("h100"))[4] == []


def test_early_stopping_needs_rows_to_evaluate_on(make):
    task, facts, card = make.spec(train=TrainSpec(early_stopping=2)), find("qwen3-0.6b"), make.gpu("h100")
    blind, unread = replace(task, eval=EvalSpec(fraction=0)), make.unread()
    for spec, report in ((blind, make.report()), (task, make.report(1)), (blind, unread)):
        assert "train.early_stopping" in codes(resolve(spec, facts, report, card)[4], "error")
    apart = replace(task, eval=EvalSpec(fraction=0, source="eval.jsonl"))
    for spec, report in ((task, make.report(held=5)), (apart, make.report(held=5)), (task, unread), (apart, unread)):
        assert codes(resolve(spec, facts, report, card)[4], "error") == set()


def test_warnings(make):
    facts, report = find("Qwen/Qwen2.5-Math-1.5B"), make.report(most=9000)
    *_, findings = resolve(make.spec(train=TrainSpec(max_length=8192)), facts, report, make.gpu("h100"))
    assert codes(findings) == {"train.beyond_context"}
    spec, *_, findings = resolve(make.spec(), facts, report, make.gpu("h100"))
    assert codes(findings) == {"train.rows_too_long"}
    assert spec.train.max_length == 1600  # four times what 95 % of rows have
    *_, findings = resolve(
        make.spec(train=TrainSpec(micro_batch=64, effective_batch=8)), facts, make.report(), make.gpu("h100")
    )
    assert codes(findings) == {"train.micro_batch_unused"}


def test_targets(make):
    facts = find("qwen3-0.6b")
    wrong = make.spec(adapter=AdapterSpec(targets=("query_key_value",)))
    *_, findings = resolve(wrong, facts, make.report(), make.gpu("h100"))
    assert codes(findings, "error") == {"adapter.targets"}
    usual = resolve(make.spec(), facts, make.report(), make.gpu("h100"))[1]
    for names in (("all-linear",), tuple(f"mlp.{name}" for name in facts.linears)):
        _, size, _, _, findings = resolve(
            make.spec(adapter=AdapterSpec(targets=names)), facts, make.report(), make.gpu("h100")
        )
        assert not findings
        assert size.trainable == usual.trainable


@pytest.mark.parametrize(
    "method, extra", [("dpo", {"dpo": DpoSpec()}), ("grpo", {"grpo": GrpoSpec(max_completion=512)})]
)
def test_other_methods_need_more(make, method, extra):
    train = TrainSpec(micro_batch=4, packing=False)
    facts, report, card = find("qwen3-0.6b"), make.report(), make.gpu("h100")
    plain_size = resolve(make.spec(train=train), facts, report, card)[1]
    spec, size, _, _, _ = resolve(make.spec(train=train, method=method, **extra), facts, report, card)
    assert size.peak_bytes.expected > plain_size.peak_bytes.expected
    assert spec.train.learning_rate < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_fitted_and_timed(make, method):
    facts, report = find("smollm2-135m"), make.report(rows=400, held=20)
    task = make.spec(method=method, grpo=GrpoSpec(max_completion=64), distill=DistillSpec(max_completion=64))
    teacher = find("smollm2-360m") if method == "distill" else None
    spec, size, time, _, findings = resolve(task, facts, report, make.cpu(backend="ray"), teacher)
    assert size.fits
    assert codes(findings, "error") == set()
    assert time.seconds.low < time.seconds.expected < time.seconds.high
    assert spec.train.packing is (method in ("sft", "dpo", "grpo"))
    written = 64 if method in SAMPLED else 0
    assert spec.train.max_length == 640 + written  # the longest row has 600 tokens
    assert ("rollout" in size.parts) == (method in SAMPLED)
    assert ("other_model" in size.parts) == (method == "distill")
    made = spec.train.effective_batch * (8 if method == "rloo" else 1)  # whose micro-batches count answers
    assert made % spec.train.micro_batch == 0 or method in ("sft", "dpo", "grpo")
    assert size.grad_accum == math.ceil(made / spec.train.micro_batch)


def test_groups_take_a_step_of_some_64_answers(make):
    task = make.spec(method="grpo", grpo=GrpoSpec(num_generations=16, num_iterations=2))
    spec, _, _, resolved, _ = resolve(task, find("qwen3-0.6b"), make.report(1000), make.gpu("h100"))
    assert spec.train.effective_batch == 4
    assert spec.train.eval_steps == math.ceil(250 * 2 / 5)  # two optimizer steps for each four prompts
    assert "4 prompts with 16 answers" in next(item.why for item in resolved if item.key == "train.effective_batch")


def test_answers_that_share_their_prompt_need_less(make):
    facts, report, card = find("qwen3-0.6b"), make.report(), make.cpu(64)  # a GPU waits for launches here
    sizes, times = {}, {}
    for packing in (True, False):
        train = TrainSpec(micro_batch=2, effective_batch=8, packing=packing)
        task = make.spec(method="grpo", train=train, grpo=GrpoSpec(max_completion=64))
        _, sizes[packing], times[packing], *_ = resolve(task, facts, report, card)
    assert sizes[True].peak_bytes.expected < sizes[False].peak_bytes.expected
    assert times[True].seconds.expected < times[False].seconds.expected


def test_a_reference_costs_what_it_must(make):
    """An adapter is switched off for it; full training holds a copy for GRPO, and fills a table for DPO."""
    facts, report, card = find("qwen3-0.6b"), make.report(), make.gpu("h100")

    def needs(kind, method, **more):
        train = TrainSpec(micro_batch=1, effective_batch=8)
        task = make.spec(method=method, adapter=AdapterSpec(kind=kind), train=train, **more)
        _, size, time, *_ = resolve(task, facts, report, card)
        return size.parts, time.seconds.expected

    for kind in ("lora", "none"):
        without, quick = needs(kind, "grpo")
        with_, slow = needs(kind, "grpo", grpo=GrpoSpec(beta=0.04))
        assert with_.get("other_model", 0) == (4 * facts.params if kind == "none" else 0)
        assert "other_model" not in without
        assert slow > quick
        table, slow = needs(kind, "dpo")
        free, quick = needs(kind, "dpo", dpo=DpoSpec(reference="none"))
        assert table == free
        assert slow > quick


def test_what_trl_cannot_do_is_refused(make):
    facts, report, card = find("qwen3-0.6b"), make.report(), replace(make.gpu("h100"), backend="ray")
    packed = make.spec(method="kto", train=TrainSpec(packing=True))
    assert codes(resolve(packed, facts, report, card)[4], "error") == {"train.unavailable"}
    for train in (TrainSpec(micro_batch=1), TrainSpec(effective_batch=1)):
        (finding,) = resolve(make.spec(method="kto", train=train), facts, report, card)[4]
        assert (finding.level, finding.code) == ("error", "kto.batch")
        assert "2 or more" in finding.fix


@pytest.mark.parametrize("method, effective, micro, taken", [("kto", 13, 4, 13), ("rloo", 10, 7, 5), ("kto", 12, 4, 4)])
def test_memory_is_planned_for_the_micro_batches_that_trl_takes(make, method, effective, micro, taken):
    """Of 13 rows nothing but 13 is an equal share of two or more."""
    facts, report, card = find("qwen3-0.6b"), make.report(), replace(make.gpu("h100"), backend="ray")
    own = {"method": method, "grpo": GrpoSpec(num_generations=2, max_completion=64)}
    rows = effective // 2 if method == "rloo" else effective

    def fitted(micro):
        return resolve(make.spec(train=TrainSpec(effective_batch=rows, micro_batch=micro), **own), facts, report, card)

    spec, size, _, resolved, _ = fitted(micro)
    assert trl_plan.micro_batch(spec) == size.micro_batch == taken
    assert spec.train.micro_batch == micro
    assert size.grad_accum == effective // taken
    assert size.peak_bytes == fitted(taken)[1].peak_bytes
    said = [(item.value, f"where {micro} may" in item.why) for item in resolved if item.key == "train.micro_batch"]
    assert said == ([] if taken == micro else [(taken, True)])


def test_trl_must_be_installed_where_it_trains(make, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    facts, report, here = find("smollm2-135m"), make.report(), make.cpu(backend="local")
    assert codes(resolve(make.spec(method="kto"), facts, report, here)[4], "error") == {"method.unavailable"}
    assert codes(resolve(make.spec(method="dpo"), facts, report, here)[4], "error") == set()
    assert codes(resolve(make.spec(method="kto"), facts, report, make.cpu())[4], "error") == set()


def test_a_loss_that_sorts_pairs_wants_them_together(make):
    facts, report = find("qwen3-0.6b"), make.report()
    for loss, micro, found in (("aot", 2, {"dpo.micro_batch"}), ("aot", 8, set()), ("sigmoid", 2, set())):
        task = make.spec(
            method="dpo", dpo=DpoSpec(loss=loss), train=TrainSpec(micro_batch=micro, effective_batch=8)
        )  # fmt: skip
        assert codes(resolve(task, facts, report, make.gpu("h100"))[4]) == found


def test_mixtures_adapt_attention_alone(make):
    spec, size, *_ = resolve(make.spec(), find("qwen3-30b-a3b"), make.report(), make.gpu("h100"))
    assert spec.adapter.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert size.params == 30_532_122_624


# --- what holds for all --------------------------------------------------------------------------------------------

trains = st.builds(
    TrainSpec,
    epochs=st.floats(0.01, 10),
    max_steps=st.none() | st.integers(1, 10_000),
    learning_rate=st.just("auto") | st.floats(1e-7, 1e-2),
    warmup_steps=st.just("auto") | st.integers(0, 100),
    max_length=st.just("auto") | st.integers(8, 1 << 16),
    effective_batch=st.just("auto") | st.integers(1, 512),
    micro_batch=st.just("auto") | st.integers(1, 64),
    packing=st.just("auto") | st.booleans(),
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    optimizer=st.sampled_from(["auto", "adamw"]),
    activation_checkpointing=st.just("auto") | st.booleans(),
    save_steps=st.just("auto") | st.integers(1, 100),
    eval_steps=st.just("auto") | st.integers(1, 100),
)
adapters = st.builds(
    AdapterSpec,
    kind=st.sampled_from(["auto", "lora", "dora", "qlora", "none"]),
    rank=st.just("auto") | st.integers(1, 1024),
    alpha=st.just("auto") | st.floats(0.1, 512),
    targets=st.just("auto") | st.just(("q_proj", "v_proj")),
)
models = st.sampled_from([model for model in known() if model.params < 80e9])
rows = st.integers(1, 10**7)


@settings(deadline=None)
@given(trains, adapters, models, rows, st.integers(1, 4000), st.floats(1, 200), st.booleans())
def test_what_the_user_set_never_changes(make, train, adapter, model, count, length, gib, gpu):
    device = make.gpu("h100", gib) if gpu else make.cpu(gib)
    asked = make.spec(train=train, adapter=adapter)
    spec, size, time, _, findings = resolve(asked, model, make.report(count, length, length * 2, length * 3), device)
    for given_part, part in ((asked.train, spec.train), (asked.adapter, spec.adapter)):
        for item in fields(part):
            before, after = getattr(given_part, item.name), getattr(part, item.name)
            assert after != "auto"
            assert before in ("auto", after)
    effective, micro = spec.train.effective_batch, spec.train.micro_batch
    assert size.micro_batch == micro
    assert size.grad_accum == max(1, math.ceil(effective / micro))
    if train.micro_batch == "auto":
        assert micro <= effective
    assert size.fits == ("size.does_not_fit" not in codes(findings))
    assert size.fits == (size.peak_bytes.high <= {"cuda": 0.95, "cpu": 0.85}[device.kind] * device.memory_bytes)
    assert time is None or 0 < time.seconds.low <= time.seconds.expected <= time.seconds.high
    assert spec.train.save_steps >= 1
    assert replace(spec, train=asked.train, adapter=asked.adapter) == asked


def test_resolving_is_quick_and_loads_nothing_heavy(make):
    code = "import sys, tunesmith.executors.kernel.sizing; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
