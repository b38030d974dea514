"""How soon there is a plan: the search for an 8B model on a 24 GB card, and a cold `tunesmith plan` of the same job.

The search is timed in this process, which must not load torch; the limit is 100 ms. It is timed where the job fits and
where it does not, for then every way out is tried as well. The whole plan is of a fresh process, beside a bare
interpreter; the limit is one second.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
from startup import data_file

from tunesmith.executors.kernel import catalogue
from tunesmith.executors.kernel.sizing import cards, resolve
from tunesmith.orchestrator.nouns import (
    AdapterSpec,
    DataReport,
    DataSource,
    Estimate,
    JobSpec,
    ModelRef,
    TokenStats,
)

TIMES = 20
PAIRS = 9
MODEL, CARD = "meta-llama/Llama-3.1-8B", "RTX 4090"


def report() -> DataReport:
    """What is known of GSM8K's training file."""
    total = Estimate(low=1.1e6, expected=1.4e6, high=1.8e6, unit="tokens")
    tokens = TokenStats(p50=177, p95=316, max=568, total=total, supervised_share=0.6)
    return DataReport(
        rows=7473, used_rows=7473, eval_rows=374, format="prompt-completion", mapping=None, fingerprint=None,
        tokens=tokens,
    )  # fmt: skip


def search(kind: str) -> Callable[[], bool]:
    """One whole resolution, from a spec to a fitted one; whether it fits."""
    facts, card = catalogue.find(MODEL), cards.named(CARD)
    if facts is None or card is None:
        raise SystemExit(f"{MODEL} or {CARD} is not known.")
    adapter = AdapterSpec(kind=kind)  # type: ignore[arg-type]
    spec = JobSpec(model=ModelRef(id=MODEL), data=(DataSource(source="rows.jsonl"),), adapter=adapter)
    return lambda: resolve(spec, facts, report(), card.device("elsewhere"))[1].fits


def milliseconds(work: Callable[[], bool], *, fits: bool) -> list[float]:
    """How long each of TIMES calls takes, after one that does not count."""
    if work() is not fits:
        raise SystemExit(f"The job was to {'fit' if fits else 'be too large'}.")
    taken = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - begun))
    return taken


def main() -> None:
    """Measure and print."""
    found = {"fits": milliseconds(search("auto"), fits=True), "too_large": milliseconds(search("none"), fits=False)}
    heavy = {"torch", "transformers", "numpy"} & {*sys.modules}
    if heavy:
        raise SystemExit(f"The search loaded {', '.join(sorted(heavy))}.")
    command = str(Path(sys.executable).with_name("tunesmith"))
    with tempfile.TemporaryDirectory() as folder:
        data = data_file(Path(folder))
        env = {**os.environ, "TUNESMITH_HOME": str(Path(folder) / "home"), "HF_HUB_OFFLINE": "1"}
        plan = [command, "plan", f"QLoRA Llama-3.1-8B on {data} in 12 GB", "--json"]
        taken = measure.interleave(
            {
                "python": lambda: measure.run([sys.executable, "-c", "pass"], env=env),
                "plan": lambda: measure.run(plan, env=env),
            },
            PAIRS,
        )
    for name, each in found.items():
        print(f"search, {name:9} median {statistics.median(each):.1f} ms, worst {max(each):.1f} ms of {TIMES}")
    print(
        f"plan             median {statistics.median(taken['plan']):.3f} s, worst {max(taken['plan']):.3f} s of {PAIRS}"
    )
    measure.close(
        "planning",
        {
            "search_ms": round(statistics.median(found["fits"]), 1),
            "search_worst_ms": round(max(found["fits"]), 1),
            "search_too_large_ms": round(statistics.median(found["too_large"]), 1),
            "search_limit_ms": 100,
            "search_ratio_vs_limit": round(statistics.median(found["fits"]) / 100, 3),
            "torch_imported": "torch" in sys.modules,
            "plan_seconds": round(statistics.median(taken["plan"]), 3),
            "plan_worst_seconds": round(max(taken["plan"]), 3),
            "plan_limit_seconds": 1.0,
            "plan_ratio_vs_python": round(measure.ratio(taken["plan"], taken["python"]), 1),
            "data": data.name,
        },
    )


if __name__ == "__main__":
    main()
