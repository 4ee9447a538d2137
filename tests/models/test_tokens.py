"""Tokens that go leave the tokenizer and the table together; texts of tokens that stay are read as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, RobertaTokenizer

from kdcli.errors import InputError
from kdcli.models import tokens
from kdcli.models.checkpoint import Checkpoint, fresh, load, save
from kdcli.models.small import StaticConfig
from kdcli.models.transforms import TransformLog, Vocab
from tests import tiny

TEXTS = [
    "the film was a moving story of warm and funny people",
    "dull endings and boring music weaken a weak plot",
    "unmoving, unfunny; the coldest of all stories (2021)",
    "films about filming films are filmed in film studios",
    "storytelling is the art of telling a story",
] * 4
KEPT_TEXTS = TEXTS[:2]


def bpe() -> Tokenizer:
    """Byte-level BPE as RoBERTa has it, trained on the texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return made


def wordpiece() -> Tokenizer:
    """WordPiece as BERT has it, with special tokens in the middle of the table."""
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=160, special_tokens=["[UNK]"], show_progress=False)
    )
    pieces = [t for t in sorted(trained.get_vocab()) if t != "[UNK]"]
    order = ["[PAD]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    vocabulary = {token: i for i, token in enumerate(order)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return made


def saved(family: str, place: Path) -> Path:
    """A random model with the tokenizer of its family, and the small files that old checkpoints have beside it."""
    backend = bpe() if family == "roberta" else wordpiece()
    if family == "roberta":
        state = json.loads(backend.to_str())["model"]
        tokenizer: Any = RobertaTokenizer(vocab=state["vocab"], merges=[tuple(m) for m in state["merges"]])
    else:
        tokenizer = BertTokenizer(vocab=backend.get_vocab(with_added_tokens=False))
    config = tiny.config("roberta" if family == "roberta" else "bert")
    if family == "static":
        config = StaticConfig(num_labels=2, hidden_size=16, intermediate_size=8)
    config.vocab_size = len(tokenizer) + 3  # tables are often longer than the vocabulary
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model: Any = fresh(config).eval()
    model.config.id2label = dict(enumerate(tiny.LABELS))
    place.mkdir()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    backend.model.save(str(place))
    return place


def used(made: Checkpoint, texts: list[str]) -> tuple[np.ndarray, tokens.Vocabulary]:
    """Kept ids when only these texts count."""
    vocabulary = tokens.Vocabulary(made.tokenizer)
    kept = vocabulary.protected(made.config)
    kept[np.concatenate(made.tokenizer(texts)["input_ids"])] = True
    return np.flatnonzero(vocabulary.closed(kept)), vocabulary


def logits(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    given = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits


@pytest.mark.parametrize("family", ["bert", "roberta", "static"])
def test_a_model_without_a_token_answers_as_before_and_loads_everywhere(family: str, tmp_path: Path) -> None:
    made = load(saved(family, tmp_path / "model"))
    old = made.tokenizer
    expected = logits(made.model, old, KEPT_TEXTS)
    kept, vocabulary = used(made, KEPT_TEXTS)
    assert len(kept) < len(vocabulary.tokens) - 10
    with torch.no_grad():  # masked: what is dropped is zero in the whole model
        gone = np.setdiff1d(np.arange(made.config.vocab_size), kept)
        tokens.token_tables(made.model)[0].weight[gone] = 0
    assert torch.equal(logits(made.model, old, KEPT_TEXTS), expected)
    made.tokenizer = tokens.cut_tokenizer(old, kept.tolist())
    tokens.keep_tokens(made.model, kept.tolist())
    made.log.transforms.append(Vocab(before=len(vocabulary.tokens), after=len(kept)))
    out = tmp_path / "out"
    out.mkdir()
    save(made, out)
    again = load(out)
    plain = AutoTokenizer.from_pretrained(out)
    backend = Tokenizer.from_file(str(out / "tokenizer.json"))
    words = [*TEXTS, "never seen: zzz übermäßig 語 🙂", ""]
    for tokenizer in (made.tokenizer, again.tokenizer, plain):
        # Equal operations on equal rows of the table.
        assert torch.equal(logits(again.model, tokenizer, KEPT_TEXTS), expected)
        assert len(tokenizer) == again.config.vocab_size == len(kept)
        assert tokenizer(words)["input_ids"] == [backend.encode(t).ids for t in words]
        assert tokenizer.pad_token_id == again.config.pad_token_id
        assert tokenizer.convert_ids_to_tokens(list(range(len(kept)))) == [vocabulary.tokens[i] for i in kept]
    if family == "roberta":
        assert json.loads((out / "vocab.json").read_text()) == backend.get_vocab(with_added_tokens=False)
        merges = (out / "merges.txt").read_text().splitlines()
        stored = json.loads((out / "tokenizer.json").read_text())["model"]["merges"]
        assert [m for m in merges if not m.startswith("#")] == [" ".join(m) for m in stored]
    else:
        assert (out / "vocab.txt").read_text().splitlines() == [vocabulary.tokens[i] for i in kept]
    # Nothing that is only spelled differently turned into something unknown.
    for text in TEXTS:
        assert again.tokenizer.decode(backend.encode(text).ids, skip_special_tokens=True).replace(
            " ", ""
        ) == text.replace(" ", "")


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_texts_of_kept_tokens_are_split_as_before(family: str, tmp_path: Path) -> None:
    made = load(saved(family, tmp_path / "model"))
    kept, _ = used(made, KEPT_TEXTS)
    cut = tokens.cut_tokenizer(made.tokenizer, kept.tolist())
    for text in KEPT_TEXTS:
        assert [int(kept[i]) for i in cut(text)["input_ids"]] == made.tokenizer(text)["input_ids"]


def test_bpe_keeps_the_way_to_its_tokens(tmp_path: Path) -> None:
    made = load(saved("roberta", tmp_path / "model"))
    vocabulary = tokens.Vocabulary(made.tokenizer)
    word = max((t for t in vocabulary.tokens if t and t not in ("<mask>",)), key=len)
    kept = vocabulary.protected(made.config)
    kept[made.tokenizer.get_vocab()[word]] = True
    ids = np.flatnonzero(vocabulary.closed(kept))
    assert len(ids) > kept.sum()
    cut = tokens.cut_tokenizer(made.tokenizer, ids.tolist())
    assert cut.tokenize(word.replace("Ġ", " ")) == [word]
    # Without its intermediate pieces the word could no longer be put together.
    short = tokens.cut_tokenizer(made.tokenizer, np.flatnonzero(kept).tolist())
    assert short.tokenize(word.replace("Ġ", " ")) != [word]


def test_what_stays_whatever_the_texts_say(tmp_path: Path) -> None:
    made = load(saved("bert", tmp_path / "model"))
    made.config.eos_token_id = 1
    vocabulary = tokens.Vocabulary(made.tokenizer)
    stays = {vocabulary.tokens[i] for i in np.flatnonzero(vocabulary.protected(made.config))}
    assert {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "a", "##a", "("} <= stays
    assert "[unused2]" not in stays
    assert not any(len(t.removeprefix("##")) > 1 for t in stays if not t.startswith("["))
    assert vocabulary.tokens[vocabulary.unknown] == "[UNK]"


def test_padding_of_roberta_keeps_its_id_because_positions_start_there() -> None:
    made = tiny.checkpoint("roberta")
    kept, _ = used(made, ["good film"])
    cut = tokens.cut_tokenizer(made.tokenizer, kept.tolist())
    before = logits(made.model, made.tokenizer, ["good film", "film"])
    tokens.keep_tokens(made.model, kept.tolist())
    assert made.config.pad_token_id == cut.pad_token_id == 1
    assert torch.equal(logits(made.model, cut, ["good film", "film"]), before)


def test_other_algorithms_are_refused() -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))

    class Fast:
        backend_tokenizer = backend

    with pytest.raises(InputError, match="Unigram tokenizer cannot be dropped"):
        tokens.Vocabulary(Fast())


def test_an_ensemble_keeps_one_table_and_the_sizes_of_its_members() -> None:
    from kdcli.models.ensemble import of_members

    members = [tiny.checkpoint(seed=n).model for n in range(2)]
    model: Any = of_members(members, members[0].get_input_embeddings().weight.detach())  # type: ignore[operator, union-attr]
    made = Checkpoint(model, tiny.tokenizer(), list(tiny.LABELS), TransformLog(), Path("/nonexistent"))
    texts = ["good film", "bad plot and music"]
    kept, _ = used(made, texts)
    before = logits(model, made.tokenizer, texts)
    cut = tokens.cut_tokenizer(made.tokenizer, kept.tolist())
    tokens.keep_tokens(model, kept.tolist())
    assert torch.equal(logits(model, cut, texts), before)
    again: Any = fresh(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again.eval(), cut, texts), before)
