"""A pair is one prompt and two answers that continue it; what is scored is the assistant's, and nothing else."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.data import Example, Message, Pair, Row, convert, encode, encode_pairs
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import Mapping

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
EACH = "{% for m in messages %}"
END = "{% endfor %}"
ENDLESS = EACH + "{{ m.role + ': ' + m.content + '\n' }}" + END + "{% if add_generation_prompt %}assistant: {% endif %}"
CHANGING = "{{ messages | length }}" + EACH + TURN + END + ASKED
DROPPING = EACH + "{% if m.role != 'system' %}" + TURN + "{% endif %}" + END + ASKED
REASONING = (
    EACH + "{% set said = m.content.split('</think>')[-1].strip() %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + said + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endif %}" + END + ASKED
)
TRIMMING = EACH + TURN.replace("m.content", "m.content | trim") + END + ASKED


def text_pair(chosen, rejected, prompt="q", row=3):
    return Example(row, prompt=prompt, extra={"chosen": chosen, "rejected": rejected})


def turns(*said):
    """Messages from ("u", text), ("a", text), ("s", text)."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return tuple(Message(roles[who], text) for who, text in said)


def talk_pair(before, chosen, rejected, row=3):
    return Example(row, messages=before, extra={"chosen": chosen, "rejected": rejected}, context=len(before))


def one(example, tokenizer, max_length=None):
    (found,) = encode_pairs([example], tokenizer, max_length)
    if isinstance(found, InputError):
        raise found
    return found


def scored(pair, tokenizer):
    """The scored tokens of chosen and of rejected, decoded, runs apart."""
    texts = []
    for ids, silent in zip((pair.chosen, pair.rejected), pair.unscored, strict=True):
        runs, run = [], []
        for place, token in enumerate(ids):
            if place in silent:
                runs, run = [*runs, run], []
            else:
                run.append(token)
        texts.append([tokenizer.decode(each) for each in [*runs, run] if each])
    return tuple(texts)


def fails(code, example, tokenizer, max_length=None):
    with pytest.raises(InputError) as caught:
        one(example, tokenizer, max_length)
    assert caught.value.code == f"data.{code}"
    assert caught.value.where == "row 3"
    return caught.value


def test_a_pair_is_a_prompt_and_two_answers_with_their_stop_tokens(small):
    tokenizer = small()
    pair = one(text_pair("four", "the answer"), tokenizer)
    assert tokenizer.decode(pair.prompt) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.chosen) == "four<|im_end|>", "the template's line break is left out"
    assert tokenizer.decode(pair.rejected) == "the answer<|im_end|>"
    assert (pair.row, pair.truncated, pair.unscored) == (3, False, ((), ()))


def test_text_and_turns_are_the_same_pair_for_a_chat_model(small):
    tokenizer = small()
    spoken = talk_pair(turns(("u", "q")), turns(("a", "four")), turns(("a", "two")))
    assert one(spoken, tokenizer) == one(text_pair("four", "two"), tokenizer)


def test_system_turns_and_earlier_rounds_are_prompt(small):
    tokenizer = small()
    before = turns(("s", "be brief"), ("u", "one"), ("a", "first"), ("u", "two"))
    pair = one(talk_pair(before, turns(("a", "good")), turns(("a", "bad"))), tokenizer)
    asked = [{"role": turn.role, "content": turn.content} for turn in before]
    assert pair.prompt == tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert scored(pair, tokenizer) == (["good<|im_end|>"], ["bad<|im_end|>"])


def test_answers_that_begin_alike_keep_their_beginning(small):
    """What the answers share is scored on both sides: losses that take means or one side alone need it."""
    tokenizer = small()
    pair = one(text_pair("the answer is four", "the answer is two"), tokenizer)
    assert scored(pair, tokenizer) == (["the answer is four<|im_end|>"], ["the answer is two<|im_end|>"])


