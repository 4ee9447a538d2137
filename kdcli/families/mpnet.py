"""MPNet: relative positions as one bias a head, which all layers share.

Source: Song et al. 2020, "MPNet: Masked and Permuted Pre-training for Language Understanding", NeurIPS 2020,
arXiv:2004.09297.
"""

from __future__ import annotations

from kdcli.families.family import Encoder

FAMILY = Encoder(
    name="mpnet",
    positions_after_padding=True,
    layers="mpnet.encoder.layer",
    embeddings="mpnet.embeddings",
    attention="attention.attn",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    attention_output="attention.attn.o",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    attention_norm="attention.LayerNorm",
    ffn_norm="output.LayerNorm",
    reader="classifier.dense",
    shared_head_bias=True,
    gives_tuple=True,
    taken_over={"layer_norm_eps": 1e-12},
)
