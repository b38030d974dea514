"""Results are handed over only when every byte is what it was."""

import json
import os

import pytest

from tunesmith.orchestrator.errors import StorageError


@pytest.fixture
def ended(yard):
    handle = yard.submit("ok")
    yard.end(handle)
    yard.output = yard.folder() / "output"
    yard.handle = handle
    return yard


def refused(yard, code):
    with pytest.raises(StorageError) as caught:
        yard.executor.collect(yard.handle)
    assert caught.value.code == f"artifacts.{code}"
    assert caught.value.where.startswith(str(yard.folder()))
    return True


def test_what_is_whole_is_handed_over(ended):
    adapter, evaluation = ended.executor.collect(ended.handle)
    files = list((ended.output / "adapter").iterdir())
    assert (adapter.kind, adapter.path) == ("adapter", str(ended.output / "adapter"))
    assert adapter.bytes == sum(file.stat().st_size for file in files)
    assert (evaluation.kind, evaluation.path) == ("eval", str(ended.output / "eval.json"))


def test_a_flipped_bit(ended):
    file = ended.output / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert refused(ended, "changed")


def test_a_file_cut_short(ended):
    os.truncate(ended.output / "adapter" / "adapter_model.safetensors", 100)
    assert refused(ended, "changed")


def test_a_missing_file(ended):
    (ended.output / "adapter" / "adapter_config.json").unlink()
    assert refused(ended, "missing")


def test_a_file_that_nobody_listed(ended):
    (ended.output / "adapter" / "pytorch_model.bin").write_bytes(b"pickle")
    assert refused(ended, "unlisted")


def test_no_manifest(ended):
    (ended.output / "manifest.json").unlink()
    assert refused(ended, "missing")


def test_no_output(ended):
    ended.output.rename(ended.folder() / "moved")
    assert refused(ended, "missing")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": 3}', '{"files": {"x": 1}}', '{"files": {"x": {}}}', "\xff"]
)
def test_a_damaged_manifest(ended, text):
    (ended.output / "manifest.json").write_text(text)
    assert refused(ended, "damaged")


@pytest.mark.parametrize("change", [{"attempt": 2}, {"spec_hash": "0" * 64}, {"spec_hash": None}])
def test_a_manifest_of_another_attempt_or_spec(ended, change):
    path = ended.output / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert refused(ended, "foreign")


def test_a_nested_manifest_that_disagrees(ended):
    inner = ended.output / "adapter" / "manifest.json"
    document = json.loads(inner.read_text())
    document["files"]["adapter_config.json"]["sha256"] = "0" * 64
    inner.write_text(json.dumps(document))
    outer = ended.output / "manifest.json"
    whole = json.loads(outer.read_text())
    import hashlib

    content = inner.read_bytes()
    whole["files"]["adapter/manifest.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    outer.write_text(json.dumps(whole))
    assert refused(ended, "changed")


def test_a_name_that_leads_out(ended, tmp_path):
    (tmp_path / "secret").write_text("x")
    path = ended.output / "manifest.json"
    document = json.loads(path.read_text())
    document["files"]["../../../../../../../secret"] = {"bytes": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(document))
    assert refused(ended, "missing")


@pytest.mark.parametrize("target", ["/etc/hostname", "adapter_config.json"])
def test_a_link_in_place_of_a_file(ended, target):
    file = ended.output / "adapter" / "adapter_model.safetensors"
    file.unlink()
    file.symlink_to(target)
    assert refused(ended, "link")


def test_a_link_in_place_of_a_folder(ended, tmp_path):
    (ended.output / "adapter").rename(tmp_path / "adapter")
    (ended.output / "adapter").symlink_to(tmp_path / "adapter")
    assert refused(ended, "link")


def test_a_link_in_place_of_the_output(ended, tmp_path):
    ended.output.rename(tmp_path / "output")
    ended.output.symlink_to(tmp_path / "output")
    with pytest.raises(StorageError) as caught:
        ended.executor.collect(ended.handle)
    assert caught.value.code == "storage.link"


def test_a_pipe_does_not_hang(ended):
    os.mkfifo(ended.output / "pipe")
    assert refused(ended, "link")
