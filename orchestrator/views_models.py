"""The models that are known and how good estimates were, drawn for a terminal. All text goes in inert, as elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tunesmith.orchestrator import figures, views
from tunesmith.orchestrator.events import number
from tunesmith.orchestrator.views import Doc


def models(doc: Doc) -> RenderableType:
    """The models of the catalogue."""
    rows = doc.get("models") or []
    table = _table("model", "parameters", "context", "licence", "weights")
    for row in rows:
        here = row.get("at_hand")
        table.add_row(
            views.text(row.get("id", ""), limit=80),
            Text(figures.count(row.get("params"))),
            Text(figures.count(row.get("context"))),
            views.text(row.get("licence") or "", limit=30),
            Text("here" if here else "on the Hub", style="green" if here else "dim"),
        )
    hint = "Any other model of the Hub, a folder or a .gguf file works too. How good estimates were: --accuracy"
    return Group(table, Text(hint, style="dim"))


def accuracy(doc: Doc) -> RenderableType:
    """Past runs by what they ran on: what was foretold against what came; below, how good that was over all of them."""
    rows = doc.get("runs") or []
    if not rows:
        return Text('No run has ended in this home yet. Start one: tunesmith run "Fine-tune Qwen3-0.6B on data.jsonl"')
    places: dict[str, list[Doc]] = {}
    for row in rows:
        places.setdefault(_place(row.get("stack") or {}), []).append(row)
    parts: list[RenderableType] = []
    for place, there in places.items():
        parts += [views.text(place, "bold"), Padding(_runs(there), (0, 0, 1, 2))]
    parts += [_said(doc.get(key) or {}, name) for key, name in (("memory", "memory"), ("seconds", "time"))]
    return Group(*parts)


def _place(stack: Doc) -> str:
    """A device with its versions, in one line."""
    if not stack:
        return "On what they ran was not told"
    driver = [f"driver {stack['driver']}"] if stack.get("driver") else []
    return ", ".join(
        [str(stack.get("device")), *driver, *(f"{key} {stack.get(key)}" for key in ("torch", "transformers"))]
    )


def _runs(rows: Sequence[Doc]) -> Table:
    table = _table("job", "model", "method", "memory", "foretold", "error", "took", "foretold", "inside")
    for row in rows:
        memory, seconds = row.get("memory") or {}, row.get("seconds") or {}
        table.add_row(
            views.text(row.get("job", ""), limit=20),
            views.text(row.get("model") or "", limit=60),
            views.text(row.get("method") or "", limit=10),
            Text(("over " if memory.get("exceeded") else "") + _size(memory.get("actual"))),
            Text(_size((memory.get("predicted") or {}).get("expected"))),
            Text(_percent(memory.get("error_percent"), signed=True)),
            Text(_duration(seconds.get("actual"))),
            Text(_range(seconds.get("predicted") or {})),
            _inside(seconds.get("inside")),
        )
    return table


def _said(summary: Doc, name: str) -> Text:
    runs = number(summary.get("runs"))
    if not runs:
        return Text(f"{name}: no run to compare with yet")
    error, inside = (_percent(summary.get(f"{key}_percent")) for key in ("mean_abs_error", "inside"))
    return Text(f"{name}: mean error {error}, {inside} inside the range, over {runs:.0f} run{'s' * (runs > 1)}")


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        table.add_column(name, no_wrap=name != "model", overflow="fold" if name == "model" else "ellipsis")
    return table


def _size(value: Any) -> str:
    return "" if value is None else figures.size(value)


def _duration(value: Any) -> str:
    return "" if value is None else figures.duration(value)


def _range(estimate: Doc) -> str:
    """The range in words; nothing where there is none."""
    return f"{_duration(estimate.get('low'))} to {_duration(estimate.get('high'))}" if estimate else ""


def _percent(value: Any, *, signed: bool = False) -> str:
    figure = number(value)
    return "" if figure is None else f"{figure:+.1f} %" if signed else f"{figure:.1f} %"


def _inside(value: Any) -> Text:
    if value is None:
        return Text("")
    return Text("yes", style="green") if value else Text("no", style="yellow")
