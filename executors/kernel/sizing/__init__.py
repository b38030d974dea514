"""Memory and time of a job, foretold from a model's shape alone: no weights, no GPU, no torch.

`size.py` counts bytes, `time.py` seconds, `defaults.py` says what an `auto` becomes and why, and `resolve.py` fits a
spec to a device with them.
"""

from tunesmith.executors.kernel.sizing.resolve import resolve, unknown_model

__all__ = ["resolve", "unknown_model"]
