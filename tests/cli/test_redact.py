"""No secret survives."""

from __future__ import annotations

import pytest

from kdcli.report.redact import redact

SECRET = "Zx81Qw77Lm20Ab93"


@pytest.mark.parametrize(
    "text",
    [
        f"hf_{SECRET}",
        f"token hf_{SECRET}, used",
        f"https://ann:{SECRET}@host.example/x",
        f"https://{SECRET}@host.example/x",
        f"https://host/x?X-Amz-Signature={SECRET}&X-Amz-Date=1",
        f"https://host/x?a=1&sig={SECRET}",
        f"https://host/x?token={SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"--set api_key={SECRET}",
        f"password={SECRET}",
        f"HF_TOKEN={SECRET}",
    ],
)
def test_secrets_are_replaced(text: str) -> None:
    assert SECRET not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "kdcli prune out/student --sparsity 0.5",
        "https://host.example/models/org/name?revision=main",
        "tokenizer.json has 30522 tokens",
        "org/name@86b5e0934494bd15c9632b12f734a8a67f723594",
        "set steps=4 key=value",
        "user@host.example",
    ],
)
def test_everything_else_is_kept(text: str) -> None:
    assert redact(text) == text
