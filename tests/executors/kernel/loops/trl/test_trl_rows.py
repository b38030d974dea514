"""Which rows TRL's trainers get, how many at once, and what is said of those they do not get."""

from dataclasses import replace

import pytest

from tunesmith.executors.kernel.data import Example, Message, Prepared
from tunesmith.executors.kernel.loops import trl
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import JobSpec, KtoSpec, ModelRef


def long_and_short(method):
    short, long = "It is.", "It is a number, and a rather long story besides. " * 3
    if method == "kto":
        return [{"prompt": "Say.", "completion": text, "label": True} for text in (short, long)]
    return [{"prompt": "Say.", "chosen": text, "rejected": "No."} for text in (short, long)]


def test_a_long_row_is_cut_where_its_end_may_go_and_left_out_where_it_may_not(make_rows):
    found = make_rows("kto", rows=long_and_short("kto"))
    assert (len(found.train), found.cut, found.lost) == (2, 1, [])
    found = make_rows("reward", rows=long_and_short("reward"))
    assert (len(found.train), found.cut, [error.code for error in found.lost]) == (1, 0, ["data.too_long"])
    assert found.lost[0].where == "row 1"


def test_rows_of_a_model_without_a_chat_template_are_texts(make_rows, make_folder):
    model = make_folder("plain", template=None)
    found = make_rows("kto", model=model).train.columns
    assert (found["prompt"][1], found["completion"][1]) == ("Say 1.", "1!1!")
    found = make_rows("reward", model=model).train.columns
    assert (found["chosen"][1], found["rejected"][1]) == ("Say 1.It is 1.", "Say 1.No 1!!")


def test_a_conversation_is_asked_for_its_last_answer(make_rows):
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    columns = make_rows("kto", rows=[{"messages": turns, "label": True}] * 4).train.columns
    assert (columns["prompt"][0], columns["completion"][0]) == (turns[:3], turns[3:])
    rows = [{"chosen": turns, "rejected": [*turns[:3], {"role": "assistant", "content": "3"}]}] * 4
    columns = make_rows("reward", rows=rows).train.columns
    assert columns["chosen"][0] == turns
    assert columns["rejected"][0][-1]["content"] == "3"


def test_rows_that_cannot_be_rendered_are_named(make_rows, make_folder, chatml):
    deaf = chatml.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    model = make_folder("deaf", template=deaf)
    ask, said = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}
    rows = [
        {"messages": [ask, said], "label": True},
        {"messages": [{"role": "system", "content": "Sing."}, ask, said], "label": False},
    ]
    found = make_rows("kto", model=model, rows=rows * 2)
    assert [error.code for error in found.lost] == ["data.template_drops_turn"] * 2
    assert found.train.numbers == (0, 2)


def test_texts_among_conversations_are_left_out(make_spec):
    from transformers import AutoTokenizer

    spec = make_spec("reward")
    talk = Example(
        0,
        messages=(Message("user", "One?"),),
        extra={"chosen": (Message("assistant", "1"),), "rejected": (Message("assistant", "2"),)},
        context=1,
    )
    text = Example(1, prompt="", extra={"chosen": "One is one.", "rejected": "One is two."})
    prepared = Prepared(train=[talk, text], eval=[text], dropped=[], rows=2)
    found = trl.tables(spec, prepared, AutoTokenizer.from_pretrained(spec.model.id))
    assert (found.train.numbers, len(found.eval)) == ((0,), 0)
    assert [error.code for error in found.lost] == ["data.mixed_rows"] * 2


def test_an_answer_needs_room_behind_its_prompt(make_rows):
    rows = [{"question": "x" * 40, "answer": "1"}, {"question": "x" * 70, "answer": "2"}]
    found = make_rows("rloo", rows=rows, train={"max_length": 96}, grpo={"max_completion": 20})
    assert found.train.numbers == (0,)
    assert found.train.kept == ({"answer": "1"},)
    assert [error.code for error in found.lost] == ["data.prompt_too_long"]


def test_nothing_left_to_train_on_is_an_error(make_rows):
    with pytest.raises(InputError) as caught:
        make_rows("reward", rows=long_and_short("reward")[1:] * 3)
    assert caught.value.code == "data.no_usable_rows"


@pytest.mark.parametrize(
    "good, bad, weights, said",
    [
        (4, 4, {}, None),
        (5, 4, {}, None),
        (4, 5, {}, None),
        (9, 3, {}, "undesirable_weight to 3"),
        (3, 9, {}, "kto.desirable_weight to 3"),
        (9, 3, {"undesirable_weight": 3.0}, None),
        (3, 0, {}, "undesirable_weight to 3"),
    ],
)
def test_unequal_numbers_of_good_and_bad_answers_are_said(good, bad, weights, said):
    found = trl.balance([True] * good + [False] * bad, KtoSpec(**weights))
    assert found is None if said is None else said in found


@pytest.mark.parametrize("rows, most, expected", [(8, 8, 8), (8, 3, 2), (10, 4, 2), (7, 4, 1), (1, 4, 1), (6, 100, 6)])
def test_a_micro_batch_is_a_whole_share_of_a_step(rows, most, expected):
    spec = JobSpec(model=ModelRef(id="m"), data=(), method="reward")
    assert trl.micro_batch(_with(spec, rows, most)) == expected


def test_rloo_counts_answers():
    spec = _with(JobSpec(model=ModelRef(id="m"), data=(), method="rloo"), 6, 9)
    spec = replace(spec, grpo=replace(spec.grpo, num_generations=4))
    assert trl.micro_batch(spec) == 8


@pytest.mark.parametrize("rows, most, expected", [(8, 1, 2), (7, 4, 7), (9, 2, 3), (2, 1, 2)])
def test_kto_never_trains_one_row_at_a_time(rows, most, expected):
    spec = JobSpec(model=ModelRef(id="m"), data=(), method="kto")
    assert trl.micro_batch(_with(spec, rows, most)) == expected
    with pytest.raises(InputError) as caught:
        trl.micro_batch(_with(spec, 1, 1))
    assert caught.value.code == "kto.batch"


def _with(spec, rows, most):
    return replace(spec, train=replace(spec.train, effective_batch=rows, micro_batch=most))
