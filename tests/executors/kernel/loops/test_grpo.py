"""GRPO around its rollout: what reward functions get and say, and a reference without noise."""

from dataclasses import dataclass

import pytest
import torch

from tunesmith.executors.kernel.control import Control
from tunesmith.executors.kernel.data import Prompt
from tunesmith.executors.kernel.loops.engine import Engine
from tunesmith.executors.kernel.loops.grpo import Grpo, Judge
from tunesmith.executors.kernel.loops.method import Turn
from tunesmith.executors.kernel.loops.rollout import Sample
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.events import Kind, decode
from tunesmith.orchestrator.nouns import GrpoSpec


class Given:
    """A rollout that writes four tokens that follow from row and sample, three rows at a time."""

    problems = ()
    slots = 3

    def refresh(self):
        pass

    def generate(self, asks, *, key, greedy=False, told=None, stopped=None):
        made = [(ask.row, sample) for ask in asks for sample in ask.samples]
        return [Sample(row, n, [3 + row, 4 + n, 5 + row * n, 2], [-1.0] * 4, True) for row, n in made]


@dataclass(frozen=True)
class Scored:
    """What answers earned, and what was logged beside it."""

    values: list
    totals: list
    told: dict
    extra = {}
    alerts = ()


class Scorer:
    """A reward that takes the ids it is given apart, and logs the mean of their first."""

    names = ("last",)

    def __init__(self, then=lambda asked: None):
        self.asked, self.then = 0, then

    def score(self, prompts, completions, completion_ids, columns, step):
        self.asked += 1
        self.then(self.asked)
        firsts = [ids[0] for ids in completion_ids]
        for ids in completion_ids:
            ids.pop()
        values = [float(ids.pop()) for ids in completion_ids]
        return Scored([[value] for value in values], values, {"first": sum(firsts) / len(firsts)})


@pytest.fixture
def make_grpo(make_net, make_spec, tmp_path):
    """A method over some prompts, and its reporter."""
    reporter = Reporter(tmp_path, 1)

    def make(rows, scorer=None, net=None, **spec):
        net = net or make_net(make_spec())
        usual = GrpoSpec(**{"num_generations": 4, "max_completion": 4, **spec})
        judge = Judge(lambda ids: " ".join(map(str, ids)), scorer or Scorer())
        prompts = [Prompt(at, [3 + at, 4, 5], "", {}) for at in rows]
        return Grpo(
            net, prompts, usual, rollout=Given(), judge=judge, reporter=reporter, seed=0, micro_batch=2, max_length=16,
            packing=True, pad_id=0,
        )  # fmt: skip

    yield make
    reporter.__exit__()


def test_a_reward_function_cannot_change_what_is_trained(make_grpo):
    (batch,) = make_grpo([1, 2]).batches([0, 1], Turn(0, 0))
    written = [token for row in (1, 2) for n in range(4) for token in (3 + row, 4 + n, 5 + row * n, 2)]
    assert batch.targets.tolist() == written


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_reference_has_no_dropout(iterations, make_grpo):
    """The model's own, that is: whatever it drops in training, it is the same reference each time it is asked."""
    method = make_grpo([1, 2], beta=0.1, num_iterations=iterations)
    net = method.net

    def noisy(module, args, output):
        return torch.nn.functional.dropout(output, 0.5, module.training)

    net.causal.get_input_embeddings().register_forward_hook(noisy)
    (batch,) = method.batches([0, 1], Turn(0, 0))
    with torch.no_grad(), net.outer.disable_adapter():
        net.outer.eval()
        expected, _ = net.token_logps(batch, method.spec.temperature)
        net.outer.train()
        assert not torch.equal(net.token_logps(batch, method.spec.temperature)[0], expected)
    assert torch.equal(method._reference(batch), expected)
    assert net.outer.training


@pytest.fixture
def evaluate(make_grpo, make_spec, make_net, tmp_path):
    """An evaluation of seven rows, three at a time: (how the run ended, metrics)."""

    def evaluate(then=lambda asked: None):
        spec = make_spec(effective_batch=2, max_steps=1)
        net, control = make_net(spec), Control(tmp_path / "control")
        method = make_grpo(range(2), net=net)
        engine = Engine(
            net, method, spec.train, reporter=method.reporter, control=control, checkpoints=tmp_path / "checkpoints",
            facts={}, evaluation=make_grpo(range(7), Scorer(then), net=net),
        )  # fmt: skip
        ended = engine.run().ended
        lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
        return ended, [event for event in map(decode, lines) if event.kind is Kind.METRIC]

    return evaluate


def test_what_functions_log_in_an_evaluation_is_told_once_over_all_rows(evaluate):
    asked = []
    ended, metrics = evaluate(asked.append)
    assert (ended, asked) == ("finished", [1, 2, 3, 4, 5, 6])
    told = [(event.step, event.values["eval/first"]) for event in metrics if "eval/first" in event.values]
    assert told == [(0, 6.0), (1, 6.0)]  # the mean of 3 to 9
    assert [event.values["train/first"] for event in metrics if "train/first" in event.values] == [3.5]


def test_a_stopped_evaluation_leaves_nothing_that_functions_logged(evaluate, tmp_path):
    def stop(asked):
        if asked == 2:
            (tmp_path / "control").write_text('{"signal": "stop", "serial": 1}')

    ended, metrics = evaluate(stop)
    assert ended == "stopped"
    assert not [name for event in metrics for name in event.values if name.startswith("eval/")]
