"""Spec documents as plain dicts: short forms written out, settings applied, paths absolute, quick runs cut short."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.graph.compose import KINDS
from tunesmith.graph.sentence import DATA_SUFFIXES, PACKED, WEIGHT_SUFFIXES
from tunesmith.orchestrator.nouns import Finding, Resolved

Doc = dict[str, Any]

QUICK_ROWS = 100
QUICK_STEPS = 10
_SHORT = {"model": "id", "adapter": "kind"}


def spelled_out(doc: Mapping[str, Any]) -> Doc:
    """A copy with short forms written out: `model: NAME`, `data: FILE`, `adapter: lora`; a mapping gets its kind."""
    made = copy.deepcopy(dict(doc))
    for key, first in _SHORT.items():
        if isinstance(made.get(key), str):
            made[key] = {first: made[key]}
    if isinstance(made.get("data"), (str, Mapping)):
        made["data"] = [made["data"]]
    if isinstance(made.get("grpo"), dict) and isinstance(made["grpo"].get("rewards"), str):
        made["grpo"]["rewards"] = [made["grpo"]["rewards"]]
    if isinstance(made.get("data"), (list, tuple)):
        made["data"] = [{"source": item} if isinstance(item, str) else item for item in made["data"]]
        for source in made["data"]:
            mapping = source.get("mapping") if isinstance(source, dict) else None
            if isinstance(mapping, dict) and "kind" not in mapping and isinstance(mapping.get("columns"), dict):
                kind = next((kind for roles, kind in KINDS if roles <= set(mapping["columns"])), None)
                if kind:
                    mapping["kind"] = kind
    return made


def get(doc: Any, key: str) -> Any:
    """The value at a dotted key, or None."""
    for step in steps_of(key):
        if isinstance(doc, (list, tuple)):
            doc = doc[int(step)] if step.isdecimal() and int(step) < len(doc) else None
        else:
            doc = doc.get(step) if isinstance(doc, Mapping) else None
    return doc


def steps_of(key: str) -> list[str]:
    """The steps of a dotted key; below columns and roles the rest is one step, because names of columns hold dots."""
    parts = key.split(".")
    for index, part in enumerate(parts[:-2]):
        if part in ("columns", "roles"):
            return [*parts[: index + 1], ".".join(parts[index + 1 :])]
    return parts


def apply(docs: list[Doc], sets: Mapping[str, Any]) -> list[Finding]:
    """Put settings into documents, in place. "stages.0.KEY" reaches one of several, `data.KEY` every data source."""
    findings = []
    for key, value in sets.items():
        steps = steps_of(key)
        targets = docs
        if steps[0] == "stages" and len(steps) > 2 and steps[1].isdecimal():
            targets, steps = docs[int(steps[1]) : int(steps[1]) + 1], steps[2:]
        if not targets or not all(_put(doc, steps, copy.deepcopy(value)) for doc in targets):
            message = f"{key[:200]} cannot be set."
            fix = "Write it like train.epochs=3; `tunesmith schema spec` lists the keys."
            findings.append(Finding(level="error", code="set.shape", message=message, where=key[:200], fix=fix))
    for index, doc in enumerate(docs):
        docs[index] = spelled_out(doc)
    return findings


def _put(doc: Doc, steps: list[str], value: Any) -> bool:
    if not all(steps):
        return False
    if steps[0] != "data" or len(steps) == 1:
        return _descend(doc, steps, value)
    sources = doc.setdefault("data", [])
    if isinstance(sources, (str, Mapping)):
        sources = doc["data"] = spelled_out({"data": sources})["data"]
    if not isinstance(sources, list):
        return False
    if steps[1].isdecimal():
        index = int(steps[1])
        if index > len(sources) or index >= 64:
            return False
        if index == len(sources):
            sources.append({})
        if len(steps) == 2:
            sources[index] = {"source": value} if isinstance(value, str) else value
            return True
        sources, steps = [sources[index]], ["data", *steps[2:]]
    elif not sources:
        sources.append({})
    return all(isinstance(source, dict) and _descend(source, steps[1:], copy.deepcopy(value)) for source in sources)


def _descend(holder: Doc, steps: list[str], value: Any) -> bool:
    for step in steps[:-1]:
        inner = holder.get(step)
        if step in _SHORT and isinstance(inner, str):
            inner = holder[step] = {_SHORT[step]: inner}
        if inner is None or inner == "auto" or (step == "hardware" and isinstance(inner, str)):
            inner = holder[step] = {}
        if not isinstance(inner, dict):
            return False
        holder = inner
    holder[steps[-1]] = value
    return True


def quicken(doc: Doc) -> list[Resolved]:
    """Cut a job down to a few minutes, in place: few rows and few steps, where the user said nothing else."""
    changed = []
    for index, source in enumerate(doc.get("data", [])):
        if isinstance(source, dict) and source.get("limit") is None and source.get("fraction") is None:
            source["limit"] = QUICK_ROWS
            why = f"a quick run: the first {QUICK_ROWS} rows"
            changed.append(Resolved(key=f"data.{index}.limit", value=QUICK_ROWS, why=why))
    train = doc.setdefault("train", {})
    if isinstance(train, dict) and train.get("max_steps") is None and train.get("epochs") is None:
        train["max_steps"] = QUICK_STEPS
        why = f"a quick run: {QUICK_STEPS} steps show that everything works"
        changed.append(Resolved(key="train.max_steps", value=QUICK_STEPS, why=why))
    return changed


def absolute(doc: Doc, cwd: str) -> None:
    """Make local relative paths absolute against `cwd`, in place; hub ids stay as they are. A few stat calls."""
    for source in doc.get("data", []):
        if isinstance(source, dict) and isinstance(source.get("source"), str):
            source["source"] = _absolute(source["source"], cwd)
    for section, key in (("eval", "source"), ("model", "id"), ("distill", "teacher")):
        holder = doc.get(section)
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            holder[key] = _absolute(holder[key], cwd, model=section != "eval")
    grpo = doc.get("grpo")
    if isinstance(grpo, dict) and isinstance(grpo.get("rewards"), (list, tuple)):
        from tunesmith.executors.kernel.rewards import absolute as reward_absolute

        grpo["rewards"] = [reward_absolute(item, cwd) if isinstance(item, str) else item for item in grpo["rewards"]]


def _absolute(name: str, cwd: str, *, model: bool = False) -> str:
    return os.path.normpath(Path(cwd, Path(name).expanduser())) if name and _is_path(name, cwd, model=model) else name


def _is_path(name: str, cwd: str, *, model: bool) -> bool:
    """Whether a name is a path: by its looks, or because something is there. A model is asked for by name first."""
    if "\0" in name or "://" in name or name.startswith(("job:", "stage:")):
        return False
    if name.startswith(("/", "./", "../", "~/")) or name in (".", ".."):
        return True
    low = name.lower()
    for suffix in PACKED:
        low = low.removesuffix(suffix)
    if low.endswith(WEIGHT_SUFFIXES if model else DATA_SUFFIXES) or (model and low.endswith(".py")):
        return True
    try:
        here = Path(cwd, name)
        if model:
            return (here / "config.json").is_file()
        return "*" in name or here.exists() or ("/" in name and here.parent.is_dir())
    except OSError:
        return False
