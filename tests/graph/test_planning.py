"""Plans from real data and the real catalogue, offline."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.executors.kernel.sizing.rows import processes
from tunesmith.graph import planning
from tunesmith.graph.planning import Draft, plan
from tunesmith.orchestrator.errors import BackendUnavailable
from tunesmith.orchestrator.nouns import Device, JobSpec, Request
from tunesmith.orchestrator.plain import build, plain

SHARED = Path(__file__).parents[3] / "shared" / "data"
GIB = 2**30
CPU = Device(backend="local", hardware="cpu", kind="cpu", memory_bytes=24 * GIB, peak_flops=3e11, bandwidth=2e10)
GPU = Device(
    backend="local", hardware="NVIDIA L4", kind="cuda", memory_bytes=24 * GIB, peak_flops=121e12, bandwidth=3e11
)
T4 = Device(
    backend="hf-jobs",
    hardware="t4-small",
    kind="cuda",
    memory_bytes=16 * GIB,
    peak_flops=65e12,
    bandwidth=3e11,
    usd_per_hour=0.4,
    as_of="2026-08-22",
)
A100 = replace(T4, hardware="a100-large", memory_bytes=80 * GIB, peak_flops=312e12, bandwidth=2e12, usd_per_hour=2.5)
SMOL = "smollm2-135m"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No Hub, and no models in a cache of the machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def make(tmp_path, rows):
    """Plans a sentence or a spec in the folder of `rows`, on one CPU unless told otherwise."""

    def made(text=None, devices=(CPU,), answers=None, **request):
        wanted = Request(text=text, cwd=str(rows.parent), **request)
        return plan(wanted, devices=lambda backend: devices, answers=answers, cache=tmp_path / "cache")

    return made


def codes(found):
    return [finding.code for finding in found]


def stage(found):
    assert len(found.stages) == 1, plain(found.findings)
    return found.stages[0]


# --- the golden plans -----------------------------------------------------------------------------------------------


def test_a_hub_data_set_out_of_reach_gives_a_full_plan_with_a_warning(make):
    found = make("Fine-tune Qwen3-0.6B on the dataset open-r1/codeforces-cots")
    one = stage(found)
    assert (found.intent, found.questions, found.errors) == ("train", (), ())
    assert found.command == ("tunesmith", "run", "Fine-tune Qwen3-0.6B on the dataset open-r1/codeforces-cots")
    assert (one.spec.model.id, one.spec.data[0].source) == ("Qwen/Qwen3-0.6B", "open-r1/codeforces-cots")
    assert (one.data.rows, one.data.used_rows, one.data.fingerprint) == (None, None, None)
    (problem,) = one.data.problems
    assert (problem.level, problem.code) == ("warning", "data.unreachable")
    assert "HF_HUB_OFFLINE" in problem.message
    assert one.size.params == 596_049_920
    assert one.size.fits
    assert "auto" not in json.dumps(plain(one.spec.train))
    assert {item.key for item in one.resolved} >= {"adapter.rank", "train.learning_rate", "train.max_length"}
    assert all(item.why for item in one.resolved)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_gsm8k_on_the_embedded_model(make):
    found = make(f"SFT smollm2-135m on {SHARED}/gsm8k_train.jsonl, first 200 rows, 20 steps")
    one = stage(found)
    assert found.errors == ()
    assert (one.spec.model.id, one.spec.train.max_steps, one.spec.data[0].limit) == (SMOL, 20, 200)
    assert (one.data.rows, one.data.used_rows, one.data.eval_rows) == (7473, 200, 10)
    assert one.data.mapping.columns == {"prompt": "question", "completion": "answer"}
    assert one.data.fingerprint.startswith("sha256:")
    assert one.time.seconds.low < one.time.seconds.expected < one.time.seconds.high
    (offer,) = one.offers
    assert (offer.backend, offer.hardware, offer.fits, offer.usd_worst) == ("local", "cpu", True, 0.0)


def test_relative_paths_begin_where_the_request_was_made(make, rows):
    for name in ("rows.jsonl", "./rows.jsonl", f"../{rows.parent.name}/rows.jsonl"):
        assert stage(make(f"SFT smollm2-135m on {name}")).spec.data[0].source == str(rows)
    spec = {"model": {"id": "smollm2-135m"}, "data": [{"source": "rows.jsonl"}]}
    assert stage(make(spec=spec)).spec.data[0].source == str(rows)


def test_a_plan_is_the_same_twice_and_its_hash_binds_what_matters(make, rows):
    text = "SFT smollm2-135m on rows.jsonl"
    one = make(text)
    assert one == make(text)
    assert build(type(one), json.loads(json.dumps(plain(one)))) == one
    hashes = {one.plan_hash, make(text, sets={"train.epochs": 2}).plan_hash, make(text, devices=[GPU, CPU]).plan_hash}
    hashes.add(make(text, sets={"limits.hours": 9}).plan_hash)
    rows.write_text(rows.read_text() + '{"prompt": "One more?", "completion": "Yes."}\n')
    hashes.add(make(text).plan_hash)
    assert len(hashes) == 5


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "where"),
    [
        ("SFT smollm2-135m on missing.jsonl", "data.missing_file", ""),
        ("SFT smollm2-135m on ./nowhere/rows", "data.missing_file", ""),
        ("SFT smollm2-135m on rows.jsonl for -3 epochs", "spec.value", "train.epochs"),
        ("SFT smollm2-135m on rows.jsonl for zero epochs", "spec.value", "train.epochs"),
        ("SFT smollm2-135m on the first 0 rows of rows.jsonl", "spec.value", "data.0.limit"),
        ("SFT smollm2-135m on rows.jsonl with rank 0", "spec.value", "adapter.rank"),
        ("SFT smollm2-135m on rows.jsonl with rank 5000", "spec.value", "adapter.rank"),
        ("SFT smollm2-135m on rows.jsonl, batch size -4", "spec.value", "train.effective_batch"),
        ("SFT smollm2-135m on rows.jsonl, hold out 150% for validation", "spec.value", "eval.fraction"),
        ("SFT smollm2-135m on rows.jsonl for at most -$5", "spec.value", "limits.usd"),
        ("SFT some-org/unknown-model on rows.jsonl", "model.unknown", "model.id"),
        ("SFT foobar-7b on rows.jsonl", "model.unknown", "model.id"),
        ("SFT smollm2-135m on rows.jsonl on hf jobs", "backend.unknown", "backend"),
        ("SFT smollm2-135m on rows.jsonl on my gpu", "hardware.unknown", "hardware"),
        ("SFT the model I just trained on rows.jsonl", "model.unavailable", "model.id"),
        ("purple monkey dishwasher", "request.not_understood", ""),
    ],
)
def test_errors_are_findings_with_a_code_and_a_place(make, text, code, where):
    found = make(text)
    assert codes(found.errors) == [code]
    assert not where or found.errors[0].where == where
    assert found.errors[0].message


def test_an_unknown_model_is_told_its_nearest_names(make):
    (error,) = make("SFT some-org/Qwen3-0.6B-mine on rows.jsonl").errors
    assert "Qwen/Qwen3-0.6B" in error.fix


def test_a_pipeline_shows_its_stages_and_is_refused(make):
    found = make("first SFT smollm2-135m on rows.jsonl, then DPO on rows.jsonl")
    assert [(one.spec.method, one.spec.model.id) for one in found.stages] == [("sft", SMOL), ("dpo", "stage:1")]
    assert found.stages[0].size.fits
    assert set(codes(found.errors)) >= {"pipeline.unavailable", "data.wrong_columns"}


def test_a_spec_of_a_later_version_is_refused_as_such(make):
    found = make(spec={"tunesmith": 2, "model": {"id": "smollm2-135m"}, "engine": "warp"})
    assert codes(found.errors) == ["spec.version"]
    assert "newer version" in found.errors[0].message


@pytest.mark.parametrize(
    ("spec", "code", "where", "said"),
    [
        ({"train": {"epoch": 3}}, "spec.unknown_key", "train.epoch", "train.epochs"),
        ({"modle": {"id": "x"}}, "spec.unknown_key", "modle", "model"),
        ({"train": {"epochs": "many"}}, "spec.value", "train.epochs", "a number"),
        ({"train": {"epochs": -1}}, "spec.value", "train.epochs", "above 0"),
        ({"train": {"packing": "yes"}}, "spec.value", "train.packing", "true or false"),
        ({"adapter": {"kind": "lara"}}, "spec.value", "adapter.kind", "qlora"),
        ({"train": []}, "spec.value", "train", "a mapping"),
        ({"data": []}, "spec.missing", "data", "no data"),
        ({"model": {}}, "spec.missing", "model.id", "missing"),
    ],
)
def test_a_bad_spec_is_refused_key_by_key(make, spec, code, where, said):
    found = make(spec={"model": {"id": "smollm2-135m"}, "data": [{"source": "rows.jsonl"}], **spec})
    (error,) = found.errors
    assert (error.code, error.where) == (code, where)
    assert said in error.message + error.fix


def test_a_feature_that_is_not_built_is_a_warning_and_never_dropped(make):
    one = stage(make("SFT smollm2-135m on rows.jsonl and push it to me/bot"))
    assert one.spec.deliver.push == "me/bot"
    assert [(item.level, item.where) for item in one.findings if item.code == "feature.unavailable"] == [
        ("warning", "deliver.push")
    ]


# --- questions, answers, settings -----------------------------------------------------------------------------------


def test_questions_and_their_answers(make, rows):
    found = make("Do a quick test run on 20 examples.")
    assert [question.field for question in found.questions] == ["model.id", "data.0.source"]
    assert (found.stages, found.errors) == ((), ())
    half = make("Do a quick test run on 20 examples.", answers={"model.id": "smollm2-135m"})
    assert [question.field for question in half.questions] == ["data.0.source"]
    whole = make(
        "Do a quick test run on 20 examples.", answers={"model.id": "smollm2-135m", "data.0.source": "rows.jsonl"}
    )
    one = stage(whole)
    assert whole.questions == ()
    assert (one.spec.data[0].source, one.spec.data[0].limit, one.spec.train.max_steps) == (str(rows), 20, 10)
    assert one.data.used_rows == 20
    assert "model.id=smollm2-135m" in whole.command


def test_an_answer_settles_an_ambiguous_model(make):
    assert make("Fine-tune llama on rows.jsonl").questions[0].choices
    found = make("Fine-tune llama on rows.jsonl", answers={"model.id": "meta-llama/Llama-3.2-1B"})
    assert stage(found).spec.model.id == "meta-llama/Llama-3.2-1B"


def test_a_setting_wins_over_words_and_is_in_the_command(make):
    found = make(
        "SFT foobar-7b on rows.jsonl for -3 epochs",
        sets={"train.epochs": 3, "model": "smollm2-135m", "data.mapping.columns.prompt": "prompt"},
    )
    assert codes(found.errors) == ["data.mapping"]  # a prompt alone is nothing to train on
    found = make(
        "SFT foobar-7b on rows.jsonl for -3 epochs",
        sets={
            "train.epochs": 3,
            "model": "smollm2-135m",
            "data.mapping.columns.prompt": "completion",
            "data.0.mapping.columns.completion": "prompt",
            "hardware": "cpu",
        },
    )
    one = stage(found)
    assert (one.spec.train.epochs, one.spec.model.id) == (3.0, "smollm2-135m")
    assert one.spec.data[0].mapping.columns == {"prompt": "completion", "completion": "prompt"}
    assert one.spec.data[0].mapping.kind == "prompt-completion"
    assert found.command[3:5] == ("--set", "train.epochs=3")


@pytest.mark.parametrize("key", ["", "train..epochs", "train.epochs.more", "data.7.limit", "stages.4.train.epochs"])
def test_a_setting_that_leads_nowhere_is_refused(make, key):
    found = make("SFT smollm2-135m on rows.jsonl for 2 epochs", sets={key: 1})
    assert codes(found.errors) == ["set.shape"]


def test_quick_shows_each_change_and_keeps_what_was_said(make):
    one = stage(make("SFT smollm2-135m on rows.jsonl", quick=True))
    changed = {item.key: item.value for item in one.resolved if "quick" in item.why}
    assert changed == {"data.0.limit": 100, "train.max_steps": 10}
    one = stage(make("SFT smollm2-135m on rows.jsonl, first 30 rows, 2 epochs", quick=True))
    assert (one.spec.data[0].limit, one.spec.train.epochs, one.spec.train.max_steps) == (30, 2.0, None)
    assert "--quick" in make("SFT smollm2-135m on rows.jsonl", quick=True).command


def test_other_intents_have_a_command_and_no_stages(make):
    for text, intent in [
        ("How's my training job doing?", "status"),
        ("Check if rows.jsonl works for SFT", "check"),
        ("Convert my fine-tuned model to GGUF with Q4_K_M quantization.", "export"),
        ("Which learning rate should I use?", "advice"),
    ]:
        found = make(text)
        assert (found.intent, found.stages, found.questions, found.errors) == (intent, (), (), ())
        assert found.command[0] == "tunesmith"


# --- devices and offers ---------------------------------------------------------------------------------------------


def test_offers_cover_every_device_with_its_price(make):
    gone = replace(CPU, backend="ray", hardware="cluster", why_not="no cluster answers")
    one = stage(make("SFT smollm2-135m on rows.jsonl", devices=[CPU, gone, T4, A100]))
    assert [offer.hardware for offer in one.offers] == ["cpu", "cluster", "t4-small", "a100-large"]
    _, ray, t4, a100 = one.offers
    assert (ray.fits, ray.seconds, ray.why_not) == (False, None, "no cluster answers")
    assert t4.usd.expected == pytest.approx(t4.seconds.expected / 3600 * 0.4)
    assert t4.usd.high <= t4.usd_worst
    assert a100.seconds.expected < t4.seconds.expected
    assert t4.as_of == "2026-08-22"


def test_a_model_that_does_not_fit_is_refused_with_what_would(make):
    found = make("Full fine-tuning of Llama-3.1-8B on rows.jsonl on hf jobs", devices=[CPU, T4, A100])
    assert stage(found).spec.hardware == "t4-small"
    (error,) = found.errors
    assert error.code == "size.does_not_fit"
    assert not stage(found).offers[1].fits
    assert stage(found).offers[1].why_not


@pytest.mark.parametrize(
    ("words", "hardware"),
    [
        ("", "NVIDIA L4"),
        ("on my gpu", "NVIDIA L4"),
        ("on the cpu", "cpu"),
        ("on hf jobs", "t4-small"),
        ("on an a100", "a100-large"),
        ("on a t4 in the cloud", "t4-small"),
    ],
)
def test_the_device_is_the_first_ready_one_that_was_asked_for(make, words, hardware):
    found = make(f"SFT smollm2-135m on rows.jsonl {words}", devices=[GPU, CPU, T4, A100])
    assert (found.errors, stage(found).spec.hardware) == ((), hardware)


@pytest.mark.parametrize(
    ("asked", "full", "means"),
    [
        ("RTX 4090", "NVIDIA GeForce RTX 4090", True),
        ("RTX 4090 Laptop", "NVIDIA GeForce RTX 4090 Laptop GPU", True),
        ("RTX 4090", "NVIDIA GeForce RTX 4090 Laptop GPU", False),
        ("RTX 4070 Ti", "NVIDIA GeForce RTX 4070", False),
        ("RTX 4070", "NVIDIA GeForce RTX 4070 Ti SUPER", False),
        ("L4", "NVIDIA L4", True),
        ("L4", "NVIDIA L40S", False),
        ("A100", "NVIDIA A100-SXM4-80GB", True),
    ],
)
def test_a_card_is_known_by_its_short_name(make, asked, full, means):
    spec = {"model": {"id": SMOL}, "data": [{"source": "rows.jsonl"}], "backend": "local", "hardware": asked}
    found = make(spec=spec, devices=[replace(GPU, hardware=full), CPU])
    assert codes(found.errors) == ([] if means else ["hardware.unknown"])
    assert (stage(found).spec.hardware == full) is means


@pytest.mark.parametrize(
    ("words", "code", "card"),
    [
        ("on my 4090", "hardware.unknown", "RTX 4090"),
        ("on a 16 GB card", "hardware.unknown", "RTX 4080"),
        ("on an A100", "backend.unknown", "A100 80GB"),
        ("on an H100", "hardware.unknown", "H100 80GB"),
    ],
)
def test_a_card_that_is_not_here_is_planned_for_all_the_same(make, words, code, card):
    """A person who thinks of buying or renting one sees what it would do; nothing can be started on it."""
    found = make(f"QLoRA Llama-3.1-8B on rows.jsonl {words}")
    (error,) = found.errors
    one = stage(found)
    assert (error.code, error.fix.endswith(f"What is foretold is for the {card}.")) == (code, True)
    assert one.size.fits
    assert one.size.device_bytes > 15 * GIB
    assert one.time is not None
    assert [offer.hardware for offer in one.offers] == ["cpu"]
    assert not {"backend", "hardware"} & {item.key for item in one.resolved}


@pytest.mark.parametrize(("hardware", "named"), [({"gpus": 2}, "NVIDIA L4"), ({"processes": 2}, "cpu")])
def test_how_many_processes_stands_whichever_device_is_chosen(make, hardware, named):
    spec = {"model": {"id": SMOL}, "data": [{"source": "rows.jsonl"}], "hardware": hardware}
    found = make(spec=spec, devices=[replace(GPU, count=2), CPU])
    one = stage(found)
    assert (found.errors, one.spec.hardware, processes(one.spec.hardware)) == ((), hardware, 2)
    assert "hardware" not in {item.key for item in one.resolved}
    assert [offer.hardware for offer in one.offers if offer.fits] == ["NVIDIA L4", "cpu"]
    again = stage(make(spec=plain(one.spec), devices=[replace(GPU, count=2), CPU]))
    assert (again.spec, again.resolved) == (one.spec, ())
    alone = make(spec={**spec, "hardware": named}, devices=[replace(GPU, count=2), CPU])
    assert stage(alone).spec.hardware == named
    assert alone.plan_hash != found.plan_hash


def test_an_offer_counts_the_processes_that_its_device_would_run(make):
    """On the CPU the memory is shared by all; a GPU that is offered beside it runs one."""
    small = replace(CPU, memory_bytes=3 * GIB)
    spec = {"model": {"id": SMOL}, "data": [{"source": "rows.jsonl"}], "hardware": {"processes": 8}}
    found = make(spec=spec, devices=[small, GPU])
    assert codes(found.errors) == ["size.does_not_fit"]
    assert [offer.fits for offer in stage(found).offers] == [False, True]


def test_a_device_that_is_not_ready_says_why(make):
    broken = replace(CPU, why_not="torch is not installed")
    found = make("SFT smollm2-135m on rows.jsonl", devices=[broken])
    assert codes(found.errors) == ["backend.not_ready"]
    assert "torch is not installed" in found.errors[0].message
    ready = make("SFT smollm2-135m on rows.jsonl", devices=[replace(GPU, why_not="no driver"), CPU])
    assert (ready.errors, stage(ready).spec.hardware) == ((), "cpu")


def test_a_backend_out_of_reach_is_a_finding(rows, tmp_path):
    def away(backend):
        raise BackendUnavailable("The backend ray cannot be loaded.", code="backend.broken")

    request = Request(text="SFT smollm2-135m on rows.jsonl", cwd=str(rows.parent))
    assert codes(plan(request, devices=away, cache=tmp_path).errors) == ["backend.broken"]


def test_caps_that_are_too_low_are_said(make):
    text = "SFT Qwen3-0.6B on rows.jsonl, 50000 steps"
    one = stage(make(f"{text}, in under 1 minute"))
    assert [(item.level, item.where) for item in one.findings if item.code == "limits.too_low"] == [
        ("error", "limits.hours")
    ]
    one = stage(make(f"{text}, for at most $0.01, on hf jobs", devices=[CPU, T4]))
    assert "limits.usd" in [item.where for item in one.findings if item.code == "limits.too_low"]
    assert one.offers[1].usd_worst == 0.01


# --- the four steps -------------------------------------------------------------------------------------------------


def test_a_draft_travels_as_json_between_the_steps(make, rows, tmp_path):
    text = "SFT smollm2-135m on rows.jsonl, quick"

    def travel(draft):
        assert draft == build(Draft, json.loads(json.dumps(plain(draft))))
        return build(Draft, json.loads(json.dumps(plain(draft))))

    draft = travel(planning.intake(Request(text=text, cwd=str(rows.parent)), {}))
    draft = travel(planning.inspect(draft, tmp_path / "cache"))
    draft = travel(planning.size(draft, lambda backend: [CPU], tmp_path / "cache"))
    assert planning.estimate(draft) == make(text)


def test_the_steps_pass_over_a_draft_without_stages(tmp_path):
    draft = planning.intake(Request(text="train a llm", cwd="/"), {})
    through = planning.size(planning.inspect(draft, tmp_path), lambda backend: [CPU], tmp_path)
    assert through == draft
    assert planning.estimate(through).questions == draft.questions


def test_a_resolved_spec_plans_to_itself(make):
    one = stage(make("SFT smollm2-135m on rows.jsonl, 5 steps"))
    again = stage(make(spec=plain(one.spec)))
    assert build(JobSpec, plain(again.spec)) == one.spec
    assert again.resolved == ()


def test_the_mapping_of_every_source_is_settled_in_the_plan(make, rows):
    other = rows.with_name("other.jsonl")
    other.write_text("".join(json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in range(9)))
    one = stage(make(spec={"model": {"id": SMOL}, "data": [{"source": str(rows)}, {"source": str(other)}]}))
    assert [source.mapping.columns for source in one.spec.data] == [
        {"prompt": "prompt", "completion": "completion"},
        {"prompt": "question", "completion": "answer"},
    ]
    assert {"data.0.mapping", "data.1.mapping"} <= {item.key for item in one.resolved}
    said = {"kind": "prompt-completion", "columns": {"prompt": "answer", "completion": "question"}}
    one = stage(make(spec={"model": {"id": SMOL}, "data": [{"source": str(other), "mapping": said}]}))
    assert one.spec.data[0].mapping.columns == said["columns"]
    assert "data.0.mapping" not in {item.key for item in one.resolved}


def test_planning_loads_nothing_heavy(rows, tmp_path):
    program = (
        "import sys, json; from pathlib import Path\n"
        "from tunesmith.graph.planning import plan\n"
        "from tunesmith.orchestrator.nouns import Device, Request\n"
        "cpu = Device(backend='local', hardware='cpu', kind='cpu', memory_bytes=2**34)\n"
        "request = Request(text='SFT smollm2-135m on rows.jsonl', cwd=sys.argv[1])\n"
        "made = plan(request, devices=lambda b: [cpu], cache=Path(sys.argv[1]))\n"
        "assert made.stages and not made.errors\n"
        "heavy = ('torch', 'transformers', 'datasets', 'langgraph', 'pydantic', 'pyarrow', 'httpx', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(rows.parent)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path)},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
