"""TRL 1.16 as the oracle: its own _calculate_rewards and weighted sum over the functions that we load from a file."""

import logging
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.rewards.score import total

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FILE = """
import functools

def length_reward(completions, **kwargs):
    return [len(completion[0]["content"]) / 7 for completion in completions]

def ids_reward(completion_ids, **kwargs):
    return [float(sum(ids)) for ids in completion_ids]

def truth_reward(prompts, completions, answer, level, trainer_state, **kwargs):
    assert len(prompts) == len(completions) == len(answer) == len(level)
    assert "prompt" not in kwargs and "completion" not in kwargs
    return [
        (trainer_state.global_step if text[0]["content"] == truth else None) if rank != "odd" else None
        for text, truth, rank in zip(completions, answer, level, strict=True)
    ]

async def judge_reward(prompts, completions, log_metric, log_extra, **kwargs):
    log_metric("judged", float(len(completions)))
    log_extra("seen", [completion[0]["content"] for completion in completions])
    return [float(len(prompt[-1]["content"])) for prompt in prompts]

class Penalty:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, completions, **kwargs):
        return [self.factor if "a" in completion[0]["content"] else None for completion in completions]

class Late(Penalty):
    async def __call__(self, completions, **kwargs):
        return [self.factor] * len(completions)

penalty = Penalty(-3)
late = Late(0.125)
bound = functools.partial(ids_reward, scale=2)
"""
NAMES = ("length_reward", "ids_reward", "truth_reward", "judge_reward", "penalty", "late", "bound")
WEIGHTS = (1.0, 0.5, -2.0, 0.01, 1.0, 3.0, 1e-3)
ROWS = [
    {
        "prompt": [{"role": "user", "content": "q" * at}],
        "answer": "abc",
        "level": "odd" if at == 2 else "even",
        "completion": "never passed on",
    }
    for at in range(6)
]
TEXTS = ["abc", "x", "abc", "", "abcabc", "zz"]
IDS = [[1, 2, 3], [4], [], [5, 6], [7] * 9, [8]]


@pytest.fixture
def trl(own):
    """TRL's trainer, as far as its scoring needs one, over the raw functions of the file."""
    import torch
    from transformers import TrainerState
    from trl import GRPOTrainer
    from trl.trainer.utils import is_async_callable, shutdown_event_loop_in_daemon, start_event_loop_in_daemon

    raw: dict = {}
    exec(compile(FILE, "raw.py", "exec"), raw)
    trainer = object.__new__(GRPOTrainer)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    trainer.args = SimpleNamespace(report_to=[])
    trainer.state = TrainerState(global_step=5)
    trainer.environments = None
    trainer.reward_funcs = [raw[name] for name in NAMES]
    trainer.reward_func_names = list(NAMES)
    trainer.reward_processing_classes = [None] * len(NAMES)
    trainer._pending_extra_logs, trainer._pending_metrics = _lists(), _lists()
    assert [is_async_callable(one) for one in trainer.reward_funcs] == [
        name in ("judge_reward", "late") for name in NAMES
    ]
    thread, trainer.async_loop, ready = start_event_loop_in_daemon(name="trl")
    ready.wait()
    yield trainer
    shutdown_event_loop_in_daemon(thread, trainer.async_loop)
    trainer.async_loop.close()


def _lists():
    from collections import defaultdict

    return defaultdict(list)