def test_of_answers_with_several_turns_only_the_assistants_are_scored(small):
    tokenizer = small()
    before = turns(("u", "one"))
    chosen = turns(("a", "first"), ("u", "more"), ("a", "second"))
    pair = one(talk_pair(before, chosen, turns(("a", "no"))), tokenizer)
    assert scored(pair, tokenizer) == (["first<|im_end|>", "second<|im_end|>"], ["no<|im_end|>"])
    said = [{"role": turn.role, "content": turn.content} for turn in before + chosen]
    whole = tokenizer.apply_chat_template(said, tokenize=False)
    assert tokenizer.decode(pair.prompt + pair.chosen) + "\n" == whole


def test_sides_that_part_at_a_users_turn(small):
    """The transcript's own shape: the prompt ends with an answer, and what users say next differs."""
    tokenizer = small()
    before = turns(("u", "one"), ("a", "first"))
    pair = one(
        talk_pair(before, turns(("u", "and two"), ("a", "good")), turns(("u", "and four"), ("a", "bad"))), tokenizer
    )
    assert scored(pair, tokenizer) == (["good<|im_end|>"], ["bad<|im_end|>"])
    assert tokenizer.decode(pair.prompt) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n<|im_start|>user\nand"
    )


def test_without_a_chat_template_pairs_are_plain_text(small):
    tokenizer = small(template=None)
    pair = one(text_pair(" is blue.", " fell", prompt="The sky"), tokenizer)
    assert [tokenizer.decode(part) for part in (pair.prompt, pair.chosen, pair.rejected)] == [
        "The sky",
        " is blue.<|im_end|>",
        " fell<|im_end|>",
    ]
    fails("no_chat_template", talk_pair(turns(("u", "q")), turns(("a", "b")), turns(("a", "c"))), tokenizer)


def test_an_answer_that_ends_itself_is_ended_once(small):
    tokenizer = small(template=None)
    pair = one(text_pair(" yes<|im_end|>", " no"), tokenizer)
    assert scored(pair, tokenizer) == ([" yes<|im_end|>"], [" no<|im_end|>"])


def test_a_token_over_the_boundary_is_read_and_not_scored(small):
    tokenizer = small(template=None)
    assert len(tokenizer.tokenize("and")) == 1, "the tokenizer was trained to have this word as one token"
    pair = one(text_pair("d four", "! two", prompt="an"), tokenizer)
    assert tokenizer.decode(pair.prompt + pair.chosen) == "and four<|im_end|>"
    assert tokenizer.decode(pair.prompt + pair.rejected) == "an! two<|im_end|>"
    assert pair.prompt == []
    assert scored(pair, tokenizer) == ([" four<|im_end|>"], ["! two<|im_end|>"])
    both = one(text_pair("d four", "d two", prompt="an"), tokenizer)
    assert tokenizer.decode(both.prompt) == "and", "both sides read it, so it belongs to the prompt"
    assert scored(both, tokenizer) == ([" four<|im_end|>"], [" two<|im_end|>"])


def test_texts_without_a_prompt_share_what_they_begin_with(small):
    for tokenizer in (small(template=None), small()):
        pair = one(text_pair("the answer is four", "the answer is two", prompt=""), tokenizer)
        assert tokenizer.decode(pair.prompt) == "the answer is"
        assert scored(pair, tokenizer) == ([" four<|im_end|>"], [" two<|im_end|>"])
    apart = one(text_pair("and four", "two", prompt=""), tokenizer)
    assert apart.prompt == []
    assert apart.unscored == ((0,), (0,)), "nothing predicts a sequence's first token"
    longer = one(text_pair("two", "two and two", prompt=""), tokenizer)
    assert scored(longer, tokenizer) == (["<|im_end|>"], [" and two<|im_end|>"])


def test_tokens_that_the_tokenizer_adds_are_prompt(small):
    from tokenizers import processors

    tokenizer = small(template=None, special=("<s>",))
    first = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", first)]
    )
    for prompt in ("q", ""):
        pair = one(text_pair("yes", "no", prompt=prompt), tokenizer)
        assert tokenizer.decode(pair.prompt) == "<s>" + prompt
        assert scored(pair, tokenizer) == (["yes<|im_end|>"], ["no<|im_end|>"])


def test_equal_answers_are_errors(small):
    fails("row.identical_pair", text_pair("four", "four"), small())
    fails("row.identical_pair", text_pair("four", " four\n"), small(TRIMMING))
    fails("row.identical_pair", text_pair("four", "four", prompt=""), small())


