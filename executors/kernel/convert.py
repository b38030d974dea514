"""A GGUF file turned into the folder that transformers loads: config.json, float32 safetensors, tokenizer, template.

Weights are written in float32, as the file's own scales give them: bfloat16 could not hold the dequantised values, and
a float32 run would start from weights rounded twice. A bfloat16 run rounds once, when it loads them.

Llama files with SmolLM's tokenizer are read directly, without torch and transformers (some seconds instead of half a
minute); for all others transformers' own reader does the work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel.gguf_file import Gguf, TensorInfo
from tunesmith.orchestrator.errors import InputError

Progress = Callable[[str, int, int], None]

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL = 3  # token type of special tokens


def convert(gguf: Gguf, folder: Path, progress: Progress) -> None:
    """Write the model in `gguf` into the empty `folder`. Raises InputError("model.gguf") for what cannot be read."""
    if gguf.architecture == "llama" and gguf.metadata.get("tokenizer.ggml.pre") == "smollm":
        directly(gguf, folder, progress)
    else:
        through_transformers(gguf, folder, progress)


def directly(gguf: Gguf, folder: Path, progress: Progress) -> None:
    """The fast way, for Llama files with SmolLM's tokenizer. Memory: the weights once, in float32."""
    from safetensors.numpy import save_file

    config = gguf.config()
    tensors: dict[str, Any] = {}
    for number, info in enumerate(gguf.tensors):
        progress("convert", number, len(gguf.tensors))
        name = _name(info.name)
        if name is None:
            raise _unreadable(gguf, f"its tensor {info.name!r:.80} is not known")
        tensors[name] = _values(gguf, info, config)
    wanted = 9 * config["num_hidden_layers"] + (2 if config["tie_word_embeddings"] else 3)
    if len(tensors) != wanted:
        raise _unreadable(gguf, f"it has {len(tensors)} tensors where {wanted} make such a model")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    special = _tokenizer(gguf, folder)
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "hidden_act": "silu",
        "initializer_range": config["hidden_size"] ** -0.5,
        "mlp_bias": False,
        "rope_parameters": rope,
        "use_cache": True,
        **special,
    }
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"_from_model_config": False, **special})
    progress("convert", len(gguf.tensors), len(gguf.tensors))


def through_transformers(gguf: Gguf, folder: Path, progress: Progress) -> None:
    """The general way: transformers reads the file into a model in memory, and saves that."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    total = len(gguf.tensors)
    progress("convert", 0, total)
    name, parent = gguf.path.name, str(gguf.path.parent)
    try:
        tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            parent,
            gguf_file=name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
            local_files_only=True,
        )
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError) as error:
        raise _unreadable(gguf, (str(error).strip().splitlines() or [type(error).__name__])[0][:200]) from error
    progress("convert", total // 2, total)
    model.save_pretrained(folder, max_shard_size="1000GB")
    tokenizer.save_pretrained(folder)
    progress("convert", total, total)


def _name(stored: str) -> str | None:
    found = _BLOCK.fullmatch(stored)
    if found is None:
        return _OUTSIDE.get(stored)
    inside = _IN_BLOCK.get(found[2])
    return f"model.layers.{int(found[1])}.{inside}.weight" if inside else None


def _values(gguf: Gguf, info: TensorInfo, config: dict[str, Any]) -> Any:
    """A tensor's values in float32, in the layout of transformers."""
    import numpy
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        kind = GGMLQuantizationType(info.kind)
        group, width = GGML_QUANT_SIZES[kind]
        shape = tuple(reversed(info.shape))
        row = shape[-1] // group * width
        count = row * int(numpy.prod(shape[:-1], dtype=numpy.int64))
        raw = numpy.fromfile(gguf.path, numpy.uint8, count, offset=info.offset).reshape(*shape[:-1], row)
        if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            raw = raw.view(numpy.float32 if kind is GGMLQuantizationType.F32 else numpy.float16)
        values = dequantize(raw, kind).astype(numpy.float32, copy=False).reshape(shape)
    except (ValueError, KeyError, NotImplementedError, OverflowError, IndexError) as error:
        raise _unreadable(gguf, f"its tensor {info.name!r:.80} cannot be unpacked ({error})") from None
    if info.name.endswith((".attn_q.weight", ".attn_k.weight")):
        # llama.cpp pairs neighbouring rows for rotary positions, transformers the two halves of a head
        heads = config["num_attention_heads" if info.name.endswith("attn_q.weight") else "num_key_value_heads"]
        values = values.reshape(heads, -1, 2, shape[-1]).swapaxes(1, 2).reshape(shape)
    return numpy.ascontiguousarray(values)


def _tokenizer(gguf: Gguf, folder: Path) -> dict[str, Any]:
    """Write tokenizer and chat template; the ids of the special tokens for the config.

    llama.cpp's pre-tokenizer "smollm" splits single digits off before GPT-2's pattern. transformers' reader of GGUF
    files leaves that out; here it is kept, as in the tokenizer that the model was trained with.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    data = gguf.metadata
    tokens, merges, kinds = (data.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges", "token_type"))
    if not (isinstance(tokens, list) and isinstance(merges, list) and isinstance(kinds, list)):
        raise _unreadable(gguf, "its tokenizer is not there")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {short: data.get(f"tokenizer.ggml.{long}_token_id") for short, long in names.items()}
    named = {f"{short}_token": tokens[id] for short, id in ids.items() if id is not None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.setting("context_length", 2048),
        **named,
    }
    _write(folder / "tokenizer_config.json", settings)
    template = data.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    return {f"{short}_token_id": ids[short] for short in ("bos", "eos", "pad") if ids[short] is not None}


def _write(path: Path, doc: dict[str, Any]) -> None:
    path.write_text(json.dumps(doc, indent=2, sort_keys=True) + "\n", "utf-8")


def _unreadable(gguf: Gguf, why: str) -> InputError:
    return InputError(
        f"{gguf.path.name[:200]} cannot be converted.",
        why=f"{why[0].upper()}{why[1:]}.",
        fix="Give the original model (safetensors), or another GGUF file of it.",
        where="model.id",
        code="model.gguf",
    )
