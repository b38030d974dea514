"""What holds for every plan: what never changes, what never falls, and that nobody does better by hand."""

from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.catalogue import known
from tunesmith.executors.kernel.sizing import resolve, size
from tunesmith.executors.kernel.sizing.job import Knobs
from tunesmith.executors.kernel.sizing.search import AS_FAST, search
from tunesmith.executors.kernel.sizing.settle import settle
from tunesmith.orchestrator.nouns import AdapterSpec, DpoSpec, GrpoSpec, TrainSpec

MODELS = [model for model in known() if model.params < 80e9]
OURS = ("sft", "dpo", "grpo")
models = st.sampled_from(MODELS)
methods = st.sampled_from(OURS)
kinds = st.sampled_from(["lora", "dora", "qlora", "none"])
lengths = st.integers(16, 4000)
more = st.integers(1, 64)


def spec_of(make, method="sft", adapter=None, **train):
    own = {"dpo": {"dpo": DpoSpec()}, "grpo": {"grpo": GrpoSpec(max_completion=128)}}.get(method, {})
    return make.spec(method=method, adapter=adapter or AdapterSpec(), train=TrainSpec(**train), **own)


def report_of(make, count, length):
    return make.report(count, length, length * 2, length * 3)


def task(spec):
    """What a spec teaches: all of it but the knobs that leave the result as it is, or nearly so."""
    free = {"micro_batch": "auto", "packing": "auto", "activation_checkpointing": "auto", "optimizer": "auto"}
    steps = {"save_steps": "auto", "dtype": "auto"}
    train = replace(spec.train, **free, **steps)
    return replace(spec, adapter=replace(spec.adapter, kind="auto"), train=train)


# --- memory --------------------------------------------------------------------------------------------------------

knobs = st.builds(
    Knobs,
    kind=kinds,
    dtype=st.sampled_from(["float32", "bfloat16"]),
    optimizer=st.sampled_from(["adamw", "adamw-8bit"]),
    checkpointing=st.booleans(),
    packing=st.booleans(),
    rows=st.integers(1, 64),
)


@settings(deadline=None)
@given(models, methods, knobs, lengths, more, st.sampled_from(["rows", "length", "rank", "layers"]), st.booleans())
def test_memory_never_falls_when_anything_grows(make, facts, method, turned, length, grown, what, gpu):
    spec = spec_of(make, method, AdapterSpec(rank=grown), max_length=length + 200, effective_batch=256)
    device = make.gpu("h100") if gpu else make.cpu(64)
    job, _ = settle(spec, facts, report_of(make, 1000, 4000), device, None)
    if what == "rows":
        larger, there = job, replace(turned, rows=turned.rows + grown)
    elif what == "layers":
        larger, there = replace(job, facts=replace(facts, layers=facts.layers + grown, params=0)), turned
    else:
        larger, there = replace(job, **{what: getattr(job, what) + grown}), turned
    for high in (False, True):
        before, after = (size.peak(one.layout(how)) for one, how in ((job, turned), (larger, there)))
        assert (after.high >= before.high) if high else (after.expected >= before.expected)


# --- what never changes --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(models, methods, st.integers(1, 10**6), lengths, st.floats(1, 200), st.floats(1, 200), st.integers(1, 128))
def test_what_is_learnt_never_depends_on_the_memory(make, facts, method, count, length, one, other, batch):
    report = report_of(make, count, length)
    spec = spec_of(make, method, effective_batch=batch)
    (first, size_1, *_), (second, size_2, *_) = (
        resolve(spec, facts, report, make.gpu("h100", gib)) for gib in (one, other)
    )
    assert task(first) == task(second)
    for found in (size_1, size_2):
        assert found.micro_batch * (found.grad_accum - 1) < batch <= found.micro_batch * found.grad_accum


# --- larger cards --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(models, methods, kinds, st.floats(4, 100), st.floats(0, 100), lengths, st.integers(1, 10**6))
def test_a_larger_card_fits_what_a_smaller_one_does_and_is_as_fast(
    make, facts, method, kind, gib, added, length, count
):
    """Of cards that differ in nothing but their memory, and of plans that keep the same quality."""
    report, spec = report_of(make, count, length), spec_of(make, method, AdapterSpec(kind=kind))
    small, large = (
        search(settle(spec, facts, report, make.gpu("h100", memory), None)[0]) for memory in (gib, gib + added)
    )
    assume(small.fits)
    assert large.fits
    quality = [(one.best.knobs.kind, one.best.knobs.dtype, one.best.knobs.optimizer) for one in (small, large)]
    if quality[0] == quality[1]:
        assert large.best.rate >= AS_FAST * small.best.rate


# --- the best there is ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(models, methods, st.floats(6, 100), lengths, st.integers(1, 32), st.booleans(), st.booleans())
def test_nobody_does_better_by_hand(make, facts, method, gib, length, rows, checkpointing, packing):
    """A person who sets the knobs gets no faster plan of the same quality, by more than is foretold at all."""
    report, card = report_of(make, 2000, length), make.gpu("h100", gib)
    free = spec_of(make, method, effective_batch=32)
    by_hand = spec_of(
        make, method, effective_batch=32, micro_batch=rows, activation_checkpointing=checkpointing, packing=packing
    )
    best, hand = (search(settle(spec, facts, report, card, None)[0]) for spec in (free, by_hand))
    assume(hand.fits)
    assert best.fits
    mine, theirs = best.best.knobs, hand.best.knobs
    many = hand.best.layout.tokens > 32768  # where more rows are taken to be no faster
    if (mine.kind, mine.dtype, mine.optimizer) == (theirs.kind, theirs.dtype, theirs.optimizer) and not many:
        assert hand.best.rate * AS_FAST <= best.best.rate * 1.02  # rows that cut a step unevenly are not tried
