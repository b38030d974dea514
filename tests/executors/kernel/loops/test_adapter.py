"""Adapters: peft's format and numbers."""

import pytest
import torch

from tunesmith.executors.kernel.loops import adapter
from tunesmith.executors.kernel.loops.batches import padded
from tunesmith.orchestrator.errors import InputError


def gradients(net, batch):
    net.outer.zero_grad()
    loss = net.summed_loss(batch) / batch.weight
    loss.backward()
    return loss.item(), {name: item.grad.clone() for name, item in net.trainable()}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fused_layers_compute_what_peft_computes(family, make_net, make_spec, make_rows, monkeypatch):
    batch = padded(make_rows(4), 4, 0)[0]
    fused = gradients(make_net(make_spec(), family), batch)
    monkeypatch.setattr(adapter, "fuse", lambda model: 0)
    usual = gradients(make_net(make_spec(), family), batch)
    assert fused[0] == pytest.approx(usual[0], abs=1e-6)
    assert fused[1].keys() == usual[1].keys()
    for name, gradient in usual[1].items():
        assert (gradient - fused[1][name]).abs().max() <= 1e-6


def test_every_plain_layer_is_fused_and_others_are_not(make_net, make_spec, make_model):
    count = sum(isinstance(m, torch.nn.Linear) for m in make_model().model.modules())
    assert adapter.fuse(make_net(make_spec()).outer) == count == 14
    assert adapter.fuse(make_net(make_spec(adapter={"kind": "dora"})).outer) == 0
    assert adapter.fuse(make_net(make_spec(adapter={"dropout": 0.1})).outer) == 0


def test_a_switched_off_adapter_leaves_the_base(make_net, make_spec, make_model, make_rows):
    batch = padded(make_rows(2), 2, 0)[0]
    net = make_net(make_spec())
    net.outer.eval()
    base = make_model().eval()
    with torch.no_grad():
        wanted = base(input_ids=batch.ids).logits.reshape(-1, 97)[batch.picks]
        with net.outer.disable_adapter():
            assert torch.allclose(net.logits(batch), wanted, atol=1e-6)
        assert not torch.allclose(net.logits(batch), wanted, atol=1e-3)


def test_only_the_adapter_is_trained_and_in_float32(make_net, make_spec):
    net = make_net(make_spec(dtype="bfloat16"))
    trained = dict(net.trainable())
    assert trained
    assert all("lora_" in name and item.dtype == torch.float32 for name, item in trained.items())
    frozen = [item for item in net.outer.parameters() if not item.requires_grad]
    assert frozen


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_plain_peft_loads_what_is_saved(make_net, make_spec, make_model, make_rows, tmp_path):
    import json

    from peft import PeftModel

    net = make_net(make_spec())
    net.outer.eval()
    adapter.save(net.outer, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["r"] == 4
    assert config["lora_alpha"] == 8
    batch = padded(make_rows(2), 2, 0)[0]
    theirs = PeftModel.from_pretrained(make_model(), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(
            theirs(input_ids=batch.ids).logits.reshape(-1, 97)[batch.picks], net.logits(batch), atol=1e-6
        )


def test_saving_twice_gives_the_same_bytes(make_net, make_spec, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        adapter.save(make_net(make_spec()).outer, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_loading_gives_back_every_bit(make_net, make_spec, tmp_path):
    net = make_net(make_spec())
    adapter.save(net.outer, tmp_path)
    before = {name: item.detach().clone() for name, item in net.trainable()}
    with torch.no_grad():
        for _, item in net.trainable():
            item.add_(1)
    adapter.load(net.outer, tmp_path)
    for name, item in net.trainable():
        assert torch.equal(item, before[name])


def test_an_adapter_of_another_shape_is_refused(make_net, make_spec, tmp_path):
    adapter.save(make_net(make_spec()).outer, tmp_path)
    with pytest.raises(InputError, match="another adapter") as caught:
        adapter.load(make_net(make_spec(adapter={"rank": 8})).outer, tmp_path)
    assert caught.value.code == "checkpoint.other_task"


def test_targets(make_model):
    model = make_model()
    everything = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert adapter.targets(model, ("all-linear",)) == adapter.targets(model, "auto") == everything
    assert adapter.targets(model, ("q_proj", "self_attn.v_proj")) == ["q_proj", "self_attn.v_proj"]
    with pytest.raises(InputError, match="no linear layer 'c_attn'") as caught:
        adapter.targets(model, ("q_proj", "c_attn"))
    assert "q_proj" in caught.value.fix


def test_first_values_depend_on_the_seed_alone(make_net, make_spec):
    def first(seed):
        net = make_net(make_spec(seed=seed))
        return {name: item.detach().clone() for name, item in net.trainable() if "lora_A" in name}

    one, same, other = first(1), first(1), first(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
