"""The tokenizer of a checkpoint against the tokenizers library alone, which reads nothing but tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from kdcli.errors import InputError
from kdcli.models import tokenizers
from kdcli.models.checkpoint import load
from tests import tiny

TEXTS = ["Good film", "svc-a=up the plot", "café WAS", "it's a  film.", "[SEP] good", "", "\u200bx"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "good",
    "Good",
    "film",
    "the",
    "plot",
    "was",
    "WAS",
    "café",
    "cafe",
    "svc-a=up",
    "svc",
    "-",
    "a",
    "=",
    "up",
]


def wordpiece() -> Any:
    every = dict.fromkeys([*BERT, *WORDS, *"abcdefghijklmnopqrstuvwxyz"])
    vocabulary = {word: i for i, word in enumerate(every)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made


def bert(place: Path, made: Any, /, **settings: Any) -> Path:
    """A BERT with this tokenizer.json, as its owner has it."""
    tiny.saved(place, "bert")
    for name in ("special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"):
        (place / name).unlink(missing_ok=True)
    made.save(str(place / "tokenizer.json"))
    named = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    content = named | {"tokenizer_class": "BertTokenizer", "model_max_length": 40} | settings
    content = {key: value for key, value in content.items() if value is not None}
    (place / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    resize(place, made.get_vocab_size())
    return place


def resize(place: Path, size: int) -> None:
    """Give the model a table of ``size`` tokens."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(place)
    model.resize_token_embeddings(size)
    model.save_pretrained(place)


def ids(path: Path, texts: list[str] = TEXTS) -> list[list[int]]:
    """By the tokenizers library alone, without a cut or padding that is stored."""
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    return [made.ids for made in backend.encode_batch(texts)]


def white_space(t: Any) -> None:
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def cased(t: Any) -> None:
    t.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)


def accents_stay(t: Any) -> None:
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


def replaced(t: Any) -> None:
    t.normalizer = normalizers.Sequence([normalizers.Replace("plot", "film"), normalizers.Lowercase()])


def no_template(t: Any) -> None:
    t.post_processor = None


def two_ends(t: Any) -> None:
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP] [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )


def with_special_tokens(t: Any) -> None:
    t.add_special_tokens(BERT)
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


CHANGES = [white_space, cased, accents_stay, replaced, no_template, two_ends, with_special_tokens]


@pytest.mark.parametrize("kind", ["BertTokenizer", "DistilBertTokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("change", CHANGES)
def test_what_goes_out_splits_as_tokenizer_json_that_came_in(
    tmp_path: Path, change: Callable[[Any], None], kind: str | None
) -> None:
    backend = wordpiece()
    change(backend)
    given = bert(tmp_path / "in", backend, tokenizer_class=kind)
    made = load(given)
    assert made.tokenizer(TEXTS)["input_ids"] == ids(given)
    (out := tmp_path / "out").mkdir()
    from kdcli.models.checkpoint import save

    save(made, out)
    assert (out / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    assert load(out).tokenizer(TEXTS)["input_ids"] == ids(given)
    plain = AutoTokenizer.from_pretrained(out)
    ordinary = [text for text in TEXTS if "[SEP]" not in text]  # which transformers takes for a special token
    assert plain(ordinary)["input_ids"] == ids(given, ordinary)
    assert plain("a", "b").keys() == made.tokenizer("a", "b").keys()


def test_a_class_that_reads_the_file_rightly_stays_and_settings_with_it(tmp_path: Path) -> None:
    given = bert(
        tmp_path / "in", wordpiece(), do_lower_case=True, truncation_side="left", model_max_length=33
    )
    (tmp_path / "out").mkdir()
    tokenizers.save(tokenizers.load(given), given, tmp_path / "out", max_length=40)
    content = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert content["tokenizer_class"] == "BertTokenizer"
    assert content["truncation_side"] == "left"
    assert content["model_max_length"] == 33
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 33


@pytest.mark.parametrize(
    ("given", "version", "expected"),
    [
        ({"model_input_names": ["input_ids", "attention_mask"]}, "4.57.6", False),
        ({"model_input_names": ["input_ids", "token_type_ids"]}, "5.0.0", True),
        ({}, "4.57.6", True),
        ({}, "5.0.0", True),  # the class of BERT gives them in both
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "4.57.6", True),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "5.0.0", False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "backend": "tokenizers"}, "4.57.6", False),
        ({"tokenizer_class": "DistilBertTokenizer"}, "4.57.6", False),
    ],
)
def test_segment_ids_are_given_where_the_owners_tokenizer_gives_them(
    tmp_path: Path, given: dict[str, Any], version: str, expected: bool
) -> None:
    """The defaults are read off the classes of transformers 4.57.6 and 5.23."""
    place = bert(tmp_path / "in", wordpiece(), **given)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    config["transformers_version"] = version
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    made = tokenizers.load(place)
    assert ("token_type_ids" in made("a", "b")) is expected
    (tmp_path / "out").mkdir()
    tokenizers.save(made, place, tmp_path / "out", max_length=40)
    (tmp_path / "out" / "config.json").write_text((place / "config.json").read_text(encoding="utf-8"))
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ("token_type_ids" in plain("a", "b")) is expected


