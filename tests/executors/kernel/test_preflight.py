"""The largest step, tried before the first: told, remembered, and harmless; with less where memory is short."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.executors.kernel.test_run import events, last_error, series
from tunesmith.executors.kernel import run as runs
from tunesmith.executors.kernel.loops import model
from tunesmith.executors.kernel.loops.engine import Engine
from tunesmith.executors.kernel.preflight import Preflight
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.nouns import DataSource, GrpoSpec

KEYS = {"preflight/peak_bytes", "preflight/seconds", "preflight/tokens", "preflight/resident_bytes"}


def logs(folder):
    return [event.values["message"] for event in events(folder) if event.kind is Kind.LOG]


def told(folder):
    """What each preflight measured."""
    found = [event for event in events(folder) if "preflight/tokens" in event.values]
    assert all(event.step == 0 and event.kind is Kind.METRIC for event in found)
    return [event.values for event in found]


def kept(folder):
    """What the home's cache holds."""
    places = (folder.parents[3] / "cache" / "preflight").glob("*")
    return [json.loads(place.read_text()) for place in places]


def adapter(folder):
    return (folder / "output/adapter/adapter_model.safetensors").read_bytes()


@pytest.fixture
def job(attempt, tmp_path):
    """An attempt of a method over its own data."""

    def make(method="sft", number=1, **train):
        rows = {
            "sft": lambda n: {"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."},
            "dpo": lambda n: {"prompt": f"Say {n}.", "chosen": f"it is {n}", "rejected": f"no, {n * n}"},
            "grpo": lambda n: {"prompt": f"What is {n}?", "answer": str(n)},
        }
        source = tmp_path / f"{method}.jsonl"
        source.write_text("".join(json.dumps(rows[method](n)) + "\n" for n in range(12)))
        grpo = GrpoSpec(num_generations=4, max_completion=6, num_iterations=2, rewards=("length:5 characters",))
        usual = {"max_steps": 3, "save_steps": 1, "eval_steps": 3, **train}
        return attempt(number, method=method, data=(DataSource(source=str(source)),), train=usual, grpo=grpo)

    return make


@pytest.fixture
def thirst(monkeypatch):
    """Every net of a run refuses forward passes with gradients over more than so many places."""

    def make(limit):
        usual, refused = model.load, []

        def load(*args):
            net = usual(*args)

            def look(module, given):
                need = given[0].numel() / (2 if net.checkpointed else 1)
                if torch.is_grad_enabled() and need > limit:
                    refused.append(need)
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

            net.causal.get_input_embeddings().register_forward_pre_hook(look)
            return net

        monkeypatch.setattr(model, "load", load)
        return refused

    return make


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_the_run_after_it_is_the_run_without_it(method, job, monkeypatch):
    folder = job(method)
    assert runs.run(folder) == 0, last_error(folder)
    (values,) = told(folder)
    assert values.keys() == KEYS
    assert values["preflight/seconds"] > 0
    assert values["preflight/tokens"] > 20
    assert any(line.startswith("Preflight: the largest step there can be took") for line in logs(folder))
    with_it, losses = adapter(folder), series(folder, "train/loss")
    means = series(folder, "train/rewards/accuracies"), series(folder, "train/reward")

    monkeypatch.setattr(Preflight, "run", lambda self: None)
    bare = job(method, 2)
    assert runs.run(bare) == 0
    assert told(bare) == []
    assert adapter(bare) == with_it
    assert series(bare, "train/loss") == losses
    assert (series(bare, "train/rewards/accuracies"), series(bare, "train/reward")) == means


def test_an_attempt_that_passed_does_not_try_again(job, monkeypatch):
    folder, usual = job(), Engine._step

    def stepping(self):
        usual(self)
        if self.cursor.step == 2:
            (folder / "control").write_text('{"signal": "stop", "serial": 1}')

    monkeypatch.setattr(Engine, "_step", stepping)
    assert runs.run(folder) == 75
    assert len(told(folder)) == len(kept(folder)) == 1
    (folder / "control").unlink()
    assert runs.run(folder) == 0
    assert len(told(folder)) == 1
    assert any(line.startswith("Preflight: passed before") for line in logs(folder))


