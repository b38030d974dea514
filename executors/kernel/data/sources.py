"""Rows from all sources of a spec, and the fingerprint of what they hold."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel.data import files, gym, hub, records
from tunesmith.orchestrator.nouns import DataSource

SHARE_SEED = 0  # of `fraction`: a share is the same rows whatever seed trains on them
_BLOCK = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its source.

    `number` counts from 0 over all sources, after limit and fraction; `where` is "file.jsonl:17" (lines from 1);
    `source` is the position of its source in the spec.
    """

    number: int
    where: str
    values: dict[str, Any]
    source: int = 0


def read(sources: Sequence[DataSource], *, offline: bool = True) -> Iterator[Row]:
    """Stream the rows of all sources in order. `limit` takes a source's first rows, then `fraction` a seeded share.

    With `offline` a data set of the Hub is not asked for. Raises InputError (data.*) with code, where and fix.
    """
    number = 0
    for position, source in enumerate(sources):
        for where, values in open_source(source, offline=offline):
            yield Row(number, where, values, position)
            number += 1


def open_source(source: DataSource, *, offline: bool = True) -> Iterator[records.Record]:
    """Stream (where, values) of one source, after limit and fraction. Raises InputError as `read` does."""
    return select(_records(source, offline), source.limit, source.fraction)


def rows_in(source: DataSource, *, offline: bool = True) -> int | None:
    """How many rows a source holds before limit and fraction; None where the Hub does not say."""
    if gym.is_gym(source.source):
        return gym.rows(source)
    if files.is_hub_id(source.source):
        return hub.rows(source, offline=offline)
    return sum(records.count(path) for path in files.locate(source.source, source.split))


def select(
    found: Iterable[records.Record], limit: int | None = None, fraction: float | None = None
) -> Iterator[records.Record]:
    """The first `limit` rows, and of these exactly ceil(fraction * n), drawn with a fixed seed, in their order.

    Streams: rows are drawn in blocks of 1,000, so that the share holds in every part of a file.
    """
    stream = iter(islice(found, limit))
    if fraction is None or fraction == 1:
        yield from stream
        return
    draw = random.Random(SHARE_SEED)
    seen = taken = 0
    while block := list(islice(stream, _BLOCK)):
        seen += len(block)
        wanted = math.ceil(seen * fraction - 1e-9) - taken
        taken += wanted
        order = sorted(range(len(block)), key=[draw.random() for _ in block].__getitem__)
        for index in sorted(order[:wanted]):
            yield block[index]


def selected_rows(count: int, limit: int | None, fraction: float | None) -> int:
    """How many of a source's `count` rows `select` takes."""
    first = count if limit is None else min(count, limit)
    return first if fraction is None else math.ceil(first * fraction - 1e-9)


def fingerprint(sources: Sequence[DataSource], *, offline: bool = True) -> str:
    """ "sha256:..." of what the sources hold and which rows are taken: file bytes, config, split, limit, fraction.

    Paths and the mapping are left out: the same files elsewhere are the same data, and the mapping stands in the
    spec, whose hash a plan binds too. Costs one pass over the bytes (about 1 GB/s). Raises InputError as `read` does.
    """
    whole = hashlib.sha256(b"tunesmith data 1\n")
    for source in sources:
        if gym.is_gym(source.source):
            contents = [_digest_of_rows(source)]
        elif files.is_hub_id(source.source):
            contents = [f"{source.source}@{hub.commit(source, offline=offline)}"]
        else:
            contents = [_digest(path) for path in files.locate(source.source, source.split)]
        choice = (source.config, source.split, source.limit, source.fraction, source.weight)
        whole.update(repr((contents, choice)).encode())
    return f"sha256:{whole.hexdigest()}"


def _records(source: DataSource, offline: bool) -> Iterator[records.Record]:
    if gym.is_gym(source.source):
        yield from gym.records(source)
        return
    if files.is_hub_id(source.source):
        yield from hub.records(source, offline=offline)
        return
    for path in files.locate(source.source, source.split):
        yield from records.records(path)


def _digest_of_rows(source: DataSource) -> str:
    """Of a source that is made and not stored: another version of its library may make other rows."""
    whole = hashlib.sha256()
    for _, values in gym.records(source):
        whole.update(json.dumps(values, sort_keys=True).encode())
    return whole.hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise files.unreadable(path, error) from error


__all__ = ["Row", "fingerprint", "read", "rows_in", "select"]
