"""The catalogue: counts against published ones, names that are forgiving and never wrong, configs of any shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.executors.kernel import catalogue
from tunesmith.executors.kernel.catalogue import at_hand, facts, find, from_config, known, nearest
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import ModelRef

# parameter counts as the model cards and the safetensors index on the Hub give them (shared embeddings once)
PUBLISHED = {
    "Qwen/Qwen1.5-0.5B": 463_987_712,
    "Qwen/Qwen1.5-1.8B": 1_836_828_672,
    "Qwen/Qwen1.5-7B": 7_721_324_544,
    "Qwen/Qwen2-72B": 72_706_203_648,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-Coder-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-27b-it": 27_432_406_640,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Ministral-8B-Instruct-2410": 8_019_808_256,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mistral-Small-Instruct-2409": 22_247_282_688,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "tiiuae/Falcon3-1B-Base": 1_669_408_768,
    "tiiuae/Falcon3-10B-Base": 10_305_653_760,
    "01-ai/Yi-1.5-6B": 6_061_035_520,
    "01-ai/Yi-1.5-34B": 34_388_917_248,
}


@pytest.mark.parametrize("id", PUBLISHED)
def test_counts_from_shapes_are_the_published_ones(id):
    assert find(id).params == PUBLISHED[id]


def test_every_shape_is_held_against_a_published_count_or_shared_with_one():
    counted = {(model.model_type, model.params) for model in map(find, PUBLISHED)}
    missing = {model.id for model in known() if (model.model_type, model.params) not in counted}
    assert missing <= {
        "Qwen/Qwen1.5-4B", "Qwen/Qwen1.5-4B-Chat", "Qwen/Qwen1.5-14B", "Qwen/Qwen1.5-14B-Chat",
        "Qwen/Qwen1.5-32B", "Qwen/Qwen1.5-32B-Chat", "Qwen/Qwen1.5-72B", "Qwen/Qwen1.5-72B-Chat",
        "tiiuae/Falcon3-3B-Base", "tiiuae/Falcon3-3B-Instruct", "tiiuae/Falcon3-7B-Base",
        "tiiuae/Falcon3-7B-Instruct", "01-ai/Yi-1.5-9B", "01-ai/Yi-1.5-9B-Chat",
    }  # fmt: skip


def test_active_parameters_of_experts():
    assert find("qwen3-30b-a3b").active_params == pytest.approx(3.35e9, rel=0.01)
    assert find("mixtral-8x7b").active_params == pytest.approx(12.9e9, rel=0.01)
    plain = find("qwen3-0.6b")
    assert plain.active_params == plain.params


@pytest.mark.parametrize(
    "name, id",
    [
        ("qwen3 0.6b", "Qwen/Qwen3-0.6B"),
        ("Qwen 3 0.6B", "Qwen/Qwen3-0.6B"),
        ("QWEN3_0.6B", "Qwen/Qwen3-0.6B"),
        ("qwen3:0.6b", "Qwen/Qwen3-0.6B"),
        ("0.6b qwen3", "Qwen/Qwen3-0.6B"),
        ("Qwen-0.6B", "Qwen/Qwen3-0.6B"),
        ("qwen 600m", "Qwen/Qwen3-0.6B"),
        ("qwen/qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("qwen3 0.6b base", "Qwen/Qwen3-0.6B-Base"),
        ("qwen3-8b instruct", "Qwen/Qwen3-8B"),
        ("qwen3 30b", "Qwen/Qwen3-30B-A3B"),
        ("qwen2.5 0.5b", "Qwen/Qwen2.5-0.5B"),
        ("Qwen2.5-Coder 7B instruct", "Qwen/Qwen2.5-Coder-7B-Instruct"),
        ("llama 3.1 8b", "meta-llama/Llama-3.1-8B"),
        ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("llama 3 8b", "meta-llama/Meta-Llama-3-8B"),
        ("llama3.2 1b", "meta-llama/Llama-3.2-1B"),
        ("llama 1b", "meta-llama/Llama-3.2-1B"),
        ("llama 3.3 70b", "meta-llama/Llama-3.3-70B-Instruct"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("SmolLM2 135M", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("smollm2-360m", "HuggingFaceTB/SmolLM2-360M"),
        ("smollm3", "HuggingFaceTB/SmolLM3-3B"),
        ("gemma 3 1b", "google/gemma-3-1b-it"),
        ("gemma-3-1b-pt", "google/gemma-3-1b-pt"),
        ("gemma 3 4b instruct", "google/gemma-3-4b-it"),
        ("gemma2 9b", "google/gemma-2-9b"),
        ("gemma 2b", "google/gemma-2b"),
        ("mistral 7b v0.3", "mistralai/Mistral-7B-v0.3"),
        ("mistral 7b instruct v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("mistral nemo", "mistralai/Mistral-Nemo-Instruct-2407"),
        ("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("phi 3.5 mini", "microsoft/Phi-3.5-mini-instruct"),
        ("phi 4", "microsoft/phi-4"),
        ("phi-4-mini", "microsoft/Phi-4-mini-instruct"),
        ("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ],
)
def test_forgiving_names(name, id):
    assert find(name).id == id


@pytest.mark.parametrize(
    "name",
    ["", " ", "8b", "0.6", "qwen", "qwen3", "qwen 7b", "llama 8b", "llama 3 1b", "llama 4 8b", "mistral 7b", "base",
     "unsloth/Qwen3-0.6B", "someone/llama-3.1-8b", "qwen3-0.7b", "qwen3-0.6b-math", "./qwen3-0.6b", "/m/qwen3-0.6b",
     "llama 3.3 70b base", "mistral small", "mixtral 8x22b", "gpt-oss-20b", pytest.param("x" * 10_000, id="long")],
)  # fmt: skip
def test_unknown_or_ambiguous_names_are_never_guessed(name):
    assert find(name) is None
    assert len(nearest(name)) == 3


def test_nearest_names_what_was_probably_meant():
    assert nearest("qwen3-0.7b")[0].startswith("Qwen/Qwen3-0.6B")
    assert "meta-llama/Llama-3.1-8B" in nearest("lama 3.1 8b")
    assert "Qwen/Qwen3-0.6B" in nearest("unsloth/Qwen3-0.6B")
    assert set(nearest("mistral 7b")) <= {model.id for model in known() if "Mistral-7B" in model.id}


def test_every_id_and_alias_finds_its_own_model():
    for model in known():
        assert find(model.id).id == model.id
        assert find(model.id.upper()).id == model.id
        for alias in model.aliases:
            assert find(alias).id == model.id, alias


@given(st.text(max_size=60))
def test_find_takes_any_text(name):
    found = find(name)
    assert found is None or found.id in {model.id for model in known()}


# --- config.json ---------------------------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def test_a_config_gives_the_facts():
    found = from_config("me/mine", LLAMA)
    assert (found.params, found.head_dim, found.family, found.context) == (134_515_008, 64, "llama", 8192)
    assert from_config("HuggingFaceTB/SmolLM2-135M-Instruct", LLAMA).instruct


def test_an_unknown_type_that_looks_like_llama_is_read():
    assert from_config("me/mine", {**LLAMA, "model_type": "granite"}).params == 134_515_008


def test_gemma3_leaves_much_out():
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        },
        "vision_config": {"hidden_size": 1152},
    }  # fmt: skip
    assert from_config("google/gemma-3-4b-it", config) == find("gemma-3-4b-it")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "576"},
        {"hidden_size": 0},
        {"hidden_size": -4},
        {"hidden_size": True},
        {"hidden_size": 10**12},
        {"hidden_size": float("nan")},
        {"hidden_size": None},
        {"num_hidden_layers": 5000},
        {"num_attention_heads": 7},
        {"vocab_size": []},
        {"num_key_value_heads": "\x1b[31m" * 1000},
        {"is_encoder_decoder": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "mamba", "ssm_cfg": {"layer": 1}},
        {"model_type": "deepseek_v3", "n_routed_experts": 256},
        {"model_type": None, "architectures": None},
        {"model_type": "gpt2", "rms_norm_eps": 1, "hidden_act": "gelu_new"},
        {"num_attention_heads": 10**9, "num_key_value_heads": 1},
    ],
)
def test_a_config_that_is_not_understood_is_a_typed_error(change):
    with pytest.raises(InputError) as error:
        from_config("me/mine", {**LLAMA, **change})
    assert error.value.code == "model.config"
    assert error.value.why
    assert error.value.fix
    assert len(str(error.value)) < 1000


@given(st.dictionaries(st.sampled_from([*LLAMA, "text_config", "head_dim"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*LLAMA]), inner, max_size=2),
)))  # fmt: skip
def test_any_json_gives_facts_or_a_typed_error(change):
    try:
        good = from_config("me/mine", {**LLAMA, **change}).params > 0
    except InputError as error:
        good = error.code == "model.config"
    assert good


# --- at hand -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(hub: Path, id: str, commit: str, config: dict) -> Path:
    root = hub / f"models--{id.replace('/', '--')}"
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    return folder


def test_a_local_folder_is_at_hand(tmp_path, hub):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    ref = ModelRef(id=str(folder))
    assert at_hand(ref, tmp_path / "cache") == folder
    assert facts(ref, tmp_path / "cache").params == 134_515_008


def test_a_hub_snapshot_is_at_hand_by_id_and_alias(tmp_path, hub):
    folder = snapshot(hub, "HuggingFaceTB/SmolLM2-360M", "ab" * 20, LLAMA)
    cache = tmp_path / "cache"
    assert at_hand(ModelRef(id="HuggingFaceTB/SmolLM2-360M"), cache) == folder
    assert at_hand(ModelRef(id="smollm2 360m"), cache) == folder
    assert at_hand(ModelRef(id="smollm2 360m", revision="ab" * 20), cache) == folder
    assert at_hand(ModelRef(id="smollm2 360m", revision="cd" * 20), cache) is None
    assert at_hand(ModelRef(id="smollm2 360m", revision="../../.."), cache) is None
    assert at_hand(ModelRef(id="smollm2 1.7b"), cache) is None
    assert facts(ModelRef(id="smollm2 360m"), cache).params == 134_515_008  # the config beats the catalogue


def test_the_converted_folder_is_at_hand(tmp_path, hub):
    folder = tmp_path / "models" / "smollm2-135m-0123"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert at_hand(ModelRef(id="smollm2-135m"), tmp_path) is None  # no weights yet
    (folder / "model.safetensors").write_bytes(b"")
    assert at_hand(ModelRef(id="smollm2-135m"), tmp_path) == folder
    assert at_hand(ModelRef(id="HuggingFaceTB/SmolLM2-135M-Instruct"), tmp_path) == folder
    assert at_hand(ModelRef(id="HuggingFaceTB/SmolLM2-135M"), tmp_path) is None


def test_broken_config_at_hand_is_a_typed_error(tmp_path, hub):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError) as error:
        facts(ModelRef(id=str(tmp_path)), tmp_path / "cache")
    assert error.value.code == "model.config"


def test_facts_come_from_the_catalogue_and_unknown_is_none(tmp_path, hub):
    assert facts(ModelRef(id="qwen3 0.6b"), tmp_path).id == "Qwen/Qwen3-0.6B"
    assert facts(ModelRef(id="job:j-abcdef"), tmp_path) is None
    assert facts(ModelRef(id="nobody/nothing"), tmp_path) is None


# --- against the source of truth -----------------------------------------------------------------------------------


def test_nothing_heavy_is_imported():
    code = (
        "import sys, tunesmith.executors.kernel.catalogue, tunesmith.executors.kernel.sizing;"
        "print([name for name in ('torch', 'transformers', 'numpy', 'huggingface_hub', 'gguf') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    "id",
    ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-30B-A3B", "meta-llama/Llama-3.2-1B",
     "HuggingFaceTB/SmolLM3-3B", "google/gemma-2b", "google/gemma-2-2b", "google/gemma-3-1b-it",
     "mistralai/Mistral-7B-v0.3", "mistralai/Mixtral-8x7B-v0.1", "microsoft/Phi-4-mini-instruct"],
)  # fmt: skip
def test_transformers_builds_the_same_module(id):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = find(id)
    config = AutoConfig.for_model(
        model.model_type,
        hidden_size=model.hidden, num_hidden_layers=model.layers, num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads, head_dim=model.head_dim, intermediate_size=model.intermediate,
        vocab_size=model.vocabulary, tie_word_embeddings=model.tied, max_position_embeddings=model.context,
        pad_token_id=0,
        **({"num_experts": model.experts, "num_local_experts": model.experts, "num_experts_per_tok": model.experts_used,
            "moe_intermediate_size": model.intermediate} if model.experts else {}),
    )  # fmt: skip
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    assert sum(weight.numel() for weight in module.parameters()) == model.params
    assert from_config(id, json.loads(config.to_json_string(use_diff=False))).params == model.params
    block = module.model.layers[0]
    shapes = {
        name.split(".")[-1]: (layer.in_features, layer.out_features)
        for name, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith("proj")
    }
    assert shapes == model.linears
    assert catalogue.find(id) is find(id)