@pytest.mark.parametrize("bytes_", [b"", b"{", b"[1]", b'{"peak_bytes": "many", "eased": {}}'])
def test_a_damaged_memory_is_none(bytes_, job):
    folder = job()
    assert runs.run(folder) == 0
    (place,) = (folder.parents[3] / "cache" / "preflight").iterdir()
    place.write_bytes(bytes_)
    for name in ("output", "checkpoints"):
        subprocess.run(["rm", "-r", str(folder / name)], check=True)
    assert runs.run(folder) == 0
    assert len(told(folder)) == 2
    assert json.loads(place.read_text())["tokens"] == told(folder)[-1]["preflight/tokens"]


def test_a_home_that_cannot_be_written_costs_the_memory_only(job):
    folder = job()
    cache = folder.parents[3] / "cache"
    cache.mkdir(parents=True)
    (cache / "preflight").write_text("in the way")
    assert runs.run(folder) == 0
    assert len(told(folder)) == 1


def test_where_the_largest_step_does_not_fit_less_goes_at_a_time_from_the_first(job, thirst):
    small = job(number=2, micro_batch=1, packing=False)
    assert runs.run(small) == 0
    refused = thirst(60)
    folder = job(micro_batch=4, packing=False)
    assert runs.run(folder) == 0, last_error(folder)
    assert len(refused) == 2
    found = [event.values for event in events(folder) if event.values.get("code") == "oom.rung"]
    assert [(item["rung"], item["step"], item["rows"]) for item in found] == [(1, None, 2), (2, None, 1)]
    assert "before the first step" in found[0]["message"]
    assert adapter(folder) == adapter(small)
    assert kept(folder)[0]["eased"] | kept(folder)[-1]["eased"] == {"rows": 1, "tokens": 96, "device": "cpu"}

    for name in ("output", "checkpoints"):
        subprocess.run(["rm", "-r", str(folder / name)], check=True)
    assert runs.run(folder) == 0  # it remembers, and meets no refusal again
    assert len(refused) == 2
    assert adapter(folder) == adapter(small)


def test_a_job_that_can_never_fit_ends_before_anything_is_spent(job, thirst):
    thirst(1)
    folder = job(micro_batch=2, packing=False)
    assert runs.run(folder) == 1
    error = last_error(folder)
    assert (error["code"], error["message"]) == ("oom.cuda", "The GPU ran out of memory.")
    assert "adapter.kind: qlora" in error["fix"]
    assert len([event for event in events(folder) if event.values.get("code") == "oom.rung"]) == 2
    assert series(folder, "train/loss") == {}
    assert "running" not in [event.values["state"] for event in events(folder) if event.kind is Kind.STATE]


CHILD = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tunesmith.executors.kernel import run as runs
from tunesmith.executors.kernel.loops import model

def limited(megabytes):
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + megabytes * 2**20, resource.RLIM_INFINITY))

usual = model.load
assert runs.run(Path(sys.argv[1])) == 0  # at ease; what libraries map, they have mapped by then
model.load = lambda *args: (usual(*args), limited(int(sys.argv[3])))[0]
sys.exit(runs.run(Path(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits on a process's memory are Linux's")
def test_a_machine_that_really_has_no_more_memory(tmp_path, attempt):
    """The allocator's own refusal, under a limit on the process's memory: the ladder is climbed, and the run fits."""
    rows = tmp_path / "long.jsonl"
    line = "what is said here is said at length, so that it takes memory. " * 7
    rows.write_text("".join(json.dumps({"prompt": f"{n}:", "completion": line}) + "\n" for n in range(64)))
    train = {"max_length": 512, "effective_batch": 32, "max_steps": 2, "packing": False, "eval_steps": 100}
    calm, tight = (
        attempt(number, data=(DataSource(source=str(rows)),), train={**train, "micro_batch": micro})
        for number, micro in ((1, 2), (2, 32))
    )
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", CHILD, str(calm), str(tight), "80"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, (last_error(tight), done.stderr[-2000:])
    found = [event.values for event in events(tight) if event.values.get("code") == "oom.rung"]
    assert 1 <= len(found) <= 4
    assert found[0]["step"] in (None, 1)
    assert found[-1]["rows"] < 32
    assert any("DefaultCPUAllocator: can't allocate memory: you tried to allocate" in line for line in logs(tight))
    assert series(tight, "train/loss") == pytest.approx(series(calm, "train/loss"), rel=1e-4)
    one, two = (load_file(place / "output/adapter/adapter_model.safetensors") for place in (calm, tight))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    ledgers = [json.loads((place / "checkpoints/step-00000002/ledger.json").read_text()) for place in (calm, tight)]
    assert ledgers[0] == ledgers[1]
