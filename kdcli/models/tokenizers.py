"""The tokenizer of a checkpoint: read from its directory, written beside the weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from kdcli.errors import InputError
from kdcli.models import tokens

# What belongs to a tokenizer, by name: nothing else is copied out of a foreign directory.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def load(path: Path) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        InputError: There is none that kdcli can read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True, use_fast=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(
            f"{path} has no tokenizer that can be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(f"the tokenizer in {path} has no tokenizer.json form, which kdcli needs")
    # A stored truncation or padding would silently change what every later user of the file sees.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def save(tokenizer: Any, source: Path, directory: Path, *, cut: bool, max_length: int) -> None:
    """Write tokenizer.json from memory and copy the small files around it by name, nothing else."""
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    for name in TOKENIZER_FILES:
        given = source / name
        if given.is_file() and given.resolve() != (directory / name).resolve():
            shutil.copyfile(given, directory / name)
    if cut:  # the files beside tokenizer.json must say what it says
        with tempfile.TemporaryDirectory() as place:
            for written in tokenizer.backend_tokenizer.model.save(place):
                if (target := directory / Path(written).name).exists():
                    shutil.copyfile(written, target)
    config = directory / "tokenizer_config.json"
    content = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    if cut:
        tokens.renumber_added(content, tokenizer.get_vocab())
    for key, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            content.setdefault(key, token)
    content.setdefault("model_max_length", max_length)
    content.setdefault("tokenizer_class", type(tokenizer).__name__)
    for key in (
        "auto_map",
        "chat_template",
        "max_length",
        "truncation_strategy",
        "pad_to_multiple_of",
        "stride",
    ):
        content.pop(key, None)
    config.write_text(
        json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
    )
