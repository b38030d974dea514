"""Documents drawn for a terminal with rich. Every text that comes from data, logs or users is made inert first.

Nothing here interprets markup: all text goes in as `Text`. A view never fails on a document with fields missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tunesmith.orchestrator import figures
from tunesmith.orchestrator.events import number
from tunesmith.orchestrator.inert import inert
from tunesmith.orchestrator.progress import Progress

Doc = Mapping[str, Any]

BAR = 24
BESIDE = ("preflight/", "memory/", "time/")  # series about the machine, not about learning
_SPARKS = "▁▂▃▄▅▆▇█"
_MARKS = {"error": ("error", "bold red"), "warning": ("warning", "yellow"), "info": ("note", "cyan")}
_STATES = {
    "succeeded": "green",
    "running": "bold cyan",
    "failed": "bold red",
    "lost": "bold red",
    "cancelled": "dim",
    "rejected": "dim",
    "awaiting_input": "yellow",
    "awaiting_approval": "yellow",
}


def text(value: object, style: str = "", limit: int | None = 300) -> Text:
    """One line of inert text."""
    return Text(inert(value, limit=limit), style=style, overflow="fold")


def facts(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    """Two columns: a label and what is known."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label), value)
    return table


def bar(share: float, width: int = BAR, style: str = "cyan") -> Text:
    """A bar filled to `share` (0 to 1)."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return Text.assemble(("█" * filled, style), ("░" * (width - filled), "dim"))


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """The course of a series in one line; every column shows the mean of its share of the points."""
    if not values:
        return ""
    columns = min(width, len(values))
    means = []
    for column in range(columns):
        part = values[column * len(values) // columns : (column + 1) * len(values) // columns]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    if high == low:
        return _SPARKS[3] * columns
    return "".join(_SPARKS[int((value - low) / (high - low) * (len(_SPARKS) - 1))] for value in means)


def state(value: object) -> Text:
    """The state of a job or an attempt, in its colour."""
    name = inert(value, limit=40)
    return Text(name.replace("_", " "), style=_STATES.get(name, ""))


def findings(items: Sequence[Doc]) -> Group:
    """What checks found, errors first, each with the way out."""
    order = list(_MARKS)
    lines: list[RenderableType] = []
    ranked = sorted(items, key=lambda item: order.index(str(item.get("level"))) if item.get("level") in order else 9)
    for item in ranked:
        word, style = _MARKS.get(str(item.get("level")), ("note", ""))
        line = Text.assemble((f"{word}: ", style))
        line.append_text(text(item.get("message", "")))
        if item.get("where"):
            line.append(f"  ({inert(item['where'], limit=120)})", style="dim")
        lines.append(line)
        if item.get("fix"):
            lines.append(Padding(text(item["fix"], "dim"), (0, 0, 0, 2)))
    return Group(*lines)


def error(doc: Doc) -> Group:
    """An error for people: what happened, why, what to do next."""
    head = Text.assemble(("Error: ", "bold red"))
    head.append_text(text(doc.get("message", "unknown error"), limit=2000))
    lines: list[RenderableType] = [head]
    lines += [text(doc[key], style, limit=2000) for key, style in (("why", ""), ("fix", "bold")) if doc.get(key)]
    return Group(*lines)


def questions(items: Sequence[Doc]) -> Group:
    """What a plan asks, and how to answer."""
    lines: list[RenderableType] = []
    for item in items:
        lines.append(Text.assemble(("question: ", "yellow"), text(item.get("text", ""))))
        choices = [inert(choice, limit=80) for choice in item.get("choices") or []]
        hint = f"{inert(item.get('field', ''), limit=80)}=" + (" | ".join(choices) if choices else "...")
        lines.append(Padding(Text(hint, style="dim"), (0, 0, 0, 2)))
    return Group(*lines)


def jobs(doc: Doc) -> RenderableType:
    """The jobs table."""
    rows = doc.get("jobs") or []
    if not rows:
        return Text('No jobs yet. Start one: tunesmith run "Fine-tune Qwen3-0.6B on data.jsonl"')
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("id", "name", "state", "method", "model", "backend", "step", "loss", "left"):
        table.add_column(name, no_wrap=name in ("id", "state", "step", "loss", "left"), overflow="ellipsis")
    for row in rows:
        progress, last = row.get("progress") or {}, row.get("last") or {}
        loss = last.get("train/loss")
        eta = progress.get("eta_seconds") if row.get("state") == "running" else None
        table.add_row(
            text(row.get("id", ""), limit=20),
            text(row.get("name") or "", limit=40),
            state(row.get("state", "")),
            text(row.get("method") or "", limit=20),
            text(row.get("model") or "", limit=60),
            text(row.get("backend") or "", limit=20),
            Text(steps(progress)),
            Text(figures.amount(loss) if loss is not None else ""),
            Text(figures.duration(eta) if eta is not None else ""),
        )
    parts: list[RenderableType] = [table]
    if doc.get("next"):
        parts.append(text(f"There are more: tunesmith jobs --before {doc['next']}", "dim"))
    return Group(*parts)


def steps(progress: Doc) -> str:
    """ "12/20", "12", or nothing."""
    step, total = number(progress.get("step")), number(progress.get("total_steps"))
    if step is None:
        return ""
    return f"{step:,.0f}/{total:,.0f}" if total is not None else f"{step:,.0f}"


def show(doc: Doc) -> RenderableType:
    """One job: what it is, where it stands, what came of it."""
    spec, progress, last = doc.get("spec") or {}, doc.get("progress") or {}, doc.get("last") or {}
    rows: list[tuple[str, RenderableType]] = [("State", state(doc.get("state", "")))]
    model = (spec.get("model") or {}).get("id")
    if model:
        data = ", ".join(inert(item.get("source", ""), limit=100) for item in spec.get("data") or [])
        rows.append(("What", text(f"{str(spec.get('method', '')).upper()}  {model}  on  {data}")))
    if doc.get("backend"):
        rows.append(("Backend", text(doc["backend"])))
    if steps(progress):
        line = Text(steps(progress))
        if progress.get("total_steps"):
            line = Text.assemble(bar((number(progress.get("step")) or 0) / progress["total_steps"]), "  ", line)
        if progress.get("tokens_per_second"):
            line.append(f"   {figures.amount(progress['tokens_per_second'])} tokens/s")
        if progress.get("eta_seconds") is not None and doc.get("state") == "running":
            line.append(f"   {figures.duration(progress['eta_seconds'])} left")
        rows.append(("Progress", line))
    shown = [key for key in last if not key.startswith(BESIDE) and number(last[key]) is not None]
    if shown:
        rows.append(("Last", text("   ".join(f"{key} {figures.amount(last[key])}" for key in shown[:8]))))
    for attempt in doc.get("attempts") or []:
        rows.append((f"Attempt {inert(attempt.get('number', ''), limit=6)}", _attempt(attempt)))
    for artifact in doc.get("artifacts") or []:
        where = f"{artifact.get('path', '')}  ({figures.size(artifact.get('bytes'))})"
        rows.append((inert(artifact.get("kind", "result"), limit=20).capitalize(), text(where)))
    head = Text.assemble((inert(doc.get("id", ""), limit=20), "bold"), "  ", text(doc.get("name") or "", limit=80))
    parts: list[RenderableType] = [head, facts(rows)]
    if isinstance(doc.get("error"), Mapping):
        parts.append(error(doc["error"]))
    for remedy in doc.get("remedies") or []:
        parts.append(text(f"remedy {remedy.get('id', '')}: {remedy.get('text', '')}"))
    for alert in doc.get("alerts") or []:
        parts.append(text(f"alert: {alert.get('message', alert) if isinstance(alert, Mapping) else alert}", "yellow"))
    calm = doc.get("state") == "succeeded"
    found = [item for item in doc.get("findings") or [] if not (calm and item.get("level") == "info")]
    if found:
        parts.append(findings(found))
    if doc.get("questions"):
        parts.append(questions(doc["questions"]))
    return Group(*parts, *_next(doc))


def _attempt(attempt: Doc) -> Text:
    line = state(attempt.get("state", ""))
    line.append(f"  on {inert(attempt.get('backend', ''), limit=20)}")
    if attempt.get("exit_code") is not None:
        line.append(f"  exit code {inert(attempt['exit_code'], limit=6)}")
    if attempt.get("resumed_from"):
        line.append(f"  resumed from {inert(attempt['resumed_from'], limit=100)}")
    return line


def _next(doc: Doc) -> list[RenderableType]:
    """The command a person most likely wants next."""
    job, where = inert(doc.get("id", ""), limit=20), doc.get("state")
    hint = {
        "awaiting_input": f"tunesmith answer {job} FIELD=VALUE",
        "awaiting_approval": f"tunesmith approve {job}    or change it: tunesmith edit {job} --set KEY=VALUE",
        "queued": f"tunesmith watch {job}",
        "running": f"tunesmith watch {job}",
        "failed": f"tunesmith logs {job}    then: tunesmith retry {job}",
        "lost": f"tunesmith logs {job}    then: tunesmith retry {job}",
    }.get(str(where))
    return [Text.assemble(("next: ", "dim"), hint)] if hint else []


def metrics(doc: Doc) -> RenderableType:
    """Every series in one line: how many points, first, last, lowest, and its course."""
    series = doc.get("series") or {}
    if not series:
        return Text("No metrics yet.")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("metric", "points", "first", "last", "lowest", "course"):
        table.add_column(
            name, justify="right" if name in ("points", "first", "last", "lowest") else "left", no_wrap=True
        )
    for key, points in series.items():
        numbers = [value for _, value, *_ in points if number(value) is not None]
        finite = [float(value) for value in numbers if not isinstance(value, str)]
        table.add_row(
            text(key, limit=60),
            f"{len(points):,}",
            figures.amount(numbers[0]) if numbers else "",
            figures.amount(numbers[-1]) if numbers else "",
            figures.amount(min(finite)) if finite else "",
            sparkline(finite),
        )
    return table


def backends(doc: Doc) -> RenderableType:
    """Every backend with its devices, and why one is not ready."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("backend", "hardware", "kind", "memory", "price", "ready"):
        table.add_column(name)
    for backend in doc.get("backends") or []:
        why = backend.get("why_not")
        for device in backend.get("devices") or [{}]:
            price = number(device.get("usd_per_hour"))
            ready = why or device.get("why_not") or ("yes" if backend.get("ready") else "no")
            count = number(device.get("count")) or 1
            memory = figures.size(device.get("memory_bytes")) if device else ""
            table.add_row(
                text(backend.get("name", ""), limit=40),
                text(device.get("hardware", ""), limit=60),
                text(device.get("kind", ""), limit=10),
                Text(f"{count:.0f} x {memory}" if count > 1 else memory),
                Text("free" if not price else f"{figures.money(price)}/h"),
                text(ready, "green" if ready == "yes" else "yellow"),
            )
    return table


