"""Plans of every method: from a sentence and from a spec, over small files and over real ones; what is refused."""

import json
from pathlib import Path

import pytest

from tunesmith.graph.planning import plan
from tunesmith.orchestrator.nouns import METHODS, SAMPLED, Device, Request
from tunesmith.orchestrator.plain import plain

SHARED = Path(__file__).parents[3] / "shared" / "data"
GIB = 2**30
CPU = Device(backend="local", hardware="cpu", kind="cpu", memory_bytes=24 * GIB, peak_flops=3e11, bandwidth=2e10)
SMOL = "smollm2-135m"

PAIRS = [{"prompt": f"Say {n}.", "chosen": f"It is {n}, as you wish.", "rejected": "No."} for n in range(40)]
LABELS = [{"prompt": f"Say {n}.", "completion": f"{n}.", "label": n % 2 == 0} for n in range(40)]
PROBLEMS = [{"question": f"What is {n} + {n}?", "answer": f"It is twice {n}. #### {2 * n}"} for n in range(40)]
FILES = {"pairs.jsonl": PAIRS, "feedback.jsonl": LABELS, "problems.jsonl": PROBLEMS}
DATA = {"dpo": "pairs.jsonl", "reward": "pairs.jsonl", "kto": "feedback.jsonl"}
NAMES = {"reward": "reward modelling"}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No Hub, and no models in a cache of the machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def make(tmp_path):
    """Plans a sentence or a spec in a folder with small files, on one CPU."""
    for name, rows in FILES.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(text=None, answers=None, **request):
        wanted = Request(text=text, cwd=str(tmp_path), **request)
        return plan(wanted, devices=lambda backend: (CPU,), answers=answers, cache=tmp_path / "cache")

    return made


def codes(found):
    return [finding.code for finding in found]


def stage(found):
    assert len(found.stages) == 1, plain(found.findings)
    assert found.errors == ()
    assert found.questions == ()
    return found.stages[0]


def section(spec, method):
    """The part of a spec that a method reads, as far as it is not the usual."""
    part = getattr(spec, {"rloo": "grpo", "reward": "dpo"}.get(method, method))
    usual = plain(type(part)())
    return {key: value for key, value in plain(part).items() if value != usual[key]}


# --- sentences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "method", "said"),
    [
        ("DPO smollm2-135m on pairs.jsonl with beta 0.2", "dpo", {"beta": 0.2}),
        ("IPO smollm2-135m on pairs.jsonl", "dpo", {"loss": "ipo"}),
        (
            "DPO smollm2-135m on pairs.jsonl with EXO loss and label smoothing 0.001",
            "dpo",
            {"loss": "exo_pair", "label_smoothing": 0.001},
        ),
        ("DPO smollm2-135m on pairs.jsonl without a reference model", "dpo", {"reference": "none"}),
        (
            "GRPO smollm2-135m on problems.jsonl with 8 generations of 64 tokens",
            "grpo",
            {"max_completion": 64, "rewards": ["number"]},
        ),
        (
            "GRPO smollm2-135m on problems.jsonl, 4 answers per question, up to 100 tokens per answer, "
            "temperature 0.7, KL penalty 0.04, dr_grpo loss, epsilon 0.1, epsilon high 0.28, don't scale the rewards, "
            "2 updates per batch",
            "grpo",
            {
                "num_generations": 4,
                "max_completion": 100,
                "temperature": 0.7,
                "beta": 0.04,
                "loss": "dr_grpo",
                "epsilon": 0.1,
                "epsilon_high": 0.28,
                "scale_rewards": "none",
                "num_iterations": 2,
                "rewards": ["number"],
            },
        ),
        ("KTO smollm2-135m on feedback.jsonl with beta 0.3", "kto", {"beta": 0.3}),
        (
            "RLOO smollm2-135m on problems.jsonl with 4 rollouts of 32 tokens and beta 0.05",
            "rloo",
            {"num_generations": 4, "max_completion": 32, "beta": 0.05, "rewards": ["number"]},
        ),
        ("Train a reward model from smollm2-135m on pairs.jsonl", "reward", {}),
        (
            "Distill smollm2-135m from smollm2-360m on problems.jsonl, 64 token completions, temperature 0.8",
            "distill",
            {"teacher": "HuggingFaceTB/SmolLM2-360M", "max_completion": 64, "temperature": 0.8},
        ),
        (
            "Distil smollm2-1.7b into smollm2-135m on problems.jsonl",
            "distill",
            {"teacher": "HuggingFaceTB/SmolLM2-1.7B"},
        ),
        (
            "Distill smollm2-135m on problems.jsonl with smollm2-360m as the teacher",
            "distill",
            {"teacher": "HuggingFaceTB/SmolLM2-360M"},
        ),
    ],
)
def test_a_sentence_plans_a_method(make, text, method, said):
    found = make(text)
    one = stage(found)
    assert (one.spec.method, one.spec.model.id) == (method, SMOL)
    assert section(one.spec, method) == said
    assert found.unread == ()
    assert one.size.fits
    assert one.time.seconds.expected > 0
    assert one.data.used_rows == 40
    assert "auto" not in json.dumps([plain(one.spec.train), plain(one.spec.adapter)])


