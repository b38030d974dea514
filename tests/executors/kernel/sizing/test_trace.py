"""Traced steps: how a depth follows from few layers, how a trace is kept, and that it agrees with what was measured."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tunesmith.executors.kernel.catalogue import from_config
from tunesmith.executors.kernel.sizing import trace as tracing
from tunesmith.executors.kernel.sizing.size import GIB, Layout, parts
from tunesmith.orchestrator.errors import InputError

WORKSPACE = 8_519_680  # of cuBLAS, overhead in the closed forms
ROOT = Path(__file__).resolve().parents[4]
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1408, "vocab_size": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip


def layout(config=LLAMA, **changes):
    facts = from_config("me/mine", config)
    kept = {"kind": "lora", "rank": 8, "targets": tuple(facts.linears), "dtype": "bfloat16", "tokens": 1536}
    return Layout(facts=facts, **{**kept, "longest": 512, "device": "cuda", **changes})


def request(config=LLAMA, *, packed=True, **changes):
    made = layout(config, **changes)
    return {
        "config": config, "kind": made.kind, "rank": made.rank, "targets": list(made.targets), "dtype": made.dtype,
        "tokens": made.tokens, "longest": made.longest, "checkpointing": made.checkpointing,
        "optimizer": made.optimizer, "head": made.head, "packed": packed,
    }  # fmt: skip


def step(layers, config=LLAMA, **changes):
    from tunesmith.executors.kernel.sizing import traced_step

    return traced_step.step(request(config, **changes), layers) | {"packed": True, "seconds": 0.0}


def test_layers_of_several_kinds_are_traced_until_they_come_again():
    assert tracing.depths({"num_hidden_layers": 80}) == (2, 3)
    assert tracing.depths({"num_hidden_layers": 2}) == (2, 2)
    assert tracing.depths({"num_hidden_layers": 6, "layer_types": ["a"] * 6}) == (2, 3)
    assert tracing.depths({"num_hidden_layers": 8, "layer_types": ["a", "b"] * 4}) == (2, 4)
    assert tracing.depths({"num_hidden_layers": 7, "layer_types": ["a", "a", "b"] * 2 + ["a"]}) == (3, 6)
    assert tracing.depths({"num_hidden_layers": 4, "layer_types": ["a", "a", "a", "b"]}) == (4, 4)


def test_every_phase_grows_by_as_much_with_every_layer():
    one = {"layers": 2, "peaks": {"forward": 100, "head": 130}, "reserved": 150, "expandable": 140, "seconds": 1.0}
    two = {"layers": 3, "peaks": {"forward": 110, "head": 132}, "reserved": 140, "expandable": 150, "seconds": 1.0}
    found = tracing.carried_on(one, two | {"packed": True}, 10)
    assert found.peaks == {"forward": 180, "head": 146}
    assert (found.live, found.reserved, found.expandable) == (180, 200, 198)


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}, {"model_type": 3, "num_hidden_layers": 2}])
def test_a_config_without_a_shape_is_an_error_before_anything_is_started(config):
    with pytest.raises(InputError) as caught:
        tracing.trace(config, layout())
    assert caught.value.code == "sizing.trace"


@pytest.mark.slow
def test_a_trace_is_made_in_its_own_process_and_kept(tmp_path):
    first = tracing.trace(LLAMA, layout(), cache=tmp_path)
    assert first.seconds > 0
    assert first.live == max(first.peaks.values()) <= first.expandable
    (kept,) = (tmp_path / "traces").iterdir()
    again = tracing.trace(LLAMA, layout(), cache=tmp_path)
    assert (again.seconds, again.peaks) == (0.0, first.peaks)
    nested = {"model_type": "outer", "text_config": LLAMA, "auto_map": {"AutoModel": "theirs.py"}}
    assert tracing.trace(nested, layout(), cache=tmp_path).peaks == first.peaks
    kept.write_text("{", encoding="utf-8")  # half a file is none
    with pytest.raises(InputError) as caught:
        tracing.trace(LLAMA, layout(), cache=tmp_path, timeout=0.01)
    assert "not done" in caught.value.why
    with pytest.raises(InputError, match="nonsense"):
        tracing.trace(LLAMA | {"model_type": "nonsense"}, layout(), cache=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "qlora", "none"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_depth_follows_from_two_and_three_layers(kind, checkpointing):
    """Six layers traced are what two and three foretell, and near what the closed forms say where those are exact."""
    changes = {"kind": kind, "checkpointing": checkpointing}
    found = tracing.carried_on(step(2, **changes), step(3, **changes), 6)
    whole = step(6, **changes)
    assert {phase: whole["peaks"][phase] for phase in found.peaks} == pytest.approx(found.peaks, rel=1e-3)
    assert found.expandable == pytest.approx(whole["expandable"], rel=0.15)  # pages of 20 MiB in half a GiB
    closed = sum(size for part, size in parts(layout(**changes)).items() if part != "overhead")
    if kind != "none" or not checkpointing:  # there autocast keeps a copy of every layer until the forward pass ends
        assert closed == pytest.approx(found.live - 2 * WORKSPACE, rel=0.05)


@pytest.mark.slow
def test_more_tokens_rank_and_layers_never_need_less():
    few = step(2)["peaks"]
    for more in (step(3), step(2, tokens=2048), step(2, rank=32)):
        assert all(more["peaks"][phase] >= few[phase] for phase in few)
    assert max(step(2, checkpointing=True)["peaks"].values()) < max(few.values())
    narrow, eight = step(2, kind="qlora"), step(2, optimizer="adamw-8bit", rank=64)
    assert narrow["peaks"]["forward"] < few["forward"]
    assert eight["peaks"]["optimizer"] < step(2, rank=64)["peaks"]["optimizer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("olmo2", {}),
    ],
)
def test_other_architectures_are_traced(model_type, more):
    from tunesmith.executors.kernel.sizing import traced_step

    config = {**LLAMA, "model_type": model_type, "num_hidden_layers": 2, **more}
    asked = {**request(), "config": config, "targets": ["q_proj", "v_proj"]}
    found = traced_step.step(asked, 2)
    assert found["peaks"]["last"] > found["peaks"]["optimizer"] > 0
    reward = traced_step.step({**asked, "head": "none"}, 2)
    assert reward["peaks"]["head"] < found["peaks"]["head"]


@pytest.mark.slow
def test_what_cannot_be_packed_says_so_and_is_traced_padded():
    from tunesmith.executors.kernel.sizing import traced_step

    config = {**LLAMA, "model_type": "gemma2", "num_hidden_layers": 2}
    with pytest.raises(NotImplementedError, match="softcap"):
        traced_step.step(request(config), 2)
    scores = 8 * 512 * 512 * 3  # attention that holds them: of each head and each pair of positions, in three rows
    short = traced_step.step(request(config, packed=False, longest=128), 2)["peaks"]["forward"]
    assert traced_step.step(request(config, packed=False), 2)["peaks"]["forward"] > short + scores


@pytest.mark.slow
def test_a_tape_has_what_a_real_step_allocates():
    """The same two steps on a CPU, once under torch's profiler and once under a tape."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunesmith.executors.kernel.sizing.traced_tape import Tape

    shape = LlamaConfig(
        num_hidden_layers=3, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=352,
        vocab_size=1000,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(shape).float(), torch.zeros(2, 96, dtype=torch.int64)

    def steps(watch):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with watch:
            for _ in range(2):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    profiled = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    steps(profiled)
    now = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    tape = Tape("cpu")
    tape.hold([*model.parameters(), *model.buffers(), ids])
    before = tape.now
    tape.rewind()
    steps(tape)
    assert max(tape.peaks.values()) - before == pytest.approx(peak, rel=0.005)  # its sizes are in steps of 512 bytes
    assert tape.now == before


@pytest.fixture
def l40s(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("memory_l40s")
    yield module
    for name in ("memory_l40s", "reference_step", "measure"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA r16", "QLoRA", "full, fused"])
def test_live_peaks_of_trls_step(l40s, name):
    """facts/sizing.md 2.5: Llama-3.1-8B, B = 2, S = 2048."""
    (order, wanted) = next(item[1:] for item in l40s.LIVE if item[0] == name)
    found = max(l40s.reference.live_peaks("llama-3.1-8b", order).values()) / GIB
    assert found == pytest.approx(wanted, rel=0.02)


@pytest.mark.slow
def test_a_published_run_on_an_l40s(l40s):
    if not l40s.RUNS.exists():
        pytest.skip("the published runs are not here")
    run = l40s.runs()["lora--llama-3.2-3B-rank64"]
    assert abs(l40s.error(l40s.foretold(run, 705), run)) < 1.5
