"""What is said to fit does fit, and what is said to be the most is the most."""

import re
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.catalogue import find, known
from tunesmith.executors.kernel.sizing import cards, resolve
from tunesmith.orchestrator.nouns import AdapterSpec, DistillSpec, GrpoSpec, Limits, TrainSpec

models = st.sampled_from([model for model in known() if model.params < 80e9])


def spec_of(make, method, adapter, **train):
    own = {"grpo": GrpoSpec(max_completion=128), "distill": DistillSpec(max_completion=128)}
    return make.spec(method=method, adapter=adapter, train=TrainSpec(**train), **own)


def too_large(findings):
    return next((item for item in findings if item.code == "size.does_not_fit"), None)


def ways_of(finding):
    return finding.fix.removeprefix("This would fit: ").removesuffix(".").split("; ")


def applied(spec, way):
    """The spec with the settings that a way out names; None where it names another model or device."""
    changes = re.findall(r"(train|adapter|grpo|limits)\.(\w+)=([\w.-]+)", way.partition(" (")[0])
    if not changes or not way.startswith(changes[0][0]):
        return None
    for section, name, text in changes:
        value = {"true": True, "false": False}.get(text, int(text) if text.isdecimal() else text)
        spec = replace(spec, **{section: replace(getattr(spec, section), **{name: value})})
    return spec


@settings(deadline=None, max_examples=60)
@given(
    models,
    st.sampled_from(["sft", "dpo", "grpo"]),
    st.sampled_from(["auto", "lora", "dora", "qlora", "none"]),
    st.sampled_from(cards.CARDS),
    st.integers(16, 4000),
    st.just("auto") | st.integers(1, 32),
    st.just("auto") | st.booleans(),
)
def test_every_way_out_is_one(make, facts, method, kind, card, length, rows, checkpointing):
    spec = spec_of(make, method, AdapterSpec(kind=kind), micro_batch=rows, activation_checkpointing=checkpointing)
    report, device = make.report(2000, length, 2 * length, 3 * length), card.device("elsewhere")
    *_, findings = resolve(spec, facts, report, device)
    finding = too_large(findings)
    assume(finding is not None)
    *ways, last = ways_of(finding)
    assert re.fullmatch(r"a device with \d+ GiB", last)
    for way in ways:
        changed = applied(spec, way)
        if changed is not None:
            assert resolve(changed, facts, report, device)[1].fits, way
        elif match := re.match(r"a card of (\d+) GB such as the ([\w ]+) \(", way):
            named = cards.named(match[2])
            assert (named.name, named.gb) == (match[2], int(match[1]))
            assert resolve(spec, facts, report, named.device("elsewhere"))[1].fits
        else:
            other = find(way.split(" ", 1)[0])
            adapter = AdapterSpec(kind="lora") if "adapter.kind=lora" in way else spec.adapter
            loose = TrainSpec() if "=auto" in way else spec.train
            assert resolve(replace(spec, adapter=adapter, train=loose), other, report, device)[1].fits, way


def test_the_longest_length_named_is_the_longest_that_fits(make):
    facts, card = find("qwen3-32b"), cards.named("4090").device("elsewhere")
    report = make.report(2000, p95=3000, most=4000)
    spec = make.spec(adapter=AdapterSpec(kind="qlora"))
    *_, findings = resolve(spec, facts, report, card)
    most = int(re.search(r"train\.max_length=(\d+) \(the largest that fits", findings[0].fix)[1])
    for length, fits in ((most, True), (most + 64, False)):
        there = replace(spec, train=TrainSpec(max_length=length))
        assert resolve(there, facts, report, card)[1].fits is fits


def test_undoing_what_costs_nothing_comes_first(make):
    """Whatever else is named, the person may have the same result for it."""
    spec = spec_of(make, "sft", AdapterSpec(kind="lora"), micro_batch=16, activation_checkpointing=False)
    *_, findings = resolve(spec, find("llama-3.1-8b"), make.report(2000, p95=900, most=1000), make.gpu("l40s", 24))
    first, *rest = ways_of(too_large(findings))
    assert re.match(r"train\.\w+=\w+( with train\.\w+=\w+)? \(same result, up to", first)
    assert any(way.startswith("adapter.kind=qlora") for way in rest)


def test_what_is_written_may_be_shorter_or_fewer(make):
    facts, card = find("qwen3-4b"), cards.named("4090").device("elsewhere")
    spec = make.spec(method="grpo", grpo=GrpoSpec(max_completion=1024), adapter=AdapterSpec(kind="qlora"))
    ways = ways_of(too_large(resolve(spec, facts, make.report(2000), card)[4]))
    keys = {way.partition("=")[0] for way in ways}
    assert "train.effective_batch" in keys
    assert "train.max_length" not in keys


def test_a_cap_may_be_raised(make):
    spec = make.spec(limits=Limits(memory_gb=1.0))
    finding = too_large(resolve(spec, find("qwen3-0.6b"), make.report(), make.cpu(16))[4])
    assert finding.where == "limits.memory_gb"
    assert ways_of(finding)[0].startswith("limits.memory_gb=16 (all that cpu has, up to ")


def test_settings_go_together_where_none_does_alone(make):
    spec, facts = make.spec(adapter=AdapterSpec(kind="lora", rank=64)), find("qwen3-32b")
    card, report = cards.named("4090").device("elsewhere"), make.report(2000, p95=3000, most=4000)
    first = ways_of(too_large(resolve(spec, facts, report, card)[4]))[0]
    assert re.match(r"adapter\.kind=qlora with (adapter\.rank|train\.max_length)=", first)
    assert resolve(applied(spec, first), facts, report, card)[1].fits
    alone = replace(spec, adapter=AdapterSpec(kind="qlora", rank=64))
    assert not resolve(alone, facts, report, card)[1].fits
