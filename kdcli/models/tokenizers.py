"""The tokenizer of a checkpoint: read from its directory, written beside the weights.

``tokenizer.json`` is the tokenizer where it is there. transformers 5 makes tokenizers of named classes (BERT's,
RoBERTa's, XLM-RoBERTa's and others) anew from the vocabulary and drops the normaliser, the pre-tokeniser and the
template that the file has, so only the settings are taken from the object it makes; what splits texts is the file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdcli.errors import InputError, first_line
from kdcli.input_names import IDS, SEGMENTS
from kdcli.models import safety, tokens
from kdcli.models.safety import show

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"

# What belongs to a tokenizer beside its file and its vocabulary, by name: nothing else is copied out of a foreign
# directory.
_OTHERS = ("special_tokens_map.json",)
_VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt")

_SENTENCEPIECE = ("spm.model", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")

# Settings that say what the normaliser of BERT does, and what its file calls them.
_NORMALISER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
# The defaults by which transformers 4 overrides tokenizer.json where the settings are silent.
_DEFAULTS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# A class that splits texts as the file says, in transformers 4 and 5 alike.
_GENERIC = "PreTrainedTokenizerFast"

# Texts on which tokenizers differ: case, accents, scripts, punctuation, numbers, white space, long words.
PROBES = (
    "",
    "The quick brown Fox jumps over 13 lazy dogs.",
    "  Two  spaces,\ttabs\nand newlines ",
    "naïve café — ÀÉÎÕÜ ß ﬁ ﬀ x² ½",
    "it's state-of-the-art; svc-a=up 10.0.0.1:8080/path_name?q=1&r=2#end",
    "我喜欢这部电影 これは映画です 한국어 фильм ταινία فيلم",
    "😀👍🏽 #tag @user $5.00 50% `code` ``quoted''",
    "a" * 120,
    "\u200bzero\u00adwidth\ufeff",
)


def load(path: Path, *, by_kdcli: bool = False) -> Any:
    """Load the tokenizer of a checkpoint, a fast one of transformers that splits as ``tokenizer.json`` says.

    Its ``model_input_names`` are those that the owner's tokenizer returns.

    Args:
        path: The checkpoint's directory.
        by_kdcli: Whether kdcli wrote it.

    Raises:
        InputError: There is none, or none that kdcli can read.
    """
    backend = read(path / FILE) if (path / FILE).is_file() else None
    if backend is None:
        _check_vocabulary(path)
    try:
        tokenizer = _auto(path)
    except Exception as error:  # the tokenizers library raises bare Exception
        try:
            tokenizer = _generic(path) if backend is not None else None
        except Exception:
            tokenizer = None
        if tokenizer is None:
            raise InputError(
                f"{show(path)} has no tokenizer that can be loaded: {first_line(error)}"
            ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        if backend is None:
            raise InputError(
                f"the tokenizer in {show(path)} has no {FILE} form, which kdcli needs: "
                f"{type(tokenizer).__name__} works in Python alone"
            )
        tokenizer = _generic(path)
    if backend is not None:
        tokenizer._tokenizer = backend
        tokenizer.kdcli_file = path / FILE
    else:
        _check_whole(tokenizer, path)
        tokenizer.kdcli_file = None
        # A cut or padding that a class sets by itself would stand in the file that is written.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_input_names = _input_names(tokenizer, path, by_kdcli)
    return tokenizer


def read(path: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a ``tokenizer.json``, without a cut or padding that is stored in it.

    Raises:
        InputError: It cannot be read.
    """
    return opened(path)[0]


