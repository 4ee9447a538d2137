"""A model on disk: load it whatever wrote it, save it so that anybody can load it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcli import cache, families, memory, tasks
from kdcli.errors import InputError
from kdcli.families.family import Encoder
from kdcli.models import activations, compressed, foreign, inputs, mapped, ownership, tokenizers, transforms
from kdcli.models.integers import Integers
from kdcli.models.transforms import Quantise, TransformLog
from kdcli.report.schema import Warning_
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task

WEIGHTS = "model.safetensors"
_DECIDING = (".json", ".txt", ".model", ".jinja", ".safetensors")
_TELLING = ("report.json", cache.SUMS)  # files that tell of a model and decide nothing


@dataclass
class Checkpoint:
    """A classification model with everything needed to run it and to write it again."""

    model: nn.Module  # float32, eval mode
    tokenizer: Any  # a fast tokenizer of transformers
    labels: list[str]  # in the order of the logits
    log: TransformLog
    path: Path  # where it was loaded from
    has_head: bool = True  # False: the classification head is newly initialised
    by_kdcli: bool = False
    doubts: list[Warning_] = field(default_factory=list)  # what a report on it should say
    notes: list[str] = field(default_factory=list)
    placed: torch.device | None = None  # where inputs go when the weights are spread over several places
    task: Task = CLASSIFICATION
    pads_left: bool = False  # only where padding on the right would change the answers

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def family(self) -> Encoder:
        """The family, for surgery.

        Raises:
            InputError: kdcli cannot operate on this architecture.
        """
        return families.of(self.model_type)

    @property
    def max_length(self) -> int:
        """Longest input in tokens, special tokens included."""
        return inputs.longest(self.model, self.tokenizer)

    @property
    def pad_id(self) -> int:
        """Id of the padding; its attribute ``left`` is true where it goes to the left of a text."""
        return inputs.padding(self.model, self.tokenizer, left=self.pads_left)

    @property
    def device(self) -> torch.device:
        return self.placed or next(self.model.parameters()).device


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the chatter of transformers (progress bars, init notices) off the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load(
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    task: Task = CLASSIFICATION,
    device: str | torch.device = "cpu",
    in_file: bool = False,
) -> Checkpoint:
    """Load a sequence-classification checkpoint, whether kdcli or plain transformers wrote it.

    Args:
        path: A directory with config.json, safetensors weights and a tokenizer.
        labels: Label names for a new head; used only when the checkpoint has none.
        task: What a new head is for; used only when the checkpoint has none.
        device: Where the model goes.
        in_file: Keep the weights of a large model of kdcli's in a file, for one that will not be trained.

    Returns:
        The model in float32 and eval mode. ``has_head`` is False when its classifier is new.

    Raises:
        InputError: The directory is broken, unsafe, or not a text classifier.
    """
    files = foreign.check(path)
    log = transforms.read_log(path)
    doubts: list[Warning_] = []
    _register_own()
    with quiet():
        if log is not None:
            model, has_head = _load_own(path, log, in_file), True
            known = tasks.recorded(files.config, foreign.show(path / "config.json")) or CLASSIFICATION
        else:
            verdict = ownership.judge(path, files, None if labels is None else list(labels), task)
            known = verdict.task
            model, has_head = ownership.load(path, files.config, verdict), verdict.has_head
            doubts = verdict.warnings
        tokenizer = tokenizers.load(path, by_kdcli=log is not None)
    inputs.check_padding(model, path)
    vocabulary = getattr(model.config, "vocab_size", None)
    if vocabulary is not None:
        tokenizers.check_size(tokenizer, vocabulary, path)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"weight '{name}' in {path} holds NaN or infinity")
    config: Any = model.config
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if not has_head and labels is not None:
        names = list(labels)
    model.eval().to(device)
    if log is not None and log.quantised is not None:
        activations.attach(model, log.quantised)
    return Checkpoint(
        model,
        tokenizer,
        names,
        log or TransformLog(),
        path,
        has_head,
        log is not None,
        doubts,
        pads_left=inputs.must_pad_left(model, tokenizer),
        task=known,
    )


def fresh(config: Any) -> nn.Module:
    """Build an untrained classifier from a configuration, with attention that can be exported and counted."""
    from transformers import AutoModelForSequenceClassification

    _register_own()
    with quiet():
        try:
            return AutoModelForSequenceClassification.from_config(
                config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
            )
        except ValueError as error:
            raise InputError(
                f"models of type '{config.model_type}' have no sequence-classification form"
            ) from error


def _register_own() -> None:
    """Teach transformers kdcli's own architectures; not at the top, because their modules import transformers."""
    with memory.loading():
        import kdcli.models.ensemble
        import kdcli.models.small  # noqa: F401


