"""The integers of sizing/size.py counted again on the training loop itself, and its peaks against real allocations."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunesmith.executors.kernel.catalogue import ModelFacts, from_config
from tunesmith.executors.kernel.sizing.rows import Rows
from tunesmith.executors.kernel.sizing.size import Layout, live, parts, saved_per_token, trainable
from tunesmith.orchestrator.nouns import AdapterSpec, DataSource, GrpoSpec, JobSpec, ModelRef, TrainSpec

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[4]
CLOSE = 0.005  # what scratch of oneDNN's products in bfloat16 may add to a small model
SHAPES = {  # (hidden, layers, heads, key-value heads, head size, intermediate, rank)
    "narrow": (144, 2, 6, 2, 16, 320, 8),
    "wide": (288, 2, 4, 4, 48, 208, 24),
    "usual": (192, 2, 6, 2, 32, 672, 2),  # proportions of real models
}


def net(model_type, shape, kind, dtype, *, layers=None, checkpointing=False, vocabulary=64):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunesmith.executors.kernel.loops import model as loop

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden, usual, heads, kv_heads, head_dim, intermediate, rank = SHAPES[shape]
    config = AutoConfig.for_model(
        model_type, hidden_size=hidden, num_hidden_layers=layers or usual, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=intermediate, vocab_size=vocabulary,
        tie_word_embeddings=False, max_position_embeddings=4096, pad_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    facts: ModelFacts = from_config("me/mine", config.to_dict())
    full = kind == "none"
    half = dtype == "bfloat16" and not full
    module = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16 if half else torch.float32, trust_remote_code=False
    )
    spec = JobSpec(
        model=ModelRef(id="me/mine"),
        data=(DataSource(source="none"),),
        adapter=AdapterSpec(kind=kind, rank=rank, alpha=32.0, targets=tuple(facts.linears)),
        train=TrainSpec(dtype=dtype, activation_checkpointing=checkpointing),
    )
    return loop.ready(module, spec, torch.device("cpu")), facts, rank


def batch(tokens, documents=4, supervised=8):
    from tunesmith.executors.kernel.loops.batches import packed

    length = tokens // documents
    labels = [-100] * (length - supervised) + [1] * supervised
    rows = [SimpleNamespace(row=number, ids=[1] * length, labels=labels) for number in range(documents)]
    (found,) = packed(rows, tokens)
    return found


def saved(trained, tokens):
    """Bytes of distinct storages that autograd keeps, parameters left out."""
    import torch

    own = {weight.untyped_storage().data_ptr() for weight in trained.outer.parameters()}
    kept, found = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trained.summed_loss(batch(tokens))
    return sum(found.values())


@pytest.mark.parametrize("shape", ["narrow", "wide"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "dora", "none"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_the_tape_counts_what_autograd_keeps(model_type, kind, dtype, shape):
    """To the byte."""
    counts = {}
    for layers in (2, 4):
        trained, facts, rank = net(model_type, shape, kind, dtype, layers=layers)
        counts[layers] = saved(trained, 384) - saved(trained, 128)
    counted = (counts[4] - counts[2]) / 2 / 256
    layout = Layout(
        facts=facts, kind=kind, rank=rank, targets=tuple(facts.linears), dtype=dtype, tokens=256, longest=64
    )  # fmt: skip
    assert saved_per_token(layout) == pytest.approx(counted, rel=1e-9)


def peak_of(step):
    """The most bytes that c10's allocator had given out at a time while a step was taken, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    step()  # gradients are there from now on, as after the first micro-batch
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    live = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def moving(layout):
    """What comes and goes in a micro-batch, where gradients are there before it."""
    sizes = live(layout)
    before = 4 * trainable(layout.facts, layout.kind, layout.rank, layout.targets)
    return sizes["activations"] + sizes["logits"] + sizes["gradients"] - before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_the_peak_of_a_step_is_foretold(kind, dtype, checkpointing):
    """Live bytes over a forward and backward pass, against the moving parts of the formula."""
    tokens = 1024
    trained, facts, rank = net("llama", "usual", kind, dtype, layers=6, checkpointing=checkpointing)
    work = batch(tokens)
    most = peak_of(lambda: trained.summed_loss(work).backward())
    layout = Layout(
        facts=facts, kind=kind, rank=rank, targets=tuple(facts.linears), dtype=dtype, tokens=work.ids.numel(),
        longest=work.documents[0], scored=len(work.picks), checkpointing=checkpointing,
    )  # fmt: skip
    assert moving(layout) == pytest.approx(most, rel=CLOSE)


