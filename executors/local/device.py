"""What this machine can run on: its GPUs, then its CPU. No torch, nothing that starts a GPU context.

Memory is read from the system (cgroup limits respected). Peaks and bandwidths are not measured: those of known GPUs are
their data sheets' (dense bf16, or fp16 where there is no bf16), those of other GPUs and of CPUs are estimated from
units, clock and instruction set. Without GPUs it takes under 20 ms.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.executors.kernel.stack import processor, stack
from tunesmith.orchestrator.nouns import Device

SMI_SECONDS = 5.0

# Dense bf16 FLOP/s and bytes/s of cards that are not among the usual ones (sizing/cards.py), from the makers' data
# sheets; the first pattern found in the name counts.
_GPUS: tuple[tuple[str, float, float], ...] = (
    (r"\bB200\b", 2250e12, 8000e9),
    (r"\bGH200\b", 989e12, 4000e9),
    (r"\bH100 NVL\b", 835e12, 3900e9),
    (r"\bH100 PCIe\b", 756e12, 2000e9),
    (r"\bL40\b", 181e12, 864e9),
    (r"\bA10\b", 125e12, 600e9),
)
_UNKNOWN_GPU = (30e12, 300e9)  # a small card of the last years, where nothing else is known

# Single-precision operations a core finishes in one cycle: two fused multiply-adds on the widest registers it has.
_LANES = (("avx512f", 64), ("avx2", 32), ("asimd", 16), ("avx", 16))
_SCALAR = 8
_USUAL_HERTZ = 2.5e9
_CORE_BANDWIDTH = 10e9  # bytes/s that one core draws from memory; a socket stops at _SOCKET_BANDWIDTH
_SOCKET_BANDWIDTH = 200e9


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as its driver describes it. Peaks are 0 where the driver does not say enough to estimate them."""

    name: str
    memory_bytes: int
    uuid: str
    peak_flops: float = 0.0
    bandwidth: float = 0.0
    why_not: str | None = None