def test_a_loose_name_is_asked_about(make):
    found = make("GRPO SmolLM2 on problems.jsonl with 8 generations of 64 tokens")
    (question,) = found.questions
    assert question.field == "model.id"
    one = stage(make("GRPO SmolLM2 on problems.jsonl with 8 generations of 64 tokens", answers={"model.id": SMOL}))
    assert (one.spec.grpo.num_generations, one.spec.grpo.max_completion) == (8, 64)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(
    ("text", "format", "rows", "steps"),
    [
        ("DPO smollm2-135m on {}/dpo_en_demo.json with beta 0.2", "preference", 299, 75),
        ("KTO smollm2-135m on {}/kto_en_demo.json", "unpaired", 300, 72),
        ("Train a reward model from smollm2-135m on {}/dpo_en_demo.json", "preference", 299, 75),
        ("GRPO smollm2-135m on {}/gsm8k_train.jsonl with 8 generations of 64 tokens", "question-answer", 7473, 888),
    ],
)
def test_real_data(make, text, format, rows, steps):
    one = stage(make(text.format(SHARED)))
    assert (one.data.format, one.data.rows, one.data.used_rows) == (format, rows, rows)
    trained = rows - one.data.eval_rows
    assert one.spec.train.warmup_steps == -(-steps // 20) or one.spec.train.warmup_steps == 100
    assert -(-trained // one.spec.train.effective_batch) == pytest.approx(steps, rel=0.06)
    if one.spec.method == "grpo":
        assert one.spec.data[0].mapping.keep == ("answer",)
        assert one.spec.grpo.rewards == ("number",)


# --- specs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_spec_plans_a_method(make, method):
    spec = {"model": {"id": SMOL}, "data": [{"source": DATA.get(method, "problems.jsonl")}], "method": method}
    if method == "distill":
        spec["distill"] = {"teacher": "smollm2-360m"}
    one = stage(make(spec=spec))
    assert one.spec.method == method
    assert one.size.fits
    assert (
        one.spec.data[0].mapping.kind
        == {
            **dict.fromkeys(SAMPLED, "prompt-only"),
            **dict.fromkeys(("dpo", "reward"), "preference"),
            **{"kto": "unpaired", "sft": "prompt-completion"},
        }[method]
    )
    assert make(spec=plain(one.spec)).stages[0].spec == one.spec  # a resolved plan plans itself


@pytest.mark.parametrize(
    ("spec", "where", "said"),
    [
        ({"dpo": {"loss": "simpo"}}, "dpo.loss", "sigmoid_norm"),
        ({"dpo": {"label_smoothing": 0.5}}, "dpo.label_smoothing", "below 0.5"),
        ({"dpo": {"reference": "model"}}, "dpo.reference", "base or none"),
        ({"grpo": {"num_generations": 1}}, "grpo.num_generations", "at least 2"),
        ({"grpo": {"epsilon": 0}}, "grpo.epsilon", "above 0"),
        ({"grpo": {"scale_rewards": "std"}}, "grpo.scale_rewards", "group or batch or none"),
        ({"kto": {"beta": 0}}, "kto.beta", "above 0"),
        ({"distill": {"beta": 1.5}}, "distill.beta", "at most 1"),
    ],
)
def test_values_are_checked_by_name(make, spec, where, said):
    found = make(spec={"model": {"id": SMOL}, "data": [{"source": "pairs.jsonl"}], **spec})
    (error,) = found.errors
    assert (error.code, error.where) == ("spec.value", where)
    assert said.replace(" or ", ", ") in error.message.replace(" or ", ", ")


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("DPO smollm2-135m on problems.jsonl", "data.wrong_columns", "a chosen and a rejected answer"),
        ("Train a reward model from smollm2-135m on feedback.jsonl", "data.wrong_columns", "a chosen and a rejected"),
        ("KTO smollm2-135m on pairs.jsonl", "data.wrong_columns", "a label that says whether it is good"),
        ("GRPO smollm2-135m on pairs.jsonl", "data.wrong_columns", "grpo needs a prompt"),
        ("DPO smollm2-135m on pairs.jsonl with EXO loss", "dpo.label_smoothing", "0.001"),
        ("GRPO smollm2-135m on problems.jsonl, 512 new tokens, max length 400", "train.max_length", "no room"),
        ("KTO smollm2-135m on feedback.jsonl with batch size 1", "kto.batch", "2 or more"),
        ("KTO smollm2-135m on feedback.jsonl with packing", "train.unavailable", "pads its batches"),
        ("Distill smollm2-135m from Qwen3-0.6B on problems.jsonl", "distill.vocabulary", "of the student's family"),
        ("Distill smollm2-135m from some-org/teacher-7b on problems.jsonl", "model.unknown", "Did you mean"),
        ("PPO smollm2-135m on problems.jsonl", "method.unknown", "kto"),
    ],
)
def test_what_cannot_work_is_refused_by_name(make, text, code, said):
    found = make(text)
    (error,) = found.errors
    assert error.code == code
    assert said in f"{error.message} {error.fix}"
    assert error.fix


