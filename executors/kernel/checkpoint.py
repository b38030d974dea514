"""Folders that are whole or absent: written beside, flushed to disk, signed with a manifest, renamed.

A checkpoint is believed only when every byte its manifest names is there. What does not verify is named and passed
over, never used. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.orchestrator.errors import StorageError
from tunesmith.orchestrator.nouns import Finding

MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d{8,})\Z")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Written:
    """A folder that was written: its bytes, and the SHA-256 of its manifest, which covers all of them."""

    path: Path
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Found:
    """The newest checkpoint that verifies, with its manifest, and what had to be passed over to reach it."""

    path: Path | None
    manifest: dict[str, Any]
    passed_over: tuple[Finding, ...]


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return checkpoints / f"step-{step:08d}"


def write(folder: Path, fill: Callable[[Path], None], **facts: Any) -> Written:
    """Make `folder` from what `fill` writes, all or nothing; `facts` (step, attempt, spec_hash) go into its manifest.

    A folder of that name is replaced. Raises StorageError (storage.full, storage.denied); then whatever was there
    before still is.
    """
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    with storage_errors(folder):
        if not folder.parent.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            flush_folder(folder.parent.parent)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            fill(beside)
            written = sign(beside, **facts)
            if folder.exists():
                old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
                folder.rename(old)
                beside.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
            else:
                beside.rename(folder)
            flush_folder(folder.parent)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    return Written(folder, written.bytes, written.sha256)


def sign(folder: Path, **facts: Any) -> Written:
    """Flush every file below `folder` to disk and write its manifest last. One read of all bytes."""
    files: dict[str, dict[str, Any]] = {}
    total = 0
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            flush_folder(path)
        elif path.name != MANIFEST or path.parent != folder:
            size, sha = _hash(path, flush=True)
            files[path.relative_to(folder).as_posix()] = {"bytes": size, "sha256": sha}
            total += size
    text = json.dumps({"files": files, **facts}, indent=1, sort_keys=True) + "\n"
    manifest = folder / MANIFEST
    with open(manifest, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    flush_folder(folder)
    return Written(folder, total + len(text.encode()), hashlib.sha256(text.encode()).hexdigest())


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder all of whose files are there, whole.

    Raises StorageError (checkpoint.corrupt) naming the first file that is not. Reads every byte once.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = dict(manifest["files"])
        wanted = {str(name): (int(item["bytes"]), str(item["sha256"])) for name, item in files.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _corrupt(folder, MANIFEST, f"it cannot be read ({type(error).__name__})") from error
    if not wanted:
        raise _corrupt(folder, MANIFEST, "it names no files")
    for name, (size, sha) in wanted.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise _corrupt(folder, name, "its path leaves the folder")
        try:
            found = _hash(folder / name, expect=size)
        except OSError as error:
            raise _corrupt(folder, name, f"it cannot be read ({type(error).__name__})") from error
        if found[0] != size:
            raise _corrupt(folder, name, f"it has {found[0]} bytes instead of {size}")
        if found[1] != sha:
            raise _corrupt(folder, name, "its bytes have changed")
    return dict(manifest)


def steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a folder by step, newest first, believed or not."""
    try:
        names = list(checkpoints.iterdir())
    except OSError:
        return []
    matched = [(STEP.match(path.name), path) for path in names]
    return sorted(((int(match[1]), path) for match, path in matched if match), reverse=True)


def newest_verified(checkpoints: Path) -> Found:
    """The newest checkpoint that verifies. Never raises for a bad one: it becomes a finding."""
    passed: list[Finding] = []
    for step, path in steps(checkpoints):
        try:
            manifest = verify(path)
            if manifest.get("step") != step:
                raise _corrupt(path, MANIFEST, "it speaks of another step")
            return Found(path, manifest, tuple(passed))
        except StorageError as error:
            passed.append(
                Finding(level="warning", code=error.code, message=f"{error.message} {error.why}", where=str(path.name))
            )
    return Found(None, {}, tuple(passed))


def keep(checkpoints: Path, count: int, also: set[int] | None = None, *, newest: int | None = None) -> None:
    """Remove all but the newest `count` checkpoints and the steps in `also`. A failure to remove is no failure.

    Those of steps after `newest`, the one just written, do not count: they are damaged ones that a resumed run passed
    over, and it will write them anew.
    """
    found = [(step, path) for step, path in steps(checkpoints) if newest is None or step <= newest]
    for at, (step, path) in enumerate(found):
        if at >= count and step not in (also or set()):
            going = path.with_name(f".{path.name}.old")
            with contextlib.suppress(OSError):
                path.rename(going)
                shutil.rmtree(going, ignore_errors=True)


def sweep(checkpoints: Path) -> None:
    """Remove what a killed writer left beside its checkpoints. For the one writer of the folder, when it starts."""
    for path in checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn a full or forbidden disk into a StorageError, also where a library wraps the system's error."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise _full(where) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"The folder {where.parent} cannot be written.",
                code="storage.denied",
                why=os.strerror(error.errno),
                fix="Give this user the right to write there, or set TUNESMITH_HOME to another folder.",
                where=str(where),
            ) from error
        raise
    except Exception as error:
        # safetensors raises its own class with the system's message inside
        if type(error).__name__ == "SafetensorError" and re.search(r"os error (28|122|27)\b", str(error)):
            raise _full(where) from error
        raise


def flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _hash(path: Path, *, flush: bool = False, expect: int | None = None) -> tuple[int, str]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if expect is not None and size != expect:
            return size, ""
        sha = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
    return size, sha


def _full(where: Path) -> StorageError:
    return StorageError(
        f"The disk is full: {where.name} was not written.",
        code="storage.full",
        why="What was saved before is still there.",
        fix="Free some space and retry the job; it goes on from its last checkpoint.",
        where=str(where.parent),
    )


def _corrupt(folder: Path, name: str, why: str) -> StorageError:
    return StorageError(
        f"The checkpoint {folder.name} is damaged: {name}.",
        code="checkpoint.corrupt",
        why=f"{why[0].upper()}{why[1:]}.",
        fix="An older checkpoint is used where there is one.",
        where=str(folder),
    )
