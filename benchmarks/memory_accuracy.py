"""How near predicted memory comes to what is measured: `--l40s` published runs, `--cpu` our own steps here.

`--cgroup` runs what plans choose within a limit that the operating system enforces. Each prints a line for each cell
and closes with one JSON line; the exit code is 1 where the bounds below are not met.
"""

from __future__ import annotations

import argparse
import json

import measure

BOUNDS = {"l40s": (1.5, 3.0), "cpu": (1.0, 3.0)}  # mean and worst error, in percent


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--l40s", action="store_true", help="the tracer against PEFT's published runs on an L40S")
    which.add_argument("--cpu", action="store_true", help="the closed forms against real steps of our kernel here")
    which.add_argument("--cgroup", action="store_true", help="plans within an enforced limit of memory")
    asked = parser.parse_args()
    if asked.cgroup:
        import memory_cgroup

        return memory_cgroup.main([])
    if asked.l40s:
        import memory_l40s as chosen
    else:
        import memory_cpu as chosen
    name = "l40s" if asked.l40s else "cpu"
    found = chosen.measure()
    print(json.dumps({"benchmark": "memory_accuracy", "against": name, **found, "machine": measure.machine()}))
    mean, worst = BOUNDS[name]
    return 0 if found["mean_abs_error_percent"] <= mean and found["max_abs_error_percent"] <= worst else 1


if __name__ == "__main__":
    raise SystemExit(main())
