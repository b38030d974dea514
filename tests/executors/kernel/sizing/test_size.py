"""Bytes: what follows from the shapes exactly, and what must never fall when something grows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.catalogue import find, known
from tunesmith.executors.kernel.sizing.size import GIB, Layout, fits, live, parts, peak, saved_per_token, trainable

MODELS = [model for model in known() if model.params < 80e9]


def layout(**changes):
    facts = changes.pop("facts", find("qwen3-0.6b"))
    usual = {
        "kind": "lora",
        "rank": 16,
        "targets": tuple(facts.linears),
        "dtype": "bfloat16",
        "tokens": 2048,
        "longest": 512,
    }
    return Layout(facts=facts, **{**usual, **changes})


@st.composite
def layouts(draw):
    facts = draw(st.sampled_from(MODELS))
    names = tuple(facts.linears)
    tokens = draw(st.integers(8, 1 << 17))
    return Layout(
        facts=facts,
        kind=draw(st.sampled_from(["lora", "dora", "qlora", "none"])),
        rank=draw(st.integers(1, 1024)),
        targets=names[: draw(st.integers(1, len(names)))],
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        tokens=tokens,
        longest=draw(st.integers(8, tokens)),
        checkpointing=draw(st.booleans()),
        optimizer=draw(st.sampled_from(["adamw", "adamw-8bit"])),
        device=draw(st.sampled_from(["cpu", "cuda"])),
        head=draw(st.sampled_from(["loss", "logps", "tiled", "none"])),
        branched=draw(st.integers(0, tokens)),
        looked=draw(st.integers(0, tokens)),
        slots=draw(st.sampled_from([0, 1, 64])),
        cached=draw(st.integers(0, 1 << 16)),
        copied=draw(st.booleans()),
        paged=draw(st.booleans()),
        beside=draw(st.sampled_from([0, 1 << 30])),
        packed=draw(st.booleans()),
        scored=draw(st.sampled_from([None, 8])),
        window=draw(st.sampled_from([0, 64])),
        answer=draw(st.sampled_from([0, 8])),
        alone=draw(st.booleans()),
    )


@settings(deadline=None)
@given(layouts(), st.integers(2, 4))
def test_memory_never_falls_when_something_grows(some, times):
    before = peak(some).expected
    most = peak(some.but(tokens=some.tokens * times)).expected
    assert most >= before if some.alone else most > before  # with few tokens the optimizer holds the most
    assert peak(some.but(longest=min(some.tokens, some.longest * times))).expected >= before
    assert peak(some.but(rank=some.rank * times)).expected >= before
    facts = some.facts
    for name in ("layers", "hidden", "intermediate", "vocabulary"):
        larger = replace(facts, params=0, **{name: getattr(facts, name) * times})
        assert peak(some.but(facts=larger)).expected > before, name
    assert peak(some.but(targets=tuple(facts.linears))).expected >= before
    for name in ("branched", "looked", "answer", "ahead", "slots", "cached", "beside"):
        if name in ("branched", "looked") and not (some.packed and some.branched):
            continue  # with the first one it is another kind of batch
        grown = some.but(**{name: getattr(some, name) * times + 1})
        assert peak(grown).expected >= before, name
    assert peak(some.but(copied=True)).expected >= before


@settings(deadline=None)
@given(layouts())
def test_the_parts_add_up_and_the_range_holds_them(some):
    sizes, found = parts(some), peak(some)
    usual = {"weights", "adapter", "optimizer", "gradients", "activations", "logits", "overhead"}
    more = {"rollout"} if some.slots else set()
    assert set(sizes) == usual | more | ({"other_model"} if some.beside else set())
    assert all(isinstance(size, int) and size >= 0 for size in sizes.values())
    assert sum(sizes.values()) == found.expected
    assert found.low <= found.expected <= found.high
    assert (found.unit, found.source) == ("bytes", "formula")


@settings(deadline=None)
@given(layouts(), st.integers(1, 200), st.integers(0, 200))
def test_what_fits_fits_into_more(some, gib, more):
    assert not fits(some, gib * GIB) or fits(some, (gib + more) * GIB)


@settings(deadline=None)
@given(layouts())
def test_the_savings_save(some):
    tokens = max(512, some.tokens)  # with fewer, recomputing may cost more than it saves
    plain = some.but(checkpointing=False, optimizer="adamw", dtype="bfloat16", tokens=tokens, alone=False)
    assert peak(plain.but(checkpointing=True)).expected <= peak(plain).expected
    assert peak(plain.but(optimizer="adamw-8bit")).expected < peak(plain).expected
    lora = plain.but(kind="lora", rank=8)
    assert parts(lora.but(kind="qlora"))["weights"] < parts(lora)["weights"]


def test_trainable_parameters_of_an_adapter():
    """r x (inputs + outputs) over seven layers of 28 blocks; the figure peft prints for Qwen3-0.6B at rank 16."""
    assert trainable(find("qwen3-0.6b"), "lora", 16, tuple(find("qwen3-0.6b").linears)) == 10_092_544
    assert trainable(find("llama-3.1-8b"), "lora", 16, ("q_proj", "v_proj")) == 6_815_744
    assert trainable(find("qwen3-0.6b"), "none", 16, ()) == 596_049_920
    gemma = find("gemma-3-4b-it")
    assert trainable(gemma, "none", 16, ()) == gemma.params - gemma.extra_params


def test_weights_by_kind():
    facts = find("llama-3.1-8b")
    assert parts(layout(facts=facts))["weights"] == 2 * facts.params
    assert parts(layout(facts=facts, dtype="float32"))["weights"] == 4 * facts.params
    full = parts(layout(facts=facts, kind="none"))
    assert full["weights"] == 4 * facts.params <= full["gradients"]  # and those of a matrix on their way
    assert full["optimizer"] == 8 * facts.params
    assert full["adapter"] == 0
    assert parts(layout(facts=facts, kind="qlora"))["weights"] == pytest.approx(5.3 * GIB, rel=0.02)


def test_saved_bytes_of_a_block():
    """12 h + 8 m + 4 a + 4 k + 2 r for each of seven targets + 4 heads + 8, in bfloat16 on a Llama."""
    facts = find("llama-3.2-1b")
    by_hand = 12 * 2048 + 8 * 8192 + 4 * 2048 + 4 * 512 + 2 * 16 * 7 + 4 * 32 + 8
    assert saved_per_token(layout(facts=facts, device="cuda")) == by_hand
    own = 2 * 2048  # documents attended one by one are put together anew for the output layer
    assert saved_per_token(layout(facts=facts, device="cuda", packed=False)) == by_hand
    raised = 4 * (2048 + 512)  # on a CPU attention runs in float32
    assert saved_per_token(layout(facts=facts, device="cpu")) == by_hand + own + raised
    assert saved_per_token(layout(facts=facts, device="cpu", packed=False)) == by_hand


def test_a_step_of_one_micro_batch_finds_no_gradients():
    """Its own grow as what is saved for them goes: the peak is less than both together."""
    full = layout(kind="none", tokens=256, longest=256)
    facts = full.facts
    alone = live(full.but(alone=True))
    assert alone["gradients"] + alone["activations"] + alone["logits"] >= 4 * facts.params
    assert sum(alone.values()) < sum(live(full).values())
    adapter = layout(tokens=4096)
    less = sum(live(adapter).values()) - sum(live(adapter.but(alone=True)).values())
    assert 0 < less <= 4 * trainable(facts, "lora", 16, adapter.targets)


def test_masks_of_windows_and_forks():
    """A window's mask is kept for every layer, as wide as a sequence; a fork's lies with its batch, once."""
    facts = find("llama-3.2-1b")
    some = layout(facts=facts, tokens=2048, longest=1024)
    more = sum(live(some.but(window=512)).values()) - sum(live(some).values())
    assert facts.layers * 4 * 2048 * 1024 <= more < (facts.layers + 3) * 4 * 2048 * 1024 + 10 * 1024**2
    assert live(some.but(window=1024)) == live(some)
    forked = some.but(branched=1000, looked=2096, head="logps")
    more = sum(live(forked.but(answer=500, ahead=6, trees=2)).values()) - sum(live(forked.but(trees=2)).values())
    assert more == 4 * 8 * 500 * 1024


def test_what_writes_holds_a_copy_of_the_adapted_layers():
    """Qwen3-0.6B: a token's keys and values are 2 x 28 x 8 x 128 numbers, written before anything is trained."""
    facts = find("qwen3-0.6b")
    few, many = layout(facts=facts, slots=64, cached=64 * 256), layout(facts=facts, slots=256, cached=256 * 65_536)
    blocks = 28 * sum(inputs * outputs for inputs, outputs in facts.linears.values())
    assert parts(few)["rollout"] == 0  # less than training holds a little later
    assert parts(few.but(copied=True))["rollout"] == 2 * blocks
    assert parts(few.but(copied=True, targets=("q_proj",)))["rollout"] == 2 * 28 * 1024 * 2048
    full = few.but(kind="none", copied=True)
    assert parts(full)["rollout"] == 2 * (blocks + 151_936 * 1024)
    assert parts(full.but(dtype="float32"))["rollout"] == 0
    sizes = parts(many)
    moving = sizes["activations"] + sizes["logits"] + sizes["gradients"]
    prompts = 2 * 1024 * (3 * 3072 + 4 * 1024)  # on their way through the model
    assert sizes["rollout"] + moving == 2 * (2 * 28 * 8 * 128) * many.cached + 10 * 151_936 * 256 + prompts
    assert parts(few.but(paged=True))["rollout"] == 2 * (2 * 28 * 8 * 128) * few.cached  # pages are kept
    assert "rollout" not in parts(layout(facts=facts))


