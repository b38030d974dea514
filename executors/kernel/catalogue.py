"""What is known of a model before its weights are here: its shape, its size, its names. No torch, no network.

Names are forgiving in case, punctuation and order ("qwen 3 0.6b"), never in meaning: a name that fits two models, or
none, gives None, and `nearest` says what may have been meant.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel.catalogue_facts import EXPERTS, FAMILIES, MODELS, SHAPES, VISION
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import ModelRef

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its weights come with the extra `demo`
EMBEDDED_FOLDER = "smollm2-135m-"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A decoder-only transformer's shape. `params` is computed from the shapes where it is not given.

    `intermediate` is the width of the gated MLP (or of one expert, with `experts` > 0); `norms` counts the norms in a
    layer; `bias` names the attention projections that have one ("qkv", "qkvo" or ""); `extra_params` are loaded with
    the model but take no part in text (an image tower). `bytes_per_token` is for English text, about.
    """

    id: str
    aliases: tuple[str, ...] = ()
    family: str
    model_type: str
    params: int = 0
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    context: int
    bytes_per_token: float = 4.0
    qk_norm: bool = False
    norms: int = 2
    bias: str = ""
    experts: int = 0
    experts_used: int = 0
    extra_params: int = 0
    instruct: bool = False
    licence: str | None = None

    def __post_init__(self) -> None:
        if not self.params:
            object.__setattr__(self, "params", self._count(self.experts) + self.extra_params)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block outside experts: name -> (inputs, outputs). Adapters attach to these."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.model_type == "phi3":
            layers = {"qkv_proj": (self.hidden, wide + 2 * narrow), "o_proj": (wide, self.hidden)}
            mlp = {"gate_up_proj": (self.hidden, 2 * self.intermediate), "down_proj": (self.intermediate, self.hidden)}
        else:
            layers = {
                "q_proj": (self.hidden, wide),
                "k_proj": (self.hidden, narrow),
                "v_proj": (self.hidden, narrow),
                "o_proj": (wide, self.hidden),
            }
            mlp = {
                "gate_proj": (self.hidden, self.intermediate),
                "up_proj": (self.hidden, self.intermediate),
                "down_proj": (self.intermediate, self.hidden),
            }
        return layers if self.experts else layers | mlp

    @property
    def active_params(self) -> int:
        """Parameters that take part in one token's forward pass (all but idle experts and image towers)."""
        return self._count(self.experts_used)

    @property
    def matmul_params(self) -> int:
        """Parameters multiplied for each token inside the blocks, the output head not counted."""
        return self.active_params - self.vocabulary * self.hidden * (1 if self.tied else 2)

    def _count(self, experts: int) -> int:
        layer = sum(wide * tall for wide, tall in self.linears.values()) + self.norms * self.hidden
        if self.qk_norm:
            layer += 2 * self.head_dim
        if self.bias:
            layer += (self.heads + 2 * self.kv_heads) * self.head_dim + (self.hidden if "o" in self.bias else 0)
        if self.experts:
            layer += self.hidden * self.experts + experts * 3 * self.hidden * self.intermediate
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden


# --- names ---------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"\d+x\d+b|a\d+b(?![a-z])|\d+(?:\.\d+)?[bmk](?![a-z0-9])|v?\d+(?:\.\d+)?|[a-z]+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([bm])")
_KINDS = {"instruct": "instruct", "it": "instruct", "chat": "instruct", "base": "base", "pt": "base"}
_FILLER = {"model", "meta", "hf", "the"}

Key = tuple[frozenset[str], str | None]


def find(name: str) -> ModelFacts | None:
    """The model meant by an id, an alias or a forgiving form of either; None where unknown or ambiguous.

    A name with an owner ("owner/model") must be that very id. A version may be left out where only one model of the
    catalogue has the remaining words ("Qwen-0.6B").
    """
    name = name.strip()
    ids, aliases, names, kinds = _index()
    known = ids.get(name.lower())
    if known is not None:
        return _build(known)
    if not name or len(name) > 200 or "/" in name or "\\" in name or name.startswith((".", "~")):
        return None
    core, kind = _key(name)
    if not any(word.isalpha() for word in core):
        return None
    known = _one(core, kind, aliases, names, kinds)
    if known is None:
        wider = {key for key, _ in names if core < key and all(map(_is_number, key - core))}
        only = wider.pop() if len(wider) == 1 else core
        if not any(word.startswith("=") for word in only - core):
            known = _one(only, kind, aliases, names, kinds)
    return None if known is None else _build(known)


