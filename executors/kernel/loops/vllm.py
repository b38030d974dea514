"""Samples written by vLLM, in this process and on the one GPU that trains, where vLLM is installed.

It has not been run on a GPU yet: it was written against the source of vLLM 0.30.0, the last release that takes the
torch and the transformers in constraints.txt. vLLM begins with random weights, not with those in the model's folder, so
that its samples pass the rollout's self-test only if every weight was handed over.
"""

from __future__ import annotations

import gc
import hashlib
import io
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.executors.kernel.loops import quantised
from tunesmith.executors.kernel.loops.merged import _merge, _mergeable
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.refill import Ask, Sample, Told

MINOR = "0.30."  # what is used of it changes from one minor version to the next
BATCH = 8192  # tokens that go through the model at once
# Nothing is reported to anyone, no plugin's code is run, no other process is started, no log is set up.
SET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_PLUGINS": ""}
SET |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CONFIGURE_LOGGING": "0"}


def available() -> str:
    """Empty where vLLM can be tried, or why it cannot. Imports nothing."""
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "vLLM is not installed (pip install 'tunesmith[vllm]')"
    if not version.startswith(MINOR):
        return f"vLLM {version} is installed, and what is asked of it here is known of {MINOR}* only"
    return "" if torch.cuda.is_available() else "torch sees no CUDA GPU"


class Vllm:
    """Writes up to `slots` samples at a time, with the weights as they were at the last `refresh`.

    `longest` and `limit` are the most tokens of a prompt and of an answer. vLLM takes `share` of the GPU's memory, for
    its own copy of the weights, for keys and values, and for its work, and holds it until `close`. Raises RuntimeError,
    and holds nothing, where vLLM is not available or refuses the model.
    """

    def __init__(
        self, net: Net, folder: Path, *, slots: int, limit: int, longest: int, temperature: float, share: float
    ) -> None:
        problem = available()
        if not problem and (net.device.index or torch.distributed.is_initialized()):
            problem = "vLLM would write on the first GPU, and for one process only"
        if problem:
            raise RuntimeError(problem)
        self.net, self.room, self.temperature = net, longest + limit, temperature
        self._trained, self._versions = [item for _, item in net.trainable()], [-1]
        self._llm: Any = None
        os.environ.update(SET)
        logging.getLogger("vllm").setLevel(logging.ERROR)
        dtype = str(net.autocast or net.head.weight.dtype).removeprefix("torch.")
        quiet: dict[str, Any] = {"trust_remote_code": False, "disable_log_stats": True, "use_tqdm_on_load": False}
        sizes = {"max_model_len": self.room, "max_num_seqs": slots, "max_num_batched_tokens": max(BATCH, slots)}
        how = {"load_format": "dummy", "logprobs_mode": "processed_logprobs", "dtype": dtype, **quiet, **sizes}
        how |= {"skip_tokenizer_init": True, "enable_prefix_caching": True, "gpu_memory_utilization": share}
        with _unchanged():
            try:
                self._vllm: Any = import_module("vllm")
                self._llm = self._vllm.LLM(model=str(folder), **how)
                self.refresh()
            except Exception as error:  # vLLM's own code, and that of many kernels
                problem = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        if problem:  # no sooner: what the error has seen could not be given back
            self.close()
            raise RuntimeError(problem)

    @property
    def stale(self) -> bool:
        """Whether a trained weight was changed in place since the last `refresh`. Compares counters, not values."""
        return [item._version for item in self._trained] != self._versions

    def refresh(self) -> None:
        """Hand over the weights as they are now. Keys and values of prompts seen before are forgotten."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights(self.net)})
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM is still writing with the weights before")
        self._versions = [item._version for item in self._trained]

    def write(
        self,
        asks: Sequence[Ask],
        key: str | None,
        stops: Collection[int],
        limit: int,
        told: Told | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> list[Sample] | None:
        """The samples by ask, then by sample, as asked; None where `stopped` said so, looked at between tokens.

        Each has a seed of its own, and is the same in other company as far as the GPU's sums are. Without a key the
        likeliest tokens are taken, with their log-probabilities at temperature 1. What samples share of a prompt is
        computed once, but for the tokens that fill no page.
        """
        if any(len(ask.ids) + limit > self.room for ask in asks):
            raise ValueError(f"a prompt and its answer may have {self.room} tokens together")
        known = self.net.causal.get_input_embeddings().num_embeddings  # vLLM refuses to stop at tokens beyond
        more: dict[str, Any] = {"stop_token_ids": [token for token in sorted(stops) if token < known]}
        more |= {"ignore_eos": True, "detokenize": False, "logprobs": 0, "flat_logprobs": True, "max_tokens": limit}
        more["temperature"] = 0.0 if key is None else self.temperature
        wanted = [(ask, number) for ask in asks for number in ask.samples]
        prompts = [{"prompt_token_ids": list(ask.ids)} for ask, _ in wanted]
        how = [self._vllm.SamplingParams(seed=seed(key or "", ask.row, number), **more) for ask, number in wanted]
        engine, done, tokens = self._llm.llm_engine, [], 0
        begun = self._llm.enqueue(prompts, how, use_tqdm=False)
        while engine.has_unfinished_requests():
            if stopped is not None and stopped():
                engine.abort_request(begun, internal=True)
                return None
            ended = [output for output in engine.step() if output.finished]
            done += ended
            tokens += sum(len(output.outputs[0].token_ids) for output in ended)
            if told is not None:
                told(tokens, len(done))
        done.sort(key=lambda output: int(output.request_id))
        return [_sample(ask.row, number, output, stops) for (ask, number), output in zip(wanted, done, strict=True)]

    def close(self) -> None:
        """Give back the GPU's memory. Nothing can be written afterwards."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        if "vllm.distributed" in sys.modules:
            sys.modules["vllm.distributed"].cleanup_dist_env_and_memory()
        gc.collect()
        torch.cuda.empty_cache()


