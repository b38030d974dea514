"""What vLLM is asked, what is made of its answers, and what it is given; vLLM itself only where it and a GPU are."""

import os
import sys
import types
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pytest
import torch

from tunesmith.executors.kernel.loops import model as models
from tunesmith.executors.kernel.loops import vllm
from tunesmith.executors.kernel.loops.refill import Ask, Sample

LIMIT = 6
ASKS = [Ask(4, [5, 6, 7], (0, 2)), Ask(1, [9], (1,)), Ask(7, [3, 4, 5, 6, 8], (0, 1, 2))]
MISSING = vllm.available()


# --- stand-ins, with the fields and parameters that vLLM 0.30 has --------------------------------------------------


@dataclass
class FlatLogprobs:
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: FlatLogprobs | None
    routed_experts: None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: None = None
    sampling_mask: None = None
    spec_decode_metrics: None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float
    seed: int
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int
    flat_logprobs: bool
    detokenize: bool


def answer(ids, logps, reason="stop", told=None):
    flat = FlatLogprobs(token_ids=list(ids if told is None else told), logprobs=list(logps))
    return RequestOutput("0", [1], [CompletionOutput(0, "", list(ids), sum(logps), flat, finish_reason=reason)], True)


class Engine:
    """Writes one request at each step, the last one first: what vLLM ends first need not have been asked first."""

    def __init__(self, model) -> None:
        self.model = model
        self.queue: list[tuple[str, list[int], SamplingParams]] = []
        self.aborted: list[str] = []
        self.down = False
        self.engine_core = types.SimpleNamespace(shutdown=self._shutdown)

    def _shutdown(self) -> None:
        self.down = True

    def has_unfinished_requests(self) -> bool:
        return bool(self.queue)

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        assert internal
        self.aborted = list(request_ids)
        self.queue.clear()

    @torch.no_grad()
    def step(self) -> list[RequestOutput]:
        name, prompt, how = self.queue.pop()
        draw = torch.Generator().manual_seed(how.seed)
        ids: list[int] = []
        flat = FlatLogprobs()
        while len(ids) < how.max_tokens and not (ids and ids[-1] in how.stop_token_ids):
            logits = self.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
            logps = (logits / (how.temperature or 1.0)).log_softmax(-1)
            ids.append(
                int(torch.multinomial(logps.exp(), 1, generator=draw)) if how.temperature else int(logps.argmax())
            )
            flat.token_ids.append(ids[-1])
            flat.logprobs.append(float(logps[ids[-1]]))
        reason = "stop" if ids[-1] in how.stop_token_ids else "length"
        output = CompletionOutput(0, "", ids, sum(flat.logprobs), flat, finish_reason=reason)
        return [RequestOutput(name, prompt, [output], True)]


class LLM:
    """vLLM's front, over a model of transformers whose weights are what was handed over, random before."""

    made: "LLM"
    fresh: Any = None
    fault: Exception | None = None
    freed = True

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool,
        trust_remote_code: bool,
        dtype: str,
        gpu_memory_utilization: float,
        load_format: str,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool,
        logprobs_mode: str,
        disable_log_stats: bool,
        use_tqdm_on_load: bool,
    ) -> None:
        self.told = {key: value for key, value in locals().items() if key != "self"}
        self.environment = dict(os.environ)
        self.resets = 0
        torch.manual_seed(0)
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("high")
        print("a banner")
        print("a bar", file=sys.stderr)
        if type(self).fault is not None:
            raise type(self).fault
        type(self).made = self
        self.request_counter = 0
        self.llm_engine = Engine(type(self).fresh)
        with torch.no_grad():
            for item in self.llm_engine.model.parameters():
                item.uniform_(-1e-3, 1e-3)

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None) -> list[None]:
        assert method == "reload_weights"
        assert not args
        own = dict(self.llm_engine.model.named_parameters())
        self.loaded = []
        with torch.no_grad():
            for name, item in kwargs["weights_iterator"]:
                assert not item.requires_grad
                own[name].copy_(item)
                self.loaded.append(name)
        return [None]

    def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False) -> bool:
        self.resets += 1
        return type(self).freed

    def enqueue(self, prompts, sampling_params, *, use_tqdm=True) -> list[str]:
        assert not use_tqdm
        self.asked = sampling_params
        names = []
        for prompt, how in zip(prompts, sampling_params, strict=True):
            self.llm_engine.queue.append((str(self.request_counter), prompt["prompt_token_ids"], how))
            names.append(f"{self.request_counter}-1f2e3d4c")
            self.request_counter += 1
        return names