def nearest(name: str, count: int = 3) -> list[str]:
    """The ids whose names look most like this one, the nearest first."""
    from difflib import SequenceMatcher

    core, kind = _key(name[:200])
    text = " ".join(sorted(core))

    def likeness(row: int) -> float:
        other, its = _key(MODELS[row][0].split("/")[-1])
        shared = len(core & other) / max(1, len(core | other))
        spelled = SequenceMatcher(None, text, " ".join(sorted(other))).ratio()
        sizes = [next((float(word[1:]) for word in words if word.startswith("=")), 0.0) for words in (core, other)]
        apart = min(2.0, abs(math.log2(sizes[0] / sizes[1]))) / 4 if all(sizes) else 0.0
        return shared + spelled - apart + (0.1 if kind == its else 0.0)

    return [MODELS[row][0] for row in sorted(range(len(MODELS)), key=lambda row: (-likeness(row), row))[:count]]


def known() -> list[ModelFacts]:
    """Every model of the catalogue."""
    return [_build(row) for row in range(len(MODELS))]


def _key(name: str) -> Key:
    core, kind = set(), None
    for word in _WORD.findall(name.lower()):
        size = _SIZE.fullmatch(word)
        if size:
            core.add(f"={round(float(size[1]) * (1000 if size[2] == 'b' else 1))}")
        elif word in _KINDS:
            kind = _KINDS[word]
        elif word not in _FILLER:
            core.add(f"{float(word.lstrip('v')):g}" if _is_number(word.lstrip("v")) else word)
    return frozenset(core), kind


def _is_number(word: str) -> bool:
    return word.startswith("=") or word.replace(".", "", 1).isdigit()


Rows = dict[Key, set[int]]


@once
def _index() -> tuple[dict[str, int], Rows, Rows, Rows]:
    ids: dict[str, int] = {}
    aliases: Rows = {}
    names: Rows = {}
    kinds: Rows = {}
    for row, (id, _, _, _, instruct, _, others) in enumerate(MODELS):
        ids[id.lower()] = row
        core, kind = _key(id.split("/")[-1])
        names.setdefault((core, kind), set()).add(row)
        kinds.setdefault((core, "instruct" if instruct else "base"), set()).add(row)
        for other in others:
            ids.setdefault(other.lower(), row)
            if "/" not in other:
                aliases.setdefault(_key(other), set()).add(row)
    return ids, aliases, names, kinds


def _one(core: frozenset[str], kind: str | None, *tiers: Rows) -> int | None:
    for tier in tiers:
        rows = tier.get((core, kind), set())
        if rows:
            return next(iter(rows)) if len(rows) == 1 else None
    return None


@once
def _build(row: int) -> ModelFacts:
    id, family, shape, context, instruct, licence, aliases = MODELS[row]
    model_type, layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary, tied = SHAPES[shape]
    experts, used, expert_width = EXPERTS.get(shape, (0, 0, intermediate))
    return ModelFacts(
        id=id,
        aliases=aliases,
        family=family,
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=expert_width,
        vocabulary=vocabulary,
        tied=tied,
        context=context,
        bytes_per_token=FAMILIES[family],
        experts=experts,
        experts_used=used,
        extra_params=VISION.get(shape, 0),
        instruct=instruct,
        licence=licence,
        **_traits(model_type),
    )


# --- config.json ---------------------------------------------------------------------------------------------------

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


def _traits(model_type: str) -> dict[str, Any]:
    return dict(_TRAITS.get(model_type, {}))


