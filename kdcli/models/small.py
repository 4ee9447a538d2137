"""Students without a transformer: pooled token embeddings, a convolution over windows, a pair of LSTMs.

Two texts are summed up one by one, into u and v, and the answer is read from (u, v, |u - v|, u * v): what makes a pair
is how its texts differ, and one summary of both at once cannot tell. ``pair_token_id`` says where the first text ends.

Source: Conneau et al. 2017, "Supervised Learning of Universal Sentence Representations from Natural Language Inference
Data", EMNLP, arXiv:1705.02364, section 3.1.

Importing this module teaches transformers their names, so that ``AutoConfig`` and
``AutoModelForSequenceClassification`` know them; kdcli does so whenever it loads or builds a model.

Shape letters: B batch, T tokens, D features of a token embedding, F features that are pooled over the tokens,
S features that sum up a text, P features that the classifier reads, C classes. No answer depends on padding; padding
stands on the right.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from kdcli.input_names import IDS


class SmallConfig(PreTrainedConfig):
    """What the three have in common. ``max_position_embeddings`` only says where texts are cut."""

    vocab_size: int = 30522
    hidden_size: int = 128  # D
    max_position_embeddings: int = 512
    pad_token_id: int | None = 0
    dropout: float = 0.1
    #: The token after the first of two texts; None: a row is one text.
    pair_token_id: int | None = None


class StaticConfig(SmallConfig):
    """Sizes of :class:`StaticForSequenceClassification`."""

    model_type = "kdcli-static"
    intermediate_size: int = 512  # of the hidden layer, P


class CnnConfig(SmallConfig):
    """Sizes of :class:`CnnForSequenceClassification`."""

    model_type = "kdcli-cnn"
    intermediate_size: int = 100  # filters of a window
    widths: list[int] | None = None  # of the windows in tokens; 3, 4 and 5 when None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.widths = [3, 4, 5] if self.widths is None else self.widths


class BilstmConfig(SmallConfig):
    """Sizes of :class:`BilstmForSequenceClassification`."""

    model_type = "kdcli-bilstm"
    intermediate_size: int = 128  # of each direction's state


class _Small(PreTrainedModel):
    """Token embeddings, :meth:`states` of the tokens, their :meth:`summary`, dropout and a linear classifier.

    Args:
        config: Its sizes.
        summary: S, of one text.
        pooled: P, what the classifier reads; that of all summaries when None.
    """

    main_input_name = IDS

    def __init__(self, config: Any, summary: int, pooled: int | None = None) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(pooled or read_features(config, summary), config.num_labels)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings (V, D)."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.word_embeddings = value  # type: ignore[assignment]

    def states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """From embeddings (B, T, D) and a mask (B, T) bool, True on real tokens, to what :meth:`summary` reads."""
        return tokens

    def summary(self, states: Tensor, mask: Tensor) -> Tensor:
        """From states to (B, S), over the tokens where the mask (B, T) is True."""
        raise NotImplementedError

    def features(self, read: Tensor) -> Tensor:
        """From the summary of a row, (B, S) or for two texts (B, 4 S), to (B, P)."""
        return read

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classify a batch.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 on real tokens, which stand on the left; all are real when None.
            token_type_ids: Ignored: not every tokenizer gives them.
            inputs_embeds: (B, T, D), in place of ``input_ids``.

        Raises:
            ValueError: A model of pairs without ``input_ids``, which say where the first text ends.
        """
        tokens = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        mask = attention_mask.bool()
        states = self.states(tokens, mask)
        ends = self.config.pair_token_id
        if ends is None:
            read = self.summary(states, mask)
        else:
            if input_ids is None:
                raise ValueError("a model of pairs needs input_ids: they say where the first text ends")
            first = before_first(input_ids == ends)
            u, v = self.summary(states, mask & first), self.summary(states, mask & ~first)
            read = torch.cat([u, v, (u - v).abs(), u * v], 1)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(self.features(read))))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv1d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class StaticForSequenceClassification(_Small):
    """The mean of token embeddings, and one hidden layer: no order, no context.

    With embeddings e_t of the T real tokens,

        logits = W gelu(U norm(1/T sum_t e_t) + b) + c

    How much a token counts is the length of its embedding: the norm takes out any factor that all have in
    common, so a weight beside each embedding could express nothing more.

    Plain transformers loads it after ``import kdcli.models.small``; onnxruntime needs nothing but model.onnx.

    Source: the deep averaging network of Iyyer et al. 2015, "Deep Unordered Composition Rivals Syntactic Methods
    for Text Classification", ACL. Differs: the mean is normalised, and GELU stands for tanh.
    """

    config_class = StaticConfig

    def __init__(self, config: StaticConfig) -> None:
        width = config.hidden_size
        super().__init__(config, width, config.intermediate_size)
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(read_features(config, width), config.intermediate_size)
        self.post_init()

    def summary(self, states: Tensor, mask: Tensor) -> Tensor:
        """The normalised mean (B, D)."""
        normed: Tensor = self.norm(masked_mean(states, mask))
        return normed

    def features(self, read: Tensor) -> Tensor:
        """Through the hidden layer to (B, P)."""
        return F.gelu(self.dense(self.dropout(read)))


