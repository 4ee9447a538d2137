"""One field, five ways in: flag, variable, kdcli.toml, recipe and Python spell it, and all refuse the same values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli import api
from kdcli.cli.command import build, flag_of, variable_of
from kdcli.errors import KdcliError
from kdcli.options import Declared, OptionError, Options, declared
from kdcli.request import STAGES, Common, Gates, OneModel, Request, StageName
from kdcli.run import recipe
from kdcli.stages import options
from tests.cli.conftest import Call
from tests.cli.fakes import Recorder

NEEDED: dict[str, dict[str, Any]] = {
    "distill": {"teacher": "model", "student": "tiny"},
    "evaluate": {"models": "model"},
}
ONE: StageName = "prune"


def fields_of(stage: StageName) -> dict[str, Declared]:
    """Every option of a stage, taken from the models themselves."""
    own = options.OPTIONS[stage]
    parts: list[type[Options]] = [own, Gates, Common, *([OneModel] if own.takes_model else [])]
    every = {field: one for part in parts for field, one in declared(part).items()}
    return {field: one for field, one in every.items() if field not in own.without}


def example(one: Declared) -> Any:
    """A value that the option takes and that is not its default, as a recipe or Python has it."""
    given: dict[str, Any] = {
        "gate": ["accuracy>=0.9"],
        "set": {"samples": 4},
        "weight": {"rkd": 0.5},
        "max-size": "20MiB",
        "device": "cpu",
        "layer-map": "uniform",
        "student": "3x192",
        "structure": "heads",
        "target-speedup": 2.0,
        "rank": 8,
        "batch-size": 8,
        "seed": 3,
    }
    if one.name in given:
        return given[one.name]
    if one.flag.names is not None:
        return list(one.flag.names())[-1]
    kind = str(one.info.annotation)
    return True if one.kind == "flag" else 1 if "int" in kind else 0.5 if "float" in kind else "some/thing"


def typed(value: Any) -> list[str]:
    """The value as it is typed, once for each time that the flag is given."""
    if isinstance(value, dict):
        return [f"{key}={each}" for key, each in value.items()]
    return [str(each) for each in (value if isinstance(value, list) else [value])]


def by_flag(call: Call, stage: str, one: Declared, value: Any) -> Any:
    if one.kind == "flag":
        return call(stage, *needed(stage, one), f"--{one.name}")
    words = [word for each in typed(value) for word in (f"--{one.name}", each)]
    return call(stage, *needed(stage, one), *words, *with_it(one))


def needed(stage: str, one: Declared) -> list[str]:
    """The words without which the stage does not run, but for the option itself."""
    found = NEEDED.get(stage, {"model": "model"})
    return [
        word
        for name, value in found.items()
        if name != one.argument
        for word in ([value] if name in ("model", "models") else [f"--{name}", value])
    ]


def with_it(one: Declared) -> list[str]:
    """What else has to be said for the option to mean something."""
    return (
        ["--epochs", "1"]
        if one.name in ("lr", "batch-size") and one.info.description != "Batch sizes to time."
        else []
    )


def read(request: Request, field: str) -> Any:
    """The value of a field, wherever in the request it is."""
    for part in (request.options, request.common, request.common.gates):
        if field in type(part).model_fields:
            return dict(part)[field]
    return request.model


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_is_a_flag_a_variable_a_key_and_an_argument(stage: StageName) -> None:
    params = {param.name: param for param in build(stage).params}
    every = fields_of(stage)
    assert set(options.of_stage(stage)) == set(every)
    for field, one in every.items():
        param = params[field]
        assert param.help == one.help != ""
        if not one.flag.argument:
            assert (flag_of(param), param.envvar) == (one.name, variable_of(one.name))
    made = api.request_of(stage, NEEDED.get(stage, {"model": "model"}))
    assert set(made.configuration()) == set(every) - {"model"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_field_has_the_same_value_on_every_way(
    stage: StageName, call: Call, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for field, one in fields_of(stage).items():
        if one.flag.argument:
            continue
        value = example(one)
        asked = NEEDED.get(stage, {"model": "model"}) | {one.argument: value}
        if with_it(one) and stage != "distill":
            asked["epochs"] = 1
        python = api.request_of(stage, asked)
        wanted, default = (
            read(python, field),
            one.info.get_default(call_default_factory=True, validated_data={}),
        )
        assert one.info.is_required() or wanted != default, field
        assert python.configuration()[field]["origin"] == "argument"

        assert (done := by_flag(call, stage, one, value)).code == 0, done.err
        assert read(recorder.requests[-1], field) == wanted, field
        assert recorder.requests[-1].configuration()[field] == python.configuration()[field] | {
            "origin": "flag"
        }

        Path("kdcli.toml").write_text(f"[{stage}]\n{one.name} = {toml(value)}\n")
        assert (done := call(stage, *needed(stage, one), *with_it(one))).code == 0, done.err
        assert read(recorder.requests[-1], field) == wanted, field
        assert recorder.requests[-1].origins[field] == "file"
        Path("kdcli.toml").unlink()

        with monkeypatch.context() as variables:
            variables.setenv(variable_of(one.name), " ".join(typed(value)))
            assert (done := call(stage, *needed(stage, one), *with_it(one))).code == 0, done.err
        assert read(recorder.requests[-1], field) == wanted, field
        assert recorder.requests[-1].origins[field] == "environment"

        if one.flag.recipe:
            asked = {key: each for key, each in asked.items() if key not in ("model", "models")}
            step = steps({stage: {key.replace("_", "-"): each for key, each in asked.items()}})[0]
            assert read(step, field) == wanted, field
            assert step.configuration()[field]["origin"] == "recipe"


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


def steps(*stages: Any, **shared: Any) -> list[Request]:
    first = next(iter(stages[0])) if isinstance(stages[0], dict) else stages[0]
    model = {} if first == "distill" else {"model": "model"}
    Path("recipe.yaml").write_text(yaml.safe_dump({"stages": list(stages), **model, **shared}))
    return recipe.read(Path("recipe.yaml"), ("kdcli", "run", "recipe.yaml", "-o", "x"))


WRONG: list[tuple[str, Any, str]] = [
    ("epochs", -1, "'-1' must be at least 0"),
    ("epochs", 1.5, "'1.5' is not a whole number"),
    ("epochs", "many", "'many' is not a whole number"),
    ("lr", -1, "'-1' must be above 0"),
    ("lr", float("inf"), "'inf' must be above 0"),
    ("batch-size", 0, "'0' must be at least 1"),
    ("sparsity", 1, "'1' must be at least 0 and below 1"),
    ("sparsity", "half", "'half' is not a number"),
    ("seed", -1, "'-1' must be at least 0 and at most 4294967295"),
    ("limit", 0, "'0' must be at least 1"),
    ("device", "evil", "unknown device 'evil': choose one of: auto, cpu, cuda, mps, or cuda:N"),
    ("max-drop", float("nan"), "'nan' must be at least 0"),
    ("max-drop", float("inf"), "'inf' must be at least 0"),
    ("min-speedup", -1, "'-1' must be at least 0"),
    ("max-size", "20 stones", "'20 stones' is not a size; write it like 20MiB, 1.5GB or 4096"),
    ("gate", "accuracy=good", "'accuracy=good' is not a gate"),
    ("structure", "head", "unknown structure 'head': did you mean 'heads'?"),
    ("structure", "heads+heads", "structure 'heads+heads' names heads twice"),
    ("method", "tailor", "unknown prune method 'tailor': did you mean 'taylor'?"),
    ("task", "regresion", "unknown task 'regresion': did you mean 'regression'?"),
]


def _flag(call: Call, key: str, value: Any, _: pytest.MonkeyPatch) -> tuple[int, str]:
    done = call(ONE, "model", f"--{key}", str(value))
    return done.code, done.err


def _variable(call: Call, key: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setenv(variable_of(key), str(value))
    # Of the environment alone they would be left out, without a training that they are for.
    done = call(ONE, "model", *(["--epochs", "1"] if key in ("lr", "batch-size") else []))
    return done.code, done.err


def _file(call: Call, key: str, value: Any, _: pytest.MonkeyPatch) -> tuple[int, str]:
    text = str(value) if isinstance(value, float) else json.dumps(value)
    Path("kdcli.toml").write_text(f"[{ONE}]\n{key} = {text}\n")
    done = call(ONE, "model", *(["--epochs", "1"] if key in ("lr", "batch-size") else []))
    return done.code, done.err


def _recipe(call: Call, key: str, value: Any, _: pytest.MonkeyPatch) -> tuple[int, str]:
    with pytest.raises(KdcliError) as error:
        steps("quantize", {ONE: {key: value}})
    return int(error.value.exit_code), str(error.value)


def _python(call: Call, key: str, value: Any, _: pytest.MonkeyPatch) -> tuple[int, str]:
    with pytest.raises(KdcliError) as error:
        api.FUNCTIONS[ONE]("model", **{key.replace("-", "_"): value})
    return int(error.value.exit_code), str(error.value)


WAYS: dict[str, tuple[Callable[..., tuple[int, str]], int, Callable[[str], str]]] = {
    "flag": (_flag, 2, lambda key: f"--{key}: "),
    "environment": (_variable, 2, lambda key: f"{variable_of(key)}: "),
    "file": (_file, 3, lambda key: f"settings file: {key}: "),
    "recipe": (_recipe, 3, lambda key: f"recipe 'recipe.yaml', stage 2: {key}: "),
    "python": (_python, 2, lambda key: f"kdcli.prune(): {key.replace('-', '_')}: "),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_refuses_the_same_values_in_its_own_words(
    way: str, call: Call, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse, code, spelt = WAYS[way]
    for key, value, words in WRONG:
        with monkeypatch.context() as own:
            found = refuse(call, key, value, own)
        assert found[0] == code, found[1]
        assert spelt(key) + words in found[1]
    assert recorder.requests == []


def test_no_model_can_be_made_of_a_wrong_value() -> None:
    for key, value, words in WRONG:
        one = next(one for one in fields_of(ONE).values() if one.name == key)
        parts: tuple[type[Options], ...] = (options.OPTIONS[ONE], Gates, Common)
        part = next(part for part in parts if one.field in part.model_fields)
        with pytest.raises(OptionError) as error:
            part(**{one.field: value})
        assert str(error.value).startswith(f"{one.field}: {words}")


def test_what_excludes_or_needs_another_is_said_in_the_words_of_the_way(
    call: Call, recorder: Recorder
) -> None:
    done = call("prune", "model", "--sparsity", "0.5", "--budget", "0.5")
    assert (done.code, "--sparsity and --budget exclude each other" in done.err) == (2, True)
    done = call("prune", "model", "--lr", "1e-4")
    assert (done.code, "--lr has no effect without --epochs; give both" in done.err) == (2, True)
    for given, words in (
        ({"sparsity": 0.5, "target-speedup": 2}, "sparsity and target-speedup exclude each other"),
        ({"batch-size": 8}, "batch-size has no effect without epochs"),
    ):
        with pytest.raises(KdcliError, match=f"^recipe 'recipe.yaml', stage 1: {words}"):
            steps({"prune": given})
    with pytest.raises(KdcliError, match=r"kdcli\.lowrank\(\): batch_size has no effect without epochs"):
        api.FUNCTIONS["lowrank"]("model", batch_size=8)
    assert recorder.requests == []


def test_a_default_of_the_file_that_has_no_effect_is_left_out(
    call: Call, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("kdcli.toml").write_text("[prune]\nlr = 0.001\n")
    monkeypatch.setenv("KDCLI_BATCH_SIZE", "8")
    assert call("prune", "model").code == 0
    assert call("prune", "model", "--epochs", "2").code == 0
    assert [read(one, "lr") for one in recorder.requests] == [None, 0.001]
    assert [read(one, "batch_size") for one in recorder.requests] == [None, 8]


def test_evaluate_has_no_method_to_set_anything_of(call: Call, recorder: Recorder) -> None:
    for words in (["--set", "nonsense=1"], ["--resume"]):
        done = call("evaluate", "model", *words)
        assert done.code == 2
        assert f"no option {words[0]}" in done.err
    with pytest.raises(KdcliError, match="unknown option 'set' of evaluate"):
        steps({"evaluate": {"set": {"a": 1}}})
    Path("kdcli.toml").write_text("resume = true\n")  # for the stages that can
    assert call("evaluate", "model").code == 0


def test_a_recipe_tells_its_command_and_what_it_said() -> None:
    found = steps({"prune": {"sparsity": 0.3, "dequantize": "no"}}, "quantize", seed=5)
    assert [step.argv for step in found] == [("kdcli", "run", "recipe.yaml", "-o", "x")] * 2
    first, second = (step.configuration() for step in found)
    assert first["sparsity"] == {"value": 0.3, "origin": "recipe"}
    assert first["dequantize"] == {"value": False, "origin": "recipe"}
    assert first["structure"]["origin"] == second["scheme"]["origin"] == "default"
    assert second["seed"] == {"value": 5, "origin": "recipe"}
    assert (found[0].model, found[1].model) == ("model", "-")


@pytest.mark.parametrize(
    "given", [{"max-drop": None}, {"gate": ""}, {"epochs": True}, {"out": "x"}, {"model": "x"}]
)
def test_a_recipe_has_no_empty_and_no_strange_key(given: dict[str, Any]) -> None:
    with pytest.raises(KdcliError, match=f"^recipe 'recipe.yaml', stage 1: .*{next(iter(given))}"):
        steps({"prune": given})


def test_what_devices_students_and_ranks_are_called() -> None:
    for device in ("auto", "cpu", "cuda", "cuda:0", "cuda:11", "mps"):
        assert Common(device=device).device == device
    for device in ("gpu", "cuda:", "cuda:x", "cpu:0", "CPU", ""):
        with pytest.raises(OptionError, match="unknown device"):
            Common(device=device)
    Path("own").mkdir()
    distill = options.OPTIONS["distill"]
    for student in ("tiny", "medium", "3x192", "static", "cnn-64", "own", "out/student", "minilm"):
        assert read(api.request_of("distill", {"teacher": "a", "student": student}), "student") == student
    with pytest.raises(OptionError, match="did you mean 'small'"):
        distill(teachers="a", student="smal")
    lowrank = options.OPTIONS["lowrank"]
    assert [dict(lowrank(rank=rank))["rank"] for rank in ("1", 64, "evbmf")] == [1, 64, "evbmf"]
    for rank in ("evbf", 1.5, "1.5", ""):
        with pytest.raises(OptionError, match="is neither a whole number nor evbmf"):
            lowrank(rank=rank)


def test_pairs_keep_the_last_of_a_key_and_equal_signs_in_values() -> None:
    assert dict(Common(settings=["a=1", "b = x=y", "a=2", "c="]).settings) == {"a": "2", "b": "x=y", "c": ""}
    for wrong in ("a", "=1", " =1"):
        with pytest.raises(OptionError, match="KEY=VALUE"):
            Common(settings=[wrong])
    for wrong in ("crd=-0.1", "crd=nan", "crd=x", "crd"):
        with pytest.raises(OptionError, match=r"^weights: '"):
            options.OPTIONS["distill"](teachers="a", student="tiny", weights=[wrong])
