"""A model hub on this machine: a loopback mirror and the cache layout of huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

_COMMIT = re.compile(r"[0-9a-f]{40}")


def lay_out_cache(cache_dir: Path, repo: str, revision: str, files_dir: Path) -> Path:
    """Put files into a hub cache as a download of ``repo`` at commit ``revision`` would, also as ``main``.

    Returns:
        The snapshot directory.
    """
    storage = cache_dir / f"models--{repo.replace('/', '--')}"
    snapshot, blobs = storage / "snapshots" / revision, storage / "blobs"
    for folder in (snapshot, blobs, storage / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (storage / "refs" / "main").write_text(revision)
    for file in sorted(path for path in files_dir.iterdir() if path.is_file()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


class HubMirror:
    """Serves ``root/<org>/<name>/*`` on 127.0.0.1 with the routes that a model download uses.

    Every 40-digit commit id of a known repository is served, and ``main``, which is ``commit(repo)``.
    Use as a context manager; ``env()`` is for a subprocess, as huggingface_hub reads it on import.
    """

    def __init__(self, root_dir_of_repo_files: Path) -> None:
        self.root = root_dir_of_repo_files
        self.requests: list[str] = []  # "GET /path", in the order of arrival
        mirror = self

        class Handler(_Handler):
            hub = mirror

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> HubMirror:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def env(self, cache_dir: Path) -> dict[str, str]:
        """Environment variables that make this mirror the hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_CACHE": str(cache_dir),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @staticmethod
    def commit(repo: str) -> str:
        """The commit id behind ``main``."""
        return hashlib.sha1(repo.encode()).hexdigest()

    def resolve(self, repo: str, revision: str) -> str | None:
        """A commit id, or None for a revision that does not exist."""
        return self.commit(repo) if revision == "main" else revision if _COMMIT.fullmatch(revision) else None


class _Handler(BaseHTTPRequestHandler):
    hub: HubMirror
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        content = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)", path)
        found = listing or content
        repo = found[1] if found else ""
        if not repo or ".." in path or not (self.hub.root / repo).is_dir():
            return self._send(404, b"Repository not found", {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.resolve(
            repo, (listing[3] if listing else content[2] if content else None) or "main"
        )
        if commit is None:
            return self._send(404, b"Revision not found", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(file for file in (self.hub.root / repo).iterdir() if file.is_file())
        if listing:
            answer = self._tree(files) if listing[2] == "tree" else self._info(repo, commit, files)
            return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        assert content is not None
        file = self.hub.root / repo / content[3]
        if file not in files:
            return self._send(
                404, b"Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            )
        raw = file.read_bytes()
        return self._send(200, raw, {"ETag": f'"{_etag(raw)}"', "X-Repo-Commit": commit})

    def _info(self, repo: str, commit: str, files: list[Path]) -> dict[str, object]:
        return {
            "_id": commit[:24],
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": file.name} for file in files],
        }

    def _tree(self, files: list[Path]) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file.read_bytes())}
            for file in files
        ]

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(raw: bytes) -> str:
    """The id that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
