"""Results verified before anyone may use them: every file of output/ against the manifests beside it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.executors.local.folder import Folder, storage
from tunesmith.orchestrator.errors import StorageError
from tunesmith.orchestrator.ports import Artifact

OUTPUT = "output"
MANIFEST = "manifest.json"
MOST_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Found:
    """A file as it is on disk."""

    bytes: int
    sha256: str


def verified(folder: Folder, *, number: int, spec: str) -> list[Artifact]:
    """The artifacts of an attempt: one for each folder of output/ that has a manifest, one for each other file.

    `spec` is the beginning of the hash of the attempt's spec. Raises StorageError (codes artifacts.missing, .changed,
    .unlisted, .link, .foreign, .damaged) at the first thing that does not verify. Reads every byte once, about 1.5 GB/s
    on one core.
    """
    with storage(folder.path / OUTPUT):
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            output = os.open(OUTPUT, flags, dir_fd=folder.descriptor)
        except FileNotFoundError:
            raise refuse(folder, "", "missing", "The attempt left no results.") from None
    try:
        with storage(folder.path / OUTPUT):
            found = _hash_all(folder, output)
        _check(folder, output, "", found, number, spec)
        nested = sorted(name[: -len(MANIFEST) - 1] for name in found if name.endswith(f"/{MANIFEST}"))
        for prefix in nested:
            _check(folder, output, prefix, found, number, spec)
    finally:
        os.close(output)
    artifacts = []
    rest = {name for name in found if name != MANIFEST}
    for prefix in nested:
        inside = {name for name in rest if name.startswith(f"{prefix}/")}
        if inside:  # a manifest within a folder already taken adds nothing
            size = sum(found[name].bytes for name in inside)
            sha256 = found[f"{prefix}/{MANIFEST}"].sha256
            artifacts.append(_artifact(folder, prefix.partition("/")[0], prefix, size, sha256))
            rest -= inside
    for name in sorted(rest):
        kind = name.partition("/")[0].partition(".")[0]
        artifacts.append(_artifact(folder, kind, name, found[name].bytes, found[name].sha256))
    return artifacts


def refuse(folder: Folder, name: str, code: str, why: str) -> StorageError:
    """Why the results cannot be used."""
    path = folder.path / OUTPUT / name
    return StorageError(
        f"The results in {folder.path / OUTPUT} do not verify.",
        why=why,
        fix="Nothing was delivered. Retry the job: it goes on from its last good checkpoint.",
        code=f"artifacts.{code}",
        where=str(path),
    )


def _artifact(folder: Folder, kind: str, name: str, size: int, sha256: str) -> Artifact:
    return Artifact(kind=kind, path=str(folder.path / OUTPUT / name), bytes=size, sha256=sha256)


def _hash_all(folder: Folder, output: int) -> dict[str, Found]:
    """Every file below output/, hashed through the descriptors it was found with; anything but plain files refused."""
    found: dict[str, Found] = {}
    for here, folders, files, descriptor in os.fwalk(".", dir_fd=output, follow_symlinks=False, onerror=_raise):
        base = "" if here == "." else here[2:] + "/"
        for name in (*folders, *files):
            mode = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise refuse(folder, base + name, "link", f"{base + name!r} is a link or another special file.")
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            with open(os.open(name, flags, dir_fd=descriptor), "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                found[base + name] = Found(file.tell(), sha256)
    return found


def _raise(error: OSError) -> None:
    raise error


def _check(folder: Folder, output: int, prefix: str, found: Mapping[str, Found], number: int, spec: str) -> None:
    """One manifest against the files: it lists exactly what is below its folder, itself left out."""
    base = f"{prefix}/" if prefix else ""
    if base + MANIFEST not in found:
        raise refuse(
            folder, base + MANIFEST, "missing", "There is no manifest: the attempt did not finish its results."
        )
    listed, document = _listed(folder, output, base)
    if document.get("attempt") != number or not str(document.get("spec_hash", "")).startswith(spec):
        raise refuse(folder, base + MANIFEST, "foreign", "The manifest is of another attempt or another spec.")
    there = {
        name[len(base) :]: file for name, file in found.items() if name.startswith(base) and name != base + MANIFEST
    }
    for name in sorted(listed.keys() - there.keys()):
        raise refuse(folder, base + name, "missing", f"{name!r} is listed and is not there.")
    for name in sorted(there.keys() - listed.keys()):
        raise refuse(folder, base + name, "unlisted", f"{name!r} is there and is not listed.")
    for name, file in there.items():
        if listed[name] != {"bytes": file.bytes, "sha256": file.sha256}:
            raise refuse(folder, base + name, "changed", f"{name!r} has another content than when it was written.")


def _listed(folder: Folder, output: int, base: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    name = base + MANIFEST
    try:
        with storage(folder.path / OUTPUT / name):
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=output)
        with open(file, "rb") as stream:
            document = json.loads(stream.read(MOST_MANIFEST_BYTES))
        entries = document["files"].items()
        return {key: {"bytes": item["bytes"], "sha256": item["sha256"]} for key, item in entries}, document
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse(folder, name, "damaged", "The manifest cannot be read.") from error
