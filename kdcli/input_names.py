"""What transformers calls the inputs of a model of texts.

``kdcli.inputs`` is where batches are made and asked; this is for what lies below it and calls a model by hand.
"""

from __future__ import annotations

IDS = "input_ids"
"""Token ids, (B, T)."""

MASK = "attention_mask"
"""1 for a real token, 0 for padding, (B, T)."""

SEGMENTS = "token_type_ids"
"""0 for a token of the first text, 1 for one of the second, (B, T)."""
