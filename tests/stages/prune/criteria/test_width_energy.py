"""Scores, layer norms and readers against least squares by NumPy; the limit of no cut; what the refit is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.families import stack
from kdcli.stages.prune.criteria import layer_kl, width_energy
from kdcli.stages.prune.criteria.width_energy import Config
from kdcli.stages.prune.criterion import WidthJob
from kdcli.tasks.classification import CLASSIFICATION
from tests import tiny


def batches(made, count: int = 8, extra: int = 0):
    found = []
    for seed in range(count):
        given = {
            k: torch.nn.functional.pad(v, (0, extra), value=made.pad_id if k == "input_ids" else 0)
            for k, v in tiny.batch(made.model_type, rows=6, seed=seed).items()
        }
        found.append((given, torch.zeros(6, dtype=torch.long)))
    return found


def narrowed(family: str = "bert", keep: int = 24, extra: int = 0, seed: int = 0, **config):
    made = tiny.checkpoint(family, seed=seed)
    with torch.no_grad():  # some features are louder than others, as in trained models
        for i, norm in enumerate(m for m in made.model.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.weight.copy_(torch.linspace(0.2, 2, 32).roll(i))
    job = WidthJob(made.model, made.family, keep, batches(made, extra=extra))
    return made, width_energy.narrow(job, Config(**config))


def activations(made) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and outputs (N, D) of every layer norm of the stream at real tokens, by hooks of our own."""
    base = made.model.base_model
    norms = [base.embeddings.LayerNorm]
    for layer in stack.encoder_layers(made.model, made.family):
        norms += [layer.attention_norm, layer.ffn_norm]
    seen: list[tuple[list, list]] = [([], []) for _ in norms]
    mask = None
    hooks = []
    for number, norm in enumerate(norms):

        def hook(_, args, output, number=number):
            at = mask if number < len(norms) - 1 else (slice(None), 0)
            seen[number][0].append(args[0][at].double().numpy())
            seen[number][1].append(output[at].double().numpy())

        hooks.append(norm.register_forward_hook(hook))
    with torch.no_grad():
        for given, _ in batches(made):
            mask = given["attention_mask"].bool()
            made.model(**given)
    for one in hooks:
        one.remove()
    return [(np.concatenate(x), np.concatenate(y)) for x, y in seen]


