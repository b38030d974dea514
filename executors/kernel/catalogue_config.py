"""A model's shape read from its config.json, which is somebody else's file: every number is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tunesmith.executors.kernel.catalogue_facts import SHAPES, VISION
from tunesmith.executors.kernel.catalogue_model import ModelFacts
from tunesmith.orchestrator.errors import InputError

_TRAITS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "smollm3": {},
    "phi3": {},
    "gemma": {},
    "qwen2": {"bias": "qkv"},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True},
    "gemma2": {"norms": 4},
    "gemma3_text": {"norms": 4, "qk_norm": True},
}
_DEFAULTS: dict[str, dict[str, Any]] = {  # what transformers assumes where such a config.json leaves a key out
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128},
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 256, "tie_word_embeddings": True},
    "smollm3": {"tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}
_FOREIGN = (  # keys of experts routed otherwise, state spaces and compressed attention
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "ssm_cfg",
    "state_size",
    "layer_block_type",
    "kv_lora_rank",
)


def traits(model_type: str) -> dict[str, Any]:
    """What sets a model type apart from Llama, as fields of ModelFacts."""
    return dict(_TRAITS.get(model_type, {}))


def read(id: str, config: Mapping[str, Any], listed: ModelFacts | None) -> ModelFacts:
    """Facts from a Hugging Face config.json. Types that are not known by name must look like Llama in every key.

    `listed` is the catalogue's entry of that id, for what a config does not say (licence, bytes per token).

    Raises InputError("model.config") for what is not understood: another architecture, missing or senseless numbers,
    weights that are already quantised.
    """
    if not isinstance(config, Mapping):
        raise unreadable(id, "it is not a JSON object")
    extra = 0
    vision = config.get("vision_config")
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {"model_type": f"{config.get('model_type', '')}_text", **config, **text}
    model_type = str(config.get("model_type", ""))
    if config.get("is_encoder_decoder"):
        raise unreadable(id, f"{model_type or 'it'} is an encoder-decoder; only decoder-only models are trained here")
    if isinstance(config.get("quantization_config"), Mapping):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise unreadable(id, f"its weights are already quantised ({method}); give the model in full precision")
    if model_type not in _TRAITS:
        _must_look_like_llama(id, model_type, config)
    values = {**_DEFAULTS.get(model_type, {}), **{key: value for key, value in config.items() if value is not None}}

    def number(key: str, fallback: int | None = None) -> int:
        value = values.get(key, fallback)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise unreadable(id, f"{key} should be a positive whole number, not {value!r:.60}")
        return value

    hidden, heads, layers = number("hidden_size"), number("num_attention_heads"), number("num_hidden_layers")
    if layers > 1000:
        raise unreadable(id, f"{layers} layers cannot be right")
    experts = used = 0
    intermediate = number("intermediate_size")
    if model_type in ("mixtral", "qwen3_moe"):
        experts = number("num_local_experts", values.get("num_experts"))
        used = number("num_experts_per_tok")
        intermediate = number("moe_intermediate_size", intermediate)
    if "head_dim" not in values and hidden % heads:
        raise unreadable(id, f"hidden_size {hidden} is no multiple of {heads} heads")
    own = traits(model_type)
    if model_type not in ("qwen2",) and values.get("attention_bias") is True:
        own["bias"] = "qkvo"
    found = ModelFacts(
        id=id,
        aliases=listed.aliases if listed else (),
        family=listed.family if listed else model_type,
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        intermediate=intermediate,
        vocabulary=number("vocab_size"),
        tied=values.get("tie_word_embeddings", False) is True,
        context=number("max_position_embeddings", 2048),
        bytes_per_token=listed.bytes_per_token if listed else _bytes_per_token(number("vocab_size")),
        experts=experts,
        experts_used=used,
        instruct=listed.instruct if listed else False,
        licence=listed.licence if listed else None,
        **own,
    )
    if isinstance(vision, Mapping):
        extra = next((VISION[name] for name in VISION if SHAPES[name][1:3] == (layers, hidden)), 0)
        found = replace(found, extra_params=extra, params=0)
    return found


def _must_look_like_llama(id: str, model_type: str, config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and any(str(name).endswith("ForCausalLM") for name in architectures)
    gated = str(config.get("hidden_act", "")) in ("silu", "swish", "gelu_pytorch_tanh")
    if not (named and gated and "rms_norm_eps" in config) or any(config.get(key) for key in _FOREIGN):
        raise unreadable(id, f"the model type {model_type or '(none)'!r:.60} is not built like Llama")


def _bytes_per_token(vocabulary: int) -> float:
    """Bytes of English text for one token: larger vocabularies hold longer pieces. A line through known tokenizers."""
    return round(min(4.6, max(3.0, 3.8 + 0.3 * math.log2(vocabulary / 32000) / 2)), 2)


def unreadable(id: str, why: str) -> InputError:
    """The error for a config.json that cannot be used."""
    return InputError(
        f"The config.json of {id[:200]} is not understood.",
        why=f"In it, {why}." if not why.startswith(("it is", "its ")) else why[0].upper() + why[1:] + ".",
        fix="Choose a decoder-only model built like Llama, Qwen, Mistral, Gemma or Phi.",
        where="config.json",
        code="model.config",
    )
