"""A GGUF file's header: metadata and where its tensors are. Standard library only; nothing in the file is trusted.

Layout (ggml's docs/gguf.md): magic, version, counts, key-value pairs, tensor infos, padding, data. Little-endian.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.orchestrator.errors import InputError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_CONVERTER = "1"  # part of what a converted folder is named by: another number where another result is written
_MOST = 1 << 24  # entries of one array, and bytes of one string
# model type, by general.architecture; the keys of its config are found alike for all of them
_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "smollm3": "smollm3",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` is innermost first, as stored; `kind` is ggml's type number; `offset` counts in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class Gguf:
    """What the header says."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        """general.architecture: "llama", "qwen2"..."""
        return str(self.metadata.get("general.architecture", ""))

    def setting(self, key: str, fallback: Any = None) -> Any:
        """A value of the architecture's own section: `llama.block_count` for "block_count"."""
        return self.metadata.get(f"{self.architecture}.{key}", fallback)

    def config(self) -> dict[str, Any]:
        """The config.json of the model inside, as far as its shape goes. InputError("model.gguf") where unknown."""
        if self.architecture not in _TYPES:
            raise _broken(self.path, f"its architecture {self.architecture!r:.40} is not one trained here")
        hidden, heads = self.setting("embedding_length"), self.setting("attention.head_count")
        vocabulary = self.setting("vocab_size") or len(self.metadata.get("tokenizer.ggml.tokens", ()))
        config = {
            "model_type": _TYPES[self.architecture],
            "hidden_size": hidden,
            "num_hidden_layers": self.setting("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.setting("attention.head_count_kv", heads),
            "intermediate_size": self.setting("feed_forward_length"),
            "vocab_size": vocabulary,
            "max_position_embeddings": self.setting("context_length", 2048),
            "rms_norm_eps": float(f"{self.setting('attention.layer_norm_rms_epsilon', 1e-5):.3g}"),
            "rope_theta": float(self.setting("rope.freq_base", 10000.0)),
            "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in self.tensors),
        }
        if head_dim := self.setting("attention.key_length") or self.setting("rope.dimension_count"):
            config["head_dim"] = head_dim
        if self.setting("expert_count"):
            raise _broken(self.path, "it is a mixture of experts, which is not read from GGUF files")
        return config


class _Reader:
    """A cursor over the mapped file that never reads beyond its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.at:
            raise _broken(self.path, "it ends in the middle of its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(min(self.number("<Q"), _MOST + 1)).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if count > _MOST or inner == _ARRAY:
                raise _broken(self.path, "one of its arrays cannot be right")
            if inner == _STRING:
                return [self.text() for _ in range(count)]
            form = self.form(inner)
            return list(struct.unpack(f"<{count}{form[1]}", self.take(count * struct.calcsize(form))))
        return self.number(self.form(kind))

    def form(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise _broken(self.path, f"it has a value of unknown type {kind}")
        return _SCALARS[kind]


def read(path: Path) -> Gguf:
    """Read a header. Some 150 ms for a vocabulary of 50,000; the tensors are not touched.

    Raises InputError: model.missing, model.gguf (not a GGUF file, another version, cut off).
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(path, data))
    except FileNotFoundError:
        raise InputError(
            f"There is no file {path}.", fix="Check the path.", where="model.id", code="model.missing"
        ) from None
    except (OSError, ValueError, UnicodeError, struct.error) as error:
        raise _broken(path, f"it cannot be read ({error})") from None


def _read(reader: _Reader) -> Gguf:
    path = reader.path
    if reader.take(4) != b"GGUF":
        raise _broken(path, "it does not begin as one")
    version, tensors, pairs = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
    if version not in (2, 3) or tensors > 100_000 or pairs > 100_000:
        raise _broken(path, f"its version {version} is not known")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.text()
        metadata[key] = reader.value(reader.number("<I"))
    infos = []
    for _ in range(tensors):
        name, axes = reader.text(), reader.number("<I")
        if axes > 8:
            raise _broken(path, f"its tensor {name!r:.60} has {axes} axes")
        shape = tuple(reader.number("<Q") for _ in range(axes))
        infos.append(TensorInfo(name, shape, reader.number("<I"), reader.number("<Q")))
    step = metadata.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1:
        raise _broken(path, "its alignment cannot be right")
    start = math.ceil(reader.at / step) * step
    found = tuple(TensorInfo(info.name, info.shape, info.kind, start + info.offset) for info in infos)
    return Gguf(path, metadata, found)


def fingerprint(path: Path) -> str:
    """A hash that tells GGUF files apart: size, the first MiB, and 64 pieces spread over the rest. A few ms."""
    size = path.stat().st_size
    mark = hashlib.sha256(f"{_CONVERTER}:{size}:".encode())
    with path.open("rb") as file:
        mark.update(file.read(1 << 20))
        for piece in range(64):
            file.seek(max(0, size - 65536) * piece // 63)
            mark.update(file.read(65536))
    return mark.hexdigest()


def folder_name(path: Path, stem: str | None = None) -> str:
    """What the folder is called that a file is converted to: a readable stem and its fingerprint."""
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in path.stem.lower())
    return f"{stem or plain[:60].strip('-') + '-'}{fingerprint(path)[:12]}"


def _broken(path: Path, why: str) -> InputError:
    return InputError(
        f"{path.name[:200]} is not a GGUF file that can be used.",
        why=why[0].upper() + why[1:] + ".",
        fix="Give the original model (safetensors), or another GGUF file of it.",
        where="model.id",
        code="model.gguf",
    )
