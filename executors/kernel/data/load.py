"""All sources of a spec as examples: the one way from files to rows, for the plan and for the run alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from tunesmith.executors.kernel.data.convert import Example, convert
from tunesmith.executors.kernel.data.formats import SAMPLE, understand
from tunesmith.executors.kernel.data.sources import Row, open_source
from tunesmith.executors.kernel.data.split import repeats, split
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DataSource, JobSpec, Mapping


class Conversion:
    """Iterate to get (row, example or the row's InputError) over all sources; formats and mappings fill as it goes.

    Each source's mapping is found from its first rows, unless the spec says it. Errors of a whole source (a missing
    file, wrong columns) are raised; errors of one row are handed out, so that the caller counts them.
    """

    def __init__(self, sources: Sequence[DataSource], *, method: str = "sft", offline: bool = True) -> None:
        self._sources = sources
        self._method = method
        self._offline = offline
        self.formats: list[str] = []
        self.mappings: list[Mapping] = []
        self.columns: list[str] = []

    def __iter__(self) -> Iterator[tuple[Row, Example | InputError]]:
        number = 0
        for position, source in enumerate(self._sources):
            found = open_source(source, offline=self._offline)
            head = list(islice(found, SAMPLE))
            values = [row for _, row in head]
            self.columns += [name for row in values for name in row if name not in self.columns]
            try:
                name, mapping = understand(values, source.mapping, method=self._method)
            except InputError as error:
                error.where = f"{source.source}, {error.where}"
                raise
            self.formats.append(name)
            self.mappings.append(mapping)
            for where, cells in chain(head, found):
                row = Row(number, where, cells, position)
                number += 1
                try:
                    yield row, convert(row, mapping)
                except InputError as error:
                    yield row, error


def mapping_of(source: DataSource, *, method: str = "sft", offline: bool = True) -> Mapping | None:
    """The mapping of one source, from its first rows; None where it cannot be read or fits no format."""
    try:
        return understand(sample(source, offline=offline), source.mapping, method=method)[1]
    except InputError:
        return None


def sample(source: DataSource, *, offline: bool = True) -> list[dict[str, Any]]:
    """The first rows of a source as they stand in it. Raises InputError as `open_source` does."""
    return [row for _, row in islice(open_source(source, offline=offline), SAMPLE)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The rows of a run. `train` and `eval` are disjoint; `dropped` holds the error of each row that was left out.

    `train` lists a row as often as its source's weight says. `rows` counts what was read, dropped rows with it.
    """

    train: list[Example]
    eval: list[Example]
    dropped: list[InputError]
    rows: int


def prepare(spec: JobSpec, *, offline: bool = False) -> Prepared:
    """Read, convert and split the data of a spec, all in memory. Deterministic: keyed by the spec's seed and the data.

    Raises InputError as `Conversion` does, and data.no_usable_rows where nothing is left to train on.
    """
    examples, places, dropped = _collect(spec.data, spec.method, offline)
    seed = spec.train.seed
    if spec.eval.source is not None:
        first = max((example.row for example in examples), default=-1) + len(dropped) + 1
        held, _, lost = _collect([eval_source(spec)], spec.method, offline)
        held = [replace(example, row=example.row + first) for example in held]
        kept = list(range(len(examples)))
    else:
        kept, out = split(len(examples), spec.eval.fraction, seed)
        held, lost = [examples[index] for index in out], []
    train: list[Example] = []
    for position, source in enumerate(spec.data):
        mine = [examples[index] for index in kept if places[index] == position]
        if source.weight == 1:
            train += mine
        else:
            train += [
                row
                for row, times in zip(mine, repeats(len(mine), source.weight, seed), strict=True)
                for _ in range(times)
            ]
    if not train:
        raise no_usable_rows(dropped)
    return Prepared(train=train, eval=held, dropped=[*dropped, *lost], rows=len(examples) + len(dropped))


def eval_source(spec: JobSpec) -> DataSource:
    """The separate evaluation data of a spec as a source: its test split, with the training data's mapping."""
    return DataSource(source=str(spec.eval.source), split="test", mapping=spec.data[0].mapping)


def no_usable_rows(dropped: Sequence[InputError]) -> InputError:
    """The error for data of which no row can be trained on, naming the first reason."""
    first = f" The first: {dropped[0].message}" if dropped else ""
    return InputError(
        "No row of the data can be trained on.",
        why=f"{len(dropped):,} rows were read and none could be used.{first}" if dropped else "There are no rows.",
        fix=dropped[0].fix if dropped else "",
        code="data.no_usable_rows",
        where=dropped[0].where if dropped else "",
    )


def _collect(
    sources: Sequence[DataSource], method: str, offline: bool
) -> tuple[list[Example], list[int], list[InputError]]:
    examples: list[Example] = []
    places: list[int] = []
    dropped: list[InputError] = []
    for row, result in Conversion(sources, method=method, offline=offline):
        if isinstance(result, InputError):
            dropped.append(result)
        else:
            examples.append(result)
            places.append(row.source)
    return examples, places, dropped