def from_config(id: str, config: Mapping[str, Any]) -> ModelFacts:
    """Facts from a Hugging Face config.json. Types that are not known by name must look like Llama in every key.

    Raises InputError("model.config") for what is not understood: another architecture, missing or senseless numbers,
    weights that are already quantised.
    """
    if not isinstance(config, Mapping):
        raise _unreadable(id, "it is not a JSON object")
    extra = 0
    vision = config.get("vision_config")
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {"model_type": f"{config.get('model_type', '')}_text", **config, **text}
    model_type = str(config.get("model_type", ""))
    if config.get("is_encoder_decoder"):
        raise _unreadable(id, f"{model_type or 'it'} is an encoder-decoder; only decoder-only models are trained here")
    if isinstance(config.get("quantization_config"), Mapping):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise _unreadable(id, f"its weights are already quantised ({method}); give the model in full precision")
    if model_type not in _TRAITS:
        _must_look_like_llama(id, model_type, config)
    values = {**_DEFAULTS.get(model_type, {}), **{key: value for key, value in config.items() if value is not None}}

    def number(key: str, fallback: int | None = None) -> int:
        value = values.get(key, fallback)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise _unreadable(id, f"{key} should be a positive whole number, not {value!r:.60}")
        return value

    hidden, heads, layers = number("hidden_size"), number("num_attention_heads"), number("num_hidden_layers")
    if layers > 1000:
        raise _unreadable(id, f"{layers} layers cannot be right")
    experts = used = 0
    intermediate = number("intermediate_size")
    if model_type in ("mixtral", "qwen3_moe"):
        experts = number("num_local_experts", values.get("num_experts"))
        used = number("num_experts_per_tok")
        intermediate = number("moe_intermediate_size", intermediate)
    if "head_dim" not in values and hidden % heads:
        raise _unreadable(id, f"hidden_size {hidden} is no multiple of {heads} heads")
    traits = _traits(model_type)
    if model_type not in ("qwen2",) and values.get("attention_bias") is True:
        traits["bias"] = "qkvo"
    listed = find(id)
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
        **traits,
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
        raise _unreadable(id, f"the model type {model_type or '(none)'!r:.60} is not built like Llama")


def _bytes_per_token(vocabulary: int) -> float:
    """Bytes of English text for one token: larger vocabularies hold longer pieces. A line through known tokenizers."""
    return round(min(4.6, max(3.0, 3.8 + 0.3 * math.log2(vocabulary / 32000) / 2)), 2)


def _unreadable(id: str, why: str) -> InputError:
    return InputError(
        f"The config.json of {id[:200]} is not understood.",
        why=f"In it, {why}." if not why.startswith(("it is", "its ")) else why[0].upper() + why[1:] + ".",
        fix="Choose a decoder-only model built like Llama, Qwen, Mistral, Gemma or Phi.",
        where="config.json",
        code="model.config",
    )


# --- at hand -------------------------------------------------------------------------------------------------------


def at_hand(ref: ModelRef, cache: Path) -> Path | None:
    """The folder on this machine with the model's config.json and tokenizer, or None. Reads no network.

    Looks at a local folder, the Hugging Face cache (HF_HUB_CACHE, HF_HOME), and the converted folder of the embedded
    model. Cost: a few stat calls.
    """
    folder = Path(ref.id).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    named = find(ref.id)
    id = named.id if named else ref.id
    snapshot = snapshot_folder(id, ref.revision)
    if snapshot is not None:
        return snapshot
    return converted_folder(cache) if id == EMBEDDED_ID else None


def snapshot_folder(id: str, revision: str | None = None) -> Path | None:
    """The newest complete look of a Hub model in the Hugging Face cache of this user, or None."""
    if id.count("/") != 1 or ".." in id or len(id) > 200:
        return None
    base = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    hub = Path(base) if base else Path(home) / "hub"
    root = hub.expanduser() / f"models--{id.replace('/', '--')}"
    commit = revision or "main"
    reference = root / "refs" / commit
    if ".." not in commit and reference.is_file():
        commit = reference.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[0-9a-f]{6,64}", commit):
        return None
    folder = root / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def converted_folder(cache: Path) -> Path | None:
    """Where the embedded model was converted to, newest first, or None."""
    folders = [path.parent for path in cache.glob(f"models/{EMBEDDED_FOLDER}*/config.json")]
    ready = [folder for folder in folders if (folder / "model.safetensors").is_file() and ".part" not in folder.name]
    return max(ready, key=lambda folder: folder.stat().st_mtime, default=None)


def facts(ref: ModelRef, cache: Path) -> ModelFacts | None:
    """What is known of the model: from its config.json when that is at hand, else from the catalogue, else None.

    Raises InputError("model.config") for a config.json that is there and cannot be used.
    """
    named = find(ref.id)
    folder = at_hand(ref, cache)
    if folder is None:
        return named
    id = named.id if named else ref.id
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(id, f"it is not JSON ({type(error).__name__})") from None
    return from_config(id, config)
