"""GGUF headers: what gguf's own writer wrote is read back, and no broken file gives anything but a typed error."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel import gguf_file
from tunesmith.executors.kernel.catalogue import facts, from_config
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import ModelRef


def write(path, *, tied=True, architecture="llama", layers=2):
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(["<unk>", "a", "b"] * 40)
    writer.add_tensor("token_embd.weight", numpy.arange(64 * 120, dtype=numpy.float32).reshape(120, 64))
    if not tied:
        writer.add_tensor("output.weight", numpy.zeros((120, 64), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_is_read_back(tmp_path):
    path = write(tmp_path / "a.gguf")
    found = gguf_file.read(path)
    assert found.architecture == "llama"
    assert found.setting("block_count") == 2
    info = found.tensors[0]
    assert (info.name, info.shape, info.kind) == ("token_embd.weight", (64, 120), 0)
    values = numpy.fromfile(path, numpy.float32, 64 * 120, offset=info.offset)
    assert (values == numpy.arange(64 * 120)).all()


@pytest.mark.parametrize("tied", [True, False])
def test_its_facts(tmp_path, tied):
    path = write(tmp_path / "a.gguf", tied=tied)
    found = facts(ModelRef(id=str(path)), tmp_path)
    assert (found.layers, found.hidden, found.kv_heads, found.vocabulary, found.tied) == (2, 64, 2, 120, tied)
    assert found == from_config(str(path), gguf_file.read(path).config())


def test_an_architecture_that_is_not_trained_is_a_typed_error(tmp_path):
    with pytest.raises(InputError) as error:
        facts(ModelRef(id=str(write(tmp_path / "a.gguf", architecture="mamba"))), tmp_path)
    assert error.value.code == "model.gguf"


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError) as error:
        gguf_file.read(tmp_path / "none.gguf")
    assert error.value.code == "model.missing"


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"PK\x03\x04" * 100, b"GGUF" + b"\xff" * 4000, b"GGUF\x03\0\0\0"],
    ids=["empty", "magic", "zip", "huge-counts", "cut"],
)
def test_what_is_no_gguf_is_a_typed_error(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(InputError) as error:
        gguf_file.read(tmp_path / "a.gguf")
    assert error.value.code == "model.gguf"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(cut=st.integers(0, 3000), at=st.integers(0, 1500), byte=st.integers(0, 255))
def test_broken_bytes_never_escape(tmp_path, cut, at, byte):
    source = tmp_path / "whole.gguf"
    if not source.exists():
        write(source)
    content = bytearray(source.read_bytes()[: cut + 1])
    content[min(at, cut)] = byte
    path = tmp_path / "broken.gguf"
    path.write_bytes(bytes(content))
    try:
        gguf_file.read(path).config()
    except InputError as error:
        code = error.code
    else:
        code = "model.gguf"
    assert code == "model.gguf"


def test_fingerprints_tell_files_apart(tmp_path):
    one, two = write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf", tied=False)
    assert gguf_file.fingerprint(one) == gguf_file.fingerprint(one)
    assert gguf_file.fingerprint(one) != gguf_file.fingerprint(two)
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    (tmp_path / "c.gguf").write_bytes(bytes(content))
    assert gguf_file.fingerprint(one) != gguf_file.fingerprint(tmp_path / "c.gguf")
    assert gguf_file.folder_name(tmp_path / "c.gguf").startswith("c-")