def test_a_stored_cut_stays_in_the_copy_and_does_not_cut_what_is_measured(tmp_path: Path) -> None:
    backend = wordpiece()
    backend.enable_truncation(4)
    backend.enable_padding(length=12, pad_id=0)
    given = bert(tmp_path / "in", backend)
    made = load(given)
    assert made.tokenizer(["good film the plot was"])["input_ids"] == ids(given, ["good film the plot was"])
    assert len(made.tokenizer("good film the plot was")["input_ids"]) == 7
    assert tokenizers.opened(given / tokenizers.FILE)[1] == 4
    (tmp_path / "out").mkdir()
    tokenizers.save(made.tokenizer, given, tmp_path / "out", max_length=40)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "setting", [{"do_lower_case": True}, {}, {"do_lower_case": False, "strip_accents": True}]
)
def test_settings_that_contradict_the_file_are_told_and_made_to_agree(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    backend = wordpiece()
    cased(backend)
    given = bert(tmp_path / "in", backend, **setting)
    other = tokenizers.read(given / tokenizers.FILE)
    assert tokenizers.as_the_settings_say(given, other)
    assert other.encode("Good café").ids != ids(given, ["Good café"])[0]
    (tmp_path / "out").mkdir()
    tokenizers.save(tokenizers.load(given), given, tmp_path / "out", max_length=40)
    content = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert content.get("do_lower_case", False) is False
    assert content.get("strip_accents", False) is False


def test_a_vocabulary_beside_the_file_that_says_something_else_does_not_go_out(tmp_path: Path) -> None:
    given = bert(tmp_path / "in", wordpiece())
    right = [token for token, _ in sorted(wordpiece().get_vocab().items(), key=lambda x: x[1])]
    (given / "vocab.txt").write_text("\n".join(sorted(right)) + "\n", encoding="utf-8")
    (given / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    (tmp_path / "out").mkdir()
    tokenizers.save(tokenizers.load(given), given, tmp_path / "out", max_length=40)
    assert (tmp_path / "out" / "vocab.txt").read_text(encoding="utf-8").split() == right
    assert not (tmp_path / "out" / "merges.txt").exists()


def without_json(place: Path, *files: str) -> Path:
    """A BERT with these vocabulary files alone."""
    tiny.saved(place, "bert")
    resize(place, wordpiece().get_vocab_size())
    for name in ("special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"):
        (place / name).unlink(missing_ok=True)
    wordpiece().model.save(str(place))
    for name in ("vocab.txt",):
        if name not in files:
            (place / name).unlink()
    for name in files:
        if not (place / name).exists():
            (place / name).write_text("{}" if name.endswith(".json") else "#version: 0.2\n", encoding="utf-8")
    return place


def test_a_vocabulary_alone_is_a_tokenizer_and_gets_a_file(tmp_path: Path) -> None:
    given = without_json(tmp_path / "in", "vocab.txt")
    made = tokenizers.load(given)
    assert made.tokenize("Good svc film") == ["good", "svc", "film"]
    (tmp_path / "out").mkdir()
    tokenizers.save(made, given, tmp_path / "out", max_length=40)
    assert ids(tmp_path / "out") == made(TEXTS)["input_ids"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "has no tokenizer: tokenizer.json is missing"),
        (("tokenizer_config.json",), "has no tokenizer: tokenizer.json is missing"),
        (("vocab.json",), r"neither merges.txt nor tokenizer.json: half a tokenizer"),
        (("merges.txt",), r"neither vocab.json nor tokenizer.json: half a tokenizer"),
        (("spiece.model",), r"SentencePiece model \(spiece.model\).*sentencepiece protobuf"),
        (("sentencepiece.bpe.model", "tokenizer_config.json"), "SentencePiece model"),
    ],
)
def test_no_tokenizer_is_invented(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        tokenizers.load(without_json(tmp_path, *files))
    import re

    assert re.search(message, f"{caught.value} {caught.value.hint}")


def test_a_vocabulary_that_the_class_does_not_read_is_named(tmp_path: Path) -> None:
    given = without_json(tmp_path, "vocab.txt")
    (given / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"does not read vocab.txt: \d+ of its \d+ tokens are missing"):
        tokenizers.load(given)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    given = bert(tmp_path, wordpiece())
    (given / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        tokenizers.load(given)


@pytest.mark.parametrize(
    ("embedded", "message"),
    [
        (44, "embeds only 44: 'z' has the id 44"),
        (45, None),
        (64, None),
        (128, None),  # a table rounded up
        (512, None),
        (5000, "has 45 tokens, but the model embeds 5000"),
    ],
)
def test_a_tokenizer_of_another_size_than_the_table(
    tmp_path: Path, embedded: int, message: str | None
) -> None:
    made = bert(tmp_path, wordpiece())
    tokenizer = tokenizers.load(made)
    assert len(tokenizer) == 45
    if message is None:
        tokenizers.check_size(tokenizer, embedded, made)
        return
    with pytest.raises(InputError, match=message):
        tokenizers.check_size(tokenizer, embedded, made)