def opened(path: Path) -> tuple[Any, int | None]:
    """The same, and the number of tokens at which the file itself cuts texts; transformers does not heed it.

    Raises:
        InputError: It cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{show(path)} cannot be read as a tokenizer: {first_line(error)}") from error
    cut = None if backend.truncation is None else int(backend.truncation["max_length"])
    backend.no_truncation()
    backend.no_padding()
    return backend, cut


def check_size(tokenizer: Any, embedded: int, path: Path) -> None:
    """Check that a tokenizer is that of a model which embeds ``embedded`` tokens.

    A table may well be larger: rounded up to a multiple, or with rows for tokens to come.

    Raises:
        InputError: It has tokens that the model does not embed, or is far smaller than the table.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    last = max(vocabulary, key=lambda token: vocabulary[token], default=None)
    if last is None:
        raise InputError(f"the tokenizer in {show(path)} has no tokens")
    if vocabulary[last] >= embedded:
        raise InputError(
            f"the tokenizer in {show(path)} has {len(vocabulary)} tokens, but the model embeds only {embedded}: "
            f"{show(last)!r} has the id {vocabulary[last]}",
            "give the tokenizer that the model was trained with",
        )
    if 2 * len(vocabulary) < embedded and embedded - len(vocabulary) >= 512:
        raise InputError(
            f"the tokenizer in {show(path)} has {len(vocabulary)} tokens, but the model embeds {embedded}: "
            "it is another model's, or a part of one",
            "give the tokenizer that the model was trained with",
        )


def save(
    tokenizer: Any, source: Path, directory: Path, *, max_length: int, padding_side: str | None = None
) -> None:
    """Write a tokenizer so that kdcli, plain transformers and the tokenizers library split texts alike.

    ``tokenizer.json`` is copied byte for byte when the tokenizer came from one and is as it was. A cut or padding
    stored in it stays: it is its owner's, and transformers does not heed it.

    Args:
        tokenizer: As :func:`load` gave it, or with other tokens.
        source: Where its settings are.
        directory: Where to write; files of the same name are replaced.
        max_length: Written where the settings name no limit.
        padding_side: Where it is not to be the tokenizer's own.

    Raises:
        InputError: What was written splits texts in another way.
    """
    tokenizer.backend_tokenizer.no_truncation()  # of its last call
    tokenizer.backend_tokenizer.no_padding()
    given = getattr(tokenizer, "kdcli_file", None)
    target = directory / FILE
    if given is not None and given.is_file():
        if given.resolve() != target.resolve():
            shutil.copyfile(given, target)
    else:
        tokenizer.backend_tokenizer.save(str(target))
    for name in _OTHERS:
        if (source / name).is_file() and (source / name).resolve() != (directory / name).resolve():
            shutil.copyfile(source / name, directory / name)
    _write_vocabulary(tokenizer, source, directory)
    content = _settings(source)
    for key, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            content.setdefault(key, token)
    if given is None:
        tokens.renumber_added(content, tokenizer.get_vocab())
    content.setdefault("model_max_length", max_length)
    content.setdefault("tokenizer_class", type(tokenizer).__name__)
    content["model_input_names"] = list(tokenizer.model_input_names)
    side = padding_side or tokenizer.padding_side
    if padding_side is not None:
        content["padding_side"] = side
    for key, (_, value) in _overridden(tokenizer.backend_tokenizer, content).items():
        content[key] = value
    for key in (
        "auto_map",
        "chat_template",
        "max_length",
        "truncation_strategy",
        "pad_to_multiple_of",
        "stride",
    ):
        content.pop(key, None)
    _write_settings(directory, content)
    if not alike(read(target), tokenizer.backend_tokenizer):
        raise InputError(f"{show(target)} does not split texts as the tokenizer that it was written from")
    if not plainly_alike(tokenizer, directory, side):
        content |= {"tokenizer_class": _GENERIC, "padding_side": side}
        _write_settings(directory, content)


def alike(one: Any, two: Any) -> bool:
    """Whether two ``tokenizers.Tokenizer`` have the same tokens, work in the same way and split probes alike."""
    return (
        _described(one) == _described(two)
        and one.get_vocab() == two.get_vocab()
        and [(e.ids, e.type_ids) for e in _encoded(one)] == [(e.ids, e.type_ids) for e in _encoded(two)]
    )


def plainly_alike(tokenizer: Any, directory: Path, side: str) -> bool:
    """Whether plain transformers reads from ``directory`` what the tokenizer is, and pads on that side."""
    try:
        plain = _auto(directory)
        return alike(plain.backend_tokenizer, tokenizer.backend_tokenizer) and plain.padding_side == side
    except Exception:  # whatever fails here, the generic class reads the file
        return False


