"""Checkpoints: whole or absent, believed only when every byte is there."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from tunesmith.executors.kernel import checkpoint
from tunesmith.orchestrator.errors import StorageError


def fill(folder):
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "cursor.json").write_text('{"step": 1}')
    (folder / "inner").mkdir()
    (folder / "inner" / "more.bin").write_bytes(b"more")


def saved(folder, step):
    return checkpoint.write(checkpoint.step_folder(folder, step), fill, step=step, attempt=1, spec_hash="abc")


def test_what_is_written_verifies(tmp_path):
    written = saved(tmp_path, 10)
    assert written.path.name == "step-00000010"
    manifest = checkpoint.verify(written.path)
    assert manifest["step"] == 10
    assert manifest["attempt"] == 1
    assert manifest["spec_hash"] == "abc"
    assert set(manifest["files"]) == {"weights.safetensors", "cursor.json", "inner/more.bin"}
    assert manifest["files"]["inner/more.bin"]["bytes"] == 4
    assert written.bytes == sum(path.stat().st_size for path in written.path.rglob("*") if path.is_file())


def test_the_names_of_new_folders_survive_a_power_cut(tmp_path, monkeypatch):
    flushed = []
    usual = checkpoint.flush_folder
    monkeypatch.setattr(checkpoint, "flush_folder", lambda folder: flushed.append(folder) or usual(folder))
    saved(tmp_path / "checkpoints", 10)
    assert flushed[0] == tmp_path
    assert flushed[-1] == tmp_path / "checkpoints"
    saved(tmp_path / "checkpoints", 20)
    assert flushed.count(tmp_path) == 1


def truncate(folder):
    os.truncate(folder / "weights.safetensors", 5000)


def flip(folder):
    with open(folder / "weights.safetensors", "r+b") as file:
        file.seek(777)
        byte = file.read(1)
        file.seek(777)
        file.write(bytes([byte[0] ^ 1]))


def lose(folder):
    (folder / "cursor.json").unlink()


def lose_inner(folder):
    (folder / "inner" / "more.bin").unlink()


def lose_manifest(folder):
    (folder / "manifest.json").unlink()


def tear_manifest(folder):
    os.truncate(folder / "manifest.json", 40)


def empty(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def empty_manifest(folder):
    (folder / "manifest.json").write_text('{"files": {}, "step": 30}')


def list_manifest(folder):
    (folder / "manifest.json").write_text("[]")


def deep_manifest(folder):
    (folder / "manifest.json").write_text("[" * 100_000)


def escape(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../step-00000020/cursor.json"] = manifest["files"].pop("cursor.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def another_step(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "step": 31}))


def folder_for_file(folder):
    (folder / "cursor.json").unlink()
    (folder / "cursor.json").mkdir()


DAMAGE = [
    truncate,
    flip,
    lose,
    lose_inner,
    lose_manifest,
    tear_manifest,
    empty,
    empty_manifest,
    list_manifest,
    deep_manifest,
    escape,
    another_step,
    folder_for_file,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, tmp_path):
    for step in (10, 20, 30):
        saved(tmp_path, step)
    damage(tmp_path / "step-00000030")
    found = checkpoint.newest_verified(tmp_path)
    assert found.path == tmp_path / "step-00000020"
    assert found.manifest["step"] == 20
    (finding,) = found.passed_over
    assert finding.code == "checkpoint.corrupt"
    assert finding.where == "step-00000030"
    assert "step-00000030 is damaged" in finding.message


def test_all_damaged_means_none(tmp_path):
    for step, damage in ((10, flip), (20, truncate), (30, empty)):
        saved(tmp_path, step)
        damage(tmp_path / f"step-{step:08d}")
    found = checkpoint.newest_verified(tmp_path)
    assert found.path is None
    assert [finding.where for finding in found.passed_over] == ["step-00000030", "step-00000020", "step-00000010"]


def test_nothing_there_means_none(tmp_path):
    assert checkpoint.newest_verified(tmp_path / "nowhere") == checkpoint.Found(None, {}, ())
    (tmp_path / "step-x").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert checkpoint.newest_verified(tmp_path) == checkpoint.Found(None, {}, ())


def test_every_single_byte_counts(tmp_path):
    folder = saved(tmp_path, 1).path
    for name in ("weights.safetensors", "cursor.json"):
        for at in range(0, (folder / name).stat().st_size, 997):
            data = bytearray((folder / name).read_bytes())
            data[at] ^= 0x80
            (folder / name).write_bytes(data)
            with pytest.raises(StorageError):
                checkpoint.verify(folder)
            data[at] ^= 0x80
            (folder / name).write_bytes(data)
    checkpoint.verify(folder)


def test_the_step_is_replaced_when_it_is_written_again(tmp_path):
    saved(tmp_path, 10)
    flip(tmp_path / "step-00000010")
    saved(tmp_path, 10)
    assert checkpoint.newest_verified(tmp_path).passed_over == ()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    saved(tmp_path, 10)

    def failing(folder):
        fill(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        checkpoint.write(tmp_path / "step-00000020", failing, step=20)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


@pytest.fixture
def small_files():
    """No file may grow over 64 KiB: how a full disk looks to a writer, without mounting one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def big_bytes(folder):
    (folder / "big.bin").write_bytes(bytes(1 << 20))


