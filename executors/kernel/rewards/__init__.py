"""Rewards for GRPO and RLOO: what is built in, users' functions by TRL's signature, and the scores of completions.

entries, hashes, load    make: from a spec to its functions; a user's file runs in `load` alone, in the job's process
auto, check              planned: what a plan says of rewards, without running anything
dry_run                  trial: every reward on sample rows, before a device works for it
Rewards, Scores          score: values per completion and function, their weighted sum, and what is logged

Works without torch, and imports no reward's package before it is needed.
"""

from tunesmith.executors.kernel.rewards.call import Reward
from tunesmith.executors.kernel.rewards.entry import BUILT_IN, Entry, absolute, parse
from tunesmith.executors.kernel.rewards.make import METHODS, entries, hashes, load
from tunesmith.executors.kernel.rewards.planned import CHOICES, Checked, Choice, auto, check
from tunesmith.executors.kernel.rewards.score import Rewards, Scores, columns_of
from tunesmith.executors.kernel.rewards.trial import dry_run

__all__ = [
    "BUILT_IN",
    "CHOICES",
    "METHODS",
    "Checked",
    "Choice",
    "Entry",
    "Reward",
    "Rewards",
    "Scores",
    "absolute",
    "auto",
    "check",
    "columns_of",
    "dry_run",
    "entries",
    "hashes",
    "load",
    "parse",
]
