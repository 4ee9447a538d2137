"""Several processes of one run, as ``torchrun`` and ``accelerate launch`` start them; no torch here.

Every process walks through the same stage. The first one alone measures, exports, writes and speaks; the others
are there for the training.
"""

from __future__ import annotations

import os


def rank() -> int:
    """Which process this is; 0 is the first, or the only one."""
    return int(os.environ.get("RANK", "0") or 0)


def local_rank() -> int:
    """Which process of its machine this is."""
    return int(os.environ.get("LOCAL_RANK", "0") or 0)


def count() -> int:
    """How many processes share the work."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def first() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0
