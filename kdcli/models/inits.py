"""First weights of a student's token table, from what the teacher makes of single tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.input_names import IDS
from kdcli.models.checkpoint import Checkpoint

_ROWS = 256  # tokens of one batch


def svd_projection(table: Tensor, width: int) -> Tensor:
    """The ``width`` leading right singular vectors of a table, strongest first.

    ``table @ projection @ projection.T`` is the best approximation of rank ``width`` in the Frobenius
    norm (Eckart and Young, 1936). Of a table whose mean was taken off, they are its principal axes.

    Args:
        table: (V, D), V and D at least ``width``.
        width: D', columns of the result.

    Returns:
        float64 (D, D') with orthonormal columns. Of every column the entry largest in size is positive,
        which a singular vector leaves open.
    """
    wide = table.double()
    _, vectors = torch.linalg.eigh(wide.T @ wide)  # ascending eigenvalues
    projection = vectors[:, -width:].flip(1)
    largest = projection.gather(0, projection.abs().argmax(0, keepdim=True))
    return projection * largest.sign()


@torch.inference_mode()
def token_vectors(teacher: Checkpoint) -> Tensor:
    """What the teacher makes of every token alone: its last state where the token stands.

    Each token of the vocabulary is read as a text of its own, between the special tokens of the
    tokenizer, so its vector holds what fine-tuning taught the teacher about it.

    Returns:
        float32 (V, D) on the teacher's device. Rows of the embedding that no token of the tokenizer has
        are what the embedding holds there read in the same way.

    Source: Model2Vec, Tulkens and van Dongen (2024), where one forward pass a token gives static vectors.
    Differs: the state of the token and not the mean over the text; no weighting by frequency.
    """
    model = teacher.model
    base = getattr(model, str(model.base_model_prefix))
    size = int(teacher.config.vocab_size)
    before, after = _around(teacher)
    found: list[Tensor] = []
    for start in range(0, size, _ROWS):
        tokens = torch.arange(start, min(start + _ROWS, size), device=teacher.device)[:, None]
        row = [tokens.new_tensor(part).expand(len(tokens), -1) for part in (before, after)]
        states = base(**{IDS: torch.cat([row[0], tokens, row[1]], dim=1)}).last_hidden_state
        found.append(states[:, len(before)].float())
    return torch.cat(found)


def token_table(vectors: Tensor, width: int, norm: float) -> Tensor:
    """Reduce token vectors to the width of a student by principal components.

    Args:
        vectors: (V, D), as ``token_vectors`` makes them.
        width: D', at most D.
        norm: Root mean square length of the rows of the result. The table is added to the position and
            segment tables, so it should be as long as the token table those belong to.

    Returns:
        (V, D') with mean zero, in the type of ``vectors``.
    """
    centred = vectors.double()
    centred = centred - centred.mean(0)
    reduced = centred @ svd_projection(centred, width)
    length = reduced.square().sum(1).mean().sqrt()
    return (reduced * (norm / length)).to(vectors.dtype)


def row_norm(table: Tensor) -> float:
    """Root mean square length of the rows of a table (V, D)."""
    return float(table.double().square().sum(1).mean().sqrt())


def _around(teacher: Checkpoint) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer sets before and after a text."""
    made = teacher.tokenizer("a", return_special_tokens_mask=True)
    row, special = made[IDS], made["special_tokens_mask"]
    if 0 not in special:  # a normaliser left nothing of the letter
        return row[:1], row[1:]
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return row[:first], row[last:]
