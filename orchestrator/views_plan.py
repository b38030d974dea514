"""A plan as a person reviews it, and a data check: what was understood, chosen and foretold, and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from tunesmith.orchestrator import figures, views
from tunesmith.orchestrator.events import number
from tunesmith.orchestrator.inert import inert

Doc = Mapping[str, Any]

_INTENTS = {
    "status": "This asks how a job is doing.",
    "check": "This asks whether data can be used.",
    "advice": "This asks for advice.",
    "export": "This asks to export a result.",
    "train": "This asks to train.",
}


def plan(doc: Doc) -> RenderableType:
    """A plan for review. For a request that does not train: what it asks, and the command for it."""
    parts: list[RenderableType] = []
    stages = doc.get("stages") or []
    if doc.get("intent") != "train":
        parts.append(Text(_INTENTS.get(str(doc.get("intent")), "This asks for something else.")))
    parts += _understood(doc)
    for index, stage in enumerate(stages, 1):
        parts.append(_stage(stage, index, len(stages)))
    problems = [*(doc.get("findings") or [])]
    for stage in stages:
        problems += [*(stage.get("findings") or []), *((stage.get("data") or {}).get("problems") or [])]
    if problems:
        parts.append(views.findings(problems))
    if doc.get("questions"):
        parts.append(views.questions(doc["questions"]))
    if stages and doc.get("plan_hash"):
        parts.append(Text(f"plan {inert(doc['plan_hash'], limit=12 + 3).rstrip('.')}", style="dim"))
    if doc.get("intent") != "train" and doc.get("command"):
        parts.append(Text.assemble(("use: ", "dim"), views.text(command(doc))))
    return Group(*parts)


def command(doc: Doc) -> str:
    """The plan's command as one would type it."""
    import shlex

    return shlex.join(inert(word, limit=500) for word in doc.get("command") or [])


def _understood(doc: Doc) -> list[RenderableType]:
    rows: list[tuple[str, RenderableType]] = []
    for item in doc.get("understood") or []:
        line = views.text(_value(item.get("value")))
        if item.get("why"):
            line.append(f"   {inert(item['why'], limit=200)}", style="dim")
        rows.append((inert(item.get("key", ""), limit=60), line))
    parts: list[RenderableType] = []
    if rows:
        parts += [Text("Understood", style="bold"), Padding(views.facts(rows), (0, 0, 0, 2))]
    unread = [inert(word, limit=80) for word in doc.get("unread") or []]
    if unread:
        parts.append(Text(f"Not understood: {', '.join(unread)}", style="yellow"))
    return parts


def _stage(stage: Doc, index: int, count: int) -> RenderableType:
    spec, data, size = stage.get("spec") or {}, stage.get("data") or {}, stage.get("size")
    model = (spec.get("model") or {}).get("id", "")
    sources = ", ".join(inert(item.get("source", ""), limit=100) for item in spec.get("data") or [])
    title = f"{str(spec.get('method', '')).upper()}  {inert(model, limit=100)}  on  {sources}"
    if count > 1:
        title = f"{index}.  {title}"
    rows: list[tuple[str, RenderableType]] = [("Data", _data(data))]
    if size:
        rows.append(("Model", _model(spec, size)))
        rows.append(("Memory", _memory(size)))
        rows += [("Elsewhere", _elsewhere(size["elsewhere"]))] if size.get("elsewhere") else []
    rows.append(("Training", _training(spec)))
    if method := _method(spec):
        rows.append(("Method", method))
    if stage.get("time"):
        time = stage["time"]
        line = Text(figures.estimate(time.get("seconds")))
        line.append(f"   at {figures.estimate(time.get('tokens_per_second'))}", style="dim")
        rows.append(("Time", line))
    parts: list[RenderableType] = [Rule(Text(title, style="bold"), align="left", style="dim"), views.facts(rows)]
    chosen = [(inert(item.get("key", ""), limit=60), _chosen(item)) for item in stage.get("resolved") or []]
    if chosen:
        parts += [Text("Chosen for you", style="bold"), Padding(views.facts(chosen), (0, 0, 0, 2))]
    offers = stage.get("offers") or []
    if len(offers) > 1 or any(number(offer.get("usd_per_hour")) for offer in offers):
        parts.append(_offers(offers))
    return Group(*parts)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return figures.amount(value) if number(value) is not None else str(value).lower()


def _chosen(item: Doc) -> Text:
    line = views.text(_value(item.get("value")), limit=120)
    line.append(f"   {inert(item.get('why', ''), limit=200)}", style="dim")
    return line


