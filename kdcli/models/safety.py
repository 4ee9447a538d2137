"""Look a checkpoint directory over before any library opens it.

A checkpoint is a stranger's file. What is checked here is what would otherwise run code, read a file
outside the directory (and publish it with the result), hang, or allocate without bound. The rules on
safetensors are those of its format description; where they differ from the library, they are stricter.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcli import families
from kdcli.errors import InputError
from kdcli.tasks import CROSS_ENCODER

MAX_JSON = 10 * 2**20  # bytes
MAX_HEADER = 16 * 2**20  # bytes; a BERT has 25 kB
MAX_TOKENIZER = 100 * 2**20  # bytes
MAX_SIZE = 1_000_000  # of any one number in a configuration
MAX_WINDOWS = 32  # of a convolution, and tokens of the widest

INDEX = "model.safetensors.index.json"

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".keras", ".msgpack", ".mar")
_READ = (".json", ".txt", ".safetensors", ".jinja", ".model", ".onnx")
_CONFIGS = (
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
_SIZES = (
    *(key for role in ("hidden", "layers", "heads", "neurons") for key in families.spellings(role)),
    "embedding_size",
    "vocab_size",
    "max_position_embeddings",
    "num_labels",
)
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation", "quant_method")
# A structured prune or a factorisation may have removed most of what the configuration describes, not all.
_EXCESS = 100


@dataclass(frozen=True)
class CheckpointFiles:
    """What a checked directory holds."""

    config: dict[str, Any]
    weights: list[Path]
    tokenizer: Path | None  # tokenizer.json, or the vocabulary that stands in for it


def check_checkpoint(directory: Path, *, weights: bool = True) -> CheckpointFiles:
    """Check everything in a checkpoint directory that loading it would trust.

    Args:
        directory: Of a model, in the layout of transformers or of kdcli.
        weights: False where none will be read: then there need not be any.

    Returns:
        The parsed config.json and the paths of weights and tokenizer.

    Raises:
        InputError: The first thing that is missing, broken or unsafe, by file name.
    """
    if not directory.is_dir():
        raise InputError(f"{show(directory)} is not a directory")
    _check_entries(directory)
    if not (directory / "config.json").exists():
        hint = (
            "merge the adapter into its base model first"
            if (directory / "adapter_config.json").exists()
            else None
        )
        raise InputError(f"{show(directory)} is not a model: it has no config.json", hint)
    if (directory / "adapter_config.json").exists():
        # transformers would go on to load whatever base model this file names.
        raise InputError(f"{show(directory)} holds an adapter", "merge it into its base model first")
    config = read_json(directory / "config.json")
    found = _weights(directory) if weights else []
    headers = {path: read_header(path) for path in found}
    if weights:
        _check_index(directory, headers)
    # A model whose weights nobody reads is not built either, so its sizes cost nothing.
    _check_config(config, directory / "config.json", _elements(headers.values()) if weights else None)
    _check_no_code(config, directory / "config.json")
    for name in _CONFIGS:
        if (directory / name).exists():
            _check_no_code(read_json(directory / name), directory / name)
    return CheckpointFiles(_with_activation(config, directory), found, _tokenizer(directory))


def _with_activation(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Add what a directory of a ``CrossEncoder`` says of the activation.

    sentence-transformers 6 keeps it in a file beside config.json, earlier ones in config.json, which counts first.
    """
    path = directory / "config_sentence_transformers.json"
    if not path.exists() or config.get(CROSS_ENCODER) is not None:
        return config
    own = read_json(path)
    if own.get("model_type") != "CrossEncoder":
        return config
    return config | {CROSS_ENCODER: {"activation_fn": own.get("activation_fn")}}


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON object, strictly.

    Args:
        path: The file.
        limit: Largest size in bytes.

    Raises:
        InputError: Too large, not UTF-8, not JSON, not an object, NaN or infinity, a key given twice.
    """
    return _parse_object(_read(path, limit), show(path))


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read and validate the header of a safetensors file without loading a tensor.

    Args:
        path: The file: 8 bytes of header length N (little-endian), N bytes of JSON, the data.

    Returns:
        Tensor name -> ``dtype``, ``shape`` and ``data_offsets`` (begin and end in bytes, relative to the
        data). ``__metadata__`` is left out.

    Raises:
        InputError: The file does not keep to the format.
    """
    where = show(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            _refuse_pointer(start + stream.peek(64)[:64], where)
            length = int.from_bytes(start, "little")
            # A header of 128 bytes modulo 256 begins like a pickle, one of 0x4b50 bytes like a zip archive; the
            # object that follows tells them apart.
            pickled = start[:2] == b"PK" or start[:1] == b"\x80"
            if pickled and not (length <= size - 8 and stream.peek(1)[:1] == b"{"):
                raise InputError(f"{where} is a pickle with the name of a safetensors file: never loaded")
            if len(start) < 8 or length < 2 or length > size - 8:
                raise InputError(f"{where} is not a safetensors file, or only a part of one ({size} bytes)")
            if length > MAX_HEADER:
                raise InputError(f"{where} has a header of {length} bytes; {MAX_HEADER} are allowed")
            raw = stream.read(length)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}") from error
    if not raw.startswith(b"{"):
        raise InputError(f"the header of {where} does not begin with an object")
    header = _parse_object(raw, f"the header of {where}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"__metadata__ in {where} is not a table of strings")
    if not header:
        raise InputError(f"{where} holds no tensors")
    spans = sorted(_span(name, entry, where) for name, entry in header.items())
    expected = 0
    for begin, end, name in spans:
        if begin != expected:
            raise InputError(f"tensor {name!r} in {where} begins at byte {begin}, not at {expected}")
        expected = end
    if expected != size - 8 - length:
        raise InputError(f"{where} should have {expected} bytes of tensors, but has {size - 8 - length}")
    return header


def show(path: Path | str) -> str:
    """A path or name for a message: control characters, which a terminal would obey, are escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _span(name: str, entry: Any, where: str) -> tuple[int, int, str]:
    if not name.isprintable():
        raise InputError(f"{where} has a tensor whose name holds control characters: {name!a}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"tensor {name!r} in {where} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise InputError(f"tensor {name!r} in {where} has the unknown dtype {dtype!r}")
    if not _naturals(shape) or len(shape) > 8:
        raise InputError(f"tensor {name!r} in {where} has the impossible shape {str(shape)[:60]}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"tensor {name!r} in {where} has the impossible data_offsets {str(offsets)[:60]}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise InputError(
            f"tensor {name!r} in {where} needs {bits / 8:g} bytes, but has {offsets[1] - offsets[0]}"
        )
    return offsets[0], offsets[1], name


def _naturals(value: Any) -> bool:
    # 2**63: the format's numbers are unsigned 64-bit ones, and a product of eight of these stays cheap.
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)


def _read(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError(f"{show(path)} has {size} bytes; {limit} are allowed")
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise InputError(f"{show(path)} cannot be read: {error.strerror}") from error
    _refuse_pointer(raw, show(path))
    return raw


def _refuse_pointer(raw: bytes, where: str) -> None:
    if raw.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{where} is a git-lfs pointer, not the file itself", "run `git lfs pull` in its repository"
        )


def _parse_object(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"the key {twice[:60]!r} is given twice")
        return found

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"the number {text[:30]} is not finite")
        return value

    try:
        parsed = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite
        )
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{where} is not a JSON object")
    return parsed


def _check_entries(directory: Path) -> None:
    """Refuse links that leave the directory, and what is no regular file (a FIFO would block forever)."""
    root = directory.resolve()
    homes = [root]
    if root.parent.name == "snapshots":  # the hub cache: its snapshots are links into its blobs
        homes += [root.parent.parent / "blobs", root.parent.parent.parent / "blobs"]
    for path in sorted(directory.iterdir()):
        if path.suffix not in _READ:
            continue
        try:
            target = path.resolve(strict=True)
            mode = target.stat().st_mode
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise InputError(f"{show(path)} is a link that leads nowhere") from error
        if path.is_symlink() and not any(target.is_relative_to(home) for home in homes):
            raise InputError(
                f"{show(path)} is a link that leaves the directory", "replace it by a copy of the file"
            )
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{show(path)} is not a regular file")


def _weights(directory: Path) -> list[Path]:
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    if (directory / INDEX).exists():
        return [directory / name for name in sorted(set(_weight_map(directory).values()))]
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{show(directory)} has only pickle weights ({show(pickles[0])}), which can run code",
            "if you trust them, convert them once with from_pretrained and save_pretrained of transformers",
        )
    raise InputError(f"{show(directory)} has no weights: model.safetensors is missing")


def _weight_map(directory: Path) -> dict[str, str]:
    path = directory / INDEX
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{show(path)} has no weight_map")
    for name in set(map(str, names.values())):
        # One rule for ../x, /x, C:\x and the like: a shard is a plain name in the same directory.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", name):
            raise InputError(f"{show(path)} names the shard {name!r}, which is not a plain file name")
        if not (directory / name).is_file():
            raise InputError(f"{show(directory)} lacks the shard {name} that its index names")
    return names


def _check_index(directory: Path, headers: dict[Path, dict[str, Any]]) -> None:
    if not (directory / INDEX).exists():
        return
    named = _weight_map(directory)
    if (directory / "model.safetensors") in headers:
        return
    for path, header in headers.items():
        promised = {tensor for tensor, shard in named.items() if shard == path.name}
        if odd := sorted(promised ^ header.keys()):
            raise InputError(f"{show(path)} and the index disagree about the tensor {odd[0]!r}")


def _elements(headers: Any) -> int:
    return sum(math.prod(entry["shape"]) for header in headers for entry in header.values())


def _check_config(config: dict[str, Any], path: Path, stored: int | None) -> None:
    where = show(path)
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{where} has no model_type, so kdcli cannot tell what the weights are")
    for key in _SIZES:
        value = config.get(key)
        if value is not None and not (type(value) is int and 1 <= value <= MAX_SIZE):
            raise InputError(
                f"{key} in {where} is {str(value)[:30]}; a whole number from 1 to {MAX_SIZE} is allowed"
            )
    names = config.get("id2label")
    if names is not None:
        if not isinstance(names, dict) or len(names) > MAX_SIZE:
            raise InputError(f"id2label in {where} is not a table of label names")
        if set(map(str, names)) != set(map(str, range(len(names)))):
            raise InputError(f"id2label in {where} must have the keys 0 to {len(names) - 1}")
        if config.get("num_labels") not in (None, len(names)):
            raise InputError(f"{where} says num_labels {config['num_labels']}, but names {len(names)} labels")
    widths = config.get("widths")  # of the windows of a convolution
    if widths is not None and not (
        isinstance(widths, list)
        and 1 <= len(widths) <= MAX_WINDOWS
        and all(type(w) is int and 1 <= w <= MAX_WINDOWS for w in widths)
    ):
        raise InputError(
            f"widths in {where} is {str(widths)[:30]}; "
            f"at most {MAX_WINDOWS} whole numbers from 1 to {MAX_WINDOWS} are allowed"
        )
    mark, last = config.get("pair_token_id"), (config.get("vocab_size") or MAX_SIZE) - 1
    if mark is not None and not (type(mark) is int and 0 <= mark <= last):
        # It would be found in no row, and half of what the model reads would be empty.
        raise InputError(
            f"pair_token_id in {where} is {str(mark)[:30]}; a token from 0 to {last} is allowed, or null"
        )
    described = _described(config)
    if stored is not None and described > _EXCESS * max(stored, MAX_SIZE):
        # Building it would exhaust the memory before the mismatch with the weights is found.
        raise InputError(f"{where} describes {described:.1e} parameters, but the weights hold {stored:.1e}")


def _described(config: dict[str, Any]) -> int:
    """Parameters of the model that a configuration describes, without biases; encoders are dense."""

    def size(*keys: str) -> int:
        return next((config[key] for key in keys if config.get(key) is not None), 0)

    sizes = {role: size(*families.spellings(role)) for role in ("hidden", "layers", "neurons")}
    rows = size("vocab_size") + size("max_position_embeddings") + len(config.get("id2label") or ())
    weights = families.presumed(config["model_type"]).weights(sizes, config)
    return sizes["hidden"] * (rows + size("num_labels")) + weights


def _check_no_code(config: dict[str, Any], path: Path) -> None:
    """Refuse configurations that ask for code from elsewhere, or for files outside the checkpoint."""
    where = show(path)
    for key, value in _items(config):
        if key in ("auto_map", "custom_pipelines") and value:
            raise InputError(f"{where} asks for code of its own ({key}), which kdcli never runs")
        if key == "trust_remote_code" and value:
            raise InputError(f"{where} asks to trust remote code, which kdcli never does")
        if key.removeprefix("_").removesuffix("_internal") in _IMPLEMENTATIONS:
            names = value.values() if isinstance(value, dict) else [value]
            if not all(name is None or re.fullmatch(r"[A-Za-z0-9_-]+", str(name)) for name in names):
                raise InputError(f"{key} in {where} names code from elsewhere: {str(value)[:60]!r}")
        if key.endswith("_file") and isinstance(value, str) and _outside(path.parent, value):
            raise InputError(f"{key} in {where} names a file outside the checkpoint: {value[:60]!r}")


def _outside(directory: Path, name: str) -> bool:
    # Old tokenizers carry the paths of the machine that made them; only one that exists here can be read.
    try:
        target = (directory / name).resolve()
        return target.exists() and not target.is_relative_to(directory.resolve())
    except (OSError, ValueError, RuntimeError):
        return True


def _items(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    todo: list[Any] = [config]
    while todo:
        for key, value in todo.pop().items():
            yield key, value
            todo += [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, dict)]


def _tokenizer(directory: Path) -> Path | None:
    for name in ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model"):
        path = directory / name
        if path.exists():
            if path.stat().st_size > MAX_TOKENIZER:
                raise InputError(f"{show(path)} has more than {MAX_TOKENIZER} bytes")
            with path.open("rb") as stream:
                _refuse_pointer(stream.read(64), show(path))
            return path
    return None