def big_tensors(folder):
    import torch
    from safetensors.torch import save_file

    save_file({"big": torch.zeros(1 << 18)}, str(folder / "big.safetensors"))


@pytest.mark.parametrize("writer", [big_bytes, big_tensors], ids=["bytes", "safetensors"])
def test_a_full_disk_is_a_typed_error_and_the_old_one_stays(writer, tmp_path, small_files):
    saved(tmp_path, 10)
    with pytest.raises(StorageError) as caught:
        checkpoint.write(tmp_path / "step-00000020", writer, step=20)
    assert caught.value.code == "storage.full"
    assert "step-00000020 was not written" in caught.value.message
    assert checkpoint.newest_verified(tmp_path).path == tmp_path / "step-00000010"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_forbidden_folder_is_a_typed_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError) as caught:
            saved(tmp_path, 10)
    finally:
        tmp_path.chmod(0o700)
    assert caught.value.code == "storage.denied"


def test_the_newest_are_kept_and_the_best_with_them(tmp_path):
    for step in (10, 20, 30, 40):
        saved(tmp_path, step)
    checkpoint.keep(tmp_path, 2, {10})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030", "step-00000040"]


def test_damaged_ones_ahead_of_a_resumed_run_do_not_push_out_what_it_writes(tmp_path):
    for step in (10, 20, 30):
        saved(tmp_path, step)
    for step in (20, 30):
        truncate(checkpoint.step_folder(tmp_path, step))
    assert checkpoint.newest_verified(tmp_path).manifest["step"] == 10
    saved(tmp_path, 15)
    checkpoint.keep(tmp_path, 1, newest=15)
    assert checkpoint.newest_verified(tmp_path).manifest["step"] == 15
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [30, 20, 15]


KILLED = """
import sys
from pathlib import Path
from tunesmith.executors.kernel import checkpoint

def fill(folder):
    for number in range(20):
        (folder / f"part-{number}").write_bytes(bytes(200_000))

root = Path(sys.argv[1])
step = 0
while True:
    step += 1
    checkpoint.write(checkpoint.step_folder(root, step), fill, step=step)
    checkpoint.keep(root, 2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_verified_checkpoint(tmp_path):
    """SIGKILL at some moments of a writer that does nothing but save: what stands always verifies."""
    done = 0
    for kill in range(6):
        root = tmp_path / str(kill)
        writer = subprocess.Popen([sys.executable, "-c", KILLED, str(root)], stdout=subprocess.PIPE, text=True)
        lines = [int(writer.stdout.readline()) for _ in range(3)]
        deadline = time.monotonic() + 0.011 * kill
        while time.monotonic() < deadline:
            pass
        writer.kill()
        lines += [int(line) for line in writer.stdout.read().split()]
        writer.stdout.close()
        writer.wait()
        found = checkpoint.newest_verified(root)
        assert found.passed_over == ()
        assert found.manifest["step"] in (lines[-1], lines[-1] + 1)
        done += any(path.name.startswith(".step") for path in root.iterdir())
        checkpoint.sweep(root)
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
    assert done > 0  # at least one kill fell into a save
