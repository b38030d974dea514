"""Where a run stands: all that a resume needs beside weights and optimizer, as JSON and safetensors, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.orchestrator.errors import InputError

_STATE = "optimizer.safetensors"
_CURSOR = "cursor.json"
_LEDGER = "ledger.json"


@dataclass(slots=True)
class Cursor:
    """Progress of a run. `ledger` lists the row numbers of every optimizer step from the first one on.

    `eased` is what was given up for want of memory, as ladder.py writes it.
    """

    step: int = 0
    tokens: int = 0
    evaluated_step: int = -1
    best_loss: float | None = None
    best_step: int = 0
    stale_evals: int = 0
    ledger: list[list[int]] = field(default_factory=list)
    eased: dict[str, Any] = field(default_factory=dict)


def save(
    folder: Path,
    cursor: Cursor,
    task: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    scaler: Mapping[str, Any],
) -> None:
    """Write cursor, ledger, optimizer state and generators into a checkpoint folder.

    `task` is what must be the same for a resume to mean anything; `names` gives each parameter its name.
    """
    from safetensors.torch import save_file

    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    scalars: dict[str, Any] = {}
    seen: set[int] = set()
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            label = f"{key}/{names[parameter]}"
            if isinstance(value, Tensor):
                tensor = value.detach().to("cpu").contiguous()
                # the 8-bit optimizer's tables are one tensor for all parameters, which safetensors refuses
                tensors[label] = tensor.clone() if tensor.data_ptr() in seen else tensor
                seen.add(tensor.data_ptr())
            else:
                scalars[label] = value
    save_file(tensors, str(folder / _STATE))
    doc = {
        "task": dict(task),
        "step": cursor.step,
        "tokens": cursor.tokens,
        "evaluated_step": cursor.evaluated_step,
        "best_loss": cursor.best_loss,
        "best_step": cursor.best_step,
        "stale_evals": cursor.stale_evals,
        "eased": cursor.eased,
        "optimizer_scalars": scalars,
        "scaler": dict(scaler),
    }
    (folder / _CURSOR).write_text(json.dumps(doc, indent=1, sort_keys=True) + "\n")
    (folder / _LEDGER).write_text(json.dumps({"steps": cursor.ledger}, separators=(",", ":")) + "\n")


def load(
    folder: Path,
    task: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
) -> tuple[Cursor, dict[str, Any]]:
    """Read back what `save` wrote from a verified folder: (cursor, scaler state). The optimizer is filled in place.

    Raises InputError (checkpoint.other_task) where the run asked for is not the one that was saved.
    """
    from safetensors.torch import load_file

    doc = json.loads((folder / _CURSOR).read_text())
    changed = sorted(key for key in {*task, *doc["task"]} if task.get(key) != doc["task"].get(key))
    if changed:
        raise other_task(folder, ", ".join(changed))
    tensors = load_file(str(folder / _STATE))
    scalars = doc["optimizer_scalars"]
    for parameter, name in names.items():
        found = {label.partition("/")[0]: value for label, value in scalars.items() if label.endswith(f"/{name}")}
        found |= {label.partition("/")[0]: value for label, value in tensors.items() if label.partition("/")[2] == name}
        if not found:
            if doc["step"]:
                raise other_task(folder, name)
            continue
        # Adam's own step counter stays where the optimizer keeps it; everything else goes beside its parameter
        optimizer.state[parameter] = {
            key: value.to(parameter.device)
            if isinstance(value, Tensor) and (value.dim() or parameter.is_cuda)
            else value
            for key, value in found.items()
        }
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    steps = json.loads((folder / _LEDGER).read_text())["steps"]
    cursor = Cursor(
        step=doc["step"],
        tokens=doc["tokens"],
        evaluated_step=doc["evaluated_step"],
        best_loss=doc["best_loss"],
        best_step=doc["best_step"],
        stale_evals=doc["stale_evals"],
        ledger=steps,
        eased=dict(doc.get("eased", {})),
    )
    return cursor, dict(doc["scaler"])


def other_task(folder: Path, what: str) -> InputError:
    """The error for a checkpoint of another run."""
    return InputError(
        "The checkpoint belongs to another run.",
        code="checkpoint.other_task",
        why=f"These differ: {what}.",
        fix="Keep data, batch, seed, model and adapter as they were, or start a new job.",
        where=str(folder),
    )
