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
from functools import cache as once
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel import catalogue_config
from tunesmith.executors.kernel.catalogue_facts import EXPERTS, FAMILIES, MODELS, SHAPES, VISION
from tunesmith.executors.kernel.catalogue_model import ModelFacts
from tunesmith.orchestrator.nouns import ModelRef

__all__ = ["ModelFacts", "at_hand", "facts", "find", "from_config", "known", "nearest"]

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its weights come with the extra `demo`
EMBEDDED_ALIAS = "smollm2-135m"  # asked for so, the packaged weights are meant, whether or not the Hub answers
EMBEDDED_FOLDER = "smollm2-135m-"


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


def from_config(id: str, config: Mapping[str, Any]) -> ModelFacts:
    """Facts from a Hugging Face config.json, with the catalogue's word where the config has none.

    Raises InputError("model.config") for what is not understood: another architecture, missing or senseless numbers,
    weights that are already quantised.
    """
    return catalogue_config.read(id, config, find(id))


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
        **catalogue_config.traits(model_type),
    )


# --- where it is ---------------------------------------------------------------------------------------------------


def local(ref: ModelRef) -> Path | None:
    """The folder with a config.json, or the .gguf file, that the reference names on this machine; absolute."""
    path = Path(os.path.expanduser(ref.id))
    try:
        if path.suffix == ".gguf":
            return path.resolve() if path.is_file() else None
        return path.resolve() if (path / "config.json").is_file() else None
    except OSError:  # a name too long to be one, a folder that may not be entered
        return None


def at_hand(ref: ModelRef, cache: Path) -> Path | None:
    """The folder on this machine with the model's config.json and tokenizer, or None. Reads no network.

    Looks at a local folder, the Hugging Face cache (HF_HUB_CACHE, HF_HOME), and the folders that a GGUF file or the
    embedded model was converted to. Cost: a few stat calls; some ms for a GGUF file.
    """
    here = local(ref)
    if here is not None and here.is_file():
        from tunesmith.executors.kernel import gguf_file

        folder = cache / "models" / gguf_file.folder_name(here)
        return folder if (folder / "config.json").is_file() else None
    if here is not None:
        return here
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

    Raises InputError for a file that is there and cannot be used: model.config, model.gguf.
    """
    named = find(ref.id)
    folder = at_hand(ref, cache)
    here = local(ref)
    if folder is None and here is not None:
        from tunesmith.executors.kernel import gguf_file

        return from_config(ref.id, gguf_file.read(here).config())
    if folder is None:
        return named
    id = named.id if named else ref.id
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise catalogue_config.unreadable(id, f"it is not JSON ({type(error).__name__})") from None
    return from_config(id, config)
