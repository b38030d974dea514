"""The rewards that a guard works out, with the real libraries: math-verify, jsonschema, re."""

import json

import pytest

from tunesmith.executors.kernel.rewards import guarded, make
from tunesmith.orchestrator.errors import InputError


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [
        (r"\boxed{72}", "72", 1),
        (r"so \boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{1/2}", "0.5", 1),
        (r"\boxed{\frac12}", r"The half is \boxed{\frac{1}{2}}.", 1),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$", 1),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
        (r"\boxed{(1,2)}", "(1, 2)", 1),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1),
        (r"\boxed{72}", "Half of 144.\n#### 72", 1),
        (r"\boxed{ 72 }", 72, 1),
        (r"<think>\boxed{1}</think> \boxed{72}", "72", 1),
        (r"\boxed{1} no, \boxed{72}", "72", 1),
        (r"\boxed{73}", "72", 0),
        (r"\boxed{72} no, \boxed{73}", "72", 0),
        ("72", "72", 0),
        (r"\boxed{}", "72", 0),
        (r"\boxed{72", "72", 0),
        (r"\boxed{\frac{1}{0}}", "72", 0),
        (r"\boxed{\notlatex{{{}", "72", 0),
        (r"\boxed{__import__('os').system('true')}", "72", 0),
        ("\\boxed{" + "x" * 10_000 + "}", "72", 0),
        (r"\boxed{72}", None, None),
        (r"\boxed{72}", "", None),
    ],
)
def test_boxed_is_equal_as_mathematics(score, said, wanted, value):
    assert score("boxed", [said], answer=wanted) == [value]


def test_regex_is_searched_in_the_whole_completion(score):
    assert score(r"regex:^\d+$", ["12", "a1", "", "1\n", "12 "]) == [1, 0, 0, 1, 0]
    assert score(r"regex:(?is)yes.*no", ["YES\nno", "no yes", [{"role": "assistant", "content": "yes no"}]]) == [
        1,
        0,
        1,
    ]
    assert score("regex:\N{SNOWMAN}", ["a\N{SNOWMAN}\udc80", "\0"]) == [1, 0]


def test_json_fits_a_schema(score, tmp_path):
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer", "minimum": 1}}}
    path = tmp_path / "s.json"
    path.write_text(json.dumps(schema))
    done = ['{"a": 1}', '{"a": 0}', '{"a": "1"}', "{}", "[]", "no", '```json\n{"a": 2}\n```', "[" * 50_000]
    assert score(f"json:{path}", done) == [1, 0, 0, 0, 0, 0, 1, 0]


def test_a_schema_never_asks_the_network(score, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"$ref": "http://127.0.0.1:9/other.json"}))
    assert score(f"json:{path}", ["{}"]) == [0]


@pytest.mark.parametrize("text", ["{", "3", '{"type": 3}', ""])
def test_what_is_no_schema_is_refused(load, tmp_path, text):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load(f"json:{path}").score(["q"], ["{}"], [[1]], {}, 0)
    assert caught.value.code == "reward.schema"


