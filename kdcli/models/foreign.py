"""What other tools leave in a model directory, told from the files alone, before torch is imported.

A directory is refused here where running it as an ordinary float classifier would give other answers than its
owner gets: quantised weights, a head for something else, a setting that transformers has dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdcli import tasks
from kdcli.errors import InputError
from kdcli.input_names import SEGMENTS
from kdcli.models import safety
from kdcli.models.safety import CheckpointFiles, show

TRANSFORM_LOG = "kdcli.json"
_SHOWN = 4

# quant_method of config.json -> what people call the tool.
_TOOLS = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "fbgemm_fp8": "FBGEMM (fp8)",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
}
# Files that only such a tool writes beside the weights.
_TOOL_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "quantization_map.json": "optimum-quanto",
    "quanto_qmap.json": "optimum-quanto",
    "inc_config.json": "Intel Neural Compressor",
    "hf_quant_config.json": "NVIDIA ModelOpt",
}
# Tensors that only such a tool stores, by the end of their name; the first that fits counts.
_TOOL_TENSORS = (
    (re.compile(r"\.(SCB|weight_format|absmax|quant_map|nested_absmax|quant_state\..*)$"), "bitsandbytes"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(weight_packed|weight_zero_point|weight_shape)$"), "compressed-tensors (llm-compressor)"),
    (re.compile(r"\.(weight|input|output)(\._data|\._scale|\._shift)$"), "optimum-quanto"),
    (re.compile(r"\.(weight_scale|weight_scale_inv|input_scale|output_scale)$"), "a tool that stores scales"),
    (re.compile(r"(_fake_quant|fake_quant_\w+|activation_post_process|weight_fake_quant)(\.|$)"), "torch.ao"),
)
_INTEGERS = re.compile(r"[IU](8|16|32|64)|BOOL|F8_.*|F6_.*|F4|C64")
# Integers that no weight is made of: indices and counts that layers keep in buffers, GPT-2's causal mask.
_COUNTERS = re.compile(
    rf"(^|\.)(position_ids|{SEGMENTS}|num_batches_tracked|relative_position_index|attn\.(masked_)?bias)$"
)

# Architectures whose position_embedding_type transformers 4 read and transformers 5 ignores: it knows absolute ones.
_NO_RELATIVE_POSITIONS = frozenset(
    {
        "albert",
        "bert",
        "bert-generation",
        "camembert",
        "convbert",
        "data2vec-text",
        "electra",
        "ernie",
        "ibert",
    }
    | {"layoutlm", "lilt", "markuplm", "megatron-bert", "mra", "nezha", "nystromformer", "qdqbert", "rembert"}
    | {"roberta", "roberta-prelayernorm", "splinter", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso"}
)
_OTHER_TASKS = {
    "ForTokenClassification": "tags single words",
    "ForQuestionAnswering": "marks answers in a text",
    "ForMultipleChoice": "chooses between texts",
    "ForNextSentencePrediction": "judges whether one sentence follows another",
}
_HEAD = re.compile(r"^(classifier|score|pre_classifier|classification_head|logits_proj|sequence_summary)\.")
_GENERIC = re.compile(r"LABEL_\d+")


def check(directory: Path) -> CheckpointFiles:
    """Check a checkpoint directory: first what is unsafe, then what another tool did to it.

    Raises:
        InputError: The first thing for which kdcli would not run this model as its owner does.
    """
    _only_for_others(directory)
    files = safety.check_checkpoint(directory)
    names = labels_of(files.config, show(directory / "config.json"))
    headers: dict[str, Any] = {}
    for path in files.weights:
        headers |= safety.read_header(path)
    if not (directory / TRANSFORM_LOG).is_file():
        _quantised(directory, files.config, headers)
        _settings(files.config, show(directory / "config.json"))
    if any(_HEAD.match(name) for name in headers):
        check_task(files.config, None if names is None else len(names), show(directory))
    return files


def task_of(directory: Path) -> str | None:
    """Name of the task of a checkpoint that :func:`check` has passed; None where it has no head.

    A graph without weights has the task that its configuration says.
    """
    files = safety.check_checkpoint(directory, weights=False)
    names = labels_of(files.config, show(directory / "config.json"))
    stored = [name for path in files.weights for name in safety.read_header(path)]
    if stored and not any(_HEAD.match(name) for name in stored):
        return None
    return check_task(files.config, None if names is None else len(names), show(directory))


def labels_of(config: Mapping[str, Any], where: str) -> list[str] | None:
    """Label names in the order of the logits; None where a configuration says nothing of them.

    ``id2label`` counts, and ``label2id`` where there is no other or only ``LABEL_0``, ``LABEL_1`` and so on; a
    number of labels alone gives such generic names.

    Raises:
        InputError: The two contradict each other, or the numbers of labels do.
    """
    by_id, by_name = config.get("id2label") or {}, config.get("label2id") or {}
    number = config.get("num_labels")
    if not isinstance(by_name, dict):
        raise InputError(f"label2id in {where} is not a table of numbers")
    names = [str(by_id[key]) for key in sorted(by_id, key=int)]
    inverse = _inverse(by_name, where)
    generic = all(_GENERIC.fullmatch(name) for names_ in inverse.values() for name in names_)
    if names and inverse and not generic and not all(_GENERIC.fullmatch(name) for name in names):
        _agree(names, inverse, where)
    if not names and inverse:
        if sorted(inverse) != list(range(len(inverse))) or any(len(same) > 1 for same in inverse.values()):
            raise InputError(
                f"label2id in {where} must give every label another number, from 0 to {len(by_name) - 1}",
                "or give id2label, in the order of the model's outputs",
            )
        names = [inverse[index][0] for index in sorted(inverse)]
    if number is not None and names and number != len(names):
        raise InputError(f"{where} says num_labels {number}, but names {len(names)} labels")
    if not names and number is not None:
        names = [f"LABEL_{index}" for index in range(number)]
    return names or None


def _inverse(by_name: Mapping[str, Any], where: str) -> dict[int, list[str]]:
    inverse: dict[int, list[str]] = {}
    for name, index in by_name.items():
        if isinstance(index, bool) or not re.fullmatch(r"\d{1,7}", str(index)):
            raise InputError(
                f"label2id in {where} gives label {str(name)[:60]!r} the number {str(index)[:30]!r}"
            )
        inverse.setdefault(int(index), []).append(str(name))
    return inverse


def _agree(names: list[str], inverse: Mapping[int, list[str]], where: str) -> None:
    given = {name.casefold(): index for index, same in inverse.items() for name in same}
    for index, name in enumerate(names):
        if (other := given.get(name.casefold())) != index:
            says = "does not have it" if other is None else f"gives it the number {other}"
            raise InputError(
                f"id2label and label2id in {where} contradict each other: "
                f"id2label has {name[:60]!r} at {index}, label2id {says}",
                "find out which of them the training used, and delete the other one",
            )


def check_task(config: Mapping[str, Any], labels: int | None, where: str) -> str | None:
    """The task of a model that has a head; None where its configuration says nothing of one.

    Args:
        config: Its config.json.
        labels: How many outputs it has; None where that is not known yet.
        where: Its directory, for the message.

    Raises:
        InputError: Its configuration contradicts itself, or the model is for something else.
    """
    names = architectures(config)
    for name in [] if any(name.endswith("ForSequenceClassification") for name in names) else names:
        for ending, does in _OTHER_TASKS.items():
            if name.endswith(ending):
                raise InputError(
                    f"{where} was saved as {name[:60]}, which {does}; "
                    f"kdcli knows these tasks: {', '.join(tasks.names())}",
                    "give a model that was trained for one of them",
                )
    return tasks.of_config(with_outputs(config, labels), where)


def with_outputs(config: Mapping[str, Any], labels: int | None) -> Mapping[str, Any]:
    """A configuration with the number of outputs that is known from elsewhere, where it names none itself."""
    if labels is None or config.get("id2label") or config.get("label2id"):
        return config
    return {**config, "num_labels": labels}


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The class names of ``architectures``, whatever form it has."""
    given = config.get("architectures") or []
    return [str(name) for name in (given if isinstance(given, list) else [given]) if name]


