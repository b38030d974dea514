"""How fast a run goes."""

from __future__ import annotations


class Pace:
    """How fast it goes: a moving average in which old steps fade, the slow first one soonest."""

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.tokens_per_second = 0.0
        self.eval_seconds = 0.0
        self._steps = 0

    def add(self, seconds: float, tokens: int) -> None:
        """Take one step in."""
        self._steps += 1
        fresh = max(0.1, 1 / self._steps) if self._steps != 2 else 1.0
        speed = tokens / seconds
        self.step_seconds += fresh * (seconds - self.step_seconds)
        self.tokens_per_second += fresh * (speed - self.tokens_per_second)