def dense():
    made = tiny.checkpoint()
    with torch.no_grad():
        for i, norm in enumerate(m for m in made.model.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.weight.copy_(torch.linspace(0.2, 2, 32).roll(i))
    return made


def test_the_loudest_features_stay() -> None:
    _, found = narrowed()
    made = dense()
    norms = [m for m in made.model.modules() if isinstance(m, torch.nn.LayerNorm)]
    scores = np.zeros(32)
    for (_, y), norm in zip(activations(made), norms, strict=True):
        energy = ((y - norm.bias.detach().double().numpy()) ** 2).mean(0)
        scores += energy / energy.sum()
    assert found.keep == sorted(np.argsort(-scores)[:24])
    assert found.detail["energy_kept"] == pytest.approx(np.sort(scores)[8:].sum() / scores.sum())


def test_norms_and_readers_are_the_least_squares_fits() -> None:
    """The reference solves each fit by lstsq on the raw rows; float32 activations leave 1e-4."""
    made, found = narrowed(ridge=0.0)
    plain = dense()
    kept, gone = found.keep, [i for i in range(32) if i not in found.keep]
    seen = activations(plain)
    layers, new = (stack.encoder_layers(m.model, m.family) for m in (plain, made))
    # The norm after the first attention, and the feed-forward layer that reads it.
    x, y = seen[1]
    part = x[:, kept]
    normed = (part - part.mean(1, keepdims=True)) / np.sqrt(part.var(1, keepdims=True) + 1e-12)
    for i, feature in enumerate(kept):
        design = np.stack([normed[:, i], np.ones(len(x))], 1)
        gamma, beta = np.linalg.lstsq(design, y[:, feature], rcond=None)[0]
        assert new[0].attention_norm.weight[i].item() == pytest.approx(gamma, abs=1e-4)
        assert new[0].attention_norm.bias[i].item() == pytest.approx(beta, abs=1e-4)
    design = np.concatenate([y[:, kept], np.ones((len(y), 1))], 1)
    guess = np.linalg.lstsq(design, y[:, gone], rcond=None)[0]
    weight = layers[0].ffn_in.weight.detach().double().numpy()
    expected = weight[:, kept] + weight[:, gone] @ guess[:-1].T
    bias = layers[0].ffn_in.bias.detach().double().numpy() + weight[:, gone] @ guess[-1]
    assert np.allclose(new[0].ffn_in.weight.detach().numpy(), expected, atol=1e-4)
    assert np.allclose(new[0].ffn_in.bias.detach().numpy(), bias, atol=1e-4)
    # The head reads first tokens alone: with fewer rows than features the ridge decides, here the shape.
    assert stack.reader(made.model, made.family).in_features == 24


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keeping_all_features_changes_nothing(family: str) -> None:
    made, found = narrowed(family, keep=32)
    plain = tiny.checkpoint(family)
    with torch.no_grad():
        for i, norm in enumerate(m for m in plain.model.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.weight.copy_(torch.linspace(0.2, 2, 32).roll(i))
        inputs = tiny.batch(family)
        assert torch.equal(made.model(**inputs).logits, plain.model(**inputs).logits)
    assert found.keep == list(range(32))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_refit_answers_more_like_the_dense_model(family: str) -> None:
    """What it is for: less divergence from the dense model than the bare cut, over random models."""
    ours, bare = [], []
    for seed in range(4):
        plain = tiny.checkpoint(family, seed=seed)
        with torch.no_grad():
            for i, norm in enumerate(m for m in plain.model.modules() if isinstance(m, torch.nn.LayerNorm)):
                norm.weight.copy_(torch.linspace(0.2, 2, 32).roll(i))
        rows = batches(plain)
        expected = layer_kl.answers(plain.model, rows)
        for refit, found in ((True, ours), (False, bare)):
            made, _ = narrowed(family, seed=seed, refit=refit)
            found.append(layer_kl.divergence(CLASSIFICATION, expected, layer_kl.answers(made.model, rows)))
    assert np.mean(ours) < np.mean(bare)


def test_padding_changes_nothing() -> None:
    (one, first), (two, second) = narrowed(), narrowed(extra=6)
    assert first.keep == second.keep
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        # float32 activations of a wider batch, through a regression of condition number up to 1e4.
        assert torch.allclose(a, b, atol=1e-3)


def test_emptied_and_factorised_layers_are_narrowed_too() -> None:
    from kdcli.models import transforms
    from kdcli.models.transforms import Cut

    made = tiny.checkpoint()
    transforms.apply(made.model, Cut(heads={0: []}, neurons={1: []}))
    name = "bert.encoder.layer.0.intermediate.dense"
    linear = made.model.get_submodule(name)
    u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)  # type: ignore[union-attr, operator]
    pair = transforms.factorise(made.model, name, len(s))
    with torch.no_grad():
        pair.second.weight.copy_(u * s)
        pair.first.weight.copy_(v)
        pair.second.bias.copy_(linear.bias)  # type: ignore[arg-type]
    whole = tiny.checkpoint()
    transforms.apply(whole.model, Cut(heads={0: []}, neurons={1: []}))
    for one in (made, whole):
        width_energy.narrow(WidthJob(one.model, one.family, 24, batches(one)), Config())
    with torch.no_grad():
        inputs = tiny.batch()
        # The factors multiply out to the matrix; the fits are linear in it.
        assert torch.allclose(made.model(**inputs).logits, whole.model(**inputs).logits, atol=1e-3)
