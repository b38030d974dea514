"""A kernel of the standard library that keeps the kernel's side of the contract and trains nothing.

Run as `python small_kernel.py FOLDER`. What it does is told by the name of the attempt's spec: "ok", "wait 500"... Each
behaviour is a function below. Every start leaves a line in FOLDER/starts, and an event that says so.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(sys.argv[1])
ATTEMPT = json.loads((FOLDER / "attempt.json").read_text())
EVENTS = os.open(FOLDER / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
lines = 0
told = False


def emit(kind, values, step=None):
    global lines
    lines += 1
    event = {
        "attempt": ATTEMPT["number"],
        "line": lines,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
        "kind": kind,
        "step": step,
        "values": values,
    }
    os.write(EVENTS, json.dumps(event).encode() + b"\n")


def state(name, error=None):
    emit("state", {"state": name, "error": error})


def on_term(*_):
    global told
    told = True


def spec_hash():
    return ATTEMPT["key"].rpartition(":")[2] + "0" * 48


def manifest(folder):
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            name = str(path.relative_to(folder))
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    document = {"files": files, "step": 3, "attempt": ATTEMPT["number"], "spec_hash": spec_hash()}
    (folder / "manifest.json").write_text(json.dumps(document))


def results():
    adapter = FOLDER / "output" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(os.urandom(4096))
    (adapter / "adapter_config.json").write_text("{}")
    manifest(adapter)
    (FOLDER / "output" / "eval.json").write_text('{"eval/loss": 1.0}')
    manifest(FOLDER / "output")


def sleeper(detached):
    """A process that outlives us if it can: it ignores TERM and, detached, has a session and a parent of its own."""
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if sys.argv[2] == 'detached':\n"
        "    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n"
        "with open(sys.argv[1], 'a') as file: file.write(f'{os.getpid()}\\n')\n"
        "time.sleep(600)\n"
    )
    family = FOLDER / "family"
    before = len(family.read_text().split()) if family.exists() else 0
    arguments = [sys.executable, "-c", program, str(family), "detached" if detached else ""]
    process = subprocess.Popen(arguments)
    if detached:
        process.wait()
    while not family.exists() or len(family.read_text().split()) <= before:
        time.sleep(0.005)


# --- behaviours ------------------------------------------------------------------------------------------------------


def ok(steps=3):
    for step in range(1, int(steps) + 1):
        emit("metric", {"train/loss": 1.0 / step}, step)
    state("finishing")
    results()
    state("succeeded")
    return 0


def wait(seconds=60):
    """Until told to end; a checkpoint when asked for one."""
    seen, until = 0, time.monotonic() + float(seconds)
    while time.monotonic() < until:
        try:
            control = json.loads((FOLDER / "control").read_text())
        except FileNotFoundError:
            control = {"signal": "", "serial": 0}
        if told or control["signal"] == "stop":
            state("stopped")
            return 75
        if control["serial"] > seen:
            seen = control["serial"]
            emit("checkpoint", {"path": f"checkpoints/step-{seen:08d}", "bytes": 0, "sha256": ""})
        time.sleep(0.005)
    return 1


def nap(seconds=0.2):
    """Works for a moment and leaves a detached process behind."""
    sleeper(True)
    time.sleep(float(seconds))
    return ok()


def fail():
    state("failed", {"type": "InputError", "code": "data.row", "message": "Row 3 is broken.", "exit_code": 2})
    return 2


def deaf():
    """Heeds no TERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    state("running")
    time.sleep(600)
    return 0


def tree():
    """A family in several sessions; then heeds nothing."""
    sleeper(False)
    sleeper(True)
    return deaf()


def die(number=signal.SIGKILL):
    os.kill(os.getpid(), int(number))
    time.sleep(60)
    return 0


def torn():
    """Lines that are no events of ours among some that are, and a last one cut short."""
    emit("metric", {"train/loss": 1.0}, 1)
    junk = [b"{not json}", b"\x00" * 40, b"[]", b'{"attempt": 99, "line": 1, "time": "", "kind": "log", "values": {}}']
    for line in (*junk, b'{"long": "' + b"x" * 300_000 + b'"}', b"y" * 6_000_000):
        os.write(EVENTS, line + b"\n")
    emit("metric", {"train/loss": 0.5}, 2)
    state("succeeded")
    os.write(EVENTS, b'{"attempt": 1, "line"')
    return 0


def flood(mebibytes=200, pause=0.0):
    """Writes that much log, from a first line to a last one."""
    block = b"".join(b"%07d " % number + b"x" * 119 + b"\n" for number in range(8192))
    os.write(1, b"the first line\n")
    for _ in range(int(mebibytes)):
        os.write(1, block)
        time.sleep(float(pause))
    os.write(1, b"the last line\n")
    return 0


def speak():
    """Tells what it was given."""
    emit("log", {"level": "info", "message": json.dumps({"environment": dict(os.environ), "cwd": os.getcwd()})})
    print("to stdout")
    print("to stderr", file=sys.stderr)
    return 0


def exit_with(code):
    return int(code)


def main():
    with open(FOLDER / "starts", "a") as file:
        file.write(f"{os.getpid()}\n")
    signal.signal(signal.SIGTERM, on_term)
    emit("log", {"level": "info", "message": f"start {os.getpid()}"})
    state("starting")
    state("running")
    name, *arguments = (ATTEMPT["spec"]["name"] or "ok").split()
    return globals()[name](*arguments)


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the interpreter gives handlers back on its way out, not this
    sys.exit(code)
