"""What kdcli knows of an architecture: the contract that every family in this folder keeps.

A family holds values (names of modules, keys of the configuration) and no algorithms; what is done with them is
written once, in :mod:`kdcli.families.layer`, :mod:`kdcli.families.stack` and the stages. Paths are dotted, as
``torch.nn.Module.get_submodule`` takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConfigKeys:
    """What ``config.json`` calls the sizes of a model."""

    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    neurons: str = "intermediate_size"

    def of(self, role: str) -> str:
        """The key for ``hidden``, ``layers``, ``heads`` or ``neurons``."""
        return {"hidden": self.hidden, "layers": self.layers, "heads": self.heads, "neurons": self.neurons}[
            role
        ]


def encoder_weights(sizes: Mapping[str, int], config: Mapping[str, Any]) -> int:
    """Weights of the layers of an encoder, without biases: four matrices for attention, two behind it."""
    hidden = sizes["hidden"]
    return sizes["layers"] * (4 * hidden * hidden + 2 * hidden * sizes["neurons"])


@dataclass(frozen=True, kw_only=True)
class Family:
    """Any architecture that kdcli knows, whether or not there is something in it to take out."""

    #: ``model_type`` in ``config.json``.
    name: str
    keys: ConfigKeys = field(default_factory=ConfigKeys)
    #: The linear layer that gives the logits.
    logits: str = "classifier"
    #: Segments where ``config.json`` has no ``type_vocab_size``; None: there is no table, and any id will do.
    segments: int | None = None
    #: The position of a token counts from the padding's id on, so the tables keep the rows up to that.
    positions_after_padding: bool = False
    #: Dropout of a student in training. The teacher's answers to many texts regularise an encoder enough; students
    #: that see no context overfit sooner.
    dropout: float = 0.0
    #: Peak learning rate of a student that starts from nothing; None: it goes by the width.
    rate: float | None = None
    #: The model type whose fusions onnxruntime's optimiser shall try.
    fused_as: str = "bert"
    #: Weights between tables and head, from sizes (0 where there is none) and the whole configuration.
    weights: Callable[[Mapping[str, int], Mapping[str, Any]], int] = encoder_weights
    #: What else than "--student static-64" makes one smaller that has no matrices to take out; None: it may have some.
    instead: str | None = None


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """Parts of a layer that can run for some tokens alone, relative to the layer.

    ``attended = attention_output(mixed, residual)``, then ``ffn_out(ffn_in(attended), attended)``, each with its
    residual and its norm.
    """

    dropout: str  # of the attention probabilities
    attention_output: str
    ffn_in: str
    ffn_out: str


@dataclass(frozen=True, kw_only=True)
class Encoder(Family):
    """A stack of layers with heads and neurons.

    Paths of the stack and of what stands before and behind it are relative to the classification model, those of the
    parts of a layer to the layer. Every sub-layer adds to the residual stream and normalises behind it.
    """

    layers: str
    #: What looks up the tokens, their positions and their segments: one table each, added up.
    embeddings: str
    attention: str
    query: str
    key: str
    value: str
    attention_output: str
    ffn_in: str
    ffn_out: str
    attention_norm: str
    ffn_norm: str
    #: The first linear layer after the encoder; it reads the first token.
    reader: str
    #: The table of the tokens and the norm of the sum, relative to ``embeddings``.
    token_table: str = "word_embeddings"
    embeddings_norm: str = "LayerNorm"
    #: Between embeddings and layers of another width, where the model has one.
    projection: str | None = None
    #: One bias a head is added to the scores, shared by all layers: a layer must pick its own heads' part.
    shared_head_bias: bool = False
    #: A layer gives its state in a tuple.
    gives_tuple: bool = False
    first_token: FirstToken | None = None
    #: Further keys of ``config.json`` that have the hidden size.
    also_hidden: tuple[str, ...] = ()
    #: Further keys that a blank one has from another of the family: key -> value where that has none.
    taken_over: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> str:
        """The table of the tokens, relative to the model."""
        return f"{self.embeddings}.{self.token_table}"

    def sizes(self, layers: int, hidden: int, heads: int) -> dict[str, int]:
        """What ``config.json`` of a blank one says, with four neurons a feature."""
        keys = self.keys
        return {
            keys.hidden: hidden,
            keys.layers: layers,
            keys.heads: heads,
            keys.neurons: 4 * hidden,
        } | dict.fromkeys(self.also_hidden, hidden)
