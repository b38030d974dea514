"""Several processes for one attempt: rank 0 starts the others, watches them, and ends with them.

Rank 0 is the kernel that the shim started. It alone speaks, saves and obeys; the others are its children, run the same
program on the same attempt, and die with it. What ended one of them is told in the attempt's folder:

    ranks/meet    where they find one another (loops/ranks.py)
    ranks/R       the error that ended rank R, as JSON
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tunesmith.executors.kernel.sizing.rows import processes
from tunesmith.orchestrator.errors import InputError, JobFailed, TunesmithError, from_doc

if TYPE_CHECKING:
    import torch

    from tunesmith.executors.kernel.loops.ranks import Joined, Ranks

LOST = 3  # exit code of a rank that ended because another one had
LOOK_SECONDS = 0.2
PATIENCE_SECONDS = 10.0  # between a broken connection and the end of whoever broke it
HELD_SECONDS = 120.0  # a GPU may wait for a dead rank for ever; so long may rank 0 wait for it, or save in peace

_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Seat:
    """Which of an attempt's processes this one is."""

    rank: int = 0
    world: int = 1


def devices(hardware: str | Mapping[str, Any] | None) -> list[torch.device]:
    """The device of each process: GPUs of one kind, the current one before others, or the CPU.

    A name means GPUs that are called so. Where nothing is asked for, a CPU will do.
    Raises InputError (hardware.gpus) where there are fewer GPUs than asked for.
    """
    import torch

    count = processes(hardware)
    if hardware == "cpu" or (isinstance(hardware, Mapping) and not hardware.get("gpus", "processes" not in hardware)):
        return [torch.device("cpu")] * count
    there = torch.cuda.is_available()
    if hardware in (None, "auto", {}) and not there:
        return [torch.device("cpu")]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if there else []
    first = torch.cuda.current_device() if there else 0
    order = sorted(range(len(names)), key=lambda index: index != first)
    wanted = hardware if isinstance(hardware, str) and hardware not in ("auto", "gpu", "cuda") else None
    for kind in dict.fromkeys(names[index] for index in order):
        alike = [index for index in order if names[index] == kind]
        if wanted in (None, kind) and len(alike) >= count:
            return [torch.device("cuda", index) for index in alike[:count]]
    raise _no_gpus(f"{count} GPUs" if count > 1 else "a GPU" if wanted is None else f"the GPU {wanted!r}", names)


def _no_gpus(wanted: str, names: Sequence[str]) -> InputError:
    kinds = ", ".join(f"{count} {name}" for name, count in Counter(names).items())
    return InputError(
        f"The job asks for {wanted}, and this machine has {kinds or 'none'}.",
        code="hardware.gpus",
        why="A job runs on what its plan was made for, on GPUs of one kind."
        if names
        else "PyTorch can use none here: it may be built without CUDA, the driver too old, or every GPU hidden.",
        where="hardware",
        fix="Plan the job again for what is there." if names else 'Mend what is in the way, or set hardware to "cpu".',
    )


def bound(parent: int) -> None:
    """Tie this process, a rank above 0, to rank 0: it dies with it, and obeys nobody else's signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(LOST)


class Crew:
    """The processes of one attempt, seen from one of them. Entered by rank 0, it starts the others.

    `abandon` is called, in another thread, with the error to end with, where a rank died and rank 0 hangs in its GPU.
    """

    def __init__(
        self,
        folder: Path,
        seat: Seat,
        abandon: Callable[[TunesmithError], None],
        *,
        command: Sequence[str] = (sys.executable, "-P", "-m", "tunesmith.executors.kernel"),
        held_seconds: float = HELD_SECONDS,
    ) -> None:
        self.folder = folder
        self.seat = seat
        self.place = folder / "ranks"
        self._abandon = abandon
        self._command = command
        self._held_seconds = held_seconds
        self._children: list[subprocess.Popen[bytes]] = []
        self._joined: Joined | None = None
        self._parted = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def __enter__(self) -> Self:
        if self.seat.rank == 0 and self.seat.world > 1:
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir(mode=0o700)
            try:
                for rank in range(1, self.seat.world):
                    self._children.append(self._start(rank))
            except BaseException:
                self._end()
                raise
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._children:
            self._end()
            self._thread.join()
            shutil.rmtree(self.place, ignore_errors=True)
        if self._joined is not None and not self._parted:
            self._joined.drop()

    def join(self, device: torch.device, pause: Callable[[], None]) -> Ranks:
        """Meet the others once they have come as far; alone, there is nobody to wait for. `pause` may end this wait."""
        from tunesmith.executors.kernel.loops import ranks

        if self.seat.world == 1:
            return ranks.ALONE

        place, rank, world = self.place / "meet", self.seat.rank, self.seat.world
        self._joined = ranks.join(place, rank, world, device, lost=self.lost, check=self.check, pause=pause)
        return self._joined

    def part(self, ranks: Ranks) -> None:
        """Part from the others when all work is done. Without it they are ended, whatever they do."""
        ranks.leave()
        self._parted = True

    def check(self) -> None:
        """Raise what ended another rank, if one has ended before its time."""
        cause = self.cause()
        if cause is not None:
            raise cause

    def lost(self, error: BaseException) -> TunesmithError:
        """What to raise where a connection broke: what ended the other rank, as soon as that is known."""
        until = time.monotonic() + (PATIENCE_SECONDS if self._children else 0)
        while (cause := self.cause()) is None and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        return cause or _lost(f"One of the {self.seat.world} does not answer any more: {said}")

    def cause(self) -> TunesmithError | None:
        """What ended a rank before its time: first those that ended by themselves, not for having lost another."""
        codes = {rank: child.poll() for rank, child in enumerate(self._children, 1)}
        ended = [rank for rank, code in codes.items() if code]
        ended.sort(key=lambda rank: codes[rank] == LOST)
        if not ended or (codes[ended[0]] == LOST and None in codes.values()):
            return None
        rank = ended[0]
        return self._told(rank) or _lost(f"Rank {rank} of {self.seat.world} {_words(codes[rank])}.")

    def tell(self, error: TunesmithError) -> None:
        """As a rank above 0, leave word of what ends this process. A full disk leaves none."""
        with contextlib.suppress(OSError):
            (self.place / str(self.seat.rank)).write_text(json.dumps(error.to_doc()), encoding="utf-8")

    def _told(self, rank: int) -> TunesmithError | None:
        try:
            error = from_doc(json.loads((self.place / str(rank)).read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError):
            return None
        error.where = ", ".join(part for part in (error.where, f"rank {rank}") if part)
        return error

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        seat = ["--rank", str(rank), "--world", str(self.seat.world), "--parent", str(os.getpid())]
        return subprocess.Popen([*self._command, str(self.folder), *seat], stdin=subprocess.DEVNULL, stdout=2)

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            cause = self.cause()
            if cause is not None:
                if not self._over.wait(self._held_seconds):
                    self._abandon(cause)
                return

    def _end(self) -> None:
        """Reap every child; one that does not end by itself after having parted, or that never parted, is killed."""
        until = time.monotonic() + (PATIENCE_SECONDS if self._parted else 0)
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=max(0.0, until - time.monotonic()))
            child.kill()
            child.wait()


def _lost(why: str) -> JobFailed:
    """The error of an attempt one of whose processes is gone."""
    return JobFailed(
        "A process of this attempt was lost.",
        code="ranks.lost",
        why=why,
        fix="The log may say more. Retry the job: it goes on from its last checkpoint.",
    )


def _words(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    killer = ": somebody killed it, or the machine ran out of memory" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{killer}"
