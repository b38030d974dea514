"""Data: from files to labelled tokens. Works without torch; transformers only where a tokenizer is passed in.

read, rows_in, fingerprint    sources: rows with the line where they stand
detect, understand, convert   formats: what columns are, and an example of each row
prepare, split                what trains and what is held out
encode, encode_many           ids and labels
encode_pairs, encode_prompts  preference pairs, and prompts that the model shall answer
cached                        the same, kept on disk by content
inspect, check                what a plan and the `check` command say of data
"""

from tunesmith.executors.kernel.data.cached import Tokens, cached
from tunesmith.executors.kernel.data.checks import check
from tunesmith.executors.kernel.data.convert import Example, Message, convert
from tunesmith.executors.kernel.data.formats import detect, understand
from tunesmith.executors.kernel.data.load import Conversion, Prepared, mapping_of, prepare, sample
from tunesmith.executors.kernel.data.pairs import Pair, encode_pairs
from tunesmith.executors.kernel.data.prompts import Prompt, encode_prompts
from tunesmith.executors.kernel.data.render import Encoded, encode, encode_many, stop_tokens
from tunesmith.executors.kernel.data.report import inspect
from tunesmith.executors.kernel.data.sources import Row, fingerprint, read, rows_in
from tunesmith.executors.kernel.data.split import held_out, repeats, split

__all__ = [
    "Conversion",
    "Encoded",
    "Example",
    "Message",
    "Pair",
    "Prepared",
    "Prompt",
    "Row",
    "Tokens",
    "cached",
    "check",
    "convert",
    "detect",
    "encode",
    "encode_many",
    "encode_pairs",
    "encode_prompts",
    "fingerprint",
    "held_out",
    "inspect",
    "mapping_of",
    "prepare",
    "read",
    "repeats",
    "rows_in",
    "sample",
    "split",
    "stop_tokens",
    "understand",
]
