"""Adam's moments in 8 bits: they learn like those in 32, and a resume takes them back bit for bit."""

import pytest
import torch

from tunesmith.executors.kernel.loops import optimizer
from tunesmith.orchestrator.errors import InputError

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def test_moments_in_eight_bits_learn_and_go_on_bitwise(make_bench, make_spec, make_rows):
    rows = make_rows(16)
    spec = make_spec(adapter={"kind": "none"}, optimizer="adamw-8bit", max_steps=8, save_steps=4, learning_rate=1e-3)
    whole = make_bench(spec, rows, name="whole", **WIDE)
    whole.engine.run()
    state = whole.engine.optimizer.state
    narrow = [name for item, name in whole.engine.names.items() if state[item]["state1"].dtype == torch.uint8]
    assert any("mlp" in name for name in narrow)
    second = make_bench(spec, rows, name="second", **WIDE)
    second.engine.resume(whole.folder / "checkpoints" / "step-00000004")
    second.engine.run()
    for name, item in whole.weights().items():
        assert torch.equal(item, second.weights()[name]), name
    losses = whole.series("train/loss")
    assert losses[8] < losses[1]
    plain = make_bench(make_spec(adapter={"kind": "none"}, max_steps=8, learning_rate=1e-3), rows, name="plain", **WIDE)
    plain.engine.run()
    for step, loss in plain.series("train/loss").items():
        assert losses[step] == pytest.approx(loss, rel=0.03)


def test_a_device_without_it_is_told_in_words(make_spec):
    with pytest.raises(InputError) as caught:
        optimizer.make([torch.zeros(4, 4)], make_spec(optimizer="adamw-8bit").train, torch.device("meta"))
    assert caught.value.code == "train.optimizer"
    assert "meta" in caught.value.why