def _load_own(path: Path, log: TransformLog, in_file: bool) -> nn.Module:
    """Rebuild: configuration, then the log, then strict weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = ownership.settle(fresh(config))
    transforms.replay(model, log)
    try:
        state = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path / WEIGHTS} cannot be read: {error}") from error
    try:
        with torch.no_grad():
            if in_file or log.quantised is not None:
                mapped.parameters(model)
            _fill(model, state, log)
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(f"{path / WEIGHTS} does not fit config.json and kdcli.json: {problem}") from error
    return model


def _fill(model: nn.Module, state: dict[str, Tensor], log: TransformLog) -> None:
    """Load a state strictly. Integers are multiplied out into their places one by one: no second model is made.

    Raises:
        RuntimeError: Names or shapes do not fit.
        InputError: A tensor that the log names is missing or is not an integer one.
    """
    own = dict(model.named_parameters())
    for layout in [] if log.quantised is None else compressed.layouts_of(log.quantised):
        for name in layout.tensors:
            dense = compressed.dequantise(state, name, layout)
            if name not in own or own[name].shape != dense.shape:
                raise RuntimeError(f"there is no weight '{name}' of shape {tuple(dense.shape)} in the model")
            own[name].copy_(dense)
            state[name] = own[name].detach()
    for name, kept in transforms.shared_weights(log).items():
        if kept in state:
            state[name] = state[kept]
    for name, tensor in state.items():
        if name in own and not tensor.is_floating_point():
            raise RuntimeError(
                f"'{name}' holds {str(tensor.dtype).removeprefix('torch.')}, and the log has no scale"
            )
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def save(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    integers: Mapping[str, Integers] | None = None,
    half: Collection[str] = (),
) -> None:
    """Write config.json, model.safetensors, the tokenizer and kdcli.json into an existing directory.

    Args:
        checkpoint: What to write; its configuration gets the label names and, where possible, the sizes.
        directory: Where; files of the same name are replaced.
        integers: Quantised weights; they are stored in place of the float weight of that name, packed when
            they have less than 8 bits, with their scales beside them.
        half: Names of weights to store as float16.
    """
    model, config = checkpoint.model, checkpoint.config
    if not integers:
        # Weights that were multiplied out on loading are dense from here on.
        checkpoint.log.transforms = [t for t in checkpoint.log.transforms if not isinstance(t, Quantise)]
    transforms.settle_in_config(model, checkpoint.log)
    _record_task(config, checkpoint.task)
    config.id2label = dict(enumerate(checkpoint.labels))
    config.label2id = {name: i for i, name in enumerate(checkpoint.labels)}
    config.architectures = [type(model).__name__]
    config.dtype = "float16" if half else "float32"
    state = {}
    shared = transforms.shared_weights(checkpoint.log)
    for name, tensor in model.state_dict().items():
        if name not in (integers or {}) and name not in shared:
            tensor = tensor.half() if name in half else tensor
            state[name] = tensor.detach().cpu().contiguous()
    for name, matrix in (integers or {}).items():
        state |= compressed.stored(name, matrix.cpu())
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)  # safetensors goes through a private temporary file
    config_json = json.loads(config.to_json_string(use_diff=False))
    config_json.pop("_name_or_path", None)
    if integers:
        config_json["quantization_config"] = compressed.configuration(model, checkpoint.log)
    _write_json(directory / "config.json", config_json)
    side = None
    if (
        checkpoint.tokenizer.padding_side == "left"
        and not checkpoint.pads_left
        and inputs.padding_difference(model, checkpoint.tokenizer, left=True) > inputs.NOISE
    ):
        side = "right"  # a student of a teacher that is padded on the left is not
    with quiet():
        tokenizers.save(
            checkpoint.tokenizer,
            checkpoint.path,
            directory,
            max_length=checkpoint.max_length,
            padding_side=side,
        )
    transforms.write_log(checkpoint.log, directory)


def _record_task(config: Any, task: Task) -> None:
    """Let config.json say what the answers are, and nothing that an earlier task left there."""
    fields = task.config_fields()
    for key in tasks.KEYS - fields.keys():
        if hasattr(config, key):
            delattr(config, key)
    for key, value in fields.items():
        setattr(config, key, value)


def rewrite_task(checkpoint: Checkpoint, directory: Path) -> None:
    """Write the task of a checkpoint again to where it was saved, because rows have decided something of it."""
    path = directory / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    fields = checkpoint.task.config_fields()
    _record_task(checkpoint.config, checkpoint.task)
    _write_json(path, {k: v for k, v in content.items() if k not in tasks.KEYS} | fields)


def weights_digest(path: Path) -> str:
    """sha256 over what decides a checkpoint's answers: configuration, log, weights, and any tokenizer's files.

    Computed once for the files as they are: their sizes and times of change are looked at, not their content.
    """
    deciding = [
        file
        for file in sorted(path.iterdir())
        if file.suffix in _DECIDING and file.name not in _TELLING and file.is_file()
    ]
    stats = [(file, file.stat()) for file in deciding]
    return _digest(tuple((file, s.st_size, s.st_mtime_ns, s.st_ino) for file, s in stats))


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, *_ in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(
        json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
    )
