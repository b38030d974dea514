"""Memory foretold against memory measured: published runs on an L40S, and TRL's step by an earlier trace.

The runs are PEFT's method comparison on MetaMathQA (Llama-3.2-3B, batches of 4, `max_memory_reserved` a step). Each is
traced on meta tensors with all its layers in that loop's order of operations, and replayed through the allocator: a
batch of the run's first bucket, the cache emptied, the longest batch. How long that was is the one thing not published;
it is fitted on one run, and the others are foretold with it. Prints a line for each run and one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure as shared
import reference_step as reference

from tunesmith.executors.kernel.catalogue import find
from tunesmith.executors.kernel.sizing.allocator import Replay, replay
from tunesmith.executors.kernel.sizing.size import Layout
from tunesmith.executors.kernel.sizing.trace import trace

RUNS = shared.ROOT.parent / "shared" / "data" / "peft_metamathqa_l40s.json"
FITTED = "lora--llama-3.2-3B-rank32"  # the run that says how long the longest batch was
FIRST = 400  # tokens of the first batch, assumed: with 200 the full run is foretold 1.1 % lower, the others the same
BUDGET = 768  # the longest that the runs allowed
GIB = 2**30

_LORA = dict(reference.TRL.adapter or {})
LIVE: tuple[tuple[str, reference.Order, float], ...] = (  # facts/sizing.md 2.5: GiB of Llama-3.1-8B, B = 2, S = 2048
    ("LoRA r16", reference.TRL, 17.74),
    ("LoRA r64", reference.TRL.but(adapter=_LORA | {"r": 64}), 19.16),
    ("LoRA r256", reference.TRL.but(adapter=_LORA | {"r": 256}), 26.28),
    ("no checkpointing", reference.TRL.but(checkpointing=False), 42.53),
    ("QLoRA", reference.TRL.but(narrow=True), 7.50),
    ("full, fused", reference.TRL.but(adapter=None), 59.86),
)


def runs() -> dict[str, Mapping[str, Any]]:
    """The LoRA, DoRA and full runs by name. FileNotFoundError where the shared data is not there."""
    found = {run["run"]: run for run in json.loads(RUNS.read_text(encoding="utf-8"))}
    return {name: run for name, run in found.items() if run["peft"].get("peft_type", "LORA") == "LORA"}


def foretold(run: Mapping[str, Any], longest: int) -> Replay:
    """What the allocator comes to in a run whose longest batch has so many tokens a row."""
    adapter = {name: value for name, value in run["peft"].items() if name != "peft_type"} or None
    order = reference.LOOP.but(adapter=adapter, batch=run["batch_size"], lengths=(FIRST, longest))
    return replay(reference.trace(reference.config("llama-3.2-3b"), order).events)


def fit(run: Mapping[str, Any]) -> tuple[int, float]:
    """The length with which a run comes out best, and the error that is left, in per cent."""
    low, high = FIRST, BUDGET
    tried: dict[int, float] = {}
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = error(foretold(run, middle), run)
        low, high = (middle, high) if tried[middle] < 0 else (low, middle)
    best = min(tried, key=lambda length: abs(tried[length]))
    return best, tried[best]


def error(found: Replay, run: Mapping[str, Any]) -> float:
    """Per cent by which reserved memory was foretold too high."""
    return 100 * (found.reserved / run["memory_reserved_max"] - 1)


def measure() -> dict[str, Any]:
    """All cells; the closing figures are those of the runs that nothing was fitted on."""
    wanted = runs()
    longest, left = fit(wanted[FITTED])
    print(f"longest batch {longest} tokens, fitted on {FITTED} ({left:+.2f} %)", flush=True)
    cells = []
    for name, run in wanted.items():
        begun = time.perf_counter()
        found = foretold(run, longest)
        cell = {
            "run": name,
            "foretold_gib": round(found.reserved / GIB, 3),
            "measured_gib": round(run["memory_reserved_max"] / GIB, 3),
            "error_percent": round(error(found, run), 2),
            "live_gib": round(found.live / GIB, 3),
            "seconds": round(time.perf_counter() - begun, 1),
            "fitted": name == FITTED,
        }
        cells.append(cell)
        print(
            f"{name:44} {cell['foretold_gib']:7.3f} GiB foretold {cell['measured_gib']:7.3f} measured"
            f" {cell['error_percent']:+6.2f} %{'  (fitted)' if cell['fitted'] else ''}",
            flush=True,
        )
    errors = [abs(cell["error_percent"]) for cell in cells if not cell["fitted"]]
    live = [_live(*item) for item in LIVE]
    seconds = tracing_seconds()
    print(f"a step of ours of a 70B config traced in {seconds:.2f} s, imports left out", flush=True)
    return {
        "mean_abs_error_percent": round(sum(errors) / len(errors), 3),
        "max_abs_error_percent": round(max(errors), 3),
        "cells": len(errors),
        "fitted": {"run": FITTED, "longest_batch": longest, "error_percent": round(left, 2)},
        "live_max_abs_error_percent": max(abs(item["error_percent"]) for item in live),
        "trace_70b_seconds": round(seconds, 2),
        "runs": cells,
        "live": live,
    }


def tracing_seconds(times: int = 3) -> float:
    """The median of what tracing our own kernel's step takes for Llama-3.1-70B, imports left out."""
    facts = find("llama-3.1-70b")
    assert facts is not None
    layout = Layout(
        facts=facts, kind="lora", rank=16, targets=tuple(facts.linears), dtype="bfloat16", tokens=4096, longest=2048,
        checkpointing=True, device="cuda",
    )  # fmt: skip
    shape = reference.config("llama-3.1-70b").to_dict()
    return statistics.median(trace(shape, layout).seconds for _ in range(times))


def _live(name: str, order: reference.Order, wanted: float) -> dict[str, Any]:
    begun = time.perf_counter()
    peaks = reference.live_peaks("llama-3.1-8b", order)
    phase = max(peaks, key=lambda key: peaks[key])
    found = peaks[phase] / GIB
    apart = 100 * (found / wanted - 1)
    print(f"TRL, Llama-3.1-8B, {name:20} {found:7.3f} GiB live, at {phase:9} {wanted:6.2f} before {apart:+6.2f} %")
    seconds = round(time.perf_counter() - begun, 2)
    return {"name": name, "gib": round(found, 3), "phase": phase, "error_percent": round(apart, 2), "seconds": seconds}


def main() -> None:
    """Run alone."""
    shared.close("memory_l40s", measure(), "torch", "transformers", "peft", "trl")


if __name__ == "__main__":
    main()
