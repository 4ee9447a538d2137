"""kdcli's ``static`` students, :class:`kdcli.models.small.Static`: pooled token embeddings and one hidden layer."""

from __future__ import annotations

from kdcli.families.family import Family

FAMILY = Family(
    name="kdcli-static",
    segments=0,
    dropout=0.2,
    rate=3e-3,
    weights=lambda sizes, _: sizes["hidden"] * sizes["neurons"],
    instead="",
)
