"""Hostile text made harmless: control characters visible, bidi and invisible marks gone, secrets masked."""

from __future__ import annotations

import re

# Tokens of the services people use with models, and passwords inside URLs. The digit asked of `sk-` keeps
# ordinary names (sk-learn-...) out.
_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{30,}|\bhf_[A-Za-z0-9]{20,}"
    r"|\bsk-(?=[\w-]*\d)[\w-]{20,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\bxox[abprs]-[\w-]{10,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
    r"|(?<=://)[^/\s@:]*:[^/\s@]*(?=@)"
    r"|(?<=https://)[^/\s@]+(?=@)|(?<=http://)[^/\s@]+(?=@)"
    r"|(?<=[?&])(?:access_token|token|api_key|apikey|sig|signature|X-Amz-Signature)=[^&\s#]{6,}",
)

_INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def has_secret(text: str) -> bool:
    """Whether something in `text` looks like a token or a password."""
    return _SECRET.search(text) is not None


def mask(text: str) -> str:
    """`text` with everything that looks like a secret replaced by `***`."""
    return _SECRET.sub("***", text)


def inert(text: object, *, lines: bool = False, limit: int | None = None) -> str:
    """`text` as it may be shown: `\\x1b` for an escape, no bidi or invisible marks, at most `limit` characters.

    Newlines and tabs stay only with `lines`. Secrets are masked, also in text that others wrote.
    """
    shown = mask(_INVISIBLE.sub("", str(text)))
    if limit is not None and len(shown) > limit:
        shown = shown[: max(limit - 3, 0)] + "..."
    return (_CONTROL if lines else _CONTROL_LINE).sub(_visible, shown)


def _visible(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code in (9, 10, 13):
        return {9: "\\t", 10: "\\n", 13: "\\r"}[code]
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
