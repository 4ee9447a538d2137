"""RoBERTa and DistilRoBERTa: BERT's layers, and a head of its own in place of the pooler.

Source: Liu et al. 2019, "RoBERTa: A Robustly Optimized BERT Pretraining Approach", arXiv:1907.11692.
"""

from __future__ import annotations

from dataclasses import replace

from kdcli.families.bert import relative

FAMILY = replace(relative("roberta", "classifier.dense"), positions_after_padding=True)