def test_truncation_keeps_the_start_of_each_side(small):
    tokenizer = small()
    example = text_pair("the answer is four", "two")
    whole = one(example, tokenizer)
    length = len(whole.prompt) + len(whole.chosen)
    assert one(example, tokenizer, length) == whole, "the line break after the stop token needs no room"
    cut = one(example, tokenizer, length - 1)
    assert cut == Pair(3, whole.prompt, whole.chosen[:-1], whole.rejected, truncated=True)
    least = one(example, tokenizer, len(whole.prompt) + 1)
    assert least == Pair(3, whole.prompt, whole.chosen[:1], whole.rejected[:1], truncated=True)
    error = fails("no_supervised_tokens", example, tokenizer, len(whole.prompt))
    assert f"the first {len(whole.prompt)} hold none of its chosen answer" in error.why
    error = fails("row.identical_pair", text_pair("and four", "and two"), tokenizer, len(whole.prompt) + 1)
    assert "differ only after" in error.why


def test_a_side_that_is_cut_in_a_users_turn_ends_with_the_answer_before(small):
    tokenizer = small()
    chosen = turns(("a", "first"), ("u", "a long question"), ("a", "second"))
    example = talk_pair(turns(("u", "one")), chosen, turns(("a", "no")))
    whole = one(example, tokenizer)
    cut = one(example, tokenizer, len(whole.prompt) + len(tokenizer.tokenize("first<|im_end|>")) + 4)
    assert cut.truncated
    assert tokenizer.decode(cut.chosen) == "first<|im_end|>"


def test_what_cannot_be_rendered_or_ended_is_an_error(small):
    fails("no_stop_token", text_pair("a", "b"), small(ENDLESS))
    fails("no_stop_token", text_pair("a", "b"), small(template=None, eos=None))
    fails("template_not_prefix", text_pair("a", "b"), small(CHANGING))
    fails("template_refused", text_pair("a", "b"), small("{{ 1 / 0 }}"))
    before = turns(("s", "be brief"), ("u", "q"))
    fails("template_drops_turn", talk_pair(before, turns(("a", "b")), turns(("a", "c"))), small(DROPPING))


def test_rows_without_two_answers_are_errors(small):
    tokenizer = small()
    fails("nothing_to_train", Example(3, prompt="q"), tokenizer)
    fails("nothing_to_train", Example(3, prompt="q", extra={"chosen": "a"}), tokenizer)
    fails("nothing_to_train", text_pair(turns(("a", "b")), "c"), tokenizer)
    fails("nothing_to_train", text_pair("a", "b", prompt=None), tokenizer)
    fails("nothing_to_train", talk_pair(turns(("u", "q")), turns(("a", "b")), ()), tokenizer)
    fails("nothing_to_train", talk_pair(turns(("u", "q")), turns(("a", "b")), turns(("u", "c"))), tokenizer)


def test_many_in_order_with_errors_in_their_place(small):
    tokenizer = small()
    examples = [text_pair("yes", f"no {number}", row=number) for number in range(300)]
    examples[5] = Example(5, prompt="q")
    examples[200] = text_pair("yes", "yes", row=200)
    found = list(encode_pairs(iter(examples), tokenizer, 64))
    assert len(found) == 300
    assert [place for place, item in enumerate(found) if isinstance(item, InputError)] == [5, 200]
    for number in (0, 4, 6, 127, 128, 199, 201, 299):
        assert found[number] == one(examples[number], tokenizer, 64)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    fails_with = pytest.raises(InputError)
    with fails_with as caught:
        list(encode_pairs([text_pair("a", "b")], Slow(), None))
    assert caught.value.code == "data.slow_tokenizer"


PIECES = st.sampled_from(
    ["an", "d", "and", " two", "\n", " ", "<|im_end|>", "<|im_start|>", "é", "\N{GRINNING FACE}", "x"]
)
SPOKEN = st.lists(PIECES, min_size=1, max_size=5).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12
)


