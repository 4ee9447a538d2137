"""The splits of a data set as a checkpoint reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kdcli.data import labels as label_names
from kdcli.data.sources import Dataset
from kdcli.data.wanted import SAID, Wanted
from kdcli.inputs import kinds
from kdcli.inputs.text import Encoded
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress


class Splits(Mapping[str, Encoded]):
    """The splits of a data set, tokenised for one checkpoint, labels aligned to its own by name.

    A split is tokenised when it is first asked for: a stage that never trains need not wait for the
    training rows.

    Raises:
        InputError: The answers of the data are not of the checkpoint's kind, or their labels are not its own.
    """

    def __init__(self, dataset: Dataset, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
        self._dataset, self._checkpoint = dataset, checkpoint
        self._progress = progress or Progress()
        if (kind := checkpoint.task.kind) != dataset.kind:
            raise Wanted(kind, f"the model '{checkpoint.path}'").contradicted(
                f"data '{dataset.ref}' have {SAID[dataset.kind]} as answer"
            )
        self._index: dict[str, int] = {}
        if dataset.kind != "number":  # which has no names
            self._index = label_names.align(
                dataset.label_names, checkpoint.labels, ids=dataset.ids, option=dataset.ids_option
            )
        self._made: dict[str, Encoded] = {}

    def __getitem__(self, split: str) -> Encoded:
        if split not in self._made:
            made, rows = self._checkpoint, self._dataset.splits[split]
            inputs = kinds.of(made.tokenizer.model_input_names)
            encoded = inputs.encode(
                rows,
                made.tokenizer,
                made.max_length,
                self._index,
                split,
                kind=self._dataset.kind,
                outputs=len(made.labels),
            )
            if encoded.cut:
                what = f"{encoded.cut} of {len(rows)} rows of {split}"
                self._progress.note(f"{what} are longer than {made.max_length} tokens: they are cut there")
            self._made[split] = encoded
        return self._made[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dataset.splits)

    def __len__(self) -> int:
        return len(self._dataset.splits)

    def __contains__(self, split: object) -> bool:
        return split in self._dataset.splits
