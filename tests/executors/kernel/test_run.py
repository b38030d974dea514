"""One attempt through every phase, on a tiny model and data written here."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tunesmith.executors.kernel import explain, place
from tunesmith.executors.kernel import run as runs
from tunesmith.orchestrator.errors import InputError, JobFailed, StorageError
from tunesmith.orchestrator.events import Kind, decode
from tunesmith.orchestrator.nouns import DataSource, EvalSpec, Mapping, ModelRef


@pytest.fixture(autouse=True)
def _small_and_offline(monkeypatch):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("TUNESMITH_HOME", raising=False)
    yield
    torch.set_num_threads(before)


def events(folder, kind=None):
    found = [decode(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    return [event for event in found if event is not None and kind in (None, event.kind)]


def series(folder, key):
    return {event.step: event.values[key] for event in events(folder, Kind.METRIC) if key in event.values}


def states(folder):
    return [event.values["state"] for event in events(folder, Kind.STATE)]


def last_error(folder):
    return events(folder, Kind.STATE)[-1].values["error"]


def alerts(folder):
    return {event.values["code"]: event.values for event in events(folder, Kind.ALERT)}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_attempt_from_start_to_end(attempt, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = attempt()
    assert runs.run(folder) == 0
    assert states(folder) == ["starting", "running", "finishing", "succeeded"]
    assert [event.line for event in events(folder)] == list(range(1, len(events(folder)) + 1))
    assert sorted(series(folder, "train/loss")) == [1, 2, 3, 4, 5, 6]
    assert sorted(series(folder, "eval/loss")) == [0, 3, 6]
    assert series(folder, "eval/loss")[6] < series(folder, "eval/loss")[0]
    phases = [event.values["phase"] for event in events(folder, Kind.PROGRESS)]
    assert list(dict.fromkeys(phases)) == ["loading", "tokenizing", "preflight", "evaluating", "training", "saving"]
    assert any("packed and single rows agree" in e.values["message"] for e in events(folder, Kind.LOG))
    (artifact,) = events(folder, Kind.ARTIFACT)
    assert artifact.values["kind"] == "adapter"

    config = json.loads((folder / "output" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder / "output" / "adapter")
    assert any(item.abs().max() > 0 for name, item in tuned.named_parameters() if "lora_B" in name)


def test_the_executor_accepts_what_is_delivered(attempt):
    from tunesmith.executors.local import manifest
    from tunesmith.executors.local.folder import Folder
    from tunesmith.orchestrator.nouns import Attempt, spec_hash
    from tunesmith.orchestrator.plain import build

    folder = attempt()
    assert runs.run(folder) == 0
    spec = build(Attempt, json.loads((folder / "attempt.json").read_text())).spec
    with Folder.find(folder.parents[3], "j-aaaaaa", 1) as held:
        (artifact,) = manifest.verified(held, number=1, spec=spec_hash(spec)[:16])
    (told,) = events(folder, Kind.ARTIFACT)
    assert artifact.kind == "adapter"
    assert artifact.sha256 == told.values["sha256"]
    assert artifact.bytes == told.values["bytes"]


def test_only_answers_are_trained(attempt, tiny_model, monkeypatch):
    from transformers import AutoTokenizer

    from tunesmith.executors.kernel.loops import engine

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trained = []
    usual = engine.Engine._seed

    def look(self, step, batch):
        trained.append(tokenizer.decode(batch.targets))
        return usual(self, step, batch)

    monkeypatch.setattr(engine.Engine, "_seed", look)
    assert runs.run(attempt(eval=EvalSpec(fraction=0.0))) == 0
    text = "".join(trained)
    answers = text.split("<|im_end|>")
    assert answers.pop() == ""
    assert sorted(answers) == sorted(f"It is {2 * n}." for n in range(24))


def test_full_weights_come_with_their_tokenizer(attempt, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = attempt(adapter={"kind": "none"})
    assert runs.run(folder) == 0
    whole = folder / "output" / "model"
    template = AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert AutoTokenizer.from_pretrained(whole).chat_template == template
    AutoModelForCausalLM.from_pretrained(whole)
    listed = json.loads((folder / "output" / "manifest.json").read_text())["files"]
    assert {"model/model.safetensors", "model/manifest.json", "model/tokenizer.json"} <= set(listed)


def test_a_stopped_attempt_goes_on_in_the_next(attempt):
    whole = attempt(9)
    assert runs.run(whole) == 0
    first = attempt(1)
    (first / "control").write_text('{"signal": "checkpoint", "serial": 1}')

    order_at(first, 3)
    assert runs.run(first) == 75
    assert states(first)[-1] == "stopped"
    assert last_error(first)["code"] == "stopped"
    assert "3" in last_error(first)["message"]
    second = attempt(2, resume_from="attempts/1/checkpoints/step-00000003")
    assert runs.run(second) == 0
    name = "output/adapter/adapter_model.safetensors"
    assert (second / name).read_bytes() == (whole / name).read_bytes()
    assert {**series(first, "train/loss"), **series(second, "train/loss")} == series(whole, "train/loss")


def order_at(folder, step):
    """Let a stop order arrive while the attempt takes this step."""
    from tunesmith.executors.kernel.loops import engine

    usual = engine.Engine._step

    def stepping(self):
        usual(self)
        if self.cursor.step == step:
            (folder / "control").write_text('{"signal": "stop", "serial": 2}')
            engine.Engine._step = usual

    engine.Engine._step = stepping


def test_a_restarted_attempt_uses_its_own_checkpoint(attempt):
    whole = attempt(9)
    assert runs.run(whole) == 0
    folder = attempt(1)
    order_at(folder, 5)
    assert runs.run(folder) == 75
    (folder / "control").unlink()
    before = len(events(folder))
    assert runs.run(folder) == 0
    assert [event.line for event in events(folder)] == list(range(1, len(events(folder)) + 1))
    assert sorted({event.step for event in events(folder)[before:] if event.kind is Kind.METRIC}) == [6]
    name = "output/adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_damaged_checkpoint_is_named_and_an_older_one_used(attempt):
    first = attempt(1)
    order_at(first, 5)
    assert runs.run(first) == 75
    newest = first / "checkpoints" / "step-00000005" / "optimizer.safetensors"
    os.truncate(newest, newest.stat().st_size - 1)
    second = attempt(2, resume_from="attempts/1/checkpoints/step-00000005")
    assert runs.run(second) == 0
    assert "step-00000005 is damaged: optimizer.safetensors" in alerts(second)["checkpoint.corrupt"]["message"]
    assert min(series(second, "train/loss")) == 5


def damage(folder, step):
    """Make the checkpoint of a step one byte shorter."""
    path = folder / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def test_a_good_checkpoint_of_any_earlier_attempt_is_gone_on_from_and_each_damaged_one_named_once(attempt):
    first = attempt(1)
    order_at(first, 3)
    assert runs.run(first) == 75
    second = attempt(2, resume_from="attempts/1/checkpoints/step-00000003")
    order_at(second, 5)
    assert runs.run(second) == 75
    for step in (4, 5):
        damage(second, step)
    stranger = attempt(3)  # of another plan: its checkpoint is not looked at
    order_at(stranger, 5)
    assert runs.run(stranger) == 75
    doc = json.loads((stranger / "attempt.json").read_text())
    (stranger / "attempt.json").write_text(json.dumps({**doc, "plan_hash": "another"}))
    (stranger.parent / "4").mkdir()  # without attempt.json
    fifth = attempt(5, resume_from="attempts/2/checkpoints/step-00000005")
    assert runs.run(fifth) == 0
    named = [event.values["where"] for event in events(fifth, Kind.ALERT)]
    assert named == ["step-00000005", "step-00000004"]
    assert min(series(fifth, "train/loss")) == 4
    assert any("step 3 (1)" in event.values["message"] for event in events(fifth, Kind.LOG))


def test_an_attempt_that_names_no_checkpoint_starts_anew(attempt):
    first = attempt(1)
    order_at(first, 3)
    assert runs.run(first) == 75
    second = attempt(2, train={"max_steps": 1})
    assert runs.run(second) == 0
    assert min(series(second, "train/loss")) == 1


@pytest.mark.parametrize("error, code", [(InputError("No such column."), 2), (JobFailed("Lost."), 1)])
def test_an_attempt_that_lost_another_rank_ends_with_the_code_of_the_cause(error, code, attempt, monkeypatch):
    """As the watching thread ends it, where the main one hangs: what was told is kept, and the code is right."""
    done = []

    class Track:
        def __init__(self, *_):
            self.close = lambda: done.append("closed")

        def __call__(self, event):
            if event.kind is Kind.STATE:
                done.append(event.values["state"])

    monkeypatch.setattr(runs, "Track", Track)
    monkeypatch.setattr(runs.os, "_exit", done.append)
    monkeypatch.setattr(runs.Run, "go", lambda self: self.crew._abandon(error))
    runs.run(attempt())
    assert done[:4] == ["starting", "closed", "failed", code]


def test_without_a_good_checkpoint_it_starts_anew_and_says_so(attempt):
    folder = attempt(2, resume_from="attempts/1/checkpoints/step-00000005")
    assert runs.run(folder) == 0
    assert "checkpoint.none" in alerts(folder)
    assert min(series(folder, "train/loss")) == 1


def test_a_checkpoint_outside_the_job_is_refused(attempt):
    folder = attempt(2, resume_from="../j-bbbbbb/attempts/1/checkpoints/step-00000005")
    assert runs.run(folder) == 2
    assert last_error(folder)["code"] == "checkpoint.outside"


def test_rows_that_cannot_be_used_are_counted(attempt, data):
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "empty", "completion": ""}) + "\n")
        file.write(json.dumps({"prompt": "long " * 100, "completion": "x"}) + "\n")
    folder = attempt(eval=EvalSpec(fraction=0.0))
    assert runs.run(folder) == 0
    found = alerts(folder)
    assert found["data.row.empty_answer"]["rows"] == 1
    assert "1 of 26 rows are left out" in found["data.row.empty_answer"]["message"]
    assert found["data.no_supervised_tokens"]["rows"] == 1


def test_changed_data_ends_the_attempt(attempt):
    folder = attempt(fingerprint="sha256:" + "0" * 64)
    assert runs.run(folder) == 2
    assert last_error(folder)["code"] == "data.changed"


def test_the_fingerprint_of_the_plan_is_accepted(attempt, data):
    from tunesmith.executors.kernel.data import fingerprint

    assert runs.run(attempt(fingerprint=fingerprint([DataSource(source=str(data))]), train={"max_steps": 1})) == 0


@pytest.mark.parametrize(
    "spec, code",
    [
        ({"data": (DataSource(source="/nowhere/rows.jsonl"),)}, "data.missing_file"),
        ({"model": ModelRef(id="/nowhere/model")}, "model.missing"),
        ({"method": "dpo"}, None),
        ({"train": {"max_length": "auto"}}, "spec.auto"),
        ({"train": {"early_stopping": 2}, "eval": EvalSpec(fraction=0.0)}, "train.early_stopping"),
        ({"adapter": {"targets": ("nothing",)}}, "adapter.targets"),
        ({"train": {"dtype": "float16"}, "hardware": "cpu"}, "train.dtype"),
        (
            {"data": (DataSource(source="DATA", mapping=Mapping(kind="text", columns={"text": "nothing"})),)},
            None,
        ),
    ],
)
def test_bad_input_ends_with_2_and_a_clear_error(spec, code, attempt, data, capfd):
    if spec.get("data") and spec["data"][0].source == "DATA":
        spec = {"data": (DataSource(source=str(data), mapping=spec["data"][0].mapping),)}
    folder = attempt(**spec)
    assert runs.run(folder) == 2
    error = last_error(folder)
    assert states(folder)[-1] == "failed"
    assert error["type"] == "InputError"
    assert error["message"]
    assert error["fix"]
    if code:
        assert error["code"] == code
    assert "Traceback" not in capfd.readouterr().err


def test_a_broken_attempt_file_ends_with_2(tmp_path, capsys):
    assert runs.run(tmp_path) == 2
    (tmp_path / "attempt.json").write_text("{")
    assert runs.run(tmp_path) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_an_unexpected_error_is_internal_and_its_traceback_goes_to_the_log(attempt, monkeypatch, capfd):
    from tunesmith.executors.kernel.loops import engine

    def broken(self):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(engine.Engine, "run", broken)
    folder = attempt()
    assert runs.run(folder) == 1
    error = last_error(folder)
    assert (error["type"], error["code"]) == ("JobFailed", "internal")
    assert "ZeroDivisionError: surprise" in error["why"]
    assert "Traceback" in capfd.readouterr().err
    assert "Traceback" not in (folder / "events.jsonl").read_text()


def test_errors_get_their_codes():
    import torch

    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    assert explain.explained(cuda).code == "oom.cuda"
    assert explain.explained(MemoryError()).code == "oom.host"
    host = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")
    assert explain.explained(host).code == "oom.host"
    assert isinstance(explain.explained(OSError(28, "No space left on device")), StorageError)
    assert explain.explained(OSError(30, "Read-only file system")).code == "storage.denied"
    assert explain.explained(ValueError("x")).code == "internal"
    assert explain.explained(KeyboardInterrupt()).code == "stopped"
    known = InputError("x", code="y")
    assert explain.explained(known) is known
    assert isinstance(explain.explained(cuda), JobFailed)


def test_the_home_of_an_attempt(tmp_path, monkeypatch):
    folder = tmp_path / "home" / "jobs" / "j-aaaaaa" / "attempts" / "1"
    assert place.home_of(folder) == tmp_path / "home"
    assert place.home_of(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    monkeypatch.setenv("TUNESMITH_HOME", "/other")
    assert str(place.home_of(folder)) == "/other"


@pytest.mark.slow
def test_as_a_process_with_sigterm_and_a_second_life(attempt):
    """The real command: TERM gives 75 and a checkpoint; started again in the same folder it goes on and ends with 0."""
    folder = attempt(train={"max_steps": 100, "save_steps": 1000, "eval_steps": 1000})
    command = [sys.executable, "-P", "-m", "tunesmith.executors.kernel", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kernel = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and kernel.poll() is None:
        if (folder / "events.jsonl").exists() and len(series(folder, "train/loss")) >= 3:
            break
    kernel.send_signal(signal.SIGTERM)
    output = kernel.communicate(timeout=120)[0]
    assert kernel.returncode == 75, output
    assert "Traceback" not in output
    step = max(series(folder, "train/loss"))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{step:08d}"]

    # the second life is killed without warning, the third ends: no step is lost
    kernel = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and max(series(folder, "train/loss")) < step + 3:
        pass
    kernel.kill()
    kernel.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert sorted(series(folder, "train/loss")) == list(range(1, 101))
    assert states(folder)[-1] == "succeeded"


def test_the_usage_is_told():
    done = subprocess.run([sys.executable, "-P", "-m", "tunesmith.executors.kernel"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "ATTEMPT_DIR" in done.stderr