@pytest.mark.parametrize("shape", ["chat", "plain", "prompt-less"])
def test_no_prompt_token_is_ever_scored(small, shape):
    """For any texts: the ids are the tokenizer's own of the rendered text, and scored tokens lie inside the answers."""
    tokenizer = small(template=None) if shape == "plain" else small()

    def rendered(prompt, answer):
        """What is before the answer, and all of it with its stop token, as text."""
        if shape == "chat":
            asked = [{"role": "user", "content": prompt}]
            before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            return before, before + answer + "<|im_end|>"
        before = prompt if shape == "plain" else ""
        return before, before + answer + ("" if answer.endswith("<|im_end|>") else "<|im_end|>")

    made = []

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(SPOKEN, SPOKEN, SPOKEN, st.none() | st.integers(1, 40))
    def hold(prompt, chosen, rejected, max_length):
        example = text_pair(chosen, rejected, prompt="" if shape == "prompt-less" else prompt)
        (pair,) = encode_pairs([example], tokenizer, max_length)
        if isinstance(pair, InputError):
            assert pair.code.startswith("data.")
            return
        made.append(pair)
        lost = False
        for answer, ids, silent in zip((chosen, rejected), (pair.chosen, pair.rejected), pair.unscored, strict=True):
            before, whole = rendered(prompt, answer)
            found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
            mine = pair.prompt + ids
            assert mine == found["input_ids"][: len(mine)]
            assert max_length is None or len(mine) <= max_length
            lost = lost or len(mine) < len(found["input_ids"])
            assert ids, "something is scored"
            assert len(ids) - 1 not in silent, "the last token is scored"
            for place in range(len(mine)):
                start = found["offset_mapping"][place][0]
                asked = place < len(pair.prompt) or place - len(pair.prompt) in silent
                inside = place > 0 and start >= len(before)
                assert inside or asked
                assert asked != inside or shape == "prompt-less"
        assert pair.truncated == lost
        assert pair.chosen != pair.rejected

    hold()
    assert len(made) > 50


def test_a_side_is_what_training_on_its_answer_would_be(small):
    """The same rules as for sft: what is scored is what would be supervised."""
    tokenizer = small()
    before = turns(("u", "one"), ("a", "first"), ("u", "two"))
    chosen = turns(("a", "good"), ("u", "more"), ("a", "better"))
    pair = one(talk_pair(before, chosen, turns(("a", "bad"))), tokenizer)
    encoded = encode(Example(3, messages=before + chosen, context=len(before)), tokenizer, None)
    places = [len(pair.prompt) + place for place in range(len(pair.chosen)) if place not in pair.unscored[0]]
    assert places == [place for place, label in enumerate(encoded.labels) if label != -100]


@pytest.mark.parametrize("template", [None, REASONING, DROPPING, ENDLESS], ids=["chatml", "reasoning", "drops", "ends"])
def test_any_row_becomes_a_pair_or_an_input_error(small, template):
    """Rows of any turns, through convert: what comes out reads as the template wrote it, or is an InputError."""
    tokenizer = small(template) if template else small()
    round_ = st.tuples(SPOKEN, SPOKEN)
    codes, made = set(), []

    @settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.none() | SPOKEN, st.lists(round_, max_size=2), SPOKEN, *[st.lists(round_, max_size=1)] * 2, SPOKEN, SPOKEN
    )
    def hold(system, rounds, asked, more, less, good, bad):
        def said(rounds, last, end):
            texts = [text for pair in rounds for text in pair] + [last]
            roles = ("user", "assistant") if end == "user" else ("assistant", "user")
            return [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]

        before = ([{"role": "system", "content": system}] if system else []) + said(rounds, asked, "user")
        chosen, rejected = said(more, good, "assistant"), said(less, bad, "assistant")
        row = {"prompt": before, "chosen": chosen, "rejected": rejected}
        try:
            example = convert(Row(0, "r:1", row), Mapping(kind="preference", columns={name: name for name in row}))
        except InputError:
            return
        (pair,) = encode_pairs([example], tokenizer, None)
        if isinstance(pair, InputError):
            codes.add(pair.code)
            return
        made.append(pair)
        for answer, ids, silent in zip((chosen, rejected), (pair.chosen, pair.rejected), pair.unscored, strict=True):
            whole = tokenizer.apply_chat_template(before + answer, tokenize=False)
            read = tokenizer.decode(pair.prompt + ids, clean_up_tokenization_spaces=False)
            assert whole.startswith(read)
            assert whole.removeprefix(read).strip() == ""
            assert read.endswith("<|im_end|>")
            assert len(ids) - 1 not in silent

    hold()
    assert codes <= {
        *("data.no_stop_token", "data.row.identical_pair", "data.template_drops_turn", "data.template_not_prefix"),
        "data.template_changes_text",
    }
    assert len(made) > 30 or template is ENDLESS
    assert ("data.template_drops_turn" in codes) == (template is DROPPING)


