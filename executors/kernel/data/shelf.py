"""Tables of numbers on disk, each under the key of what it was made from: whole and true, or not there.

A table is one safetensors file that holds a SHA-256 over its key and all of its bytes. It is written aside, flushed and
renamed, so that readers and writers of other processes never see half of it. What has not been read for longest goes
when the room is used up. A shelf never fails its user: what cannot be read is absent, what cannot be kept is said.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]
    Table = Mapping[str, Array]

_SUM = "sha256"
_STALE = 3600  # seconds after which what a killed writer left is removed
_TRIES = 100  # locks that were removed while they were waited for, before the work is done without
_POLL = 0.1  # seconds between looks at a lock, so that a stop is heard while another process works


@dataclass(frozen=True, slots=True)
class Shelf:
    """A folder of tables, `room` bytes at most."""

    folder: Path
    room: int

    def get(self, key: str) -> tuple[Table | None, str]:
        """The table of a key, or None; and what was wrong with the file where there was one. Reads every byte once."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = self._path(key)
        try:
            table = load(path.read_bytes())
            said = table.pop(_SUM).tobytes()
        except FileNotFoundError:
            return None, ""
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            return None, self._damaged(path, type(error).__name__)
        if said != _digest(key, table):
            return None, self._damaged(path, "its bytes have changed")
        with contextlib.suppress(OSError):
            os.utime(path)
        return table, ""

    def put(self, key: str, table: Table) -> str:
        """Keep a table; what kept it from being kept, or ""."""
        import numpy as np
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        size = sum(array.nbytes for array in table.values())
        if size > self.room:
            return f"{size:,} bytes are more than the {self.room:,} that the cache may hold"
        path = self._path(key)
        aside = self.folder / f".{key}.{os.getpid()}.new"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file({**table, _SUM: np.frombuffer(_digest(key, table), np.uint8)}, str(aside))
                _flush(aside)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            return f"{self.folder} cannot be written: {error}"
        self._tidy(path)
        return ""

    @contextlib.contextmanager
    def alone(self, key: str, pause: Callable[[], None]) -> Iterator[None]:
        """Hold a key against other processes, so that one makes its table and the others wait and read it.

        The lock dies with its holder. `pause` is called while waiting, and may raise. Without locks (some network file
        systems) the work is done twice, which is harmless.
        """
        lock = self.folder / f".{key}.lock"
        for _ in range(_TRIES):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = lock.open("ab")
            except OSError:
                break
            with file, _held(file, pause):
                if not _is(file, lock):
                    continue  # its holder has removed it, and the next one has locked a new file
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        if _is(file, lock):
                            lock.unlink()
                return
        yield

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _damaged(self, path: Path, why: str) -> str:
        with contextlib.suppress(OSError):
            path.unlink()
        return f"{path.name} was damaged ({why})"

    def _tidy(self, newest: Path) -> None:
        """Remove what was used longest ago until the rest has room, and what killed writers left."""
        kept: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process may be tidying too
                found = path.stat()
                if path.suffix == ".safetensors":
                    kept.append((float("inf") if path == newest else found.st_mtime, found.st_size, path))
                elif path.suffix in (".new", ".lock") and time.time() - found.st_mtime > _STALE:
                    path.unlink()
        over = sum(size for _, size, _ in kept) - self.room
        for _, size, path in sorted(kept):
            if over <= 0 or path == newest:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            over -= size


@contextlib.contextmanager
def _held(file: IO[bytes], pause: Callable[[], None]) -> Iterator[None]:
    """Hold a file's lock, where there are locks."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            pause()
            time.sleep(_POLL)
        except OSError:
            break
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked child has the file too


def _is(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one that stands at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _digest(key: str, table: Table) -> bytes:
    sha = hashlib.sha256(key.encode())
    for name, array in sorted(table.items()):
        sha.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        sha.update(array.data)
    return sha.digest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
