"""How soon the command answers: `tunesmith --help` and a whole `tunesmith plan`, beside a bare interpreter.

Each figure is of a fresh process. The plan is of the GSM8K training file in ../shared/data, or of a file of the same
size written here where that folder is missing (said in "data").
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import measure

PAIRS = 9


def data_file(folder: Path) -> Path:
    """The GSM8K training rows, or as many rows of the same lengths."""
    real = measure.ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
    if real.exists():
        return real
    made = folder / "rows.jsonl"
    with made.open("w", encoding="utf-8") as out:
        for number in range(7473):
            answer = f"We add {number} and one. " * 11 + f"\n#### {number + 1}"
            out.write(json.dumps({"question": f"What comes after {number}? " * 9, "answer": answer}) + "\n")
    return made


def main() -> None:
    """Measure and print."""
    command = str(Path(sys.executable).with_name("tunesmith"))
    with tempfile.TemporaryDirectory() as folder:
        data = data_file(Path(folder))
        env = {**os.environ, "TUNESMITH_HOME": str(Path(folder) / "home"), "HF_HUB_OFFLINE": "1"}
        plan = [command, "plan", f"Fine-tune Qwen3-0.6B on {data}", "--json"]
        taken = measure.interleave(
            {
                "python": lambda: measure.run([sys.executable, "-c", "pass"], env=env),
                "help": lambda: measure.run([command, "--help"], env=env),
                "plan": lambda: measure.run(plan, env=env),
            },
            PAIRS,
        )
    for name, seconds in taken.items():
        print(f"{name:8} median {statistics.median(seconds):.3f} s, worst {max(seconds):.3f} s of {PAIRS}")
    measure.close(
        "startup",
        {
            "help_seconds": round(statistics.median(taken["help"]), 3),
            "help_ratio_vs_python": round(measure.ratio(taken["help"], taken["python"]), 1),
            "plan_seconds": round(statistics.median(taken["plan"]), 3),
            "plan_worst_seconds": round(max(taken["plan"]), 3),
            "plan_ratio_vs_python": round(measure.ratio(taken["plan"], taken["python"]), 1),
            "data": data.name,
        },
        "click",
        "pydantic",
    )


if __name__ == "__main__":
    main()
