"""Users' functions in every form that TRL documents, and all that they can get wrong."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.rewards.call import Reward
from tunesmith.executors.kernel.rewards.score import Rewards, columns_of
from tunesmith.orchestrator.errors import JobFailed, TunesmithError

PROMPTS = ["p0", "p1", "p2"]
DONE = ["a", "bb", "ccc"]
IDS = [[1], [1, 2], [1, 2, 3]]


def rewards(*calls, weights=None, **options):
    """Rewards of these functions, as if from a user's file."""
    weights = weights or [1.0] * len(calls)
    made = [
        Reward(getattr(call, "__name__", "own"), weight, call, "own.py", "own.py")
        for call, weight in zip(calls, weights, strict=True)
    ]
    return Rewards(made, **options)


def run(*calls, columns=None, step=1, weights=None, rows=()):
    """The scores that functions give to the three samples."""
    found = rewards(*calls, weights=weights)
    try:
        return found.score(PROMPTS, DONE, IDS, columns or {}, step, rows=rows)
    finally:
        found.close()


# --- forms of functions ---------------------------------------------------------------------------------------------


def test_completions_alone():
    def longer(completions, **kwargs):
        return [float(len(text)) for text in completions]

    scores = run(longer)
    assert scores.values == [[1.0], [2.0], [3.0]]
    assert scores.totals == [1.0, 2.0, 3.0]
    assert scores.log == {"rewards/longer/mean": 2.0, "rewards/longer/std": 1.0}


def test_ids_prompts_and_columns_by_name():
    def all_of_them(prompts, completions, completion_ids, ground_truth, **kwargs):
        assert set(kwargs) == {"level", "trainer_state", "log_extra", "log_metric"}
        return [
            len(prompt) + len(text) + len(ids) + truth
            for prompt, text, ids, truth in zip(prompts, completions, completion_ids, ground_truth, strict=True)
        ]

    columns = {"ground_truth": [10, 20, 30], "level": ["x", "y", "z"], "completion": ["hidden"] * 3, "prompts": [0] * 3}
    assert run(all_of_them, columns=columns).totals == [14.0, 26.0, 38.0]


def test_no_function_sees_what_another_one_changed(own, load):
    """Each gets lists of its own, and whoever asked keeps theirs."""
    path = own(
        "def vandal(prompts, completions, completion_ids, tags, **kwargs):\n"
        "    prompts[0][0]['content'] = completions[0][-1]['content'] = ''\n"
        "    tags[0]['x'].append(1)\n"
        "    completion_ids[0].clear()\n"
        "    completions.clear()\n"
        "    return [0.0]\n"
        "def honest(prompts, completions, completion_ids, tags, **kwargs):\n"
        "    said = [prompts[0][0]['content'], completions[0][-1]['content'], tags[0]['x'], completion_ids[0]]\n"
        "    return [float(said == ['q', 'a', [], [1, 2]])]\n"
    )
    prompts, completions = [[{"role": "user", "content": "q"}]], [[{"role": "assistant", "content": "a"}]]
    ids, columns = [[1, 2]], {"tags": [{"x": []}]}
    found = load(f"{path}:vandal", f"{path}:honest").score(prompts, completions, ids, columns, 1)
    assert [list(row) for row in found.values] == [[0.0, 1.0]]
    assert (completions[0][0]["content"], ids, columns) == ("a", [[1, 2]], {"tags": [{"x": []}]})


def test_conversations_as_trl_passes_them():
    seen = []

    def contents(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        return [float(len(completion[0]["content"])) for completion in completions]

    found = rewards(contents)
    prompts = [[{"role": "user", "content": "q"}]]
    done = [[{"role": "assistant", "content": "four"}]]
    assert found.score(prompts, done, [[1]], {}, 1).totals == [4.0]
    assert seen == [(prompts, done)]


def test_trainer_state_tells_the_step():
    def later(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step + trainer_state.max_steps)] * len(completions)

    found = rewards(later)
    found.state.max_steps = 100
    assert [found.score(PROMPTS, DONE, IDS, {}, step).totals[0] for step in (1, 7)] == [101.0, 107.0]


def test_none_is_left_out_of_the_sum_and_of_the_means():
    def some(completions, task, **kwargs):
        return [1.0 if kind == "maths" else None for kind in task]

    def other(completions, task, **kwargs):
        return [2.0 if kind == "code" else None for kind in task]

    scores = run(some, other, columns={"task": ["maths", "code", "maths"]}, weights=[1.0, 0.5])
    assert scores.values == [[1.0, None], [None, 2.0], [1.0, None]]
    assert scores.totals == [1.0, 1.0, 1.0]
    assert scores.log == {"rewards/some/mean": 1.0, "rewards/some/std": 0.0, "rewards/other/mean": 2.0}
    assert scores.alerts == ()


