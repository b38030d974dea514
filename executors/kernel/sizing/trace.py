"""The memory of a step of any architecture, traced in a process of its own, which alone imports torch.

Two and three layers (or so many that every kind of layer is among them) are traced on meta tensors, and what a layer
adds is carried on to all of them, phase by phase. What the allocator reserves beyond the live bytes comes from its
loss and its largest layer, and hardly grows with depth: it is added as the traces have it. A trace takes one to three
seconds beside imports and is kept in a folder, by a hash of everything that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel.sizing.size import Layout
from tunesmith.orchestrator.errors import InputError

PHASES = ("forward", "head", "last", "first", "optimizer")
TIMEOUT = 120.0  # seconds, imports on a slow disk included
_PACKAGES = ("torch", "transformers", "peft")
_KERNEL = Path(__file__).resolve().parents[1]
_SOURCES = (  # what a trace follows: a change there is another trace
    *(f"sizing/{name}.py" for name in ("allocator", "trace", "traced_step", "traced_tape")),
    *(f"loops/{name}.py" for name in ("adapter", "attention", "batches", "loss", "model", "products", "quantised")),
)


@dataclass(frozen=True, slots=True)
class Traced:
    """What a step of the whole model holds, in bytes.

    peaks       most live bytes in each phase: forward; head, from the last layer's output to its gradient; backward
                through the last and through the first layer, which bound those between; optimizer
    reserved    what the CUDA allocator takes for it, within some per cent: blocks of logits find room or not by chance
    expandable  the same with expandable segments, as our kernel asks for; within three per cent
    packed      whether batches were packed; not where the architecture's attention asks for what is not exact so
    seconds     what tracing took, imports left out; 0 where it was kept from an earlier time
    """

    peaks: dict[str, int]
    reserved: int
    expandable: int
    packed: bool
    seconds: float

    @property
    def live(self) -> int:
        """The most live bytes of all phases."""
        return max(self.peaks.values())


def trace(
    config: Mapping[str, Any],
    layout: Layout,
    *,
    packed: bool = True,
    cache: Path | None = None,
    timeout: float = TIMEOUT,
) -> Traced:
    """The memory of a step on CUDA of the model that a Hugging Face config.json describes.

    Of the layout counts what is trained and how, and the tokens; `longest` is a document's length, and without `packed`
    that of every row. Where attention cannot be packed, rows are padded, as the kernel's self-test has it. Answers that
    are written, and other models, are not in it. `cache` is a folder to keep traces in.
    Raises InputError (sizing.trace) where the architecture cannot be built or traced.
    """
    shape = _text(config)
    request: dict[str, Any] = {
        "config": shape,
        "kind": layout.kind,
        "rank": layout.rank,
        "targets": list(layout.targets),
        "dtype": layout.dtype,
        "tokens": layout.tokens,
        "longest": layout.longest,
        "checkpointing": layout.checkpointing,
        "optimizer": layout.optimizer,
        "head": "loss" if layout.head == "tiled" else layout.head,
        "packed": packed,
    }
    depth = shape.get("num_hidden_layers")
    if not isinstance(depth, int) or depth < 1 or not isinstance(shape.get("model_type"), str):
        raise _untraced("Its config has no model_type, or no number of layers.")
    few, more = depths(shape)
    kept = None if cache is None else cache / "traces" / f"{_key(request, (few, more))}.json"
    if kept is not None and (found := _read(kept)) is not None:
        return found
    one, two = _asked({**request, "depths": [few, more]}, timeout)
    result = carried_on(one, two, depth)
    if kept is not None:
        _write(kept, result)
    return result


def depths(config: Mapping[str, Any]) -> tuple[int, int]:
    """How many layers are traced: two and three, or as many as it takes for each kind of layer to come again."""
    depth, kinds = int(config["num_hidden_layers"]), config.get("layer_types")
    if depth < 3:
        return depth, depth
    period = 1
    if isinstance(kinds, (list, tuple)) and len(kinds) == depth:
        period = next(size for size in range(1, depth + 1) if all(kinds[at] == kinds[at % size] for at in range(depth)))
    if period > 1 and 2 * period > depth:
        return depth, depth
    return (2, 3) if period == 1 else (period, 2 * period)


def carried_on(one: Mapping[str, Any], two: Mapping[str, Any], depth: int) -> Traced:
    """From two traces of one step to a depth: each phase grows by as much with every layer."""
    more = max(1, two["layers"] - one["layers"])
    peaks = {}
    for phase in PHASES:
        if phase in two["peaks"]:
            low = one["peaks"].get(phase, two["peaks"][phase])
            peaks[phase] = low + (two["peaks"][phase] - low) * (depth - one["layers"]) // more
    live = max(peaks.values())
    reserved, expandable = (
        live + max(item[name] - max(item["peaks"].values()) for item in (one, two))
        for name in ("reserved", "expandable")
    )
    return Traced(peaks, reserved, expandable, two["packed"], one["seconds"] + two["seconds"])


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config, without what only says where it came from or loads code."""
    inner = config.get("text_config")
    chosen = dict(inner) if isinstance(inner, Mapping) else dict(config)
    for name in ("auto_map", "_name_or_path", "quantization_config", "transformers_version", "torch_dtype", "dtype"):
        chosen.pop(name, None)
    return chosen


def _key(request: Mapping[str, Any], layers: tuple[int, int]) -> str:
    digest = hashlib.sha256(json.dumps([request, layers], sort_keys=True).encode())
    for name in _PACKAGES:
        try:
            digest.update(f"{name}={metadata.version(name)};".encode())
        except metadata.PackageNotFoundError:
            digest.update(f"{name}=;".encode())
    for name in _SOURCES:
        digest.update((_KERNEL / name).read_bytes())
    return digest.hexdigest()


def _asked(request: Mapping[str, Any], timeout: float) -> list[dict[str, Any]]:
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "tunesmith.executors.kernel.sizing.trace"],
            input=json.dumps(request), capture_output=True, text=True, timeout=timeout, check=False,
            env={**os.environ, **quiet, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise _untraced(f"The tracer was not done after {timeout:.0f} seconds.") from error
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        last = (done.stderr.strip().splitlines() or [f"The tracer ended with code {done.returncode}."])[-1]
        raise _untraced(last[:300]) from error
    return found


def _untraced(why: str) -> InputError:
    return InputError(
        "The model's memory cannot be traced.",
        code="sizing.trace",
        why=why,
        where="model.id",
        fix="The closed forms still say how much it needs, about; a first step on the device says it exactly.",
    )


def _read(path: Path) -> Traced | None:
    try:
        doc = json.loads(path.read_text(encoding="utf-8"))
        peaks = {str(phase): int(size) for phase, size in doc["peaks"].items()}
        return Traced(peaks, int(doc["reserved"]), int(doc["expandable"]), bool(doc["packed"]), 0.0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # another process's crash, or nobody has asked before


def _write(path: Path, result: Traced) -> None:
    """Aside and renamed: a reader finds all of it or nothing. A full or read-only disk costs only the time saved."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
            json.dump(asdict(result), file)
        Path(file.name).replace(path)
    except OSError:
        return


def main() -> None:
    """The worker: a request on standard input, a list of traces as the last line of standard output."""
    request = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints
    from tunesmith.executors.kernel.sizing import traced_step

    traced_step.load(request)
    try:
        found = traced_step.steps(request)
    except NotImplementedError:
        if not request["packed"]:
            raise
        found = traced_step.steps({**request, "packed": False})
    print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
