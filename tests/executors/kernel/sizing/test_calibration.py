"""Corrections by earlier runs: nothing from nothing, steady runs believed, one odd run hardly, ranges that hold."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.sizing import calibration
from tunesmith.executors.kernel.sizing.calibration import MEMORY, PACE, TWO_SIDED, corrections, learn
from tunesmith.orchestrator.nouns import Estimate, Past, TimeEstimate
from tunesmith.orchestrator.plain import build, plain

BYTES = Estimate(low=0.9e9, expected=1e9, high=1.1e9, unit="bytes")
TOKENS = Estimate(low=9e4, expected=1e5, high=1.1e5, unit="tokens")
TIME = TimeEstimate(
    seconds=Estimate(low=50, expected=120, high=400, unit="seconds"),
    tokens_per_second=Estimate(low=400, expected=1000, high=2500, unit="tokens/s"),
)
logs = st.floats(-1.5, 1.5)
beliefs = st.sampled_from([*MEMORY.values(), PACE])


def of(past, kind="cpu", method="sft", family="llama"):
    return corrections(past, method=method, family=family, kind=kind)


def run(memory=1.0, pace=1.0, beside=1.0, **changes):
    """A run that took so many times what was foretold."""
    pairs = {"bytes": (2e9, 2e9 * memory), "rate": (500.0, 500.0 / pace), "rest": (20.0, 20.0 * beside)}
    return Past(**{"method": "sft", "family": "llama", **pairs, **changes})


def test_no_run_changes_nothing() -> None:
    known = of([])
    assert known.runs == 0
    assert known.held(BYTES) is BYTES
    assert known.timed(TIME, TOKENS) is TIME


def test_runs_of_another_kind_change_nothing() -> None:
    others = [run(2.0, family="qwen3"), run(2.0, method="dpo"), Past(method="sft", family="llama")]
    assert of(others).held(BYTES) is BYTES


@pytest.mark.parametrize("pair", [(0.0, 1e9), (1e9, 0.0), (math.nan, 1e9), (1e9, math.inf), (-1.0, 1.0)])
def test_figures_that_cannot_be_are_passed_over(pair) -> None:
    assert of([run(bytes=pair, rate=pair, rest=pair)]).runs == 0


@settings(deadline=None)
@given(beliefs, logs)
def test_steady_runs_are_believed_in_the_end(belief, truth: float) -> None:
    assert math.log(learn(belief, [truth] * 300).factor) == pytest.approx(truth, abs=0.01)


@settings(deadline=None)
@given(beliefs, logs)
def test_one_run_moves_it_part_of_the_way(belief, truth: float) -> None:
    moved = math.log(learn(belief, [truth]).factor)
    assert abs(moved) <= abs(truth) + 1e-9
    assert moved * truth >= 0


def test_one_run_moves_memory_half_of_the_way_at_most() -> None:
    for kind, belief in MEMORY.items():
        assert math.log(learn(belief, [0.02]).factor) == pytest.approx(0.01), kind
        assert math.log(learn(belief, [5.0]).factor) <= 1.35 * belief.bias


@settings(deadline=None)
@given(st.lists(st.floats(-0.1, 0.1), min_size=10, max_size=30), st.sampled_from([-3.0, 3.0]))
def test_a_run_far_off_moves_little(ratios: list[float], odd: float) -> None:
    belief = MEMORY["cpu"]
    moved = math.log(learn(belief, [*ratios, odd]).factor / learn(belief, ratios).factor)
    assert abs(moved) < 0.03


@settings(deadline=None)
@given(beliefs, st.lists(logs, max_size=12), st.lists(logs, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_runs_does_not_matter(belief, ratios, least, chance) -> None:
    shuffled = chance.sample(ratios, len(ratios))
    assert learn(belief, shuffled, least).factor == pytest.approx(learn(belief, ratios, least).factor)


@settings(deadline=None)
@given(beliefs, st.lists(logs, max_size=12), logs)
def test_a_run_that_needed_more_never_lowers(belief, ratios: list[float], bound: float) -> None:
    before, after = learn(belief, ratios), learn(belief, ratios, [bound])
    assert after.factor >= before.factor - 1e-9
    if math.log(before.factor) > bound + 1e-9:
        assert after.factor == pytest.approx(before.factor)
        assert after.runs == before.runs


def test_needing_more_than_there_was_raises_the_estimate() -> None:
    known = of([run(bytes=(1e9, 1.5e9), exceeded=True, rate=None, rest=None)])
    assert known.held(BYTES).expected > 1.1e9
    assert "memory x 1." in known.said()


@settings(deadline=None)
@given(st.lists(logs, min_size=1, max_size=12), st.sampled_from(["cpu", "cuda", "mps"]))
def test_ranges_are_in_order_and_have_a_floor(ratios: list[float], kind: str) -> None:
    known = of([run(math.exp(one), math.exp(-one), math.exp(one / 2)) for one in ratios], kind)
    held, time = known.held(BYTES), known.timed(TIME, TOKENS)
    for estimate in (held, time.seconds, time.tokens_per_second):
        assert 0 < estimate.low < estimate.expected < estimate.high < math.inf
        assert estimate.source == "calibrated"
    assert held.formula == BYTES.expected
    assert time.seconds.formula == 120
    assert held.high / held.expected >= math.exp(TWO_SIDED * calibration.FLOOR)


def test_the_range_of_memory_narrows_with_agreeing_runs() -> None:
    widths = []
    for count in (1, 3, 10, 100, 10_000):
        held = of([run(1.05)] * count, "cuda").held(BYTES)
        widths.append(held.high / held.expected)
    assert widths == sorted(widths, reverse=True)
    assert widths[0] < 1.1
    assert widths[-1] == pytest.approx(math.exp(TWO_SIDED * calibration.FLOOR), rel=0.01)


def test_scattered_runs_widen_it() -> None:
    held = of([run(1.5), run(0.7)] * 5).held(BYTES)
    assert held.high / held.expected > BYTES.high / BYTES.expected


def test_seconds_are_training_and_the_rest_apart() -> None:
    """100 s of training take twice as long, 20 s beside it half."""
    time = of([run(pace=2.0, beside=0.5)] * 500).timed(TIME, TOKENS)
    assert time.seconds.expected == pytest.approx(210, rel=0.01)
    assert time.tokens_per_second.expected == pytest.approx(500, rel=0.01)
    only_pace = of([run(pace=2.0, rest=None)] * 500).timed(TIME, TOKENS)
    assert only_pace.seconds.expected == pytest.approx(220, rel=0.01)


def test_without_speed_the_speed_stays_the_formulas() -> None:
    time = of([run(beside=3.0, rate=None)] * 500).timed(TIME, TOKENS)
    assert time.tokens_per_second == TIME.tokens_per_second
    assert time.seconds.expected == pytest.approx(160, rel=0.01)


def test_tokens_that_are_not_known_widen_the_seconds() -> None:
    known = of([run()] * 50)
    vague = Estimate(low=2e4, expected=1e5, high=3e5, unit="tokens")
    sure, unsure = known.timed(TIME, TOKENS).seconds, known.timed(TIME, vague).seconds
    assert unsure.low < sure.low
    assert unsure.high > 2 * sure.high


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.03, 0.1, 0.25]), st.sampled_from([2, 5, 20]))
def test_the_range_holds_the_next_run(seed: int, scatter: float, count: int) -> None:
    """Devices with a bias of their own and runs that scatter: at least nine in ten of the next runs fall inside."""
    chance, inside, trials = random.Random(seed), 0, 200
    for _ in range(trials):
        bias = chance.gauss(0, 0.5)
        ratios = [bias + chance.gauss(0, scatter) for _ in range(count + 1)]
        known = learn(PACE, ratios[:count])
        inside += abs(ratios[-1] - math.log(known.factor)) <= TWO_SIDED * known.spread()
    assert inside / trials >= 0.9


def test_a_past_travels_as_plain_data() -> None:
    assert build(Past, plain(run())) == run()


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10**12), min_size=1), st.integers(0, 10**12), logs)
def test_parts_still_add_up(parts: dict[str, int], beside: int, factor: float) -> None:
    whole = {**parts, "overhead": beside}
    total = (sum(whole.values()) + 1) * math.exp(factor)
    found = calibration.parted(whole, total)
    assert found.keys() == whole.keys()
    assert min(found.values()) >= 0
    assert sum(found.values()) == pytest.approx(total, rel=1e-6, abs=len(whole))


def test_more_than_was_foretold_is_overhead() -> None:
    assert calibration.parted({"weights": 100, "overhead": 20}, 150.0) == {"weights": 100, "overhead": 50}
    assert calibration.parted({"weights": 100, "overhead": 20}, 80.0) == {"weights": 80, "overhead": 0}
