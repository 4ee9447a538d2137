"""Drop tokens: the rows of the token table and the entries of the tokenizer go together.

Letters: V tokens of the tokenizer. What stays keeps its order, so the new id of a token is its rank among those
that stay.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from kdcli import families
from kdcli.errors import InputError
from kdcli.families.modules import LowRankEmbedding, keep_rows

_ALGORITHMS = ("WordPiece", "BPE", "WordLevel")


def token_tables(model: nn.Module) -> list[nn.Embedding]:
    """Every table of the model that token ids look up; a model with several names them ``token_tables``."""
    kind: Any = model
    named = getattr(kind, "token_tables", None)
    found = list(named()) if named is not None else [kind.get_input_embeddings()]
    found = [table.token_embeddings if isinstance(table, LowRankEmbedding) else table for table in found]
    return [table for table in found if isinstance(table, nn.Embedding)]


class Vocabulary:
    """The V tokens of a tokenizer, and which of them depend on each other.

    Raises:
        InputError: The tokenizer works by another algorithm than WordPiece, BPE and whole words.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        model = self.state["model"]
        affixes = model.get("end_of_word_suffix") or (
            model["type"] == "BPE" and model.get("continuing_subword_prefix")
        )
        if model.get("type") not in _ALGORITHMS or affixes:
            raise InputError(
                f"tokens of a {model.get('type')} tokenizer{' with affixes' if affixes else ''} cannot be dropped",
                f"kdcli does it for {', '.join(_ALGORITHMS)}",
            )
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.tokens: list[str | None] = [None] * (1 + max(vocabulary.values()))  # None: an id without a token
        for token, index in vocabulary.items():
            self.tokens[index] = token
        self.special = np.zeros(len(self.tokens), dtype=bool)
        self.special[[entry["id"] for entry in self.state["added_tokens"]]] = True
        self.unknown = vocabulary.get(model.get("unk_token"))
        """Id of the token for what cannot be spelled; None when everything can."""
        self._index = vocabulary

    def protected(self, config: Any) -> np.ndarray:
        """Tokens that have to stay, bool (V,).

        Special and added tokens, those that ``config`` names, the unknown token, single characters and their
        continuation forms, from which most words can still be spelled, and bytes.
        """
        model = self.state["model"]
        prefix = model.get("continuing_subword_prefix") or ""
        kept = self.special.copy()
        for index, token in enumerate(self.tokens):
            if token is not None:
                one = len(token) == 1 or (bool(prefix) and token[:-1] == prefix)
                kept[index] |= one or (bool(model.get("byte_fallback")) and token.startswith("<0x"))
        if self.unknown is not None:
            kept[self.unknown] = True
        for index in token_ids(config).values():
            if 0 <= index < len(kept):
                kept[index] = True
        if families.presumed(str(config.model_type)).positions_after_padding:
            kept[: int(config.pad_token_id) + 1] = True
        return kept & np.array([token is not None for token in self.tokens])

    def closed(self, kept: np.ndarray) -> np.ndarray:
        """``kept`` and what BPE makes on its way to those tokens; texts of kept tokens are then split as before."""
        if self.state["model"]["type"] != "BPE":
            return kept  # the longest piece that fits is still there, and no longer one has come
        ranks = {pair: rank for rank, pair in enumerate(_pairs(self.state["model"]["merges"]))}
        found = kept.copy()
        for index in np.flatnonzero(kept & ~self.special):
            token = self.tokens[index]
            for part in [] if token is None else _steps(token, ranks):
                if part in self._index:
                    found[self._index[part]] = True
        return found


def cut_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """A tokenizer with the given tokens alone, in the order of ``kept``.

    Args:
        tokenizer: A fast tokenizer of transformers, which is left as it is.
        kept: Ascending ids; special and added tokens must be among them.
    """
    from tokenizers import Tokenizer

    state = copy.deepcopy(Vocabulary(tokenizer).state)
    position = {old: new for new, old in enumerate(kept)}
    model = state["model"]
    model["vocab"] = {t: position[i] for t, i in model["vocab"].items() if i in position}
    if model["type"] == "BPE":
        left = model["vocab"]
        model["merges"] = [
            list(pair) for pair in _pairs(model["merges"]) if {*pair, "".join(pair)} <= left.keys()
        ]
    for entry in state["added_tokens"]:
        entry["id"] = position[entry["id"]]
    _renumber(state.get("post_processor"), position)
    if state.get("padding"):
        state["padding"]["pad_id"] = position[state["padding"]["pad_id"]]
    made = copy.copy(tokenizer)
    # Not by a file and the library's loading: that makes some classes anew from the vocabulary alone.
    made._tokenizer = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
    made.kdcli_file = None  # it is no longer what the file says
    return made


def renumber_added(settings: dict[str, Any], ids: Mapping[str, int]) -> None:
    """Give the added tokens in the content of a ``tokenizer_config.json`` their new ids, in place."""
    entries = settings.get("added_tokens_decoder")
    if isinstance(entries, dict):
        known = [(ids[e["content"]], e) for e in entries.values() if e.get("content") in ids]
        settings["added_tokens_decoder"] = {str(i): entry for i, entry in sorted(known, key=lambda x: x[0])}


def keep_tokens(model: nn.Module, kept: Sequence[int]) -> None:
    """Keep the given rows of every token table, in place, and tell the configuration of the new ids."""
    config: Any = model.config
    position = {old: new for new, old in enumerate(kept)}
    for table in token_tables(model):
        keep_rows(table, kept)
    for holder in (config, getattr(config, "member", None)):
        if holder is None:
            continue
        changed = {k: position[v] for k, v in token_ids(holder).items() if v in position}
        for key, value in ({"vocab_size": len(kept)} | changed).items():
            if isinstance(holder, dict):
                holder[key] = value
            else:
                setattr(holder, key, value)


def border(tokenizer: Any) -> int | None:
    """The token that ends the first of two texts; None where nothing marks it. T5 has no separator but the end."""
    found: int | None = tokenizer.sep_token_id
    return tokenizer.eos_token_id if found is None else found


def token_ids(config: Any) -> dict[str, int]:
    """Every ``*_token_id`` that a configuration, or the dictionary of one, has."""
    values = config if isinstance(config, dict) else vars(config)
    return {k: v for k, v in values.items() if k.endswith("_token_id") and type(v) is int}


def _pairs(merges: Iterable[Any]) -> list[tuple[str, str]]:
    """Merges of BPE, which old files write as one string a pair."""
    made = [m.split(" ") if isinstance(m, str) else m for m in merges]
    return [(first, second) for first, second in made]


def _steps(token: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """What BPE makes of the characters of ``token``, step by step, up to the token itself."""
    parts, made = list(token), []
    while len(parts) > 1:
        pairs = list(itertools.pairwise(parts))
        at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[at] not in ranks:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        made.append(parts[at])
    return made


def _renumber(node: Any, position: Mapping[int, int]) -> None:
    """Give the special tokens of a post-processor their new ids, in place."""
    if isinstance(node, list):
        for part in node:
            _renumber(part, position)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "ids":
                node[key] = [position[i] for i in value]
            elif key in ("sep", "cls") and isinstance(value, list):
                node[key] = [value[0], position[value[1]]]
            else:
                _renumber(value, position)
