"""Hostile sentences: bounded time, nothing executed, nothing invisible passed on."""

import time

import pytest

from tunesmith.graph.intake import MOST, read

HOSTILE = [
    "'" * MOST,
    "'a', 'b' and " * 300,
    "warm up " * 500,
    "in for under within at most " * 140,
    "qwen3 " * 660,
    "1 " * 2000,
    "two and a half " * 260,
    "https://huggingface.co/" * 170,
    "push it to the my our " * 180,
    "../a " * 800,
    "\x00\x1b[31m" * 600,
    "\u202e" * MOST,
    "[/red] [link=file:///etc/passwd] %s {0} ${HOME} $(id) `id` <script> fine-tune qwen3-0.6b on data.jsonl",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_takes_bounded_time_and_no_control_characters_pass(text):
    began = time.process_time()
    reading = read(text[:MOST])
    assert time.process_time() - began < 20  # a pattern that backtracks would take hours
    said = " ".join([*reading.unread, *reading.command, *(item.message for item in reading.findings)])
    assert not any(ord(one) < 32 or one == "\u202e" for one in said)


def test_a_request_that_begins_with_a_dash_is_no_option():
    assert not any(part.startswith("-") for part in read("--help: how is my job doing?").command)
