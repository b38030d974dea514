"""Tiny random models with a tokenizer of bytes, rows for every method of TRL's, and runs over them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tunesmith.executors.kernel import rewards
from tunesmith.executors.kernel.control import Control
from tunesmith.executors.kernel.data import prepare
from tunesmith.executors.kernel.loops import model as models
from tunesmith.executors.kernel.loops import trl
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.events import Kind, decode
from tunesmith.orchestrator.nouns import (
    AdapterSpec,
    DataSource,
    DistillSpec,
    EvalSpec,
    GrpoSpec,
    JobSpec,
    ModelRef,
    TrainSpec,
)

CPU = torch.device("cpu")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _model(folder: Path, *, seed: int = 0, template: str | None = CHATML, **shape):
    """A folder with a tiny random Llama and a tokenizer of bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(kinds.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(name, special=True) for name in ("<|pad|>", "<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|pad|>", eos_token="<|im_end|>")
    if template:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        **shape,
    }
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory):
    """Makes a folder with a model; the template and the shape may be others."""

    def make(name: str, **more):
        return _model(tmp_path_factory.mktemp(name), **more)

    return make


@pytest.fixture(scope="session")
def student(make_folder):
    return make_folder("student")


@pytest.fixture(scope="session")
def teacher(make_folder):
    return make_folder("teacher", seed=1, hidden_size=48, num_hidden_layers=1)


@pytest.fixture
def chatml():
    """The template of the tiny models."""
    return CHATML


@pytest.fixture
def rows_for():
    """22 rows for each method."""
    return ROWS


ROWS = {
    "kto": [{"prompt": f"Say {n}.", "completion": f"{n}!" * (1 + n % 3), "label": n % 3 > 0} for n in range(22)],
    "reward": [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"No {n % 5}!!"} for n in range(22)],
    "rloo": [{"question": f"Say {n}.", "answer": str(n)} for n in range(22)],
    "distill": [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(22)],
}


@dataclass
class Bench:
    """A run with the folder it writes to."""

    engine: trl.TrlEngine
    folder: Path
    reporter: Reporter
    tokenizer: object

    def events(self, kind: Kind | None = None) -> list:
        lines = (self.folder / "events.jsonl").read_bytes().splitlines()
        return [event for event in map(decode, lines) if event is not None and kind in (None, event.kind)]

    def series(self, key: str) -> dict[int, float]:
        return {event.step: event.values[key] for event in self.events(Kind.METRIC) if key in event.values}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: item.detach().clone() for name, item in self.engine.net.trainable()}

    def folders(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").iterdir())

    def tell_after(self, step: int | None, signal: str = "stop") -> None:
        """Tell the run something when the figures of a step are in."""
        logged = self.engine.logged

        def tell(at, figures):
            logged(at, figures)
            if at == step:
                self.tell(signal)

        self.engine.logged = tell

    def tell(self, signal: str, serial: int = 1) -> None:
        (self.folder / "control").write_text(json.dumps({"signal": signal, "serial": serial}))


REWARDS = """
SEEN = []

def short(completions, prompts, answer, trainer_state, log_metric, **columns):
    SEEN.append((trainer_state.global_step, [turns[-1]["content"] for turns in prompts], list(answer)))
    log_metric("letters", sum(len(turns[0]["content"]) for turns in completions) / len(completions))
    return [-len(turns[0]["content"]) / 8 for turns in completions]

async def vowels(completions, **columns):
    texts = [turns[0]["content"] for turns in completions]
    return [None if len(text) % 5 == 0 else float(sum(letter in "aeiou" for letter in text)) for text in texts]
"""


@pytest.fixture
def make_spec(tmp_path, student, teacher):
    """A resolved spec of a method over its rows."""

    def make(method, *, rows=None, source=None, model=None, adapter=None, train=None, grpo=None, eval=0.1, **more):
        if source is None:
            source = tmp_path / f"{method}.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[method]))
        scorer = tmp_path / "scorer.py"
        scorer.write_text(REWARDS)
        rewarded = (f"{scorer}:short", f"0.5*{scorer}:vowels")
        chosen = {
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "max_length": 96,
            "effective_batch": 4,
            "micro_batch": 2,
            "packing": False,
            "dtype": "float32",
            "optimizer": "adamw",
            "activation_checkpointing": False,
            "save_steps": 4,
            "eval_steps": 3,
            "max_steps": 6,
            **(train or {}),
        }
        fitted = {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": ("all-linear",), **(adapter or {})}
        taught = {"num_generations": 2, "max_completion": 8, "beta": 0.05, "rewards": rewarded, **(grpo or {})}
        return JobSpec(
            model=ModelRef(id=str(model or student)),
            data=(DataSource(source=str(source)),),
            eval=EvalSpec(fraction=eval),
            method=method,
            adapter=AdapterSpec(**fitted),
            train=TrainSpec(**chosen),
            grpo=GrpoSpec(**taught),
            distill=DistillSpec(teacher=str(teacher), max_completion=8),
            **more,
        )

    return make


@pytest.fixture
def make_rows(make_spec):
    """The rows of a method as its trainer reads them, without a model."""

    def make(method, **more):
        from transformers import AutoTokenizer

        spec = make_spec(method, eval=0.0, **more)
        return trl.tables(spec, prepare(spec), AutoTokenizer.from_pretrained(spec.model.id))

    return make


@pytest.fixture
def bench(tmp_path, make_spec, teacher):
    """A run of a method over its rows, in a folder of its own."""
    open_reporters = []

    def make(method, *, name="a", **more):
        from transformers import AutoTokenizer

        spec = make_spec(method, **more)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(spec.model.id)
        net = models.load(Path(spec.model.id), spec, CPU)
        reporter = Reporter(folder, 1)
        open_reporters.append(reporter)
        engine = trl.TrlEngine(
            net,
            trl.tables(spec, prepare(spec), tokenizer),
            spec,
            tokenizer,
            reporter=reporter,
            control=Control(folder / "control"),
            checkpoints=folder / "checkpoints",
            facts={"attempt": 1, "spec_hash": "0"},
            task={"data": "d", "method": method},
            rewards=rewards.load(spec) if method == "rloo" else None,
            teacher=trl.load_teacher(teacher, spec, net, tokenizer) if method == "distill" else None,
        )
        return Bench(engine, folder, reporter, tokenizer)

    yield make
    for reporter in open_reporters:
        reporter.__exit__()
