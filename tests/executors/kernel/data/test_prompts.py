"""A prompt is what the model reads before it answers, and what reward functions are told of a row."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.data import Example, Message, Prompt, Row, convert, encode_prompts, prepare
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DataSource, Mapping

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
EACH = "{% for m in messages %}"
END = "{% endfor %}"
DROPPING = EACH + "{% if m.role != 'system' %}" + TURN + "{% endif %}" + END + ASKED
FORGETFUL = EACH + TURN.replace("m.content", "m.content.split('</think>')[-1]") + END + ASKED


def talk(*said, **extra):
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = tuple(Message(roles[who], text) for who, text in said)
    return Example(3, messages=messages, extra=extra, context=len(messages))


def one(example, tokenizer, max_prompt=None):
    (found,) = encode_prompts([example], tokenizer, max_prompt)
    if isinstance(found, InputError):
        raise found
    return found


def fails(code, example, tokenizer, max_prompt=None):
    with pytest.raises(InputError) as caught:
        one(example, tokenizer, max_prompt)
    assert caught.value.code == f"data.{code}"
    assert caught.value.where == "row 3"
    return caught.value


def test_a_text_is_a_users_turn_for_a_chat_model(small):
    tokenizer = small()
    prompt = one(Example(3, prompt="two and two", extra={"answer": "four", "level": 1}), tokenizer)
    assert tokenizer.decode(prompt.ids) == "<|im_start|>user\ntwo and two<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.prompt == [{"role": "user", "content": "two and two"}]
    assert prompt.columns == {"answer": "four", "level": 1}
    assert prompt.row == 3
    assert one(talk(("u", "two and two"), answer="four", level=1), tokenizer) == prompt


def test_a_text_stays_a_text_where_there_is_no_chat_template(small):
    tokenizer = small(template=None)
    prompt = one(Example(3, prompt="two and two"), tokenizer)
    assert prompt == Prompt(3, tokenizer("two and two")["input_ids"], "two and two", {})
    fails("no_chat_template", talk(("u", "q")), tokenizer)


def test_what_a_tokenizer_adds_by_itself(small):
    """Before a plain text, and never before what a chat template wrote."""
    from tokenizers import processors

    for template in (None, EACH + TURN + END + ASKED):
        tokenizer = small(template, special=("<s>",))
        first = tokenizer.convert_tokens_to_ids("<s>")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", first)]
        )
        assert (one(Example(3, prompt="q"), tokenizer).ids[0] == first) == (template is None)


def test_system_turns_and_earlier_rounds(small):
    tokenizer = small()
    example = talk(("s", "be brief"), ("u", "one"), ("a", "first"), ("u", "two"))
    prompt = one(example, tokenizer)
    assert [turn["role"] for turn in prompt.prompt] == ["system", "user", "assistant", "user"]
    assert prompt.ids == tokenizer.apply_chat_template(prompt.prompt, add_generation_prompt=True)["input_ids"]


def test_templates_may_forget_earlier_reasoning_and_no_turn(small):
    example = talk(("u", "one"), ("a", "<think>hm</think>first"), ("u", "two"))
    tokenizer = small(FORGETFUL)
    assert "hm" not in tokenizer.decode(one(example, tokenizer).ids)
    fails("template_drops_turn", talk(("s", "be brief"), ("u", "one")), small(DROPPING))
    fails("template_refused", talk(("u", "one")), small("{{ 1 / 0 }}"))


def test_a_long_prompt_is_dropped_and_never_cut(small):
    tokenizer = small()
    whole = one(Example(3, prompt="two and two"), tokenizer)
    assert one(Example(3, prompt="two and two"), tokenizer, len(whole.ids)) == whole
    error = fails("prompt_too_long", Example(3, prompt="two and two"), tokenizer, len(whole.ids) - 1)
    assert f"{len(whole.ids)} tokens" in error.why


def test_what_is_no_prompt(small):
    tokenizer = small()
    for example in (
        *(Example(3), Example(3, prompt=""), Example(3, text="a"), Example(3, prompt="a", completion="b")),
        *(talk(), talk(("s", "be brief")), talk(("u", "q"), ("a", "b"))),
    ):
        fails("no_prompt", example, tokenizer)
    fails("no_prompt", Example(3, prompt=""), small(template=None))


def test_many_in_order_with_errors_in_their_place(small):
    tokenizer = small()
    examples = [Example(number, prompt=f"q{number}", extra={"n": number}) for number in range(600)]
    examples[100] = Example(100, prompt="q" * 100)
    found = list(encode_prompts(iter(examples), tokenizer, 64))
    assert len(found) == 600
    assert [at for at, item in enumerate(found) if isinstance(item, InputError)] == [100]
    assert [found[at] for at in (0, 255, 256, 599)] == [one(examples[at], tokenizer) for at in (0, 255, 256, 599)]
    assert found[599].columns == {"n": 599}


def test_kept_columns_have_their_own_names(write, make_spec):
    path = write("p.jsonl", [{"Question": "2+2?", "Final Answer": "4", "id": 7}])
    mapping = Mapping(kind="prompt-only", columns={"prompt": "Question"}, keep=("Final Answer", "id"))
    (example,) = prepare(make_spec(DataSource(source=path, mapping=mapping), method="grpo", fraction=0)).train
    assert example.extra == {"Final Answer": "4", "id": 7}


TEXTS = st.lists(
    st.sampled_from(["and", " two", "\n", " ", "<|im_end|>", "<|im_start|>", "é", "\N{GRINNING FACE}"]), min_size=1
).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@pytest.mark.parametrize("template", [EACH + TURN + END + ASKED, DROPPING, None], ids=["chatml", "drops", "plain"])
def test_any_prompt_reads_as_it_was_written_or_is_an_input_error(small, template):
    tokenizer = small(template)
    made = []

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(TEXTS | st.lists(TEXTS, max_size=4), st.none() | TEXTS, st.integers(1, 60))
    def hold(asked, system, max_prompt):
        value = asked
        if isinstance(asked, list):
            value = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(asked)]
        row = {"prompt": value, "system": system}
        columns = {"prompt": "prompt", "system": "system"}
        try:
            example = convert(Row(0, "r:1", row), Mapping(kind="prompt-only", columns=columns, keep=("system",)))
        except InputError:
            return
        (prompt,) = encode_prompts([example], tokenizer, max_prompt)
        if isinstance(prompt, InputError):
            assert prompt.code in {
                *("data.prompt_too_long", "data.template_drops_turn", "data.no_chat_template"),
            }
            return
        made.append(prompt)
        assert 0 < len(prompt.ids) <= max_prompt
        assert prompt.columns == {"system": system}
        read = tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False)
        if isinstance(prompt.prompt, str):
            assert read == prompt.prompt
        else:
            assert read == tokenizer.apply_chat_template(prompt.prompt, tokenize=False, add_generation_prompt=True)
            assert prompt.prompt[-1]["role"] == "user"

    hold()
    assert len(made) > 10


# --- TRL 1.16's own tokenisation, and what it tells reward functions -------------------------------------------------


@pytest.fixture(scope="module")
def trl_prompts(smollm2, tmp_path_factory):
    """TRL's own trainer over rows: the ids of all prompts, and what a reward function is told of the first three."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=len(smollm2),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )

    def told(rows):
        seen = []

        def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
            seen.append((prompts, columns))
            return [float(number) for number in range(len(prompts))]

        few = rows[:3]
        trainer = GRPOTrainer(
            model=transformers.LlamaForCausalLM(config),
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")),
                per_device_train_batch_size=2 * len(few),
                num_generations=2,
                max_completion_length=2,
                max_steps=1,
                shuffle_dataset=False,
                use_cpu=True,
                bf16=False,
                report_to="none",
                gradient_checkpointing=False,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(few),
            processing_class=smollm2,
        )
        trainer.train()
        ((prompts, columns),) = seen
        assert len(prompts) == 2 * len(few), "every prompt twice, for two completions"
        ids, _, _ = trainer._tokenize_prompts([row["prompt"] for row in rows])
        told = [(prompts[2 * at], {name: each[2 * at] for name, each in columns.items()}) for at in range(len(few))]
        return ids, told

    return told


