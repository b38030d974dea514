"""Ids are the tokenizer's own; labels cover the answers and their stop tokens, and nothing else."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.data import Encoded, Example, Message, encode, encode_many, prepare, stop_tokens
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DataSource

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
EACH = "{% for m in messages %}"
END = "{% endfor %}"

# The way Qwen3 writes turns: reasoning only in the last answer, and an empty one where it has none.
THINKING = (
    EACH + "{% set said = m.content.split('</think>')[-1].strip() %}{% set thought = '' %}"
    "{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() %}{% endif %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + said + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endif %}" + END + ASKED
)
LLAMA2 = (
    EACH + "{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}{% else %}{{ raise_exception('no system turn') }}"
    "{% endif %}" + END
)
ENDLESS = EACH + "{{ m.role + ': ' + m.content + '\n' }}" + END + "{% if add_generation_prompt %}assistant: {% endif %}"
CHANGING = "{{ messages | length }}" + EACH + TURN + END + ASKED
DROPPING = EACH + "{% if m.role != 'tool' %}" + TURN + "{% endif %}" + END + ASKED
SHOUTING = EACH + TURN.replace("m.content", "(m.content | upper if m.role == 'assistant' else m.content)") + END + ASKED
THOUGHTFUL = EACH + TURN + END + ASKED.replace("assistant\n", "assistant\n<think>\n")
OWN_MARKS = EACH + "{{ '<o>' + m.content + '<c>' }}" + END + "{% if add_generation_prompt %}<o>{% endif %}"


def talk(*texts, context=0, first="user"):
    names = ("user", "assistant") if first == "user" else ("system", "user", "assistant")
    roles = [first] if first == "system" else []
    while len(roles) < len(texts):
        roles.append("user" if not roles or roles[-1] != "user" else "assistant")
    assert set(roles) <= set(names)
    return Example(3, messages=tuple(map(Message, roles, texts)), context=context)


def as_dicts(example):
    return [{"role": message.role, "content": message.content} for message in example.messages]


def supervised(encoded, tokenizer):
    """The runs of supervised tokens, decoded."""
    runs, run = [], []
    for token, label in zip(encoded.ids, encoded.labels, strict=True):
        assert label in (-100, token)
        if label != -100:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs + ([tokenizer.decode(run)] if run else [])


def fails(code, example, tokenizer, max_length=None):
    with pytest.raises(InputError) as caught:
        encode(example, tokenizer, max_length)
    assert caught.value.code == f"data.{code}"
    assert caught.value.where == "row 3"


def test_one_answer(small):
    tokenizer = small()
    example = talk("two and two", "four")
    encoded = encode(example, tokenizer, None)
    assert encoded.ids == tokenizer.apply_chat_template(as_dicts(example), tokenize=True)["input_ids"]
    assert supervised(encoded, tokenizer) == ["four<|im_end|>"]
    assert (encoded.row, encoded.truncated) == (3, False)


def test_the_line_break_after_the_stop_token_is_read_and_not_trained(small):
    tokenizer = small()
    encoded = encode(talk("a", "b"), tokenizer, None)
    assert tokenizer.decode(encoded.ids).endswith("b<|im_end|>\n")
    assert encoded.labels[-1] == -100
    assert encoded.labels[-2] == tokenizer.eos_token_id


def test_every_answer_of_a_conversation(small):
    tokenizer = small()
    example = talk("be brief", "one", "first", "two", "second", first="system")
    assert supervised(encode(example, tokenizer, None), tokenizer) == ["first<|im_end|>", "second<|im_end|>"]


def test_answers_in_the_context_are_not_trained_on(small):
    tokenizer = small()
    example = talk("one", "first", "two", "second", context=3)
    assert supervised(encode(example, tokenizer, None), tokenizer) == ["second<|im_end|>"]


def test_prompt_and_completion_are_one_user_and_one_assistant_turn(small):
    tokenizer = small()
    assert encode(Example(3, prompt="a", completion="b"), tokenizer, None) == encode(talk("a", "b"), tokenizer, None)


def test_without_a_chat_template_prompt_and_completion_are_plain_text(small):
    tokenizer = small(template=None)
    encoded = encode(Example(3, prompt="The sky is", completion=" blue."), tokenizer, None)
    assert tokenizer.decode(encoded.ids) == "The sky is blue.<|im_end|>"
    assert supervised(encoded, tokenizer) == [" blue.<|im_end|>"]
    fails("no_chat_template", talk("a", "b"), tokenizer)


def test_text_is_trained_on_as_a_whole_and_ended_once(small):
    tokenizer = small(template=None)
    for text in ("some words", "some words<|im_end|>"):
        encoded = encode(Example(3, text=text), tokenizer, None)
        assert encoded.labels == encoded.ids
        assert tokenizer.decode(encoded.ids) == "some words<|im_end|>"


def test_a_token_over_the_boundary_is_not_trained_on(small):
    tokenizer = small(template=None)
    whole = tokenizer.tokenize("and")
    assert len(whole) == 1, "the tokenizer was trained to have this word as one token"
    encoded = encode(Example(3, prompt="an", completion="d four"), tokenizer, None)
    assert supervised(encoded, tokenizer) == [" four<|im_end|>"]


def test_an_emoji_of_several_tokens_is_trained_on_whole(small):
    tokenizer = small()
    text = "ok \N{GRINNING FACE}\N{VARIATION SELECTOR-16} é"
    assert supervised(encode(talk("\N{GRINNING FACE}", text), tokenizer, None), tokenizer) == [text + "<|im_end|>"]


def test_reasoning_templates(small):
    tokenizer = small(THINKING)
    example = talk("one", "<think>hm</think>first", "two", "<think>well</think>second")
    runs = supervised(encode(example, tokenizer, None), tokenizer)
    assert runs == ["first<|im_end|>", "<think>\nwell\n</think>\n\nsecond<|im_end|>"]
    assert supervised(encode(talk("one", "think"), tokenizer, None), tokenizer) == [
        "<think>\n\n</think>\n\nthink<|im_end|>"
    ]


def test_a_template_with_the_end_of_sequence_as_stop(small):
    tokenizer = small(LLAMA2, eos="</s>", special=("<s>",))
    runs = supervised(encode(talk("one", "first", "two", "second"), tokenizer, None), tokenizer)
    assert [run.strip() for run in runs] == ["first </s>", "second </s>"]
    fails("template_refused", talk("be", "one", "first", first="system"), tokenizer)


def test_the_stop_token_must_end_generation(small):
    base = small(eos="<|endoftext|>")
    assert supervised(encode(talk("a", "b"), base, None), base) == ["b<|im_end|>"], "a known end of turn"
    own = small(OWN_MARKS, eos="<|endoftext|>", special=("<o>", "<c>"))
    fails("no_stop_token", talk("a", "b"), own)
    fails("no_stop_token", talk("a", "b"), small(ENDLESS))
    fails("no_stop_token", Example(3, text="a"), small(template=None, eos=None))


def test_generation_config_names_stop_tokens(small, tmp_path):
    import transformers

    tokenizer = small(special=("<c>",))
    number = tokenizer.convert_tokens_to_ids("<c>")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{number}]}}')
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert stop_tokens(loaded) == {number, tokenizer.eos_token_id}
    (tmp_path / "generation_config.json").write_text("broken")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert stop_tokens(again) == {tokenizer.eos_token_id}


def test_templates_that_cannot_be_labelled(small):
    fails("template_not_prefix", talk("a", "b"), small(CHANGING))
    fails("template_not_prefix", talk("a", "b"), small(THOUGHTFUL))
    said = [("user", "q"), ("assistant", "f"), ("tool", "it is 3"), ("assistant", "3")]
    example = Example(3, messages=tuple(Message(role, text) for role, text in said))
    fails("template_drops_turn", example, small(DROPPING))
    fails("template_changes_text", talk("q", "word"), small(SHOUTING))
    fails("template_refused", talk("a", "b"), small("{{ 1 / 0 }}"))


def test_stop_tokens_inside_an_answer_do_not_end_it(small):
    tokenizer = small()
    runs = supervised(encode(talk("q", "one<|im_end|>two"), tokenizer, None), tokenizer)
    assert runs == ["one<|im_end|>two<|im_end|>"]


def test_truncation_keeps_the_start_and_drops_rows_without_an_answer(small):
    tokenizer = small()
    example = talk("q", "the answer is four")
    whole = encode(example, tokenizer, None)
    first = next(index for index, label in enumerate(whole.labels) if label != -100)
    cut = encode(example, tokenizer, first + 1)
    assert cut == Encoded(3, whole.ids[: first + 1], whole.labels[: first + 1], truncated=True)
    fails("no_supervised_tokens", example, tokenizer, first)
    assert encode(example, tokenizer, len(whole.ids)) == whole


def test_there_must_be_something_to_train_on(small):
    fails("nothing_to_train", Example(3, prompt="q"), small())
    fails("nothing_to_train", talk("q"), small())


def test_many_in_order_with_errors_in_their_place(small):
    tokenizer = small()
    examples = [Example(number, prompt=f"q{number}", completion="a") for number in range(600)]
    examples[100] = Example(100, prompt="q")
    found = list(encode_many(iter(examples), tokenizer, 64))
    assert len(found) == 600
    assert isinstance(found[100], InputError)
    assert found[:3] + found[598:] == [encode(examples[n], tokenizer, 64) for n in (0, 1, 2, 598, 599)]


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError) as caught:
        encode(talk("a", "b"), Slow(), None)
    assert caught.value.code == "data.slow_tokenizer"


@pytest.mark.parametrize("template", [None, THINKING, LLAMA2], ids=["chatml", "thinking", "llama2"])
def test_only_answers_are_ever_trained_on(small, template):
    """For any conversation: the supervised runs are the answers with their stop tokens, in order."""
    if template is LLAMA2:
        tokenizer, stop = small(template, eos="</s>", special=("<s>",)), "</s>"
    else:
        tokenizer, stop = small(template) if template else small(), "<|im_end|>"
    texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    def hold(rounds):
        example = talk(*(text for pair in rounds for text in pair))
        encoded = encode(example, tokenizer, None)
        whole = tokenizer.apply_chat_template(as_dicts(example), tokenize=False)
        assert encoded.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
        runs = supervised(encoded, tokenizer)
        assert len(runs) == len(rounds)
        for run, (_, answer) in zip(runs, rounds, strict=True):
            spoken = run.removesuffix(stop)
            assert spoken != run
            assert spoken.strip() in ("<think>\n\n</think>\n\n" + answer.strip(), answer.strip())

    hold()


def test_gsm8k_answers_are_what_is_trained_on(real, smollm2, make_spec):
    """The real model on real rows: the supervised tokens decode to the answer and its end, nothing more."""
    source = DataSource(source=str(real / "gsm8k_train.jsonl"), limit=200)
    prepared = prepare(make_spec(source, fraction=0))
    for example, encoded in zip(prepared.train, encode_many(prepared.train, smollm2, 1024), strict=True):
        assert supervised(encoded, smollm2) == [example.completion + "<|im_end|>"]
