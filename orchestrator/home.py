"""A home on disk: where everything of one user lives, private (0700), and what goes wrong there as typed errors."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tunesmith.orchestrator.errors import InputError, StorageError

_JOB_ID = re.compile(r"j-[a-z2-7]{6}(\.[0-9]{1,4})?", re.ASCII)
_SUN_PATH = 100  # an AF_UNIX address holds 108 bytes on Linux and 104 on macOS


@dataclass(frozen=True, slots=True)
class Home:
    """The paths of a home. Nothing is made on disk before `make`."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(os.path.abspath(self.path)))

    @property
    def state_db(self) -> Path:
        """The store: the truth about every job."""
        return self.path / "state.db"

    @property
    def metrics_db(self) -> Path:
        """Event lines of every attempt; can be rebuilt from the attempts' event files."""
        return self.path / "metrics.db"

    @property
    def graph_db(self) -> Path:
        """LangGraph's own checkpoints; may be deleted at any time."""
        return self.path / "graph.db"

    @property
    def socket(self) -> Path:
        """The daemon's Unix socket, mode 0600. Bind and connect through `address`, which is never too long."""
        return self.path / "socket"

    @property
    def daemon_lock(self) -> Path:
        """Held (flock) by the one daemon of this home; its first line is that daemon's pid."""
        return self.path / "daemon.lock"

    @property
    def driver_lock(self) -> Path:
        """Held (flock) by the one driver process of this home."""
        return self.path / "driver.lock"

    @property
    def daemon_log(self) -> Path:
        """What the daemon has to say."""
        return self.path / "daemon.log"

    @property
    def driver_log(self) -> Path:
        """What the driver has to say."""
        return self.path / "driver.log"

    @property
    def cache(self) -> Path:
        """Converted weights and downloads; may be deleted when no job runs."""
        return self.path / "cache"

    @property
    def trackio(self) -> Path:
        """The local dashboard's data."""
        return self.path / "trackio"

    @property
    def jobs(self) -> Path:
        """One folder for each job."""
        return self.path / "jobs"

    def job(self, job: str) -> Path:
        """The folder of a job. Raises InputError for what is not a job id: no id ever leaves the home."""
        if not _JOB_ID.fullmatch(job):
            raise InputError(f"{job[:80]!r} is not a job id.", code="job.unknown", fix="List jobs: tunesmith jobs")
        return self.jobs / job

    def attempt(self, job: str, number: int) -> Path:
        """The folder of attempt `number` (from 1) of a job."""
        return self.job(job) / "attempts" / str(int(number))

    @property
    def address(self) -> str:
        """The socket's path as bind and connect take it.

        A path of more than 100 bytes goes through an open descriptor of the folder (Linux). Raises StorageError where
        the system has no such way, or where the folder does not exist.
        """
        return _address(self.path)

    def make(self) -> Home:
        """Make the folders that are missing and see that they are ours, private and writable.

        Raises StorageError: a file in the way, another user's folder, a read-only or a full disk.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError as error:
            raise StorageError(
                f"{self.path} is a file, not a folder.", code="storage.not_a_folder", fix=_ELSEWHERE
            ) from error
        except OSError as error:
            raise storage_error(error, self.path) from error
        self._private()
        for folder in (self.jobs, self.cache, self.trackio):
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise storage_error(error, folder) from error
        try:
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"\0" * 4096)
                probe.flush()
        except OSError as error:
            raise storage_error(error, self.path) from error
        return self

    def _private(self) -> None:
        found = self.path.stat()
        if found.st_uid != os.geteuid():
            raise StorageError(
                f"{self.path} belongs to another user (uid {found.st_uid}).",
                code="storage.foreign",
                why="Jobs and their data are private to the user who owns them.",
                fix=_ELSEWHERE,
            )
        if found.st_mode & stat.S_ISVTX or self.path in (Path("/"), Path.home()):
            raise StorageError(
                f"{self.path} is shared or is not only Tunesmith's.",
                code="storage.shared",
                why="The home is made private (0700), which would lock others out of this folder.",
                fix=_ELSEWHERE,
            )
        if found.st_mode & 0o077:
            try:
                self.path.chmod(0o700)
            except OSError as error:
                raise storage_error(error, self.path) from error


_ELSEWHERE = "Set TUNESMITH_HOME to a folder of your own."

_folders: dict[str, int] = {}  # descriptors that stand for homes with long paths; as many as homes in use, usually none


def _address(folder: Path) -> str:
    direct = os.fsencode(folder / "socket")
    if len(direct) <= _SUN_PATH:
        return os.fsdecode(direct)
    if not os.path.isdir("/proc/self/fd"):
        raise StorageError(
            f"The path of the home is too long for a socket ({len(direct)} bytes).",
            code="storage.long_path",
            fix="Set TUNESMITH_HOME to a folder with a shorter path.",
        )
    try:
        known = _folders.get(str(folder))
        if known is None or not os.path.samestat(os.fstat(known), os.stat(folder)):
            opened = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            if known is not None:
                os.close(known)
            _folders[str(folder)] = known = opened
    except OSError as error:
        raise storage_error(error, folder) from error
    return f"/proc/self/fd/{known}/socket"


def default_home() -> Home:
    """The home of this user: TUNESMITH_HOME, or the platform's place for a user's data."""
    given = os.environ.get("TUNESMITH_HOME", "").strip()
    if given:
        return Home(Path(given).expanduser())
    import platformdirs

    return Home(Path(platformdirs.user_data_dir("tunesmith", appauthor=False)))


def storage_error(error: OSError, path: Path) -> StorageError:
    """The typed error for what the system said about a path: full, read-only, denied, or its own words."""
    words = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return full(path)
    if error.errno == errno.EROFS:
        return StorageError(
            f"{path} is on a read-only file system.", code="storage.read_only", fix=_ELSEWHERE, where=str(path)
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return StorageError(
            f"{path} cannot be written.", why=f"{words}.", fix=_ELSEWHERE, where=str(path), code="storage.denied"
        )
    return StorageError(f"{path} cannot be used: {words}.", fix=_ELSEWHERE, where=str(path))


def full(path: Path) -> StorageError:
    """The typed error for a disk without room."""
    return StorageError(
        "The disk is full.",
        code="storage.full",
        why=f"{path} could not be written; what was there before is intact.",
        fix="Free some space (old jobs, the cache folder), then try again.",
        where=str(path),
    )


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a private file whole: aside, then renamed. Raises StorageError.

    Durable: synced, and its folder too (some milliseconds). Not for copies of what a database holds anyway.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(aside, path)
        if not durable:
            return
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise storage_error(error, path) from error