def trl(test):
    return pytest.mark.slow(pytest.mark.filterwarnings("ignore")(test))


@pytest.fixture(scope="module")
def questions(real):
    from tunesmith.orchestrator.nouns import EvalSpec, JobSpec, ModelRef

    source = DataSource(source=str(real / "gsm8k_train.jsonl"), limit=200)
    return prepare(JobSpec(model=ModelRef(id="m"), data=(source,), method="grpo", eval=EvalSpec(fraction=0))).train


def check(theirs, prompts):
    ids, told = theirs
    assert [prompt.ids for prompt in prompts] == ids
    assert [(prompt.prompt, prompt.columns) for prompt in prompts[: len(told)]] == told


@trl
def test_real_questions_are_trls(trl_prompts, questions, smollm2):
    """GSM8K as users' turns: the same ids, and reward functions are told the same."""
    rows = [{"prompt": [{"role": "user", "content": row.prompt}], **row.extra} for row in questions]
    assert set(rows[0]) == {"prompt", "answer"}
    check(trl_prompts(rows), list(encode_prompts(questions, smollm2, 512)))


@trl
def test_conversations_are_trls(trl_prompts, smollm2):
    examples = [
        talk(("s", "be brief"), ("u", "one?"), ("a", "1"), ("u", "two?"), answer="2"),
        talk(("u", "one?"), answer=" "),
    ]
    rows = [
        {
            "prompt": [{"role": turn.role, "content": turn.content} for turn in example.messages],
            **example.extra,
        }
        for example in examples
    ]
    check(trl_prompts(rows), list(encode_prompts(examples, smollm2, None)))


@trl
def test_plain_texts_are_trls(trl_prompts, questions, smollm2):
    template, smollm2.chat_template = smollm2.chat_template, None
    try:
        theirs = trl_prompts([{"prompt": row.prompt, **row.extra} for row in questions])
        check(theirs, list(encode_prompts(questions, smollm2, 512)))
    finally:
        smollm2.chat_template = template


@trl
def test_text_meets_a_chat_model(trl_prompts, smollm2):
    """TRL gives the model plain text, and reward functions a text (difference 1)."""
    text = "What is the capital of France?"
    (ids,), told = trl_prompts([{"prompt": text}])
    assert (smollm2.decode(ids), told) == (text, [(text, {})])
    ours = one(Example(3, prompt=text), smollm2)
    assert ours.prompt == [{"role": "user", "content": text}]
    assert smollm2.decode(ours.ids).endswith(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
