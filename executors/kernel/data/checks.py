"""The `check` document: is this data ready, for which methods, and what is wrong with it, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel.data.convert import convert
from tunesmith.executors.kernel.data.formats import SAMPLE, columns_of, shapes, understand
from tunesmith.executors.kernel.data.load import Conversion, no_usable_rows
from tunesmith.executors.kernel.data.problems import Problems, finding_of, of_mapping
from tunesmith.executors.kernel.data.report import token_stats
from tunesmith.executors.kernel.data.sources import Row, fingerprint, open_source
from tunesmith.executors.kernel.data.tokens import Lengths
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import METHODS, SCHEMA_VERSION, DataSource, Finding
from tunesmith.orchestrator.plain import plain

PREVIEW = 3
CLIP = 2000  # characters of a cell in a preview


def check(
    sources: Sequence[DataSource],
    *,
    method: str | None = None,
    tokenizer_folder: Path | None = None,
    max_length: int | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """The `check` document of design: ready by method, format, rows, columns, mapping, preview, problems, tokens.

    Without `method` the one that the data was made for is shown. Every row is read. Raises InputError where the data
    cannot be read at all (data.missing_file, data.broken_json, data.unreachable...); columns that fit no method are a
    problem in the document.
    """
    heads = [list(islice(open_source(source, offline=offline), SAMPLE)) for source in sources]
    verdicts = {name: _verdict(sources, heads, name) for name in METHODS}
    shown = method or _made_for(heads, verdicts)
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "ready": {name: verdict is None for name, verdict in verdicts.items()},
        "method": shown,
        "format": None,
        "rows": None,
        "used_rows": 0,
        "columns": list(dict.fromkeys(name for head in heads for _, values in head for name in values)),
        "mapping": None,
        "fingerprint": fingerprint(sources, offline=offline),
        "preview": [],
        "problems": [],
        "tokens": None,
    }
    try:
        _whole(document, sources, shown, method, tokenizer_folder, max_length, offline)
    except InputError as error:
        if error.code not in ("data.wrong_columns", "data.mapping"):
            raise
        named = [shape.name for head in heads for shape in shapes(columns_of([values for _, values in head]))]
        document["format"] = named[0] if named else None
        document["rows"] = sum(1 for source in sources for _ in open_source(source, offline=offline))
        document["problems"] = [plain(finding_of(error))]
    return document


def _whole(
    document: dict[str, Any],
    sources: Sequence[DataSource],
    shown: str,
    asked: str | None,
    folder: Path | None,
    max_length: int | None,
    offline: bool,
) -> None:
    conversion = Conversion(sources, method=shown, offline=offline)
    problems, lengths = Problems(), Lengths()
    dropped: list[InputError] = []
    preview: list[dict[str, Any]] = []
    used = 0
    for row, result in conversion:
        problems.see(row, result, conversion.mappings[row.source])
        if isinstance(result, InputError):
            dropped = dropped or [result]
            continue
        used += 1
        lengths.add(result)
        if len(preview) < PREVIEW:
            after = {key: value for key, value in plain(result).items() if value not in (None, {}, 0) and key != "row"}
            preview.append({"where": row.where, "before": _clip(row.values), "after": _clip(after)})
    findings: list[Finding] = problems.findings()
    if not used:
        findings.insert(0, finding_of(no_usable_rows(dropped)))
        document["ready"][shown] = False
    methods = [asked] if asked else [name for name in (shown, "sft") if document["ready"].get(name)]
    for name, source in zip(conversion.formats, sources, strict=False):
        head = [values for _, values in islice(open_source(source, offline=offline), SAMPLE)]
        for each in dict.fromkeys(methods):
            mapping = understand(head, source.mapping, method=each)[1]
            findings += [item for item in of_mapping(name, mapping, conversion.columns, each) if item not in findings]
    tokens, troubles = token_stats(lengths, None, folder, max_length or "auto") if folder else (None, [])
    document |= {
        "format": conversion.formats[0] if len(set(conversion.formats)) == 1 else "mixed",
        "rows": problems.rows,
        "used_rows": used,
        "mapping": plain(conversion.mappings[0]) if len(conversion.mappings) == 1 else plain(conversion.mappings),
        "preview": preview,
        "problems": [plain(item) for item in sorted([*findings, *troubles], key=lambda item: item.level != "error")],
        "tokens": plain(tokens),
    }


def _verdict(sources: Sequence[DataSource], heads: Sequence[list[Any]], method: str) -> InputError | None:
    """Why a method cannot use the data, judged by the first rows of each source; None where it can."""
    first: InputError | None = None
    for source, head in zip(sources, heads, strict=True):
        try:
            _, mapping = understand([values for _, values in head], source.mapping, method=method)
        except InputError as error:
            return error
        usable = False
        for number, (where, values) in enumerate(head):
            try:
                convert(Row(number, where, values), mapping)
                usable = True
            except InputError as error:
                first = first or error
        if not usable:
            return first or no_usable_rows([])
    return None


def _made_for(heads: Sequence[list[Any]], verdicts: dict[str, InputError | None]) -> str:
    """The method that the data was made for, among those it is ready for."""
    found = [shape.kind for head in heads[:1] for shape in shapes(columns_of([values for _, values in head]))]
    made = {"preference": "dpo", "unpaired": "kto", "prompt-only": "grpo"}.get(found[0], "sft") if found else "sft"
    ready = [name for name in METHODS if verdicts[name] is None]
    return made if made in ready or not ready else ready[0]


def _clip(value: Any) -> Any:
    """A value for a preview: long texts cut, with how much was cut."""
    if isinstance(value, str):
        return value if len(value) <= CLIP else f"{value[:CLIP]}... ({len(value) - CLIP:,} characters more)"
    if isinstance(value, dict):
        return {key: _clip(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clip(item) for item in value[:20]]
    if isinstance(value, int) or value is None or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)[:CLIP]
