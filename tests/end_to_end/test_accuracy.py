"""What was foretold of a run stands against what it took, and the next plan of its kind learns from it."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def test_a_run_stands_against_its_plan_and_corrects_the_next(machine, spec) -> None:
    path = str(spec("measured", max_steps=8))
    before = machine.document("plan", path)["stages"][0]
    assert before["size"]["peak_bytes"]["source"] == before["time"]["seconds"]["source"] == "formula"
    assert machine.run("run", path, "--yes", "--json").returncode == 0
    document = machine.document("models", "--accuracy")
    (row,) = document["runs"]
    assert row["name"] == "measured"
    assert (row["method"], row["family"], row["state"]) == ("sft", "llama", "succeeded")
    assert row["memory"]["predicted"] == before["size"]["peak_bytes"]
    assert row["seconds"]["predicted"] == before["time"]["seconds"]
    assert 100 * 2**20 < row["memory"]["actual"] < 4 * 2**30
    assert 0 < row["seconds"]["actual"] < 280
    error = 100 * (row["memory"]["predicted"]["expected"] / row["memory"]["actual"] - 1)
    assert row["memory"]["error_percent"] == pytest.approx(error)
    assert document["memory"]["runs"] == document["seconds"]["runs"] == 1
    assert document["memory"]["mean_abs_error_percent"] == pytest.approx(abs(error))

    after = machine.document("plan", path)["stages"][0]
    peak, seconds = after["size"]["peak_bytes"], after["time"]["seconds"]
    assert peak["source"] == seconds["source"] == after["time"]["tokens_per_second"]["source"] == "calibrated"
    assert peak["formula"] == pytest.approx(row["memory"]["predicted"]["expected"], rel=0.02)
    assert abs(peak["expected"] - row["memory"]["actual"]) < abs(peak["formula"] - row["memory"]["actual"])
    assert seconds["formula"] == pytest.approx(row["seconds"]["predicted"]["expected"], rel=0.02)
    assert seconds["low"] <= seconds["expected"] <= seconds["high"]
    (said,) = [item for item in after["findings"] if item["code"] == "size.calibrated"]
    assert "1 earlier run " in said["message"]

    assert machine.run("run", path, "--json").returncode == 3, "the daemon's own plan waits for approval"
    waiting = machine.document("show", "last")
    assert any(item["code"] == "size.calibrated" for item in waiting["findings"])
