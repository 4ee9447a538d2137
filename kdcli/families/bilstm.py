"""kdcli's ``bilstm`` students, in :mod:`kdcli.models.small`: one LSTM in each direction."""

from __future__ import annotations

from kdcli.families.family import Family

FAMILY = Family(
    name="kdcli-bilstm",
    segments=0,
    dropout=0.2,
    weights=lambda sizes, _: 8 * sizes["neurons"] * (sizes["hidden"] + sizes["neurons"]),
    instead="",
)
