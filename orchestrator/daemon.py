"""The daemon: composes store, queue, driver and HTTP for one home, and is the only process that writes its databases.

    python -P -m tunesmith.orchestrator.daemon run --home HOME      in the foreground, until SIGTERM
    python -P -m tunesmith.orchestrator.daemon drive --home HOME    the driver, which the daemon starts itself

Neither ending the daemon nor killing it ends a job: the next daemon adopts what runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.orchestrator.errors import Conflict, StorageError, TunesmithError
from tunesmith.orchestrator.home import Home, default_home, storage_error
from tunesmith.orchestrator.nouns import SCHEMA_VERSION

if TYPE_CHECKING:
    from starlette.applications import Starlette

log = logging.getLogger("tunesmith.daemon")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of the daemon and of the driver; the exit code."""
    parser = argparse.ArgumentParser(prog="tunesmith-daemon", description="The daemon of Tunesmith.")
    parser.add_argument("what", choices=["run", "drive"])
    parser.add_argument("--home", type=Path, default=None, help="the home folder (TUNESMITH_HOME)")
    given = parser.parse_args(argv)
    home = default_home() if given.home is None else Home(given.home)
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        if given.what == "run":
            run(home)
        else:
            drive(home)
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(home: Home) -> None:
    """Serve a home until SIGTERM, SIGINT or POST /shutdown.

    Raises Conflict where another daemon serves it (with that daemon's pid), StorageError where it cannot be written.
    """
    home.make()
    with _lock(home.daemon_lock, "daemon"), contextlib.closing(_bind(home)) as listener:
        asyncio.run(_serve(home, listener))
        with contextlib.suppress(OSError):
            home.socket.unlink()


