"""The rows of one file, streamed, each with the line where it stands. What is broken is a typed error with its place.

Files are hostile: a line is at most MAX_LINE bytes, a row nests at most MAX_DEPTH levels deep, an array that must be
held in memory is at most MAX_ARRAY bytes (after decompression).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from tunesmith.executors.kernel.data.files import Kind, kind_of, unreadable
from tunesmith.orchestrator.errors import InputError

MAX_LINE = 64 * 2**20
MAX_ARRAY = 2**30
MAX_DEPTH = 64

Record = tuple[str, dict[str, Any]]

_TURNS = frozenset({"messages", "conversations", "conversation", "dialog", "dialogue"})
_DECODER = json.JSONDecoder()


def records(path: Path) -> Iterator[Record]:
    """(where, values) of each row of a file; where is "file.jsonl:17", counting lines from 1.

    Parquet rows and rows inside a JSON object have no line of their own: "file.parquet row 17".
    Raises InputError: data.empty, data.broken_json, data.broken_csv, data.broken_file, data.encoding, data.not_rows,
    data.too_deep, data.line_too_long, data.too_large, data.unknown_type, data.unreadable.
    """
    kind = kind_of(path)
    empty = True
    try:
        for record in _READERS[kind](path):
            empty = False
            yield record
    except OSError as error:
        if error.errno is None:  # gzip's own error, not the system's
            raise _broken_gzip(path) from error
        raise unreadable(path, error) from error
    except (EOFError, zlib.error) as error:
        raise _broken_gzip(path) from error
    if empty:
        raise InputError(
            f"{path.name} holds no rows.", fix="Name a file with data in it.", code="data.empty", where=str(path)
        )


def count(path: Path) -> int:
    """How many rows a file holds. JSON lines are counted without parsing them (1 GB/s)."""
    if kind_of(path) == "jsonl" and not _starts_array(path):
        with _open(path) as lines:
            return sum(1 for _, line in _lines(path, lines) if not line.isspace())
    if kind_of(path) == "parquet":
        return int(_parquet(path).metadata.num_rows)
    return sum(1 for _ in records(path))


def nesting(value: Any) -> int:
    """How deeply containers are nested in a value, without recursion; a string is 0, [] is 1."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, level = stack.pop()
        if isinstance(item, dict):
            stack.extend((inner, level + 1) for inner in item.values())
        elif isinstance(item, list):
            stack.extend((inner, level + 1) for inner in item)
        else:
            continue
        deepest = max(deepest, level)
    return deepest


