"""Where data lies: a file, a glob or a folder on this machine, or the id of a data set on the Hub."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Literal

from tunesmith.orchestrator.errors import InputError

Kind = Literal["json", "jsonl", "csv", "tsv", "parquet", "txt"]

KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
KNOWN = "JSON, JSON lines, CSV, TSV, Parquet and plain text (.txt), each also as .gz"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SIDE_FILES = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}


def is_hub_id(source: str) -> bool:
    """Whether a source names a data set on the Hub: no such file here, and nothing about it looks like a path."""
    if not _HUB_ID.fullmatch(source) or suffix(source) in KINDS:
        return False
    path = Path(source)
    return not path.exists() and not ("/" in source and path.parent.is_dir())


def suffix(name: str) -> str:
    """The suffix that tells the format, in lower case, .gz set aside."""
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def locate(source: str, split: str = "train") -> tuple[Path, ...]:
    """The files of a local source, in a stable order. In a folder whose files are named by split, only that split's.

    Raises InputError: data.missing_file, data.no_files, data.no_split, data.outside_folder, data.unreadable.
    """
    if "\0" in source or not source.strip():
        raise InputError("The name of a data source is empty or holds a NUL byte.", code="data.missing_file")
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return (path,)
        if path.is_dir():
            return _in_folder(path, split)
        if any(sign in source for sign in "*?["):
            return _in_glob(path)
        if path.exists():
            raise InputError(
                f"{source} is neither a file nor a folder.",
                why="Devices, sockets and pipes cannot be read twice, and a run reads its data more than once.",
                fix="Write the rows to a file and name that.",
                code="data.unreadable",
                where=source,
            )
    except OSError as error:
        raise unreadable(path, error) from error
    raise _missing(source, path)


def unreadable(path: Path, error: OSError) -> InputError:
    """The typed error for a file that the system will not let us read."""
    reason = error.strerror or type(error).__name__
    fix = "Check the file's owner and mode." if isinstance(error, PermissionError) else "Check the path and the disk."
    return InputError(f"{path} cannot be read: {reason}.", code="data.unreadable", where=str(path), fix=fix)


def kind_of(path: Path) -> Kind:
    """The format of a file, by its suffix. Raises InputError data.unknown_type."""
    kind = KINDS.get(suffix(path.name))
    if kind is None:
        raise InputError(
            f"{path.name} is of a type that is not read here.",
            why=f"Read are {KNOWN}.",
            fix="Convert the file, or rename it if only the ending is wrong.",
            code="data.unknown_type",
            where=str(path),
        )
    return kind


def _in_folder(folder: Path, split: str) -> tuple[Path, ...]:
    root = folder.resolve()
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or name in _SIDE_FILES or suffix(name) not in KINDS:
                continue
            path = Path(parent, name)
            if not path.resolve().is_relative_to(root):
                raise InputError(
                    f"{path} is a link that leads out of the folder.",
                    why="A folder of data may come from anywhere; a link in it could name any file of this machine.",
                    fix="Name the file itself as a source, or copy it into the folder.",
                    code="data.outside_folder",
                    where=str(path),
                )
            found.append(path)
    rows = [path for path in found if suffix(path.name) != ".txt"]
    return _of_split(rows or found, folder, split)


def _of_split(found: list[Path], folder: Path, split: str) -> tuple[Path, ...]:
    if not found:
        raise InputError(
            f"There is no data file in {folder}.", why=f"Read are {KNOWN}.", code="data.no_files", where=str(folder)
        )
    by_split: dict[str | None, list[Path]] = {}
    for path in found:
        words = re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower())
        named = next((_SPLITS[word] for word in words if word in _SPLITS), None)
        by_split.setdefault(named, []).append(path)
    if set(by_split) == {None}:
        return tuple(found)
    wanted = by_split.get(_SPLITS.get(split.lower(), split)) or by_split.get(None)
    if wanted:
        return tuple(wanted)
    names = ", ".join(sorted(name for name in by_split if name))
    raise InputError(
        f"{folder} has no files of the split {split!r}.",
        why=f"By their names its files belong to: {names}.",
        fix="Set data.split to one of these, or name the files with a glob.",
        code="data.no_split",
        where=str(folder),
    )


def _in_glob(pattern: Path) -> tuple[Path, ...]:
    import glob

    found = sorted(glob.glob(str(pattern), recursive=True))
    files = tuple(path for path in map(Path, found) if path.is_file() and not path.name.startswith("."))
    if files:
        return files
    raise InputError(
        f"No file matches {pattern}.",
        fix="Check the pattern; ** matches any depth of folders.",
        code="data.missing_file",
        where=str(pattern),
    )


def _missing(source: str, path: Path) -> InputError:
    folder = path.parent
    if not folder.is_dir():
        why = f"The folder {folder} does not exist either."
        near = ""
    else:
        names = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
        close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
        data = [name for name in names if suffix(name) in KINDS][:3]
        near = ", ".join(close or data)
        why = f"In {folder.resolve()} there is: {near}." if near else f"{folder.resolve()} holds no data file."
    fix = "Check the spelling; relative paths begin where the request was made."
    if _HUB_ID.fullmatch(source):
        fix += " A data set of the Hub is named OWNER/NAME, and no local folder may have the name of its owner."
    return InputError(f"There is no file {source}.", why=why, fix=fix, code="data.missing_file", where=source)
