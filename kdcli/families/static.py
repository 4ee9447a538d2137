"""kdcli's ``static`` students, in :mod:`kdcli.models.small`: pooled token embeddings and one hidden layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcli.families.family import Family


def _hidden_layer(sizes: Mapping[str, int], config: Mapping[str, Any]) -> int:
    """Weights of the hidden layer, which reads a text, or four vectors of two (kdcli.models.small)."""
    return sizes["hidden"] * sizes["neurons"] * (1 if config.get("pair_token_id") is None else 4)


FAMILY = Family(
    name="kdcli-static",
    segments=0,
    dropout=0.2,
    rate=3e-3,
    weights=_hidden_layer,
    instead="",
)
