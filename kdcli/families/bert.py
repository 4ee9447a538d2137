"""BERT, and the MiniLMs, TinyBERTs and miniatures made of it.

Source: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
NAACL 2019, arXiv:1810.04805.
"""

from __future__ import annotations

from dataclasses import replace

from kdcli.families.family import Encoder, FirstToken

FAMILY = Encoder(
    name="bert",
    layers="bert.encoder.layer",
    embeddings="bert.embeddings",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    attention_norm="attention.output.LayerNorm",
    ffn_norm="output.LayerNorm",
    reader="bert.pooler.dense",
    first_token=FirstToken(
        dropout="attention.self.dropout",
        attention_output="attention.output",
        ffn_in="intermediate",
        ffn_out="output",
    ),
    taken_over={"layer_norm_eps": 1e-12, "type_vocab_size": 2},
)


def relative(name: str, reader: str) -> Encoder:
    """A family whose layers are BERT's: a base of another name, with another head behind it."""
    return replace(
        FAMILY,
        name=name,
        layers=f"{name}.encoder.layer",
        embeddings=f"{name}.embeddings",
        reader=reader,
    )
