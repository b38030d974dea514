"""An attempt's folder, held by descriptor: below the home, nothing is opened through a link."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.executors.local import shim
from tunesmith.orchestrator.errors import InputError, StorageError

JOB_ID = re.compile(r"j-[a-z2-7]{6}(\.[1-9][0-9]{0,2})?", re.ASCII)
MOST_ATTEMPTS = 10**6


def attempt_path(home: Path, job: str, number: int) -> Path:
    """Where attempt `number` of `job` lives. Raises InputError for a name that is not a job's or an attempt's."""
    if not isinstance(job, str) or not JOB_ID.fullmatch(job):
        raise InputError(
            f"{job!r} is not a job id.", why="An id is j- and six of a-z and 2-7.", code="job.id", where="job"
        )
    if type(number) is not int or not 1 <= number < MOST_ATTEMPTS:
        raise InputError(f"{number!r} is not the number of an attempt.", code="attempt.number", where="number")
    return home / "jobs" / job / "attempts" / str(number)


class Folder:
    """One attempt's files, relative to a descriptor of its folder. Every method may raise StorageError."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path

    @classmethod
    def make(cls, home: Path, job: str, number: int) -> Folder:
        """The folder, made 0700 with its parents where it is missing, and durably entered in them."""
        path = attempt_path(home, job, number)
        with storage(path):
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            return cls(_walk(home, path, make=True), path)

    @classmethod
    def find(cls, home: Path, job: str, number: int) -> Folder | None:
        """The folder, or None where there is none."""
        path = attempt_path(home, job, number)
        with storage(path):
            try:
                return cls(_walk(home, path, make=False), path)
            except FileNotFoundError:
                return None

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self.descriptor)

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def has(self, name: str) -> bool:
        """Whether there is an entry of that name."""
        with storage(self.path / name):
            return shim.exists(self.descriptor, name)

    def read(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file, or None where there is no such file; StorageError where it is not one."""
        with storage(self.path / name):
            try:
                return shim.read_document(self.descriptor, name)
            except (ValueError, RecursionError) as error:
                raise StorageError(
                    f"{self.path / name} is damaged.",
                    why="It is written whole or not at all, so something else changed it.",
                    code="storage.damaged",
                    where=str(self.path / name),
                ) from error

    def write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a file so that it is whole or absent, durably."""
        with storage(self.path / name):
            shim.write_document(self.descriptor, name, dict(document))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Alone among the writers of `control`: a lock on the folder itself, held for a moment only."""
        with storage(self.path):
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def take_lock(self) -> int | None:
        """A descriptor that holds `lock` exclusively, or None while a shim or another submitter holds it."""
        with storage(self.path / "lock"):
            return self._flock(os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)

    @property
    def locked(self) -> bool:
        """Whether a shim, or somebody about to start one, holds `lock` now."""
        with storage(self.path / "lock"):
            try:
                descriptor = self._flock(os.O_RDONLY, fcntl.LOCK_SH)
            except FileNotFoundError:
                return False
        if descriptor is None:
            return True
        os.close(descriptor)
        return False

    def _flock(self, flags: int, kind: int) -> int | None:
        descriptor = os.open("lock", flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self.descriptor)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _walk(home: Path, path: Path, *, make: bool) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    here = os.open(home, flags)
    try:
        for name in path.relative_to(home).parts:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=here)
                    os.fsync(here)
            below = os.open(name, flags | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
        return here
    except BaseException:
        os.close(here)
        raise


_REASONS = {
    errno.ENOSPC: ("storage.full", "The disk is full.", "Free some space, then try again."),
    errno.EDQUOT: ("storage.full", "The disk quota is used up.", "Free some space, then try again."),
    errno.ENOENT: ("storage.missing", "It is not there any more.", "Was the job's folder removed by hand?"),
    errno.EROFS: ("storage.read_only", "The file system is read-only.", "Choose another TUNESMITH_HOME."),
    errno.EACCES: ("storage.denied", "Permission is denied.", "Make the folder yours, or choose another home."),
    errno.EPERM: ("storage.denied", "Permission is denied.", "Make the folder yours, or choose another home."),
    errno.ELOOP: ("storage.link", "A link stands where a folder or file of ours belongs.", "Remove the link."),
    errno.ENOTDIR: ("storage.link", "A link or a file stands where a folder belongs.", "Remove it."),
}


def storage_error(number: int | None, text: str, path: Path) -> StorageError:
    """A failed system call as an error for people."""
    code, why, fix = _REASONS.get(number or 0, ("storage", f"The system says: {text}.", "Check the disk."))
    return StorageError(f"{path} cannot be used.", why=why, fix=fix, code=code, where=str(path))


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into StorageError."""
    try:
        yield
    except OSError as error:
        raise storage_error(error.errno, error.strerror or str(error), path) from error
