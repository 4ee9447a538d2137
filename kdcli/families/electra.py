"""ELECTRA: BERT's layers, behind embeddings that may be narrower.

Source: Clark et al. 2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", ICLR 2020,
arXiv:2003.10555.
"""

from __future__ import annotations

from dataclasses import replace

from kdcli.families.bert import relative

FAMILY = replace(
    relative("electra", "classifier.dense"),
    projection="electra.embeddings_project",
    also_hidden=("embedding_size",),
)