def seed(key: str, row: int, sample: int) -> int:
    """What a sample's random numbers follow from: 63 bits, for vLLM holds seeds as signed numbers."""
    return int.from_bytes(hashlib.blake2b(f"{key}:{row}:{sample}".encode(), digest_size=8).digest()) >> 1


@torch.no_grad()
def weights(net: Net) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model in training with its adapter merged in, one at a time by the names of their file.

    A tied one comes once, and a 4-bit one in the type it was quantised from. vLLM turns types and joins layers itself.
    """
    seen: set[int] = set()
    inside = "."
    for name, module in net.causal.named_modules():
        if name.startswith(inside):
            continue
        layer, whole = module, None
        if _mergeable(module):
            inside, layer, whole = f"{name}.", module.get_base_layer(), _merge(module)
        elif quantised.is_narrow(module):
            whole = quantised.dequantised(module)
        for label, item in layer.named_parameters(prefix=name, recurse=False):
            if id(item) not in seen:
                seen.add(id(item))
                yield label, item.detach() if whole is None or label != f"{name}.weight" else whole


def _sample(row: int, number: int, output: Any, stops: Collection[int]) -> Sample:
    """A sample out of what vLLM returns for a request: one answer, one log-probability for each of its tokens."""
    (written,) = output.outputs
    ids, logps = list(written.token_ids), list(written.logprobs.logprobs)
    if written.finish_reason not in ("stop", "length") or list(written.logprobs.token_ids) != ids:
        raise RuntimeError(f"vLLM ended an answer of {len(ids)} tokens with {written.finish_reason!r}")
    return Sample(row, number, ids, logps, ids[-1] in stops)


@contextmanager
def _unchanged() -> Iterator[None]:
    """What vLLM sets for the whole process stays as it was, and nothing is printed: some of its bars know no switch."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    sdp = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    devices = [0] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(sdp)
