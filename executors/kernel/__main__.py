"""`python -P -m tunesmith.executors.kernel ATTEMPT_DIR`: run one attempt, end with its exit code.

Its own further ranks are started with `--rank R --world N --parent PID` added (crew.py).
"""

import argparse
import logging
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
# On import it asks for the package `kernels`, which runs code from a hub and is not wanted here.
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)


def main() -> int:
    """Parse the command line and run, as rank 0 or as one of its others."""
    parser = argparse.ArgumentParser(prog="python -P -m tunesmith.executors.kernel", allow_abbrev=False)
    parser.add_argument("folder", metavar="ATTEMPT_DIR", type=Path)
    for name in ("--rank", "--world", "--parent"):
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        from tunesmith.executors.kernel import crew

        crew.bound(given.parent)
    from tunesmith.executors.kernel import run

    code = run.follow(given.folder, crew.Seat(given.rank, given.world)) if given.rank else run.run(given.folder)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # NCCL may wait for a rank that is gone, at the latest when the interpreter takes it down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
