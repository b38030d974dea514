"""Runs attempts in forks of one warm process, each to its end or to its death at a point named beforehand.

Reads lines `FOLDER WHEN` and answers each with the exit status of the fork. WHEN is one of

    never     to the end
    event N   SIGKILL as it writes its N-th event
    write N   SIGKILL as it makes a file or folder durable for the N-th time: inside saves
    after S   death by a timer after S seconds, wherever it is
"""

import os
import signal
import sys
from pathlib import Path

import torch

from tunesmith.executors.kernel import run as runs
from tunesmith.executors.kernel.reporter import Reporter


def after(count, action):
    """A function to be called each time: it kills this process when it is called for the `count`-th time."""
    left = [count]

    def hook(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return action(*args, **kwargs)

    return hook


def arm(when, value):
    """Prepare this process's death."""
    if when == "event":
        emit = Reporter.emit
        Reporter.emit = after(int(value), emit)
    elif when == "write":
        hook = after(int(value), lambda call, *args: call(*args))
        fsync, rename = os.fsync, Path.rename
        os.fsync = lambda fd: hook(fsync, fd)
        Path.rename = lambda self, target: hook(rename, self, target)
    elif when == "after":
        signal.setitimer(signal.ITIMER_REAL, float(value))


def fork(folder, when, value="0"):
    """Run an attempt in a fork; the status that waitpid gives."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            arm(when, value)
            code = runs.run(Path(folder))
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, *when = line.split()
        if when[0] == "here":  # in this very process, so that no import is left to the forks
            status = runs.run(Path(folder))
        else:
            status = fork(folder, *when)
        print("status", status, flush=True)


if __name__ == "__main__":
    main()