def _data(data: Doc) -> RenderableType:
    if data.get("rows") is None:
        return Text("not read from here", style="yellow")
    said = [f"{figures.count(data['rows'])} rows"]
    if data.get("used_rows") is not None and data["used_rows"] != data["rows"]:
        said.append(f"{figures.count(data['used_rows'])} used")
    if data.get("eval_rows"):
        said.append(f"{figures.count(data['eval_rows'])} held out")
    line = views.text(", ".join(said))
    if data.get("format"):
        line.append(f"   {inert(data['format'], limit=60)}", style="dim")
    tokens = data.get("tokens")
    if tokens:
        line.append("\n")
        line.append_text(_tokens(tokens))
    return line


def _tokens(tokens: Doc) -> Text:
    said = ", ".join(f"{name} {figures.count(tokens.get(key))}" for name, key in _LENGTHS)
    line = Text(f"tokens a row: {said}")
    total = dict(tokens.get("total") or {}, source=f"by {_MEANS.get(str(tokens.get('method')), 'count')}")
    line.append(f"   {figures.estimate(total)} in all" if tokens.get("total") else "", style="dim")
    if tokens.get("truncated_rows"):
        line.append(f"   {figures.count(tokens['truncated_rows'])} rows are cut", style="yellow")
    return line


_MEANS = {"bytes-per-token": "bytes per token", "sample": "a sample", "tokenizer": "the tokenizer"}
_LENGTHS = (("median", "p50"), ("95 %", "p95"), ("longest", "max"))


def _model(spec: Doc, size: Doc) -> Text:
    adapter = spec.get("adapter") or {}
    kind = inert(adapter.get("kind", ""), limit=20)
    part = figures.share(size.get("trainable"), size.get("params"))
    line = Text(f"{figures.count(size.get('params'))} parameters, {figures.count(size.get('trainable'))} trained")
    line.append(f" ({part})" if part else "")
    how = "all weights" if kind == "none" else f"{kind} rank {inert(size.get('rank'), limit=8)}"
    line.append(f"   {how}", style="dim")
    if size.get("quantization"):
        line.append(f"   {inert(size['quantization'], limit=30)}", style="dim")
    return line


def _memory(size: Doc) -> RenderableType:
    peak, device = size.get("peak_bytes") or {}, number(size.get("device_bytes")) or 0.0
    expected, high = number(peak.get("expected")) or 0.0, number(peak.get("high")) or 0.0
    style = "green" if size.get("fits") and high <= device else ("yellow" if size.get("fits") else "red")
    line = views.bar(expected / device if device else 1.0, style=style)
    line.append(f"  {figures.estimate(peak)} of {figures.size(device)}")
    if not size.get("fits"):
        line.append("   does not fit", style="bold red")
    parts = sorted((size.get("parts") or {}).items(), key=lambda item: -(number(item[1]) or 0))
    named = [f"{inert(name, limit=30)} {figures.size(value)}" for name, value in parts if number(value)]
    if named:
        line.append("\n" + "   ".join(named), style="dim")
    return line


def _elsewhere(cards: list[Doc]) -> Text:
    """The next smaller and the next larger card: whether it would do, and how fast it would be."""
    said = []
    for card in cards:
        name = f"{inert(card.get('hardware', ''), limit=40)} ({figures.size(card.get('memory_bytes'))})"
        speed = number(card.get("speed"))
        does = "fits" if card.get("fits") else "does not fit"
        said.append(f"{name} {does}" + (f", {figures.amount(round(speed, 2))} times as fast" if speed else ""))
    return Text("   ".join(said), style="dim")


def _training(spec: Doc) -> Text:
    """How long and how; what is still `auto` (nothing could be sized) is left out."""
    train = spec.get("train") or {}
    steps, epochs = train.get("max_steps"), train.get("epochs")
    length = f"{figures.amount(steps)} steps" if steps else f"{figures.amount(epochs)} epoch{'s' * (epochs != 1)}"
    said = [
        (epochs, length),
        (train.get("learning_rate"), f"learning rate {figures.amount(train.get('learning_rate'))}"),
        (train.get("scheduler"), f"{inert(train.get('scheduler'), limit=20)} schedule"),
        (train.get("effective_batch"), f"{figures.amount(train.get('effective_batch'))} rows a step"),
        (train.get("max_length"), f"up to {figures.amount(train.get('max_length'))} tokens"),
        (train.get("dtype"), inert(train.get("dtype"), limit=20)),
    ]
    return Text(", ".join(text for value, text in said if value not in (None, "auto")))


