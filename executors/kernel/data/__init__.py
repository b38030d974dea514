"""Data: from files to labelled tokens. Works without torch; transformers only where a tokenizer is passed in.

read, rows_in, fingerprint    sources: rows with the line where they stand
detect, understand, convert   formats: what columns are, and an example of each row
prepare, split                what trains and what is held out
encode, encode_many           ids and labels
inspect, check                what a plan and the `check` command say of data
"""

from tunesmith.executors.kernel.data.checks import check
from tunesmith.executors.kernel.data.convert import Example, Message, convert
from tunesmith.executors.kernel.data.formats import detect, understand
from tunesmith.executors.kernel.data.load import Conversion, Prepared, mapping_of, prepare
from tunesmith.executors.kernel.data.render import Encoded, encode, encode_many, stop_tokens
from tunesmith.executors.kernel.data.report import inspect
from tunesmith.executors.kernel.data.sources import Row, fingerprint, read, rows_in
from tunesmith.executors.kernel.data.split import held_out, repeats, split

__all__ = [
    "Conversion",
    "Encoded",
    "Example",
    "Message",
    "Prepared",
    "Row",
    "check",
    "convert",
    "detect",
    "encode",
    "encode_many",
    "fingerprint",
    "held_out",
    "inspect",
    "mapping_of",
    "prepare",
    "read",
    "repeats",
    "rows_in",
    "split",
    "stop_tokens",
    "understand",
]
