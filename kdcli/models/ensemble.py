"""Several small classifiers over one token table, whose mixed probabilities are the answer.

Importing this module teaches transformers the name ``kdcli-ensemble``. Letters as in :mod:`kdcli.families.modules`;
M members.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from kdcli import families
from kdcli.errors import InputError
from kdcli.input_names import IDS

MOST = 48  # members: as many as a teacher may have layers


class EnsembleConfig(PreTrainedConfig):
    """``members`` classifiers of the configuration ``member``."""

    model_type = "kdcli-ensemble"
    vocab_size: int = 30522
    hidden_size: int = 128
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int | None = 0
    members: int = 1
    member: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if type(self.members) is not int or not 1 <= self.members <= MOST:
            raise InputError(
                f"members of a '{self.model_type}' model must be a whole number from 1 to {MOST}"
            )
        if not isinstance(self.member, dict) or not families.is_encoder(str(self.member.get("model_type"))):
            raise InputError(f"member of a '{self.model_type}' model must be the configuration of an encoder")


class EnsembleForSequenceClassification(PreTrainedModel):
    """``softmax(logits) = sum_m w_m softmax(z_m)``: the members' probabilities, mixed by fixed weights.

    The members share the token table, which is most of a small model; positions, encoder and head are their own.
    """

    config_class = EnsembleConfig
    main_input_name = IDS
    base_model_prefix = "ensemble"

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__(config)
        assert config.member is not None
        inner = AutoConfig.for_model(**copy.deepcopy(config.member))
        inner.num_labels = config.num_labels
        inner.vocab_size = config.vocab_size
        self.family = families.of(inner.model_type)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.members = nn.ModuleList()
        for _ in range(config.members):
            member = AutoModelForSequenceClassification.from_config(
                inner, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
            )
            # Without a table of its own: the shared one is looked up here.
            member.set_submodule(self.family.tokens, nn.Identity())
            self.members.append(member)
        self.register_buffer("log_weights", torch.full((config.members,), 1.0 / config.members).log())

    def get_input_embeddings(self) -> nn.Module:
        """The shared token table (V, D)."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the shared token table."""
        self.word_embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ModelOutput:
        """Token ids (B, T) to ``logits`` (B, C), logarithms of the mixed probabilities, and ``every`` (M, B, C)."""
        embedded = self.word_embeddings(input_ids)
        more = {} if int(self.config.type_vocab_size or 0) < 2 else {"token_type_ids": token_type_ids}
        answers = [
            member(inputs_embeds=embedded, attention_mask=attention_mask, **more).logits
            for member in self.members
        ]
        every = torch.stack(answers)
        weighted = every.log_softmax(-1) + self.log_weights[:, None, None]
        return ModelOutput(logits=weighted.logsumexp(0), every=every)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the members have initialised themselves, and the table is always copied in."""


AutoConfig.register("kdcli-ensemble", EnsembleConfig)
AutoModelForSequenceClassification.register(EnsembleConfig, EnsembleForSequenceClassification)


def of_members(members: list[nn.Module], table: Tensor) -> EnsembleForSequenceClassification:
    """Build an ensemble of models of one configuration; their own token tables are dropped for ``table`` (V, D)."""
    config: Any = members[0].config
    inner = {k: v for k, v in config.to_dict().items() if k not in ("id2label", "label2id", "architectures")}
    made = EnsembleForSequenceClassification(
        EnsembleConfig(
            vocab_size=len(table),
            hidden_size=int(config.hidden_size),
            max_position_embeddings=int(config.max_position_embeddings),
            type_vocab_size=int(getattr(config, "type_vocab_size", 0) or 0),
            pad_token_id=config.pad_token_id,
            num_labels=int(config.num_labels),
            members=len(members),
            member=inner,
            attn_implementation="eager",
        )
    )
    for own, given in zip(made.members, members, strict=True):
        state = {k: v for k, v in given.state_dict().items() if not k.startswith(f"{made.family.tokens}.")}
        own.load_state_dict(state)
    made.word_embeddings.weight.data.copy_(table)
    return made.eval()


def mixture_weights(logits: Tensor, labels: Tensor, rounds: int = 200) -> Tensor:
    """Weights (M,) of a mixture that give the labels the highest likelihood.

    The likelihood is concave in the weights, so these rounds of expectation-maximisation, which start from equal
    weights, cannot end in a wrong hill: w_m <- mean_i w_m p_m(y_i) / sum_k w_k p_k(y_i).

    Args:
        logits: (M, N, C) of M members for N rows.
        labels: (N,) class indices.
        rounds: Of the iteration.

    Source: Dempster, Laird, Rubin 1977, "Maximum Likelihood from Incomplete Data via the EM Algorithm".
    """
    members, rows, _ = logits.shape
    likelihood = logits.log_softmax(-1).double()[:, torch.arange(rows, device=labels.device), labels]
    likelihood = (likelihood - likelihood.max(0).values).exp()  # (M, N), scaled row by row
    weights = likelihood.new_full((members,), 1 / members)
    for _ in range(rounds):
        shares = weights[:, None] * likelihood
        weights = (shares / shares.sum(0)).mean(1)
    return weights
