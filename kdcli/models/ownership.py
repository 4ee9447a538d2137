"""Does transformers run this checkpoint as its owner does? Told from names and shapes, without reading a weight.

transformers drops tensors that it has no place for, starts weights that are missing at random, and fits two outputs
where a configuration names none. Each of these changes the answers, and none is an error there; here they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdcli import tasks
from kdcli.errors import InputError, first_line
from kdcli.input_names import SEGMENTS
from kdcli.models import foreign
from kdcli.models.foreign import CheckpointFiles
from kdcli.models.safety import show
from kdcli.report.schema import Warning_
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task

# Tensors that no sequence classifier of transformers reads, so that leaving them out changes no answer. Everything
# else that has no place is refused.
_UNREAD = (
    # indices and counters that older versions stored: they are computed, or count batches of training
    rf"(^|\.)(position_ids|{SEGMENTS}|num_batches_tracked)$",
    r"\.attn\.masked_bias$",  # GPT-2's causal mask
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
    # heads of pretraining, which some fine-tunings keep in the file: masked words, next sentence, replaced words
    r"^cls\.(predictions|seq_relationship)\.",
    r"^(lm_head|lm_loss|pred_layer|lm_predictions|mask_predictions|mlm_head|generator_lm_head|generator_predictions)\.",
    r"^(discriminator_predictions|vocab_transform|vocab_layer_norm|vocab_projector)\.",
    r"^predictions\.",  # ALBERT's
    r"^sop_classifier\.",  # ALBERT's order of sentences
    r"^decoder\.(weight|bias)$",  # ModernBERT's, the projection to the vocabulary
    r"^final_logits_bias$",  # BART's
)
# RoBERTa and its relatives classify from the first token: transformers 2 stored a pooler that nothing reads. Where the
# classifier reads a pooler (BERT, ALBERT), it has a place for it. A class of the owner's own may read it.
_UNREAD_POOLER = (r"(^|\.)pooler\.dense\.(weight|bias)$",)
# Heads of another task: without a head for classification, what is taken is the encoder below them.
_UNREAD_OF_ENCODER = (r"^qa_outputs\.",)
_WRAPPERS = {
    "module.": "DistributedDataParallel or DataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "model.": "a module around the model",
}
_TUNED = (
    (re.compile(r"\.lora_|\.base_layer\.|\.ia3_"), "PEFT", "merge_and_unload()"),
    (re.compile(r"(^|\.)(prefix_encoder|prompt_encoder|prompt_embeddings)\."), "prompt tuning", "none"),
    (re.compile(r"(^|\.)adapters?\."), "an adapter library", "its merge"),
)


@dataclass(frozen=True)
class Verdict:
    """What a checkpoint of plain transformers is, once it has passed."""

    labels: list[str]  # in the order of the logits
    has_head: bool
    kwargs: dict[str, Any] = field(default_factory=dict)  # that give its configuration these labels
    task: Task = CLASSIFICATION  # of the head that it has, or that a new one is for
    warnings: list[Warning_] = field(default_factory=list)


def judge(
    path: Path, files: CheckpointFiles, labels: list[str] | None = None, task: Task = CLASSIFICATION
) -> Verdict:
    """Compare names and shapes in the weights with those of the classifier that transformers would build.

    Args:
        path: A directory that plain transformers wrote and :func:`kdcli.models.foreign.check` has passed.
        files: What that check returned.
        labels: Names for a new head; used only when the checkpoint has none.
        task: What a new head is for.

    Raises:
        InputError: A tensor has no place, is missing or has another shape, or the answer is not one of its labels.
    """
    own = foreign.labels_of(files.config, show(path / "config.json"))
    kwargs = _kwargs(own)
    model, info = _outline(path, files.config, kwargs)
    sized = _sized_by_labels(path, kwargs)
    has_head = not (sized and sized <= info["missing_keys"])
    if has_head and own is None and (rows := _rows(info, sized)) is not None:
        # No number of labels is given: the head says it. transformers takes two, which does not fit.
        own = [f"LABEL_{i}" for i in range(rows)]
        kwargs = _kwargs(own)
        model, info = _outline(path, files.config, kwargs)
    names = own
    if not has_head:
        names = labels or own
        kwargs = _kwargs(names)
    _refuse_wrapped(path, info)
    _refuse_missing(path, info, has_head, model.base_model_prefix)
    _refuse_misfits(path, info, sized, own, files.config)
    _refuse_unused(path, info, has_head, files.config)
    if names is None:
        names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    if not has_head:
        return Verdict(names, False, kwargs, task)
    foreign.check_task(files.config, len(names), show(path))
    known = tasks.recorded(foreign.with_outputs(files.config, len(names)), show(path / "config.json"))
    return Verdict(
        names,
        True,
        kwargs,
        known or CLASSIFICATION,
        _unknown_class(files.config, type(model).__name__),
    )


def load(path: Path, config_json: Mapping[str, Any], verdict: Verdict) -> Any:
    """The model itself, in float32 with attention that can be exported and counted."""
    model, _ = _from_pretrained(path, config_json, verdict.kwargs)
    if not verdict.has_head:
        model.config.problem_type = None  # of another head; the new one's task is written with it
    return settle(model)


def settle(model: Any) -> Any:
    """Undo settings that decide the form of the outputs or how they are computed, and not what they are."""
    config = model.config
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    # Pieces of the sequence through the feed-forward one after another: less memory, and no export.
    for one in (config, *model.modules()):
        if getattr(one, "chunk_size_feed_forward", 0):
            one.chunk_size_feed_forward = 0
    return model


def _kwargs(names: list[str] | None) -> dict[str, Any]:
    if names is None:
        return {}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _config(path: Path, kwargs: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True, **kwargs)


def _outline(
    path: Path, config_json: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model without numbers, and transformers' own account of what fits it."""
    return _from_pretrained(path, config_json, kwargs, device_map="meta", ignore_mismatched_sizes=True)