def as_the_settings_say(path: Path, backend: Any) -> list[str]:
    """Make a tokenizer split as transformers 4 does where the settings of a checkpoint contradict ``tokenizer.json``.

    Args:
        path: The checkpoint's directory.
        backend: What :func:`read` gave of its file; changed here.

    Returns:
        What differs, in words; nothing when nothing does.
    """
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    content = _settings(path)
    words = []
    for key, (value, own) in _overridden(backend, content).items():
        words.append(f"{key} is {json.dumps(value)}, not {json.dumps(own)}")
        part = "pre_tokenizer" if key == "add_prefix_space" else "normalizer"
        state = json.loads(getattr(backend, part).__getstate__()) | {_NORMALISER.get(key, key): value}
        kind = getattr(pre_tokenizers if part == "pre_tokenizer" else normalizers, state.pop("type"))
        setattr(backend, part, kind(**state))
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    more = [(t, s) for t, s in _named_tokens(path, content) if t not in known]
    for token, special in dict(more).items():
        words.append(f"{token!r} is a token of its own")
        made = AddedToken(token, normalized=False, special=special)
        (backend.add_special_tokens if special else backend.add_tokens)([made])
    return words


def _auto(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def _generic(path: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)


def _check_vocabulary(path: Path) -> None:
    """Refuse what transformers would make a tokenizer of its own for, or fail on in words of its own."""
    have = {name for name in (*_VOCABULARIES, *_SENTENCEPIECE) if (path / name).is_file()}
    have |= {file.name for file in path.glob("*.model")}
    if "vocab.txt" in have or {"vocab.json", "merges.txt"} <= have:
        return
    make = "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    if pieces := sorted(name for name in have if name.endswith(".model")):
        raise InputError(
            f"{show(path)} has a SentencePiece model ({show(pieces[0])}) and no {FILE}, which kdcli needs",
            f'make it once: pip install "transformers<5" sentencepiece protobuf (in an environment of its own), '
            f"then in Python {make} with AutoTokenizer of transformers",
        )
    if have:
        lacks = "merges.txt" if "vocab.json" in have else "vocab.json"
        raise InputError(
            f"{show(path)} has {sorted(have)[0]} and neither {lacks} nor {FILE}: half a tokenizer",
            f"add {lacks}, or {FILE}",
        )
    raise InputError(
        f"{show(path)} has no tokenizer: {FILE} is missing, and so is a vocabulary (vocab.txt, or vocab.json with "
        "merges.txt)",
        "save the one that the model was trained with beside it: "
        "AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(DIR)",
    )


def _check_whole(tokenizer: Any, path: Path) -> None:
    """Refuse a tokenizer that transformers made up because it looked for files of another name."""
    if (path / "vocab.txt").is_file():
        words = set((path / "vocab.txt").read_text(encoding="utf-8").split("\n")) - {""}
        name = "vocab.txt"
    else:
        words = set(safety.read_json(path / "vocab.json", safety.MAX_TOKENIZER))
        name = "vocab.json"
    lost = words - {*tokenizer.get_vocab()}
    if len(lost) > len(words) // 100:  # lines of white space are read as nothing
        raise InputError(
            f"transformers makes a {type(tokenizer).__name__} for {show(path)}, which does not read {name}: "
            f"{len(lost)} of its {len(words)} tokens are missing, such as {min(lost)!r}",
            f"name the right tokenizer_class in {SETTINGS}, or add {FILE}",
        )


def _input_names(tokenizer: Any, path: Path, by_kdcli: bool) -> list[str]:
    """What the owner's tokenizer returns.

    Where the settings do not say it, it is the default of the class, and transformers 4 and 5 have different ones:
    version 5 gives segment ids for a few classes only, version 4 for all but a few.
    """
    content = _settings(path)
    names = content.get("model_input_names")
    if isinstance(names, list) and IDS in names:
        return [str(name) for name in names]
    made = list(tokenizer.model_input_names)
    config = safety.read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if by_kdcli and int(config.get("type_vocab_size") or 0) >= 2:
        # It wrote no names when it fed segment ids to every model that takes them.
        return list(dict.fromkeys([*made, SEGMENTS]))
    major = str(config.get("transformers_version") or "5").split(".")[0]
    by_version_4 = major.isdecimal() and int(major) < 5 and "backend" not in content
    own = "model_input_names" in vars(type(tokenizer)) and type(tokenizer).__name__ != "AlbertTokenizer"
    if by_version_4 and not own:
        return list(dict.fromkeys([*made, SEGMENTS]))
    return made


def _settings(path: Path) -> dict[str, Any]:
    return safety.read_json(path / SETTINGS) if (path / SETTINGS).is_file() else {}


def _write_settings(directory: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
    (directory / SETTINGS).write_text(text + "\n", encoding="utf-8")


def _write_vocabulary(tokenizer: Any, source: Path, directory: Path) -> None:
    """The files beside tokenizer.json must say what it says: some programs read them instead."""
    wanted = [name for name in _VOCABULARIES if (source / name).is_file()]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as place:
        made = {Path(file).name: Path(file) for file in tokenizer.backend_tokenizer.model.save(place)}
        for name in wanted:
            if name not in made:
                (directory / name).unlink(missing_ok=True)
                continue
            right = made[name] if _read(source / name) != _read(made[name]) else source / name
            if right.resolve() != (directory / name).resolve():
                shutil.copyfile(right, directory / name)


def _read(path: Path) -> Any:
    """What a vocabulary file says, whatever its layout."""
    if path.suffix == ".json":
        return safety.read_json(path, safety.MAX_TOKENIZER)
    lines = path.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n")
    return [line for line in lines if line and not line.startswith("#version")]


def _overridden(backend: Any, content: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that contradict the file: name -> (what the settings say or leave to a default, what it says)."""
    found = {}
    state = {} if backend.normalizer is None else json.loads(backend.normalizer.__getstate__())
    if state.get("type") == "BertNormalizer":
        bert = str(content.get("tokenizer_class", "")).removesuffix("Fast") not in (
            "PreTrainedTokenizer",
            "TokenizersBackend",
        )
        for key, name in _NORMALISER.items():
            value = content.get(key, _DEFAULTS[key] if bert else state[name])
            if value != state[name]:
                found[key] = (value, state[name])
    try:
        state = {} if backend.pre_tokenizer is None else json.loads(backend.pre_tokenizer.__getstate__())
    except Exception:  # one that cannot be written down
        state = {}
    if "add_prefix_space" in state:
        value = content.get("add_prefix_space", False)
        if value != state["add_prefix_space"]:
            found["add_prefix_space"] = (value, state["add_prefix_space"])
    return found


def _named_tokens(path: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Tokens that the files beside tokenizer.json name, and whether they are special."""
    lists = [content]
    if (path / "special_tokens_map.json").is_file():
        lists.append(safety.read_json(path / "special_tokens_map.json"))
    for one in lists:
        entries = [one.get(key) for key in _NAMED]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = one.get(key)
            entries += more if isinstance(more, list) else []
        for entry in entries:
            token = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(token, str) and token:
                yield token, True
    decoder = content.get("added_tokens_decoder")
    for entry in decoder.values() if isinstance(decoder, dict) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield entry["content"], bool(entry.get("special"))
    if (path / "added_tokens.json").is_file():
        yield from ((token, False) for token in safety.read_json(path / "added_tokens.json"))


def _described(backend: Any) -> list[Any]:
    """How a tokenizer works, without its vocabulary and its template."""
    parts: list[Any] = []
    for part in (backend.normalizer, backend.pre_tokenizer):
        try:
            parts.append(None if part is None else json.loads(part.__getstate__()))
        except Exception:  # one that cannot be written down
            parts.append(type(part).__name__)
    model = backend.model
    names = "unk_token continuing_subword_prefix end_of_word_suffix max_input_chars_per_word fuse_unk byte_fallback"
    values = [getattr(model, name, None) for name in (*names.split(), "ignore_merges", "unk_id")]
    return [*parts, type(model).__name__, *values]


def _encoded(backend: Any) -> list[Any]:
    pairs = [(PROBES[i], PROBES[i + 1]) for i in range(1, 4)]
    return [*backend.encode_batch(list(PROBES)), *backend.encode_batch(pairs)]
