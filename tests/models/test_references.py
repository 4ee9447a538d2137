"""Where a model reference leads: a path, a package, the hub cache, a mirror, or nowhere (fast)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kdcli.errors import InputError, KdcliError, UnavailableError
from kdcli.models import references
from kdcli.models.aliases import MODELS, STUDENT_REPOS, ModelAlias
from kdcli.models.references import resolve, resolve_student
from tests.hub import HubMirror, lay_out_cache

BERT = MODELS["bert-base"]
HEADER = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'

# What a subprocess does with the reference: one line of JSON, so that a test can look at it.
SCRIPT = """
import json, sys
from kdcli.errors import KdcliError
from kdcli.models import references
call = references.resolve_student if sys.argv[2] == "student" else references.resolve
try:
    found = call(sys.argv[1], offline=sys.argv[2] == "offline")
    print(json.dumps(dict(path=str(found.path), source=found.source, repo=found.repo,
                          revision=found.revision, alias=found.alias, notes=found.notes)))
except KdcliError as error:
    print(json.dumps(dict(code=int(error.exit_code), message=str(error), hint=error.hint)))
"""


def write_model(directory: Path, **extra: bytes) -> Path:
    """A model as small as the format allows."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "bert"}')
    (directory / "vocab.txt").write_text("[PAD]\n")
    (directory / "model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + b"\0\0\0\0")
    for name, content in extra.items():
        (directory / name.replace("__", ".")).write_bytes(content)
    return directory


def run(ref: str, env: dict[str, str], how: str = "online") -> dict[str, Any]:
    """Resolve in a fresh interpreter, because huggingface_hub reads its environment on import."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, ref, how],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_aliases_are_pinned() -> None:
    assert {"bert-base", "minilm", "tiny"} <= MODELS.keys()
    for name, alias in MODELS.items():
        assert name == alias.name
        assert len(alias.revision) == 40
        assert set(alias.revision) <= set("0123456789abcdef")
        assert alias.package is None or alias.sha256 is not None, "repacked weights need a hash"
    assert all(MODELS[alias.name] is alias for alias in STUDENT_REPOS.values())


def test_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "out" / "student")
    monkeypatch.chdir(tmp_path)
    for ref in (str(model), "./out/student", "out/student"):
        found = resolve(ref)
        assert (found.source, found.alias, found.notes) == ("path", None, [])
        assert found.path.resolve() == model.resolve()


def test_directory_wins_over_alias_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "minilm")
    monkeypatch.chdir(tmp_path)
    found = resolve("minilm")
    assert (found.source, found.path, found.alias) == ("path", Path("minilm"), None)
    assert "not the alias" in found.notes[0]


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "-rf",
        "-",
        "../../etc/nothing",
        "a/b/c",
        "-org/name",
        "org/-name",
        "org/na--me",
        "org/name.git",
        "org/name@../x",
        "org/name@",
        "org/n\u0430me",  # a Cyrillic letter
        "org\\name",
        "org/na me",
        "name@main",
        "bert-base@main",
        "berts-base",
        "org/" + "x" * 100,
        "a" * 5000,
        "file:///etc",
        "https://user:s3cret@example.invalid/org/name?X-Sig=s3cret",
        "org/name\x1b[31m",
        "org/name\0",
        "org/name\n",
    ],
)
def test_bad_reference(ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(references, "_unreachable", no_network)
    with pytest.raises(InputError) as caught:
        resolve(ref)
    text = f"{caught.value} {caught.value.hint}"
    assert text.isprintable()
    assert "s3cret" not in text


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean 'minilm'"):
        resolve("minlm")


@pytest.mark.parametrize(
    ("ref", "meant"),
    [
        ("./modle", "model"),
        ("modle", "model"),
        ("./out/studnet", "out/student"),
        ("out/studnet", "out/student"),
        ("otu/student", "out/student"),
        ("out/deep/quantised/modl", "out/deep/quantized/model"),
    ],
)
def test_a_misspelt_path_is_not_answered_by_the_hub(
    ref: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "out/student", "out/deep/quantized/model"):
        write_model(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(references, "_unreachable", lambda _: pytest.fail("the network was touched"))
    with pytest.raises(InputError) as caught:
        resolve(ref)
    assert f"'{meant}'" in f"{caught.value} {caught.value.hint}"


def test_a_name_beside_a_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the local directory 'org' holds no 'name'") as caught:
        resolve("org/name")
    assert str(caught.value.hint) == "for the repository on the hub write org/name@main"
    with pytest.raises(UnavailableError):  # the hub is meant, and not allowed here
        resolve("org/name@main", offline=True)
    with pytest.raises(UnavailableError):  # nothing speaks for a path
        resolve("team/classifier", offline=True)


def test_a_cached_name_beside_a_local_directory_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "org").mkdir(parents=True)
    lay_out_cache(tmp_path / "cache", "org/name", BERT.revision, write_model(tmp_path / "made"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "here")
    found = resolve("org/name")
    assert found.source == "cache"
    assert any("holds no 'name'" in note for note in found.notes)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        resolve(str(model / "model.safetensors"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that ships a model and must not be imported."""
    root = tmp_path / "site"
    write_model(root / "kdcli_test_weights" / "model")
    (root / "kdcli_test_weights" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(root)
    return root / "kdcli_test_weights" / "model"


def packaged_alias(sha256: str) -> ModelAlias:
    return ModelAlias(
        name="packed",
        repo="org/packed",
        revision="0" * 40,
        summary="",
        package=("kdcli_test_weights", "model"),
        sha256=sha256,
    )


def test_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    digest = hashlib.sha256((package / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(MODELS, "packed", packaged_alias(digest))
    found = resolve("packed", offline=True)
    assert (found.source, found.path, found.repo, found.revision) == (
        "package",
        package,
        "org/packed",
        "0" * 40,
    )


def test_package_with_other_weights(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "packed", packaged_alias("f" * 64))
    with pytest.raises(InputError, match="does not hold the weights of 'packed'"):
        resolve("packed")


def test_cache(tmp_path: Path) -> None:
    files = write_model(tmp_path / "files")
    snapshot = lay_out_cache(tmp_path / "hub", BERT.repo, BERT.revision, files)
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found = run("bert-base", env)
    assert found == {
        "path": str(snapshot),
        "source": "cache",
        "repo": BERT.repo,
        "revision": BERT.revision,
        "alias": "bert-base",
        "notes": [],
    }
    found = run(f"{BERT.repo}@{BERT.revision}", env)
    assert (found["path"], found["alias"], found["notes"]) == (str(snapshot), None, [])
    found = run(BERT.repo, env)
    assert found["path"] == str(snapshot)
    assert BERT.revision in found["notes"][0]
    assert run(f"{BERT.repo}@v9", env)["code"] == 7


def test_cache_under_hf_home(tmp_path: Path) -> None:
    lay_out_cache(tmp_path / "hub", BERT.repo, BERT.revision, write_model(tmp_path / "files"))
    assert run("bert-base", {"HF_HOME": str(tmp_path)}, "offline")["source"] == "cache"


def test_incomplete_cache_is_not_used(tmp_path: Path) -> None:
    snapshot = lay_out_cache(tmp_path, BERT.repo, BERT.revision, write_model(tmp_path / "files"))
    (snapshot / "model.safetensors").resolve().unlink()
    assert run("bert-base", {"HF_HUB_CACHE": str(tmp_path)}, "offline")["code"] == 7


def test_cache_with_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    alias = packaged_alias("f" * 64)
    monkeypatch.setitem(MODELS, "packed", alias)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    lay_out_cache(tmp_path, alias.repo, alias.revision, write_model(tmp_path / "files"))
    with pytest.raises(InputError, match="does not hold the weights"):
        resolve("packed", offline=True)


def test_mirror(tmp_path: Path) -> None:
    extra = {"pytorch_model__bin": b"\x80", "README__md": b"#", "modeling__py": b"", "tf_model__h5": b""}
    write_model(tmp_path / "repos" / BERT.repo, **extra)
    with HubMirror(tmp_path / "repos") as mirror:
        env = mirror.env(tmp_path / "cache")
        found = run("bert-base", env)
        assert (found["source"], found["revision"]) == ("hub", BERT.revision)
        fetched = sorted(file.name for file in Path(found["path"]).iterdir())
        assert fetched == ["config.json", "model.safetensors", "vocab.txt"]
        served = len(mirror.requests)
        assert served > 0
        again = run("bert-base", env)
        assert (again["source"], again["path"]) == ("cache", found["path"])
        assert len(mirror.requests) == served, "a cached model needs no request"


def test_mirror_main_branch(tmp_path: Path) -> None:
    write_model(tmp_path / "repos" / "org" / "name")
    with HubMirror(tmp_path / "repos") as mirror:
        found = run("org/name", mirror.env(tmp_path / "cache"))
        assert (found["source"], found["revision"]) == ("hub", HubMirror.commit("org/name"))


def test_mirror_errors(tmp_path: Path) -> None:
    write_model(tmp_path / "repos" / "org" / "name")
    pickled = write_model(tmp_path / "repos" / "org" / "pickled", pytorch_model__bin=b"\x80")
    (pickled / "model.safetensors").unlink()
    with HubMirror(tmp_path / "repos") as mirror:
        env = mirror.env(tmp_path / "cache")
        answer = run("org/absent", env)
        assert answer["code"] == 3
        assert "neither a local directory nor a repository" in answer["message"]
        answer = run("org/name@v9", env)
        assert answer["code"] == 3
        assert "no revision 'v9'" in answer["message"]
        answer = run("org/pickled", env)
        assert answer["code"] == 3
        assert "no safetensors" in answer["message"]
        assert not any("pytorch_model.bin" in line for line in mirror.requests)


def test_offline_makes_no_request(tmp_path: Path) -> None:
    write_model(tmp_path / "repos" / "org" / "name")
    with HubMirror(tmp_path / "repos") as mirror:
        env = mirror.env(tmp_path / "cache")
        assert run("org/name", env, "offline")["code"] == 7
        assert run("org/name", env | {"HF_HUB_OFFLINE": "1"})["code"] == 7
        assert mirror.requests == []


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:9",  # nobody listens
        "http://10.255.255.1",  # swallows packets, or has no route
        "https://hub.invalid",  # no such name (RFC 6761)
        "nonsense",
    ],
)
def test_unreachable_is_told_fast(tmp_path: Path, endpoint: str) -> None:
    start = time.monotonic()
    answer = run("bert-base", {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path)})
    assert time.monotonic() - start < 3
    assert answer["code"] == 7
    assert BERT.repo in answer["message"]
    for way in ("network", "HF_HUB_CACHE", "local directory", "pip install"):
        assert way in answer["hint"]


def test_silent_hub_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(references, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
        start = time.monotonic()
        with pytest.raises(UnavailableError, match="the download failed"):
            resolve("org/name")
        assert time.monotonic() - start < 15, "the download's own retries take minutes"


def test_proxy_is_what_gets_probed(tmp_path: Path) -> None:
    with HubMirror(tmp_path) as mirror:
        env = mirror.env(tmp_path) | {"NO_PROXY": "", "no_proxy": "", "http_proxy": "http://127.0.0.1:9"}
        answer = run("bert-base", env)
        assert answer["code"] == 7
        assert mirror.requests == []


def test_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = STUDENT_REPOS["tiny"]
    lay_out_cache(tmp_path, tiny.repo, tiny.revision, write_model(tmp_path / "files"))
    found = run("tiny", {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}, "student")
    assert (found["source"], found["revision"]) == ("cache", tiny.revision)
    with pytest.raises(UnavailableError, match="medium"):
        resolve_student("medium")


def test_student_ignores_a_directory_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(KdcliError):
        resolve_student("tiny", offline=True)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from kdcli.models import aliases, references, safety; "
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'safetensors', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