def test_a_completion_that_nothing_applies_to_is_nan_and_told_once():
    def some(completions, **kwargs):
        return [None, 1.0, None]

    found = rewards(some)
    scores = found.score(PROMPTS, DONE, IDS, {}, 1, rows=[7, 8, 9])
    assert [math.isnan(value) for value in scores.totals] == [True, False, True]
    (alert,) = scores.alerts
    assert (alert.level, alert.code) == ("warning", "reward.none")
    assert "2 of 3" in alert.message
    assert "completion 1 of 3 (row 7), 'a'" in alert.message
    assert found.score(PROMPTS, DONE, IDS, {}, 2).alerts == ()


def test_what_functions_log_comes_back():
    def logs(completions, log_extra, log_metric, **kwargs):
        log_extra("upper", [text.upper() for text in completions])
        log_metric("share", 0.25)
        log_metric("share", 0.75)
        log_metric("odd", float("nan"))
        return [0.0] * len(completions)

    scores = run(logs)
    assert scores.extra == {"upper": ["A", "BB", "CCC"]}
    assert scores.told["share"] == 0.5
    assert "odd" not in scores.told


def test_numbers_of_every_kind_are_numbers():
    from decimal import Decimal
    from fractions import Fraction

    import numpy

    given = [
        (True, 2, 3.5),
        [Decimal("1"), Fraction(4, 2), numpy.float32(3.5)],
        numpy.array([1, 2, 3.5]),
        [1, numpy.int64(2), 3.5],
        (value for value in [1, 2, 3.5]),
    ]
    for values in given:
        assert run(lambda values=values, **kwargs: values).totals == [1.0, 2.0, 3.5]


def test_async_functions_wait_together_on_one_loop():
    import asyncio

    loops, order = [], []

    def make(name, other):
        gates.append(None)

        async def judge(completions, **kwargs):
            loops.append(asyncio.get_running_loop())
            order.append(f"{name} begins")
            events.setdefault(name, asyncio.Event()).set()
            await events.setdefault(other, asyncio.Event()).wait()  # ends only if both run at once
            order.append(f"{name} ends")
            return [float(len(text)) for text in completions]

        judge.__name__ = name
        return judge

    def plain(completions, **kwargs):
        order.append("plain")
        return [1.0] * len(completions)

    gates, events = [], {}
    found = rewards(make("one", "two"), plain, make("two", "one"), weights=[1.0, 10.0, 100.0])
    try:
        for step in (1, 2):
            events.clear()
            scores = found.score(PROMPTS, DONE, IDS, {}, step)
            assert scores.totals == [111.0, 212.0, 313.0]
    finally:
        found.close()
    assert len(set(loops)) == 1
    assert order[:3] == ["plain", "one begins", "two begins"]


def test_async_is_told_of_every_form():
    import functools

    class Judge:
        async def __call__(self, completions, **kwargs):
            return [2.0] * len(completions)

    async def judge(factor, completions, **kwargs):
        return [factor] * len(completions)

    assert run(Judge(), functools.partial(judge, 3.0)).values == [[2.0, 3.0]] * 3


# --- what goes wrong ------------------------------------------------------------------------------------------------


def broken(completions, **kwargs):
    for text in completions:
        if text == "bb":
            raise KeyError("bb\nand more")
    return [0.0] * len(completions)


async def broken_async(completions, **kwargs):
    raise ValueError("no answer")


def leaves(completions, **kwargs):
    raise SystemExit(4)


@pytest.mark.parametrize(
    ("call", "why", "sample"),
    [
        (broken, "KeyError: 'bb", "completion 2 of 3 (row 8), 'bb'"),
        (broken_async, "ValueError: no answer", "a batch of 3 completions"),
        (leaves, "SystemExit: 4", "completion 1 of 3 (row 7), 'a'"),
        (lambda completions: [0.0], "TypeError", "completion 1 of 3 (row 7), 'a'"),
        (lambda **kwargs: (1 / 0 for _ in range(3)), "ZeroDivisionError", "a batch of 3 completions"),
    ],
)
def test_an_exception_becomes_an_error_that_names_function_and_sample(call, why, sample):
    with pytest.raises(JobFailed) as caught:
        run(call, rows=[7, 8, 9])
    error = caught.value
    assert error.code == "reward.failed"
    assert f"{getattr(call, '__name__', 'own')} failed on {sample}" in error.message
    assert error.why.startswith(why)
    assert "\n" not in str(error)
    assert error.where.startswith("own.py")