def test_what_the_kernel_would_refuse_is_refused_at_planning(make):
    spec = {"model": {"id": SMOL}, "data": [{"source": "pairs.jsonl"}], "method": "dpo"}
    half = make(spec={**spec, "train": {"dtype": "float16"}})
    assert [(item.code, item.where) for item in half.errors] == [("train.unavailable", "train.dtype")]
    early = {**spec, "train": {"early_stopping": 3}}
    blind = make(spec={**early, "eval": {"fraction": 0}})
    assert [(item.code, item.where) for item in blind.errors] == [("train.early_stopping", "train.early_stopping")]
    assert "eval.fraction" in blind.errors[0].fix
    assert make(spec=early).errors == ()


@pytest.mark.parametrize("hardware", [{"gpus": 2}, {"processes": 2}])
def test_what_trl_trains_runs_on_one_device(make, hardware):
    spec = {"model": {"id": SMOL}, "data": [{"source": "feedback.jsonl"}], "method": "kto", "hardware": hardware}
    assert "hardware.gpus" in codes(make(spec=spec).errors)
    spec |= {"data": [{"source": "pairs.jsonl"}], "method": "dpo"}
    assert "hardware.gpus" not in codes(make(spec=spec).errors)


@pytest.mark.parametrize("result", ["job:j-abc234", "stage:1"])
def test_results_of_jobs_are_no_models_yet(make, result):
    spec = {"model": {"id": SMOL}, "data": [{"source": "problems.jsonl"}], "method": "distill"}
    (error,) = make(spec={**spec, "distill": {"teacher": result}}).errors
    assert (error.code, error.where) == ("model.unavailable", "distill.teacher")


def test_rewards_and_their_weights_must_match(make):
    spec = {"model": {"id": SMOL}, "data": [{"source": "problems.jsonl"}], "method": "grpo"}
    grpo = {"rewards": ["number", "length:50"], "reward_weights": [1.0, 0.1]}
    assert stage(make(spec={**spec, "grpo": grpo})).spec.grpo.reward_weights == (1.0, 0.1)
    found = make(spec={**spec, "grpo": {**grpo, "reward_weights": [1.0]}})
    assert "grpo.reward_weights" in {item.where for item in found.errors}


def test_a_mapping_of_the_wrong_kind_is_refused(make):
    mapping = {"kind": "prompt-completion", "columns": {"prompt": "question", "completion": "answer"}}
    source = {"source": "problems.jsonl", "mapping": mapping}
    found = make(spec={"model": {"id": SMOL}, "data": [source], "method": "grpo"})
    assert codes(found.errors) == ["data.mapping"]
    assert "prompt-only" in found.errors[0].fix


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"method": "sft", "dpo": {"beta": 0.3}}, "sft does not read dpo.beta"),
        ({"method": "rloo", "grpo": {"loss": "bnpo", "beta": 0.1}}, "rloo does not read grpo.loss"),
        ({"method": "kto", "dpo": {"beta": 0.3}, "kto": {"beta": 0.3}}, "kto does not read dpo.beta"),
        ({"method": "dpo", "dpo": {"label_smoothing": 0.1}}, "sigmoid does not read dpo.label_smoothing"),
    ],
)
def test_what_a_method_does_not_read_is_said(make, spec, said):
    data = [{"source": DATA.get(spec["method"], "problems.jsonl")}]
    one = stage(make(spec={"model": {"id": SMOL}, "data": data, **spec}))
    (warning,) = [item for item in one.findings if item.code == "spec.unused"]
    assert (warning.level, said in warning.message) == ("warning", True)


# --- questions ------------------------------------------------------------------------------------------------------


def test_a_distillation_asks_for_its_teacher(make):
    text = "Distill smollm2-135m on problems.jsonl"
    assert [question.field for question in make(text).questions] == ["distill.teacher"]
    one = stage(make(text, answers={"distill.teacher": "smollm2-360m"}))
    assert one.spec.distill.teacher == "smollm2-360m"
    spec = {"model": {"id": SMOL}, "data": [{"source": "problems.jsonl"}], "method": "distill"}
    assert [question.field for question in make(spec=spec).questions] == ["distill.teacher"]
    assert stage(make(spec=spec, sets={"distill.teacher": "smollm2-360m"})).size.parts["other_model"] > 0


def test_a_loose_teacher_is_asked_about(make):
    (question,) = make("Distill smollm2-135m from llama on problems.jsonl").questions
    assert question.field == "distill.teacher"
    assert all("llama" in choice.lower() for choice in question.choices)


def test_our_own_methods_are_those_of_the_kernel():
    from tunesmith.executors.kernel import run
    from tunesmith.executors.kernel.sizing.rows import THROUGH_TRL
    from tunesmith.graph import methods

    assert run.OWN == methods.OWN
    assert {*methods.OWN, *THROUGH_TRL} == set(METHODS)


def test_nothing_of_another_method_gets_into_a_plan(make):
    one = stage(make("SFT smollm2-135m on problems.jsonl with temperature sensors as the topic"))
    assert one.spec.method == "sft"