def devices() -> list[Device]:
    """What may be run on, the best first. A device that cannot be used as things stand says so in `why_not`."""
    build = torch_build()
    missing = None if build else "torch is not installed: pip install 'tunesmith[train]'"
    found = group(visible(gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")))
    no_cuda = missing or (None if build == "cuda" else "The torch installed here is built without CUDA.")
    listed = [_cuda(gpu, count, gpu.why_not or no_cuda) for gpu, count in found]
    if sys.platform == "darwin" and platform.machine() == "arm64":
        listed.append(_mps(missing))
    return [*listed, _cpu(missing)]


# --- the CPU -------------------------------------------------------------------------------------------------------


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes that this process may use at most: the machine's memory, or less where a cgroup (v1 or v2) says so."""
    import psutil

    return min([psutil.virtual_memory().total, *_cgroup_limits(root)])


def cores(root: Path = Path("/")) -> float:
    """How many cores this process may use: whole cores it may be scheduled on, or less where a cgroup quota says so.

    Hyper-threads share one core's arithmetic and are not counted.
    """
    import psutil

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    whole = psutil.cpu_count(logical=False) or threads
    per_core = max(1.0, (psutil.cpu_count() or whole) / whole)
    return min([threads / per_core, *_cgroup_quotas(root)])


def cpu_peak(count: float, info: str, hertz: float) -> float:
    """An estimate of the fp32 FLOP/s of `count` cores: cores x clock x two fused multiply-adds on the widest registers.

    `info` is the text of /proc/cpuinfo. A dense product reaches 50 to 80 % of it.
    """
    flags = set(re.findall(r"[a-z0-9_]+", info.lower()))
    return count * hertz * next((lanes for flag, lanes in _LANES if flag in flags), _SCALAR)


def _cpu(why_not: str | None) -> Device:
    count = cores()
    return Device(
        backend="local",
        hardware="cpu",
        kind="cpu",
        memory_bytes=memory_limit(),
        peak_flops=cpu_peak(count, _cpu_flags(), _hertz()),
        bandwidth=min(count * _CORE_BANDWIDTH, _SOCKET_BANDWIDTH),
        why_not=why_not,
        stack=stack("cpu", processor()),
    )


def _cpu_flags() -> str:
    """The instruction sets of the first core, as /proc/cpuinfo names them."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.lower().startswith(("flags", "features")):
                return line
    return "asimd" if platform.machine() in ("arm64", "aarch64") else ""


def _hertz() -> float:
    """The highest clock that the system tells of, else the present one, else a usual one."""
    with contextlib.suppress(OSError, ValueError):
        return float(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()) * 1e3
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if match := re.match(r"cpu MHz\s*:\s*([0-9.]+)", line):
                return float(match[1]) * 1e6
    return _USUAL_HERTZ


def _cgroups(root: Path) -> dict[str, list[Path]]:
    """The cgroup folders of this process by controller ("" for v2), each with its ancestors up to the mount.

    In a container the path told is often that of the host, and what is mounted is the container's own: folders that are
    not there are passed over, and the mount itself always counts.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return {}
    mount = root / "sys/fs/cgroup"
    found: dict[str, list[Path]] = {}
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            base = mount / controller if controller else mount
            here = base / path.strip("/")
            found[controller] = [place for place in (here, *here.parents) if place == base or base in place.parents]
    return found


def _read(place: Path, name: str) -> str:
    try:
        return (place / name).read_text()
    except OSError:
        return ""


def _cgroup_limits(root: Path) -> Iterable[int]:
    groups = _cgroups(root)
    texts = [_read(place, "memory.max") for place in groups.get("", [])]
    texts += [_read(place, "memory.limit_in_bytes") for place in groups.get("memory", [])]
    return [int(text) for text in texts if text.strip().isdigit() and int(text) > 0]


def _cgroup_quotas(root: Path) -> Iterable[float]:
    groups = _cgroups(root)
    pairs = [_read(place, "cpu.max").split() for place in groups.get("", [])]
    pairs += [
        [_read(place, "cpu.cfs_quota_us").strip(), _read(place, "cpu.cfs_period_us").strip()]
        for place in groups.get("cpu", [])
    ]
    return [
        int(pair[0]) / int(pair[1])
        for pair in pairs
        if len(pair) == 2 and pair[0].isdigit() and pair[1].isdigit() and int(pair[0]) > 0 and int(pair[1]) > 0
    ]


# --- GPUs ----------------------------------------------------------------------------------------------------------


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs of this machine, through NVML where its Python module is installed, else through nvidia-smi."""
    found = _by_nvml()
    return _by_smi() if found is None else found


def visible(found: list[Gpu], wish: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, by index or by the beginning of a uuid, up to the first bad entry."""
    if wish is None:
        return found
    chosen = []
    for entry in (part.strip() for part in wish.split(",")):
        if entry.isdigit() and int(entry) < len(found):
            chosen.append(found[int(entry)])
        elif match := [gpu for gpu in found if entry and gpu.uuid.startswith(entry)]:
            chosen.append(match[0])
        else:
            break
    return chosen


def group(found: list[Gpu]) -> list[tuple[Gpu, int]]:
    """Equal GPUs as one entry with their number, the largest memory first; the smallest of a kind speaks for it."""
    kinds: dict[tuple[str, str | None], list[Gpu]] = {}
    for gpu in found:
        kinds.setdefault((gpu.name, gpu.why_not), []).append(gpu)
    groups = [(min(kind, key=lambda gpu: gpu.memory_bytes), len(kind)) for kind in kinds.values()]
    return sorted(groups, key=lambda pair: (pair[0].why_not is not None, -pair[0].memory_bytes, pair[0].name))


def gpu_speed(gpu: Gpu) -> tuple[float, float]:
    """FLOP/s and bytes/s of a GPU: its data sheet's, else what the driver's figures suggest, else a small card's."""
    for pattern, flops, bandwidth in _GPUS:
        if re.search(pattern, gpu.name, re.IGNORECASE):
            return flops, bandwidth
    from tunesmith.executors.kernel.sizing import cards

    card = cards.named(gpu.name)
    if card is not None:
        return card.flops, card.bandwidth
    return gpu.peak_flops or _UNKNOWN_GPU[0], gpu.bandwidth or _UNKNOWN_GPU[1]


def _cuda(gpu: Gpu, count: int, why_not: str | None) -> Device:
    flops, bandwidth = gpu_speed(gpu)
    return Device(
        backend="local",
        hardware=gpu.name,
        kind="cuda",
        memory_bytes=gpu.memory_bytes,
        count=count,
        peak_flops=flops,
        bandwidth=bandwidth,
        why_not=why_not,
        stack=stack("cuda", gpu.name),
    )


def _by_nvml() -> list[Gpu] | None:
    """GPUs through the driver's library; None where the module or the library is missing."""
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            flops = bandwidth = 0.0
            with contextlib.suppress(nvml.NVMLError, AttributeError):
                # Two operations a cycle and core; tensor cores double that even on small cards.
                clock = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6
                flops = nvml.nvmlDeviceGetNumGpuCores(handle) * clock * 2 * 2
                clock = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1e6
                bandwidth = clock * 2 * nvml.nvmlDeviceGetMemoryBusWidth(handle) / 8
            why_not = None
            with contextlib.suppress(nvml.NVMLError, AttributeError):
                if nvml.nvmlDeviceGetMigMode(handle)[0] == 1:
                    why_not = "It is split into MIG instances, which are not told apart yet."
            found.append(
                Gpu(
                    name=_text(nvml.nvmlDeviceGetName(handle)),
                    memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
                    uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
                    peak_flops=flops,
                    bandwidth=bandwidth,
                    why_not=why_not,
                )
            )
        return found
    except nvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _by_smi() -> list[Gpu]:
    """GPUs through nvidia-smi; none where it is missing, fails or does not answer in time."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,uuid,mig.mode.current", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, timeout=SMI_SECONDS, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_smi(answer.stdout.decode("utf-8", "replace"))


def parse_smi(text: str) -> list[Gpu]:
    """GPUs in what `nvidia-smi --query-gpu=name,memory.total,uuid,mig.mode.current` printed; memory in MiB."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[1].isdigit():
            why_not = (
                "It is split into MIG instances, which are not told apart yet." if fields[3] == "Enabled" else None
            )
            found.append(Gpu(fields[0], int(fields[1]) * 2**20, fields[2], why_not=why_not))
    return found


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _mps(why_not: str | None) -> Device:
    """An Apple GPU, as far as can be told without torch: it shares the machine's memory, of which it may use 3/4."""
    return Device(
        backend="local",
        hardware="mps",
        kind="mps",
        memory_bytes=memory_limit() * 3 // 4,
        peak_flops=5e12,
        bandwidth=100e9,
        why_not=why_not or "Training on Apple GPUs has not been tried; the CPU works.",
    )


# --- torch, without importing it -----------------------------------------------------------------------------------


def torch_build() -> str:
    """What the torch installed here was built for: "cuda", "cpu", or "" where there is none. It is not imported."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return ""
    if spec is None or spec.origin is None:
        return ""
    return parse_torch_version(_read(Path(spec.origin).parent, "version.py"))


def parse_torch_version(text: str) -> str:
    """ "cuda" or "cpu", from the text of torch/version.py; a build that does not say counts as a CPU build."""
    values: Mapping[str, str] = dict(re.findall(r"^(cuda|hip)\b[^=\n]*=\s*(.+?)\s*$", text, re.MULTILINE))
    return "cuda" if any(value != "None" for value in values.values()) else "cpu"