def test_the_line_of_a_users_file_is_named(own, load):
    path = own("def score(completions, **kwargs):\n    helper()\n\n\ndef helper():\n    raise OSError(2, 'x')\n")
    with pytest.raises(JobFailed) as caught:
        load(f"{path}:score").score(PROMPTS, DONE, IDS, {}, 1)
    assert caught.value.where == f"{path}:6"


def test_a_failing_async_function_leaves_no_task_behind():
    async def slow(completions, **kwargs):
        import asyncio

        await asyncio.sleep(0)
        finished.append(True)
        return [0.0] * len(completions)

    finished = []
    with pytest.raises(JobFailed):
        run(broken_async, slow)
    assert finished == [True]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0], "gave 1 rewards for 3 completions"),
        ([1.0] * 4, "gave 4 rewards for 3 completions"),
        ([], "gave 0 rewards for 3 completions"),
        (1.0, "gave a value of type float"),
        (None, "gave a value of type NoneType"),
        ("abc", "gave the text 'abc'"),
        ({"a": 1.0}, "gave a value of type dict"),
        ([1.0, "2", 3.0], "gave the text '2' for completion 2 of 3"),
        ([1.0, 2.0, float("nan")], "gave nan for completion 3 of 3"),
        ([float("inf"), 2.0, 3.0], "gave inf for completion 1 of 3"),
        ([1e39, 2.0, 3.0], "gave 1e+39 for completion 1 of 3"),
        ([10**400, 2.0, 3.0], "gave a value of type int for completion 1 of 3"),
        ([[1.0], 2.0, 3.0], "gave a value of type list for completion 1 of 3"),
        ([1j, 2.0, 3.0], "gave a value of type complex for completion 1 of 3"),
    ],
)
def test_what_is_no_list_of_numbers_is_a_typed_error(values, said):
    async def later(**kwargs):
        return values

    for call in (lambda **kwargs: values, later):
        with pytest.raises(JobFailed) as caught:
            run(call)
        assert caught.value.code == "reward.value"
        assert said in caught.value.message
        assert caught.value.where == "own.py"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)


@given(anything)
@settings(max_examples=300)
def test_whatever_a_function_gives_the_totals_are_numbers_or_the_error_is_typed(values):
    scores, code = None, ""
    try:
        scores = run(lambda **kwargs: values)
    except TunesmithError as error:
        code = error.code
    if scores is None:
        assert code == "reward.value"
    else:
        assert all(isinstance(value, float) for value in scores.totals)
        assert [math.isnan(value) for value in scores.totals] == [value is None for value in values]


def test_columns_are_lists_with_gaps_filled():
    assert columns_of([{"a": 1}, {"b": 2}]) == {"a": [1, None], "b": [None, 2]}
    assert columns_of([]) == {}


# --- what is built in never raises anything else --------------------------------------------------------------------

hostile = st.one_of(
    st.text(max_size=60),
    st.text(alphabet='0123456789,.-$/#{}[]"\\ \nefxboxdthink<>', max_size=80),
    st.sampled_from(["\\boxed{", "<think>", "</think>", "####", "[" * 3000, "\ud800", "9" * 5000, "1e9999", "\0"]),
)
cell = st.one_of(hostile, st.none(), st.integers(), st.floats(), st.lists(hostile | st.integers(), max_size=3))


@given(st.lists(st.tuples(hostile, cell), min_size=1, max_size=4), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_built_in_rewards_give_numbers_for_any_text(kept, pairs, chat):
    entries = ("number", "exact", "json", "json:answer", "length:9 characters", "length:<=3", "think", "boxed")
    found = _all_of(kept, entries)
    done = [[{"role": "assistant", "content": text}] if chat else text for text, _ in pairs]
    count = len(pairs)
    scores = found.score(["q"] * count, done, [[1]] * count, {"answer": [answer for _, answer in pairs]}, 1)
    for row in scores.values:
        assert all(value is None or 0 <= value <= 1 for value in row)


def _all_of(kept, entries):
    key = " ".join(entries)
    if key not in kept:
        from tunesmith.executors.kernel.rewards import load
        from tunesmith.orchestrator.nouns import DataSource, GrpoSpec, JobSpec, ModelRef

        data = (DataSource(source="r"),)
        kept[key] = load(JobSpec(model=ModelRef(id="m"), data=data, method="grpo", grpo=GrpoSpec(rewards=entries)))
    return kept[key]
