"""A newcomer's first minutes: an empty clone, an empty HOME, no model hub; `make demo`, then `make test`.

Model hubs are made unreachable by an endpoint that refuses connections. Prints the seconds each takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure


def main() -> int:
    """Clone, run both commands, and say how long they took."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        clone, home = Path(folder) / "clone", Path(folder) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "-q", str(measure.ROOT), str(clone)], check=True)
        shared = measure.ROOT.parent / "shared"
        if shared.is_dir():
            (Path(folder) / "shared").symlink_to(shared)
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TUNESMITH_", "VIRTUAL_ENV"))
        }
        env = {**kept, "HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"}
        for target in ("demo", "test"):
            begun = time.time()
            done = subprocess.run(["make", target], cwd=clone, env=env, check=False)
            figures[f"{target}_seconds"] = round(time.time() - begun, 1)
            if done.returncode != 0:
                print(f"make {target} exited {done.returncode}")
                return 1
    measure.close("fresh_clone", figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
