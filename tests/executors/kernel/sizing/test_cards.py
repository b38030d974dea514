"""Usual cards: what their names mean, and what a job would do on the next ones."""

from dataclasses import replace

import pytest

from tunesmith.executors.kernel.catalogue import find
from tunesmith.executors.kernel.sizing import cards, resolve


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("a100", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("t4-small", "T4"),
        ("l40s", "L40S"),
        ("L4", "L4"),
        ("a10g-large", "A10G"),
        ("RTX 4070 Ti Super", None),
        ("RTX 4090 Laptop", None),
        ("cpu", None),
        ("RTX 6000 Ada", None),
    ],
)
def test_a_card_is_found_by_what_people_and_drivers_call_it(said, name):
    found = cards.named(said)
    assert (found.name if found else None) == name


def test_the_next_cards_are_the_next_sizes(make):
    report = make.report()
    for card, names in (
        ("RTX 4090", ["RTX 4080", "RTX 5090"]),
        ("RTX 3060", ["RTX 4080"]),
        ("H200", ["H100 80GB"]),
        ("A100 40GB", ["RTX 5090", "L40S"]),
    ):
        _, found, *_ = resolve(make.spec(), find("qwen3-0.6b"), report, cards.named(card).device("elsewhere"))
        assert [item.hardware for item in found.elsewhere] == names
        assert all(item.fits and item.speed > 0 for item in found.elsewhere)
    speeds = {item.hardware: item.speed for item in found.elsewhere}
    assert speeds["RTX 5090"] <= 1  # so small a model waits for launches on either
    capped = replace(make.spec(), limits=replace(make.spec().limits, memory_gb=12))
    _, found, *_ = resolve(capped, find("qwen3-0.6b"), report, cards.named("H100").device("elsewhere"))
    assert [item.hardware for item in found.elsewhere] == ["RTX 4080"]
    _, found, *_ = resolve(make.spec(), find("qwen3-0.6b"), report, make.cpu(16))
    assert [item.hardware for item in found.elsewhere] == ["RTX 4070"]
    assert cards.of_size(20).name == "RTX 4090"
    assert cards.of_size(500) is None
