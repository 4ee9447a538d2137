"""Which layers ``--include`` and ``--exclude`` leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from kdcli.errors import UsageError


def patterns_leave(
    layers: Mapping[str, nn.Module],
    include: Sequence[str],
    exclude: Sequence[str],
    what: str,
    *,
    some: bool = True,
) -> dict[str, nn.Module]:
    """The layers that ``--include`` and ``--exclude`` leave.

    Raises:
        UsageError: A pattern matches no layer, or no layer is left where there have to be ``some``.
    """

    def matched(flag: str, patterns: Sequence[str]) -> set[str]:
        found = {pattern: {name for name in layers if fnmatchcase(name, pattern)} for pattern in patterns}
        for pattern, names in found.items():
            if not names:
                examples = ", ".join(list(layers)[:6]) or "none left, all layers are factorised or removed"
                raise UsageError(
                    f"{flag} '{pattern}' matches no {what}",
                    f"* stands for any characters; the names are such as {examples}",
                )
        return set().union(*found.values())

    kept = matched("--include", include or ("*",) * bool(layers))
    kept -= matched("--exclude", exclude)
    if some and layers and not kept:
        raise UsageError("--include and --exclude together leave no layer to factorise")
    return {name: layer for name, layer in layers.items() if name in kept}
