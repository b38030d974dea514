"""Which rows TRL's trainers get, how many at once, and what is said of those they do not get."""

from dataclasses import replace

import pytest

from tunesmith.executors.kernel.loops import trl
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import JobSpec, KtoSpec, ModelRef


def long_and_short(method):
    short, long = "It is.", "It is a number, and a rather long story besides. " * 3
    if method == "kto":
        return [{"prompt": "Say.", "completion": text, "label": True} for text in (short, long)]
    return [{"prompt": "Say.", "chosen": text, "rejected": "No."} for text in (short, long)]


def test_a_long_row_is_cut_where_its_end_may_go_and_left_out_where_it_may_not(bench):
    found = bench("kto", rows=long_and_short("kto"), eval=0.0).engine.rows
    assert (len(found.train), found.cut, found.lost) == (2, 1, [])
    found = bench("reward", rows=long_and_short("reward"), eval=0.0).engine.rows
    assert (len(found.train), found.cut, [error.code for error in found.lost]) == (1, 0, ["data.too_long"])
    assert found.lost[0].where == "row 1"


def test_rows_of_a_model_without_a_chat_template_are_texts(bench, make_model):
    model = make_model("plain", template=None)
    found = bench("kto", model=model, eval=0.0).engine.rows.train.columns
    assert (found["prompt"][1], found["completion"][1]) == ("Say 1.", "1!1!")
    found = bench("reward", model=model, eval=0.0).engine.rows.train.columns
    assert (found["chosen"][1], found["rejected"][1]) == ("Say 1.It is 1.", "Say 1.No 1!!")


def test_a_conversation_is_asked_for_its_last_answer(bench):
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    columns = bench("kto", rows=[{"messages": turns, "label": True}] * 4, eval=0.0).engine.rows.train.columns
    assert (columns["prompt"][0], columns["completion"][0]) == (turns[:3], turns[3:])
    rows = [{"chosen": turns, "rejected": [*turns[:3], {"role": "assistant", "content": "3"}]}] * 4
    columns = bench("reward", rows=rows, eval=0.0).engine.rows.train.columns
    assert columns["chosen"][0] == turns
    assert columns["rejected"][0][-1]["content"] == "3"


def test_rows_that_cannot_be_rendered_are_named(bench, make_model, chatml):
    deaf = chatml.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    model = make_model("deaf", template=deaf)
    ask, said = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}
    rows = [
        {"messages": [ask, said], "label": True},
        {"messages": [{"role": "system", "content": "Sing."}, ask, said], "label": False},
    ]
    found = bench("kto", model=model, rows=rows * 2, eval=0.0).engine.rows
    assert [error.code for error in found.lost] == ["data.template_drops_turn"] * 2
    assert found.train.numbers == (0, 2)


def test_nothing_left_to_train_on_is_an_error(bench):
    with pytest.raises(InputError) as caught:
        bench("reward", rows=long_and_short("reward")[1:] * 3, eval=0.0)
    assert caught.value.code == "data.no_usable_rows"


@pytest.mark.parametrize(
    "good, bad, weights, said",
    [(4, 4, {}, None), (5, 4, {}, None), (9, 3, {}, "undesirable_weight to 3"), (3, 9, {}, "kto.desirable_weight to 3"),
     (9, 3, {"undesirable_weight": 3.0}, None), (3, 0, {}, "undesirable_weight to 3")],
)  # fmt: skip
def test_unequal_numbers_of_good_and_bad_answers_are_said(good, bad, weights, said):
    found = trl.balance([True] * good + [False] * bad, KtoSpec(**weights))
    assert found is None if said is None else said in found


@pytest.mark.parametrize("rows, most, expected", [(8, 8, 8), (8, 3, 2), (10, 4, 2), (7, 4, 1), (1, 4, 1), (6, 100, 6)])
def test_a_micro_batch_is_a_whole_share_of_a_step(rows, most, expected):
    spec = JobSpec(model=ModelRef(id="m"), data=(), method="reward")
    assert trl.micro_batch(_with(spec, rows, most)) == expected


@pytest.mark.parametrize("rows, most, expected", [(8, 1, 2), (7, 4, 7), (9, 2, 3), (2, 1, 2)])
def test_kto_never_trains_one_row_at_a_time(rows, most, expected):
    spec = JobSpec(model=ModelRef(id="m"), data=(), method="kto")
    assert trl.micro_batch(_with(spec, rows, most)) == expected
    with pytest.raises(InputError) as caught:
        trl.micro_batch(_with(spec, 1, 1))
    assert caught.value.code == "kto.batch"


def _with(spec, rows, most):
    return replace(spec, train=replace(spec.train, effective_batch=rows, micro_batch=most))
