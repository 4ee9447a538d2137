"""DistilBERT: no segments and no pooler.

Source: Sanh et al. 2019, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
arXiv:1910.01108.
"""

from __future__ import annotations

from kdcli.families.family import ConfigKeys, Encoder

FAMILY = Encoder(
    name="distilbert",
    keys=ConfigKeys(hidden="dim", layers="n_layers", heads="n_heads", neurons="hidden_dim"),
    layers="distilbert.transformer.layer",
    embeddings="distilbert.embeddings",
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    ffn_in="ffn.lin1",
    ffn_out="ffn.lin2",
    attention_norm="sa_layer_norm",
    ffn_norm="output_layer_norm",
    reader="pre_classifier",
)