def test_trl_holds_a_tile_of_logits():
    """Its head scores every position, up to 4,096 by 32,768 at a time; on a CPU it makes many copies of them."""
    facts = find("smollm2-135m")
    some = layout(facts=facts, head="tiled", dtype="float32", device="cpu", tokens=1000, checkpointing=True)
    assert parts(some)["logits"] == 32 * 1000 * 32_768
    assert parts(some.but(tokens=8000))["logits"] == 32 * 4096 * 32_768
    assert parts(some.but(device="cuda", dtype="bfloat16", tokens=8000))["logits"] == 2 * 256 * 2**20


def test_a_reward_model_has_no_logits():
    assert parts(layout(head="none"))["logits"] == 0
    some = layout(dtype="float32", tokens=128, checkpointing=True)
    words = 55 * 151_936  # rows of a chunk: 2**23 logits
    assert parts(some)["logits"] == 12 * words  # the last chunk's stay until the next are there
    assert parts(some.but(head="logps"))["logits"] == 12 * words
    assert parts(some.but(scored=55))["logits"] == 8 * words


def test_logits_are_held_for_a_chunk_only():
    small, large = (parts(layout(tokens=tokens, checkpointing=True)) for tokens in (256, 512))
    assert small["logits"] == large["logits"] < 0.2 * GIB
