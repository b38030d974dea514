"""Starts real driver processes quickly: imports once, then forks one for each line on stdin and prints its pid.

A line is "drive" or "crash STEP" (that planning step kills its process). Arguments: store file, home, idle seconds.
"""

import os
import signal
import sys
from pathlib import Path

import jobstore

from tunesmith.graph import driver, planning
from tunesmith.graph.machine import Tools, advance
from tunesmith.orchestrator.nouns import Request


def warm(home, data):
    """One job through every step, so that no import is left to the forks."""
    store = jobstore.JobStore()
    spec = {"model": {"id": "smollm2-135m"}, "data": [{"source": data}]}
    store.create("j-zzzzzz", Request(spec=spec, cwd=str(home)), yes=True)
    tools = Tools(store.lease("j-zzzzzz"), home / "cache", lambda node: None)
    assert advance("j-zzzzzz", tools, home / "warm.db") == "await"
    store.db.close()


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def main(path, home, idle, data):
    home = Path(home)
    warm(home, data)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            word, *rest = line.split()
            if word == "crash":
                setattr(planning, rest[0], kill)
            try:
                driver.run(jobstore.Leases(jobstore.JobStore(path)), home, idle_seconds=float(idle))
                os._exit(0)
            finally:
                os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