# --- TRL 1.16's own tokenisation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_pairs(smollm2, tmp_path_factory):
    """TRL's own preparation and collation: rows in, {place: (prompt, chosen, rejected)} out, as a model reads them."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    import torch
    import transformers
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=len(smollm2),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )

    def pairs(rows, max_length=1024):
        trainer = DPOTrainer(
            model=transformers.LlamaForCausalLM(config),
            args=DPOConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")),
                max_length=max_length,
                use_cpu=True,
                bf16=False,
                report_to="none",
                gradient_checkpointing=False,
            ),
            train_dataset=datasets.Dataset.from_list([{**row, "place": place} for place, row in enumerate(rows)]),
            processing_class=smollm2,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj"]),
        )
        found = {}
        for row in trainer.train_dataset:
            batch = trainer.data_collator([{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}])
            sides = []
            for ids, real, mask in zip(
                *(batch[name].tolist() for name in ("input_ids", "attention_mask", "completion_mask")), strict=True
            ):
                length, start = sum(real), mask.index(1)
                assert start == len(row["prompt_ids"])
                sides.append(ids[start:length])
            found[row["place"]] = (row["prompt_ids"], *sides)
        return found

    return pairs


@pytest.fixture(scope="module")
def preferences(real):
    """The real preference set, 299 pairs."""
    from tunesmith.executors.kernel.data import prepare
    from tunesmith.orchestrator.nouns import DataSource, EvalSpec, JobSpec, ModelRef

    source = DataSource(source=str(real / "dpo_en_demo.json"))
    spec = JobSpec(model=ModelRef(id="m"), data=(source,), method="dpo", eval=EvalSpec(fraction=0))
    return prepare(spec).train


def as_trl(example):
    """An example in TRL's own format."""

    def dicts(messages):
        return [{"role": turn.role, "content": turn.content} for turn in messages]

    chosen, rejected = example.extra["chosen"], example.extra["rejected"]
    if isinstance(chosen, str):
        prompt = {"prompt": example.prompt} if example.prompt else {}
        return {**prompt, "chosen": chosen, "rejected": rejected}
    return {"prompt": dicts(example.messages), "chosen": dicts(chosen), "rejected": dicts(rejected)}


def parts(pair):
    return pair.prompt, pair.chosen, pair.rejected


def trl(test):
    return pytest.mark.slow(pytest.mark.filterwarnings("ignore")(test))


@trl
def test_real_conversations_are_trls(trl_pairs, preferences, smollm2):
    """The same rows are kept, and cut at the same place; TRL's sides go on by a line break (difference 1)."""
    theirs = trl_pairs([as_trl(example) for example in preferences], 700)
    ours = dict(enumerate(encode_pairs(preferences, smollm2, 700)))
    dropped = {place: pair.code for place, pair in ours.items() if isinstance(pair, InputError)}
    same = [place for place, (_, chosen, rejected) in theirs.items() if chosen == rejected]
    assert same == [place for place, code in dropped.items() if code == "data.row.identical_pair"], "difference 6"
    assert len(same) == 1, "two tokens of each answer are left, and they are the same"
    assert set(dropped) - set(same) == set(ours) - set(theirs)
    assert set(dropped.values()) == {"data.row.identical_pair", "data.no_supervised_tokens"}
    (line_break,) = smollm2.encode("\n", add_special_tokens=False)
    stop = smollm2.eos_token_id
    cut = 0
    for place, (prompt, chosen, rejected) in theirs.items():
        if place in same:
            continue
        pair = ours[place]
        assert pair.unscored == ((), ())
        assert pair.prompt == prompt
        for mine, whole in ((pair.chosen, chosen), (pair.rejected, rejected)):
            ended = whole[-2:] == [stop, line_break]
            assert mine == (whole[:-1] if ended else whole)
            assert ended or mine[-1] == stop or pair.truncated
        cut += pair.truncated
    assert len(dropped) > 10
    assert 10 < cut < len(theirs) - 100