# --- bytes and lines -----------------------------------------------------------------------------------------------


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        import gzip

        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _lines(path: Path, handle: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(iter(lambda: handle.readline(MAX_LINE + 1), b""), 1):
        if len(line) > MAX_LINE:
            raise InputError(
                f"Line {number} of {path.name} is longer than {MAX_LINE >> 20} MiB.",
                why="No row of text is that long; the line breaks may be missing.",
                fix="Write one row a line.",
                code="data.line_too_long",
                where=f"{path.name}:{number}",
            )
        yield number, line


def _text(path: Path, raw: bytes, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        why = "It begins with the mark of UTF-16." if utf16 else f"Byte 0x{raw[error.start]:02x} cannot stand there."
        raise InputError(
            f"{path.name} is not UTF-8 text in line {line}.",
            why=why,
            fix=f"Convert it: iconv -f {'UTF-16' if utf16 else 'WINDOWS-1252'} -t UTF-8 {path.name} > converted.",
            code="data.encoding",
            where=f"{path.name}:{line}",
        ) from error


def _whole(path: Path) -> str:
    with _open(path) as handle:
        raw = handle.read(MAX_ARRAY + 1)
    if len(raw) > MAX_ARRAY:
        raise InputError(
            f"{path.name} is one JSON value of more than {MAX_ARRAY >> 30} GiB.",
            why="Such a file must be held in memory as a whole.",
            fix=f"Write one row a line: jq -c '.[]' {path.name} > rows.jsonl",
            code="data.too_large",
            where=str(path),
        )
    return _text(path, raw, 1)


def _broken_gzip(path: Path) -> InputError:
    return InputError(
        f"{path.name} is not a whole gzip file.",
        fix="Fetch or compress it again.",
        code="data.broken_file",
        where=str(path),
    )


def _broken_json(path: Path, line: int, reason: str, column: int | None = None) -> InputError:
    place = f"line {line}" + (f", column {column}" if column else "")
    return InputError(
        f"{path.name} is not JSON in {place}: {reason}.",
        fix="Mend or remove that line.",
        code="data.broken_json",
        where=f"{path.name}:{line}",
    )


def _not_rows(path: Path, where: str, found: Any) -> InputError:
    kind = {list: "a list", str: "a text", dict: "an object", bool: "a boolean", type(None): "null"}
    return InputError(
        f"{where} is {kind.get(type(found), 'a number')}, not a row.",
        why="A row is an object with named columns. A .json file holds an array of rows, or an object with one list.",
        code="data.not_rows",
        where=where,
    )


def _shallow(path: Path, where: str, value: Any) -> None:
    if nesting(value) > MAX_DEPTH:
        raise _too_deep(path, where)


def _too_deep(path: Path, where: str) -> InputError:
    return InputError(
        f"{where} nests deeper than {MAX_DEPTH} levels.",
        why="No row for training does; it would only exhaust the reader.",
        fix="Remove that row.",
        code="data.too_deep",
        where=where,
    )


# --- JSON ----------------------------------------------------------------------------------------------------------


def _starts_array(path: Path) -> bool:
    with _open(path) as handle:
        head = handle.read(4096)
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_jsonl(path: Path) -> Iterator[Record]:
    if _starts_array(path):
        yield from _read_array(path, _whole(path))
        return
    name = path.name
    loads = json.loads
    with _open(path) as handle:
        for number, line in _lines(path, handle):
            if line.isspace():
                continue
            where = f"{name}:{number}"
            text = _text(path, line, number)
            try:
                values = loads(text)
            except json.JSONDecodeError as error:
                raise _broken_json(path, number, error.msg, error.colno) from error
            except RecursionError as error:
                raise _too_deep(path, where) from error
            except ValueError as error:  # a number of more than 4,300 digits
                raise _broken_json(path, number, str(error).split(";")[0]) from error
            if type(values) is not dict:
                raise _not_rows(path, where, values)
            if text.count("[") + text.count("{") > MAX_DEPTH:
                _shallow(path, where, values)
            yield where, values


def _read_json(path: Path) -> Iterator[Record]:
    text = _whole(path)
    start = _skip(text, 0)
    if start == len(text):
        return
    if text[start] == "[":
        yield from _read_array(path, text)
        return
    value, end = _decode(path, text, start, 1)
    if _skip(text, end) < len(text):
        del text, value
        yield from _read_jsonl(path)  # JSON lines that are named .json
        return
    yield from _read_object(path, value)


def _read_array(path: Path, text: str) -> Iterator[Record]:
    position = _skip(text, _skip(text, 0) + 1)
    line, counted = 1, 0
    first = True
    while True:
        line += text.count("\n", counted, position)
        counted = position
        if position >= len(text):
            raise _broken_json(path, line, "the array does not end")
        if first and text[position] == "]":
            break
        where = f"{path.name}:{line}"
        value, end = _decode(path, text, position, line)
        if type(value) is not dict:
            raise _not_rows(path, where, value)
        _shallow(path, where, value)
        yield where, value
        first = False
        position = _skip(text, end)
        mark = text[position : position + 1]
        if mark == "]":
            break
        if mark != ",":
            raise _broken_json(path, line + text.count("\n", counted, position), "a comma or ] is missing")
        position = _skip(text, position + 1)
    rest = _skip(text, position + 1)
    if rest < len(text):
        raise _broken_json(path, text.count("\n", 0, rest) + 1, "something follows the array")


def _read_object(path: Path, value: Any) -> Iterator[Record]:
    if type(value) is not dict:
        raise _not_rows(path, f"{path.name}:1", value)
    lists = [(key, item) for key, item in value.items() if isinstance(item, list)]
    if len(lists) != 1 or lists[0][0] in _TURNS:
        _shallow(path, f"{path.name}:1", value)
        yield f"{path.name}:1", value
        return
    for number, item in enumerate(lists[0][1], 1):
        where = f"{path.name} row {number}"
        if type(item) is not dict:
            raise _not_rows(path, where, item)
        _shallow(path, where, item)
        yield where, item


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _decode(path: Path, text: str, start: int, line: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _broken_json(path, error.lineno, error.msg, error.colno) from error
    except RecursionError as error:
        raise _too_deep(path, f"{path.name}:{line}") from error
    except ValueError as error:
        raise _broken_json(path, line, str(error).split(";")[0]) from error


# --- tables and text -----------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Iterator[Record]:
    yield from _read_table(path, None)


def _read_tsv(path: Path) -> Iterator[Record]:
    yield from _read_table(path, "\t")


def _read_table(path: Path, delimiter: str | None) -> Iterator[Record]:
    import csv

    csv.field_size_limit(MAX_LINE)
    with _open(path) as handle:
        lines = (_text(path, line, number) for number, line in _lines(path, handle))
        first = next(lines, "")
        delimiter = delimiter or max(",;\t|", key=first.count)
        reader = csv.reader(_chain(first, lines), delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next(reader, [])
            _check_header(path, header)
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    if len(cells) != len(header):
                        raise _broken_csv(path, line, f"{len(cells)} cells where the header has {len(header)}")
                    yield f"{path.name}:{line}", dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise _broken_csv(path, line, str(error)) from error


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _check_header(path: Path, header: list[str]) -> None:
    if header and (len(set(header)) < len(header) or not all(name.strip() for name in header)):
        raise _broken_csv(path, 1, "the header has a column twice or without a name")


def _broken_csv(path: Path, line: int, reason: str) -> InputError:
    return InputError(
        f"{path.name} is not one table, line {line}: {reason}.",
        fix="Put cells that hold delimiters, quotes or line breaks in double quotes; the first line names the columns.",
        code="data.broken_csv",
        where=f"{path.name}:{line}",
    )


def _read_txt(path: Path) -> Iterator[Record]:
    with _open(path) as handle:
        for number, line in _lines(path, handle):
            text = _text(path, line, number).rstrip("\r\n")
            if text and not text.isspace():
                yield f"{path.name}:{number}", {"text": text}


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"{path.name} needs the package pyarrow to be read.",
            fix='Install it: pip install "tunesmith[train]".',
            code="data.no_reader",
            where=str(path),
        ) from error
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{path.name} is not a Parquet file.",
            why=str(error).splitlines()[0][:200],
            fix="Fetch or write it again.",
            code="data.broken_file",
            where=str(path),
        ) from error


def _read_parquet(path: Path) -> Iterator[Record]:
    table = _parquet(path)
    number = 0
    import pyarrow

    try:
        for batch in table.iter_batches(batch_size=512):
            for values in batch.to_pylist():
                number += 1
                yield f"{path.name} row {number}", values
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{path.name} breaks off after row {number}.",
            why=str(error).splitlines()[0][:200],
            code="data.broken_file",
            where=f"{path.name} row {number}",
        ) from error


_READERS = {
    "json": _read_json,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "txt": _read_txt,
}

__all__ = ["MAX_ARRAY", "MAX_DEPTH", "MAX_LINE", "Kind", "Record", "count", "nesting", "records"]
