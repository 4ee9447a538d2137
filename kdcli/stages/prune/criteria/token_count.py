r"""Token count: keep the tokens that given texts use, and those from which any word can be spelled.

With $n(t)$ how often token $t$ occurs in the texts, the set of tokens that stay is

    \{\, t : n(t) \ge \text{min\_count} \,\} \;\cup\;
    \{\, t : t \text{ is special, unknown, a single character or its continuation form} \,\}

The texts are the training and validation rows, and those of ``vocab_text``. With ``min_count`` 1 they are split into
the same tokens as before. Other texts may be split into more and shorter tokens; the share of unknown ones is
reported. BPE also keeps what it makes on its way to a token that stays.

Source: Yang, Cui, Chen 2022, "TextPruner: A Model Pruning Toolkit for Pre-Trained Language Models",
arXiv:2203.15996 (vocabulary pruning: tokens that do not occur in the texts are dropped).
Differs: single characters stay, so that a word nobody has seen is spelled and not unknown; and the tokenizer of any
BPE keeps its merges in order.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from kdcli.stages.prune.criterion import Criterion, TokenJob


class Config(BaseModel):
    """Parameters of dropping tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    min_count: int = Field(1, ge=1, description="how often a token must occur in the texts to stay")
    vocab_text: str | None = Field(
        None, description="a file of extra texts: one a line, or a table with the data's text columns"
    )


def keep(job: TokenJob, config: Config) -> np.ndarray:
    """True where a token stays, (V,)."""
    return job.protected | (job.counts >= config.min_count)


METHOD = Criterion(config=Config, keep=keep)