def doctor(doc: Doc) -> RenderableType:
    """What was looked at, and the fix for what is wrong."""
    styles = {"ok": "green", "warning": "yellow", "error": "bold red"}
    table = Table.grid(padding=(0, 2))
    for check in doc.get("checks") or []:
        status = str(check.get("status"))
        said: RenderableType = text(check.get("message", ""))
        if check.get("fix"):
            said = Group(said, text(check["fix"], "dim"))
        table.add_row(Text(status, style=styles.get(status, "")), text(check.get("name", "")), said)
    return table


def live(progress: Progress) -> RenderableType:
    """A running job as it is drawn while one follows it."""
    line = state(progress.state)
    if progress.phase:
        line.append(f"  {inert(progress.phase, limit=30)}  ")
    if progress.share is not None:
        line.append_text(bar(progress.share))
    if progress.step is not None and progress.phase in ("training", ""):
        line.append(f"  {progress.step}" + (f"/{progress.total}" if progress.total else ""), style="bold")
    elif progress.of:
        done = f"  {figures.count(progress.done)}/{figures.count(progress.of)} {inert(progress.unit, limit=20)}"
        line.append(done.rstrip())
    second = Text()
    if progress.loss is not None:
        second.append(f"loss {figures.amount(progress.loss)}", style="bold")
        if progress.first_loss is not None and progress.first_loss != progress.loss:
            second.append(f" (from {figures.amount(progress.first_loss)})", style="dim")
    if progress.tokens_per_second:
        second.append(f"   {progress.tokens_per_second:,.0f} tokens/s")
    if progress.eta_seconds is not None:
        second.append(f"   {figures.duration(progress.eta_seconds)} left")
    parts: list[RenderableType] = [line]
    if second:
        parts.append(second)
    if progress.alerts:
        parts.append(text(progress.alerts[-1], "yellow"))
    return Group(*parts)