def drive(home: Home) -> None:
    """Run the job graph for a home's daemon until nothing is left to do for a while."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with _lock(home.driver_lock, "driver"):
        from tunesmith.graph import driver
        from tunesmith.orchestrator.remote import Line, RemoteLeases

        with contextlib.closing(Line(home)) as line:
            driver.run(RemoteLeases(line), home.path, idle_seconds=60.0)


# --- composition ---------------------------------------------------------------------------------------------------


class Daemon:
    """The parts of one daemon, wired to each other. `stopping` is set when it is to end."""

    def __init__(self, home: Home) -> None:
        from tunesmith.orchestrator.backends import Backends
        from tunesmith.orchestrator.bell import Bell
        from tunesmith.orchestrator.drivers import Drivers
        from tunesmith.orchestrator.leases import Leases
        from tunesmith.orchestrator.metrics import Metrics
        from tunesmith.orchestrator.queue import Queue
        from tunesmith.orchestrator.store import Store

        self.home = home
        self.started = time.monotonic()
        self.bell = Bell()
        self.metrics = Metrics(home.metrics_db)
        self.store = Store(home.state_db, position=self.metrics.position, on_change=self._changed)
        self.backends = Backends(home.path)
        self.leases = Leases(self.store, home)
        self.drivers = Drivers(self.leases, home)
        self.queue = Queue(self.store, self.metrics, self.backends, rung=lambda job: self.bell.ring([job]))
        self.stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending = threading.Event()
        self._preparing = threading.Thread(target=self._prepare, name="prepare", daemon=True)

    def app(self) -> Starlette:
        """The HTTP application over these parts."""
        from tunesmith.orchestrator.api import Api, Core

        core = Core(
            home=self.home,
            store=self.store,
            metrics=self.metrics,
            leases=self.leases,
            backends=self.backends,
            bell=self.bell,
            health=self.health,
            stop=self.end,
            reasons=self.queue.reasons,
        )
        return Api(core).app()

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the queue and the driver's keeper, adopt what runs, and mend metrics.db where it must be."""
        self._loop = loop
        self.bell.attach(loop)
        self.leases.heal()
        self.queue.nudge()
        self.drivers.start()
        self._preparing.start()

    def end(self) -> None:
        """Ask the daemon to end, from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.stopping.set)

    def close(self) -> None:
        """End the threads and close the databases. What runs, runs on."""
        self._ending.set()
        self.drivers.stop()
        self.queue.stop()
        if self._preparing.is_alive():
            self._preparing.join(3.0)
        self.store.close()
        self.metrics.close()

    def health(self) -> dict[str, Any]:
        """The /health document."""
        return {
            "pid": os.getpid(),
            "version": _version(),
            "home": str(self.home.path),
            "uptime_seconds": round(time.monotonic() - self.started, 3),
            "schema_version": SCHEMA_VERSION,
            "driver": self.drivers.pid,
        }

    def _changed(self, jobs: frozenset[str]) -> None:
        """After a commit: nothing that goes wrong here may undo what was committed."""
        if not jobs:
            return
        self.bell.ring(jobs)
        self.drivers.nudge()
        try:
            self.queue.nudge()
        except StorageError as error:
            log.warning("the queue was not told of a change: %s", error)

    def _prepare(self) -> None:
        """What need not be done before the first answer: rebuilding metrics, and loading what the first job needs."""
        try:
            if self.metrics.incomplete:
                self.metrics.rebuild(self.home.jobs, stop=self._ending.is_set)
            from tunesmith.orchestrator import wire

            log.debug("%s is loaded", wire.__name__)
        except Exception:
            log.exception("metrics.db could not be rebuilt")


async def _serve(home: Home, listener: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # the daemon listens to signals itself, and ends with code 0

    daemon = Daemon(home)
    loop = asyncio.get_running_loop()
    config = uvicorn.Config(
        daemon.app(),
        http=_own_clients_only(),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=256,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
    )
    server = Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stopping.set)

    async def watch() -> None:
        await daemon.stopping.wait()
        daemon.bell.close()
        server.should_exit = True

    watching = asyncio.create_task(watch())
    try:
        daemon.begin(loop)
        log.info("daemon %d serves %s", os.getpid(), home.path)
        await server.serve(sockets=[listener])
    finally:
        watching.cancel()
        await asyncio.to_thread(daemon.close)
        log.info("daemon %d ends", os.getpid())


# --- the socket and the lock ---------------------------------------------------------------------------------------


def _bind(home: Home) -> socket.socket:
    """A listening socket of our own, 0600 from its first moment; what a dead daemon left is replaced."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(home.socket.lstat().st_mode):
                raise StorageError(f"{home.socket} is in the way: it is not a socket.", fix="Move it away.")
            home.socket.unlink()
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            made.bind(home.address)
        finally:
            os.umask(before)
        made.listen(256)
        made.setblocking(False)
        return made
    except OSError as error:
        raise storage_error(error, home.socket) from error


@contextlib.contextmanager
def _lock(path: Path, what: str) -> Iterator[None]:
    """Hold a file's flock, with our pid in it. Raises Conflict, with the pid of whoever holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise Conflict(
                f"Another {what} (pid {pid}) serves {path.parent}.",
                code=f"{what}.running",
                fix="Use that one, or end it first: tunesmith daemon stop",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _own_clients_only() -> Any:
    """uvicorn's HTTP protocol, closed at once for clients of another user (Linux; elsewhere by file modes)."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Protocol
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol  # type: ignore[assignment]

    class OwnClients(Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            peer = _peer_uid(transport.get_extra_info("socket"))
            if peer is not None and peer not in (0, os.geteuid()):
                log.warning("a client of uid %d was turned away", peer)
                transport.abort()

    return OwnClients


def _peer_uid(connection: Any) -> int | None:
    import struct

    if connection is None or not hasattr(socket, "SO_PEERCRED"):
        return None
    try:
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return None
    return int(struct.unpack("3i", found)[1])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tunesmith")
    except PackageNotFoundError:
        return "0"


if __name__ == "__main__":
    sys.exit(main())
