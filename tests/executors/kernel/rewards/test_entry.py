"""The grammar of `grpo.rewards`."""

import pytest

from tunesmith.executors.kernel.rewards import absolute, entries, parse
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import GrpoSpec


@pytest.mark.parametrize(
    ("text", "kind", "argument", "path", "weight"),
    [
        ("number", "number", "", "", 1),
        ("number:final", "number", "final", "", 1),
        ("0.2*think", "think", "", "", 0.2),
        (" 2 * exact:label ", "exact", "label", "", 2),
        ("-1.5e-1*length:200", "length", "200", "", -0.15),
        (".5*think:reasoning,answer", "think", "reasoning,answer", "", 0.5),
        (r"regex:^\d+$", "regex", r"^\d+$", "", 1),
        ("regex:a*b: c", "regex", "a*b: c", "", 1),
        ("length:<=800 characters", "length", "<=800 characters", "", 1),
        ("json", "json", "", "", 1),
        ("json:answer", "json", "answer", "", 1),
        ("json:s/x.json", "json", "s/x.json", "s/x.json", 1),
        ("reasoning-gym", "reasoning-gym", "", "", 1),
        ("rewards.py", "file", "", "rewards.py", 1),
        ("0.5*rl/my rewards.py:score", "file", "score", "rl/my rewards.py", 0.5),
        ("/a/b.py:größe", "file", "größe", "/a/b.py", 1),
        ("number.py:number", "file", "number", "number.py", 1),
        ("auto", "auto", "", "", 1),
    ],
)
def test_entries_are_taken_apart(text, kind, argument, path, weight):
    entry = parse(text)
    assert (entry.kind, entry.argument, entry.path, entry.weight) == (kind, argument, path, weight)
    assert entry.weighted == ("*" in text and not text.startswith("regex"))


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", "reward.syntax", "empty"),
        ("x" * 5000, "reward.syntax", "too long"),
        ("a\0b.py", "reward.syntax", "NUL"),
        ("1e999*number", "reward.syntax", "[WEIGHT*]"),
        ("2*auto", "reward.syntax", "weight"),
        ("nmber", "reward.unknown", "'number'"),
        ("Number", "reward.unknown", "'number'"),
        ("org/reward-model", "reward.unknown", "Reward models"),
        ("rewards.py:", "reward.unknown", "FILE.py:FUNCTION"),
        ("rewards.py:1st", "reward.unknown", "FILE.py:FUNCTION"),
        ("number:", "reward.argument", "colon"),
        ("regex", "reward.argument", "pattern"),
        ("regex:(", "reward.pattern", "missing )"),
        ("length", "reward.argument", "length above 0"),
        ("length:0", "reward.argument", "length above 0"),
        ("length:-3", "reward.argument", "length above 0"),
        ("length:long", "reward.argument", "length above 0"),
        ("think:<b>", "reward.argument", "tags"),
        ("reasoning-gym:chain_sum", "reward.argument", "data.source"),
    ],
)
def test_what_is_no_entry_is_refused_with_the_way_out(text, code, said):
    with pytest.raises(InputError) as caught:
        parse(text)
    assert caught.value.code == code
    assert caught.value.where == "grpo.rewards"
    assert said in str(caught.value)


def test_weights_stand_in_the_entries_or_beside_them():
    assert [one.weight for one in entries(GrpoSpec(rewards=("number", "0.2*think")))] == [1, 0.2]
    beside = GrpoSpec(rewards=("number", "think"), reward_weights=(2.0, -1.0))
    assert [one.weight for one in entries(beside)] == [2, -1]
    for rewards, weights, code in (
        (("number", "0.2*think"), (1.0, 1.0), "reward.weights"),
        (("number",), (1.0, 1.0), "reward.weights"),
        ((), (), "reward.none"),
        (("auto", "number"), (), "reward.auto"),
    ):
        with pytest.raises(InputError) as caught:
            entries(GrpoSpec(rewards=rewards, reward_weights=weights))
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("rewards.py:score", "/home/me/rewards.py:score"),
        ("0.5*../r.py:score", "0.5*/home/r.py:score"),
        ("2* json:s.json", "2* json:/home/me/s.json"),
        ("json:json:.json", "json:/home/me/json:.json"),
        ("/abs/r.py:f", "/abs/r.py:f"),
        ("number:a.b", "number:a.b"),
        ("regex:rewards.py", "regex:rewards.py"),
        ("no such thing", "no such thing"),
    ],
)
def test_only_paths_become_absolute(text, made):
    assert absolute(text, "/home/me") == made
