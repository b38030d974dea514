"""The search: quality before speed, speed before habit, and a reason for each knob."""

import pytest

from tunesmith.executors.kernel.catalogue import find
from tunesmith.executors.kernel.sizing import cards, reasons
from tunesmith.executors.kernel.sizing.search import search
from tunesmith.executors.kernel.sizing.settle import settle
from tunesmith.orchestrator.nouns import AdapterSpec, TrainSpec


def looked(make, model, device, report=None, **spec):
    job, _ = settle(make.spec(**spec), find(model), report or make.report(), device, None)
    found = search(job)
    return found, {key: why for key, (_, why) in reasons.of(job, found).items()}


def card(name):
    return cards.named(name).device("elsewhere")


def test_quality_comes_before_speed(make):
    """A base in 4 bits would leave room for larger micro-batches, without recomputing: it is not taken for that."""
    report = make.report(p95=1800, most=2000)
    found, why = looked(make, "llama-3.1-8b", card("4090"), report)
    packed, _ = looked(make, "llama-3.1-8b", card("4090"), report, adapter=AdapterSpec(kind="qlora"))
    assert (found.best.knobs.kind, found.best.knobs.checkpointing) == ("lora", True)
    assert packed.fits
    assert all(one.knobs.kind == "lora" for one in found.fitted)
    assert "GiB" in why["train.activation_checkpointing"]


def test_recomputing_is_chosen_where_it_is_faster(make):
    """A small model waits for launches: rather many rows, computed twice, than few."""
    report = make.report(p50=60, p95=90, most=100)
    train = TrainSpec(effective_batch=64, packing=False, max_length=100)
    found, why = looked(make, "qwen3-0.6b", make.gpu("h100", 3.2), report, train=train)
    best = found.best.knobs
    plain = max((one for one in found.fitted if not one.knobs.checkpointing), key=lambda one: one.rate)
    assert best.checkpointing
    assert best.rows > plain.knobs.rows
    assert found.best.rate > plain.rate
    assert "times as fast" in why["train.activation_checkpointing"]


def test_a_packed_micro_batch_that_is_too_large_gives_way_to_a_padded_one(make):
    """Packed, a micro-batch holds as many tokens as the longest sequence may have; padded, as the longest has."""
    report = make.report(2000, p50=100, p95=200, most=300)
    train = TrainSpec(max_length=32768, effective_batch=256)
    found, why = looked(make, "llama-3.1-8b", card("4090"), report, train=train, adapter=AdapterSpec(kind="lora"))
    assert found.fits
    assert not found.best.knobs.packing
    assert "32,768 tokens" in why["train.packing"] or "times as fast" in why["train.packing"]


@pytest.mark.parametrize(
    ("model", "on", "spec", "key", "said"),
    [
        ("llama-3.1-8b", "3060", {}, "adapter.kind", "in 16 bits the model needs up to "),
        ("llama-3.1-8b", "3060", {}, "train.micro_batch", "the most that fits, as "),
        ("llama-3.1-8b", "H200", {}, "train.micro_batch", "a whole step at once"),
        ("llama-3.1-8b", "H100", {}, "train.activation_checkpointing", "it fits without, 1."),
        ("qwen3-4b", "T4", {"adapter": AdapterSpec(kind="lora")}, "train.dtype", "in float32 it needs up to "),
        ("qwen3-1.7b", "5090", {"adapter": AdapterSpec(kind="none")}, "train.optimizer", "in 8 bits: in 32 it needs"),
        ("llama-3.1-8b", "3060", {"adapter": AdapterSpec(kind="lora")}, "train.micro_batch", "the fewest there can be"),
    ],
)
def test_each_reason_says_what_the_other_way_would_need(make, model, on, spec, key, said):
    train = TrainSpec(effective_batch=16)
    _, why = looked(make, model, card(on), make.report(2000, p95=700, most=800), train=train, **spec)
    assert said in why[key]


def test_of_plans_as_fast_the_one_with_most_rows_is_taken(make):
    """Where speed is foretold alike, as on a CPU, larger products are the safer guess."""
    found, _ = looked(make, "smollm2-135m", make.cpu(64), train=TrainSpec(effective_batch=16, max_length=512))
    assert found.best.knobs.rows == max(one.knobs.rows for one in found.fitted) == 4  # 2,048 tokens at once
