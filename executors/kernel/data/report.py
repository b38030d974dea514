"""What a plan says of its data: rows, format, problems, lengths. Reads everything once and loads no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tunesmith.executors.kernel.data.files import is_hub_id
from tunesmith.executors.kernel.data.load import Conversion, eval_source, no_usable_rows
from tunesmith.executors.kernel.data.problems import Problems, finding_of, of_mapping
from tunesmith.executors.kernel.data.sources import fingerprint, rows_in, selected_rows
from tunesmith.executors.kernel.data.split import held_out
from tunesmith.executors.kernel.data.tokens import Lengths
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DataReport, DataSource, Finding, JobSpec, Level, Mapping, TokenStats

HUB_ROWS = 512  # rows of a data set of the Hub that a plan looks at
UNREACHABLE = frozenset({"data.unreachable"})


class Facts(Protocol):
    """What is needed of a model's facts."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that one token of the family covers on average."""
        ...


def inspect(
    spec: JobSpec,
    *,
    facts: Facts | None = None,
    tokenizer_folder: Path | None = None,
    limit_rows: int | None = None,
    offline: bool = False,
) -> DataReport:
    """The data report of a spec. Never raises for bad data: what is wrong stands in `problems`, errors first.

    `rows` counts the sources' rows before limit and fraction, `used_rows` what can be trained on after them (a row
    counts once, whatever its source's weight); both are None where the data could not be read. With `limit_rows`, and
    for data sets of the Hub, only the first rows of each source are looked at, the rest is extrapolated, and a finding
    says so. About 20 us a row, without a tokenizer.
    """
    if limit_rows is None and any(is_hub_id(source.source) for source in spec.data):
        limit_rows = HUB_ROWS
    sources = spec.data if limit_rows is None else [_first(source, limit_rows) for source in spec.data]
    conversion = Conversion(sources, method=spec.method, offline=offline)
    problems, lengths = Problems(), Lengths()
    used = 0
    dropped: list[InputError] = []
    try:
        mark = fingerprint(spec.data, offline=offline)
        for row, result in conversion:
            problems.see(row, result, conversion.mappings[row.source])
            if isinstance(result, InputError):
                dropped = dropped or [result]
            else:
                used += 1
                lengths.add(result)
        rows, selected = _counts(spec.data, problems.rows if limit_rows is None else None, offline)
    except InputError as error:
        return _unread(error)
    findings = problems.findings()
    if not used:
        findings.insert(0, finding_of(no_usable_rows(dropped)))
    for name, mapping in zip(conversion.formats, conversion.mappings, strict=True):
        findings += [
            item for item in of_mapping(name, mapping, conversion.columns, spec.method) if item not in findings
        ]
    tokens, troubles = token_stats(lengths, facts, tokenizer_folder, spec.train.max_length)
    if selected is not None and selected > problems.rows:
        factor = selected / problems.rows
        findings.append(_looked_at(problems.rows, selected))
        used = round(used * factor)
        tokens = tokens and _scaled(tokens, factor)
    eval_rows, more = _eval_rows(spec, used, offline)
    return DataReport(
        rows=rows,
        used_rows=used,
        eval_rows=eval_rows,
        format=_one(conversion.formats),
        mapping=_common(conversion.mappings),
        fingerprint=mark,
        problems=tuple(sorted([*findings, *more, *troubles], key=lambda item: item.level != "error")),
        tokens=tokens,
    )


def token_stats(
    lengths: Lengths, facts: Facts | None, folder: Path | None, max_length: int | str
) -> tuple[TokenStats | None, list[Finding]]:
    """Lengths by the tokenizer in `folder` where it works, else by bytes per token, and what was wrong with it."""
    limit = max_length if isinstance(max_length, int) else None
    troubles: list[Finding] = []
    if folder is not None and (folder / "tokenizer.json").is_file():
        try:
            return lengths.by_tokenizer(folder, limit), []
        except InputError as error:
            troubles.append(finding_of(error, "warning"))
        except (OSError, ValueError, ImportError) as error:
            trouble = InputError("The tokenizer cannot be used to count tokens.", why=str(error), code="data.tokenizer")
            troubles.append(finding_of(trouble, "warning"))
    return lengths.by_bytes(facts.bytes_per_token if facts is not None else None, limit), troubles


def _first(source: DataSource, rows: int) -> DataSource:
    return replace(source, limit=rows if source.limit is None else min(rows, source.limit))


def _counts(sources: Sequence[DataSource], read: int | None, offline: bool) -> tuple[int | None, int | None]:
    """(rows of all sources, rows after limit and fraction); None where the Hub does not say.

    `read` is how many rows were read where all selected ones were: sources taken whole need no second look.
    """
    if read is not None and all(source.limit is None and source.fraction is None for source in sources):
        return read, read
    counts = [rows_in(source, offline=offline) for source in sources]
    known = [(source, count) for source, count in zip(sources, counts, strict=True) if count is not None]
    if len(known) < len(counts):
        return None, read
    selected = sum(selected_rows(count, source.limit, source.fraction) for source, count in known)
    return sum(count for _, count in known), selected


def _looked_at(rows: int, selected: int) -> Finding:
    return Finding(
        level="info",
        code="data.sampled",
        message=f"The first {rows:,} of {selected:,} rows were looked at; the counts of the others are extrapolated.",
        where="data",
    )


def _scaled(tokens: TokenStats, factor: float) -> TokenStats:
    """Lengths of the rows looked at as those of all rows: totals grow, and nothing is exact any more."""
    total = tokens.total
    total = replace(total, low=total.low * factor, expected=total.expected * factor, high=total.high * factor)
    return replace(
        tokens,
        total=total,
        truncated_rows=round(tokens.truncated_rows * factor),
        exact=False,
        method="sample" if tokens.method == "tokenizer" else tokens.method,
    )


def _eval_rows(spec: JobSpec, used: int, offline: bool) -> tuple[int | None, list[Finding]]:
    if spec.eval.source is None:
        return held_out(used, spec.eval.fraction), []
    count = 0
    try:
        for _, result in Conversion([eval_source(spec)], method=spec.method, offline=offline):
            count += not isinstance(result, InputError)
    except InputError as error:
        return None, [finding_of(error, _level(error))]
    return count, []


def _unread(error: InputError) -> DataReport:
    return DataReport(
        rows=None,
        used_rows=None,
        eval_rows=None,
        format=None,
        mapping=None,
        fingerprint=None,
        problems=(finding_of(error, _level(error)),),
    )


def _level(error: InputError) -> Level:
    return "warning" if error.code in UNREACHABLE else "error"


def _one(names: Sequence[str]) -> str | None:
    found = list(dict.fromkeys(names))
    return found[0] if len(found) == 1 else "mixed" if found else None


def _common(mappings: Sequence[Mapping]) -> Mapping | None:
    """The mapping of all sources, or None where they differ: then each source keeps its own."""
    return mappings[0] if mappings and all(mapping == mappings[0] for mapping in mappings) else None
