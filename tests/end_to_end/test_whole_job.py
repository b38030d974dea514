"""From a sentence or a spec to an adapter that plain peft loads, and the same ending whoever is killed meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SHARED = Path(__file__).parents[3] / "shared" / "data"
TICKETS = Path(__file__).parents[2] / "examples" / "tickets.jsonl"


def adapter(document: dict) -> Path:
    (path,) = [Path(item["path"]) for item in document["artifacts"] if item["kind"] == "adapter"]
    return path


def digest(document: dict) -> str:
    return hashlib.sha256((adapter(document) / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers so
def test_a_spec_becomes_an_adapter_that_plain_peft_loads(machine, spec, tiny) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = machine.run("run", str(spec(max_steps=6)), "--yes", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["state"] == "succeeded"
    assert [item["state"] for item in document["attempts"]] == ["succeeded"]
    series = machine.document("metrics", document["id"])["series"]["train/loss"]
    assert [point[0] for point in series] == [1, 2, 3, 4, 5, 6]
    assert series[-1][1] < series[0][1]
    base = AutoModelForCausalLM.from_pretrained(tiny, trust_remote_code=False)
    tuned = PeftModel.from_pretrained(base, adapter(document))
    assert sum(item.numel() for name, item in tuned.named_parameters() if "lora_" in name) > 0


def test_without_a_terminal_a_job_waits_for_approval(machine, spec) -> None:
    done = machine.run("run", str(spec(max_steps=2)), "--json")
    assert done.returncode == 3, (done.stdout, done.stderr)
    document = machine.document("show", "last")
    assert document["state"] == "awaiting_approval"
    stale = machine.run("approve", "last", "--plan", "0" * 64)
    assert stale.returncode == 6, stale.stderr
    edited = machine.run("edit", "last", "--set", "train.max_steps=3")
    assert edited.returncode == 0, edited.stderr
    fresh = machine.until("last", lambda item: item["state"] == "awaiting_approval")
    assert fresh["plan_hash"] != document["plan_hash"]
    assert machine.run("approve", "last", "--plan", document["plan_hash"]).returncode == 6
    assert machine.run("approve", "last", "--plan", fresh["plan_hash"]).returncode == 0
    ended = machine.until("last", lambda item: item["state"] == "succeeded")
    assert ended["progress"]["total_steps"] == 3


def test_daemon_killed_while_training_and_graph_db_deleted_at_each_interrupt(machine, spec) -> None:
    plain = json.loads(machine.run("run", str(spec("plain", max_steps=60)), "--yes", "--json").stdout)
    assert plain["state"] == "succeeded"

    def forget() -> None:
        for path in machine.home.glob("graph.db*"):
            path.unlink()

    assert machine.run("run", str(spec("killed", max_steps=60))).returncode == 3
    machine.until("killed", lambda item: item["state"] == "awaiting_approval")
    forget()
    assert machine.run("approve", "killed").returncode == 0
    machine.until("killed", lambda item: (item["progress"]["step"] or 0) >= 10)
    os.kill(machine.daemon(), signal.SIGKILL)
    forget()
    machine.document("daemon", "start")
    ended = machine.until("killed", lambda item: item["state"] == "succeeded")
    assert [item["state"] for item in ended["attempts"]] == ["succeeded"]
    assert digest(ended) == digest(plain)
    steps = [point[0] for point in machine.document("metrics", "killed")["series"]["train/loss"]]
    assert steps == list(range(1, 61))


def test_cancel_ends_at_a_checkpoint_and_retry_goes_on_from_it(machine, spec) -> None:
    whole = json.loads(machine.run("run", str(spec("whole", max_steps=60)), "--yes", "--json").stdout)
    assert machine.run("run", str(spec("halves", max_steps=60)), "--yes", "--detach").returncode == 0
    machine.until("halves", lambda item: (item["progress"]["step"] or 0) >= 5)
    assert machine.run("cancel", "halves").returncode == 0
    machine.until("halves", lambda item: item["state"] == "cancelled")
    assert machine.run("retry", "halves").returncode == 0
    ended = machine.until("halves", lambda item: item["state"] == "succeeded")
    assert [item["state"] for item in ended["attempts"]] == ["cancelled", "succeeded"]
    assert ended["attempts"][1]["resumed_from"].startswith("attempts/1/checkpoints/step-")
    assert digest(ended) == digest(whole)


def test_a_sentence_trains_the_real_model(machine) -> None:
    request = f"SFT smollm2-135m on {TICKETS}, first 12 rows, 2 steps, batch size 2"
    done = machine.run("run", request, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["state"] == "succeeded"
    assert document["last"]["train/loss"] < 6
    answer = machine.document("ask", "what's the current loss?")
    assert f"{document['last']['train/loss']:.4g}"[:4] in answer["answer"]


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_the_first_200_rows_of_gsm8k_for_20_steps(machine) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"the real data sets are not at {SHARED}")
    request = "SFT smollm2-135m on ../shared/data/gsm8k_train.jsonl, first 200 rows, 20 steps"
    machine.env.pop("OMP_NUM_THREADS")
    done = machine.run("run", request, "--yes", "--json", cwd=Path(__file__).parents[2], seconds=1100)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["state"] == "succeeded"
    losses = [point[1] for point in machine.document("metrics", "last")["series"]["train/loss"]]
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])
    held_out = [point[1] for point in machine.document("metrics", "last")["series"]["eval/loss"]]
    assert held_out[-1] < held_out[0]
