"""A base in 4 bits: peft's and bitsandbytes' numbers, nothing full kept, and every bit back after a resume."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.loops import adapter, quantised
from tunesmith.executors.kernel.loops import model as models
from tunesmith.executors.kernel.loops.batches import packed, padded
from tunesmith.orchestrator.errors import InputError

CPU = torch.device("cpu")
QLORA = {"kind": "qlora"}
WHOLE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture
def make_model(make_model):
    """As elsewhere, with rows of whole blocks."""
    return lambda family="llama", **more: make_model(family, **{**WHOLE, **more})


@pytest.fixture
def make_net(make_net):
    return lambda spec, family="llama", **more: make_net(spec, family, **{**WHOLE, **more})


def test_rows_of_broken_blocks_are_refused_on_a_cpu(make_net, make_spec):
    """bitsandbytes with AVX-512 reads them wrongly, without a word."""
    with pytest.raises(InputError) as caught:
        make_net(make_spec(adapter=QLORA), intermediate_size=96)
    assert caught.value.code == "adapter.qlora"
    assert "96" in caught.value.why


@pytest.fixture
def saved(make_model, tmp_path):
    make_model().save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


def narrow(net):
    """The 4-bit layers themselves; what wraps one answers for its weight too."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in net.causal.named_modules() if isinstance(module, Linear4bit)}


def gradients(net, batch):
    net.outer.zero_grad()
    loss = net.summed_loss(batch) / batch.weight
    loss.backward()
    return loss.item(), {name: item.grad.clone() for name, item in net.trainable()}


def fill(net):
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, item in net.trainable():
            if "lora_B" in name:
                item.copy_(torch.randn(item.shape, generator=draw) * 0.1)