class CnnForSequenceClassification(_Small):
    """Filters over windows of tokens, each one's largest answer: short phrases, wherever they stand.

    A filter w of width n gives c_t = relu(w . [e_(t-i) ... e_(t-i+n-1)] + b) with i = (n - 1) // 2 at every real
    token t, where whatever lies outside the text is 0, and then max_t c_t.

    Plain transformers loads it after ``import kdcli.models.small``; onnxruntime needs nothing but model.onnx.

    Source: Kim 2014, "Convolutional Neural Networks for Sentence Classification", EMNLP, arXiv:1408.5882,
    equations 2 and 3. Differs: windows are centred on tokens, so a text may be shorter than a window.
    """

    config_class = CnnConfig

    def __init__(self, config: CnnConfig) -> None:
        assert config.widths is not None
        super().__init__(config, config.intermediate_size * len(config.widths))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.hidden_size, config.intermediate_size, width) for width in config.widths
        )
        self.post_init()

    def states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The answers of every filter (B, S, T)."""
        x = tokens.transpose(1, 2) * mask[:, None].to(tokens.dtype)
        found = []
        for convolution in self.convolutions:
            width: int = convolution.kernel_size[0]  # type: ignore[index, assignment]
            found.append(convolution(F.pad(x, ((width - 1) // 2, width // 2))).relu())
        return torch.cat(found, 1)

    def summary(self, states: Tensor, mask: Tensor) -> Tensor:
        """The largest answer of every filter (B, S)."""
        # No answer is below 0, so a 0 on padding never wins.
        return (states * mask[:, None].to(states.dtype)).amax(2)


class BilstmForSequenceClassification(_Small):
    """One LSTM in each direction; the maximum and the mean of its states over the tokens.

    The second LSTM reads the real tokens of each row in reverse, so both meet padding last, where nothing is
    pooled. Together they are the bidirectional LSTM of torch.

    Plain transformers loads it after ``import kdcli.models.small``; onnxruntime needs nothing but model.onnx.

    Source: Conneau et al. 2017, "Supervised Learning of Universal Sentence Representations from Natural Language
    Inference Data", EMNLP, arXiv:1705.02364, section 3.2.2; as a student, Tang et al. 2019, "Distilling
    Task-Specific Knowledge from BERT into Simple Neural Networks", arXiv:1903.12136, section 3.1. Differs: maximum
    and mean are both kept, and there is no hidden layer.
    """

    config_class = BilstmConfig

    def __init__(self, config: BilstmConfig) -> None:
        super().__init__(config, 4 * config.intermediate_size)
        self.forwards = nn.LSTM(config.hidden_size, config.intermediate_size, batch_first=True)
        self.backwards = nn.LSTM(config.hidden_size, config.intermediate_size, batch_first=True)
        self.post_init()

    def states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """What each LSTM remembers at every token, one beside the other (B, T, 2 F)."""
        steps = torch.arange(mask.shape[1], device=mask.device)[None]
        order = (mask.sum(1, keepdim=True) - 1 - steps).clamp(min=0)[..., None]
        ahead = self.forwards(tokens)[0]
        back = self.backwards(tokens.gather(1, order.expand_as(tokens)))[0]
        if self.config.pair_token_id is not None:  # of one text all states are summed up, in whichever order
            back = back.gather(1, order.expand_as(back))
        return torch.cat([ahead, back], 2)

    def summary(self, states: Tensor, mask: Tensor) -> Tensor:
        """Maxima and means of both directions (B, 4 F)."""
        return torch.cat([masked_max(states, mask), masked_mean(states, mask)], 1)


def read_features(config: SmallConfig, summary: int) -> int:
    """How many features a row is read from: S, or 4 S where it is two texts."""
    return summary if config.pair_token_id is None else 4 * summary


def before_first(marks: Tensor) -> Tensor:
    """Which tokens of (B, T) stand before or on the first mark, bool (B, T)."""
    marked = marks.to(torch.long)
    return (marked.cumsum(1) - marked) == 0


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T, F) over the tokens where ``mask`` (B, T) is True; (B, F)."""
    real = mask[..., None].to(values.dtype)
    return (values * real).sum(1) / real.sum(1).clamp(min=1)


def masked_max(states: Tensor, mask: Tensor) -> Tensor:
    """Largest of (B, T, F) over the tokens where ``mask`` (B, T) is True; (B, F). States of an LSTM exceed -1."""
    return states.masked_fill(~mask[..., None], -1.0).amax(1)


KINDS: dict[str, tuple[Any, Any]] = {
    "static": (StaticConfig, StaticForSequenceClassification),
    "cnn": (CnnConfig, CnnForSequenceClassification),
    "bilstm": (BilstmConfig, BilstmForSequenceClassification),
}
"""Name of a student -> its configuration and its model."""

for _config, _model in KINDS.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForSequenceClassification.register(_config, _model)
