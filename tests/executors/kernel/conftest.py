"""A tiny model with its tokenizer, a little data, and attempts over them in a home's layout."""

import json

import pytest

from tunesmith.orchestrator.nouns import AdapterSpec, Attempt, DataSource, EvalSpec, JobSpec, ModelRef, TrainSpec
from tunesmith.orchestrator.plain import plain

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a tiny random Llama and a tokenizer of bytes with a chat template."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(name, special=True) for name in ("<|pad|>", "<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "max_position_embeddings": 256,
    }
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(str(folder))
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def attempt(tmp_path, tiny_model, data):
    """Writes attempt.json in a home's layout and returns the attempt's folder."""

    def make(number=1, *, train=None, adapter=None, resume_from=None, fingerprint=None, **spec):
        chosen = {
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "max_length": 96,
            "effective_batch": 4,
            "micro_batch": 2,
            "packing": True,
            "dtype": "float32",
            "optimizer": "adamw",
            "activation_checkpointing": False,
            "save_steps": 2,
            "eval_steps": 3,
            "max_steps": 6,
            **(train or {}),
        }
        fitted = {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": ("all-linear",), **(adapter or {})}
        doc = JobSpec(
            **{
                "model": ModelRef(id=str(tiny_model)),
                "data": (DataSource(source=str(data)),),
                "eval": EvalSpec(fraction=0.1),
                "adapter": AdapterSpec(**fitted),
                "train": TrainSpec(**chosen),
                **spec,
            }
        )
        folder = tmp_path / "home" / "jobs" / "j-aaaaaa" / "attempts" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        noun = Attempt(
            job="j-aaaaaa",
            number=number,
            spec=doc,
            plan_hash="p",
            data_fingerprint=fingerprint,
            resume_from=resume_from,
        )
        (folder / "attempt.json").write_text(json.dumps(plain(noun)))
        return folder

    return make