def test_every_linear_layer_but_the_head_is_narrow_and_adapters_are_float32(make_net, make_spec):
    for tied in (True, False):
        net = make_net(make_spec(adapter=QLORA, dtype="bfloat16"), tie_word_embeddings=tied)
        assert len(narrow(net)) == 14
        for module in narrow(net).values():
            state = module.weight.quant_state
            assert (state.quant_type, state.nested, state.dtype) == ("nf4", True, torch.bfloat16)
        assert type(net.head) is torch.nn.Linear
        assert net.head.weight.dtype == torch.bfloat16
        assert net.causal.get_input_embeddings().weight.dtype == torch.bfloat16
        assert net.chunked
        assert net.autocast is None
        assert {item.dtype for _, item in net.trainable()} == {torch.float32}
        assert all("lora_" in name for name, _ in net.trainable())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_layer_computes_what_peft_and_bitsandbytes_compute(
    family, layout, make_net, make_spec, make_rows, monkeypatch
):
    rows = make_rows(4)
    batch = padded(rows, 4, 0)[0] if layout == "padded" else packed(rows, 200)[0]
    ours = gradients(make_net(make_spec(adapter=QLORA), family), batch)
    monkeypatch.setattr(adapter, "fuse", lambda model: 0)
    net = make_net(make_spec(adapter=QLORA), family)
    assert type(net.causal.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    theirs = gradients(net, batch)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert gradient.abs().max() > 1e-5, name
        assert (gradient - ours[1][name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
def test_gradients_are_those_of_the_dequantised_model(targets, make_net, make_model, make_spec, make_rows):
    batch = padded(make_rows(4), 4, 0)[0]
    net = make_net(make_spec(adapter={**QLORA, "targets": targets}))
    full = make_model()
    for name, module in narrow(net).items():
        plain = full.get_submodule(name.replace(".base_layer", ""))
        assert not torch.equal(plain.weight, quantised.dequantised(module))
        with torch.no_grad():
            plain.weight.copy_(quantised.dequantised(module))
    reference = models.ready(full, make_spec(adapter={"targets": targets}), CPU)
    fill(reference)
    ours, theirs = gradients(net, batch), gradients(reference, batch)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert gradient.abs().max() > 1e-5, name
        assert (gradient - ours[1][name]).abs().max() <= 1e-6, name


def test_quantising_while_reading_gives_the_same_bits(saved, make_net, make_spec):
    spec = make_spec(adapter=QLORA)
    read, made = models.load(saved, spec, CPU), make_net(spec)
    fill(read)
    assert read.causal.state_dict().keys() == made.causal.state_dict().keys()
    for name, item in made.causal.state_dict().items():
        assert torch.equal(read.causal.state_dict()[name], item), name
    assert narrow(read).keys() == narrow(made).keys()
    for name, module in narrow(made).items():
        assert torch.equal(quantised.dequantised(module), quantised.dequantised(narrow(read)[name]))


def test_dequantised_is_within_nf4_of_the_weight_and_a_copy(make_net, make_model, make_spec):
    net, full = make_net(make_spec(adapter=QLORA)), make_model()
    layer = net.causal.model.layers[0].mlp.up_proj
    weight = full.model.layers[0].mlp.up_proj.weight
    found = quantised.dequantised(layer)
    assert torch.equal(found, quantised.dequantised(layer.base_layer))
    assert found.shape == weight.shape
    assert 0 < (found - weight).abs().max() <= 0.16 * weight.abs().max()  # NF4's widest gap is 0.30, halved
    found.zero_()
    assert quantised.dequantised(layer).abs().max() > 0
    plain = make_net(make_spec()).causal.model.layers[0].mlp.up_proj
    assert quantised.dequantised(plain) is not plain.base_layer.weight
    assert torch.equal(quantised.dequantised(plain), plain.base_layer.weight)
    assert not quantised.dequantised(plain).requires_grad


def test_nothing_full_is_kept(make_net, make_spec, monkeypatch):
    """What a layer saves is x, x @ A.T and what it is made of; full weights die with the product they were read for."""
    net = make_net(make_spec(adapter=QLORA))
    layer = net.causal.model.layers[0].mlp.up_proj
    alive, usual = [], quantised.read

    def watched(packed, state):
        assert all(item() is None for item in alive)
        weight = usual(packed, state)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(quantised, "read", watched)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda item: saved.append(item) or item, lambda item: item):
        out = layer(torch.randn(7, 64, requires_grad=True))
        assert len(alive) == 1
    gc.collect()
    assert all(item() is None for item in alive)
    weight, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert sorted(tuple(item.shape) for item in saved) == sorted(
        tuple(shape) for shape in ((7, 64), (7, 4), weight.shape, a.shape, b.shape)
    )
    assert weight.dtype == torch.uint8
    assert weight.numel() == 128 * 64 // 2
    out.square().sum().backward()
    assert len(alive) == 2
    assert all(item() is None for item in alive)


def test_a_whole_step_holds_one_full_layer_at_a_time(make_net, make_spec, make_rows, monkeypatch):
    net = make_net(make_spec(adapter=QLORA))
    alive, usual = [], quantised.read

    def watched(packed, state):
        assert all(item() is None for item in alive)
        weight = usual(packed, state)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(quantised, "read", watched)
    gradients(net, padded(make_rows(4), 4, 0)[0])
    assert len(alive) == 2 * 14 - 3  # nothing before the first layer is trained


def test_a_switched_off_adapter_leaves_the_base_to_the_bit(make_net, make_spec, make_rows):
    net = make_net(make_spec(adapter=QLORA))
    net.outer.eval()
    batch = padded(make_rows(2), 2, 0)[0]
    with torch.no_grad():
        trained = net.logits(batch)
        with net.outer.disable_adapter():
            base = net.logits(batch)
        for name, item in net.trainable():
            if "lora_B" in name:
                item.zero_()
        assert torch.equal(net.logits(batch), base)
        assert not torch.allclose(trained, base, atol=1e-3)


def test_an_evaluation_between_steps_changes_nothing(make_net, make_spec, make_rows):
    """On some CPUs bitsandbytes repacks a weight in its first evaluation, for good."""
    net = make_net(make_spec(adapter={**QLORA, "targets": ("q_proj",)}))  # the others run in bitsandbytes' own layers
    assert not any(module.support_avx512bf16_for_cpu for module in narrow(net).values())
    batch = padded(make_rows(4), 4, 0)[0]
    before = gradients(net, batch)
    net.outer.eval()
    with torch.no_grad():
        net.summed_loss(batch)
    net.outer.train()
    after = gradients(net, batch)
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


@pytest.mark.parametrize("packing", [True, False])
def test_resume_is_bitwise(packing, make_bench, make_spec, make_rows):
    rows = make_rows(10)
    spec = make_spec(max_steps=5, save_steps=2, packing=packing, adapter=QLORA)
    whole = make_bench(spec, rows, name="whole")
    whole.engine.run()
    assert whole.series("train/loss")[5] < whole.series("train/loss")[1]
    rest = make_bench(spec, rows, name="rest")
    rest.engine.resume(checkpoint.newest_verified(whole.folder / "checkpoints").path)
    assert rest.engine.cursor.step == 4
    rest.engine.run()
    for name, item in whole.weights().items():
        assert torch.equal(item, rest.weights()[name]), name
    assert rest.series("train/loss")[5] == whole.series("train/loss")[5]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_plain_peft_loads_what_is_saved_on_a_base_in_4_bits(saved, make_spec, make_rows, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    net = models.load(saved, make_spec(adapter=QLORA), CPU)
    fill(net)
    net.outer.eval()
    adapter.save(net.outer, tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(saved, quantization_config=how, device_map={"": "cpu"})
    theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    for module in theirs.modules():
        module.support_avx512bf16_for_cpu = False  # with it an evaluation multiplies in bfloat16
    batch = padded(make_rows(2), 2, 0)[0]
    with torch.no_grad():
        wanted = theirs(input_ids=batch.ids).logits.reshape(-1, 97)[batch.picks]
        assert torch.allclose(wanted, net.logits(batch), atol=1e-5)
        with theirs.disable_adapter():
            base = theirs(input_ids=batch.ids).logits.reshape(-1, 97)[batch.picks]
    assert not torch.allclose(wanted, base, atol=1e-3)


def test_dropout_keeps_pefts_own_layers(make_net, make_spec, make_rows):
    net = make_net(make_spec(adapter={**QLORA, "dropout": 0.1}, dtype="bfloat16"))
    assert net.autocast == torch.bfloat16
    loss, found = gradients(net, padded(make_rows(4), 4, 0)[0])
    assert loss > 0
    assert all(torch.isfinite(item).all() for item in found.values())


def test_bfloat16_learns(make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(adapter=QLORA, dtype="bfloat16", packing=True, max_steps=12), make_rows(8))
    bench.engine.run()
    losses = bench.series("train/loss")
    assert losses[12] < 0.9 * losses[1]


def test_without_bitsandbytes_it_is_refused_in_words(saved, make_net, make_spec, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for attempt in (
        lambda: make_net(make_spec(adapter=QLORA)),
        lambda: models.load(saved, make_spec(adapter=QLORA), CPU),
    ):
        with pytest.raises(InputError) as caught:
            attempt()
        assert caught.value.code == "adapter.qlora"
        assert "bitsandbytes" in caught.value.why
        assert caught.value.fix


def quantised_file(make_model, folder, kind):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_model().save_pretrained(str(folder / "full"))
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder / "full", quantization_config=how, device_map={"": "cpu"})
    model.save_pretrained(str(folder / kind))
    return folder / kind


def test_weights_that_are_narrow_in_the_file_are_taken_as_they_are(make_model, make_spec, make_rows, tmp_path):
    folder = quantised_file(make_model, tmp_path, "nf4")
    net = models.load(folder, make_spec(adapter=QLORA), CPU)
    assert len(narrow(net)) == 14
    assert not any(module.weight.quant_state.nested for module in narrow(net).values())
    loss, found = gradients(net, padded(make_rows(4), 4, 0)[0])
    assert loss > 0
    assert len(found) == 28


def test_weights_quantised_in_another_way_are_refused_in_words(make_model, make_spec, tmp_path):
    folder = quantised_file(make_model, tmp_path, "fp4")
    with pytest.raises(InputError) as caught:
        models.load(folder, make_spec(adapter=QLORA), CPU)
    assert caught.value.code == "adapter.qlora"
    assert "NF4" in caught.value.why


LEAN = """
import ctypes, gc, pathlib, sys, threading, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
from tunesmith.executors.kernel.loops import model, quantised
torch.set_num_threads(1)
peak = [0]
def made(name, layers):
    folder = pathlib.Path(sys.argv[1], name)
    shape = dict(vocab_size=64, hidden_size=512, intermediate_size=2048, num_attention_heads=8)
    shape["num_hidden_layers"] = layers
    LlamaForCausalLM(LlamaConfig(**shape)).bfloat16().save_pretrained(folder, max_shard_size="30MB")
    return folder
def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024
def watch():
    while True:
        peak[0] = max(peak[0], held())
        time.sleep(0.002)
small, large = made("small", 1), made("large", 12)
model.read(small, "x", torch.float32, narrow=torch.device("cpu"))
gc.collect(); ctypes.CDLL(None).malloc_trim(0)
before = held()
threading.Thread(target=watch, daemon=True).start()
net = model.read(large, "x", torch.float32, narrow=torch.device("cpu"))
assert quantised.is_narrow(net.model.layers[0].mlp.up_proj)
print(peak[0] - before)
"""


@pytest.mark.slow
def test_reading_never_holds_the_full_model(tmp_path):
    """50 M parameters are 202 MB in float32 and 25 MB in 4 bits; quantising one layer takes some 15 MB."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    command = [sys.executable, "-P", "-W", "ignore", "-c", LEAN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 25e6 < int(done.stdout) < 70e6
