"""The executors of this installation, found through the entry-point group `tunesmith.executors`, imported on first use.

A plug-in that cannot be imported or constructed is a backend that is not ready, with the reason; never a crash.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from tunesmith.orchestrator import accuracy
from tunesmith.orchestrator.errors import BackendUnavailable, InputError, TunesmithError
from tunesmith.orchestrator.inert import inert
from tunesmith.orchestrator.nouns import Device
from tunesmith.orchestrator.plain import plain
from tunesmith.orchestrator.ports import Executor

GROUP = "tunesmith.executors"
log = logging.getLogger("tunesmith.daemon")
Factory = Callable[[Path], Executor]


class Backends:
    """Executors by name, each constructed once with the home folder. `factories` replaces the entry points."""

    def __init__(self, home: Path, factories: Mapping[str, Factory] | None = None) -> None:
        self.home = home
        self._factories = dict(_installed() if factories is None else factories)
        self._made: dict[str, Executor] = {}
        self._broken: dict[str, BackendUnavailable] = {}
        self._prices: dict[str, float] = {}
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """Every backend known, `local` first."""
        return sorted(self._factories, key=lambda name: (name != "local", name))

    def get(self, name: str) -> Executor:
        """The executor of a backend. Raises InputError for an unknown name, BackendUnavailable for a broken plug-in."""
        with self._lock:
            if name in self._made:
                return self._made[name]
            if name in self._broken:
                raise self._broken[name]
            if name not in self._factories:
                raise unknown(name, self.names())
            try:
                self._made[name] = self._factories[name](self.home)
            except Exception as error:
                log.exception("backend %s cannot be loaded", name)
                self._broken[name] = BackendUnavailable(
                    f"The backend {name} cannot be loaded.",
                    why=f"{type(error).__name__}: {inert(error, limit=500)}",
                    fix="Install what it needs, then restart the daemon: tunesmith daemon stop",
                    code="backend.broken",
                )
                raise self._broken[name] from error
            return self._made[name]

    def devices(self, name: str | None = None) -> list[Device]:
        """What a backend offers, or all of them, with the past runs of this home; one that is not ready offers nothing.

        Asks the executor anew.
        """
        if name is not None and name not in self._factories:
            raise unknown(name, self.names())
        found: list[Device] = []
        for each in self.names() if name is None else [name]:
            found += self._ask(each)[0]
        return accuracy.recalled(self.home, found)

    def listing(self) -> list[dict[str, Any]]:
        """One document for each backend: name, ready, why_not, devices."""
        docs = []
        for name in self.names():
            devices, why_not = self._ask(name)
            if why_not is None and not any(device.why_not is None for device in devices):
                why_not = next((device.why_not for device in devices if device.why_not), "It offers no device.")
            docs.append(
                {
                    "name": name,
                    "ready": why_not is None,
                    "why_not": why_not,
                    "devices": [plain(item) for item in devices],
                }
            )
        return docs

    def prices(self) -> dict[str, float]:
        """The highest price in dollars an hour of each backend, as it last listed its devices; asks nobody."""
        return dict(self._prices)

    def _ask(self, name: str) -> tuple[Sequence[Device], str | None]:
        try:
            devices = tuple(replace(device, backend=name) for device in self.get(name).devices())
            self._prices[name] = max((device.usd_per_hour for device in devices), default=0.0)
            return devices, None
        except TunesmithError as error:
            return (), str(error)
        except Exception as error:
            log.exception("backend %s cannot list its devices", name)
            return (), f"{type(error).__name__}: {inert(error, limit=500)}"


def unknown(name: str, names: Sequence[str]) -> InputError:
    """The error for a backend that is not installed."""
    return InputError(
        f"There is no backend {name[:80]!r} here.",
        code="backend.unknown",
        fix=f"One of: {', '.join(names) or 'none is installed'}.",
        where="backend",
    )


def _installed() -> dict[str, Factory]:
    return {point.name: _loaded_by(point) for point in entry_points(group=GROUP)}


def _loaded_by(point: EntryPoint) -> Factory:
    def make(home: Path) -> Executor:
        made: Executor = point.load()(home)
        return made

    return make