def _method(spec: Doc) -> Text | None:
    """What is particular to the method: what it compares with, what it writes, what it is rewarded for."""
    name = str(spec.get("method", ""))
    read = spec.get({"rloo": "grpo"}.get(name, name)) or {}
    most = f"of up to {figures.amount(read.get('max_completion'))} tokens"
    beta = read.get("beta")
    said = {
        "dpo": [f"loss {inert(read.get('loss'), limit=20)}", f"beta {figures.amount(beta)}"],
        "kto": [f"beta {figures.amount(beta)}"],
        "grpo": [f"{figures.amount(read.get('num_generations'))} answers {most} to each prompt"],
        "distill": [f"answers {most}, judged by {inert(read.get('teacher'), limit=100)}"],
    }
    said["rloo"] = said["grpo"]
    parts = said.get(name, [])
    if name in ("grpo", "rloo"):
        parts += [f"rewarded by {', '.join(inert(item, limit=60) for item in read.get('rewards') or [])}"]
        parts += [f"KL weighted {figures.amount(beta)}"] if beta else []
    if read.get("reference") == "none":
        parts += ["no reference"]
    return Text(", ".join(parts)) if parts else None


def _offers(offers: list[Doc]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("backend", "hardware", "fits", "time", "cost", "at worst"):
        table.add_column(name)
    for offer in offers:
        fits = "yes" if offer.get("fits") else inert(offer.get("why_not") or "no", limit=100)
        usd = offer.get("usd")
        table.add_row(
            views.text(offer.get("backend", ""), limit=20),
            views.text(offer.get("hardware", ""), limit=40),
            Text(fits, style="" if offer.get("fits") else "dim"),
            Text(figures.duration((offer.get("seconds") or {}).get("expected"))),
            Text(figures.estimate(usd) if usd else figures.money(0)),
            Text(figures.money(offer["usd_worst"]) if offer.get("usd_worst") is not None else ""),
        )
    return table


def check(doc: Doc) -> RenderableType:
    """A data check: verdict for each method, lengths, what a row becomes, what is wrong."""
    head = Text(f"{figures.count(doc.get('rows'))} rows", style="bold")
    head.append(f"   {inert(doc.get('format') or 'format not recognised', limit=80)}")
    columns = ", ".join(inert(name, limit=60) for name in (doc.get("columns") or [])[:20])
    parts: list[RenderableType] = [head, Text(f"columns: {columns}", style="dim")]
    verdict = Table.grid(padding=(0, 2))
    for method, ready in (doc.get("ready") or {}).items():
        word = Text("ready", style="green") if ready else Text("not ready", style="red")
        verdict.add_row(views.text(str(method).upper(), "bold", limit=20), word)
    parts.append(verdict)
    mapping = doc.get("mapping")
    if isinstance(mapping, Mapping) and mapping.get("columns"):
        said = ", ".join(
            f"{inert(role, limit=40)} = {inert(name, limit=60)}" for role, name in mapping["columns"].items()
        )
        parts.append(Text(f"mapping: {inert(mapping.get('kind', ''), limit=40)}   {said}", style="dim"))
    if doc.get("tokens"):
        parts += [_tokens(doc["tokens"]), *_histogram(doc["tokens"])]
    for row in (doc.get("preview") or [])[:2]:
        parts.append(_preview(row))
    if doc.get("problems"):
        parts.append(views.findings(doc["problems"]))
    return Group(*parts)


def _histogram(tokens: Doc) -> list[RenderableType]:
    """`histogram` is [[upper bound, rows], ...]."""
    bins = [(number(pair[0]), number(pair[1])) for pair in tokens.get("histogram") or [] if len(pair) == 2]
    known = [(bound, rows) for bound, rows in bins if bound is not None and rows is not None]
    most = max((rows for _, rows in known), default=0.0)
    if not most:
        return []
    table = Table.grid(padding=(0, 1))
    for bound, rows in known:
        table.add_row(Text(f"<= {figures.count(bound)}", justify="right"), views.bar(rows / most), figures.count(rows))
    return [table]


def _preview(row: Doc) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    table.add_column("a row as it is", ratio=1, overflow="fold")
    table.add_column("as it is trained on", ratio=1, overflow="fold")
    table.add_row(_pretty(row.get("before")), _pretty(row.get("after")))
    return table


def _pretty(value: Any) -> Text:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1, default=str)
    return Text(inert(shown, lines=True, limit=600))
