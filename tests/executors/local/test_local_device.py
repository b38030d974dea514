"""What this machine says of itself, and what the drivers of others would say."""

import os
import subprocess
import sys

import psutil
import pytest

from tunesmith.executors.local import device
from tunesmith.executors.local.device import Gpu

SMI = """NVIDIA H100 80GB HBM3, 81559, GPU-11111111-aaaa-bbbb-cccc-000000000001, Disabled
NVIDIA L4, 23034, GPU-22222222-aaaa-bbbb-cccc-000000000002, [N/A]
NVIDIA L4, 23034, GPU-33333333-aaaa-bbbb-cccc-000000000003, [N/A]
NVIDIA A100-SXM4-80GB, 81920, GPU-44444444-aaaa-bbbb-cccc-000000000004, Enabled
"""


def test_the_cpu_is_always_there_and_comes_last():
    cpu = device.devices()[-1]
    assert (cpu.backend, cpu.kind, cpu.hardware, cpu.count) == ("local", "cpu", "cpu", 1)
    assert 0 < cpu.memory_bytes <= psutil.virtual_memory().total
    assert 1e9 < cpu.peak_flops < 1e14
    assert 1e9 < cpu.bandwidth <= 200e9


def test_looking_imports_no_torch():
    code = "import sys; from tunesmith.executors.local import device; device.devices(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_smi_is_read():
    found = device.parse_smi(SMI + "garbage\nNVIDIA X, [N/A], GPU-5, [N/A]\n")
    assert [gpu.name for gpu in found] == ["NVIDIA H100 80GB HBM3", "NVIDIA L4", "NVIDIA L4", "NVIDIA A100-SXM4-80GB"]
    assert found[1].memory_bytes == 23034 * 2**20
    assert [bool(gpu.why_not) for gpu in found] == [False, False, False, True]


def test_equal_gpus_are_one_entry_and_the_unready_come_last():
    groups = device.group(device.parse_smi(SMI))
    assert [(gpu.name, count) for gpu, count in groups] == [
        ("NVIDIA H100 80GB HBM3", 1),
        ("NVIDIA L4", 2),
        ("NVIDIA A100-SXM4-80GB", 1),
    ]


@pytest.mark.parametrize(
    "wish, indices",
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("0, 9, 1", [0]),
        ("GPU-3333", [2]),
        ("nonsense", []),
    ],
)
def test_cuda_visible_devices_is_respected(wish, indices):
    found = device.parse_smi(SMI)
    assert device.visible(found, wish) == [found[index] for index in indices]


@pytest.mark.parametrize(
    "name, flops, bandwidth",
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 3350e9),
        ("NVIDIA H100 PCIe", 756e12, 2000e9),
        ("NVIDIA H200", 989e12, 4800e9),
        ("NVIDIA L4", 121e12, 300e9),
        ("NVIDIA L40S", 362e12, 864e9),
        ("NVIDIA A10G", 70e12, 600e9),
        ("Tesla T4", 65e12, 320e9),
        ("NVIDIA GeForce RTX 4090", 165e12, 1008e9),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2039e9),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1555e9),
        ("Some Card", 30e12, 300e9),
    ],
)
def test_known_gpus_have_their_data_sheets_speed(name, flops, bandwidth):
    assert device.gpu_speed(Gpu(name, 1, "")) == (flops, bandwidth)


def test_an_unknown_gpu_is_judged_by_what_its_driver_says():
    assert device.gpu_speed(Gpu("New Card", 1, "", peak_flops=5e13, bandwidth=4e11)) == (5e13, 4e11)


def program(folder, text):
    path = folder / "nvidia-smi"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def test_a_driver_that_answers_is_heard(tmp_path, monkeypatch):
    program(tmp_path, f"cat <<'END'\n{SMI}END\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert device._by_smi() == device.parse_smi(SMI)


@pytest.mark.parametrize("text", ["exit 9", "exec sleep 60", "echo 'NVIDIA-SMI has failed'"])
def test_a_driver_that_fails_or_hangs_leaves_the_cpu(tmp_path, monkeypatch, text):
    program(tmp_path, text)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(device, "SMI_SECONDS", 0.2)
    assert device._by_smi() == []


@pytest.mark.parametrize(
    "text, build",
    [
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", "cuda"),
        ("cuda = '12.8'\n", "cuda"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", "cuda"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", "cpu"),
        ("__version__ = '2.6'\n", "cpu"),
    ],
)
def test_what_torch_was_built_for_is_read_not_imported(text, build):
    assert device.parse_torch_version(text) == build


def test_a_gpu_without_a_cuda_build_is_listed_and_says_why(tmp_path, monkeypatch):
    program(tmp_path, f"cat <<'END'\n{SMI}END\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "_by_nvml", lambda: None)
    monkeypatch.setattr(device, "torch_build", lambda: "cpu")
    listed = device.devices()
    assert [item.kind for item in listed] == ["cuda", "cuda", "cuda", "cpu"]
    assert "without CUDA" in listed[0].why_not
    assert listed[1].count == 2
    monkeypatch.setattr(device, "torch_build", lambda: "cuda")
    assert [bool(item.why_not) for item in device.devices()] == [False, False, True, False]


# --- cgroups ---------------------------------------------------------------------------------------------------------


def machine(root, membership, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


GIB = 2**30


@pytest.mark.parametrize(
    "membership, files, limit",
    [
        ("0::/user/job\n", {"user/job/memory.max": "max\n", "user/memory.max": f"{GIB}\n"}, GIB),
        ("0::/user/job\n", {"user/job/memory.max": f"{GIB}\n", "user/memory.max": f"{2 * GIB}\n"}, GIB),
        ("0::/../host/path\n", {"memory.max": f"{GIB}\n"}, GIB),
        ("4:memory:/box\n0::/\n", {"memory/box/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("4:memory:/host/path\n", {"memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("0::/\n", {}, None),
        ("", {}, None),
    ],
)
def test_the_memory_of_a_cgroup_is_the_memory(tmp_path, membership, files, limit):
    root = machine(tmp_path, membership, files)
    assert device.memory_limit(root) == (limit or psutil.virtual_memory().total)


@pytest.mark.parametrize(
    "membership, files, quota",
    [
        ("0::/box\n", {"box/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/box\n", {"box/cpu.max": "max 100000\n"}, None),
        ("1:cpu,cpuacct:/box\n", {"cpu/box/cpu.cfs_quota_us": "25000", "cpu/box/cpu.cfs_period_us": "100000"}, 0.25),
        ("1:cpu:/box\n", {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_cores_of_a_cgroup_are_the_cores(tmp_path, membership, files, quota):
    assert device.cores(machine(tmp_path, membership, files)) == (quota or device.cores(tmp_path / "nowhere"))


def test_wider_registers_make_a_faster_cpu():
    hertz = 2e9
    assert device.cpu_peak(2, "flags: fpu sse2 avx avx2 avx512f", hertz) == 2 * hertz * 64
    assert device.cpu_peak(2, "flags: fpu sse2 avx avx2", hertz) == 2 * hertz * 32
    assert device.cpu_peak(1, "Features: fp asimd", hertz) == hertz * 16
    assert device.cpu_peak(0.5, "", hertz) == hertz * 4
