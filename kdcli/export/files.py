"""Reading and writing graphs whose weights are too many to hold twice.

A graph is one message of Protocol Buffers. The library reads and writes messages as a whole, so that next to the
weights their bytes are in memory; here the bytes are those of the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from kdcli.errors import InputError

LARGE = 128 << 20
"""Bytes of weights from which on a detour is worth it."""
_MOST = 2**31 - 1  # bytes of a message that any reader takes
_SMALL = 1024  # bytes of a tensor that is read at once
_BYTES = 2  # the wire type of strings, bytes and messages


@contextmanager
def mapped(file: Path) -> Iterator[memoryview]:
    """The content of a file that is not empty, as memory that belongs to the file."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        view = memoryview(content)
        try:
            yield view
        finally:
            view.release()


def load(source: Path) -> onnx.ModelProto:
    """Read a graph that has no external data.

    Of equal weights the exporter stores one, and the others as copies made by Identity; here all who read a copy
    read the weight itself, so that it is seen to be one.
    """
    model = onnx.ModelProto()
    with mapped(source) as content:
        model.ParseFromString(content)
    _read_originals(model.graph)
    return model


def view(source: Path) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Read a graph as :func:`load` does, but leave the bytes of its weights in the file.

    Returns:
        The graph, and for each initialiser that does not hold its values their bytes, for :func:`values` and
        :func:`save`. They are memory that belongs to the file, for as long as there is one of them.
    """
    with source.open("rb") as stream:
        content = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    model, tensors = _split(content)
    weights = {}
    for start, end in tensors:
        rest, data = _without(content[start:end], TensorProto.RAW_DATA_FIELD_NUMBER)
        if len(data) == 1 and data[0][1] - data[0][0] >= _SMALL:
            tensor = TensorProto.FromString(rest)
            begin, last = data[0]
            weights[tensor.name] = np.frombuffer(content, np.uint8, last - begin, start + begin)
        else:
            tensor = TensorProto.FromString(content[start:end])
        model.graph.initializer.append(tensor)
    _read_originals(model.graph)
    return model, weights


def values(tensor: TensorProto, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """The values of an initialiser of :func:`view`; not to be written to."""
    if (content := weights.get(tensor.name)) is None:
        return numpy_helper.to_array(tensor)
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type).newbyteorder("<")
    return content.view(kind).reshape(tuple(tensor.dims))


def referring(source: Path) -> bytes:
    """A small graph that finds its weights in the bytes of ``source``, as its external data.

    A runtime that is given it, and the directory of the file, maps them instead of reading them twice.

    Raises:
        InputError: The file is no graph.
    """
    with _graph_of(source) as (content, model, tensors):
        for start, end in tensors:
            rest, data = _without(content[start:end], TensorProto.RAW_DATA_FIELD_NUMBER)
            if len(data) != 1 or data[0][1] - data[0][0] < _SMALL:
                model.graph.initializer.append(TensorProto.FromString(content[start:end]))
                continue
            tensor = TensorProto.FromString(rest)
            tensor.data_location = TensorProto.EXTERNAL
            where = {"location": source.name, "offset": start + data[0][0], "length": data[0][1] - data[0][0]}
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
            model.graph.initializer.append(tensor)
    return model.SerializeToString()


@contextmanager
def _graph_of(source: Path) -> Iterator[tuple[memoryview, onnx.ModelProto, list[tuple[int, int]]]]:
    """The content of a file, its graph without initialisers, and where these lie."""
    try:
        with mapped(source) as content:
            yield content, *_split(content)
    except (DecodeError, IndexError, ValueError) as error:
        raise InputError(f"{source} is not an ONNX graph, or is cut off") from error


def outline(source: Path) -> onnx.ModelProto:
    """Read a graph without its initialisers, which are almost all of its bytes.

    Raises:
        InputError: The file is no graph.
    """
    with _graph_of(source) as (_, model, _):
        return model


def save(model: onnx.ModelProto, target: Path, *, weights: Mapping[str, np.ndarray] | None = None) -> None:
    """Write a graph, one weight after the other: the bytes of ``onnx.save``.

    Args:
        model: What to write.
        target: The file.
        weights: Initialiser -> its values, of those that do not hold them themselves.

    Raises:
        InputError: The graph is larger than a file of this format can be.
    """
    given = weights or {}
    tensors = []
    for tensor in model.graph.initializer:
        before, after, size = b"", b"", tensor.ByteSize()
        if (values := given.get(tensor.name)) is not None:
            before, after = _around(tensor, "raw_data", _ASIDE)
            before += _key(TensorProto.RAW_DATA_FIELD_NUMBER, values.nbytes)
            size = len(before) + values.nbytes + len(after)
        tensors.append((tensor, size, before, values, after))
    first, last = _around(model.graph, "initializer")
    begin, end = _around(model, "graph")
    number = GraphProto.INITIALIZER_FIELD_NUMBER
    total = len(first + last) + sum(size + len(_key(number, size)) for _, size, *_ in tensors)
    if total > _MOST:
        raise InputError(f"the ONNX graph has {total / 2**30:.1f} GiB, and such a file holds less than 2 GiB")
    with target.open("wb") as stream:
        stream.write(begin + _key(onnx.ModelProto.GRAPH_FIELD_NUMBER, total) + first)
        for tensor, size, before, values, after in tensors:
            stream.write(_key(number, size))
            if values is None:
                stream.write(tensor.SerializeToString())
            else:
                stream.write(before)
                stream.write(np.ascontiguousarray(values).data)
                stream.write(after)
        stream.write(last + end)


def aside(graph: GraphProto, content: memoryview) -> dict[str, np.ndarray]:
    """The bytes of initialisers with external data, which all lie in the file of this content; for :func:`save`."""
    found = {}
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            info: Any = ExternalDataInfo(tensor)
            found[tensor.name] = np.frombuffer(content, np.uint8, info.length, info.offset)
    return found


def beside(source: Path) -> list[Path]:
    """The files that hold the external data of a graph, each once; none for a graph in one piece.

    Raises:
        InputError: The file is no graph, or one of them is missing or lies outside its directory.
    """
    names: set[str] = set()
    with _graph_of(source) as (content, model, tensors):
        for start, end in tensors:
            rest, _ = _without(content[start:end], TensorProto.RAW_DATA_FIELD_NUMBER)
            names |= _locations(TensorProto.FromString(rest))
        for node in model.graph.node:
            for attribute in node.attribute:
                names |= _locations(attribute.t)
    home = source.parent.resolve()
    for name in sorted(names):
        place = source.parent / name
        inside = not Path(name).is_absolute() and place.resolve().is_relative_to(home)
        if not inside or not place.is_file():
            raise InputError(
                f"{source} keeps weights in {name!r}, which is {'missing' if inside else 'outside its directory'}",
                "put the file beside the graph" if inside else None,
            )
    return [source.parent / name for name in sorted(names)]


def _locations(tensor: TensorProto) -> set[str]:
    if tensor.data_location != TensorProto.EXTERNAL:
        return set()
    return {entry.value for entry in tensor.external_data if entry.key == "location"}


# What says in a tensor that its data are elsewhere.
_ASIDE = frozenset({"raw_data", "external_data", "data_location", "doc_string"})


def _around(message: Any, name: str, without: frozenset[str] = frozenset()) -> tuple[bytes, bytes]:
    """A message without one of its fields, as the bytes before and behind it."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    before, after = type(message)(), type(message)()
    for field, value in message.ListFields():
        if field.number == number or field.name in without:
            continue
        part = before if field.number < number else after
        if hasattr(value, "extend"):
            getattr(part, field.name).extend(value)
        elif field.message_type is not None:
            getattr(part, field.name).CopyFrom(value)
        else:
            setattr(part, field.name, value)
    return before.SerializeToString(), after.SerializeToString()