@trl
def test_plain_texts_are_trls(trl_pairs, preferences, smollm2):
    """Without a chat template the two are the same token for token, prompts or none (difference 5 has no case here)."""
    texts = [
        Example(
            example.row,
            prompt=example.messages[0].content if example.row % 2 else "",
            extra={side: "\n" + example.extra[side][0].content for side in ("chosen", "rejected")},
        )
        for example in preferences
        if not example.extra["chosen"][0].content.startswith("\n")
    ]
    template, smollm2.chat_template = smollm2.chat_template, None
    try:
        for chosen in ([text for text in texts if text.prompt], [text for text in texts if not text.prompt]):
            theirs = trl_pairs([as_trl(text) for text in chosen], 700)
            ours = dict(enumerate(encode_pairs(chosen, smollm2, 700)))
            for place, pair in ours.items():
                if isinstance(pair, InputError):
                    assert place not in theirs or theirs[place][1] == theirs[place][2], "difference 6"
                    continue
                prompt, first, second = theirs[place]
                assert pair.prompt + pair.chosen == prompt + first
                assert pair.prompt + pair.rejected == prompt + second
                if chosen[place].prompt:
                    assert pair.prompt == prompt
                    assert pair.unscored == ((), ())
            assert len(theirs) > 100
    finally:
        smollm2.chat_template = template


@trl
def test_a_merge_over_the_boundary(trl_pairs, smollm2):
    """An answer that begins with line breaks: ChatML's own and the first are a single token (difference 2)."""
    chosen, rejected = turns(("a", "\n\nYes")), turns(("a", "No"))
    example = talk_pair(turns(("u", "q")), chosen, rejected)
    ((prompt, first, second),) = trl_pairs([as_trl(example)]).values()
    pair = one(example, smollm2)
    assert pair.prompt == prompt
    assert (pair.chosen, pair.rejected) == (first[:-1], second[:-1])
    assert smollm2.decode(first[:1]) == "\n\n"
    assert smollm2.decode(second[:1]) == "\n", "TRL scores the end of the prompt"
    assert scored(pair, smollm2) == (["\nYes<|im_end|>"], ["No<|im_end|>"])


@trl
def test_answers_of_several_turns(trl_pairs, smollm2):
    """The ids are the same; TRL scores the user's turn and the headers of turns too (difference 3)."""
    before = turns(("s", "be brief"), ("u", "one"), ("a", "first"), ("u", "two"))
    chosen = turns(("a", "second"), ("u", "three"), ("a", "third"))
    example = talk_pair(before, chosen, turns(("a", "what?")))
    ((prompt, first, second),) = trl_pairs([as_trl(example)]).values()
    pair = one(example, smollm2)
    assert parts(pair) == (prompt, first[:-1], second[:-1])
    assert scored(pair, smollm2) == (["second<|im_end|>", "third<|im_end|>"], ["what?<|im_end|>"])


@trl
def test_text_meets_a_chat_model(trl_pairs, smollm2):
    """TRL gives the model plain text (difference 4), and for turns the same ids as ours for the text."""
    example = text_pair("Paris", "Rome", prompt="What is the capital of France?")
    spoken = talk_pair(turns(("u", example.prompt)), turns(("a", "Paris")), turns(("a", "Rome")))
    ((plain, _, _),) = trl_pairs([as_trl(example)]).values()
    ((prompt, first, second),) = trl_pairs([as_trl(spoken)]).values()
    assert smollm2.decode(plain) == example.prompt
    assert parts(one(example, smollm2)) == (prompt, first[:-1], second[:-1])


@trl
def test_equal_answers(trl_pairs, smollm2):
    """TRL trains on a pair that says nothing (difference 6)."""
    example = talk_pair(turns(("u", "q")), turns(("a", "same")), turns(("a", "same")))
    ((_, first, second),) = trl_pairs([as_trl(example)]).values()
    assert first == second
    fails("row.identical_pair", example, smollm2)