@pytest.fixture
def stand_in(monkeypatch):
    """The module `vllm`, which is there and sees a GPU."""
    for name in vllm.SET:
        monkeypatch.setenv(name, "as it was")
    kind = type("StandIn", (LLM,), {})
    distributed = types.ModuleType("vllm.distributed")
    distributed.cleaned = []
    distributed.cleanup_dist_env_and_memory = lambda: distributed.cleaned.append(True)
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams, module.distributed = kind, SamplingParams, distributed
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    monkeypatch.setattr(vllm, "available", lambda: "")
    return module


@pytest.fixture
def make_writer(stand_in, make_net, make_model, make_spec, tmp_path):
    def make(spec=None, *, net=None, temperature=0.7, limit=LIMIT, **more):
        stand_in.LLM.fresh = make_model(**more).eval()
        net = net or make_net(spec or make_spec(), **more)
        net.outer.eval()
        sizes = {"slots": 4, "limit": limit, "longest": 5, "temperature": temperature, "share": 0.25}
        return vllm.Vllm(net, tmp_path, **sizes)

    return make


@torch.no_grad()
def by_the_trainer(net, asks, samples, temperature):
    """Log-probabilities of the samples' tokens by the model in training."""
    prompts = {ask.row: list(ask.ids) for ask in asks}
    found = []
    for item in samples:
        whole = torch.tensor([prompts[item.row] + item.ids], device=net.device)
        with net.amp():
            logits = net.causal(input_ids=whole).logits[0, -len(item.ids) - 1 : -1]
        logps = (logits.float() / temperature).log_softmax(-1)
        found.append(logps.gather(1, whole[0, -len(item.ids) :, None]).squeeze(1).cpu())
    return found


# --- whether it can be tried ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version, gpu, why",
    [
        (None, True, "not installed"),
        ("0.33.0", True, "vLLM 0.33.0"),
        ("0.3.0", True, "vLLM 0.3.0"),
        ("0.30.0", False, "no CUDA GPU"),
        ("0.30.1+cu130", True, ""),
    ],
)
def test_why_it_cannot_be_tried(version, gpu, why, monkeypatch):
    def find(name):
        if name != "vllm" or version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", find)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before = set(sys.modules)
    said = vllm.available()
    assert why in said
    assert bool(said) == bool(why)
    assert set(sys.modules) == before


def test_what_is_missing_is_said(make_net, make_spec, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "available", lambda: "there is none")
    with pytest.raises(RuntimeError, match="there is none"):
        vllm.Vllm(make_net(make_spec()), tmp_path, slots=1, limit=1, longest=1, temperature=1.0, share=0.1)