@pytest.mark.parametrize(("entry", "package"), [("boxed", "math-verify"), ("reasoning-gym", "reasoning-gym")])
def test_a_missing_package_comes_with_the_command_that_installs_it(load, monkeypatch, entry, package):
    monkeypatch.setattr(make.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        load(entry)
    assert caught.value.code == "reward.package"
    assert f"pip install {package}" in caught.value.fix


@pytest.mark.slow
def test_reasoning_gym_scores_by_the_tasks_own_scorer(score):
    metadata = {"source_dataset": "chain_sum", "source_index": 0, "source_config": {"seed": 0, "size": 5}}
    import reasoning_gym

    task = reasoning_gym.create_dataset("chain_sum", seed=0, size=5)
    answer = task[0]["answer"]
    forms = ("{}", "<answer>{}</answer>", "<think>hm</think> {}", "<answer>1</answer> no, <answer>\n{}\n</answer>")
    for said in (answer, f"{answer}.0", f"{answer}1", "nothing", ""):
        wanted = task.score_answer(said, task[0])
        found = score("reasoning-gym", [form.format(said) for form in forms], metadata=metadata)
        assert found == [wanted] * len(forms)
    assert score("reasoning-gym", [answer], metadata=metadata) == [1]


def test_a_row_of_any_seed_and_split_is_found_again(score):
    from tunesmith.executors.kernel.data import read
    from tunesmith.orchestrator.nouns import DataSource

    asked = DataSource(source="reasoning-gym:leg_counting", config='{"seed": 3}', split="test", limit=6)
    for row in read([asked]):
        assert score("reasoning-gym", [row.values["answer"]], metadata=row.values["metadata"]) == [1]


def test_making_a_row_again_has_its_own_time(load, monkeypatch, tmp_path):
    """A task whose row takes long, and whose scorer has no longer than any other: by what is left on the alarm."""
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym" / "factory.py").write_text("DATASETS = {}\n")
    (tmp_path / "reasoning_gym" / "__init__.py").write_text(
        "import signal\n"
        "def left():\n"
        "    return signal.getitimer(signal.ITIMER_REAL)[0]\n"
        "def create_dataset(task, **config):\n"
        "    return Slow()\n"
        "class Slow:\n"
        "    def __getitem__(self, index):\n"
        "        return {'made': left()}\n"
        "    def score_answer(self, answer, entry):\n"
        "        return float(entry['made'] > 60 and 0 < left() < 10)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    metadata = {"source_dataset": "sokoban", "source_index": 0, "source_config": {"seed": 0, "size": 5}}
    (found,) = load("reasoning-gym").score(["q"], ["x"], [[1]], {"metadata": [metadata]}, 1).values
    assert list(found) == [1.0]


def test_rows_that_a_user_saved_are_scored_by_what_they_hold(score):
    metadata = {"source_dataset": "leg_counting", "difficulty": {}}
    assert score("reasoning-gym", ["8", "9"], metadata=metadata, question="?", answer="8") == [1, 0]
    odd = ({"source_dataset": "no_such_task"}, {"other": 1}, None, "text")
    assert score("reasoning-gym", ["8"] * 4, metadata=odd, answer="8") == [0, None, None, None]


def test_rows_of_other_data_are_refused_by_name(score):
    with pytest.raises(InputError) as caught:
        score("reasoning-gym", ["8"], answer="8")
    assert caught.value.code == "reward.no_column"


@pytest.mark.parametrize(
    "text",
    [
        "(5 + 3) * 8 - 7/2",
        "x**2 + 3*x + C",
        "sin(x) + log(2*x) - exp(-x)/2",
        "-3.5*x^4",
        "2.5e-3*x**2*y**3 + pi",
        "(x**2 + 1)**(3/2)/3 + C1",
        "sin(cos(x))*E**(2*x)",
    ],
)
def test_mathematics_may_reach_the_parser(text):
    assert guarded.is_maths(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "exec(1)",
        "open(x)",
        "eval (x)",
        "x.real",
        "().__class__",
        "chr(95)",
        "[1]",
        "lambda: 0",
        "'a'",
        "getattr(x, y)",
        "1 if x else 2; 3",
        "(eval)((chr)(95))",
        "((eval))((chr)(95)+(chr)(95))",
        "(1,eval)(x)",
        "x + exec",
        "sin(eval)",
        "1 or open",
        "1if x else(2)",
        "x and y",
        "0xfor x in y",
        "x . real",
        "1.\nreal",
        "(x).a",
        "1 .a",
        "_",
        "x_1",
        "_x(1)",
        "x @ y",
        '"a"',
        "f(x=1)",
        "\uff45val(x)",
        "\uff45",
        "\u0665",
        "\u33d1(x)",
        "x\u00a0+ 1",
        "x # y",
        "x\\\ny",
        "x:=1",
        "{x}",
        "`x`",
        "9**9**9",
        "9**(9**9**9)",
        "2**99999",
        "2**(-99999)",
        "x^2^3",
        "99999!",
        "x" * 5000,
    ],
)
def test_code_never_reaches_the_parser(text):
    assert not guarded.is_maths(text)


@pytest.mark.slow
def test_a_models_code_is_not_run_by_any_scorer(score, tmp_path):
    """Some scorers of Reasoning Gym hand the answer to eval. Ours must not."""
    mark = tmp_path / "ran"
    attack = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    text = "+".join(f"(chr)({ord(one)})" for one in attack)
    import reasoning_gym.factory

    for task in (*guarded._LITERALS, *guarded._EXPRESSIONS):
        assert task in reasoning_gym.factory.DATASETS
        metadata = {"source_dataset": task, "source_index": 0, "source_config": {"seed": 1, "size": 2}}
        said = [f"<answer>{attack}</answer>", attack, f"(eval)({text})"]
        assert score("reasoning-gym", said, metadata=metadata) == [0, 0, 0]
    assert not mark.exists()


@pytest.mark.slow
def test_every_scorer_that_evaluates_is_known():
    """Whichever module of Reasoning Gym evaluates what it is given is on one of the two lists."""
    import re
    from pathlib import Path

    import reasoning_gym

    harmless = {"codeio", "basic_arithmetic", "bitwise_arithmetic", "propositional_logic"}  # evaluate what they made
    harmless |= {"generators_00_49", "generators_50_99"}
    found = {
        path.stem
        for path in Path(reasoning_gym.__file__).parent.rglob("*.py")
        if re.search(r"(?<![\w.])(?:eval|exec)\(|(?:parse_expr|sympify)\(", path.read_text("utf-8"))
    }
    assert found - harmless == {*guarded._LITERALS, *guarded._EXPRESSIONS}
