"""What is given up, rung by rung, where memory runs out: first what costs nothing, then what costs time alone.

None of it changes what is trained: the rows of a step, their weights and its result stay as they are. In order: the
same again, with everything freed; micro-batches of half the rows, down to a single one; activations computed twice
instead of being kept. The last rung that may be taken gives up all of that at once. Where answers are written or rows
evaluated, fewer go at a time, and training is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tunesmith.executors.kernel.loops import quantised
from tunesmith.executors.kernel.loops.batches import Batch
from tunesmith.executors.kernel.loops.gauge import free
from tunesmith.executors.kernel.loops.method import Method
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.room import LEAST, Room
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.executors.kernel.shortage import Shortage
from tunesmith.orchestrator.errors import JobFailed
from tunesmith.orchestrator.nouns import TrainSpec

RUNGS = 4  # of all kinds, that one start of an attempt may take
_AGAIN = "the same is tried again with all unused memory freed"
_TWICE = "activations are computed twice instead of being kept"


class Ladder:
    """Takes rungs, tells each, and knows what has been given up.

    `together` is how many rows are evaluated at a time; None as long as memory has never run out over that. A step of
    None is the time before the first one. Every way up raises JobFailed (oom.*) where nothing is left to give up.
    """

    def __init__(
        self,
        net: Net,
        method: Method,
        train: TrainSpec,
        reporter: Reporter,
        *,
        evaluation: Method | None = None,
        world: int = 1,
    ) -> None:
        self.net = net
        self.method = method
        self.evaluation = evaluation
        self.train = train
        self.reporter = reporter
        self.world = world
        self.taken = 0
        self.together: int | None = None
        self._slots: int | None = None
        self._twice = False

    # --- ways up ----------------------------------------------------------------------------------------------------

    def climb(self, shortage: Shortage, batch: Batch | None, step: int | None) -> None:
        """A pass over `batch` needs more than there is.

        The same is only tried again during training: before it, memory has not been used long enough to be in pieces.
        """
        self._allowed(shortage, step)
        if step is not None and not self.taken:
            return self._take(_AGAIN, shortage, step)
        room, last = self.method.room.below(batch), self.taken == RUNGS - 1
        if room is not None:
            self.method.limit = LEAST if last else room
        twice = (room is None or last) and not self.net.checkpointed and self._compute_twice()
        if room is None and not twice:
            raise self._end(shortage, step)
        self._take(_both([_rows(self.method.room)] * (room is not None) + [_TWICE] * twice), shortage, step)

    def write_less(self, shortage: Shortage, step: int | None) -> None:
        """Writing answers needs more than there is."""
        self._allowed(shortage, step)
        if self.method.slots < 2:
            raise self._end(shortage, step)
        self._slots = self.method.slots // 2
        self.method.narrow(self._slots)
        self._take(_written(self._slots), shortage, step)

    def assess_less(self, shortage: Shortage, rows: int, step: int) -> None:
        """Evaluating `rows` rows at a time needs more than there is."""
        self._allowed(shortage, step)
        if rows < 2 or self.evaluation is None:
            raise self._end(shortage, step)
        most = max(2, min(rows, self.evaluation.breadth))
        self.together = 1 if self.taken == RUNGS - 1 else most // 2
        self._take(f"{_assessed(self.together)}, and training stays as it is", shortage, step)

    def _allowed(self, shortage: Shortage, step: int | None) -> None:
        if self.world > 1 and step is not None:
            why = f"{self.world} processes take every step together, so one of them cannot try it again by itself"
            left = ["a lower train.micro_batch", "train.activation_checkpointing: true"]
            raise shortage.ends(left, why=why, step=step)
        if self.taken >= RUNGS:
            raise self._end(shortage, step)

    def _compute_twice(self) -> bool:
        try:
            self.net.checkpoint()
        except ValueError:  # an architecture that cannot
            return False
        self._twice = True
        return True

    def _take(self, what: str, shortage: Shortage, step: int | None) -> None:
        self.taken += 1
        where = "before the first step" if step is None else f"at step {step:,}"
        self.reporter.log(
            f"Memory ran out {where} ({shortage.words or 'no word of how much'}). Now {what}. "
            "What is trained stays the same.",
            "warning",
        )
        self.reporter.alert("oom.rung", f"Memory ran out {where}: {what}.", rung=self.taken, step=step, **self.doc())
        free()

    def _end(self, shortage: Shortage, step: int | None) -> JobFailed:
        left = ["train.optimizer: adamw-8bit"] if self.train.optimizer == "adamw" else []
        if not self.net.adapted:
            left.append("adapter.kind: lora")
        elif not any(quantised.is_narrow(module) for module in self.net.causal.modules()):
            left.append("adapter.kind: qlora")
        why = "All that changes no result has been tried, and what is left changes the job"
        return shortage.ends([*left, "a lower train.max_length"], why=why, step=step)

    # --- what has been given up, over a resume ----------------------------------------------------------------------

    def doc(self) -> dict[str, Any]:
        """What has been given up, as plain data; empty where nothing has."""
        limit = self.method.limit
        found = {
            "rows": None if limit is None else limit.rows,
            "tokens": None if limit is None else limit.tokens,
            "twice": self._twice or None,
            "slots": self._slots,
            "together": self.together,
        }
        kept = {name: value for name, value in found.items() if value is not None}
        return {**kept, "device": self._device()} if kept else {}

    def resume(self, doc: Mapping[str, Any]) -> None:
        """Begin where an earlier start ended, if it was on such a device: another one may have room for more."""
        if not doc or doc.get("device") != self._device():
            return
        told = []
        if "rows" in doc and (room := Room(doc["rows"], doc["tokens"])) != self.method.limit:
            self.method.limit = room.within(self.method.limit)
            told.append(_rows(self.method.room))
        if "twice" in doc and not self.net.checkpointed and self._compute_twice():
            told.append(_TWICE)
        if doc.get("slots", self.method.slots) < self.method.slots:
            self._slots = doc["slots"]
            self.method.narrow(doc["slots"])
            told.append(_written(doc["slots"]))
        if doc.get("together", self.together) != self.together:
            self.together = doc["together"]
            told.append(_assessed(doc["together"]))
        if told:
            self.reporter.log(f"Memory ran out before: {_both(told)}.")

    def _device(self) -> str:
        if self.net.device.type != "cuda":
            return self.net.device.type
        about = torch.cuda.get_device_properties(self.net.device)
        return f"{about.name}, {about.total_memory} bytes"


def _rows(room: Room) -> str:
    if room == LEAST:
        return "each row goes through the model by itself"
    rows = f"{room.rows:,} rows" if room.rows > 1 else "one row"
    return f"{rows} at most (packed, {room.tokens:,} tokens) go through the model at a time"


def _written(slots: int) -> str:
    return f"{slots:,} answers at most are written at a time"


def _assessed(rows: int) -> str:
    return f"{rows:,} held-out rows at most are evaluated at a time"


def _both(parts: list[str]) -> str:
    return ", and ".join(parts)
