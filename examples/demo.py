"""The main job from start to end on a real model: plan, approval, training, then answers before and after.

    make demo

It works in a home of its own (.demo beside this clone), so it leaves nothing behind in yours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
TUNESMITH = str(Path(sys.executable).with_name("tunesmith"))
ROWS = 32
SHOWN = 6


def main() -> int:
    """Run the demo; the exit code is that of the first command that fails, or 1 where the tuned model is no better."""
    console = Console()
    env = {**os.environ, "TUNESMITH_HOME": str(ROOT / ".demo"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        return demo(console, env)
    finally:
        subprocess.run([TUNESMITH, "daemon", "stop"], env=env, check=False, capture_output=True)


def demo(console: Console, env: dict[str, str]) -> int:
    """Train, then compare."""
    console.rule("Train")
    command = ["tunesmith", "run", "examples/tickets.yaml", "--yes"]
    console.print(Text("$ " + " ".join(command), style="bold"))
    trained = subprocess.run([TUNESMITH, *command[1:]], cwd=ROOT, env=env, check=False)
    if trained.returncode != 0:
        return trained.returncode
    shown = subprocess.run(
        [TUNESMITH, "show", "last", "--json"], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    job = json.loads(shown.stdout)
    number = job["attempts"][-1]["number"]
    attempt = ROOT / ".demo" / "jobs" / job["id"] / "attempts" / str(number)
    console.rule("Tickets it never saw: base and tuned, side by side")
    found, summary = compare(console, attempt, env)
    if summary is None:
        return 1
    console.print(table(found[:SHOWN]))
    rows, base, tuned = summary["rows"], summary["base_right"], summary["tuned_right"]
    console.print(
        Text(f"Right answers, as strict JSON: {base} of {rows} before, {tuned} of {rows} after.", style="bold")
    )
    console.print(Text(f"The adapter: {attempt / 'output' / 'adapter'}", style="dim"))
    return 0 if tuned > base else 1


def compare(console: Console, attempt: Path, env: dict[str, str]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The held-out rows answered by both, with a count while it works; None where the program failed."""
    program = [sys.executable, "-P", "-m", "tunesmith.executors.kernel.evaluate", str(attempt), "--rows", str(ROWS)]
    found: list[dict[str, Any]] = []
    summary = None
    with (
        subprocess.Popen(program, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process,
        console.status("Loading both models...") as status,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            document = json.loads(line)
            if "row" in document:
                found.append(document)
                status.update(f"{len(found)} of {ROWS} tickets answered by both models")
            elif "error" in document:
                console.print(Text(document["error"]["message"], style="red"))
            else:
                summary = document
    return found, summary if process.returncode == 0 else None


def table(rows: list[dict[str, Any]]) -> Table:
    """A few tickets with both answers."""
    view = Table(show_lines=True)
    for title in ("ticket", "base", "tuned", "wanted"):
        view.add_column(title, ratio=1)
    for row in rows:
        view.add_row(
            Text(row["prompt"]),
            Text(row["base"], style="green" if row["base_right"] else "red"),
            Text(row["tuned"], style="green" if row["tuned_right"] else "red"),
            Text(row["reference"]),
        )
    return view


if __name__ == "__main__":
    sys.exit(main())
