"""Runs every "Must show" at its full count, item by item: `make proof`, or `make proof ITEMS="startup demo"`.

An item that has passed on the commit at hand is not run again, so an interrupted proof goes on where it was. Each item
leaves benchmarks/results/ITEM.json: commit, seed, machine, seconds, exit code, and the item's closing JSON line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import measure

SEED = 20261122


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to show: a command that exits 0 when it is shown."""

    name: str
    shows: str
    command: tuple[str, ...]


PYTHON = sys.executable
PYTEST = (PYTHON, "-P", "-m", "pytest", "-q", "--timeout=3600", "-m", "proof")
ITEMS = (
    Item("startup", "help <= 0.2 s, plan <= 1.0 s", (PYTHON, "benchmarks/startup.py")),
    Item("sft-throughput", "SFT against TRL", (PYTHON, "benchmarks/sft_throughput.py", "--as-is")),
    Item("dpo-throughput", "DPO against TRL", (PYTHON, "benchmarks/dpo_throughput.py")),
    Item("grpo-step", "a GRPO step against TRL's", (PYTHON, "benchmarks/grpo_step.py", "--as-is")),
    Item(
        "deaths",
        "100 runs killed at random points, also inside saves",
        (*PYTEST, "tests/executors/kernel/test_deaths.py"),
    ),
    Item("learning", "GRPO raises the reward of held-out prompts", (*PYTEST, "tests/end_to_end/test_learning.py")),
    Item("memory-l40s", "memory against published runs", (PYTHON, "benchmarks/memory_accuracy.py", "--l40s")),
    Item("memory-cpu", "memory against our own steps", (PYTHON, "benchmarks/memory_accuracy.py", "--cpu")),
    Item("memory-cgroup", "plans within an enforced limit", (PYTHON, "benchmarks/memory_accuracy.py", "--cgroup")),
    Item("planning", "tier 0 search <= 100 ms, an 8B plan <= 1.0 s", (PYTHON, "benchmarks/planning.py")),
    Item(
        "gsm8k",
        "200 rows of GSM8K, 20 steps: succeeded, and the loss fell",
        (*PYTEST, "tests/end_to_end/test_whole_job.py"),
    ),
    Item("fresh-clone", "an empty clone and HOME: make demo, then make test", (PYTHON, "benchmarks/fresh_clone.py")),
    Item("full-counts", "every test marked proof", PYTEST),
)


def shown(item: Item, commit: str) -> bool:
    """Whether this item has already passed on this very commit."""
    path = measure.RESULTS / f"{item.name}.json"
    if commit.endswith("-dirty") or not path.exists():
        return False
    result = json.loads(path.read_text(encoding="utf-8"))
    return result["commit"] == commit and result["exit_code"] == 0


def prove(item: Item, commit: str) -> bool:
    """Run one item, show its output as it comes, and write its result."""
    print(f"== {item.name}: {item.shows}", flush=True)
    begun = time.time()
    env = {**os.environ, "TUNESMITH_SEED": str(SEED)}
    tail: list[str] = []
    with subprocess.Popen(
        item.command, cwd=measure.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            tail = [*tail[-19:], line.rstrip("\n")]
    figures = None
    for line in reversed(tail):
        if line.startswith('{"benchmark"'):
            figures = json.loads(line)
            break
    result = {
        "item": item.name,
        "shows": item.shows,
        "commit": commit,
        "seed": SEED,
        "machine": measure.machine(),
        "seconds": round(time.time() - begun, 1),
        "exit_code": process.returncode,
        "figures": figures,
        "last_line": next((line for line in reversed(tail) if line.strip()), ""),
    }
    measure.RESULTS.mkdir(exist_ok=True)
    (measure.RESULTS / f"{item.name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return bool(process.returncode == 0)


def main() -> int:
    """Prove the named items, or all; the exit code is the number that failed."""
    wanted = sys.argv[1:]
    unknown = set(wanted) - {item.name for item in ITEMS}
    if unknown:
        print(f"No such item: {', '.join(sorted(unknown))}. There are: {', '.join(item.name for item in ITEMS)}.")
        return 2
    commit = measure.commit()
    failed = 0
    for item in ITEMS:
        if wanted and item.name not in wanted:
            continue
        if not wanted and shown(item, commit):
            print(f"== {item.name}: shown before on {commit}", flush=True)
            continue
        failed += not prove(item, commit)
    return failed


if __name__ == "__main__":
    sys.exit(main())
