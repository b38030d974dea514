"""What earlier runs say about the formulas: corrections, and ranges as wide as the formulas were wrong.

Everything is a ratio of measured to foretold, in logarithms. Where the ratios lie is Huber's estimate with a normal
prior at "the formula is right": one run moves it part of the way, many agreeing runs all the way, and a run far off
pulls no harder than one a little off (Huber 1964, "Robust Estimation of a Location Parameter"). A run that was killed
for want of memory says only that it needed more than there was, and pulls upwards alone. How far ratios scatter is
their mean square, the starting guess counting as some runs. Pure arithmetic: no torch, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tunesmith.orchestrator.nouns import Estimate, Past, TimeEstimate

TWO_SIDED = 1.96  # standard deviations to each side that hold 95 %
HUBER = 1.345  # residuals above this many deviations pull with a constant force
GUESSED_RUNS = 3  # how many runs the starting guess of the scatter is worth
FLOOR = 0.007  # no range is narrower: the same run twice differs by as much
HALVINGS = 24  # of an interval of a few units: to a ten-millionth
FURTHEST = math.log(20)  # a ratio beyond this is a mistake of measuring


@dataclass(frozen=True, slots=True)
class Belief:
    """Before any run, in logarithms: how far off the formula may be, and how far runs of one kind lie apart."""

    bias: float
    scatter: float


MEMORY = {"cuda": Belief(0.03, 0.03), "cpu": Belief(0.15, 0.15), "mps": Belief(0.15, 0.15)}  # CPU: resident memory
PACE = Belief(0.5, 0.3)  # seconds for a token while training
REST = Belief(0.7, 0.4)  # seconds beside training: imports, loading, evaluation, saving


@dataclass(frozen=True, slots=True)
class Correction:
    """Measured is about `factor` times foretold, by `runs` runs; `squares` is the sum of their squared residuals."""

    belief: Belief
    factor: float = 1.0
    runs: int = 0
    squares: float = 0.0

    def spread(self, guess: float | None = None) -> float:
        """The standard deviation, in logarithms, of the next run's ratio. `guess` is the scatter before any run."""
        start = self.belief.scatter if guess is None else min(guess, self.belief.scatter)
        variance = (GUESSED_RUNS * start**2 + self.squares) / (GUESSED_RUNS + self.runs)
        return max(FLOOR, math.sqrt(variance * (1 + 1 / (1 + self.runs))))

    def apply(self, estimate: Estimate, *, inverse: bool = False) -> Estimate:
        """The estimate corrected, its range as wide as the runs scatter; as it was where no run counts.

        `inverse` is for what falls where the factor rises: speeds, by a factor on seconds.
        """
        if not self.runs or estimate.expected <= 0:
            return estimate
        factor = 1 / self.factor if inverse else self.factor
        guess = math.log(max(1.0, estimate.high / estimate.expected)) / TWO_SIDED
        width = math.exp(TWO_SIDED * self.spread(guess))
        expected = estimate.expected * factor
        return replace(
            estimate,
            low=expected / width,
            expected=expected,
            high=expected * width,
            source="calibrated",
            formula=estimate.expected,
        )


