"""Hostile and broken checkpoints, all made here: each is one InputError, and no library sees it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from kdcli.errors import InputError
from kdcli.models.safety import CheckpointFiles, check_checkpoint, read_header, read_json
from tests import tiny
from tests.hub import lay_out_cache

CONFIG = {
    "model_type": "bert",
    "hidden_size": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 4,
    "vocab_size": 5,
    "id2label": {"0": "negative", "1": "positive"},
}


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file, with a header that may be anything."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = tensors(
    {"__metadata__": {"format": "pt"}, "a": entry(0, 4), "b": entry(4, 8, [1], "F32")}, b"12345678"
)


def write(directory: Path, config: Any = CONFIG, weights: bytes | None = GOOD, **files: Any) -> Path:
    """A checkpoint; ``name__json=...`` writes name.json."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = {"config.json": config, "model.safetensors": weights, "vocab.txt": b"[PAD]\n"}
    contents |= {name.replace("__", "."): content for name, content in files.items()}
    for name, content in contents.items():
        if content is not None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            (directory / name).write_bytes(raw)
    return directory


def refuse(directory: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        check_checkpoint(directory)
    assert str(caught.value).isprintable(), "a message is one line without control characters"
    assert len(str(caught.value)) < 400 + len(str(directory)) * 2


@pytest.mark.parametrize("length", [128, 384, 0x8002, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    header = json.dumps({"a": entry(0, 4)}).encode().ljust(length)  # the format pads with spaces
    path = tmp_path / "model.safetensors"
    path.write_bytes(tensors(header, b"1234"))
    assert path.read_bytes()[:1] == b"\x80" or path.read_bytes()[:2] in (b"PK", b"\x02\x80")
    assert set(read_header(path)) == {"a"}


def test_good(tmp_path: Path) -> None:
    found = check_checkpoint(write(tmp_path))
    assert found == CheckpointFiles(CONFIG, [tmp_path / "model.safetensors"], tmp_path / "vocab.txt")
    assert list(read_header(tmp_path / "model.safetensors")) == ["a", "b"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("by_kdcli", [False, True])
def test_real_checkpoints_pass(tmp_path: Path, family: str, by_kdcli: bool) -> None:
    found = check_checkpoint(tiny.saved(tmp_path, family, by_kdcli=by_kdcli))
    assert found.config["model_type"] == family
    assert found.tokenizer == tmp_path / "tokenizer.json"


def test_sharded(tmp_path: Path) -> None:
    parts = {"m-1.safetensors": "a", "m-2.safetensors": "b"}
    index = {"metadata": {}, "weight_map": {name: part for part, name in parts.items()}}
    write(tmp_path, weights=None)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for part, name in parts.items():
        (tmp_path / part).write_bytes(tensors({name: entry(0, 1)}, b"1"))
    assert [path.name for path in check_checkpoint(tmp_path).weights] == sorted(parts)
    (tmp_path / "m-2.safetensors").write_bytes(tensors({"a": entry(0, 1)}, b"1"))
    refuse(tmp_path, "disagree about the tensor 'a'")
    (tmp_path / "m-2.safetensors").unlink()
    refuse(tmp_path, "lacks the shard m-2.safetensors")


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "a/b.safetensors",
        "C:\\x.safetensors",
        "\\\\host\\x.safetensors",
        "x.safetensors\0",
        "x.safetensors\n",
        "..",
        "pytorch_model.bin",
        7,
        None,
    ],
)
def test_index_that_leaves_the_directory(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "secret.safetensors").write_bytes(GOOD)
    write(tmp_path / "model", weights=None)
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    refuse(tmp_path / "model", "not a plain file name")
    write(tmp_path / "model")  # even where model.safetensors makes the index unnecessary
    refuse(tmp_path / "model", "not a plain file name")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_index_without_a_map(tmp_path: Path, index: Any) -> None:
    write(tmp_path, weights=None, **{"model.safetensors.index.json": index})
    refuse(tmp_path, "no weight_map")


U64 = 2**64 - 1
HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x02\0\0", "not a safetensors file"),
    "no header": (tensors(b""), "not a safetensors file"),
    "longer than the file": (tensors(b"{}", length=500), "only a part"),
    "longest": (tensors(b"{}", length=U64), "only a part"),
    "pickle": (b"\x80\x04\x95" + b"." * 64, "is a pickle"),
    "zip": (b"PK\x03\x04" + b"." * 64, "is a pickle"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
    "not an object": (tensors(b"[1]"), "does not begin with an object"),
    "space first": (tensors(b' {"a":1}'), "does not begin with an object"),
    "not JSON": (tensors(b'{"a":'), "not valid JSON"),
    "not UTF-8": (tensors(b'{"\xff":1}'), "not valid JSON"),
    "nested": (tensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deeply"),
    "twice": (tensors(b'{"a":1,"a":2}'), "'a' is given twice"),
    "NaN": (tensors(b'{"a":NaN}'), "not finite"),
    "no tensors": (tensors({"__metadata__": {}}), "no tensors"),
    "metadata": (tensors({"__metadata__": {"a": 1}, "a": entry(0, 1)}, b"1"), "table of strings"),
    "metadata list": (tensors({"__metadata__": [], "a": entry(0, 1)}, b"1"), "table of strings"),
    "not an entry": (tensors({"a": 1}), "needs exactly"),
    "no offsets": (tensors({"a": {"dtype": "U8", "shape": [1]}}), "needs exactly"),
    "extra key": (tensors({"a": entry(0, 1) | {"x": 1}}, b"1"), "needs exactly"),
    "dtype": (tensors({"a": entry(0, 1, dtype="U128")}, b"1"), "unknown dtype"),
    "dtype list": (tensors({"a": entry(0, 1, dtype=["U8"])}, b"1"), "unknown dtype"),
    "shape": (tensors({"a": entry(0, 1, "1")}, b"1"), "impossible shape"),
    "negative shape": (tensors({"a": entry(0, 1, [-1, -1])}, b"1"), "impossible shape"),
    "boolean shape": (tensors({"a": entry(0, 1, [True])}, b"1"), "impossible shape"),
    "float shape": (tensors({"a": entry(0, 1, [1.0])}, b"1"), "impossible shape"),
    "overflowing shape": (tensors({"a": entry(0, 0, [2**32, 2**32])}), "needs 1.84467e"),
    "beyond 64 bits": (tensors({"a": entry(0, 0, [2**64])}), "impossible shape"),
    "many dimensions": (tensors({"a": entry(0, 1, [1] * 10_000)}, b"1"), "impossible shape"),
    "negative offset": (tensors({"a": entry(-1, 0)}), "impossible data_offsets"),
    "swapped offsets": (tensors({"a": entry(1, 0, [1])}, b"1"), "impossible data_offsets"),
    "three offsets": (
        tensors({"a": entry(0, 1) | {"data_offsets": [0, 1, 2]}}, b"1"),
        "impossible data_offsets",
    ),
    "too few bytes": (tensors({"a": entry(0, 3, [1], "F32")}, b"123"), "needs 4 bytes, but has 3"),
    "half a byte": (tensors({"a": entry(0, 1, [1], "F4")}, b"1"), "needs 0.5 bytes"),
    "hole": (tensors({"a": entry(0, 1), "b": entry(2, 3)}, b"123"), "begins at byte 2, not at 1"),
    "hole first": (tensors({"a": entry(1, 2)}, b"12"), "begins at byte 1, not at 0"),
    "overlap": (tensors({"a": entry(0, 2), "b": entry(1, 3)}, b"123"), "begins at byte 1, not at 2"),
    "truncated": (tensors({"a": entry(0, 4)}, b"123"), "should have 4 bytes of tensors, but has 3"),
    "trailing": (tensors({"a": entry(0, 1)}, b"12"), "should have 1 bytes"),
    "name with NUL": (tensors({"a\0": entry(0, 1)}, b"1"), "control characters"),
    "name with ANSI": (tensors({"\x1b[31m": entry(0, 1)}, b"1"), "control characters"),
    "name with a line": (tensors({"a\n::error::": entry(0, 1)}, b"1"), "control characters"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_weights(tmp_path: Path, case: str) -> None:
    raw, match = HEADERS[case]
    refuse(write(tmp_path, weights=raw), match)


def test_header_cap(tmp_path: Path) -> None:
    raw = b"{" + b" " * 17 * 2**20 + b"}"
    refuse(write(tmp_path, weights=tensors(raw)), "has a header of")


def test_never_laxer_than_the_library(tmp_path: Path) -> None:
    """Mutate a good file: what passes here must also be a file that safetensors opens."""
    rng = random.Random(0)
    path = tmp_path / "model.safetensors"
    accepted = refused = 0
    for _ in range(800):
        raw = bytearray(GOOD)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randint(0, 2)] = rng.choice(
                [b"", b"0", b"9", b"-", b"]", b",", b'"', bytes([rng.randrange(256)])]
            )
        path.write_bytes(raw)
        try:
            header = read_header(path)
        except InputError:
            refused += 1
            continue
        accepted += 1
        try:
            with safe_open(path, "np") as opened:
                assert set(opened.keys()) == header.keys()
        except SafetensorError as error:
            raise AssertionError(f"accepted {bytes(raw)!r}, which safetensors refuses") from error
    assert accepted > 20
    assert refused > 300


def test_only_pickle(tmp_path: Path) -> None:
    refuse(write(tmp_path, weights=None, pytorch_model__bin=b"\x80"), "only pickle weights")


def test_safetensors_beside_pickle(tmp_path: Path) -> None:
    write(tmp_path, pytorch_model__bin=b"\x80", training_args__bin=b"\x80")
    assert [path.name for path in check_checkpoint(tmp_path).weights] == ["model.safetensors"]


def test_nothing_there(tmp_path: Path) -> None:
    refuse(tmp_path / "absent", "is not a directory")
    refuse(write(tmp_path, config=None, weights=None), "no config.json")
    refuse(write(tmp_path, weights=None), "no weights")


def test_adapter(tmp_path: Path) -> None:
    refuse(write(tmp_path, adapter_config__json={"base_model_name_or_path": "org/name"}), "holds an adapter")


CONFIGS: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "not valid JSON"),
    "not an object": (b"[]", "not a JSON object"),
    "not UTF-8": (b'{"a":"\xff"}', "not valid JSON"),
    "NaN": (b'{"a":NaN}', "not finite"),
    "infinity": (b'{"a":[-Infinity]}', "not finite"),
    "infinite": (b'{"a":1e999}', "not finite"),
    "twice": (b'{"x":{"a":1,"a":1}}', "given twice"),
    "nested": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "digits": (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "too large": (b" " * (10 * 2**20 + 1), "are allowed"),
    "no model_type": ({"hidden_size": 2}, "no model_type"),
    "model_type": ({"model_type": ["bert"]}, "no model_type"),
    "negative": (CONFIG | {"hidden_size": -1}, "hidden_size"),
    "zero": (CONFIG | {"num_hidden_layers": 0}, "num_hidden_layers"),
    "absurd": (CONFIG | {"vocab_size": 10**12}, "vocab_size"),
    "boolean": (CONFIG | {"num_attention_heads": True}, "num_attention_heads"),
    "fraction": (CONFIG | {"dim": 2.5}, "dim"),
    "text": (CONFIG | {"intermediate_size": "4"}, "intermediate_size"),
    "bomb": (CONFIG | {"hidden_size": 1_000_000, "vocab_size": 1_000_000}, "describes 5.0e.12 parameters"),
    "layers": (CONFIG | {"hidden_size": 4096, "num_hidden_layers": 1_000_000}, "parameters"),
    "label bomb": (CONFIG | {"num_labels": 10**9}, "num_labels"),
    "label count": (CONFIG | {"num_labels": 3}, "num_labels 3, but names 2"),
    "label keys": (CONFIG | {"id2label": {"1": "a", "2": "b"}}, "keys 0 to 1"),
    "label list": (CONFIG | {"id2label": ["a"]}, "not a table"),
    "auto_map": (CONFIG | {"auto_map": {"AutoModel": "evil.Model"}}, "code of its own"),
    "nested auto_map": (
        CONFIG | {"a": [{"text_config": {"auto_map": {"AutoModel": "x"}}}]},
        "code of its own",
    ),
    "pipeline": (CONFIG | {"custom_pipelines": {"x": {"impl": "evil.P"}}}, "code of its own"),
    "trust": (CONFIG | {"text_config": {"trust_remote_code": True}}, "trust remote code"),
    "attention": (CONFIG | {"_attn_implementation_internal": "org/kernel"}, "code from elsewhere"),
    "attention 2": (CONFIG | {"attn_implementation": {"": "org/kernel:fn"}}, "code from elsewhere"),
    "experts": (CONFIG | {"_experts_implementation": "org/kernel"}, "code from elsewhere"),
    "quantiser": (CONFIG | {"quantization_config": {"quant_method": "org/plugin"}}, "code from elsewhere"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_config(tmp_path: Path, case: str) -> None:
    config, match = CONFIGS[case]
    refuse(write(tmp_path, config=config), match)


@pytest.mark.parametrize(
    "harmless",
    [
        {"auto_map": {}},
        {"trust_remote_code": False},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": None},
        {"num_labels": 2},
        {"quantization_config": {"quant_method": "compressed-tensors"}},
    ],
)
def test_harmless_config(tmp_path: Path, harmless: dict[str, Any]) -> None:
    assert check_checkpoint(write(tmp_path, config=CONFIG | harmless)).config == CONFIG | harmless


def test_hostile_tokenizer(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    model = tmp_path / "model"
    for config, match in (
        ({"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "code of its own"),
        ({"vocab_file": str(secret)}, "outside the checkpoint"),
        ({"tokenizer_file": "../secret"}, "outside the checkpoint"),
        (b"{", "not valid JSON"),
    ):
        refuse(write(model, tokenizer_config__json=config), match)
    write(model, tokenizer_config__json={"vocab_file": "/nonexistent/machine/vocab.txt", "merges_file": None})
    assert check_checkpoint(model).tokenizer == model / "vocab.txt"
    write(model, tokenizer__json=b"version https://git-lfs.github.com/spec/v1\n")
    refuse(model, "git-lfs pointer")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.txt", "chat_template.jinja"])
def test_link_out_of_the_directory(tmp_path: Path, name: str) -> None:
    model = write(tmp_path / "model")
    secret = tmp_path / "secret"
    secret.write_bytes(GOOD)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    refuse(model, "a link that leaves the directory")


@pytest.mark.parametrize("target", ["absent.json", "config.json"])
def test_link_to_nowhere(tmp_path: Path, target: str) -> None:
    write(tmp_path, config=None)
    (tmp_path / "config.json").symlink_to(target)
    refuse(tmp_path, "leads nowhere")


def test_link_within_the_directory(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (tmp_path / "model.safetensors").symlink_to("weights.safetensors")
    assert check_checkpoint(tmp_path).weights == [tmp_path / "model.safetensors"]


def test_hub_cache_links(tmp_path: Path) -> None:
    snapshot = lay_out_cache(tmp_path / "hub", "org/name", "0" * 40, write(tmp_path / "files"))
    assert (snapshot / "model.safetensors").is_symlink()
    assert check_checkpoint(snapshot).config == CONFIG
    (snapshot / "vocab.txt").unlink()
    (snapshot / "vocab.txt").symlink_to(tmp_path / "files" / "vocab.txt")
    refuse(snapshot, "a link that leaves the directory")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("make", [_fifo, _device])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_no_regular_file(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    write(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    code = (
        "import sys; from pathlib import Path; from kdcli.models.safety import check_checkpoint; "
        "check_checkpoint(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=20, check=False
    )
    assert "InputError" in done.stderr


def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    refuse(tmp_path, "cannot be read")


def test_path_with_control_characters(tmp_path: Path) -> None:
    refuse(write(tmp_path / "a\x1b[31mb", config=b"{"), "not valid JSON")


def test_read_json_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path, limit=8) == {"a": 1}
    with pytest.raises(InputError, match="8 bytes; 7 are allowed"):
        read_json(path, limit=7)
