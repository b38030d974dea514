"""A whole attempt by one of TRL's trainers, from attempt.json to its results, and another that goes on from it."""

import json

import pytest

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel import rewards as scoring
from tunesmith.executors.kernel import run as runs
from tunesmith.executors.kernel.loops import trl
from tunesmith.orchestrator.events import Kind, decode
from tunesmith.orchestrator.nouns import Attempt
from tunesmith.orchestrator.plain import plain

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Writes attempt.json in a home's layout and returns the attempt's folder."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TUNESMITH_HOME", raising=False)

    def make(spec, number=1, resume_from=None):
        folder = tmp_path / "home" / "jobs" / "j-aaaaaa" / "attempts" / str(number)
        folder.mkdir(parents=True)
        hashes = tuple(scoring.hashes(spec)) if spec.method == "rloo" else ()
        noun = Attempt(
            job="j-aaaaaa", number=number, spec=spec, plan_hash="p", reward_hashes=hashes, resume_from=resume_from
        )
        (folder / "attempt.json").write_text(json.dumps(plain(noun)))
        return folder

    return make


def events(folder, kind):
    found = [decode(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    return [event for event in found if event is not None and event.kind is kind]


@pytest.mark.slow
@pytest.mark.parametrize("method", trl.METHODS)
def test_an_attempt_ends_with_results_and_another_goes_on_from_its_checkpoint(method, attempt, make_spec):
    spec = make_spec(method)
    first = attempt(spec)
    assert runs.run(first) == 0, (first / "events.jsonl").read_text()[-2000:]
    assert [event.values["state"] for event in events(first, Kind.STATE)] == [
        "starting", "running", "finishing", "succeeded",
    ]  # fmt: skip
    manifest = checkpoint.verify(first / "output")
    assert (manifest["step"], manifest["attempt"]) == (6, 1)
    checkpoint.verify(first / "output" / "adapter")
    (artifact,) = events(first, Kind.ARTIFACT)
    assert (artifact.values["kind"], artifact.values["path"]) == ("adapter", "output/adapter")

    second = attempt(spec, 2, "attempts/1/checkpoints/step-00000004")
    assert runs.run(second) == 0, (second / "events.jsonl").read_text()[-2000:]
    assert sorted(event.step for event in events(second, Kind.METRIC) if "train/loss" in event.values) == [5, 6]
    weights = [folder / "output" / "adapter" / "adapter_model.safetensors" for folder in (first, second)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_distillation_without_a_teacher_is_refused(attempt, make_spec):
    from dataclasses import replace

    spec = make_spec("distill")
    folder = attempt(replace(spec, distill=replace(spec.distill, teacher=None)))
    assert runs.run(folder) == 2
    assert events(folder, Kind.STATE)[-1].values["error"]["code"] == "distill.teacher"