@pytest.mark.parametrize("alone", [True, False])
def test_one_process_on_the_first_gpu(alone, make_writer, make_net, make_spec, monkeypatch):
    net = make_net(make_spec())
    if alone:
        net.device = torch.device("cuda:1")
    else:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="first GPU"):
        make_writer(net=net)


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_seeds_follow_from_names():
    names = [(key, row, sample) for key in ("1:0", "1:1", "2:0") for row in range(20) for sample in range(8)]
    seeds = [vllm.seed(*name) for name in names]
    assert seeds == [vllm.seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= each < 2**63 for each in seeds)
    assert max(seeds) > 2**62
    assert vllm.seed("1:0", 3, 2) == 1834464439106959481


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["lora", "dora", "none"])
def test_weights_are_those_of_the_merged_model(kind, tied, family, make_net, make_model, make_spec):
    net = make_net(make_spec(adapter={"kind": kind}), family, tie_word_embeddings=tied)
    net.outer.eval()
    given = dict(vllm.weights(net))
    fresh = make_model(family, tie_word_embeddings=tied).eval()
    assert set(given) == {name for name, _ in fresh.named_parameters()}  # a tied one comes once
    with torch.no_grad():
        for item in fresh.parameters():
            item.zero_()
    fresh.load_state_dict(given, strict=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(fresh(input_ids=ids).logits, net.causal(input_ids=ids).logits, atol=1e-5)


def test_a_4_bit_base_is_read_back(make_net, make_model, make_spec):
    pytest.importorskip("bitsandbytes")
    whole = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # rows of whole blocks
    net = make_net(make_spec(adapter={"kind": "qlora", "targets": ("q_proj",)}), **whole)
    net.outer.eval()
    given = dict(vllm.weights(net))
    fresh = make_model(**whole).eval()
    assert {name: item.shape for name, item in given.items()} == {
        name: item.shape for name, item in fresh.named_parameters()
    }
    fresh.load_state_dict(given, strict=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(fresh(input_ids=ids).logits, net.causal(input_ids=ids).logits, atol=1e-4)


def test_weights_are_handed_over_as_they_are_made(make_net, make_spec):
    """One merged layer at a time: no second model is held."""
    given = vllm.weights(make_net(make_spec()))
    assert next(given)[0] == "model.embed_tokens.weight"
    assert next(given)[0] == "model.layers.0.self_attn.q_proj.weight"


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_samples_are_those_that_were_asked_for(kind, make_writer, make_spec):
    writer = make_writer(make_spec(adapter={"kind": kind}))
    told: list[tuple[int, int]] = []
    samples = writer.write(ASKS, "1:0", {2}, LIMIT, lambda *now: told.append(now), lambda: False)
    assert [(item.row, item.sample) for item in samples] == [(ask.row, n) for ask in ASKS for n in ask.samples]
    assert told[-1] == (sum(len(item.ids) for item in samples), len(samples))
    assert all(item.ended == (item.ids[-1] == 2) for item in samples)
    assert all(item.ended or len(item.ids) == LIMIT for item in samples)
    for item, logps in zip(samples, by_the_trainer(writer.net, ASKS, samples, 0.7), strict=True):
        assert torch.tensor(item.logps) == pytest.approx(logps, abs=1e-5)
    assert writer.write(ASKS, "1:0", {2}, LIMIT) == samples
    assert writer.write(ASKS[::-1], "1:0", {2}, LIMIT)[-2:] == samples[:2]
    assert writer.write(ASKS, "1:1", {2}, LIMIT) != samples
    assert writer.write([], "1:0", {2}, LIMIT) == []


def test_what_is_asked_of_vllm(make_writer, stand_in, tmp_path):
    writer = make_writer()
    told = stand_in.LLM.made.told
    assert told["model"] == str(tmp_path)
    assert told["trust_remote_code"] is False
    assert (told["dtype"], told["load_format"]) == ("float32", "dummy")
    assert (told["max_model_len"], told["max_num_seqs"], told["gpu_memory_utilization"]) == (5 + LIMIT, 4, 0.25)
    assert told["logprobs_mode"] == "processed_logprobs"
    assert stand_in.LLM.made.environment.items() >= vllm.SET.items()
    writer.write(ASKS[:1], "1:0", {2, 30, 5000}, LIMIT)
    first, second = stand_in.LLM.made.asked
    assert (first.seed, second.seed) == (vllm.seed("1:0", 4, 0), vllm.seed("1:0", 4, 2))
    assert (first.temperature, first.max_tokens, first.logprobs) == (0.7, LIMIT, 0)
    assert first.stop_token_ids == [2, 30]  # the model has no token 5000
    assert first.ignore_eos
    assert not first.detokenize


def test_without_a_key_the_likeliest_are_taken(make_writer, stand_in):
    writer = make_writer()
    samples = writer.write([Ask(0, [5, 6], (0, 1))], None, frozenset(), LIMIT)
    assert stand_in.LLM.made.asked[0].temperature == 0.0
    assert samples[0].ids == samples[1].ids
    whole = torch.tensor([[5, 6, *samples[0].ids]])
    with torch.no_grad():
        assert writer.net.causal(input_ids=whole).logits[0, 1:-1].argmax(-1).tolist() == samples[0].ids


def test_a_stop_between_tokens_gives_nothing(make_writer, stand_in):
    writer = make_writer()
    looks = iter([False, False, True])
    assert writer.write(ASKS, "1:0", {2}, LIMIT, None, lambda: next(looks)) is None
    engine = stand_in.LLM.made.llm_engine
    assert len(engine.aborted) == 6
    assert not engine.queue
    assert len(writer.write(ASKS, "1:0", {2}, LIMIT)) == 6


def test_new_weights_are_handed_over(make_writer, stand_in):
    writer = make_writer(temperature=1.0)
    assert stand_in.LLM.made.resets == 1
    assert not writer.stale
    before = writer.write(ASKS, "1:0", {2}, LIMIT)
    with torch.no_grad():
        for _, item in writer.net.trainable():
            item.mul_(1.5)
    assert writer.stale
    writer.refresh()
    assert not writer.stale
    assert stand_in.LLM.made.resets == 2
    after = writer.write(ASKS, "1:0", {2}, LIMIT)
    assert after != before
    for item, logps in zip(after, by_the_trainer(writer.net, ASKS, after, 1.0), strict=True):
        assert torch.tensor(item.logps) == pytest.approx(logps, abs=1e-5)


def test_keys_and_values_of_the_weights_before_are_never_used(make_writer, stand_in):
    writer = make_writer()
    stand_in.LLM.freed = False
    with pytest.raises(RuntimeError, match="weights before"):
        writer.refresh()


def test_an_answer_longer_than_the_room_is_refused(make_writer):
    writer = make_writer()
    with pytest.raises(ValueError, match="11 tokens"):
        writer.write([Ask(0, [3] * 6, (0,))], "1:0", {2}, LIMIT)


def test_an_answer_is_made_a_sample():
    made = vllm._sample(3, 1, answer([5, 6, 2], [-0.5, -1.0, -0.25]), {2})
    assert made == Sample(3, 1, [5, 6, 2], [-0.5, -1.0, -0.25], True)
    assert not vllm._sample(3, 1, answer([5, 6], [-0.5, -1.0], "length"), {2}).ended


@pytest.mark.parametrize(
    "output", [answer([5], [-0.5], "abort"), answer([5], [-0.5], "error"), answer([5, 6], [-0.5, -1.0], told=[5, 7])]
)
def test_an_answer_that_is_not_whole_is_an_error(output):
    with pytest.raises(RuntimeError, match="vLLM ended an answer"):
        vllm._sample(0, 0, output, {2})


# --- beside the trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, ValueError("no such model\nand more"), torch.OutOfMemoryError("all is taken")])
def test_the_process_stays_as_it_was(fault, make_net, make_model, make_spec, stand_in, tmp_path, capsys):
    net, stand_in.LLM.fresh, stand_in.LLM.fault = make_net(make_spec()), make_model(), fault
    sizes = {"slots": 1, "limit": 1, "longest": 1, "temperature": 1.0, "share": 0.1}
    torch.manual_seed(11)
    drawn, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    if fault is None:
        vllm.Vllm(net, tmp_path, **sizes).close()
        assert stand_in.LLM.made.llm_engine.down
    else:
        with pytest.raises(RuntimeError, match=f"^{type(fault).__name__}: {str(fault).splitlines()[0]}$") as caught:
            vllm.Vllm(net, tmp_path, **sizes)
        assert type(caught.value) is RuntimeError
        assert caught.value.__context__ is None  # its frames would hold the memory
    assert stand_in.distributed.cleaned == [True]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.get_num_threads() == 1
    assert capsys.readouterr() == ("", "")


def test_weights_that_vllm_does_not_know_are_a_refusal(make_writer, make_net, make_spec, stand_in):
    net = make_net(make_spec(), tie_word_embeddings=False)  # the stand-in's is tied: it has no head
    with pytest.raises(RuntimeError, match="KeyError"):
        make_writer(net=net)
    assert stand_in.LLM.made.llm_engine.down
    assert stand_in.distributed.cleaned == [True]


# --- vLLM itself ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
def test_vllm_writes_what_the_trainer_would(make_model, make_spec, tmp_path, capsys):
    """Also after a step: with weights that are not those in the folder."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_model(head_dim=64, initializer_range=0.1, **shape).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    net = models.ready(model, make_spec(dtype="bfloat16"), torch.device("cuda"))
    net.outer.eval()
    writer = vllm.Vllm(net, tmp_path, slots=4, limit=9, longest=5, temperature=0.7, share=0.1)
    for _ in range(2):
        samples = writer.write(ASKS, "1:0", {2}, 9)
        gaps = [
            (torch.tensor(item.logps) - logps).abs()
            for item, logps in zip(samples, by_the_trainer(net, ASKS, samples, 0.7), strict=True)
        ]
        assert float(torch.cat(gaps).mean()) < 0.05
        with torch.no_grad():
            for _, item in net.trainable():
                item.add_(torch.randn_like(item) * 0.1)
        writer.refresh()
    writer.close()
    assert capsys.readouterr() == ("", "")
