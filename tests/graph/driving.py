"""Turns of a job's graph for the tests of the machine."""

import sqlite3
from contextlib import closing

from tunesmith.graph.machine import Tools, advance
from tunesmith.orchestrator.states import JobState as S

JOB = "j-aaaaaa"


class Drive:
    """Turns of one job's graph; `steps` are the nodes entered, over all turns."""

    def __init__(self, store, folder):
        self.store, self.folder, self.steps = store, folder, []
        self.database = folder / "graph.db"

    def __call__(self, port=None, enter=None):
        port = port or self.store.lease(JOB)
        return advance(JOB, Tools(port, self.folder / "cache", enter or self.steps.append), self.database)

    def state(self):
        return self.store.doc(JOB)["state"]

    def calls(self):
        return [call[0] for call in self.store.doc(JOB)["calls"]]


def through(drive, store, between=lambda: None):
    """The whole main road of a job with a question; `between` is called at each interrupt."""
    assert drive() == "review"
    assert drive.state() == S.AWAITING_INPUT
    between()
    field = store.view(JOB).plan.questions[0].field
    store.answer(JOB, **{field: "smollm2-135m"})
    assert drive() == "review"
    assert drive.state() == S.AWAITING_APPROVAL
    between()
    store.approve(JOB)
    assert drive() == "await"
    assert drive.state() == S.QUEUED
    between()
    store.start(JOB)
    store.end(JOB, exit_code=0)
    assert drive() == "end"


def rows_of(database):
    with closing(sqlite3.connect(database)) as connection:
        counts = [
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("checkpoints", "writes")
        ]
    return sum(counts)
