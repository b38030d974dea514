"""Log-probabilities of answers under the reference model, computed once and kept on disk.

The reference does not change while a job trains, so what it says of a row is worth keeping: over epochs, over a resume,
over the next job on the same model and data. Rows are filled in as they come up.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.executors.kernel.loops.forks import Tree
from tunesmith.executors.kernel.loops.ranks import ALONE, Ranks


class Reference:
    """A table [rows, answers] of summed log-probabilities, float32; NaN where nothing is known yet.

    `path` None keeps it in memory; of several ranks the first writes. A file that cannot be read, or is of another
    shape, counts as empty: the name of the file says what it is of, and a value in it is either whole or NaN.
    """

    def __init__(self, path: Path | None, rows: int, answers: int, *, ranks: Ranks = ALONE) -> None:
        self.path = path
        self.ranks = ranks
        self.table = torch.full((rows, answers), float("nan"))
        self._changed = False
        if path is not None:
            self._read(path)

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Which of some rows are not known yet."""
        return [row for row in dict.fromkeys(rows) if bool(self.table[row].isnan().any())]

    def put(self, members: Sequence[tuple[int, int]], values: Tensor) -> None:
        """Take in values of (row, answer) pairs. Waits for the device."""
        at = torch.tensor(members, dtype=torch.int64)
        self.table[at[:, 0], at[:, 1]] = values.detach().float().cpu()
        self._changed = True

    def get(self, members: Sequence[tuple[int, int]]) -> Tensor:
        """The values of (row, answer) pairs, float32 [n]."""
        at = torch.tensor(members, dtype=torch.int64)
        return self.table[at[:, 0], at[:, 1]]

    def share(self) -> None:
        """Let every rank know what the others found out. Every rank does."""
        if self.ranks.world == 1:
            return
        known = ~self.table.isnan()
        sums, counts = torch.where(known, self.table, 0.0), known.float()
        self.ranks.sum_([sums, counts])
        self.table = torch.where(counts > 0, sums / counts, torch.nan)
        self._changed = True

    def flush(self) -> None:
        """Write what is new to disk, all or nothing. A full or forbidden disk costs the cache, not the run."""
        if self.path is None or self.ranks.rank or not self._changed:
            return
        from safetensors.torch import save_file

        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(dir=self.path.parent, prefix=".reference-")
            os.close(handle)
            try:
                save_file({"logps": self.table}, beside)
                os.replace(beside, self.path)
                self._changed = False
            finally:
                Path(beside).unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(str(path))["logps"]
        except (OSError, KeyError, SafetensorError):
            return
        if found.shape == self.table.shape and found.dtype == torch.float32:
            self.table = found


def key(trees: Iterable[Tree], *about: str) -> str:
    """The name of a table: what the rows are and what of them is scored, and `about` the model and how it computes."""
    sha = hashlib.sha256("\0".join(about).encode())
    for tree in trees:
        for part in (tree.prompt, *tree.answers, *tree.silent):
            sha.update(torch.tensor(list(part), dtype=torch.int32).numpy().tobytes())
            sha.update(b"|")
        sha.update(b"\n")
    return sha.hexdigest()[:32]
