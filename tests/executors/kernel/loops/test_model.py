"""Loading: safetensors only, whole or refused, in the type that was asked for."""

import json
import os

import pytest
import torch

from tunesmith.executors.kernel.loops import model as models
from tunesmith.executors.kernel.loops.batches import packed
from tunesmith.orchestrator.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def saved(make_model, tmp_path):
    make_model(tie_word_embeddings=False).save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


def drop_a_weight(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(folder / "model.safetensors"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))


def tear(folder):
    os.truncate(folder / "model.safetensors", 10_000)


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def unknown_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nobody-knows"}))


def own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


def encoder(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))


@pytest.mark.parametrize("harm", [drop_a_weight, other_shape, tear, pickle_only, unknown_type, own_code, encoder])
def test_what_cannot_be_loaded_is_refused_in_words(harm, saved, make_spec):
    harm(saved)
    with pytest.raises(InputError) as caught:
        models.load(saved, make_spec(), CPU)
    assert caught.value.code == "model.unloadable"
    assert caught.value.why
    assert not (saved / "ran").exists()


def test_a_model_is_loaded_as_it_was_saved(saved, make_model, make_spec):
    net = models.load(saved, make_spec(), CPU)
    wanted = make_model(tie_word_embeddings=False).state_dict()
    found = {
        name.replace(".base_layer", ""): item for name, item in net.causal.state_dict().items() if "lora_" not in name
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], item) for name, item in wanted.items())
    assert net.outer.training


@pytest.mark.parametrize(
    "dtype, kind, base, autocast",
    [
        ("float32", "lora", torch.float32, None),
        ("bfloat16", "lora", torch.bfloat16, None),
        ("bfloat16", "dora", torch.bfloat16, torch.bfloat16),
        ("bfloat16", "none", torch.float32, torch.bfloat16),
        ("float32", "none", torch.float32, None),
    ],
)
def test_types(dtype, kind, base, autocast, saved, make_spec):
    net = models.load(saved, make_spec(dtype=dtype, adapter={"kind": kind}), CPU)
    frozen = {item.dtype for item in net.outer.parameters() if not item.requires_grad}
    trained = {item.dtype for _, item in net.trainable()}
    assert trained == {torch.float32}
    assert frozen == (set() if kind == "none" else {base})
    assert net.autocast == autocast


def test_float16_on_a_cpu_is_refused(saved, make_spec):
    with pytest.raises(InputError) as caught:
        models.load(saved, make_spec(dtype="float16"), CPU)
    assert caught.value.code == "train.dtype"


def test_a_models_own_dropout_is_off_and_the_adapters_is_not(make_net, make_spec, make_rows):
    net = make_net(make_spec(adapter={"dropout": 0.25}, packing=True), attention_dropout=0.3)
    net.outer.train()
    assert {item.self_attn.attention_dropout for item in net.causal.model.layers} == {0.0}
    dropouts = {module.p for module in net.outer.modules() if isinstance(module, torch.nn.Dropout)}
    assert dropouts == {0.25}
    batch = packed(make_rows(4), 60)[0]
    net.logits(batch).sum().backward()
