"""kdcli's ``cnn`` students, in :mod:`kdcli.models.small`: a convolution over windows of tokens."""

from __future__ import annotations

from kdcli.families.family import Family

FAMILY = Family(
    name="kdcli-cnn",
    segments=0,
    dropout=0.2,
    weights=lambda sizes, config: sizes["hidden"] * sizes["neurons"] * sum(config.get("widths") or ()),
    instead="; its convolutions by kdcli lowrank --method tucker2",
)
