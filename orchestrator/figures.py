"""Numbers as people read them: bytes, durations, counts, money, and ranges with their source. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tunesmith.orchestrator.events import number

UNKNOWN = "unknown"


def amount(value: Any) -> str:
    """A metric or a setting, to four significant figures: 1.234, 0.0002, 2e-05, NaN, 12,000."""
    figure = number(value)
    if figure is None:
        return UNKNOWN if value is None else str(value)
    if not math.isfinite(figure):
        return "NaN" if math.isnan(figure) else ("infinity" if figure > 0 else "-infinity")
    if figure == int(figure) and abs(figure) < 1e15:
        return f"{int(figure):,}"
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.4g}"


def count(value: Any) -> str:
    """How many, in thousands, millions or billions from ten thousand on: 7,473, 134.5 M, 7.6 B."""
    figure = number(value)
    if figure is None or not math.isfinite(figure):
        return UNKNOWN
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(figure) >= size:
            return f"{figure / size:.1f} {letter}"
    return f"{figure:,.0f}"


def size(value: Any) -> str:
    """Bytes in binary units: 512 B, 3.4 MiB, 23.6 GiB."""
    figure = number(value)
    if figure is None or not math.isfinite(figure):
        return UNKNOWN
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(figure) >= 1024**power:
            return f"{figure / 1024**power:.1f} {name}"
    return f"{figure:.0f} B"


def duration(value: Any) -> str:
    """Seconds in the two largest units that matter: 12 s, 2 min 5 s, 3 h 20 min, 2 d 4 h."""
    figure = number(value)
    if figure is None or not math.isfinite(figure):
        return UNKNOWN
    if figure < 1:
        return "less than 1 s"
    seconds = round(figure)
    for large, small, names in ((86400, 3600, ("d", "h")), (3600, 60, ("h", "min")), (60, 1, ("min", "s"))):
        if seconds >= large:
            units = round(seconds / small)
            whole, rest = divmod(units, large // small)
            return f"{whole} {names[0]}" + (f" {rest} {names[1]}" if rest else "")
    return f"{seconds} s"


def money(value: Any) -> str:
    """Dollars: $0, $0.40, $12.35."""
    figure = number(value)
    if figure is None or not math.isfinite(figure):
        return UNKNOWN
    return "$0" if figure == 0 else (f"${figure:,.2f}" if figure >= 0.01 else f"${figure:.4f}")


_UNITS = {"bytes": size, "seconds": duration, "usd": money, "tokens": count}


def quantity(value: Any, unit: str) -> str:
    """A figure with the unit of an Estimate."""
    if unit in _UNITS:
        return _UNITS[unit](value)
    figure = number(value)
    return f"{amount(round(figure)) if figure is not None and abs(figure) >= 10 else amount(value)} {unit}".strip()


def estimate(doc: Mapping[str, Any] | None) -> str:
    """An Estimate: "153 tokens/s (51 to 382, formula)"; what the figures share is said once."""
    if not doc:
        return UNKNOWN
    unit = str(doc.get("unit", ""))
    low, middle, high = (quantity(doc.get(key), unit) for key in ("low", "expected", "high"))
    source = str(doc.get("source", "formula"))
    if low == middle == high:
        return f"{middle} ({source})"
    ends = [said.partition(" ")[2] for said in (low, middle, high)]
    if ends[0] == ends[2] and unit != "seconds":
        low = low.partition(" ")[0]
        if ends[1] == ends[2]:
            high = high.partition(" ")[0]
    return f"{middle} ({low} to {high}, {source})"


def share(part: Any, whole: Any) -> str:
    """A percentage: 3.6 %, or "" where there is none."""
    above, below = number(part), number(whole)
    if above is None or not below:
        return ""
    percent = 100 * above / below
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.2g} %"
