"""Where TRL 1.16 gives rows, ours are the same ids and labels; every difference is listed here with its reason.

Differences on prompt/completion rows:
1. The line break that ChatML writes after the stop token: TRL trains on it, we read it and do not train on it. At
   inference generation ends with the stop token, so nothing after it is ever asked of the model.
Differences on rows of messages:
2. TRL by default trains on all turns (assistant_only_loss=False); we train on the assistant's alone.
3. ShareGPT's role names (human, gpt) are left in place by TRL and rendered as roles no model knows; we map them.
"""

import pytest

from tunesmith.executors.kernel.data import encode_many, prepare
from tunesmith.orchestrator.nouns import DataSource

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MAX_LENGTH = 160  # some of the rows are longer, so truncation is compared too


@pytest.fixture(scope="module")
def trl_rows(smollm2, tmp_path_factory):
    """TRL's own preparation: rows in, (ids, labels) out."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    import torch
    import transformers
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=len(smollm2),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config)

    def rows(found, max_length=MAX_LENGTH):
        args = SFTConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            max_length=max_length,
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
        )
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=datasets.Dataset.from_list(found), processing_class=smollm2
        )
        return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]

    return rows


@pytest.fixture(scope="module")
def gsm8k(real):
    from tunesmith.orchestrator.nouns import EvalSpec, JobSpec, ModelRef

    source = DataSource(source=str(real / "gsm8k_train.jsonl"), limit=100)
    return prepare(JobSpec(model=ModelRef(id="m"), data=(source,), eval=EvalSpec(fraction=0))).train


def test_gsm8k_as_messages_of_prompt_and_completion(trl_rows, gsm8k, smollm2):
    theirs = trl_rows(
        [
            {
                "prompt": [{"role": "user", "content": example.prompt}],
                "completion": [{"role": "assistant", "content": example.completion}],
            }
            for example in gsm8k
        ]
    )
    ours = list(encode_many(gsm8k, smollm2, MAX_LENGTH))
    assert len(theirs) == len(ours) == 100
    line_break = smollm2.encode("\n", add_special_tokens=False)
    whole = 0
    for (ids, labels), encoded in zip(theirs, ours, strict=True):
        assert encoded.ids == ids
        if encoded.truncated and ids[-1] != smollm2.eos_token_id:
            assert encoded.labels == labels
        elif not encoded.truncated:
            whole += 1
            assert labels[-1:] == line_break, "difference 1"
            assert encoded.labels == [*labels[:-1], -100]
    assert 10 < whole < 90


def test_plain_prompt_and_completion(trl_rows, gsm8k, smollm2):
    """Without a chat template the two are concatenated as they are, in both."""
    template, smollm2.chat_template = smollm2.chat_template, None
    try:
        theirs = trl_rows([{"prompt": row.prompt, "completion": "\n" + row.completion} for row in gsm8k])
        from dataclasses import replace

        ours = list(encode_many([replace(row, completion="\n" + row.completion) for row in gsm8k], smollm2, MAX_LENGTH))
    finally:
        smollm2.chat_template = template
    assert [(encoded.ids, encoded.labels) for encoded in ours] == theirs


def test_text(trl_rows, gsm8k, smollm2):
    from tunesmith.executors.kernel.data import Example

    theirs = trl_rows([{"text": row.prompt} for row in gsm8k])
    ours = encode_many([Example(row.row, text=row.prompt) for row in gsm8k], smollm2, MAX_LENGTH)
    assert [(encoded.ids, encoded.labels) for encoded in ours] == theirs


def test_conversations(trl_rows, smollm2):
    from tunesmith.executors.kernel.data import Example, Message

    texts = ["one?", "One.", "two?", "Two."]
    turns = [Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]
    ((ids, labels),) = trl_rows([{"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}])
    (encoded,) = encode_many([Example(0, messages=tuple(turns))], smollm2, MAX_LENGTH)
    assert encoded.ids == ids
    assert labels == ids, "difference 2"
    trained = [token for token in encoded.labels if token != -100]
    assert smollm2.decode(trained) == "One.<|im_end|>Two.<|im_end|>"


def test_sharegpt_roles(trl_rows, smollm2):
    row = {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "One."}]}
    ((ids, _),) = trl_rows([row])
    assert "<|im_start|>human" in smollm2.decode(ids), "difference 3"
    from tunesmith.executors.kernel.data import Row, convert, detect

    _, mapping = detect([row])
    (encoded,) = encode_many([convert(Row(0, "r:1", row), mapping)], smollm2, MAX_LENGTH)
    assert "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>" in smollm2.decode(encoded.ids)