def test_values_totals_and_logs_are_trls(trl, own, load):
    import torch

    prompts = [row["prompt"] for row in ROWS]
    done = [[{"role": "assistant", "content": text}] for text in TEXTS]
    theirs = trl._calculate_rewards(ROWS, prompts, done, IDS)
    weights = torch.tensor(WEIGHTS)
    totals = (theirs * weights.unsqueeze(0)).nansum(dim=1)  # as _generate_and_score_completions adds them up

    path = own(FILE)
    columns = {name: [row[name] for row in ROWS] for name in ("answer", "level", "completion")}
    found = load(*(f"{path}:{name}" for name in NAMES), reward_weights=WEIGHTS)
    ours = found.score(prompts, done, IDS, columns, 5)

    nan = float("nan")
    values = torch.tensor([[nan if value is None else value for value in row] for row in ours.values])
    torch.testing.assert_close(values, theirs, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(torch.tensor(ours.totals), totals, rtol=1e-6, atol=1e-6)
    assert found.names == NAMES
    assert ours.told["judged"] == sum(trl._pending_metrics["judged"]) / len(trl._pending_metrics["judged"])
    assert ours.extra == dict(trl._pending_extra_logs)
    from trl.trainer.utils import nanstd

    for place, name in enumerate(NAMES):
        assert ours.log[f"rewards/{name}/mean"] == pytest.approx(float(torch.nanmean(theirs[:, place])), rel=1e-6)
        spread = ours.log.get(f"rewards/{name}/std", nan)  # of fewer than two there is none, and TRL's is NaN
        assert spread == pytest.approx(float(nanstd(theirs[:, place])), rel=1e-5, abs=1e-6, nan_ok=True)


def test_where_nothing_applies_trl_has_nan_too(trl, own, load, caplog):
    import torch

    row = {"prompt": "q", "answer": "a", "level": "odd"}
    trl.reward_funcs = trl.reward_funcs[2:3]
    trl.reward_func_names, trl.reward_processing_classes = ["truth_reward"], [None]
    done = [[{"role": "assistant", "content": "x"}]]
    from accelerate import PartialState

    PartialState()
    with caplog.at_level(logging.WARNING):
        theirs = trl._calculate_rewards([row], ["q"], done, [[1]])
    assert torch.isnan(theirs).all()
    ours = load(f"{own(FILE)}:truth_reward").score(["q"], done, [[1]], {"answer": ["a"], "level": ["odd"]}, 5)
    assert ours.values == [[None]]
    assert ours.totals[0] != ours.totals[0]
    assert [alert.code for alert in ours.alerts] == ["reward.none"]


@pytest.mark.parametrize("values", [[1.0], [1.0] * 7])
def test_a_wrong_count_is_refused_by_both(trl, own, load, values):
    from tunesmith.orchestrator.errors import JobFailed

    trl.reward_funcs = [lambda **kwargs: values]
    trl.reward_func_names, trl.reward_processing_classes = ["wrong"], [None]
    done = [[{"role": "assistant", "content": text}] for text in TEXTS]
    prompts = [row["prompt"] for row in ROWS]
    with pytest.raises(ValueError, match="rewards"):
        trl._calculate_rewards(ROWS, prompts, done, IDS)
    path = own(f"def wrong(**kwargs):\n    return {values}\n")
    with pytest.raises(JobFailed) as caught:
        load(f"{path}:wrong").score(prompts, done, IDS, {}, 1)
    assert caught.value.code == "reward.value"


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("think", "think_format_reward"),
        ("boxed", "accuracy_reward"),
    ],
)
def test_trls_own_rewards_agree_with_ours_where_they_mean_the_same(load, entry, name):
    from trl import rewards as theirs

    texts = [
        r"<think>a</think>\boxed{\frac{1}{2}}",
        r"<think>a</think>\boxed{0.5}",
        r"\boxed{1/3}",
        r"<think>a<think>b</think>\boxed{3}",
        r"<think>a</think> no box",
        "",
    ]
    done = [[{"role": "assistant", "content": text}] for text in texts]
    answers = [r"\frac{1}{2}"] * len(texts)
    wanted = getattr(theirs, name)(completions=done, solution=answers)
    found = load(entry).score(["q"] * len(texts), done, [[1]] * len(texts), {"solution": answers}, 1)
    assert [row[0] for row in found.values] == [float(value) for value in wanted]


def test_trls_rewards_work_from_a_users_file(own, load):
    path = own(
        "from trl.rewards import think_format_reward, get_soft_overlong_punishment\n"
        "overlong = get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4)\n"
    )
    found = load(f"{path}:think_format_reward", f"0.5*{path}:overlong")
    done = [[{"role": "assistant", "content": "<think>a</think>b"}]] * 3
    scores = found.score(["q"] * 3, done, [[1] * 2, [1] * 6, [1] * 20], {}, 1)
    assert scores.values == [[1.0, 0.0], [1.0, -0.5], [1.0, -1.0]]
    assert scores.totals == [1.0, 0.75, 0.5]


@settings(deadline=None)
@given(st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=6), st.data())
def test_a_total_is_trls_nansum(values, data):
    import math

    import torch

    weights = data.draw(st.lists(st.floats(-10, 10), min_size=len(values), max_size=len(values)))
    row = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
    found = total(values, weights)
    if all(value is None for value in values):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(float((row * torch.tensor(weights, dtype=torch.float64)).nansum()), abs=1e-9)


def test_tensors_are_numbers(own, load):
    path = own(
        "import torch\n"
        "def whole(completions, **kwargs):\n"
        "    return torch.tensor([1.5] * len(completions))\n"
        "def each(completions, **kwargs):\n"
        "    return [torch.tensor(2, dtype=torch.int64) for _ in completions]\n"
    )
    found = load(f"{path}:whole", f"{path}:each").score(["q"] * 2, ["a", "b"], [[1]] * 2, {}, 1)
    assert found.values == [[1.5, 2.0]] * 2