def _only_for_others(directory: Path) -> None:
    """Say what a directory is that another library made and that has no classifier of transformers in it."""
    if not directory.is_dir():
        return
    if (directory / "model_head.pkl").exists():
        raise InputError(
            f"{show(directory)} is a SetFit model: its classifier is model_head.pkl, a pickle, which kdcli never loads",
            "to start from its encoder alone, copy the directory without that file and give it to "
            "distill as --teacher: it is fine-tuned on your labels",
        )
    for name in sorted(p.name for p in directory.glob("adapter_model*.safetensors")):
        if (directory / "config.json").exists() and not (directory / "adapter_config.json").exists():
            raise InputError(
                f"{show(directory)} holds an adapter beside its weights ({show(name)})",
                "merge it into the model (merge_and_unload of PEFT) and save that, or remove the file",
            )
    if (
        (directory / "config.json").exists()
        and not any(
            path.suffix in (".safetensors", ".bin", ".h5", ".msgpack") for path in directory.iterdir()
        )
        and (graphs := sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.onnx")))
    ):
        raise InputError(
            f"{show(directory)} has an ONNX graph ({show(graphs[0])}), but no weights: model.safetensors is missing",
            "give the directory of the model that it was exported from",
        )


def _quantised(directory: Path, config: Mapping[str, Any], headers: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse weights that another tool has quantised.

    transformers would read such integers as if they were the weights themselves, or load the library that made
    them and run it in place of torch's own layers.
    """
    where = show(directory)
    stated: Any = config.get("quantization_config") or config.get("compression_config")
    tool, sign = None, ""
    if stated:
        method = str(stated.get("quant_method") or "") if isinstance(stated, dict) else ""
        if not method and isinstance(stated, dict) and (stated.keys() & {"load_in_8bit", "load_in_4bit"}):
            method = "bitsandbytes"
        tool, sign = (
            _TOOLS.get(method, method[:60] or "another tool"),
            "config.json has a quantization_config",
        )
    elif isinstance(config.get("quantization"), dict):
        tool, sign = "MLX", "config.json has a table 'quantization'"
    else:
        for name, maker in _TOOL_FILES.items():
            if (directory / name).exists():
                tool, sign = maker, f"it has the file {name}"
        for pattern, maker in _TOOL_TENSORS:
            found = next((name for name in headers if pattern.search(name)), None)
            if tool is None and found is not None:
                tool, sign = maker, f"it has the tensor {found!r}"
    if tool is None:
        for name, entry in headers.items():
            if _INTEGERS.fullmatch(entry["dtype"]) and not _COUNTERS.search(name):
                tool, sign = "another tool", f"the tensor {name!r} is stored as {entry['dtype']}"
                break
    if tool is not None:
        raise InputError(
            f"{where} is already quantised by {tool}: {sign}; kdcli starts from float weights",
            "give the float model that it was made from"
            + (
                "; if its weights are float, remove that table from config.json"
                if "config.json" in sign
                else ""
            ),
        )


def _settings(config: Mapping[str, Any], where: str) -> None:
    """Refuse settings that decide the answers and that this transformers ignores."""
    kind = config.get("position_embedding_type")
    if kind not in (None, "absolute") and config.get("model_type") in _NO_RELATIVE_POSITIONS:
        raise InputError(
            f"{where} asks for position_embedding_type {str(kind)[:60]!r}, which the installed transformers ignores: "
            f"the model would give other answers than it was trained for",
            "only 'absolute' is supported; give a model that was trained with absolute positions",
        )
    length = config.get("pre_seq_len")
    if length:
        raise InputError(
            f"{where} asks for a trained prefix (pre_seq_len {str(length)[:30]}), which transformers ignores",
            "give a model that was fine-tuned without a prefix",
        )
    adapters = config.get("adapters")
    if isinstance(adapters, dict) and adapters.get("adapters"):
        raise InputError(
            f"{where} names adapters ({_some(adapters['adapters'])}), which transformers ignores",
            "merge them into the model and save that",
        )


def _some(names: Iterable[str]) -> str:
    listed = [show(str(name))[:60] for name in names]
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