@dataclass(frozen=True, slots=True)
class Corrections:
    """What earlier runs of a kind say of memory, of seconds for a token, and of seconds beside training."""

    memory: Correction
    pace: Correction
    rest: Correction

    @property
    def runs(self) -> int:
        """The most runs that one of the corrections rests on; 0 means that the formulas stand as they are."""
        return max(self.memory.runs, self.pace.runs, self.rest.runs)

    def said(self) -> str:
        """What they change, for people."""
        named = (("memory", self.memory), ("time for a token", self.pace), ("time beside training", self.rest))
        changes = [f"{name} x {item.factor:.2f}" for name, item in named if item.runs]
        count = f"{self.runs} earlier run{'s' * (self.runs > 1)} of this kind on this device"
        return f"Estimates are corrected by {count}: {', '.join(changes)}."

    def held(self, estimate: Estimate) -> Estimate:
        """Bytes, corrected."""
        return self.memory.apply(estimate)

    def timed(self, time: TimeEstimate, tokens: Estimate) -> TimeEstimate:
        """Seconds and speed, corrected. `tokens` are those that the formula's speed is meant for, over the whole job.

        Training and what is beside it are corrected apart, and their ranges joined as those of independent errors.
        """
        if not self.pace.runs and not self.rest.runs:
            return time
        speed, seconds = time.tokens_per_second, time.seconds
        share = min(seconds.expected, tokens.expected / max(speed.expected, 1e-9))
        training = share * self.pace.factor
        rest = (seconds.expected - share) * self.rest.factor
        pace, beside = (TWO_SIDED * item.spread() for item in (self.pace, self.rest))
        known = max(tokens.expected, 1.0)
        most, least = max(1.0, tokens.high / known), min(1.0, tokens.low / known)
        total = training + rest
        return TimeEstimate(
            seconds=replace(
                seconds,
                low=total - math.hypot(training * (1 - least * math.exp(-pace)), rest * (1 - math.exp(-beside))),
                expected=total,
                high=total + math.hypot(training * (most * math.exp(pace) - 1), rest * (math.exp(beside) - 1)),
                source="calibrated",
                formula=seconds.expected,
            ),
            tokens_per_second=self.pace.apply(speed, inverse=True),
        )


def corrections(past: Sequence[Past], *, method: str, family: str, kind: str) -> Corrections:
    """What the runs among `past` with this method and model family say; `kind` is the device's (cpu, cuda, mps).

    That they ran on this device, with these versions of everything, is for whoever collects them to see to.
    """
    alike = [run for run in past if run.method == method and run.family == family]
    held = [(ratio, run.exceeded) for run in alike if (ratio := _ratio(run.bytes)) is not None]
    rates = [-ratio for run in alike if (ratio := _ratio(run.rate)) is not None]
    rests = [ratio for run in alike if (ratio := _ratio(run.rest)) is not None]
    return Corrections(
        memory=learn(
            MEMORY[kind], [ratio for ratio, more in held if not more], [ratio for ratio, more in held if more]
        ),
        pace=learn(PACE, rates),
        rest=learn(REST, rests),
    )


def parted(parts: Mapping[str, int], total: float) -> dict[str, int]:
    """Parts that add up to the corrected `total`: what is beside the counted bytes (overhead) takes the difference.

    Where that is not enough to take it from, all other parts shrink alike.
    """
    counted = sum(size for name, size in parts.items() if name != "overhead")
    if total >= counted:
        return {**parts, "overhead": round(total) - counted}
    return {name: 0 if name == "overhead" else round(size * total / counted) for name, size in parts.items()}


def learn(belief: Belief, ratios: Sequence[float], least: Sequence[float] = ()) -> Correction:
    """The correction by logarithms of measured over foretold; `least` are those of which only a lower bound is known.

    A bound below what the other runs say anyway counts as no run.
    """
    if not ratios and not least:
        return Correction(belief)
    at = _location(belief, ratios, least)
    bound = [value for value in least if value > at]
    residuals = [min(abs(value - at), 3 * belief.scatter) for value in (*ratios, *bound)]
    return Correction(belief, math.exp(at), len(residuals), math.fsum(value**2 for value in residuals))


def _location(belief: Belief, ratios: Sequence[float], least: Sequence[float]) -> float:
    """Where the derivative of the penalties is nought: it rises all the way, so halving an interval finds it."""

    def slope(at: float) -> float:
        pulls = [max(-HUBER, min(HUBER, (at - value) / belief.scatter)) for value in ratios]
        pulls += [max(-HUBER, min(0.0, (at - value) / belief.scatter)) for value in least]
        return at / belief.bias**2 + math.fsum(pulls) / belief.scatter

    low, high = min((0.0, *ratios)), max((0.0, *ratios, *least))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


def _ratio(pair: Sequence[float] | None) -> float | None:
    """The logarithm of measured over foretold; None where either is not a positive number."""
    if pair is None or not all(math.isfinite(value) and value > 0 for value in pair):
        return None
    foretold, measured = pair
    return max(-FURTHEST, min(FURTHEST, math.log(measured / foretold)))