def _key(number: int, size: int) -> bytes:
    """What stands in front of a field of so many bytes."""
    made = bytearray()
    for value in (number << 3 | _BYTES, size):
        while value > 0x7F:
            made.append(value & 0x7F | 0x80)
            value >>= 7
        made.append(value)
    return bytes(made)


def _split(content: memoryview) -> tuple[onnx.ModelProto, list[tuple[int, int]]]:
    """A graph without its initialisers, and where these lie."""
    rest, graphs = _without(content, onnx.ModelProto.GRAPH_FIELD_NUMBER)
    model, found = onnx.ModelProto.FromString(rest), []
    for start, end in graphs:
        inside, tensors = _without(content[start:end], GraphProto.INITIALIZER_FIELD_NUMBER)
        model.graph.MergeFromString(inside)
        found += [(start + first, start + last) for first, last in tensors]
    return model, found


def _without(content: memoryview, number: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The bytes of a message without one of its fields, and where that lies.

    Raises:
        IndexError, ValueError: It is no message.
    """
    rest, found = bytearray(), []
    at = 0
    while at < len(content):
        begin = at
        key, at = _varint(content, at)
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)
        if size is None and key & 7 != _BYTES:
            raise ValueError(f"there is no wire type {key & 7}")
        if key & 7 in (0, _BYTES):
            value, at = _varint(content, at)
            size = 0 if key & 7 == 0 else value
        assert size is not None
        start, at = at, at + size
        if at > len(content):
            raise ValueError("the message is cut off")
        if key >> 3 == number:
            found.append((start, at))
        else:
            rest += content[begin:at]
    return bytes(rest), found


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (content[at] & 0x7F) << shift
        if content[at] < 0x80:
            return value, at + 1
        at, shift = at + 1, shift + 7


def _read_originals(graph: GraphProto) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    kept = {output.name for output in graph.output}
    original: dict[str, str] = {}
    copies = []
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in weights and node.output[0] not in kept:
            original[node.output[0]] = node.input[0]
            copies.append(node)
    for node in copies:
        graph.node.remove(node)
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in original:
                node.input[place] = original[name]
