"""Ranks as real processes over gloo: what they say to each other, and that together they train as one would."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.executors.kernel.loops.ranks import ALONE, buckets


class Forks:
    """A process with everything imported that runs the ranks of `ranked.py`."""

    def __init__(self, process):
        self.process = process

    def run(self, body, world, folder, **given):
        """(exit codes, what each rank found) of `world` ranks."""
        folder.mkdir(exist_ok=True)
        order = {"body": body, "world": world, "folder": str(folder), **given}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        words = [folder / f"{rank}.json" for rank in range(world)]
        return codes, [json.loads(path.read_text()) if path.exists() else None for path in words]


@pytest.fixture(scope="module")
def forks():
    command = [sys.executable, "-P", str(Path(__file__).with_name("ranked.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout.readline() == "ready\n"
        yield Forks(one)
        one.stdin.close()


@pytest.fixture
def rows(make_rows):
    """Rows as plain data."""

    def make(count, seed=0):
        return [{"row": row.row, "ids": row.ids, "labels": row.labels} for row in make_rows(count, seed)]

    return make


def test_alone_there_is_nobody_to_ask():
    tensor = torch.ones(3)
    ALONE.sum_([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert (ALONE.agree(True), ALONE.agree(False)) == (True, False)
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    ALONE.same("rows", 1)
    ALONE.leave()


def test_buckets_hold_every_element_once_and_one_type_each():
    tensors = [torch.zeros(size) for size in (3, 4, 0, 9, 2)] + [torch.zeros(2, dtype=torch.float64), torch.zeros(5)]
    found = [[item.numel() for item in bucket] for bucket in buckets(tensors, most=32)]
    assert found == [[3, 4], [9], [2, 5], [2]]
    assert all(len({item.dtype for item in bucket}) == 1 for bucket in buckets(tensors))
    assert list(buckets([])) == []


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_what_ranks_say_to_each_other(world, forks, tmp_path):
    codes, found = forks.run("messages", world, tmp_path)
    assert codes == [0] * world
    everyone = range(world)
    assert sorted(item for one in found for item in one["shared"]) == list(range(7))
    draws = [torch.Generator().manual_seed(rank) for rank in everyone]
    wanted = (
        sum(torch.randn(5, 7, generator=draw) for draw in draws),
        sum(torch.randn(3, 4, generator=d) for d in draws),
    )
    for rank, one in enumerate(found):
        assert one["shared"] == list(range(7))[rank::world]
        assert one["flags"] == [True, False]
        assert one["gathered"] == [{"rank": r, "word": "ä" * r, "third": 1 / 3, "none": None} for r in everyone]
        assert one["apart"][:2] == ["ranks.apart", "The processes of this attempt do not have the same weights."]
        assert one["apart"][2] == f"Rank {world - 1} of {world} differ from rank 0."
        assert one["over"]
        sums = load_file(tmp_path / f"{rank}.safetensors")
        assert (sums["0"] - wanted[0]).abs().max() < 1e-6
        assert (sums["1"] - wanted[1].t()).abs().max() < 1e-6
        assert sums["3"] == sum(1.5 + r for r in everyone)
        assert sums["4"].dtype == torch.float64
        assert sums["5"].dtype == torch.bfloat16
        first = load_file(tmp_path / "0.safetensors")
        assert all(torch.equal(first[name], sums[name]) for name in first)


LORA = {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": ["all-linear"]}


def settings(**more):
    return {"effective_batch": 4, "micro_batch": 2, "packing": False, "max_steps": 6, **more}


@pytest.fixture
def asked(rows):
    """A GRPO run over nine prompts."""

    def make(iterations, **more):
        prompts = [{"row": row["row"], "ids": row["ids"][:5]} for row in rows(9)]
        grpo = {"num_generations": 4, "num_iterations": iterations, "beta": 0.1}
        told = {"adapter": LORA, "settings": settings(**more), "rows": prompts, "held": prompts[:3]}
        return {**told, "method": "grpo", "grpo": grpo}

    return make


@pytest.mark.slow
def test_a_killed_rank_is_an_error_and_no_wait(forks, tmp_path):
    codes, found = forks.run("killed", 2, tmp_path)
    assert codes == [0, -signal.SIGKILL]
    assert found[0]["error"]["code"] == "ranks.lost"


@pytest.mark.slow
def test_a_rank_that_says_nothing_is_an_error_in_time(forks, tmp_path):
    codes, found = forks.run("quiet", 2, tmp_path)
    assert codes == [0, 0]
    assert found[0]["error"]["code"] == "ranks.lost"


RUNS = {
    "lora": ({}, LORA),
    "lora, packed, with dropout": ({"packing": True, "micro_batch": 1}, {**LORA, "dropout": 0.2}),
    "full": ({"weight_decay": 0.1}, {"kind": "none"}),
}


def series(found, key):
    return {step: values[key] for step, values in found[0]["metrics"] if key in values}


def weights(folder, rank=0):
    return load_file(folder / f"weights-{rank}.safetensors")


def furthest(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_two_ranks_train_as_one_does(name, forks, rows, tmp_path):
    """Ten rows in steps of four: the last step of an epoch has two rows, one batch, and nothing for rank 1."""
    change, adapter = RUNS[name]
    order = {
        "adapter": adapter,
        "settings": settings(eval_steps=3, **change),
        "rows": rows(10),
        "held": rows(5, seed=1),
    }
    order["spare"] = name == "full"
    _, alone = forks.run("train", 1, tmp_path / "alone", **order)
    codes, both = forks.run("train", 2, tmp_path / "both", **order)
    assert codes == [0, 0]
    assert both[0]["ledger"] == both[1]["ledger"] == alone[0]["ledger"]
    assert both[0]["step"] == 6
    for key in ("train/loss", "train/grad_norm", "train/num_tokens", "eval/loss"):
        one, two = series(alone, key), series(both, key)
        assert two.keys() == one.keys()
        assert two == pytest.approx(one, abs=1e-6, rel=1e-6), key
    assert furthest(weights(tmp_path / "alone"), weights(tmp_path / "both")) <= 1e-6
    assert furthest(weights(tmp_path / "both", 0), weights(tmp_path / "both", 1)) == 0
    assert not list((tmp_path / "both").glob("checkpoints/*"))


@pytest.mark.slow
@pytest.mark.parametrize("packing, adapter", [(False, LORA), (True, LORA), (True, {"kind": "none"})])
def test_two_ranks_learn_preferences_as_one_does(packing, adapter, forks, rows, tmp_path):
    """Each rank asks the reference about its own pairs, with full weights before the first step; both tell means."""
    pairs = [
        {"row": row["row"], "prompt": row["ids"][:3], "answers": [row["ids"][3:], row["ids"][:1:-2]]}
        for row in rows(10)
    ]
    order = {"adapter": adapter, "settings": settings(packing=packing, micro_batch=1), "rows": pairs, "method": "dpo"}
    _, alone = forks.run("train", 1, tmp_path / "alone", **order)
    codes, both = forks.run("train", 2, tmp_path / "both", **order)
    assert codes == [0, 0]
    assert both[0]["ledger"] == both[1]["ledger"] == alone[0]["ledger"]
    for key in (
        "train/loss",
        "train/rewards/margins",
        "train/rewards/accuracies",
        "train/logps/chosen",
        "train/entropy",
    ):
        one, two = series(alone, key), series(both, key)
        assert len(one) == 6
        assert two == pytest.approx(one, abs=1e-5, rel=1e-5), key
    assert series(both, "train/rewards/margins")[6] > 0.01
    # Adam divides by the gradient's own size, so sums in another order show: up to 1.5e-6 on one processor
    assert furthest(weights(tmp_path / "alone"), weights(tmp_path / "both")) <= 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 2])
def test_two_ranks_write_and_learn_as_one_does(iterations, forks, asked, tmp_path):
    """Nine prompts in steps of four: in the last step of an epoch there is none for rank 1 to answer."""
    order = asked(iterations, max_steps=3 * iterations, eval_steps=3, max_grad_norm=0.0)
    _, alone = forks.run("train", 1, tmp_path / "alone", **order)
    codes, both = forks.run("train", 2, tmp_path / "both", **order)
    assert codes == [0, 0]
    assert both[0]["ledger"] == both[1]["ledger"] == alone[0]["ledger"]
    for key in ("train/loss", "train/reward", "train/reward_std", "train/kl", "eval/reward"):
        one, two = series(alone, key), series(both, key)
        assert len(one) > 1, key
        assert two == pytest.approx(one, abs=1e-5, rel=1e-5), key
    assert series(both, "train/kl")[3 * iterations] > 0
    assert furthest(weights(tmp_path / "alone"), weights(tmp_path / "both")) <= 1e-6
    assert furthest(weights(tmp_path / "both", 0), weights(tmp_path / "both", 1)) == 0


@pytest.mark.slow
def test_a_stop_in_a_rollout_waits_for_no_other_rank(forks, asked, tmp_path):
    """Rank 0 breaks off and saves the step before; the other, which still writes, is none of its concern."""
    order = asked(1, max_steps=4)
    _, whole = forks.run("train", 2, tmp_path / "whole", **order)
    codes, cut = forks.run("train", 2, tmp_path / "cut", deeds={"torn": 2}, **order)
    assert codes == [0, 0]
    assert (cut[0]["ended"], cut[0]["step"]) == ("stopped", 2)
    assert cut[1]["error"]["code"] == "ranks.lost"
    codes, rest = forks.run("train", 2, tmp_path / "rest", resume=str(tmp_path / "cut"), **order)
    assert codes == [0, 0]
    assert {**series(cut, "train/loss"), **series(rest, "train/loss")} == series(whole, "train/loss")
    assert furthest(weights(tmp_path / "whole"), weights(tmp_path / "rest")) == 0


@pytest.mark.slow
def test_early_stopping_is_the_same_for_every_rank(forks, rows, tmp_path):
    change = {"epochs": 60, "max_steps": None, "learning_rate": 0.05, "eval_steps": 2, "early_stopping": 2}
    order = {"adapter": LORA, "settings": settings(scheduler="constant", **change), "rows": rows(8), "held": rows(6, 3)}
    _, alone = forks.run("train", 1, tmp_path / "alone", **order)
    codes, both = forks.run("train", 2, tmp_path / "both", **order)
    assert codes == [0, 0]
    ends = [[one[key] for key in ("ended", "step", "best", "ledger")] for one in (alone[0], *both)]
    assert ends[0][0] == "early"
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.slow
def test_a_stop_ends_all_at_one_step_and_any_number_goes_on(forks, rows, tmp_path):
    order = {"adapter": LORA, "settings": settings(), "rows": rows(10)}
    _, whole = forks.run("train", 2, tmp_path / "whole", **order)
    codes, cut = forks.run("train", 2, tmp_path / "cut", deeds={"stop": 3}, **order)
    assert codes == [0, 0]
    assert [(one["ended"], one["step"]) for one in cut] == [("stopped", 3)] * 2
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000003"]
    for world in (2, 1):
        place = tmp_path / f"rest of {world}"
        codes, rest = forks.run("train", world, place, resume=str(tmp_path / "cut"), **order)
        assert codes == [0] * world
        assert all(one["ledger"] == whole[0]["ledger"] for one in rest)
        losses = {**series(cut, "train/loss"), **series(rest, "train/loss")}
        apart = furthest(weights(tmp_path / "whole"), weights(place))
        if world == 2:
            assert losses == series(whole, "train/loss")
            assert apart == 0
        else:
            assert losses == pytest.approx(series(whole, "train/loss"), abs=1e-6)
            assert apart <= 1e-6


@pytest.mark.slow
def test_a_rank_killed_in_training_ends_the_run_and_its_checkpoints_stay(forks, rows, tmp_path):
    order = {"adapter": LORA, "settings": settings(save_steps=2), "rows": rows(10)}
    codes, found = forks.run("train", 2, tmp_path, deeds={"kill": 3}, **order)
    assert codes == [0, -signal.SIGKILL]
    assert found[0]["error"]["code"] == "ranks.lost"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
def test_before_the_first_step_all_ranks_give_up_the_same(forks, rows, tmp_path):
    """Rank 1 alone has no room for the largest step; micro-batches stay the same in both, and so does the result."""
    order = {"adapter": LORA, "settings": settings(micro_batch=4, effective_batch=8), "rows": rows(16)}
    _, calm = forks.run("train", 1, tmp_path / "calm", **order)
    codes, found = forks.run("train", 2, tmp_path / "dry", dry=[-1, 24], **order)
    assert codes == [0, 0]
    assert [one["room"] for one in found] == [[1, 64]] * 2
    assert [one["rungs"] for one in found] == [2, 2]
    assert found[0]["ledger"] == found[1]["ledger"] == calm[0]["ledger"]
    assert furthest(weights(tmp_path / "calm"), weights(tmp_path / "dry")) <= 1e-5
    assert furthest(weights(tmp_path / "dry", 0), weights(tmp_path / "dry", 1)) == 0


@pytest.mark.slow
def test_a_rank_that_runs_out_in_a_step_ends_the_attempt_and_says_why(forks, rows, tmp_path):
    order = {"adapter": LORA, "settings": settings(save_steps=1), "rows": rows(10)}
    codes, found = forks.run("train", 2, tmp_path, dry=[1, 1], **order)
    assert codes == [0, 0]
    assert found[0]["error"]["code"] == "ranks.lost"
    assert found[1]["error"]["code"] == "oom.cuda"
    assert "2 processes take every step together" in found[1]["error"]["why"]
    assert "train.micro_batch" in found[1]["error"]["fix"]
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith("step"))
    assert steps == ["step-00000001"]
