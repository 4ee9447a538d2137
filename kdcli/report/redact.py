"""Keep secrets out of reports, logs and error texts."""

from __future__ import annotations

import re

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}\b"), "hf_***"),
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1***@"),
    (
        re.compile(r"([?&](?:X-Amz-[A-Za-z-]+|Signature|sig|token|access_token|key)=)[^&\s]+", re.IGNORECASE),
        r"\1***",
    ),
    (re.compile(r"\b(Bearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), r"\1***"),
    (re.compile(r"\b([\w-]*(?:token|password|secret|api_?key)=)\S+", re.IGNORECASE), r"\1***"),
)


def redact(text: str) -> str:
    """Replace tokens, passwords in addresses and signatures by ``***``."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
