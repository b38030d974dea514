"""`python -P -m tunesmith.executors.kernel ATTEMPT_DIR`: run one attempt, end with its exit code."""

import os
import sys
from pathlib import Path

# Before any library reads them: nothing is reported to anyone, nothing draws on the log.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# GNU OpenMP lets idle threads spin for milliseconds after each operation. On a machine that does anything else, they
# spin against the thread that has work: 3 to 5 times slower, measured with SmolLM2-135M on two busy cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# torch and oneDNN keep what they compile for every shape, and packed batches seldom repeat one: 14 MB more each step of
# SmolLM2-135M, for up to 1,024 shapes. Small caches serve one step and cost no speed (measured: none).
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def main() -> int:
    """Parse the one argument and run."""
    if len(sys.argv) != 2:
        print("usage: python -P -m tunesmith.executors.kernel ATTEMPT_DIR", file=sys.stderr)
        return 2
    from tunesmith.executors.kernel.run import run

    return run(Path(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
