"""``kdcli`` for a shell, without importing torch and transformers each time.

``forked.py SOCKET`` imports them once and forks for every call; ``forked.py SOCKET WORD...`` makes a call. To the shell
it is a process like any other: its own streams, directory, environment and exit code. What it is not is a cold start,
and variables that a library reads when it is imported are those of the server.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys

LOST = 99  # the exit code of a call whose process died


def call(place: str, words: list[str]) -> int:
    """Have the server run ``kdcli`` with these words and this process's streams; returns its exit code."""
    import json

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        socket.send_fds(connection, [b"."], [0, 1, 2])
        content = {"words": words, "cwd": os.getcwd(), "environment": dict(os.environ)}
        connection.sendall(json.dumps(content).encode())
        connection.shutdown(socket.SHUT_WR)
        # The next one in a pipe waits for the end of what the call writes, not for that of this process.
        for stream in (0, 1, 2):
            os.close(stream)
        answer = connection.recv(1)
    return answer[0] if answer else LOST


def serve(place: str) -> None:
    """Print a line when ready, then answer calls until killed."""
    import gc
    import importlib

    for name in ("kdcli.cli.app", "kdcli.run.life", "kdcli.models.ensemble", "kdcli.models.small"):
        importlib.import_module(name)
    for name in ("torch.onnx", "onnxruntime.transformers.optimizer"):
        importlib.import_module(name)
    gc.freeze()  # a fork that looks through all of it would copy all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen(16)
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    import json

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = LOST
    with contextlib.suppress(BaseException):
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        asked = json.loads(b"".join(iter(lambda: connection.recv(1 << 16), b"")))
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["cwd"])
        code = _run(asked["words"])
    with contextlib.suppress(OSError):
        for number in (0, 1, 2):
            os.close(number)
        connection.sendall(bytes([code]))
    os._exit(code)


def _run(words: list[str]) -> int:
    import traceback

    from kdcli.cli.app import main

    try:
        main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        return code
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    return LOST


def shim(place: str) -> str:
    """A shell script that is ``kdcli`` of the server at ``place``."""
    line = [sys.executable, "-I", "-S", __file__, place]
    return f'#!/bin/sh\nexec {shlex.join(line)} "$@"\n'


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        sys.exit(call(sys.argv[1], sys.argv[2:]))
