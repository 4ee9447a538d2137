"""Data sets from the hub, through ``datasets`` and its local cache."""

from __future__ import annotations

import errno
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kdcli.data.tables import Table
from kdcli.errors import InputError, ResourceError, UnavailableError, first_line
from kdcli.names import printable

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
PROBE_SECONDS = 1.5


def parse(ref: str) -> tuple[str, str | None] | None:
    """Split ``org/name[@revision]``; None when ``ref`` is not of that form."""
    match = _ID.fullmatch(ref)
    return None if match is None or ".." in ref else (match.group(1), match.group(2))


def load(
    repo: str, revision: str | None, wanted: Mapping[str, str], *, offline: bool
) -> tuple[dict[str, Table], list[str]]:
    """Open the splits of a hub data set; the local cache alone when offline or nothing answers.

    Args:
        repo: ``org/name``.
        revision: A commit, tag or branch, or None for the newest.
        wanted: Split name on the hub -> split name here.
        offline: Open no connection.

    Returns:
        The splits found, and notes for the user.

    Raises:
        UnavailableError: It is neither reachable nor cached (in this revision).
        ResourceError: The cache cannot be written.
        InputError: The hub has no such data set, or it is not of a usable form.
    """
    import datasets
    from huggingface_hub.errors import HTTPError  # of the HTTP client, whichever the hub library uses

    ref = f"{repo}@{revision}" if revision else repo
    told = offline or bool(datasets.config.HF_HUB_OFFLINE)
    cut_off = told or not _reachable()
    hint = (
        "connect to the network, or point HF_HOME (HF_DATASETS_CACHE) at a cache that has it, "
        "or give a directory with train.csv, validation.csv and test.csv"
    )
    try:
        with _quiet(datasets, cut_off):
            loaded = datasets.load_dataset(repo, revision=revision)
    except Exception as error:  # whatever the library raises, the user asked for data that can't be had
        reason = first_line(error)
        if isinstance(error, OSError) and error.errno in (
            errno.EACCES,
            errno.EROFS,
            errno.EPERM,
            errno.ENOSPC,
        ):
            hint = "set HF_HOME (or HF_DATASETS_CACHE) to a directory that can be written and has room"
            raise ResourceError(f"data set '{ref}' cannot be stored in the cache: {reason}", hint) from error
        if cut_off:
            why = "--offline or HF_HUB_OFFLINE is set" if told else "the hub can't be reached"
            raise UnavailableError(f"data set '{ref}' is not in the local cache, and {why}", hint) from error
        if isinstance(error, (ConnectionError, TimeoutError, HTTPError)):
            raise UnavailableError(f"data set '{ref}' can't be fetched: {reason}", hint) from error
        raise InputError(f"data set '{ref}' can't be used: {reason}") from error

    commit = _commit(loaded)
    # `datasets` falls back to the newest cached copy, whatever its revision; nobody asked for that one.
    pinned = revision is not None and (cut_off or _COMMIT.fullmatch(revision))
    if pinned and commit is not None and not commit.startswith(revision or ""):
        raise UnavailableError(f"data set '{ref}': only revision {commit} is in the local cache", hint)
    notes = []
    if revision is None:
        notes.append(f"data set '{repo}' has no @revision; this is {commit or 'an unknown revision'}")
    if ignored := sorted(name for name in loaded if name not in wanted):
        notes.append(f"data set '{repo}': splits left out: {', '.join(map(printable, ignored))}")
    tables: dict[str, Table] = {}
    for name, split in loaded.items():
        if name not in wanted:
            continue
        if wanted[name] in tables:
            raise InputError(f"data set '{ref}' has two splits that mean '{wanted[name]}'")
        tables[wanted[name]] = _table(f"{ref} {name}", split)
    return tables, notes


def _table(source: str, split: Any) -> Table:
    def column(name: str) -> list[Any]:
        return list(split.with_format(None).select_columns([name])[:][name])

    classes = {
        name: names
        for name, feature in split.features.items()
        if (names := getattr(getattr(feature, "feature", feature), "names", None))
        is not None  # also of lists
    }
    return Table(source, list(split.column_names), range(1, len(split) + 1), column, "row", classes)


def _commit(loaded: Mapping[str, Any]) -> str | None:
    """The revision that the cache path .../<config>/<version>/<commit>/<file>.arrow names."""
    files = [file["filename"] for split in loaded.values() for file in split.cache_files]
    return Path(files[0]).parent.name if files else None


@contextmanager
def _quiet(datasets: Any, cut_off: bool) -> Iterator[None]:
    """No progress bars and no log lines from the library; no connection either when cut off."""
    before = datasets.config.HF_HUB_OFFLINE
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.config.HF_HUB_OFFLINE = before or cut_off
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _reachable() -> bool:
    """Whether the hub, or the proxy in front of it, takes a connection within ``PROBE_SECONDS``."""
    from huggingface_hub import constants

    answered = threading.Event()

    def probe() -> None:
        try:
            target = urlsplit(constants.ENDPOINT)
            proxies = urllib.request.getproxies()
            proxy = proxies.get(target.scheme) or proxies.get("all")
            if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
                target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            port = target.port or (443 if target.scheme == "https" else 80)
            with socket.create_connection((target.hostname, port), timeout=PROBE_SECONDS):
                answered.set()
        except (OSError, ValueError):
            pass  # not reachable; the event stays unset

    # A look-up of the host name can't be given a time limit, so it runs where it can be left behind.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