@pytest.mark.parametrize("prompt, answer", [(96, 32), (32, 96)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_a_step_over_pairs_is_foretold(dtype, checkpointing, prompt, answer):
    """The same for DPO, whose answers share their prompt and are cut out of the batch to look at it."""
    from tunesmith.executors.kernel.loops.dpo import Dpo
    from tunesmith.executors.kernel.loops.forks import Tree
    from tunesmith.executors.kernel.loops.method import Turn

    trained, facts, rank = net("llama", "usual", "lora", dtype, layers=6, checkpointing=checkpointing)
    trees = [Tree(number, [1] * prompt, ([2] * answer, [3] * answer)) for number in range(4)]
    length = prompt + answer
    spec = JobSpec(model=ModelRef(id="me/mine"), data=(DataSource(source="none"),), method="dpo")
    method = Dpo(trained, trees, spec.dpo, micro_batch=4, max_length=length, packing=True, pad_id=0)
    (work,) = method.batches(range(4), Turn(0, 0))
    most = peak_of(lambda: method.loss(work).backward())
    tokens = 4 * (prompt + 2 * (answer - 1))
    assert work.ids.numel() == tokens
    rows = Rows(spec=spec, length=length, packing=True, share=answer / length)
    assert tokens <= 4 * rows.budget()
    layout = Layout(
        facts=facts, kind="lora", rank=rank, targets=tuple(facts.linears), dtype=dtype, tokens=tokens, longest=length,
        checkpointing=checkpointing, head="logps", branched=tokens - 4 * prompt, looked=2 * 4 * prompt, trees=4,
        scored=len(work.picks), asked=False,
    )  # fmt: skip
    assert moving(layout) == pytest.approx(most, rel=CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_a_step_over_groups_is_foretold(dtype):
    """The same for GRPO's training pass: one prompt, eight answers."""
    from tunesmith.executors.kernel.loops.forks import Tree, forked

    trained, facts, rank = net("llama", "usual", "lora", dtype, layers=6)
    prompt, answer = 64, 48
    (work,) = forked([Tree(0, [1] * prompt, ([2] * answer,) * 8), Tree(1, [1] * prompt, ([2] * answer,) * 8)], 4096)
    most = peak_of(lambda: trained.token_logps(work)[0].sum().backward())
    tokens = 2 * (prompt + 8 * (answer - 1))
    assert work.ids.numel() == tokens
    layout = Layout(
        facts=facts, kind="lora", rank=rank, targets=tuple(facts.linears), dtype=dtype, tokens=tokens,
        longest=prompt + answer, head="logps", branched=tokens - 2 * prompt, looked=8 * 2 * prompt, trees=2,
        scored=len(work.picks), asked=False,
    )  # fmt: skip
    assert moving(layout) == pytest.approx(most, rel=CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_what_a_rollout_holds_is_foretold(kind, dtype):
    """Its copy of the weights to the byte, and what it holds while it writes."""
    from tunesmith.executors.kernel.loops.rollout import Ask, Rollout

    trained, facts, rank = net("llama", "usual", kind, dtype, layers=4, vocabulary=2048)
    prompt, answer, answers, prompts = 60, 16, 8, 4
    rollout = Rollout(
        trained, stops=frozenset(), max_completion=answer, temperature=1.0, slots=answers * prompts
    )  # fmt: skip
    asks = [Ask(number, [1] * prompt, range(answers)) for number in range(prompts)]
    most = peak_of(lambda: rollout.generate(asks, key="1:0"))
    spec = JobSpec(
        model=ModelRef(id="me/mine"), data=(DataSource(source="none"),), method="grpo",
        grpo=GrpoSpec(num_generations=answers, max_completion=answer),
    )  # fmt: skip
    rows = Rows(spec=spec, length=prompt + answer, packing=True, share=0.5)
    layout = Layout(
        facts=facts, kind=kind, rank=rank, targets=tuple(facts.linears), dtype=dtype, tokens=1, longest=8,
        slots=rows.slots(prompts, "cpu"), cached=rows.cached(prompts, "cpu", dtype),
    )  # fmt: skip
    assert (rollout.way, rollout.problems) == ("cells", ())
    copied = parts(layout.but(copied=True))["rollout"] - parts(layout)["rollout"]
    assert copied == rollout.merged.own_bytes
    sizes = parts(layout)
    held = sizes["rollout"] + sizes["activations"] + sizes["logits"] + sizes["gradients"]
    if kind == "none":  # gradients of all weights outweigh it later; autocast keeps what it casts meanwhile
        assert held >= 0.75 * most - rollout.merged.own_bytes
    else:
        assert held == pytest.approx(most, rel=0.25)


@pytest.fixture
def memory_cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("memory_cpu")
    for name in ("memory_cpu", "measure"):
        sys.modules.pop(name, None)


def test_the_live_bytes_of_whole_jobs_are_foretold(memory_cpu, monkeypatch, tmp_path):
    """The short form of benchmarks/memory_cpu.py, with its bounds: the engine's own steps, each job by itself."""
    monkeypatch.setattr(memory_cpu, "KEPT", tmp_path / "counts.jsonl")
    names = ("llama-sft-lora-float32", "mistral-sft-lora-bfloat16", "qwen3-dpo-none", "llama-grpo-lora-bfloat16")
    found = memory_cpu.measure([cell for cell in memory_cpu.cells() if cell.name.startswith(names)])
    assert found["cells"] == len(names)
    assert found["mean_abs_error_percent"] <= 1.0
    assert found["max_abs_error_percent"] <= 3.0
