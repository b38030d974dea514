"""Whether the run will have the memory it needs, found out before anything is spent.

The largest step that the data can ask for is taken once, and undone. Where it does not fit, the ladder is climbed until
it does. What was found is kept in the home's cache under all that it follows from, so an attempt that is started again
does not try again; a job tries for itself, since other processes may hold memory by then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.executors.kernel.sizing.size import in_gib

if TYPE_CHECKING:
    from tunesmith.executors.kernel.loops.engine import Engine
    from tunesmith.executors.kernel.loops.trial import Tried

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


class Preflight:
    """Tries the largest step of an engine, and tells what it took. Of several ranks all do, and all climb together.

    `about` is what the outcome follows from beside device, libraries and sizes; `pause` may raise between two tries.
    """

    def __init__(
        self, engine: Engine, folder: Path, about: Mapping[str, Any], *, reporter: Reporter, pause: Callable[[], None]
    ) -> None:
        self.engine = engine
        self.reporter = reporter
        self.pause = pause
        self.path = folder / f"{self._key(about)}.json"

    def run(self) -> None:
        """Find out, or remember. Raises JobFailed (oom.*) where the step does not fit, whatever is given up for it."""
        ranks = self.engine.ranks
        known = ranks.gather(None if ranks.rank else self._known())[0]
        if known is not None:
            self.engine.ladder.resume(known["eased"])
            self.reporter.log(f"Preflight: passed before, with {in_gib(known['peak_bytes'])} at the most.")
            return
        while (tried := self._tried()) is None:
            self.pause()
        self._tell(tried)

    def _tried(self) -> Tried | None:
        """A step that fits; None where a rung was taken since it did not."""
        from tunesmith.executors.kernel.loops import trial
        from tunesmith.executors.kernel.shortage import Shortage

        ranks, ladder = self.engine.ranks, self.engine.ladder
        tried = trial.step(self.engine)
        mine, began = tried.shortage, all(ranks.gather(tried.batch is not None))
        found = [item for item in ranks.gather(None if mine is None else [mine.gpu, mine.said]) if item is not None]
        if not found:
            return tried
        if began or not self.engine.method.slots:
            ladder.climb(Shortage(*found[0]), tried.batch if began else None, None)
        else:  # there was no room for what the writing of answers keeps
            ladder.write_less(Shortage(*found[0]), None)
        return None

    def _tell(self, tried: Tried) -> None:
        assert tried.measured is not None
        measured, device = tried.measured, self.engine.net.device
        found = {"peak_bytes": measured.peak, "seconds": round(measured.seconds, 6), "tokens": tried.tokens}
        found |= {"resident_bytes": measured.resident}
        if measured.reserved is not None:
            found["reserved_bytes"] = measured.reserved
        self.reporter.metric({f"preflight/{name}": value for name, value in found.items()}, 0)
        took = f"{tried.tokens:,} tokens in {measured.seconds:.2f} s"
        if device.type == "cuda":
            memory = f"{in_gib(measured.peak)} of the GPU's memory, {in_gib(measured.reserved or 0)} with what is kept"
        else:
            memory = f"{in_gib(measured.peak)} more memory, {in_gib(measured.resident)} in all"
        self.reporter.log(f"Preflight: the largest step there can be took {took} and {memory}.")
        if not self.engine.ranks.rank:
            self._keep({**found, "eased": self.engine.ladder.doc()})

    def _key(self, about: Mapping[str, Any]) -> str:
        from importlib.metadata import PackageNotFoundError, version  # slow to import

        import torch

        stack = [platform.python_version(), platform.machine()]
        for name in _LIBRARIES:
            with contextlib.suppress(PackageNotFoundError):
                stack.append(f"{name} {version(name)}")
        engine = self.engine
        device = engine.net.device.type
        if device == "cuda":
            device += f" {torch.cuda.get_device_name(engine.net.device)} {torch.version.cuda}"
        room, twice, world = engine.method.room, engine.net.checkpointed, engine.ranks.world
        size = {"rows": room.rows, "tokens": room.tokens, "twice": twice, "world": world, **engine.task}
        facts = {"stack": stack, "device": device, "size": size, "about": dict(about)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _known(self) -> dict[str, Any] | None:
        try:
            doc = json.loads(self.path.read_bytes())
            return {"peak_bytes": int(doc["peak_bytes"]), "eased": dict(doc["eased"])}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _keep(self, doc: Mapping[str, Any]) -> None:
        """All or nothing. A full or forbidden disk costs the cache, not the run."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(dir=self.path.parent, prefix=".preflight-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(doc, file, sort_keys=True)
                os.replace(beside, self.path)
            finally:
                Path(beside).unlink(missing_ok=True)
