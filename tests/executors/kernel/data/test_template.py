"""The plan's renderer writes what the tokenizer writes, without transformers."""

import pytest

from tunesmith.executors.kernel.data import Example, Message, encode
from tunesmith.executors.kernel.data.template import renderer
from tunesmith.executors.kernel.data.tokens import Counter
from tunesmith.orchestrator.errors import InputError

TALK = (Message("user", "hi <b>"), Message("assistant", "é"))
TEMPLATES = [
    "{%- for m in messages %}\n  {{- '<|im_start|>' + m.role + '\n' + m.content|trim + '<|end|>\n' }}\n{%- endfor %}",
    "{{ bos_token }}{% for m in messages %}{% if loop.index0 > 5 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ eos_token }}",
    "{{ strftime_now('%Y') }}{% set ns = namespace(x=1) %}{% if tools is none %}{{ ns.x }}{% endif %}",
    "{% if not date is defined %}{{ messages[0]['content'] }}{% endif %}{{ add_generation_prompt }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(small, tmp_path, source, prompt):
    tokenizer = small(source, special=("<s>",))
    tokenizer.bos_token = "<s>"
    tokenizer.save_pretrained(tmp_path)
    expected = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in TALK], tokenize=False, add_generation_prompt=prompt
    )
    assert renderer(tmp_path)(TALK, prompt) == expected


def test_the_template_inside_the_config(tmp_path):
    assert renderer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "default", "template": "x{{ bos_token }}"}], "bos_token": {"content": "<s>"}}'
    )
    assert renderer(tmp_path)(TALK, False) == "x<s>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__ }}{{ 1/0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_templates_of_strangers_raise_only_the_typed_error(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(InputError) as caught:
        renderer(tmp_path)(TALK, False)
    assert caught.value.code == "data.template_refused"


def test_a_template_that_is_none(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(InputError) as caught:
        renderer(tmp_path)
    assert caught.value.code == "data.bad_template"


def test_counts_are_the_kernels(small, tmp_path):
    tokenizer = small()
    tokenizer.save_pretrained(tmp_path)
    examples = [
        Example(0, prompt="two and two", completion="four"),
        Example(1, messages=TALK),
        Example(2, text="words"),
    ]
    expected = [len(encode(example, tokenizer, None).ids) for example in examples]
    assert Counter(tmp_path).count(examples) == expected
