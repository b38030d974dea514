"""Which checkpoint an attempt goes on from; test_run.py shows it over whole attempts."""

import json

from tunesmith.executors.kernel import checkpoint, earlier
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.events import Kind, decode
from tunesmith.orchestrator.nouns import Attempt
from tunesmith.orchestrator.plain import build


def test_a_checkpoint_that_speaks_of_another_step_is_damaged(attempt):
    folder = attempt()
    noun = build(Attempt, json.loads((folder / "attempt.json").read_text()))
    place = checkpoint.step_folder(folder / "checkpoints", 6)
    with Reporter(folder, 1) as reporter:
        for said in (7, "6", None):
            checkpoint.write(place, lambda inside: (inside / "a").write_bytes(b"a"), step=said)
            assert earlier.newest(folder, noun, reporter) is None
        checkpoint.write(place, lambda inside: (inside / "a").write_bytes(b"a"), step=6)
        assert earlier.newest(folder, noun, reporter) == place
    lines = [decode(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    alerts = [line.values for line in lines if line.kind is Kind.ALERT]
    assert [alert["code"] for alert in alerts] == ["checkpoint.corrupt"] * 3
    assert all("another step" in alert["message"] for alert in alerts)