def _from_pretrained(
    path: Path, config_json: Mapping[str, Any], kwargs: Mapping[str, Any], **more: Any
) -> tuple[Any, dict[str, Any]]:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    kind = config_json.get("model_type")
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=_config(path, kwargs),
            attn_implementation="eager",
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **more,
        )
    except (
        *(ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError, ImportError),
        *(SafetensorError, StrictDataclassError),
    ) as error:
        reason = first_line(error)
        if isinstance(error, KeyError):  # whose words are the key alone
            reason = f"transformers knows nothing named {error}; see the names in its config.json, such as hidden_act"
        if "above report" in reason:  # it went to a log that nobody sees
            reason = "its weights cannot be brought into the form that this transformers uses"
        raise InputError(
            f"{show(path)} cannot be loaded as a text classifier (model_type {kind!r}): {reason}"
        ) from error
    return model, info


def _sized_by_labels(path: Path, kwargs: Mapping[str, Any]) -> set[str]:
    """Names of the tensors whose size follows the number of labels: the outputs of the head."""
    from transformers import AutoModelForSequenceClassification

    def shapes(labels: int) -> dict[str, torch.Size]:
        names = [f"LABEL_{i}" for i in range(labels)]
        with torch.device("meta"):
            config = _config(path, {**kwargs, **_kwargs(names)})
            config.problem_type = None
            model = AutoModelForSequenceClassification.from_config(
                config, attn_implementation="eager", trust_remote_code=False
            )
        return {name: tensor.shape for name, tensor in model.state_dict().items()}

    two, three = shapes(2), shapes(3)
    return {name for name, shape in two.items() if three.get(name) != shape}


def _rows(info: Mapping[str, Any], sized: set[str]) -> int | None:
    """How many outputs the head in the file has, when that alone does not fit."""
    found = {
        next(iter(stored)) for name, stored, _ in info["mismatched_keys"] if name in sized and len(stored)
    }
    fits = all(name in sized for name, _, _ in info["mismatched_keys"])
    return found.pop() if fits and len(found) == 1 else None


