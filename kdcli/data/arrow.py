"""Parquet files, and the folders that ``datasets`` writes with ``save_to_disk``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcli.data.tables import Table
from kdcli.errors import InputError, first_line
from kdcli.names import printable

SAVED = "dataset_info.json"
SAVED_SPLITS = "dataset_dict.json"


def parquet(data: bytes, path: Path) -> Table:
    """Read a parquet file; its ``huggingface`` metadata gives numbered classes their names.

    Raises:
        InputError: The file is broken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        schema, count = file.schema_arrow, int(file.metadata.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"'{path}' is not a readable parquet file: {first_line(error)}") from error

    def column(name: str) -> list[Any]:
        try:
            return file.read(columns=[name]).column(name).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"'{path}': can't read column '{printable(name)}': {first_line(error)}"
            ) from error

    return Table(str(path), list(schema.names), range(1, count + 1), column, "row", _classes(schema.metadata))


def is_saved(path: Path) -> bool:
    """Whether a folder is one data set without splits, as ``Dataset.save_to_disk`` writes it."""
    return (path / SAVED).is_file() and (path / "state.json").is_file()


def saved_splits(path: Path) -> list[str] | None:
    """The splits that ``DatasetDict.save_to_disk`` wrote; None for any other folder."""
    if not (path / SAVED_SPLITS).is_file():
        return None
    names = _json(path / SAVED_SPLITS).get("splits")
    if not isinstance(names, list) or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise InputError(f"'{path / SAVED_SPLITS}' does not list splits")
    return names


def saved(path: Path) -> Table:
    """Read one data set that ``save_to_disk`` wrote, from its own Arrow files and nothing else.

    Raises:
        InputError: The folder is broken, or its rows are picked by an index file.
    """
    import pyarrow as pa

    state = _json(path / "state.json")
    if state.get("_indices_data_files"):
        raise InputError(f"'{path}' was saved with an index of rows", "save it again: flatten_indices()")
    tables = []
    for entry in state.get("_data_files") or []:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"'{path / 'state.json'}' names no files of its folder")
        try:
            with pa.memory_map(str(path / name)) as source:
                tables.append(pa.ipc.open_stream(source).read_all())
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"'{path / name}' is not a readable Arrow file: {first_line(error)}") from error
    if not tables:
        raise InputError(f"'{path / 'state.json'}' names no data files")
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise InputError(f"the files of '{path}' do not fit together: {first_line(error)}") from error
    rows = range(1, table.num_rows + 1)
    classes = _named(_json(path / SAVED).get("features"))
    return Table(
        str(path), list(table.column_names), rows, lambda name: table.column(name).to_pylist(), "row", classes
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{file}' can't be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"'{file}' is not a JSON object")
    return content


def _classes(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """What ``datasets`` keeps of its features in the metadata of a schema."""
    try:
        return _named(json.loads((metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def _named(features: Any) -> dict[str, list[str]]:
    found = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        if isinstance(feature, list) and len(feature) == 1:  # lists of classes, as older versions wrote them
            feature = feature[0]
        elif isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            found[column] = names
    return found
