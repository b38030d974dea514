"""An attempt on a base in 4 bits, from start to end, stopped and resumed, and what it delivers."""

import json

import pytest

from tunesmith.executors.kernel import run as runs
from tunesmith.orchestrator.events import Kind, decode

QLORA = {"kind": "qlora"}
ADAPTER = "output/adapter/adapter_model.safetensors"


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


def events(folder, kind):
    found = [decode(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    return [event for event in found if event is not None and event.kind is kind]


def series(folder, key):
    return {event.step: event.values[key] for event in events(folder, Kind.METRIC) if key in event.values}


def stop_at(monkeypatch, folder, step):
    """Let a stop order arrive while the attempt takes this step."""
    from tunesmith.executors.kernel.loops import engine

    usual = engine.Engine._step

    def stepping(self):
        usual(self)
        if self.cursor.step == step:
            (folder / "control").write_text('{"signal": "stop", "serial": 1}')

    monkeypatch.setattr(engine.Engine, "_step", stepping)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_adapter_delivered_lowers_the_loss_on_a_base_in_4_bits(attempt, tiny_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = attempt(adapter=QLORA)
    assert runs.run(folder) == 0
    assert [event.values["state"] for event in events(folder, Kind.STATE)][-1] == "succeeded"
    assert not [event for event in events(folder, Kind.LOG) if event.values.get("level") == "warning"]
    losses = series(folder, "eval/loss")
    assert losses[6] < losses[0]
    (artifact,) = events(folder, Kind.ARTIFACT)
    assert artifact.values["kind"] == "adapter"
    config = json.loads((folder / "output" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=how, device_map={"": "cpu"})
    tuned = PeftModel.from_pretrained(base, folder / "output" / "adapter").eval()
    text = AutoTokenizer.from_pretrained(tiny_model)(
        "<|im_start|>user\nWhat is 3 plus 3?<|im_end|>\n<|im_start|>assistant\nIt is 6.<|im_end|>", return_tensors="pt"
    )
    with torch.no_grad():
        after = tuned(**text, labels=text["input_ids"]).loss
        with tuned.disable_adapter():
            before = tuned(**text, labels=text["input_ids"]).loss
    assert after < before


def test_a_stopped_attempt_goes_on_to_the_same_bits(attempt, monkeypatch):
    whole = attempt(9, adapter=QLORA)
    assert runs.run(whole) == 0
    first = attempt(1, adapter=QLORA)
    with monkeypatch.context() as patch:
        stop_at(patch, first, 3)
        assert runs.run(first) == 75
    second = attempt(2, adapter=QLORA, resume_from="attempts/1/checkpoints/step-00000003")
    assert runs.run(second) == 0
    assert (second / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert {**series(first, "train/loss"), **series(second, "train/loss")} == series(whole, "train/loss")


def test_without_the_library_it_ends_with_2_and_a_clear_error(attempt, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    folder = attempt(adapter=QLORA)
    assert runs.run(folder) == 2
    error = events(folder, Kind.STATE)[-1].values["error"]
    assert (error["type"], error["code"]) == ("InputError", "adapter.qlora")
    assert error["fix"]
