from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kdcli.data.sources import Rows
from kdcli.errors import InputError
from kdcli.inputs.text import Encoded, concatenate, encode, fingerprint

CLS, SEP, PAD, UNK = 0, 1, 2, 3
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]


def make_tokenizer(*, preset: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; with ``preset`` it truncates to 5 and pads to 9 by itself, as MiniLM does."""
    vocabulary = {word: i for i, word in enumerate(["[CLS]", "[SEP]", "[PAD]", "[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    if preset:
        backend.enable_truncation(5)
        backend.enable_padding(length=9, pad_id=PAD, pad_token="[PAD]")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def rows_of(encoded: Encoded) -> list[list[int]]:
    return [part.tolist() for part in np.split(encoded.ids, encoded.offsets[1:-1])]


@pytest.mark.parametrize("preset", [False, True])
def test_truncates_to_max_length_and_never_pads(preset: bool) -> None:
    rows = Rows(["a", "a b c d e f g h", ""])
    encoded = encode(rows, make_tokenizer(preset=preset), 7, None)
    assert rows_of(encoded) == [[CLS, 4, SEP], [CLS, 4, 5, 6, 7, 8, SEP], [CLS, SEP]]
    assert encoded.lengths.tolist() == [3, 7, 2]
    assert encoded.labels is None


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = make_tokenizer(preset=True)
    before = tokenizer.backend_tokenizer.to_str()
    encode(Rows(["a b c d e f g h"]), tokenizer, 7, None)
    assert tokenizer.backend_tokenizer.to_str() == before
    plain = make_tokenizer()
    before = plain.backend_tokenizer.to_str()
    encode(Rows(["a b c d e f g h"]), plain, 7, None)
    assert plain.backend_tokenizer.to_str() == before


def test_pairs_lose_tokens_from_the_longer_text_and_have_segments() -> None:
    encoded = encode(Rows(["a b c d e f", "a"], ["g h", "b"]), make_tokenizer(preset=True), 8, None)
    assert rows_of(encoded) == [[CLS, 4, 5, 6, SEP, 10, 11, SEP], [CLS, 4, SEP, 5, SEP]]
    assert encoded.type_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]


def test_dtypes_and_labels() -> None:
    encoded = encode(
        Rows(["a", "b", "c"], None, ["no", "yes", "no"]), make_tokenizer(), 8, {"yes": 0, "no": 4}
    )
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [4, 0, 4]
    dtypes = [encoded.ids.dtype, encoded.type_ids.dtype, encoded.offsets.dtype, encoded.labels.dtype]
    assert dtypes == [np.int32, np.int8, np.int64, np.int64]


def test_an_unknown_label_is_named() -> None:
    with pytest.raises(InputError, match="unknown label 'ye': did you mean 'yes'"):
        encode(Rows(["a", "b"], None, ["yes", "ye"]), make_tokenizer(), 8, {"yes": 0, "no": 1})


def test_no_room_for_text() -> None:
    with pytest.raises(InputError, match="special tokens alone are 2"):
        encode(Rows(["a"]), make_tokenizer(), 2, None)


def test_chunks_are_joined_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows([" ".join(WORDS[: i % 7]) for i in range(11)], None, [str(i % 2) for i in range(11)])
    whole = encode(rows, make_tokenizer(), 6, {"0": 0, "1": 1})
    monkeypatch.setattr("kdcli.inputs.text._CHUNK", 3)
    assert fingerprint(encode(rows, make_tokenizer(), 6, {"0": 0, "1": 1})) == fingerprint(whole)


def test_no_rows() -> None:
    encoded = encode(Rows([]), make_tokenizer(), 8, None)
    assert len(encoded) == 0
    assert encoded.ids.dtype == np.int32


def test_take_matches_encoding_the_taken_rows() -> None:
    rows = Rows([" ".join(WORDS[:i]) for i in range(6)], None, list("010101"))
    index = {"0": 0, "1": 1}
    encoded = encode(rows, make_tokenizer(), 8, index)
    for picked in ([5, 0, 0, 3], np.array([2]), []):
        direct = encode(rows.take(picked), make_tokenizer(), 8, index)
        assert fingerprint(encoded.take(picked)) == fingerprint(direct)


def test_take_understands_masks_and_refuses_what_is_not_there() -> None:
    encoded = encode(Rows(["a", "b c", "d"]), make_tokenizer(), 8, None)
    assert rows_of(encoded.take(np.array([False, True, True]))) == [[CLS, 5, 6, SEP], [CLS, 7, SEP]]
    with pytest.raises(IndexError):
        encoded.take([3])


def test_concatenate_fills_the_missing_labels() -> None:
    labelled = encode(Rows(["a", "b c"], None, ["0", "1"]), make_tokenizer(), 8, {"0": 0, "1": 1})
    bare = encode(Rows(["d e f"]), make_tokenizer(), 8, None)
    both = concatenate(labelled, bare, np.array([-100]))
    assert rows_of(both) == rows_of(labelled) + rows_of(bare)
    assert both.labels is not None
    assert both.labels.dtype == np.int64
    assert both.labels.tolist() == [0, 1, -100]
    assert concatenate(bare, bare, np.array([-100])).labels is None


def test_fingerprint_sees_ids_borders_and_labels() -> None:
    tokenizer = make_tokenizer()
    base = encode(Rows(["a b", "c"], None, ["0", "1"]), tokenizer, 8, {"0": 0, "1": 1})
    others = [
        Encoded(base.ids + 1, base.type_ids, base.offsets, base.labels),
        Encoded(base.ids, base.type_ids + 1, base.offsets, base.labels),
        Encoded(base.ids, base.type_ids, np.array([0, 3, 7]), base.labels),
        Encoded(base.ids, base.type_ids, base.offsets, np.array([1, 0])),
        Encoded(base.ids, base.type_ids, base.offsets, None),
    ]
    assert len({fingerprint(x) for x in (base, *others)}) == 6
    assert fingerprint(base.take(np.arange(2))) == fingerprint(base)


def test_rows_that_are_cut_are_counted() -> None:
    rows = Rows(["a b c", "a b c d e f g h", "a b c d e", "a"])
    encoded = encode(rows, make_tokenizer(preset=True), 7, None)
    assert encoded.lengths.tolist() == [5, 7, 7, 3]
    assert encoded.cut == 1  # five words with both special tokens fit exactly


def test_a_tokenizer_that_gives_no_segment_ids_is_not_made_to() -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    rows = Rows(["a b", "c"], ["d", "e"])
    encoded = encode(rows, tokenizer, 8, None)
    assert encoded.type_ids is None
    assert encoded.take([1, 0]).type_ids is None
    assert concatenate(encoded, encoded, np.array([-1])).type_ids is None
    assert encode(Rows([]), tokenizer, 8, None).type_ids is None


def test_a_row_without_a_token_is_named() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", "$A $B", [])
    with pytest.raises(InputError, match=r"row 3 of test has no tokens: its text is '  '"):
        encode(Rows(["a", "b", "  "]), tokenizer, 8, None, "test")