def _refuse_wrapped(path: Path, info: Mapping[str, Any]) -> None:
    unused, missing = set(info["unexpected_keys"]), set(info["missing_keys"])
    for prefix, maker in _WRAPPERS.items():
        stripped = {name.removeprefix(prefix) for name in unused if name.startswith(prefix)}
        if stripped and stripped & missing:
            raise InputError(
                f"the tensors in {show(path)} are named '{prefix}...', as {maker} names them, "
                f"so that '{sorted(stripped & missing)[0]}' is not found and transformers would start it at random",
                "save the inner model (model.module or model._orig_mod), or take the prefix off the names",
            )


def _refuse_missing(path: Path, info: Mapping[str, Any], has_head: bool, root: str) -> None:
    missing = sorted(info["missing_keys"])
    if not has_head:
        # A new head is trained with what leads to it; the encoder has to be there.
        missing = [n for n in missing if n.startswith(f"{root}.") and ".pooler." not in n]
    if not missing:
        return
    if has_head:
        raise InputError(
            f"{show(path)} has a classification head, but lacks {_listed(missing)}, which would be random",
            "save the whole model again; where its classifier is a class of your own, kdcli cannot run it",
        )
    raise InputError(f"{show(path)} lacks weights that its config.json promises, such as {_listed(missing)}")


def _refuse_misfits(
    path: Path,
    info: Mapping[str, Any],
    sized: set[str],
    labels: list[str] | None,
    config_json: Mapping[str, Any],
) -> None:
    for name, stored, wanted in sorted(info["mismatched_keys"], key=lambda entry: str(entry[0])):
        shapes = f"'{name}' in {show(path)} has the shape {list(stored)}, config.json asks for {list(wanted)}"
        if name in sized and labels is not None:
            raise InputError(
                f"config.json names {len(labels)} labels, but the head has {next(iter(stored)) if len(stored) else 0} "
                f"outputs: {shapes}",
                "put one name for every output into id2label, in their order",
            )
        if config_json.get("pruned_heads"):
            raise InputError(
                f"{shapes}: heads were cut out (pruned_heads), which transformers 5 cannot load",
                "give the model from before and let kdcli prune it",
            )
        raise InputError(
            f"{shapes}: another tool has cut it, or config.json belongs to another model",
            "correct config.json, or give the model from before the cut and let kdcli prune it",
        )


def _refuse_unused(
    path: Path, info: Mapping[str, Any], has_head: bool, config_json: Mapping[str, Any]
) -> None:
    plain = not has_head or not _unknown_class(config_json, "")
    names = (*_UNREAD, *(_UNREAD_POOLER if plain else ()), *(() if has_head else _UNREAD_OF_ENCODER))
    harmless = "|".join(names)
    unused = sorted(name for name in info["unexpected_keys"] if not re.search(harmless, name))
    if not unused:
        return
    for pattern, maker, how in _TUNED:
        if found := [name for name in unused if pattern.search(name)]:
            hint = (
                "give a model that was fine-tuned without it"
                if how == "none"
                else f"merge them first ({how})"
            )
            raise InputError(
                f"{show(path)} holds weights of {maker} that the model has no place for: {_listed(found)}",
                hint,
            )
    raise InputError(
        f"{show(path)} holds weights that a plain classifier of its config.json has no place for: {_listed(unused)}",
        "without them it would give other answers than its owner gets: if it is a class of your own, kdcli cannot "
        "run it; if they are left over, save the model again without them",
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - 3
    return ", ".join(f"'{show(n)[:80]}'" for n in names[:3]) + (f" and {rest} more" if rest > 0 else "")


def _unknown_class(config_json: Mapping[str, Any], used: str) -> list[Warning_]:
    """A warning where the owner's class is none of transformers': its weights fit, its ``forward`` is unknown."""
    import transformers

    own = [name for name in foreign.architectures(config_json) if not hasattr(transformers, name)]
    if not own:
        return []
    message = (
        f"the model was saved as {show(own[0])[:60]}, which transformers does not have: it was run as {used}"
    )
    return [Warning_(code="unknown-class", message=message)]
