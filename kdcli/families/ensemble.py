"""kdcli's ensembles of small encoders over one token table, :mod:`kdcli.models.ensemble`."""

from __future__ import annotations

from kdcli.families.family import Family

FAMILY = Family(name="kdcli-ensemble", segments=0)
